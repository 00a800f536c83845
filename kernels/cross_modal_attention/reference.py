"""Permutation-invariant cross-modal attention in plain PyTorch: the definition of the operation.

A few queries R per video read a small set of N tokens. The set carries log-weights instead of positions, so the order of its
members has no influence, and a log-weight of -inf removes a member::

    a[b,r,h,n] = scale <query[b,r,h], key[b,n,h]> + log_weight[b,r,n]
    output     = sum_n softmax_n(a) value[b,n,h]
    evidence   = logsumexp_n a

A row whose tokens all have log-weight -inf (or that has none, N = 0) gives output 0 and evidence -inf, with zero gradients.
A removed token must still hold finite numbers: what it holds has no influence, but NaN times zero is NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are taken in float32, in float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cross_modal_attention(
    query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of R queries over a weighted set of N tokens, with the evidence of each read-out.

    Differentiable any number of times in every tensor, also through the evidence.

    Args:
        query: ``[B, R, H, d]``, floating point.
        key: ``[B, N, H, d]``, same dtype.
        value: ``[B, N, H, d]``, same dtype.
        log_weight: ``[B, N]``, or three dimensions broadcastable to ``[B, R, N]``; -inf removes the token for that query.
            None means zeros.
        scale: Factor of the inner product, ``1 / sqrt(d)`` by default.

    Returns:
        Output ``[B, R, H, d]`` in the dtype of ``query``, and log-evidence ``[B, R, H]`` in float32 (float64 for float64).
    """
    scores = _scores(query, key, log_weight, scale)
    # Softmax by hand: where every score is -inf the library's softmax is 0/0, and its gradient NaN.
    # The peak only guards against overflow; the result does not depend on it, so it is left out of the graph.
    peak = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -math.inf)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    weight = torch.exp(scores - peak)
    total = weight.sum(-1, keepdim=True)
    empty = total == 0
    # Selecting twice keeps log(0) and 1/0 out of the unselected branch, whose gradient would be NaN.
    safe_total = torch.where(empty, 1.0, total)
    log_evidence = torch.where(empty, -math.inf, peak + torch.log(safe_total))
    output = _product(weight, _heads_first(value)) / safe_total
    return output.transpose(1, 2).to(query.dtype).contiguous(), log_evidence.squeeze(-1).transpose(1, 2).contiguous()


def cross_modal_attention_backward(
    grad_output: Tensor,
    grad_log_evidence: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_weight: Tensor | None,
    log_evidence: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`cross_modal_attention` in closed form, from its inputs and the evidence alone.

    With p = softmax(a), do and de the incoming gradients of output and evidence::

        dp[r,n] = <do[r], value[n]>
        da[r,n] = p[r,n] (dp[r,n] - sum_n' p[r,n'] dp[r,n'] + de[r])
        dquery  = scale sum_n da key,    dkey = scale sum_r da query,    dvalue = sum_r p do,    dlog_weight = sum_h da

    The sum over n' equals <do[r], output[r]>, but the output is rounded to its dtype, and that error would enter every gradient.

    Args:
        grad_output: ``[B, R, H, d]``.
        grad_log_evidence: ``[B, R, H]``; ignored where the evidence is -inf, which is a constant.
        query: As given to the forward function.
        key: As given to the forward function.
        value: As given to the forward function.
        log_weight: As given to the forward function.
        log_evidence: ``[B, R, H]``, as returned by the forward function.
        scale: As given to the forward function.

    Returns:
        Gradients with respect to query, key, value and log_weight, each in shape and dtype of its input (None for no log_weight).
    """
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    evidence = log_evidence.transpose(1, 2).unsqueeze(-1)
    empty = evidence == -math.inf
    probability = torch.exp(_scores(query, key, log_weight, scale) - torch.where(empty, 0.0, evidence))
    grad_out = _heads_first(grad_output)
    grad_probability = grad_out @ _heads_first(value).transpose(-1, -2)
    through_softmax = (probability * grad_probability).sum(-1, keepdim=True)
    through_evidence = torch.where(empty, 0.0, grad_log_evidence.transpose(1, 2).unsqueeze(-1).to(evidence.dtype))
    grad_score = probability * (grad_probability - through_softmax + through_evidence)
    grad_query = (grad_score @ _heads_first(key)) * scale
    grad_key = (grad_score.transpose(-1, -2) @ _heads_first(query)) * scale
    grad_value = probability.transpose(-1, -2) @ grad_out
    grad_log_weight = None
    if log_weight is not None:
        per_row = grad_score.sum(1)  # over the heads: [B, R, N]
        target = log_weight.unsqueeze(1) if log_weight.dim() == 2 else log_weight
        grad_log_weight = per_row.sum_to_size(target.shape).reshape(log_weight.shape).to(log_weight.dtype)
    grads = [grad.transpose(1, 2).to(query.dtype).contiguous() for grad in (grad_query, grad_key, grad_value)]
    return grads[0], grads[1], grads[2], grad_log_weight


def _heads_first(tensor: Tensor) -> Tensor:
    """``[B, L, H, d]`` to ``[B, H, L, d]`` in the accumulation dtype."""
    return tensor.transpose(1, 2).to(accumulation_dtype(tensor.dtype))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``[B, H, I, K] @ [B, H, K, J]``, reading heads where they lie where no gradient is wanted.

    PyTorch first copies factors whose first two dimensions are not one in memory. A product per head needs no copies: with the heads
    of large sets side by side that is twice as fast, but its gradients have to be put together again, which is slower.
    """
    # What traces this comes first: it must not take note of the batch's size.
    trains = torch.compiler.is_compiling() or (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
    if trains or len(left) == 1:
        return left @ right
    return torch.stack([torch.bmm(one, other) for one, other in zip(left.unbind(1), right.unbind(1), strict=True)], 1)


def _scores(query: Tensor, key: Tensor, log_weight: Tensor | None, scale: float | None) -> Tensor:
    """The attention scores a, ``[B, H, R, N]`` in the accumulation dtype."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = _product(_heads_first(query) * scale, _heads_first(key).transpose(-1, -2))
    if log_weight is None:
        return scores
    weight = log_weight.unsqueeze(1) if log_weight.dim() == 2 else log_weight
    return scores + weight.unsqueeze(1).to(scores.dtype)
