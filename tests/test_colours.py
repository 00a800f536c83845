"""Colours that were taken for BT.601: one matrix makes them what FFmpeg makes of the same luma and chroma."""

from __future__ import annotations

import av
import numpy as np
import pytest

from amd_fast.data.colours import from_bt601


def converted(planes: np.ndarray, space: int, full: bool) -> np.ndarray:
    """By swscale, luma and chroma ``[3, H, W]`` at full resolution."""
    frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
    frame.colorspace, frame.color_range = space, 2 if full else 1
    return frame.to_ndarray(format="rgb24").astype(np.float32)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", [1, 7, 9])
def test_the_matrix_is_that_of_ffmpeg(space: int, full: bool) -> None:
    rng = np.random.default_rng(space)
    planes = np.stack([rng.integers(110, 150, (32, 32)), *rng.integers(83, 173, (2, 32, 32))]).astype(np.uint8)  # nothing is cut off
    wrong, right = converted(planes, 5, full), converted(planes, space, full)
    assert np.abs(wrong - right).mean() > 2
    assert np.abs(wrong @ from_bt601(space).T - right).mean() < 0.8  # both are rounded


def test_greys_stay_and_bt601_needs_nothing() -> None:
    np.testing.assert_allclose(from_bt601(1).sum(1), 1, atol=1e-6)
    assert all(from_bt601(space) is None for space in (0, 2, 5, 6))
