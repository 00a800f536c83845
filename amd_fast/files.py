"""Writing files and folders whole or not at all: under a temporary name beside the target, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from amd_fast.errors import AmdFastError, DataError
from amd_fast.storage import is_remote, plain, uploaded_folder, write_bytes

_REMEDY = "free some space, or choose another folder that can be written"


def write_atomically(path: str | os.PathLike[str], content: bytes, *, error: type[AmdFastError] = DataError) -> None:
    """Writes a file so that a reader sees the old content or the new one, whatever happens in between; makes the folder.

    Args:
        path: the file, or a URI.
        content: its new content.
        error: what is raised where the disk is full or the folder cannot be written; an older file is left as it was.
    """
    if is_remote(path):
        write_bytes(os.fspath(path), content, error=error)
        return
    path = Path(plain(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp keeps a file to its owner; these are shared like any other
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as cause:
        raise error(f"cannot write {path} ({cause.strerror}); {_REMEDY}") from cause


@contextmanager
def written_folder(path: str | os.PathLike[str], *, error: type[AmdFastError] = DataError) -> Iterator[Path]:
    """A new folder to fill, which takes its place at ``path`` when the block ends without an error; nothing is left otherwise.

    An older folder there stays readable until the new one is complete, and is removed after that.

    Args:
        path: the folder, or a URI, see :func:`~amd_fast.storage.uploaded_folder`.
        error: what is raised where the disk is full or the place cannot be written.
    """
    if is_remote(path):
        with uploaded_folder(os.fspath(path), error=error) as folder:
            yield folder
        return
    path = Path(plain(path))
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        take_place(temporary, path)
    except OSError as cause:
        raise error(f"cannot write {path} ({cause.strerror or cause}); {_REMEDY}") from cause
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def take_place(new: Path, path: Path) -> None:
    """Renames the folder ``new`` to ``path``, on the same disk; an older one there steps aside first, for POSIX cannot replace it."""
    aside: Path | None = None
    if path.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        os.replace(path, aside)
    try:
        os.replace(new, path)
    except BaseException:
        if aside is not None:
            with suppress(OSError):
                os.replace(aside, path)
        raise
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
