"""Reading uploaded clips in processes of their own: strangers' files can crash a decoder or keep it busy for ever, and do it there."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np

from amd_fast.data.child import Failure
from amd_fast.data.clips import RawClip, decode_clip
from amd_fast.data.containers import open_container
from amd_fast.data.workers import Workers
from amd_fast.errors import DataError, DecodeError

logger = logging.getLogger(__name__)

# What browsers record and cameras write. Playlists and lists of pictures are not among them: they name other files to be opened.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf"
_MOST_PIXELS = 4096 * 4096  # of a frame; two dozen decoded ones are held at a time
_MORE_MEMORY = 4 << 30  # bytes that decoding may take
_THUMBNAIL_HEIGHT = 120
_SLOT = 64 << 20  # shared memory per process, bytes


class Reading(NamedTuple):
    """A clip that was read: its sampled frames (and flow), and a JPEG picture of it."""

    clip: RawClip
    thumbnail: bytes


@dataclass(frozen=True)
class UploadReading:
    """Reads one uploaded file, in the process of a worker.

    Args:
        modalities: of "rgb" and "flow", what the model looks at.
        frames, short_side: as for :func:`~amd_fast.data.clips.decode_clip`.
    """

    modalities: tuple[str, ...]
    frames: int
    short_side: int

    def __call__(self, path: str) -> tuple[dict[str, np.ndarray], bytes] | Failure:
        """The arrays of the clip and its picture, or why there are none, in words that do not name the file."""
        _bound_memory()
        try:
            check_container(path)
            wanted = dict.fromkeys((*self.modalities, "rgb"))  # the picture needs the colours, whatever the model looks at
            raw = decode_clip(path, self.frames, short_side=self.short_side, modalities=tuple(wanted))
        except DataError as error:
            return Failure(str(error).replace(repr(path), "this clip"))
        except Exception as error:  # damaged files find their way into every corner of a decoder
            return Failure(f"cannot decode this clip: unexpected {type(error).__name__}")
        return {name: raw[name] for name in self.modalities if name in raw}, _thumbnail(raw["rgb"])


@functools.cache
def _bound_memory() -> None:
    """Lets this process have so much memory more and no more: sizes may change in the middle of a video. Where there is /proc."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        return
    import resource

    now = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + _MORE_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def check_container(path: str) -> None:
    """Lets through what the decoder recognises, by content, as one of the containers, with pictures of a size that fits the memory.

    Raises:
        DecodeError: it is something else.
    """
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    try:
        with open_container(f"file:{path}", options=options) as container:
            sizes = [(stream.width, stream.height) for stream in container.streams.video]
    except (av.FFmpegError, ValueError, OSError) as error:
        logger.debug("refused an upload: %s", error)
        raise DecodeError("this file is not a video that can be read here; give an mp4, webm, mov, mkv or avi file") from error
    for width, height in sizes:
        if width * height > _MOST_PIXELS:
            raise DecodeError(f"its frames have {width} x {height} pixels, which is too large; make the video smaller first")


def _thumbnail(rgb: np.ndarray) -> bytes:
    """JPEG of the frame in the middle of uint8 ``[T, H, W, 3]``."""
    frame = rgb[len(rgb) // 2]
    height, width = frame.shape[:2]
    size = (min(4 * _THUMBNAIL_HEIGHT, max(1, round(width * _THUMBNAIL_HEIGHT / height))), _THUMBNAIL_HEIGHT)
    small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    return bytes(cv2.imencode(".jpg", np.ascontiguousarray(small[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 80])[1])


class ClipReading:
    """A fixed number of processes that read uploads.

    Args:
        work: reads one file.
        processes: how many.
        seconds: that a clip may take; its process is ended then and started anew.
    """

    def __init__(self, work: UploadReading, processes: int, seconds: float) -> None:
        self._processes = processes
        self._workers: Workers[str, tuple[dict[str, np.ndarray], bytes]] = Workers(
            work, processes, kind="process", timeout=seconds, slot=_SLOT
        )

    def warm_up(self) -> None:
        """Starts the processes, so that the first clip does not wait for them; returns when they run."""
        self._workers.run([os.devnull] * self._processes, lambda number, result: None)

    def read(self, path: str) -> Reading:
        """Reads a clip; blocks until that is done.

        Raises:
            DecodeError: it cannot be read, or takes too long; the text is for whoever uploaded it.
        """
        found: list[Reading] = []

        def accept(number: int, result: tuple[dict[str, np.ndarray], bytes]) -> None:
            found.append(Reading(RawClip(result[0]), result[1]))

        failures = self._workers.run([path], accept)
        if failures:
            reason = failures[0].reason
            if reason.startswith("it took longer"):
                reason = "reading this clip took too long; give a shorter or smaller one"
            elif reason.startswith("the process"):
                reason = "the decoder could not cope with this clip; convert it to mp4 first"
            raise DecodeError(reason)
        return found[0]

    def close(self) -> None:
        """Ends the processes."""
        self._workers.close()
