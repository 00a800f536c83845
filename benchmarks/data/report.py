"""Results for people (a table, a plot, advice) and for programs (JSON)."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from amd_fast.files import write_atomically

from .contenders import Group
from .run import CLOCKS, Report, Result


def show(report: Report, console: Console) -> None:
    """Print one table per group, what is missing from it, and the advice."""
    for group in dict.fromkeys(result.group for result in report.results):
        console.print(_table(report, group))
    for result in report.results:
        for clip, fault in result.faults.items():
            console.print(f"{result.name} ({result.group}): wrong frames of {clip}: {fault}", markup=False, highlight=False)
        if result.reason:
            console.print(f"{result.name} ({result.group}): not timed: {result.reason}", markup=False, highlight=False)
        for clip, reason in result.refused.items() if result.wall else ():
            console.print(f"{result.name} ({result.group}): PyAV reads {clip} in its place: {reason}", markup=False, highlight=False)
    for line in report.missing:
        console.print(f"not here: {line}", markup=False, highlight=False)
    facts = report.machine
    machine = ", ".join(dict.fromkeys([facts["device"], facts["cpu"]]))
    console.print(f"{machine}, {report.threads} threads, commit {facts['commit']}, load {facts['load']}", highlight=False)
    for line in report.advice:
        console.print(f"* {line}", markup=False, highlight=False)


def _table(report: Report, group: Group) -> Table:
    work, mine = report.work, report.ours(group)
    over = "" if mine is None else f"; times: over those of {mine.name}, median over the rounds (lowest to highest)"
    table = Table(
        title=f"{group}: {len(report.clips)} clips, {work.frames} frames at {work.size} x {work.size}, {report.threads} threads",
        caption=f"clips per second: median (worst to best round){over}",
    )
    for column in ("", "clips/s", "wall time", "processor time", "frames"):
        table.add_column(column, justify="left" if column in ("", "frames") else "right", overflow="fold")
    ratios = {(ratio.other, ratio.clock): str(ratio) for ratio in report.ratios(group)}
    members = [result for result in report.results if result.group == group and result.wall]
    for result in sorted(members, key=lambda result: -result.rate()):
        cells = [ratios.get((result.name, clock), "1" if result is mine else "") for clock in CLOCKS]
        rate = f"{result.rate():.1f} ({result.rate('worst'):.1f} to {result.rate('best'):.1f})"
        table.add_row(result.name, rate, *cells, _frames(result), style=None if result.peer else "bold")
    return table


def _frames(result: Result) -> str:
    right = f"wrong on {len(result.faults)} of {result.clips}" if result.faults else "right"
    return f"{right}; PyAV reads {len(result.refused)} of {result.clips}" if result.refused else right


def write(report: Report, folder: Path, stem: str) -> list[Path]:
    """Write ``<stem>.json`` and ``<stem>.svg``; return the paths."""
    numbers, picture = folder / f"{stem}.json", folder / f"{stem}.svg"
    write_atomically(numbers, (json.dumps(report.to_json(), indent=1) + "\n").encode())
    import matplotlib as mpl
    from matplotlib.figure import Figure

    members = [result for result in report.results if result.wall]
    with mpl.rc_context({"svg.hashsalt": stem, "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 1.2 + 0.3 * len(members)), layout="constrained")
        title = f"{report.machine['device']}, {report.threads} threads, {report.machine['commit']}"
        axes = figure.add_subplot(xlabel="clips per second, median (line: worst to best round)", title=title)
        for place, result in enumerate(members):
            colour = "tab:grey" if result.peer else "tab:blue"
            axes.barh(place, result.rate(), color=colour, hatch="" if result.exact else "///", edgecolor="white")
            axes.plot([result.rate("worst"), result.rate("best")], [place, place], color="black", linewidth=1)
        names = [f"{result.group}: {result.name}{'' if result.exact else ' (wrong frames)'}" for result in members]
        axes.set_yticks(range(len(members)), names, fontsize=8)
        axes.invert_yaxis()
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    write_atomically(picture, drawn.getvalue())
    return [numbers, picture]
