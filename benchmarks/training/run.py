"""The measurement: every contender's first step is checked, then all take turns, within a budget of time."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amd_fast.training.batches import TrainBatch

from .. import machine, timing
from ..recipe import Recipe
from .contenders import PEER, SETTINGS, Ours, Outcome, Peer, Step, configure, fixed_batch, outcome, unread_manifest
from .gate import WrongStepError, allowed_error, check, unit_roundoff

METHOD = (
    "A step: one fixed batch of noise on the device, all loss terms, backward, clipping, AdamW. The peer and ours start from the same "
    "weights; loss and gradient norm of everyone's first step are compared with the peer's before any clock starts: 'allowed' is four "
    "times the largest change seen when the peer's weights and pixels are changed at random by the unit roundoff of the contender's "
    "precision. Contenders with one line of settings differ from 'amd_fast' in these alone. 'ratio' is the peer's median over this one. "
    "'peak_memory': bytes of GPU memory that a step holds beyond weights and optimiser state. 'fed': clips per second of training from "
    "video files on the same cores; both count whole rounds of the batches that they read at the same time, after a first round that does "
    "not count. The peer's clips are centre views, ours are cut at random; neither keeps any in memory. "
)
_PREPARING = 0.6  # share of the budget after which no further contender is prepared, so that those at hand are timed


@dataclass
class Result:
    """One contender.

    Attributes:
        name: Of the contender.
        precision: ``"float32"`` or ``"bfloat16"`` mixed.
        status: ``"ok"``, ``"wrong"`` (failed the check and was not timed), ``"failed"`` or ``"skipped"``.
        reason: Why it is not ok.
        found, expected, allowed: Loss and gradient norm of the first step, those of the peer, and by how much they may differ.
        time: The quantiles of a step, None where not timed.
        clips_per_second: At the median.
        ratio: The peer's median over this one.
        peak_memory: Bytes of GPU memory that a step holds beyond weights and optimiser state, None on a CPU.
    """

    name: str
    precision: str = ""
    status: str = "ok"
    reason: str = ""
    found: Outcome | None = None
    expected: Outcome | None = None
    allowed: Outcome | None = None
    time: timing.Timing | None = None
    clips_per_second: float | None = None
    ratio: float | None = None
    peak_memory: int | None = None


@dataclass
class Fed:
    """Training from video files: clips per second, reading them included.

    Attributes:
        name: Of the contender.
        reads: What reads its clips.
        status, reason: As of a result.
        clips_per_second: Over all steps timed.
        steps: How many these are.
        ratio: Its clips per second over the peer's.
    """

    name: str
    reads: str = ""
    status: str = "ok"
    reason: str = ""
    clips_per_second: float | None = None
    steps: int = 0
    ratio: float | None = None


@dataclass
class Report:
    """Results and the circumstances they were got under."""

    machine: dict[str, object]
    recipe: Recipe
    results: list[Result] = dataclasses.field(default_factory=list)
    fed: list[Fed] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    method: str = METHOD + timing.METHOD

    def to_json(self) -> dict[str, Any]:
        """Plain data; outcomes by name."""
        content = dataclasses.asdict(self)
        for row, result in zip(content["results"], self.results, strict=True):
            row |= {name: value._asdict() for name in ("found", "expected", "allowed") if (value := getattr(result, name))}
        return content

    @property
    def good(self) -> bool:
        """Whether nothing was wrong and nothing failed; what had no room or no time does not count."""
        return all(row.status in ("ok", "skipped") for row in self.rows)

    @property
    def rows(self) -> list[Result | Fed]:
        """Of both kinds."""
        return [*self.results, *self.fed]


def measure(
    recipe: Recipe,
    device: torch.device,
    *,
    names: Sequence[str] = tuple(SETTINGS),
    budget: float = 300.0,
    seconds: float = 5.0,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Checks and times the peer and ours.

    Args:
        recipe: What is trained.
        device: Where.
        names: Of ours, see ``SETTINGS``.
        budget: Seconds of wall time; what is not begun within it is listed in the report.
        seconds: Time to spend on the steps of each.
        progress: Is told what is being done.
    """
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32  # PyTorch's default, which the peer keeps
    report = Report(machine.describe(device) | {"decoders": machine.decoders(), "float32 convolutions in TF32": tf32}, recipe)
    started = time.monotonic()
    with unread_manifest(recipe) as manifest, ExitStack() as held:
        batch = fixed_batch(recipe, manifest, device)
        try:
            progress(f"checking {PEER}")
            bar = _Bar(recipe, manifest, device, batch)
        except torch.OutOfMemoryError:
            report.left_out.append(f"everything: {PEER} does not fit into memory, and so there is nothing to check against")
            return report
        report.results.append(Result(PEER, "float32", found=bar.expected))
        steps: dict[str, Step] = {PEER: bar.peer}
        for name in names:
            if time.monotonic() - started > _PREPARING * budget:
                report.left_out.append(f"{name}: the budget of {budget:g} s was spent on what comes before it")
                continue
            progress(f"checking {name}")
            result = Result(name)
            report.results.append(result)
            if (ours := _checked(result, bar, held)) is not None:
                steps[name] = ours
        progress(f"timing {', '.join(steps)}")
        _time(report, steps, bar, seconds)
    return report


