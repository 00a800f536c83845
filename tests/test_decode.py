"""Frame-exact decoding against a full linear decode, on files written here and, where present, on real clips."""

from __future__ import annotations

import runpy
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amd_fast.data import decode as decode_module
from amd_fast.data.decode import VideoReader, decode_frames, decode_rgb, probe_video
from amd_fast.data.packets import display_ranks
from amd_fast.data.sampling import segment_indices
from amd_fast.errors import DecodeError

MADE = runpy.run_path(str(Path(__file__).with_name("made_videos.py")))
VIDEOS, SHOWN, linear, linear_frames, number, video, write_video = (
    MADE["VIDEOS"],
    MADE["SHOWN"],
    MADE["linear"],
    MADE["linear_frames"],
    MADE["number"],
    MADE["video"],
    MADE["write_video"],
)
REAL = Path(__file__).parents[2] / "shared" / "data" / "clips"
REAL_CLIPS = sorted(REAL.iterdir()) if REAL.is_dir() else []


def assert_exact(path: Path, indices: list[int], expected: list[np.ndarray]) -> None:
    decoded = decode_frames(path, indices)
    assert len(decoded) == len(indices)
    for index, frame in zip(indices, decoded, strict=True):
        reference = expected[min(index, len(expected) - 1)]
        np.testing.assert_array_equal(frame.to_ndarray(format="gray"), reference, err_msg=f"{path} frame {index}")


# --------------------------------------------------------------------------------------------------- frame exactness


@pytest.mark.parametrize("name", VIDEOS)
def test_every_frame_alone_and_all_together(name: str) -> None:
    path, expected = video(name), linear(video(name))
    if name != "starts_inside":
        assert [number(image) for image in expected] == list(SHOWN.get(name, range(40)))
    assert_exact(path, list(range(len(expected))), expected)
    for index in (*range(0, len(expected), 7), len(expected) - 1, len(expected), len(expected) + 50):
        assert_exact(path, [index], expected)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(VIDEOS)), indices=st.lists(st.integers(0, 45), min_size=1, max_size=10))
def test_any_set_of_indices(name: str, indices: list[int]) -> None:
    assert_exact(video(name), indices, linear(video(name)))


SPARSE = [
    "h264_b",
    "h264_pyramid_mkv",
    "h264_variable_rate",
    "mpeg4_avi",
    "mpeg4_avi_b",
    "mpeg4_avi_packed",
    "vp9_webm",
    "vp9_hidden",
    "av1_mkv",
    "edit_list",
]


