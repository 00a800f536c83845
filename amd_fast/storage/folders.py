"""Folders that are written to a store: filled on this machine, then uploaded."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amd_fast.errors import AmdFastError, DataError
from amd_fast.storage import remote
from amd_fast.storage.cache import cache_folder
from amd_fast.storage.uris import join


@contextmanager
def uploaded_folder(uri: str, *, error: type[AmdFastError] = DataError) -> Iterator[Path]:
    """A local folder to fill, whose files replace those of the same names below ``uri`` when the block ends without an error.

    The first file by name is taken away there before the others are written and comes back last: as long as it is missing, what is
    there is incomplete. A folder that could not be uploaded is kept, and the error says where.

    Args:
        uri: the folder in the store; other objects below it stay.
        error: what is raised where it cannot be written.
    """
    staging = cache_folder() / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=staging))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    names = sorted(os.path.relpath(file, folder).replace(os.sep, "/") for file in folder.rglob("*") if file.is_file())
    try:
        if names:
            remote.remove(join(uri, names[0]), error=error)
        for name in reversed(names):
            remote.upload(folder / name, join(uri, name), error=error)
    except AmdFastError as cause:
        raise error(f"{cause}. What was to be written is kept in {folder}") from cause
    shutil.rmtree(folder, ignore_errors=True)
