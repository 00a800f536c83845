"""The measurement: videos are made, then one process per number of cores does its tasks, within a budget of time."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amd_fast.resources import usable_cores

from .. import machine
from ..recipe import Recipe
from .clips import Video, synthesise
from .tasks import Job, Task

METHOD = (
    "'reads': clips per second of the training loader, decoded, cut at random, with flow, without a network. 'steps': the share of a "
    "training step that 'waiting' for data takes, by torch.profiler. Nothing is kept in memory between steps. Each number of cores is a "
    "process of its own, held to so many of the system's processors from its start, threads of all libraries included. One synthetic "
    "video per kind, under as many names as a step has clips; encoders as they are by default but for the distance of keyframes."
)
GRACE = 15.0  # seconds that a process may take longer than its share before it is ended
_ENCODING = 0.3  # share of the budget after which no further kind of video is made


@dataclass
class Report:
    """Results and the circumstances they were got under.

    Attributes:
        machine, recipe, length: Where, what is trained, and seconds of a video.
        videos: What was made: kind, bytes, frames.
        rows: What the tasks found, one mapping each, with ``cores``; ``failed`` says why one found nothing.
        left_out: What was not measured, and why.
    """

    machine: dict[str, object]
    recipe: Recipe
    length: float
    videos: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    method: str = METHOD

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    @property
    def good(self) -> bool:
        """Whether nothing failed; what had no time does not count."""
        return not any("failed" in row for row in self.rows)


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        videos: Kinds, the most important first.
        cores: Numbers of cores.
        length: Of a video, seconds.
        seconds: Least time to count clips for.
        steps: Training steps that are profiled.
        budget: Seconds of wall time.
    """

    videos: Sequence[Video]
    cores: Sequence[int]
    length: float = 10.0
    seconds: float = 3.0
    steps: int = 4
    budget: float = 900.0


def measure(
    recipe: Recipe,
    plan: Plan,
    folder: Path,
    *,
    progress: Callable[[str], None] = lambda line: None,
    keep: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Makes the videos in ``folder`` and measures; what the budget does not reach is listed in the report.

    ``keep`` is given the report after every number of cores: a run that is ended has not worked in vain.
    """
    device = machine.default_device()
    report = Report(machine.describe(device) | {"decoders": machine.decoders()}, recipe, plan.length)
    started = time.monotonic()
    tasks = _make_videos(report, plan, folder, started, progress)
    cores = _possible(report, plan.cores)
    for place, count in enumerate(cores):
        share = (plan.budget - (time.monotonic() - started)) / (len(cores) - place)
        progress(f"{count} {'core' if count == 1 else 'cores'}: {max(share, 0.0):.0f} s")
        job = Job(tasks, recipe, plan.seconds, plan.steps, share, str(folder / f"{count}.jsonl"))
        reason = _run(job, count, folder) if share > 0 else ""
        _collect(report, job, count, reason)
        keep(report)
    report.machine["load_after"] = machine.load()
    return report


def _make_videos(report: Report, plan: Plan, folder: Path, started: float, progress: Callable[[str], None]) -> list[Task]:
    """Tasks over all kinds that could be made: a step on the first, reading all, steps on the others."""
    steps, reads = [], []
    for number, video in enumerate(plan.videos):
        if time.monotonic() - started > _ENCODING * plan.budget:
            report.left_out.append(f"{video.name}: {_ENCODING:.0%} of the budget of {plan.budget:g} s was spent on making videos")
            continue
        progress(f"encoding {video.name}")
        try:
            manifest = synthesise(video, folder / str(number), report.recipe, plan.length)
        except ValueError as error:
            report.left_out.append(f"{video.name}: this FFmpeg has no encoder for it ({error})")
            continue
        size = (folder / str(number) / "0.mp4").stat().st_size
        report.videos.append({"video": video.name, **dataclasses.asdict(video), "bytes": size})
        steps.append(Task("step", video.name, video.codec, str(manifest)))
        reads.append(Task("read", video.name, video.codec, str(manifest)))
    return [*steps[:1], *reads, *steps[1:]]


def _possible(report: Report, wanted: Sequence[int]) -> list[int]:
    """The numbers of cores that this machine has."""
    here = usable_cores()
    can_restrict = hasattr(os, "sched_setaffinity")
    possible = [count for count in wanted if count == here or (count < here and can_restrict)]
    for count in wanted:
        if count not in possible:
            reason = f"this machine has {here}" if count > here else "this system cannot hold a process to fewer than all"
            report.left_out.append(f"{count} cores: {reason}")
    return possible


def _run(job: Job, cores: int, folder: Path) -> str:
    """Runs a job in a process held to some cores; returns why it came to no good end, empty where it did."""
    file = folder / f"{cores}.json"
    file.write_text(job.to_json(), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.feeding.tasks", str(file)]
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        if before is not None:
            os.sched_setaffinity(0, sorted(before)[:cores])  # of this thread, which its child starts with
        process = subprocess.Popen(command, env=machine.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    finally:
        if before is not None:
            os.sched_setaffinity(0, before)
    try:
        _, said = process.communicate(timeout=job.budget + GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return ""
    return "" if process.returncode == 0 else (said.strip() or f"exit status {process.returncode}").splitlines()[-1]


def _collect(report: Report, job: Job, cores: int, reason: str) -> None:
    """Takes a job's lines into the report, and lists the tasks that it did not come to."""
    lines: list[dict[str, Any]] = []
    with suppress(FileNotFoundError):
        lines = [json.loads(line) for line in Path(job.results).read_text(encoding="utf-8").splitlines()]
    report.rows += [{"cores": cores, **line} for line in lines]
    missing = job.tasks[len(lines) :]
    if reason:
        report.rows += [{"cores": cores, "kind": task.kind, "video": task.video, "failed": reason} for task in missing]
    else:
        report.left_out += [f"{task.kind}, {task.video}, cores {cores}: its share of the budget was spent" for task in missing]
