"""Results for people (two tables: kinds of videos by cores) and for programs (JSON)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from amd_fast.files import write_atomically

from .run import Report


def show(report: Report, console: Console) -> None:
    """Print the tables, and what is missing from them."""
    recipe = report.recipe
    frames = f"{recipe.frames} frames at {recipe.size} x {recipe.size}"
    console.print(_table(report, "read", f"reading: clips/s, {frames}, rgb and flow", lambda row: f"{row['clips_per_second']:.1f}"))
    title = f"a training step of {recipe.model}, {recipe.clips} clips of {frames}: share that waits for data"
    console.print(_table(report, "step", title, lambda row: f"{row['waiting']:.0%} of {row['step_seconds'] * 1e3:.0f} ms"))
    for row in report.rows:
        if "failed" in row:
            where = f"{row['kind']}, {row['video']}, cores {row['cores']}"
            console.print(f"{where}: failed: {row['failed']}", style="red", markup=False, highlight=False)
    for line in report.left_out:
        console.print(f"left out: {line}", markup=False, highlight=False)
    facts = report.machine
    console.print(f"{facts['device']}, {facts['cpu']}, commit {facts['commit']}, load {facts['load']}", highlight=False)


def _table(report: Report, kind: str, title: str, cell: Any) -> Table:
    rows = [row for row in report.rows if row["kind"] == kind]
    cores = list(dict.fromkeys(row["cores"] for row in rows))
    table = Table(title=title)
    table.add_column("videos")
    table.add_column("decoder")
    for count in cores:
        table.add_column(f"{count} {'core' if count == 1 else 'cores'}", justify="right")
    for video in dict.fromkeys(row["video"] for row in rows):
        found = {row["cores"]: row for row in rows if row["video"] == video}
        decoder = ", ".join(dict.fromkeys(row["decoder"] for row in found.values() if "decoder" in row))
        shown = ["" if count not in found else "failed" if "failed" in found[count] else cell(found[count]) for count in cores]
        table.add_row(video, decoder, *shown)
    return table


def write(report: Report, path: Path | None) -> None:
    """The whole report as JSON, where a path is given."""
    if path is not None:
        write_atomically(path, (json.dumps(report.to_json(), indent=1) + "\n").encode())
