"""OTAM's soft alignment as Triton kernels: the functions that launch them.

The forward pass reads every distance once and writes one number per pair. The backward pass repeats it, keeping its columns in the
memory of the gradient, and a second kernel walks back: nothing is saved between the passes but the distances. Every result is owned by one
thread: nothing is added atomically and repeated runs agree bit for bit.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..common.gpu import gpu_of, on_device
from ..common.tables import ceil_div
from . import config as configurations
from .config import LaunchConfig
from .device import otam_backward, otam_forward


def otam_alignment(distances: Tensor, smoothing: float, query_frames: Tensor | None, support_frames: Tensor | None) -> Tensor:
    """Costs ``[P]`` of ``[P, Tq, Ts]`` float32 or float64 distances of any strides; arguments as in the reference."""
    cost = distances.new_empty(len(distances))
    _forward(distances, smoothing, _lengths(distances, query_frames, support_frames), cost, keep=False)
    return cost


def otam_alignment_backward(
    grad_cost: Tensor, distances: Tensor, smoothing: float, query_frames: Tensor | None, support_frames: Tensor | None
) -> Tensor:
    """Gradient ``[P, Tq, Ts]`` of the distances, contiguous; ``grad_cost [P]`` contiguous, the rest as in the forward pass."""
    grad = torch.empty_like(distances, memory_format=torch.contiguous_format)
    lengths = _lengths(distances, query_frames, support_frames)
    _forward(distances, smoothing, lengths, grad, keep=True)
    if len(grad):
        launch = _config("backward", distances)
        with on_device(distances):
            otam_backward[(ceil_div(len(grad), launch.pairs),)](
                grad_cost, distances, *_pointers(distances, lengths), grad, len(grad), *distances.stride(), smoothing,
                **_constants(distances, launch, lengths),
            )  # fmt: skip
    return grad


def _forward(distances: Tensor, smoothing: float, lengths: tuple[Tensor, Tensor] | None, out: Tensor, *, keep: bool) -> None:
    """Costs, or ln A of every cell, into ``out``."""
    if len(distances):
        launch = _config("forward", distances)
        with on_device(distances):
            otam_forward[(ceil_div(len(distances), launch.pairs),)](
                distances, *_pointers(distances, lengths), out, out, len(distances), *distances.stride(), smoothing, KEEP=keep,
                **_constants(distances, launch, lengths),
            )  # fmt: skip


def _lengths(distances: Tensor, query_frames: Tensor | None, support_frames: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Both numbers of frames, or None where neither is given."""
    if query_frames is None and support_frames is None:
        return None
    sides = zip((query_frames, support_frames), distances.shape[1:], strict=True)
    full = torch.ones(len(distances), dtype=torch.int64, device=distances.device)
    query, support = (full * most if frames is None else frames.contiguous() for frames, most in sides)
    return query, support


def _pointers(distances: Tensor, lengths: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    # Lengths that are not given are never read; something has to stand for their addresses.
    return lengths or (distances, distances)


def _constants(distances: Tensor, launch: LaunchConfig, lengths: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    return {
        "ROWS": distances.shape[1],
        "COLUMNS": distances.shape[2],
        "LENGTHS": lengths is not None,
        "PAIRS": launch.pairs,
        "ACC": tl.float64 if distances.dtype == torch.float64 else tl.float32,
        "num_warps": launch.warps,
        # Contraction to fused multiply-add is asked for by name: Triton's default for it is about to change.
        "enable_fp_fusion": True,
    }


def _config(kernel: str, distances: Tensor) -> LaunchConfig:
    return _config_on(kernel, distances.shape[1], distances.device)


@functools.cache
def _config_on(kernel: str, frames: int, device: torch.device) -> LaunchConfig:
    gpu = gpu_of(device)
    return configurations.choose(kernel, frames, configurations.load_table(gpu.name, gpu.architecture))
