"""Codec x container x decoder: each clip decodes to the right frames, or is refused with the reason.

Every picture has its number written into it. The oracle is a full decode with PyAV and nothing of ours.
"""

from __future__ import annotations

import io
import itertools
import os
import runpy
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from amd_fast.data.clips import decode_clip
from amd_fast.data.cut import cut_stream
from amd_fast.data.dali import ClipJob, DaliDecoder
from amd_fast.data.decode import VideoReader, decode_frames, probe_video
from amd_fast.data.decoders import CPU_CODECS, dali_installed
from amd_fast.data.sampling import segment_indices
from amd_fast.data.views import IMAGENET_MEAN, IMAGENET_STD, ClipTransform
from amd_fast.errors import DecodeError

MADE = runpy.run_path(str(Path(__file__).with_name("made_videos.py")))
linear, linear_frames, number, pack_b_frames, picture, write_video = (
    MADE[name] for name in ("linear", "linear_frames", "number", "pack_b_frames", "picture", "write_video")
)
FRAMES, SIDE = 24, 96
GPU_SIDE = 256  # NVDEC decodes some codecs from 128 or 144 pixels on
X265 = "log-level=none:keyint=8:min-keyint=8:bframes=2:scenecut=0:pools=none:frame-threads=1"
ENCODERS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"g": "8", "bf": "2"}),
    "hevc": ("libx265", {"x265-params": X265}),
    "vp8": ("libvpx", {"g": "8", "deadline": "realtime", "cpu-used": "8"}),
    "vp9": ("libvpx-vp9", {"g": "8", "deadline": "realtime", "cpu-used": "8"}),
    "av1": ("libsvtav1", {"g": "8", "preset": "12", "svtav1-params": "lp=1"}),
    "mpeg4": ("mpeg4", {"g": "8"}),
    "mjpeg": ("mjpeg", {}),
}
CONTAINERS = {
    "h264": ("mp4", "mkv", "avi"),
    "hevc": ("mp4", "mkv"),
    "vp8": ("webm",),
    "vp9": ("webm", "mp4"),
    "av1": ("mp4", "webm"),
    "mpeg4": ("avi", "mp4"),
    "mjpeg": ("avi", "mp4", "mkv"),
}
# No presentation times; or too few frames for a codec that reorders them to show that they are in order of display.
ORDER_UNKNOWN = ("h264 avi", "hevc mp4 3 frames")
IRREGULAR = np.cumsum(np.random.default_rng(5).integers(1, 7, FRAMES)).tolist()


def encoded(codec: str, container: str, frames: int = FRAMES, **settings: object) -> Callable[[Path], Path]:
    encoder, options = ENCODERS[codec]
    arguments = {"width": SIDE, "height": SIDE, "pixel_format": "yuvj420p" if codec == "mjpeg" else "yuv420p"} | settings
    if codec == "hevc" and frames < 3:
        # x265 computes decoding times from a member that it sets with the third picture: before, they are whatever lay in memory.
        options = {"x265-params": X265.replace("bframes=2", "bframes=0")}
    arguments["options"] = {**options, **arguments.pop("options", {})}

    def write(folder: Path, side: int = SIDE) -> Path:
        grown = {name: arguments[name] + side - SIDE for name in ("width", "height") if arguments[name] >= SIDE}
        return write_video(folder / f"v.{container}", encoder, frames, **{**arguments, **grown}, show=enlarged)

    return write


