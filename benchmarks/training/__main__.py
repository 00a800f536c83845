"""``python -m benchmarks.training``: the training step beside eager float32, and training from video files, as tables and JSON."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

from benchmarks import machine
from benchmarks.recipe import Recipe, add_options, chosen
from benchmarks.report import wide_console

from .contenders import SETTINGS
from .report import show, write
from .run import Report, free, measure


def main() -> int:
    """Parse options, measure, print, write; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").split("\n")[0])
    add_options(parser, Recipe)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS), help="of ours")
    parser.add_argument("--seconds", type=float, default=5.0, help="to time each for, and four times that from files")
    parser.add_argument("--length", type=float, default=10.0, help="of the videos read, seconds")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds; what is not begun within it is listed as left out")
    parser.add_argument("--output", help="folder to write the numbers to, named after the device")
    options = parser.parse_args()
    console, started = wide_console(), time.monotonic()
    recipe, device = chosen(options, Recipe), machine.default_device()
    report = measure(recipe, device, names=options.only, budget=options.budget, seconds=options.seconds, progress=console.print)
    free(device)
    _from_files(report, options, started)
    show(report, console)
    if options.output is not None:
        path = write(report, Path(options.output), f"training-{machine.file_stem(device)}")
        console.print(f"wrote {path}", soft_wrap=True)
    return 0 if report.good else 1


def _from_files(report: Report, options: argparse.Namespace, started: float) -> None:
    """Training from files, where PyAV is here to make and read them and there is time left."""
    title = "training from video files"
    if importlib.util.find_spec("av") is None:
        report.left_out.append(f"{title}: PyAV is not installed")
    elif time.monotonic() - started > options.budget:
        report.left_out.append(f"{title}: the budget of {options.budget:g} s was spent on the steps")
    else:
        from . import fed  # here: it needs PyAV

        device = machine.default_device()
        console = wide_console()
        report.fed = fed.measure(report.recipe, device, seconds=4 * options.seconds, length=options.length, progress=console.print)


if __name__ == "__main__":
    sys.exit(main())
