"""Dividing source recordings between the support and the query of an episode, so that none is on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amd_fast.data.draws import GOLDEN, mix

IntArray = npt.NDArray[np.int64]
Sizes = dict[int, tuple[int, int]]  # group: clips of a class that may be support, that may be queries

_LIMIT = 2048  # steps of one search; the classes of an episode seldom need a hundred


class SearchLimitError(Exception):
    """The search gave up before it had an answer."""


class ClassClips:
    """The clips of one class and how its groups divide them.

    Args:
        support: Positions of the clips that may be support, int64 [n], ascending.
        query: Those that may be queries; the two may overlap.
        groups: Group number of every clip there is, int64 [clips].

    Attributes:
        support, query: As given, as lists.
        sizes: For each of the class's groups, how many of ``support`` and of ``query`` it holds.
        support_groups: Groups that hold support clips.
        clips: Number of different clips.
    """

    def __init__(self, support: IntArray, query: IntArray, groups: IntArray) -> None:
        self.support: list[int] = support.tolist()
        self.query: list[int] = query.tolist()
        own, held = Counter(groups[support].tolist()), Counter(groups[query].tolist())
        self.sizes = {group: (own[group], held[group]) for group in sorted(own.keys() | held.keys())}
        self.support_groups = own.keys()
        self.clips = len(np.union1d(support, query))

    @property
    def overlap(self) -> int:
        """Number of clips that may be either."""
        return len(self.support) + len(self.query) - self.clips

    def most_support(self, queries: int) -> int:
        """Most support clips when ``queries`` query clips come from groups without support; -1 where there are too few for that."""
        if len(self.sizes) == self.clips:
            spare = len(self.query) - self.overlap
            return len(self.support) - max(0, queries - spare) if queries <= len(self.query) else -1
        best = np.full(queries + 1, -1)  # best[j]: most support clips when the groups seen so far give j queries (the last: or more)
        best[0] = 0
        for own, held in self.sizes.values():
            to_support = np.where(best >= 0, best + own, -1)
            to_query = np.full_like(best, -1)
            np.maximum.at(to_query, np.minimum(np.arange(queries + 1) + held, queries), best)
            best = np.maximum(to_support, to_query)
        return int(best[queries])


@dataclass(frozen=True)
class _State:
    support: tuple[int, ...]  # clips each class still needs on the support side
    query: tuple[int, ...]
    free: tuple[
        tuple[int, int, int], ...
    ]  # in undecided groups, for each class: support clips, query clips, and group by group the more of the two
    undecided: tuple[int, ...]
    query_side: tuple[int, ...]


def divide_groups(sizes: Sequence[Sizes], shots: int, queries: int, key: int, limit: int = _LIMIT) -> set[int] | None:
    """Choose groups for the query side such that every class finds its queries there and its support elsewhere.

    Depth-first over the groups of the class with the least to spare, in random order, so it finds a division whenever one exists.

    Args:
        sizes: For each class, how many clips for the support and for the query each of its groups holds.
        shots: Support clips that every class needs.
        queries: Query clips that every class needs.
        key: Stream of random draws.
        limit: Steps to take at most.

    Returns:
        The groups on the query side; None where it is proven that there is no division.

    Raises:
        SearchLimitError: Neither was shown within the limit.
    """
    classes = len(sizes)
    groups = tuple(sorted(set().union(*sizes)))
    free = tuple(_total(size.values()) for size in sizes)
    stack = [_State((shots,) * classes, (queries,) * classes, free, groups, ())]
    for step in range(limit):
        if not stack:
            return None
        state = stack.pop()
        # A group serves one side only, so the last term bounds both needs together.
        slack = [min(f[0] - s, f[1] - q, f[2] - s - q) for f, s, q in zip(state.free, state.support, state.query, strict=True)]
        if min(slack) < 0:
            continue
        draw = mix(key + (step + 1) * GOLDEN)
        needy = [c for c in range(classes) if state.support[c] or state.query[c]]
        if not needy:
            return {*state.query_side, *(g for i, g in enumerate(state.undecided) if mix(draw + (i + 1) * GOLDEN) >> 63)}
        tight = min(needy, key=slack.__getitem__)
        candidates = [g for g in state.undecided if g in sizes[tight]]
        group = candidates[((draw >> 32) * len(candidates)) >> 32]
        needs = state.support[tight], state.query[tight]
        query_first = (((draw & 0xFFFFFFFF) * sum(needs)) >> 32) < needs[1]
        stack += [_decide(state, sizes, group, side) for side in (not query_first, query_first)]
    if not stack:
        return None
    raise SearchLimitError


def _total(sizes: Iterable[tuple[int, int]]) -> tuple[int, int, int]:
    own, held, either = 0, 0, 0
    for support, query in sizes:
        own, held, either = own + support, held + query, either + max(support, query)
    return own, held, either


def _decide(state: _State, sizes: Sequence[Sizes], group: int, to_query: bool) -> _State:
    held = [size.get(group, (0, 0)) for size in sizes]
    needs = state.query if to_query else state.support
    reduced = tuple(max(0, need - n[to_query]) for need, n in zip(needs, held, strict=True))
    return _State(
        support=state.support if to_query else reduced,
        query=reduced if to_query else state.query,
        free=tuple((f[0] - n[0], f[1] - n[1], f[2] - max(n)) for f, n in zip(state.free, held, strict=True)),
        undecided=tuple(g for g in state.undecided if g != group),
        query_side=(*state.query_side, group) if to_query else state.query_side,
    )
