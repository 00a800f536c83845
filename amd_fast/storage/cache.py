"""The local copies of remote objects: one folder shared by all processes of a machine, of bounded size.

``<cache>/objects/<2 digits>/<hash of the URI>-<hash of its version><suffix>`` are the copies, least recently used by their time of
modification. A copy in use is locked (shared) by its readers; a copy being made is locked (exclusively) by its maker, whose partial
file is at once the lock that others wait for. Locks are the kernel's (flock): what a killed process held is free again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from amd_fast.errors import AmdFastError, DataError
from amd_fast.storage import remote
from amd_fast.storage.remote import ObjectInfo, StoreError
from amd_fast.storage.uris import PathLike, base_name, is_remote, plain

logger = logging.getLogger(__name__)

DEFAULT_GIGABYTES = 20.0
_POLL = 0.02  # seconds between looks at a copy that another reader is making
_BUSY = 120.0  # seconds that the cache's own lock may be held by another process; it takes milliseconds
_TRIES = 20  # copies made in vain, each evicted or changed before it could be opened
_MANY = 1000  # copies from which on a little more is evicted than needed, so that not every download walks through them all
_PARTIAL = re.compile(r"\.(.+)\.(\d+)\.part")


class Lease:
    """A file of this machine that stays where it is until the lease is closed; a context manager that gives its path."""

    def __init__(self, path: Path, lock: int | None = None) -> None:
        self.path, self._lock = path, lock

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file back; closing twice is no error."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def __del__(self) -> None:
        self.close()


def cache_folder() -> Path:
    """Where copies of remote files lie: ``AMD_FAST_CACHE``, by default ``~/.cache/amd_fast``."""
    return Path(os.environ.get("AMD_FAST_CACHE") or Path.home() / ".cache" / "amd_fast")


def lease(path: PathLike, *, error: type[AmdFastError] = DataError) -> Lease:
    """A file to read: a local path as it is, anything remote as a local copy that is not evicted while the lease is open.

    The store is asked each time whether the object has changed, and a changed one is fetched again. Where it does not answer, the
    copy there is serves, with a warning.

    Raises:
        DataError (or ``error``): it cannot be fetched; names the URI and the reason, or the cache where that is full or unusable.
        ImplementationError: the package for that kind of store is not installed.
    """
    if not is_remote(path):
        return Lease(Path(plain(path)))
    uri = os.fspath(path)
    try:
        return Cache(cache_folder(), round(remote.number_from_environment("AMD_FAST_CACHE_GB", DEFAULT_GIGABYTES) * 1e9)).lease(uri)
    except StoreError as failure:
        raise failure.as_error(error, "read", uri) from failure.__cause__
    except OSError as cause:
        _refuse(cause, uri, error)


def local(path: PathLike, *, error: type[AmdFastError] = DataError) -> Path:
    """The path of a file to read, see :func:`lease`; the copy of a remote one can be evicted once others have been used since.

    Raises:
        DataError (or ``error``), ImplementationError: see :func:`lease`.
    """
    with lease(path, error=error) as found:
        return found


def _refuse(cause: OSError, uri: str, error: type[AmdFastError]) -> NoReturn:
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = "free some space, set AMD_FAST_CACHE_GB to less than the disk holds, or AMD_FAST_CACHE to a folder on another disk"
        raise error(f"cannot fetch {uri}: the disk of the cache {cache_folder()} is full; {remedy}") from cause
    remedy = "set AMD_FAST_CACHE to a folder on a local disk that can be written"
    raise error(f"cannot fetch {uri}: the cache {cache_folder()} cannot be used ({cause.strerror or cause}); {remedy}") from cause


@dataclass(frozen=True)
class Cache:
    """A folder of copies.

    Attributes:
        folder: where; made when needed, shared by any number of processes.
        limit: bytes that the copies may take; exceeded by what is in use at once, and by a single object that is larger.
    """

    folder: Path
    limit: int

    def lease(self, uri: str) -> Lease:
        """A copy of an object as it is now.

        Raises:
            StoreError: it cannot be read.
            OSError: the cache cannot be used.
        """
        stem = self.folder / "objects" / digest(uri)[:2] / digest(uri)
        for _ in range(_TRIES):
            try:
                info = remote.describe(uri)
            except StoreError as failure:
                if failure.unreachable and (old := self._last_copy(stem)) is not None:
                    logger.warning("%s: %s; its copy in the cache is used", uri, failure.reason)
                    return old
                raise
            target = stem.with_name(f"{stem.name}-{digest(info.version)[:16]}{_suffix(uri)}")
            with suppress(_LostError):
                return self._copy(uri, info, target)
        raise StoreError("it changed, or its copy was evicted, faster than it could be read", "set AMD_FAST_CACHE_GB to more")

    def _copy(self, uri: str, info: ObjectInfo, target: Path) -> Lease:
        """The copy of one version, made by this process or by whichever was first."""
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{info.size}.part")
        seen, since = -1, time.monotonic()
        while (found := _open_copy(target, info.size)) is None:
            claim = self._claim(partial, target, info.size)
            if claim is not None:
                return self._fetch(uri, info, partial, target, claim)
            grown = _size(partial)
            if grown != seen:
                seen, since = grown, time.monotonic()
            if time.monotonic() - since > 2 * remote.patience():
                raise StoreError(
                    f"another process has been fetching it without progress (see {partial})", "end that process", unreachable=True
                )
            time.sleep(_POLL)
        return found

    def _fetch(self, uri: str, info: ObjectInfo, partial: Path, target: Path, lock: int) -> Lease:
        made = Lease(target, lock)
        try:
            remote.download(uri, partial, info.size)
            self._publish(partial, target, lock, info.size)
        except BaseException:
            partial.unlink(missing_ok=True)
            made.close()
            self._release(info.size)
            raise
        self._remove_others(target)
        return made

    def _publish(self, partial: Path, target: Path, lock: int, size: int) -> None:
        with self._locked():  # nobody looks for partial files meanwhile, so that the lock can change its kind
            fcntl.flock(lock, fcntl.LOCK_SH)
            # Another size: the object has changed meanwhile. Another file: the store's package has replaced the one that is locked.
            if _size(partial) != size or not _same_file(lock, partial):
                raise _LostError
            os.replace(partial, target)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The whole cache, for the moments in which its size changes."""
        handle = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            end = time.monotonic() + _BUSY
            while not _try_lock(handle):
                if time.monotonic() > end:
                    raise OSError(errno.ETIMEDOUT, f"another process has held {self.folder / 'lock'} for {_BUSY:.0f} s")
                time.sleep(_POLL)
            yield
        finally:
            os.close(handle)

    def _claim(self, partial: Path, target: Path, size: int) -> int | None:
        """Makes the partial file, locked, with room for it in the cache; None where another reader makes or has made the copy."""
        with self._locked():
            if target.exists():
                return None
            handle = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
            if not (_try_lock(handle) and _same_file(handle, partial)):
                os.close(handle)
                return None
            used = self._used()
            if used is None or used + size > self.limit:
                used = self._evict(self.limit - size, keep=partial)
            self._record(used + size)
            return handle

    def _release(self, size: int) -> None:
        with self._locked():
            self._record(max(0, (self._used() or 0) - size))

    def _used(self) -> int | None:
        """Bytes that copies take, those being made with their full size; None where that is not known."""
        try:
            return int((self.folder / "size").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _record(self, used: int) -> None:
        (self.folder / "size").write_text(str(used))  # under the lock; a torn number is unreadable, and counted anew

    def _evict(self, budget: int, keep: Path) -> int:
        """Removes copies that nobody uses, the least recently used first, until they fit ``budget``; returns the bytes that are left."""
        found = []
        for folder in (self.folder / "objects").iterdir():
            with os.scandir(folder) as items:
                for item in items:
                    with suppress(FileNotFoundError):
                        status = item.stat()
                        being_made = _PARTIAL.fullmatch(item.name)
                        size = int(being_made[2]) if being_made else status.st_size
                        if item.path != str(keep):
                            found.append((status.st_mtime_ns, size, item.path, being_made is not None))
        left = sum(size for _, size, _, _ in found)
        budget -= self.limit // 20 if len(found) > _MANY else 0
        for _, size, path, partial in sorted(found):
            if (partial or left > budget) and _remove(path):
                left -= size
        return left

    def _last_copy(self, stem: Path) -> Lease | None:
        """The newest copy of an object, of whatever version."""
        copies = sorted(stem.parent.glob(f"{stem.name}-*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return next((found for path in copies if (found := _open_copy(path, None)) is not None), None)

    def _remove_others(self, target: Path) -> None:
        """Removes copies of earlier versions of the same object."""
        start = target.name.partition("-")[0]
        old = [path for path in target.parent.glob(f"{start}-*") if path != target]
        for path in old:
            size = _size(path)
            if _remove(path):
                self._release(size)


class _LostError(Exception):
    """A copy that was gone, or not what it should be, when it was complete."""


def _open_copy(path: Path, size: int | None) -> Lease | None:
    """A lease of a copy, marked as used; None where there is none, it is being removed, or it has not the size of the object."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    found = Lease(path, handle)
    if not (_try_lock(handle, fcntl.LOCK_SH) and _same_file(handle, path)):
        found.close()
        return None
    if size is not None and os.fstat(handle).st_size != size:
        found.close()
        _remove(path)
        return None
    with suppress(OSError):  # another user's cache can be read, too
        os.utime(path)
    return found


def _remove(path: PathLike) -> bool:
    """Removes a file unless somebody uses it."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        if not (_try_lock(handle) and _same_file(handle, path)):
            return False
        os.unlink(path)
        return True
    finally:
        os.close(handle)


def _try_lock(handle: int, kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same_file(handle: int, path: PathLike) -> bool:
    """Whether a path still names the file that was opened."""
    try:
        there, here = os.stat(path), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _size(path: PathLike) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def digest(text: str) -> str:
    """32 hexadecimal digits that stand for a URI or a version, fit for file names."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _suffix(uri: str) -> str:
    """The end of the name, for readers that go by it."""
    found = re.fullmatch(r"\.[A-Za-z0-9]{1,8}", os.path.splitext(base_name(uri))[1])
    return found[0] if found else ""
