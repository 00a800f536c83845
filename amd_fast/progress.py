"""Progress of long work, with rate and time left: a bar on a terminal, a line a minute where the output is kept (batch jobs)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")
console = Console()

_PAUSE = 60.0  # seconds between lines


def wide_console() -> Console:
    """Where tables go: the console, or, where the output is a file, one so wide that their lines are not folded."""
    return console if console.is_terminal else Console(width=200)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Steps per second so far."""
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="cyan")


def progress_bar(*, disable: bool = False) -> Progress:
    """A rich progress display with count, rate, elapsed time and time left; shown on terminals only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=disable or not console.is_terminal,
    )


def track(
    items: Sequence[T] | Iterable[T], description: str, *, unit: int = 1, total: int | None = None, disable: bool = False
) -> Iterator[T]:
    """Iterates with a progress bar, or a line a minute on the standard error stream; each item counts as ``unit`` steps."""
    if total is None and isinstance(items, Sequence):
        total = len(items) * unit
    lines = None if disable or console.is_terminal else _Lines(description, total)
    with progress_bar(disable=disable) as bar:
        task = bar.add_task(description, total=total, note="")
        for item in items:
            yield item
            bar.advance(task, unit)
            if lines is not None:
                lines.advance(unit)


class _Lines:
    """What a bar shows, in lines."""

    def __init__(self, description: str, total: int | None) -> None:
        self.description, self.total, self.done = description, total, 0
        self.started = self.written = time.monotonic()

    def advance(self, steps: int) -> None:
        self.done += steps
        now = time.monotonic()
        if now - self.written < _PAUSE:
            return
        self.written = now
        rate = self.done / (now - self.started)
        of_total = "" if self.total is None else f" of {self.total}"
        left = "" if self.total is None else f", {max(self.total - self.done, 0) / rate / 60:.0f} min left"
        print(f"{self.description}: {self.done}{of_total}, {rate:.1f}/s{left}", file=sys.stderr, flush=True)
