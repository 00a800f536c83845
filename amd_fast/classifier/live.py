"""Sliding windows over a stream or a long video: each is a clip for a classifier, with bounded delay and memory."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from amd_fast.data.containers import open_container
from amd_fast.data.decode import to_pixels
from amd_fast.data.names import is_video
from amd_fast.data.readers import DEFAULT_RATE, PixelFormat
from amd_fast.errors import AmdFastError, ConfigError, DecodeError
from amd_fast.storage import lease

if TYPE_CHECKING:
    from amd_fast.classifier.answers import Answer
    from amd_fast.classifier.estimator import FewShotClassifier

MOST_FRAMES = 4096
"""Frames that a window may hold, made small: bounds the memory whatever the stream sends."""
_LIVE = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srt", "tcp", "udp", "mms")
_OPENS = 10.0  # seconds a source may take to open, and
_SENDS = 10.0  # to send the next packet
_LEAVES = 1.0  # seconds that the reader is waited for
_KINDS: tuple[PixelFormat, ...] = ("rgb24", "gray")
_SAME = 1e-6  # seconds that times may differ by rounding
_LOOK = 0.2  # seconds between looks whether the reader is still there


@dataclass(frozen=True)
class Window:
    """A stretch of a stream.

    Attributes:
        start, end: seconds of the stream's own clock.
        frames: uint8 ``[n, H, W, 3]``, made small.
        luma: uint8 ``[n, H, W]``, of the same pictures.
        skipped: windows passed over since the last one, because they came faster than they were taken.
    """

    start: float
    end: float
    frames: np.ndarray
    luma: np.ndarray
    skipped: int = 0


def is_live(source: str) -> bool:
    """Whether a source is a camera or a stream, rather than a file; of http addresses, those that do not name a video file."""
    scheme, found, rest = source.partition("://")
    if not found:
        return source.startswith("/dev/")
    over_http = scheme.lower() in ("http", "https")
    return scheme.lower() in _LIVE or (over_http and not is_video(rest.partition("?")[0]))


def watch(
    classifier: FewShotClassifier, source: str | os.PathLike[str], *, window: float = 2.0, stride: float = 1.0
) -> Iterator[tuple[Window, Answer]]:
    """Classifies a camera, stream or video window by window, until it ends or the iteration is given up.

    A stream is never waited for by more than one window: where answers take longer than the stride, windows are passed over, and the
    newest comes next. Of a file every window is classified; a rest shorter than the stride is not.

    Args:
        classifier: fitted with clips.
        source: a camera (``/dev/video0``), the URL of a stream, or a video file.
        window, stride: length of a window and from one's start to the next's, seconds. A file shorter than a window is one window.

    Raises:
        ConfigError: a length that is not positive, or windows of more than ``MOST_FRAMES`` frames.
        DecodeError: the source cannot be opened, or breaks off.
    """
    short_side = classifier.space_.decoding["short_side"]
    with Windows(source, window=window, stride=stride, short_side=short_side) as windows:
        for found in windows:
            [answer] = classifier.explain([{"rgb": found.frames, "luma": found.luma}])
            yield found, answer


class Windows:
    """Reads a source in a thread of its own and hands over its windows one by one; a context manager and an iterator.

    Args:
        source: as for :func:`watch`.
        window, stride: seconds.
        short_side: pixels that frames are made small to.
    """

    def __init__(self, source: str | os.PathLike[str], *, window: float, stride: float, short_side: int) -> None:
        if window <= 0 or stride <= 0:
            raise ConfigError(f"window and stride are lengths in seconds, got window={window}, stride={stride}; give positive numbers")
        self.source, self.live = os.fspath(source), is_live(os.fspath(source))
        self._window, self._stride, self._short_side = window, stride, short_side
        self._frames: deque[tuple[float, np.ndarray, np.ndarray]] = deque()
        self._changed = threading.Condition()
        self._waiting: Window | None = None
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name=f"windows of {self.source}", daemon=True)

    def __enter__(self) -> Windows:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout=_LEAVES)  # one that waits for a silent stream ends by itself when that has taken too long

    def __iter__(self) -> Iterator[Window]:
        while True:
            with self._changed:
                while self._waiting is None and not self._ended:
                    self._changed.wait(_LOOK)  # in slices, so that Ctrl-C is heard
                found, self._waiting = self._waiting, None
                self._changed.notify_all()
            if found is None:
                if self._error is not None:
                    raise self._error
                return
            yield found

    def _read(self) -> None:
        try:
            if self.live:
                self._read_from(self.source)
            else:
                with lease(self.source) as file:
                    self._read_from(os.fspath(file))
        except AmdFastError as error:
            self._error = error
        except (av.FFmpegError, OSError, ValueError) as error:
            remedy = "check the address, and that nothing else uses the camera" if self.live else "check that it is a whole video file"
            reason = getattr(error, "strerror", None) or str(error)
            self._error = DecodeError(f"cannot read {self.source!r} ({reason}); {remedy}")
        except BaseException as error:  # handed to whoever waits for windows
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _read_from(self, file: str) -> None:
        options: dict[str, Any] = {"format": "v4l2"} if file.startswith("/dev/") else {}
        if not self.live and not os.path.isfile(file):
            raise FileNotFoundError(2, "there is no such file")
        with open_container(file, timeout=(_OPENS, _SENDS), **options) as container:
            if not container.streams.video:
                raise ValueError("it has no pictures")
            first: float | None = None
            due = self._window
            for number, frame in enumerate(container.decode(video=0)):
                if self._stopped:
                    return
                time = frame.time if frame.time is not None else number / DEFAULT_RATE
                first = time if first is None else first
                time -= first
                if self._frames and time < self._frames[-1][0]:  # the stream began anew
                    first, time, due = first + time, 0.0, self._window
                    self._frames.clear()
                while time >= due - _SAME:
                    self._hand_over(due)
                    due += self._stride
                self._keep(time, frame)
            self._hand_over_rest(due)

    def _keep(self, time: float, frame: Any) -> None:
        colours, luma = (to_pixels([frame], short_side=self._short_side, pixel_format=kind)[0] for kind in _KINDS)
        self._frames.append((time, colours, luma))
        if len(self._frames) > MOST_FRAMES:
            raise ConfigError(f"a window of {self._window} seconds of {self.source!r} has more than {MOST_FRAMES} frames; make it shorter")

    def _hand_over_rest(self, due: float) -> None:
        """At the end: the window that the last frames complete, or all there is where no window was complete."""
        if not self._frames:
            return
        step = (self._frames[-1][0] - self._frames[0][0]) / max(len(self._frames) - 1, 1)
        end = self._frames[-1][0] + step
        if due == self._window or end >= due - step / 2:
            self._hand_over(min(due, end))

    def _hand_over(self, end: float) -> None:
        start = end - self._window
        while self._frames and self._frames[0][0] < start - _SAME:
            self._frames.popleft()
        inside = [(colours, luma) for time, colours, luma in self._frames if time < end - _SAME]
        if not inside or len({colours.shape for colours, _ in inside}) > 1:  # a gap, or the stream changed its size
            return
        frames, luma = (np.stack(pictures) for pictures in zip(*inside, strict=True))
        with self._changed:
            while self._waiting is not None and not self.live and not self._stopped:
                self._changed.wait(_LOOK)
            skipped = 0 if self._waiting is None else self._waiting.skipped + 1
            self._waiting = Window(max(start, 0.0), end, frames, luma, skipped)
            self._changed.notify_all()
