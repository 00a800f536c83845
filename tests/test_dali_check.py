"""A machine on which DALI does not work is told from clips that are bad: one reason and one remedy, whatever the number of clips."""

from __future__ import annotations

import logging
import runpy
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from amd_fast.data import clips, cutting, dali, dali_check, loader
from amd_fast.data.dali import ClipJob, DaliDecoder
from amd_fast.data.dali_check import Check, check_dali, examine, explained, tiny_stream
from amd_fast.data.decoders import DecoderChoice, dali_installed
from amd_fast.data.loader import BatchBuilder, ClipBatch, ClipLoader
from amd_fast.data.manifest import Manifest
from amd_fast.data.views import ClipTransform
from amd_fast.errors import ImplementationError

pytestmark = pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")
MADE = runpy.run_path(str(Path(__file__).with_name("made_videos.py")))
video, write_video = MADE["video"], MADE["write_video"]
SIZE = 56
CPU = torch.device("cpu")
NO_FLOW_ENGINE = "Failed to load libnvidia-opticalflow.so.1"


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_check, "_found", {})
    loader._warn_once.cache_clear()


@pytest.fixture
def auto_takes_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    choose = loader.choose_decoder
    choice = DecoderChoice("dali", "for this test")
    monkeypatch.setattr(loader, "choose_decoder", lambda codec, name, device: choice if name == "auto" else choose(codec, name, device))


def fail(message: str) -> Any:
    def failing(*_: Any, **__: Any) -> Any:
        failing.calls += 1
        raise RuntimeError(message)

    failing.calls = 0
    return failing


def opened(decoder: str, *names: str, **options: Any) -> ClipLoader:
    rows = [
        {"path": str(video(name)), "label": "a", "codec": name.split("_")[0], "frames": 40, "width": 128, "height": 96} for name in names
    ]
    return ClipLoader(Manifest(pd.DataFrame(rows), "/"), ("rgb",), frames=3, size=SIZE, workers=1, decoder=decoder, **options)


def read(reader: ClipLoader, positions: list[int]) -> ClipBatch:
    builder = BatchBuilder(len(positions), reader)
    reader.fill(builder, {row: (position, (row,)) for row, position in enumerate(positions)})
    return builder.finish()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ------------------------------------------------------------------------------------------------------------ the question


@pytest.mark.parametrize(("rgb", "flow"), [(True, False), (False, True), (True, True)])
def test_this_machine_works(rgb: bool, flow: bool) -> None:
    assert examine(CPU, rgb=rgb, flow=flow) == Check(None)


def test_other_pictures_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, stream = tiny_stream("cpu")
    monkeypatch.setattr(dali_check, "tiny_stream", lambda device: (255 - pictures, stream))
    assert "shows other pictures than were put in" in examine(CPU, rgb=True, flow=False).problem


def test_a_machine_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_check, "_run", failing := fail(NO_FLOW_ENGINE))
    found = {check_dali(CPU, rgb=True, flow=True) for _ in range(3)}
    assert failing.calls == 1
    assert len(found) == 1
    check_dali(CPU, rgb=True, flow=False)
    assert failing.calls == 2


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        (NO_FLOW_ENGINE, "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video, or leave 'flow' out"),
        ("CUDA driver version is insufficient for CUDA runtime version", "update the driver"),
        ("CUDA runtime API error cudaErrorMemoryAllocation (2): out of memory", "free memory of the GPU"),
        ("something else", "amd-fast doctor"),
    ],
)
def test_a_reason_and_a_remedy(message: str, remedy: str) -> None:
    text = explained(RuntimeError(f"{message}\nStacktrace (3 entries):\n[frame 0]: lib.so\nCurrent pipeline object is no longer valid."))
    assert text.startswith(f"{message}; ")
    assert remedy in text
    assert "frame 0" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("flow", [True, False])
def test_this_gpu_works(flow: bool) -> None:
    assert examine(torch.device("cuda", 0), rgb=True, flow=flow).problem is None


# ------------------------------------------------------------------------------------------------- before the first clip


def test_by_name_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_check, "_run", fail(NO_FLOW_ENGINE))
    for make in (lambda: DaliDecoder(("rgb",), 3, SIZE), lambda: opened("dali", "vp9_webm")):
        with pytest.raises(
            ImplementationError, match=r"DALI does not work on cpu: .*opticalflow.*NVIDIA_DRIVER_CAPABILITIES.*decoder='pyav'"
        ):
            make()


