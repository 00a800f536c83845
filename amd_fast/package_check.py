"""Compares an exported package with what was recorded when it was made: ``python -m amd_fast.package_check FOLDER``.

Run as a process of its own it shows that the package needs torch alone: of this library nothing else is imported, none of its ops
are registered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PARTS = ("encoder", "head")
DESCRIPTION, RECORDED = "package.json", "recorded.safetensors"
RELATIVE, ABSOLUTE = 1e-3, 1e-4
"""Tolerances: an exported program may sum in another order. Outputs are log-probabilities, shares and normalised tokens, all around 1."""


def differences(folder: Path) -> list[str]:
    """What of the package's outputs differs from the recorded ones, one line each; empty where it is good."""
    import torch
    import torch.export
    from safetensors.torch import load_file

    description = json.loads((folder / DESCRIPTION).read_text())
    recorded = load_file(folder / RECORDED, device=description["device"])
    found = []
    for part in PARTS:
        program = torch.export.load(folder / f"{part}.pt2").module()
        for case in range(description["recorded"]):
            prefix = f"{part}.{case}"
            inputs = [recorded[f"{prefix}.input.{name}"] for name in description[part]["inputs"]]
            names = list(description[part]["outputs"])
            with torch.no_grad():
                outputs = program(*inputs)
            for name, got in zip(names, outputs, strict=True):
                expected = recorded[f"{prefix}.output.{name}"]
                if got.shape != expected.shape:
                    found.append(f"{part}, input {case}: {name} is {list(got.shape)}, was {list(expected.shape)}")
                elif not torch.allclose(got.to(expected), expected, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True):
                    off = float((got.to(expected) - expected).abs().nan_to_num(nan=float("inf"), posinf=float("inf")).max())
                    found.append(f"{part}, input {case}: {name} is off by {off:.2g}, allowed {RELATIVE:g} of its size and {ABSOLUTE:g}")
    return found


def main(folder: str) -> int:
    """Prints the differences; 1 where there are any."""
    found = differences(Path(folder))
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
