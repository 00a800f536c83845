"""Few-shot splits of the public data sets: tables of their classes, and the lists of clips that the field's repositories hold.

A table (:func:`split_table`) says which class is for training, validation and test; with it, all clips of a class are used. A list
(:func:`read_split_list`) names single clips, as published numbers on Kinetics and Something-Something need: there a split holds a
hundred clips of each class.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from amd_fast.data.layouts import Entry, Listing
from amd_fast.data.manifest import SPLITS, Rejection, read_text_table
from amd_fast.data.names import NameIndex, loose_key, video_id
from amd_fast.errors import DataError
from amd_fast.storage import absolute, base_name, exists, is_folder, join, list_below, read_bytes

_TABLES = Path(__file__).parent / "tables"
_ANONYMOUS = re.compile(r"(train|val|test)\d+")
_LIST_FILE = re.compile(r"(train|val|test).*\.txt", re.IGNORECASE)
_FORMS = "'class/video' (TRX, CMN), 'train0//path/class/video.ext' or 'train0/video' (HyRSM)"
_NAMED = 3  # classes or clips that a message names


class _Line(NamedTuple):
    """A line of a list: the file, its number, the split, the class's number and folder (empty where it has none), and the clip."""

    file: str
    number: int
    split: str
    anonymous: str
    folder: str
    video: str


def split_names() -> list[str]:
    """Names of the splits whose classes are known here, see :func:`split_table`."""
    return sorted(path.stem for path in _TABLES.glob("*.csv"))


def split_table(name: str) -> pd.DataFrame:
    """Classes of a published few-shot split.

    Args:
        name: "hmdb51_arn" (31/10/10 classes), "ucf101_arn" (70/10/21), "kinetics100_cmn", "ssv2_cmn" or "ssv2_otam" (64/12/24).

    Returns:
        One row per class, all text: ``dataset``, ``protocol``, ``split`` (train, val, test) and ``label``, the class as the data
        set writes it. The lists of ssv2_otam number their classes (column ``list_label``, such as "test18") and name none;
        ``label`` is filled where the clips of a class are also in the lists of ssv2_cmn, which is so for 36 of 100, and else empty.

    Raises:
        DataError: There is no such split; names those there are.
    """
    if name not in split_names():
        raise DataError(f"unknown split {name!r}; known are {', '.join(split_names())}. Lists of your own go to split_list (--split-list)")
    return read_text_table(_TABLES / f"{name}.csv")


