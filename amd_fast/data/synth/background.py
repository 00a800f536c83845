"""What is behind the action: floors, walls, furniture and light."""

from __future__ import annotations

import cv2
import numpy as np

MARGIN = 0.15  # of the frame, on every side: room for the camera to drift


def _noise(side: int, cell: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise ``[side, side]`` float32 in [-1, 1] whose blobs are about ``cell`` pixels wide."""
    coarse = rng.uniform(-1, 1, (max(2, side // cell + 2),) * 2).astype(np.float32)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def _tone(rng: np.random.Generator) -> np.ndarray:
    """A colour, RGB float32 ``[3]``; mostly muted, so that the subject's colours stand out."""
    tint = 0.3 if rng.random() < 0.15 else 0.12
    return (rng.uniform(60, 190) * (1 + tint * rng.uniform(-1, 1, 3))).astype(np.float32)


def _planks(side: int, rng: np.random.Generator) -> np.ndarray:
    wood = np.array([142, 112, 84], dtype=np.float32) * rng.uniform(0.6, 1.3)
    width = int(rng.integers(side // 16, side // 7))
    shade = rng.uniform(0.86, 1.1, side // width + 2).astype(np.float32)
    rows = np.arange(side)
    base = shade[rows // width][:, None] * np.ones((1, side), np.float32)
    base[rows % width == 0] *= 0.75
    grain = cv2.resize(rng.uniform(-1, 1, (side, max(2, side // 14))).astype(np.float32), (side, side))
    picture = wood * (base * (1 + 0.07 * grain))[..., None]
    return np.ascontiguousarray(picture.transpose(1, 0, 2)) if rng.random() < 0.5 else picture


def _tiles(side: int, rng: np.random.Generator) -> np.ndarray:
    step = int(rng.integers(side // 10, side // 5))
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    checks = ((rows // step + columns // step) % 2).astype(np.float32)
    picture = _tone(rng) * (1 + rng.uniform(0.0, 0.25) * (checks - 0.5))[..., None]
    picture[(rows % step == 0) | (columns % step == 0)] *= rng.uniform(0.75, 1.2)
    return picture


def _carpet(side: int, rng: np.random.Generator) -> np.ndarray:
    coarse, fine = _noise(side, int(rng.integers(side // 6, side // 3)), rng), _noise(side, 3, rng)
    return _tone(rng) * (1 + 0.2 * coarse + 0.1 * fine)[..., None]


def _blobs(side: int, rng: np.random.Generator) -> np.ndarray:
    share = _noise(side, int(rng.integers(side // 9, side // 4)), rng)[..., None] * 0.5 + 0.5
    return (_tone(rng) * share + _tone(rng) * (1 - share)) * (1 + 0.06 * _noise(side, 3, rng)[..., None])


def _room(side: int, rng: np.random.Generator) -> np.ndarray:
    """Wall and floor with a few pieces of furniture along the wall."""
    picture = _tone(rng) * (1 + 0.06 * _noise(side, side // 4, rng) + 0.04 * _noise(side, 4, rng))[..., None]
    floor = int(side * rng.uniform(0.55, 0.75))
    picture[floor:] = (_planks(side, rng) if rng.random() < 0.5 else _carpet(side, rng))[floor:]
    picture[floor : floor + max(1, side // 60)] *= 0.7
    for _ in range(int(rng.integers(1, 4))):
        width, height = (int(side * rng.uniform(0.1, 0.3)) for _ in range(2))
        left, bottom = int(rng.uniform(0, side - width)), floor + int(side * rng.uniform(-0.25, 0.06))
        _box(picture, left, max(0, bottom - height), width, height, rng)
    return picture


def _ward(side: int, rng: np.random.Generator) -> np.ndarray:
    """A floor seen from above with a bed or a rug and smaller things on it."""
    picture = _planks(side, rng) if rng.random() < 0.6 else _tiles(side, rng)
    for low, high in ((0.25, 0.5), (0.08, 0.16), (0.06, 0.14))[: int(rng.integers(1, 4))]:
        width, height = (int(side * rng.uniform(low, high)) for _ in range(2))
        _box(picture, int(rng.uniform(0, side - width)), int(rng.uniform(0, side - height)), width, height, rng)
    return picture


def _box(picture: np.ndarray, left: int, top: int, width: int, height: int, rng: np.random.Generator) -> None:
    tone = _tone(rng) * rng.uniform(0.6, 1.35)
    part = picture[top : top + height, left : left + width]
    part[:] = tone * (1 + 0.05 * rng.uniform(-1, 1, part.shape[:2]).astype(np.float32))[..., None]
    part[-max(1, height // 12) :] *= 0.75


SIDE_SCENES = (_room, _room, _carpet, _blobs, _planks)
ABOVE_SCENES = (_ward, _ward, _planks, _tiles, _carpet)
ANY_SCENES = (_room, _ward, _carpet, _blobs, _tiles, _planks)


def scene(size: int, view: str, rng: np.random.Generator) -> np.ndarray:
    """A background picture, uint8 RGB, larger than the frame by ``MARGIN`` on each side."""
    side = round(size * (1 + 2 * MARGIN))
    makers = {"side": SIDE_SCENES, "above": ABOVE_SCENES}.get(view, ANY_SCENES)
    picture = makers[int(rng.integers(len(makers)))](side, rng)
    # Kept softer than the subject, so that it stands out in most clips.
    mean = picture.mean(axis=(0, 1))
    return np.clip(mean + rng.uniform(0.6, 1.0) * (picture - mean), 0, 255).astype(np.uint8)


def lighting(size: int, rng: np.random.Generator) -> np.ndarray:
    """Gain per pixel and channel, float32 ``[size, size, 3]``: brightness, colour temperature, and light falling off to one side."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.2)
    gain = rng.uniform(0.75, 1.15) * (1 + slope * (x * np.cos(angle) + y * np.sin(angle)) - rng.uniform(0, 0.12) * (x * x + y * y))
    warmth = rng.uniform(-0.07, 0.07)
    return (gain[..., None] * np.array([1 + warmth, 1.0, 1 - warmth])).astype(np.float32)


def backdrops(scene: np.ndarray, shifts: np.ndarray, size: int) -> np.ndarray:
    """The part of a scene that a camera on the path ``shifts`` sees: uint8 RGB ``[T, size, size, 3]``."""
    margin = (scene.shape[0] - size) / 2
    frames = np.empty((len(shifts), size, size, 3), dtype=np.uint8)
    for frame, (dx, dy) in zip(frames, shifts, strict=True):
        matrix = np.array([[1.0, 0.0, margin - dx], [0.0, 1.0, margin - dy]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        cv2.warpAffine(scene, matrix, (size, size), dst=frame, flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    return frames
