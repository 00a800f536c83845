"""Matchers: descriptors of support and query clips in, one score per view and class out, batched over episodes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from amd_fast.errors import ConfigError


class Match(NamedTuple):
    """What a matcher says of the queries of E episodes.

    Attributes:
        logits: ``[E, Q, V, ways]`` float32, per view and class.
        distance: ``[E, Q, V, ways]`` distance from the query to the class, not squared.
        spread: ``[E, V]`` mean distance between the episode's classes: the scale the distances are read against.
        present: ``[E, Q, V]`` bool, False where the query or a whole class of the support lacks the view.
    """

    logits: Tensor
    distance: Tensor
    spread: Tensor
    present: Tensor


class Support(NamedTuple):
    """A support set reduced to its classes: ``prototypes [E, ways, V, D]`` and ``present [E, V]``."""

    prototypes: Tensor
    present: Tensor


def class_means(descriptors: Tensor, labels: Tensor, present: Tensor, ways: int) -> Support:
    """Mean descriptor of every class, over the clips in which a view is present.

    Args:
        descriptors: ``[E, S, V, D]``.
        labels: ``[E, S]`` int64 in 0..ways-1.
        present: ``[E, S, V]`` bool.
        ways: number of classes.
    """
    member = (labels[..., None] == torch.arange(ways, device=labels.device)).to(descriptors.dtype)
    weight = torch.einsum("esc,esv->ecsv", member, present.to(descriptors.dtype))
    count = weight.sum(2)  # [E, ways, V]
    total = torch.einsum("ecsv,esvd->ecvd", weight, descriptors)
    return Support(total / count.clamp(min=1)[..., None], (count > 0).all(1))


class PrototypeMatcher(nn.Module):
    """Squared Euclidean distance to the class means: ``logits = -||f - c||^2 / tau_v`` (Snell et al., 2017).

    Args:
        num_views: V; every view learns its own temperature tau_v.
        dim: descriptor width D; tau starts at ``dim / sharpness``.
    """

    def __init__(self, num_views: int, dim: int, sharpness: float = 8.0) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.full((num_views,), dim / sharpness).log())

    def prepare(self, descriptors: Tensor) -> Tensor:
        """Maps descriptors to the space in which distances are taken (here: as they are)."""
        return descriptors

    def forward(self, query: Tensor, support: Support, present: Tensor) -> Match:
        """``query [E, Q, V, D]`` against a support set; ``present [E, Q, V]``. Both prepared with :meth:`prepare`."""
        views_first = query.float().permute(0, 2, 1, 3)  # [E, V, Q, D]
        prototypes = support.prototypes.float().permute(0, 2, 1, 3)  # [E, V, ways, D]
        squared = _squared_distances(views_first, prototypes)
        logits = -squared / self.log_temperature.exp()[:, None, None]
        between = _root(_squared_distances(prototypes, prototypes))
        ways = between.shape[-1]
        spread = between.sum((-1, -2)) / max(ways * (ways - 1), 1)
        return Match(logits.permute(0, 2, 1, 3), _root(squared).permute(0, 2, 1, 3), spread, present & support.present[:, None])


class CosineMatcher(PrototypeMatcher):
    """Cosine similarity to the class means of normalised descriptors.

    For unit vectors ``||f - c||^2 = 2 - 2 cos``, so this is the prototype matcher on the sphere; ``2 / tau_v`` is the usual scale.
    """

    def __init__(self, num_views: int, dim: int, scale: float = 10.0) -> None:
        super().__init__(num_views, dim)
        with torch.no_grad():
            self.log_temperature.fill_(2.0 / scale).log_()

    def prepare(self, descriptors: Tensor) -> Tensor:
        """Normalises to length 1 (a descriptor that is 0, of a missing view, stays 0)."""
        return nn.functional.normalize(descriptors.float(), dim=-1)

    def forward(self, query: Tensor, support: Support, present: Tensor) -> Match:
        """As :meth:`PrototypeMatcher.forward`; class means are brought back onto the sphere."""
        return super().forward(query, Support(self.prepare(support.prototypes), support.present), present)


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """``[..., A, D], [..., B, D] -> [..., A, B]`` through one matrix product, never negative."""
    product = first @ second.transpose(-1, -2)
    return (first.square().sum(-1)[..., None] + second.square().sum(-1)[..., None, :] - 2 * product).clamp(min=0)


def _root(squared: Tensor) -> Tensor:
    # Distances only feed the (detached) evidence: no gradient is asked of the root, which would be infinite at 0.
    return squared.detach().sqrt()


MATCHERS: dict[str, type[PrototypeMatcher]] = {"prototype": PrototypeMatcher, "cosine": CosineMatcher}


def create_matcher(name: str, num_views: int, dim: int) -> PrototypeMatcher:
    """A matcher by name.

    Raises:
        ConfigError: the name is unknown.
    """
    if name not in MATCHERS:
        raise ConfigError(f"unknown matcher {name!r}; choose one of {', '.join(MATCHERS)}")
    return MATCHERS[name](num_views, dim)
