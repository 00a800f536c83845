"""Profiles of training: where a step's time goes, from traces made by hand and from real runs with a known slow part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amd_fast.data.synth.writing import synthesize
from amd_fast.errors import ConfigError
from amd_fast.training.config import DataOptions, EpisodeOptions, ModelOptions, OptimiserOptions, TrainConfig
from amd_fast.training.phases import BACKWARD, COMMUNICATION, COPY, FORWARD, OPTIMISER, STEP, WAIT_FOR_DATA, WAIT_FOR_DEVICE
from amd_fast.training.profile import profile_training
from amd_fast.training.timeline import LAUNCHING, OTHER, PARTS, break_down, what_bounds

MAIN = 1


def span(cat: str, name: str, start: float, stop: float, *, tid: int = MAIN, correlation: int | None = None) -> dict[str, Any]:
    """An event of a trace; times in milliseconds."""
    arguments = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": start * 1e3, "dur": (stop - start) * 1e3, "tid": tid, "args": arguments}


def ranges(**phases: tuple[float, float]) -> list[dict[str, Any]]:
    return [span("user_annotation", f"amd_fast: {name.replace('_', ' ')}", *times) for name, times in phases.items()]


def milliseconds(events: list[dict[str, Any]]) -> dict[str, float]:
    parts, _ = break_down(events)
    return {name: round(seconds * 1e3, 6) for name, seconds in parts.items() if seconds}


def test_on_a_cpu_phases_are_the_main_threads_and_only_uncovered_exchange_is_communication() -> None:
    events = [
        *ranges(step=(0, 100), wait_for_data=(0, 10), forward=(10, 30), backward=(30, 80), optimiser=(85, 95)),
        span("cpu_op", "aten::conv2d", 12, 30),
        span("cpu_op", "aten::convolution_backward", 30, 60),
        span("cpu_op", "aten::convolution_backward", 62, 70),
        span("cpu_op", "aten::mm", 70, 80, tid=2),  # another thread's work does not hold up the main one
        span("user_annotation", "gloo:all_reduce", 50, 78, tid=3),
        {"ph": "i", "name": "an instant", "ts": 5},
    ]
    assert milliseconds(events) == {WAIT_FOR_DATA: 10, FORWARD: 20, BACKWARD: 40, COMMUNICATION: 10, OPTIMISER: 10, OTHER: 10}


def test_on_a_gpu_the_kernel_that_runs_decides_and_idling_is_put_down_to_what_the_host_does() -> None:
    events = [
        *ranges(step=(0, 100), wait_for_data=(0, 5), copy=(5, 6), forward=(6, 10), backward=(10, 14), optimiser=(14, 15)),
        *ranges(wait_for_the_device=(15, 100)),
        span("cuda_runtime", "cudaMemcpyAsync", 5, 6, correlation=1),
        span("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 6, 16, tid=9, correlation=1),
        span("cuda_runtime", "cudaLaunchKernel", 7, 8, correlation=2),
        span("kernel", "conv", 16, 40, tid=8, correlation=2),
        span("cuda_runtime", "cudaLaunchKernel", 11, 12, tid=2, correlation=3),  # by autograd's own thread
        span("kernel", "conv_backward", 40, 70, tid=8, correlation=3),
        span("kernel", "ncclDevKernel_AllReduce", 60, 80, tid=10, correlation=4),
        span("cuda_runtime", "cudaLaunchKernel", 14, 15, correlation=5),
        span("kernel", "adam", 80, 90, tid=8, correlation=5),
    ]
    expected = {WAIT_FOR_DATA: 5, LAUNCHING: 1, COPY: 10, FORWARD: 24, BACKWARD: 30, COMMUNICATION: 10, OPTIMISER: 10, OTHER: 10}
    assert milliseconds(events) == expected


def test_parts_sum_up_to_the_steps_and_nothing_outside_of_them_counts() -> None:
    events = [
        *ranges(step=(10, 30), forward=(12, 20)),
        *ranges(step=(40, 45)),
        *ranges(backward=(31, 39)),
        span("user_annotation", "gloo:all_reduce", 0, 100, tid=3),
    ]
    parts, steps = break_down(events)
    assert steps == 2
    assert sum(parts.values()) == pytest.approx(0.025)
    assert parts[BACKWARD] == 0


@pytest.mark.parametrize(
    ("largest", "said"),
    [
        (WAIT_FOR_DATA, "reading clips"),
        (BACKWARD, "computation"),
        (COPY, "copying"),
        (COMMUNICATION, "communication"),
        (LAUNCHING, "host"),
        (OTHER, "outside"),
    ],
)
def test_the_sentence_names_the_largest_part(largest: str, said: str) -> None:
    sentence = what_bounds({name: 5.0 if name == largest else 0.5 for name in PARTS})
    assert said in sentence and "%" in sentence


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("synth")
    synthesize(folder, classes=10, clips_per_class=3, size=48, workers=1, progress=False)
    return TrainConfig(
        output=str(folder / "run"),
        threads=1,
        device="cpu",
        precision="fp32",
        model=ModelOptions(options={"dim": 32, "backbone_options": {"base": 8}}),
        data=DataOptions(manifest=str(folder / "manifest.csv"), size=32, frames=4, workers=1, cache="ram"),
        episode=EpisodeOptions(ways=3, queries=1, per_step=2),
        optimiser=OptimiserOptions(steps=100),
    )


@pytest.mark.parametrize(("slow", "said"), [(WAIT_FOR_DATA, "reading clips"), (OPTIMISER, "computation")])
def test_a_slow_part_is_found(slow: str, said: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from amd_fast.training import batches, optimisation

    pause = 0.25
    if slow == WAIT_FOR_DATA:
        stream = batches.EpisodeBatches.stream

        def late(*arguments: Any) -> Iterator[Any]:
            for batch in stream(*arguments):
                time.sleep(pause)
                yield batch

        monkeypatch.setattr(batches.EpisodeBatches, "stream", late)
    else:
        step = optimisation.torch.optim.AdamW.step
        monkeypatch.setattr(optimisation.torch.optim.AdamW, "step", lambda self: (time.sleep(pause), step(self)))
    (found,) = profile_training(config, 3, progress=False)
    assert pause < found.parts[slow] < found.seconds
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert all(found.parts[name] > 0 for name in (WAIT_FOR_DATA, COPY, FORWARD, BACKWARD, OPTIMISER))
    summary = json.loads((Path(config.output) / "profile" / "profile.json").read_text())
    assert said in summary["bound"] and summary["ranks"][0]["steps"] == 3
    events = json.loads((Path(config.output) / "profile" / "rank-0.trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == f"amd_fast: {STEP}" and event.get("cat") == "user_annotation" for event in events) == 3
    assert any(event.get("name") == f"amd_fast: {WAIT_FOR_DEVICE}" for event in events)
    assert not (Path(config.output) / "checkpoints").exists()


@pytest.mark.slow
def test_two_processes_show_their_communication(config: TrainConfig, tmp_path: Path, repository: Path) -> None:
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "amd_fast.cli", "train", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "run"), "--profile", "3"]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, *train], env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The step is bound by") == 1, "rank 0 alone talks"
    summary = json.loads((tmp_path / "run" / "profile" / "profile.json").read_text())
    assert [rank["rank"] for rank in summary["ranks"]] == [0, 1]
    assert all(rank["parts"][COMMUNICATION] > 0 for rank in summary["ranks"])
    assert (tmp_path / "run" / "profile" / "rank-1.trace.json").is_file()


def test_no_steps_are_refused(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="at least one step"):
        profile_training(config, 0)
