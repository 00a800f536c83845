"""Draws one clip: a performance of a motion program by a subject of some appearance, in front of a background."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from amd_fast.data.synth import background, damage
from amd_fast.data.synth.appearance import Appearance
from amd_fast.data.synth.drawing_figures import draw_figure
from amd_fast.data.synth.drawing_shapes import draw_shape
from amd_fast.data.synth.framing import camera
from amd_fast.data.synth.programs import Program

FPS = 25
FRAMES = (24, 40)  # shortest and longest clip


@dataclass(frozen=True)
class ClipSpec:
    """Everything that decides the pixels of a clip.

    Attributes:
        program: what moves, and how.
        look: how it looks.
        seed: chooses all that varies between clips of a class.
        size: side of the frames in pixels.
        damage: kind of sensor damage, empty for none. A damaged clip shows the very performance that the clean one shows.
    """

    program: Program
    look: Appearance
    seed: int
    size: int = 96
    damage: str = ""

    @property
    def frames(self) -> int:
        """Number of frames of the clip, known without drawing it."""
        return damage.frames_left(_length(self._rng()), self.damage, self._damage_rng())

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def _damage_rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, 1])


def _length(rng: np.random.Generator) -> int:
    return int(rng.integers(FRAMES[0], FRAMES[1] + 1))


def render_clip(spec: ClipSpec) -> np.ndarray:
    """Frames of a clip, uint8 RGB ``[T, size, size, 3]``; the same for the same spec, whichever process draws them.

    Raises:
        ConfigError: the kind of damage is unknown.
    """
    rng = spec._rng()
    count = _length(rng)
    program, size = spec.program, spec.size
    scene, light = background.scene(size, program.view, rng), background.lighting(size, rng)
    shifts = camera(count, size, rng)
    canvas = background.backdrops(scene, shifts, size)
    if program.is_figure:
        draw_figure(canvas, program.action, program.view, spec.look, FPS, shifts, rng)
    else:
        draw_shape(canvas, program.action, spec.look, shifts, rng)
    frames = np.stack([cv2.multiply(frame, light, dtype=cv2.CV_8U) for frame in (canvas[::-1] if program.backwards else canvas)])
    return damage.apply(frames, spec.damage, spec._damage_rng())
