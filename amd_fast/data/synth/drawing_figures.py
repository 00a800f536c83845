"""Draws jointed figures: hulls around circles at the joints, far parts first, so that any view of any pose works."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from amd_fast.data.synth.appearance import BUILDS, COLOURS, HAIR, SKIN, Appearance, draw_colour
from amd_fast.data.synth.figures import FIGURES, figure_channels
from amd_fast.data.synth.framing import fit
from amd_fast.data.synth.skeleton import INDEX, joints, project

_FRACTION_BITS = 4  # of the coordinates handed to OpenCV
_CIRCLE = np.stack([(np.cos(angle), np.sin(angle)) for angle in np.linspace(0, 2 * np.pi, 12, endpoint=False)])


@dataclass(frozen=True)
class _Solid:
    """The hull of some spheres: centres ``[T, spheres, 3]``, radii in body heights, RGB colour."""

    centres: np.ndarray
    radii: tuple[float, ...]
    colour: np.ndarray


@dataclass(frozen=True)
class _View:
    """From the figure's world to pixels; ``shifts`` ``[T, 2]`` is the camera's path."""

    elevation: float
    distance: float
    scale: float
    offset: np.ndarray
    shifts: np.ndarray

    def outline(self, solid: _Solid) -> tuple[np.ndarray, np.ndarray]:
        """Points ``[T, n, 2]`` int32 whose hull is the solid's picture, and its nearness ``[T]``."""
        screen, near, zoom = project(solid.centres, self.elevation, self.distance)
        radius = self.scale * np.asarray(solid.radii) * zoom
        points = (screen * self.scale + self.offset + self.shifts[:, None])[:, :, None] + radius[:, :, None, None] * _CIRCLE
        return _fixed(points).reshape(len(points), -1, 2), near.mean(axis=1)


def draw_figure(
    canvas: np.ndarray, action: str, view: str, look: Appearance, fps: float, shifts: np.ndarray, rng: np.random.Generator
) -> None:
    """Draws one performance into the frames ``canvas``, uint8 RGB ``[T, size, size, 3]``, in place; ``shifts`` is the camera's path."""
    motion, above, (count, size) = FIGURES[action], view == "above", canvas.shape[:2]
    points = joints(figure_channels(motion, count, fps, above, rng), pinned_feet=motion.feet_stay)
    solids = _dressed(points, look, rng)
    elevation, distance = (rng.uniform(1.2, 1.56), rng.uniform(1.9, 2.8)) if above else (rng.uniform(0.05, 0.45), 3.2)
    screen = np.concatenate([project(solid.centres, elevation, distance)[0].reshape(-1, 2) for solid in solids])
    wanted = size * (rng.uniform(0.85, 1.25) if above else rng.uniform(0.7, 0.95))
    scale, offset = fit(screen.min(axis=0) - 0.08, screen.max(axis=0) + 0.08, wanted, size, rng)
    camera = _View(elevation, distance, scale, offset, shifts)
    if motion.prop and rng.random() < 0.75:  # the action must not depend on the furniture
        _draw_prop(canvas, motion.prop, points[-1], camera, rng)
    outlines, depths = zip(*(camera.outline(solid) for solid in solids), strict=True)
    depth = np.stack(depths)  # [solids, T]
    shade = np.clip(1.0 + 0.9 * (depth - depth.mean(axis=0)), 0.72, 1.15)
    for index, frame in enumerate(canvas):
        for number in np.argsort(depth[:, index], kind="stable"):
            _fill(frame, outlines[number][index], solids[number].colour * shade[number, index])


def _fixed(points: np.ndarray) -> np.ndarray:
    return np.rint(points * (1 << _FRACTION_BITS)).astype(np.int32)


def _fill(frame: np.ndarray, points: np.ndarray, colour: np.ndarray) -> None:
    cv2.fillConvexPoly(frame, cv2.convexHull(points), np.clip(colour, 0, 255).tolist(), cv2.LINE_AA, _FRACTION_BITS)


