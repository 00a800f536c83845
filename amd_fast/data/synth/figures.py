"""How figures move: by key poses (a one-off action such as sitting down), by cycles (walking, waving), or along a path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from amd_fast.data.synth.skeleton import CHANNELS
from amd_fast.data.synth.timing import action_progress

Pose = Mapping[str, float]


def _both(**angles: float) -> dict[str, float]:
    """A pose that is the same left and right: ``hip=1`` sets ``hip_l`` and ``hip_r``; names without sides pass through."""
    return {name: angle for key, angle in angles.items() for name in ([key] if key in CHANNELS else [f"{key}_l", f"{key}_r"])}


STAND = _both(elbow=0.25)
SIT = _both(hip=1.5, knee=1.5, bend=0.1, arm=0.45, elbow=0.6)
LEAN = _both(hip=0.9, knee=1.0, bend=0.65, arm=0.3, elbow=0.5)
CROUCH = _both(hip=1.9, knee=2.2, bend=0.5, pitch=0.1, arm=0.6, elbow=0.9)
STOOP = _both(bend=1.45, hip=0.1, knee=0.3, arm=1.2, elbow=0.0)
BUCKLE = _both(hip=0.7, knee=1.2, bend=0.3, arm=0.7, elbow=0.6)
PRONE = _both(pitch=1.5, arm=2.2, elbow=0.4, hip=0.0, knee=0.1, spread=0.15)
SUPINE = _both(pitch=-1.5, arm=0.2, out=0.5, hip=0.15, knee=0.3, spread=0.12)
ON_SIDE = _both(roll=1.5, hip=0.6, knee=0.8, arm=0.9, elbow=0.9)
SIT_FLOOR = _both(hip=1.5, knee=0.3, bend=-0.1, arm=-0.3, elbow=0.1)


@dataclass(frozen=True)
class Cycle:
    """Sinusoidal joint motion: channel = offset + amplitude * sin(2 pi (harmonic * phase + shift))."""

    offset: float
    amplitude: float
    shift: float = 0.0
    harmonic: int = 1


def _gait(stride: float, bend: float, swing: float) -> dict[str, Cycle]:
    return {
        "hip_l": Cycle(0.1, stride), "hip_r": Cycle(0.1, stride, 0.5),
        "knee_l": Cycle(bend, bend, 0.2), "knee_r": Cycle(bend, bend, 0.7),
        "arm_l": Cycle(0.0, swing, 0.5), "arm_r": Cycle(0.0, swing),
        "elbow_l": Cycle(0.3 + bend, 0.1), "elbow_r": Cycle(0.3 + bend, 0.1),
    }  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Motion of a jointed figure.

    Attributes:
        keys: ``(time, pose)`` with times rising from 0 to 1, joined smoothly; empty for a purely cyclic motion.
        cycles: joint angles that oscillate, added to the key poses.
        rate: cycles per second, lowest and highest.
        path: name of the route of the whole body: ``""``, ``across``, ``sideways``, ``circle``, ``towards``, ``turn``.
        stride: body heights per second along the path.
        facing: ``profile`` (left or right), ``front``, or ``path`` (where it is going).
        hop: height of jumps, body heights.
        prop: furniture that may stand there: ``""``, ``chair``, ``bed``.
    """

    keys: tuple[tuple[float, Pose], ...] = ()
    cycles: Mapping[str, Cycle] = field(default_factory=dict)
    rate: tuple[float, float] = (1.2, 2.2)
    path: str = ""
    stride: float = 0.0
    facing: str = "profile"
    hop: float = 0.0
    prop: str = ""

    @property
    def feet_stay(self) -> bool:
        """Whether the feet stay in place (falling, sitting down) rather than the hips (walking, waving, lying)."""
        return bool(self.keys) and not self.path and self.prop != "bed"


