"""Few-shot episodes as a pure function of their number: same arguments, same episode, on every platform and numpy version.

Random numbers come from a counter (``amd_fast.data.draws``), so episode ``i`` needs none of the episodes before it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from amd_fast.data.draws import bits, choose, choose_many, mix, mix_many, permutation
from amd_fast.data.group_sides import ClassClips, IntArray, SearchLimitError, divide_groups
from amd_fast.errors import EpisodeError

Values = Sequence[Any] | npt.NDArray[Any]

# Odd multipliers: distinct episodes, redraws and tries start at distinct points of the counter.
_EPISODE = 0xD1342543DE82EF95
_REDRAW = 0xDA942042E4DD58B5
_TRY = 0xAEF17502108EF2D9
_TRIES = 4  # random draws of the clips of given classes before the groups are divided by search
_REDRAWS = 32  # random draws of the classes before they are sought
_SEARCHES = 256  # divisions of groups sought for one episode
_REMEMBERED = 65_536  # impossible class combinations kept in memory
_CHUNK = 4096  # episodes drawn at once; bounds the memory of the intermediate arrays
_NAMED = 5  # classes named in one error message


class Episode(NamedTuple):
    """Positions of the clips of one episode.

    Attributes:
        support: int64 [ways * shots], class by class in the order of ``classes``.
        query: int64 [ways * queries], likewise; ``queries`` counts per class.
        classes: The label values, [ways]. Clip ``i`` of the support has the label ``classes[i // shots]``.
    """

    support: IntArray
    query: IntArray
    classes: npt.NDArray[Any]


def episode(index: int, labels: Values, *, ways: int, shots: int, queries: int, seed: int, groups: Values | None = None) -> Episode:
    """Draw episode number ``index``. See ``EpisodeSampler``, which is faster for more than one.

    Args:
        index: Number of the episode, >= 0.
        labels: Class of every clip, [clips], integers or text.
        ways: Classes per episode.
        shots: Support clips per class.
        queries: Query clips per class.
        seed: Any integer; a different seed is a different sequence of episodes.
        groups: Source recording of every clip, [clips]; support and query never share one. None: every clip is its own.

    Raises:
        EpisodeError: The clips do not allow it; the message names the class and what to lower.
    """
    return EpisodeSampler(labels, ways=ways, shots=shots, queries=queries, seed=seed, groups=groups)(index)


def eligible_classes(
    labels: Values,
    *,
    shots: int,
    queries: int,
    groups: Values | None = None,
    support_pool: Values | None = None,
    query_pool: Values | None = None,
) -> npt.NDArray[Any]:
    """Classes that on their own have enough clips, in enough groups, for ``shots`` support and ``queries`` query clips (sorted).

    The arguments are those of ``EpisodeSampler``.
    """
    classes, members, _ = _by_class(labels, groups, support_pool, query_pool)
    return classes[[_shortage(member, shots, queries) is None for member in members]]


class EpisodeSampler:
    """Draws episodes; everything that does not depend on the episode's number is prepared once.

    Classes are drawn uniformly without replacement. Without groups (or with one clip per group) the clips of a class are drawn
    uniformly too, queries before support. With groups, the support comes from the recordings that hold no query of any class (a
    recording with several actions is on one side only), from different recordings as far as there are any. Where a few such draws
    fail, the groups are divided between the two sides by exhaustive search; where that shows that the drawn classes cannot form
    an episode, other classes are drawn.

    Args:
        labels, ways, shots, queries, seed, groups: As for ``episode``.
        support_pool: Clips that may be support, bool [clips]; None: all.
        query_pool: Clips that may be queries, bool [clips]; None: all.

    Raises:
        EpisodeError: Fewer classes than ``ways``, or a class with too few clips or groups (``eligible_classes`` says which have
            enough), or numbers below 1.
    """

    def __init__(
        self,
        labels: Values,
        *,
        ways: int,
        shots: int,
        queries: int,
        seed: int,
        groups: Values | None = None,
        support_pool: Values | None = None,
        query_pool: Values | None = None,
    ) -> None:
        self.ways, self.shots, self.queries, self.seed = (operator.index(value) for value in (ways, shots, queries, seed))
        for name in ("ways", "shots", "queries"):
            if getattr(self, name) < 1:
                raise EpisodeError(f"{name} is {getattr(self, name)}; an episode needs at least 1")
        self.classes, self._members, group_numbers = _by_class(labels, groups, support_pool, query_pool)
        self._check()
        self._group_of: list[int] = group_numbers.tolist()
        self._support = _Ragged([member.support for member in self._members])
        self._query = _Ragged([member.query for member in self._members])
        self._constrained = _constrained(self._members, self.shots, self.queries)
        self._impossible: set[frozenset[int]] = set()
        self._key = mix(self.seed)

    def __call__(self, index: int) -> Episode:
        """Episode number ``index`` (>= 0).

        Raises:
            EpisodeError: The groups allow no episode of these classes.
        """
        index = operator.index(index)
        if index < 0:
            raise EpisodeError(f"episode number is {index}; it must be >= 0")
        key = mix(self._key + index * _EPISODE)
        chosen, support, query = self._draw_constrained(key) if self._constrained else self._draw(key)
        return Episode(np.array(support, dtype=np.int64), np.array(query, dtype=np.int64), self.classes[chosen])

    def batch(self, start: int, count: int) -> tuple[IntArray, IntArray]:
        """Episodes ``start`` to ``start + count - 1`` at once, the same as one by one.

        Returns:
            support int64 [count, ways * shots] and query int64 [count, ways * queries].

        Raises:
            EpisodeError: As for a single episode.
        """
        if start < 0 or count < 0:
            raise EpisodeError(f"episodes {start} to {start} + {count}: both numbers must be >= 0")
        support = np.empty((count, self.ways * self.shots), dtype=np.int64)
        query = np.empty((count, self.ways * self.queries), dtype=np.int64)
        if self._constrained:
            for row in range(count):
                support[row], query[row], _ = self(start + row)
            return support, query
        for first in range(0, count, _CHUNK):
            rows = slice(first, min(first + _CHUNK, count))
            support[rows], query[rows] = self._draw_many(start + first, rows.stop - first)
        return support, query

    def _draw(self, key: int) -> tuple[list[int], list[int], list[int]]:
        """Classes (positions in ``classes``), support and query where every choice of queries leaves enough support."""
        chosen = choose(key, self.ways, len(self.classes))
        support: list[int] = []
        query: list[int] = []
        first = self.ways
        for label in chosen:
            member = self._members[label]
            picks = [member.query[i] for i in choose(key, self.queries, len(member.query), first)]
            order = permutation(key, len(member.support), first + self.queries)
            support += islice((clip for clip in map(member.support.__getitem__, order) if clip not in picks), self.shots)
            query += picks
            first += 2 * self.queries + self.shots
        return chosen, support, query

    def _draw_many(self, start: int, count: int) -> tuple[IntArray, IntArray]:
        """Support and query of ``count`` episodes, the same as ``_draw``, with arrays."""
        each = 2 * self.queries + self.shots  # draws per class: as many of the support clips drawn may be queries already
        steps = np.arange(count, dtype=np.uint64) * np.uint64(_EPISODE)
        # Taken modulo 2**64 by hand: numpy takes no larger Python integer.
        keys = mix_many(np.uint64((self._key + start * _EPISODE) % 2**64) + steps)
        draws = bits(keys, self.ways * (1 + each))
        chosen = choose_many(draws[:, : self.ways], np.full(count, len(self.classes)))
        draws = draws[:, self.ways :].reshape(count, self.ways, each)
        query = self._query.take(chosen, draws[..., : self.queries])
        order = self._support.take(chosen, draws[..., self.queries :])
        taken = (order[..., None] == query[..., None, :]).any(-1)  # past the end of a short list: free, but never among the first
        first_free = np.argsort(taken, axis=-1, kind="stable")[..., : self.shots]
        return np.take_along_axis(order, first_free, axis=-1).reshape(count, -1), query.reshape(count, -1)

    def _draw_constrained(self, key: int) -> tuple[list[int], list[int], list[int]]:
        """The same as ``_draw`` where groups have to be kept apart: some redraws of the classes, a search for classes, then an error."""
        searches = iter(range(_SEARCHES))
        for redraw in range(_REDRAWS):
            stream = mix(key + redraw * _REDRAW)
            chosen = choose(stream, self.ways, len(self.classes))
            drawn = self._draw_clips(stream, chosen, searches)
            if drawn is not None:
                return chosen, *drawn
        found = self._seek_classes(key, [], list(permutation(key, len(self.classes))), searches)
        if found is None:
            raise EpisodeError(
                f"found no {self.ways} of the {len(self.classes)} classes with {self.shots} support and {self.queries} query clips each "
                "and no group on both sides, because groups hold several classes; lower ways, shots or queries, or add other recordings"
            )
        return found

    def _seek_classes(
        self, key: int, chosen: list[int], others: list[int], searches: Iterator[int]
    ) -> tuple[list[int], list[int], list[int]] | None:
        """Classes that can form an episode, ``chosen`` and some of ``others``, depth first; an impossible set is left at once."""
        missing = self.ways - len(chosen)
        for i, label in enumerate(others[: len(others) - missing + 1]):
            extended = [*chosen, label]
            query_side = self._query_side(key, extended, searches)
            if query_side is None:
                continue
            if missing == 1:
                drawn = self._pick(key, extended, query_side)
                return None if drawn is None else (extended, *drawn)
            found = self._seek_classes(key, extended, others[i + 1 :], searches)
            if found is not None:
                return found
        return None

    def _draw_clips(self, stream: int, chosen: list[int], searches: Iterator[int]) -> tuple[list[int], list[int]] | None:
        """Support and query of the chosen classes; None where there is no way (or none was found within the limits)."""
        if frozenset(chosen) not in self._impossible:
            for attempt in range(_TRIES):
                drawn = self._pick(mix(stream + attempt * _TRY), chosen)
                if drawn is not None:
                    return drawn
        query_side = self._query_side(stream, chosen, searches)
        return None if query_side is None else self._pick(stream, chosen, query_side)

    def _query_side(self, stream: int, chosen: list[int], searches: Iterator[int]) -> set[int] | None:
        """Groups that may serve the queries such that every chosen class finds its support in the others; None as for ``_draw_clips``.

        What is known to be impossible counts as a search all the same: an episode must not depend on those drawn before it.
        """
        members = frozenset(chosen)
        if next(searches, None) is None or members in self._impossible:
            return None
        try:
            query_side = divide_groups([self._members[label].sizes for label in chosen], self.shots, self.queries, stream)
        except SearchLimitError:
            return None
        if query_side is None and len(self._impossible) < _REMEMBERED:
            self._impossible.add(members)
        return query_side

    def _pick(self, stream: int, chosen: list[int], query_side: set[int] | None = None) -> tuple[list[int], list[int]] | None:
        """Queries at random (from the groups ``query_side``, where given), then support from the groups that hold no query."""
        query: list[int] = []
        for way, label in enumerate(chosen):
            clips = self._members[label].query
            order = map(clips.__getitem__, permutation(mix(stream + 2 * way), len(clips)))
            allowed = order if query_side is None else (clip for clip in order if self._group_of[clip] in query_side)
            query += islice(allowed, self.queries)
        taken = {self._group_of[clip] for clip in query}
        support: list[int] = []
        for way, label in enumerate(chosen):
            member = self._members[label]
            order = map(member.support.__getitem__, permutation(mix(stream + 2 * way + 1), len(member.support)))
            found = self._spread(order, len(member.support_groups - taken), taken)
            if found is None:
                return None
            support += found
        return support, query

    def _spread(self, order: Iterable[int], groups: int, taken: set[int]) -> list[int] | None:
        """The first clips in the given order that lie outside the groups ``taken``, from as many of the other ``groups`` as possible."""
        distinct: list[int] = []
        others: list[int] = []
        used: set[int] = set()
        for clip in order:
            group = self._group_of[clip]
            if group in taken:
                continue
            if group in used:
                others.append(clip)
            else:
                used.add(group)
                distinct.append(clip)
            if len(distinct) == min(groups, self.shots) and len(distinct) + len(others) >= self.shots:
                return (distinct + others)[: self.shots]
        return None

    def _check(self) -> None:
        if self.ways > len(self.classes):
            raise EpisodeError(
                f"{self.ways} ways asked for, but the clips have {len(self.classes)} classes; lower ways or use more classes"
            )
        short = []
        for name, member in zip(self.classes, self._members, strict=True):
            reason = _shortage(member, self.shots, self.queries)
            if reason is not None:
                short.append(f"class {str(name)!r} {reason}")
        if short:
            more = f"; and {len(short) - _NAMED} more classes" if len(short) > _NAMED else ""
            raise EpisodeError(
                f"too few clips or groups for shots={self.shots}, queries={self.queries} of each class: {'; '.join(short[:_NAMED])}{more}. "
                "Lower shots or queries, or leave these classes out (eligible_classes() gives the others)"
            )


class _Ragged:
    """Lists of clips of different lengths, one per class, for choosing from many at once."""

    def __init__(self, lists: Sequence[Sequence[int]]) -> None:
        self.sizes = np.array([len(items) for items in lists], dtype=np.int64)
        self.offsets = np.cumsum(self.sizes) - self.sizes
        self.items = np.concatenate([np.array(items, dtype=np.int64) for items in lists])

    def take(self, which: IntArray, draws: npt.NDArray[np.uint64]) -> IntArray:
        """A choice without replacement from the lists ``which`` [...], by 32-bit draws [..., count]; -1 after a list's end."""
        picks = choose_many(draws, self.sizes[which])
        return np.where(picks < 0, -1, self.items[self.offsets[which][..., None] + np.maximum(picks, 0)])


def _by_class(
    labels: Values, groups: Values | None, support_pool: Values | None, query_pool: Values | None
) -> tuple[npt.NDArray[Any], list[ClassClips], IntArray]:
    """Sorted label values, the clips of each, and the group number of every clip."""
    names = np.asarray(labels)
    if names.ndim != 1 or not len(names):
        raise EpisodeError(f"labels have shape {list(names.shape)}; give one label per clip, [clips], and at least one clip")
    classes, codes = np.unique(names, return_inverse=True)
    group_names = np.arange(len(names)) if groups is None else _per_clip("groups", groups, len(names))
    numbers = np.unique(group_names, return_inverse=True)[1].astype(np.int64)
    pools = []
    for name, pool in (("support_pool", support_pool), ("query_pool", query_pool)):
        mask = np.ones(len(names), dtype=bool) if pool is None else _per_clip(name, pool, len(names))
        if mask.dtype != bool:
            raise EpisodeError(f"{name} has dtype {mask.dtype}; give a boolean mask, True for clips that may be drawn")
        order = np.argsort(codes, kind="stable").astype(np.int64)
        order = order[mask[order]]
        pools.append(np.split(order, np.cumsum(np.bincount(codes[order], minlength=len(classes)))[:-1]))
    return classes, [ClassClips(support, query, numbers) for support, query in zip(*pools, strict=True)], numbers


def _per_clip(name: str, values: Values, clips: int) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.shape != (clips,):
        raise EpisodeError(f"{clips} labels, but {name} of shape {list(array.shape)}; give one entry per clip")
    return array


def _constrained(members: Iterable[ClassClips], shots: int, queries: int) -> bool:
    """Whether support has to be sought: a group holds several clips, or unlucky queries would leave a class too little support."""
    seen: set[int] = set()
    for member in members:
        if len(member.sizes) < member.clips or not seen.isdisjoint(member.sizes):
            return True
        if len(member.support) < shots + min(queries, member.overlap):
            return True
        seen.update(member.sizes)
    return False


def _shortage(member: ClassClips, shots: int, queries: int) -> str | None:
    """What a class lacks, in words; None where it has enough."""
    most = member.most_support(queries)
    if most >= shots:
        return None
    clips, groups = member.clips, len(member.sizes)
    held = f"has {clips} clips"
    if len(member.support) < clips or len(member.query) < clips:
        held += f" ({len(member.support)} may be support, {len(member.query)} may be queries)"
    if groups < clips:
        held += f" in {groups} group{'s' if groups > 1 else ''}"
    if most < 1:
        return f"{held}, too few for shots=1, queries={queries}"
    return f"{held}, enough for shots={most} at most"
