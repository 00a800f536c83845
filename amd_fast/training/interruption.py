"""A request from outside to stop: SIGTERM (spot instances, SLURM, torchrun) and SIGUSR1 (SLURM's early warning).

Imports nothing slow: the train command comes here first of all.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

EXIT_INTERRUPTED = 75
"""EX_TEMPFAIL of sysexits.h: stopped on request with everything saved; the same command with ``--resume`` goes on."""

REQUESTS = (signal.SIGTERM, signal.SIGUSR1)


class EndOnRequest:
    """While it is open, a signal ends this process at once with ``EXIT_INTERRUPTED``; a context manager for what is not training.

    There is nothing to save then: files are written whole or not at all, and training itself (:class:`StopRequest`) saves what it did.
    A thread looks after it, because the main thread may be inside of a C function, importing or waiting for other ranks, where Python
    runs no signal handlers. Outside of the main thread, where Python allows none, nothing changes.
    """

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup = signal.set_wakeup_fd(self._writer)
            self._before = {number: signal.signal(number, _nothing) for number in REQUESTS}
            os.register_at_fork(before=self._hold_back, after_in_parent=self._let_through, after_in_child=self._forget)
            threading.Thread(target=self._watch, args=(reader,), name="requests to stop", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before:
            self._forget()
            os.close(self._writer)  # which ends the thread

    def _forget(self) -> None:
        """Signals do again what they did before; in a forked process too, or one that is meant for it would end its parent."""
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._let_through()
            self._before = {}

    def _hold_back(self) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)

    def _let_through(self) -> None:
        if self._before:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)

    @staticmethod
    def _watch(reader: int) -> None:
        while received := os.read(reader, 1):
            if received[0] in REQUESTS:
                rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
                name = signal.Signals(received[0]).name
                text = f"{rank}stopped by {name} before training began or after it ended: nothing was left to save, --resume goes on\n"
                os.write(2, text.encode())
                os._exit(EXIT_INTERRUPTED)
        os.close(reader)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler of Python's, without which it does not tell the thread."""


class StopRequest:
    """Remembers that a signal asked this process to stop, instead of dying of it; a context manager.

    Outside of the main thread, where Python allows no signal handlers, it never sees a request.
    """

    def __init__(self) -> None:
        self.signal = ""
        self._owner = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup = -1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in REQUESTS}
            self._wakeup = signal.set_wakeup_fd(-1)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked worker process: it has nothing to save
            os._exit(128 + number)
        self.signal = signal.Signals(number).name

    def __bool__(self) -> bool:
        return bool(self.signal)
