"""Training batches: a pure function of seed and step, read ahead of the network.

Slot k of step s is episode ``s * per_step + k``. Of ``world_size`` processes, number r takes the slots r, r + world_size, ...; what is
in a batch depends on seed and step alone, and on which clips are lost: not on the number of processes, on workers and their
kind, or on the step that training started at.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from amd_fast.data.draws import mix
from amd_fast.data.episodes import EpisodeSampler
from amd_fast.data.loader import BatchBuilder, ClipLoader
from amd_fast.data.manifest import Manifest
from amd_fast.data.substitutes import Substitutes
from amd_fast.errors import ConfigError, DataError
from amd_fast.training.config import EpisodeOptions

logger = logging.getLogger(__name__)

_REDRAWS = 64  # episodes tried in place of one whose classes have lost too many clips
_FAR = 1 << 40  # such episodes have numbers that no training reaches


@dataclass
class TrainBatch:
    """E episodes (those of one process): support clips first, then queries.

    Attributes:
        step: 0-based optimisation step.
        clips: ``{modality: [E * (S + Q), T, channels, h, w]}``, episode by episode.
        present: ``[E * (S + Q), M]`` bool.
        support_label, query_label: ``[E, S]``, ``[E, Q]`` int64, class within the episode.
        base_class: ``[E * (S + Q)]`` int64, class among all training classes.
        episodes: the episodes' numbers.
        positions: ``[E * (S + Q)]`` int64, the manifest rows that the clips come from.
    """

    step: int
    clips: dict[str, Tensor]
    present: Tensor
    support_label: Tensor
    query_label: Tensor
    base_class: Tensor
    episodes: range
    positions: np.ndarray


@dataclass(frozen=True)
class Share:
    """This process's episodes of every step.

    Raises:
        ConfigError: ``per_step`` is not a multiple of ``world_size``.
    """

    options: EpisodeOptions
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.options.per_step % self.world_size or not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"episode.per_step={self.options.per_step} episodes cannot be shared out evenly to world_size={self.world_size} processes "
                f"(this is number {self.rank}); make per_step a multiple of the number of processes"
            )

    def episodes(self, step: int) -> range:
        """Their numbers in one step."""
        per_step = self.options.per_step
        return range(step * per_step + self.rank, (step + 1) * per_step, self.world_size)

    def labels(self) -> tuple[Tensor, Tensor]:
        """``[E, S]`` and ``[E, Q]`` int64: the classes within their episode, the same in every step."""
        options, classes, count = self.options, torch.arange(self.options.ways), len(self.episodes(0))
        support, query = classes.repeat_interleave(options.shots), classes.repeat_interleave(options.queries)
        return support.expand(count, -1), query.expand(count, -1)


class EpisodeBatches:
    """Batches by step number: the same step gives the same batch, in whatever order it is asked for.

    Memory: ``(prefetch + 2) x E x (S + Q) x T x size^2 x channels x 4`` bytes at most (E episodes of this process, S + Q clips in
    each, channels of all modalities together: 5 for rgb and flow): ``prefetch`` batches in work or ready, one in use, one being
    handed over; besides what the loader itself needs (see :class:`~amd_fast.data.loader.ClipLoader`). A replay keeps its batches.

    Args:
        manifest: training clips.
        loader: reads them.
        options: shape of the episodes; ``per_step`` is their number over all processes together.
        seed: of episodes and augmentation. The randomness of a clip comes from seed, episode and place in the episode alone.
        rank, world_size: number of this process, and of all.
        prefetch: batches read ahead.
        replay: feed the first so many batches over and over, from memory; 0: off.
        pinned: put the clips into page-locked memory, from which they are copied to a GPU while it computes.

    Raises:
        ConfigError: ``per_step`` is not a multiple of ``world_size``, or a number is out of range.
        EpisodeError: the clips allow no such episodes.
    """

    def __init__(
        self,
        manifest: Manifest,
        loader: ClipLoader,
        options: EpisodeOptions,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
        replay: int = 0,
        pinned: bool = False,
    ) -> None:
        self.share = Share(options, rank, world_size)
        if prefetch < 1 or replay < 0:
            raise ConfigError(f"data.prefetch must be at least 1 and data.replay at least 0, got {prefetch} and {replay}")
        self.loader, self.options, self.seed = loader, options, seed
        self.prefetch, self.replay, self.pinned = prefetch, replay, pinned
        self.classes, self._code = np.unique(manifest.labels, return_inverse=True)
        self.sampler = EpisodeSampler(
            manifest.labels, ways=options.ways, shots=options.shots, queries=options.queries, seed=seed, groups=manifest.groups
        )
        self._substitutes = Substitutes(manifest.labels, manifest.groups)
        self._readable: set[int] = set()
        self._stored: dict[int, TrainBatch] = {}
        self._reader = threading.local()  # tells the threads of a stream when nobody wants their batches any more

    def batch(self, step: int) -> TrainBatch:
        """This process's part of the batch of one step. In a replay, step s shows the clips of step ``s % replay``.

        Raises:
            DataError: too many clips are lost, or so many of a class that no episode can be made.
        """
        if not self.replay:
            return self._read(step)
        number = step % self.replay
        if number not in self._stored:
            self._stored[number] = self._read(number)
        return replace(self._stored[number], step=step)

    def stream(self, start: int, stop: int) -> Generator[TrainBatch]:
        """Batches of the steps ``start..stop - 1`` in order, read ahead."""
        if self.replay:
            logger.warning("replay of %d stored batches: speeds are real, losses and accuracies mean nothing", self.replay)
        cancelled = threading.Event()
        readers = ThreadPoolExecutor(self.prefetch, "batches", initializer=lambda: setattr(self._reader, "cancelled", cancelled))
        upcoming = iter(range(start, stop))
        pending: deque[Future[TrainBatch]] = deque()

        def read_ahead() -> None:
            while len(pending) < self.prefetch and (step := next(upcoming, None)) is not None:
                pending.append(readers.submit(self.batch, step))

        try:
            read_ahead()
            while pending:
                batch = pending.popleft().result()
                read_ahead()
                yield batch
                del batch  # or it would be in memory until the next one is ready
        finally:
            cancelled.set()
            readers.shutdown(cancel_futures=True)

    def _read(self, step: int) -> TrainBatch:
        """Reads a batch; composes its episodes anew as long as clips turn out to be lost."""
        options = self.options
        episodes = self.share.episodes(step)
        builder = BatchBuilder(len(episodes) * options.ways * (options.shots + options.queries), self.loader, pinned=self.pinned)
        while True:
            lost = self.loader.lost
            positions = np.concatenate([self._compose(number, lost) for number in episodes])
            todo = np.flatnonzero((builder.positions != positions) & (positions >= 0)).tolist()
            if not todo:
                break
            wanted = {row: (int(positions[row]), self._clip_seed(episodes, row)) for row in todo}
            self.loader.fill(builder, wanted, cancelled=getattr(self._reader, "cancelled", None))
            self._readable.update(builder.positions.tolist())
        loaded = builder.finish()
        return TrainBatch(
            step,
            loaded.clips,
            loaded.present,
            *self.share.labels(),
            torch.from_numpy(self._code[positions]),
            episodes,
            positions,
        )

    def _clip_seed(self, episodes: range, row: int) -> tuple[int, ...]:
        episode, place = divmod(row, self.options.ways * (self.options.shots + self.options.queries))
        return self.seed % 2**64, episodes[episode], place

    def _compose(self, number: int, lost: dict[int, str]) -> np.ndarray:
        """Positions of an episode's clips, support first, without the lost ones; depends on nothing else.

        Where nobody can stand in, another episode is drawn. But a clip that stands in and has not been read yet may be lost as well,
        and others may find a place then: it is read first, and -1 is returned at the places that wait for that.
        """
        for redraw in range(_REDRAWS if lost else 1):
            support, query, _ = self.sampler(number + redraw * _FAR)
            drawn = np.concatenate([support, query])
            found = self._substitutes.compose(drawn, len(support), lost, mix(self.seed + number)) if lost else drawn
            if (found >= 0).all() or not self._readable.issuperset(found[(found >= 0) & (found != drawn)].tolist()):
                return found
        raise DataError(
            f"too many clips are lost to make episode {number}: no clip of its classes is left to stand in, nor could other classes "
            f"be drawn; run 'amd-fast index' again to leave bad files out. Lost: {self.loader.losses}"
        )
