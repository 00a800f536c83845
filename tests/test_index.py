"""Indexing of folders and CSVs: what is found, what is left out and why, on real files with every kind of fault."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import amd_fast.data
from amd_fast.data.index import index, index_command, print_summary
from amd_fast.data.manifest import Manifest
from amd_fast.errors import DataError, DecodeError

av = pytest.importorskip("av")

REAL = Path(__file__).resolve().parents[1].parent / "shared" / "data"
NAME = "c # & ; ( ! [ @ d.mp4"


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 9 frames, 48 x 32, 25 frames a second."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for shade in range(9):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mp4 file with a sound track only."""
    path = tmp_path_factory.mktemp("sound") / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def place(clip: Path, root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        # Not shutil.copy, which keeps a link's target: each must be a file of its own.
        (root / name).write_bytes(clip.read_bytes())


def reasons(manifest: Manifest) -> dict[str, str]:
    return dict(zip(manifest.rejected["path"], manifest.rejected["reason"], strict=True))


def test_folder_of_classes(clip: Path, tmp_path: Path) -> None:
    place(clip, tmp_path, "walk/b.mp4", "walk/deep/er/a.MP4", "run/x.mp4", ".hidden/h.mp4", "run/.h.mp4", "run/notes.txt")
    m = index(tmp_path, progress=False)
    assert m.table["path"].tolist() == ["run/x.mp4", "walk/b.mp4", "walk/deep/er/a.MP4"]
    assert m.labels.tolist() == ["run", "walk", "walk"]
    assert m.groups.tolist() == m.table["path"].tolist()
    row = m.table.iloc[0]
    assert (row["frames"], row["fps"], row["width"], row["height"], row["codec"]) == (9, 25.0, 48, 32, "mpeg4")
    assert len(m.rejected) == 0


def test_bad_input_is_named_with_reason_and_remedy(clip: Path, sound: Path, tmp_path: Path) -> None:
    good = [f"Run/{NAME}", f"run/{NAME}", "a # & ; ( ! [ @ b/x y.mp4"]
    place(clip, tmp_path, *good, "outside.mp4")
    (tmp_path / "Run/empty.mp4").touch()
    (tmp_path / "Run/text.mp4").write_text("not a video")
    (tmp_path / "Run/cut.mp4").write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    shutil.copy(sound, tmp_path / "Run/sound.mp4")
    (tmp_path / "Run/folder.mp4").mkdir()
    m = index(tmp_path, progress=False)
    assert sorted(m.table["path"]) == sorted(good)
    assert {"Run", "run"} <= set(m.classes)
    why = reasons(m)
    assert set(why) == {"outside.mp4", "Run/empty.mp4", "Run/text.mp4", "Run/cut.mp4", "Run/sound.mp4"}
    assert "0 bytes" in why["Run/empty.mp4"]
    assert "no video stream" in why["Run/sound.mp4"]
    assert "outside the class folders" in why["outside.mp4"]
    assert all(m.rejected["remedy"])
    assert m.rejected["label"].tolist().count("Run") == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes and names of raw bytes")
@pytest.mark.skipif(sys.platform == "darwin", reason="file names must be UTF-8 there")
def test_strange_files_and_links(clip: Path, tmp_path: Path) -> None:
    place(clip, tmp_path, "walk/z.mp4", "other/a.mp4")
    raw = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(raw)
    shutil.copy(clip, raw + b"/n\xff.mp4")
    os.mkfifo(tmp_path / "walk/pipe.mp4")
    os.symlink("loop.mp4", tmp_path / "walk/loop.mp4")
    os.symlink("gone.mp4", tmp_path / "walk/gone-link.mp4")
    os.symlink("..", tmp_path / "walk/up")
    os.symlink(tmp_path / "walk", tmp_path / "a-link-to-walk")
    os.symlink(tmp_path / "walk/z.mp4", tmp_path / "other/a-link.mp4")
    m = index(tmp_path, progress=False)
    assert sorted(zip(m.table["path"], m.labels.tolist(), strict=True)) == [
        ("caf\udce9/n\udcff.mp4", "caf\\xe9"),
        ("other/a.mp4", "other"),
        ("walk/z.mp4", "walk"),
    ]
    why = reasons(m)
    assert set(why) == {"walk/pipe.mp4", "walk/loop.mp4", "walk/gone-link.mp4", "walk/up", "a-link-to-walk", "other/a-link.mp4"}
    assert why["other/a-link.mp4"] == "it is the same file as walk/z.mp4, as 'walk' and 'other'"
    assert "no regular file" in why["walk/pipe.mp4"]
    assert "the root itself" in why["walk/up"]
    m.to_csv(tmp_path / "manifest.csv")
    assert all(Manifest.from_csv(tmp_path / "manifest.csv").file(row).is_file() for row in range(3))
    print_summary(m, Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8")))


def test_linked_class_folder_is_followed(clip: Path, tmp_path: Path) -> None:
    place(clip, tmp_path, "disk2/jumping/a.mp4", "set/run/b.mp4")
    os.symlink(tmp_path / "disk2/jumping", tmp_path / "set/jump")
    assert index(tmp_path / "set", progress=False).table["path"].tolist() == ["run/b.mp4", "jump/a.mp4"]


def test_any_failure_of_the_probe_costs_one_clip_only(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import amd_fast.data.readers as readers

    place(clip, tmp_path, *(f"a/{name}.mp4" for name in ("fine", "crash", "locked", "odd")))
    real = readers.open_clip

    def open_clip(path: str) -> object:
        match Path(path).stem:
            case "crash":
                raise ZeroDivisionError("in a codec")
            case "locked":
                raise PermissionError(13, "Permission denied")
            case "odd":
                raise DecodeError("some message without the usual form")
        return real(path)

    monkeypatch.setattr(readers, "open_clip", open_clip)
    m = index(tmp_path, progress=False)
    assert m.table["path"].tolist() == ["a/fine.mp4"]
    assert reasons(m) == {
        "a/crash.mp4": "probing failed: ZeroDivisionError: in a codec",
        "a/locked.mp4": "it cannot be read: Permission denied",
        "a/odd.mp4": "some message without the usual form",
    }
    assert all(m.rejected["remedy"])


def test_result_does_not_depend_on_the_number_of_workers(clip: Path, tmp_path: Path) -> None:
    place(clip, tmp_path, *(f"c{i % 4}/{i}.mp4" for i in range(40)))
    (tmp_path / "c1/bad.mp4").write_text("x")
    one, many = (index(tmp_path, workers=workers, progress=False) for workers in (1, 3))
    for m in (one, many):
        m.to_csv(tmp_path / "m.csv")
    assert one.hash() == many.hash()
    assert one.rejected.equals(many.rejected)
    assert len(one) == 40


def test_groups_from_file_names(clip: Path, tmp_path: Path) -> None:
    place(clip, tmp_path, "A/v_A_g01_c01.mp4", "A/v_A_g01_c02.mp4", "A/v_A_g02_c01.mp4", "B/v_B_g01_c01.mp4", "B/holiday.mp4")
    m = index(tmp_path, group=r"(v_.+_g\d+)_c", progress=False)
    assert m.groups.tolist() == ["v_A_g01", "v_A_g01", "v_A_g02", "v_B_g01"]
    assert "does not match the group expression" in reasons(m)["B/holiday.mp4"]
    for bad, says in (("(", "not a regular expression"), ("g01", "captures 0 parts"), ("(a)(b)", "captures 2 parts")):
        with pytest.raises(DataError, match=says):
            index(tmp_path, group=bad, progress=False)


def test_csv_list(clip: Path, tmp_path: Path) -> None:
    place(clip, tmp_path, "v/a.mp4", "v/b.mp4", "v/c.mp4")
    (tmp_path / "list.csv").write_text(
        "path,label,subject,video,split,frames\n"
        f"v/a.mp4,001,01,r1,train,999\n{tmp_path}/v/b.mp4,1,02,r1,test,\nv/c.mp4,1,,r2,,\n"
        "v/./a.mp4,001,,,,\nv/none.mp4,1,,,,\n,1,,,,\nv/c.mp4,,,,,\nmemory://no/x.mp4,1,,,,\n"
    )
    m = index(tmp_path / "list.csv", "csv", group="video", progress=False)
    assert m.table["path"].tolist() == ["v/a.mp4", f"{tmp_path}/v/b.mp4", "v/c.mp4"]
    assert m.labels.tolist() == ["001", "1", "1"]
    assert m.groups.tolist() == ["r1", "r1", "r2"]
    assert m.table["subject"].tolist() == ["01", "02", ""]
    assert m.table["split"].tolist() == ["train", "test", ""]
    assert m.table["frames"].tolist() == [9, 9, 9]  # measured, whatever the list says
    why = reasons(m)
    assert why["v/./a.mp4"] == "it is the same file as v/a.mp4"
    assert "No such file" in why["v/none.mp4"]
    assert why["row 7"] == "row 7 of list.csv has no path"
    assert why["v/c.mp4"] == "row 8 of list.csv has no label"
    assert "there is no such object" in why["memory://no/x.mp4"]


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("file,label\na,b\n", {}, "has no column 'path', only file, label"),
        ("path,label\na,b\n", {"group": "video"}, "has no column 'video'"),
        ("path,label\na,b\n", {"modalities": ["thermal"]}, "has no column 'thermal'"),
        ("path,label,split\na,b,dev\n", {}, "has the split 'dev'"),
        ("path,label\n", {}, "lists no clips"),
        ("path,label\na.mp4,b\nc.mp4,b\n", {}, "none of the clips.*No such file or directory \\(2\\)"),
    ],
)
def test_csv_that_cannot_be_indexed(text: str, arguments: dict, says: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        index(tmp_path / "list.csv", "csv", progress=False, **arguments)


def test_folder_that_cannot_be_indexed(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    place(clip, tmp_path, "only/a.mp4")
    for root, layout, says in (
        (tmp_path / "none", "folder", "cannot read .*none: No such file"),
        (tmp_path / "notes.txt", "folder", "is a file; give the folder"),
        (tmp_path, "rows", "unknown layout 'rows'; known are folder, csv"),
        (tmp_path, "csv", "cannot read"),
    ):
        with pytest.raises(DataError, match=says):
            index(root, layout, progress=False)
    (tmp_path / "only/a.mp4").unlink()
    with pytest.raises(DataError, match=r"holds no videos \(1 other files\)"):
        index(tmp_path, progress=False)


def test_modality_files(clip: Path, tmp_path: Path) -> None:
    faults = {
        "good": np.zeros((3, 4, 5), np.float16),
        "channels": np.zeros((3, 4, 5, 2), np.uint8),
        "flat": np.zeros((3, 4), np.float32),
        "none": np.zeros((0, 4, 5), np.float32),
        "words": np.full((3, 4, 5), "x"),
        "objects": np.array([{}], dtype=object),
    }
    for name, array in faults.items():
        place(clip, tmp_path, f"a/{name}.mp4")
        np.save(tmp_path / f"a/{name}.thermal.npy", array, allow_pickle=True)
    place(clip, tmp_path, "a/cut.mp4", "a/without.mp4", "a/text.mp4")
    (tmp_path / "a/cut.thermal.npy").write_bytes((tmp_path / "a/good.thermal.npy").read_bytes()[:-1])
    (tmp_path / "a/text.thermal.npy").write_text("hello")
    m = index(tmp_path, modalities=["thermal"], progress=False)
    assert len(m) == len(faults) + 3
    held = {Path(m.table["path"][row]).stem: m.extra(row, ["thermal"]).get("thermal") for row in range(len(m))}
    assert {name for name, path in held.items() if path} == {"good", "channels"}
    assert held["good"] == tmp_path / "a/good.thermal.npy"
    why = reasons(m)
    assert set(why) == {f"a/{name}.thermal.npy" for name in ("flat", "none", "words", "objects", "cut", "text")}
    assert why["a/flat.thermal.npy"] == "thermal of a/flat.mp4: it has shape [3, 4]"
    assert "not numbers" in why["a/words.thermal.npy"]
    with pytest.raises(DataError, match=r"no clip .* has the modality 'depth'.*channels.depth.npy"):
        index(tmp_path, modalities=["depth"], progress=False)
    # The same through a list, where the column is found without being named.
    (tmp_path / "l.csv").write_text("path,label,heat\na/good.mp4,x,a/good.thermal.npy\na/cut.mp4,x,a/missing.npy\na/text.mp4,x,\n")
    m = index(tmp_path / "l.csv", "csv", progress=False)
    assert m.modalities == ("heat",)
    assert reasons(m) == {"a/missing.npy": "heat of a/cut.mp4: there is no such file"}


def test_command_writes_manifest_and_prints_what_was_left_out(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place(clip, tmp_path, *(f"set/c[{i}]/{j}.mp4" for i in range(5) for j in range(2)))
    (tmp_path / "set/c[1]/bad.mp4").touch()
    index_command(str(tmp_path / "set"), split="3/1/1", seed=1)
    printed = capsys.readouterr().out
    m = Manifest.from_csv(tmp_path / "set/manifest.csv")
    assert [(m.table["split"] == name).sum() for name in ("train", "val", "test")] == [6, 2, 2]
    assert m.rejected["path"].tolist() == ["c[1]/bad.mp4"]
    assert "c[1]/bad.mp4" in printed
    assert "Left out: 1" in printed
    again = (tmp_path / "set/manifest.csv").read_bytes()
    index_command(str(tmp_path / "set"), split="3/1/1", seed=1, workers=1)
    assert (tmp_path / "set/manifest.csv").read_bytes() == again
    index_command(str(tmp_path / "set/manifest.csv"), layout="csv", output=str(tmp_path / "copy.csv"))
    assert Manifest.from_csv(tmp_path / "copy.csv").file(0).is_file()
    index_command(str(tmp_path / "set/manifest.csv"), layout="csv")
    assert (tmp_path / "set/manifest.indexed.csv").read_bytes() == again
    for arguments, says in (
        ({"root": str(tmp_path / "copy.csv"), "layout": "csv", "output": str(tmp_path / "copy.csv")}, "would replace the list"),
        ({"root": str(tmp_path / "set"), "split": "64/12"}, "split is '64/12'; give three numbers"),
        ({"root": str(tmp_path / "set"), "output": str(tmp_path / "no/m.csv")}, "cannot write to the folder"),
    ):
        with pytest.raises(DataError, match=says):
            index_command(**arguments)


def test_importing_the_module_leaves_the_function_in_its_place() -> None:
    code = (
        "import sys, amd_fast.data.index, amd_fast.data\n"
        "from amd_fast.data import index, Manifest, episode, EpisodeSampler\n"
        "assert callable(amd_fast.data.index) and index is amd_fast.data.index\n"
        "assert not {'torch', 'cv2', 'av'} & set(sys.modules), 'heavy imports'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])
    assert set(amd_fast.data.__all__) <= set(dir(amd_fast.data))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        amd_fast.data.nothing  # noqa: B018


@pytest.mark.skipif(not (REAL / "gmdcsa24").is_dir(), reason="the real clips are not here")
def test_real_clips_agree_with_their_list() -> None:
    m = index(REAL / "gmdcsa24" / "manifest.csv", "csv", group="source_video", progress=False)
    listed = Manifest.from_csv(REAL / "gmdcsa24" / "manifest.csv", group="source_video")
    assert len(m.rejected) == 0
    for name in ("path", "label", "group", "frames", "width", "height", "codec", "subject"):
        assert m.table[name].tolist() == listed.table[name].tolist(), name
    np.testing.assert_allclose(m.table["fps"], listed.table["fps"], rtol=1e-4)
