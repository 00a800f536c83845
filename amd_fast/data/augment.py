"""Photometric and speed augmentation of training clips: one draw for a whole clip."""

from __future__ import annotations

import math

import numpy as np

_GREY_SHARE = 0.2  # of the clips lose their colours where colours are jittered at all


def jitter_colour(frames: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Other contrast, brightness and colour balance, the same for all frames of a clip; sometimes no colour at all.

    Args:
        frames: normalised float32 ``[T, 3, height, width]`` (ImageNet mean and standard deviation taken out).
        strength: s; contrast is multiplied by ``exp(U(-s, s))``, each channel's by ``exp(U(-s/2, s/2))``, and ``U(-s, s)`` standard
            deviations are added.
        rng: source of randomness.

    Returns:
        A new array of the same shape.
    """
    contrast, brightness, coin, *balance = rng.random(6)
    gain = np.exp(strength * (2 * contrast - 1) + strength / 2 * (2 * np.array(balance) - 1)).astype(np.float32)[:, None, None]
    mean = frames.mean((0, 2, 3), keepdims=True)[0]
    result = (frames - mean) * gain + (mean + np.float32(strength * (2 * brightness - 1)))
    if coin < _GREY_SHARE:
        result[:] = result.mean(1, keepdims=True)
    return result


def jitter_speed(flow: np.ndarray, most: float, rng: np.random.Generator) -> np.ndarray:
    """The flow of the same clip played faster or slower: multiplied by one factor, log-uniform in ``[1 / most, most]``."""
    return flow * np.float32(math.exp(math.log(most) * (2 * rng.random() - 1)))
