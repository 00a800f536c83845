"""Frame-exact decoding against a full linear decode, on files written here and, where present, on real clips."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from fractions import Fraction
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
from amd_fast.errors import DataError, DecodeError

REAL = Path(__file__).parents[2] / "shared" / "data" / "clips"
REAL_CLIPS = sorted(REAL.iterdir()) if REAL.is_dir() else []
BITS = 8


# ----------------------------------------------------------------------------------------------- videos made here


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
) -> Path:
    with av.open(str(path), "w", options=container_options or {}) as container:
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
            frame = av.VideoFrame.from_ndarray(picture(k, width, height), format="rgb24")
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
    "mpeg4_avi": lambda d: write_video(d / "v.avi", "mpeg4"),
    "mpeg4_avi_b": lambda d: write_video(d / "v.avi", "mpeg4", options={"bf": "2"}),
    "mpeg4_avi_packed": lambda d: pack_b_frames(write_video(d / "b.avi", "mpeg4", options={"bf": "1"}), d / "v.avi"),
    "mpeg4_mp4_b": lambda d: write_video(d / "v.mp4", "mpeg4", options={"bf": "2"}),
    "mpeg4_copied": _from_avi_to_mkv,
    "mpeg2_b": lambda d: write_video(d / "v.mkv", "mpeg2video", options={"bf": "2"}),
    "mjpeg_avi": lambda d: write_video(d / "v.avi", "mjpeg", pixel_format="yuvj420p"),
    "ffv1_mkv": lambda d: write_video(d / "v.mkv", "ffv1"),
    "vp9_webm": lambda d: write_video(d / "v.webm", "libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
    "vp9_hidden": lambda d: write_video(d / "v.webm", "libvpx-vp9", options={"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}),
    "edit_list": _edit_list,
    "starts_inside": _starts_inside,
}
SHOWN = {"h264_short": 3, "h264_single": 1, "edit_list": 35}


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="amd_fast_decode_"))


@pytest.fixture(scope="module", autouse=True)
def _remove_videos():
    yield
    shutil.rmtree(_folder(), ignore_errors=True)


@functools.cache
def video(name: str) -> Path:
    folder = _folder() / name
    folder.mkdir()
    return VIDEOS[name](folder)


def linear_frames(path: Path) -> list[np.ndarray]:
    """The oracle: decode everything in order with PyAV and nothing of ours."""
    with av.open(str(path), metadata_errors="replace") as container:
        container.streams.video[0].thread_type = "NONE"
        return [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]


linear = functools.cache(linear_frames)


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
        assert len(expected) == SHOWN.get(name, 40)
        offset = 40 - len(expected) if name == "edit_list" else 0
        assert [number(image) for image in expected] == list(range(offset, offset + len(expected)))
    assert_exact(path, list(range(len(expected))), expected)
    for index in (*range(0, len(expected), 7), len(expected) - 1, len(expected), len(expected) + 50):
        assert_exact(path, [index], expected)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(VIDEOS)), indices=st.lists(st.integers(0, 45), min_size=1, max_size=10))
def test_any_set_of_indices(name: str, indices: list[int]) -> None:
    assert_exact(video(name), indices, linear(video(name)))


SPARSE = ["h264_b", "h264_pyramid_mkv", "h264_variable_rate", "mpeg4_avi", "mpeg4_avi_b", "mpeg4_avi_packed", "vp9_webm", "edit_list"]


@pytest.mark.parametrize("name", SPARSE)
def test_common_files_are_read_sparsely(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These never need a full decode; a change that falls back to one would go unnoticed otherwise."""
    monkeypatch.setattr(VideoReader, "_decode_all", lambda self: pytest.fail("decoded everything"))
    assert_exact(video(name), [1, 17, 33], linear(video(name)))


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
    monkeypatch.setattr(decode_module, "resize", lambda image, size: resized.append(size) or resize(image, size))
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
    full = decode_rgb(video("h264_b"), [7, 22])
    if short_side == 48:  # a half in each direction: the mean of 2 x 2 pixels
        mean = full.reshape(2, 48, 2, 64, 2, 3).mean(axis=(2, 4))
        assert np.abs(pixels - mean).max() <= 1


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


