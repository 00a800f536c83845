"""What all matchers share: clips as they read them, the answer they give, classes as weighted sums of clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from amd_fast.models.matchers.products import Product, inner_products


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


class Clips(NamedTuple):
    """What a matcher reads of clips, computed once per clip.

    Attributes:
        rows: by name, ``[parts, *clips, rows, width]`` float32: vectors of which inner products are taken; parts are views or modalities.
        numbers: by name, ``[*clips, ...]``: what else a matcher needs of a clip.
        present: ``[*clips, V]`` bool.
    """

    rows: dict[str, Tensor]
    numbers: dict[str, Tensor]
    present: Tensor

    def take(self, index: Tensor) -> Clips:
        """The clips at ``index`` (any shape) of a single dimension of clips."""
        rows = {name: value[:, index] for name, value in self.rows.items()}
        return Clips(rows, {name: value[index] for name, value in self.numbers.items()}, self.present[index])

    def numbers_at(self, index: Tensor) -> Clips:
        """As :meth:`take`, without the rows."""
        return Clips({}, {name: value[index] for name, value in self.numbers.items()}, self.present[index])

    def split(self, episodes: int, support: int) -> tuple[Clips, Clips]:
        """``[E * (S + Q)]`` clips, episode by episode, as the support ``[E, S]`` and the queries ``[E, Q]``."""
        each = torch.arange(self.present.shape[0], device=self.present.device).reshape(episodes, -1)
        return self.take(each[:, :support]), self.take(each[:, support:])

    @staticmethod
    def cat(parts: Sequence[Clips]) -> Clips:
        """One after the other, along a single dimension of clips."""
        first = parts[0]
        rows = {name: torch.cat([part.rows[name] for part in parts], 1) for name in first.rows}
        numbers = {name: torch.cat([part.numbers[name] for part in parts]) for name in first.numbers}
        return Clips(rows, numbers, torch.cat([part.present for part in parts]))


class Matcher(nn.Module):
    """Scores of query clips against the classes of a support set.

    A matcher says what it reads of a clip (:meth:`prepare`, once per clip), which inner products between clips it needs
    (``products``), and what follows from them (:meth:`judge`). So an episode can be scored from its clips, with gradients
    (:meth:`match`), or from a bank of thousands of prepared clips, where the products are taken in whatever way is fastest.

    Args:
        num_views: V; every view has its own learned temperature tau_v: ``logits = -distance / tau_v``.
        temperature: where tau starts.
    """

    reads: ClassVar[Literal["descriptors", "tokens"]] = "tokens"
    products: ClassVar[Mapping[str, Product]]
    workspace: ClassVar[int]
    """Numbers that :meth:`judge` holds at a time per inner product."""

    def __init__(self, num_views: int, temperature: float) -> None:
        super().__init__()
        self.num_views = num_views
        self.log_temperature = nn.Parameter(torch.full((num_views,), temperature).log())

    def clips(self, tokens: Tensor, log_weight: Tensor, descriptors: Tensor, present: Tensor) -> Clips:
        """Clips as this matcher reads them.

        Args:
            tokens: ``[B, M, T, D]``.
            log_weight: ``[B, M, T]``; a token with -inf has no influence. Other weights count in the descriptors alone.
            descriptors: ``[B, V, D]`` read-outs of the same tokens.
            present: ``[B, V]`` bool.
        """
        raise NotImplementedError

    def settle(self, clips: Clips) -> Clips:
        """All prepared clips of a bank, made ready for inner products between any of them; distances stay as they are."""
        return clips

    def judge(self, products: Mapping[str, Tensor], support: Clips, query: Clips, labels: Tensor | None, ways: int) -> Match:
        """The match that follows from the inner products; rows of the clips are not looked at. Arguments as :meth:`match`."""
        raise NotImplementedError

    def match(self, support: Clips, query: Clips, labels: Tensor | None, ways: int) -> Match:
        """Scores of the queries of E episodes, differentiable.

        Args:
            support: ``[E, S]`` clips.
            query: ``[E, Q]`` clips.
            labels: ``[E, S]`` int64 in 0..ways-1, or None: class by class, S / ways clips each.
            ways: number of classes.
        """
        member = membership(labels, support.present, ways)
        return self.judge(inner_products(self.products, support.rows, query.rows, member), support, query, labels, ways)

    def logits(self, distance: Tensor) -> Tensor:
        """``[V, ...] -> [V, ...]``, minus the distance over the view's temperature."""
        return -distance / self.log_temperature.exp().reshape(-1, *[1] * (distance.dim() - 1))


def membership(labels: Tensor | None, support: Tensor, ways: int) -> Tensor:
    """``[E, ways, S]`` bool, which clip is of which class; ``support`` is any ``[E, S, ...]`` tensor."""
    classes = torch.arange(ways, device=support.device)
    if labels is None:
        labels = classes.repeat_interleave(support.shape[1] // ways).expand(support.shape[:2])
    return classes[:, None] == labels[:, None, :]


def class_shares(member: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of every clip in the mean of every class, over the clips that are there.

    Args:
        member: ``[E, ways, S]`` bool.
        present: ``[E, S, V]`` bool.

    Returns:
        ``[V, E, ways, S]`` float32, summing to 1 over S (to 0 for a class without a clip), and ``[V, E, ways]`` bool, has clips.
    """
    weight = (member[None] & present.permute(2, 0, 1)[:, :, None]).float()
    count = weight.sum(-1)
    return weight / count.clamp(min=1)[..., None], count > 0


def mean_off_diagonal(matrix: Tensor) -> Tensor:
    """``[..., ways, ways] -> [...]``. The diagonal is left out, not taken for 0: the root of a rounding error is no rounding error."""
    ways = matrix.shape[-1]
    return (matrix.sum((-1, -2)) - torch.diagonal(matrix, dim1=-2, dim2=-1).sum(-1)) / max(ways * (ways - 1), 1)


def views_last(*values: Tensor) -> tuple[Tensor, ...]:
    """``[V, E, Q, ...] -> [E, Q, V, ...]``."""
    return tuple(value.permute(1, 2, 0, *range(3, value.dim())) for value in values)


def everything(mask: Tensor) -> bool:
    """Whether a mask is True everywhere, where that can be asked at no cost: on a GPU, or in a graph, the answer is no."""
    return not torch.compiler.is_compiling() and mask.device.type == "cpu" and bool(mask.all())
