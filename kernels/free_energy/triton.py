"""Active inference and the free-energy loss as Triton kernels: the functions that launch them.

The forward pass is one kernel over the queries (``device.py``): posteriors, beliefs, fusion, every term, and the two factors per
query that its gradient needs besides the logits, the responsibilities r_v and the teacher's policy. The backward pass is one
kernel that reads the logits once more; it repeats no inference. Saving the softmaxes instead would write and read as many
bytes again as the logits have. The generative model, a few hundred numbers, is packed into one table by a third kernel.

Every result is owned by one program: nothing is added atomically and repeated runs agree bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..common.gpu import gpu_of, on_device
from ..common.tables import ceil_div, power_of_two
from . import config as configurations
from .config import LaunchConfig, Shape
from .device import free_energy_backward, free_energy_forward, pack_model

_PACK_BLOCK = 1024


def free_energy_loss_with_factors(
    view_logits: Tensor,
    target: Tensor,
    context_evidence: Tensor | None,
    likelihood: Tensor,
    outcome_likelihood: Tensor,
    log_preference: Tensor,
    state_prior: Tensor,
    habit: Tensor,
    precision: Tensor,
    temperature: float,
    margin: float,
    distillation_weight: float,
    cross_entropy_weight: float,
    present: Tensor | None,
) -> tuple[Tensor, ...]:
    """Forward pass over ``[R, V, C]`` logits; arguments as in the reference, with one leading dimension.

    Returns:
        total, task, distillation, cross_entropy ``[R]``, state, policy ``[R, V]``, group ``[R]``, responsibility ``[R, V]``,
        teacher_policy ``[R]``, all contiguous.
    """
    rows, views, _ = view_logits.shape
    dtype, acc = _accumulation(view_logits)
    terms = [view_logits.new_empty(rows, dtype=dtype) for _ in range(4)]
    state, policy, responsibility = (view_logits.new_empty((rows, views), dtype=dtype) for _ in range(3))
    group = target.new_empty(rows)
    teacher_policy = view_logits.new_empty(rows, dtype=dtype)
    outputs = (*terms, state, policy, group, responsibility, teacher_policy)
    if rows == 0:
        return outputs
    channels, bins = likelihood.shape[1:3]
    launch = _config("forward", view_logits)
    sizes = {"V": views, "K": channels, "BINS": bins}
    with on_device(view_logits):
        table = _pack((likelihood, outcome_likelihood, log_preference, state_prior, habit, precision), dtype, acc, sizes)
        free_energy_forward[(ceil_div(rows, launch.rows),)](
            view_logits.contiguous(),
            target.contiguous(),
            table if context_evidence is None else context_evidence.contiguous(),
            _as_bytes(present, target),
            table,
            *outputs,
            rows,
            temperature,
            margin,
            distillation_weight,
            cross_entropy_weight,
            PRESENT=present is not None,
            TEMPERED=temperature != 1.0,
            **sizes,
            **_constants(view_logits, launch, acc),
        )
    return outputs


def free_energy_loss_backward(
    grad_total: Tensor | None,
    grad_task: Tensor | None,
    grad_distillation: Tensor | None,
    grad_cross_entropy: Tensor | None,
    view_logits: Tensor,
    target: Tensor,
    present: Tensor | None,
    responsibility: Tensor,
    teacher_policy: Tensor,
    group: Tensor,
    temperature: float,
    distillation_weight: float,
    cross_entropy_weight: float,
) -> Tensor:
    """Backward pass; arguments and result as in the reference, with one leading dimension and contiguous gradients."""
    rows, views, _ = view_logits.shape
    grad_logits = torch.empty_like(view_logits, memory_format=torch.contiguous_format)
    if rows == 0:
        return grad_logits
    grads = (grad_total, grad_task, grad_distillation, grad_cross_entropy)
    given = {name: grad is not None for name, grad in zip(("TOTAL", "TASK", "DISTILLATION", "CROSS_ENTROPY"), grads, strict=True)}
    launch = _config("backward", view_logits)
    with on_device(view_logits):
        free_energy_backward[(ceil_div(rows, launch.rows),)](
            *(teacher_policy if grad is None else grad for grad in grads),
            view_logits.contiguous(),
            target.contiguous(),
            _as_bytes(present, target),
            responsibility,
            teacher_policy,
            group,
            grad_logits,
            rows,
            temperature,
            distillation_weight,
            cross_entropy_weight,
            **given,
            PRESENT=present is not None,
            TEMPERED=temperature != 1.0,
            V=views,
            **_constants(view_logits, launch, _accumulation(view_logits)[1]),
        )
    return grad_logits


def _pack(model: tuple[Tensor, ...], dtype: torch.dtype, acc: tl.dtype, sizes: dict[str, int]) -> Tensor:
    likelihood, views = model[0], sizes["V"]
    table = likelihood.new_empty(likelihood.numel() + 3 * views * views + 2 * views + 3, dtype=dtype)
    pack_model[(ceil_div(likelihood.numel(), _PACK_BLOCK),)](
        *(array.contiguous() for array in model),
        table,
        **sizes,
        BLOCK=_PACK_BLOCK,
        BLOCK_V=power_of_two(views),
        TINY=torch.finfo(dtype).tiny,
        ACC=acc,
    )
    return table


def _as_bytes(present: Tensor | None, placeholder: Tensor) -> Tensor:
    # An optional tensor that is not given is never read; something has to stand for its address.
    return placeholder if present is None else present.contiguous().view(torch.uint8)


def _accumulation(tensor: Tensor) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if tensor.dtype == torch.float64 else (torch.float32, tl.float32)


def _approximate(view_logits: Tensor) -> bool:
    """Whether exponentials and logarithms are those of NVIDIA's special-function units: off by a unit or two of float32."""
    return view_logits.is_cuda and not torch.version.hip and view_logits.dtype != torch.float64


def _constants(view_logits: Tensor, launch: LaunchConfig, acc: tl.dtype) -> Mapping[str, Any]:
    return _constants_of(view_logits.shape[1], view_logits.shape[2], launch, acc, _approximate(view_logits))


@functools.lru_cache(maxsize=4096)
def _constants_of(views: int, classes: int, launch: LaunchConfig, acc: tl.dtype, approximate: bool) -> Mapping[str, Any]:
    return {
        "C": classes,
        "BLOCK_V": power_of_two(views),
        "BLOCK_C": power_of_two(classes),
        "ROWS": launch.rows,
        "ROW_PER_THREAD": launch.row_per_thread,
        "ACC": acc,
        "APPROXIMATE": approximate,
        "num_warps": launch.warps,
        # Contraction to fused multiply-add is asked for by name: Triton's default for it is about to change.
        "enable_fp_fusion": True,
    }


def _config(kernel: str, view_logits: Tensor) -> LaunchConfig:
    item_size = 8 if view_logits.dtype == torch.float64 else 4
    return _config_on(kernel, Shape.of(view_logits.shape[1], view_logits.shape[2], item_size), view_logits.device)


@functools.cache
def _config_on(kernel: str, shape: Shape, device: torch.device) -> LaunchConfig:
    gpu = gpu_of(device)
    return configurations.choose(kernel, shape, configurations.load_table(gpu.name, gpu.architecture), gpu.shared_memory)
