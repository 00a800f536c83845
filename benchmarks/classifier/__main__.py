"""Run it: ``PYTHONPATH=. python -m benchmarks.classifier accuracy MANIFEST... --models RUN...`` or ``latency MANIFEST --models RUN``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from amd_fast.files import write_atomically
from amd_fast.progress import console
from benchmarks import machine

from . import accuracy, latency


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classifier", description=__doc__)
    parser.add_argument("what", choices=("accuracy", "latency"))
    parser.add_argument("manifests", nargs="+", help="CSV with path, label and source_video")
    parser.add_argument("--models", nargs="*", default=[], help="run folders")
    parser.add_argument("--shots", nargs="*", type=int, default=[5])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--least", type=int, default=5, help="classes with fewer clips are left out")
    parser.add_argument("--asked", type=int, default=60, help="clips asked in the measurement of latency")
    parser.add_argument("--output", help="JSON file")
    given = parser.parse_args()
    facts = machine.describe(machine.default_device())
    found: Any
    if given.what == "accuracy":
        options = {"shots": given.shots, "repeats": given.repeats, "least": given.least}
        found = [row for manifest in given.manifests for row in accuracy.measure(manifest, given.models, **options)]
        console.print(pd.DataFrame(found).round(1).to_string(index=False), soft_wrap=True)
    else:
        found = {}
        for manifest in given.manifests:
            table = pd.read_csv(manifest)
            order = np.random.default_rng(0).permutation(len(table))[:200]
            paths = [str(Path(manifest).parent / path) for path in table["path"].iloc[order]]
            measured = latency.measure(given.models[0], paths, table["label"].iloc[order].tolist(), asked=given.asked)
            found[Path(manifest).parent.name] = measured
        console.print_json(json.dumps(found))
    if given.output:
        result = {"what": given.what, "machine": facts, "load at the end": machine.load(), "result": found}
        write_atomically(given.output, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