class _Bar:
    """The peer, what its first step says, and how far others' may be from it."""

    def __init__(self, recipe: Recipe, manifest: Path, device: torch.device, batch: TrainBatch) -> None:
        self.recipe, self.manifest, self.device, self.batch = recipe, manifest, device, batch
        self.peer = Peer(configure(recipe, manifest, device, impl="reference"), device)
        self.weights = {name: value.clone() for name, value in self.peer.objective.state_dict().items()}
        self._allowed: dict[float, Outcome] = {}
        units = [unit_roundoff(None, device), unit_roundoff(torch.bfloat16, device)]
        self._allowed = {unit: allowed_error(self.peer, batch, unit) for unit in units}
        self.peer.objective.load_state_dict(self.weights)
        self.expected = outcome(self.peer, batch, device)

    def judge(self, result: Result, ours: Ours) -> None:
        """Takes the first step from the peer's first weights, and checks it.

        Raises:
            WrongStepError: it is not the peer's.
        """
        precision, result.expected = ours.trainer.precision, self.expected
        result.precision = "float32" if precision is None else str(precision).removeprefix("torch.")
        result.allowed = self._allowed[unit_roundoff(precision, self.device)]
        ours.objective.load_state_dict(self.weights)
        result.found = outcome(ours, self.batch, self.device)
        check(result.found, self.expected, result.allowed)


def _checked(result: Result, bar: _Bar, held: ExitStack) -> Ours | None:
    """Makes and checks one of ours; None where it cannot be timed, which a line of the report says: the others go on."""
    try:
        ours = held.enter_context(closing(Ours(configure(bar.recipe, bar.manifest, bar.device, **SETTINGS[result.name]))))
        bar.judge(result, ours)
    except WrongStepError as error:
        result.status, result.reason = "wrong", str(error)
    except torch.OutOfMemoryError:
        result.status, result.reason = "skipped", "out of memory"
    except Exception as error:
        result.status, result.reason = "failed", f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
    else:
        return ours
    return None


def _time(report: Report, steps: dict[str, Step], bar: _Bar, seconds: float) -> None:
    """Times all steps in turns; fills in the results."""
    calls = {name: _call(step, bar.batch) for name, step in steps.items()}
    timings = timing.measure(calls, bar.device, seconds)
    for result in report.results:
        if result.name in timings:
            result.time = timings[result.name]
            result.clips_per_second = report.recipe.clips / result.time.p50
            result.ratio = timings[PEER].p50 / result.time.p50
            result.peak_memory = _peak_memory(steps[result.name], calls[result.name], bar.device)
    report.machine["load_after"] = machine.load()


def _call(step: Step, batch: TrainBatch) -> Callable[[], Tensor]:
    return lambda: step(batch)


def _peak_memory(step: Any, call: Callable[[], Tensor], device: torch.device) -> int | None:
    step.objective.zero_grad(set_to_none=True)  # or the last step's gradients would count as held before
    return timing.peak_memory(call, device)


def free(device: torch.device) -> None:
    """Gives memory of contenders that are gone back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
