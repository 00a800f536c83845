"""What the commands read: files, folders and lists of clips; and how they speak of those they cannot read."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from amd_fast.data.layouts import find_clips
from amd_fast.data.manifest import Rejection
from amd_fast.errors import DataError

STDIN = "-"


def clips_below(sources: Iterable[str]) -> list[str]:
    """Clips by path: files as they are, folders searched at any depth, ``-`` for a list on the standard input, a path per line.

    Raises:
        DataError: a folder holds no clips, or nothing was listed.
    """
    found: list[str] = []
    for source in sources:
        if source == STDIN:
            found += [line for line in (line.rstrip("\r\n") for line in sys.stdin) if line.strip()]
        elif os.path.isdir(source):
            found += _in_folder(source)
        else:
            found.append(source)
    if not found:
        raise DataError("no clips were listed; give files, folders, or - and a path per line on the standard input")
    return found


def _in_folder(folder: str) -> list[str]:
    rejected: list[Rejection] = []
    found = [str(Path(folder, path)) for path in find_clips(Path(folder), rejected, [])]
    if not found and any(name.lower().endswith((".jpg", ".jpeg", ".png")) for name in os.listdir(folder)):
        return [folder]  # the frames of one clip
    if not found:
        raise DataError(f"no videos below {folder}; give a folder that holds some, at any depth")
    return found


def complain(lost: Mapping[str, str]) -> None:
    """Names clips that could not be read on the standard error."""
    console = Console(stderr=True, soft_wrap=True)
    for clip, reason in lost.items():
        console.print(Text.assemble(("left out: ", "bold yellow"), reason if clip in reason else f"{clip}: {reason}"))


@contextmanager
def silenced() -> Iterator[None]:
    """Without the classifier's warnings, which the commands say in their own words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
