"""How data sets lie on disk: which files are clips, of which class, from which recording. Nothing is opened here but lists."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from amd_fast.data.manifest import SPLITS, Rejection, is_modality_column, read_text_table
from amd_fast.data.names import VIDEO_SUFFIXES, is_picture, is_video, readable, video_id, without_suffix
from amd_fast.errors import DataError
from amd_fast.storage import base_name, list_below, parent

_OUTSIDE = "it lies outside the class folders"


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
    """What a layout found: the clips in a fixed order, the modality columns, what it left out, and what is to be said about it."""

    root: Path | str
    entries: list[Entry]
    modalities: tuple[str, ...]
    rejected: list[Rejection]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LayoutOptions:
    """What a layout can be told.

    Attributes:
        group: What names the source recording: the column of a CSV, elsewhere a regular expression with one capture group that is
            searched for in the name of the clip's file or folder. None: what the layout knows itself.
        modalities: Further modalities to look for.
        annotations: File or folder of the data set's official lists, or its URI; None: they are looked for among the clips.
    """

    group: str | None = None
    modalities: Sequence[str] = ()
    annotations: Path | str | None = None


def list_folder(root: Path | str, options: LayoutOptions) -> Listing:
    """One folder per class, videos at any depth below it.

    The file of a modality lies beside the video: ``thermal`` of ``walk/a.mp4`` is ``walk/a.thermal.npy``. Hidden files and folders
    and files without a video suffix are passed over. Links to folders are followed, each folder is read once.

    Args:
        root: The folder that holds the class folders, or its URI.
        options: Without ``group`` every clip is its own recording. Recordings that are numbered per class need the class in what
            the expression captures: ``(v_.+_g\\d+)_c`` for UCF101.

    Raises:
        DataError: The folder cannot be read or holds no videos, the expression is not one with one capture group, or no clip has
            a file of a modality.
    """
    rejected: list[Rejection] = []
    grouping = Grouping(options.group, rejected)
    entries: list[Entry] = []
    others = 0
    files = _files(root, rejected)
    there = set(files)
    for path in files:
        if not is_video(path):
            others += 1
            continue
        folder, _, _ = path.partition("/")
        if folder == path:
            rejected.append(Rejection(path, "", _OUTSIDE, "move it into the folder of its class"))
            continue
        label = readable(folder)
        group = grouping(path, label)
        if group is not None:
            entries.append(Entry(path, label, group, beside(root, path, options.modalities, there)))
    if not entries and not rejected:
        known = " ".join(VIDEO_SUFFIXES)
        raise DataError(f"{root} holds no videos ({others} other files); it must hold one folder per class, with files ending in {known}")
    require_modalities(root, entries, options.modalities)
    return Listing(root, entries, tuple(options.modalities), rejected)


def list_frames(root: Path | str, options: LayoutOptions) -> Listing:
    """Folders of numbered pictures, one per clip, in a folder that names the class: ``walk/anna_c1/img_00001.jpg``.

    Class folders may lie deeper, in a folder per split, say. The file of a modality lies beside the clip's folder.

    Args:
        root: The folder above all that, or its URI.
        options: As for :func:`list_folder`.

    Raises:
        DataError: As for :func:`list_folder`.
    """
    rejected: list[Rejection] = []
    grouping = Grouping(options.group, rejected)
    entries: list[Entry] = []
    others: list[str] = []
    clips = list(find_clips(root, rejected, others))
    there = set(others)
    for path in clips:
        if is_video(path):
            rejected.append(Rejection(path, "", "it is a video", "index videos with --layout folder"))
            continue
        above, _, _ = path.rpartition("/")
        if not above:
            rejected.append(Rejection(path, "", _OUTSIDE, "move it into the folder of its class"))
            continue
        label = readable(above.rpartition("/")[2])
        group = grouping(path, label)
        if group is not None:
            entries.append(Entry(path, label, group, beside(root, path, options.modalities, there)))
    if not entries and not rejected:
        raise DataError(f"{root} holds no folders of frames; it must hold <class>/<clip>/ with pictures such as img_00001.jpg")
    require_modalities(root, entries, options.modalities)
    return Listing(root, entries, tuple(options.modalities), rejected)


def list_csv(root: Path | str, options: LayoutOptions) -> Listing:
    """A CSV with a header line and at least the columns path (relative to the CSV's folder, or absolute) and label.

    A path may name a video file or a folder of frames.
    All further columns are kept. Columns of ``.npy`` paths are modalities, named or not.

    Args:
        root: The CSV file, or its URI.
        options: ``group`` is the column that names the source recording; None: the column ``group`` where there is one. ``modalities``
            are columns that must be there and hold ``.npy`` paths (relative to the CSV's folder; empty = missing for that clip).

    Raises:
        DataError: The file cannot be read as CSV, or a column is missing.
    """
    table = read_text_table(root)
    modalities = options.modalities
    source = options.group or ("group" if "group" in table.columns else None)
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
            reason = f"row {line} of {base_name(root)} has no {'label' if path else 'path'}"
            rejected.append(Rejection(path or f"row {line}", label, reason, "fill it in, or remove the row"))
            continue
        entries.append(Entry(path, label, row[source] if source else "", {name: row[name] for name in further}))
    detected = [name for name in further if name not in modalities and is_modality_column(table[name])]
    return Listing(parent(root), entries, (*modalities, *detected), rejected)


class Grouping:
    """The source recording of a clip, from its name.

    Args:
        expression: Regular expression with one capture group; None: empty, or what the layout gives as ``known``.
        rejected: Where clips are added whose name does not match.

    Raises:
        DataError: The expression is not one with one capture group.
    """

    def __init__(self, expression: str | None, rejected: list[Rejection]) -> None:
        self._pattern = _compile(expression)
        self._rejected = rejected

    def __call__(self, path: str, label: str, known: str = "") -> str | None:
        """The recording of the clip at ``path``; None where its name does not tell."""
        if self._pattern is None:
            return known
        found = self._pattern.search(readable(path.rpartition("/")[2]))
        if found and found[1]:
            return found[1]
        reason = f"its name does not match the group expression {self._pattern.pattern!r}"
        remedy = "widen the expression, or rename the file, so that its source recording is known"
        self._rejected.append(Rejection(path, label, reason, remedy))
        return None


def find_clips(root: Path | str, rejected: list[Rejection], others: list[str]) -> Iterator[str]:
    """Video files, and folders that hold numbered pictures and no videos, below ``root``; relative paths in a fixed order.

    Args:
        root: Folder to search, or its URI.
        rejected: Where folders are added that cannot be read.
        others: Where all further files are added, but pictures.
    """
    for folder, files in groupby(_files(root, rejected), key=lambda path: path.rpartition("/")[0]):
        paths = list(files)
        videos = [path for path in paths if is_video(path)]
        others += [path for path in paths if not is_video(path) and not is_picture(path)]
        if videos:
            yield from videos
        elif folder and any(is_picture(path) for path in paths):
            yield folder


def beside(root: Path | str, path: str, modalities: Sequence[str], there: Container[str] | None = None) -> dict[str, str]:
    """Files of modalities that lie beside a clip, "" where there is none; ``there`` are all files below ``root`` where they are known."""

    def is_there(file: str) -> bool:
        return os.path.lexists(Path(root, file)) if there is None else file in there

    names = {name: f"{without_suffix(path)}.{name}.npy" for name in modalities}
    return {name: file if is_there(file) else "" for name, file in names.items()}


def require_modalities(root: Path | str, entries: Sequence[Entry], modalities: Sequence[str]) -> None:
    """Refuse a modality that no clip has.

    Raises:
        DataError: Names the modality and where its files are expected.
    """
    for name in modalities:
        if entries and not any(entry.further[name] for entry in entries):
            first = video_id(entries[0].path)
            raise DataError(f"no clip below {root} has the modality {name!r}; put its array beside each video, such as {first}.{name}.npy")


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


def _files(root: Path | str, rejected: list[Rejection]) -> list[str]:
    """All files below ``root``, in the order of a walk."""
    return list(_walk(root, rejected)) if isinstance(root, Path) else list_below(root)


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
