"""Training batches: a pure function of seed and step on any number of processes and workers; memory bounded; replay."""

from __future__ import annotations

import gc
import logging
import os
import runpy
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amd_fast.data.loader import ClipLoader
from amd_fast.data.manifest import Manifest
from amd_fast.data.substitutes import Substitutes
from amd_fast.errors import ConfigError, DataError
from amd_fast.training.batches import EpisodeBatches, TrainBatch
from amd_fast.training.config import EpisodeOptions

write_manifest = runpy.run_path(str(Path(__file__).with_name("tiny_clips.py")))["write_manifest"]
FOUR = EpisodeOptions(ways=3, shots=1, queries=2, per_step=4)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    made: Manifest = write_manifest(tmp_path_factory.mktemp("clips"))
    return made


def make(
    manifest: Manifest, options: EpisodeOptions = FOUR, *, seed: int = 3, loader: dict[str, Any] | None = None, **more: Any
) -> EpisodeBatches:
    reading = {"frames": 3, "size": 16, "flip": True, "colour": 0.3, "workers": 2, **(loader or {})}
    made = ClipLoader(manifest, ("rgb", "flow"), **reading)
    made.fill_cache(progress=False)
    return EpisodeBatches(manifest, made, options, seed, **more)


def by_episode(batches: list[TrainBatch]) -> dict[int, dict[str, Any]]:
    """What belongs to each episode."""
    result = {}
    for batch in batches:
        count = len(batch.episodes)
        for row, episode in enumerate(batch.episodes):
            assert episode not in result, "two processes have the same episode"
            result[episode] = {name: clip.unflatten(0, (count, -1))[row] for name, clip in batch.clips.items()} | {
                "present": batch.present.unflatten(0, (count, -1))[row],
                "positions": batch.positions.reshape(count, -1)[row],
                "base_class": batch.base_class.unflatten(0, (count, -1))[row],
                "support_label": batch.support_label[row],
                "query_label": batch.query_label[row],
            }
    return result


def assert_same(first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]]) -> None:
    assert first.keys() == second.keys()
    for episode, values in first.items():
        for name, value in values.items():
            assert np.array_equal(np.asarray(value), np.asarray(second[episode][name])), (episode, name)


def test_a_batch_holds_the_episodes_of_its_step(manifest: Manifest) -> None:
    batches = make(manifest)
    batch = batches.batch(5)
    assert list(batch.episodes) == [20, 21, 22, 23] and batch.step == 5
    for episode, values in by_episode([batch]).items():
        drawn = batches.sampler(episode)
        assert values["positions"].tolist() == [*drawn.support, *drawn.query]
        names = manifest.labels[values["positions"]]
        assert list(names[:3]) == list(drawn.classes) == [batches.classes[code] for code in values["base_class"][:3]]
        assert list(names[3:]) == [drawn.classes[label] for label in values["query_label"]]
    assert batch.clips["rgb"].shape == (36, 3, 3, 16, 16) and batch.clips["flow"].shape == (36, 3, 2, 16, 16) and batch.present.all()


