"""``python -m benchmarks.episodes``: ten thousand episodes per matcher beside a loop and the floor, as a table and JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from rich.table import Table

import amd_fast
from amd_fast.files import write_atomically
from benchmarks import machine
from benchmarks.report import pretty, wide_console

from . import encoding
from .run import CLOCKS, Result, Sizes, WrongResultError, cases, measure

METHOD = (
    "Ours and the floor score all episodes, the loop loop_episodes of them, extrapolated to all; the three take turns, and seconds are "
    "medians over the rounds. Preparing the bank's clips, once for all episodes, is not part of 'ours' but given as 'prepare'. Random "
    "features with class structure; every matcher's log-posteriors agree with the loop's before the clock starts."
)


def main() -> int:
    """Parse options, measure, print, write; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.episodes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--matchers", nargs="*", default=amd_fast.list_matchers())
    parser.add_argument("--shots", nargs="*", type=int, default=[1, 5])
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="processor: seconds of this process, where other work runs")
    parser.add_argument("--encode", type=int, default=0, help="episodes whose clips are decoded and encoded anew; 0: none")
    parser.add_argument("--output", help="folder to write the numbers to, named after the device")
    options = parser.parse_args()
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)})
    console = wide_console()
    results: list[Result] = []
    facts = machine.describe(torch.device("cpu"))
    status = 0
    for name, shots in cases(options.matchers, options.shots):
        try:
            results.append(measure(name, shots, sizes, CLOCKS[options.clock]))
        except WrongResultError as error:
            console.print(str(error), style="red")
            status = 1
            continue
        last = results[-1]
        console.print(f"{name}, {shots}-shot: {pretty(last.ours)}, {last.ratio:.1f} times faster, {last.over_floor:.2f} of the floor")
    encoded = encoding.measure(options.encode) if options.encode else None
    console.print(_table(results))
    if encoded:
        console.print(encoded.text())
    facts["load after"] = machine.load()
    if options.output is not None:
        path = Path(options.output) / f"episodes-{machine.file_stem(torch.device('cpu'))}.json"
        rows = [dataclasses.asdict(result) | {"ratio": result.ratio, "over_floor": result.over_floor} for result in results]
        report = {"machine": facts, "method": METHOD, "clock": options.clock, "sizes": dataclasses.asdict(sizes), "results": rows}
        report["encoding"] = dataclasses.asdict(encoded) if encoded else None
        write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
        console.print(f"wrote {path}")
    return status


def _table(results: list[Result]) -> Table:
    table = Table(title="all episodes: ours, the loop (extrapolated), the floor")
    for column in ("matcher", "shots", "ours", "loop", "times faster", "floor", "ours / floor", "prepare", "error", "plan"):
        table.add_column(column, justify="left" if column in ("matcher", "plan") else "right")
    for result in results:
        times = [pretty(seconds) for seconds in (result.ours, result.loop)]
        rest = [f"{result.ratio:.1f}", pretty(result.floor), f"{result.over_floor:.2f}", pretty(result.prepare), f"{result.error:.0e}"]
        table.add_row(result.matcher, str(result.shots), *times, *rest, result.plan)
    return table


if __name__ == "__main__":
    sys.exit(main())
