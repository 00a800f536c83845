"""Which frames of a clip are sampled."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amd_fast.data.sampling import segment_indices
from amd_fast.errors import DataError


@given(frames=st.integers(1, 100_000), count=st.integers(1, 64), seed=st.none() | st.integers(0, 2**32 - 1))
def test_each_index_lies_in_its_segment(frames: int, count: int, seed: int | None) -> None:
    indices = segment_indices(frames, count, None if seed is None else np.random.default_rng(seed))
    assert indices.dtype == np.int64
    assert indices.shape == (count,)
    for k, index in enumerate(indices.tolist()):
        assert 0 <= index < frames
        assert Fraction(k * frames, count) - 1 < index < Fraction((k + 1) * frames, count)


def test_segment_centres() -> None:
    assert segment_indices(80, 8).tolist() == [5, 15, 25, 35, 45, 55, 65, 75]
    assert segment_indices(3, 8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_random_offsets_cover_every_frame_evenly() -> None:
    rng = np.random.default_rng(0)
    drawn = np.concatenate([segment_indices(24, 8, rng) for _ in range(3000)])
    counts = np.bincount(drawn, minlength=24)
    assert np.abs(counts / counts.mean() - 1).max() < 0.15


@pytest.mark.parametrize(("frames", "count"), [(0, 8), (-3, 8), (10, 0)])
def test_nothing_to_sample(frames: int, count: int) -> None:
    with pytest.raises(DataError):
        segment_indices(frames, count)
