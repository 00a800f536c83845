"""Scores of thousands of episodes from a bank of prepared clips: the inner products in whatever way is fastest, then the matcher's part.

Nothing loops over episodes, classes or clips. Two ways lead to the products of an episode's clips:

* gathered: the clips' rows are copied side by side (those of a class added up, where prototypes are asked for), as many episodes at a
  time as stay in the processor's cache, and multiplied. That moves ``4 n R W`` bytes and costs ``2 m W`` operations per episode and part,
  for n clips of R rows of width W and m products;
* looked up: all clips that occur in the episodes are multiplied with each other once, ``2 N^2 W`` operations per part for N clips, and
  an episode picks its ``m`` products. Open where a clip has one row (descriptors), and where the N^2 products fit the free memory.

:func:`plan` takes the cheaper one. A byte moved counts as 5 operations and a product picked as 1000: on two cores of an AMD EPYC a
matrix product runs at about 110 GFLOP/s, rows are gathered at about 21 GB/s and single numbers in about 9 ns, in one measurement.

Episodes are taken in chunks. A chunk holds ``min(free memory / 4, 32 MiB on a CPU) / (4 bytes x products per episode x the matcher's
workspace)`` episodes, at least one; its rows are gathered in parts of at most 4 MiB on a CPU. No number depends on either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from amd_fast.models.matchers import Clips, Match, Matcher
from amd_fast.models.matchers.products import OF_CLASSES, Pairs, Product, class_views, pair_views, product_shape
from amd_fast.resources import free_memory

_FLOAT = 4
_BYTE, _PICK = 5.0, 1000.0  # operations that a byte moved, and a product picked, are worth
_CACHED_ROWS, _CACHED_CHUNK = 4 << 20, 32 << 20  # bytes, on a CPU


class Plan(NamedTuple):
    """How a set of episodes is scored.

    Attributes:
        looked_up: names of the products that are picked from all products of the bank; the others are gathered.
        chunk: episodes scored together.
        gathered: of these, episodes whose rows are gathered together.
    """

    looked_up: frozenset[str]
    chunk: int
    gathered: int


def plan(matcher: Matcher, clips: Clips, episodes: int, support: int, query: int, ways: int, *, distinct: int | None = None) -> Plan:
    """The plan for ``episodes`` episodes of ``support`` and ``query`` clips over a bank, of which ``distinct`` clips occur."""
    device = clips.present.device
    free = free_memory(device)
    number = len(clips.present) if distinct is None else distinct
    products, moved = 0, 1
    looked_up = set()
    for name, product in matcher.products.items():
        rows = clips.rows[product.rows]
        parts, _, height, width = rows.shape
        wanted = _count(product_shape(product.pairs, support, query, height, ways))
        products += parts * wanted
        together = support + (query if product.pairs in ("all", "cross", "prototype") else 0)
        gather = episodes * (_BYTE * _FLOAT * together * height * width + 2.0 * wanted * width)
        look_up = 2.0 * number**2 * width + _PICK * episodes * wanted
        fits = _FLOAT * parts * number**2 <= free / 4
        if height == 1 and product.pairs == "all" and fits and look_up < gather:
            looked_up.add(name)
        moved = max(moved, ((ways if product.pairs in OF_CLASSES else support) + query) * height * width)
    cpu = device.type == "cpu"
    room = min(free / 4, _CACHED_CHUNK) if cpu else free / 4
    chunk = max(1, min(episodes, int(room / (_FLOAT * products * matcher.workspace))))
    return Plan(frozenset(looked_up), chunk, max(1, min(chunk, _CACHED_ROWS // (_FLOAT * moved))) if cpu else chunk)


def matches(matcher: Matcher, clips: Clips, support: Tensor, query: Tensor, ways: int, *, chunk: int | None = None) -> Iterator[Match]:
    """Matches of E episodes, chunk by chunk, without gradients.

    Args:
        matcher: in evaluation mode.
        clips: ``[N]`` prepared clips of a bank, see :meth:`~amd_fast.models.matchers.base.Matcher.settle`.
        support: ``[E, S]`` int64 positions, class by class, S / ways of each.
        query: ``[E, Q]`` int64 positions.
        ways: classes per episode.
        chunk: episodes scored together, in place of the planned number.
    """
    distinct, position = torch.unique(torch.cat([support, query], 1), return_inverse=True)
    planned = plan(matcher, clips, len(support), support.shape[1], query.shape[1], ways, distinct=len(distinct))
    if chunk is not None:
        planned = planned._replace(chunk=chunk, gathered=min(chunk, planned.gathered))
    with torch.inference_mode():
        tables = {name: _all_products(clips.rows[matcher.products[name].rows], distinct) for name in planned.looked_up}
        gathering = _Gathering(matcher.products, clips.rows, planned, ways)
        for first in range(0, len(support), planned.chunk):
            here = slice(first, first + planned.chunk)
            products = gathering.products(support[here], query[here])
            for name, table in tables.items():
                products[name] = _picked(table, position[here])
            yield matcher.judge(products, clips.numbers_at(support[here]), clips.numbers_at(query[here]), None, ways)


def _count(shape: tuple[int, ...]) -> int:
    number = 1
    for size in shape:
        number *= size
    return number


def _all_products(rows: Tensor, distinct: Tensor) -> Tensor:
    """``[parts, N * N]`` products of the rows ``[parts, clips, 1, W]`` at ``distinct [N]`` with each other."""
    chosen = rows[:, distinct, 0]
    return (chosen @ chosen.mT).flatten(1)


def _picked(table: Tensor, chosen: Tensor) -> Tensor:
    """``[parts, E, n, n]`` from ``[parts, N * N]``, for the clips ``chosen [E, n]``."""
    number = round(table.shape[1] ** 0.5)
    place = chosen[:, :, None] * number + chosen[:, None, :]
    return table.index_select(1, place.flatten()).unflatten(1, place.shape)


def _multiply(left: Tensor, right: Tensor, into: Tensor) -> None:
    torch.bmm(left.flatten(0, -3), right.flatten(0, -3).mT, out=into.view(-1, *into.shape[-2:]))


class _Gathering:
    """Products of gathered rows, in memory that is used again: on a CPU, fresh memory costs more than what is written to it."""

    def __init__(self, products: Mapping[str, Product], rows: Mapping[str, Tensor], planned: Plan, ways: int) -> None:
        self.rows, self.planned, self.ways = rows, planned, ways
        self.groups: dict[tuple[str, bool], dict[str, Pairs]] = {}  # by the rows, and whether they are added up by class
        for name, product in products.items():
            if name not in planned.looked_up:
                self.groups.setdefault((product.rows, product.pairs in OF_CLASSES), {})[name] = product.pairs
        self.largest = max((rows[name][0, 0].numel() for name, _ in self.groups), default=0)
        self.memory: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def products(self, support: Tensor, query: Tensor) -> dict[str, Tensor]:
        """All products of a chunk of episodes, by name."""
        found: dict[str, Tensor] = {}
        for (name, of_classes), wanted in self.groups.items():
            rows = self.rows[name]
            parts, _, height, _ = rows.shape
            for key, pairs in wanted.items():
                shape = product_shape(pairs, support.shape[1], query.shape[1], height, self.ways)
                found[key] = self._memory(key, (parts, len(support), *shape), rows)
            multiply = self._of_classes if of_classes else self._of_clips
            step = self.planned.gathered * (self.largest // rows[0, 0].numel())
            for part in range(parts):
                for first in range(0, len(support), step):
                    here = slice(first, first + step)
                    multiply(rows[part], support[here], query[here], [(pairs, found[key][part, here]) for key, pairs in wanted.items()])
        return found

    def _of_clips(self, rows: Tensor, support: Tensor, query: Tensor, wanted: list[tuple[Pairs, Tensor]]) -> None:
        """Products of clips ``[clips, R, W]``, each written into its tensor."""
        clips = self._gathered("clips", rows, torch.cat([support, query], 1))
        for pairs, into in wanted:
            _multiply(*pair_views(pairs, clips, support.shape[1], self.ways), into)

    def _of_classes(self, rows: Tensor, support: Tensor, query: Tensor, wanted: list[tuple[Pairs, Tensor]]) -> None:
        """Products with classes; the rows of a single clip are of unit length already, or 0."""
        queries = self._gathered("queries", rows, query if any(pairs == "prototype" for pairs, _ in wanted) else query[:, :0])
        if one := support.shape[1] == self.ways:
            total = self._gathered("support", rows, support)
        else:
            total = F.embedding_bag(support.reshape(-1, support.shape[1] // self.ways), rows.flatten(1), mode="sum")
            total = total.view(len(support), self.ways, *rows.shape[1:])
        for pairs, into in wanted:
            _multiply(*class_views(pairs, total, queries), into)
            if pairs == "prototype" and not one:
                into.div_(torch.linalg.vector_norm(total, dim=-1).clamp_(min=1e-12).flatten(1)[:, None])

    def _gathered(self, name: str, rows: Tensor, index: Tensor) -> Tensor:
        """``[E, n, R, W]`` from ``[clips, R, W]``."""
        memory = self._memory(f"rows {name}", (index.numel(), rows[0].numel()), rows)
        torch.index_select(rows.flatten(1), 0, index.flatten(), out=memory)
        return memory.view(*index.shape, *rows.shape[1:])

    def _memory(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if (name, shape) not in self.memory:
            self.memory[name, shape] = like.new_empty(shape)
        return self.memory[name, shape]
