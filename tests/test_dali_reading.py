"""The loader with DALI: PyAV's batches within the tolerance; what it does not read PyAV reads, or is lost where DALI was named."""

from __future__ import annotations

import runpy
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from amd_fast.data import loader as loader_module
from amd_fast.data.clips import read_clip
from amd_fast.data.dali import PIXEL_TOLERANCE
from amd_fast.data.decoders import DecoderChoice, dali_installed
from amd_fast.data.loader import BatchBuilder, ClipBatch, ClipLoader
from amd_fast.data.manifest import Manifest
from amd_fast.data.views import IMAGENET_STD
from amd_fast.errors import ConfigError, ImplementationError

pytestmark = pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")
video = runpy.run_path(str(Path(__file__).with_name("made_videos.py")))["video"]
CYCLES = 2e9  # of a GPU in a second, or more
SIZE = 56


def manifest(*names: str) -> Manifest:
    size = {"frames": 40, "width": 128, "height": 96}
    rows = [{"path": str(video(name)), "label": "a", "codec": name.split("_")[0], **size} for name in names]
    return Manifest(pd.DataFrame(rows), "/")


def opened(clips: Manifest, decoder: str, **options: object) -> ClipLoader:
    return ClipLoader(clips, ("rgb", "flow"), frames=3, size=SIZE, flip=True, workers=1, decoder=decoder, **options)


def trained_on(loader: ClipLoader, wanted: list[tuple[int, tuple[int, ...]]]) -> ClipBatch:
    builder = BatchBuilder(len(wanted), loader)
    loader.fill(builder, dict(enumerate(wanted)))
    return builder.finish()


def assert_alike(first: ClipBatch, second: ClipBatch) -> None:
    difference = (first.clips["rgb"] - second.clips["rgb"]) * torch.from_numpy(255 * IMAGENET_STD).view(3, 1, 1)
    assert difference.abs().mean((1, 2, 3, 4)).max() <= PIXEL_TOLERANCE
    np.testing.assert_array_equal(first.positions, second.positions)
    torch.testing.assert_close(first.present, second.present)


def test_batches_are_those_of_pyav() -> None:
    """In training with two seeds of one clip, and in a test with three crops."""
    clips = manifest("vp9_webm", "mjpeg_avi")
    wanted = [(0, (7, 0)), (1, (7, 1)), (0, (7, 2))]
    loaders = [opened(clips, decoder) for decoder in ("dali", "pyav")]
    first, second = (trained_on(loader, wanted) for loader in loaders)
    assert_alike(first, second)
    assert first.clips["rgb"][0].ne(first.clips["rgb"][2]).any()
    assert first.clips["flow"].shape == (3, 3, 2, SIZE, SIZE)
    assert_alike(*(loader.load_test(np.array([1, 0]), crops=3) for loader in loaders))
    assert not loaders[0].lost
    for loader in loaders:
        loader.close()


def test_auto_reads_with_pyav_what_dali_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the codec is DALI's, but of one file it does not know the order of the frames."""
    choices = {"auto": DecoderChoice("dali", "for this test"), "pyav": DecoderChoice("pyav", "for this test")}
    monkeypatch.setattr(loader_module, "choose_decoder", lambda codec, decoder, device: choices[decoder])
    clips = manifest("vp9_webm", "h264_b", "mjpeg_avi")
    auto, plain = opened(clips, "auto"), opened(clips, "pyav")
    wanted = [(k, (1, k)) for k in range(3)]
    first, second = trained_on(auto, wanted), trained_on(plain, wanted)
    assert_alike(first, second)
    assert torch.equal(first.clips["rgb"][1], second.clips["rgb"][1])  # by PyAV itself
    assert not torch.equal(first.clips["rgb"][0], second.clips["rgb"][0])
    assert not auto.lost


def test_auto_on_the_cpu_is_pyav() -> None:
    clips = manifest("vp9_webm", "h264_b")
    first, second = (trained_on(opened(clips, decoder), [(0, (3,)), (1, (4,))]) for decoder in ("auto", "pyav"))
    assert torch.equal(first.clips["rgb"], second.clips["rgb"])


def test_dali_by_name_never_falls_back(tmp_path: Path) -> None:
    with pytest.raises(ImplementationError, match="not h264"):
        opened(manifest("vp9_webm", "h264_b"), "dali")
    with pytest.raises(ConfigError, match="cache='none'"):
        opened(manifest("vp9_webm"), "dali", cache="ram")
    broken = tmp_path / "broken.webm"
    broken.write_bytes(video("vp9_webm").read_bytes()[:300])
    rows = manifest("vp9_webm").table
    table = pd.concat([rows, rows.assign(path=str(broken))], ignore_index=True)
    loader = opened(Manifest(table, "/"), "dali")
    batch = loader.load_test(np.array([0, 1]))
    assert batch.positions.tolist() == [0]
    assert list(loader.lost) == [1]
    assert str(broken) in loader.lost[1]


def on_a_gpu() -> tuple[ClipLoader, ClipLoader, list[tuple[int, tuple[int, ...]]]]:
    """A loader with DALI on the GPU and one with PyAV, and what to read; of the last clip DALI does not decode the codec."""
    clips = manifest("h264_b", "mpeg4_avi", "mjpeg_avi")
    auto = ClipLoader(clips, ("rgb",), frames=3, size=SIZE, flip=True, workers=1, decoder="auto", device="cuda")
    plain = ClipLoader(clips, ("rgb",), frames=3, size=SIZE, flip=True, workers=1, decoder="pyav")
    return auto, plain, [(k, (1, k)) for k in range(3)]


@pytest.mark.gpu
def test_batches_on_a_gpu() -> None:
    auto, plain, wanted = on_a_gpu()
    first, second = trained_on(auto, wanted), trained_on(plain, wanted)
    assert first.clips["rgb"].is_cuda
    first.clips["rgb"] = first.clips["rgb"].cpu()
    assert_alike(first, second)
    assert not auto.lost
    for loader in (auto, plain):
        loader.close()


@pytest.mark.gpu
@pytest.mark.xfail(reason="on an H100, with DALI 2.4.0, the batch came only after the long kernel had ended; why is not known")
def test_a_batch_is_read_while_a_long_kernel_runs() -> None:
    auto, plain, wanted = on_a_gpu()
    plain.close()
    trained_on(auto, wanted)  # starts everything
    started = time.perf_counter()
    trained_on(auto, wanted)
    torch.cuda.synchronize()
    alone = time.perf_counter() - started
    torch.cuda._sleep(round(min(5 * alone + 1, 20) * CYCLES))
    busy = torch.cuda.Event()
    busy.record()
    trained_on(auto, wanted)
    waited = busy.query()
    auto.close()
    assert not waited


def test_one_clip() -> None:
    for train in (False, True):
        first, second = (
            read_clip(video("vp9_webm"), 4, SIZE, decoder=decoder, train=train, flip=True, rng=np.random.default_rng(2))["rgb"]
            for decoder in ("dali", "pyav")
        )
        assert ((first - second) * torch.from_numpy(255 * IMAGENET_STD).view(3, 1, 1)).abs().mean() <= PIXEL_TOLERANCE
        assert not torch.equal(first, second)
