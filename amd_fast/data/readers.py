"""What a clip is read from: one interface for video files and whatever else holds the frames of a clip."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, Self

import numpy as np

PixelFormat = Literal["rgb24", "gray"]


class ClipReader(Protocol):
    """An opened clip, for reading single frames by their position in display order; a context manager, used from one thread."""

    path: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    @property
    def frame_count(self) -> int:
        """Number of frames that can be read."""

    def frames(self, indices: Iterable[int]) -> list[Any]:
        """Frames by position, in any order, repeats allowed; one past the end gives the last frame. Opaque: see :meth:`pixels`."""

    def pixels(self, frames: Sequence[Any], *, short_side: int | None = None, pixel_format: PixelFormat = "rgb24") -> np.ndarray:
        """Frames as uint8 ``[T, H, W, 3]`` (``[T, H, W]`` for "gray"), upright, resized to a shorter side where one is given."""


def open_clip(path: str | os.PathLike[str]) -> ClipReader:
    """Opens a clip for reading.

    Raises:
        DecodeError: it cannot be read; names the file and the remedy.
    """
    from amd_fast.data.decode import VideoReader

    return VideoReader(path)
