"""The custom ops: differentiable functions with a fused Triton kernel and a readable PyTorch reference behind them.

Importing this package needs torch only. Which implementation runs is decided per call, see :mod:`amd_fast.ops.dispatch`
and :func:`explain`.
"""

from __future__ import annotations

import importlib
from typing import Any

from amd_fast.ops.dispatch import explain

_PUBLIC = {
    "cross_modal_attention": "amd_fast.ops.attention",
    "FreeEnergyLoss": "amd_fast.ops.free_energy",
    "free_energy_loss": "amd_fast.ops.free_energy",
    "otam_alignment": "amd_fast.ops.otam",
}

__all__ = ["FreeEnergyLoss", "cross_modal_attention", "explain", "free_energy_loss", "otam_alignment"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
