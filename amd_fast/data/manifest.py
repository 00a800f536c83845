"""The manifest: one row per clip, with everything the rest of the library needs to know before it opens the file."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from amd_fast.data.names import video_id
from amd_fast.errors import DataError
from amd_fast.files import write_atomically
from amd_fast.storage import absolute, exists, is_remote, is_uri, join, parent, plain, read_bytes, remove

SPLITS = ("train", "val", "test")
#: Columns every manifest has, in the order they are written. Further columns follow in the order they came.
COLUMNS = ("path", "label", "group", "split", "frames", "fps", "width", "height", "codec")
#: Modalities that are computed from the video itself and so need no column of their own.
VIDEO_MODALITIES = ("rgb", "flow")

_TEXT = ("path", "label", "group", "split", "codec")
# What decides which episodes are drawn and what a model sees; the size or the codec of a file does not.
_HASHED = ("path", "label", "group", "split", "frames", "damage", "damaged_modality")
_REMEDY_CSV = "write it as comma-separated UTF-8 text with a header line, at least path,label"


class Rejection(NamedTuple):
    """Something that was left out of a manifest: a clip, a folder, or one modality file of a clip."""

    path: str
    label: str
    reason: str
    remedy: str


class Manifest:
    """A table of clips and the folder their paths are relative to.

    Args:
        table: One row per clip. ``path`` (relative to ``root`` with forward slashes, or absolute, or a URI) and ``label`` are
            required. ``group`` (source recording; empty = the clip is its own group), ``split`` ("train", "val", "test" or ""),
            ``frames``, ``fps``, ``width``, ``height``, ``codec`` are filled in where absent (0 and "" mean unknown). Every further
            column is kept as text, "" where it is missing; a column of ``.npy`` paths is a modality.
        root: Folder, or URI of one, that relative paths start from.
        rejected: What was left out, with columns path, label, reason, remedy.
        notes: Remarks on how the clips were found, for whoever indexes them; not stored.

    Raises:
        DataError: A required column is missing, a path comes twice, a label is empty, or a value does not fit its column.

    Labels are text and compared exactly: "001" is not "1", "Run" is not "run". Treat a manifest and its tables as read-only;
    ``subset``, ``with_splits`` and ``split_classes`` return new ones.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        root: str | os.PathLike[str],
        rejected: pd.DataFrame | None = None,
        *,
        notes: Sequence[str] = (),
    ) -> None:
        self.root: Path | str = absolute(root)
        self.table = _normalise(table)
        self.rejected = _rejected_table([]) if rejected is None else _rejected_table(rejected.itertuples(index=False))
        self.notes = tuple(notes)

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str], *, group: str | None = None) -> Manifest:
        """Read a manifest; its folder becomes the root. ``<stem>.rejected.csv`` beside it is read too, where it exists.

        Args:
            path: The CSV file, or its URI.
            group: Column to take the groups from, for a CSV that calls them something else (``source_video``, say).

        Raises:
            DataError: The file cannot be read, is not a CSV, or breaks the schema (the message gives file and row).
        """
        path = plain(path)
        table = read_text_table(path)
        if group is not None:
            if group not in table.columns:
                raise DataError(f"{path} has no column {group!r} to take groups from; its columns are {', '.join(table.columns)}")
            table["group"] = table[group]
        beside = _rejected_path(path)
        rejected = read_text_table(beside) if exists(beside) else None
        try:
            return cls(table, parent(path), rejected)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the manifest atomically to a file or URI, and what was rejected to ``<stem>.rejected.csv`` (removed where nothing was).

        Equal manifests give equal bytes. Where the CSV goes to another folder than ``root``, paths are rewritten: relative where
        the file lies below that folder, absolute otherwise.

        Raises:
            DataError: The folder does not exist or cannot be written.
        """
        path = plain(path)
        table = self.table.copy()
        folder = parent(path) if is_remote(path) else os.path.abspath(parent(path))
        if folder != str(self.root):
            for column in ("path", *self.modalities):
                table[column] = pd.Series([_relocate(p, str(self.root), folder) for p in table[column]], dtype=object)
        _write_table(path, table)
        beside = _rejected_path(path)
        if len(self.rejected):
            _write_table(beside, self.rejected)
        elif is_remote(beside):
            remove(beside)
        else:
            Path(beside).unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"Manifest({len(self)} clips, {len(self.classes)} classes, {len(set(self.groups))} groups, root={str(self.root)!r})"

    @cached_property
    def labels(self) -> np.ndarray:
        """Label of every clip, a numpy array of str [len(self)]."""
        return np.array(self.table["label"].tolist(), dtype=np.str_)

    @cached_property
    def groups(self) -> np.ndarray:
        """Source recording of every clip, a numpy array of str [len(self)]; never empty (a clip without one is its own group)."""
        return np.array(self.table["group"].tolist(), dtype=np.str_)

    @cached_property
    def classes(self) -> list[str]:
        """The labels that occur, sorted by code point."""
        return sorted(set(self.table["label"]))

    @cached_property
    def modalities(self) -> tuple[str, ...]:
        """Columns that name modality files: those whose entries, where there are any, all end in ``.npy``."""
        return tuple(name for name in self.table.columns if name not in COLUMNS and is_modality_column(self.table[name]))

    @cached_property
    def _locations(self) -> list[str]:
        return [locate(path, self.root) for path in self.table["path"]]

    def file(self, row: int) -> Path | str:
        """Path of the clip's video; a str where it is a URI, for :func:`amd_fast.storage.lease` or anything that opens clips."""
        return _opened(self._locations[row])

    def extra(self, row: int, modalities: Iterable[str]) -> dict[str, Path | str]:
        """Files of the clip's further modalities.

        Args:
            row: Position of the clip.
            modalities: Names of modalities. ``rgb`` and ``flow`` come from the video and are passed over, unless a column
                of that name holds files.

        Returns:
            ``{modality: path or URI}`` for those that this clip has; one that is missing is not in it.

        Raises:
            DataError: A name is neither a column nor computed from the video.
        """
        found: dict[str, Path | str] = {}
        for name in modalities:
            if name not in self.table.columns or name in COLUMNS:
                if name in VIDEO_MODALITIES:
                    continue
                known = ", ".join((*VIDEO_MODALITIES, *self.modalities))
                raise DataError(f"unknown modality {name!r}: the manifest in {self.root} has {known}; add a column of .npy paths for it")
            value = str(self.table[name].iat[row])
            if value:
                found[name] = _opened(locate(value, self.root))
        return found

    def subset(self, split: str | None = None, classes: Iterable[str] | None = None) -> Manifest:
        """The clips of a split, of some classes, or both, in the same order.

        Raises:
            DataError: A class does not occur, or nothing is left.
        """
        keep = np.ones(len(self), dtype=bool)
        if split is not None:
            keep &= (self.table["split"] == split).to_numpy()
        if classes is not None:
            wanted = set(classes)
            self._require_classes(wanted)
            keep &= self.table["label"].isin(wanted).to_numpy()
        if not keep.any():
            counts = Counter(self.table["split"])
            held = ", ".join(f"{counts[name]} in {name or '(no split)'}" for name in sorted(counts))
            asked = f"split {split!r}" if classes is None else f"split {split!r} and classes {sorted(wanted)}"
            raise DataError(f"no clips in {asked}; the manifest has {held}. Give it splits with split_classes() or with_splits()")
        return Manifest(self.table[keep], self.root)

    def with_splits(self, splits: Mapping[str, str], *, name: str = "") -> Manifest:
        """The same clips with splits given by class; a class that is not named belongs to no split.

        Args:
            splits: Split of each class.
            name: What the splits are called, see ``split_name``.

        Raises:
            DataError: A class does not occur, or a split is none of train, val, test and "".
        """
        self._require_classes(splits)
        table = self.table.copy()
        table["split"] = pd.Series([splits.get(label, "") for label in table["label"]], dtype=object)
        if name or "split_name" in table:
            table["split_name"] = pd.Series([name if split else "" for split in table["split"]], dtype=object)
        return Manifest(table, self.root, self.rejected, notes=self.notes)

    def split_classes(self, fractions: Sequence[float], seed: int = 0) -> Manifest:
        """Give whole classes to train, val and test, on a manifest that has no splits yet.

        Args:
            fractions: Three shares (train, val, test) in any unit: (0.64, 0.12, 0.24), (64, 12, 24), or the numbers of classes
                themselves. Rounded by largest remainder; a split with a share above 0 gets at least one class.
            seed: Chooses which classes. They are ordered by SHA-256 of seed and name, so the result is the same on every machine
                and does not depend on the order of the clips.

        Raises:
            DataError: There are splits already, the shares are not three numbers >= 0, or there are fewer classes than splits.
        """
        if (self.table["split"] != "").any():
            raise DataError("the manifest has splits already; use them, or replace them on purpose with with_splits({class: split})")
        counts = _apportion(fractions, len(self.classes))
        order = sorted(self.classes, key=lambda label: hashlib.sha256(f"{seed}\n{label}".encode("utf-8", "surrogatepass")).digest())
        names = [split for split, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
        shares = "/".join(f"{share:g}" for share in fractions)
        return self.with_splits(dict(zip(order, names, strict=True)), name=f"{shares}, seed {seed}")

    def hash(self) -> str:
        """SHA-256 (hex) of what decides episodes and results.

        Covers path, label, group, split, frames, damage and the modality files of every row, in order. The order counts because an
        episode is a list of positions: equal hashes mean equal episodes.
        """
        names = [name for name in self.table.columns if name in _HASHED or name in self.modalities]
        digest = hashlib.sha256(json.dumps(names).encode())
        for row in self.table[names].itertuples(index=False, name=None):
            digest.update(json.dumps([v if isinstance(v, str) else int(v) for v in row]).encode())
        return digest.hexdigest()

    @property
    def split_name(self) -> str:
        """What the splits are called (column ``split_name``), such as "hmdb51_arn"; empty where nobody named them."""
        return " + ".join(sorted(set(self.table.get("split_name", pd.Series(dtype=object))) - {""}))

    def split_hash(self) -> str:
        """SHA-256 (hex) of which clips of which classes belong to which split.

        Taken over the JSON text of the sorted list of [split, label, clip name], the name being the last part of the path without
        the ending of a video file: where the clips lie, in which order and in which format makes no difference. Clips of no
        split do not count, unless there are no splits at all.
        """
        table = self.table[self.table["split"] != ""] if (self.table["split"] != "").any() else self.table
        clips = sorted(zip(table["split"], table["label"], map(video_id, table["path"]), strict=True))
        return hashlib.sha256(json.dumps(clips).encode()).hexdigest()

    def _require_classes(self, names: Iterable[str]) -> None:
        unknown = sorted(set(names) - set(self.classes))
        if unknown:
            known = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
            raise DataError(f"no clips of class {', '.join(map(repr, unknown))}; names are compared exactly, the classes are {known}")


def locate(path: str, root: str | os.PathLike[str]) -> str:
    """Absolute form of a manifest's path; URIs and absolute paths stay as they are."""
    return join(root, path)


def _opened(location: str) -> Path | str:
    return location if is_remote(location) else Path(plain(location))


def is_modality_column(values: Iterable[str]) -> bool:
    """Whether a column holds ``.npy`` files: at least one entry, and none that is something else."""
    entries = [value for value in values if value]
    return bool(entries) and all(value.lower().endswith(".npy") for value in entries)


def read_text_table(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read a CSV with every value as text, exactly as written (no guessing of numbers or missing values).

    Bytes that are not UTF-8 survive as surrogate escapes, as in ``os.fsdecode``, so any file name can be written and read back.

    Raises:
        DataError: The file cannot be read, is empty, repeats a column, or has a row of another length.
    """
    try:
        with io.TextIOWrapper(io.BytesIO(read_bytes(path)), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            rows = []
            for row in reader:
                if row and len(row) != len(header):
                    raise DataError(f"{path}, line {reader.line_num}: {len(row)} values for {len(header)} columns; {_REMEDY_CSV}")
                rows.extend([row] if row else [])
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path and its permissions") from None
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not CSV ({error}); {_REMEDY_CSV}") from None
    if not header:
        raise DataError(f"{path} is empty; {_REMEDY_CSV}")
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has the column {', '.join(map(repr, repeated))} more than once; rename or remove one")
    return _text_table(header, list(zip(*rows, strict=True)) or [()] * len(header))


def _text_table(names: Sequence[str], columns: Sequence[Sequence[str]]) -> pd.DataFrame:
    # dtype object: pandas' Arrow strings cannot hold the surrogate escapes of file names that are not UTF-8.
    return pd.DataFrame({name: pd.Series(list(values), dtype=object) for name, values in zip(names, columns, strict=True)})


def _rejected_table(rows: Iterable[Any]) -> pd.DataFrame:
    columns: list[list[str]] = [[], [], [], []]
    for row in rows:
        for column, name in zip(columns, Rejection._fields, strict=True):
            column.append(_text(getattr(row, name, "")))
    return _text_table(Rejection._fields, columns)


def rejected_table(rows: Iterable[Rejection]) -> pd.DataFrame:
    """Rejections as the table a manifest keeps (columns path, label, reason, remedy)."""
    return _rejected_table(rows)


def _write_table(path: str, table: pd.DataFrame) -> None:
    rows = (tuple(table.columns), *table.itertuples(index=False, name=None))
    text = "".join(",".join(_quoted(value) for value in row) + "\n" for row in rows)
    write_atomically(path, text.encode("utf-8", "surrogateescape"))


def _quoted(value: Any) -> str:
    """A CSV field. Python's writer leaves a lone carriage return unquoted, which its reader then takes for the end of the row."""
    text = str(value)
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\r\n') else text


def _rejected_path(path: str) -> str:
    return os.path.splitext(path)[0] + ".rejected.csv"


def _relocate(path: str, root: str, folder: str) -> str:
    """A path relative to ``root`` as one relative to ``folder`` where it lies below that, absolute otherwise."""
    if not path:
        return path
    absolute = join(root, path)
    absolute = absolute if is_uri(absolute) else os.path.normpath(absolute)
    below = folder.rstrip("/") + "/" if is_uri(folder) else os.path.join(folder, "")
    return absolute[len(below) :].replace(os.sep, "/") if absolute.startswith(below) else absolute


def _text(value: Any) -> str:
    if value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value)


def _number(value: Any, convert: Callable[[float], Any]) -> Any:
    """A finite number >= 0, 0 where there is none."""
    text = _text(value).strip()
    number = float(text) if text else 0.0
    if not (math.isfinite(number) and number >= 0):
        raise ValueError
    converted = convert(number)
    if converted != number:
        raise ValueError
    return converted


def _numbers(values: pd.Series, name: str) -> pd.Series:
    convert: Callable[[float], Any] = float if name == "fps" else int
    numbers = []
    for row, value in enumerate(values):
        try:
            numbers.append(_number(value, convert))
        except ValueError:
            kind = "a number" if name == "fps" else "a whole number"
            raise DataError(f"row {row + 1}: {name} is {value!r}; it must be {kind} >= 0, or empty where unknown") from None
    return pd.Series(numbers, dtype=np.float64 if name == "fps" else np.int64)


def _normalise(table: pd.DataFrame) -> pd.DataFrame:
    missing = [name for name in ("path", "label") if name not in table.columns]
    if missing:
        found = ", ".join(map(str, table.columns))
        raise DataError(
            f"a manifest needs the columns path and label; {' and '.join(missing)} missing, found {found}. Rename yours to match"
        )
    columns: dict[str, pd.Series] = {}
    for name in (*COLUMNS, *(str(c) for c in table.columns if c not in COLUMNS)):
        values = table[name] if name in table.columns else pd.Series([None] * len(table), dtype=object)
        if name in COLUMNS and name not in _TEXT:
            columns[name] = _numbers(values, name)
        else:
            columns[name] = pd.Series([_text(value) for value in values], dtype=object)
    result = pd.DataFrame(columns)
    _check_rows(result)
    result["group"] = result["group"].where(result["group"] != "", result["path"])
    return result


def _check_rows(table: pd.DataFrame) -> None:
    for name in ("path", "label"):
        empty = np.flatnonzero(table[name] == "")
        if len(empty):
            raise DataError(f"row {empty[0] + 1} has no {name} ({len(empty)} such rows); fill it in or remove the row")
    twice = table["path"].duplicated()
    if twice.any():
        first = table["path"][twice].iloc[0]
        raise DataError(f"{first!r} is listed more than once ({int(twice.sum())} repeated rows); keep one row per clip")
    wrong = sorted(set(table["split"]) - {*SPLITS, ""})
    if wrong:
        raise DataError(f"split is {', '.join(map(repr, wrong))}; it must be train, val, test or empty")


def _apportion(fractions: Sequence[float], classes: int) -> list[int]:
    """Whole numbers of classes in the ratio of ``fractions``, by largest remainder, none of the wanted splits empty."""
    shares = [float(value) for value in fractions]
    total = math.fsum(shares)
    if len(shares) != len(SPLITS) or not all(math.isfinite(s) and s >= 0 for s in shares) or total == 0:
        raise DataError(f"splits {list(fractions)!r}: give three shares >= 0 for train, val and test, such as 64/12/24")
    wanted = sum(share > 0 for share in shares)
    if classes < wanted:
        raise DataError(f"{classes} classes cannot fill {wanted} splits; give a split the share 0, or index more classes")
    exact = [share * classes / total for share in shares]
    counts = [math.floor(value + 1e-9) for value in exact]
    for i in sorted(range(3), key=lambda i: counts[i] - exact[i])[: classes - sum(counts)]:
        counts[i] += 1
    for i, share in enumerate(shares):
        if share > 0 and counts[i] == 0:
            counts[counts.index(max(counts))] -= 1
            counts[i] = 1
    return counts
