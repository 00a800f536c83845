"""The loader's jobs done by DALI, as its workers do them with PyAV."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from amd_fast.data.child import Failure
from amd_fast.data.dali import ClipJob, DaliDecoder
from amd_fast.data.reading import ClipReading, ReadJob, views_of_a_test
from amd_fast.data.workers import CancelledError

_AT_ONCE = 32  # files between two looks at whether anybody still wants them


class DaliReading:
    """Does :class:`~amd_fast.data.reading.ReadJob` with DALI; from any thread, one at a time.

    Args:
        reading: what workers would do; gives modalities, frames, size and augmentation.
        device: where the clips are decoded, and stay.
        threads: see :class:`~amd_fast.data.dali.DaliDecoder`.

    Raises:
        ImplementationError: DALI cannot run here.
    """

    def __init__(self, reading: ClipReading, device: torch.device, threads: int) -> None:
        self._reading = reading
        self._decoder = DaliDecoder(reading.modalities, reading.frames, reading.size, device=device, threads=threads)
        self._lock = threading.Lock()

    @staticmethod
    def takes(job: ReadJob) -> bool:
        """Whether this is a job for DALI: one that decodes a file, and wants finished clips of it."""
        return job.raw is None and bool(job.seeds or job.views)

    def run(
        self,
        jobs: Sequence[ReadJob],
        accept: Callable[[int, list[dict[str, Tensor]]], Failure | None],
        *,
        cancelled: threading.Event | None = None,
    ) -> dict[int, Failure]:
        """Does the jobs; arguments, result and errors as for :meth:`amd_fast.data.workers.Workers.run`.

        The results are ``{modality: float32 [T, channels, size, size]}`` on the device, one per seed or view.
        """
        failures: dict[int, Failure] = {}
        for first in range(0, len(jobs), _AT_ONCE):
            if cancelled is not None and cancelled.is_set():
                raise CancelledError
            parts = [list(self._parts(job)) for job in jobs[first : first + _AT_ONCE]]
            with self._lock:
                clips = iter(self._decoder.load([part for of_job in parts for part in of_job]))
            for number, of_job in enumerate(parts, first):
                results = [next(clips) for _ in of_job]
                good = [clip for clip in results if isinstance(clip, dict)]
                errors = [clip for clip in results if not isinstance(clip, dict)]
                failure = Failure(str(errors[0])) if errors else accept(number, good)
                if failure is not None:
                    failures[number] = failure
        return failures

    def close(self) -> None:
        """Ends the threads and frees DALI's memory."""
        self._decoder.close()

    def _parts(self, job: ReadJob) -> Iterator[ClipJob]:
        """One for each clip that is wanted of the file."""
        for seed in job.seeds:
            yield ClipJob(job.path, self._reading.augment, np.random.default_rng(seed), job.frame_count, job.extra)
        for view in () if job.seeds else views_of_a_test(self._reading.size, self._reading.modalities, job.views):
            yield ClipJob(job.path, view, None, job.frame_count, job.extra)
