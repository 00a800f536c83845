"""Compares an exported package with what was recorded when it was made: ``python check.py`` in the package's folder.

A copy of this file lies in every package. It needs torch and safetensors and nothing else; that the package needs no more is what
running it shows. Prints JSON, and exits with 1 where anything is wrong.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.export
from safetensors.torch import load_file

PARTS = ("encoder", "head")
DESCRIPTION = "package.json"
EXPECTED = "expected."
TOLERANCE = 1e-4
"""Of a value, or of 1 where that is more: an exported program may sum in another order. To this comes what the description allows."""


def load_program(folder: Path, part: str, kind: str) -> Callable[..., Any]:
    """A program of a package: ``kind`` is "aotinductor" or "torch-export"."""
    path = str(folder / f"{part}.pt2")
    if kind == "torch-export":
        return torch.export.load(path).module()
    from torch._inductor import aoti_load_package  # the compiler behind it takes seconds to import

    return aoti_load_package(path)


def changed_files(folder: Path, description: dict[str, Any]) -> list[str]:
    """What is missing, or has another hash than the description says."""
    wrong = []
    for name, expected in description["sha256"].items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            wrong.append(f"{name} was changed")
    return wrong


def compare(folder: Path) -> tuple[dict[str, float], list[str]]:
    """Runs both programs on every recorded episode, and the encoder on its first clip alone.

    Returns:
        largest difference of every output, and what is outside of the tolerance, one line each.
    """
    description = json.loads((folder / DESCRIPTION).read_text())
    wrong = changed_files(folder, description)
    if wrong:
        return {}, wrong
    largest: dict[str, float] = {}
    programs = {part: load_program(folder, part, description["programs"]) for part in PARTS}
    for episode in description["episodes"]:
        recorded = load_file(folder / episode, device=description["device"])
        for part, inputs, expected in _cases(description, recorded):
            with torch.no_grad():
                outputs = programs[part](*inputs)
            for name, got, wanted in zip(expected, outputs, expected.values(), strict=True):
                key = f"{part}.{name}"
                if got.shape != wanted.shape:
                    wrong.append(f"{episode}: {key} is {list(got.shape)}, was {list(wanted.shape)}")
                    continue
                off = torch.where(got == wanted, 0.0, (got.to(wanted) - wanted).abs()).nan_to_num(nan=float("inf"))
                largest[key] = max(largest.get(key, 0.0), float(off.max()))
                allowed = TOLERANCE * wanted.abs().clamp(1.0, 1 / TOLERANCE) + description["tolerance"][key]
                if not bool((off <= allowed).all()):
                    wrong.append(f"{episode}: {key} is off by {float(off.max()):.2g}, allowed are {float(allowed.max()):.2g}")
    return largest, wrong


def _cases(description: dict[str, Any], recorded: dict[str, Any]) -> list[tuple[str, list[Any], dict[str, Any]]]:
    """Part, inputs and expected outputs of what is run on an episode."""
    encoder, head = ([entry["name"] for entry in description[part]["inputs"]] for part in PARTS)
    outputs = {part: [entry["name"] for entry in description[part]["outputs"]] for part in PARTS}
    expected = {part: {name: recorded[EXPECTED + name] for name in outputs[part]} for part in PARTS}
    shots = len(recorded["support_labels"])
    sides = {
        f"{side}_{name}": value[cut]
        for side, cut in (("support", slice(None, shots)), ("query", slice(shots, None)))
        for name, value in expected["encoder"].items()
    }
    clips, known = [recorded[name] for name in encoder], {**sides, **recorded}
    alone = {name: value[:1] for name, value in expected["encoder"].items()}
    return [
        ("encoder", clips, expected["encoder"]),
        ("encoder", [clip[:1] for clip in clips], alone),
        ("head", [known[name] for name in head], expected["head"]),
    ]


def main(folder: str | None = None) -> int:
    """Prints what was found; 1 where the package is not good."""
    largest, wrong = compare(Path(folder) if folder else Path(__file__).resolve().parent)
    told = {"torch": torch.__version__, "without_amd_fast": "amd_fast" not in sys.modules, "largest_difference": largest, "wrong": wrong}
    print(json.dumps(told, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
