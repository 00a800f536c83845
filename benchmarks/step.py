"""Where the time of a training step of the demo goes: ``python -m benchmarks.step RESULT.json``.

Synthesises clips as ``amd-fast demo`` does (fewer of them: a step does not care), profiles steps of the demo's configuration as
``amd-fast train --profile`` does, some times in a row, and writes what came out, with the machine and its load before each.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from amd_fast.data.synth.writing import synthesize
from amd_fast.demo import demo_config
from amd_fast.files import write_atomically
from amd_fast.training.profile import profile_training
from amd_fast.training.timeline import what_bounds
from benchmarks.machine import describe, load

CLASSES, CLIPS_PER_CLASS, STEPS, REPEATS = 20, 4, 8, 2


def measure(
    folder: Path, *, classes: int = CLASSES, clips_per_class: int = CLIPS_PER_CLASS, steps: int = STEPS, repeats: int = REPEATS
) -> dict[str, Any]:
    """Clips and runs lie in ``folder``; seconds, clips/s of the whole machine."""
    synthesize(folder / "clips", classes=classes, clips_per_class=clips_per_class, progress=False)
    config = demo_config(folder / "clips" / "manifest.csv", folder / "run", steps=600, seed=0)
    runs = []
    for _ in range(repeats):
        before = load()
        (found,) = profile_training(config, steps, progress=False)
        runs.append(
            {
                "load": before,
                "steps": found.steps,
                "seconds": found.seconds,
                "parts": found.parts,
                "clips_per_second": found.clips_per_second,
                "bound": what_bounds(found.parts),
            }
        )
    settings = config.to_dict()
    settings.pop("output")
    settings["data"].pop("manifest")
    machine = describe(torch.device("cpu"))
    return {"machine": machine, "clips": {"classes": classes, "per_class": clips_per_class}, "config": settings, "runs": runs}


def table(result: dict[str, Any]) -> str:
    """Milliseconds and share of every part in every run, as a Markdown table."""
    runs = result["runs"]

    def row(name: str, cells: list[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    def share(run: dict[str, Any], part: str) -> str:
        return f"{run['parts'][part] * 1e3:.1f} ms, {run['parts'][part] / run['seconds']:.0%}"

    return "\n".join(
        [
            row("part of the step", [f"run {number}" for number in range(1, len(runs) + 1)]),
            row("---", ["---"] * len(runs)).replace(" ", ""),
            *(row(part, [share(run, part) for run in runs]) for part in runs[0]["parts"] if any(run["parts"][part] for run in runs)),
            row("**step**", [f"{run['seconds'] * 1e3:.1f} ms" for run in runs]),
            row("clips/s", [f"{run['clips_per_second']:.0f}" for run in runs]),
            row("load before (1, 5, 15 min)", [", ".join(map(str, run["load"] or ["not known"])) for run in runs]),
        ]
    )


def main(file: str) -> None:
    """Measures, writes the result, prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    write_atomically(Path(file), (json.dumps(result, indent=1) + "\n").encode())
    print(table(result))
    for run in result["runs"]:
        print(run["bound"])


if __name__ == "__main__":
    main(sys.argv[1])
