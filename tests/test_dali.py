"""Clips read by DALI: the frames, views and values that PyAV's path gives, on the CPU where no GPU is here."""

from __future__ import annotations

import runpy
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from amd_fast.data import dali as dali_module
from amd_fast.data.clips import decode_clip
from amd_fast.data.cut import cut_stream
from amd_fast.data.dali import PIXEL_TOLERANCE, ClipJob, DaliDecoder
from amd_fast.data.dali_graph import load_dali
from amd_fast.data.decode import VideoReader
from amd_fast.data.decoders import dali_installed
from amd_fast.data.sampling import segment_indices
from amd_fast.data.views import FLOW_UNIT, IMAGENET_STD, RESIZE_RATIO, ClipTransform, View
from amd_fast.errors import DataError, DecodeError, ImplementationError

MADE = runpy.run_path(str(Path(__file__).with_name("made_videos.py")))
video, write_video = MADE["video"], MADE["write_video"]
needs_dali = pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")
SIZE = 56
NAMES = ["vp9_webm", "vp9_hidden", "vp8_webm", "mjpeg_avi"]


def by_pyav(path: Path, transform: ClipTransform, frames: int, rng: np.random.Generator | None, **extra: Path) -> dict[str, Tensor]:
    short_side = round(transform.size * RESIZE_RATIO)
    raw = decode_clip(path, frames, short_side=short_side, modalities=transform.modalities, rng=rng, extra=extra)
    return transform(raw, rng)


def grey_levels(difference: Tensor) -> float:
    return float((difference * torch.from_numpy(255 * IMAGENET_STD).view(3, 1, 1)).abs().mean())


@needs_dali
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [False, True])
def test_pixels_agree_with_pyav(name: str, train: bool) -> None:
    """The same frames, crop and mirroring: a frame or a pixel off, or no mirroring, is several times the tolerance."""
    transform = ClipTransform(SIZE, ("rgb",), train=train, flip=True, scale=(0.5, 0.9))
    seeds = range(6) if train else [None]
    with DaliDecoder(("rgb",), 5, SIZE, threads=1) as decoder:
        clips = decoder.load([ClipJob(video(name), transform, None if seed is None else np.random.default_rng(seed)) for seed in seeds])
    for seed, clip in zip(seeds, clips, strict=True):
        expected = by_pyav(video(name), transform, 5, None if seed is None else np.random.default_rng(seed))["rgb"]
        assert clip["rgb"].shape == expected.shape
        assert clip["rgb"].dtype == torch.float32
        assert grey_levels(clip["rgb"] - expected) <= PIXEL_TOLERANCE
        assert grey_levels(clip["rgb"].flip(-1) - expected) > 4 * PIXEL_TOLERANCE
        assert grey_levels(clip["rgb"].roll(1, 0) - expected) > 4 * PIXEL_TOLERANCE


@needs_dali
def test_colours_change_as_in_pyav() -> None:
    transform = ClipTransform(SIZE, ("rgb",), train=True, colour=0.4)
    seeds = range(12)
    with DaliDecoder(("rgb",), 3, SIZE, threads=1) as decoder:
        clips = decoder.load([ClipJob(video("mjpeg_avi"), transform, np.random.default_rng(seed)) for seed in seeds])
    greys = set()
    for seed, clip in zip(seeds, clips, strict=True):
        expected = by_pyav(video("mjpeg_avi"), transform, 3, np.random.default_rng(seed))["rgb"]
        assert grey_levels(clip["rgb"] - expected) <= 2 * PIXEL_TOLERANCE  # a gain multiplies the difference too
        greys.add(bool(expected.std(1).max() < 1e-4))
        assert (clip["rgb"].std(1).max() < 1e-4) == (expected.std(1).max() < 1e-4)
    assert greys == {True, False}


@needs_dali
@pytest.mark.parametrize("space", [1, 5, 7, 9])
def test_colours_of_other_standards_are_those_of_pyav(tmp_path: Path, space: int) -> None:
    """BT.709, BT.601, SMPTE 240M, BT.2020. DALI takes all for BT.601; one that is, beside them, stays what it is."""
    path = write_tagged(tmp_path / "tagged.webm", space)
    transform = ClipTransform(SIZE, ("rgb", "flow"), train=False)
    with DaliDecoder(("rgb", "flow"), 4, SIZE, threads=1) as decoder:
        (plain,) = decoder.load([ClipJob(video("vp9_webm"), transform)])
        tagged, beside = decoder.load([ClipJob(file, transform) for file in (path, video("vp9_webm"))])
    expected = by_pyav(path, transform, 4, None)["rgb"]
    assert grey_levels(tagged["rgb"] - expected) <= 2.0
    assert all(torch.equal(plain[name], beside[name]) for name in plain)