@pytest.mark.parametrize("name", SPARSE)
def test_common_files_are_read_sparsely(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These never need a full decode; a change that falls back to one would go unnoticed otherwise."""
    monkeypatch.setattr(VideoReader, "_decode_all", lambda self: pytest.fail("decoded everything"))
    assert_exact(video(name), [1, 17, 33], linear(video(name)))


def opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The options that a reader opens a file with, one entry per time it does."""
    calls: list[dict[str, str]] = []
    av_open = av.open
    with monkeypatch.context() as patch:
        patch.setattr(decode_module.av, "open", lambda *args, **named: calls.append(named["options"]) or av_open(*args, **named))
        VideoReader(path).close()
    return calls


@pytest.mark.parametrize(
    ("name", "by_header"),
    [
        ("h264_b", [True]),
        ("h264_no_b", [True]),
        ("hevc", [True]),
        ("vp9_webm", [True]),
        ("av1_mkv", [True]),
        ("h264_single", [True, False]),
        ("h264_avi", [False]),
    ],
)
def test_a_header_that_says_enough_is_believed(name: str, by_header: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is examined, which decodes pictures, where the header does not say whether frames are reordered."""
    assert ["skip_frame" in options for options in opened(video(name), monkeypatch)] == by_header


@pytest.mark.parametrize("name", VIDEOS)
def test_header_and_examination_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def facts() -> tuple[object, ...]:
        with VideoReader(video(name)) as reader:
            table, frames = reader.table, reader.stream.frames  # the stream may be another one once the file was checked
            try:
                checked: object = reader.check()
            except DecodeError as error:
                checked = str(error)
            return table.times, table.shown, table.keyframes, table.timed, reader.codec, frames, checked

    by_header = facts()
    monkeypatch.setattr(decode_module, "_is_described", lambda file: False)
    assert facts() == by_header


def test_frames_lost_to_a_header_are_found_by_examining(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the header names fewer reordered frames than there are, and the decoder drops what comes too late."""
    sparsely = VideoReader._decode_sparsely
    monkeypatch.setattr(VideoReader, "_decode_sparsely", lambda self, wanted: sparsely(self, wanted if self._examined else set()))
    monkeypatch.setattr(VideoReader, "_decode_all", lambda self: pytest.fail("decoded everything"))
    assert_exact(video("h264_b"), [1, 17, 33], linear(video("h264_b")))


def test_unneeded_packets_are_not_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = []
    decode = VideoReader._decode
    monkeypatch.setattr(VideoReader, "_decode", lambda self, packet: fed.append(packet) or decode(self, packet))
    decode_frames(video("mpeg4_avi"), [25])  # keyframes at 0, 12, 24, 36
    assert len(fed) <= 3
    fed.clear()
    decode_frames(video("mpeg4_avi"), [24])
    assert len(fed) <= 2


def test_equal_indices_share_a_frame_and_order_is_kept() -> None:
    frames = decode_frames(video("h264_b"), [30, 2, 30])
    assert frames[0] is frames[2]
    assert [number(frame.to_ndarray(format="gray")) for frame in frames] == [30, 2, 30]
    assert decode_frames(video("h264_b"), []) == []


def test_repeated_frames_are_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    resized = []
    resize = decode_module.resize
    monkeypatch.setattr(decode_module, "resize", lambda image, size, out=None: resized.append(size) or resize(image, size, out))
    pixels = decode_rgb(video("h264_short"), [0, 0, 1, 1, 2, 2, 9, 9], 48)
    assert [number(image) for image in pixels] == [0, 0, 1, 1, 2, 2, 2, 2]
    assert len(resized) == 3


@pytest.mark.skipif(not REAL_CLIPS, reason="real clips are not here")
@pytest.mark.parametrize("path", REAL_CLIPS, ids=lambda path: path.name[:24])
def test_real_clips(path: Path) -> None:
    expected = linear_frames(path)
    assert probe_video(path).frames == len(expected)
    rng = np.random.default_rng(3)
    for _ in range(3):
        assert_exact(path, segment_indices(len(expected), 8, rng).tolist(), expected)
    assert_exact(path, [0, len(expected) - 1, len(expected) + 9], expected)


@pytest.mark.parametrize("name", ["h264_b", "mpeg4_avi_packed", "hevc"])
def test_packets_are_fed_from_a_keyframe_to_the_wanted_frame(name: str) -> None:
    """Held-back frames are drained; feeding on would decode pictures that nobody wants."""
    with VideoReader(video(name)) as reader:
        decode, fed = reader._decode, []
        reader._decode = lambda packet: fed.append(packet) or decode(packet)  # type: ignore[method-assign]
        (frame,) = reader.frames([20])
        assert frame.pts == reader.table.shown[20]
        assert fed[0].pts in {time for time, _ in reader.table.keyframes}
        assert fed[-1] is None and fed[-2].pts == frame.pts


def test_display_ranks() -> None:
    assert display_ranks("IPBBPB") == [0, 3, 1, 2, 5, 4]
    assert display_ranks("IPPP") == [0, 1, 2, 3]
    assert display_ranks("") == []


# ------------------------------------------------------------------------------------------------------------ pixels


def test_rgb_is_what_pyav_gives() -> None:
    with av.open(str(video("h264_b"))) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    pixels = decode_rgb(video("h264_b"), [3, 20, 99])
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.stack([expected[3], expected[20], expected[39]]))


@pytest.mark.parametrize(("short_side", "shape"), [(48, (48, 64)), (96, (96, 128)), (150, (150, 200))])
def test_resize_to_short_side(short_side: int, shape: tuple[int, int]) -> None:
    pixels = decode_rgb(video("h264_b"), [7, 22], short_side)
    assert pixels.shape == (2, *shape, 3)
    assert [number(image) for image in pixels] == [7, 22]


@pytest.mark.parametrize("name", ["h264_b", "h264_odd_444"])
def test_shrunk_pictures_are_means_over_areas(name: str) -> None:
    """Against averaging and converting (BT.601, limited range) in float64."""
    frames = decode_frames(video(name), [7, 22])
    height, width = frames[0].height, frames[0].width
    for frame, small, grey in zip(
        frames,
        decode_module.to_pixels(frames, short_side=height // 3),
        decode_module.to_pixels(frames, short_side=height // 3, pixel_format="gray"),
        strict=True,
    ):
        planes = frame.reformat(format="yuv444p", interpolation="AREA").to_ndarray().astype(np.float64)
        size = small.shape[1::-1]
        luma, blue, red = (cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes.reshape(3, height, width))
        luma, blue, red = 1.164383 * (luma - 16), blue - 128, red - 128
        exact = np.stack([luma + 1.596027 * red, luma - 0.391762 * blue - 0.812968 * red, luma + 2.017232 * blue], axis=-1).clip(0, 255)
        error = np.abs(small - exact)
        assert error.mean() < 0.8 and error.max() <= 6
        stored = cv2.resize(frame.to_ndarray(format="gray").astype(np.float64), size, interpolation=cv2.INTER_AREA)
        assert np.abs(grey - stored).max() <= 1.5


@pytest.mark.parametrize("pixel_format", ["yuvj420p", "yuv420p10le"])
def test_shrunk_pictures_of_other_formats(tmp_path: Path, pixel_format: str) -> None:
    """Full range keeps its range; what is not made of 8-bit planes is averaged after its conversion."""
    path = write_video(tmp_path / "v.mkv", "mjpeg" if "j" in pixel_format else "libx264", frames=2, pixel_format=pixel_format)
    full, small = decode_rgb(path, [1])[0], decode_rgb(path, [1], 32)[0]
    exact = cv2.resize(full.astype(np.float64), small.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(small - exact).mean() < (2.5 if "j" in pixel_format else 0.6)


def test_odd_size() -> None:
    assert decode_rgb(video("h264_odd_444"), [5]).shape == (1, 99, 133, 3)
    assert decode_rgb(video("h264_odd_444"), [5], 33).shape == (1, 33, 44, 3)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotated_clips_are_shown_upright(tmp_path: Path, degrees: int) -> None:
    path = write_video(tmp_path / "turned.mp4", frames=4, rotation=degrees)
    stored = decode_rgb(write_video(tmp_path / "stored.mp4", frames=4), [2])[0]
    upright = decode_rgb(path, [2])[0]
    turns = {90: cv2.ROTATE_90_COUNTERCLOCKWISE, 180: cv2.ROTATE_180, -90: cv2.ROTATE_90_CLOCKWISE}
    np.testing.assert_array_equal(upright, cv2.rotate(stored, turns[degrees]))
    info = probe_video(path)
    assert (info.height, info.width) == upright.shape[:2]
    assert min(decode_rgb(path, [2], 48).shape[1:3]) == 48


def test_negative_index() -> None:
    with pytest.raises(DecodeError, match="-1"):
        decode_frames(video("h264_b"), [3, -1])
