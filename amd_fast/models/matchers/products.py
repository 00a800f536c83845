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
    return {name: _product(product.pairs, support[product.rows], query[product.rows], ways) for name, product in wanted.items()}


def _product(pairs: Pairs, support: Tensor, query: Tensor, ways: int) -> Tensor:
    if pairs == "cross":
        return query.flatten(2, 3) @ support.flatten(2, 3).mT
    if pairs == "class":
        support = support.unflatten(2, (ways, -1)).flatten(3, 4)
    else:
        support = (torch.cat([support, query], 2) if pairs == "all" else support).flatten(2, 3)
    return support @ support.mT
