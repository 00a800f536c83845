"""Cross-modal attention through torch's own fused kernel on the CPU, which reads the heads where they lie and copies nothing.

The kernel that ``torch.nn.functional.scaled_dot_product_attention`` runs there also gives the logarithm of the softmax's
denominator, which is our evidence; it is called directly, because the function does not return it. It has no gradient with
respect to the evidence or the log-weights: where one is wanted, the closed form of the reference gives it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_forward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def serves(query: Tensor, key: Tensor) -> bool:
    """Whether the kernel takes these tensors and keeps the op's precision (in 16 bits it rounds the softmax to 16 bits)."""
    known = _forward is not None and _backward is not None and query.device.type == "cpu"
    return known and query.dtype in (torch.float32, torch.float64) and query.numel() > 0 and key.numel() > 0


def cross_modal_attention(
    query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Forward pass; arguments and results as in the reference, ``log_weight`` as ``[B, R or 1, N]``."""
    output, log_evidence = _forward(*_heads_first(query, key, value), 0.0, False, attn_mask=_mask(log_weight, query, key), scale=scale)
    log_evidence = log_evidence.transpose(1, 2)
    if log_weight is not None:
        # The kernel's output for a query without tokens is 0, as it should be, and its logarithm 0 too.
        log_evidence = log_evidence.masked_fill((log_weight == -math.inf).all(-1, keepdim=True), -math.inf)
    return output.transpose(1, 2).contiguous(), log_evidence.contiguous()


def cross_modal_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_weight: Tensor | None,
    output: Tensor,
    log_evidence: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of the output alone; arguments as in the reference, and the forward pass's results."""
    # exp(-inf - 0) is the 0 that a query without tokens needs, exp(-inf + inf) is NaN.
    shift = torch.where(log_evidence == -math.inf, 0.0, log_evidence)
    saved = (*_heads_first(query, key, value, output), shift.transpose(1, 2))
    mask = _mask(log_weight, query, key)
    grads = _backward(*_heads_first(grad_output), *saved, 0.0, False, attn_mask=mask, scale=scale)
    grad_query, grad_key, grad_value = (grad.transpose(1, 2).contiguous() for grad in grads)
    return grad_query, grad_key, grad_value


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Views ``[B, H, L, d]``; the kernel takes any strides but that of the last dimension."""
    return tuple((tensor if tensor.stride(-1) == 1 else tensor.contiguous()).transpose(1, 2) for tensor in tensors)


def _mask(log_weight: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """``[B, 1, R, N]``, rows of consecutive elements."""
    if log_weight is None:
        return None
    batch, rows, tokens = query.shape[0], query.shape[1], key.shape[1]
    return log_weight.to(query.dtype).contiguous().expand(batch, rows, tokens).unsqueeze(1)
