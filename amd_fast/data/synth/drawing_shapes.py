"""Draws moving shapes."""

from __future__ import annotations

import cv2
import numpy as np

from amd_fast.data.synth.appearance import SPRITE_RADIUS, SPRITE_SIZE, Appearance, sprite
from amd_fast.data.synth.framing import fit
from amd_fast.data.synth.shapes import shape_placement


def draw_shape(canvas: np.ndarray, action: str, look: Appearance, shifts: np.ndarray, rng: np.random.Generator) -> None:
    """Draws one performance into the frames ``canvas``, uint8 RGB ``[T, size, size, 3]``, in place; ``shifts`` is the camera's path."""
    count, size = canvas.shape[:2]
    picture, place = sprite(look, rng), shape_placement(action, count, rng)
    travel = max(np.ptp(place.x), np.ptp(place.y))
    radius = rng.uniform(0.15, 0.21) if travel > 0.25 else rng.uniform(0.22, 0.30)  # what stays in place may be larger
    reach = radius * np.maximum(np.abs(place.scale_x), np.abs(place.scale_y))
    low = np.array([(place.x - reach).min(), (place.y - reach).min()])
    high = np.array([(place.x + reach).max(), (place.y + reach).max()])
    scale, offset = fit(low, high, float(size), size, rng)
    angles = place.angle + rng.uniform(-0.3, 0.3)
    zoom = radius * scale / SPRITE_RADIUS
    middle = np.full(2, (SPRITE_SIZE - 1) / 2)
    for index in range(count):
        for piece in range(len(place.x)):
            cos, sin = np.cos(angles[piece, index]), np.sin(angles[piece, index])
            stretch = zoom * np.array([place.scale_x[piece, index], place.scale_y[piece, index]])
            linear = np.array([[cos, -sin], [sin, cos]]) * stretch
            centre = np.array([place.x[piece, index], place.y[piece, index]]) * scale + offset + shifts[index]
            _paste(canvas[index], picture, np.column_stack((linear, centre - linear @ middle)))


def _paste(frame: np.ndarray, picture: np.ndarray, matrix: np.ndarray) -> None:
    """Blends a premultiplied picture into the frame under an affine map, touching only the box it covers."""
    corners = matrix[:, :2] @ np.array([[0, SPRITE_SIZE, SPRITE_SIZE, 0], [0, 0, SPRITE_SIZE, SPRITE_SIZE]]) + matrix[:, 2:]
    left, top = np.clip(np.floor(corners.min(axis=1)).astype(int) - 1, 0, frame.shape[0])
    right, bottom = np.clip(np.ceil(corners.max(axis=1)).astype(int) + 1, 0, frame.shape[0])
    if right <= left or bottom <= top:
        return
    local = matrix - np.array([[0, 0, left], [0, 0, top]])
    warped = cv2.warpAffine(picture, local, (int(right - left), int(bottom - top)), flags=cv2.INTER_LINEAR)
    box = frame[top:bottom, left:right]
    box[:] = np.rint(box * (1.0 - warped[..., 3:]) + warped[..., :3])
