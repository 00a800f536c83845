"""Cross-attention over tuples of frames, in the manner of TRX (Perrett et al., CVPR 2021).

A clip is the set of its ordered frame tuples p = (t1 < t2 [< t3]). With frames x (positions added), a linear map each for keys and
values, and layer norm of the keys, a query tuple attends to all tuples of all support clips of a class:

    k_p = LN(sum_i Wk_i x[t_i] + b),   v_p = sum_i Wv_i x[t_i]
    a_pj = softmax_j(<k_p, k_j> / sqrt(d)),   distance(query, class) = mean_p || v_p - sum_j a_pj v_j ||^2

(a bias of the values would cancel). A linear map of a concatenation is a sum of maps of its parts, so what a clip needs is
``n T`` vectors for tuples of n frames and not one per tuple; and everything above is made of inner products of those:

    <k_p, k_j>                  r_p r_j times n^2 products of centred key parts; r = 1 / standard deviation, from a clip's own parts
    || v_p - sum_j a_pj v_j ||^2   = || v_p ||^2 - 2 <v_p, c> + ||c||^2,  c = sum over the support's parts, with coefficients a S

S ``[tuples, n T]`` says which parts a tuple is made of. No tuple's key or value is ever written. The joint view concatenates keys and
values over the modalities: its scores are the mean over the modalities, and it has one attention for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from amd_fast.errors import ConfigError, DataError
from amd_fast.models.matchers.base import Clips, Match, Matcher, class_shares, everything, mean_off_diagonal, membership, views_last
from amd_fast.models.matchers.products import Product

_NORM_EPS = 1e-5
_POSITION_SCALE = 0.1


class TupleMatcher(Matcher):
    """TRX with tuples of one size; see the module.

    Args:
        num_views: V, the modalities and, where it is one more than these, the joint view.
        dim: width D of the tokens.
        num_modalities: M; every modality has maps of its own.
        tuple_size: frames per tuple n, 2 or 3.
        width: d of keys and values; by default the published share of D, 1152 of 2048.
    """

    products: ClassVar[Mapping[str, Product]] = {
        "key": Product("key", "cross"),
        "value": Product("value", "cross"),
        "class": Product("value", "class"),
        "between": Product("summary", "between"),
    }
    workspace: ClassVar[int] = 16

    def __init__(self, num_views: int, dim: int, num_modalities: int = 1, *, tuple_size: int = 2, width: int | None = None) -> None:
        width = width or max(1, dim * 1152 // 2048)
        if tuple_size not in (2, 3):
            raise ConfigError(f"matcher_options.tuple_size must be 2 or 3, got {tuple_size}")
        super().__init__(num_views, width / 24)
        self.dim, self.width, self.num_modalities, self.tuple_size = dim, width, num_modalities, tuple_size
        bound = (tuple_size * dim) ** -0.5  # as of a linear layer on the concatenated frames
        self.key = nn.Parameter(torch.empty(num_modalities, tuple_size, width, dim).uniform_(-bound, bound))
        self.key_bias = nn.Parameter(torch.empty(num_modalities, width).uniform_(-bound, bound))
        self.value = nn.Parameter(torch.empty(num_modalities, tuple_size, width, dim).uniform_(-bound, bound))
        self.norm_weight = nn.Parameter(torch.ones(num_modalities, width))
        self.norm_bias = nn.Parameter(torch.zeros(num_modalities, width))

    def clips(self, tokens: Tensor, log_weight: Tensor, descriptors: Tensor, present: Tensor) -> Clips:
        """See :meth:`Matcher.clips`; descriptors are not read.

        Raises:
            DataError: fewer frames than a tuple has.
        """
        frames = tokens.shape[2]
        if frames < self.tuple_size:
            raise DataError(
                f"tuples of {self.tuple_size} frames need as many; the clips have {frames}: sample more, or use another matcher"
            )
        tokens = tokens.float() + positions(frames, self.dim).to(tokens.device)
        key = self._parts(tokens, self.key) + self.key_bias[:, None, None] / self.tuple_size
        key = key - key.mean(-1, keepdim=True)
        value = self._parts(tokens, self.value)
        which = parts_of_tuples(frames, self.tuple_size).to(tokens)
        deviation = (_quadratic(which, key @ key.mT) / self.width + _NORM_EPS).rsqrt()
        scaled = key * self.norm_weight[:, None, None]
        offset = deviation * ((scaled @ self.norm_bias[:, None, :, None])[..., 0] @ which.T)
        counts = torch.isfinite(log_weight)[..., tuple_frames(frames, self.tuple_size).to(tokens.device)].all(-1)  # [B, M, tuples]
        share = counts.movedim(1, 0).float() / counts.sum(-1).T.clamp(min=1)[..., None]
        summary = (share @ which)[:, :, None] @ value
        numbers = {"deviation": deviation, "offset": offset, "length": _quadratic(which, value @ value.mT)}
        numbers = {name: number.movedim(0, 1) for name, number in numbers.items()}  # [B, M, tuples]
        return Clips({"key": scaled, "value": value, "summary": summary}, {**numbers, "tuples": counts}, present)

    def _parts(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """``[B, M, T, D] -> [M, B, n T, d]``: every frame as it counts in every place of a tuple."""
        parts = torch.einsum("bmtd,mnwd->mbntw", tokens, weight)
        return parts.flatten(2, 3)

    def match(self, support: Clips, query: Clips, labels: Tensor | None, ways: int) -> Match:
        """See :meth:`Matcher.match`; unordered labels cost a look at their values (on a GPU, a synchronisation)."""
        if labels is not None:
            support = class_by_class(support, labels, ways)
        return super().match(support, query, None, ways)

    def judge(self, products: Mapping[str, Tensor], support: Clips, query: Clips, labels: Tensor | None, ways: int) -> Match:
        """See :meth:`Matcher.judge`; ``labels`` must be None: the support comes class by class."""
        shots = support.present.shape[1] // ways
        frames = products["class"].shape[-1] // (shots * self.tuple_size)
        which = parts_of_tuples(frames, self.tuple_size).to(products["key"])
        asked, seen = query.numbers["tuples"].movedim(2, 0), support.numbers["tuples"].movedim(2, 0)  # [M, E, clips, tuples]
        masks = None if everything(asked) and everything(seen) else _Masks(asked, seen.unflatten(2, (ways, shots)).flatten(3))
        scores = self._scores(products["key"], which, support, query).unflatten(4, (ways, -1))  # [M, E, Q, tuples, ways, shots * tuples]
        crossed = _by_query_tuple(which, products["value"]).unflatten(-1, (ways, -1))
        length = query.numbers["length"].movedim(2, 0)[..., None]

        def distance(attention: Tensor) -> Tensor:
            coefficient = (attention.unflatten(-1, (shots, -1)) @ which).flatten(-2)  # [M or 1, E, Q, tuples, ways, shots * n T]
            coefficient = coefficient.expand_as(crossed)
            # ||sum of parts||^2 - 2 <query, sum of parts>, class by class
            own = torch.baddbmm(
                crossed.movedim(4, 2).reshape(-1, crossed.shape[2] * crossed.shape[3], crossed.shape[-1]),
                coefficient.movedim(4, 2).reshape(-1, crossed.shape[2] * crossed.shape[3], crossed.shape[-1]),
                products["class"].flatten(0, 2),
                beta=-2,
            )
            by_class = own.view(*crossed.shape[:2], ways, *crossed.shape[2:4], -1).movedim(2, 4)
            return length + (coefficient * by_class).sum(-1)

        to_class, compared = _mean_distance(distance, scores, masks, joint=False)
        if self.num_views > self.num_modalities:
            joint, joint_compared = _mean_distance(distance, scores, masks, joint=True)
            to_class, compared = torch.cat([to_class, joint]), torch.cat([compared, joint_compared])
        share, there = class_shares(membership(None, support.present, ways), support.present)
        present = query.present.permute(2, 0, 1) & there.all(-1)[:, :, None] & compared.all(-1)
        to_class = to_class.clamp(min=0)
        logits, root, present = views_last(self.logits(to_class), to_class.detach().sqrt(), present)
        return Match(logits, root, self._spread(products["between"], share), present)

    def _scores(self, key: Tensor, which: Tensor, support: Clips, query: Clips) -> Tensor:
        """``[M, E, Q, tuples, S * tuples]`` scaled products of normalised keys, less what all support tuples share."""
        deviation, own, offset = (
            side.numbers[name].movedim(2, 0) for side, name in ((query, "deviation"), (support, "deviation"), (support, "offset"))
        )
        by_tuple = key.unflatten(-1, (-1, which.shape[1])) @ which.T  # [M, E, Q * n T, S, tuples]
        by_tuple = (by_tuple * own[:, :, None]).flatten(3).unflatten(2, (-1, which.shape[1]))  # [M, E, Q, n T, S * tuples]
        scaled = which * (deviation[..., None] * self.width**-0.5)  # [M, E, Q, tuples, n T]
        shift = (self.width**-0.5 * offset.flatten(2))[:, :, None, None].expand(-1, -1, deviation.shape[2], -1, -1)
        scores = torch.baddbmm(shift.flatten(0, 2), scaled.flatten(0, 2), by_tuple.flatten(0, 2))
        return scores.view(*deviation.shape, -1)

    def _spread(self, between: Tensor, share: Tensor) -> Tensor:
        """``[E, V]`` mean distance between the classes' mean values; ``between [M, E, ways, ways]`` of sums, ``share [V, E, ways, S]``."""
        with torch.no_grad():
            share = share[: self.num_modalities]
            weight = share.amax(-1)  # a clip's weight in the mean of its class
            between = between * weight[..., None] * weight[..., None, :]
            own = torch.diagonal(between, dim1=-2, dim2=-1)
            spread = mean_off_diagonal((own[..., None] + own[..., None, :] - 2 * between).clamp(min=0).sqrt())
            if self.num_views > self.num_modalities:
                known = (share.sum(-1) > 0).all(-1)
                spread = torch.cat([spread, (spread * known).sum(0, keepdim=True) / known.sum(0, keepdim=True).clamp(min=1)])
            return spread.T


