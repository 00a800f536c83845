"""``amd-fast export``: a trained model as a folder of programs for Python without this library, and for C++."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from amd_fast.errors import ConfigError
from amd_fast.export.package import export_package
from amd_fast.export.programs import Format
from amd_fast.models.afmir import AFMIR
from amd_fast.progress import console


def export_command(run: str, output: str, format: Format = "aotinductor", device: str = "cpu", progress: bool = True) -> None:
    """Export a trained model as programs that need torch alone, for Python and C++, and check them in a fresh process.

    Encoder and head become a program each, for any number of clips and classes. Nothing is written where the check finds other numbers
    than the model's.

    Args:
        run: Run folder, or a model's .safetensors file; or a URI of either.
        output: Folder to write, which must not exist; or its URI.
        format: aotinductor (compiled here, for machines like this one; needs a C++ compiler and minutes) or torch-export (a graph that
            torch runs anywhere; Python only).
        device: What the programs are for: cpu, cuda, cuda:1, ...
        progress: Show a progress bar on a terminal.
    """
    from amd_fast.training.checkpoint import load_model

    description = export_package(_moved(load_model(run), device), output, format=format, progress=progress)
    console.print(_table(description))
    console.print(f"equal to the model in a fresh process without amd_fast; the package is in {output}", soft_wrap=True, markup=False)


def _moved(model: AFMIR, device: str) -> AFMIR:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for an unknown device, and for one that is not here
        raise ConfigError(f"--device {device} cannot be used here ({str(error).splitlines()[0]}); cpu always can") from error


def _table(description: dict[str, Any]) -> Table:
    table = Table("program", "", "tensor", "shape", "type", "largest difference")
    for part in ("encoder", "head"):
        for side in ("inputs", "outputs"):
            for entry in description[part][side]:
                off = description["largest_difference"].get(f"{part}.{entry['name']}") if side == "outputs" else None
                shape = ", ".join(map(str, entry["shape"]))
                table.add_row(part, side[:-1], entry["name"], shape, entry["dtype"], "" if off is None else f"{off:.1e}")
    return table
