"""Matchers that compare two clips frame by frame: Bi-MHM and OTAM.

Both read the tokens of a modality, of unit length, and the cosine distances ``1 - cos`` between the frames of two clips ``[Tq, Ts]``;
a distance of clips follows from these. Of several support clips of a class, OTAM takes the mean of their distances, Bi-MHM the distance
to one clip whose frames are the means of theirs. The joint view concatenates the modalities frame by frame, each of unit length: its
frame distances are the mean over the modalities that both clips have, and cost no further product. Frames that are missing (log-weight
-inf) take no part, nor do pairs of clips without a common modality.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from amd_fast import ops
from amd_fast.models.matchers.base import Clips, Match, Matcher, class_shares, everything, mean_off_diagonal, membership, views_last
from amd_fast.models.matchers.products import Product


class FramePairs(NamedTuple):
    """Frames of pairs of clips, of which some lack some frames.

    Attributes:
        distance: ``[V, E, Q, S, Tq, Ts]``; +inf where two frames have nothing in common.
        query, support: ``[V, E, Q, S, T]`` bool, which frames count on either side.
    """

    distance: Tensor
    query: Tensor
    support: Tensor


class FrameMatcher(Matcher):
    """What Bi-MHM and OTAM share. Subclasses give the distance of two clips from the distances of their frames.

    The spread of an episode, which an alignment of all support clips with each other would cost more than the queries do, is read
    from the mean frame of every class: the mean cosine distance between those of different classes.

    Args:
        num_views: V, the modalities and, where it is one more than these, the joint view.
        num_modalities: M.
        temperature: where tau starts.
    """

    workspace: ClassVar[int] = 8

    def __init__(self, num_views: int, num_modalities: int, temperature: float) -> None:
        super().__init__(num_views, temperature)
        self.num_modalities = num_modalities

    def clips(self, tokens: Tensor, log_weight: Tensor, descriptors: Tensor, present: Tensor) -> Clips:
        """See :meth:`Matcher.clips`; descriptors are not read."""
        there = torch.isfinite(log_weight)
        frame = nn.functional.normalize(tokens.float(), dim=-1) * there[..., None]
        frame = frame.movedim(1, 0)  # [M, B, T, D]
        return Clips({"frame": frame, "summary": frame.mean(2, keepdim=True)}, {"frames": there}, present)

    def class_distance(self, products: Tensor, support: Clips, query: Clips, member: Tensor) -> tuple[Tensor, Tensor]:
        """Distances to the classes from the products of their frames, and whether there is one, both ``[V, E, Q, ways]``."""
        raise NotImplementedError

    def judge(self, products: Mapping[str, Tensor], support: Clips, query: Clips, labels: Tensor | None, ways: int) -> Match:
        """See :meth:`Matcher.judge`."""
        member = membership(labels, support.present, ways)
        to_class, compared = self.class_distance(products["frames"], support, query, member)
        logits, reported, present = views_last(self.logits(to_class), to_class.detach(), compared.all(-1))
        with torch.no_grad():
            _, there = class_shares(member, support.numbers["frames"].any(-1))
            return Match(logits, reported, self._spread(products["between"], there), present)

    def _with_joint(self, cosine: Tensor) -> Tensor:
        """``[M, ...] -> [V, ...]``, where nothing is missing."""
        return torch.cat([cosine, cosine.mean(0, keepdim=True)]) if self.num_views > self.num_modalities else cosine

    def _pairs(self, products: Tensor, support: Clips, query: Clips) -> tuple[FramePairs, Tensor]:
        """Frame distances of every view where frames may be missing, and ``[V, E, Q, S]`` bool, the pairs of clips that can be compared."""
        seen, asked = support.numbers["frames"], query.numbers["frames"]  # [E, S, M, T], [E, Q, M, T]
        frames = seen.shape[-1]
        distance = 1 - _by_clip(products, frames).transpose(3, 4)  # [M, E, Q, S, T, T]
        rows = asked.permute(2, 0, 1, 3)[:, :, :, None].expand(*distance.shape[:5])  # [M, E, Q, S, T]
        columns = seen.permute(2, 0, 1, 3)[:, :, None].expand(*distance.shape[:4], frames)
        common = rows[..., None] & columns[..., None, :]
        if self.num_views > self.num_modalities:
            number = common.sum(0, keepdim=True)
            mean = torch.where(common, distance, 0.0).sum(0, keepdim=True) / number.clamp(min=1)
            common, distance = torch.cat([common, number > 0]), torch.cat([distance, mean])
        compared = _both(support, query) & common.any(-1).any(-1)
        return FramePairs(distance.masked_fill(~common, torch.inf), common.any(-1), common.any(-2)), compared

    def _spread(self, between: Tensor, there: Tensor) -> Tensor:
        """``[E, V]`` mean cosine distance between the mean frames of the classes; ``there [M, E, ways]``, which have any."""
        length = torch.diagonal(between, dim1=-2, dim2=-1).clamp(min=1e-12).sqrt()
        apart = (1 - between / (length[..., None] * length[..., None, :])).clamp(min=0)
        known = there.all(-1)  # [M, E]
        spread = torch.where(known, mean_off_diagonal(apart), 0.0)
        if self.num_views > self.num_modalities:
            spread = torch.cat([spread, spread.sum(0, keepdim=True) / known.sum(0, keepdim=True).clamp(min=1)])
        return spread.T


class BiMHMMatcher(FrameMatcher):
    """Bidirectional mean Hausdorff metric of HyRSM (Wang et al., CVPR 2022): the order of a query's frames does not count.

    ``d = mean_i min_j D[i, j] + mean_j min_i D[i, j]``. The published scores are sums over T frames, so tau starts at 1 / 8. As published,
    several support clips of a class are averaged frame by frame before they are compared; here they are unit vectors by then.
    """

    products: ClassVar[Mapping[str, Product]] = {"frames": Product("frame", "prototype"), "between": Product("summary", "between")}

    def __init__(self, num_views: int, dim: int, num_modalities: int = 1, *, temperature: float = 0.125) -> None:
        super().__init__(num_views, num_modalities, temperature)

    def class_distance(self, products: Tensor, support: Clips, query: Clips, member: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FrameMatcher.class_distance`."""
        classes = _of_classes(support, member)
        if _complete(classes, query):
            cosine = self._with_joint(_by_clip(products, query.numbers["frames"].shape[-1]))  # [V, E, Q, Tq, ways, Ts]
            return 2 - cosine.amax(-1).mean(3) - cosine.amax(3).mean(-1), _both(classes, query)
        pairs, compared = self._pairs(products, classes, query)
        sides = ((pairs.distance.amin(-1), pairs.query), (pairs.distance.amin(-2), pairs.support))
        means = [torch.where(counts, nearest, 0.0).sum(-1) / counts.sum(-1).clamp(min=1) for nearest, counts in sides]
        return torch.where(compared, means[0] + means[1], 0.0), compared


