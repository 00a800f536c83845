"""Where a loader's work on a device is queued: on the CPU nothing, on a GPU (a fake one here) a stream of its own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from amd_fast.data.lane import Lane


def test_on_the_cpu_there_is_none() -> None:
    lane = Lane("cpu")
    with lane.entered():
        tensor = torch.ones(2)
    lane.wait()
    lane.hand_over([tensor])
    assert lane.device == torch.device("cpu")
    assert lane.gpu is None


def test_work_on_a_gpu_waits_for_nothing_but_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is settled once; nobody waits for the stream that training queues on, and that one waits without its thread."""
    log: list[Any] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def synchronize(self) -> None:
            log.append(("thread waits for", self))

        def wait_stream(self, other: Any) -> None:
            log.append((self, "waits for", other))

    class Made:
        def record_stream(self, stream: Any) -> None:
            log.append(("kept for", stream))

    @contextmanager
    def entered(stream: Any):
        log.append(("in", stream))
        yield

    training = Stream(torch.device("cuda:3"))
    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.stream", entered)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: training)
    lane = Lane("cuda")
    assert (lane.device, lane.gpu) == (torch.device("cuda:3"), 3)
    assert Lane("cuda:1").gpu == 1
    with lane.entered():
        log.append("work")
    lane.wait()
    lane.hand_over([Made()])
    own = lane._stream
    assert own.device == lane.device
    assert log == [("in", own), "work", ("thread waits for", own), (training, "waits for", own), ("kept for", training)]


@pytest.mark.gpu
def test_a_busy_default_stream_holds_nothing_up() -> None:
    """Copies finish while a long kernel runs on the stream that training would use."""
    lane = Lane("cuda")

    def work() -> torch.Tensor:
        with lane.entered():
            tensor = torch.ones(1000).to(lane.device) * 2
        lane.wait()
        return tensor

    work()  # a kernel is loaded at its first launch, which waits for those that run
    torch.cuda._sleep(1 << 31)
    busy = torch.cuda.Event()
    busy.record()
    tensor = work()
    assert not busy.query()
    lane.hand_over([tensor])
    assert float(tensor.sum()) == 2000
