"""What is measured on a number of cores, in a process of its own: ``python -m benchmarks.feeding.tasks JOB.json``.

Writes one line of JSON per task into the job's file as soon as it is done, so that a process that is ended has not worked in vain.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from amd_fast.data.decoders import choose_decoder
from amd_fast.training.config import TrainConfig
from amd_fast.training.distributed import World, choose_device
from amd_fast.training.phases import WAIT_FOR_DATA
from amd_fast.training.preparation import open_data
from amd_fast.training.profile import profile_training

from ..recipe import Recipe
from ..throughput import rate

Kind = Literal["step", "read"]


@dataclass(frozen=True)
class Task:
    """One figure: of a training step or of reading alone, on one kind of videos."""

    kind: Kind
    video: str
    codec: str
    manifest: str


@dataclass(frozen=True)
class Job:
    """The tasks of a process, the most important first.

    Attributes:
        tasks: What to measure.
        recipe: What is trained.
        seconds: Least time to count clips for.
        steps: Training steps that are profiled.
        budget: Seconds after which no task is begun.
        results: The file that lines are written to.
    """

    tasks: list[Task]
    recipe: Recipe
    seconds: float
    steps: int
    budget: float
    results: str

    def to_json(self) -> str:
        """For the process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """As :meth:`to_json` wrote it."""
        content = json.loads(text)
        content["tasks"] = [Task(**task) for task in content["tasks"]]
        content["recipe"] = Recipe(**content["recipe"])
        return cls(**content)


def read(config: TrainConfig, recipe: Recipe, seconds: float) -> dict[str, Any]:
    """Clips per second of the training loader, decoded, augmented and with flow, and nothing that waits for the network."""
    device = choose_device(config.device)
    with closing(open_data(config, World(), device)) as data, closing(data.batches.stream(0, sys.maxsize)) as stream:
        found = rate(stream, clips=recipe.clips, at_once=config.data.prefetch, seconds=seconds, device=device)
        if lost := data.batches.loader.lost:
            raise RuntimeError(next(iter(lost.values())))
    return {"clips_per_second": found.clips_per_second, "batches": found.batches}


def step(config: TrainConfig, steps: int) -> dict[str, Any]:
    """Where the time of a training step goes, as ``amd-fast train --profile`` finds it."""
    (found,) = profile_training(config, steps, progress=False)
    waiting = found.parts[WAIT_FOR_DATA] / found.seconds
    return {"waiting": waiting, "step_seconds": found.seconds, "clips_per_second": found.clips_per_second, "parts": found.parts}


def run(job: Job) -> None:
    """Does the tasks of a job until its time is up."""
    started = time.monotonic()
    with open(job.results, "a", encoding="utf-8") as file:
        for task in job.tasks:
            if time.monotonic() - started > job.budget:
                return
            file.write(json.dumps(_done(task, job)) + "\n")
            file.flush()


def _done(task: Task, job: Job) -> dict[str, Any]:
    """A line of the results: what was found, or why nothing was."""
    line: dict[str, Any] = {"kind": task.kind, "video": task.video}
    try:
        # Named, so that what this decoder cannot read is an error here, not a clip that another one reads.
        line["decoder"] = choose_decoder(task.codec, "auto", choose_device("auto")).decoder
        manifest = Path(task.manifest)
        config = job.recipe.config(manifest, manifest.parent / "run", data={"decoder": line["decoder"]})
        return line | (step(config, job.steps) if task.kind == "step" else read(config, job.recipe, job.seconds))
    except Exception as error:
        return line | {"failed": f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"}


if __name__ == "__main__":
    run(Job.from_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
