"""Frame-exact decoding of the few frames a clip needs, on the CPU, with PyAV (FFmpeg).

The n-th frame is the n-th one that a full decode shows, whatever the container says about time. Decoding starts at the keyframe
before a wanted frame, and pictures that nothing refers to and nobody asked for are skipped. Where the order of display cannot be
known beforehand (see ``packets``), the frames are counted by decoding from the start.

Pictures are shown as stored: rotation in the container's display matrix is applied, mirroring and non-square pixels are not.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import av
import numpy as np
from av.stream import Discard, Disposition
from av.video.reformatter import Interpolation, VideoReformatter

from amd_fast.data.containers import open_container
from amd_fast.data.h264 import sequence_headers, shown_as_decoded
from amd_fast.data.packets import PacketTable, read_packets
from amd_fast.data.pixels import resize, scaled_size
from amd_fast.data.readers import DEFAULT_RATE, PixelFormat, VideoInfo
from amd_fast.errors import DecodeError
from amd_fast.storage import lease

# Formats of 8-bit planes, and those of the same range whose chroma is as large as their luma: no colour is lost by averaging there.
_UNSAMPLED = {f"yuv{full}{sampling}p": f"yuv{full}444p" for full in ("", "j") for sampling in ("420", "422", "444")}
# FFmpeg reads packets and decodes pictures to learn of a stream what its container may not say. These two say it in their headers.
_DESCRIBED = ((4, b"ftyp"), (0, b"\x1a\x45\xdf\xa3"))  # how mp4 and mov, and Matroska and WebM begin
_UNEXAMINED = {"skip_frame": "all", "analyzeduration": "1", "fpsprobesize": "0"}
_NEVER_REORDERED = frozenset({"vp8", "vp9", "av1", "mjpeg"})
_TOLERATED_LOSS = 0.1  # share of the promised frames that may be missing: headers of AVI files are often a few frames off


class VideoReader:
    """The video stream of one file, opened for reading single frames; use it as a context manager, from one thread.

    The compressed stream is held in memory while the reader is open: meant for clips, seconds to minutes long. A URI is read through
    the cache of remote files, where its copy stays as long as the reader is open.

    Raises:
        DecodeError: the file cannot be opened or holds no video that can be decoded; names the file and the remedy.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._frame_count: int | None = None
        self._container: Any = None
        self._file = lease(self.path, error=DecodeError)
        try:
            self._open(examine=not _is_described(self._file.path))
            if not self._examined and self._table.times is None:
                self._open(examine=True)
        except BaseException:
            self.close()
            raise

    def _open(self, *, examine: bool) -> None:
        """Opens the file, where possible by its header alone, in a fifth of the time that FFmpeg takes to ``examine`` the stream."""
        if self._container is not None:
            self._container.close()
        self._examined = examine
        self._container = _open_container(self._file.path, self.path, {} if examine else _UNEXAMINED)
        self._stream = self._find_stream()
        self._context = self._stream.codec_context
        # A decoder has to know beforehand that frames are reordered; one that learns it on the way loses frames.
        if not examine and not self._context.has_b_frames and not self._never_reorders():
            self._open(examine=True)
            return
        self._context.thread_type = "NONE"  # clips are decoded in parallel, not the frames of one; skipping needs single frames
        self._context.thread_count = 1
        # dav1d takes what to skip from its first packet, for good, and shows a picture from before instead of a skipped one.
        self._can_skip = self._context.codec.canonical_name != "av1"
        self._table = self._read_packets()

    def _never_reorders(self) -> bool:
        """Whether codec or header rule out that frames are shown in another order than they come in."""
        if self.codec != "h264":
            return self.codec in _NEVER_REORDERED
        headers = list(sequence_headers(self._context.extradata or b""))
        return bool(headers) and all(map(shown_as_decoded, headers))

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; frames already returned stay valid."""
        if self._container is not None:
            self._container.close()
        self._file.close()

    @property
    def table(self) -> PacketTable:
        """The packets, and the order in which they are shown."""
        return self._table

    @property
    def stream(self) -> Any:
        """The ``av.VideoStream`` that is read."""
        return self._stream

    @property
    def codec(self) -> str:
        """FFmpeg's name of the codec, such as "h264"."""
        return str(self._context.codec.canonical_name)

    def describe_pixels(self) -> None:
        """Makes sure that the stream's codec context knows pixel format and colours, which the header of a file may not say."""
        if self._context.pix_fmt is None and not self._examined:
            self._open(examine=True)

    @property
    def turns(self) -> int:
        """Counter-clockwise quarter turns that show the pictures upright, which the first one says once it is decoded."""
        return _quarter_turns(self.frames([0])[0])

    @property
    def frame_count(self) -> int:
        """Number of frames, known from the packets where they can be trusted, else from a full decode.

        Raises:
            DecodeError: nothing can be decoded.
        """
        if self._table.times is not None:
            return len(self._table.shown)
        if self._frame_count is None:
            self._frame_count = sum(1 for _ in self._decode_all())
        if self._frame_count == 0:
            raise self._nothing_decodes()
        return self._frame_count

    def frames(self, indices: Iterable[int]) -> list[Any]:
        """Decode frames by position in display order.

        Args:
            indices: positions, in any order, repeats allowed; one past the end gives the last frame.

        Returns:
            list of ``av.VideoFrame``, one per index; equal indices share one object.

        Raises:
            DecodeError: a negative index, or nothing can be decoded.
        """
        positions = [int(i) for i in indices]
        if not positions:
            return []
        if min(positions) < 0:
            raise self._error(f"frame {min(positions)} was asked for", "frames count from 0")
        if self._table.times is None:
            return self._frames_by_count(positions)
        shown = self._table.shown
        wanted = [shown[min(i, len(shown) - 1)] for i in positions]
        found = self._frames_by_time(set(wanted))
        if not found:
            raise self._nothing_decodes()
        return [found[time] for time in wanted]

    def pixels(self, frames: Sequence[Any], *, short_side: int | None = None, pixel_format: PixelFormat = "rgb24") -> np.ndarray:
        """Frames of :meth:`frames` as one array, see :func:`to_pixels`."""
        return to_pixels(frames, short_side=short_side, pixel_format=pixel_format)

    def check(self) -> VideoInfo:
        """Describe the stream, having made sure that the file is whole and that its first and last frames decode.

        Raises:
            DecodeError: the file is truncated, or its first or last frame is damaged.
        """
        self._check_complete()
        count = self.frame_count
        if self._table.times is not None:
            ends = {self._table.shown[0], self._table.shown[-1]}
            if any(frame.pts != time for time, frame in self._frames_by_time(ends).items()):
                raise self._error("its first or last frame is damaged", "copy or download the file again, or re-encode it with ffmpeg")
        first = self.frames([0])[0]
        width, height = first.width, first.height
        if _quarter_turns(first) % 2:
            width, height = height, width
        duration = self._duration(count)
        return VideoInfo(count, count / duration, width, height, self.codec, duration)

    def _find_stream(self) -> Any:
        streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise self._error("it holds no video stream, only audio or other data", "leave it out, or give the video itself")
        if streams[0].codec_context is None:
            raise self._error("this build of FFmpeg has no decoder for its codec", "re-encode it, say as H.264 with ffmpeg")
        for other in self._container.streams:
            if other is not streams[0]:
                other.discard = Discard.all  # spares reading the sound
        return streams[0]

    def _read_packets(self) -> PacketTable:
        try:
            table = read_packets(self._container, self._stream)
        except (av.FFmpegError, ValueError, OSError) as error:
            raise self._error(f"its packets cannot be read ({_reason(error)})", "copy or download the file again") from error
        if not table.packets:
            raise self._error("its video stream is empty", "copy or download the file again, or leave it out")
        return table

    def _decode(self, packet: Any | None) -> list[Any]:
        """Feed one packet, or None at the end; a damaged one yields no frame."""
        try:
            return list(self._context.decode(packet))
        except av.FFmpegError:
            return []

    def _restart(self) -> None:
        if self._context.is_open:
            self._context.flush_buffers()

    def _decode_all(self) -> Iterator[Any]:
        self._restart()
        self._context.skip_frame = "DEFAULT"
        for packet in (*self._table.packets, None):
            yield from self._decode(packet)

    def _frames_by_count(self, positions: Sequence[int]) -> list[Any]:
        wanted, end = set(positions), max(positions)
        found: dict[int, Any] = {}
        last = None
        for k, last in enumerate(self._decode_all()):
            if k in wanted:
                found[k] = last
            if k == end:
                break
        if last is None:
            raise self._nothing_decodes()
        return [found.get(i, last) for i in positions]

    def _frames_by_time(self, wanted: set[int]) -> dict[int, Any]:
        """Frames by time stamp: all those wanted, or none where nothing can be decoded."""
        found = self._decode_sparsely(wanted)
        if found.keys() != wanted and not self._examined:
            self._open(examine=True)
            found = self._decode_sparsely(wanted) if self._table.times is not None else {}
        return found if found.keys() == wanted else self._decode_nearest(wanted)

    def _decode_sparsely(self, wanted: set[int]) -> dict[int, Any]:
        """Decode only what the wanted frames need; stops at the first run of packets that does not give all of its frames."""
        found: dict[int, Any] = {}
        for start, end, times in self._runs(wanted):
            self._restart()
            self._feed(start, end, wanted, found)
            if not times <= found.keys():
                break
        return found

    def _runs(self, wanted: set[int]) -> list[tuple[int, int, set[int]]]:
        """What to feed: (start, end, wanted time stamps) of packets from a keyframe to the last wanted one before a later keyframe."""
        times, keyframes = self._table.times, self._table.keyframes
        assert times is not None
        position = {time: k for k, time in enumerate(times) if time in wanted}
        runs: list[tuple[int, int, set[int]]] = []
        for time in sorted(wanted):
            keyframe = max(0, bisect.bisect_right(keyframes, time, key=lambda keyframe: keyframe[0]) - 1)
            start, end = keyframes[keyframe][1], position[time] + 1
            if runs and start <= runs[-1][1]:
                start, before, together = runs.pop()
                runs.append((start, max(end, before), together | {time}))
            else:
                runs.append((start, end, {time}))
        return runs

    def _feed(self, start: int, end: int, wanted: set[int], found: dict[int, Any]) -> None:
        """Decode a run of packets, collecting the wanted frames; the decoder hands over those it holds back without any more packets."""
        packets, times = self._table.packets, self._table.times
        assert times is not None
        for position in range(start, end):  # a picture nothing refers to is worth decoding only if it is wanted itself
            self._context.skip_frame = "DEFAULT" if times[position] in wanted or not self._can_skip else "NONREF"
            for frame in self._decode(packets[position]):
                if frame.pts in wanted:
                    found[frame.pts] = frame
        for frame in self._decode(None):
            if frame.pts in wanted:
                found[frame.pts] = frame

    def _decode_nearest(self, wanted: set[int]) -> dict[int, Any]:
        """Full decode of a damaged stream: a lost picture is replaced by the one shown before it, as a player does."""
        pending = sorted(wanted, reverse=True)
        found: dict[int, Any] = {}
        previous = None
        for frame in self._decode_all():
            if frame.pts is None:
                continue
            while pending and pending[-1] <= frame.pts:
                time = pending.pop()
                found[time] = frame if frame.pts == time or previous is None else previous
            previous = frame
            if not pending:
                break
        if previous is not None:
            found.update((time, previous) for time in pending)
        return found

    def _duration(self, count: int) -> float:
        """Seconds; the last frame is given the mean duration of the others."""
        shown = self._table.shown
        if self._table.timed and count > 1:
            return float((shown[-1] - shown[0]) * self._stream.time_base) * count / (count - 1)
        rate = self._stream.average_rate or self._stream.guessed_rate
        return count / (float(rate) if rate else DEFAULT_RATE)

    def _check_complete(self) -> None:
        """Compare what the file promises (index, header) with what it holds."""
        entries = self._stream.index_entries
        reach = max((entry.pos + entry.size for entry in entries), default=0)
        promised = self._stream.frames
        held = len(self._table.packets)
        if (
            (self._table.timed and reach > os.path.getsize(self._file.path))
            or held < promised * (1 - _TOLERATED_LOSS) - 1
            or self._promised_seconds() * (1 - _TOLERATED_LOSS) > self._duration(max(held, 1))
            or self._table.packets[-1].is_corrupt  # the file ends inside it
        ):
            raise self._error("it is truncated: it ends before what its header promises", "copy or download the file again")

    def _promised_seconds(self) -> float:
        """Duration written in a Matroska header, which counts no frames; 0 where it says nothing about the video stream."""
        if "matroska" not in self._container.format.name or len(self._container.streams) > 1 or not self._container.duration:
            return 0.0
        return float(self._container.duration) / av.time_base

    def _nothing_decodes(self) -> DecodeError:
        return self._error("none of its frames can be decoded", "copy or download the file again, or re-encode it with ffmpeg")

    def _error(self, reason: str, remedy: str) -> DecodeError:
        return _decode_error(self.path, reason, remedy)


