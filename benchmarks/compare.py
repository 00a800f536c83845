"""Two revisions of the source tree against each other: the same measuring code, one process each, taking turns.

The other revision is checked out into a temporary git worktree, and this tree's ``benchmarks/`` laid over it. Each process
(``python -m benchmarks.compare``) reads one request per line on its standard input and answers with one line of samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from amd_fast.errors import ConfigError, ImplementationError

from . import machine, timing
from .console import print_table
from .providers import OURS, providers
from .report import pretty
from .run import calls_of, in_order, name_of
from .shapes import AttentionShape, Direction, LossShape, Shape
from .workloads import make

_TURNS = 5
_SECONDS = 0.2  # per turn


@dataclasses.dataclass
class Comparison:
    """Medians of this tree and of another revision, in seconds, by shape, dtype and direction."""

    machine: dict[str, object]
    base: str
    rows: list[dict[str, Any]]
    left_out: list[str]
    method: str = timing.METHOD


def compare(
    base: str,
    shapes: Sequence[Shape],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    directions: Sequence[Direction],
    budget: float = 600.0,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Measure our implementation as it is here and as it was at ``base``.

    Raises:
        ConfigError: There is no such revision.
        ImplementationError: One of the two cannot be measured.
    """
    start = time.monotonic()
    report = Comparison(machine.describe(device), base, [], [])
    with _worktree(base) as folder, _worker(folder, device) as old, _worker(machine.REPOSITORY, device) as new:
        for shape, dtype in in_order(shapes, dtypes):
            if time.monotonic() - start > budget:
                report.left_out.append(f"{shape.op} {shape.name} {name_of(dtype)}")
                continue
            progress(f"{shape.op} {shape.name} {shape.sizes} {name_of(dtype)}")
            for direction in directions:
                request = {"op": shape.op, "shape": dataclasses.asdict(shape), "dtype": name_of(dtype), "direction": direction}
                before, now = [], []
                for _ in range(_TURNS):
                    before.append(_ask(old, request))
                    now.append(_ask(new, request))
                row = {"op": shape.op, "name": shape.name, "sizes": shape.sizes, "dtype": name_of(dtype), "direction": direction}
                report.rows.append({**row, "base": before, "here": now, "ratio": statistics.median(before) / statistics.median(now)})
    return report


def show(report: Comparison, console: Any) -> None:
    """Print the comparison."""
    rows = []
    for row in report.rows:
        spread = [
            f"{pretty(statistics.median(row[side]))} ({pretty(min(row[side]))} to {pretty(max(row[side]))})" for side in ("here", "base")
        ]
        rows.append([f"{row['ratio']:.2f}", row["op"], row["name"], row["sizes"], row["dtype"], row["direction"], *spread])
    columns = ["ratio", "op", "shape", "sizes", "dtype", "pass", "here", report.base]
    print_table(console, f"times faster than {report.base}, medians of turns", columns, rows, right=("ratio",))
    for line in report.left_out:
        console.print(f"left out: {line}: the budget was spent", markup=False)


def write(report: Comparison, folder: Path, stem: str) -> list[Path]:
    """Write the comparison as JSON; return the path."""
    from amd_fast.files import write_atomically  # here: an older revision, which this module is also run on, may not have it

    path = folder / f"{stem}-against-{machine.revision(report.base)}.json"
    write_atomically(path, (json.dumps(dataclasses.asdict(report), indent=1) + "\n").encode())
    return [path]


@contextlib.contextmanager
def _worktree(base: str) -> Iterator[Path]:
    revision = machine.revision(base)
    if not revision:
        raise ConfigError(f"base: got {base!r}, expected a revision that git knows; see git log")
    git = ["git", "-C", str(machine.REPOSITORY), "worktree"]
    with tempfile.TemporaryDirectory(prefix="amd_fast-base-") as temporary:
        folder = Path(temporary) / "tree"
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
        try:
            shutil.copytree(machine.REPOSITORY / "benchmarks", folder / "benchmarks", dirs_exist_ok=True)
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=False)


@contextlib.contextmanager
def _worker(folder: Path, device: torch.device) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.compare", str(device)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=machine.environment(folder), **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def _ask(process: subprocess.Popen[str], request: dict[str, Any]) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise ImplementationError(f"{request}: the process in {process.args!r} ended; its message stands above")
    return float(json.loads(answer))


def serve(device: torch.device, requests: IO[str], answers: IO[str]) -> None:
    """Answer requests, one per line, with the median time of our implementation; prepare each case once."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))
    prepared: tuple[str, dict[Direction, timing.Call]] = ("", {})
    for line in requests:
        request = json.loads(line)
        key = json.dumps([request["op"], request["shape"], request["dtype"]])
        if key != prepared[0]:
            kind = AttentionShape if request["op"] == AttentionShape.op else LossShape
            case = make(kind(**request["shape"]), getattr(torch, request["dtype"]), device)
            forward = next(provider for provider in providers(case.shape.op) if provider.name == OURS).build(case)
            case.check(forward)
            prepared = key, calls_of(case, forward)
        call = prepared[1][request["direction"]]
        call()
        answers.write(json.dumps(timing.measure({OURS: call}, device, _SECONDS)[OURS].p50) + "\n")
        answers.flush()


if __name__ == "__main__":
    # What anything else prints must not get between the answers.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as channel:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(torch.device(sys.argv[1]), sys.stdin, channel)
