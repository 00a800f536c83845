"""A jointed figure: forward kinematics of 17 joints from a few joint angles, for all frames of a clip at once.

World axes: x right, y away from a camera that looks side-on, z up. Lengths are in body heights, angles in radians.
Body axes: x forward, y left, z up (towards the head).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

LIMB_JOINTS = ("hip", "knee", "ankle", "toe", "shoulder", "elbow", "hand")
JOINTS = ("pelvis", "chest", "head", *(f"{joint}_{side}" for side in "lr" for joint in LIMB_JOINTS))
INDEX = {name: position for position, name in enumerate(JOINTS)}

# Joint angles and displacements that a motion may set; anything it leaves out is 0.
LIMB_CHANNELS = ("hip", "spread", "knee", "arm", "out", "elbow", "fore")
BODY_CHANNELS = ("yaw", "pitch", "roll", "twist", "bend", "sway", "nod", "x", "y", "lift")
CHANNELS = (*BODY_CHANNELS, *(f"{channel}_{side}" for side in "lr" for channel in LIMB_CHANNELS))

THIGH, SHANK, FOOT, TORSO, NECK, UPPER_ARM, FOREARM = 0.25, 0.25, 0.07, 0.29, 0.13, 0.17, 0.16
HIP_HALF, SHOULDER_HALF, SOLE = 0.055, 0.115, 0.03


def _rotation(axis: int, angle: np.ndarray) -> np.ndarray:
    """Rotation matrices ``[T, 3, 3]`` about one axis, right-handed."""
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.zeros((len(angle), 3, 3))
    matrix[:, axis, axis] = 1.0
    matrix[:, first, first] = matrix[:, second, second] = cos
    matrix[:, first, second], matrix[:, second, first] = -sin, sin
    return matrix


def _limb(flexion: np.ndarray, outward: np.ndarray, side: float) -> np.ndarray:
    """Directions ``[T, 3]`` of a limb that hangs down at 0, swings forward by ``flexion`` and sideways by ``outward``."""
    return np.stack((np.sin(flexion) * np.cos(outward), side * np.sin(outward), -np.cos(flexion) * np.cos(outward)), axis=-1)


def joints(channels: Mapping[str, np.ndarray], *, pinned_feet: bool) -> np.ndarray:
    """World positions ``[T, 17, 3]`` float64 of the joints named in ``JOINTS``.

    Args:
        channels: arrays ``[T]`` for names of ``CHANNELS``; ``x`` and ``y`` displace the figure, ``lift`` raises it off the floor.
        pinned_feet: keep the middle of the feet in place (falling, sitting down); otherwise the pelvis is kept (walking).

    The lowest joint always rests on the floor (plus ``lift``), so a pose needs no height of its own.
    """
    frames = len(next(iter(channels.values())))
    zero = np.zeros(frames)
    get = {name: np.asarray(channels.get(name, zero), dtype=np.float64) for name in CHANNELS}
    pelvis = _rotation(2, get["yaw"]) @ _rotation(1, get["pitch"]) @ _rotation(0, get["roll"]) @ _rotation(2, get["twist"])
    torso = pelvis @ _rotation(1, get["bend"]) @ _rotation(0, get["sway"])

    positions = np.zeros((frames, len(JOINTS), 3))
    positions[:, INDEX["chest"]] = TORSO * torso[:, :, 2]
    positions[:, INDEX["head"]] = positions[:, INDEX["chest"]] + NECK * (torso @ _rotation(1, get["nod"]))[:, :, 2]
    for name, side in (("l", 1.0), ("r", -1.0)):
        hip = side * HIP_HALF * pelvis[:, :, 1]
        flexion, bent, spread = get[f"hip_{name}"], get[f"hip_{name}"] - get[f"knee_{name}"], get[f"spread_{name}"]
        knee = hip + THIGH * _apply(pelvis, _limb(flexion, spread, side))
        ankle = knee + SHANK * _apply(pelvis, _limb(bent, spread, side))
        toe = ankle + FOOT * _apply(pelvis, _limb(bent + np.pi / 2, zero, side))
        shoulder = positions[:, INDEX["chest"]] + side * SHOULDER_HALF * torso[:, :, 1] - 0.03 * torso[:, :, 2]
        raised, outward = get[f"arm_{name}"], get[f"out_{name}"] + 0.12
        elbow = shoulder + UPPER_ARM * _apply(torso, _limb(raised, outward, side))
        hand = elbow + FOREARM * _apply(torso, _limb(raised + get[f"elbow_{name}"], outward + get[f"fore_{name}"], side))
        for joint, place in zip(LIMB_JOINTS, (hip, knee, ankle, toe, shoulder, elbow, hand), strict=True):
            positions[:, INDEX[f"{joint}_{name}"]] = place

    if pinned_feet:
        feet = 0.5 * (positions[:, INDEX["ankle_l"], :2] + positions[:, INDEX["ankle_r"], :2])
        positions[:, :, :2] -= feet[:, None]
    positions[:, :, 2] -= positions[:, :, 2].min(axis=1, keepdims=True) - SOLE - get["lift"][:, None]
    positions[:, :, 0] += get["x"][:, None]
    positions[:, :, 1] += get["y"][:, None]
    return positions


def _apply(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return np.einsum("tij,tj->ti", matrix, vector)


def project(points: np.ndarray, elevation: float, distance: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Perspective view of world points ``[..., 3]``.

    Args:
        points: world positions.
        elevation: of the camera, in radians: 0 side-on, pi/2 from above.
        distance: of the camera from the middle of a standing body, in body heights.

    Returns:
        screen positions ``[..., 2]`` (x right, y down, in body heights at the middle of a standing body), nearness to the camera
        ``[...]``, and magnification ``[...]``.
    """
    height = points[..., 2] - 0.45  # the camera turns about the middle of a standing body
    up = height * np.cos(elevation) + points[..., 1] * np.sin(elevation)
    near = height * np.sin(elevation) - points[..., 1] * np.cos(elevation)
    # Whoever walks up to the camera does not reach it: nearness levels off.
    zoom = distance / (distance - np.minimum(near, 0.6 * distance))
    return np.stack((points[..., 0] * zoom, -up * zoom), axis=-1), near, zoom
