"""The OTAM kernels as they are launched, described for a compiler without a GPU."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from ..common.tables import CompileSpec
from .config import LaunchConfig
from .device import otam_backward, otam_forward

_TYPES = {
    "query_frames": "*i64",
    "support_frames": "*i64",
    "pairs": "i64",
    "pair_stride": "i32",
    "row_stride": "i32",
    "column_stride": "i32",
    "smoothing": "fp64",
}
_NUMBERS = {"pairs", "pair_stride", "row_stride", "column_stride", "smoothing"}


def spec(kernel: str, frames: int, launch: LaunchConfig) -> CompileSpec:
    """A kernel for sequences of ``frames`` frames, with numbers of frames given: the larger variant.

    ``kernel`` is ``"forward"``, ``"columns"`` (the forward kernel, keeping what the backward one needs) or ``"backward"``.
    """
    function = otam_backward if kernel == "backward" else otam_forward
    sizes = {"ROWS": frames, "COLUMNS": frames, "LENGTHS": True, "KEEP": kernel == "columns", "PAIRS": launch.pairs, "ACC": tl.float32}
    names = function.arg_names
    constants: dict[str, Any] = {name: value for name, value in sizes.items() if name in names}
    types = {name: _TYPES.get(name, "*fp32") for name in names if name not in constants}
    per_pair = 4 + 2 * 8
    return CompileSpec(
        kernel=function,
        label=f"{kernel} T={frames} {launch.pairs} pairs",
        signature=types,
        constants=constants,
        divisible=frozenset(name for name in types if name not in _NUMBERS),
        warps=launch.warps,
        stages=1,
        bytes_per_element={"forward": 4, "columns": 8, "backward": 12}[kernel] + per_pair / frames**2,
    )
