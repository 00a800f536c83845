"""The free-energy kernels as they are launched, described for a compiler without a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import triton.language as tl

from ..common.tables import CompileSpec, power_of_two
from .config import LaunchConfig
from .device import free_energy_backward, free_energy_forward, pack_model

_BINS = 8
_POINTERS = {"target": "*i64", "group": "*i64", "group_out": "*i64", "present": "*u8"}
_NUMBERS = {
    "rows": "i32",
    "temperature": "fp64",
    "margin": "fp64",
    "distillation_weight": "fp64",
    "cross_entropy_weight": "fp64",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a launch may have beside its configuration, where that makes another program.

    Attributes:
        tempered: The distillation has a temperature other than 1.
        logits: Their type, ``"bf16"`` or ``"fp32"``.
        channels: Channels of evidence K; the backward pass knows nothing of them.
    """

    tempered: bool = False
    logits: str = "bf16"
    channels: int = 2


# The usual one, the one with most to keep, and what lies in between: the importance of each (``CompileSpec``).
VARIANTS = {Variant(): 0, Variant(True, "fp32", 4): 1, Variant(True): 2, Variant(False, "fp32", 4): 2}


def spec(kernel: str, views: int, classes: int, launch: LaunchConfig, variant: Variant, importance: int = 0) -> CompileSpec:
    """The forward or backward kernel in one configuration, with every optional input given: the largest launch of its kind."""
    function = free_energy_forward if kernel == "forward" else free_energy_backward
    constants: dict[str, Any] = {
        "PRESENT": True,
        "TEMPERED": variant.tempered,
        "TOTAL": True,
        "TASK": True,
        "DISTILLATION": True,
        "CROSS_ENTROPY": True,
        "V": views,
        "K": variant.channels,
        "BINS": _BINS,
        "C": classes,
        "BLOCK_V": power_of_two(views),
        "BLOCK_C": power_of_two(classes),
        "ROWS": launch.rows,
        "ROW_PER_THREAD": launch.row_per_thread,
        "ACC": tl.float32,
        "APPROXIMATE": True,
    }
    names = function.arg_names
    pointers = {**_POINTERS, "logits": f"*{variant.logits}", "grad_logits": f"*{variant.logits}"}
    types = {name: _NUMBERS.get(name) or pointers.get(name, "*fp32") for name in names if name not in constants}
    channels = f" K={variant.channels}" if kernel == "forward" else ""
    return CompileSpec(
        kernel=function,
        label=f"{kernel} V={views} C={classes}{channels} {variant.logits} {'tau' if variant.tempered else 'tau=1'} {launch.rows} rows",
        signature=types,
        constants={name: value for name, value in constants.items() if name in names},
        amd_constants={"APPROXIMATE": False},
        divisible=frozenset(name for name in types if name not in _NUMBERS),
        warps=launch.warps,
        stages=1,
        bytes_per_element=_bytes_per_element(kernel, views, classes, variant),
        importance=importance,
    )


def pack_spec(views: int) -> CompileSpec:
    """The kernel that packs the generative model."""
    constants = {"V": views, "K": 2, "BINS": _BINS, "BLOCK": 1024, "BLOCK_V": power_of_two(views), "TINY": 1e-38, "ACC": tl.float32}
    types = {name: "*fp32" if name == "table" else "*fp64" for name in pack_model.arg_names if name not in constants}
    return CompileSpec(pack_model, f"pack V={views}", types, constants, frozenset(types), 4, 1, 12.0)


def _bytes_per_element(kernel: str, views: int, classes: int, variant: Variant) -> float:
    """The logits, and a few numbers per query (V the views' own, K - 1 channels of context) over its V x C of them."""
    item_size = 2 if variant.logits == "bf16" else 4
    if kernel == "forward":
        per_row = 8 + views + 4 * views * (variant.channels - 1) + 4 * 4 + 3 * 4 * views + 8 + 4
        return item_size + per_row / (views * classes)
    per_row = 4 * 4 + 8 + views + 4 * views + 4 + 8
    return 2 * item_size + per_row / (views * classes)
