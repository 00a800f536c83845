"""Reading and writing whole remote objects through fsspec: transient failures are repeated, and every wait has a bound."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from amd_fast.errors import AmdFastError, ConfigError, DataError, ImplementationError
from amd_fast.storage.uris import PathLike, is_remote, is_uri, plain

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

logger = logging.getLogger(__name__)

_ATTEMPTS = 20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts, doubled each time
_SLOWEST = 1 << 20  # bytes per second: what is allowed for on top of the patience, for a part of _BLOCK bytes shows no progress
_BLOCK = 64 << 20
_LISTING = 10  # a listing shows no progress between its first page and its last: this many times the patience
_SHUNNED = 30.0  # seconds for which a store that did not answer gets a single short attempt
_SHORT = 3.0  # seconds of that attempt

_EXTRA = {"s3": "remote", "s3a": "remote"}
# What no repetition changes. Names, for the packages that define these exceptions need not be installed.
_FINAL = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ImportError, ValueError, TypeError, NotImplementedError),
)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError", "TokenRetrievalError")
_FINAL_CODES = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, getattr(errno, "EREMCHG", errno.EINVAL))

# What stores call an object's checksum and time, and with them its size: an object that differs in none of these has not changed.
_MARKS = (
    *("ETag", "etag", "md5Hash", "content_md5", "generation", "size"),
    *("mtime", "LastModified", "last_modified", "updated", "modified", "created"),
)

T = TypeVar("T")


class StoreError(Exception):
    """Why something remote could not be read or written.

    Attributes:
        reason, remedy: for the message.
        unreachable: the store did not answer, as opposed to answering that it will not or cannot.
    """

    def __init__(self, reason: str, remedy: str, *, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.remedy, self.unreachable = reason, remedy, unreachable

    def as_error(self, kind: type[AmdFastError], doing: str, uri: str) -> AmdFastError:
        """The error that a user sees."""
        return kind(f"cannot {doing} {uri}: {self.reason}; {self.remedy}")


def is_unreachable(error: BaseException) -> bool:
    """Whether an error was raised because a store did not answer, so that another file there would fare no better."""
    return isinstance(error.__context__, StoreError) and error.__context__.unreachable


@dataclass(frozen=True)
class ObjectInfo:
    """An object's state: ``version`` changes whenever its content does; ``size`` in bytes."""

    version: str
    size: int


def patience() -> float:
    """Seconds without any progress after which a remote operation is given up: ``AMD_FAST_REMOTE_TIMEOUT``, by default 30.

    That is less than loaders give a clip, so that they learn the reason.
    """
    return number_from_environment("AMD_FAST_REMOTE_TIMEOUT", 30.0)


def number_from_environment(name: str, default: float) -> float:
    """A number above 0 from the environment.

    Raises:
        ConfigError: it is something else.
    """
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} is {text!r}; set it to a number above 0, or leave it out for {default:g}")
    return value


def describe(uri: str) -> ObjectInfo:
    """State of an object, asked of the store.

    Raises:
        StoreError: there is none, or the store cannot be asked.
    """
    found = _repeat(uri, lambda store, path, _: store.info(path))
    if found["type"] != "file":
        raise StoreError("it is a folder, not an object", "name the file itself")
    if found.get("size") is None:
        raise StoreError("the store does not tell its size", "copy it to this machine, or to a store that does")
    return ObjectInfo("\n".join(str(found.get(mark)) for mark in _MARKS), int(found["size"]))


def exists(path: PathLike) -> bool:
    """Whether there is a file, an object or a folder of that name.

    Raises:
        DataError: the store cannot be asked.
    """
    if not is_remote(path):
        return os.path.exists(plain(path))
    uri = os.fspath(path)
    try:
        _repeat(uri, lambda store, path, _: store.info(path))
    except StoreError as failure:
        if isinstance(failure.__cause__, FileNotFoundError):
            return False
        raise failure.as_error(DataError, "read", uri) from failure.__cause__
    return True


def is_folder(path: PathLike, *, error: type[AmdFastError] = DataError) -> bool:
    """Whether a path or URI names a folder; False where there is nothing.

    Raises:
        DataError (or ``error``): the store cannot be asked.
    """
    if not is_remote(path):
        return os.path.isdir(plain(path))
    uri = os.fspath(path)
    try:
        return bool(_repeat(uri, lambda store, path, _: store.info(path))["type"] == "directory")
    except StoreError as failure:
        if isinstance(failure.__cause__, FileNotFoundError):
            return False
        raise failure.as_error(error, "read", uri) from failure.__cause__