class _Masks(NamedTuple):
    """Tuples without a missing frame: ``query [M, E, Q, tuples]``, ``support [M, E, ways, shots * tuples]``."""

    query: Tensor
    support: Tensor


def _mean_distance(distance: Callable[[Tensor], Tensor], scores: Tensor, masks: _Masks | None, *, joint: bool) -> tuple[Tensor, Tensor]:
    """Mean over the query's tuples, and for the joint view over the modalities, of the distance to what each attends to.

    Args:
        distance: from the attention of every modality, or one for all, to ``[M, E, Q, tuples, ways]``.
        scores: ``[M, E, Q, tuples, ways, shots * tuples]``.
        masks: None where nothing is missing.
        joint: one attention for all modalities.

    Returns:
        Distance and whether anything could be compared, ``[M, E, Q, ways]``, with M = 1 for the joint view.
    """
    over = (0, 3) if joint else (3,)
    if masks is None:
        attention = torch.softmax(scores.mean(0, keepdim=True) if joint else scores, -1)
        mean = distance(attention).mean(over, keepdim=True).squeeze(3)
        return mean, torch.ones_like(mean, dtype=torch.bool)
    both = masks.query[..., None, None] & masks.support[:, :, None, None]
    if joint:
        number = both.sum(0, keepdim=True)
        scores = torch.where(both, scores, 0.0).sum(0, keepdim=True) / number.clamp(min=1)
        seen = number > 0
    else:
        seen = both
    attention = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), -1) * both  # a modality attends to what has it
    total = attention.sum(-1, keepdim=True)
    weight = (total[..., 0] > 0).to(scores.dtype)
    apart = distance(attention / total.clamp(min=torch.finfo(scores.dtype).tiny))
    count = weight.sum(over, keepdim=True).squeeze(3)
    return (apart * weight).sum(over, keepdim=True).squeeze(3) / count.clamp(min=1), count > 0


