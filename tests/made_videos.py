"""Videos made for tests, with each frame's number written into its picture; tests take it through ``runpy``."""

from __future__ import annotations

import atexit
import functools
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from amd_fast.data.containers import open_container

BITS = 8


def picture(index: int, width: int = 128, height: int = 96) -> np.ndarray:
    """A moving texture with the frame's number written as eight black or white blocks along the upper edge."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = [np.sin((x + 3 * index) / 9 + channel) * np.cos((y - 2 * index) / 11 - channel) for channel in range(3)]
    image = (127 + 90 * np.stack(waves, axis=-1)).astype(np.uint8)
    block = width // BITS
    for bit in range(BITS):
        image[:24, bit * block : (bit + 1) * block] = 255 if index >> bit & 1 else 0
    return image


def number(image: np.ndarray) -> int:
    """Read the frame's number back from a grey or RGB picture."""
    grey = image if image.ndim == 2 else image.mean(axis=2)
    block = grey.shape[1] / BITS
    rows = slice(0, round(grey.shape[0] / 4) - 4)
    return sum(int(grey[rows, round((bit + 0.3) * block) : round((bit + 0.7) * block)].mean() > 127) << bit for bit in range(BITS))


@contextmanager
def ordinary_priority() -> Iterator[None]:
    """Takes back what SVT-AV1 does where root runs it: the calling thread, and all that it starts later, at real-time priority.

    Two such test workers that wait for each other's time stop a machine of two cores.
    """
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameter)


def write_video(
    path: Path,
    codec: str = "libx264",
    frames: int = 40,
    *,
    width: int = 128,
    height: int = 96,
    times: list[int] | None = None,
    rotation: int = 0,
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    show: Callable[[int, int, int], np.ndarray] = picture,
) -> Path:
    with ordinary_priority(), av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options={"g": "12", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.thread_count = 1
        if codec != "mjpeg":
            stream.bit_rate = 1_500_000
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 25)
        if rotation:
            stream.set_display_rotation(rotation)
        for k in range(frames):
            frame = av.VideoFrame.from_ndarray(show(k, width, height), format="rgb24")
            frame.pts = k if times is None else times[k]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remux(source: Path, target: Path, change: Callable[[int, av.Packet], av.Packet | None], **container_options: str) -> Path:
    with av.open(str(source)) as reader, av.open(str(target), "w", options=container_options) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        packets = [packet for packet in reader.demux(video=0) if packet.size]
        for k, packet in enumerate(packets):
            if (changed := change(k, packet)) is not None:
                changed.stream = stream
                writer.mux(changed)
    return target


def pack_b_frames(source: Path, target: Path) -> Path:
    """What DivX does and HMDB51 holds: a B-picture rides in the packet of the anchor before it, an empty picture takes its place."""
    divx = b"\x00\x00\x01\xb2DivX503b1393p"
    empty = b"\x00\x00\x01\xb6\x56\x00\x0a\x7f"
    start = b"\x00\x00\x01\xb6"
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        data = [(bytes(packet), packet.is_keyframe) for packet in reader.demux(video=0) if packet.size]
        out: list[tuple[bytes, bool]] = []
        for content, key in data:
            is_b = content[content.find(start) + 4] >> 6 == 2
            if is_b:
                out[-1] = (out[-1][0] + content, out[-1][1])
                out.append((empty, False))
            else:
                out.append((content, key))
        # The user data goes before the first picture; one packet more than pictures, as in the real files.
        first = out[0][0]
        out[0] = (first[: first.find(start)] + divx + first[first.find(start) :], True)
        out.insert(1, (b"\x7f", True))
        for k, (content, key) in enumerate(out):
            packet = av.Packet(content)
            packet.pts = packet.dts = k
            packet.time_base = Fraction(1, 25)
            packet.is_keyframe = key
            packet.stream = stream
            writer.mux(packet)
    return target


def _irregular(count: int) -> list[int]:
    return np.cumsum(np.random.default_rng(5).integers(1, 7, count)).tolist()


def _from_avi_to_mkv(folder: Path) -> Path:
    """Decoding times in disguise: an AVI with B-pictures whose packets were copied with time stamps in storage order."""
    source = write_video(folder / "b.avi", "mpeg4", options={"bf": "2"})

    def in_storage_order(k: int, packet: av.Packet) -> av.Packet:
        packet.pts = packet.dts = k
        return packet

    return remux(source, folder / "copied.mkv", in_storage_order)


def _edit_list(folder: Path) -> Path:
    """Frames before the start of the edit list are decoded and never shown."""
    source = write_video(folder / "whole.mp4")

    def five_earlier(k: int, packet: av.Packet) -> av.Packet:
        packet.pts -= round(5 / 25 / packet.time_base)
        packet.dts -= round(5 / 25 / packet.time_base)
        return packet

    return remux(source, folder / "edited.mp4", five_earlier, avoid_negative_ts="disabled")


