"""``python -m benchmarks.feeding``: clips read per second and waiting training steps for 1 to 16 cores, as tables and JSON."""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import machine
from benchmarks.recipe import Recipe, add_options, chosen
from benchmarks.report import wide_console

from .clips import ENCODERS, kinds
from .report import show, write
from .run import Plan, measure


def main() -> int:
    """Parse options, measure, print, write; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feeding", description=(__doc__ or "").split("\n")[0])
    add_options(parser, Recipe)
    parser.add_argument("--codecs", nargs="*", default=list(ENCODERS), choices=list(ENCODERS))
    parser.add_argument("--pictures", nargs="*", default=["320x240", "1280x720"], help="width x height of the videos")
    parser.add_argument("--gops", nargs="*", type=int, default=[250, 12], help="largest distance of keyframes, frames")
    parser.add_argument("--cores", nargs="*", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--length", type=float, default=10.0, help="of the videos, seconds")
    parser.add_argument("--seconds", type=float, default=3.0, help="least time to count the clips of one cell for")
    parser.add_argument("--steps", type=int, default=4, help="training steps that are profiled")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds; what is not reached within it is listed as left out")
    parser.add_argument("--output", help="folder to write the numbers to, named after the device")
    options = parser.parse_args()
    console = wide_console()
    videos = kinds(options.codecs, options.pictures, options.gops)
    plan = Plan(videos, options.cores, options.length, options.seconds, options.steps, options.budget)
    path = None if options.output is None else Path(options.output, f"feeding-{machine.file_stem(machine.default_device())}.json")
    with tempfile.TemporaryDirectory() as folder:
        keep = partial(write, path=path)
        report = measure(chosen(options, Recipe), plan, Path(folder), progress=console.print, keep=keep)
    keep(report)
    show(report, console)
    if path is not None:
        console.print(f"wrote {path}", soft_wrap=True)
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
