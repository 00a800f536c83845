"""Launch configurations of the free-energy kernels: how many queries a program takes, and with how many warps.

Configurations are checked in, one table per GPU in ``configs/*.json``, never searched at run time. A lookup goes from exact to
nearest to default, twice: first the GPU (its own table, then one of the same architecture, then ``default.json``), then the shape
(its own entry, then the nearest in log size, with the volume of a program's tile kept). What does not fit the shared memory of the
device is cut down until it does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from importlib.resources import files
from typing import Any, NamedTuple

MAX_VIEWS = 9
MAX_CLASSES = 1024
KERNELS = ("forward", "backward")

_THREADS_PER_WARP = 32


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
    def of(cls, views: int, classes: int, item_size: int = 4) -> Shape:
        """Round the classes of a call up."""
        return cls(views, power_of_two(classes), item_size)

    @property
    def volume(self) -> int:
        """Elements of one query that a program keeps in registers."""
        return self.views * self.classes


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def choose(kernel: str, shape: Shape, table: dict[str, list[dict[str, int]]], shared_memory: int) -> LaunchConfig:
    """The configuration of ``kernel`` at ``shape``.

    Args:
        kernel: One of ``KERNELS``.
        shape: The rounded shape of the call.
        table: Entries by kernel, see :func:`load_table`.
        shared_memory: Bytes of shared memory that a program may have on the device.
    """
    nearest = min(table[kernel], key=lambda entry: _distance(entry, shape))
    volume = nearest["views"] * power_of_two(nearest["classes"])
    rows = nearest["rows"] * volume / shape.volume
    rows = 1 << max(0, round(math.log2(rows)))
    # A thread that owns a query repeats nothing of its inference; a lane without a query would repeat another's.
    rows = min(rows, max(nearest["rows"], _THREADS_PER_WARP * nearest["warps"]))
    while rows > 1 and shared_memory_bound(rows, shape) > shared_memory:
        rows //= 2
    return LaunchConfig(rows, nearest["warps"], rows >= _THREADS_PER_WARP * nearest["warps"])


def _distance(entry: dict[str, int], shape: Shape) -> float:
    """Distance of a table's entry in octaves."""
    return abs(math.log2(entry["views"] / shape.views)) + abs(math.log2(power_of_two(entry["classes"]) / shape.classes))


def shared_memory_bound(rows: int, shape: Shape) -> int:
    """An upper bound of the shared memory of a program in bytes: changes of layout pass one view's tile through it."""
    return 2 * rows * shape.classes * shape.item_size


@functools.cache
def load_table(device_name: str, architecture: str) -> dict[str, list[dict[str, int]]]:
    """The table for a GPU: by name, else of the same architecture, else the default one.

    Args:
        device_name: As the driver gives it, for example ``"NVIDIA H200"``.
        architecture: For example ``"sm_90"`` or ``"gfx942"``.
    """
    tables = [json.loads(file.read_text()) for file in files(__package__).joinpath("configs").iterdir() if file.name.endswith(".json")]
    for key, value in (("device", device_name), ("architecture", architecture), ("device", "default")):
        for table in tables:
            if table[key] == value:
                return dict(table["kernels"])
    raise FileNotFoundError("kernels/free_energy/configs/default.json is missing; install the package again")


class CompileSpec(NamedTuple):
    """One variant of one kernel, for compiling it without running it.

    Attributes:
        kernel: The Triton function.
        label: What tells this variant from the others of the kernel.
        signature: Triton type of every argument that is not a constant, by name.
        constants: Value of every constant, by name.
        divisible: Arguments known to be multiples of 16, as they are in a launch with aligned tensors.
        warps: Warps per program.
        stages: Depth of the software pipeline.
        bytes_per_element: Bytes that must cross the memory bus per logit, each tensor moved once.
    """

    kernel: Any
    label: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: frozenset[str]
    warps: int
    stages: int
    bytes_per_element: float


def compile_specs(shared_memory: int) -> list[CompileSpec]:
    """Every kernel in every configuration of the default table that a device with this much shared memory would run."""
    from .ahead import pack_spec, spec

    table = load_table("default", "any")
    specs = []
    for kernel in KERNELS:
        for entry in table[kernel]:
            launch = choose(kernel, Shape.of(entry["views"], entry["classes"]), table, shared_memory)
            specs.append(spec(kernel, entry["views"], entry["classes"], launch, tempered=True))
        specs.append(spec(kernel, 3, 5, choose(kernel, Shape.of(3, 5), table, shared_memory), tempered=False))
    return [*specs, pack_spec(1), pack_spec(MAX_VIEWS)]