def test_auto_says_so_once_and_is_pyav(monkeypatch: pytest.MonkeyPatch, auto_takes_dali: None, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dali_check, "_run", fail(NO_FLOW_ENGINE))
    readers = [opened("auto", "vp9_webm"), opened("auto", "vp9_webm"), opened("pyav", "vp9_webm")]
    first, _, plain = (read(reader, [0, 0]) for reader in readers)
    assert torch.equal(first.clips["rgb"], plain.clips["rgb"])
    (said,) = warnings_of(caplog)
    assert said.startswith("PyAV reads the clips: NVIDIA DALI does not work on cpu: ")
    assert "NVIDIA_DRIVER_CAPABILITIES" in said


# ----------------------------------------------------------------------------------------------- in the middle of an epoch


def test_a_machine_that_stops_working(monkeypatch: pytest.MonkeyPatch, auto_takes_dali: None, caplog: pytest.LogCaptureFixture) -> None:
    """The batch is not tried clip by clip, no clip is lost, and DALI is not asked again."""
    auto, named, plain = (
        opened("auto", "vp9_webm", "mjpeg_avi"),
        opened("dali", "vp9_webm", "mjpeg_avi"),
        opened("pyav", "vp9_webm", "mjpeg_avi"),
    )
    monkeypatch.setattr(dali_check, "_run", fail("CUDA driver version is insufficient"))
    monkeypatch.setattr(DaliDecoder, "_run", failing := fail("CUDA driver version is insufficient"))
    for _ in range(2):
        assert torch.equal(read(auto, [0, 1]).clips["rgb"], read(plain, [0, 1]).clips["rgb"])
    assert failing.calls == 1
    (said,) = warnings_of(caplog)
    assert said.startswith("PyAV reads the clips from now on: ")
    assert "update the driver" in said
    with pytest.raises(ImplementationError, match="update the driver"):
        read(named, [0])
    assert not auto.lost
    assert not named.lost


def test_memory_that_runs_out_for_one_clip_is_no_bad_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a batch it may be enough to take half of it; the clip that does not fit alone is named."""
    run, tried = DaliDecoder._run, []

    def crowded(self: DaliDecoder, samples: Any) -> Any:
        tried.append(len(samples))
        if len(samples) > room:
            raise RuntimeError("cudaErrorMemoryAllocation (2): out of memory")
        return run(self, samples)

    monkeypatch.setattr(DaliDecoder, "_run", crowded)
    jobs = [ClipJob(video("vp9_webm"), ClipTransform(SIZE, ("rgb",), train=False))] * 4
    with DaliDecoder(("rgb",), 3, SIZE, threads=1) as decoder:
        room = 2
        assert all(isinstance(clip, dict) for clip in decoder.load(jobs))
        assert tried == [4, 2, 2]
        room = 0
        with pytest.raises(ImplementationError, match=r"v\.webm: .*out of memory.*free memory"):
            decoder.load(jobs[:1])


def test_a_batch_that_never_comes_back(monkeypatch: pytest.MonkeyPatch, auto_takes_dali: None, caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    monkeypatch.setattr(dali, "_GRACE", 0.5)
    monkeypatch.setattr(DaliDecoder, "_run", lambda self, samples: gate.wait(60))
    auto, plain = opened("auto", "vp9_webm", timeout=0.5), opened("pyav", "vp9_webm")
    begun = time.monotonic()
    assert torch.equal(read(auto, [0]).clips["rgb"], read(plain, [0]).clips["rgb"])
    (said,) = warnings_of(caplog)
    assert "has not come back within 1 s from " in said
    assert str(video("vp9_webm")) in said
    auto.close()
    assert time.monotonic() - begun < 30
    gate.set()


def test_a_file_that_never_opens_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the other clips, and not the decoder's end."""
    gate, original = threading.Event(), cutting.open_clip
    monkeypatch.setattr(cutting, "open_clip", lambda path: gate.wait(60) if "vp8" in str(path) else original(path))
    transform = ClipTransform(SIZE, ("rgb",), train=False)
    begun = time.monotonic()
    with DaliDecoder(("rgb",), 3, SIZE, threads=1, timeout=1.0) as decoder:
        first, second = decoder.load([ClipJob(video(name), transform) for name in ("vp8_webm", "vp9_webm")])
    assert "longer than 1 s" in str(first)
    assert isinstance(second, dict)
    assert time.monotonic() - begun < 20
    gate.set()


# -------------------------------------------------------------------------------------------------------------- refusals