FIGURES: dict[str, Figure] = {
    "sit_down": Figure(((0.0, STAND), (0.5, LEAN), (1.0, SIT)), prop="chair"),
    "fall_forward": Figure(((0.0, STAND), (0.4, {**BUCKLE, "pitch": 0.5}), (0.8, PRONE), (1.0, PRONE))),
    "fall_back": Figure(((0.0, STAND), (0.45, {**BUCKLE, "pitch": -0.6, "bend": 0.6}), (0.85, SUPINE), (1.0, SUPINE))),
    "fall_side": Figure(((0.0, STAND), (0.4, {**BUCKLE, "roll": 0.5}), (0.8, ON_SIDE), (1.0, ON_SIDE)), facing="front"),
    "collapse": Figure(((0.0, STAND), (0.5, CROUCH), (0.75, {**CROUCH, "roll": 0.9}), (1.0, ON_SIDE)), facing="front"),
    "lie_down": Figure(((0.0, SIT_FLOOR), (0.5, {**SIT_FLOOR, "pitch": -0.7, "hip_l": 0.9, "hip_r": 0.8}), (1.0, SUPINE)), prop="bed"),
    "bend_down": Figure(((0.0, STAND), (0.9, STOOP), (1.0, STOOP))),
    "crouch": Figure(((0.0, STAND), (0.9, CROUCH), (1.0, CROUCH))),
    "kneel": Figure(((0.0, STAND), (0.5, {"hip_l": 1.3, "knee_l": 1.5, "knee_r": 0.9}), (1.0, _both(knee=1.57, arm=0.8, elbow=1.0)))),
    "raise_arms": Figure(((0.0, STAND), (0.9, _both(out=2.9, fore=0.1)), (1.0, _both(out=2.9, fore=0.1))), facing="front"),
    "roll_over": Figure(((0.0, SUPINE), (1.0, {**SUPINE, "twist": np.pi, "arm_l": 0.5})), prop="bed"),
    "sit_up": Figure(((0.0, SUPINE), (1.0, {**SIT_FLOOR, "arm_l": 1.2, "arm_r": 1.2})), prop="bed"),
    "walk": Figure(cycles=_gait(0.5, 0.4, 0.45), rate=(1.1, 1.8), path="across", stride=0.6, facing="path"),
    "run": Figure(
        cycles={**_gait(0.85, 0.8, 0.9), "bend": Cycle(0.25, 0.0)},
        rate=(2.0, 2.8), path="across", stride=0.95, facing="path", hop=0.03,
    ),
    "walk_circle": Figure(cycles=_gait(0.5, 0.4, 0.45), rate=(1.3, 2.0), path="circle", stride=1.0, facing="path"),
    "approach": Figure(cycles=_gait(0.5, 0.4, 0.45), rate=(1.2, 2.0), path="towards", stride=1.0, facing="front"),
    "crawl": Figure(
        ((0.0, _both(pitch=1.35, hip=1.35, knee=1.5, arm=1.5, nod=-0.6)), (1.0, _both(pitch=1.35, hip=1.35, knee=1.5, arm=1.5, nod=-0.6))),
        {"hip_l": Cycle(0, 0.35), "hip_r": Cycle(0, 0.35, 0.5), "arm_l": Cycle(0, 0.45, 0.5), "arm_r": Cycle(0, 0.45)},
        (1.2, 2.0), "across", 0.55, "path",
    ),
    "sidestep": Figure(
        cycles={"spread_l": Cycle(0.25, 0.25), "spread_r": Cycle(0.25, 0.25, 0.4), "out_l": Cycle(0.4, 0.2), "out_r": Cycle(0.4, 0.2, 0.5)},
        rate=(1.4, 2.2), path="sideways", stride=0.6, facing="front",
    ),
    "turn_round": Figure(cycles={"out_l": Cycle(0.7, 0.25), "out_r": Cycle(0.9, 0.25)}, rate=(0.8, 1.4), path="turn", facing="front"),
    "wave": Figure(
        cycles={"out_l": Cycle(2.2, 0.35), "fore_l": Cycle(0.35, 0.65), "out_r": Cycle(0.1, 0.0)}, rate=(1.6, 2.6), facing="front",
    ),
    "flap": Figure(cycles={"out_l": Cycle(1.4, 0.8), "out_r": Cycle(1.4, 0.8)}, rate=(1.3, 2.4), facing="front"),
    "jacks": Figure(
        cycles={"out_l": Cycle(1.5, 1.3), "out_r": Cycle(1.5, 1.3), "spread_l": Cycle(0.3, 0.3), "spread_r": Cycle(0.3, 0.3)},
        rate=(1.3, 2.0), facing="front", hop=0.05,
    ),
    "jump": Figure(
        cycles={"hip_l": Cycle(0.55, 0.55, 0.75), "hip_r": Cycle(0.55, 0.55, 0.75), "knee_l": Cycle(0.75, 0.75, 0.75),
                "knee_r": Cycle(0.75, 0.75, 0.75), "arm_l": Cycle(0.9, 1.2, 0.3), "arm_r": Cycle(0.9, 1.2, 0.3)},
        rate=(1.3, 1.9), hop=0.22,
    ),
    "squat": Figure(
        cycles={"hip_l": Cycle(0.85, 0.85), "hip_r": Cycle(0.85, 0.85), "knee_l": Cycle(1.0, 1.0), "knee_r": Cycle(1.0, 1.0),
                "bend": Cycle(0.25, 0.2), "arm_l": Cycle(0.8, 0.7), "arm_r": Cycle(0.8, 0.7)},
        rate=(1.0, 1.7),
    ),
    "kick": Figure(
        cycles={"hip_l": Cycle(0.55, 0.95), "knee_l": Cycle(0.45, 0.45, 0.6), "arm_r": Cycle(0.3, 0.6), "bend": Cycle(-0.1, 0.15, 0.5)},
        rate=(1.2, 2.0),
    ),
    "punch": Figure(
        cycles={"arm_l": Cycle(1.1, 0.45), "elbow_l": Cycle(1.0, 1.0, 0.5), "arm_r": Cycle(1.1, 0.45, 0.5), "elbow_r": Cycle(1.0, 1.0),
                "hip_l": Cycle(0.35, 0.05), "hip_r": Cycle(-0.25, 0.05)},
        rate=(1.6, 2.6),
    ),
    "clap": Figure(
        cycles={"arm_l": Cycle(1.4, 0.1), "arm_r": Cycle(1.4, 0.1), "out_l": Cycle(0.35, 0.5), "out_r": Cycle(0.35, 0.5)},
        rate=(1.8, 3.0), facing="front",
    ),
    "dance": Figure(
        cycles={"sway": Cycle(0.0, 0.4), "roll": Cycle(0.0, 0.12, 0.5), "out_l": Cycle(1.2, 0.7), "out_r": Cycle(1.2, 0.7, 0.5),
                "knee_l": Cycle(0.3, 0.3), "knee_r": Cycle(0.3, 0.3, 0.5), "hip_l": Cycle(0.2, 0.2), "hip_r": Cycle(0.2, 0.2, 0.5)},
        rate=(1.0, 1.8), facing="front",
    ),
    "march": Figure(
        cycles={"hip_l": Cycle(0.65, 0.75), "hip_r": Cycle(0.65, 0.75, 0.5), "knee_l": Cycle(0.7, 0.7), "knee_r": Cycle(0.7, 0.7, 0.5),
                "arm_l": Cycle(0.4, 0.7, 0.5), "arm_r": Cycle(0.4, 0.7)},
        rate=(1.2, 2.0),
    ),
    "bow": Figure(cycles={"bend": Cycle(0.65, 0.6), "arm_l": Cycle(0.6, 0.4), "arm_r": Cycle(0.6, 0.4)}, rate=(0.9, 1.5)),
    "thrash": Figure(
        ((0.0, SUPINE), (1.0, SUPINE)),
        {"arm_l": Cycle(0.8, 0.9), "arm_r": Cycle(0.8, 0.9, 0.5), "hip_l": Cycle(0.5, 0.5, 0.3), "hip_r": Cycle(0.5, 0.5, 0.8),
         "knee_l": Cycle(0.6, 0.6, 0.3), "knee_r": Cycle(0.6, 0.6, 0.8)},
        (1.4, 2.4), prop="bed",
    ),
}  # fmt: skip


