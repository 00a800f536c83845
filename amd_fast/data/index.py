"""Indexing: every video is opened once, before training, so that trouble shows now and by name."""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from amd_fast.data.benchmark_layouts import list_hmdb51, list_kinetics, list_ssv2, list_ucf101
from amd_fast.data.layouts import Entry, LayoutOptions, Listing, list_csv, list_folder, list_frames
from amd_fast.data.manifest import SPLITS, Manifest, Rejection, locate, rejected_table
from amd_fast.data.names import readable
from amd_fast.data.splits import read_split_list, select_classes, select_listed, split_names
from amd_fast.errors import ConfigError, DataError, DecodeError, ImplementationError
from amd_fast.progress import console, progress_bar
from amd_fast.resources import available_cores
from amd_fast.storage import absolute, base_name, is_remote, is_unreachable, join, lease, parent, plain

if TYPE_CHECKING:
    from amd_fast.data.readers import VideoInfo

_AHEAD = 8  # files submitted per worker before the oldest result is waited for
_SHOWN = 20  # rejections printed; the table beside the manifest has all of them
_AGAIN = "copy or download the file again, or leave it out"

#: Layouts by name.
LAYOUTS: dict[str, Callable[[Path | str, LayoutOptions], Listing]] = {
    "folder": list_folder,
    "csv": list_csv,
    "frames": list_frames,
    "kinetics400": list_kinetics,
    "ssv2": list_ssv2,
    "hmdb51": list_hmdb51,
    "ucf101": list_ucf101,
}

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Probed(NamedTuple):
    row: dict[str, Any] | None  # None: the clip is left out
    rejected: list[Rejection]