def class_by_class(support: Clips, labels: Tensor, ways: int) -> Clips:
    """Support clips ``[E, S]`` in any order as ``[E, ways * most]``, class by class; smaller classes are filled up with absent clips."""
    episodes, number = labels.shape
    count = (labels[:, None] == torch.arange(ways, device=labels.device)[:, None]).sum(-1)  # [E, ways]
    most = int(count.max())
    order = torch.argsort(labels, dim=1, stable=True)
    place = torch.arange(most, device=labels.device)
    position = (count.cumsum(1) - count)[..., None] + place
    exists = (place < count[..., None]).flatten(1)
    index = order.gather(1, position.flatten(1).clamp(max=number - 1))
    episode = torch.arange(episodes, device=labels.device)[:, None]
    rows = {name: value[:, episode, index] for name, value in support.rows.items()}
    numbers = {name: value[episode, index] for name, value in support.numbers.items()}
    numbers["tuples"] = numbers["tuples"] & exists[..., None, None]
    return Clips(rows, numbers, support.present[episode, index] & exists[..., None])


def positions(frames: int, dim: int) -> Tensor:
    """Sinusoidal positions ``[T, D]`` float32 (Vaswani et al., 2017), a tenth as large, as TRX adds them to the frames."""
    angle = torch.arange(frames)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10000.0) / dim))
    return _POSITION_SCALE * torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim]


def tuple_frames(frames: int, size: int) -> Tensor:
    """``[tuples, size]`` int64: the frames of every ordered tuple."""
    return torch.combinations(torch.arange(frames), size)


def parts_of_tuples(frames: int, size: int) -> Tensor:
    """S ``[tuples, size * frames]`` float32: 1 where a tuple has a frame in a place."""
    which = nn.functional.one_hot(tuple_frames(frames, size), frames)  # [tuples, size, frames]
    return which.flatten(1).float()


def _by_query_tuple(which: Tensor, products: Tensor) -> Tensor:
    """Sums over the parts of the query's tuples: ``[M, E, Q * n T, ...] -> [M, E, Q, tuples, rest]``."""
    return which @ products.flatten(3).unflatten(2, (-1, which.shape[1]))


def _quadratic(which: Tensor, gram: Tensor) -> Tensor:
    """Squared length of the sum of every tuple's parts: ``[..., n T, n T] -> [..., tuples]``."""
    return ((which @ gram) * which).sum(-1)
