"""One process that does jobs for a thread: it can be killed, and it can die without taking the run with it."""

from __future__ import annotations

import ctypes
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from amd_fast.errors import DataError

_START_SECONDS = 120.0  # a new interpreter imports torch, OpenCV and PyAV, perhaps from a slow disk
_END_SECONDS = 5.0
_ALIGNMENT = 64
_PRELOADED = "amd_fast.data.reading"

_starting = threading.Lock()  # multiprocessing's book-keeping of children is not made for several threads


@dataclass(frozen=True)
class Failure:
    """Why a job could not be done."""

    reason: str


@dataclass(frozen=True)
class Raised:
    """An exception on its way to whoever waits for the job."""

    error: BaseException


class Child:
    """Hands jobs to a process, one at a time; a process that died or took too long is replaced by a new one.

    Results come back through shared memory: whatever arrays a result holds are copied there and out again, nothing else is.
    Processes are forked from a server that has imported what they need (spawned where the system has no such server), so a script
    that starts training needs the usual ``if __name__ == "__main__":``.

    Args:
        work: does a job; pickled.
        timeout: seconds a job may take.
        slot: bytes of shared memory; arrays that do not fit go through the pipe.
    """

    def __init__(self, work: Callable[[Any], Any], timeout: float, slot: int) -> None:
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        self._context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            self._context.set_forkserver_preload([_PRELOADED])
        self._work, self._timeout = work, timeout
        self._slot = self._context.RawArray(ctypes.c_ubyte, slot)
        self._process: Any = None
        self._connection: Any = None

    @property
    def pid(self) -> int | None:
        """Id of the process, None where there is none at the moment."""
        return None if self._process is None else self._process.pid

    def __call__(self, job: Any) -> Any:
        """Does a job; a :class:`Failure` where it takes too long or ends its process.

        Raises:
            DataError: no process can be started.
            Exception: whatever ``work`` raised.
        """
        if self._process is not None and not self._process.is_alive():  # killed between two jobs: not this one's fault
            self.stop()
        if self._process is None:
            self._start()
        try:
            self._connection.send(job)
            if not self._connection.poll(self._timeout):
                self.stop()
                return Failure(f"it took longer than {self._timeout:g} s (slow or dead storage)")
            outcome = _unpack(self._connection.recv(), memoryview(self._slot).cast("B"))
        except (EOFError, OSError):
            return Failure(f"the process that decoded it {self._ending()}")
        if isinstance(outcome, Raised):
            raise outcome.error
        return outcome

    def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None:
            return
        self._connection.close()
        with _starting:
            process.kill()
            process.join(_END_SECONDS)

    def _start(self) -> None:
        self._connection, theirs = self._context.Pipe()
        with _starting:
            self._process = self._context.Process(target=_serve, args=(theirs, self._work, self._slot), name="clips", daemon=True)
            self._process.start()
        theirs.close()
        try:
            ready = self._connection.poll(_START_SECONDS) and self._connection.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.stop()
            raise DataError(
                f"a process that decodes clips did not start within {_START_SECONDS:g} s; a script that trains needs "
                "'if __name__ == \"__main__\":' around what it does, or data.worker_kind=thread"
            )

    def _ending(self) -> str:
        """How the process ended, in words."""
        with _starting:
            self._process.join(_END_SECONDS)
            code = self._process.exitcode
        self.stop()
        if code is not None and code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


def _serve(connection: Any, work: Callable[[Any], Any], slot: Any) -> None:
    """What the process does: jobs, until the other end of the pipe is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what an interrupt ends is for the parent to decide
    _one_thread()
    memory = memoryview(slot).cast("B")
    with suppress(EOFError, ConnectionError):  # whoever gave the jobs is gone
        connection.send(True)
        while True:
            job = connection.recv()
            try:
                outcome = work(job)
            except Exception as error:
                outcome = Raised(error)
            connection.send(_pack(outcome, memory))


def _one_thread() -> None:
    """There are as many processes as cores already."""
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def _pack(value: Any, memory: memoryview) -> tuple[bytes, list[tuple[int, int] | bytes]]:
    """Pickles a value; its arrays are copied into the shared memory, as (place, bytes), or given as bytes where it is full."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts: list[tuple[int, int] | bytes] = []
    place = 0
    for buffer in buffers:
        raw = buffer.raw()
        if place + raw.nbytes <= memory.nbytes:
            memory[place : place + raw.nbytes] = raw
            parts.append((place, raw.nbytes))
            place += -(-raw.nbytes // _ALIGNMENT) * _ALIGNMENT
        else:
            parts.append(bytes(raw))
    return data, parts


def _unpack(message: tuple[bytes, list[tuple[int, int] | bytes]], memory: memoryview) -> Any:
    data, parts = message
    buffers = [bytearray(part) if isinstance(part, bytes) else bytearray(memory[part[0] : part[0] + part[1]]) for part in parts]
    return pickle.loads(data, buffers=buffers)