@pytest.mark.parametrize("cache", ["none", "ram"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_out_the_same_episodes(manifest: Manifest, world_size: int, cache: str) -> None:
    alone = by_episode(list(make(manifest, loader={"cache": cache}).stream(0, 3)))
    ranks = [make(manifest, rank=rank, world_size=world_size, loader={"cache": cache, "workers": 1 + rank}) for rank in range(world_size)]
    parts = [batch for rank in ranks for batch in rank.stream(0, 3)]
    assert [list(batch.episodes) for batch in parts[:2]] == [list(range(0, 4, world_size)), list(range(4, 8, world_size))]
    assert_same(by_episode(parts), alone)


def test_one_episode_a_process_is_step_times_world_size_plus_rank(manifest: Manifest) -> None:
    for rank in range(4):
        assert list(make(manifest, rank=rank, world_size=4).batch(7).episodes) == [7 * 4 + rank]


def test_any_start_any_order_any_workers(manifest: Manifest) -> None:
    whole = by_episode(list(make(manifest, prefetch=3).stream(0, 6)))
    other = make(manifest, loader={"workers": 1}, prefetch=1)
    later = [*other.stream(4, 6), other.batch(3), other.batch(0), other.batch(2), other.batch(1)]
    assert_same(by_episode(later), whole)
    assert not np.array_equal(by_episode([make(manifest, seed=4).batch(0)])[0]["rgb"], whole[0]["rgb"])


def test_an_episode_does_not_depend_on_the_others_of_its_batch(manifest: Manifest) -> None:
    one = EpisodeOptions(ways=3, shots=1, queries=2, per_step=1)
    alone = make(manifest, one)
    assert_same(by_episode([alone.batch(number) for number in range(4, 8)]), by_episode([make(manifest).batch(1)]))


@pytest.mark.slow
def test_processes_give_the_same_batches_as_threads_and_resume(manifest: Manifest) -> None:
    threads = by_episode(list(make(manifest).stream(0, 4)))
    one, two = make(manifest, loader={"worker_kind": "process"}), make(manifest, loader={"worker_kind": "process", "workers": 1})
    assert_same(by_episode([*one.stream(0, 2), *two.stream(2, 4)]), threads)
    assert len(one.loader.processes()) == 2
    one.loader.close()
    two.loader.close()


def test_numbers_that_do_not_fit_are_refused(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match=r"per_step=4 episodes.*world_size=3"):
        make(manifest, world_size=3)
    with pytest.raises(ConfigError, match="number 2"):
        make(manifest, rank=2, world_size=2)
    with pytest.raises(ConfigError, match=r"data\.prefetch must be at least 1"):
        make(manifest, prefetch=0)


def test_replay_feeds_the_first_batches_over_and_over(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    fresh = [make(manifest).batch(step) for step in range(2)]
    batches = make(manifest, replay=2)
    with caplog.at_level(logging.WARNING):
        replayed = list(batches.stream(3, 8))
    assert "replay of 2 stored batches" in caplog.text and "accuracies mean nothing" in caplog.text
    assert [batch.step for batch in replayed] == [3, 4, 5, 6, 7]
    for batch in replayed:
        assert torch.equal(batch.clips["rgb"], fresh[batch.step % 2].clips["rgb"]) and batch.episodes == fresh[batch.step % 2].episodes
    batches.loader.close()
    again = next(batches.stream(9, 10))  # nothing is read any more
    assert again.clips["rgb"] is replayed[0].clips["rgb"]


def test_an_error_reaches_the_training_loop_and_ends_the_stream(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make(manifest)
    monkeypatch.setattr(batches, "batch", lambda step: (_ for _ in ()).throw(DataError(f"step {step} lost")))
    before = set(threading.enumerate())
    with pytest.raises(DataError, match="step 7 lost"):
        next(batches.stream(7, 9))
    assert not set(threading.enumerate()) - before


def test_a_stream_left_early_stops_reading(manifest: Manifest) -> None:
    batches = make(manifest)
    before = set(threading.enumerate())
    stream = batches.stream(0, 10_000)
    next(stream)
    stream.close()
    assert not set(threading.enumerate()) - before
    assert batches.batch(0).episodes == range(4)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_batches_in_memory_are_bounded(manifest: Manifest, prefetch: int) -> None:
    batches = make(manifest, prefetch=prefetch)
    made: list[weakref.ref[TrainBatch]] = []
    real = batches.batch(0)

    def batch(step: int) -> TrainBatch:
        new = replace(real, step=step)  # faster than any reading
        made.append(weakref.ref(new))
        return new

    batches.batch = batch  # type: ignore[method-assign]

    def alive() -> int:
        return sum(reference() is not None for reference in made)

    most = 0
    for _batch in batches.stream(0, 10):
        deadline = time.monotonic() + 5  # until as much is read ahead as can be
        while alive() <= prefetch and len(made) < 10 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.1)  # long enough to read one more, if that were allowed
        most = max(most, alive())
    del _batch
    gc.collect()
    assert prefetch + 1 <= most <= prefetch + 2, "prefetch is either not used or exceeded"
    assert len(made) == 10 and alive() == 0


def resident() -> int:
    """Bytes of memory this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_files_and_threads_stay_flat_over_two_thousand_episodes(manifest: Manifest) -> None:
    options = EpisodeOptions(ways=2, shots=1, queries=1, per_step=10)
    made = ClipLoader(manifest, ("rgb",), frames=2, size=16, workers=2)
    batches = EpisodeBatches(manifest, made, options, 0)
    seen = [
        (resident(), len(os.listdir("/proc/self/fd")), threading.active_count())
        for batch in batches.stream(0, 200)
        if batch.step % 20 == 19
    ]
    memory, files, threads = (np.array(column) for column in zip(*seen, strict=True))
    # 6 MiB: the allocator's slack. One episode that stayed in memory would add 2 000 x 4 clips x 6 KiB = 47 MiB.
    assert memory[4:].max() - memory[2] < 6 * 2**20
    assert files.max() - files.min() <= 4 and threads.max() == threads.min()


# ---------------------------------------------------------------------------------------------------------- stand-ins


@st.composite
def episodes_with_losses(draw: st.DrawFn) -> tuple[Substitutes, np.ndarray, np.ndarray, np.ndarray, int, set[int], int]:
    clips = draw(st.integers(2, 9))
    labels = np.repeat(np.arange(3), clips)
    groups = np.array(draw(st.lists(st.integers(0, 8), min_size=3 * clips, max_size=3 * clips)))
    order = [draw(st.permutations(range(clips))) for _ in range(3)]
    shots, queries = draw(st.integers(1, clips - 1)), 1
    support = [label * clips + item for label in range(3) for item in order[label][:shots]]
    query = [label * clips + item for label in range(3) for item in order[label][shots : shots + queries]]
    lost = draw(st.sets(st.integers(0, 3 * clips - 1), max_size=2 * clips))
    drawn = np.array([*support, *query])
    return Substitutes(labels.astype(str), groups.astype(str)), labels, groups, drawn, len(support), lost, draw(st.integers(0, 2**63))


@given(episodes_with_losses())
def test_a_stand_in_has_the_class_and_keeps_the_sides_apart(
    case: tuple[Substitutes, np.ndarray, np.ndarray, np.ndarray, int, set[int], int],
) -> None:
    substitutes, labels, groups, drawn, shots, lost, key = case
    found = substitutes.compose(drawn, shots, lost, key)
    gone = np.isin(drawn, list(lost))
    if not gone.any():
        assert np.array_equal(found, drawn)
        return
    drawn, gone = drawn[found >= 0], gone[found >= 0]
    shots, found = int((found[:shots] >= 0).sum()), found[found >= 0]
    assert np.array_equal(found[~gone], drawn[~gone]) and not set(found.tolist()) & lost
    assert np.array_equal(labels[found], labels[drawn])
    for place in np.flatnonzero(gone):
        own, other = (found[:shots], found[shots:]) if place < shots else (found[shots:], found[:shots])
        assert groups[found[place]] not in groups[other]
        if (own == found[place]).sum() > 1:  # twice only where the class has nobody else for this side
            before = [clip for side in (own,) for clip in side]
            free = [c for c in np.flatnonzero(labels == labels[found[place]]) if c not in lost and c not in before]
            assert all(groups[clip] in groups[other] for clip in free)


@given(episodes_with_losses())
def test_who_stands_in_does_not_depend_on_when_the_losses_were_found(
    case: tuple[Substitutes, np.ndarray, np.ndarray, np.ndarray, int, set[int], int],
) -> None:
    substitutes, _, _, drawn, shots, lost, key = case
    known: set[int] = set()
    while True:  # as the loader does: compose, read, and compose anew with the losses found
        found = substitutes.compose(drawn, shots, known, key)
        new = set(found.tolist()) & lost - known
        if not new:
            break
        known |= new
    assert np.array_equal(found, substitutes.compose(drawn, shots, lost, key))


def test_where_a_class_is_lost_other_classes_are_drawn(tmp_path: Path) -> None:
    table = write_manifest(tmp_path, classes=4, clips=3)
    options = EpisodeOptions(ways=2, shots=1, queries=1)
    whole = by_episode([make(table, options).batch(step) for step in range(12)])
    for number in range(3):
        table.file(number).unlink()
    batches = make(table, options, loader={"max_lost": 1.0})
    found = by_episode([batches.batch(step) for step in range(12)])
    for episode, values in found.items():
        assert "class 0" not in manifest_labels(table, values["positions"]) and len(set(values["base_class"].tolist())) == 2
        if "class 0" not in manifest_labels(table, whole[episode]["positions"]):
            assert torch.equal(values["rgb"], whole[episode]["rgb"])
    assert sorted(batches.loader.lost) == [0, 1, 2]
    again = make(table, options, loader={"max_lost": 1.0})
    assert_same(by_episode([again.batch(step) for step in reversed(range(12))]), found)  # found in another order, the same in the end


def manifest_labels(table: Manifest, positions: np.ndarray) -> set[str]:
    return set(table.labels[positions].tolist())


def test_where_no_episode_can_be_made_the_reasons_are_given(tmp_path: Path) -> None:
    table = write_manifest(tmp_path, classes=2, clips=3)
    for number in range(3):
        table.file(number).unlink()
    with pytest.raises(DataError, match=r"too many clips are lost to make episode 0.*[23] x .*no such file"):
        make(table, EpisodeOptions(ways=2, shots=1, queries=1)).batch(0)


def test_a_missing_modality_is_zeros(tmp_path: Path) -> None:
    table = write_manifest(tmp_path, classes=2, clips=3, thermal=True)
    changed = pd.DataFrame(table.table)
    changed.loc[[0, 3], "thermal"] = ""
    table = Manifest(changed, tmp_path)
    loader = ClipLoader(table, ("rgb", "thermal"), frames=3, size=16, workers=1)
    batch = EpisodeBatches(table, loader, EpisodeOptions(ways=2, shots=1, queries=2), 0).batch(0)
    lacking = np.isin(batch.positions, [0, 3])
    assert lacking.any() and np.array_equal(~batch.present[:, 1].numpy(), lacking) and batch.present[:, 0].all()
    assert not batch.clips["thermal"][lacking].any() and batch.clips["thermal"][~lacking].flatten(1).any(1).all()


@pytest.mark.gpu
def test_pinned_batches_are_copied_while_the_gpu_computes(manifest: Manifest) -> None:
    batch = make(manifest, pinned=True).batch(0)
    assert all(clip.is_pinned() for clip in batch.clips.values())
    assert torch.equal(batch.clips["rgb"].to("cuda", non_blocking=True).cpu(), make(manifest).batch(0).clips["rgb"])
