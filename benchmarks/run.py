"""Running the benchmarks: every shape, every provider, the check before the clock, within a budget of time.

Nothing that goes wrong with one provider, ours included, ends the run: it is a line in the report. What has been measured is handed
over after every shape, so that a run that is killed leaves what it had.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from . import machine, timing
from .providers import OURS, Provider, UnavailableError, providers
from .shapes import DIRECTIONS, Direction, LossShape, Shape
from .workloads import Case, Forward, WrongError, make

CPU_ELEMENTS = 1 << 20  # elements of the main input on a CPU, where the full shapes take minutes a call
FAULTS = ("failed", "wrong")

_FIRST: tuple[Direction, ...] = ("both", "forward", "backward")  # of what a failure in the middle of a shape leaves, what matters most
_LAG = 8  # shapes of the first dtype before the first one of the second
_CASE_SECONDS = 40.0  # no provider is begun later than this at one shape: compilers take most of it
_TIMING_SECONDS = 6.0  # of all clocks at one shape; some ten providers share it


@dataclasses.dataclass
class Result:
    """One provider at one shape, dtype and direction.

    Attributes:
        op, shape, sizes, dtype, direction, provider: What was measured.
        status: ``"ok"``, ``"wrong"`` (failed the check and was not timed), ``"failed"`` (raised an error, or had too little memory) or
            ``"skipped"`` (cannot run here).
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
    status: str = "ok"
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
    """Results and the circumstances they were got under.

    Attributes:
        machine: See :func:`benchmarks.machine.describe`.
        copy_bandwidth: Bytes per second of a copy in the same run.
        results: What was measured, or why it was not.
        left_out: What was not begun, and why.
        method: How it was measured.
        running: What was being measured when this was written; empty where the run had ended.
        ended: What earlier processes ended in the middle of, tried last when going on.
        lost: Why nothing more could be measured in this process; empty where it could.
    """

    machine: dict[str, Any]
    copy_bandwidth: float
    results: list[Result]
    left_out: list[str]
    method: str = timing.METHOD
    running: str = ""
    ended: list[str] = dataclasses.field(default_factory=list)
    lost: str = ""

    @property
    def faults(self) -> int:
        """Lines in which ours failed or was wrong."""
        return sum(result.provider.startswith(OURS) and result.status in FAULTS for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """The report that :meth:`to_json` gave."""
        results = [Result(**{**entry, "time": entry["time"] and timing.Timing(**entry["time"])}) for entry in data["results"]]
        return cls(**{**data, "results": results})


class DeviceLostError(Exception):
    """The GPU answers nothing any more, as after an access to memory that is not ours; only another process can go on."""


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
    save: Callable[[Report], object] = lambda report: None,
    earlier: Report | None = None,
) -> Report:
    """Measure every provider at every shape and dtype.

    Args:
        shapes: The shapes, most important first; what the budget does not reach is listed in the report.
        dtypes: The dtypes, most important first.
        device: Where to run. On a GPU, a stream of its own is made current, or nothing could be captured.
        directions: Which passes.
        chosen: The providers of an op.
        budget: Seconds of wall time; no shape is begun after it.
        seconds: Most time to spend on one provider and direction; many providers get less each.
        progress: Is told what is being measured.
        save: Is given the report before and after every shape.
        earlier: A run that ended early, to go on with where it was got under the same circumstances; its shapes are not measured again.
    """
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))
    start = time.monotonic()
    report = begin(device, earlier)
    known = {(_title(result), result.provider) for result in report.results}
    for shape, dtype in sorted(in_order(shapes, dtypes), key=lambda pair: title_of(*pair) in report.ended):
        title = title_of(shape, dtype)
        rest = [provider for provider in chosen(shape.op) if (title, provider.name) not in known]
        if not rest:
            continue
        if report.lost or time.monotonic() - start > budget:
            report.left_out.append(f"{title}: {report.lost or f'the budget of {budget:g} s was spent'}")
            continue
        progress(title)
        report.running = title
        save(report)
        try:
            _measure(shape, dtype, device, report, directions, rest, seconds)
        except DeviceLostError as error:
            report.lost = f"the GPU stopped answering at {title} ({error})"
            # Whoever was not to blame can be measured by another process.
            report.results = [line for line in report.results if line.time or line.status != "ok" or _title(line) != title]
            report.left_out.append(f"{title}: {report.lost}")
    report.running = ""
    report.machine["load_after"] = machine.load()
    save(report)
    return report


def begin(device: torch.device, earlier: Report | None) -> Report:
    """An empty report, or the earlier one where it is of the same code on the same machine."""
    facts = machine.describe(device)
    if earlier is None or any(earlier.machine.get(name) != facts[name] for name in ("device", "commit", "torch", "triton")):
        return Report(facts, timing.copy_bandwidth(device), [], [])
    ended = [*earlier.ended, earlier.running] if earlier.running else earlier.ended
    return dataclasses.replace(earlier, left_out=[], running="", ended=ended, lost="")


def title_of(shape: Shape, dtype: torch.dtype) -> str:
    """A shape and dtype for people."""
    return f"{shape.op} {shape.name} {shape.sizes} {name_of(dtype)}"


def _title(line: Result) -> str:
    return f"{line.op} {line.shape} {line.sizes} {line.dtype}"


