"""Where the camera looks: slow drift and tremor, and how large and where the subject is in the frame."""

from __future__ import annotations

import numpy as np


def camera(frames: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Shift of the picture in pixels, float64 ``[T, 2]``: a slow drift in about half of the clips, and a slight tremor."""
    speed = rng.uniform(0.0, 0.0025) * size if rng.random() < 0.5 else 0.0
    angle = rng.uniform(0, 2 * np.pi)
    path = (np.arange(frames) - (frames - 1) / 2)[:, None] * speed * np.array([np.cos(angle), np.sin(angle)])
    shift: np.ndarray = path + rng.normal(0.0, rng.uniform(0.0, 0.0015) * size, (frames, 2))
    return shift


def fit(low: np.ndarray, high: np.ndarray, wanted: float, size: int, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """Scale (pixels per unit) and offset (pixels ``[2]``) that bring all that the subject covers during a clip into the frame.

    Args:
        low: smallest x and y, in the subject's units.
        high: largest x and y.
        wanted: scale to use where it fits; otherwise the largest that does.
        size: side of the frame in pixels.
        rng: chooses the place, off the middle as far as there is room.
    """
    scale = min(wanted, float(0.94 * size / np.max(high - low)))
    free = size - scale * (high - low)
    return scale, free * rng.uniform(0.1, 0.9, 2) - scale * low