def enlarged(index: int, width: int, height: int) -> np.ndarray:
    """A picture whose number takes the same share of it, however large it is."""
    if height < 2 * SIDE:
        return picture(index, width, height)
    return np.ascontiguousarray(cv2.resize(picture(index, width // 2, height // 2), (width, height), interpolation=cv2.INTER_NEAREST))


def packed(folder: Path, side: int = SIDE) -> Path:
    return pack_b_frames(encoded("mpeg4", "avi", options={"bf": "1"})(folder, side), folder / "packed.avi")


CLIPS: dict[str, Callable[..., Path]] = {
    **{f"{codec} {container}": encoded(codec, container) for codec in CONTAINERS for container in CONTAINERS[codec]},
    "mpeg4 avi B": encoded("mpeg4", "avi", options={"bf": "2"}),
    "mpeg4 avi packed B": packed,
    **{f"{codec} {container} variable": encoded(codec, container, times=IRREGULAR)
       for codec, container in (("h264", "mp4"), ("hevc", "mkv"), ("vp9", "webm"), ("av1", "webm"), ("mjpeg", "mkv"))},
    **{f"{codec} mp4 turned": encoded(codec, "mp4", rotation=90) for codec in ("h264", "hevc", "vp9", "mjpeg")},
    **{f"{codec} {container} 10 bit": encoded(codec, container, pixel_format="yuv420p10le")
       for codec, container in (("h264", "mp4"), ("hevc", "mp4"), ("av1", "webm"))},
    **{f"{codec} {container} odd": encoded(codec, container, width=99, height=97)
       for codec, container in (("vp9", "webm"), ("mjpeg", "avi"), ("mpeg4", "avi"))},
    "h264 mkv odd": encoded("h264", "mkv", width=99, height=97, pixel_format="yuv444p"),
    "hevc mkv odd": encoded("hevc", "mkv", width=99, height=97, pixel_format="yuv444p"),
    **{f"{codec} {CONTAINERS[codec][0]} {n} frames": encoded(codec, CONTAINERS[codec][0], n) for codec in CONTAINERS for n in (1, 3)},
}  # fmt: skip


@cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="amd_fast_matrix_")


@cache
def clip(name: str, side: int = SIDE) -> Path:
    place = Path(folder().name, f"{name.replace(' ', '_')}_{side}")
    place.mkdir()
    return CLIPS[name](place, side)


def turned(name: str) -> bool:
    return "turned" in name


@pytest.mark.parametrize("name", CLIPS)
def test_pyav(name: str) -> None:
    """Every frame, alone and sampled, to the last bit of the full decode."""
    path, expected = clip(name), linear(clip(name))
    count = int(name.split()[2]) if name.endswith("frames") else FRAMES
    assert [number(image) for image in expected] == list(range(count))
    info = probe_video(path)
    assert (info.frames, info.codec) == (count, name.split()[0])
    for indices in (*([i] for i in range(0, count, 5)), [count - 1, count + 9], segment_indices(count, 8).tolist()):
        for index, frame in zip(indices, decode_frames(path, indices), strict=True):
            np.testing.assert_array_equal(frame.to_ndarray(format="gray"), expected[min(index, count - 1)])
    upright = decode_clip(path, 8, short_side=72, modalities=("rgb",))["rgb"]
    shown = np.rot90(upright, -1, axes=(1, 2)) if turned(name) else upright
    assert [number(image) for image in shown] == segment_indices(count, 8).tolist()


@pytest.mark.parametrize("name", CLIPS)
def test_cut_for_dali(name: str) -> None:
    """Cut without decoding: the same pictures. An order of display that only a decoder knows is not guessed."""
    expected = linear(clip(name))
    refused = name in ORDER_UNKNOWN
    for indices in ([0], [len(expected) - 1], segment_indices(len(expected), 8, np.random.default_rng(3)).tolist()):
        with VideoReader(clip(name)) as reader:
            stream = cut_stream(reader, indices)
        if refused:
            assert stream is None
            continue
        decoded = linear_frames(io.BytesIO(stream.data))
        for place, index in zip(stream.frames, indices, strict=True):
            np.testing.assert_array_equal(decoded[place], expected[index])


@pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")
def test_dali_on_the_cpu() -> None:
    """It reads three codecs; of the others each is named with the reason, and those beside it in the batch are read."""
    transform = ClipTransform(SIDE, ("rgb",), train=False, resize_ratio=1.0)
    with DaliDecoder(("rgb",), 8, SIDE, threads=1) as decoder:
        results = dict(zip(CLIPS, decoder.load([ClipJob(clip(name), transform) for name in CLIPS]), strict=True))
    for name, result in results.items():
        codec = name.split()[0]
        if codec in CPU_CODECS and not turned(name):
            assert numbers(result) == segment_indices(len(linear(clip(name))), 8).tolist(), name
        else:
            assert isinstance(result, DecodeError), name
            assert str(clip(name)) in str(result)
            assert ("turned" if codec in CPU_CODECS else f"not {codec}") in str(result)


def numbers(result: dict[str, torch.Tensor] | DecodeError) -> list[int]:
    assert isinstance(result, dict), result
    mean, std = (torch.from_numpy(255 * values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return [number(shown) for shown in (result["rgb"].cpu() * std + mean).permute(0, 2, 3, 1).numpy()]


# What every GPU with a video decoder takes. Of the others, some read some: 10 bits, VP9, AV1.
SURE = [f"{codec} {container}" for codec in ("h264", "mpeg4") for container in ("mp4", "mkv", "avi")]


@pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")
@pytest.mark.gpu
def test_dali_on_a_gpu() -> None:
    """All in one batch: the right frames, or a refusal that names the clip and the reason before anything is decoded."""
    transform = ClipTransform(SIDE, ("rgb",), train=False, resize_ratio=1.0)
    paths = {name: clip(name, GPU_SIDE) for name in CLIPS}
    with DaliDecoder(("rgb",), 8, SIDE, device="cuda") as decoder:
        results = dict(zip(CLIPS, decoder.load([ClipJob(path, transform) for path in paths.values()]), strict=True))
    assert_right_or_refused(results, paths)
    for name in set(SURE) & set(CLIPS) - set(ORDER_UNKNOWN):
        assert isinstance(results[name], dict), results[name]


def assert_right_or_refused(results: dict[str, dict[str, torch.Tensor] | DecodeError], paths: dict[str, Path]) -> None:
    reasons = ("turned", "order of its frames", "not shown", "odd sizes", "does not decode", "does not take", "takes")
    for name, result in results.items():
        if isinstance(result, DecodeError):
            assert str(paths[name]) in str(result)
            assert any(reason in str(result) for reason in reasons), result
        else:
            assert not turned(name), name
            assert numbers(result) == segment_indices(len(linear(paths[name])), 8).tolist(), name


def test_an_hour_of_video(tmp_path: Path) -> None:
    """90 000 frames, made of one group of pictures shown 375 times: any frame is reached without decoding those before it.

    The reader needs the compressed file in memory, and less than a kilobyte per frame besides.
    """
    period, times = 240, 375
    path = tmp_path / "hour.mp4"
    with av.open(str(encoded("h264", "mp4", period, width=32, height=32)(tmp_path))) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        contents = [bytes(packet) for packet in packets]
        tick = round(1 / 25 / packets[0].time_base)
        for n, (old, content) in itertools.product(range(times), zip(packets, contents, strict=True)):
            packet = av.Packet(content)
            packet.pts, packet.dts = old.pts + n * period * tick, old.dts + n * period * tick
            packet.time_base, packet.is_keyframe, packet.stream = old.time_base, old.is_keyframe, stream
            target.mux(packet)
    before = _resident()
    with VideoReader(path) as reader:
        assert reader.frame_count == period * times
        wanted = [0, 45_001, 71_234, period * times - 1, period * times + 5]
        frames = reader.frames(wanted)
        expected = [min(index, period * times - 1) % period for index in wanted]
        assert [number(frame.to_ndarray(format="gray")) for frame in frames] == expected
        if before:
            assert _resident() - before < path.stat().st_size + 1000 * period * times
        cut = cut_stream(reader, wanted)
    assert cut.packets < 60
    shown = linear_frames(io.BytesIO(cut.data))
    assert [number(shown[place]) for place in cut.frames] == expected


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