def read_split_list(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read the lists of a few-shot split.

    A line is ``class/video`` (TRX, CMN; what stands before the class is passed over) or begins with split and number of its class,
    ``train0//path/class/video.ext`` or ``train0/video`` (HyRSM, OTAM). The split is that of the number, else that of the file's name.

    Args:
        path: A list, or a folder with one per split, ``train*.txt``, ``val*.txt`` and ``test*.txt``; or the URI of either.

    Returns:
        One row per clip, all text: ``split``, ``label`` and ``video`` (name without path and file ending). The label is that of
        the list; where a list numbers its classes and no folder tells them apart, it is the number, such as "test18".

    Raises:
        DataError: No lists there, a line of another form, a clip that comes twice, a class in two splits, or a store that does not answer.
    """
    lines = [line for file, split in _list_files(absolute(path)) for line in _lines(file, split)]
    if not lines:
        raise DataError(f"the split list {path} is empty; its lines must be {_FORMS}")
    _check_lines(lines)
    named = _folders_are_classes(lines)
    labels = [(line.folder if named or not line.anonymous else line.anonymous) for line in lines]
    splits: dict[str, str] = {}
    for line, label in zip(lines, labels, strict=True):
        if splits.setdefault(loose_key(label), line.split) != line.split:
            both = f"{splits[loose_key(label)]} and {line.split}"
            raise DataError(f"{line.file}, line {line.number}: the class {label!r} is in {both}; a class must be in one split only")
    table = {"split": [line.split for line in lines], "label": labels, "video": [line.video for line in lines]}
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in table.items()})


def select_classes(listing: Listing, name: str) -> Listing:
    """The clips of a split's classes, with their splits; for :func:`amd_fast.data.index`.

    Raises:
        DataError: Unknown split, one whose classes have no names, a listing that has splits already, or none of the classes is there.
    """
    table = split_table(name)
    unnamed = int((table["label"] == "").sum())
    if unnamed:
        raise DataError(
            f"the published lists of {name} number their classes, and only {len(table) - unnamed} of {len(table)} could be named; "
            "give the lists themselves with split_list (--split-list), the data set's labels then name the classes"
        )
    splits = {loose_key(label): split for label, split in zip(table["label"], table["split"], strict=True)}
    chosen = [(entry, splits[loose_key(entry.label)]) for entry in listing.entries if loose_key(entry.label) in splits]
    if not chosen:
        raise _nothing(listing, f"classes of the split {name}", table["label"].iloc[0], [entry.label for entry in listing.entries])
    found = {loose_key(entry.label) for entry, _ in chosen}
    missing = [label for label in table["label"] if loose_key(label) not in found]
    notes = [f"Split {name}: {len(found)} of {len(table)} classes are here{_such_as(missing)}"]
    return _selected(listing, chosen, name, notes, [])


def select_listed(listing: Listing, clips: pd.DataFrame, name: str) -> Listing:
    """The clips that a split list names, with their splits; for :func:`amd_fast.data.index`.

    Clips are sought by name, in their class where the list has it. Names may differ as :class:`~amd_fast.data.names.NameIndex` allows.

    Args:
        listing: What the layout found.
        clips: Table of :func:`read_split_list`.
        name: What the splits are to be called.

    Raises:
        DataError: The listing has splits already, none of the clips is there, or the clips of one numbered class have several labels.
    """
    listed = [_Wanted(*row) for row in clips[["split", "label", "video"]].itertuples(index=False, name=None)]
    index = NameIndex([video_id(entry.path) for entry in listing.entries])
    keys = [loose_key(entry.label) for entry in listing.entries]
    chosen: dict[int, _Wanted] = {}
    rejected: list[Rejection] = []
    for clip in listed:
        numbered = _ANONYMOUS.fullmatch(clip.label) is not None
        key = loose_key(clip.label)
        positions = [i for i in index.find(clip.video) if numbered or keys[i] == key]
        if len(positions) == 1 and positions[0] not in chosen:
            chosen[positions[0]] = clip
        else:
            rejected.append(_not_taken(clip, [listing.entries[i] for i in positions]))
    if not chosen:
        found = [f"{entry.label}/{video_id(entry.path)}" for entry in listing.entries]
        raise _nothing(listing, f"clips of the split list {name}", f"{listed[0].label}/{listed[0].video}", found)
    pairs = [(listing.entries[i], chosen[i]) for i in sorted(chosen)]
    _check_labels(pairs)
    here, whole = Counter(clip.split for clip in chosen.values()), Counter(clip.split for clip in listed)
    counts = ", ".join(f"{here[split]} of {whole[split]} {split}" for split in SPLITS if whole[split])
    notes = [f"Split list {name}: {counts} clips are here, {len(rejected)} are not"]
    return _selected(listing, [(entry, clip.split) for entry, clip in pairs], name, notes, rejected)


class _Wanted(NamedTuple):
    split: str
    label: str
    video: str


def _selected(
    listing: Listing, chosen: Sequence[tuple[Entry, str]], name: str, notes: Iterable[str], rejected: Iterable[Rejection]
) -> Listing:
    if any(entry.further.get("split") for entry in listing.entries):
        raise DataError(f"the clips have splits already, so that they cannot be split as {name}; remove the column split, or give no split")
    entries = [replace(entry, further={**entry.further, "split": split, "split_name": name}) for entry, split in chosen]
    others = len(listing.entries) - len(entries)
    more = [f"{others} clips that do not belong to it are left out"] if others else []
    return replace(listing, entries=entries, notes=[*listing.notes, *notes, *more], rejected=[*listing.rejected, *rejected])


def _not_taken(clip: _Wanted, candidates: Sequence[Entry]) -> Rejection:
    path = f"{clip.label}/{clip.video}"
    if not candidates:
        return Rejection(
            path, clip.label, f"the split lists it for {clip.split}, and it is not here", "nothing to do, unless you can get it"
        )
    if len(candidates) == 1:
        return Rejection(path, clip.label, f"another line of the split list means {candidates[0].path} too", "keep one of the two lines")
    several = ", ".join(entry.path for entry in candidates[:_NAMED])
    return Rejection(path, clip.label, f"the split lists it, and several clips can be meant: {several}", "keep one of them, or rename them")


def _check_labels(pairs: Sequence[tuple[Entry, _Wanted]]) -> None:
    """A numbered class must be one class of the data set, and no class in two splits."""
    labels: dict[str, dict[str, str]] = defaultdict(dict)
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    for entry, clip in pairs:
        labels[clip.label].setdefault(entry.label, entry.path)
        splits[entry.label].setdefault(clip.split, entry.path)
    for name, held in (*labels.items(), *splits.items()):
        if len(held) > 1:
            (one, first), (other, second) = list(held.items())[:2]
            raise DataError(f"split list: {name!r} is both {one!r} ({first}) and {other!r} ({second}); the list is not one of these clips")


def _nothing(listing: Listing, what: str, expected: str, found: Sequence[str]) -> DataError:
    first = f"the first found is {found[0]!r}" if found else "no clips were found"
    return DataError(f"none of the {what} is in {listing.root}: the first expected is {expected!r}, {first}; check data set and layout")


def _such_as(missing: Sequence[str]) -> str:
    return f", {len(missing)} are missing (such as {', '.join(missing[:_NAMED])})" if missing else ""


def _list_files(place: Path | str) -> list[tuple[str, str]]:
    """The lists, each with the split its name gives (empty where it gives none)."""
    if not is_folder(place):
        if not exists(place):
            raise DataError(f"there is no split list at {place}; give a list, or the folder of a split's lists")
        found = _LIST_FILE.fullmatch(base_name(place))
        return [(os.fspath(place), found[1].lower() if found else "")]
    names, folders = _held(place)
    files: dict[str, str] = {}
    for name in names:
        found = _LIST_FILE.fullmatch(name)
        if not found:
            continue
        split = found[1].lower()
        if split in files:
            raise DataError(f"{place} holds several lists for {split}, {files[split]} and {name}; keep one list per split")
        files[split] = name
    if not files:
        hint = f"; give one of its folders ({', '.join(folders[:10])})" if folders else ""
        raise DataError(f"{place} holds no lists named train*.txt, val*.txt or test*.txt{hint}")
    return [(join(place, files[split]), split) for split in SPLITS if split in files]


def _held(folder: Path | str) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders that lie in a folder."""
    if isinstance(folder, Path):
        entries = sorted(folder.iterdir())
        return [entry.name for entry in entries if entry.is_file()], [entry.name for entry in entries if entry.is_dir()]
    below = [name.partition("/") for name in list_below(folder)]
    return [name for name, deeper, _ in below if not deeper], sorted({name for name, deeper, _ in below if deeper})


def _lines(file: str, split: str) -> Iterator[_Line]:
    try:
        text = read_bytes(file).decode("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"cannot read the split list {file}: {error.strerror}; check its permissions") from None
    for number, line in enumerate(text.splitlines(), start=1):
        parts = [part for part in line.strip().split("/") if part]
        if not parts:
            continue
        numbered = _ANONYMOUS.fullmatch(parts[0])
        if len(parts) < 2 or not (split or numbered):
            missing = "no class" if len(parts) < 2 else "no split, and neither does the file's name"
            raise DataError(f"{file}, line {number} has {missing}: {line.strip()!r}; lines must be {_FORMS}")
        folder = parts[-2] if len(parts) > 2 or not numbered else ""
        own = numbered[1] if numbered else split
        if split and own != split:
            raise DataError(f"{file}, line {number} is of the split {own}, in a list for {split}: {line.strip()!r}")
        yield _Line(file, number, own, parts[0] if numbered else "", folder, video_id(parts[-1]))


def _check_lines(lines: Sequence[_Line]) -> None:
    """No clip comes twice. Clips of two classes may have the same name, where the list gives the classes."""
    first: dict[tuple[str, str], _Line] = {}
    for line in lines:
        known = first.setdefault(("" if line.anonymous else line.folder, line.video), line)
        if known is not line:
            where = f"line {known.number} of {base_name(known.file)}"
            raise DataError(f"{line.file}, line {line.number}: {line.video!r} is in {where} already; a clip must be listed once")


def _folders_are_classes(lines: Sequence[_Line]) -> bool:
    """Whether the folders in a numbered list stand for its classes: each number has one of its own."""
    folders: Mapping[str, set[str]] = defaultdict(set)
    for line in lines:
        if line.anonymous:
            folders[line.anonymous].add(line.folder)
    distinct = {next(iter(names)) for names in folders.values() if len(names) == 1} - {""}
    return bool(folders) and len(distinct) == len(folders)
