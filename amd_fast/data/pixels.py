"""Sizes of decoded pictures, the same for every reader of clips."""

from __future__ import annotations

import cv2
import numpy as np


def resize(image: np.ndarray, size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
    """A picture ``[H, W]`` or ``[H, W, channels]`` resized to ``size`` (width, height).

    Averages over the area a pixel covers (INTER_AREA) when the picture gets smaller, bilinear when it gets larger.

    Args:
        image: the picture.
        size: width and height of the result, pixels.
        out: contiguous array of the result's shape and dtype to write into; without it the result may be the picture itself.
    """
    height, width = image.shape[:2]
    if (width, height) != size:
        return cv2.resize(image, size, dst=out, interpolation=cv2.INTER_AREA if size[0] < width else cv2.INTER_LINEAR)
    if out is None:
        return image
    out[...] = image
    return out


def scaled_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """Width and height in pixels with the shorter side at ``short_side`` and proportions kept; as they are for None."""
    if short_side is None:
        return width, height
    shorter = min(width, height)
    return max(1, round(width * short_side / shorter)), max(1, round(height * short_side / shorter))
