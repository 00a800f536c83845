"""Launch configurations of the OTAM kernels: how many pairs of sequences a program takes, and with how many warps.

Configurations are checked in, one table per GPU in ``configs/*.json``, never searched at run time: the GPU's own table, else one of
the same architecture, else ``default.json``; there, the entry whose number of frames is nearest.
"""

from __future__ import annotations

import dataclasses
import functools
from importlib.resources import files

from ..common.tables import CompileSpec, Table, nearest, table_for, tables_for

MAX_FRAMES = 16
KERNELS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is launched.

    Attributes:
        pairs: Pairs of sequences per program; a thread keeps a column of its pair's alignment in registers.
        warps: Warps per program.
    """

    pairs: int
    warps: int


def obstacle(query_frames: int, support_frames: int) -> str | None:
    """Why the kernels cannot take sequences of these lengths, None where they can."""
    most = max(query_frames, support_frames)
    return f"the sequences have {most} frames and the kernel takes up to {MAX_FRAMES}" if most > MAX_FRAMES else None


def choose(kernel: str, frames: int, table: Table) -> LaunchConfig:
    """The configuration of ``kernel`` for query sequences of ``frames`` frames."""
    entry = nearest(table[kernel], {"frames": max(frames, 1)})
    return LaunchConfig(entry["pairs"], entry["warps"])


@functools.cache
def load_table(device_name: str, architecture: str) -> Table:
    """The table for a GPU, see :func:`table_for`."""
    return table_for(files(__package__).joinpath("configs"), device_name, architecture)


def compile_specs(shared_memory: int, architecture: str) -> list[CompileSpec]:
    """Every kernel in every configuration of the tables for an architecture; none needs shared memory."""
    from .ahead import spec

    specs = {}
    for table in tables_for(files(__package__).joinpath("configs"), architecture):
        for variant, kernel in (("forward", "forward"), ("columns", "forward"), ("backward", "backward")):
            for entry in table[kernel]:
                for transposed in (False, True):
                    item = spec(variant, entry["frames"], choose(kernel, entry["frames"], table), transposed)
                    specs[item.label, item.warps] = item
    return list(specs.values())
