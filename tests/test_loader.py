"""The loader: clips shared within a batch, tests with crops and cache, and every fault in the middle of an epoch."""

from __future__ import annotations

import logging
import os
import runpy
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amd_fast.data import clips as clips_module
from amd_fast.data import cutting as cutting_module
from amd_fast.data.clips import ClipTransform, decode_clip, decode_draws
from amd_fast.data.decoders import dali_installed
from amd_fast.data.loader import BatchBuilder, ClipLoader
from amd_fast.data.losses import LEAST_LOST, Losses
from amd_fast.data.manifest import Manifest
from amd_fast.errors import ConfigError, DataError
from amd_fast.training.batches import EpisodeBatches, TrainBatch
from amd_fast.training.config import EpisodeOptions

HELPERS = runpy.run_path(str(Path(__file__).with_name("tiny_clips.py")))
FRAMES, write_manifest = HELPERS["FRAMES"], HELPERS["write_manifest"]
EPISODES = EpisodeOptions(ways=3, shots=1, queries=2, per_step=2)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    made: Manifest = write_manifest(tmp_path_factory.mktemp("clips"))
    return made


def load(loader: ClipLoader, wanted: list[tuple[int, tuple[int, ...]]]) -> BatchBuilder:
    builder = BatchBuilder(len(wanted), loader)
    loader.fill(builder, dict(enumerate(wanted)))
    return builder


# ---------------------------------------------------------------------------------------------------- what is loaded


def test_several_draws_equal_single_ones(manifest: Manifest, tmp_path: Path) -> None:
    np.save(tmp_path / "thermal.npy", np.random.default_rng(0).random((5, 6, 8)))
    options: dict[str, Any] = {"short_side": 24, "modalities": ("rgb", "flow", "thermal"), "extra": {"thermal": tmp_path / "thermal.npy"}}
    together = decode_draws(manifest.file(0), 4, [np.random.default_rng(k) for k in range(5)] + [None], **options)
    for k, clip in enumerate(together):
        single = decode_clip(manifest.file(0), 4, rng=None if k == 5 else np.random.default_rng(k), **options)
        assert clip.keys() == single.keys() and all(np.array_equal(clip[name], single[name]) for name in clip)


