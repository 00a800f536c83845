"""Photometric and speed augmentation of training clips: drawn once for a whole clip, then applied by whichever decoder reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_GREY_SHARE = 0.2  # of the clips lose their colours where colours are jittered at all


@dataclass(frozen=True, slots=True)
class ColourChange:
    """One change of contrast, brightness and colour balance, for all frames of a clip.

    Attributes:
        gain: factor of each channel's distance from its mean over the clip, (red, green, blue).
        offset: added to every channel, in standard deviations.
        grey: whether the channels are then replaced by their mean.
    """

    gain: tuple[float, float, float]
    offset: float
    grey: bool


def draw_colour(strength: float, rng: np.random.Generator) -> ColourChange:
    """Draws a change of colours; takes six numbers from ``rng``.

    Args:
        strength: s; contrast is multiplied by ``exp(U(-s, s))``, each channel's by ``exp(U(-s/2, s/2))``, and ``U(-s, s)`` standard
            deviations are added.
        rng: source of randomness.
    """
    contrast, brightness, coin, *balance = rng.random(6).tolist()
    red, green, blue = (math.exp(strength * (2 * contrast - 1) + strength / 2 * (2 * share - 1)) for share in balance)
    return ColourChange((red, green, blue), strength * (2 * brightness - 1), coin < _GREY_SHARE)


def change_colour(frames: np.ndarray, change: ColourChange) -> np.ndarray:
    """Applies a change of colours.

    Args:
        frames: normalised float32 ``[T, 3, height, width]`` (ImageNet mean and standard deviation taken out).
        change: what to do to them.

    Returns:
        A new array of the same shape.
    """
    gain = np.array(change.gain, dtype=np.float32)[:, None, None]
    mean = frames.mean((0, 2, 3), keepdims=True)[0]
    result = (frames - mean) * gain + (mean + np.float32(change.offset))
    if change.grey:
        result[:] = result.mean(1, keepdims=True)
    return result


def draw_speed(most: float, rng: np.random.Generator) -> float:
    """Factor on the flow of a clip played faster or slower, log-uniform in ``[1 / most, most]``; takes one number from ``rng``."""
    return math.exp(math.log(most) * (2 * rng.random() - 1))
