"""How data sets lie on disk: which files are clips, of which class, from which recording. Nothing is opened here but lists."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from amd_fast.data.manifest import SPLITS, Rejection, is_modality_column, read_text_table
from amd_fast.errors import DataError

#: Endings of file names that are taken for videos, compared without regard to case.
VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)


@dataclass
class Entry:
    """A clip that a data set lists, not yet opened.

    Attributes:
        path: Relative to the listing's root with forward slashes, or absolute, or a URI.
        label: Its class.
        group: Source recording; empty where unknown.
        further: Further columns of its row, those of modalities among them.
    """

    path: str
    label: str
    group: str
    further: dict[str, str] = field(default_factory=dict)


@dataclass
class Listing:
    """What a layout found: the clips in a fixed order, the modality columns, and what it left out."""

    root: Path
    entries: list[Entry]
    modalities: tuple[str, ...]
    rejected: list[Rejection]


def list_folder(root: Path, group: str | None, modalities: Sequence[str]) -> Listing:
    """One folder per class, videos at any depth below it.

    The file of a modality lies beside the video: ``thermal`` of ``walk/a.mp4`` is ``walk/a.thermal.npy``. Hidden files and folders
    and files without a video suffix are passed over. Links to folders are followed, each folder is read once.

    Args:
        root: The folder that holds the class folders.
        group: Regular expression with one capture group, searched for in the file name; what it captures is the source recording.
            Recordings that are numbered per class need the class in the capture: ``(v_.+_g\\d+)_c`` for UCF101. None: every clip
            is its own recording.
        modalities: Names of modalities to look for.

    Raises:
        DataError: The folder cannot be read or holds no videos, the expression is not one with one capture group, or no clip has
            a file of a modality.
    """
    pattern = _compile(group)
    rejected: list[Rejection] = []
    entries: list[Entry] = []
    others = 0
    for path in _walk(root, rejected):
        if not path.lower().endswith(VIDEO_SUFFIXES):
            others += 1
            continue
        folder, _, _ = path.partition("/")
        if folder == path:
            rejected.append(Rejection(path, "", "it lies outside the class folders", "move it into the folder of its class"))
            continue
        label, name = readable(folder), readable(path.rpartition("/")[2])
        found = pattern.search(name) if pattern else None
        if pattern and not (found and found[1]):
            remedy = "widen the expression, or rename the file, so that its source recording is known"
            rejected.append(Rejection(path, label, f"its name does not match the group expression {pattern.pattern!r}", remedy))
            continue
        entries.append(Entry(path, label, found[1] if found else "", _beside(root, path, modalities)))
    if not entries and not rejected:
        known = " ".join(VIDEO_SUFFIXES)
        raise DataError(f"{root} holds no videos ({others} other files); it must hold one folder per class, with files ending in {known}")
    for name in modalities:
        if entries and not any(entry.further[name] for entry in entries):
            first = Path(entries[0].path).stem
            raise DataError(f"no clip below {root} has the modality {name!r}; put its array beside each video, such as {first}.{name}.npy")
    return Listing(root, entries, tuple(modalities), rejected)


def list_csv(root: Path, group: str | None, modalities: Sequence[str]) -> Listing:
    """A CSV with a header line and at least the columns path (relative to the CSV's folder, or absolute) and label.

    All further columns are kept. Columns of ``.npy`` paths are modalities, named or not.

    Args:
        root: The CSV file.
        group: Column that names the source recording. None: the column ``group`` where there is one.
        modalities: Columns that must be there and hold ``.npy`` paths (relative to the CSV's folder; empty = missing for that clip).

    Raises:
        DataError: The file cannot be read as CSV, or a column is missing.
    """
    table = read_text_table(root)
    source = group or ("group" if "group" in table.columns else None)
    needed = ["path", "label", *modalities, *([source] if source else [])]
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise DataError(f"{root} has no column {', '.join(map(repr, missing))}, only {', '.join(table.columns)}; rename or add columns")
    wrong = sorted(set(table["split"]) - {*SPLITS, ""}) if "split" in table.columns else []
    if wrong:
        raise DataError(f"{root} has the split {', '.join(map(repr, wrong))}; it must be train, val, test or empty")
    if not len(table):
        raise DataError(f"{root} lists no clips; add a row per clip")
    further = [name for name in table.columns if name not in ("path", "label", "group")]
    rejected: list[Rejection] = []
    entries: list[Entry] = []
    for line, row in enumerate(table.to_dict("records"), start=2):
        path, label = row["path"], row["label"]
        if not path or not label:
            reason = f"row {line} of {root.name} has no {'label' if path else 'path'}"
            rejected.append(Rejection(path or f"row {line}", label, reason, "fill it in, or remove the row"))
            continue
        entries.append(Entry(path, label, row[source] if source else "", {name: row[name] for name in further}))
    detected = [name for name in further if name not in modalities and is_modality_column(table[name])]
    return Listing(root.parent, entries, (*modalities, *detected), rejected)


#: Layouts by name. Each takes root, group and modalities as the functions above do.
LAYOUTS: dict[str, Callable[[Path, str | None, Sequence[str]], Listing]] = {"folder": list_folder, "csv": list_csv}


def readable(name: str) -> str:
    """A file name as text that can be printed and stored anywhere: bytes that are not UTF-8 become ``\\xNN``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _compile(group: str | None) -> re.Pattern[str] | None:
    if group is None:
        return None
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise DataError(f"group {group!r} is not a regular expression ({error}); give one such as '(.+)_c\\d+'") from None
    if pattern.groups != 1:
        raise DataError(f"group {group!r} captures {pattern.groups} parts; put one pair of parentheses round the recording, '(.+)_c\\d+'")
    return pattern


def _beside(root: Path, path: str, modalities: Sequence[str]) -> dict[str, str]:
    stem = os.path.splitext(path)[0]
    names = {name: f"{stem}.{name}.npy" for name in modalities}
    return {name: file if os.path.lexists(root / file) else "" for name, file in names.items()}


def _walk(root: Path, rejected: list[Rejection]) -> Iterator[str]:
    """Files below ``root`` by relative path with forward slashes, in sorted order, hidden ones left out.

    Linked folders come last: a folder that is also reachable without the link belongs where it really lies.
    """
    seen: dict[tuple[int, int], str] = {}
    pending = [""]
    linked: list[str] = []
    while pending or linked:
        folder = pending.pop() if pending else linked.pop(0)
        try:
            status = os.stat(root / folder)
            first = seen.setdefault((status.st_dev, status.st_ino), folder)
            if first != folder:
                reason = f"it links to a folder that is read already ({first or 'the root itself'})"
                rejected.append(Rejection(folder, "", reason, "nothing to do, unless the link was meant as a class of its own"))
                continue
            with os.scandir(root / folder) as found:
                items = sorted((item for item in found if not item.name.startswith(".")), key=lambda item: item.name)
        except OSError as error:
            if not folder:
                raise DataError(f"cannot read {root}: {error.strerror}; check the path and its permissions") from None
            rejected.append(Rejection(folder, "", f"the folder cannot be read: {error.strerror}", "check its permissions"))
            continue
        folders, links, files = _sort_out(root, folder, items)
        pending += reversed(folders)
        linked += links
        yield from files


def _sort_out(root: Path, folder: str, items: Iterable[os.DirEntry[str]]) -> tuple[list[str], list[str], list[str]]:
    """Folders, links to folders, and everything else, each by its path relative to ``root``."""
    folders: list[str] = []
    links: list[str] = []
    files: list[str] = []
    for item in items:
        path = f"{folder}/{item.name}" if folder else item.name
        if item.is_dir(follow_symlinks=False):
            folders.append(path)
        elif item.is_symlink() and os.path.isdir(root / path):  # not item.is_dir(), which raises for a link to itself
            links.append(path)
        else:
            files.append(path)
    return folders, links, files
