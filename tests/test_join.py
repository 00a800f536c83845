"""Joining manifests: nothing lost, nothing moved, splits as asked."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from amd_fast.cli import main
from amd_fast.data.join import join
from amd_fast.data.manifest import Manifest
from amd_fast.errors import DataError


def manifest(folder: Path, labels: list[str], split: str, **columns: list[str]) -> Manifest:
    folder.mkdir()
    rows = {"path": [f"{label}_{i}.mp4" for i, label in enumerate(labels)], "label": labels, "split": split, "frames": 9, "fps": 25.0}
    table = pd.DataFrame({**rows, "width": 4, "height": 4, "codec": "h264", **columns})
    Manifest(table.assign(group=table["path"]), folder).to_csv(folder / "manifest.csv")
    return Manifest.from_csv(folder / "manifest.csv")


def test_clips_of_both_stay_where_they_are(tmp_path: Path) -> None:
    first = manifest(tmp_path / "a", ["run", "jump"], "train", damage=["", "dark"])
    second = manifest(tmp_path / "b", ["sit", "walk", "run"], "", thermal=["x.npy", "", "y.npy"])
    both = join([first, second], tmp_path, test=["walk"])
    assert [both.file(i) for i in range(5)] == [first.file(0), first.file(1), *(second.file(i) for i in range(3))]
    assert both.table["split"].tolist() == ["train", "train", "train", "test", "train"]
    assert both.table["damage"].tolist() == ["", "dark", "", "", ""]
    assert both.extra(2, ["thermal"]) == second.extra(0, ["thermal"]) and not both.extra(0, ["thermal"])
    assert np.array_equal(both.labels, ["run", "jump", "sit", "walk", "run"])
    assert join([second], tmp_path).table["split"].tolist() == ["", "", ""]


def test_what_cannot_be_joined_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = manifest(tmp_path / "a", ["run"], "train")
    with pytest.raises(DataError, match="listed more than once"):
        join([first, first], tmp_path)
    with pytest.raises(DataError, match="fly"):
        join([first], tmp_path, test=["fly"])
    with pytest.raises(DataError, match="at least one"):
        join([], tmp_path)
    assert main(["join", str(tmp_path / "a" / "manifest.csv"), "--output", str(tmp_path / "both.csv"), "--test", "run"]) == 0
    assert "test: 1 clips of 1 classes" in capsys.readouterr().out
    assert Manifest.from_csv(tmp_path / "both.csv").table["split"].tolist() == ["test"]
