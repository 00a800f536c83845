"""The kernels of cross-modal attention as they are launched, described for a compiler without a GPU."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from ..common.tables import CompileSpec
from .config import LaunchConfig, Shape
from .rows import rows_backward, rows_forward
from .tiles import tiles_backward_queries, tiles_backward_tokens, tiles_forward

_FUNCTIONS = {
    "rows_forward": rows_forward,
    "rows_backward": rows_backward,
    "tiles_forward": tiles_forward,
    "tiles_backward": tiles_backward_tokens,
    "stream_forward": tiles_forward,
    "stream_backward_queries": tiles_backward_queries,
    "stream_backward_tokens": tiles_backward_tokens,
}
_ELEMENTS = {"query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value"}
_FLOAT32 = {"log_weight", "log_evidence", "grad_log_evidence", "baselines", "grad_weight"}
_COUNTS = {"pairs", "heads", "rows", "tokens"}


def spec(kernel: str, shape: Shape, launch: LaunchConfig) -> CompileSpec:
    """One kernel in one configuration, with a log-weight per query and token and its gradient: the largest variant."""
    constants: dict[str, Any] = {
        "WEIGHTED": True,
        "WEIGHT_GRAD": True,
        "PER_ROW": True,
        "FUSED": kernel == "tiles_backward",
        "WIDTH": shape.width,
        "BLOCK_WIDTH": shape.width,
        "PAIRS": launch.pairs,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_TOKENS": launch.block_tokens,
        "ACC": tl.float32,
        "PRECISION": "tf32x3",
    }
    function = _FUNCTIONS[kernel]
    names = function.arg_names
    types = {name: _argument_type(name, shape.item_size) for name in names if name not in constants}
    block = f"{launch.pairs}x{launch.block_rows}x{launch.block_tokens}"
    return CompileSpec(
        kernel=function,
        label=f"{kernel} d={shape.width} N={shape.tokens} {8 * shape.item_size}-bit {block}",
        signature=types,
        constants={name: value for name, value in constants.items() if name in names},
        amd_constants={"PRECISION": "ieee"} if "PRECISION" in names else {},
        divisible=frozenset(name for name in types if name not in _COUNTS and name != "scale" and not name.startswith("weight_")),
        warps=launch.warps,
        stages=launch.stages,
        bytes_per_element=_bytes_per_element(kernel, shape),
    )


def _argument_type(name: str, item_size: int) -> str:
    if name in _ELEMENTS:
        return "*bf16" if item_size == 2 else "*fp32"
    if name in _FLOAT32:
        return "*fp32"
    return "fp32" if name == "scale" else "i32"


def _bytes_per_element(kernel: str, shape: Shape) -> float:
    """Traffic of one pair over the elements of its key; the vectors of a query count R / N of a token's, a score 1 / d."""
    tokens, rows = {"forward": (2, 2), "backward": (4, 3), "backward_queries": (2, 3), "backward_tokens": (4, 2)}[kernel.split("_", 1)[1]]
    scores = 4 * (2 if kernel in ("rows_backward", "tiles_backward", "stream_backward_tokens") else 1)
    ratio = shape.rows / shape.tokens
    return shape.item_size * (tokens + rows * ratio) + scores * shape.rows / shape.width
