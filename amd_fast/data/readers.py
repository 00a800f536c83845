"""What a clip is read from: one interface for video files and whatever else holds the frames of a clip."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np

from amd_fast.data.names import is_video
from amd_fast.errors import DecodeError
from amd_fast.storage import is_folder, is_remote

PixelFormat = Literal["rgb24", "gray"]
#: Frames per second taken for clips that do not say: folders of frames, and streams without time stamps or a rate.
DEFAULT_RATE = 25.0


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What there is to know about a clip before training on it.

    Attributes:
        frames: number of frames that can be decoded.
        fps: frames per second, on average where the rate varies; ``DEFAULT_RATE`` where nothing says.
        width, height: pixels of a frame, shown upright.
        codec: FFmpeg's name of the codec, such as "h264"; "jpeg folder" or "png folder" for folders of frames.
        duration: seconds.
    """

    frames: int
    fps: float
    width: int
    height: int
    codec: str
    duration: float


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

    def check(self) -> VideoInfo:
        """Describe the clip, having made sure that it can be trained on.

        Raises:
            DecodeError: it is incomplete or damaged; names the file and the remedy.
        """


def open_clip(path: str | os.PathLike[str]) -> ClipReader:
    """Opens a clip for reading: a video file, or a folder that holds its frames as pictures; or the URI of either.

    In a store, a name that ends as a video's is taken for one without asking, so that each clip costs one request less.

    Raises:
        DecodeError: it cannot be read; names the file and the remedy.
    """
    surely_a_file = is_remote(path) and is_video(os.fspath(path))
    if not surely_a_file and is_folder(path, error=DecodeError):
        from amd_fast.data.frame_folder import FrameFolderReader

        return FrameFolderReader(path)
    from amd_fast.data.decode import VideoReader

    return VideoReader(path)