def write_tagged(path: Path, space: int) -> Path:
    """Coloured patches, so that a wrong matrix shows."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=25, options={"deadline": "realtime", "cpu-used": "8"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 128, 96, "yuv420p", 4_000_000
        stream.codec_context.colorspace = space
        for k in range(8):
            patches = np.random.default_rng(k).integers(20, 236, (3, 4, 3), dtype=np.uint8)
            picture = np.ascontiguousarray(patches.repeat(32, 0).repeat(32, 1))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=space)))
        container.mux(stream.encode(None))
    return path


@needs_dali
@pytest.mark.parametrize("train", [False, True])
def test_flow_agrees_with_pyav(tmp_path: Path, train: bool) -> None:
    """A texture that moves 3 pixels to the right and 2 up a frame."""
    path = write_moving(tmp_path / "moving.avi")
    transform = ClipTransform(64, ("rgb", "flow"), train=train, flip=True, scale=(0.6, 0.9), speed=2.0)
    signs = set()
    with DaliDecoder(("rgb", "flow"), 4, 64, threads=1) as decoder:
        for seed in range(5):
            (clip,) = decoder.load([ClipJob(path, transform, np.random.default_rng(seed) if train else None)])
            expected = by_pyav(path, transform, 4, np.random.default_rng(seed) if train else None)
            middle = [shown["flow"][:, :, 12:-12, 12:-12].flatten(2).median(-1).values.mean(0) for shown in (clip, expected)]
            torch.testing.assert_close(middle[0], middle[1], atol=0.12, rtol=0.05)
            assert clip["flow"].shape == expected["flow"].shape == (4, 2, 64, 64)
            signs.add(float(middle[0][0].sign()))
            assert middle[0][1] < 0
    assert signs == ({1.0, -1.0} if train else {1.0})


def write_moving(path: Path, codec: str = "mjpeg", pixel_format: str = "yuvj420p", width: int = 128, height: int = 96) -> Path:
    noise = cv2.GaussianBlur(np.random.default_rng(0).random((height + 104, width + 132, 3)).astype(np.float32), (0, 0), 3)
    wide = (255 * (noise - noise.min()) / np.ptp(noise)).astype(np.uint8)

    def show(k: int, *_: int) -> np.ndarray:
        return np.ascontiguousarray(wide[20 + 2 * k : 20 + height + 2 * k, 120 - 3 * k : 120 + width - 3 * k])

    return write_video(path, codec, 30, pixel_format=pixel_format, width=width, height=height, show=show)


def test_vectors_become_units_of_the_picture() -> None:
    """From a coarse grid as well, mirrored with the sign of x, faster by the view's factor, clipped."""
    vectors = torch.tensor([4.0, -2.0]).expand(2, 14, 14, 2)
    view = View(64, 64, 0, 0, 64, mirrored=True, speed=1.5)
    units = dali_module._flow_units(vectors, view, SIZE)
    assert units.shape == (2, 2, SIZE, SIZE)
    torch.testing.assert_close(units[:, 0], torch.full((2, SIZE, SIZE), -4.0 / (FLOW_UNIT * SIZE) * 1.5))
    torch.testing.assert_close(units[:, 1], torch.full((2, SIZE, SIZE), -2.0 / (FLOW_UNIT * SIZE) * 1.5))
    assert dali_module._flow_units(100 * vectors, view, SIZE).abs().max() == 5 * 1.5


@needs_dali
def test_a_cut_stream_decodes_like_the_whole_file() -> None:
    """DALI itself, with nothing of ours but the cut."""
    dali, fn, types = load_dali()

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        data, frames = (
            fn.external_source(name=name, dtype=kind, ndim=1) for name, kind in (("data", types.UINT8), ("frames", types.INT32))
        )
        return fn.decoders.video(data, frames=frames, pad_mode="none")

    pipeline = graph()

    def decoded(data: bytes, frames: np.ndarray) -> np.ndarray:
        pipeline.feed_input("data", [np.frombuffer(data, np.uint8)])
        pipeline.feed_input("frames", [frames.astype(np.int32)])
        return np.array(pipeline.run()[0].at(0))

    for name in NAMES:
        wanted = np.array([3, 11, 12, 25, 39])
        with VideoReader(video(name)) as reader:
            stream = cut_stream(reader, wanted)
        np.testing.assert_array_equal(decoded(stream.data, stream.frames), decoded(video(name).read_bytes(), wanted))


@needs_dali
def test_short_clips_and_further_modalities(tmp_path: Path) -> None:
    thermal = tmp_path / "t.npy"
    np.save(thermal, np.random.default_rng(0).normal(20, 2, (9, 24, 32)).astype(np.float32))
    for frames in (1, 3):
        path = write_video(tmp_path / f"{frames}.webm", "libvpx-vp9", frames, options={"deadline": "realtime", "cpu-used": "8"})
        transform = ClipTransform(SIZE, ("thermal", "rgb", "flow"), train=False)
        with DaliDecoder(transform.modalities, 8, SIZE, threads=1) as decoder:
            (clip,) = decoder.load([ClipJob(path, transform, extra={"thermal": thermal})])
        expected = by_pyav(path, transform, 8, None, thermal=thermal)
        assert list(clip) == ["thermal", "rgb", "flow"]
        assert grey_levels(clip["rgb"] - expected["rgb"]) <= PIXEL_TOLERANCE
        torch.testing.assert_close(clip["thermal"], expected["thermal"])
        assert (clip["flow"].abs().max() == 0) == (frames == 1)


