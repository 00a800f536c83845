"""The free-energy kernels as they are launched, described for a compiler without a GPU."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from ..common.tables import CompileSpec, power_of_two
from .config import LaunchConfig
from .device import free_energy_backward, free_energy_forward, pack_model

_CHANNELS, _BINS = 2, 8
_POINTERS = {"target": "*i64", "group": "*i64", "group_out": "*i64", "present": "*u8", "logits": "*bf16", "grad_logits": "*bf16"}
_NUMBERS = {
    "rows": "i64",
    "hidden_one": "i32",
    "temperature": "fp64",
    "margin": "fp64",
    "distillation_weight": "fp64",
    "cross_entropy_weight": "fp64",
}


def spec(kernel: str, views: int, classes: int, launch: LaunchConfig, tempered: bool) -> CompileSpec:
    """The forward or backward kernel in one configuration, with every optional input given: the largest variant."""
    function = free_energy_forward if kernel == "forward" else free_energy_backward
    constants: dict[str, Any] = {
        "PRESENT": True,
        "TEMPERED": tempered,
        "TOTAL": True,
        "TASK": True,
        "DISTILLATION": True,
        "CROSS_ENTROPY": True,
        "V": views,
        "K": _CHANNELS,
        "BINS": _BINS,
        "C": classes,
        "BLOCK_V": power_of_two(views),
        "BLOCK_C": power_of_two(classes),
        "ROWS": launch.rows,
        "ROW_PER_THREAD": launch.row_per_thread,
        "ACC": tl.float32,
    }
    names = function.arg_names
    types = {name: _NUMBERS.get(name) or _POINTERS.get(name, "*fp32") for name in names if name not in constants}
    return CompileSpec(
        kernel=function,
        label=f"{kernel} V={views} C={classes} {'tau' if tempered else 'tau=1'} {launch.rows} rows",
        signature=types,
        constants={name: value for name, value in constants.items() if name in names},
        divisible=frozenset(name for name in types if name not in _NUMBERS),
        warps=launch.warps,
        stages=1,
        bytes_per_element=_bytes_per_element(kernel, views, classes),
    )


def pack_spec(views: int) -> CompileSpec:
    """The kernel that packs the generative model."""
    constants = {"V": views, "K": _CHANNELS, "BINS": _BINS, "BLOCK": 1024, "BLOCK_V": power_of_two(views), "TINY": 1e-38, "ACC": tl.float32}
    types = {name: "*fp32" if name == "table" else "*fp64" for name in pack_model.arg_names if name not in constants}
    return CompileSpec(pack_model, f"pack V={views}", types, constants, frozenset(types), 4, 1, 12.0)


def _bytes_per_element(kernel: str, views: int, classes: int) -> float:
    """bfloat16 logits; the rest is a few numbers per query (V the views' own, K - 1 channels of context) over its V x C logits."""
    if kernel == "forward":
        per_row = 8 + views + 4 * views * (_CHANNELS - 1) + 4 * 4 + 3 * 4 * views + 8 + 4
        return 2 + per_row / (views * classes)
    per_row = 4 * 4 + 8 + views + 4 * views + 4 + 8
    return 2 + 2 + per_row / (views * classes)
