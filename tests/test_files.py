"""Whole-or-nothing writing of files and folders."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from amd_fast.errors import CheckpointError, DataError
from amd_fast.files import write_atomically, written_folder


def fill(folder: Path, text: str) -> None:
    (folder / "a.txt").write_text(text)


def test_a_file_is_replaced_whole_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.bin"
    for content in (b"one", b"", b"three"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file.bin"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"good")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(CheckpointError, match="No space left"):
                write_atomically(path, b"better", error=CheckpointError)
        assert path.read_bytes() == b"good" and os.listdir(tmp_path) == ["file"]


def test_a_folder_takes_its_place_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    for text in ("old", "new"):
        with written_folder(path) as folder:
            fill(folder, text)
            assert not path.exists() or (path / "a.txt").read_text() == "old"
        assert (path / "a.txt").read_text() == text
    assert os.listdir(tmp_path) == ["bank"]


@pytest.mark.parametrize("failure", [ValueError("mine"), OSError(28, "No space left on device")])
def test_a_folder_that_was_not_finished_leaves_nothing(tmp_path: Path, failure: Exception) -> None:
    path = tmp_path / "bank"
    with written_folder(path) as folder:
        fill(folder, "old")
    expected = DataError if isinstance(failure, OSError) else ValueError

    def fail_half_way() -> None:
        with written_folder(path) as folder:
            fill(folder, "half")
            raise failure

    with pytest.raises(expected, match=str(failure.args[-1])):
        fail_half_way()
    assert (path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["bank"]


def test_the_old_folder_comes_back_where_the_new_one_cannot_be_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bank"
    with written_folder(path) as folder:
        fill(folder, "old")
    replace, calls = os.replace, []

    def second_fails(*paths: object) -> None:
        calls.append(paths)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        replace(*paths)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(DataError, match="Input/output error"), written_folder(path) as folder:
        fill(folder, "new")
    assert (path / "a.txt").read_text() == "old"
