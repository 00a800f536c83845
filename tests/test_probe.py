"""What probing says of whole files, and of damaged, strange and foreign ones."""

from __future__ import annotations

import os
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from amd_fast.data import decode as decode_module
from amd_fast.data.decode import VideoReader, decode_rgb, probe_video
from amd_fast.errors import DecodeError

MADE = runpy.run_path(str(Path(__file__).with_name("made_videos.py")))
VIDEOS, SHOWN, number, video, write_video, _irregular = (
    MADE["VIDEOS"],
    MADE["SHOWN"],
    MADE["number"],
    MADE["video"],
    MADE["write_video"],
    MADE["_irregular"],
)


# ------------------------------------------------------------------------------------------------------------- probe


@pytest.mark.parametrize("name", [name for name in VIDEOS if name != "starts_inside"])
def test_probe(name: str) -> None:
    info = probe_video(video(name))
    assert info.frames == len(SHOWN.get(name, range(40)))
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
