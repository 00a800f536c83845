"""Tables of launch configurations, and the lookup in them: exact, then nearest, then default.

Configurations are checked in, one table per GPU in the ``configs/*.json`` of a kernel, never searched at run time. First the GPU is
looked up (its own table, then one of the same architecture, then ``default.json``), then the shape (its own entry, then the nearest
in log size). The table of a GPU holds what was measured there and nothing else: for other sizes the entries of ``default.json`` count,
so that what is mended there reaches every GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

Entry = dict[str, int]
Table = dict[str, list[Entry]]

SIZES = ("item_size", "width", "tokens", "views", "classes", "frames")  # fields of an entry that say what it is for


class CompileSpec(NamedTuple):
    """One variant of one kernel, for compiling it without running it.

    Attributes:
        kernel: The Triton function.
        label: What tells this variant from the others of the op, the kernel's name first.
        signature: Triton type of every argument that is not a constant, by name.
        constants: Value of every constant, by name.
        divisible: Arguments known to be multiples of 16, as they are in a launch with aligned tensors.
        warps: Warps per program.
        stages: Depth of the software pipeline.
        bytes_per_element: Bytes that must cross the memory bus per element of the op's main input, each tensor moved once.
        amd_constants: Constants whose value differs on AMD.
        importance: 0 for what most launches run, which the tests compile for every GPU; 1 for what differs from that in registers,
            which they compile for one GPU each; 2 for what lies in between, which is left to ``amd-fast compile``.
    """

    kernel: Any
    label: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: frozenset[str]
    warps: int
    stages: int
    bytes_per_element: float
    amd_constants: Mapping[str, Any] = {}
    importance: int = 0


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below ``size`` (1 for 0)."""
    return 1 << max(size - 1, 0).bit_length()


def ceil_div(size: int, block: int) -> int:
    """Blocks that hold ``size`` elements. (Triton's own ``cdiv`` is a function of its language, slow to call from the host.)"""
    return -(-size // block)


def table_for(folder: Traversable, device_name: str, architecture: str) -> Table:
    """The table for a GPU: by name, else of the same architecture, else the default one.

    Args:
        folder: Where a kernel's tables are.
        device_name: As the driver gives it, for example ``"NVIDIA H200"``.
        architecture: For example ``"sm_90"`` or ``"gfx942"``.

    Raises:
        FileNotFoundError: There is no default table.
    """
    tables = _read(folder)
    default = next((table["kernels"] for table in tables if table["device"] == "default"), None)
    if default is None:
        raise FileNotFoundError(f"{folder}/default.json is missing; install the package again")
    named = [table["kernels"] for table in tables if table["device"] == device_name]
    related = [table["kernels"] for table in tables if table["architecture"] == architecture]
    measured = (named or related or [default])[-1]
    return merged(measured, default)


def tables_for(folder: Traversable, architecture: str) -> list[Table]:
    """Every table that some GPU of an architecture would use: those of the architecture, and the default one where there is none."""
    devices = [table["device"] for table in _read(folder) if table["architecture"] == architecture]
    return [table_for(folder, device, architecture) for device in devices or ["default"]]


def measured_on(folder: Traversable, device_name: str) -> Table:
    """What was measured on a GPU, empty where nothing was."""
    return next((dict(table["kernels"]) for table in _read(folder) if table["device"] == device_name), {})


def merged(first: Table, second: Table) -> Table:
    """The entries of two tables; for the same sizes that of the first."""
    entries: Table = {}
    for kernel in dict.fromkeys((*first, *second)):
        known = first.get(kernel, [])
        sizes = [_sizes(entry) for entry in known]
        entries[kernel] = [*known, *(entry for entry in second.get(kernel, []) if _sizes(entry) not in sizes)]
    return entries


def _sizes(entry: Entry) -> Entry:
    return {name: entry[name] for name in SIZES if name in entry}


def nearest(entries: Sequence[Entry], sizes: Mapping[str, int]) -> Entry:
    """The entry nearest to these sizes, in octaves summed over the sizes that the entry has; of equals the first."""
    return min(entries, key=lambda entry: sum(abs(math.log2(entry[name] / size)) for name, size in sizes.items() if name in entry))


def _read(folder: Traversable) -> list[dict[str, Any]]:
    entries = sorted(folder.iterdir(), key=lambda file: file.name)
    return [json.loads(file.read_text()) for file in entries if file.name.endswith(".json")]