def test_one_bad_clip_is_found_by_halving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tried = DaliDecoder._run, []
    monkeypatch.setattr(DaliDecoder, "_run", lambda self, samples: tried.append(len(samples)) or run(self, samples))
    damaged = spoilt(tmp_path / "damaged.webm")
    transform = ClipTransform(SIZE, ("rgb",), train=False)
    with DaliDecoder(("rgb",), 3, SIZE, threads=1) as decoder:
        clips = decoder.load([ClipJob(damaged if k == 5 else video("vp9_webm"), transform) for k in range(16)])
    assert [k for k, clip in enumerate(clips) if not isinstance(clip, dict)] == [5]
    assert tried == [16, 8, 4, 4, 2, 1, 1, 2, 8]


def spoilt(path: Path) -> Path:
    with cutting.VideoReader(video("vp9_webm")) as reader:
        packet = reader.table.packets[0]
        data = bytearray(video("vp9_webm").read_bytes())
        data[packet.pos + 8 : packet.pos + packet.size] = b"\xff" * (packet.size - 8)
    path.write_bytes(data)
    return path


def test_what_is_refused_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auto_takes_dali: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Two turned clips and a damaged one: each is cut once, each reason is said once, and the second epoch is DALI's and PyAV's at once."""
    turned = [write_video(tmp_path / f"turned{k}.mp4", "mjpeg", 4, rotation=90, pixel_format="yuvj420p") for k in range(2)]
    paths = [video("vp9_webm"), *turned, spoilt(tmp_path / "damaged.webm")]
    table = pd.DataFrame([{"path": str(path), "label": "a", "codec": "vp9", "frames": 4, "width": 128, "height": 96} for path in paths])
    opens: list[str] = []
    original = cutting.open_clip
    monkeypatch.setattr(cutting, "open_clip", lambda path: opens.append(Path(path).name) or original(path))
    auto = ClipLoader(Manifest(table, "/"), ("rgb",), frames=3, size=SIZE, workers=1, decoder="auto")
    first = read(auto, [0, 1, 2, 3])
    assert sorted(opens) == ["damaged.webm", "turned0.mp4", "turned1.mp4", "v.webm"]
    said = warnings_of(caplog)
    assert len(said) == 2
    assert f"DALI does not read 2 clips, such as {turned[0]} (its pictures are stored turned" in said[0]
    assert f"DALI does not read 1 clip, such as {paths[3]} (" in said[1]
    opens.clear()
    runs: list[int] = []
    run = DaliDecoder._run
    monkeypatch.setattr(DaliDecoder, "_run", lambda self, samples: runs.append(len(samples)) or run(self, samples))
    second = read(auto, [0, 1, 2, 3])
    assert opens == ["v.webm"]
    assert runs == [1]
    assert warnings_of(caplog) == said
    np.testing.assert_array_equal(first.clips["rgb"], second.clips["rgb"])
    assert not auto.lost


@pytest.mark.parametrize("decoder", ["auto", "dali"])
def test_a_file_that_cannot_be_read_is_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auto_takes_dali: None, decoder: str
) -> None:
    """It is lost: PyAV would open the same file, and wait for the same storage."""
    opens: list[str] = []
    for module in (clips, cutting):
        original = module.open_clip
        monkeypatch.setattr(module, "open_clip", lambda path, original=original: opens.append(str(path)) or original(path))
    row = {"path": str(tmp_path / "gone.webm"), "label": "a", "codec": "vp9", "frames": 40, "width": 128, "height": 96}
    reader = ClipLoader(Manifest(pd.DataFrame([row]), "/"), ("rgb",), frames=3, size=SIZE, workers=1, decoder=decoder)
    read(reader, [0])
    assert opens == [row["path"]]
    assert reader.lost[0].startswith(f"cannot decode {row['path']!r}: there is no such file")


def test_an_upright_clip_is_decoded_once_to_see_that(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    monkeypatch.setattr(cutting.VideoReader, "turns", property(lambda self: turns.append(0) or 0))
    named = opened("dali", "vp9_webm")
    for _ in range(3):
        read(named, [0])
    assert len(turns) == 1


def test_a_cache_leaves_nothing_for_dali(auto_takes_dali: None) -> None:
    """Its clips come from memory, and the batches stay on the CPU, where they are pinned for the copy to a GPU."""
    cached = opened("auto", "vp9_webm", cache="ram", device="cpu")
    assert cached._dali is None
    assert opened("auto", "vp9_webm")._dali is not None