def download(uri: str, file: PathLike, size: int) -> None:
    """Writes an object to a local file.

    Raises:
        StoreError: it cannot be read.
        OSError: the file cannot be written.
    """
    _repeat(uri, lambda store, path, progress: store.get_file(path, os.fspath(file), callback=progress), size=size)


def read_bytes(path: PathLike, *, error: type[AmdFastError] = DataError) -> bytes:
    """The content of a file or of a small object, which is not kept in the cache.

    Raises:
        DataError (or ``error``): the object cannot be read; names the URI and the reason.
        OSError: the file cannot be read.
    """
    if not is_remote(path):
        return Path(plain(path)).read_bytes()
    uri = os.fspath(path)
    try:
        return bytes(_repeat(uri, lambda store, path, _: store.cat_file(path)))
    except StoreError as failure:
        raise failure.as_error(error, "read", uri) from failure.__cause__


def write_bytes(uri: str, content: bytes, *, error: type[AmdFastError] = DataError) -> None:
    """Writes an object whole or not at all.

    Raises:
        DataError (or ``error``): it cannot be written; names the URI and the reason.
    """
    _write(uri, lambda store, path, _: store.pipe_file(path, content), len(content), error)


def upload(file: PathLike, uri: str, *, error: type[AmdFastError] = DataError) -> None:
    """Writes a local file to an object, whole or not at all.

    Raises:
        DataError (or ``error``): it cannot be written; names the URI and the reason.
    """
    size = os.path.getsize(file)
    _write(uri, lambda store, path, progress: store.put_file(os.fspath(file), path, callback=progress), size, error)


def remove(uri: str, *, error: type[AmdFastError] = DataError) -> None:
    """Removes an object; one that does not exist is no error.

    Raises:
        DataError (or ``error``): it cannot be removed; names the URI and the reason.
    """
    try:
        _repeat(uri, lambda store, path, _: store.rm_file(path))
    except StoreError as failure:
        if not isinstance(failure.__cause__, FileNotFoundError):
            raise failure.as_error(error, "remove", uri) from failure.__cause__


def list_below(uri: str, *, error: type[AmdFastError] = DataError) -> list[str]:
    """Objects below a URI, relative to it, in the order of a walk: the files of a folder by name, then its folders by name.

    Hidden files and folders are left out.

    Raises:
        DataError (or ``error``): the store cannot be asked, or there is nothing.
    """

    def find(store: AbstractFileSystem, path: str, _: Any) -> list[str]:
        store.invalidate_cache()
        start = path.rstrip("/") + "/"
        return [name[len(start) :] for name in store.find(path) if name.startswith(start)]

    try:
        names = _repeat(uri, find, limit=_LISTING * patience())
    except StoreError as failure:
        raise failure.as_error(error, "list", uri) from failure.__cause__
    if not names:
        raise error(f"cannot list {uri}: there is nothing below it; check the name")
    parts = [name.split("/") for name in names if name and not name.endswith("/")]
    shown = [part for part in parts if not any(piece.startswith(".") for piece in part)]
    return ["/".join(part) for part in sorted(shown, key=lambda part: [*((1, piece) for piece in part[:-1]), (0, part[-1])])]


def _write(uri: str, put: Callable[[Any, str, Any], object], size: int, error: type[AmdFastError]) -> None:
    """A store that can rename gets another name first; the others are object stores, where a write is whole or does not happen."""
    from fsspec import AbstractFileSystem

    def write(store: AbstractFileSystem, path: str, progress: Any) -> None:
        if type(store).mv is AbstractFileSystem.mv:
            put(store, path, progress)
            return
        folder, _, name = path.rpartition("/")
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.tmp"
        put(store, temporary, progress)
        store.mv(temporary, path)

    try:
        _repeat(uri, write, size=size, insist=True)
    except StoreError as failure:
        raise failure.as_error(error, "write", uri) from failure.__cause__


