"""Cut streams: decoded in full, they show the frames of the original that were asked for, and no packet is kept for nothing."""

from __future__ import annotations

import io
import runpy
from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext
from hypothesis import given, settings
from hypothesis import strategies as st

from amd_fast.data import cut as cut_module
from amd_fast.data import h264
from amd_fast.data.cut import CutStream, cut_stream
from amd_fast.data.decode import VideoReader

MADE = runpy.run_path(str(Path(__file__).with_name("made_videos.py")))
linear, linear_frames, video = MADE["linear"], MADE["linear_frames"], MADE["video"]

CUT = [
    *("h264_b", "h264_pyramid_mkv", "h264_open_gop", "h264_intra_refresh", "h264_no_b", "h264_odd_444", "h264_variable_rate", "edit_list"),
    *("hevc", "hevc_open_gop", "hevc_10_bit", "mpeg4_avi", "mpeg4_avi_b", "mpeg4_avi_packed", "mpeg4_mp4_b", "mjpeg_avi"),
    *("vp8_webm", "vp9_webm", "vp9_hidden", "av1_mkv"),
]
REFUSED = ["h264_avi", "h264_ts", "mpeg4_copied", "mpeg2_b", "starts_inside"]


def cut(path: Path, indices: list[int]) -> CutStream | None:
    with VideoReader(path) as reader:
        return cut_stream(reader, indices)


def assert_same_frames(path: Path, indices: list[int], expected: list[np.ndarray]) -> CutStream:
    """Equal to the last bit: nothing is decoded and encoded again."""
    stream = cut(path, indices)
    assert stream is not None
    decoded = linear_frames(io.BytesIO(stream.data))
    assert len(decoded) == stream.packets  # what is counted is shown
    assert stream.frames.dtype == np.int32
    for place, index in zip(stream.frames, indices, strict=True):
        np.testing.assert_array_equal(decoded[place], expected[min(index, len(expected) - 1)], err_msg=f"{path} frame {index}")
    return stream


@pytest.mark.parametrize("name", CUT)
def test_every_frame_alone_and_all_together(name: str) -> None:
    expected = linear(video(name))
    for index in (*range(0, len(expected), 3), len(expected) - 1, len(expected) + 50):
        assert_same_frames(video(name), [index], expected)
    assert assert_same_frames(video(name), list(range(len(expected))), expected).packets >= len(expected)


@settings(max_examples=150)
@given(name=st.sampled_from(CUT), indices=st.lists(st.integers(0, 45), min_size=1, max_size=8))
def test_any_set_of_frames(name: str, indices: list[int]) -> None:
    assert_same_frames(video(name), indices, linear(video(name)))


@pytest.mark.parametrize("name", REFUSED)
def test_an_unknown_order_is_not_guessed(name: str) -> None:
    assert cut(video(name), [0, 5]) is None


def test_real_clips(shared_data: Path) -> None:
    """H.264 of Kinetics, MPEG-4 of UCF101, packed B-frames of HMDB51."""
    rng = np.random.default_rng(1)
    for path in sorted((shared_data / "clips").iterdir()):
        expected = linear_frames(path)
        for count in (1, 8):
            assert_same_frames(path, sorted(rng.integers(0, len(expected), count).tolist()), expected)


def test_only_needed_packets_are_kept() -> None:
    """Key frames at 0, 12, 24, 36; a picture nothing refers to is kept only if it is wanted."""
    kept = {name: [cut(video(name), [index]).packets for index in (24, 25, 35)] for name in ("mpeg4_avi", "h264_no_b", "mjpeg_avi")}
    assert kept == {"mpeg4_avi": [1, 2, 12], "h264_no_b": [1, 2, 12], "mjpeg_avi": [1, 1, 1]}
    assert cut(video("mpeg4_avi_b"), [30]).packets == 3  # I24, P27, P30
    assert cut(video("mpeg4_avi_b"), [29]).packets == 4  # and the B-frame itself
    assert len(cut(video("mpeg4_avi"), [24]).data) < 0.1 * video("mpeg4_avi").stat().st_size
    everything = cut(video("h264_b"), list(range(40)))
    assert everything.packets == 40


def nal_types(stream: CutStream) -> list[list[int]]:
    """Of each packet, the types of its NAL units."""
    types = []
    with av.open(io.BytesIO(stream.data)) as container:
        for packet in container.demux(video=0):
            data, found, place = bytes(packet), [], 0
            while place < len(data):
                found.append(data[place + 4] & 31 if stream.codec == "h264" else data[place + 4] >> 1 & 63)
                place += 4 + int.from_bytes(data[place : place + 4])
            types += [found] if found else []
    return types


