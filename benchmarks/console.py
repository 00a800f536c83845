"""What the benchmarks print: through rich where it can be imported, as plain text on a machine with little beside torch and triton."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


class PlainConsole:
    """Stands where rich's console would; styles are ignored."""

    def print(self, text: object = "", **style: object) -> None:
        print(text, flush=True)


def wide_console() -> Any:
    """A console whose tables are not folded where the output goes to a file."""
    try:
        from amd_fast import progress
    except ImportError:  # rich is missing
        return PlainConsole()
    return progress.wide_console()


def print_table(
    console: Any,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[str] = (),
    red: Collection[int] = (),
) -> None:
    """Print a table.

    Args:
        console: From :func:`wide_console`, or rich's.
        title: Stands above it.
        columns: Their names.
        rows: The cells.
        right: Names of the columns of numbers, which are aligned on the right.
        red: Positions of the rows to point out, which only colours can do.
    """
    if isinstance(console, PlainConsole):
        console.print("\n".join([title, *_aligned([columns, *rows], [name in right for name in columns])]))
        return
    from rich.table import Table

    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for place, cells in enumerate(rows):
        table.add_row(*cells, style="red" if place in red else None)
    console.print(table)


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if flush else cell.ljust(width) for cell, width, flush in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]
