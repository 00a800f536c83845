"""Folders that are written to a store: made on this machine, then uploaded."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amd_fast.errors import AmdFastError, DataError
from amd_fast.storage import remote
from amd_fast.storage.cache import cache_folder, digest
from amd_fast.storage.uris import PathLike, base_name, is_remote, join, plain


def working_folder(path: PathLike) -> Path:
    """The folder of this machine in which something is made: a local path itself; for a URI always the same one beside the cache.

    It is not made here, and nothing evicts it.
    """
    if not is_remote(path):
        return Path(plain(path))
    uri = os.fspath(path).rstrip("/")
    return cache_folder() / "work" / f"{base_name(uri)}-{digest(uri)[:12]}"


def files_below(folder: Path) -> list[str]:
    """Files below a folder, relative to it with forward slashes, sorted; hidden ones (being written, say) left out."""
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))


def upload_folder(folder: Path, path: PathLike, *, error: type[AmdFastError] = DataError) -> None:
    """Writes the files of a folder below a URI, where other objects stay; nothing is to be done where ``path`` is local.

    The first file by name is taken away there before the others are written and comes back last: as long as it is missing, what is
    there is incomplete, and it is never a mixture of old and new.

    Raises:
        DataError (or ``error``): they cannot be written; names the URI, the reason, and the local folder.
    """
    if not is_remote(path):
        return
    names = files_below(folder)
    try:
        if names:
            remote.remove(join(path, names[0]), error=error)
        for name in reversed(names):
            remote.upload(folder / name, join(path, name), error=error)
    except AmdFastError as cause:
        raise error(f"{cause}. What was to be written is kept in {folder}") from cause


@contextmanager
def open_folder(path: PathLike, *, error: type[AmdFastError] = DataError) -> Iterator[Path]:
    """A local folder to write files into: the path itself; for a URI one that is uploaded at the end, see :func:`uploaded_folder`."""
    if is_remote(path):
        with uploaded_folder(os.fspath(path), error=error) as folder:
            yield folder
    else:
        yield Path(plain(path))


@contextmanager
def uploaded_folder(uri: str, *, error: type[AmdFastError] = DataError) -> Iterator[Path]:
    """A new local folder to fill, uploaded when the block ends without an error, see :func:`upload_folder`.

    Args:
        uri: the folder in the store.
        error: what is raised where it cannot be written; the local folder is then kept.
    """
    place = cache_folder() / "work"
    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=place))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    upload_folder(folder, uri, error=error)
    shutil.rmtree(folder, ignore_errors=True)
