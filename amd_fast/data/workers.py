"""Jobs done in a bounded time by threads, each with a process of its own where a crash must not end the run."""

from __future__ import annotations

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from amd_fast.data.child import Child, Failure, Raised
from amd_fast.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

WorkerKind = Literal["thread", "process"]
Job = TypeVar("Job")
Result = TypeVar("Result")

_STUCK = 16  # threads given up on and still not back; beyond that the storage does not answer at all
_LOOK = 0.5  # seconds between looks for overdue and cancelled jobs, at most
_GRACE = 150.0  # seconds: a thread with a process is given up on only long after that process should have been ended


class CancelledError(Exception):
    """The jobs are not wanted any more."""


@dataclass
class _Group:
    """The jobs of one call."""

    left: int
    cancelled: threading.Event
    done: threading.Event = field(default_factory=threading.Event)
    given_up: bool = False
    failures: dict[int, Failure] = field(default_factory=dict)
    error: BaseException | None = None


@dataclass
class _Task:
    group: _Group
    number: int
    job: Any
    accept: Callable[[int, Any], Failure | None]


class Workers(Generic[Job, Result]):
    """A fixed number of threads that do jobs of one kind; those of the kind "process" hand them to a process of their own.

    A job that takes longer than the timeout fails. Its process is killed and started anew; its thread cannot be killed, so it is
    left behind and replaced by another, up to 16 of them. A process that dies (a decoder's crash) fails its job and is replaced.

    Args:
        work: does a job; returns its result or a :class:`Failure`. Pickled where the kind is "process".
        count: number of threads.
        kind: "thread" or "process".
        timeout: seconds a job may take once it has begun.
        slot: bytes of shared memory per process; larger results go through a pipe, which is slower.
        here: tells jobs that are done in the thread, whatever the kind.
    """

    def __init__(
        self,
        work: Callable[[Job], Result | Failure],
        count: int,
        *,
        kind: WorkerKind = "thread",
        timeout: float = 60.0,
        slot: int = 1 << 20,
        here: Callable[[Job], bool] | None = None,
    ) -> None:
        if count < 1 or timeout <= 0:
            raise ConfigError(f"workers need a count of at least 1 and a timeout above 0 seconds, got {count=}, {timeout=}")
        if kind not in ("thread", "process"):
            raise ConfigError(f"unknown kind of workers {kind!r}; choose 'thread' or 'process'")
        self._pool = _Pool(work, kind, timeout, slot, here)
        self._finish = weakref.finalize(self, _Pool.stop, self._pool)  # the threads know the pool alone, so this object can go
        for _ in range(count):
            self._pool.start_thread()

    def run(
        self,
        jobs: Sequence[Job],
        accept: Callable[[int, Result], Failure | None],
        *,
        cancelled: threading.Event | None = None,
    ) -> dict[int, Failure]:
        """Does the jobs and waits for them.

        Args:
            jobs: what to do.
            accept: called in a worker's thread with the number of a job and its result, which is then forgotten. What it returns
                counts as the job's failure.
            cancelled: set by whoever does not want the jobs any more.

        Returns:
            The failures by number of the job.

        Raises:
            CancelledError: ``cancelled`` was set.
            DataError: too many threads are stuck, or processes cannot be started.
            Exception: whatever ``work`` or ``accept`` raised.
        """
        if not jobs:
            return {}
        group = _Group(len(jobs), cancelled or threading.Event())
        for number, job in enumerate(jobs):
            self._pool.tasks.put(_Task(group, number, job, accept))
        try:
            while not group.done.wait(min(_LOOK, self._pool.timeout / 4)):
                self._pool.give_up_overdue()
                if group.cancelled.is_set():
                    raise CancelledError
        finally:
            group.given_up = True
        if group.error is not None:
            raise group.error
        return group.failures

    def processes(self) -> list[int]:
        """Process ids of the workers that have a process."""
        return [child.pid for child in self._pool.children.values() if child.pid is not None]

    def close(self) -> None:
        """Ends the threads and processes once they have finished what they are at."""
        self._finish()


class _Pool:
    """What the threads share."""

    def __init__(self, work: Callable[[Any], Any], kind: str, timeout: float, slot: int, here: Callable[[Any], bool] | None) -> None:
        self.work, self.kind, self.timeout, self.slot, self.here = work, kind, timeout, slot, here
        self.tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.running: dict[int, tuple[_Task, float]] = {}
        self.stuck: dict[int, _Task] = {}
        self.children: dict[int, Child] = {}
        self.threads = 0

    def start_thread(self) -> None:
        self.threads += 1
        # A daemon: a thread that hangs in a read must not keep the interpreter from ending.
        threading.Thread(target=self._serve, name=f"clips-{self.threads}", daemon=True).start()

    def stop(self) -> None:
        for _ in range(self.threads):
            self.tasks.put(None)

    def _serve(self) -> None:
        me = threading.get_ident()
        perform = self.work
        if self.kind == "process":
            child = self.children[me] = Child(self.work, self.timeout, self.slot)
            here = self.here
            perform = lambda job: self.work(job) if here is not None and here(job) else child(job)  # noqa: E731
        try:
            while (task := self.tasks.get()) is not None:
                if task.group.given_up or task.group.cancelled.is_set():
                    continue
                with self.lock:
                    self.running[me] = task, time.monotonic()
                outcome = _outcome(perform, task.job)
                with self.lock:
                    if self.running.pop(me, None) is None:  # given up on: another thread has taken this one's place
                        self.stuck.pop(me, None)
                        return
                self._deliver(task, outcome)
                del task, outcome  # or the last clip would stay in memory while the thread waits for another
        finally:
            if self.children.get(me) is not None:
                self.children.pop(me).stop()

    def _deliver(self, task: _Task, outcome: Any) -> None:
        if not isinstance(outcome, (Failure, Raised)):
            outcome = _outcome(lambda result: task.accept(task.number, result), outcome)
        group = task.group
        with self.lock:
            if isinstance(outcome, Failure):
                group.failures[task.number] = outcome
            elif isinstance(outcome, Raised):
                group.error = group.error or outcome.error
            group.left -= 1
            if not group.left or group.error is not None:
                group.done.set()

    def give_up_overdue(self) -> None:
        """Fails the jobs that take too long, and puts other threads in the place of theirs.

        Raises:
            DataError: too many threads are stuck.
        """
        limit = self.timeout + (_GRACE if self.kind == "process" else 0.0)
        now = time.monotonic()
        with self.lock:
            overdue = [(me, task) for me, (task, started) in self.running.items() if now - started > limit]
            for me, task in overdue:
                del self.running[me]
                self.stuck[me] = task
            stuck = [str(task.job) for task in self.stuck.values()]
        for _, task in overdue:
            self._deliver(task, Failure(f"it took longer than {self.timeout:g} s (slow or dead storage)"))
            self.start_thread()
        if len(stuck) > _STUCK:
            raise DataError(
                f"{len(stuck)} threads hang in reading clips, the first in {', '.join(stuck[:3])}; "
                "check that the storage answers, or set data.worker_kind=process, whose workers can be ended"
            )


def _outcome(perform: Callable[[Any], Any], job: Any) -> Any:
    try:
        return perform(job)
    except Exception as error:  # whatever goes wrong in the thread is raised where the jobs are waited for
        return Raised(error)
