"""Permutation-invariant cross-modal read-out: a set of tokens in, one descriptor per view out (design: `docs/method.md`, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amd_fast import ops


def view_names(modalities: tuple[str, ...], joint: bool = True) -> tuple[str, ...]:
    """The views of a clip: its modalities in order and, where there are several and it is wanted, the joint one."""
    return (*modalities, "joint") if joint and len(modalities) > 1 else modalities


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

    def forward(self, tokens: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Descriptors and log-evidence of every view.

        Args:
            tokens: ``[B, M, T, D]``.
            log_weight: ``[B, M, T]`` float32, -inf = missing.

        Returns:
            ``[B, V, D]`` descriptors (0 for a view without a token) and ``[B, V]`` log-evidence (mean over heads and seeds, -inf there).
        """
        batch, _, frames, dim = tokens.shape
        seeds, width = self.seed.shape[1], dim // self.heads
        means = self._means(tokens, log_weight)
        query = self.query(self.norm(self.seed + means[:, :, None].to(self.seed.dtype)))
        key, value = self.key_value(tokens + self.embedding[:, None].to(tokens.dtype)).chunk(2, -1)
        visible = self._visible(log_weight).repeat_interleave(seeds, 1)
        output, evidence = ops.cross_modal_attention(
            query.reshape(batch, -1, self.heads, width).to(key.dtype),
            key.reshape(batch, self.num_modalities * frames, self.heads, width),
            value.reshape(batch, self.num_modalities * frames, self.heads, width),
            visible,
            impl=self.impl,
        )
        read = output.reshape(batch, self.num_views, seeds, dim).mean(2)
        evidence = evidence.reshape(batch, self.num_views, -1).mean(-1)
        return means + self.out(read), evidence
