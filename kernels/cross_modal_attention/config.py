"""Launch configurations: which kernels a shape runs, how much of it a program takes, and how many warps.

They come from the tables in ``configs/`` (``common/tables.py``). An entry for other sizes is made to fit: the volume of a program's
tile is kept, and what does not fit the shared memory of the device is cut down until it does.
"""

from __future__ import annotations

import dataclasses
import functools
from importlib.resources import files

from ..common.tables import CompileSpec, Table, nearest, power_of_two, table_for, tables_for

MAX_WIDTH = 256

# Above this many queries the matrix units are worth their padding (float32, which they only emulate, needs more of them),
# and above this many tokens or elements a pair leaves the registers. These follow from counting operations and registers;
# they wait for a measurement on a GPU.
_ROWS_MAX_QUERIES = {2: 8, 4: 32, 8: 32}
_ROWS_MAX_TOKENS = 128
_TILES_MAX_QUERIES = 16
_TILES_MAX_TOKENS = 64
_MAX_ELEMENTS = 8192

# No GPU that emulates float32 products has as little for a program.
_AMD_SHARED_MEMORY = 64 << 10

# Parts of float32 vectors wider than 128: one for every warp of a program.
_PARTS = 8

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
        parts: Parts that vectors are cut into, where a program would not hold them otherwise.
    """

    pairs: int
    block_rows: int
    block_tokens: int
    warps: int
    stages: int = 1
    parts: int = 1


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
    return None


def choose(kernel: str, shape: Shape, table: Table, shared_memory: int) -> LaunchConfig:
    """The configuration of ``kernel`` at ``shape``.

    Args:
        kernel: One of ``KERNELS``.
        shape: The rounded shape of the call.
        table: Entries by kernel, see :func:`load_table`.
        shared_memory: Bytes of shared memory that a program may have on the device.
    """
    # A different element size counts like any other factor of two.
    entry = nearest(table[kernel], {"item_size": shape.item_size, "width": shape.width, "tokens": shape.tokens})
    if kernel.startswith("stream"):
        parts = _PARTS if shape.width > MAX_WIDTH // 2 and shape.item_size > 2 else 1
        config = LaunchConfig(1, entry["block_rows"], entry["block_tokens"], entry["warps"], entry["stages"], parts)
    else:
        matrix = kernel.startswith("tiles")  # the matrix units want blocks of at least 16
        rows, tokens = (max(16, shape.rows), max(16, shape.tokens)) if matrix else (1, shape.tokens)
        pairs = max(1, entry["pairs"] * entry["tokens"] * entry["width"] // (tokens * shape.width))
        config = LaunchConfig(pairs, rows, tokens, entry["warps"], entry.get("stages", 1))
    return fit(kernel, config, shape, shared_memory)


def fit(kernel: str, config: LaunchConfig, shape: Shape, shared_memory: int) -> LaunchConfig:
    """Cut a configuration down until it fits the shared memory: first the pairs, then the pipeline, then the blocks."""
    emulated = shared_memory > _AMD_SHARED_MEMORY
    while shared_memory_bound(kernel, config, shape, emulated) > shared_memory:
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


def shared_memory_bound(kernel: str, config: LaunchConfig, shape: Shape, emulated: bool = True) -> int:
    """An upper bound of the shared memory of a program in bytes, not far above what the compiler needs.

    ``emulated``: products of float32 are made of TF32 ones, as on NVIDIA's GPUs; AMD's matrix units have them.
    """
    if kernel.startswith("rows"):
        # Only sums that cross warps and changes of layout pass through it, a tile at most.
        return config.pairs * config.block_tokens * shape.width * 4
    vector = shape.width * shape.item_size * 2  # key and value, or query and gradient
    tokens, rows = config.block_tokens * vector, config.block_rows * vector
    # What the loop of the kernel reads is there once per stage.
    read, kept = (rows, tokens) if kernel == "stream_backward_tokens" else (tokens, rows)
    scores = 2 * config.block_rows * config.block_tokens * 4
    if shape.item_size > 2 and emulated:
        # They are made of two halves of each query.
        read, kept = (2 * rows, tokens) if kernel == "stream_backward_tokens" else (tokens, 2 * rows)
    elif shape.item_size > 2:
        kept, scores = 0, scores * config.parts  # what stays lies in registers
    needed = config.stages * read + kept + scores
    if kernel in ("tiles_backward", "stream_backward_tokens"):
        # On the way out the float32 gradients of key and value change their layout.
        needed = max(needed, 2 * config.block_tokens * shape.width * 4)
    return config.pairs * needed


@functools.cache
def load_table(device_name: str, architecture: str) -> Table:
    """The table for a GPU, see :func:`table_for`."""
    return table_for(files(__package__).joinpath("configs"), device_name, architecture)


def compile_specs(shared_memory: int, architecture: str) -> list[CompileSpec]:
    """Every kernel in every configuration of the tables for an architecture, as a device with this much shared memory would run it."""
    from .ahead import spec, variants

    specs = {}
    for table in tables_for(files(__package__).joinpath("configs"), architecture):
        for kernel in KERNELS:
            for entry in table[kernel]:
                rows = 3 if kernel.startswith("rows") else 16
                shape = Shape.of(entry["item_size"], entry["width"], rows, entry.get("tokens", 512))
                launch = choose(kernel, shape, table, shared_memory)
                for variant, importance in variants(kernel, shape).items():
                    item = spec(kernel, shape, launch, variant, importance)
                    specs[item.label, item.warps, item.stages] = item
    return list(specs.values())