@pytest.mark.parametrize("kind", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_training_clips_are_decoded_and_augmented_by_their_seed_alone(manifest: Manifest, kind: Any) -> None:
    options: dict[str, Any] = {"flip": True, "scale": (0.5, 1.0), "colour": 0.4, "speed": 1.5}
    loader = ClipLoader(manifest, ("rgb", "flow"), frames=3, size=16, workers=2, worker_kind=kind, **options)
    wanted = [(5, (7, 1)), (0, (7, 2)), (5, (7, 3)), (5, (7, 1))]
    builder = load(loader, wanted)
    batch = builder.finish()
    assert batch.positions.tolist() == [5, 0, 5, 5] and batch.present.all()
    transform = ClipTransform(16, ("rgb", "flow"), train=True, **options)
    for row, (position, seed) in enumerate(wanted):
        rng = np.random.default_rng(seed)
        raw = decode_clip(manifest.file(position), 3, short_side=18, modalities=("rgb", "flow"), rng=rng)
        for name, clip in transform(raw, rng).items():
            assert torch.equal(batch.clips[name][row], clip)
    loader.close()


def count_opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened: list[str] = []
    original = clips_module.open_clip

    def counting(path: Any) -> Any:
        opened.append(Path(path).name)
        return original(path)

    monkeypatch.setattr(clips_module, "open_clip", counting)
    return opened


def test_a_clip_that_comes_twice_in_a_batch_is_opened_once(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = count_opens(monkeypatch)
    loader = ClipLoader(manifest, ("rgb",), frames=3, size=16, workers=2)
    load(loader, [(position, (place,)) for place, position in enumerate([4, 2, 4, 4, 2, 9])])
    assert sorted(opened) == ["002.mp4", "004.mp4", "009.mp4"]
    opened.clear()
    batch = loader.load_test(np.array([3, 1, 3]), crops=2)
    assert sorted(opened) == ["001.mp4", "003.mp4"] and batch.positions.tolist() == [3, 1, 3]
    assert torch.equal(batch.clips["rgb"][:2], batch.clips["rgb"][4:])


@pytest.mark.parametrize("kind", ["thread", pytest.param("process", marks=pytest.mark.slow)])
@pytest.mark.parametrize("crops", [1, 3])
def test_test_clips_are_views_of_the_centre_frames(manifest: Manifest, kind: Any, crops: int) -> None:
    loader = ClipLoader(manifest, ("rgb", "flow"), frames=3, size=16, workers=1, worker_kind=kind)
    batch = loader.load_test(np.array([7, 2]), crops)
    places = [None] if crops == 1 else [0.0, 0.5, 1.0]
    expected = []
    for position in (7, 2):
        raw = decode_clip(manifest.file(position), 3, short_side=18, modalities=("rgb", "flow"))
        expected += [ClipTransform(16, ("rgb", "flow"), train=False, place=place)(raw) for place in places]
    for name in ("rgb", "flow"):
        assert torch.equal(batch.clips[name], torch.stack([clip[name] for clip in expected]))
    loader.close()


def test_tests_leave_out_lost_clips_and_refuse_no_crops(manifest: Manifest, tmp_path: Path) -> None:
    table = manifest.table.assign(path=[str(manifest.file(row)) for row in range(len(manifest))])
    table.loc[1, "path"] = str(tmp_path / "gone.mp4")
    loader = ClipLoader(Manifest(table, tmp_path), ("rgb",), frames=3, size=16, workers=2)
    batch = loader.load_test(np.array([0, 1, 2, 1]), crops=2)
    whole = ClipLoader(manifest, ("rgb",), frames=3, size=16).load_test(np.array([0, 2]), crops=2)
    assert batch.positions.tolist() == [0, 2] and torch.equal(batch.clips["rgb"], whole.clips["rgb"]) and len(batch.present) == 4
    assert list(loader.lost) == [1] and "gone.mp4" in loader.lost[1]
    assert loader.load_test(np.array([1])).clips["rgb"].shape == (0, 3, 3, 16, 16)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        loader.load_test(np.array([0]), crops=0)


@pytest.mark.parametrize("kind", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_what_is_in_the_cache_is_not_opened_again(manifest: Manifest, tmp_path: Path, kind: Any) -> None:
    folder = tmp_path / "clips"
    shutil.copytree(manifest.root, folder)
    table = Manifest(manifest.table, folder)
    options: dict[str, Any] = {"frames": 3, "size": 16, "workers": 1, "worker_kind": kind, "cache": "ram"}
    tests, training = ClipLoader(table, ("rgb",), cache_frames=1, **options), ClipLoader(table, ("rgb",), **options)
    first = tests.load_test(np.arange(4))
    training.fill_cache(progress=False)
    expected = load(training, [(5, (0,)), (0, (1,))]).finish()
    shutil.rmtree(folder)
    again = tests.load_test(np.array([3, 0, 9]))
    assert again.positions.tolist() == [3, 0] and torch.equal(again.clips["rgb"], first.clips["rgb"][[3, 0]]) and list(tests.lost) == [9]
    assert torch.equal(load(training, [(5, (0,)), (0, (1,))]).finish().clips["rgb"], expected.clips["rgb"]) and not training.lost
    plain = ClipLoader(manifest, ("rgb",), frames=3, size=16, workers=1).load_test(np.arange(4))
    assert torch.equal(first.clips["rgb"], plain.clips["rgb"])
    for loader in (tests, training):
        loader.close()


# --------------------------------------------------------------------------------------- faults in the middle of an epoch


MODALITIES = ("rgb", "thermal")
STEPS = 9


DECODERS = {"mpeg4": "pyav", "vp9": "dali"}  # what reads the clips of a codec here, without a GPU
by_dali = pytest.param("vp9", marks=pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed"), id="dali")


@pytest.fixture(scope="module", params=[pytest.param("mpeg4", id="pyav"), by_dali])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, list[TrainBatch], int]:
    """Clips, an epoch of them without any fault, and the clip that most of its later part shows."""
    table = write_manifest(tmp_path_factory.mktemp("whole"), classes=3, per_group=2, thermal=True, codec=request.param)
    whole = epoch(open_loader(table), table)
    return table, whole, int(np.bincount(np.concatenate([batch.positions for batch in whole[5:]])).argmax())


@pytest.fixture
def table(undisturbed: tuple[Manifest, list[TrainBatch], int], tmp_path: Path) -> Manifest:
    """A copy of the clips, to be spoilt."""
    shutil.copytree(undisturbed[0].root, tmp_path / "clips")
    return Manifest(undisturbed[0].table, tmp_path / "clips")


def open_loader(table: Manifest, **options: Any) -> ClipLoader:
    decoder = DECODERS[table.table["codec"].iloc[0]]
    return ClipLoader(table, MODALITIES, **{"frames": 3, "size": 16, "workers": 2, "decoder": decoder, **options})


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def make_unreadable(path: Path) -> None:
    """Root may read everything; a link that leads to itself, nobody."""
    if os.geteuid():
        path.chmod(0)
    else:
        path.unlink()
        path.symlink_to(path)


def rows(batches: list[TrainBatch]) -> Iterator[tuple[tuple[int, int], int, dict[str, torch.Tensor]]]:
    """Episode and place, position, and clips of every row."""
    for batch in batches:
        places = len(batch.positions) // len(batch.episodes)
        for row, position in enumerate(batch.positions.tolist()):
            yield (batch.episodes[row // places], row % places), position, {name: clip[row] for name, clip in batch.clips.items()}


def assert_only_the_victim_is_replaced(found: list[TrainBatch], expected: list[TrainBatch], victim: int, manifest: Manifest) -> int:
    """Every other clip of the epoch is bit for bit what it was; returns how often the victim was replaced."""
    replaced = 0
    for (key, position, clips), (other_key, wanted, reference) in zip(rows(found), rows(expected), strict=True):
        assert key == other_key
        if wanted == victim and position != victim:
            replaced += 1
            assert manifest.labels[position] == manifest.labels[victim]
        else:
            assert position == wanted and all(torch.equal(clips[name], reference[name]) for name in clips)
    for batch in found:
        for row in range(len(batch.episodes)):
            members = batch.positions.reshape(len(batch.episodes), -1)[row]
            support, query = manifest.groups[members[:3]], manifest.groups[members[3:]]
            assert not set(support) & set(query) and len(set(members)) == len(members)
    return replaced


def epoch(loader: ClipLoader, manifest: Manifest, fault: Callable[[], None] | None = None) -> list[TrainBatch]:
    batches = EpisodeBatches(manifest, loader, EPISODES, 0, prefetch=1)
    found = []
    for batch in batches.stream(0, STEPS):
        found.append(batch)
        if fault is not None and batch.step == 3:
            fault()
    return found


Undisturbed = tuple[Manifest, list[TrainBatch], int]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (delete, "thread"),
        (truncate, "thread"),
        (empty, "thread"),
        (garbage, "thread"),
        (make_unreadable, "thread"),
        pytest.param(garbage, "process", marks=pytest.mark.slow),
    ],
)
def test_a_file_that_goes_bad_costs_its_clip_alone(
    undisturbed: Undisturbed, table: Manifest, fault: Any, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, whole, victim = undisturbed
    loader = open_loader(table, worker_kind=kind)
    with caplog.at_level(logging.WARNING):
        found = epoch(loader, table, lambda: fault(Path(table.file(victim))))
    assert assert_only_the_victim_is_replaced(found, whole, victim, table) >= 1
    assert list(loader.lost) == [victim]
    assert [record.getMessage().startswith(f"clip {table.file(victim)} lost: ") for record in caplog.records] == [True]
    loader.close()


def make_pipe(path: Path) -> None:
    """A file that never answers: a pipe nobody writes to. (Videos that are pipes are refused, arrays are not.)"""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["thread", pytest.param("process", marks=pytest.mark.slow)])
def test_a_read_that_hangs_is_lost_after_its_time(
    undisturbed: Undisturbed, table: Manifest, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, whole, victim = undisturbed
    pipe = table.root / f"{victim:03}.npy"
    loader = open_loader(table, worker_kind=kind, timeout=1.0)
    with caplog.at_level(logging.WARNING):
        found = epoch(loader, table, lambda: make_pipe(pipe))
    assert assert_only_the_victim_is_replaced(found, whole, victim, table) >= 1
    assert list(loader.lost) == [victim] and "longer than 1 s" in loader.lost[victim] and str(table.file(victim)) in caplog.text
    os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))  # lets go the thread that hangs in opening it
    loader.close()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.slow
def test_a_decoder_that_crashes_its_process_costs_its_clip_alone(undisturbed: Undisturbed, table: Manifest) -> None:
    _, whole, victim = undisturbed
    pipe = table.root / f"{victim:03}.npy"
    loader = open_loader(table, workers=1, worker_kind="process")

    def crash_while_it_reads() -> None:
        """Opening a pipe for writing fails until somebody is there to read: the process is in the middle of the clip then."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                time.sleep(0.01)
                continue
            for process in loader.processes():
                os.kill(process, signal.SIGSEGV)
            os.close(writer)
            return

    crasher = threading.Thread(target=crash_while_it_reads, daemon=True)

    def fault() -> None:
        make_pipe(pipe)
        crasher.start()

    found = epoch(loader, table, fault)
    assert assert_only_the_victim_is_replaced(found, whole, victim, table) >= 1
    assert list(loader.lost) == [victim] and "SIGSEGV" in loader.lost[victim]
    loader.close()


def test_a_slow_mount_costs_the_clips_it_holds_up(undisturbed: Undisturbed, table: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that hang are replaced, so that the other clips are read meanwhile."""
    _, whole, victim = undisturbed
    gate, original = threading.Event(), clips_module.open_clip
    slow: list[Path] = []

    def open_clip(path: Any) -> Any:
        if Path(path) in slow:
            gate.wait(30)
        return original(path)

    for module in (clips_module, cutting_module):
        monkeypatch.setattr(module, "open_clip", open_clip)
    loader = open_loader(table, timeout=0.8)
    found = epoch(loader, table, lambda: slow.append(Path(table.file(victim))))
    assert assert_only_the_victim_is_replaced(found, whole, victim, table) >= 1
    assert "slow or dead storage" in loader.lost[victim]
    gate.set()
    loader.close()


# ------------------------------------------------------------------------------------------------------ too many losses


def test_too_many_lost_clips_stop_the_epoch_with_a_summary(tmp_path: Path) -> None:
    table = write_manifest(tmp_path)
    for number in range(0, 24, 2):
        delete(table.file(number)) if number % 4 else garbage(table.file(number))
    batches = EpisodeBatches(table, ClipLoader(table, ("rgb",), frames=3, size=16, workers=2), EPISODES, 0)
    with pytest.raises(DataError, match=r"1[012] of the \d+ clips read so far are lost, more than data\.max_lost=0\.1 allows") as stopped:
        for _ in batches.stream(0, 100):
            pass
    text = str(stopped.value)
    assert " x cannot decode '…': there is no such file" in text and " x cannot decode '…': it cannot be opened" in text
    assert text.count(".mp4") == 5 and str(tmp_path) in text
    tolerant = EpisodeBatches(table, ClipLoader(table, ("rgb",), frames=3, size=16, workers=2, max_lost=0.6), EPISODES, 0)
    for batch in tolerant.stream(0, 30):
        assert (batch.positions % 2 == 1).all()
    assert len(tolerant.loader.lost) == 12


def test_the_share_counts_clips_not_readings() -> None:
    losses = Losses(1000, 0.1)
    losses.see(range(90))
    for position in range(LEAST_LOST - 1):
        losses.add(position, f"{position}.mp4", "gone")
        losses.add(position, f"{position}.mp4", "gone again")  # the same clip
    with pytest.raises(DataError, match="10 of the 90"):
        losses.add(50, "50.mp4", "gone")
    losses.see(range(200))
    losses.add(60, "60.mp4", "gone")  # 11 of 200
    assert len(losses.reasons) == 11 and losses.reasons[0] == "gone"


def test_clips_of_another_shape_are_named(tmp_path: Path) -> None:
    table = write_manifest(tmp_path, thermal=True)
    np.save(tmp_path / "002.npy", np.zeros((FRAMES, 6, 8, 3), np.float32))
    loader = ClipLoader(table, ("rgb", "thermal"), frames=3, size=16, workers=1)
    load(loader, [(0, (0,)), (1, (1,)), (2, (2,))])
    assert list(loader.lost) == [2] and "thermal is [3, 3, 16, 16] where other clips have [3, 1, 16, 16]" in loader.lost[2]


def test_an_unexpected_error_of_the_decoder_is_a_lost_clip_a_wrong_setting_is_not(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Any) -> Any:
        raise error

    monkeypatch.setattr(clips_module, "open_clip", broken)
    loader = ClipLoader(manifest, ("rgb",), frames=3, size=16, workers=1)
    error: Exception = ZeroDivisionError("in a corner of the decoder")
    load(loader, [(0, (0,))])
    assert "unexpected ZeroDivisionError (in a corner" in loader.lost[0]
    error = ConfigError("no such decoder")
    with pytest.raises(ConfigError, match="no such decoder"):
        load(loader, [(1, (0,))])
