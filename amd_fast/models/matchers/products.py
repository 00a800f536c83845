"""Inner products between the clips of an episode: the large part of every matcher's work, and the only one that grows with D."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Pairs = Literal["all", "cross", "support", "class"]


class Product(NamedTuple):
    """Which inner products a matcher needs.

    Attributes:
        rows: name of the clips' rows, R of width W per clip.
        pairs: of which clips. ``"all"``: of all with all, support first, ``[parts, E, (S + Q) R, (S + Q) R]``; ``"cross"``: of queries
            with support, ``[parts, E, Q R, S R]``; ``"support"``: ``[parts, E, S R, S R]``; ``"class"``: of the support clips of a
            class, which come class by class, ``[parts, E, ways, S / ways R, S / ways R]``.
    """

    rows: str
    pairs: Pairs


def inner_products(
    wanted: Mapping[str, Product], support: Mapping[str, Tensor], query: Mapping[str, Tensor], ways: int
) -> dict[str, Tensor]:
    """The products of E episodes, differentiable. ``support`` and ``query`` are rows ``[parts, E, clips, R, W]`` by name."""
    found = {}
    for name, (rows, pairs) in wanted.items():
        clips = support[rows] if pairs in ("support", "class") else torch.cat([support[rows], query[rows]], 2)
        left, right = pair_views(pairs, clips, support[rows].shape[2], ways)
        found[name] = left @ right.mT
    return found


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
    sides = {"all": (support + query, support + query), "cross": (query, support), "support": (support, support)}[pairs]
    return sides[0] * height, sides[1] * height