def in_order(shapes: Sequence[Shape], dtypes: Sequence[torch.dtype]) -> list[tuple[Shape, torch.dtype]]:
    """All pairs, the most important first: a second dtype follows some shapes later, so that neither waits for all of the other.

    The loss is given its logits in float32 also where the model computes in half precision.
    """
    loss_first = sorted(dtypes, key=lambda dtype: dtype != torch.float32)
    places = itertools.product(range(len(shapes)), range(len(dtypes)))
    return [
        (shapes[place], (loss_first if isinstance(shapes[place], LossShape) else dtypes)[turn])
        for place, turn in sorted(places, key=lambda pair: (pair[0] + _LAG * pair[1], pair[1]))
    ]


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _measure(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    report: Report,
    directions: Sequence[Direction],
    chosen: Iterable[Provider],
    seconds: float,
) -> None:
    """Add the results of every provider at one shape and dtype to the report."""
    torch._dynamo.reset()  # compiled for this shape alone, and never past the limit of recompilations
    try:
        case = make(shape, dtype, device)
        case.bounds  # noqa: B018  # what makes the check fail for want of memory is no fault of the provider that comes first
    except Exception as failure:
        report.left_out.append(f"{title_of(shape, dtype)}: its inputs and float64 results: {_reason(failure)[1]}")
        _recover(device)
        return
    run_case(case, directions, chosen, report, seconds)
    del case
    _recover(device)


def run_case(case: Case, directions: Sequence[Direction], chosen: Iterable[Provider], report: Report, seconds: float) -> None:
    """Check and time every provider on one case; the results are in the report whatever happens on the way."""
    start = time.monotonic()
    calls: dict[str, dict[Direction, timing.Call]] = {}
    lines: dict[str, dict[Direction, Result]] = {}
    for provider in chosen:
        lines[provider.name] = {direction: _line(case, provider, direction) for direction in directions}
        report.results += lines[provider.name].values()
        try:
            calls[provider.name], error = _prepare(case, provider, start + _CASE_SECONDS)
        except Exception as failure:
            _give_up(lines[provider.name].values(), failure, case.device)
        else:
            for line in lines[provider.name].values():
                line.error = error
    seconds = min(seconds, _TIMING_SECONDS / max(1, len(calls) * len(directions)))
    for direction in sorted(directions, key=_FIRST.index):
        _time(case, direction, calls, lines, report.copy_bandwidth, seconds)


def _time(
    case: Case,
    direction: Direction,
    calls: dict[str, dict[Direction, timing.Call]],
    lines: dict[str, dict[Direction, Result]],
    copy: float,
    seconds: float,
) -> None:
    running = {name: by_direction[direction] for name, by_direction in calls.items()}

    def failed(name: str, failure: Exception) -> None:
        """It is out of this direction and of those to come, and what it held makes room for the others."""
        del calls[name], running[name]
        _give_up([line for line in lines[name].values() if line.time is None], failure, case.device)

    for name, taken in timing.measure(running, case.device, seconds, failed).items():
        try:
            _fill(lines[name][direction], taken, case, copy, running[name])
        except Exception as failure:
            failed(name, failure)


def _prepare(case: Case, provider: Provider, end: float) -> tuple[dict[Direction, timing.Call], float | None]:
    """Build a provider, check it, and run it once in every direction; not after the time ``end``."""
    if time.monotonic() > end:
        raise UnavailableError(f"the {_CASE_SECONDS:g} s for a shape were spent")
    forward, error = provider.build(case), None
    if provider.whole:
        error = case.check(forward)
    else:
        case = dataclasses.replace(case, differentiated="divergence", incoming=torch.ones((), device=case.device))
    calls = calls_of(case, forward)
    for call in calls.values():
        call()
    if case.device.type == "cuda":
        torch.cuda.synchronize(case.device)  # an error of this provider must not come up in the next one
    return calls, error


def _line(case: Case, provider: Provider, direction: Direction) -> Result:
    shape = case.shape
    return Result(
        shape.op, shape.name, shape.sizes, name_of(case.dtype), direction, provider.name, reason=provider.part, peer=provider.peer
    )  # fmt: skip


def _give_up(lines: Iterable[Result], failure: Exception, device: torch.device) -> None:
    for line in lines:
        line.status, line.reason = _reason(failure)
    failure.__traceback__ = failure.__context__ = failure.__cause__ = None  # their frames hold tensors
    _recover(device)


def _reason(failure: Exception) -> tuple[str, str]:
    """What an error makes of a result: its status, and why."""
    if isinstance(failure, torch.OutOfMemoryError):
        return "failed", "out of memory"
    message = (str(failure).strip() or "?").splitlines()[0]
    if isinstance(failure, UnavailableError):
        return "skipped", message
    return ("wrong", message) if isinstance(failure, WrongError) else ("failed", f"{type(failure).__name__}: {message}")


def _recover(device: torch.device) -> None:
    """Give unused memory back, so that what one provider or shape took is no reason for the next to fail.

    Raises:
        DeviceLostError: The device answers nothing any more.
    """
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except Exception as error:
            raise DeviceLostError(_reason(error)[1]) from error


def _fill(line: Result, taken: timing.Timing, case: Case, copy: float, call: timing.Call) -> None:
    line.peak_memory = timing.peak_memory(call, case.device)  # first: it can fail, and what has failed has no time
    line.time = taken
    line.bytes = case.shape.traffic(line.direction, case.dtype.itemsize)  # type: ignore[arg-type]
    line.bandwidth = line.bytes / taken.p50
    line.of_copy = line.bandwidth / copy
