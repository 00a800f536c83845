"""Launch configurations: which kernels a shape runs, how much of it a program takes, and how many warps.

Configurations are checked in, one table per GPU in ``configs/*.json``, never searched at run time. A lookup goes from exact to
nearest to default, twice: first the GPU (its own table, then one of the same architecture, then ``default.json``), then the
shape (its own entry, then the nearest in log size of the same kernel, with the volume of a program's tile kept). What does not
fit the shared memory of the device is cut down until it does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from importlib.resources import files
from typing import Any, NamedTuple

MAX_WIDTH = 256

# Above this many queries the matrix units are worth their padding (float32, which they only emulate, needs more of them),
# and above this many tokens or elements a pair leaves the registers. These follow from counting operations and registers;
# they wait for a measurement on a GPU.
_ROWS_MAX_QUERIES = {2: 8, 4: 32, 8: 32}
_ROWS_MAX_TOKENS = 128
_TILES_MAX_QUERIES = 16
_TILES_MAX_TOKENS = 64
_MAX_ELEMENTS = 8192

KERNELS = (
    "rows_forward",
    "rows_backward",
    "tiles_forward",
    "tiles_backward",
    "stream_forward",
    "stream_backward_queries",
    "stream_backward_tokens",
)


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is launched.

    Attributes:
        pairs: Pairs (one head of one video) per program.
        block_rows: Queries per block, 1 where queries pass by one at a time.
        block_tokens: Tokens per block.
        warps: Warps per program.
        stages: Depth of the software pipeline.
    """

    pairs: int
    block_rows: int
    block_tokens: int
    warps: int
    stages: int = 1


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a configuration depends on: sizes rounded up to powers of two, and the size of an element in bytes."""

    item_size: int
    width: int
    rows: int
    tokens: int

    @classmethod
    def of(cls, item_size: int, width: int, rows: int, tokens: int) -> Shape:
        """Round the sizes of a call up."""
        return cls(item_size, max(16, power_of_two(width)), power_of_two(rows), power_of_two(tokens))


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below ``size`` (1 for 0)."""
    return 1 << max(size - 1, 0).bit_length()