def _dressed(points: np.ndarray, look: Appearance, rng: np.random.Generator) -> list[_Solid]:
    """The parts of a figure with joints ``[T, 17, 3]``."""
    build, width = BUILDS[look.silhouette], BUILDS[look.silhouette].width
    top, second = (draw_colour(COLOURS[name], rng) for name in (look.colour, look.second))
    skin = draw_colour(SKIN[int(rng.integers(len(SKIN)))], rng)
    shoe, hair = draw_colour(COLOURS["black"], rng), draw_colour(HAIR[int(rng.integers(len(HAIR)))], rng)
    sleeve, leg = top if build.sleeves else skin, skin if build.skirt else second

    def hull(names: str, radii: tuple[float, ...], colour: np.ndarray) -> _Solid:
        return _Solid(points[:, [INDEX[name] for name in names.split()]], radii, colour)

    solids = [hull("head", (0.075 * build.head,), skin)]
    for side in "lr":
        solids += [
            hull(f"hip_{side} knee_{side}", (0.062 * width, 0.048 * width), leg),
            hull(f"knee_{side} ankle_{side}", (0.046 * width, 0.034 * width), leg),
            hull(f"ankle_{side} toe_{side}", (0.034, 0.026), shoe),
            hull(f"shoulder_{side} elbow_{side}", (0.046 * width, 0.036 * width), sleeve),
            hull(f"elbow_{side} hand_{side}", (0.034 * width, 0.032 * width), skin),
        ]
    if build.skirt:
        solids.append(hull("hip_l hip_r knee_l knee_r", (0.07, 0.07, 0.08, 0.08), top))
    return solids + _torso(points, look.texture, 0.062 * width, top, second) + _headwear(points, build.head, build.hat, hair, second)


def _torso(points: np.ndarray, texture: str, radius: float, top: np.ndarray, second: np.ndarray) -> list[_Solid]:
    """The torso, cut into the pieces that carry the pattern of the clothes."""
    hips, shoulders = ((points[:, INDEX[f"{name}_l"]], points[:, INDEX[f"{name}_r"]]) for name in ("hip", "shoulder"))

    def piece(low: float, high: float, colour: np.ndarray, left: float = 0.0, right: float = 1.0, swell: float = 1.0) -> _Solid:
        rows = [[hip + share * (shoulder - hip) for hip, shoulder in zip(hips, shoulders, strict=True)] for share in (low, high)]
        corners = np.stack([row[0] + across * (row[1] - row[0]) for row in rows for across in (left, right)], axis=1)
        return _Solid(corners, (radius * swell,) * 4, colour)

    if texture == "hoops":
        return [piece(0.25 * i, 0.25 * i + 0.25, (second, top)[i % 2], swell=0.97 + 0.01 * i) for i in range(4)]
    if texture == "halves":
        return [piece(0, 1, top, 0.0, 0.5), piece(0, 1, second, 0.5, 1.0)]
    if texture == "belted":
        return [piece(0, 1, top), piece(0.02, 0.16, second, swell=1.05)]
    return [piece(0, 1, top)]


def _headwear(points: np.ndarray, head_size: float, hat: bool, hair: np.ndarray, second: np.ndarray) -> list[_Solid]:
    """Hair at the back and on top of the head, so that front, back and top differ; a hat with a brim on it."""
    head, chest = points[:, INDEX["head"]], points[:, INDEX["chest"]]
    up = (head - chest) / np.linalg.norm(head - chest, axis=-1, keepdims=True)
    left = points[:, INDEX["shoulder_l"]] - points[:, INDEX["shoulder_r"]]
    ahead = np.cross(left / np.linalg.norm(left, axis=-1, keepdims=True), up)
    solids = [_Solid((head + 0.025 * up - 0.025 * ahead)[:, None], (0.075 * head_size,), hair)]
    if hat:
        brim = head + 0.055 * up
        solids.append(_Solid(np.stack((brim - 0.1 * ahead, brim + 0.1 * ahead, brim + 0.06 * up), axis=1), (0.035, 0.035, 0.05), second))
    return solids


def _draw_prop(canvas: np.ndarray, prop: str, pose: np.ndarray, camera: _View, rng: np.random.Generator) -> None:
    """A chair where the figure sits, or a mat where it lies, given the joints ``[17, 3]`` of its last pose."""
    tone = rng.uniform(40, 220) * (1 + 0.2 * rng.uniform(-1, 1, 3))
    pelvis = pose[INDEX["pelvis"]]
    if prop == "chair":
        along, length, width, height = np.array([1.0, 0.0, 0.0]), 0.15, 0.15, max(0.05, float(pelvis[2]) - 0.07)
    else:
        along, length, width, height = pose[INDEX["head"]] - pelvis, 0.68, 0.27, 0.0
    along = along * [1.0, 1.0, 0.0] / max(1e-6, float(np.hypot(along[0], along[1])))
    across = np.array([-along[1], along[0], 0.0])
    base = np.array([pelvis * [1, 1, 0] + length * i * along + width * j * across for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
    top = base + np.array([0.0, 0.0, height])
    for corners, gain in ((np.concatenate((base, top)), 0.7), (top, 1.0)):
        screen, _, _ = project(corners, camera.elevation, camera.distance)
        for frame, shift in zip(canvas, camera.shifts, strict=True):
            _fill(frame, _fixed(screen * camera.scale + camera.offset + shift), tone * gain)
