"""Evidence channels of active sample inference: what a query tells about the reliability of each view, scaled to [0, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amd_fast.models.matchers import Match


def surprise(match: Match) -> Tensor:
    """``ln(distance to the nearest class / mean distance between classes)``, clipped to [-2, 2] and scaled to [0, 1]. ``[E, Q, V]``."""
    nearest = match.distance.amin(-1)
    tiny = torch.finfo(nearest.dtype).tiny
    ratio = (nearest.clamp(min=tiny) / match.spread[:, None].clamp(min=tiny)).log()
    return (ratio.clamp(-2.0, 2.0) + 2.0) / 4.0


def agreement(match: Match) -> Tensor:
    """Probability that a view and another present view, drawn from their posteriors, name the same class; 0.5 where it is the only one."""
    posterior = torch.softmax(match.logits, -1) * match.present[..., None]
    others = posterior.sum(-2, keepdim=True) - posterior
    count = match.present.sum(-1, keepdim=True) - match.present.to(torch.int64)
    same = (posterior * others).sum(-1) / count.clamp(min=1)
    return torch.where(count > 0, same, torch.full_like(same, 0.5))


CHANNELS: dict[str, Callable[[Match], Tensor]] = {"surprise": surprise, "agreement": agreement}
"""Channels beside ``certainty`` (always channel 0, which the loss computes itself from the logits)."""


def context_evidence(names: tuple[str, ...], match: Match) -> Tensor:
    """The channels after certainty, ``[E, Q, V, K - 1]``, without gradient (beliefs are held fixed: the E-step)."""
    with torch.no_grad():
        if not names:
            return match.logits.new_zeros((*match.logits.shape[:-1], 0))
        return torch.stack([CHANNELS[name](match) for name in names], -1)