# ------------------------------------------------------------------------------------------------------------- probe


@pytest.mark.parametrize("name", [name for name in VIDEOS if name != "starts_inside"])
def test_probe(name: str) -> None:
    info = probe_video(video(name))
    assert info.frames == SHOWN.get(name, 40)
    assert (info.width, info.height) == ((133, 99) if name == "h264_odd_444" else (128, 96))
    assert info.duration == pytest.approx(info.frames / info.fps)
    if name == "h264_variable_rate":
        span = (_irregular(40)[-1] - _irregular(40)[0]) / 25
        assert info.duration == pytest.approx(span * 40 / 39, rel=0.01)
    elif name != "h264_single":
        assert info.fps == pytest.approx(25, rel=0.01)
    assert info.codec == {"libx264": "h264"}.get(name, name.split("_")[0]) or name in ("edit_list", "mpeg2_b")


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for k in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, 1024 * k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut(source: Path, target: Path, share: float) -> Path:
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def with_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _unknown_codec(folder: Path) -> Path:
    data = video("mpeg4_avi").read_bytes()
    return with_bytes(folder / "unknown.avi", data.replace(b"FMP4", b"QQQQ").replace(b"fmp4", b"QQQQ"))


def _scrambled(folder: Path) -> Path:
    """The header is whole, the pictures are noise."""
    data = bytearray(video("h264_b").read_bytes())
    start = data.find(b"mdat") + 4
    end = data.find(b"moov") - 4
    data[start:end] = np.random.default_rng(0).integers(0, 256, end - start, dtype=np.uint8).tobytes()
    return with_bytes(folder / "scrambled.mp4", bytes(data))


PLAYLIST = b"#EXTM3U\n#EXTINF:5,\nhttp://example.invalid/a.ts\n#EXT-X-ENDLIST\n"


def _cut_between_packets(source: Path, target: Path, packets: int, more: int = 0) -> Path:
    """No packet is cut in two (unless ``more`` bytes are kept): only header and index tell that some are missing."""
    with av.open(str(source)) as container:
        first_lost = sorted(packet.pos for packet in container.demux(video=0) if packet.size)[packets]
    header = 8 if source.suffix == ".avi" else 0  # an AVI chunk starts with its name and size
    return with_bytes(target, source.read_bytes()[: first_lost - header + more])


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda d: d / "nowhere.mp4", "no such file"),
    "folder": (lambda d: d, "no such file"),
    "empty": (lambda d: with_bytes(d / "empty.mp4", b""), "empty"),
    "text": (lambda d: with_bytes(d / "text.mp4", b"This is not a video.\n" * 50), "cannot be opened"),
    "playlist": (lambda d: with_bytes(d / "list.mp4", PLAYLIST), "cannot decode"),
    "audio": (lambda d: write_audio(d / "audio.mp4"), "no video stream"),
    "no_index": (lambda d: cut(video("h264_b"), d / "cut.mp4", 0.5), "cannot be opened"),
    "truncated_faststart": (
        lambda d: cut(write_video(d / "fast.mp4", container_options={"movflags": "+faststart"}), d / "cut.mp4", 0.6),
        "truncated",
    ),
    "last_packet_lost": (
        lambda d: _cut_between_packets(write_video(d / "fast.mp4", container_options={"movflags": "+faststart"}), d / "cut.mp4", 39),
        "truncated",
    ),
    "quarter_lost_avi": (lambda d: _cut_between_packets(video("mpeg4_avi"), d / "cut.avi", 30), "truncated"),
    "last_packet_cut_avi": (lambda d: _cut_between_packets(video("mpeg4_avi"), d / "cut.avi", 39, more=100), "truncated"),
    "truncated_avi": (lambda d: cut(video("mpeg4_avi"), d / "cut.avi", 0.5), "truncated"),
    "truncated_mkv": (lambda d: cut(video("h264_pyramid_mkv"), d / "cut.mkv", 0.5), "truncated"),
    "truncated_webm": (lambda d: cut(video("vp9_webm"), d / "cut.webm", 0.5), "truncated"),
    "unknown_codec": (_unknown_codec, "codec"),
    "scrambled": (_scrambled, "damaged|none of its frames"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named_with_reason_and_remedy(kind: str, tmp_path: Path) -> None:
    make, reason = BAD[kind]
    path = make(tmp_path)
    with pytest.raises(DecodeError, match=reason) as caught:
        probe_video(path)
    message = str(caught.value)
    assert str(path) in message
    assert any(word in message for word in ("check", "copy", "leave", "re-encode"))
    if kind in ("missing", "empty", "text", "audio", "no_index", "unknown_codec", "scrambled"):
        with pytest.raises(DecodeError, match="cannot decode"):
            decode_rgb(path, [0])


def test_damaged_last_frame(tmp_path: Path) -> None:
    """Found when probing; in training the frame before it takes its place."""
    with av.open(str(video("h264_no_b"))) as container:
        last = [packet for packet in container.demux(video=0) if packet.size][-1]
        position, size = last.pos, last.size
    data = bytearray(video("h264_no_b").read_bytes())
    data[position : position + size] = b"\xff" * size
    path = with_bytes(tmp_path / "damaged.mp4", bytes(data))
    with pytest.raises(DecodeError, match="damaged"):
        probe_video(path)
    assert [number(image) for image in decode_rgb(path, [5, 38, 39, 60])] == [5, 38, 38, 38]


def test_damaged_frame_in_the_middle(tmp_path: Path) -> None:
    with av.open(str(video("mjpeg_avi"))) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][20]
        position, size = packet.pos, packet.size
    data = bytearray(video("mjpeg_avi").read_bytes())
    data[position : position + size] = bytes(size)
    path = with_bytes(tmp_path / "damaged.avi", bytes(data))
    assert [number(image) for image in decode_rgb(path, [19, 20, 21, 39])] == [19, 19, 21, 39]


