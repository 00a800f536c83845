"""Running the benchmarks: every shape, every provider, the check before the clock, within a budget of time."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from . import machine, timing
from .providers import OURS, Provider, UnavailableError, providers
from .shapes import DIRECTIONS, Direction, LossShape, Shape
from .workloads import Case, Forward, WrongError, make

CPU_ELEMENTS = 1 << 20  # elements of the main input on a CPU, where the full shapes take minutes a call


@dataclasses.dataclass
class Result:
    """One provider at one shape, dtype and direction.

    Attributes:
        op, shape, sizes, dtype, direction, provider: What was measured.
        status: ``"ok"``, ``"wrong"`` (failed the check and was not timed) or ``"skipped"``.
        reason: Why it is not ok, or which part of the op it computes.
        peer: Whether it computes the whole op and is not ours.
        error: Largest error over the allowed one.
        time: The quantiles, None where not timed.
        bytes: Fewest bytes that the op must move.
        bandwidth: ``bytes`` over the median, bytes per second.
        of_copy: ``bandwidth`` over that of a copy in the same run.
        peak_memory: Bytes of GPU memory beyond the inputs.
    """

    op: str
    shape: str
    sizes: str
    dtype: str
    direction: str
    provider: str
    status: str
    reason: str = ""
    peer: bool = False
    error: float | None = None
    time: timing.Timing | None = None
    bytes: int = 0
    bandwidth: float = 0.0
    of_copy: float = 0.0
    peak_memory: int | None = None


@dataclasses.dataclass
class Report:
    """Results and the circumstances they were got under."""

    machine: dict[str, object]
    copy_bandwidth: float
    results: list[Result]
    left_out: list[str]
    method: str = timing.METHOD

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


def calls_of(case: Case, forward: Forward) -> dict[Direction, timing.Call]:
    """What is timed: the forward pass without a graph, the backward pass alone, and both together."""

    def without_graph() -> object:
        with torch.no_grad():
            return forward()

    outputs = forward()
    return {
        "forward": without_graph,
        "backward": lambda: case.gradients(outputs, retain=True),
        "both": lambda: case.gradients(forward()),
    }


def run(
    shapes: Sequence[Shape],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    directions: Sequence[Direction] = DIRECTIONS,
    chosen: Callable[[str], Iterable[Provider]] = providers,
    budget: float = 600.0,
    seconds: float = 0.3,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Measure every provider at every shape and dtype.

    Args:
        shapes: The shapes, most important first; what the budget does not reach is listed in the report.
        dtypes: The dtypes, most important first.
        device: Where to run. On a GPU, a stream of its own is made current, or nothing could be captured.
        directions: Which passes.
        chosen: The providers of an op.
        budget: Seconds of wall time; no shape is begun after it.
        seconds: Time to spend on one provider and direction.
        progress: Is told what is being measured.
    """
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))
    start = time.monotonic()
    facts = machine.describe(device)
    copy = timing.copy_bandwidth(device)
    report = Report(facts, copy, [], [])
    for shape, dtype in in_order(shapes, dtypes):
        title = f"{shape.op} {shape.name} {shape.sizes} {name_of(dtype)}"
        if time.monotonic() - start > budget:
            report.left_out.append(f"{title}: the budget of {budget:g} s was spent")
            continue
        progress(title)
        try:
            report.results += _run_case(make(shape, dtype, device), directions, chosen(shape.op), copy, seconds)
        except torch.OutOfMemoryError:
            report.left_out.append(f"{title}: not enough memory for its inputs and the float64 results")
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    facts["load_after"] = machine.load()
    return report


def in_order(shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> list[tuple[Shape, torch.dtype]]:
    """All pairs, the most important first. The loss is given its logits in float32 also where the model computes in half precision."""
    loss_first = sorted(dtypes, key=lambda dtype: dtype != torch.float32)
    return [
        (shape, (loss_first if isinstance(shape, LossShape) else dtypes)[place]) for place in range(len(dtypes)) for shape in shapes
    ]  # fmt: skip


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _run_case(case: Case, directions: Sequence[Direction], chosen: Iterable[Provider], copy: float, seconds: float) -> list[Result]:
    torch._dynamo.reset()  # compiled for this shape alone, and never past the limit of recompilations
    results: list[Result] = []
    calls: dict[str, dict[Direction, timing.Call]] = {}
    for provider in chosen:
        blank = functools.partial(_result, case, provider)
        try:
            calls[provider.name], error = _prepare(case, provider)
        except UnavailableError as reason:
            results += [blank(direction, status="skipped", reason=str(reason)) for direction in directions]
        except WrongError as reason:
            results += [blank(direction, status="wrong", reason=str(reason)) for direction in directions]
        except torch.OutOfMemoryError:
            results += [blank(direction, status="skipped", reason="out of memory") for direction in directions]
        else:
            results += [blank(direction, status="ok", reason=provider.part, error=error) for direction in directions]
    for direction in directions:
        running = {name: by_direction[direction] for name, by_direction in calls.items()}
        timings = timing.measure(running, case.device, seconds)
        for result in results:
            if result.direction == direction and result.provider in timings:
                _fill(result, timings[result.provider], case, direction, copy, running[result.provider])
    return results


def _prepare(case: Case, provider: Provider) -> tuple[dict[Direction, timing.Call], float | None]:
    """Build a provider, check it, and run it once in every direction.

    A peer's failure, of whatever kind, is a line in the table and not the end of the run; ours is not caught.
    """
    try:
        forward, error = provider.build(case), None
        if provider.whole:
            error = case.check(forward)
        else:
            case = dataclasses.replace(case, differentiated="divergence", incoming=torch.ones((), device=case.device))
        calls = calls_of(case, forward)
        for call in calls.values():
            call()
    except (UnavailableError, WrongError, torch.OutOfMemoryError):
        raise
    except Exception as failure:
        if provider.name == OURS:
            raise
        raise UnavailableError(f"{type(failure).__name__}: {(str(failure).strip() or '?').splitlines()[0]}") from failure
    return calls, error


def _result(case: Case, provider: Provider, direction: Direction, *, status: str, reason: str, error: float | None = None) -> Result:
    shape = case.shape
    return Result(
        shape.op, shape.name, shape.sizes, name_of(case.dtype), direction, provider.name, status, reason, provider.peer, error
    )  # fmt: skip


def _fill(result: Result, time_taken: timing.Timing, case: Case, direction: Direction, copy: float, call: timing.Call) -> None:
    result.time = time_taken
    result.bytes = case.shape.traffic(direction, case.dtype.itemsize)
    result.bandwidth = result.bytes / time_taken.p50
    result.of_copy = result.bandwidth / copy
    result.peak_memory = timing.peak_memory(call, case.device)
