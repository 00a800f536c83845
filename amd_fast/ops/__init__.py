"""The custom ops: differentiable functions with a fused Triton kernel and a readable PyTorch reference behind them.

Importing this package needs torch only. Which implementation runs is decided per call, see :mod:`amd_fast.ops.dispatch`
and :func:`explain`.
"""

from __future__ import annotations

from amd_fast.lazy import attach
from amd_fast.ops.dispatch import explain

_PUBLIC = {
    "cross_modal_attention": "amd_fast.ops.attention",
    "FreeEnergyLoss": "amd_fast.ops.free_energy",
    "free_energy_loss": "amd_fast.ops.free_energy",
    "otam_alignment": "amd_fast.ops.otam",
}

__all__ = ["FreeEnergyLoss", "cross_modal_attention", "explain", "free_energy_loss", "otam_alignment"]

__getattr__, __dir__ = attach(__name__, _PUBLIC)
