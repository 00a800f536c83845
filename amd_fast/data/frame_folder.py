"""Clips that lie on disk as a folder of numbered pictures, as ``img_00001.jpg``, ``frame_000001.jpg`` or ``00001.jpg``.

The n-th frame is the n-th picture by number, wherever the numbers start and whatever their step. Pictures are decoded at their full
size and then resized; where that makes them larger or leaves their size, a folder of PNG files gives the pixels of the video they were
taken from. Only the frames asked for are read; a folder in a store is listed each time, its pictures come through the cache. Like
videos, clips are meant to be read in parallel, one thread each: OpenCV decodes without Python's lock.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from amd_fast.data.pixels import resize, scaled_size
from amd_fast.data.readers import DEFAULT_RATE, PixelFormat, VideoInfo
from amd_fast.errors import DecodeError
from amd_fast.storage import is_remote, join, lease, list_below

_NUMBERED = re.compile(r"(.*\D|)(\d+)\.(jpe?g|png)", re.IGNORECASE | re.DOTALL)
# Precomputed flow that some extractors put beside the frames: flow_x_00001.jpg, x_00001.jpg.
_FLOW_PREFIX = re.compile(r"(flow)?[_-]?[xyuv][_-]?|flow[_-]?", re.IGNORECASE)
_CODECS = {"jpg": "jpeg folder", "jpeg": "jpeg folder", "png": "png folder"}
_NAMED = 5  # gaps that a message names
_EXTRACT = "extract the clip again"
_COPY = "copy it or extract the clip again"


class FrameFolderReader:
    """The frames of one folder, for reading single ones; see :class:`~amd_fast.data.readers.ClipReader`.

    Raises:
        DecodeError: the folder cannot be read, holds no numbered pictures, holds more than one series of them, or two pictures of
            the same number; names the folder and the remedy.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._numbers, self._names, self._codec = self._list()

    def __enter__(self) -> FrameFolderReader:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    @property
    def frame_count(self) -> int:
        """Number of pictures."""
        return len(self._names)

    def frames(self, indices: Iterable[int]) -> list[np.ndarray]:
        """Decode frames by position.

        Args:
            indices: positions from 0, in any order, repeats allowed; one past the end gives the last frame.

        Returns:
            list of uint8 ``[H, W, 3]`` in OpenCV's order (blue, green, red), one per index; equal indices share one array.

        Raises:
            DecodeError: a negative index, or a picture that is damaged or of another size than the others.
        """
        positions = [int(i) for i in indices]
        if positions and min(positions) < 0:
            raise self._error(f"frame {min(positions)} was asked for", "frames count from 0")
        positions = [min(i, len(self._names) - 1) for i in positions]
        decoded = {i: self._decode(self._names[i]) for i in dict.fromkeys(positions)}
        sizes = {i: (picture.shape[1], picture.shape[0]) for i, picture in decoded.items()}
        self._require_one_size({self._names[i]: size for i, size in sizes.items()})
        return [decoded[i] for i in positions]

    def pixels(self, frames: Sequence[np.ndarray], *, short_side: int | None = None, pixel_format: PixelFormat = "rgb24") -> np.ndarray:
        """Frames of :meth:`frames` as one array, each converted once.

        Args:
            frames: at least one frame.
            short_side: pixels of the shorter side, or None for the size as stored.
            pixel_format: "rgb24", or "gray" for the luma (ITU-R BT.601).

        Returns:
            uint8 ``[T, H, W, 3]``, or ``[T, H, W]`` for "gray".
        """
        target = scaled_size(frames[0].shape[1], frames[0].shape[0], short_side)
        code = cv2.COLOR_BGR2GRAY if pixel_format == "gray" else cv2.COLOR_BGR2RGB
        width, height = target
        pixels = np.empty((len(frames), height, width) if pixel_format == "gray" else (len(frames), height, width, 3), np.uint8)
        places: dict[int, int] = {}
        for place, frame in enumerate(frames):
            if (known := places.setdefault(id(frame), place)) != place:
                pixels[place] = pixels[known]
            else:
                resize(cv2.cvtColor(frame, code), target, out=pixels[place])
        return pixels

    def check(self) -> VideoInfo:
        """Describe the clip, having looked at every picture's header and end, and decoded the first and the last.

        Nothing in a folder says how fast its frames follow each other: fps is ``DEFAULT_RATE``.

        Raises:
            DecodeError: numbers are missing, pictures differ in size, or one is damaged.
        """
        self._check_gaps()
        self._require_one_size({name: self._stored_size(name) for name in self._names})
        height, width = self.frames([0, len(self._names) - 1])[0].shape[:2]
        count = len(self._names)
        return VideoInfo(count, DEFAULT_RATE, width, height, self._codec, count / DEFAULT_RATE)

    def _list(self) -> tuple[list[int], list[str], str]:
        """Numbers and names of the pictures in order, and what they are."""
        names = [name for name in self._names_there() if not name.startswith(".")]
        series: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for name in names:
            if found := _NUMBERED.fullmatch(name):
                prefix, number, suffix = found.groups()
                series.setdefault((prefix, _CODECS[suffix.lower()]), []).append((int(number), name))
        series = {key: frames for key, frames in series.items() if not _FLOW_PREFIX.fullmatch(key[0])}
        if not series:
            held = f"it holds no numbered pictures ({len(names)} other files)" if names else "the folder is empty"
            raise self._error(held, "put the frames there as img_00001.jpg, img_00002.jpg, ..., or leave it out")
        if len(series) > 1:
            examples = ", ".join(sorted(repr(min(frames)[1]) for frames in series.values())[:_NAMED])
            raise self._error(f"it holds {len(series)} series of pictures, such as {examples}", "keep one series of frames per folder")
        ((_, codec), frames) = next(iter(series.items()))
        numbers, ordered = zip(*sorted(frames), strict=True)
        twice = next((i for i in range(1, len(numbers)) if numbers[i] == numbers[i - 1]), None)
        if twice is not None:
            raise self._error(f"{ordered[twice - 1]!r} and {ordered[twice]!r} have the same number", "keep one of the two")
        return list(numbers), list(ordered), codec

    def _names_there(self) -> list[str]:
        if is_remote(self.path):
            return [name for name in list_below(self.path, error=DecodeError) if "/" not in name]
        try:
            return os.listdir(self.path)
        except OSError as error:
            raise self._error(f"the folder cannot be read ({error.strerror})", "check the path and its permissions") from error

    def _check_gaps(self) -> None:
        """Refuse numbers that are missing; a constant step (every fifth frame kept) is no gap."""
        steps = np.diff(self._numbers)
        if not len(steps):
            return
        step = int(steps.min())
        gaps = np.flatnonzero(steps != step)
        if not len(gaps):
            return
        named = [f"{self._names[i]!r} and {self._names[i + 1]!r}" for i in gaps[:_NAMED]]
        more = f" and in {len(gaps) - _NAMED} more places" if len(gaps) > _NAMED else ""
        raise self._error(f"frames are missing between {', '.join(named)}{more}", _EXTRACT)

    def _require_one_size(self, sizes: dict[str, tuple[int, int]]) -> None:
        if len(set(sizes.values())) <= 1:
            return
        usual = Counter(sizes.values()).most_common(1)[0][0]
        name, odd = next((name, size) for name, size in sizes.items() if size != usual)
        reason = f"its frames differ in size: {name!r} has {odd[0]} x {odd[1]} pixels, others {usual[0]} x {usual[1]}"
        raise self._error(reason, f"{_EXTRACT}, at one size")

    def _read(self, name: str) -> bytes:
        try:
            with lease(join(self.path, name), error=DecodeError) as file:
                data = file.read_bytes()
        except OSError as error:
            raise self._error(f"{name!r} cannot be read ({error.strerror})", "check its permissions") from error
        if not data:
            raise self._error(f"{name!r} is empty (0 bytes)", _COPY)
        # A JPEG file ends with a marker after its last scan, and neither marker can occur inside the compressed data. Some versions of
        # OpenCV fill the missing part of a truncated file with grey and say nothing.
        if data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\xda"):
            raise self._error(f"{name!r} is truncated", _COPY)
        return data

    def _decode(self, name: str) -> np.ndarray:
        data = self._read(name)
        try:
            picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        except cv2.error:  # a header that promises absurd sizes
            picture = None
        if picture is None:
            raise self._error(f"{name!r} is no picture that can be decoded", _COPY)
        return picture

    def _stored_size(self, name: str) -> tuple[int, int]:
        """Width and height from the header."""
        from PIL import Image, UnidentifiedImageError

        data = self._read(name)
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
                return picture.size
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise self._error(f"{name!r} is no picture that can be decoded", _COPY) from error

    def _error(self, reason: str, remedy: str) -> DecodeError:
        return DecodeError(f"cannot decode {self.path!r}: {reason}; {remedy}")