def route(shape: Shape) -> str:
    """Which kernels a shape runs: ``"rows"``, ``"tiles"`` or ``"stream"``."""
    elements = shape.tokens * shape.width
    if shape.rows <= _ROWS_MAX_QUERIES[shape.item_size] and shape.tokens <= _ROWS_MAX_TOKENS and elements <= _MAX_ELEMENTS:
        return "rows"
    small = shape.rows <= _TILES_MAX_QUERIES and shape.tokens <= _TILES_MAX_TOKENS
    # Wide heads leave room for half as many elements: a matrix unit wants the whole of a vector at once.
    fits = elements <= (_MAX_ELEMENTS if shape.width < MAX_WIDTH // 2 else _MAX_ELEMENTS // 2)
    return "tiles" if shape.item_size == 2 and small and fits else "stream"


def obstacle(shape: Shape) -> str | None:
    """Why no kernel takes this shape, None where one does."""
    if shape.width > MAX_WIDTH:
        return f"the kernels take heads up to {MAX_WIDTH} wide and these are wider (split the features into more heads)"
    if shape.width > MAX_WIDTH // 2 and shape.item_size > 2 and route(shape) == "stream":
        return (
            f"heads wider than {MAX_WIDTH // 2} in float32 leave the registers beyond {_ROWS_MAX_QUERIES[4]} queries or "
            f"{_MAX_ELEMENTS // shape.width} tokens (split the features into more heads, or use 16 bits)"
        )
    return None


def choose(kernel: str, shape: Shape, table: dict[str, list[dict[str, int]]], shared_memory: int) -> LaunchConfig:
    """The configuration of ``kernel`` at ``shape``.

    Args:
        kernel: One of ``KERNELS``.
        shape: The rounded shape of the call.
        table: Entries by kernel, see :func:`load_table`.
        shared_memory: Bytes of shared memory that a program may have on the device.
    """
    nearest = min(table[kernel], key=lambda entry: _distance(entry, shape))
    if kernel.startswith("stream"):
        config = LaunchConfig(1, nearest["block_rows"], nearest["block_tokens"], nearest["warps"], nearest["stages"])
    else:
        matrix = kernel.startswith("tiles")  # the matrix units want blocks of at least 16
        rows, tokens = (max(16, shape.rows), max(16, shape.tokens)) if matrix else (1, shape.tokens)
        pairs = max(1, nearest["pairs"] * nearest["tokens"] * nearest["width"] // (tokens * shape.width))
        config = LaunchConfig(pairs, rows, tokens, nearest["warps"], nearest.get("stages", 1))
    return fit(kernel, config, shape, shared_memory)


def _distance(entry: dict[str, int], shape: Shape) -> float:
    """Distance of a table's entry in octaves; a different element size counts like any other factor of two."""
    return sum(abs(math.log2(entry[name] / getattr(shape, name))) for name in ("item_size", "width", "tokens") if name in entry)


def fit(kernel: str, config: LaunchConfig, shape: Shape, shared_memory: int) -> LaunchConfig:
    """Cut a configuration down until it fits the shared memory: first the pairs, then the pipeline, then the blocks."""
    while shared_memory_bound(kernel, config, shape) > shared_memory:
        if config.pairs > 1:
            config = dataclasses.replace(config, pairs=config.pairs // 2)
        elif config.stages > 1:
            config = dataclasses.replace(config, stages=config.stages - 1)
        elif kernel.startswith("stream") and config.block_tokens > 16:
            config = dataclasses.replace(config, block_tokens=config.block_tokens // 2)
        elif kernel.startswith("stream") and config.block_rows > 16:
            config = dataclasses.replace(config, block_rows=config.block_rows // 2)
        else:
            break
    return config


def shared_memory_bound(kernel: str, config: LaunchConfig, shape: Shape) -> int:
    """An upper bound of the shared memory of a program in bytes, not far above what the compiler needs."""
    if kernel.startswith("rows"):
        # Only sums that cross warps and changes of layout pass through it, a tile at most.
        return config.pairs * config.block_tokens * shape.width * 4
    vector = shape.width * shape.item_size * 2  # key and value, or query and gradient
    # Float32 products on the matrix units are made of two halves of each query.
    tokens, rows = config.block_tokens * vector, config.block_rows * vector * (1 if shape.item_size == 2 else 2)
    # What the loop of the kernel reads is there once per stage.
    read, kept = (rows, tokens) if kernel == "stream_backward_tokens" else (tokens, rows)
    scores = 2 * config.block_rows * config.block_tokens * 4
    return config.pairs * (config.stages * read + kept + scores)


@functools.cache
def load_table(device_name: str, architecture: str) -> dict[str, list[dict[str, int]]]:
    """The table for a GPU: by name, else of the same architecture, else the default one.

    Args:
        device_name: As the driver gives it, for example ``"NVIDIA H200"``.
        architecture: For example ``"sm_90"`` or ``"gfx942"``.
    """
    default: dict[str, list[dict[str, int]]] = {}
    same_architecture: dict[str, list[dict[str, int]]] | None = None
    for file in sorted(files(__package__).joinpath("configs").iterdir(), key=lambda entry: entry.name):
        if not file.name.endswith(".json"):
            continue
        table = json.loads(file.read_text())
        if table["device"] == device_name:
            return dict(table["kernels"])
        if table["architecture"] == architecture:
            same_architecture = table["kernels"]
        if file.name == "default.json":
            default = table["kernels"]
    return default if same_architecture is None else same_architecture


class CompileSpec(NamedTuple):
    """One variant of one kernel, for compiling it without running it.

    Attributes:
        kernel: The Triton function.
        label: What tells this variant from the others of the kernel.
        signature: Triton type of every argument that is not a constant, by name.
        constants: Value of every constant, by name.
        amd_constants: Those that differ on AMD.
        divisible: Arguments known to be multiples of 16, as they are in a launch with aligned tensors.
        warps: Warps per program.
        stages: Depth of the software pipeline.
        bytes_per_element: Bytes that must cross the memory bus per element of ``key``, each tensor moved once.
    """

    kernel: Any
    label: str
    signature: dict[str, str]
    constants: dict[str, Any]
    amd_constants: dict[str, Any]
    divisible: frozenset[str]
    warps: int
    stages: int
    bytes_per_element: float


def compile_specs(shared_memory: int) -> list[CompileSpec]:
    """Every kernel in every configuration of the default table, as a device with this much shared memory would run it."""
    from .ahead import spec

    table = load_table("", "")
    specs = {}
    for kernel in KERNELS:
        for entry in table[kernel]:
            rows = 3 if kernel.startswith("rows") else 16
            shape = Shape.of(entry["item_size"], entry["width"], rows, entry.get("tokens", 512))
            item = spec(kernel, shape, choose(kernel, shape, table, shared_memory))
            specs[item.label] = item
    return list(specs.values())