def decode_frames(path: str | os.PathLike[str], indices: Iterable[int]) -> list[Any]:
    """Decode single frames of a video by position in display order.

    Args:
        path: video file.
        indices: positions from 0, in any order, repeats allowed; one past the end gives the last frame.

    Returns:
        list of ``av.VideoFrame``, one per index.

    Raises:
        DecodeError: the file cannot be decoded; names the file and the remedy.
    """
    with VideoReader(path) as reader:
        return reader.frames(indices)


def decode_rgb(path: str | os.PathLike[str], indices: Iterable[int], short_side: int | None = None) -> np.ndarray:
    """Decode single frames of a video to RGB, upright, optionally resized.

    Args:
        path: video file.
        indices: positions from 0 in display order, at least one; one past the end gives the last frame.
        short_side: pixels of the shorter side after resizing (proportions are kept), or None for the size as stored.

    Returns:
        uint8 ``[T, H, W, 3]``.

    Raises:
        DecodeError: the file cannot be decoded; names the file and the remedy.
    """
    return to_pixels(decode_frames(path, indices), short_side=short_side)


def probe_video(path: str | os.PathLike[str]) -> VideoInfo:
    """Check that a video file can be trained on, and describe it.

    Reads all packets and decodes the first and the last frame (all of them where only a decode can count them).

    Raises:
        DecodeError: the file is missing, empty, truncated, no video, or cannot be decoded; names the file and the remedy.
    """
    with VideoReader(path) as reader:
        return reader.check()


