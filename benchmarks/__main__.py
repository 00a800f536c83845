"""``python -m benchmarks``: the same as ``amd-fast bench``, for machines without the packages of the command line."""

from __future__ import annotations

import argparse
import sys

from amd_fast.bench import bench_command
from amd_fast.errors import AmdFastError


def main() -> int:
    """Parse the options of :func:`amd_fast.bench.bench_command` and run it; its exit status, or 2 for an error of ours."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(bench_command.__doc__ or "").split("\n")[0])
    for name in ("op", "shapes", "dtypes", "directions"):
        parser.add_argument(f"--{name}", nargs="*")
    for name in ("base", "output", "device"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--budget", type=float, default=600.0)
    parser.add_argument("--max-elements", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    try:
        return bench_command(**vars(parser.parse_args()))
    except AmdFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
