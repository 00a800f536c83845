"""Several manifests as one: to train on synthetic and real clips together, say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from amd_fast.data.manifest import Manifest, locate
from amd_fast.errors import DataError
from amd_fast.progress import console
from amd_fast.storage import is_uri, parent


def join(manifests: Sequence[Manifest], root: Path | str, *, test: Sequence[str] = ()) -> Manifest:
    """One manifest with the clips of all, in order.

    Args:
        manifests: At least one. A class of the same name in two of them is one class.
        root: Folder (or URI of one) the new manifest will lie in; paths become absolute, so clips stay where they are.
        test: Classes that go to the test split. With any, the other classes without a split go to train.

    Raises:
        DataError: Nothing to join, a clip that occurs twice, or a test class that no manifest has.
    """
    if not manifests:
        raise DataError("no manifests to join; give at least one")
    parts = []
    for manifest in manifests:
        part = manifest.table.copy()
        for column in ("path", *manifest.modalities):
            part[column] = [_absolute(manifest.root, value) for value in part[column]]
        parts.append(part)
    table = pd.concat(parts, ignore_index=True).fillna("")
    unknown = sorted(set(test) - set(table["label"]))
    if unknown:
        raise DataError(f"no manifest has the test classes {unknown}; they have {', '.join(sorted(set(table['label'])))}")
    if test:
        table.loc[table["split"] == "", "split"] = "train"
        table.loc[table["label"].isin(test), "split"] = "test"
    return Manifest(table, root)


def _absolute(root: Path | str, value: str) -> str:
    located = locate(value, root)
    return located if not value or is_uri(located) else os.path.abspath(located)


def join_command(manifests: list[str], output: str = "joined.csv", test: list[str] = [], group: str | None = None) -> None:  # noqa: B006
    """Join manifests into one, for training on several sets of clips together.

    Args:
        manifests: Manifests to join, one after the other.
        output: Manifest to write; clips stay where they are.
        test: Classes that go to the test split; the others keep their split, or go to train where they have none.
        group: Column that names the source recording in manifests where it is not "group".
    """
    joined = join([Manifest.from_csv(name, group=group) for name in manifests], parent(output) or ".", test=test)
    joined.to_csv(output)
    counts = joined.table.groupby("split")["label"].agg(["nunique", "size"])
    for split, (classes, clips) in counts.iterrows():
        console.print(f"{split or 'no split'}: {clips} clips of {classes} classes")
    console.print(f"Manifest: {output}", soft_wrap=True)
