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
    "pairs": "i32",
    "pair_stride": "i32",
    "row_stride": "i32",
    "column_stride": "i32",
    "smoothing": "fp64",
}


def spec(kernel: str, frames: int, launch: LaunchConfig, transposed: bool = False) -> CompileSpec:
    """A kernel for sequences of ``frames`` frames, with numbers of frames given: the larger variant.

    ``kernel`` is ``"forward"``, ``"columns"`` (the forward kernel, keeping what the backward one needs) or ``"backward"``;
    ``transposed`` distances are those of the other direction.
    """
    function = otam_backward if kernel == "backward" else otam_forward
    rows, columns = (1, frames) if transposed else (frames, 1)
    strides = {"pair_stride": frames * frames, "row_stride": rows, "column_stride": columns}
    constants: dict[str, Any] = {
        "ROWS": frames,
        "COLUMNS": frames,
        "LENGTHS": True,
        "KEEP": kernel == "columns",
        "PAIRS": launch.pairs,
        "ACC": tl.float32,
        **{name: 1 for name, stride in strides.items() if stride == 1},  # which Triton takes for a constant
    }
    names = function.arg_names
    types = {name: _TYPES.get(name, "*fp32") for name in names if name not in constants}
    per_pair = 4 + 2 * 8
    return CompileSpec(
        kernel=function,
        label=f"{kernel} T={frames} {launch.pairs} pairs{' transposed' * transposed}",
        signature=types,
        constants={name: value for name, value in constants.items() if name in names},
        divisible=frozenset(name for name in types if types[name].startswith("*") or strides.get(name, 1) % 16 == 0),
        warps=launch.warps,
        stages=1,
        importance=int(transposed),
        bytes_per_element={"forward": 4, "columns": 8, "backward": 12}[kernel] + per_pair / frames**2,
    )
