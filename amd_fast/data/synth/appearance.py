"""Appearances: silhouette x texture x colour family, for shapes (sprites) and for figures (build and clothes)."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np

# Hue (turns), saturation, value of each colour family; a clip draws its own colour close by.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.99, 0.82, 0.80), "orange": (0.075, 0.88, 0.92), "yellow": (0.15, 0.82, 0.93), "green": (0.36, 0.72, 0.62),
    "teal": (0.49, 0.75, 0.70), "blue": (0.61, 0.78, 0.78), "purple": (0.77, 0.58, 0.70), "pink": (0.92, 0.45, 0.93),
    "white": (0.12, 0.05, 0.95), "black": (0.62, 0.20, 0.12), "grey": (0.60, 0.06, 0.52), "brown": (0.065, 0.58, 0.42),
}  # fmt: skip
SKIN = ((0.055, 0.42, 0.86), (0.06, 0.50, 0.68), (0.06, 0.55, 0.45), (0.05, 0.33, 0.93))
HAIR = ((0.07, 0.5, 0.12), (0.07, 0.6, 0.25), (0.1, 0.5, 0.55), (0.6, 0.1, 0.1))


def draw_colour(base: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """One colour of a family: RGB float64 ``[3]`` in [0, 255]."""
    hue = (base[0] + rng.uniform(-0.018, 0.018)) % 1.0
    saturation = float(np.clip(base[1] * rng.uniform(0.85, 1.12), 0, 1))
    value = float(np.clip(base[2] * rng.uniform(0.88, 1.08), 0, 1))
    return 255.0 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))


@dataclass(frozen=True)
class Appearance:
    """How something looks.

    Attributes:
        silhouette: key of ``SILHOUETTES`` (shapes) or ``BUILDS`` (figures).
        texture: pattern of ``TEXTURES`` (shapes) or of the clothes: ``plain``, ``hoops``, ``halves``, ``belted`` (figures).
        colour: colour family of the whole, or of the torso.
        second: colour family of the pattern, or of the legs.
    """

    silhouette: str
    texture: str
    colour: str
    second: str

    @property
    def name(self) -> str:
        """For example ``disc_plain_red_red``."""
        return f"{self.silhouette}_{self.texture}_{self.colour}_{self.second}"


@dataclass(frozen=True)
class Build:
    """Proportions of a figure: widths relative to the average one, and what it wears beside shirt and trousers."""

    width: float = 1.0
    head: float = 1.0
    skirt: bool = False
    hat: bool = False
    sleeves: bool = True


BUILDS: dict[str, Build] = {
    "slim": Build(0.85),
    "stocky": Build(1.35),
    "child": Build(1.05, 1.35, sleeves=False),
    "robed": Build(1.0, skirt=True),
    "hatted": Build(1.0, hat=True),
    "sleeveless": Build(1.0, sleeves=False),
}


def _polar(radius: np.ndarray) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, len(radius), endpoint=False) - np.pi / 2
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)


def _star(points: int, inner: float) -> np.ndarray:
    return _polar(np.where(np.arange(2 * points) % 2 == 0, 1.0, inner))


def _ellipse(height: float) -> np.ndarray:
    return _polar(np.ones(48)) * [1.0, height]


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    x, y = 16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack((x, y + 2), axis=1) / 17.0


def _crescent() -> np.ndarray:
    outer = np.linspace(0.55, 2 * np.pi - 0.55, 40)
    inner = np.linspace(2 * np.pi - 0.85, 0.85, 40)
    return np.concatenate((np.stack((np.cos(outer), np.sin(outer)), 1), np.stack((0.42 + 0.62 * np.cos(inner), 0.72 * np.sin(inner)), 1)))


# Outlines inside the unit circle, y down.
SILHOUETTES: dict[str, np.ndarray] = {
    "disc": _polar(np.ones(48)),
    "square": 0.8 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float),
    "triangle": _polar(np.ones(3)),
    "star": _star(5, 0.45),
    "cross": np.array([(-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
                       (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33)]),
    "bar": np.array([(-1, -0.38), (1, -0.38), (1, 0.38), (-1, 0.38)]),
    "hexagon": _polar(np.ones(6)),
    "arrow": np.array([(1, 0), (0.1, -0.85), (0.1, -0.35), (-0.95, -0.35), (-0.95, 0.35), (0.1, 0.35), (0.1, 0.85)]),
    "heart": _heart(),
    "crescent": _crescent(),
    "gear": _polar(np.repeat(np.where(np.arange(18) % 2 == 0, 1.0, 0.72), 3)),
    "corner": np.array([(-0.9, -0.9), (-0.15, -0.9), (-0.15, 0.2), (0.9, 0.2), (0.9, 0.9), (-0.9, 0.9)]),
    "ellipse": _ellipse(0.6),
}  # fmt: skip

TEXTURES = ("plain", "stripes", "checks", "dots", "halves", "rings", "zigzag", "fade")
SPRITE_RADIUS = 32
SPRITE_SIZE = 2 * SPRITE_RADIUS + 4


def _pattern(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of the second colour in [0, 1] at positions inside the unit circle."""
    if texture == "stripes":
        return (np.sin(2 * np.pi * 1.6 * x) > 0).astype(float)
    if texture == "checks":
        return (np.sin(2 * np.pi * 1.1 * x) * np.sin(2 * np.pi * 1.1 * y) > 0).astype(float)
    if texture == "dots":
        return ((np.mod(x + 0.25, 0.55) - 0.27) ** 2 + (np.mod(y + 0.25, 0.55) - 0.27) ** 2 < 0.035).astype(float)
    if texture == "halves":
        return (y > 0).astype(float)
    if texture == "rings":
        return (np.sin(2 * np.pi * 1.7 * np.hypot(x, y)) > 0).astype(float)
    if texture == "zigzag":
        return (np.sin(2 * np.pi * (1.5 * y + 0.5 * np.abs(np.mod(3 * x, 2.0) - 1.0))) > 0).astype(float)
    if texture == "fade":
        return np.clip(0.5 + 0.6 * x, 0, 1)
    return np.zeros_like(x)


def sprite(look: Appearance, rng: np.random.Generator) -> np.ndarray:
    """A shape as a picture: float32 ``[68, 68, 4]``, colours times coverage and coverage, both in [0, 255] and [0, 1]."""
    axis = (np.arange(SPRITE_SIZE) - (SPRITE_SIZE - 1) / 2) / SPRITE_RADIUS
    x, y = np.meshgrid(axis, axis)
    first, second = (draw_colour(COLOURS[name], rng) for name in (look.colour, look.second))
    share = _pattern(look.texture, x, y)[..., None]
    light = (1.0 - 0.12 * (x + y))[..., None]  # a little relief, so that plain shapes are not quite flat
    picture = np.clip((first * (1 - share) + second * share) * light, 0, 255)
    outline = np.round((SILHOUETTES[look.silhouette] * SPRITE_RADIUS + (SPRITE_SIZE - 1) / 2) * 16).astype(np.int32)
    coverage = np.zeros((SPRITE_SIZE, SPRITE_SIZE), dtype=np.uint8)
    cv2.fillPoly(coverage, [outline], 255, cv2.LINE_AA, 4)
    alpha = coverage.astype(np.float32)[..., None] / 255.0
    premultiplied = np.concatenate((picture.astype(np.float32) * alpha, alpha), axis=-1)
    # Shapes are shown at about half this size: the blur keeps their textures from shimmering.
    return cv2.GaussianBlur(premultiplied, (0, 0), 0.8)
