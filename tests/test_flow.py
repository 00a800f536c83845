"""Optical flow on images whose motion is known."""

from __future__ import annotations

import threading

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amd_fast.data.flow import FlowPreset, dis_flow
from amd_fast.errors import DataError


def texture(height: int = 96, width: int = 128, seed: int = 0, channels: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).random((height, width, channels)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5).reshape(noise.shape)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    return (255 * smooth).astype(np.uint8).squeeze()


def moved(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """The picture with its content moved x pixels to the right and y pixels down."""
    matrix = np.array([[1, 0, x], [0, 1, y]], dtype=np.float64)
    return cv2.warpAffine(image, matrix, image.shape[1::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def inside(flow: np.ndarray) -> np.ndarray:
    return flow[16:-16, 16:-16].reshape(-1, 2)


@settings(max_examples=25, deadline=None)
@given(x=st.floats(-4, 4), y=st.floats(-4, 4), seed=st.integers(0, 100))
def test_shift_is_found_with_its_sign(x: float, y: float, seed: int) -> None:
    first = texture(seed=seed)
    flow = dis_flow(first, moved(first, x, y))
    assert flow.dtype == np.float32
    assert flow.shape == (96, 128, 2)
    np.testing.assert_allclose(np.median(inside(flow), axis=0), [x, y], atol=0.15)
    assert np.abs(inside(flow) - [x, y]).mean() < 0.35


@pytest.mark.parametrize("preset", ["ultrafast", "fast", "balanced", "medium"])
def test_presets_and_number_of_threads(preset) -> None:
    first = texture()
    second = moved(first, 2, -1)
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        alone = dis_flow(first, second, preset=preset)
        cv2.setNumThreads(4)
        together = dis_flow(first, second, preset=preset)
    finally:
        cv2.setNumThreads(threads)
    np.testing.assert_allclose(np.median(inside(alone), axis=0), [2, -1], atol=0.3)
    np.testing.assert_array_equal(alone, together)  # training must resume bit for bit on another machine


def test_result_does_not_depend_on_earlier_calls_or_threads() -> None:
    first = texture()
    second = moved(first, 1.5, 0.5)
    expected = dis_flow(first, second)
    dis_flow(texture(64, 80, seed=9), texture(64, 80, seed=8))
    np.testing.assert_array_equal(dis_flow(first, second), expected)
    results: list[np.ndarray] = []
    workers = [threading.Thread(target=lambda: results.append(dis_flow(first, second))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    assert all(np.array_equal(result, expected) for result in results)


@pytest.mark.parametrize("preset", ["ultrafast", "fast", "balanced", "medium"])
def test_result_does_not_depend_on_smaller_frames_before(preset: FlowPreset) -> None:
    pairs = []
    for side in (128, 73, 48, 37, 32, 24, 16):
        first = texture(side, side, seed=side)
        pairs.append((first, moved(first, 1.5, 0.5)))

    def alone(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        found: list[np.ndarray] = []
        thread = threading.Thread(target=lambda: found.append(dis_flow(*pair, preset=preset)))  # a new thread has a new solver
        thread.start()
        thread.join()
        return found[0]

    expected = [alone(pair) for pair in pairs]
    for order in (range(7), reversed(range(7)), (3, 3, 0, 6, 0, 5, 1)):
        for number in order:
            np.testing.assert_array_equal(dis_flow(*pairs[number], preset=preset), expected[number])


def test_mirrored_pictures_give_mirrored_flow() -> None:
    first = texture()
    second = moved(first, 2.5, -1.0)
    flow = dis_flow(first, second)
    mirrored = dis_flow(np.ascontiguousarray(first[:, ::-1]), second[:, ::-1])[:, ::-1] * [-1, 1]
    assert np.abs(inside(flow - mirrored)).mean() < 0.1


def test_still_picture_and_colours() -> None:
    colours = texture(channels=3)
    assert np.abs(dis_flow(colours, colours)).max() < 0.01
    flow = dis_flow(colours, moved(colours, 3, 0))
    np.testing.assert_allclose(np.median(inside(flow), axis=0), [3, 0], atol=0.15)
    constant = np.full((40, 40), 7, np.uint8)
    assert np.isfinite(dis_flow(constant, constant)).all()


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 300), (17, 33), (300, 16)])
def test_small_and_narrow_pictures(height: int, width: int) -> None:
    for preset in ("ultrafast", "fast", "balanced", "medium"):
        flow = dis_flow(texture(height, width), texture(height, width, seed=1), preset=preset)
        assert flow.shape == (height, width, 2)
        assert np.isfinite(flow).all()


def test_bad_frames() -> None:
    frame = np.zeros((32, 32), np.uint8)
    with pytest.raises(DataError, match="equal shape"):
        dis_flow(frame, np.zeros((32, 40), np.uint8))
    with pytest.raises(DataError, match="uint8"):
        dis_flow(frame.astype(np.float32), frame.astype(np.float32))
    with pytest.raises(DataError, match=r"\[h, w, 3\]"):
        dis_flow(frame[None], frame[None])
    with pytest.raises(DataError, match="at least 16"):
        dis_flow(frame[:8], frame[:8])
    with pytest.raises(DataError, match="preset"):
        dis_flow(frame, frame, preset="slow")  # type: ignore[arg-type]