def test_open_groups_start_at_their_own_picture() -> None:
    """HEVC without IDR pictures but the first: each cut starts at a CRA picture, renamed BLA, without the pictures that lead it."""
    with VideoReader(video("hevc_open_gop")) as reader:
        places = [reader.table.shown.index(time) for time, _ in reader.table.keyframes]
        assert len(places) >= 4
        stream = cut_stream(reader, [places[1], places[3] + 1])
    kinds = [[kind for kind in packet if kind < 32] for packet in nal_types(stream)]
    assert kinds[0] == [18]
    assert [18] in kinds[1:]
    assert not any(6 <= kind <= 9 or kind == 21 for packet in kinds for kind in packet)


def test_pictures_that_may_look_alike_are_told_apart() -> None:
    """Two H.264 IDR pictures in a row: an access unit delimiter before each."""
    assert nal_types(cut(video("h264_no_b"), [12, 36])) == [[9, 5], [9, 5]]


def test_a_start_that_something_later_reaches_behind_is_none() -> None:
    """Shown order 0 2 1 4 3: what follows the second start is shown before it and is needed."""
    units = [cut_module._Unit(start, False, False, bytes) for start in (True, False, False, True, False)]
    assert cut_module._clean_starts([0, 2, 1, 4, 3], units) == [0]
    assert cut_module._clean_starts([0, 2, 1, 3, 4], units) == [0, 3]
    units[4].leads = True
    assert cut_module._clean_starts([0, 2, 1, 4, 3], units) == [0, 3]


def test_hidden_pictures_are_reported() -> None:
    """VP9's superframes, counted by FFmpeg's own splitter; AV1 by the pictures that its encoder shows again."""
    with av.open(str(video("vp9_hidden"))) as container:
        split = BitStreamFilterContext("vp9_superframe_split", container.streams.video[0])
        parts = [len(list(split.filter(packet))) for packet in container.demux(video=0) if packet.size]
    with av.open(str(video("vp9_hidden"))) as container:
        hides = [cut_module._vp9_hides(packet) for packet in container.demux(video=0) if packet.size]
    assert set(parts) == {1, 2}
    assert hides == [count > 1 for count in parts]
    for name, hidden in (("vp9_hidden", True), ("av1_mkv", True), ("vp9_webm", False), ("vp8_webm", False), ("h264_b", False)):
        assert cut(video(name), list(range(40))).hidden is hidden
    assert not cut(video("vp9_hidden"), [0, 3]).hidden  # the packets kept are what counts


def test_size_and_codec_are_those_of_the_file() -> None:
    stream = cut(video("h264_odd_444"), [3])
    assert (stream.codec, stream.width, stream.height) == ("h264", 133, 99)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("options", [{"flags": "+ildct+ilme"}, {"x264-params": "tff=1"}, {"x264-params": "tff=1:cqm=jvt"}])
def test_fields_are_reported(tmp_path: Path, container: str, options: dict[str, str]) -> None:
    """DALI on a GPU counts each field of such a picture as a frame."""
    pixels = "yuv444p" if "cqm" in str(options) else "yuv420p"  # the header that says the most before it says this
    path = MADE["write_video"](tmp_path / f"v.{container}", "libx264", 12, options=options, pixel_format=pixels)
    assert cut(path, [3]).interlaced
    assert not cut(video("h264_b"), [3]).interlaced
    assert not cut(video("h264_odd_444"), [3]).interlaced


def test_a_header_among_the_packets_counts() -> None:
    """Streams may change their header on the way; a header cut off is none to rely on."""
    with VideoReader(video("h264_b")) as reader:
        (header,) = h264.sequence_headers(reader.stream.codec_context.extradata)
        assert not h264.allows_fields(header)
        assert h264.allows_fields(header[:5])
        packet = av.Packet(len(header[:5]).to_bytes(4) + header[:5] + bytes(reader.table.packets[0]))
        packet.is_keyframe = True
        assert cut_module._may_be_interlaced(reader, [packet])
        assert not cut_module._may_be_interlaced(reader, reader.table.packets)


def test_what_a_decoder_must_know_of_the_pixels() -> None:
    stream = cut(video("hevc_10_bit"), [3])
    assert (stream.pixel_format, stream.colour_space) == ("yuv420p10le", 2)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_colours_that_only_the_stream_names_are_known(container: str, tmp_path: Path) -> None:
    options = {"x264-params": "colormatrix=bt709"}
    path = MADE["write_video"](tmp_path / f"v.{container}", "libx264", 12, options=options, container_options={"movflags": "-write_colr"})
    with VideoReader(path) as reader:
        stream = cut_stream(reader, [0, 5])
    assert stream is not None and (stream.pixel_format, stream.colour_space) == ("yuv420p", 1)
