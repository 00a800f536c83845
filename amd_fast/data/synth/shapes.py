"""How shapes move: closed-form trajectories, each a function of the progress of a one-off action, of plain time, and of chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from amd_fast.data.synth.timing import action_progress, smoothstep

Course = dict[str, np.ndarray]
ShapeMotion = Callable[[np.ndarray, np.ndarray, np.random.Generator], Course]

#: Motions by name. Each gives what it moves, as arrays ``[T]`` or ``[pieces, T]``: ``x`` and ``y`` (frame widths about the centre, y down),
#: ``angle`` (radians), ``scale_x`` and ``scale_y`` (relative). What it leaves out rests at 0, scales at 1.
SHAPES: dict[str, ShapeMotion] = {}

TRAVEL = 0.58  # of the frame's width, for motions that cross it


@dataclass(frozen=True)
class Placement:
    """Where the pieces of a shape are: arrays ``[pieces, T]`` in the units of ``SHAPES``."""

    x: np.ndarray
    y: np.ndarray
    angle: np.ndarray
    scale_x: np.ndarray
    scale_y: np.ndarray


def shape_placement(name: str, frames: int, rng: np.random.Generator) -> Placement:
    """The trajectory of one performance of a shape's motion."""
    course = SHAPES[name](action_progress(frames, rng), np.linspace(0.0, 1.0, frames), rng)
    pieces = max(np.atleast_2d(values).shape[0] for values in course.values())
    rest = {"x": 0.0, "y": 0.0, "angle": 0.0, "scale_x": 1.0, "scale_y": 1.0}
    return Placement(**{key: np.broadcast_to(np.asarray(course.get(key, value), float), (pieces, frames)) for key, value in rest.items()})


def _motion(function: ShapeMotion) -> ShapeMotion:
    SHAPES[function.__name__.strip("_")] = function
    return function


def _phase(time: np.ndarray, rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """Phase in radians from a random start, with low to high turns in a clip."""
    return 2 * np.pi * (rng.uniform() + rng.uniform(low, high) * time)


def _resized(scale: np.ndarray | float) -> Course:
    return {"scale_x": np.asarray(scale), "scale_y": np.asarray(scale)}


@_motion
def _slide(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    return {"x": TRAVEL * rng.uniform(0.75, 1.0) * (time - 0.5), "y": rng.uniform(-0.05, 0.05) * (time - 0.5)}


@_motion
def _drop(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    return {"y": TRAVEL * (progress**2 - 0.5), "x": rng.uniform(-0.04, 0.04) * (time - 0.5)}


@_motion
def _circle(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    angle, radius = _phase(time, rng, 0.8, 1.3), rng.uniform(0.17, 0.26)
    return {"x": radius * np.cos(angle), "y": radius * np.sin(angle)}


@_motion
def _spin(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    return {"angle": _phase(time, rng, 0.8, 1.3)}


@_motion
def _bounce(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    height = np.abs(np.sin(_phase(time, rng, 0.9, 1.4)))
    return {"y": 0.22 - 0.45 * height, "scale_y": 1.0 - 0.25 * np.exp(-8.0 * height)}


@_motion
def _zigzag(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    return {"x": TRAVEL * (time - 0.5), "y": 0.1 * np.arcsin(np.sin(_phase(time, rng, 1.6, 2.6)))}


@_motion
def _pendulum(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    angle = 0.9 * np.sin(_phase(time, rng, 1.0, 1.6))
    return {"x": 0.3 * np.sin(angle), "y": 0.3 * np.cos(angle), "angle": -angle}


@_motion
def _grow(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    return _resized(0.45 + 1.15 * progress)


@_motion
def _pulse(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    return _resized(1.0 + 0.35 * np.sin(_phase(time, rng, 1.6, 2.6)))


@_motion
def _shake(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    return {"x": 0.07 * np.sin(_phase(time, rng, 4.0, 6.0))}


@_motion
def _rock(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    return {"angle": 0.8 * np.sin(_phase(time, rng, 2.0, 3.2))}


@_motion
def _squash(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    return {"scale_y": 1.35 - 1.05 * progress, "scale_x": 0.75 + 0.65 * progress, "y": 0.2 * progress}


@_motion
def _split(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    return {"x": np.stack((-0.26 * progress, 0.26 * progress)), **_resized(0.85)}


@_motion
def _topple(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    fallen = progress**2
    return {
        "angle": np.pi / 2 + 1.6 * fallen,
        "x": 0.16 * fallen,
        "y": 0.1 * fallen,
        "scale_x": np.asarray(1.4),
        "scale_y": np.asarray(1.1),
    }


@_motion
def _spiral(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    angle = _phase(time, rng, 1.3, 1.9)
    return {"x": 0.27 * time * np.cos(angle), "y": 0.27 * time * np.sin(angle)}


@_motion
def _hop(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    return {"x": 0.5 * (time - 0.5), "y": -0.22 * np.abs(np.sin(_phase(time, rng, 1.2, 1.8)))}


@_motion
def _orbit(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    angle = _phase(time, rng, 0.7, 1.1)
    return {"x": 0.2 * np.stack((np.cos(angle), -np.cos(angle))), "y": 0.2 * np.stack((np.sin(angle), -np.sin(angle))), **_resized(0.8)}


@_motion
def _tumble(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    return {"x": TRAVEL * (time - 0.5), "angle": _phase(time, rng, 0.7, 1.1)}


@_motion
def _figure_eight(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    angle = _phase(time, rng, 0.9, 1.3)
    return {"x": 0.27 * np.sin(angle), "y": 0.17 * np.sin(2 * angle)}


@_motion
def _throw(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    return {"x": TRAVEL * (time - 0.5), "y": -rng.uniform(1.4, 1.9) * time * (1.0 - time), "angle": 1.5 * time}


@_motion
def _stop_and_go(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    steps = 3.0 * time
    return {"x": TRAVEL * ((np.floor(steps) + smoothstep(1.8 * (steps % 1.0))) / 3.0 - 0.5)}


@_motion
def _flip(progress: np.ndarray, time: np.ndarray, rng: np.random.Generator) -> Course:
    angle = _phase(time, rng, 0.9, 1.5)
    return {"scale_x": np.cos(angle), "y": 0.06 * np.sin(angle)}
