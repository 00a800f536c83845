"""Results for people (tables) and for programs (JSON)."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from amd_fast.files import write_atomically

from ..report import pretty
from .run import Fed, Report, Result


def show(report: Report, console: Console) -> None:
    """Print the tables, and what is missing from them."""
    recipe = report.recipe
    shape = f"{recipe.model}, {recipe.clips} clips of {recipe.frames} frames at {recipe.size} x {recipe.size}, rgb and flow"
    console.print(_steps(report.results, f"a training step: {shape}"))
    if report.fed:
        console.print(_fed(report.fed, f"training from video files: {shape}"))
    for result in report.rows:
        if result.reason:
            colour = "red" if result.status in ("wrong", "failed") else None
            console.print(f"{result.name}: {result.status}: {result.reason}", style=colour, markup=False, highlight=False)
    for line in report.left_out:
        console.print(f"left out: {line}", markup=False, highlight=False)
    facts = report.machine
    console.print(f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}, load {facts['load']}", highlight=False)


def _steps(results: list[Result], title: str) -> Table:
    table = Table(title=title, caption="times: medians (20 % to 80 %); ratio: the first one's time over this one's")
    for column in ("", "precision", "step", "clips/s", "ratio", "peak memory", "loss off by", "gradient off by"):
        table.add_column(column, justify="left" if column in ("", "precision") else "right", overflow="fold")
    for result in results:
        table.add_row(result.name, result.precision, *_timed(result), *_off(result))
    return table


def _timed(result: Result) -> list[str]:
    if result.time is None or result.clips_per_second is None:
        return [result.status if result.status != "ok" else "not timed", "", "", ""]
    step = f"{pretty(result.time.p50)} ({pretty(result.time.p20)} to {pretty(result.time.p80)})"
    memory = "" if result.peak_memory is None else f"{result.peak_memory / 1e9:.2f} GB"
    return [step, f"{result.clips_per_second:.1f}", f"{result.ratio:.2f}", memory]


def _off(result: Result) -> list[str]:
    """How far loss and gradient norm are from the peer's, and how far they may be."""
    if result.found is None or result.expected is None or result.allowed is None:
        return ["", ""]
    triples = zip(result.found, result.expected, result.allowed, strict=True)
    return [f"{abs(found - expected):.1e} of {allowed:.1e}" for found, expected, allowed in triples]


def _fed(rows: list[Fed], title: str) -> Table:
    table = Table(title=title)
    for column in ("", "reads", "clips/s", "ratio", "steps"):
        table.add_column(column, justify="left" if column in ("", "reads") else "right", overflow="fold")
    for row in rows:
        rate = row.status if row.clips_per_second is None else f"{row.clips_per_second:.1f}"
        table.add_row(row.name, row.reads, rate, "" if row.ratio is None else f"{row.ratio:.2f}", str(row.steps))
    return table


def write(report: Report, folder: Path, stem: str) -> Path:
    """Write ``<stem>.json``; return the path."""
    path = folder / f"{stem}.json"
    write_atomically(path, (json.dumps(report.to_json(), indent=1) + "\n").encode())
    return path
