"""A request from outside to stop: SIGTERM (spot instances, SLURM, torchrun) and SIGUSR1 (SLURM's early warning)."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

EXIT_INTERRUPTED = 75
"""EX_TEMPFAIL of sysexits.h: stopped on request with everything saved; the same command with ``--resume`` goes on."""


class StopRequest:
    """Remembers that a signal asked this process to stop, instead of dying of it; a context manager.

    Outside of the main thread, where Python allows no signal handlers, it never sees a request.
    """

    def __init__(self) -> None:
        self.signal = ""
        self._owner = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked worker process: it has nothing to save
            os._exit(128 + number)
        self.signal = signal.Signals(number).name

    def __bool__(self) -> bool:
        return bool(self.signal)
