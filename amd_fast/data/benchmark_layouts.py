"""The public action data sets as they are distributed: their official lists, their file names, and what tells recordings apart.

The lists give the classes' names and say which clips there should be. They are looked for among the clips, by file name, or where
``annotations`` says; folders and lists can be URIs. Clips may be video files or folders of frames, in class folders or in one heap,
whatever the ending. A clip that is listed and not there is normal (videos vanish from YouTube), so it is counted and not refused.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from amd_fast.data.layouts import Entry, Grouping, LayoutOptions, Listing, beside, find_clips, require_modalities
from amd_fast.data.manifest import Rejection
from amd_fast.data.names import NameIndex, loose_key, readable, video_id, youtube_id
from amd_fast.errors import DataError
from amd_fast.storage import base_name, join, list_below, read_bytes

_NAMED = 3  # missing clips that a note names


@dataclass
class _Official:
    """What the official lists say.

    Attributes:
        classes: Names of the classes as the data set writes them.
        clips: Class of every clip by its name (``video_id``); empty where the lists give it none, as for a hidden test set.
        parts: Further columns of a clip: ``official_split`` (train, val, test), or one such column per official fold.
    """

    classes: set[str] = field(default_factory=set)
    clips: dict[str, str] = field(default_factory=dict)
    parts: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Benchmark:
    """One data set.

    Attributes:
        title: Its name.
        lists: Names of its list files.
        expected: The lists in words, for messages.
        read: Reads them.
        columns: Further columns its clips get.
        group: Source recording of a clip, from its name and class.
        own_class: Class from the name of a clip that no list and no folder gives one; empty where it does not tell.
    """

    title: str
    lists: re.Pattern[str]
    expected: str
    read: Callable[[Sequence[str]], _Official]
    columns: tuple[str, ...]
    group: Callable[[str, str], str]
    own_class: Callable[[str], str] = lambda name: ""


def list_kinetics(root: Path | str, options: LayoutOptions) -> Listing:
    """Kinetics: ``<youtube id>_<start>_<end>.mp4``, and CSV lists with the columns label, youtube_id, time_start, time_end, split.

    Files may lie in ``<split>/<class>/``, ``<class>/`` or flat; class folders may have underscores for spaces. Clips without times in
    their name are taken where the lists hold their id once. A recording is a YouTube video.

    Raises:
        DataError: There are neither class folders nor lists, a list cannot be read, or there are no clips.
    """
    return _list(_KINETICS, root, options)


def list_ssv2(root: Path | str, options: LayoutOptions) -> Listing:
    """Something-Something V2: ``<id>.webm``, and the JSON lists of train, validation and labels.

    Classes are the templates without their brackets, as in the list of labels. Every clip is a recording of its own. Clips of the
    test list have no public class and are left out.

    Raises:
        DataError: The lists are not there or cannot be read, or there are no clips.
    """
    return _list(_SSV2, root, options)


def list_hmdb51(root: Path | str, options: LayoutOptions) -> Listing:
    """HMDB51: ``<class>/<movie>_<class>_<properties>_<number>.avi``, and the lists ``<class>_test_split<N>.txt``.

    A recording is the movie, as far as the name tells: several classes may have clips of one movie, while a movie under two
    names counts as two.

    Raises:
        DataError: There are neither class folders nor lists, a list cannot be read, or there are no clips.
    """
    return _list(_HMDB51, root, options)


def list_ucf101(root: Path | str, options: LayoutOptions) -> Listing:
    """UCF101: ``<class>/v_<class>_g<group>_c<clip>.avi``, and the lists classInd.txt, trainlist0N.txt, testlist0N.txt.

    A recording is a class and group: groups are numbered anew in each class.

    Raises:
        DataError: A list cannot be read, or there are no clips.
    """
    return _list(_UCF101, root, options)


def _list(benchmark: _Benchmark, root: Path | str, options: LayoutOptions) -> Listing:
    rejected: list[Rejection] = []
    others: list[str] = []
    paths = list(find_clips(root, rejected, others))
    if not paths:
        raise DataError(f"{root} holds no clips of {benchmark.title} ({len(others)} other files); give the folder its videos lie in")
    lists = _lists(benchmark, root, others, options.annotations)
    official = benchmark.read(lists)
    if not lists and not any("/" in path for path in paths) and not benchmark.own_class(video_id(paths[0])):
        raise _no_lists(benchmark, root, "its clips lie in no class folders, so that only the lists tell their class")
    matched = _match(benchmark, root, options, paths, official, rejected, set(others))
    require_modalities(root, matched.entries, options.modalities)
    return Listing(root, matched.entries, tuple(options.modalities), rejected, _notes(benchmark, lists, official, matched))


class _Matched(NamedTuple):
    """Clips with their classes, the names of those that are listed, and how many are not, or are listed without a class."""

    entries: list[Entry]
    found: set[str]
    unlisted: int
    hidden: int


def _match(
    benchmark: _Benchmark,
    root: Path | str,
    options: LayoutOptions,
    paths: Iterable[str],
    official: _Official,
    rejected: list[Rejection],
    there: Container[str],
) -> _Matched:
    listed = list(official.clips)
    index = NameIndex(listed)
    classes = {loose_key(name): name for name in sorted(official.classes)}
    grouping = Grouping(options.group, rejected)
    entries: list[Entry] = []
    taken: dict[str, str] = {}
    unlisted = hidden = 0
    for path in paths:
        name = video_id(path)
        candidates = index.find(name)
        official_name = listed[candidates[0]] if len(candidates) == 1 else ""
        label = official.clips.get(official_name, "") or _folder_class(path, classes) or _known(benchmark.own_class(name), classes)
        if not label:
            hidden += bool(official_name)
            rejected += [] if official_name else [_without_class(benchmark, path)]
            continue
        first = taken.setdefault(official_name or path, path)
        if first != path:
            rejected.append(Rejection(path, label, f"it is the same clip as {first}", "keep one of the two; only the first is used"))
            continue
        group = grouping(path, label, benchmark.group(readable(name), label))
        if group is None:
            continue
        unlisted += not official_name
        parts = {column: official.parts.get(official_name, {}).get(column, "") for column in benchmark.columns}
        entries.append(Entry(path, label, group, {**parts, **beside(root, path, options.modalities, there)}))
    return _Matched(entries, taken.keys() & official.clips.keys(), unlisted, hidden)


def _folder_class(path: str, classes: dict[str, str]) -> str:
    """The class that a folder above the clip names, the nearest first; any folder where the classes are not known."""
    folders = path.split("/")[:-1]
    if not classes:
        return readable(folders[-1]) if folders else ""
    return next((classes[loose_key(folder)] for folder in reversed(folders) if loose_key(folder) in classes), "")


def _known(label: str, classes: dict[str, str]) -> str:
    """A class as the data set writes it; itself where the classes are not known."""
    return classes.get(loose_key(label), "" if classes else label)


def _without_class(benchmark: _Benchmark, path: str) -> Rejection:
    reason = f"no official list of {benchmark.title} names it, and no folder above it is one of the classes"
    return Rejection(path, "", reason, "check its name, or give the list it is in with --annotations")


def _notes(benchmark: _Benchmark, lists: Sequence[str], official: _Official, matched: _Matched) -> list[str]:
    if not lists:
        return [
            f"{benchmark.title}: no official lists ({benchmark.expected}), so the folders are the classes, and nobody knows what is missing"
        ]
    expected = [name for name, label in official.clips.items() if label]
    missing = [name for name in expected if name not in matched.found]
    notes = [f"{benchmark.title}: {len(expected) - len(missing)} of {len(expected)} listed clips are here, {len(missing)} are missing"]
    if missing:
        notes[0] += f" (such as {', '.join(missing[:_NAMED])})"
        parts = {name: official.parts[name].get("official_split", "") for name in expected}
        whole, here = Counter(parts.values()), Counter(parts.get(name, "") for name in matched.found)
        if "" not in whole:
            notes.append("Here: " + ", ".join(f"{here[part]} of {count} {part}" for part, count in whole.items()))
    if matched.unlisted:
        notes.append(f"{matched.unlisted} clips are in none of the lists read; their folders give their classes")
    if matched.hidden:
        notes.append(f"{matched.hidden} clips are listed without a class, as hidden test sets are; they are left out")
    return notes


def _lists(benchmark: _Benchmark, root: Path | str, others: Sequence[str], annotations: Path | str | None) -> list[str]:
    """The data set's list files, each name once.

    Raises:
        DataError: ``annotations`` is not there or holds none, or a list is there twice.
    """
    candidates = [join(root, other) for other in others] if annotations is None else _annotations(benchmark, annotations)
    found: dict[str, str] = {}
    for path in candidates:
        name = base_name(path)
        if not benchmark.lists.fullmatch(name):
            continue
        if name in found:
            raise DataError(f"{benchmark.title} has the list {name} twice, {found[name]} and {path}; name one with --annotations")
        found[name] = path
    if annotations is not None and not found:
        raise _no_lists(benchmark, annotations, "none of its files is one")
    return list(found.values())


def _annotations(benchmark: _Benchmark, place: Path | str) -> list[str]:
    """The file given, or the files of the folder given."""
    if not isinstance(place, Path):
        return [place] if benchmark.lists.fullmatch(base_name(place)) else [join(place, name) for name in list_below(place)]
    if place.is_file():
        return [str(place)]
    if not place.is_dir():
        raise DataError(f"there are no official lists at {place}; check --annotations")
    return sorted(str(path) for path in place.rglob("*") if path.is_file())


def _no_lists(benchmark: _Benchmark, place: Path | str, reason: str) -> DataError:
    return DataError(
        f"no official lists of {benchmark.title} in {place}: {reason}; they are {benchmark.expected}. "
        "Put them there, or say where they are with --annotations"
    )


def _read_kinetics(lists: Sequence[str]) -> _Official:
    official = _Official()
    for path in lists:
        with _opened(path) as file:
            reader = csv.DictReader(file)
            columns = set(reader.fieldnames or ())
            if not columns >= {"youtube_id", "time_start", "time_end"}:
                continue  # some other CSV, a manifest of ours, say
            for row in reader:
                try:
                    name = f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
                except (TypeError, ValueError):
                    raise _damaged(path, f"line {reader.line_num} has no times", "youtube_id, time_start and time_end") from None
                label = (row.get("label") or "").strip()
                part = _PARTS.get((row.get("split") or _stem(path)).strip().lower(), "")
                _add(official, path, name, label, {"official_split": part})
    return official


def _read_ssv2(lists: Sequence[str]) -> _Official:
    if not lists:
        raise DataError(
            "no official lists of Something-Something V2 among the clips: its file names are numbers, so that only the lists tell their "
            f"class; they are {_SSV2.expected}. Put them there, or say where they are with --annotations"
        )
    official = _Official()
    for path in lists:
        with _opened(path) as file:
            try:
                content = json.load(file)
            except ValueError as error:
                raise _damaged(path, str(error), "JSON") from None
        kind = _PARTS.get(next(part for part in ("train", "validation", "test", "labels") if part in _stem(path)), "labels")
        if kind == "labels":
            official.classes |= {str(name) for name in content}
            continue
        for item in content:
            if not isinstance(item, dict) or "id" not in item:
                raise _damaged(path, f"{str(item)[:60]!r} has no id", "objects with id and template")
            label = re.sub(r"[\[\]]", "", str(item.get("template") or ""))
            _add(official, path, str(item["id"]), label, {"official_split": kind})
    return official


def _read_hmdb51(lists: Sequence[str]) -> _Official:
    official = _Official()
    for path in lists:
        found = _HMDB51.lists.fullmatch(base_name(path))
        assert found
        label, fold = found.groups()
        for number, line in _lines(path):
            name, _, use = line.rpartition(" ")
            if use not in _HMDB_USES:
                raise _damaged(path, f"line {number} is {line!r}", "a file name and 0, 1 or 2")
            _add(official, path, video_id(name.strip()), label, {f"official_split{fold}": _HMDB_USES[use]})
    return official


def _read_ucf101(lists: Sequence[str]) -> _Official:
    official = _Official()
    for path in lists:
        found = _UCF101.lists.fullmatch(base_name(path))
        assert found
        part, fold = found.groups()
        for number, line in _lines(path):
            if part is None:
                official.classes.add(line.split()[-1])
                continue
            name = re.sub(r" \d+$", "", line)
            if "/" not in name:
                raise _damaged(path, f"line {number} is {line!r}", "<class>/<file>")
            _add(official, path, video_id(name), name.split("/")[-2], {f"official_split{fold}": part})
    return official


def _add(official: _Official, path: str, name: str, label: str, parts: dict[str, str]) -> None:
    """Take up a listed clip; one of the same name must be of the same class."""
    known = official.clips.setdefault(name, label)
    if known != label:
        raise _damaged(path, f"{name} is of class {label!r}, and of class {known!r} in another line", "every clip once")
    official.parts.setdefault(name, {}).update(parts)
    if label:
        official.classes.add(label)


def _stem(path: str) -> str:
    return os.path.splitext(base_name(path))[0]


def _opened(path: str) -> io.StringIO:
    try:
        content = read_bytes(path)
    except OSError as error:
        raise DataError(f"cannot read the list {path}: {error.strerror}; check its permissions") from None
    return io.StringIO(content.decode("utf-8-sig", "surrogateescape"), newline="")


def _lines(path: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_opened(path), start=1):
        if line.strip():
            yield number, line.strip()


def _damaged(path: str, what: str, expected: str) -> DataError:
    return DataError(f"the official list {path} cannot be read: {what}; it must hold {expected}. Download it again")


def _movie(name: str, label: str) -> str:
    """The movie of an HMDB51 clip: what stands before the class and the properties; else the name without its last number."""
    found = re.fullmatch(rf"(.+?)_{re.escape(label)}_[fhlu]_[cn]m_np\d+_(?:ba|fr|le|ri)_(?:bad|goo|med)_\d+", name)
    return found[1] if found else re.sub(r"_\d+$", "", name)


def _ucf_group(name: str, label: str) -> str:
    """Class and group of a UCF101 clip; the name where it has no group."""
    found = re.fullmatch(r"v_.+_(g\d+)_c\d+", name)
    return f"{label}_{found[1]}" if found else name


def _ucf_class(name: str) -> str:
    found = re.fullmatch(r"v_(.+)_g\d+_c\d+", name)
    return found[1] if found else ""


_PARTS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
_HMDB_USES = {"0": "", "1": "train", "2": "test"}
_FOLDS = ("official_split1", "official_split2", "official_split3")

_KINETICS = _Benchmark(
    "Kinetics",
    re.compile(r".+\.csv"),
    "train.csv, validate.csv and test.csv with the columns label, youtube_id, time_start, time_end, split",
    _read_kinetics,
    ("official_split",),
    lambda name, label: youtube_id(name),
)
_SSV2 = _Benchmark(
    "Something-Something V2",
    re.compile(r"(?:.*[-_])?(?:train|validation|test|labels)\.json"),
    "labels.json, train.json and validation.json",
    _read_ssv2,
    ("official_split",),
    lambda name, label: name,
)
_HMDB51 = _Benchmark("HMDB51", re.compile(r"(.+)_test_split([123])\.txt"), "<class>_test_split<1 to 3>.txt", _read_hmdb51, _FOLDS, _movie)
_UCF101 = _Benchmark(
    "UCF101",
    re.compile(r"classInd\.txt|(train|test)list0([123])\.txt"),
    "classInd.txt, trainlist01.txt to 03 and testlist01.txt to 03",
    _read_ucf101,
    _FOLDS,
    _ucf_group,
    _ucf_class,
)