def to_pixels(frames: Sequence[Any], *, short_side: int | None = None, pixel_format: PixelFormat = "rgb24") -> np.ndarray:
    """Convert decoded frames to one array, upright, all in the size of the first; each frame is converted once.

    Pictures get larger by OpenCV (bilinear) after swscale has converted their colours at the stored size, its fast path. They get
    smaller before, by swscale averaging over the area a pixel covers, on the planes of luma and chroma: that takes half of the time of
    averaging RGB (640 x 360 to short side 256, 8 frames: 6.1 ms instead of 11.2), and is nearer to the exact result (0.4 to 0.7 grey
    levels off on average instead of 1.1 to 1.4). Formats other than 8-bit planes are averaged as RGB, as folders of pictures are.

    Args:
        frames: at least one ``av.VideoFrame``.
        short_side: pixels of the shorter side, or None for the size of the first frame.
        pixel_format: "rgb24", or "gray" for the luma alone.

    Returns:
        uint8 ``[T, H, W, 3]``, or ``[T, H, W]`` for "gray".
    """
    width, height = frames[0].width, frames[0].height
    target = scaled_size(width, height, short_side)
    planes = _UNSAMPLED.get(frames[0].format.name) if target[0] < width else None
    shrink, convert = VideoReformatter(), VideoReformatter()  # each keeps its tables from frame to frame
    size = dict(zip(("width", "height"), target if planes else (width, height), strict=True))
    stacked = np.empty((len(frames), target[1], target[0], *([3] if pixel_format == "rgb24" else [])), np.uint8)
    rows: dict[int, int] = {}
    for row, frame in enumerate(frames):
        if rows.setdefault(id(frame), row) < row:
            stacked[row] = stacked[rows[id(frame)]]
        else:
            small = shrink.reformat(frame, **size, format=planes, interpolation=Interpolation.AREA, threads=1) if planes else frame
            resize(convert.reformat(small, **size, format=pixel_format, threads=1).to_ndarray(), target, out=stacked[row])
    turns = _quarter_turns(frames[0])
    return np.ascontiguousarray(np.rot90(stacked, turns, axes=(1, 2))) if turns else stacked


