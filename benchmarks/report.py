"""Results for people (a table, a plot) and for programs (JSON)."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .console import print_table, wide_console
from .providers import OURS
from .run import FAULTS, Report, Result


def groups(results: Sequence[Result]) -> Iterator[list[Result]]:
    """Results that are compared with each other: of one op, shape, dtype and direction."""

    def key(result: Result) -> tuple[str, ...]:
        return result.op, result.shape, result.dtype, result.direction

    order = {key(result): None for result in results}
    by_key: dict[tuple[str, ...], list[Result]] = {name: [] for name in order}
    for result in results:
        by_key[key(result)].append(result)
    yield from by_key.values()


def ours(group: Sequence[Result]) -> Result | None:
    """Our own result of a group, None where it was not timed."""
    return next((result for result in group if result.provider == OURS and result.time), None)


def best_peer(group: Sequence[Result]) -> Result | None:
    """The fastest peer of a group that passed the check."""
    timed = [result for result in group if result.peer and result.time]
    return min(timed, key=lambda result: result.time.p50 if result.time else 0.0, default=None)


def ratio(group: Sequence[Result], eager: bool = False) -> float | None:
    """How many times longer the best peer takes than ours; ``eager`` compares wall times per call launched from Python."""
    mine, peer = ours(group), best_peer(group)
    if not (mine and peer and mine.time and peer.time):
        return None
    if not eager:
        return peer.time.p50 / mine.time.p50
    calls = [result.time.call for result in group if result.peer and result.time and result.time.call]
    return min(calls) / mine.time.call if calls and mine.time.call else None


def show(report: Report, console: Any = None) -> None:
    """Print the tables, one per op, and what is missing from them; ``console`` is rich's or of :mod:`benchmarks.console`."""
    console = console or wide_console()
    compared = list(groups(report.results))
    for op in dict.fromkeys(group[0].op for group in compared):
        _show_table(console, op, [group for group in compared if group[0].op == op], eager="driver" in report.machine)
    machine = report.machine
    console.print(
        f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit']}, load {machine['load']}, "
        f"copy {report.copy_bandwidth / 1e9:.0f} GB/s"
    )
    timed = [result.time for result in report.results if result.time]
    noisy = sum(time.p80 > 2.0 * time.p20 for time in timed)
    if 10 * noisy > len(timed):
        console.print(f"the machine was not quiet: {noisy} of {len(timed)} times vary by more than a factor of two", style="yellow")
    reasons: dict[str, list[str]] = {}
    for result in report.results:
        if not result.time:
            reasons.setdefault(f"{result.provider}: {result.status}: {result.reason}", []).append(f"{result.shape} {result.dtype}")
    for reason, where in reasons.items():
        console.print(f"{reason} ({', '.join(dict.fromkeys(where))})", markup=False, highlight=False)
    for line in report.left_out:
        console.print(f"left out: {line}", markup=False, highlight=False)
    if report.faults:
        console.print(f"{OURS} failed or was wrong in {report.faults} of {len(report.results)} lines, see above", style="bold red")


def _show_table(console: Any, op: str, members: Sequence[Sequence[Result]], eager: bool) -> None:
    columns = ["ratio", "shape", "sizes", "dtype", "pass", "amd_fast", "of copy", "best peer", "others"]
    if eager:
        columns.insert(1, "eager")
    rows = []
    for group in members:
        mine, peer = ours(group), best_peer(group)
        others = [result for result in group if result.time and result not in (mine, peer)]
        first = group[0]
        cells = [
            _times(ratio(group)),
            first.shape,
            first.sizes,
            first.dtype,
            first.direction,
            _quantiles(mine) if mine else _why_not(group),
            f"{mine.of_copy:.0%}" if mine else "",
            f"{peer.provider} {_quantiles(peer)}" if peer else "none",
            ", ".join(f"{result.provider} {pretty(result.time.p50)}" for result in others if result.time),
        ]
        if eager:
            cells.insert(1, _times(ratio(group, eager=True)))
        rows.append(cells)
    slower = [place for place, group in enumerate(members) if (ratio(group) or math.inf) < 1.0 or _why_not(group) in FAULTS]
    title = f"{op}: times faster than the best peer, medians (20 % to 80 %)"
    print_table(console, title, columns, rows, right=("ratio", "eager", "of copy"), red=slower)


def _why_not(group: Sequence[Result]) -> str:
    """What became of ours where it was not timed."""
    return next((result.status for result in group if result.provider == OURS and not result.time), "not timed")


def _times(quotient: float | None) -> str:
    return "" if quotient is None else f"{quotient:.2f}"


def _quantiles(result: Result) -> str:
    assert result.time is not None
    return f"{pretty(result.time.p50)} ({pretty(result.time.p20)} to {pretty(result.time.p80)})"


def pretty(seconds: float) -> str:
    """A time with a fitting unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def write(report: Report, folder: Path, stem: str) -> list[Path]:
    """Write ``<stem>.json`` and ``<stem>.svg``; return the paths."""
    from amd_fast.files import write_atomically  # here: ``compare`` runs this module on older revisions, which may not have it

    numbers, picture = write_numbers(report, folder, stem), folder / f"{stem}.svg"
    try:
        import matplotlib as mpl
    except ImportError:
        return [numbers]
    with mpl.rc_context({"svg.hashsalt": stem, "svg.fonttype": "none"}):
        figure = _plot(report)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        write_atomically(picture, drawn.getvalue())
    return [numbers, picture]


def write_numbers(report: Report, folder: Path, stem: str) -> Path:
    """Write ``<stem>.json``, whole or not at all; return the path."""
    from amd_fast.files import write_atomically

    path = folder / f"{stem}.json"
    write_atomically(path, (json.dumps(report.to_json(), indent=1) + "\n").encode())
    return path


def read(folder: Path, stem: str) -> Report | None:
    """The report in ``<stem>.json``, None where there is none or one of other fields."""
    try:
        return Report.from_json(json.loads((folder / f"{stem}.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, TypeError, KeyError, ValueError):
        return None


def _plot(report: Report):  # type: ignore[no-untyped-def]  # matplotlib is optional here
    """Time of every provider relative to ours, one line per shape, dtype and pass, on a logarithmic axis."""
    from matplotlib.figure import Figure

    compared = [group for group in groups(report.results) if ours(group)]
    names = list(dict.fromkeys(result.provider for result in report.results if result.time and result.provider != OURS))
    figure = Figure(figsize=(9, 1.5 + 0.22 * len(compared)), layout="constrained")
    axes = figure.add_subplot(
        xscale="log", xlabel="time / time of amd_fast", title=f"{report.machine['device']}, {report.machine['commit']}"
    )
    for name in names:
        points = [
            (result.time.p50 / mine.time.p50, place)
            for place, group in enumerate(compared)
            if (mine := ours(group)) and mine.time
            for result in group
            if result.provider == name and result.time
        ]
        axes.scatter([time for time, _ in points], [place for _, place in points], label=name, s=18)
    axes.axvline(1.0, color="black", linewidth=0.8)
    labels = [f"{group[0].op.split('_')[0]} {group[0].shape} {group[0].dtype} {group[0].direction}" for group in compared]
    axes.set_yticks(range(len(compared)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", alpha=0.3)
    if names:
        axes.legend(fontsize=7)
    return figure
