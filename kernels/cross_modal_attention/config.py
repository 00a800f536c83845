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

# Measured on an H100. Queries that pass by one at a time cost nothing beside reading the tokens while they are few and vectors are
# float32, which the matrix units only emulate; of 16 bits, where the tokens are half as many bytes, only the very smallest sets.
_ROWS_MAX_QUERIES = {4: 4, 8: 32}
_ROWS_MAX_TOKENS = 128
_ROWS_MAX_TOKENS_OF_FLOAT32_BACKWARD = 32
_ROWS_MAX_PAIRINGS_OF_16_BITS = 8
_ROWS_MAX_ELEMENTS = 8192
# Sets that one block holds, all of it in the registers of a few warps.
_SET_MAX_TOKENS = {"forward": 32, "backward": 64}
_SET_MAX_ELEMENTS = 4096
# More queries than this take two kernels for their gradients.
_BLOCK_OF_QUERIES = 16

# What AMD's GPUs have for a program; none of NVIDIA's that the kernels are compiled for has as little.
_AMD_SHARED_MEMORY = 64 << 10

# Float32 vectors wider than this leave the registers of the kernels that stream; wider than 128 those of all kernels, which take them in
# parts, one for every warp of a program.
_STREAM_MAX_FLOAT32 = {"forward": 128, "backward": 64}
_MAX_WHOLE_FLOAT32 = 128
_PARTS = 8

# On an H100, with Triton 3.6, a product of float32 with 64 rows by eight warps read memory that was not its own. The gradients' products
# have as many rows as a block has tokens.
_WARPS_OF_64_ROWS = 4

