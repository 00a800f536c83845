"""Lists of episodes: written, hashed, read back, and scored to the same numbers as the seed that made them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import amd_fast
from amd_fast.cli import main
from amd_fast.data.manifest import Manifest
from amd_fast.errors import DataError, EpisodeError
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.evaluation.protocol import Condition, evaluate, list_episodes
from amd_fast.evaluation.protocol_file import EpisodeList

ODD = ["a,b.mp4", 'c"d.mp4', "e#f & g;h!.mp4", "ünï\udce9.mp4", "# {x}.mp4", " spaced .mp4", "line\nbreak.mp4", "cr\rhere.mp4"]


def bank(clips: int = 8, classes: int = 6, seed: int = 0, damage: bool = False) -> FeatureBank:
    generator = torch.Generator().manual_seed(seed)
    label = np.repeat([f"class {i}" for i in range(classes)], clips)
    tokens = 0.6 * torch.randn(classes, 1, 1, 32, generator=generator).repeat_interleave(clips, 0)
    tokens = tokens + torch.randn(len(label), 2, 3, 32, generator=generator)
    names = [f"{label[i]}/{i}.mp4" for i in range(len(label))]
    names[: len(ODD)] = ODD
    table = pd.DataFrame({"path": names, "label": label, "group": [str(i // 2) for i in range(len(label))]}, dtype=object)
    if damage:
        table["damage"] = np.where(np.arange(len(label)) % 3 == 0, "dark", "")
        table["damaged_modality"] = np.where(table["damage"] == "dark", "rgb", "")
    return FeatureBank(tokens.numpy(), np.zeros((len(label), 2, 3), np.float32), table, {})


@pytest.fixture(scope="module")
def model() -> amd_fast.AFMIR:
    torch.manual_seed(0)
    return amd_fast.create_model("afmir_small", dim=32).eval()


def equal(a: EpisodeList, b: EpisodeList) -> bool:
    return all((x == y).all() for x, y in ((a.classes, b.classes), (a.support, b.support), (a.query, b.query)))


@pytest.mark.parametrize("name", ["list.csv", "list.csv.gz"])
def test_a_file_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    listed = list_episodes(bank(), Condition(ways=3, shots=2, queries=2, episodes=40, seed=7))
    path = tmp_path / name
    listed.write(path)
    first = path.read_bytes()
    listed.write(path)
    assert path.read_bytes() == first
    again = EpisodeList.read(path)
    assert equal(listed, again) and again.hash == listed.hash and (again.seed, again.query_clips) == (7, "all")
    assert (again.ways, again.shots, again.queries, len(again)) == (3, 2, 2, 40)
    content = gzip.decompress(first) if name.endswith("gz") else first
    header, _, table = content.partition(b"\n")
    assert json.loads(header[1:])["sha256"] == hashlib.sha256(table).hexdigest() == listed.hash
    text = table.decode("utf-8", "surrogateescape")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == 120 and set(rows[0]) == {"episode", "class", "support_1", "support_2", "query_1", "query_2"}
    assert rows[4]["query_2"] == listed.query[1, 1, 1]


@given(seed=st.integers(0, 2**40), ways=st.integers(2, 5), shots=st.integers(1, 3), queries=st.integers(1, 2), episodes=st.integers(1, 30))
def test_support_and_query_share_neither_clip_nor_group(seed: int, ways: int, shots: int, queries: int, episodes: int) -> None:
    clips = bank()
    listed = list_episodes(clips, Condition(ways, shots, queries, episodes, seed))
    group, label = (dict(zip(clips.table["path"], clips.table[name], strict=True)) for name in ("group", "label"))
    for number in range(episodes):
        support, query = listed.support[number].ravel().tolist(), listed.query[number].ravel().tolist()
        assert len({*support, *query}) == len(support) + len(query)
        assert {group[name] for name in support}.isdisjoint(group[name] for name in query)
        for way in range(ways):
            assert {label[name] for name in (*listed.support[number, way], *listed.query[number, way])} == {listed.classes[number, way]}


@pytest.mark.parametrize("damage", [False, True])
def test_scores_from_a_file_equal_those_of_its_seed(tmp_path: Path, model: amd_fast.AFMIR, damage: bool) -> None:
    clips, learning = bank(damage=damage), bank(seed=1, damage=damage)
    drawn = evaluate(model, clips, ways=4, shots=(1, 2), episodes=60, seed=5, calibration=learning, calibration_episodes=50)
    lists = []
    for shots in (1, 2):
        for kind in ("clean", "damaged") if damage else ("all",):
            path = tmp_path / f"{shots}{kind}.csv.gz"
            list_episodes(clips, Condition(4, shots, 1, 60, 5, kind)).write(path)  # type: ignore[arg-type]
            lists.append(EpisodeList.read(path))
    listed = evaluate(model, clips, listed=lists, calibration=learning, calibration_episodes=50)
    for one, two, file in zip(drawn.conditions, listed.conditions, lists, strict=True):
        assert one.name == two.name and one.protocol == two.protocol == file.hash
        assert all(np.array_equal(one.log_probs[name], two.log_probs[name]) for name in one.methods)
        assert np.array_equal(one.policy, two.policy)
    pd.testing.assert_frame_equal(drawn.summary(), listed.summary())
    pd.testing.assert_frame_equal(drawn.episodes, listed.episodes)
    assert listed.to_dict()["conditions"][0]["protocol"] == lists[0].hash


def test_order_of_the_clips_and_names_of_the_classes_change_no_number(model: amd_fast.AFMIR) -> None:
    """A list holds on any manifest of the same clips; a seed on one whose classes are called otherwise, whatever order that gives."""
    clips = bank()
    wanted = list_episodes(clips, Condition(4, 1, 1, 50, 0))
    plain = evaluate(model, clips, listed=[wanted]).conditions[0]
    shuffled = np.random.default_rng(0).permutation(len(clips))
    table = clips.table.iloc[shuffled].reset_index(drop=True)
    other = FeatureBank(clips.tokens[shuffled], clips.log_weight[shuffled], table, {})
    for which in (clips, other):
        names = [f"{'zyxwvu'[int(label[-1])]} {label}" for label in which.labels]
        renamed = FeatureBank(which.tokens, which.log_weight, which.table.assign(label=names), {})
        found = evaluate(model, renamed, listed=[wanted]).conditions[0]
        np.testing.assert_allclose(found.log_probs["ami"], plain.log_probs["ami"], rtol=1e-5, atol=1e-5)
        if which is clips:
            seeded = evaluate(model, renamed, ways=4, episodes=50)
            first = evaluate(model, clips, ways=4, episodes=50)
            np.testing.assert_array_equal(seeded.conditions[0].log_probs["ami"], first.conditions[0].log_probs["ami"])
            one, two = (result.summary().drop(columns=["macro_f1", "precision", "recall"]) for result in (seeded, first))
            pd.testing.assert_frame_equal(one, two)
            pd.testing.assert_frame_equal(seeded.summary(), first.summary(), rtol=1e-12)


def test_missing_clips_are_counted_and_named() -> None:
    clips = bank()
    listed = list_episodes(clips, Condition(3, 1, 1, 200, 0))
    keep = np.arange(len(clips)) >= 4
    with pytest.raises(DataError, match=r"names 4 clips that are not among the 44 at hand \(1 of them could not be decoded\)") as error:
        listed.rows(clips.subset(keep).table, {"a,b.mp4": "truncated"})
    assert "'# {x}.mp4'" not in str(error.value) and "'a,b.mp4'" in str(error.value)
    with pytest.raises(DataError, match="different labels here"):
        listed.rows(clips.table.assign(label=np.roll(clips.labels, 3)))


def test_a_file_that_was_changed_or_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    listed = list_episodes(bank(), Condition(3, 1, 1, 4, 0))
    listed.write(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"class 1", b"class 2", 1) if b"class 1" in content else content + b"x")
    with pytest.raises(DataError, match="was changed since it was written"):
        EpisodeList.read(path)
    path.write_bytes(content.partition(b"\n")[2])
    assert equal(EpisodeList.read(path), listed)  # without the first line, as another system might write it
    head = "episode,class,support_1,query_1\n"
    for text, message in (
        ("", "its columns are missing"),
        ("a,b\n1,2\n", "its columns are a, b"),
        (head, "different numbers of classes, or there is none"),
        (head + "0,a,x,y\n0,b,z,w\n1,a,x,y\n", "different numbers"),
        (head + "0,a,x,y\n0,b,z\n", "row 2 has 3 values"),
        (head + "0,a,x,y\n0,b,y,w\n", "episode 0 names a clip or a class twice"),
        (head + "0,a,x,y\n0,a,z,w\n", "twice"),
        ('# {"amd_fast": "episodes 9"}\n' + head, "another format"),
        ("# {broken\n" + head, "another format"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            EpisodeList.read(path)
    path.write_bytes(b"\x1f\x8bnot gzip")
    with pytest.raises(DataError, match="cannot read"):
        EpisodeList.read(path)
    with pytest.raises(DataError, match=r"\.csv\.gz"):
        listed.write(tmp_path / "list.parquet")


def test_the_command_writes_what_evaluate_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips = bank()
    table = clips.table.assign(split="test", path=[f"{i}.mp4" for i in range(len(clips))])
    manifest = tmp_path / "manifest.csv"
    Manifest(table, tmp_path).to_csv(manifest)
    arguments = ["episodes", str(manifest), str(tmp_path / "list.csv.gz"), "--ways", "3", "--episodes", "25", "--seed", "4"]
    assert main(arguments) == 0
    listed = EpisodeList.read(tmp_path / "list.csv.gz")
    assert equal(listed, list_episodes(FeatureBank(clips.tokens, clips.log_weight, table, {}), Condition(3, 1, 1, 25, 4)))
    assert listed.hash in "".join(capsys.readouterr().out.split())
    assert main([*arguments, "--query-clips", "dirty"]) == 2
    assert "dirty" in capsys.readouterr().err


def test_the_calibration_split_is_named_where_it_is_too_small(model: amd_fast.AFMIR) -> None:
    clips = bank(damage=True)
    with pytest.raises(EpisodeError, match=r"calibration split.*5 shots.*clean clips alone.*class 'class 0'.*--calibration-split"):
        evaluate(model, bank(clips=12, damage=True), shots=5, calibration=clips, episodes=10)