def open_store(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of a URI (its settings come from the environment and fsspec's configuration), and the path in it.

    Raises:
        ImplementationError: the package for that kind of store is not installed, or there is none.
    """
    import fsspec

    protocol = uri.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in _EXTRA:  # repetitions are counted here, in one place, so that they have one bound
        configured = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
        options["config_kwargs"] = {**configured, "retries": {"total_max_attempts": 1}}
    try:
        store = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        remedy = f"pip install 'amd_fast[{_EXTRA[protocol]}]'" if protocol in _EXTRA else "install it"
        raise ImplementationError(f"cannot open {uri}: a package for {protocol}:// is missing ({error}); {remedy}") from error
    except ValueError as error:
        raise ImplementationError(f"cannot open {uri}: {error}; give a path, or a URI of a kind that fsspec knows") from error
    if protocol in _EXTRA:
        store.retries = 1
    return store, str(store._strip_protocol(uri))


class _Progress:
    """When something last moved, as told by fsspec's callback."""

    def __init__(self) -> None:
        from fsspec.callbacks import Callback

        self.last = time.monotonic()
        self.callback = Callback(hooks={"moved": self._moved})

    def _moved(self, *_: Any, **__: Any) -> None:
        self.last = time.monotonic()


class _Call(Generic[T]):
    """A call in a thread of its own, for no other bound holds for every kind of store; one that does not return is left behind."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function, self._done = function, threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="remote", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:  # handed over to the waiting thread
            self._error = error
        self._done.set()

    def result(self, progress: _Progress, limit: float) -> T:
        while not self._done.wait(max(0.0, progress.last + limit - time.monotonic())):
            if time.monotonic() - progress.last >= limit:
                raise TimeoutError(f"no answer for {limit:.3g} s")
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


_silent: dict[str, float] = {}  # stores that did not answer, and until when they are given little time


def _repeat(uri: str, call: Callable[[Any, str, Any], T], *, size: int = 0, limit: float | None = None, insist: bool = False) -> T:
    """Calls ``call(store, path, callback)`` until it succeeds, fails for good, or nothing has moved for ``limit`` seconds.

    A store that has just not answered another call gets one short attempt, unless this one has to ``insist``.
    """
    if not is_uri(uri):
        raise ValueError(f"{uri!r} is not a URI")
    store, path = open_store(uri)
    place = "/".join(uri.split("/")[:3])
    shunned = time.monotonic() < _silent.get(place, 0.0) and not insist
    limit = min(_SHORT, patience()) if shunned else limit or patience()
    progress, pause = _Progress(), _FIRST_PAUSE
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            result = _Call(lambda: call(store, path, progress.callback)).result(progress, limit + min(size, _BLOCK) / _SLOWEST)
        except Exception as error:
            if _is_final(error):
                raise _failure(error) from error
            if shunned or attempt == _ATTEMPTS or time.monotonic() - progress.last + pause > limit:
                _silent[place] = time.monotonic() + _SHUNNED
                raise _failure(error) from error
            logger.info("%s: %s; trying again", uri, _reason(error))
        else:
            _silent.pop(place, None)
            return result
        time.sleep(pause * random.uniform(0.75, 1.25))  # so that many readers do not come back in the same moment
        pause = min(2 * pause, _LONGEST_PAUSE)
    raise AssertionError("the last attempt returns or raises")


def _is_final(error: BaseException) -> bool:
    if isinstance(error, TimeoutError | ConnectionError):
        return False
    code = getattr(error, "errno", None)
    return isinstance(error, _FINAL) or type(error).__name__ in _NO_CREDENTIALS or code in _FINAL_CODES


def _failure(error: BaseException) -> StoreError:
    """What an exception of fsspec or of the package behind it means."""
    reason = _reason(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise error
    if type(error).__name__ in _NO_CREDENTIALS:
        return StoreError(f"no credentials ({reason})", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    if isinstance(error, PermissionError):
        return StoreError(f"access denied ({reason})", "check the credentials and what they may do")
    if isinstance(error, FileNotFoundError):
        return StoreError(f"there is no such object or bucket ({reason})", "check the name, and the endpoint in AWS_ENDPOINT_URL")
    if _is_final(error):
        return StoreError(reason, "check the name and the store's settings")
    remedy = "check the network and the endpoint; AMD_FAST_REMOTE_TIMEOUT sets the seconds that are waited"
    return StoreError(f"the store does not answer ({reason})", remedy, unreachable=True)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
