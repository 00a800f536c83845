"""Matchers on descriptors: distances to the means of the classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from amd_fast.models.matchers.base import Clips, Match, Matcher, class_shares, mean_off_diagonal, membership, views_last
from amd_fast.models.matchers.products import Product


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


class PrototypeMatcher(Matcher):
    """Squared Euclidean distance to the class means: ``logits = -||f - c||^2 / tau_v`` (Snell et al., 2017).

    Args:
        num_views: V; every view learns its own temperature tau_v.
        dim: descriptor width D; tau starts at ``dim / sharpness``.
    """

    reads: ClassVar[Literal["descriptors", "tokens"]] = "descriptors"
    products: ClassVar[Mapping[str, Product]] = {"gram": Product("descriptor", "all")}
    workspace: ClassVar[int] = 6

    def __init__(self, num_views: int, dim: int, num_modalities: int = 1, *, sharpness: float = 8.0) -> None:
        super().__init__(num_views, dim / sharpness)

    def prepare(self, descriptors: Tensor) -> Tensor:
        """Maps descriptors to the space in which distances are taken (here: as they are)."""
        return descriptors

    def clips(self, tokens: Tensor, log_weight: Tensor, descriptors: Tensor, present: Tensor) -> Clips:
        """See :meth:`Matcher.clips`; tokens are not read."""
        return Clips({"descriptor": self.prepare(descriptors).transpose(0, 1)[:, :, None].float()}, {}, present)

    def settle(self, clips: Clips) -> Clips:
        """Moves the origin into the mean of all clips: distances from products then lose fewer digits to cancellation."""
        there = clips.present.T[..., None, None]
        rows = clips.rows["descriptor"]
        mean = (rows * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
        return clips._replace(rows={"descriptor": (rows - mean) * there})

    def forward(self, query: Tensor, support: Support, present: Tensor) -> Match:
        """``query [E, Q, V, D]`` against a support set; ``present [E, Q, V]``. Both prepared with :meth:`prepare`."""
        views_first = query.float().permute(0, 2, 1, 3)  # [E, V, Q, D]
        prototypes = support.prototypes.float().permute(0, 2, 1, 3)  # [E, V, ways, D]
        squared = _squared_distances(views_first, prototypes)
        between = _squared_distances(prototypes, prototypes)
        return self._answer(squared.transpose(0, 1), between.transpose(0, 1), present & support.present[:, None])

    def match(self, support: Clips, query: Clips, labels: Tensor | None, ways: int) -> Match:
        """See :meth:`Matcher.match`; goes through the class means, so that the work grows with S + Q and not with its square."""
        if labels is None:
            labels = membership(None, support.present, ways).long().argmax(1)
        seen, asked = (side.rows["descriptor"].squeeze(3).permute(1, 2, 0, 3) for side in (support, query))
        answer: Match = self(asked, class_means(seen, labels, support.present, ways), query.present)
        return answer

    def judge(self, products: Mapping[str, Tensor], support: Clips, query: Clips, labels: Tensor | None, ways: int) -> Match:
        """See :meth:`Matcher.judge`: ``||f - c||^2`` from inner products of clips, c being a weighted sum of them."""
        share, there = class_shares(membership(labels, support.present, ways), support.present)
        number = support.present.shape[1]
        gram = products["gram"].double()  # small by now; float32 would lose more to the differences below than the products did
        share = share.double()
        to_class = gram[..., :, :number] @ share.mT  # [V, E, S + Q, ways]
        between = share @ to_class[..., :number, :]
        to_class, between = self._on_space(to_class[..., number:, :], between)
        own = torch.diagonal(gram, dim1=-2, dim2=-1)[..., number:]
        class_own = torch.diagonal(between, dim1=-2, dim2=-1)
        squared = (own[..., None] + class_own[..., None, :] - 2 * to_class).clamp(min=0)
        apart = (class_own[..., None] + class_own[..., None, :] - 2 * between).clamp(min=0)
        return self._answer(squared.float(), apart.float(), query.present & there.all(-1).T[:, None])

    def _on_space(self, to_class: Tensor, between: Tensor) -> tuple[Tensor, Tensor]:
        """Products with and between class means as they are compared (here: as they are)."""
        return to_class, between

    def _answer(self, squared: Tensor, between: Tensor, present: Tensor) -> Match:
        logits, distance = views_last(self.logits(squared), _root(squared))
        return Match(logits, distance, mean_off_diagonal(_root(between)).T, present)


class CosineMatcher(PrototypeMatcher):
    """Cosine similarity to the class means of normalised descriptors.

    For unit vectors ``||f - c||^2 = 2 - 2 cos``, so this is the prototype matcher on the sphere; ``2 / tau_v`` is the usual scale.
    """

    def __init__(self, num_views: int, dim: int, num_modalities: int = 1, *, scale: float = 10.0) -> None:
        super().__init__(num_views, dim)
        with torch.no_grad():
            self.log_temperature.fill_(2.0 / scale).log_()

    def prepare(self, descriptors: Tensor) -> Tensor:
        """Normalises to length 1 (a descriptor that is 0, of a missing view, stays 0)."""
        return nn.functional.normalize(descriptors.float(), dim=-1)

    def forward(self, query: Tensor, support: Support, present: Tensor) -> Match:
        """As :meth:`PrototypeMatcher.forward`; class means are brought back onto the sphere."""
        return super().forward(query, Support(self.prepare(support.prototypes), support.present), present)

    def settle(self, clips: Clips) -> Clips:
        """On the sphere the origin is given."""
        return clips

    def _on_space(self, to_class: Tensor, between: Tensor) -> tuple[Tensor, Tensor]:
        length = torch.diagonal(between, dim1=-2, dim2=-1).clamp(min=0).sqrt().clamp(min=1e-12)
        return to_class / length[..., None, :], between / (length[..., None] * length[..., None, :])


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    """``[..., A, D], [..., B, D] -> [..., A, B]`` through one matrix product, never negative."""
    product = first @ second.transpose(-1, -2)
    return (first.square().sum(-1)[..., None] + second.square().sum(-1)[..., None, :] - 2 * product).clamp(min=0)


def _root(squared: Tensor) -> Tensor:
    # Distances only feed the (detached) evidence: no gradient is asked of the root, which would be infinite at 0.
    return squared.detach().sqrt()
