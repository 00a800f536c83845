"""Calls made one after another in a thread of their own, which is left behind if one of them never comes back."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from amd_fast.errors import ImplementationError

Result = TypeVar("Result")

_LOOK = 0.5  # seconds between looks for a call that takes too long, at most


@dataclass
class Call(Generic[Result]):
    """One call; see :meth:`OneThread.wait`."""

    work: Callable[[], Result] | None
    about: Callable[[], str]
    done: threading.Event = field(default_factory=threading.Event)
    value: Any = None
    error: BaseException | None = None


class OneThread:
    """For a library that is used from one thread and may hang in its driver.

    Args:
        name: of the thread.
        what: the library, for messages.
        limit: seconds that a call may take once it has begun.
        entered: the context that the thread spends its life in.
    """

    def __init__(self, name: str, what: str, limit: float, entered: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self._what, self._state = what, _State(limit, entered)
        self._finish = weakref.finalize(self, self._state.calls.put, None)  # the thread knows the state alone, so this object can go
        # A daemon: a thread that hangs in a driver must not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._state.serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Result], about: Callable[[], str]) -> Call[Result]:
        """Has something done after all that was submitted before.

        Args:
            work: what to do.
            about: tells, for an error's message, what it was about, such as the names of clips.
        """
        call = Call(work, about)
        self._state.calls.put(call)
        return call

    def wait(self, call: Call[Result]) -> Result:
        """The result of a call.

        Raises:
            ImplementationError: this call, or one before it, did not come back in time; nothing is done here from then on.
            Exception: whatever the call raised.
        """
        state = self._state
        while not call.done.wait(min(_LOOK, state.limit / 4)):
            running = state.running
            if state.broken is None and running is not None and time.monotonic() - running[1] > state.limit:
                state.broken = (
                    f"has not come back within {state.limit:g} s from {running[0].about()}; look at the driver's messages (dmesg)"
                )
            if state.broken is None and not self._thread.is_alive() and not call.done.is_set():
                state.broken = "was closed before this was done; open the loader or decoder anew"
            if state.broken is not None:
                raise ImplementationError(f"{self._what} {state.broken}, or use decoder='pyav'")
        if call.error is not None:
            raise call.error
        value: Result = call.value
        return value

    def close(self, patience: float = 5.0) -> None:
        """Ends the thread once it has done what it is at; waits for that, but no longer than ``patience`` seconds."""
        self._finish()
        self._thread.join(patience)


class _State:
    """What the thread knows."""

    def __init__(self, limit: float, entered: Callable[[], AbstractContextManager[object]]) -> None:
        self.limit, self.entered = limit, entered
        self.calls: queue.SimpleQueue[Call[Any] | None] = queue.SimpleQueue()
        self.running: tuple[Call[Any], float] | None = None
        self.broken: str | None = None

    def serve(self) -> None:
        try:
            with self.entered():
                while (call := self.calls.get()) is not None:
                    if self.broken is None:
                        self._do(call)
                    del call  # or the last batch would stay in memory while the thread waits for another
        except Exception as error:  # what the thread works on cannot be had at all
            self.broken = f"cannot be used on this device ({error}); see 'amd-fast doctor'"

    def _do(self, call: Call[Any]) -> None:
        self.running = call, time.monotonic()
        try:
            assert call.work is not None
            call.value = call.work()
        except Exception as error:  # raised where the call is waited for
            call.error = error
        finally:
            self.running = call.work = None
            call.done.set()
