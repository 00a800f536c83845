"""Draws one clip: a performance of a motion program by a subject of some appearance, in front of a background."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from amd_fast.data.synth import background, damage
from amd_fast.data.synth.appearance import BUILDS, COLOURS, HAIR, SKIN, SPRITE_RADIUS, SPRITE_SIZE, Appearance, Build, draw_colour, sprite
from amd_fast.data.synth.programs import FIGURES, Program, figure_channels, shape_placement
from amd_fast.data.synth.skeleton import INDEX, joints, project

FPS = 25
FRAMES = (24, 40)
_SHIFT = 4  # fractional bits of OpenCV's coordinates
_CIRCLE = np.stack([(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 12, endpoint=False)])


@dataclass(frozen=True)
class ClipSpec:
    """Everything that decides the pixels of a clip."""

    program: Program
    look: Appearance
    seed: int
    size: int = 96
    damage: str = ""

    @property
    def frames(self) -> int:
        """Number of frames of the clip, known without drawing it."""
        drawn = self._drawn_frames(np.random.default_rng(self.seed))
        return damage.frames_left(drawn, self.damage, self.damage_rng())

    def _drawn_frames(self, rng: np.random.Generator) -> int:
        return int(rng.integers(FRAMES[0], FRAMES[1] + 1))

    def damage_rng(self) -> np.random.Generator:
        """Generator of the damage alone, so that a damaged clip shows the very performance that the clean one would show."""
        return np.random.default_rng([self.seed, 1])


def render_clip(spec: ClipSpec) -> np.ndarray:
    """Frames of a clip, uint8 RGB ``[T, size, size, 3]``; the same for the same spec, whichever process draws them."""
    rng = np.random.default_rng(spec.seed)
    count = spec._drawn_frames(rng)
    scene, light = background.scene(spec.size, spec.program.view, rng), background.lighting(spec.size, rng)
    shifts = background.camera(count, spec.size, rng)
    canvas = _backdrops(scene, shifts, spec.size)
    draw = _draw_figure if spec.program.is_figure else _draw_shape
    draw(canvas, spec, shifts, rng)
    if spec.program.backwards:
        canvas = canvas[::-1]
    frames = np.stack([cv2.multiply(frame, light, dtype=cv2.CV_8U) for frame in canvas])
    return damage.apply(frames, spec.damage, spec.damage_rng())


def _backdrops(scene: np.ndarray, shifts: np.ndarray, size: int) -> np.ndarray:
    margin = (scene.shape[0] - size) / 2
    frames = np.empty((len(shifts), size, size, 3), dtype=np.uint8)
    for index, (dx, dy) in enumerate(shifts):
        matrix = np.array([[1.0, 0.0, margin - dx], [0.0, 1.0, margin - dy]])
        cv2.warpAffine(
            scene, matrix, (size, size), dst=frames[index], flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REFLECT_101
        )
    return frames


def _fit(low: np.ndarray, high: np.ndarray, wanted: float, size: int, rng: np.random.Generator) -> tuple[float, np.ndarray]:
    """Scale and offset that bring the box low..high into the frame, at the wanted scale or as large as fits, somewhere at random."""
    room = 0.94 * size
    scale = min(wanted, float(room / np.max(high - low)))
    free = np.maximum(0.0, size - scale * (high - low))
    return scale, free * rng.uniform(0.1, 0.9, 2) - scale * low


def _draw_shape(canvas: np.ndarray, spec: ClipSpec, shifts: np.ndarray, rng: np.random.Generator) -> None:
    size, count = spec.size, len(canvas)
    picture = sprite(spec.look, rng)
    place = shape_placement(spec.program.action, count, rng)
    radius = size * rng.uniform(0.13, 0.20)
    reach = radius * np.maximum(np.abs(place.scale_x), np.abs(place.scale_y)) / size
    low = np.array([(place.x - reach).min(), (place.y - reach).min()])
    high = np.array([(place.x + reach).max(), (place.y + reach).max()])
    scale, offset = _fit(low, high, float(size), size, rng)
    tilt = rng.uniform(-0.3, 0.3)
    middle = (SPRITE_SIZE - 1) / 2
    for index in range(count):
        for piece in range(len(place.x)):
            angle = place.angle[piece, index] + tilt
            zoom = radius / size * scale / SPRITE_RADIUS
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            linear = turn * (zoom * np.array([place.scale_x[piece, index], place.scale_y[piece, index]]))
            centre = np.array([place.x[piece, index], place.y[piece, index]]) * scale + offset + shifts[index]
            _paste(canvas[index], picture, np.column_stack((linear, centre - linear @ np.array([middle, middle]))))


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


@dataclass(frozen=True)
class _Part:
    """A limb: a hull around circles at some joints."""

    joints: tuple[int, ...]
    radii: tuple[float, ...]
    colour: np.ndarray


def _parts(look: Appearance, build: Build, rng: np.random.Generator) -> list[_Part]:
    top, bottom = (draw_colour(COLOURS[name], rng) for name in (look.colour, look.second))
    skin = draw_colour(SKIN[int(rng.integers(len(SKIN)))], rng)
    shoe = draw_colour(COLOURS["black"], rng)
    w = build.width
    sleeve, leg = (top if build.sleeves else skin), (skin if build.skirt else bottom)
    parts = []
    for side in "lr":
        hip, knee, ankle, toe, shoulder, elbow, hand = (
            INDEX[f"{name}_{side}"] for name in ("hip", "knee", "ankle", "toe", "shoulder", "elbow", "hand")
        )
        parts += [
            _Part((hip, knee), (0.062 * w, 0.048 * w), leg),
            _Part((knee, ankle), (0.046 * w, 0.034 * w), leg),
            _Part((ankle, toe), (0.034, 0.026), shoe),
            _Part((shoulder, elbow), (0.046 * w, 0.036 * w), sleeve),
            _Part((elbow, hand), (0.034 * w, 0.032 * w), skin),
        ]
    if build.skirt:
        parts.append(_Part(tuple(INDEX[f"{name}_{side}"] for name in ("hip", "knee") for side in "lr"), (0.07, 0.07, 0.08, 0.08), top))
    return parts + [_Part((INDEX["head"],), (0.075 * build.head,), skin)]


def _torso(points: np.ndarray, look: Appearance, build: Build, top: np.ndarray, second: np.ndarray) -> list[tuple[np.ndarray, float, np.ndarray]]:
    """Slices of the torso as (corner points ``[T, corners, 3]``, radius, colour), which carry the pattern of the clothes."""
    hip_l, hip_r, shoulder_l, shoulder_r = (points[:, INDEX[name]] for name in ("hip_l", "hip_r", "shoulder_l", "shoulder_r"))

    def slice_(low: float, high: float, left: float = 0.0, right: float = 1.0) -> np.ndarray:
        rows = [(hip_l + share * (shoulder_l - hip_l), hip_r + share * (shoulder_r - hip_r)) for share in (low, high)]
        return np.stack([a + across * (b - a) for a, b in rows for across in (left, right)], axis=1)

    radius = 0.062 * build.width
    if look.texture == "hoops":
        bounds = np.linspace(0, 1, 5)
        return [(slice_(bounds[i], bounds[i + 1]), radius * (0.98 + 0.01 * i), (second, top)[i % 2]) for i in range(4)]
    if look.texture == "halves":
        return [(slice_(0, 1, 0, 0.5), radius, top), (slice_(0, 1, 0.5, 1), radius, second)]
    if look.texture == "belted":
        return [(slice_(0, 1), radius, top), (slice_(0.02, 0.16), radius * 1.05, second)]
    return [(slice_(0, 1), radius, top)]


def _draw_figure(canvas: np.ndarray, spec: ClipSpec, shifts: np.ndarray, rng: np.random.Generator) -> None:
    motion, above = FIGURES[spec.program.action], spec.program.view == "above"
    build = BUILDS[spec.look.silhouette]
    channels = figure_channels(motion, len(canvas), FPS, above, rng)
    points = joints(channels, pinned_feet=bool(motion.keys) and not motion.path and not motion.prop == "bed")
    elevation = rng.uniform(1.2, 1.55) if above else rng.uniform(0.05, 0.4)
    pieces, colours = _solids(points, spec.look, build, rng)
    screen, near = zip(*(project(piece, elevation) for piece, _ in pieces))
    everything = np.concatenate([place.reshape(-1, 2) for place in screen])
    low, high = everything.min(axis=0) - 0.08, everything.max(axis=0) + 0.08
    wanted = spec.size * (rng.uniform(0.8, 1.15) if above else rng.uniform(0.6, 0.85))
    scale, offset = _fit(low, high, wanted, spec.size, rng)
    _draw_prop(canvas, motion.prop, points, elevation, scale, offset, shifts, rng)
    outlines, depths = [], []
    for (_, radii), place, nearness in zip(pieces, screen, near):
        size = scale * np.asarray(radii) * 3.2 / (3.2 - nearness)  # [T, corners]
        circles = (place * scale + offset + shifts[:, None])[:, :, None] + size[:, :, None, None] * _CIRCLE
        outlines.append(np.rint(circles * (1 << _SHIFT)).astype(np.int32).reshape(len(canvas), -1, 2))
        depths.append(nearness.mean(axis=1))
    depth = np.stack(depths)  # [parts, T]
    shade = np.clip(1.0 + 0.9 * (depth - depth.mean(axis=0)), 0.72, 1.15)
    for index, frame in enumerate(canvas):
        for part in np.argsort(depth[:, index], kind="stable"):
            hull = cv2.convexHull(outlines[part][index])
            cv2.fillConvexPoly(frame, hull, (np.clip(colours[part] * shade[part, index], 0, 255)).tolist(), cv2.LINE_AA, _SHIFT)


def _solids(
    points: np.ndarray, look: Appearance, build: Build, rng: np.random.Generator
) -> tuple[list[tuple[np.ndarray, tuple[float, ...]]], list[np.ndarray]]:
    """All parts of a figure as (circle centres ``[T, circles, 3]``, radii) and their colours."""
    parts = _parts(look, build, rng)
    pieces = [(points[:, list(part.joints)], part.radii) for part in parts]
    colours = [part.colour for part in parts]
    top, second = (draw_colour(COLOURS[name], rng) for name in (look.colour, look.second))
    for corners, radius, colour in _torso(points, look, build, top, second):
        pieces.append((corners, (radius,) * corners.shape[1]))
        colours.append(colour)
    head, chest = points[:, INDEX["head"]], points[:, INDEX["chest"]]
    up = (head - chest) / np.linalg.norm(head - chest, axis=-1, keepdims=True)
    left = points[:, INDEX["shoulder_l"]] - points[:, INDEX["shoulder_r"]]
    ahead = np.cross(left / np.linalg.norm(left, axis=-1, keepdims=True), up)
    pieces.append(((head + 0.025 * up - 0.025 * ahead)[:, None], (0.075 * build.head,)))
    colours.append(draw_colour(HAIR[int(rng.integers(len(HAIR)))], rng))
    if build.hat:
        rim = head + 0.055 * up
        pieces.append((np.stack((rim - 0.1 * ahead, rim + 0.1 * ahead, rim + 0.06 * up), axis=1), (0.035, 0.035, 0.05)))
        colours.append(second)
    return pieces, colours


def _draw_prop(
    canvas: np.ndarray,
    prop: str,
    points: np.ndarray,
    elevation: float,
    scale: float,
    offset: np.ndarray,
    shifts: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """A chair where the figure sits, a mat where it lies; in three of four clips, so that the action does not depend on it."""
    if not prop or rng.random() < 0.25:
        return
    tone = rng.uniform(40, 220) * (1 + 0.25 * rng.uniform(-1, 1, 3))
    end = points[-1]
    pelvis = end[INDEX["pelvis"]]
    if prop == "chair":
        half, height, along, across = 0.15, max(0.05, float(pelvis[2]) - 0.07), np.array([1.0, 0, 0]), np.array([0, 1.0, 0])
        length = half
    else:
        along = end[INDEX["head"]] - end[INDEX["pelvis"]]
        along = np.array([along[0], along[1], 0.0]) / max(1e-6, float(np.hypot(along[0], along[1])))
        across, half, length, height = np.array([-along[1], along[0], 0.0]), 0.27, 0.68, 0.0
    floor = np.array([pelvis[0], pelvis[1], 0.0])
    flat = np.array([floor + length * i * along + half * j * across for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
    for level, gain in ((0.0, 0.7), (height, 1.0)) if height else ((0.0, 1.0),):
        box = np.concatenate((flat, flat + np.array([0, 0, height]))) if level == 0.0 else flat + np.array([0, 0, level])
        screen, _ = project(box, elevation)
        for index, frame in enumerate(canvas):
            corners = np.rint((screen * scale + offset + shifts[index]) * (1 << _SHIFT)).astype(np.int32)
            cv2.fillConvexPoly(frame, cv2.convexHull(corners), np.clip(tone * gain, 0, 255).tolist(), cv2.LINE_AA, _SHIFT)
