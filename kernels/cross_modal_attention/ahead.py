"""The kernels of cross-modal attention as they are launched, described for a compiler without a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import triton.language as tl

from ..common.tables import CompileSpec
from .config import LaunchConfig, Shape
from .rows import rows_backward, rows_forward
from .sets import set_backward, set_forward
from .stream import stream_backward, stream_forward
from .tiles import tiles_backward_queries, tiles_backward_tokens, tiles_forward

_FUNCTIONS = {
    "rows_forward": rows_forward,
    "rows_backward": rows_backward,
    "set_forward": set_forward,
    "set_backward": set_backward,
    "stream_forward": stream_forward,
    "stream_backward": stream_backward,
    "tiles_forward": tiles_forward,
    "tiles_backward_queries": tiles_backward_queries,
    "tiles_backward_tokens": tiles_backward_tokens,
}
_ELEMENTS = {"query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value"}
_FLOAT32 = {"log_weight", "log_evidence", "grad_log_evidence", "baselines", "grad_weight"}
# Enough heads for aligned strides; more of them change nothing.
_HEADS = 8


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a launch may have beside its configuration, where that makes another program.

    Attributes:
        weights: ``"row"`` (a log-weight per query and token), ``"shared"`` (one per token) or ``"none"``.
        width: Of a head, where it is not the whole of the block that holds it; 0: all of it.
        aligned: Strides are multiples of 16 elements, so that vectors are read in wide loads.
        gradient: That of the log-weights is wanted too.
    """

    weights: str = "row"
    width: int = 0
    aligned: bool = True
    gradient: bool = True

    @property
    def text(self) -> str:
        """What a label says of it: only what is not usual."""
        said = {
            f"{self.weights} weights": self.weights != "row",
            f"width {self.width}": self.width > 0,
            "odd strides": not self.aligned,
            "no gradient of weights": not self.gradient,
        }
        return "".join(f" {part}" for part, unusual in said.items() if unusual)


def variants(kernel: str, shape: Shape) -> dict[Variant, int]:
    """The kinds of launch at a shape that differ in registers, and the importance of each (``CompileSpec``)."""
    masked = shape.width * 3 // 4
    if kernel.endswith("forward") or kernel in ("stream_backward", "tiles_backward_queries"):  # nothing is made of the log-weights
        return {Variant(): 0, Variant("row", masked): 1, Variant("none"): 2, Variant("shared", masked, aligned=False): 2}
    unusual = {Variant("shared", masked, aligned=False): 1, Variant("none"): 1}
    between = (Variant("shared"), Variant("row", masked), Variant(gradient=False))
    return {Variant(): 0, **unusual, **dict.fromkeys(between, 2)}


def spec(kernel: str, shape: Shape, launch: LaunchConfig, variant: Variant, importance: int = 0) -> CompileSpec:
    """One kernel in one configuration, as a launch of this kind compiles it."""
    function = _FUNCTIONS[kernel]
    names = function.arg_names
    weighted = variant.weights != "none"
    numbers = _strides(shape, variant)
    constants: dict[str, Any] = {
        "WEIGHTED": weighted,
        "WEIGHT_GRAD": weighted and variant.gradient,
        "PER_ROW": variant.weights == "row" and variant.gradient,
        "WIDTH": variant.width or shape.width,
        "BLOCK_WIDTH": shape.width // launch.parts,
        "PAIRS": launch.pairs,
        "BLOCK_ROWS": launch.block_rows,
        "BLOCK_TOKENS": launch.block_tokens,
        "ACC": tl.float32,
        "PRECISION": "tf32x3",
        "PARTS": launch.parts,
        **{name: 1 for name, number in numbers.items() if number == 1},  # which Triton takes for a constant, as it does None
        **({} if weighted else {"log_weight": None}),
    }
    types = {name: _argument_type(name, shape.item_size) for name in names if name not in constants}
    block = f"{launch.pairs}x{launch.block_rows}x{launch.block_tokens}"
    return CompileSpec(
        kernel=function,
        label=f"{kernel} d={shape.width} N={shape.tokens} {8 * shape.item_size}-bit {block}{variant.text}",
        signature=types,
        constants={name: value for name, value in constants.items() if name in names},
        amd_constants={"PRECISION": "ieee"} if "PRECISION" in names else {},
        divisible=frozenset(name for name in types if types[name].startswith("*") or numbers.get(name, 1) % 16 == 0),
        warps=launch.warps,
        stages=launch.stages,
        bytes_per_element=_bytes_per_element(kernel, shape),
        importance=importance,
    )


def _strides(shape: Shape, variant: Variant) -> dict[str, int]:
    """The strides of contiguous tensors, or those of slices of vectors one element longer."""
    step = (variant.width or shape.width) + (not variant.aligned)
    rows = max(1, shape.rows - 1)  # a query per modality and the joint one are one more than a power of two, or one less
    numbers: dict[str, int] = {}
    for name, length in (("query", rows), ("key", shape.tokens), ("value", shape.tokens)):
        numbers |= {f"{name}_b": length * _HEADS * step, f"{name}_{'r' if name == 'query' else 'n'}": _HEADS * step, f"{name}_h": step}
    per_row = {"none": (0, 0, 0), "shared": (shape.tokens, 0, 1), "row": (rows * shape.tokens, shape.tokens, 1)}[variant.weights]
    return numbers | dict(zip(("weight_b", "weight_r", "weight_n"), per_row, strict=True))


def _argument_type(name: str, item_size: int) -> str:
    if name in _ELEMENTS:
        return "*bf16" if item_size == 2 else "*fp32"
    if name in _FLOAT32:
        return "*fp32"
    return "fp32" if name == "scale" else "i32"


def _bytes_per_element(kernel: str, shape: Shape) -> float:
    """Traffic of one pair over the elements of its key; the vectors of a query count R / N of a token's, a score 1 / d."""
    tokens, rows = {"forward": (2, 2), "backward": (4, 3), "backward_queries": (2, 3), "backward_tokens": (4, 2)}[kernel.split("_", 1)[1]]
    scores = 4 * (2 if kernel.endswith(("_backward", "_tokens")) else 1)
    ratio = shape.rows / shape.tokens
    return shape.item_size * (tokens + rows * ratio) + scores * shape.rows / shape.width