def index(
    root: str | os.PathLike[str],
    layout: str = "folder",
    *,
    workers: int | None = None,
    group: str | None = None,
    modalities: Sequence[str] = (),
    annotations: str | os.PathLike[str] | None = None,
    split: str | None = None,
    split_list: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Manifest:
    """Find the clips of a data set, open each once, and return the manifest of those that can be used.

    Args:
        root: Folder of clips; for ``layout="csv"`` a file with at least the columns path and label; or the URI of either.
        layout: One of ``LAYOUTS``: "folder" (a folder per class), "csv", "frames" (a folder per class, in it one of pictures per
            clip), or a data set as it is distributed: "kinetics400", "ssv2", "hmdb51", "ucf101".
        workers: Threads that open files. None: twice the number of processor cores, 32 at most.
        group: Source recording, which support and query never share. For a CSV the column that names it; else a regular expression
            with one capture group on the clip's name. None: what the layout knows; where it knows nothing each clip is its own.
        modalities: Further modalities: columns of ``.npy`` paths in a CSV, files ``<clip>.<modality>.npy`` beside the clips of a
            folder. A file that cannot be used is left out and listed; the clip stays.
        annotations: File or folder of a data set's official lists, or its URI. None: they are looked for below ``root``.
        split: Name of a few-shot split, see :func:`amd_fast.data.split_table`: its classes only, with all their clips.
        split_list: File or folder of a few-shot split's lists, or its URI, see :func:`amd_fast.data.read_split_list`: the listed clips
            only.
        progress: Show a progress bar (on terminals only).

    Returns:
        The manifest, clips in the layout's order. Its ``rejected`` table says what was left out, why, and what to do about it; its
        ``notes`` say how many of the clips that the lists name are there.

    Raises:
        DataError: Unknown layout or split, nothing to read at ``root``, no clip of the split, no usable clip at all, or a store that
            does not answer.
        ConfigError: Both ``split`` and ``split_list``.
    """
    if layout not in LAYOUTS:
        raise DataError(f"unknown layout {layout!r}; known are {', '.join(LAYOUTS)}")
    if split is not None and split_list is not None:
        raise ConfigError(f"both the split {split!r} and the split list {os.fspath(split_list)!r} are given; choose one")
    root = absolute(root)
    if layout != "csv" and isinstance(root, Path) and root.is_file():
        raise DataError(f"{root} is a file; give the folder of the class folders, or layout='csv' for a list of clips")
    listed = None if split_list is None else read_split_list(split_list)  # before the clips are sought: a wrong path shows at once
    listing = LAYOUTS[layout](root, LayoutOptions(group, modalities, None if annotations is None else absolute(annotations)))
    if listed is not None:
        listing = select_listed(listing, listed, base_name(absolute(split_list or "")))
    elif split is not None:
        listing = select_classes(listing, split)
    rejected = list(listing.rejected)
    entries = _without_repeats(listing, rejected)
    rows = []
    workers = workers or min(32, 2 * available_cores())
    with progress_bar(disable=not progress) as bar:
        task = bar.add_task("Probing videos", total=len(entries), note="")
        for probed in _in_order(lambda entry: _probe(entry, listing), entries, workers):
            rows.extend([probed.row] if probed.row is not None else [])
            rejected += probed.rejected
            bar.advance(task)
    if not rows:
        reasons = Counter(rejection.reason for rejection in rejected).most_common(3)
        raise DataError(f"none of the clips in {root} can be used: {'; '.join(f'{reason} ({count})' for reason, count in reasons)}")
    return Manifest(pd.DataFrame(rows), listing.root, rejected_table(rejected), notes=listing.notes)


def index_command(
    root: str,
    output: str | None = None,
    layout: str = "folder",
    group: str | None = None,
    modalities: list[str] = [],  # noqa: B006  (never changed; the command line shows the default)
    split: str | None = None,
    split_list: str | None = None,
    annotations: str | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Probe a folder or CSV of clips and write its manifest.

    Every clip is opened once. Those that cannot be used are left out and listed, with reason and remedy, in <manifest>.rejected.csv.

    Args:
        root: Folder of clips, or a CSV with at least the columns path and label; or the URI of one, such as s3://bucket/videos.
        output: Manifest to write; by default manifest.csv in the folder, or <name>.indexed.csv beside the CSV.
        layout: folder (a folder per class), csv, frames (folders of pictures), kinetics400, ssv2, hmdb51 or ucf101.
        group: What names the source recording: a column of the CSV, or a regular expression with one capture group on clip names. By
            default what the layout knows of it, such as UCF101's group numbers; else every clip is its own.
        modalities: Further modalities: columns of .npy paths, or files <clip>.<modality>.npy beside the clips.
        split: A published few-shot split by name, such as hmdb51_arn; or shares or numbers of classes for train/val/test, such
            as 64/12/24, dealt out by --seed. By default no split.
        split_list: File or folder of a few-shot split's lists, as TRX or HyRSM have them, or its URI; only the listed clips are taken.
        annotations: File or folder of the data set's official lists, or its URI, where they do not lie among the clips.
        seed: Chooses which classes go where, with --split in shares or numbers.
        workers: Files opened at once; by default twice the number of cores, 32 at most.
    """
    source = absolute(root)
    stem = os.path.splitext(base_name(source))[0]
    written = output or (join(parent(source), f"{stem}.indexed.csv") if layout == "csv" else join(source, "manifest.csv"))
    if absolute(written) == source:
        raise DataError(f"the manifest would replace the list it is made from, {source}; give another output")
    folder = parent(absolute(written))
    if not is_remote(folder) and not os.access(folder, os.W_OK):
        raise DataError(f"cannot write to the folder {folder}; give another with --output")
    shares = None if split is None else _parse_shares(split)
    named = split if shares is None else None
    manifest = index(
        root, layout, workers=workers, group=group, modalities=modalities, annotations=annotations, split=named, split_list=split_list
    )
    if shares is not None:
        manifest = manifest.split_classes(shares, seed)
    manifest.to_csv(written)
    print_summary(manifest, console)
    console.print(Text(f"Manifest: {readable(written)}"), soft_wrap=True)


def print_summary(manifest: Manifest, console: Console) -> None:
    """Print what a manifest holds, split by split, and what was left out and why."""
    table = Table(title="Clips", title_justify="left")
    for name in ("split", "classes", "clips", "groups", "per class", "codecs", "seconds", "further"):
        table.add_column(name, justify="left" if name in ("split", "codecs", "further") else "right")
    for split in (*SPLITS, ""):
        part = manifest.table[manifest.table["split"] == split]
        if len(part):
            table.add_row(*(Text(value) for value in _summary_row(split or "-", part, manifest.modalities)))
    console.print(table)
    for note in manifest.notes:
        console.print(Text(readable(note)), soft_wrap=True)
    if (manifest.table["split"] != "").any():
        console.print(Text(f"Split: {manifest.split_name or 'unnamed'}, hash {manifest.split_hash()}"), soft_wrap=True)
    if not len(manifest.rejected):
        return
    table = Table(title=f"Left out: {len(manifest.rejected)}", title_justify="left")
    for name in ("path", "reason", "what to do"):
        table.add_column(name, overflow="fold")
    for name, _, reason, remedy in manifest.rejected.head(_SHOWN).astype(str).itertuples(index=False, name=None):
        table.add_row(*(Text(readable(value)) for value in (name, reason, remedy)))
    console.print(table)
    if len(manifest.rejected) > _SHOWN:
        console.print(f"... and {len(manifest.rejected) - _SHOWN} more, in the table <manifest>.rejected.csv")


def _summary_row(split: str, part: pd.DataFrame, modalities: Iterable[str]) -> list[str]:
    per_class = part["label"].value_counts()
    seconds = (part["frames"] / part["fps"].where(part["fps"] > 0)).dropna()
    codecs = [codec for codec, _ in Counter(part["codec"]).most_common()]
    held = {name: int((part[name] != "").sum()) for name in modalities}
    return [
        split,
        str(len(per_class)),
        str(len(part)),
        str(part["group"].nunique()),
        f"{per_class.min()}-{per_class.max()}",
        ", ".join(codecs),
        f"{seconds.min():.1f}-{seconds.max():.1f}" if len(seconds) else "unknown",
        ", ".join(f"{name} {count}" for name, count in held.items()) or "-",
    ]


def _parse_shares(split: str) -> list[float] | None:
    """The three numbers of ``64/12/24``; None for the name of a split."""
    if split in split_names():
        return None
    try:
        train, val, test = (float(part) for part in split.split("/"))
    except ValueError:
        known = ", ".join(split_names())
        raise DataError(f"split is {split!r}; give three numbers for train, val and test, such as 64/12/24, or one of {known}") from None
    return [train, val, test]


def _in_order(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[Result]:
    """Results in the order of the items, from threads, with a bounded number of them waiting."""
    waiting: deque[Future[Result]] = deque()
    executor = ThreadPoolExecutor(max(1, workers), thread_name_prefix="probe")
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) >= _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def _without_repeats(listing: Listing, rejected: list[Rejection]) -> list[Entry]:
    """The entries, each file once, the file itself before links to it. A clip that came twice could be support and query at once."""
    first: dict[Any, Entry] = {}
    locations = {id(entry): locate(entry.path, listing.root) for entry in listing.entries}
    for entry in sorted(listing.entries, key=lambda entry: os.path.islink(locations[id(entry)])):
        try:
            status = os.stat(locations[id(entry)])
            key: Any = (status.st_dev, status.st_ino)
        except (OSError, ValueError):  # missing, or no name a file can have: the probe will say so
            key = locations[id(entry)]
        known = first.setdefault(key, entry)
        if known is not entry:
            where = "it is listed twice" if known.path == entry.path else f"it is the same file as {known.path}"
            what = f"{where}, as {known.label!r} and {entry.label!r}" if known.label != entry.label else where
            rejected.append(Rejection(entry.path, entry.label, what, "keep one of the two; only the first is used"))
    kept = {id(entry) for entry in first.values()}
    return [entry for entry in listing.entries if id(entry) in kept]


def _probe(entry: Entry, listing: Listing) -> _Probed:
    """Open a clip and its modality files."""
    location = locate(entry.path, listing.root)
    try:
        info = _describe(location)
    except ImplementationError:  # a package is missing for all clips of a kind
        raise
    except DecodeError as error:
        if is_unreachable(error):  # the other clips there would be left out, too
            raise
        return _Probed(None, [Rejection(entry.path, entry.label, *_reason_and_remedy(error, location))])
    except OSError as error:
        reason, remedy = f"it cannot be read: {error.strerror or error}", "check the path and its permissions"
        return _Probed(None, [Rejection(entry.path, entry.label, reason, remedy)])
    except Exception as error:  # one strange file must not end the indexing of a hundred thousand
        return _Probed(None, [Rejection(entry.path, entry.label, f"probing failed: {type(error).__name__}: {error}", _AGAIN)])
    further = dict(entry.further)
    rejected = []
    for name in listing.modalities:
        fault = _check_array(locate(further[name], listing.root)) if further[name] else None
        if fault is not None:
            remedy = "save it with numpy.save as [frames, height, width] or [frames, height, width, channels]; the clip is kept without it"
            rejected.append(Rejection(further[name], entry.label, f"{name} of {entry.path}: {fault}", remedy))
            further[name] = ""
    measured = {name: getattr(info, name) for name in ("frames", "width", "height", "codec")}
    measured["fps"] = round(info.fps, 6)  # a ratio of integers, stored without the noise of its last digits
    row = {name: value for name, value in further.items() if name not in measured}
    return _Probed({"path": entry.path, "label": entry.label, "group": entry.group, **row, **measured}, rejected)


def _describe(location: str) -> VideoInfo:
    from amd_fast.data.readers import open_clip

    if not is_remote(location):
        location = plain(location)
        if not os.path.isdir(location):
            _require_file(location)
    with open_clip(location) as reader:
        return reader.check()


def _require_file(location: str) -> None:
    """Refuse what is no readable file before a decoder waits on it (opening a named pipe would hang)."""
    if not stat.S_ISREG(os.stat(location).st_mode):
        raise DecodeError(f"{location}: it is no regular file; leave it out")
    with open(location, "rb") as file:
        file.read(1)


def _reason_and_remedy(error: DecodeError, location: str) -> tuple[str, str]:
    """The two halves of a message ``<what and where>: <reason>; <remedy>``; the place has its own column already."""
    message = str(error)
    for prefix in (f"cannot decode {location!r}: ", f"{location}: ", f"cannot read {location}: "):
        message = message.removeprefix(prefix)
    reason, _, remedy = message.partition("; ")
    return reason, remedy or _AGAIN


def _check_array(location: str) -> str | None:
    """Why a modality file cannot be used; None where it can. Reads the header only."""
    try:
        with lease(location) as file:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return "there is no such file"
    except DataError as error:
        return str(error)
    except (OSError, ValueError, EOFError) as error:
        return f"it is not a numpy array file that can be read ({error})"
    if not isinstance(array, np.ndarray) or array.ndim not in (3, 4) or 0 in array.shape:
        return f"it has shape {list(array.shape) if isinstance(array, np.ndarray) else type(array).__name__}"
    if array.dtype.kind not in "biuf":
        return f"its dtype is {array.dtype}, not numbers"
    return None
