"""Which decoder is chosen, and what is said of it."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

import amd_fast
from amd_fast.data import decoders, explain_decoder
from amd_fast.data.cut import CutStream, cut_stream
from amd_fast.data.decode import VideoReader
from amd_fast.data.decoders import choose_decoder, dali_installed, dali_obstacle, stream_obstacle
from amd_fast.data.manifest import Manifest
from amd_fast.errors import ConfigError, DecodeError, ImplementationError

MADE = runpy.run_path(str(Path(__file__).with_name("made_videos.py")))
video = MADE["video"]


@pytest.fixture
def with_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "dali_installed", lambda: True)


@pytest.mark.parametrize("codec", ["h264", "vp9", "mjpeg", None])
@pytest.mark.parametrize("installed", [True, False])
def test_without_a_gpu_pyav_reads_everything(codec: str | None, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoders, "dali_installed", lambda: installed)
    choice = choose_decoder(codec, "auto", "cpu")
    assert choice.decoder == "pyav"
    assert "no GPU" in choice.reason


def test_on_a_gpu_dali_reads_what_nvdec_takes(with_dali: None, monkeypatch: pytest.MonkeyPatch) -> None:
    obstacles = {"h264": None, "av1": "this GPU's video decoder does not take av1"}
    monkeypatch.setattr(decoders, "_nvdec_obstacle", obstacles.get)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert choose_decoder("h264", "auto", "cuda").decoder == "dali"
    assert choose_decoder("av1", "auto", "cuda") == ("pyav", "this GPU's video decoder does not take av1")
    assert choose_decoder("h264", "auto") == choose_decoder("h264", "auto", "cuda:1")
    assert choose_decoder("h264", "auto", "cpu").decoder == "pyav"
    with pytest.raises(ImplementationError, match=r"does not take av1.*decoder='auto' or 'pyav'"):
        choose_decoder("av1", "dali", "cuda")


def test_on_a_gpu_without_the_drivers_video_library(with_dali: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", nothing)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    decoders._nvdec_library.cache_clear()
    choice = choose_decoder("h264", "auto", "cuda")
    decoders._nvdec_library.cache_clear()
    assert choice.decoder == "pyav"
    assert "NVIDIA_DRIVER_CAPABILITIES" in choice.reason


class Nvdec:
    """A driver that decodes 8-bit 4:2:0 from 144 x 144 to 4096 x 4096, and 4:4:4 to something that is not NV12."""

    def cuvidGetDecoderCaps(self, answer: Any) -> int:
        caps = answer._obj
        assert caps.codec in (4, 8, 11)
        caps.supported = caps.codec != 11 and caps.bit_depth_minus_8 == 0
        caps.output_formats = 1 if caps.chroma == 1 else 4
        caps.min_width = caps.min_height = 144
        caps.max_width = caps.max_height = 4096
        caps.max_macroblocks = 65_536
        return 0


@pytest.fixture
def nvdec(with_dali: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(decoders, "_nvdec_library", Nvdec)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.device", lambda gpu: nullcontext())
    monkeypatch.setattr("torch.cuda.current_stream", lambda: SimpleNamespace(query=lambda: True))
    decoders._decode_caps.cache_clear()
    yield
    decoders._decode_caps.cache_clear()


def stream(**facts: Any) -> CutStream:
    return CutStream(**{"data": b"", "frames": None, "codec": "hevc", "width": 320, "height": 240, "packets": 1, "hidden": False} | facts)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, None),
        ({"width": 128}, "128 x 240, and this GPU's video decoder takes hevc from 144 x 144 to 4096 x 4096"),
        ({"width": 5000}, "5000 x 240"),
        ({"pixel_format": "yuv420p10le"}, "hevc with 10 bits as yuv420p10le"),
        ({"codec": "h264", "pixel_format": "yuv444p"}, "h264 with 8 bits as yuv444p"),
        ({"codec": "av1"}, "does not take av1"),
        ({"pixel_format": ""}, "not known without decoding"),
        ({"hidden": True}, "not shown"),
        ({"interlaced": True}, "fields"),
        ({"height": 239}, "odd sizes"),
    ],
)
def test_a_gpu_is_asked_before_it_decodes(nvdec: None, facts: dict[str, Any], reason: str | None) -> None:
    found = stream_obstacle(stream(**facts), "cuda")
    assert (found is None) if reason is None else (reason in found)
    assert stream_obstacle(stream(**facts), "cpu") is None


def test_files_that_a_gpu_would_show_wrongly(nvdec: None, tmp_path: Path) -> None:
    """Made by x264, cut, and refused; the plain one beside them is not."""
    found = {}
    for name, options in {"plain": {}, "fields": {"x264-params": "tff=1"}, "odd": {"width": 255, "pixel_format": "yuv444p"}}.items():
        encoding = {"options": options} if "x264-params" in options else options
        path = MADE["write_video"](tmp_path / f"{name}.mp4", "libx264", 6, **{"width": 256, "height": 192} | encoding)
        with VideoReader(path) as reader:
            found[name] = stream_obstacle(cut_stream(reader, [0, 5]), "cuda")
    assert found["plain"] is None
    assert "interlaced H.264" in found["fields"]
    assert "255 x 192" in found["odd"]


def test_codecs_that_a_gpu_takes(nvdec: None) -> None:
    assert dali_obstacle("h264", "cuda") is None
    assert "does not take av1" in dali_obstacle("av1", "cuda")
    assert dali_obstacle("mjpeg", "cuda") == "DALI does not decode mjpeg on a GPU"


@pytest.mark.parametrize(("codec", "device", "reason"), [("h264", "cpu", "not h264"), ("vp9", "cuda", "no GPU")])
def test_a_name_is_never_replaced(codec: str, device: str, reason: str, with_dali: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ImplementationError, match=f"{reason}.*use decoder='auto' or 'pyav'"):
        choose_decoder(codec, "dali", device)
    assert choose_decoder("vp9", "dali", "cpu") == ("dali", "it was asked for by name")
    assert choose_decoder(codec, "pyav", device) == ("pyav", "it was asked for by name")


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia", "nvidia.dali"):  # the second may have been imported by another test
        monkeypatch.setitem(sys.modules, name, None)
    dali_installed.cache_clear()
    assert not dali_installed()
    dali_installed.cache_clear()
    monkeypatch.setattr(decoders, "dali_installed", lambda: False)
    with pytest.raises(ImplementationError, match=r"not installed \(pip install"):
        choose_decoder("vp9", "dali", "cpu")
    with pytest.raises(ConfigError, match=r"'decord'.*'auto', 'dali', 'pyav'"):
        choose_decoder("vp9", "decord")


def test_explained_for_a_manifest_a_video_and_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_dali: None) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    table = pd.DataFrame({"path": ["a.mp4", "b.mp4", "c.webm"], "label": "x", "codec": ["h264", "h264", "vp9"]})
    manifest = Manifest(table, tmp_path)
    lines = explain_decoder(manifest).splitlines()
    assert [line.split(" is decoded by ")[0] for line in lines] == ["h264 (2 clips)", "vp9 (1 clip)"]
    assert all("by pyav because" in line for line in lines)
    table.to_csv(tmp_path / "m.csv", index=False)
    assert explain_decoder(tmp_path / "m.csv") == explain_decoder(manifest)
    assert explain_decoder(video("vp9_webm"), "dali") == "vp9 (1 clip) is decoded by dali because it was asked for by name."
    assert explain_decoder().startswith("video of unknown codec is decoded by pyav because ")
    assert amd_fast.explain("decode") == explain_decoder()
    with pytest.raises(ImplementationError, match="not h264"):
        explain_decoder(manifest, "dali")
    with pytest.raises(DecodeError, match="nowhere"):
        explain_decoder(tmp_path / "nowhere.mp4")