def _keyed(keys: tuple[tuple[float, Pose], ...], progress: np.ndarray) -> dict[str, np.ndarray]:
    """Joint angles at each progress value, between the key poses before and after it."""
    times = np.array([time for time, _ in keys])
    names = {name for _, pose in keys for name in pose}
    return {name: np.interp(progress, times, [pose.get(name, 0.0) for _, pose in keys]) for name in names}


def _facing(motion: Figure, rng: np.random.Generator, above: bool) -> float:
    if motion.facing == "path":
        return rng.uniform(-0.15, 0.15)
    if above:
        return rng.uniform(-np.pi, np.pi)  # seen from above a still figure may point anywhere
    if motion.facing == "front":
        return -np.pi / 2 + rng.uniform(-0.45, 0.45)
    return rng.uniform(-0.45, 0.45) + (np.pi if rng.random() < 0.5 else 0.0)


def figure_channels(motion: Figure, frames: int, fps: float, above: bool, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Joint angles ``[T]`` by channel for one performance of a motion, with its own speed, phase, vigour and direction."""
    seconds = np.arange(frames) / fps
    channels = _keyed(motion.keys or ((0.0, STAND), (1.0, STAND)), action_progress(frames, rng))
    rate, start, vigour = rng.uniform(*motion.rate), rng.uniform(), rng.uniform(0.85, 1.15)
    phase = start + rate * seconds
    for name, cycle in motion.cycles.items():
        angle = cycle.offset + vigour * cycle.amplitude * np.sin(2 * np.pi * (cycle.harmonic * phase + cycle.shift))
        channels[name] = channels.get(name, 0.0) + angle
    if motion.hop:
        channels["lift"] = vigour * motion.hop * np.maximum(0.0, np.sin(2 * np.pi * phase))
    channels["yaw"] = np.full(frames, _facing(motion, rng, above))
    _follow(motion, channels, seconds, rng)
    return channels


def _follow(motion: Figure, channels: dict[str, np.ndarray], seconds: np.ndarray, rng: np.random.Generator) -> None:
    """Adds the route of the whole body to the channels."""
    distance = motion.stride * rng.uniform(0.8, 1.25) * seconds
    yaw = channels["yaw"]
    if motion.path == "across":
        channels["x"], channels["y"] = distance * np.cos(yaw), distance * np.sin(yaw)
    elif motion.path == "sideways":
        channels["yaw"] = -np.pi / 2 + np.full_like(yaw, rng.uniform(-0.2, 0.2))  # facing the camera, moving to the right
        channels["x"] = distance
    elif motion.path == "towards":
        channels["yaw"] = np.full_like(yaw, -np.pi / 2)
        channels["y"] = -distance
    elif motion.path == "turn":
        channels["yaw"] = yaw + 2 * np.pi * rng.uniform(0.5, 0.9) * seconds
    elif motion.path == "circle":
        radius = rng.uniform(0.32, 0.45)
        angle = rng.uniform(0, 2 * np.pi) + distance / radius
        channels["x"], channels["y"], channels["yaw"] = radius * np.cos(angle), radius * np.sin(angle), angle + np.pi / 2