def test_negative_index() -> None:
    with pytest.raises(DecodeError, match="-1"):
        decode_frames(video("h264_b"), [3, -1])


ODD_NAMES = ["a#b & c;(!)[@] .mp4", "http:x.mp4", "concat:a|b.mp4", "%03d.mp4", "ümlaut 走.mp4", os.fsdecode(b"\xff\xfe.mp4")]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(video("h264_short"), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):  # without a folder before it, "http:x.mp4" looks like an address
        assert probe_video(path).frames == 3


def test_reader_closes_its_file_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    class Container:
        def __init__(self, inner: av.container.InputContainer) -> None:
            self._inner = inner

        def __getattr__(self, name: str):
            return getattr(self._inner, name)

        def close(self) -> None:
            closed.append(True)
            self._inner.close()

    opened = decode_module._open_container
    monkeypatch.setattr(decode_module, "_open_container", lambda *names: Container(opened(*names)))
    with pytest.raises(DecodeError, match="no video stream"):
        VideoReader(write_audio(tmp_path / "audio.mp4"))
    assert closed == [True]


# ---------------------------------------------------------------------------------------------------------- sampling


@given(frames=st.integers(1, 100_000), count=st.integers(1, 64), seed=st.none() | st.integers(0, 2**32 - 1))
def test_each_index_lies_in_its_segment(frames: int, count: int, seed: int | None) -> None:
    indices = segment_indices(frames, count, None if seed is None else np.random.default_rng(seed))
    assert indices.dtype == np.int64
    assert indices.shape == (count,)
    for k, index in enumerate(indices.tolist()):
        assert 0 <= index < frames
        assert Fraction(k * frames, count) - 1 < index < Fraction((k + 1) * frames, count)


def test_segment_centres() -> None:
    assert segment_indices(80, 8).tolist() == [5, 15, 25, 35, 45, 55, 65, 75]
    assert segment_indices(3, 8).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_random_offsets_cover_every_frame_evenly() -> None:
    rng = np.random.default_rng(0)
    drawn = np.concatenate([segment_indices(24, 8, rng) for _ in range(3000)])
    counts = np.bincount(drawn, minlength=24)
    assert np.abs(counts / counts.mean() - 1).max() < 0.15


@pytest.mark.parametrize(("frames", "count"), [(0, 8), (-3, 8), (10, 0)])
def test_nothing_to_sample(frames: int, count: int) -> None:
    with pytest.raises(DataError):
        segment_indices(frames, count)
