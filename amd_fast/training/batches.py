"""Training batches: episode ``step * per_step + e`` of the pure episode function, its clips decoded ahead of the network."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amd_fast.data.episodes import EpisodeSampler
from amd_fast.data.loader import ClipLoader
from amd_fast.data.manifest import Manifest
from amd_fast.training.config import EpisodeOptions

_AHEAD = 2


@dataclass
class TrainBatch:
    """E episodes: support clips first, then queries.

    Attributes:
        step: 0-based optimisation step.
        clips: ``{modality: [E * (S + Q), T, channels, h, w]}``, episode by episode.
        present: ``[E * (S + Q), M]`` bool.
        support_label, query_label: ``[E, S]``, ``[E, Q]`` int64, class within the episode.
        base_class: ``[E * (S + Q)]`` int64, class among all training classes.
        episodes: the episodes' numbers.
    """

    step: int
    clips: dict[str, Tensor]
    present: Tensor
    support_label: Tensor
    query_label: Tensor
    base_class: Tensor
    episodes: range


class EpisodeBatches:
    """Batches by step number: the same step gives the same batch, in whatever order it is asked for.

    Args:
        manifest: training clips.
        loader: reads them.
        options: shape and number of episodes per step.
        seed: of episodes and augmentation.
    """

    def __init__(self, manifest: Manifest, loader: ClipLoader, options: EpisodeOptions, seed: int) -> None:
        self.loader, self.options, self.seed = loader, options, seed
        self.classes, self._code = np.unique(manifest.labels, return_inverse=True)
        self.sampler = EpisodeSampler(
            manifest.labels, ways=options.ways, shots=options.shots, queries=options.queries, seed=seed, groups=manifest.groups
        )

    def batch(self, step: int) -> TrainBatch:
        """The batch of one step."""
        options = self.options
        support, query = self.sampler.batch(step * options.per_step, options.per_step)
        positions = np.concatenate([support, query], 1)
        loaded = self.loader.load(positions.reshape(-1), (self.seed, step))
        classes = torch.arange(options.ways)
        return TrainBatch(
            step,
            loaded.clips,
            loaded.present,
            classes.repeat_interleave(options.shots).expand(options.per_step, -1),
            classes.repeat_interleave(options.queries).expand(options.per_step, -1),
            torch.from_numpy(self._code[positions.reshape(-1)]),
            range(step * options.per_step, (step + 1) * options.per_step),
        )

    def stream(self, start: int, stop: int) -> Iterator[TrainBatch]:
        """Batches of the steps ``start..stop - 1`` in order, read ahead in a thread; at most ``2 + 1`` batches are in memory."""
        ready: queue.Queue[TrainBatch | BaseException] = queue.Queue(_AHEAD)
        stopped = threading.Event()

        def put(item: TrainBatch | BaseException) -> None:
            while not stopped.is_set():
                with suppress(queue.Full):
                    ready.put(item, timeout=0.2)
                    return

        def produce() -> None:
            try:
                for step in range(start, stop):
                    if stopped.is_set():
                        return
                    put(self.batch(step))
            except BaseException as error:  # whatever goes wrong in the thread is raised where the batch is waited for
                put(error)

        thread = threading.Thread(target=produce, name="batches", daemon=True)
        thread.start()
        try:
            for _ in range(start, stop):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()
