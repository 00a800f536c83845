"""What ``amd_fast.explain("decode", manifest)`` says of clips that a manifest tells apart; the choice itself is in test_decoders.py."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

import amd_fast
from amd_fast.data import decoders
from amd_fast.data.manifest import Manifest

IN_MEMORY = "PyAV also decodes what is kept in memory: all training clips with data.cache ram, or auto where they fit."


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    sizes = {"width": [320, 321, 320, 99, 99], "height": [240, 240, 239, 97, 97]}
    codecs = ["h264", "h264", "h264", "h264", "av1"]
    return Manifest(pd.DataFrame({"path": [f"{name}.mp4" for name in "abcde"], "label": "x", "codec": codecs, **sizes}), tmp_path)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that decodes H.264 and no AV1."""
    monkeypatch.setattr(decoders, "dali_installed", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(decoders, "_nvdec_obstacle", {"h264": None, "av1": "this GPU's video decoder does not take av1"}.get)


def test_on_a_gpu_the_clips_that_dali_does_not_read_are_counted(gpu: None, manifest: Manifest, tmp_path: Path) -> None:
    lines = amd_fast.explain("decode", manifest).splitlines()
    assert lines == [
        "h264 (4 clips) is decoded by dali because the GPU decodes this codec.",
        "av1 (1 clip) is decoded by pyav because this GPU's video decoder does not take av1.",
        "Of DALI's clips 3 of odd width or height are read by PyAV: it reads such wrongly on a GPU.",
        "What DALI refuses once it sees the file (turned pictures, say) is read by PyAV, and counted in the log.",
        IN_MEMORY,
    ]
    manifest.to_csv(tmp_path / "m.csv")
    assert amd_fast.explain("decode", tmp_path / "m.csv").splitlines() == lines
    even = Manifest(manifest.table[:1], tmp_path)
    assert [line.split()[0] for line in amd_fast.explain("decode", even).splitlines()] == ["h264", "What", "PyAV"]
    named = amd_fast.explain("decode", Manifest(manifest.table[:2], tmp_path), "dali").splitlines()
    assert named[1].startswith("Of DALI's clips 1 of odd width or height is lost with decoder='dali'") and len(named) == 3
    assert amd_fast.explain("decode", manifest, "pyav").count("\n") == 1


def test_without_a_gpu_there_is_nothing_more_to_say(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert amd_fast.explain("decode", manifest).count("\n") == 1
    monkeypatch.setattr(decoders, "dali_installed", lambda: True)
    table = manifest.table.assign(codec="vp9")
    assert "odd" not in amd_fast.explain("decode", Manifest(table, manifest.root), "dali")
