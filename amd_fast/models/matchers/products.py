"""Inner products between the clips of an episode: the large part of every matcher's work, and the only one that grows with D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pairs = Literal["all", "cross", "class", "prototype", "between"]


OF_CLASSES: tuple[Pairs, ...] = ("prototype", "between")
"""Pairs in which a class is one, not each of its support clips."""


class Product(NamedTuple):
    """Which inner products a matcher needs.

    Attributes:
        rows: name of the clips' rows, R of width W per clip.
        pairs: of which clips. ``"all"``: of all with all, support first, ``[parts, E, (S + Q) R, (S + Q) R]``; ``"cross"``: of queries
            with support, ``[parts, E, Q R, S R]``; ``"class"``: of the support clips of a
            class, which come class by class, ``[parts, E, ways, S / ways R, S / ways R]``; ``"prototype"``: of queries with the means of
            the support clips of every class, row by row, brought to unit length, ``[parts, E, Q R, ways R]``; ``"between"``: of the
            classes, each the sum of all rows of its support clips, ``[parts, E, ways, ways]``.
    """

    rows: str
    pairs: Pairs


def inner_products(
    wanted: Mapping[str, Product], support: Mapping[str, Tensor], query: Mapping[str, Tensor], member: Tensor
) -> dict[str, Tensor]:
    """The products of E episodes, differentiable.

    Args:
        wanted: products by name.
        support, query: rows ``[parts, E, clips, R, W]`` by name.
        member: ``[E, ways, S]`` bool, which support clip is of which class.
    """
    found = {}
    for name, (rows, pairs) in wanted.items():
        seen = support[rows]
        if pairs in OF_CLASSES:
            total = (member.to(seen.dtype) @ seen.flatten(3)).unflatten(3, seen.shape[3:])
            left, right = class_views(pairs, total, query[rows])
            found[name] = left @ (F.normalize(right, dim=-1) if pairs == "prototype" else right).mT
        else:
            clips = seen if pairs == "class" else torch.cat([seen, query[rows]], 2)
            left, right = pair_views(pairs, clips, seen.shape[2], member.shape[1])
            found[name] = left @ right.mT
    return found


def class_views(pairs: Pairs, total: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of a product with classes, from their sums ``[..., ways, R, W]`` and the queries ``[..., Q, R, W]``.

    Those of a ``"prototype"`` product have yet to be brought to unit length.
    """
    if pairs == "prototype":
        return query.flatten(-3, -2), total.flatten(-3, -2)
    sums = total.sum(-2) if total.shape[-2] > 1 else total.squeeze(-2)
    return sums, sums


def pair_views(pairs: Pairs, clips: Tensor, support: int, ways: int) -> tuple[Tensor, Tensor]:
    """The two factors ``[..., rows, W]`` of a product, as views of the clips ``[..., S + Q, R, W]``, support first."""
    if pairs == "cross":
        return clips[..., support:, :, :].flatten(-3, -2), clips[..., :support, :, :].flatten(-3, -2)
    chosen = clips if pairs == "all" else clips[..., :support, :, :]
    chosen = chosen.unflatten(-3, (ways, -1)).flatten(-3, -2) if pairs == "class" else chosen.flatten(-3, -2)
    return chosen, chosen


def product_shape(pairs: Pairs, support: int, query: int, height: int, ways: int) -> tuple[int, ...]:
    """The shape of a product for one episode and part."""
    if pairs == "class":
        return ways, support // ways * height, support // ways * height
    if pairs == "between":
        return ways, ways
    together = support + query
    sides = {"all": (together, together), "cross": (query, support), "prototype": (query, ways)}[pairs]
    return sides[0] * height, sides[1] * height
