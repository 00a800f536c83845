"""The enrolled clips of a classifier: encoded once, kept with their names, and written to a folder whose every byte is accounted for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from amd_fast.classifier.inputs import ReadClip
from amd_fast.classifier.spaces import Arrays
from amd_fast.errors import CheckpointError, DataError
from amd_fast.files import written_folder
from amd_fast.storage import join, read_bytes

FORMAT = "amd_fast gallery 1"
FACTS, CLIPS, MODEL = "gallery.json", "clips.safetensors", "model.safetensors"
COLUMNS = ("clip", "label", "group", "digest")


@dataclass
class Gallery:
    """Enrolled clips.

    Attributes:
        arrays: what the space keeps of them, see :mod:`amd_fast.classifier.spaces`; the first dimension counts clips.
        table: one row per clip with ``clip`` (its name), ``label``, ``group`` (source recording) and ``digest`` of its decoded frames
            (empty for vectors).
        cache: what was computed from the clips since they last changed.
    """

    arrays: Arrays = field(default_factory=dict)
    table: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(COLUMNS), dtype=object))
    cache: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.table)

    def add(self, arrays: Arrays, table: pd.DataFrame) -> Gallery:
        """A gallery with further clips.

        Raises:
            DataError: the new clips have modalities or a width that do not fit those there are.
        """
        if not len(self):
            return Gallery(dict(arrays), table.reset_index(drop=True))
        if set(arrays) != set(self.arrays):
            raise DataError("clips and descriptors cannot be enrolled together; give what the classifier was fitted with")
        for name, value in arrays.items():
            if value.shape[1:] != self.arrays[name].shape[1:]:
                raise DataError(f"new clips have {name} of {list(value.shape[1:])}, those enrolled {list(self.arrays[name].shape[1:])}")
        joined = {name: torch.cat([self.arrays[name], value]) for name, value in arrays.items()}
        return Gallery(joined, pd.concat([self.table, table], ignore_index=True))

    def keep(self, mask: np.ndarray) -> Gallery:
        """The clips where ``mask`` is True."""
        rows = torch.from_numpy(np.flatnonzero(mask))
        return Gallery({name: value[rows] for name, value in self.arrays.items()}, self.table[mask].reset_index(drop=True))

    def new_clips(self, table: pd.DataFrame) -> np.ndarray:
        """Which rows are clips not enrolled yet, bool ``[n]``: one that comes twice under the same label counts once.

        Raises:
            DataError: the same content under two labels.
        """
        columns = ["digest", "label", "clip"]
        known = {digest: (label, clip) for digest, label, clip in self.table[columns].itertuples(index=False)}
        known.pop("", None)
        new = np.ones(len(table), dtype=bool)
        for row, (digest, label, clip) in enumerate(table[columns].itertuples(index=False)):
            if digest and digest in known:
                earlier, name = known[digest]
                if earlier != label:
                    same = f"{clip} is" if clip == name else f"{clip} and {name} are the same clip,"
                    raise DataError(f"{same} given as {str(earlier)!r} and as {str(label)!r}; leave out one of the two")
                new[row] = False
            elif digest:
                known[digest] = (label, clip)
        return new

    def recordings(self) -> np.ndarray:
        """A number per source recording, int ``[n]``; a clip without one is its own."""
        names = [f"group {group}" if group else f"clip {row}" for row, group in enumerate(self.table["group"])]
        numbers: np.ndarray = np.unique(names, return_inverse=True)[1]
        return numbers


def enrolment(read: Sequence[ReadClip], labels: np.ndarray, groups: Any = None) -> pd.DataFrame:
    """Rows of a gallery's table for clips that were read.

    Raises:
        DataError: numbers of clips, labels and groups differ.
    """
    listed = [""] * len(read) if groups is None else [str(group) for group in np.asarray(groups).ravel()]
    for name, values in (("labels", labels), ("groups", listed)):
        if len(values) != len(read):
            raise DataError(f"got {len(read)} clips and {len(values)} {name}; give one for each clip")
    rows = zip([clip.name for clip in read], list(labels), listed, [clip.digest for clip in read], strict=True)
    return pd.DataFrame({name: pd.Series(column, dtype=object) for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)})


def save_gallery(folder: str | os.PathLike[str], gallery: Gallery, facts: dict[str, Any], model: bytes | None) -> None:
    """Writes a gallery into a folder or to a URI, whole or not at all; one that was there is replaced.

    Args:
        folder: where to.
        gallery: the clips.
        facts: what else describes the classifier, in plain values.
        model: the content of a model file to keep beside them, or None.
    """
    labels, kind = _plain_labels(gallery.table["label"].tolist())
    rows = {name: gallery.table[name].astype(str).tolist() for name in COLUMNS if name != "label"}
    files = {CLIPS: save_tensors({name: value.contiguous() for name, value in gallery.arrays.items()})}
    if model is not None:
        files[MODEL] = model
    described = {
        "format": FORMAT,
        **facts,
        "label_kind": kind,
        "clips": [{**{name: rows[name][i] for name in rows}, "label": label} for i, label in enumerate(labels)],
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    described["sha256_of_this"] = _digest(described)
    with written_folder(folder) as place:
        for name, content in files.items():
            (place / name).write_bytes(content)
        (place / FACTS).write_text(json.dumps(described, indent=1) + "\n")


def load_gallery(folder: str | os.PathLike[str]) -> tuple[Gallery, dict[str, Any], bytes | None]:
    """Reads what :func:`save_gallery` wrote: the clips, the facts, and the model file where there is one.

    Raises:
        CheckpointError: not a gallery, of another version, or changed since it was written (the message names the file).
    """
    remedy = "take it from a backup, or enroll the clips again into a new folder"
    try:
        facts = json.loads(read_bytes(join(folder, FACTS)))
    except (OSError, ValueError, DataError) as error:
        raise CheckpointError(f"{folder} is not a gallery ({error}); make one with 'amd-fast enroll {folder} CLIPS'") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        got = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
        raise CheckpointError(f"{folder} is not a gallery this version can read (format {got!r}, expected {FORMAT!r}); {remedy}")
    if facts.pop("sha256_of_this", None) != _digest(facts):
        raise CheckpointError(f"the gallery {folder} was changed after it was written: {FACTS} has another hash than it says; {remedy}")
    contents: dict[str, bytes] = {}
    for name, expected in facts["sha256"].items():
        try:
            contents[name] = read_bytes(join(folder, name))
        except (OSError, DataError) as error:
            raise CheckpointError(f"the gallery {folder} lacks {name} ({error}); {remedy}") from error
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise CheckpointError(f"the gallery {folder} was changed after it was written: {name} has another hash; {remedy}")
    try:
        arrays: dict[str, Tensor] = load_tensors(contents[CLIPS])
        rows = facts["clips"]
        table = pd.DataFrame({name: pd.Series([row[name] for row in rows], dtype=object) for name in COLUMNS})
    except (KeyError, SafetensorError) as error:
        raise CheckpointError(f"the gallery {folder} is incomplete ({error}); {remedy}") from error
    table["label"] = pd.Series(_labels_back(table["label"].tolist(), facts["label_kind"]), dtype=object)
    return Gallery(arrays, table), facts, contents.get(MODEL)


def _digest(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _plain_labels(labels: Sequence[Any]) -> tuple[list[Any], str]:
    kinds = {np.asarray(label).dtype.kind for label in labels}
    kind = {"U": "text", "i": "integer", "u": "integer", "f": "number", "b": "boolean"}.get(kinds.pop() if len(kinds) == 1 else "")
    if kind is None:
        raise DataError("labels are written as text, integers, numbers or booleans, all of one kind; convert them before save()")
    convert = {"text": str, "integer": int, "number": float, "boolean": bool}[kind]
    return [convert(label) for label in labels], kind


def _labels_back(labels: Sequence[Any], kind: str) -> list[Any]:
    dtype = {"text": str, "integer": np.int64, "number": np.float64, "boolean": np.bool_}[kind]
    return list(np.asarray(labels, dtype=dtype))