def _starts_inside(folder: Path) -> Path:
    """The first packets, keyframe included, are gone."""
    source = write_video(folder / "w.mp4", options={"bf": "2"})
    return remux(source, folder / "inside.mkv", lambda k, packet: packet if k >= 5 else None)


_VP9_FAST = {"deadline": "realtime", "cpu-used": "8"}

VIDEOS: dict[str, Callable[[Path], Path]] = {
    "h264_b": lambda d: write_video(d / "v.mp4", options={"bf": "3"}),
    "h264_pyramid_mkv": lambda d: write_video(d / "v.mkv", options={"bf": "5", "b-pyramid": "normal", "g": "30"}),
    "h264_open_gop": lambda d: write_video(d / "v.mp4", options={"bf": "3", "x264-params": "open-gop=1:keyint=9:min-keyint=9:scenecut=0"}),
    "h264_intra_refresh": lambda d: write_video(d / "v.mp4", options={"x264-params": "intra-refresh=1:keyint=10", "g": "10"}),
    "h264_no_b": lambda d: write_video(d / "v.mp4", options={"bf": "0"}),
    "h264_avi": lambda d: write_video(d / "v.avi", options={"bf": "2"}),
    "h264_ts": lambda d: write_video(d / "v.ts", options={"bf": "2"}),
    "h264_odd_444": lambda d: write_video(d / "v.mp4", width=133, height=99, pixel_format="yuv444p"),
    "h264_variable_rate": lambda d: write_video(d / "v.mp4", times=_irregular(40)),
    "h264_short": lambda d: write_video(d / "v.mp4", frames=3),
    "h264_single": lambda d: write_video(d / "v.mp4", frames=1),
    "hevc": lambda d: write_video(d / "v.mp4", "libx265", options={"x265-params": "log-level=none:keyint=12:pools=none:frame-threads=1"}),
    "hevc_open_gop": lambda d: write_video(
        d / "v.mkv", "libx265", options={"x265-params": "log-level=none:keyint=9:min-keyint=9:open-gop=1:scenecut=0:bframes=3:pools=none"}
    ),
    "hevc_10_bit": lambda d: write_video(
        d / "v.mp4", "libx265", pixel_format="yuv420p10le", options={"x265-params": "log-level=none:keyint=12:pools=none:frame-threads=1"}
    ),
    "mpeg4_avi": lambda d: write_video(d / "v.avi", "mpeg4"),
    "mpeg4_avi_b": lambda d: write_video(d / "v.avi", "mpeg4", options={"bf": "2"}),
    "mpeg4_avi_packed": lambda d: pack_b_frames(write_video(d / "b.avi", "mpeg4", options={"bf": "1"}), d / "v.avi"),
    "mpeg4_mp4_b": lambda d: write_video(d / "v.mp4", "mpeg4", options={"bf": "2"}),
    "mpeg4_copied": _from_avi_to_mkv,
    "mpeg2_b": lambda d: write_video(d / "v.mkv", "mpeg2video", options={"bf": "2"}),
    "mjpeg_avi": lambda d: write_video(d / "v.avi", "mjpeg", pixel_format="yuvj420p"),
    "ffv1_mkv": lambda d: write_video(d / "v.mkv", "ffv1"),
    "vp9_webm": lambda d: write_video(d / "v.webm", "libvpx-vp9", options={**_VP9_FAST, "auto-alt-ref": "0"}),
    "vp9_hidden": lambda d: write_video(d / "v.webm", "libvpx-vp9", options=_VP9_FAST),  # some packets hold a picture that is not shown
    "vp8_webm": lambda d: write_video(d / "v.webm", "libvpx", options=_VP9_FAST),
    "av1_mkv": lambda d: write_video(d / "v.mkv", "libsvtav1", options={"preset": "12", "svtav1-params": "lp=1"}),
    "edit_list": _edit_list,
    "starts_inside": _starts_inside,
}
# The numbers of the frames shown, where they are not 0 to 39.
SHOWN = {"h264_short": range(3), "h264_single": range(1), "edit_list": range(5, 40)}


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="amd_fast_videos_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def video(name: str) -> Path:
    """One of ``VIDEOS``, made once."""
    folder = _folder() / name
    folder.mkdir()
    return VIDEOS[name](folder)


def linear_frames(source: Path | io.BytesIO) -> list[np.ndarray]:
    """The oracle: decode everything in order with PyAV and nothing of ours."""
    with open_container(source if isinstance(source, io.BytesIO) else str(source)) as container:
        container.streams.video[0].thread_type = "NONE"
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


linear = functools.cache(linear_frames)
