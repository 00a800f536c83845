"""Launch configurations of the free-energy kernels: how many queries a program takes, and with how many warps.

They come from the tables in ``configs/`` (``common/tables.py``). An entry for other sizes is made to fit: the volume of a program's
tile is kept, and what does not fit the shared memory of the device is cut down until it does.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from importlib.resources import files

from ..common.tables import CompileSpec, Table, nearest, power_of_two, table_for, tables_for

MAX_VIEWS = 9
MAX_CLASSES = 1024
KERNELS = ("forward", "backward")

_THREADS_PER_WARP = 32

# Few classes, a block of them filled, and many: what is compiled ahead of time for every number of views.
_CLASSES = (5, 8, 20, 64, 256, MAX_CLASSES)


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is launched.

    Attributes:
        rows: Queries per program.
        warps: Warps per program.
        row_per_thread: Every thread owns whole queries: no sum over classes crosses threads.
    """

    rows: int
    warps: int
    row_per_thread: bool


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a configuration depends on: views, classes rounded up to a power of two, bytes of a logit in registers."""

    views: int
    classes: int
    item_size: int = 4

    @classmethod
    @functools.lru_cache(maxsize=4096)  # asked for at every launch
    def of(cls, views: int, classes: int, item_size: int = 4) -> Shape:
        """Round the classes of a call up."""
        return cls(views, power_of_two(classes), item_size)

    @property
    def volume(self) -> int:
        """Elements of one query that a program keeps in registers."""
        return self.views * self.classes


def choose(kernel: str, shape: Shape, table: Table, shared_memory: int) -> LaunchConfig:
    """The configuration of ``kernel`` at ``shape``.

    Args:
        kernel: One of ``KERNELS``.
        shape: The rounded shape of the call.
        table: Entries by kernel, see :func:`load_table`.
        shared_memory: Bytes of shared memory that a program may have on the device.
    """
    rounded = [entry | {"classes": power_of_two(entry["classes"])} for entry in table[kernel]]
    entry = nearest(rounded, {"views": shape.views, "classes": shape.classes})
    rows = entry["rows"] * entry["views"] * entry["classes"] / shape.volume
    rows = 1 << max(0, round(math.log2(rows)))
    # A thread that owns a query repeats nothing of its inference; a lane without a query would repeat another's.
    rows = min(rows, max(entry["rows"], _THREADS_PER_WARP * entry["warps"]))
    while rows > 1 and shared_memory_bound(rows, shape) > shared_memory:
        rows //= 2
    return LaunchConfig(rows, entry["warps"], rows >= _THREADS_PER_WARP * entry["warps"])


def shared_memory_bound(rows: int, shape: Shape) -> int:
    """An upper bound of the shared memory of a program in bytes: changes of layout pass one view's tile through it."""
    return 2 * rows * shape.classes * shape.item_size


@functools.cache
def load_table(device_name: str, architecture: str) -> Table:
    """The table for a GPU, see :func:`table_for`."""
    return table_for(files(__package__).joinpath("configs"), device_name, architecture)


def compile_specs(shared_memory: int, architecture: str) -> list[CompileSpec]:
    """Every kernel as a device with this much shared memory would run it, in every configuration of the tables for an architecture.

    The shapes are those of the tables and, since others run as the nearest of those, every number of views with few and many classes.
    """
    from .ahead import VARIANTS, pack_spec, spec

    specs = {}
    for table in tables_for(files(__package__).joinpath("configs"), architecture):
        for kernel in KERNELS:
            named = [(entry["views"], entry["classes"]) for entry in table[kernel]]
            others = [(views, classes) for views in range(1, MAX_VIEWS + 1) for classes in _CLASSES]
            for views, classes in dict.fromkeys(named + others):
                launch = choose(kernel, Shape.of(views, classes), table, shared_memory)
                for variant, importance in VARIANTS.items():
                    usual = (views, classes) in named
                    item = spec(kernel, views, classes, launch, variant, importance if usual or importance == 1 else 2)
                    specs[item.label, item.warps] = item
    return [*specs.values(), pack_spec(1), pack_spec(MAX_VIEWS)]