@needs_dali
def test_a_bad_clip_is_named_and_leaves_the_others_alone(tmp_path: Path) -> None:
    """A file that is no video is found by opening it, a damaged picture by decoding its batch again, clip by clip."""
    text, missing, damaged = tmp_path / "text.webm", tmp_path / "missing.webm", tmp_path / "damaged.webm"
    text.write_text("This is not a video.\n" * 50)
    data = bytearray(video("vp9_webm").read_bytes())
    with VideoReader(video("vp9_webm")) as reader:
        packet = reader.table.packets[0]
        data[packet.pos + 8 : packet.pos + packet.size] = b"\xff" * (packet.size - 8)
    damaged.write_bytes(data)
    transform = ClipTransform(SIZE, ("rgb",), train=False)
    good = ClipJob(video("vp9_webm"), transform)
    with DaliDecoder(("rgb",), 4, SIZE, threads=1, batch_size=3) as decoder:
        (alone,) = decoder.load([good])
        paths = (video("vp9_webm"), text, damaged, video("vp9_webm"), missing, video("h264_b"), video("vp9_webm"))
        clips = decoder.load([ClipJob(path, transform) for path in paths])
        again = decoder.load([good])
    for place in (0, 3, 6):
        torch.testing.assert_close(clips[place]["rgb"], alone["rgb"])
    torch.testing.assert_close(again[0]["rgb"], alone["rgb"])
    for place, path, reason in ((1, text, "opened"), (2, damaged, "DALI"), (4, missing, "no such file"), (5, video("h264_b"), "not h264")):
        assert isinstance(clips[place], DecodeError)
        assert str(path) in str(clips[place])
        assert reason in str(clips[place])


@needs_dali
def test_what_dali_would_show_otherwise_is_refused(tmp_path: Path) -> None:
    turned = write_video(tmp_path / "turned.mp4", "mjpeg", 4, rotation=90, pixel_format="yuvj420p")
    folder = tmp_path / "frames"
    folder.mkdir()
    for k in range(3):
        cv2.imwrite(str(folder / f"img_{k:05d}.jpg"), np.full((40, 50, 3), 90, np.uint8))
    transform = ClipTransform(SIZE, ("rgb",), train=False)
    with DaliDecoder(("rgb",), 4, SIZE, threads=1) as decoder:
        clips = decoder.load([ClipJob(turned, transform), ClipJob(folder, transform)])
    for clip, reason in zip(clips, ("turned", "no video file"), strict=True):
        assert isinstance(clip, DataError)
        assert reason in str(clip)
        assert "decoder='auto'" in str(clip)


def test_asked_for_without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amd_fast.data.decoders.dali_installed", lambda: False)
    with pytest.raises(ImplementationError, match=r"not installed.*pip install"):
        DaliDecoder(("rgb",), 4, SIZE)


# ------------------------------------------------------------------------------------------------------------ on a GPU


@needs_dali
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["h264_b", "h264_open_gop", "hevc", "hevc_open_gop", "mpeg4_avi", "mpeg4_avi_b", "vp9_webm"])
def test_frames_on_a_gpu(name: str) -> None:
    """The pictures of PyAV, or a refusal where 128 x 96 is too small for the GPU's decoder; larger ones are in the codec matrix."""
    path = video(name)
    transform = ClipTransform(84, ("rgb",), train=False, resize_ratio=1.0)
    with DaliDecoder(("rgb",), 8, 84, device="cuda") as decoder:
        for seed in range(4):
            (clip,) = decoder.load([ClipJob(path, transform, np.random.default_rng(seed))])
            if name.startswith(("hevc", "vp9")) and isinstance(clip, DecodeError):
                assert "its pictures are 128 x 96, and this GPU's video decoder takes" in str(clip)
                continue
            assert isinstance(clip, dict), clip
            index = segment_indices(40, 8, np.random.default_rng(seed))
            expected = by_pyav(path, transform, 8, np.random.default_rng(seed))["rgb"]
            assert clip["rgb"].is_cuda
            assert len(index) == len(clip["rgb"])
            assert grey_levels(clip["rgb"].cpu() - expected) <= PIXEL_TOLERANCE


@needs_dali
@pytest.mark.gpu
def test_flow_of_the_optical_flow_engine(tmp_path: Path) -> None:
    """Its sign and its unit: 3 pixels to the right and 2 up a frame, in pictures of 192 pixels of which 7/8 are shown."""
    path = write_moving(tmp_path / "moving.mp4", "libx264", "yuv420p", 256, 192)
    transform = ClipTransform(224, ("flow",), train=False)
    with DaliDecoder(("flow",), 4, 224, device="cuda") as decoder:
        (clip,) = decoder.load([ClipJob(path, transform)])
    assert isinstance(clip, dict), clip
    middle = clip["flow"][:, :, 40:-40, 40:-40].flatten(2).median(-1).values.mean(0).cpu()
    torch.testing.assert_close(middle, torch.tensor([3.0, -2.0]) / 192 * RESIZE_RATIO * 56, atol=0.15, rtol=0)
