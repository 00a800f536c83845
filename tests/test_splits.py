"""Few-shot splits: the field's lists as they are, the tables shipped with the package, and how both meet the clips on disk.

Run as a script, this file writes the tables anew from the lists: ``python tests/test_splits.py``.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import re
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd
import pytest

import amd_fast.data.splits as splits_module
from amd_fast.data.layouts import Entry, Listing
from amd_fast.data.manifest import Manifest
from amd_fast.data.names import NameIndex, loose_key, video_id
from amd_fast.data.splits import read_split_list, select_classes, select_listed, split_names, split_table
from amd_fast.errors import DataError

LISTS = Path(__file__).resolve().parents[1].parent / "shared" / "splits"
needs_lists = pytest.mark.skipif(not LISTS.is_dir(), reason="the lists are not here")

#: Split: folder of its lists, data set, protocol.
SOURCES = {
    "hmdb51_arn": ("hmdb_ARN", "HMDB51", "ARN"),
    "kinetics100_cmn": ("kinetics_CMN", "Kinetics-400", "CMN"),
    "ssv2_cmn": ("ssv2_CMN", "Something-Something V2", "CMN"),
    "ssv2_otam": ("ssv2_OTAM", "Something-Something V2", "OTAM"),
    "ucf101_arn": ("ucf_ARN", "UCF101", "ARN"),
}
#: Folder of lists: classes and clips of train, val and test.
COUNTS = {
    "trx/kinetics_CMN": ((64, 12, 24), (6_400, 1_200, 2_400)),
    "trx/ssv2_CMN": ((64, 12, 24), (6_400, 1_200, 2_400)),
    "trx/ssv2_OTAM": ((64, 12, 24), (67_013, 1_926, 2_857)),
    "trx/hmdb_ARN": ((31, 10, 10), (4_280, 1_194, 1_292)),
    "trx/ucf_ARN": ((70, 10, 21), (9_154, 1_421, 2_745)),
    "hyrsm/kinetics100": ((64, 12, 24), (6_400, 1_200, 2_400)),
    "hyrsm/ssv2_small": ((64, 12, 24), (6_400, 1_200, 2_400)),
    "hyrsm/ssv2_full": ((64, 12, 24), (67_013, 1_926, 2_857)),
    "hyrsm/hmdb51": ((31, 10, 10), (4_280, 1_194, 1_292)),
    "hyrsm/ucf101": ((70, 10, 21), (9_154, 1_421, 2_745)),
    "hyrsm/epic_kitchens": ((60, 0, 20), (66_056, 0, 10_646)),
}


@functools.cache
def published(folder: str) -> pd.DataFrame:
    return read_split_list(LISTS / folder)


def derived_table(name: str) -> list[dict[str, str]]:
    """The classes of a split, read from its lists without the code under test."""
    folder, dataset, protocol = SOURCES[name]
    classes = {
        (split, line.split("/")[0]): None
        for split in ("train", "val", "test")
        for file in (LISTS / "trx" / folder).glob(f"{split}*.txt")
        for line in file.read_text(encoding="utf-8").splitlines()
    }
    names = {label: label for _, label in classes} if name != "ssv2_otam" else named_otam_classes()
    rows = []
    for split, label in sorted(classes, key=lambda pair: (["train", "val", "test"].index(pair[0]), natural(pair[1]))):
        row = {"dataset": dataset, "protocol": protocol, "split": split, "label": names.get(label, "")}
        rows.append(row | ({"list_label": label} if name == "ssv2_otam" else {}))
    return rows


def natural(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"([a-z]+)(\d+)", text)
    return (found[1], int(found[2])) if found else (text, 0)


def named_otam_classes() -> dict[str, str]:
    """Names of those classes of the OTAM lists that share clips with the CMN lists, which name theirs: all shared clips must agree."""
    names: dict[str, str] = {}
    shared: dict[str, Counter[str]] = defaultdict(Counter)
    for file in (LISTS / "trx" / "ssv2_CMN").glob("*.txt"):
        for line in file.read_text(encoding="utf-8").splitlines():
            label, _, video = line.rpartition("/")
            names[video] = label
    for file in (LISTS / "trx" / "ssv2_OTAM").glob("*.txt"):
        for line in file.read_text(encoding="utf-8").splitlines():
            number, _, video = line.rpartition("/")
            if video in names:
                shared[number][names[video]] += 1
    assert all(len(found) == 1 for found in shared.values())
    return {number: next(iter(found)) for number, found in shared.items()}


def as_csv(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@needs_lists
@pytest.mark.parametrize("folder", COUNTS)
def test_published_lists(folder: str) -> None:
    table = published(folder)
    classes, clips = COUNTS[folder]
    assert tuple(table["label"][table["split"] == split].nunique() for split in ("train", "val", "test")) == classes
    assert tuple((table["split"] == split).sum() for split in ("train", "val", "test")) == clips
    by_class, by_video = (table.groupby(column)["split"].nunique() for column in ("label", "video"))
    assert (by_class == 1).all() and (by_video == 1).all()
    assert not table["video"].str.contains(r"/|\.(?:avi|mp4|webm)$", case=False).any()
    numbered = table["label"].str.fullmatch(r"(train|val|test)\d+")
    assert numbered.all() if folder.rpartition("/")[2] in ("ssv2_OTAM", "ssv2_small", "ssv2_full", "epic_kitchens") else not numbered.any()


@needs_lists
def test_lists_of_two_repositories_name_the_same_clips() -> None:
    for one, other in (("trx/hmdb_ARN", "hyrsm/hmdb51"), ("trx/ucf_ARN", "hyrsm/ucf101")):
        pairs = [set(published(name).itertuples(index=False, name=None)) for name in (one, other)]
        assert pairs[0] == pairs[1]
    videos = [set(published(name)["video"]) for name in ("trx/ssv2_OTAM", "hyrsm/ssv2_full")]
    assert videos[0] == videos[1]


@needs_lists
@pytest.mark.parametrize("name", SOURCES)
def test_shipped_tables_are_those_of_the_lists(name: str) -> None:
    file = Path(splits_module.__file__).parent / "tables" / f"{name}.csv"
    assert file.read_text(encoding="utf-8") == as_csv(derived_table(name)), "write them anew with: python tests/test_splits.py"


@pytest.mark.parametrize(("name", "classes"), [(n, COUNTS[f"trx/{SOURCES[n][0]}"][0]) for n in SOURCES])
def test_tables(name: str, classes: tuple[int, ...]) -> None:
    table = split_table(name)
    counts = Counter(table["split"])
    assert tuple(counts[split] for split in ("train", "val", "test")) == classes
    labels = table["label"][table["label"] != ""]
    assert labels.map(loose_key).is_unique
    assert len(labels) == (36 if name == "ssv2_otam" else sum(classes))
    assert split_names() == sorted(SOURCES)


def listing(*paths: str, labels: dict[str, str] | None = None) -> Listing:
    entries = [Entry(path, (labels or {}).get(path, path.split("/")[-2] if "/" in path else ""), "") for path in paths]
    return Listing(Path("/clips"), entries, (), [])


def write(folder: Path, **lists: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in lists.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def chosen(result: Listing) -> dict[str, str]:
    return {entry.path: entry.further["split"] for entry in result.entries}


def test_clips_are_found_however_they_are_spelled(tmp_path: Path) -> None:
    lists = write(
        tmp_path / "lists",
        trainlist03=(
            "air drumming/-VtLx-mcPds_000012_000022\n"  # padded times, file without padding
            "air drumming/abcdefghijk_000001_000011\n"  # file without times
            "air drumming/ABCDEFGHIJK_000001_000011\n"  # ids differ by case alone
            "air drumming/zbcdefghijk_000050_000060\n"  # another part of that video: not here
            "\n"
        ),
        vallist03="/some/where/HandstandPushups/v_HandStandPushups_g01_c01\n/some/where/Jump/001\n",
        testlist03="Run/001\nRun/#2 (x) [y] a&b\n",
    )
    found = select_listed(
        listing(
            "train/air_drumming/-VtLx-mcPds_12_22.mp4",
            "air_drumming/abcdefghijk.mp4",
            "air_drumming/ABCDEFGHIJK_000001_000011.mkv",
            "air_drumming/zbcdefghijk_000001_000011.mp4",
            "HandstandPushups/v_HandstandPushups_g01_c01.AVI",
            "jump/001.avi",
            "run/001.avi",
            "run/2_x_y_A_b.avi",
            "run/unlisted.avi",
        ),
        read_split_list(lists),
        "mine",
    )
    assert chosen(found) == {
        "train/air_drumming/-VtLx-mcPds_12_22.mp4": "train",
        "air_drumming/abcdefghijk.mp4": "train",
        "air_drumming/ABCDEFGHIJK_000001_000011.mkv": "train",
        "HandstandPushups/v_HandstandPushups_g01_c01.AVI": "val",
        "jump/001.avi": "val",
        "run/001.avi": "test",
        "run/2_x_y_A_b.avi": "test",
    }
    assert [(r.path, r.reason) for r in found.rejected] == [
        ("air drumming/zbcdefghijk_000050_000060", "the split lists it for train, and it is not here")
    ]
    assert found.notes == [
        "Split list mine: 3 of 4 train, 2 of 2 val, 2 of 2 test clips are here, 1 are not",
        "2 clips that do not belong to it are left out",
    ]
    assert {entry.further["split_name"] for entry in found.entries} == {"mine"}


def test_numbered_classes_get_the_names_of_their_clips(tmp_path: Path) -> None:
    """HyRSM's and OTAM's lists: with a folder per class, with one folder for all, and with none."""
    clips = {f"{i}.webm": label for i, label in enumerate(["Opening something", "Opening something", "Closing something", "Tearing"])}
    paths = [*clips, "4.webm"]
    for text in (
        {"train": "train7/0\ntrain7/1\n", "test": "test0/2\ntest0/99\n"},
        {"train": "train7//videos/0.MP4\ntrain7//videos/1.MP4\n", "test": "test0//videos/2.MP4\ntest0//videos/99.MP4\n"},
    ):
        table = read_split_list(write(tmp_path / "lists", **text))
        assert table["label"].tolist() == ["train7", "train7", "test0", "test0"]
        found = select_listed(listing(*paths, labels=clips), table, "l")
        assert [(e.label, e.further["split"]) for e in found.entries] == [("Opening something", "train")] * 2 + [
            ("Closing something", "test")
        ]
    named = {"train": "train0//v/Opening_something/0.mp4\n", "test": "test0//v/Tearing/3.mp4\n"}
    table = read_split_list(write(tmp_path / "lists", **named))
    assert table["label"].tolist() == ["Opening_something", "Tearing"]
    assert chosen(select_listed(listing(*paths, labels=clips), table, "l")) == {"0.webm": "train", "3.webm": "test"}
    for wrong, says in (
        ({"train": "train7/0\ntrain7/2\n", "test": "test0/3\n"}, "'train7' is both 'Opening something' .* and 'Closing something'"),
        ({"train": "train7/0\n", "test": "test0/1\n"}, "'Opening something' is both 'train' .* and 'test'"),
    ):
        with pytest.raises(DataError, match=says):
            select_listed(listing(*paths, labels=clips), read_split_list(write(tmp_path / "lists", **wrong)), "l")


def test_a_single_list_is_one_split(tmp_path: Path) -> None:
    folder = write(tmp_path, testlist07="a/1\n", any="val3/x\nval3/y\n")
    assert read_split_list(folder / "testlist07.txt")["split"].tolist() == ["test"]
    assert read_split_list(folder / "any.txt")["split"].tolist() == ["val", "val"]


@pytest.mark.parametrize(
    ("lists", "says"),
    [
        ({}, r"holds no lists named train\*.txt"),
        ({"train": "\n\n"}, "is empty; its lines must be"),
        ({"train": "a/1\nonlyavideo\n"}, "train.txt, line 2 has no class: 'onlyavideo'; lines must be 'class/video'"),
        ({"train": "a/1\na/2\na/1\n"}, "train.txt, line 3: '1' is in line 1 of train.txt already"),
        ({"train": "a/1\n", "test": "A/2\n"}, "test.txt, line 1: the class 'A' is in train and test"),
        ({"train": "train0/1\n", "test": "test0/1\n"}, "'1' is in line 1 of train.txt already"),
        ({"train": "test0/1\n"}, "line 1 is of the split test, in a list for train"),
        ({"train1": "a/1\n", "train2": "a/2\n"}, "several lists for train, train1.txt and train2.txt"),
    ],
)
def test_lists_that_cannot_be_used(lists: dict[str, str], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        read_split_list(write(tmp_path / "l", **lists))


def test_other_wrong_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no split list at .*none"):
        read_split_list(tmp_path / "none")
    (tmp_path / "ucf_ARN").mkdir()
    with pytest.raises(DataError, match=r"give one of its folders \(ucf_ARN\)"):
        read_split_list(tmp_path)
    with pytest.raises(DataError, match="line 1 has no split, and neither does the file's name"):
        read_split_list(write(tmp_path / "x", clips="a/1\n") / "clips.txt")
    with pytest.raises(DataError, match="unknown split 'hmdb'; known are hmdb51_arn, kinetics100_cmn"):
        split_table("hmdb")
    table = pd.DataFrame({"split": ["train"], "label": ["Run"], "video": ["v1"]})
    with pytest.raises(
        DataError, match=r"none of the clips of the split list l is in .*expected is 'Run/v1', the first found is 'walk/v1'"
    ):
        select_listed(listing("walk/v1.mp4"), table, "l")
    with pytest.raises(DataError, match="expected is 'Run/v1', no clips were found"):
        select_listed(listing(), table, "l")
    with pytest.raises(DataError, match=r"none of the classes of the split ucf101_arn.*'ApplyEyeMakeup', the first found is 'walk'"):
        select_classes(listing("walk/v1.mp4"), "ucf101_arn")
    with pytest.raises(DataError, match="only 36 of 100 could be named; give the lists themselves"):
        select_classes(listing("walk/v1.mp4"), "ssv2_otam")
    taken = listing("Run/v1.mp4")
    taken.entries[0].further["split"] = "test"
    with pytest.raises(DataError, match="have splits already"):
        select_listed(taken, table, "l")


def test_clips_that_a_list_cannot_tell_apart_are_left_out_by_name() -> None:
    table = pd.DataFrame({"split": ["train"] * 4, "label": ["run"] * 4, "video": ["a b", "c", "one", "One"]})
    found = select_listed(listing("run/A_B.mp4", "run/x/../a-b.mp4".replace("x/../", ""), "run/c.mp4", "run/ONE.mp4"), table, "l")
    assert [entry.path for entry in found.entries] == ["run/c.mp4", "run/ONE.mp4"]
    assert [r.reason for r in found.rejected] == [
        "the split lists it, and several clips can be meant: run/A_B.mp4, run/a-b.mp4",
        "another line of the split list means run/ONE.mp4 too",
    ]


def test_a_split_by_name_takes_whole_classes() -> None:
    found = select_classes(
        listing("Brush hair/1.avi", "cartwheel/1.avi", "cartwheel/2.avi", "fencing/1.avi", "nonsense/1.avi"), "hmdb51_arn"
    )
    assert chosen(found) == {"Brush hair/1.avi": "train", "cartwheel/1.avi": "val", "cartwheel/2.avi": "val", "fencing/1.avi": "test"}
    assert found.notes[0].startswith("Split hmdb51_arn: 3 of 51 classes are here, 48 are missing (such as ")
    assert found.notes[1] == "1 clips that do not belong to it are left out"


def test_names() -> None:
    assert [video_id(path) for path in ("a/b.MP4", "s3://b/c.webm", "x/v.1", "x/frames/", "only")] == ["b", "c", "v.1", "frames", "only"]
    index = NameIndex(["Walk 1", "walk_1", "run"])
    assert (index.find("walk_1"), index.find("WALK-1"), index.find("RUN"), index.find("no")) == ([1], [0, 1], [2], [])
    videos = NameIndex(["abcdefghijk_000001_000011", "mnopqrstuvw"])
    assert videos.find("ABCDEFGHIJK_000001_000011") == []  # YouTube ids differ by case
    assert (videos.find("abcdefghijk_1_11"), videos.find("abcdefghijk"), videos.find("mnopqrstuvw_000005_000015")) == ([0], [0], [1])
    assert videos.find("abcdefghijk_000002_000012") == []  # another part of the video


def test_split_hash_is_over_split_class_and_clip_whatever_the_path() -> None:
    rows = [("train", "a", "set/a/1.avi"), ("train", "a", "set/a/2.avi"), ("test", "b", "set/b/1.avi"), ("", "c", "set/c/1.avi")]

    def manifest(rows: list[tuple[str, str, str]]) -> Manifest:
        return Manifest(pd.DataFrame(rows, columns=["split", "label", "path"]), "/r")

    base = manifest(rows).split_hash()
    assert base == manifest([(s, c, f"/else/where/{p[:-4]}.mp4") for s, c, p in rows[::-1]]).split_hash()
    assert base == manifest(rows[:3]).split_hash()  # clips of no split do not count
    for position, changed in ((0, ("val", "a", "set/a/1.avi")), (0, ("train", "x", "set/a/1.avi")), (0, ("train", "a", "set/a/9.avi"))):
        assert base != manifest([*rows[:position], changed, *rows[position + 1 :]]).split_hash()
    assert base != manifest(rows[1:]).split_hash()
    text = '[["test", "b", "1"], ["train", "a", "1"], ["train", "a", "2"]]'
    assert base == hashlib.sha256(text.encode()).hexdigest()  # pinned: reports of old runs stay comparable


if __name__ == "__main__":
    for table_name in SOURCES:
        target = Path(splits_module.__file__).parent / "tables" / f"{table_name}.csv"
        target.write_text(as_csv(derived_table(table_name)), encoding="utf-8")
        print(target)
