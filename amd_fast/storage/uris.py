"""Names of things that lie elsewhere: ``scheme://...`` beside ordinary paths, and the joining and splitting of both."""

from __future__ import annotations

import os
from pathlib import Path

_LOCAL = ("file://", "local://")

PathLike = str | os.PathLike[str]


def is_uri(path: PathLike) -> bool:
    """Whether a path is a URI (``scheme://...``)."""
    scheme, found, _ = os.fspath(path).partition("://")
    return bool(found) and len(scheme) > 1 and scheme.replace("+", "").isalnum()


def is_remote(path: PathLike) -> bool:
    """Whether a path is a URI of something that is no file of this machine."""
    return is_uri(path) and not os.fspath(path).startswith(_LOCAL)


def plain(path: PathLike) -> str:
    """The path behind a ``file://`` URI; anything else as it is."""
    text = os.fspath(path)
    start = next((start for start in _LOCAL if text.startswith(start)), "")
    return text[len(start) :]


def absolute(path: PathLike) -> Path | str:
    """A local path as an absolute one; the URI of something remote as it is, without a final slash."""
    return os.fspath(path).rstrip("/") if is_remote(path) else Path(os.path.abspath(plain(path)))


def join(root: PathLike, *names: str) -> str:
    """A path or URI below another one; a name that is absolute or a URI itself replaces what stands before it."""
    text = os.fspath(root)
    for name in names:
        if is_uri(name) or os.path.isabs(name):
            text = name
        elif is_uri(text):
            text = f"{text.rstrip('/')}/{name}"
        else:
            text = os.path.join(text, name)
    return text


def parent(path: PathLike) -> str:
    """The folder of a path or URI; that of a URI's first part is the part itself."""
    text = os.fspath(path)
    if not is_uri(text):
        return os.path.dirname(text)
    scheme, _, rest = text.partition("://")
    head, found, _ = rest.rstrip("/").rpartition("/")
    return f"{scheme}://{head if found else rest}"


def base_name(path: PathLike) -> str:
    """The last part of a path or URI."""
    return os.fspath(path).rstrip("/").rpartition("/")[2]
