"""``amd-fast predict``: which of a gallery's actions do clips, or a stream, show?"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from amd_fast.classifier.answers import Answer
from amd_fast.classifier.enroll_command import INCOMPLETE
from amd_fast.classifier.estimator import FewShotClassifier
from amd_fast.classifier.live import is_live, watch
from amd_fast.classifier.sources import clips_below, complain, silenced
from amd_fast.data.readers import open_clip
from amd_fast.errors import AmdFastError, ConfigError, DataError
from amd_fast.files import write_atomically
from amd_fast.progress import console

Format = Literal["table", "csv", "jsonl"]
LIVE_WINDOW = 2.0  # seconds, where --window does not say


@dataclass(frozen=True)
class Found:
    """An answer with its place: the window of a stream in seconds, and the picture that was written of it."""

    answer: Answer
    start: float | None = None
    end: float | None = None
    skipped: int = 0
    thumbnail: str = ""


def predict_command(
    gallery: str,
    sources: list[str],
    format: Format = "table",
    window: float | None = None,
    stride: float | None = None,
    false_unknown: float | None = None,
    thumbnails: str | None = None,
    workers: int = 0,
    progress: bool = True,
) -> int:
    """Recognise a gallery's actions in clips, in long videos or in a live stream.

    A camera (/dev/video0) or the URL of a stream (rtsp://, tcp://, udp://, ...) is watched in sliding windows until it ends or Ctrl-C.
    Clips that cannot be read are named, the others go on; the exit status is then 1.

    Args:
        gallery: Folder of the gallery, or its URI.
        sources: Videos, folders of videos, - for a list of paths on the standard input; or one camera or stream.
        format: What is printed: table, csv, or jsonl (a JSON object per line); the last two as soon as each answer is there.
        window: Read sources in sliding windows of this many seconds; streams always are (2 seconds by default).
        stride: Seconds from the start of one window to the next; by default half a window.
        false_unknown: Share of clips of enrolled actions that may be called unknown, in place of the gallery's own; 0 always answers.
        thumbnails: Folder to write a picture of each clip to, named after its number and answer.
        workers: Threads that read clips; 0 is one per core.
        progress: Show a progress bar on a terminal.
    """
    streams = [source for source in sources if is_live(source)]
    if streams and len(sources) > 1:
        raise ConfigError(f"{streams[0]} is a stream, and only one source is watched at a time; start a second process for the others")
    classifier = FewShotClassifier.load(gallery)
    classifier.set_params(unreadable="skip", workers=workers, progress=progress and format == "table")
    if false_unknown is not None:
        classifier.set_params(false_unknown=false_unknown)
    printer = _PRINTERS[format](classifier)
    lost: dict[str, str] = {}
    number = 0
    with silenced():
        windows = bool(streams) or window is not None
        found = _in_windows(classifier, sources, window, stride) if windows else _in_clips(classifier, clips_below(sources))
        try:
            for number, (each, frames) in enumerate(found, 1):
                if each.answer.error:
                    lost[each.answer.clip] = each.answer.error
                picture = "" if thumbnails is None or each.answer.error else _thumbnail(thumbnails, number, each, frames)
                printer.add(Found(each.answer, each.start, each.end, each.skipped, picture))
        except KeyboardInterrupt:
            if not streams:
                raise
    printer.close()
    complain(lost)
    if number and len(lost) == number:
        raise DataError(f"none of the {number} clips could be read")
    return INCOMPLETE if lost else 0


def _in_clips(classifier: FewShotClassifier, clips: list[str]) -> Iterator[tuple[Found, np.ndarray | None]]:
    for answer in classifier.explain_each(clips):
        yield Found(answer), None


def _in_windows(
    classifier: FewShotClassifier, sources: list[str], window: float | None, stride: float | None
) -> Iterator[tuple[Found, np.ndarray | None]]:
    length = LIVE_WINDOW if window is None else window
    for source in sources if is_live(sources[0]) else clips_below(sources):
        try:
            for seen, answer in watch(classifier, source, window=length, stride=length / 2 if stride is None else stride):
                yield Found(_named(answer, source), seen.start, seen.end, seen.skipped), seen.frames
        except DataError as error:
            if is_live(source):
                raise
            yield Found(Answer(source, classifier.unknown, error=str(error))), None


def _named(answer: Answer, source: str) -> Answer:
    return Answer(**{**vars(answer), "clip": source})


def _thumbnail(folder: str, number: int, found: Found, frames: np.ndarray | None) -> str:
    """Writes a picture of three frames and returns its path; empty where the clip cannot be read a second time."""
    from amd_fast.evaluation.thumbnails import SHORT_SIDE, as_jpeg  # brings matplotlib, which takes a second

    try:
        if frames is None:
            with open_clip(found.answer.clip) as reader:
                last = max(reader.frame_count - 1, 0)
                frames = reader.pixels(reader.frames([0, last // 2, last]), short_side=SHORT_SIDE)
    except (AmdFastError, OSError):
        return ""
    name = re.sub(r"[^\w.-]+", "_", str(found.answer.label))
    path = os.path.join(folder, f"{number:06}_{name}.jpg")
    write_atomically(path, as_jpeg(frames[[0, len(frames) // 2, len(frames) - 1]]))
    return path


def _fields(found: Found) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if found.start is not None:
        extra = {"start": found.start, "end": found.end, "skipped": found.skipped}
    if found.thumbnail:
        extra["thumbnail"] = found.thumbnail
    return {**found.answer.to_dict(), **extra}


class _Printer(Protocol):
    def __init__(self, classifier: FewShotClassifier) -> None: ...
    def add(self, found: Found) -> None: ...
    def close(self) -> None: ...


class _Lines:
    """A JSON object per line."""

    def __init__(self, classifier: FewShotClassifier) -> None:
        pass

    def add(self, found: Found) -> None:
        print(json.dumps(_fields(found)), flush=True)

    def close(self) -> None:
        pass


class _Csv:
    """A header, then a line per answer: the answer, the trust in each view, the probability of each class."""

    def __init__(self, classifier: FewShotClassifier) -> None:
        self._views, self._classes = classifier.space_.views, [str(label) for label in classifier.classes_]
        self._line(
            ["clip", "start", "end", "label", "confidence", "typicality", "known", "trusted"]
            + [f"trust {view}" for view in self._views]
            + [f"p {label}" for label in self._classes]
            + ["thumbnail", "error"]
        )

    def add(self, found: Found) -> None:
        fields = _fields(found)
        plain = [fields.get(name) for name in ("clip", "start", "end", "label", "confidence", "typicality", "known", "trusted")]
        trust = [found.answer.policy.get(view) for view in self._views]
        shares = [fields["probabilities"].get(label) for label in self._classes]
        self._line([*plain, *trust, *shares, found.thumbnail, found.answer.error])

    def close(self) -> None:
        pass

    def _line(self, values: Iterable[Any]) -> None:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow(["" if value is None else value for value in values])
        print(buffer.getvalue(), end="", flush=True)


class _Table:
    """A table at the end; for windows a line each, as they come."""

    def __init__(self, classifier: FewShotClassifier) -> None:
        self._table = Table(Column("clip", overflow="fold"), "action", "probability", "typicality", "trusts")

    def add(self, found: Found) -> None:
        answer = found.answer
        if answer.error:
            return
        trusts = f"{answer.trusted} {answer.policy[answer.trusted]:.0%}"
        if found.start is None:
            row = Text(answer.clip), Text(str(answer.label)), f"{answer.confidence:.0%}", f"{answer.typicality:.2f}", Text(trusts)
            self._table.add_row(*row)
            return
        passed = f"  ({found.skipped} windows passed over)" if found.skipped else ""
        line = f"{found.start:8.2f} to {found.end:8.2f} s  {answer.label}  {answer.confidence:.0%}, trusts {trusts}{passed}"
        console.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        if self._table.row_count:
            console.print(self._table)


_PRINTERS: dict[str, type[_Printer]] = {"table": _Table, "csv": _Csv, "jsonl": _Lines}
