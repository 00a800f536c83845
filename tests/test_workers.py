"""Workers: results, failures, time limits and crashes, in threads and in processes."""

from __future__ import annotations

import ctypes
import gc
import operator
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from amd_fast.data import workers as module
from amd_fast.data.child import Child, Failure
from amd_fast.data.workers import CancelledError, Workers
from amd_fast.errors import ConfigError, DataError
from amd_fast.resources import available_cores


def collect(workers: Workers[Any, Any], jobs: list[Any], **options: Any) -> tuple[dict[int, Any], dict[int, Failure]]:
    results: dict[int, Any] = {}
    failures = workers.run(jobs, results.__setitem__, **options)
    return results, failures


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_every_job_is_done_once_and_arrays_come_back_whole(kind: Any) -> None:
    workers: Workers[Any, Any] = Workers(np.arange, 2, kind=kind, slot=1 << 12)
    sizes = [0, 1, 100, 5000, 100_000, 7]  # from nothing to far more than the shared memory holds
    results, failures = collect(workers, sizes)
    assert not failures and sorted(results) == list(range(len(sizes)))
    for number, size in enumerate(sizes):
        assert np.array_equal(results[number], np.arange(size)) and results[number].flags.writeable
    assert len(workers.processes()) == (2 if kind == "process" else 0)
    workers.close()


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_an_exception_reaches_the_caller(kind: Any) -> None:
    workers: Workers[Any, Any] = Workers(operator.neg, 1, kind=kind)
    with pytest.raises(TypeError, match="bad operand"):
        collect(workers, [1, "text"])
    assert collect(workers, [1, 2]) == ({0: -1, 1: -2}, {})
    workers.close()


def test_what_accept_returns_or_raises_counts() -> None:
    workers: Workers[Any, Any] = Workers(operator.neg, 2)
    assert workers.run([1, 2, 3], lambda number, result: Failure("odd") if result % 2 else None) == {0: Failure("odd"), 2: Failure("odd")}
    with pytest.raises(KeyError):
        workers.run([1], lambda number, result: {}[number])
    workers.close()


def test_a_crashed_process_costs_its_job_alone() -> None:
    workers: Workers[Any, Any] = Workers(ctypes.string_at, 1, kind="process")  # reads memory where it is told to
    results, failures = collect(workers, [0])
    before = workers.processes()
    assert not results and list(failures) == [0] and "SIGSEGV" in failures[0].reason
    with pytest.raises(ctypes.ArgumentError):  # the next process is there, and says that this is no address
        collect(workers, [1.5])
    assert len(workers.processes()) == 1 and workers.processes() != before
    workers.close()


def test_a_process_killed_between_two_jobs_costs_nothing() -> None:
    child = Child(operator.neg, timeout=30, slot=1)
    assert child(1) == -1
    os.kill(child.pid or 0, 9)
    deadline = time.monotonic() + 10
    while child._process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child(2) == -2
    child.stop()
    assert child.pid is None


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_job_that_hangs_fails_and_the_others_are_done(kind: Any) -> None:
    workers: Workers[Any, Any] = Workers(time.sleep, 2, kind=kind, timeout=0.6)
    results, failures = collect(workers, [0, 20, 0, 20, 0, 0])
    assert sorted(results) == [0, 2, 4, 5] and sorted(failures) == [1, 3]
    assert "longer than 0.6 s" in failures[1].reason
    assert collect(workers, [0, 0, 0])[1] == {}  # there are workers again
    workers.close()


def test_threads_given_up_on_are_counted_until_they_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STUCK", 2)
    gate = threading.Event()
    workers: Workers[Any, Any] = Workers(lambda job: gate.wait(30), 2, timeout=0.3)
    assert len(collect(workers, [1, 2])[1]) == 2
    with pytest.raises(DataError, match=r"[34] threads hang.* the first in 1, 2"):
        collect(workers, [3, 4, 5])
    gate.set()
    deadline = time.monotonic() + 10
    while workers._pool.stuck and time.monotonic() < deadline:
        time.sleep(0.01)
    results, failures = collect(workers, [6, 7])
    assert sorted(results) == [0, 1] and not failures
    workers.close()


def test_cancelled_jobs_are_not_begun() -> None:
    begun: list[int] = []
    cancelled, started = threading.Event(), threading.Event()

    def work(job: int) -> int:
        begun.append(job)
        started.set()
        cancelled.wait(10)
        return job

    workers: Workers[Any, Any] = Workers(work, 1, timeout=4)
    threading.Thread(target=lambda: started.wait(10) and cancelled.set()).start()
    with pytest.raises(CancelledError):
        collect(workers, [1, 2, 3], cancelled=cancelled)
    assert collect(workers, [4])[0] == {0: 4} and begun == [1, 4]
    workers.close()


def test_threads_end_with_the_workers() -> None:
    def forgotten() -> tuple[weakref.ref[Any], int]:
        workers: Workers[Any, Any] = Workers(operator.neg, 3)
        collect(workers, list(range(10)))
        return weakref.ref(workers), workers._pool.threads

    before = set(threading.enumerate())
    reference, threads = forgotten()
    gc.collect()
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reference() is None and threads == 3 and not set(threading.enumerate()) - before


def test_a_result_is_forgotten_once_it_is_accepted() -> None:
    made: list[weakref.ref[np.ndarray]] = []

    def work(size: int) -> np.ndarray:
        array = np.zeros(size)
        made.append(weakref.ref(array))
        return array

    workers: Workers[Any, Any] = Workers(work, 2)
    ignore: Callable[[int, Any], None] = lambda number, result: None  # noqa: E731
    workers.run([10] * 50, ignore)
    deadline = time.monotonic() + 5
    while any(reference() is not None for reference in made) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(made) == 50 and all(reference() is None for reference in made)
    workers.close()


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="count=0"):
        Workers(operator.neg, 0)
    with pytest.raises(ConfigError, match="'fibre'"):
        Workers(operator.neg, 1, kind="fibre")  # type: ignore[arg-type]
    assert Workers(operator.neg, 1).run([], lambda number, result: None) == {}


def test_cores_are_shared_out_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = available_cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * alone))
    assert alone >= 1 and available_cores() == 1
