"""Videos as they come from cameras and from the web: H.264 and HEVC, small and large, keyframes far apart and close together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import cv2
import numpy as np
from av.video.stream import VideoStream

from ..recipe import Recipe, write_manifest

ENCODERS = {"h264": "libx264", "hevc": "libx265"}
RATE = 25  # frames per second
_GRAIN = 3.0  # standard deviation of a camera's noise, grey levels: without any, a codec has next to nothing to store
_GRAINS = 8


@dataclass(frozen=True)
class Video:
    """A kind of videos.

    Attributes:
        codec: FFmpeg's name of it, a key of ``ENCODERS``.
        width, height: Pixels.
        gop: Largest distance of keyframes, frames; 250 is what x264 and x265 choose unless told otherwise.
    """

    codec: str
    width: int
    height: int
    gop: int

    @property
    def name(self) -> str:
        """As in tables: ``h264 320x240 gop 250``."""
        return f"{self.codec} {self.width}x{self.height} gop {self.gop}"


def kinds(codecs: list[str], pictures: list[str], gops: list[int]) -> list[Video]:
    """All combinations; those with the first of everything come first."""
    sizes = [tuple(map(int, picture.split("x"))) for picture in pictures]
    return [Video(codec, width, height, gop) for gop in gops for width, height in sizes for codec in codecs]


def synthesise(video: Video, folder: Path, recipe: Recipe, seconds: float) -> Path:
    """One video under as many names as a step has clips, so that reading finds nothing in common but the file cache; its manifest.

    Raises:
        ValueError: This FFmpeg lacks the encoder.
    """
    folder.mkdir(parents=True)
    first = folder / "0.mp4"
    frames = write_video(first, video, round(seconds * RATE))
    names = [f"{number}.mp4" for number in range(recipe.ways * (recipe.shots + recipe.queries))]
    for name in names[1:]:
        try:
            os.link(first, folder / name)
        except OSError:
            shutil.copyfile(first, folder / name)
    labels = [f"class {number // (recipe.shots + recipe.queries)}" for number in range(len(names))]
    facts = {"frames": frames, "fps": RATE, "width": video.width, "height": video.height, "codec": video.codec}
    return write_manifest(folder, names, labels, **facts)


def write_video(path: Path, video: Video, frames: int) -> int:
    """Encodes moving pictures with the encoder's own defaults but the distance of keyframes; returns the number of frames."""
    options = {"g": str(video.gop)}
    if video.codec == "hevc":
        options["x265-params"] = f"keyint={video.gop}:log-level=none"
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream(ENCODERS[video.codec], rate=Fraction(RATE), options=options))
        stream.width, stream.height, stream.pix_fmt = video.width, video.height, "yuv420p"
        for picture in moving_pictures(video.width, video.height, frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return frames


def moving_pictures(width: int, height: int, frames: int) -> Iterator[np.ndarray]:
    """A camera that sways over a textured scene in which things move, with a camera's noise; uint8 ``[height, width, 3]``."""
    rng = np.random.default_rng(0)
    scene = _texture(rng, round(1.3 * width), round(1.3 * height))
    things = [_texture(rng, width // 4, height // 3) for _ in range(3)]
    grains = [np.rint(rng.normal(0.0, _GRAIN, (height, width, 3))).astype(np.int16) for _ in range(_GRAINS)]
    for number in range(frames):
        moment = number / RATE
        left, top = (round(0.15 * side * (1 + np.sin(speed * moment))) for side, speed in ((width, 0.9), (height, 0.7)))
        picture = scene[top : top + height, left : left + width].copy()
        for index, thing in enumerate(things):
            x, y = (
                round((0.5 + 0.5 * np.sin((1.1 + 0.4 * index) * moment + shift)) * (whole - part))
                for whole, part, shift in ((width, thing.shape[1], index), (height, thing.shape[0], 2 * index))
            )
            picture[y : y + thing.shape[0], x : x + thing.shape[1]] = thing
        yield cv2.add(picture, grains[number % _GRAINS], dtype=cv2.CV_8U)


def _texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Noise of several sizes, coarse ones stronger, as in pictures of the world; uint8 ``[height, width, 3]``."""
    total = np.full((height, width, 3), 127.0, np.float32)
    for cells in (4, 16, 64, 256):
        coarse = rng.normal(0.0, 120.0 / np.sqrt(cells), (cells, cells, 3)).astype(np.float32)
        total += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(total, 0, 255).astype(np.uint8)