class OTAMMatcher(FrameMatcher):
    """Ordered temporal alignment (Cao et al., CVPR 2020), the mean of both directions.

    The cost of an alignment (:func:`amd_fast.ops.otam_alignment`) is taken per frame of the side it walks along, and from the cost at
    zero distances, so that it is 0 for equal sequences and comparable between clips with unlike numbers of frames. Where no frame is
    missing that is the published cost / T, less a constant that all classes share; tau starts at 1 / 8.

    Args:
        num_views: V.
        dim: width of the tokens.
        num_modalities: M.
        smoothing: lambda, in units of the cosine distance.
        temperature: where tau starts.
        impl: implementation of the op.
    """

    products: ClassVar[Mapping[str, Product]] = {"frames": Product("frame", "cross"), "between": Product("summary", "between")}

    def __init__(
        self, num_views: int, dim: int, num_modalities: int = 1, *, smoothing: float = 0.1, temperature: float = 0.125, impl: str = "auto"
    ) -> None:
        super().__init__(num_views, num_modalities, temperature)
        self.smoothing, self.impl = smoothing, impl

    def class_distance(self, products: Tensor, support: Clips, query: Clips, member: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`FrameMatcher.class_distance`."""
        distance, compared = self._clip_distance(products, support, query)
        weight = (member[None, :, None] & compared[:, :, :, None]).to(distance.dtype)  # [V, E, Q, ways, S]
        count = weight.sum(-1)
        return (weight @ torch.where(compared, distance, 0.0)[..., None])[..., 0] / count.clamp(min=1), count > 0

    def _clip_distance(self, products: Tensor, support: Clips, query: Clips) -> tuple[Tensor, Tensor]:
        """Distance of every pair of clips, anything where there is none, and where there is one, both ``[V, E, Q, S]``."""
        rows, columns = None, None
        if _complete(support, query):
            distance, compared = 1 - self._with_joint(_by_clip(products, support.numbers["frames"].shape[-1])), _both(support, query)
            distance = distance.transpose(3, 4).contiguous()
        else:
            pairs, compared = self._pairs(products, support, query)
            rows, columns = pairs.query.sum(-1), pairs.support.sum(-1)
            distance = _first(_first(pairs.distance, pairs.query).mT, pairs.support).mT
        forward = self._per_frame(distance, rows, columns)
        return (forward + self._per_frame(distance.mT, columns, rows)) / 2, compared

    def _per_frame(self, distance: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        most = distance.shape[-1]
        cost = ops.otam_alignment(distance, self.smoothing, query_frames=rows, support_frames=columns, impl=self.impl)
        if rows is None or columns is None:
            return (cost - ops.otam_alignment(distance.new_zeros(distance.shape[-2:]), self.smoothing, impl=self.impl)) / most
        high = distance.shape[-2] + 1
        number = torch.arange(high * (most + 1), device=distance.device)  # every pair of numbers of frames
        nothing = distance.new_zeros(len(number), *distance.shape[-2:])
        least = ops.otam_alignment(
            nothing, self.smoothing, query_frames=number // (most + 1), support_frames=number % (most + 1), impl=self.impl
        )
        return (cost - least[rows * (most + 1) + columns]) / columns.clamp(min=1)


def _by_clip(products: Tensor, frames: int) -> Tensor:
    """``[M, E, Q Tq, S Ts] -> [M, E, Q, Tq, S, Ts]``."""
    return products.unflatten(3, (-1, frames)).unflatten(2, (-1, frames))


def _both(support: Clips, query: Clips) -> Tensor:
    """``[V, E, Q, S]`` bool, where both clips have the view."""
    return query.present.permute(2, 0, 1)[..., None] & support.present.permute(2, 0, 1)[:, :, None]


def _complete(support: Clips, query: Clips) -> bool:
    """Whether no frame is missing; see :func:`~amd_fast.models.matchers.base.everything`."""
    return everything(support.numbers["frames"]) and everything(query.numbers["frames"])


def _of_classes(support: Clips, member: Tensor) -> Clips:
    """The classes as clips: a class has what any of its support clips has."""
    frames = support.numbers["frames"]  # [E, S, M, T]
    share = member.float()
    return Clips(
        {}, {"frames": ((share @ frames.flatten(2).float()) > 0).unflatten(2, frames.shape[2:])}, (share @ support.present.float()) > 0
    )


def _first(distance: Tensor, counts: Tensor) -> Tensor:
    """Rows that count ahead of those that do not, in order: ``[..., Tq, Ts]`` by ``[..., Tq]``."""
    order = torch.argsort(counts.to(torch.int8), dim=-1, descending=True, stable=True)
    return distance.gather(-2, order[..., None].expand_as(distance))
