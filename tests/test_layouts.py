"""The public data sets as they are distributed: official lists, odd names, missing clips, recordings, and lists that are wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest

from amd_fast.data.benchmark_layouts import list_hmdb51, list_kinetics, list_ssv2, list_ucf101
from amd_fast.data.index import index, index_command
from amd_fast.data.layouts import LayoutOptions, Listing
from amd_fast.data.manifest import Manifest
from amd_fast.data.splits import read_split_list, select_listed
from amd_fast.errors import ConfigError, DataError

LISTS = Path(__file__).resolve().parents[1].parent / "shared" / "splits"
needs_lists = pytest.mark.skipif(not LISTS.is_dir(), reason="the lists are not here")
PLAIN = LayoutOptions()


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def rows(listing: Listing) -> dict[str, tuple[str, str]]:
    """Class and recording of every clip."""
    return {entry.path: (entry.label, entry.group) for entry in listing.entries}


def column(listing: Listing, name: str) -> dict[str, str]:
    return {entry.path: entry.further[name] for entry in listing.entries}


KINETICS = """label,youtube_id,time_start,time_end,split
air drumming,-VtLx-mcPds,12,22,train
air drumming,abc_12_4567,0,10,train
"passing American football (in game)",ABCDEFGHIJK,100,110,validate
massaging person's head,zzzzzzzzzzz,5,15,validate
yoga,gonegonegon,1,11,train
"""


def test_kinetics(tmp_path: Path) -> None:
    root = touch(
        tmp_path,
        "train/air_drumming/-VtLx-mcPds_000012_000022.mp4",
        "abc_12_4567_000000_000010.mkv",
        "val/whatever/ABCDEFGHIJK.mp4",
        "val/massaging_persons_head/zzzzzzzzzzz_5_15/img_00001.jpg",
        "val/massaging_persons_head/zzzzzzzzzzz_5_15/img_00002.jpg",
        "replacement/-VtLx-mcPds_000012_000022.mp4",
        "train/air_drumming/unlistedxxx_000001_000011.mp4",
        "train/unknown/unlistedyyy_000001_000011.mp4",
    )
    (root / "train.csv").write_text(KINETICS)
    (root / "manifest.csv").write_text("path,label\nx,y\n")  # no list of Kinetics
    listing = list_kinetics(root, PLAIN)
    assert rows(listing) == {
        "abc_12_4567_000000_000010.mkv": ("air drumming", "abc_12_4567"),
        "replacement/-VtLx-mcPds_000012_000022.mp4": ("air drumming", "-VtLx-mcPds"),
        "train/air_drumming/unlistedxxx_000001_000011.mp4": ("air drumming", "unlistedxxx"),
        "val/massaging_persons_head/zzzzzzzzzzz_5_15": ("massaging person's head", "zzzzzzzzzzz"),
        "val/whatever/ABCDEFGHIJK.mp4": ("passing American football (in game)", "ABCDEFGHIJK"),
    }
    assert column(listing, "official_split")["val/whatever/ABCDEFGHIJK.mp4"] == "val"
    assert column(listing, "official_split")["train/air_drumming/unlistedxxx_000001_000011.mp4"] == ""
    reasons = {rejection.path: rejection.reason for rejection in listing.rejected}
    assert reasons["train/air_drumming/-VtLx-mcPds_000012_000022.mp4"].startswith("it is the same clip as replacement/")
    assert reasons["train/unknown/unlistedyyy_000001_000011.mp4"].startswith("no official list of Kinetics names it")
    assert listing.notes == [
        "Kinetics: 4 of 5 listed clips are here, 1 are missing (such as gonegonegon_000001_000011)",
        "Here: 2 of 3 train, 2 of 2 val",
        "1 clips are in none of the lists read; their folders give their classes",
    ]


def test_kinetics_without_lists_takes_folders_for_classes(tmp_path: Path) -> None:
    root = touch(tmp_path, "train/air_drumming/-VtLx-mcPds_000012_000022.mp4", "val/yoga/abcdefghijk_000001_000011.mp4")
    listing = list_kinetics(root, PLAIN)
    assert [label for label, _ in rows(listing).values()] == ["air_drumming", "yoga"]
    assert "no official lists" in listing.notes[0]
    with pytest.raises(DataError, match=r"no official lists of Kinetics in .*lie in no class folders.*--annotations"):
        list_kinetics(touch(tmp_path / "flat", "-VtLx-mcPds_000012_000022.mp4"), PLAIN)


def write_ssv2(folder: Path, prefix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    templates = {"Putting [something] onto [something]": [3, 12], "Opening [something]": [7, 99]}
    clips = [{"id": str(i), "label": "putting a cup", "template": name, "placeholders": []} for name, ids in templates.items() for i in ids]
    (folder / f"{prefix}labels.json").write_text(json.dumps({"Opening something": "0", "Putting something onto something": "1"}))
    (folder / f"{prefix}train.json").write_text(json.dumps(clips[:3]))
    (folder / f"{prefix}validation.json").write_text(json.dumps(clips[3:]))
    (folder / f"{prefix}test.json").write_text(json.dumps([{"id": "50"}]))
    return folder


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_ssv2(prefix: str, tmp_path: Path) -> None:
    root = touch(tmp_path / "ssv2", *(f"20bn-something-something-v2/{i}.webm" for i in (3, 12, 7, 50, 1000)))
    with pytest.raises(DataError, match=r"file names are numbers.*--annotations"):
        list_ssv2(root, PLAIN)
    lists = write_ssv2(tmp_path / "lists", prefix)
    listing = list_ssv2(root, LayoutOptions(annotations=lists))
    assert rows(listing) == {
        "20bn-something-something-v2/12.webm": ("Putting something onto something", "12"),
        "20bn-something-something-v2/3.webm": ("Putting something onto something", "3"),
        "20bn-something-something-v2/7.webm": ("Opening something", "7"),
    }
    assert listing.notes == [
        "Something-Something V2: 3 of 4 listed clips are here, 1 are missing (such as 99)",
        "Here: 3 of 3 train, 0 of 1 val",
        "1 clips are listed without a class, as hidden test sets are; they are left out",
    ]
    assert [rejection.path for rejection in listing.rejected] == ["20bn-something-something-v2/1000.webm"]


HMDB = {
    "chew": ("#2_Gum_chew_h_nm_np1_fr_med_0", "#2_Gum_chew_h_nm_np1_fr_med_1"),
    "brush_hair": ("April_09_brush_hair_u_nm_np1_ba_goo_0", "atrapado & co; (1)!_brush_hair_u_nm_np2_le_goo_0"),
    "smile": ("#2_Gum_smile_h_cm_np1_fr_bad_3", "my@home [x]_smile_h_nm_np1_fr_med_0"),
}


def test_hmdb51(tmp_path: Path) -> None:
    root = touch(tmp_path, *(f"{label}/{name}.avi" for label, names in HMDB.items() for name in names))
    (root / "smile/my@home [x]_smile_h_nm_np1_fr_med_0.avi").unlink()
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir()
    for label, names in HMDB.items():
        for fold in (1, 2, 3):
            (lists / f"{label}_test_split{fold}.txt").write_text("".join(f"{name}.avi {(i + fold) % 3} \n" for i, name in enumerate(names)))
    listing = list_hmdb51(root, PLAIN)
    assert rows(listing) == {
        "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi": ("brush_hair", "April_09"),
        "brush_hair/atrapado & co; (1)!_brush_hair_u_nm_np2_le_goo_0.avi": ("brush_hair", "atrapado & co; (1)!"),
        "chew/#2_Gum_chew_h_nm_np1_fr_med_0.avi": ("chew", "#2_Gum"),
        "chew/#2_Gum_chew_h_nm_np1_fr_med_1.avi": ("chew", "#2_Gum"),
        "smile/#2_Gum_smile_h_cm_np1_fr_bad_3.avi": ("smile", "#2_Gum"),
    }
    first = listing.entries[0].further
    assert [first[f"official_split{fold}"] for fold in (1, 2, 3)] == ["train", "test", ""]
    assert listing.notes == ["HMDB51: 5 of 6 listed clips are here, 1 are missing (such as my@home [x]_smile_h_nm_np1_fr_med_0)"]
    own = list_hmdb51(root, LayoutOptions(group="(.+)"))
    assert {entry.group for entry in own.entries} == {Path(entry.path).name for entry in own.entries}


def test_ucf101(tmp_path: Path) -> None:
    root = touch(
        tmp_path,
        "UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi",
        "UCF-101/Archery/v_Archery_g08_c01.avi",
        "UCF-101/Archery/v_Archery_g08_c02.avi",
        "UCF-101/Archery/v_Archery_g30_c01.avi",
    )
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_bytes(b"1 Archery\r\n2 HandstandPushups\r\n")
    (lists / "trainlist01.txt").write_bytes(b"HandstandPushups/v_HandStandPushups_g08_c01.avi 2\r\nArchery/v_Archery_g08_c01.avi 1\r\n")
    (lists / "testlist01.txt").write_bytes(b"Archery/v_Archery_g08_c02.avi\r\n")
    listing = list_ucf101(root, PLAIN)
    assert rows(listing) == {
        "UCF-101/Archery/v_Archery_g08_c01.avi": ("Archery", "Archery_g08"),
        "UCF-101/Archery/v_Archery_g08_c02.avi": ("Archery", "Archery_g08"),
        "UCF-101/Archery/v_Archery_g30_c01.avi": ("Archery", "Archery_g30"),
        "UCF-101/HandstandPushups/v_HandStandPushups_g08_c01.avi": ("HandstandPushups", "HandstandPushups_g08"),
    }
    assert list(column(listing, "official_split1").values()) == ["train", "test", "", "train"]
    assert listing.notes[0] == "UCF101: 3 of 3 listed clips are here, 0 are missing"
    flat = touch(tmp_path / "flat", "v_HandStandPushups_g08_c01.avi", "v_Archery_g01_c01.avi")
    assert [label for label, _ in rows(list_ucf101(flat, PLAIN)).values()] == ["Archery", "HandStandPushups"]
    known = list_ucf101(flat, LayoutOptions(annotations=lists))
    assert [label for label, _ in rows(known).values()] == ["Archery", "HandstandPushups"]


@pytest.mark.parametrize(
    ("lay", "name", "text", "says"),
    [
        (list_kinetics, "train.csv", "label,youtube_id,time_start,time_end\na,b,x,1\n", "line 2 has no times; it must hold youtube_id"),
        (list_ssv2, "train.json", "[{", "train.json cannot be read: .*must hold JSON. Download it again"),
        (list_ssv2, "train.json", '["a"]', "'a' has no id"),
        (list_hmdb51, "a_test_split1.txt", "x.avi 7\n", "line 1 is 'x.avi 7'; it must hold a file name and 0, 1 or 2"),
        (list_ucf101, "testlist01.txt", "x.avi\n", "line 1 is 'x.avi'; it must hold <class>/<file>"),
        (list_ucf101, "testlist01.txt", "A/x.avi\nB/x.avi\n", "x is of class 'B', and of class 'A' in another line"),
    ],
)
def test_lists_that_cannot_be_read(lay: object, name: str, text: str, says: str, tmp_path: Path) -> None:
    touch(tmp_path, "a/x.avi")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        lay(tmp_path, PLAIN)  # type: ignore[operator]


def test_wrong_places(tmp_path: Path) -> None:
    root = touch(tmp_path / "set", "a/x.avi", "notes.txt")
    with pytest.raises(DataError, match=r"there are no official lists at .*none; check --annotations"):
        list_ucf101(root, LayoutOptions(annotations=tmp_path / "none"))
    with pytest.raises(DataError, match=r"no official lists of UCF101 in .*set: none of its files is one; they are classInd.txt"):
        list_ucf101(root, LayoutOptions(annotations=root))
    with pytest.raises(DataError, match=r"holds no clips of HMDB51 \(1 other files\)"):
        list_hmdb51(touch(tmp_path / "empty", "notes.txt"), PLAIN)
    for folder in ("one", "two"):
        touch(root / folder, "classInd.txt")
    with pytest.raises(DataError, match=r"has the list classInd.txt twice.*name one with --annotations"):
        list_ucf101(root, PLAIN)
    with pytest.raises(DataError, match=r"no clip below .* has the modality 'thermal'"):
        list_hmdb51(root, LayoutOptions(modalities=["thermal"]))


@needs_lists
@pytest.mark.parametrize(
    ("lay", "official", "lists", "clips", "groups"),
    [
        (list_hmdb51, "hmdb51_splits", ("trx/hmdb_ARN", "hyrsm/hmdb51"), 6_766, None),
        (list_ucf101, "ucf101_splits", ("trx/ucf_ARN", "hyrsm/ucf101"), 13_320, 101 * 25),
    ],
)
def test_real_names_of_whole_data_sets(
    lay: object, official: str, lists: tuple[str, ...], clips: int, groups: int | None, tmp_path: Path
) -> None:
    """Every clip of the data set, by name: all are in the official lists and in the few-shot lists of two repositories."""
    table = read_split_list(LISTS / lists[0])
    for label in set(table["label"]):
        (tmp_path / label).mkdir()
    for label, video in zip(table["label"], table["video"], strict=True):
        (tmp_path / label / f"{video}.avi").touch()
    listing = lay(tmp_path, LayoutOptions(annotations=LISTS / "official" / official))  # type: ignore[operator]
    assert len(listing.entries) == clips
    assert not listing.rejected
    assert f"{clips} of {clips} listed clips are here, 0 are missing" in listing.notes[0]
    found = {entry.group for entry in listing.entries}
    assert len(found) == groups if groups else len(found) < clips / 4
    splits = [[entry.further["split"] for entry in select_listed(listing, read_split_list(LISTS / name), name).entries] for name in lists]
    assert len(splits[0]) == clips
    assert splits[0] == splits[1]


@needs_lists
def test_real_names_of_kinetics(tmp_path: Path) -> None:
    """HyRSM's list has other spellings (underscores, no times) and some other clips than the one the files are made from."""
    table = read_split_list(LISTS / "trx/kinetics_CMN")
    starts = table["video"].str.extract(r"^(.{11})_0*(\d+)_0*(\d+)$")
    lines = [f'"{label}",{v},{a},{b},train' for label, v, a, b in zip(table["label"], starts[0], starts[1], starts[2], strict=True)]
    (tmp_path / "train.csv").write_text("label,youtube_id,time_start,time_end,split\n" + "\n".join(lines))
    for video in table["video"]:
        (tmp_path / f"{video}.mp4").touch()
    listing = list_kinetics(tmp_path, PLAIN)
    assert len(listing.entries) == len({entry.group for entry in listing.entries}) == 10_000
    counts = []
    for name in ("trx/kinetics_CMN", "hyrsm/kinetics100"):
        found = select_listed(listing, read_split_list(LISTS / name), name)
        counts.append(Counter(entry.further["split"] for entry in found.entries))
    assert counts[0] == {"train": 6_400, "val": 1_200, "test": 2_400}
    assert counts[1] == {"train": 6_400 - 179, "val": 1_200 - 41, "test": 2_400 - 57}  # clips that HyRSM substituted


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "clip.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for shade in range(5):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 40 * shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def test_from_files_to_manifest_and_hash(clip: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way of `amd-fast index`: layout, split by list and by name, notes, hash, and what the manifest keeps of it."""
    root = tmp_path / "ucf"
    for label in ("ApplyEyeMakeup", "ApplyLipstick", "BlowingCandles", "NotOfIt"):
        (root / label).mkdir(parents=True)
        for number in (1, 2):
            (root / label / f"v_{label}_g0{number}_c01.avi").write_bytes(clip)
    lists = tmp_path / "ucf_ARN"
    lists.mkdir()
    for name, label in (("trainlist03", "ApplyEyeMakeup"), ("vallist03", "ApplyLipstick"), ("testlist03", "BlowingCandles")):
        (lists / f"{name}.txt").write_text("".join(f"{label}/v_{label}_g0{number}_c01\n" for number in (1, 2, 3)))
    output = tmp_path / "listed.csv"
    index_command(str(root), layout="ucf101", split_list=str(lists), output=str(output))
    printed = capsys.readouterr().out
    manifest = Manifest.from_csv(output)
    assert Counter(manifest.table["split"]) == {"train": 2, "val": 2, "test": 2}
    assert manifest.groups.tolist()[:2] == ["ApplyEyeMakeup_g01", "ApplyEyeMakeup_g02"]
    assert manifest.split_name == "ucf_ARN"
    assert manifest.rejected["path"].tolist()[0] == "ApplyEyeMakeup/v_ApplyEyeMakeup_g03_c01"
    for line in (
        "Split list ucf_ARN: 2 of 3 train, 2 of 3 val, 2 of 3 test clips are here, 3 are not",
        "2 clips that do not belong to it are left out",
        f"Split: ucf_ARN, hash {manifest.split_hash()}",
    ):
        assert line in printed
    named = index(root, "ucf101", split="ucf101_arn", progress=False)
    assert named.split_name == "ucf101_arn"
    assert named.split_hash() == manifest.split_hash()  # the same clips in the same splits
    assert named.notes[1].startswith("Split ucf101_arn: 3 of 101 classes are here, 98 are missing")
    whole = index(root, "ucf101", progress=False)
    assert (len(whole), whole.split_name) == (8, "")
    table = pd.read_csv(output)
    assert table["split_name"].tolist() == ["ucf_ARN"] * 6
    for arguments, kind, says in (
        ({"split": "ucf101_arn", "split_list": str(lists)}, ConfigError, "choose one"),
        ({"split": "ucf"}, DataError, "split is 'ucf'; give three numbers .* or one of hmdb51_arn, kinetics100_cmn, ssv2_cmn"),
        ({"split_list": str(tmp_path / "none")}, DataError, "there is no split list at"),
        ({"split": "kinetics100_cmn"}, DataError, "none of the classes of the split kinetics100_cmn"),
    ):
        with pytest.raises(kind, match=says):
            index_command(str(root), layout="ucf101", output=str(output), **arguments)