KERNELS = (
    "rows_forward",
    "rows_backward",
    "set_forward",
    "set_backward",
    "stream_forward",
    "stream_backward",
    "tiles_forward",
    "tiles_backward_queries",
    "tiles_backward_tokens",
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
    """What a configuration depends on: sizes rounded up to powers of two, and the size of an element in bytes.

    ``aligned``: the tokens' vectors begin at multiples of 16 elements, so that they are read in wide loads.
    """

    item_size: int
    width: int
    rows: int
    tokens: int
    aligned: bool = True

    @classmethod
    @functools.lru_cache(maxsize=4096)  # asked for at every launch
    def of(cls, item_size: int, width: int, rows: int, tokens: int, aligned: bool = True) -> Shape:
        """Round the sizes of a call up."""
        return cls(item_size, max(16, power_of_two(width)), power_of_two(rows), power_of_two(tokens), aligned)


def route(shape: Shape, direction: str, weight_gradient: bool = False) -> str:
    """Which kernels a shape runs: ``"rows"``, ``"set"``, ``"stream"`` or ``"tiles"``.

    Args:
        shape: The rounded shape of the call.
        direction: ``"forward"`` or ``"backward"``.
        weight_gradient: The gradient of the log-weights is wanted too, which the kernel that streams does not make.
    """
    elements = shape.tokens * shape.width
    if _passes_by_rows(shape, direction) and elements <= _ROWS_MAX_ELEMENTS:
        return "rows"
    if shape.item_size > 2 and shape.width > _STREAM_MAX_FLOAT32[direction]:
        return "tiles"
    many_queries = shape.rows > _BLOCK_OF_QUERIES
    if shape.item_size == 2 and not many_queries and shape.tokens <= _SET_MAX_TOKENS[direction] and elements <= _SET_MAX_ELEMENTS:
        return "set"
    return "tiles" if direction == "backward" and (many_queries or weight_gradient) else "stream"


def _passes_by_rows(shape: Shape, direction: str) -> bool:
    if shape.item_size == 2:
        return shape.rows * shape.tokens <= _ROWS_MAX_PAIRINGS_OF_16_BITS
    narrower = shape.item_size == 4 and direction == "backward"
    most_tokens = _ROWS_MAX_TOKENS_OF_FLOAT32_BACKWARD if narrower else _ROWS_MAX_TOKENS
    return shape.rows <= _ROWS_MAX_QUERIES[shape.item_size] and shape.tokens <= most_tokens


def obstacle(width: int) -> str | None:
    """Why no kernel takes heads this wide, None where one does."""
    if width > MAX_WIDTH:
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
    # The matrix units want blocks of at least 16 where products are summed over them, and 8 queries elsewhere; but AMD's want 16 there
    # too, and a set's vectors that are read element by element leave the registers beside 8.
    eight = kernel.endswith("forward") and shared_memory > _AMD_SHARED_MEMORY and (shape.aligned or not kernel.startswith("set"))
    queries = max(8 if eight else 16, shape.rows)
    if kernel.startswith("rows"):
        pairs = max(1, entry["pairs"] * entry["tokens"] * entry["width"] // (shape.tokens * shape.width))
        config = LaunchConfig(pairs, 1, shape.tokens, entry["warps"])
    elif kernel.startswith("set"):
        config = LaunchConfig(1, queries, max(16, shape.tokens), entry["warps"])
    else:
        wide = shape.width > _MAX_WHOLE_FLOAT32 and shape.item_size > 2
        parts = _PARTS if wide and kernel.startswith("tiles") else 1
        block_rows = queries if kernel == "stream_backward" else min(queries, _BLOCK_OF_QUERIES)
        # Elements that are read one by one take a register each for their address: half of them then, where all lie in registers.
        block_tokens = entry["block_tokens"] if shape.aligned or kernel != "stream_forward" else max(16, entry["block_tokens"] // 2)
        config = LaunchConfig(1, block_rows, block_tokens, entry["warps"], entry["stages"], parts)
    if shape.item_size == 4 and kernel.startswith(("set_backward", "stream_backward")) and config.block_tokens >= 64:
        config = dataclasses.replace(config, warps=min(config.warps, _WARPS_OF_64_ROWS))
    return fit(kernel, config, shape, shared_memory)


def fit(kernel: str, config: LaunchConfig, shape: Shape, shared_memory: int) -> LaunchConfig:
    """Cut a configuration down until it fits the shared memory: first the pairs, then the pipeline, then the block of tokens."""
    emulated = shared_memory > _AMD_SHARED_MEMORY
    while shared_memory_bound(kernel, config, shape, emulated) > shared_memory:
        if config.pairs > 1:
            config = dataclasses.replace(config, pairs=config.pairs // 2)
        elif config.stages > 1:
            config = dataclasses.replace(config, stages=config.stages - 1)
        elif kernel.startswith(("stream", "tiles")) and config.block_tokens > 16:
            config = dataclasses.replace(config, block_tokens=config.block_tokens // 2)
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
    read, kept = (rows, tokens) if kernel == "tiles_backward_tokens" else (tokens, rows)
    # Scores, and the log-weights once per stage.
    scores = (1 + config.stages) * config.block_rows * config.block_tokens * 4
    if kernel.endswith("backward"):
        kept += kept // 2  # the gradient of the queries on its way out
    if shape.item_size > 2 and emulated:
        # They are made of two halves of each query, which the kernel that streams keeps as factors of four products.
        halves = 4 * rows if kernel == "stream_backward" else 2 * rows
        read, kept = (2 * rows, tokens) if kernel == "tiles_backward_tokens" else (tokens, halves)
    elif shape.item_size > 2:
        kept, scores = kept // 2, scores * config.parts  # the queries; what else stays lies in registers
    needed = config.stages * read + kept + scores
    if kernel.endswith("backward") or kernel == "tiles_backward_tokens":
        # On the way out the float32 gradients of key and value change their layout.
        needed = max(needed, 2 * config.block_tokens * shape.width * 4)
    return needed


@functools.cache
def load_table(device_name: str, architecture: str) -> Table:
    """The table for a GPU, see :func:`table_for`."""
    return table_for(files(__package__).joinpath("configs"), device_name, architecture)


def compile_specs(shared_memory: int, architecture: str) -> list[CompileSpec]:
    """Every kernel in every configuration of the tables for an architecture, as a device with this much shared memory would run it."""
    from .ahead import spec, variants

    specs: dict[tuple[object, ...], CompileSpec] = {}
    for table in tables_for(files(__package__).joinpath("configs"), architecture):
        for kernel in KERNELS:
            for entry in table[kernel]:
                for rows in {"rows": (3,), "tiles": (64,)}.get(kernel.split("_")[0], (3, 9)):
                    shape = Shape.of(entry["item_size"], entry["width"], rows, entry.get("tokens", 512))
                    for variant, importance in variants(kernel, shape).items():
                        launch = choose(kernel, dataclasses.replace(shape, aligned=variant.aligned), table, shared_memory)
                        item = spec(kernel, shape, launch, variant, importance)
                        # Two entries that differ in the size of the sets alone can be one program.
                        types, constants = (repr(sorted(known.items())) for known in (item.signature, item.constants))
                        specs.setdefault((kernel, types, constants, *sorted(item.divisible), item.warps, item.stages), item)
    return list(specs.values())
