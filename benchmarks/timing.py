"""Clocks. Providers are timed in turns, round by round, so that a machine that slows down slows all of them down.

On a GPU each call is timed by a pair of events, after a write that leaves nothing of its inputs in the second-level cache. A call
shorter than ``_GRAPH_BELOW`` is captured in a CUDA graph where it can be and replayed: otherwise the clock would show how fast
Python launches kernels. What a caller sees who does not capture is measured besides, as ``call``. On a CPU the wall clock is read
around each call, or around several where one is too short.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], object]

METHOD = (
    "Providers take turns. GPU: CUDA events around single calls, second-level cache overwritten before each, calls under 10 ms "
    "replayed from a CUDA graph where they can be captured ('graph'), else launched from Python ('events'); 'call' is the wall "
    "time per eager call, many in a row. CPU: wall clock around single calls. Quantiles over all calls; seconds."
)
_GRAPH_BELOW = 1e-2  # seconds: far more than Python takes to launch what a call launches
_ROUNDS = 5
_SHORTEST_SAMPLE = 2e-4  # seconds; the wall clock's own cost vanishes in this


@dataclasses.dataclass(frozen=True)
class Timing:
    """Quantiles of the time of a call, in seconds.

    Attributes:
        p20: A fifth of the calls was faster.
        p50: The median.
        p80: A fifth of the calls was slower.
        samples: How many calls were timed.
        method: ``"graph"``, ``"events"`` or ``"wall"``, see the module.
        call: Wall time per eager call on a GPU, None elsewhere.
    """

    p20: float
    p50: float
    p80: float
    samples: int
    method: str
    call: float | None = None


def measure(
    calls: Mapping[str, Call],
    device: torch.device,
    seconds: float = 0.3,
    failed: Callable[[str, Exception], object] | None = None,
    *,
    graphs: bool = True,
) -> dict[str, Timing]:
    """Time each call for about ``seconds``, in turns. The calls must have run before.

    Args:
        calls: The calls by name.
        device: Where they run.
        seconds: Time for each.
        failed: Is told of a call that raises, which is then left out; by default the error is the caller's.
        graphs: Whether a short call may be captured.
    """
    make = functools.partial(_GpuClock, graphs=graphs) if device.type == "cuda" else _CpuClock
    clocks: dict[str, Any] = {}

    timings: dict[str, Timing] = {}

    def start(name: str) -> None:
        clocks[name] = make(calls[name], seconds / _ROUNDS)

    def turn(name: str) -> None:
        clocks[name].round()

    def finish(name: str) -> None:
        timings[name] = clocks[name].timing()

    waiting = list(calls)
    for step in (start, *[turn] * _ROUNDS, finish):
        for name in list(waiting):
            try:
                step(name)
            except Exception as error:
                if failed is None:
                    raise
                waiting.remove(name)
                clocks.pop(name, None)
                failed(name, error)
    return timings


class _CpuClock:
    method = "wall"

    def __init__(self, call: Call, seconds: float) -> None:
        self.call, self.samples = call, []  # type: Call, list[float]
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-9)
        self.inner = max(1, int(_SHORTEST_SAMPLE / once))
        self.count = max(2, min(200, int(seconds / (once * self.inner))))

    def round(self) -> None:
        for _ in range(self.count):
            start = time.perf_counter()
            for _ in range(self.inner):
                self.call()
            self.samples.append((time.perf_counter() - start) / self.inner)

    def timing(self) -> Timing:
        return Timing(*_quantiles(self.samples), len(self.samples), self.method)


class _GpuClock:
    def __init__(self, call: Call, seconds: float, *, graphs: bool = True) -> None:
        self.call, self.samples = call, []  # type: Call, list[float]
        self.replay, self.method, self.graph = call, "events", None
        self.flush = _cache_filler(torch.cuda.current_device())
        once = max(statistics.median(self._sample(3)), 1e-6)
        if graphs and once < _GRAPH_BELOW:
            self.graph = _captured(call)
            if self.graph is not None:
                self.replay, self.method = self.graph.replay, "graph"
                once = max(statistics.median(self._sample(3)), 1e-6)
        self.count = max(3, min(100, int(seconds / (once + 1e-4))))

    def _sample(self, count: int) -> list[float]:
        pairs = []
        for _ in range(count):
            self.flush.zero_()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            self.replay()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs]

    def round(self) -> None:
        self.samples += self._sample(self.count)

    def timing(self) -> Timing:
        count = max(3, self.count)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            self.call()
        torch.cuda.synchronize()
        wall = (time.perf_counter() - start) / count
        return Timing(*_quantiles(self.samples), len(self.samples), self.method, wall)


def _quantiles(samples: list[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


_fillers: dict[int, torch.Tensor] = {}


def _cache_filler(device: int) -> torch.Tensor:
    """A buffer four times the second-level cache; the time to write it also lets Python launch the next call before the GPU needs it."""
    if device not in _fillers:
        size = 4 * max(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0), 16 << 20)
        _fillers[device] = torch.empty(size, dtype=torch.int8, device=f"cuda:{device}")
    return _fillers[device]


def _captured(call: Call) -> Any:
    """The call as a CUDA graph, None where it cannot be captured. Runs on the current stream, which must not be the default one."""
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
        graph.replay()
        torch.cuda.synchronize()
    except Exception:  # it waits for the device, allocates outside of PyTorch, or the like: timed as it is
        torch.cuda.synchronize()
        return None
    return graph


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Most bytes of GPU memory that a call holds beyond what was held before it, None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of copying a tensor far larger than any cache.

    Not captured in a graph: there a copy becomes one of the copy engine, which on an H100 was a fifth slower than the kernel that runs
    otherwise, and no measure of what a kernel can reach.
    """
    size = 1 << (30 if device.type == "cuda" else 27)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2.0 * size / measure({"copy": lambda: target.copy_(source)}, device, 0.5, graphs=False)["copy"].p50
