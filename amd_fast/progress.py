"""Progress bars for long work: rate and time left on a terminal, silence elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")
console = Console()


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
    """Iterates with a progress bar; each item counts as ``unit`` steps."""
    if total is None and isinstance(items, Sequence):
        total = len(items) * unit
    with progress_bar(disable=disable) as bar:
        task = bar.add_task(description, total=total, note="")
        for item in items:
            yield item
            bar.advance(task, unit)
