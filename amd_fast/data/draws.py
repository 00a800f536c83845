"""Random draws from a counter: integers in, integers out, the same on every platform and numpy version.

The bits are SplitMix64 (Steele, Lea and Flood, 2014): draw ``j`` of a stream is ``mix(key + (j + 1) * GOLDEN)``, so any draw can be
computed without those before it. Each function comes for one stream (Python integers) and, where many are drawn at once, for arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_MASK = (1 << 64) - 1

UIntArray = npt.NDArray[np.uint64]


def mix(value: int) -> int:
    """SplitMix64's finalizer, of a value taken modulo 2**64."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def mix_many(values: UIntArray) -> UIntArray:
    """``mix`` of every element."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))


def permutation(key: int, size: int, first: int = 0) -> Iterator[int]:
    """A random permutation of ``range(size)``, one element at a time (Fisher-Yates on an array that is never written out).

    Args:
        key: The stream.
        size: Number of elements, below 2**32. A position is the high half of 32 random bits times the number of those left;
            that favours some by less than ``size / 2**32``.
        first: Draw of the stream to start with.
    """
    moved: dict[int, int] = {}
    counter = key + first * GOLDEN
    for i in range(size):
        counter += GOLDEN
        position = i + (((mix(counter) >> 32) * (size - i)) >> 32)
        yield moved.get(position, position)
        moved[position] = moved.get(i, i)


def choose(key: int, count: int, size: int, first: int = 0) -> list[int]:
    """The first ``count`` elements of ``permutation(key, size, first)``: a random choice without replacement."""
    moved: dict[int, int] = {}
    chosen = []
    counter = key + first * GOLDEN
    for i in range(count):
        counter += GOLDEN
        position = i + (((mix(counter) >> 32) * (size - i)) >> 32)
        chosen.append(moved.get(position, position))
        moved[position] = moved.get(i, i)
    return chosen


def bits(keys: UIntArray, count: int) -> UIntArray:
    """The first ``count`` draws of every stream, [streams, count], 32 random bits each, for ``choose_many``."""
    counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    return mix_many(keys[:, None] + counters) >> np.uint64(32)


def choose_many(draws: UIntArray, sizes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """``choose`` for many streams.

    Args:
        draws: 32 random bits each, [..., count].
        sizes: Number of elements to choose from, [...].

    Returns:
        Positions below ``sizes``, distinct along the last axis, int64 [..., count]; -1 after the last one where ``sizes < count``.
    """
    count = draws.shape[-1]
    left = sizes.astype(np.int64)
    result = np.empty(draws.shape, dtype=np.int64)
    positions: list[UIntArray] = []
    moved: list[UIntArray] = []
    for i in range(count):
        position = np.uint64(i) + ((draws[..., i] * np.maximum(left - i, 0).astype(np.uint64)) >> np.uint64(32))
        value, at_i = position, np.full_like(position, i)
        for p, m in zip(positions, moved, strict=True):
            value = np.where(p == position, m, value)
            at_i = np.where(p == i, m, at_i)
        result[..., i] = np.where(left > i, value.astype(np.int64), -1)
        positions.append(position)
        moved.append(at_i)
    return result
