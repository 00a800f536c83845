"""Sensor damage, applied to the frames of a clip before they are encoded.

Damage of ``rgb`` spoils single frames and leaves most of the motion between them; damage of ``flow`` spoils the motion between frames
and leaves single frames as they were.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from amd_fast.errors import ConfigError

Frames = np.ndarray  # uint8 [T, height, width, 3]
_LUMA = np.array([0.299, 0.587, 0.114])


def _dark(frames: Frames, rng: np.random.Generator) -> Frames:
    gain, tint = rng.uniform(0.13, 0.24), 1 + rng.uniform(-0.15, 0.15, 3)
    return _rounded(frames * (gain * tint) + rng.normal(0.0, 1.2, frames.shape))


def _blurred(frames: Frames, rng: np.random.Generator) -> Frames:
    sigma = frames.shape[1] * rng.uniform(0.035, 0.055)
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in frames])


def _noisy(frames: Frames, rng: np.random.Generator) -> Frames:
    """Blotches of colour, new in every frame; little of them reaches the grey values that optical flow is computed from."""
    count, size = frames.shape[:2]
    cells = size // max(2, size // 24) + 1
    blotches = rng.normal(0.0, rng.uniform(60, 85), (count, cells, cells, 3)).astype(np.float32)
    noise = np.stack([cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR) for coarse in blotches])
    coloured = np.clip(frames + noise, 0, 255)
    grey_error = ((coloured - frames) * _LUMA).sum(axis=-1) + rng.normal(0.0, 4.0, frames.shape[:3])
    return _rounded(coloured - grey_error[..., None])


def _inverted(frames: Frames, rng: np.random.Generator) -> Frames:
    return 255 - frames


def _occluded(frames: Frames, rng: np.random.Generator) -> Frames:
    """Dirt on the lens: smears of colour that stay where they are.

    Their edges are soft, they are about as bright as the picture, and a little shines through: optical flow, which looks at grey
    values, still finds most of the motion behind them.
    """
    size = frames.shape[1]
    axis = np.arange(size, dtype=np.float32)
    result, brightness = frames.astype(np.float32), float((frames.mean(axis=(0, 1, 2)) * _LUMA).sum())
    for _ in range(int(rng.integers(6, 10))):
        x, y = rng.uniform(0.1, 0.9, 2) * size
        width, height = rng.uniform(0.07, 0.15, 2) * size
        bump = np.exp(-0.5 * (((axis - x) / width) ** 2 + ((axis[:, None] - y) / height) ** 2))
        cover = (rng.uniform(0.75, 0.9) * np.minimum(1.0, 1.6 * bump))[..., None]
        colour = rng.uniform(0, 255, 3)
        colour = np.clip(colour + rng.uniform(0.8, 1.2) * brightness - (colour * _LUMA).sum(), 0, 255)
        result += cover * (colour.astype(np.float32) - result)
    return _rounded(result)


def _shake(frames: Frames, rng: np.random.Generator) -> Frames:
    count, size = frames.shape[:2]
    shifts = rng.normal(0.0, 0.05 * size, (count, 2))
    turns = np.asarray(rng.normal(0.0, 4.0, count))
    shaken = np.empty_like(frames)
    for index, frame in enumerate(frames):
        matrix = cv2.getRotationMatrix2D((size / 2, size / 2), float(turns[index]), 1.0)
        matrix[:, 2] += shifts[index]
        shaken[index] = cv2.warpAffine(frame, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return shaken


def _frozen(frames: Frames, rng: np.random.Generator) -> Frames:
    """The picture stands still, jumps, and stands still again: most successive frames are the same."""
    source, position = np.zeros(len(frames), dtype=int), 0
    while position < len(frames):
        hold = int(rng.integers(7, 13))
        source[position : position + hold] = min(position + hold // 2, len(frames) - 1)
        position += hold
    return frames[source]


def _dropped(frames: Frames, rng: np.random.Generator) -> Frames:
    """Only six to eight frames arrive, at irregular intervals."""
    keep = frames_left(len(frames), "dropped", rng)
    inner = rng.choice(np.arange(1, len(frames) - 1), size=keep - 2, replace=False)
    return frames[np.sort(np.concatenate(([0], inner, [len(frames) - 1])))]


def frames_left(count: int, kind: str, rng: np.random.Generator) -> int:
    """Frames of a clip of ``count`` frames after damage by ``kind``; ``rng`` as it would be given to ``apply``."""
    return min(count, int(rng.integers(6, 9))) if kind == "dropped" else count


def _rounded(values: np.ndarray) -> Frames:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


KINDS: dict[str, dict[str, Callable[[Frames, np.random.Generator], Frames]]] = {
    "rgb": {"dark": _dark, "blurred": _blurred, "noisy": _noisy, "inverted": _inverted, "occluded": _occluded},
    "flow": {"shake": _shake, "frozen": _frozen, "dropped": _dropped},
}
MODALITY = {kind: modality for modality, kinds in KINDS.items() for kind in kinds}


def apply(frames: Frames, kind: str, rng: np.random.Generator) -> Frames:
    """Damages a clip; returns uint8 ``[T', height, width, 3]`` (``T' < T`` where frames are dropped).

    Args:
        frames: uint8 ``[T, height, width, 3]``, square.
        kind: a name from ``MODALITY``, or empty for none.

    Raises:
        ConfigError: the kind is unknown.
    """
    if not kind:
        return frames
    if kind not in MODALITY:
        raise ConfigError(f"Unknown sensor damage {kind!r}. Known kinds: {', '.join(sorted(MODALITY))}.")
    return KINDS[MODALITY[kind]][kind](frames, rng)
