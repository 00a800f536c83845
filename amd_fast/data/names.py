"""Names of clips and classes: what they have in common where data sets, lists and disks spell them differently."""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

#: Endings of file names that are taken for videos, compared without regard to case.
VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)

_PICTURE = re.compile(r".*\d\.(jpe?g|png)", re.IGNORECASE | re.DOTALL)
# A trimmed Kinetics clip: eleven characters of YouTube id, and the seconds where it starts and ends, in six digits or fewer.
_TRIMMED = re.compile(r"(.{11})_(\d{1,6})_(\d{1,6})")
_YOUTUBE_ID = 11


def readable(name: str) -> str:
    """A file name as text that can be printed and stored anywhere: bytes that are not UTF-8 become ``\\xNN``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_video(path: str) -> bool:
    """Whether a file name is a video's."""
    return path.lower().endswith(VIDEO_SUFFIXES)


def is_picture(path: str) -> bool:
    """Whether a file name is that of a frame: a number at the end, and the ending of a picture file."""
    return _PICTURE.fullmatch(path) is not None


def without_suffix(path: str) -> str:
    """A path without the ending of a video file; any other ending belongs to the name."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in VIDEO_SUFFIXES else path


def video_id(path: str) -> str:
    """Name of a clip wherever it lies: the last part of its path, without the ending of a video file."""
    return without_suffix(path.rstrip("/").rpartition("/")[2])


def youtube_id(name: str) -> str:
    """The YouTube id in the name of a trimmed clip; the name itself where there are no times behind it."""
    found = _TRIMMED.fullmatch(name)
    return found[1] if found else name


@functools.lru_cache(maxsize=4096)  # the same few hundred class names come for every clip
def loose_key(name: str) -> str:
    """Letters and digits of a name, without case: equal for ``air_drumming`` and ``Air drumming``."""
    return "".join(mark for mark in unicodedata.normalize("NFC", name).casefold() if mark.isalnum())


class NameIndex:
    """Positions of names, for looking up a name that may be spelled differently.

    A name is found as it is; else as a trimmed YouTube clip whose times are written in another way, or left out on one side; else
    without regard to case, spaces and punctuation. Trimmed clips are not sought that way: YouTube ids differ by case.

    Args:
        names: Names without file endings; the same one may come again.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._exact: dict[str, list[int]] = defaultdict(list)
        self._loose: dict[str, list[int]] = defaultdict(list)
        self._youtube: dict[str, list[tuple[int | None, int]]] = defaultdict(list)
        for position, name in enumerate(names):
            self._exact[name].append(position)
            self._loose[loose_key(name)].append(position)
            source, start = _youtube_clip(name)
            if source:
                self._youtube[source].append((start, position))

    def find(self, name: str) -> list[int]:
        """Positions of the clips that a name can mean, in order; several where it does not tell them apart."""
        if name in self._exact:
            return self._exact[name]
        source, start = _youtube_clip(name)
        if source:
            known = [position for other, position in self._youtube.get(source, ()) if None in (start, other) or start == other]
            if known or start is not None:
                return known
        return self._loose.get(loose_key(name), [])


def _youtube_clip(name: str) -> tuple[str, int | None]:
    """YouTube id and start in seconds; no start where the name is an id alone, no id where it cannot be one."""
    found = _TRIMMED.fullmatch(name)
    if found:
        return found[1], int(found[2])
    return (name, None) if len(name) == _YOUTUBE_ID else ("", None)