def _quarter_turns(frame: Any) -> int:
    """Counter-clockwise quarter turns that show a frame upright; other angles are left as stored."""
    return round(frame.rotation / 90) % 4 if frame.rotation % 90 == 0 else 0


def _is_described(file: str | os.PathLike[str]) -> bool:
    """Whether a file's container describes its streams in a header."""
    try:
        with open(file, "rb") as content:
            head = content.read(16)
    except OSError:  # whoever opens it next says what is wrong
        return False
    return any(head[place:].startswith(mark) for place, mark in _DESCRIBED)


def _open_container(file: str | os.PathLike[str], path: str, options: Mapping[str, str]) -> Any:
    """Opens ``file`` with further options of FFmpeg; messages call it ``path``."""
    if not os.path.isfile(file):
        raise _decode_error(path, "there is no such file", "check the path, and the folder a manifest's paths are relative to")
    if os.path.getsize(file) == 0:
        raise _decode_error(path, "it is empty (0 bytes)", "copy or download the file again, or leave it out")
    try:
        # "file:" and the whitelist keep odd names from being read as URLs, and playlists from opening network connections.
        return open_container(f"file:{os.fspath(file)}", options={"protocol_whitelist": "file", **options})
    except (av.FFmpegError, ValueError, OSError) as error:
        reason = f"it cannot be opened as a video ({_reason(error)})"
        raise _decode_error(path, reason, "check that it is a whole video file; copy or download it again, or leave it out") from error


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)


def _decode_error(path: str, reason: str, remedy: str) -> DecodeError:
    return DecodeError(f"cannot decode {path!r}: {reason}; {remedy}")
