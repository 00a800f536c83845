"""Permutation-invariant cross-modal read-out: a set of tokens in, one descriptor per view out (design: `docs/method.md`, section 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from amd_fast import ops
from amd_fast.ops.dispatch import exporting


def view_names(modalities: tuple[str, ...], joint: bool = True) -> tuple[str, ...]:
    """The views of a clip: its modalities in order and, where there are several and it is wanted, the joint one."""
    return (*modalities, "joint") if joint and len(modalities) > 1 else modalities


def attend_to_tokens(query: Tensor, tokens: Tensor, key_value: nn.Linear, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over projected tokens that projects the queries and the sums instead: keys and values never exist.

    ``<q, Wk x + bk> = <Wk^T q, x> + <q, bk>`` and ``sum_n p[n] (Wv x[n] + bv) = Wv sum_n p[n] x[n] + bv sum_n p[n]``. There are
    fewer queries than tokens, so the two large projections shrink to two small ones.

    Args:
        query: ``[B, R, H, d]``.
        tokens: ``[B, N, D]``, D = H d, same dtype.
        key_value: The projection to keys and values, D to 2 D.
        log_weight: ``[B, R, N]``, -inf removes the token for that query.

    Returns:
        Output ``[B, R, H, d]`` and log-evidence ``[B, R, H]``, as :func:`amd_fast.ops.cross_modal_attention` gives them.
    """
    heads, width = query.shape[2:]
    key_weight, value_weight = key_value.weight.unflatten(0, (2, heads, width))  # [H, d, D] each
    key_bias, value_bias = key_value.bias.unflatten(0, (2, heads, width))
    score = torch.einsum("brhc,bnc->brhn", torch.einsum("brhd,hdc->brhc", query, key_weight), tokens)
    score = (score + (query * key_bias).sum(-1, keepdim=True)) / math.sqrt(width) + log_weight.to(query.dtype).unsqueeze(2)
    # Where no token is seen, softmax and logsumexp would be 0/0 with a gradient of NaN.
    empty = (log_weight == -math.inf).all(-1)[:, :, None, None]
    score = score.masked_fill(empty, 0.0)
    probability = torch.softmax(score, -1).masked_fill(empty, 0.0)
    log_evidence = torch.logsumexp(score, -1).masked_fill(empty.squeeze(-1), -math.inf)
    summed = torch.einsum("brhn,bnc->brhc", probability, tokens)
    output = torch.einsum("brhc,hdc->brhd", summed, value_weight) + value_bias * ~empty
    return output, log_evidence


class CrossModalReadout(nn.Module):
    """Reads each modality on its own and, where there are several, all of them jointly.

    Args:
        num_modalities: M.
        dim: token width D, a multiple of ``heads``.
        heads: attention heads H.
        seeds: learned queries per view; their read-outs are averaged.
        joint: also read all modalities together (where there are several).
        impl: implementation of the attention, see :func:`amd_fast.ops.cross_modal_attention`.
    """

    def __init__(self, num_modalities: int, dim: int, heads: int = 4, seeds: int = 1, joint: bool = True, impl: str = "auto") -> None:
        super().__init__()
        self.num_modalities, self.dim, self.heads, self.impl = num_modalities, dim, heads, impl
        self.num_views = num_modalities + (joint and num_modalities > 1)
        self.seed = nn.Parameter(torch.randn(self.num_views, seeds, dim) * 0.02)
        self.embedding = nn.Parameter(torch.randn(num_modalities, dim) * 0.02)
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.normal_(self.out.weight, std=0.1 * dim**-0.5)

    def _means(self, tokens: Tensor, log_weight: Tensor) -> Tensor:
        """Weighted mean of every view's tokens ``[B, V, D]``; zero where all of a view is missing."""
        present = torch.isfinite(log_weight).any(-1, keepdim=True)  # [B, M, 1]
        share = torch.softmax(log_weight.masked_fill(~present, 0.0), -1) * present
        means = torch.einsum("bmt,bmtd->bmd", share.to(tokens.dtype), tokens)
        if self.num_views == self.num_modalities:
            return means
        joint = means.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp(min=1).to(tokens.dtype)
        return torch.cat([means, joint], 1)

    def _visible(self, log_weight: Tensor) -> Tensor:
        """Log-weights ``[B, V, M * T]`` with -inf where a view may not see a token."""
        batch, modalities, frames = log_weight.shape
        own = torch.eye(modalities, dtype=torch.bool, device=log_weight.device)
        seen = own if self.num_views == modalities else torch.cat([own, own.new_ones(1, modalities)])
        hidden = ~seen[None, :, :, None]
        return log_weight[:, None].masked_fill(hidden, float("-inf")).reshape(batch, self.num_views, modalities * frames)

    def _skips_keys(self, query: Tensor, tokens: Tensor) -> bool:
        """Whether :func:`attend_to_tokens` is faster than projecting every token.

        On the CPU (two EPYC cores, one thread, float32) it was measured 1.6 to 9 times faster than the usual form, forward and
        together with the backward pass, at all of the benchmarks' shapes; it pays by saving products. A GPU is rather kept waiting
        by memory, and there what is written and read again grows with R H instead of N: that is left to a measurement.
        """
        rows, tokens_seen = query.shape[1], tokens.shape[1]
        plain = type(self.key_value) is nn.Linear and query.dtype == tokens.dtype == self.key_value.weight.dtype
        on_cpu = tokens.device.type == "cpu" and tokens.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
        if self.impl != "auto" or not plain or not on_cpu or exporting():
            return False
        return rows * (self.dim + self.heads * tokens_seen) < tokens_seen * (self.dim + rows)

    def forward(self, tokens: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Descriptors and log-evidence of every view.

        Args:
            tokens: ``[B, M, T, D]``.
            log_weight: ``[B, M, T]`` float32, -inf = missing.

        Returns:
            ``[B, V, D]`` descriptors (0 for a view without a token) and ``[B, V]`` log-evidence (mean over heads and seeds, -inf there).
        """
        batch, dim = tokens.shape[0], tokens.shape[-1]
        seeds, width = self.seed.shape[1], dim // self.heads
        means = self._means(tokens, log_weight)
        query = self.query(self.norm(self.seed + means[:, :, None].to(self.seed.dtype)))
        tokens = (tokens + self.embedding[:, None].to(tokens.dtype)).flatten(1, 2)
        visible = self._visible(log_weight).repeat_interleave(seeds, 1)
        query = query.reshape(batch, -1, self.heads, width)
        if self._skips_keys(query, tokens):
            output, evidence = attend_to_tokens(query, tokens, self.key_value, visible)
        else:
            key, value = (part.unflatten(-1, (self.heads, width)) for part in self.key_value(tokens).chunk(2, -1))
            output, evidence = ops.cross_modal_attention(query.to(key.dtype), key, value, visible, impl=self.impl)
        read = output.reshape(batch, self.num_views, seeds, dim).mean(2)
        evidence = evidence.reshape(batch, self.num_views, -1).mean(-1)
        return means + self.out(read), evidence


def one_set(values: Tensor, together: int) -> Tensor:
    """Makes several crops or views of each clip one set of frames: ``[clips * together, M, T, ...] -> [clips, M, together * T, ...]``."""
    return values.unflatten(0, (-1, together)).transpose(1, 2).flatten(2, 3)
