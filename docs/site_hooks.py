"""What the site's pages hold beside their Markdown: the tables of commands and settings, made from the parsers and dataclasses.

mkdocs calls the functions named ``on_...`` while it builds; a test compares what they write with the parsers and dataclasses.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from amd_fast import cli
from amd_fast.training.config import TrainConfig

_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):<code>~?([^<]+)</code>")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the comments ``<!-- generated: commands -->`` and ``<!-- generated: configuration -->`` by their tables."""
    for name, write in (("commands", commands_text), ("configuration", configuration_text)):
        mark = f"<!-- generated: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, write())
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Drops the roles of docstrings (``:func:``), which Markdown does not know, from the names that they stand before."""
    return _ROLE.sub(r"<code>\1</code>", html)


def commands_text() -> str:
    """A section for every command: what it does, and a table of its arguments."""
    return "\n\n".join(_command(name) for name in cli.COMMANDS)


def _command(name: str) -> str:
    parser: Any = cli.build_parser(name, cli.COMMANDS[name])
    settings = {item.name for item in dataclasses.fields(TrainConfig)} if name == "train" else set()
    shown = [action for action in parser._actions if action.dest != "help" and action.dest.split(".")[0] not in settings]
    text = f"## amd-fast {name}\n\n{_plain(parser.description)}\n\n"
    if shown:
        text += _table(("argument", "default", "meaning"), [_argument(action) for action in shown])
    if settings:
        text += "\n\nEvery setting of the [configuration](configuration.md) is an option besides."
    return text


def _argument(action: Any) -> tuple[str, str, str]:
    names = [option for option in action.option_strings if option.startswith("--")]
    shown = ", ".join(f"`{name}`" for name in names) or f"`{action.dest}`"
    return shown, _default(action.default) if names else "required", _plain(action.help)


def _default(value: Any) -> str:
    if value is None or value == "==SUPPRESS==":
        return ""
    if isinstance(value, (list, tuple)):
        value = " ".join(map(str, value))
    return f"`{value}`" if value != "" else "empty"


def configuration_text() -> str:
    """A section for every group of settings, with their types, defaults and meaning."""
    return "\n\n".join(
        f"## {title}\n\n{intro}\n\n" + _table(("option", "type", "default", "meaning"), rows) for title, intro, rows in _groups()
    )


def _groups() -> Iterator[tuple[str, str, list[tuple[str, ...]]]]:
    config = TrainConfig()
    nested = [item.name for item in dataclasses.fields(config) if dataclasses.is_dataclass(getattr(config, item.name))]
    yield "The run", _summary(config), [row for row in _settings(config, "") if row[0].strip("`-") not in nested]
    for name in nested:
        group = getattr(config, name)
        yield name, _summary(group), _settings(group, f"{name}.")


def _settings(group: Any, prefix: str) -> list[tuple[str, ...]]:
    meaning = field_texts(type(group))
    types = {
        item.name: str(item.type).replace("Literal[", "").removesuffix("]") if "Literal" in str(item.type) else str(item.type)
        for item in dataclasses.fields(group)
    }
    return [
        (f"`--{prefix}{name}`", f"`{kind}`".replace("|", "\\|"), _default(getattr(group, name)), _plain(meaning[name]))
        for name, kind in types.items()
    ]


def field_texts(kind: type) -> dict[str, str]:
    """The text under every field of a dataclass, which Python itself does not keep."""
    body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
    texts = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            documented = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            texts[field.target.id] = str(text.value.value) if documented else ""  # type: ignore[attr-defined]
    return texts


def _summary(group: Any) -> str:
    return _plain(inspect.getdoc(type(group))).split("\n")[0]


def _plain(text: str | None) -> str:
    """One line, with the literals of docstrings as those of Markdown."""
    line = " ".join((text or "").split()).replace("``", "`")
    return line.replace("|", "\\|").replace("<", "&lt;")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
