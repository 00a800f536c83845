"""The loader's jobs done by DALI: the workers open and cut the files, DALI decodes them, and what it refuses is remembered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from amd_fast.data.child import Failure
from amd_fast.data.cutting import CutJob, Cutting, Draw, Refused
from amd_fast.data.dali import DaliDecoder
from amd_fast.data.losses import Refusals
from amd_fast.data.reading import ClipReading, ReadJob, views_of_a_test
from amd_fast.data.workers import Workers
from amd_fast.errors import ImplementationError


@dataclass(frozen=True)
class ReadingOrCutting:
    """What workers do who serve both decoders: the whole of a :class:`ReadJob` with PyAV, and the beginning of it for DALI."""

    reading: ClipReading
    cutting: Cutting

    def __call__(self, job: ReadJob | CutJob) -> Any:
        """Does either kind of job."""
        return self.cutting(job) if isinstance(job, CutJob) else self.reading(job)


class DaliReading:
    """Does :class:`~amd_fast.data.reading.ReadJob` with DALI; from any threads.

    Args:
        reading: what workers do with PyAV; gives modalities, frames, size and augmentation.
        decoder: DALI.
        workers: do :class:`ReadingOrCutting`.
    """

    def __init__(self, reading: ClipReading, decoder: DaliDecoder, workers: Workers[Any, Any]) -> None:
        self._reading, self._decoder, self._workers = reading, decoder, workers
        self.refusals = Refusals()
        """The files that DALI does not read."""
        self._broken = False

    def takes(self, job: ReadJob) -> bool:
        """Whether this is a job for DALI: one that wants finished clips of a file that it has not refused."""
        return not self._broken and job.raw is None and bool(job.seeds or job.views) and job.path not in self.refusals

    def run(
        self,
        jobs: Sequence[ReadJob],
        accept: Callable[[int, list[dict[str, Tensor]]], Failure | None],
        *,
        cancelled: threading.Event | None = None,
    ) -> dict[int, Failure | Refused]:
        """Does the jobs; arguments and errors as for :meth:`amd_fast.data.workers.Workers.run`.

        The results are ``{modality: float32 [T, channels, size, size]}`` in the decoder's lane, one per seed or view.

        Returns:
            By number of the job why it failed, to the file's account or to DALI's.

        Raises:
            ImplementationError: DALI does not work any more; it takes no further jobs.
        """
        problems: dict[int, Failure | Refused] = {}
        cuts = [CutJob(job.path, tuple(self._draws(job)), job.frame_count, job.extra) for job in jobs]
        try:
            for number, outcome in self._decoder.read(cuts, self._workers, cancelled):
                problem = accept(number, outcome) if isinstance(outcome, list) else outcome
                if problem is not None:
                    problems[number] = problem
        except ImplementationError:
            self._broken = True
            raise
        self.refusals.add(problem for problem in problems.values() if isinstance(problem, Refused))
        return problems

    def close(self) -> None:
        """Ends DALI's thread and frees its memory."""
        self._decoder.close()
        self.refusals.sum_up()

    def _draws(self, job: ReadJob) -> Iterator[Draw]:
        """One for each clip that is wanted of the file."""
        for seed in job.seeds:
            yield self._reading.augment, np.random.default_rng(seed)
        for view in () if job.seeds else views_of_a_test(self._reading.size, self._reading.modalities, job.views):
            yield view, None
