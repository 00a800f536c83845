"""Calls in a thread of their own: in order, with their errors, and never waited for without a bound."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager

import pytest

from amd_fast.data.one_thread import OneThread
from amd_fast.errors import ImplementationError


def test_calls_are_made_in_order_in_one_thread() -> None:
    thread = OneThread("t", "this", 30)
    calls = [thread.submit(lambda k=k: (k, threading.get_ident()), str) for k in range(20)]
    results = [thread.wait(call) for call in reversed(calls)][::-1]
    assert [k for k, _ in results] == list(range(20))
    assert len({ident for _, ident in results}) == 1
    failing = thread.submit(lambda: 1 / 0, str)
    with pytest.raises(ZeroDivisionError):
        thread.wait(failing)
    assert thread.wait(thread.submit(lambda: "goes on", str)) == "goes on"
    thread.close()
    with pytest.raises(ImplementationError, match="this was closed"):
        thread.wait(thread.submit(str, str))


def test_a_call_that_hangs_is_named_and_all_that_wait_are_told() -> None:
    gate = threading.Event()
    thread = OneThread("t", "this", 0.4)
    calls = [thread.submit(gate.wait, lambda: "a.mp4, b.mp4"), thread.submit(str, str)]
    begun = time.monotonic()
    for call in reversed(calls):  # whoever waits behind it as well, though nobody waits for the call itself
        with pytest.raises(ImplementationError, match=r"this has not come back within 0\.4 s from a\.mp4, b\.mp4.*decoder='pyav'"):
            thread.wait(call)
    with pytest.raises(ImplementationError, match=r"a\.mp4"):
        thread.wait(thread.submit(str, str))
    thread.close(patience=0.1)
    assert time.monotonic() - begun < 5
    gate.set()


def test_time_in_the_queue_does_not_count() -> None:
    thread = OneThread("t", "this", 0.6)
    calls = [thread.submit(lambda: time.sleep(0.3), str) for _ in range(4)]
    for call in reversed(calls):
        thread.wait(call)
    thread.close()


def test_a_device_that_cannot_be_had() -> None:
    @contextmanager
    def entered():
        raise RuntimeError("no such device")
        yield

    thread = OneThread("t", "this", 30, entered)
    with pytest.raises(ImplementationError, match=r"this cannot be used .*no such device.*amd-fast doctor"):
        thread.wait(thread.submit(str, str))


def test_the_thread_ends_with_its_owner_and_keeps_no_result() -> None:
    class Result:
        pass

    made: list[weakref.ref[Result]] = []

    def work() -> Result:
        result = Result()
        made.append(weakref.ref(result))
        return result

    before = set(threading.enumerate())
    thread = OneThread("t", "this", 30)
    thread.wait(thread.submit(work, str))
    gc.collect()
    assert made[0]() is None
    del thread
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


def test_a_thread_that_hangs_does_not_keep_the_interpreter() -> None:
    code = "import threading; from amd_fast.data.one_thread import OneThread as T; T('t', 'this', 9).submit(threading.Event().wait, str)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
