"""Training batches from a feature bank: tokens in place of clips, for training with frozen backbones."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch

from amd_fast.data.episodes import EpisodeSampler
from amd_fast.data.manifest import Manifest
from amd_fast.errors import ConfigError
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.models.afmir import AFMIR
from amd_fast.training.batches import Share, TrainBatch
from amd_fast.training.config import DataOptions, EpisodeOptions
from amd_fast.training.objective import LOG_WEIGHT, TOKENS


class NothingToRead:
    """Stands where a loader of clips would: nothing is decoded, so nothing can be lost."""

    def __init__(self) -> None:
        self.lost: dict[int, str] = {}

    def fill_cache(self, *, progress: bool = True) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class TokenBatches:
    """Episodes of a bank by step number: the same episodes as :class:`~amd_fast.training.batches.EpisodeBatches` makes of its clips.

    Args:
        bank: the clips trained on.
        options: shape of the episodes; ``per_step`` is their number over all processes together.
        seed: of the episodes.
        rank, world_size: number of this process, and of all.
        replay: show the first so many batches over and over; 0: off.

    Raises:
        ConfigError: ``per_step`` is not a multiple of ``world_size``.
        EpisodeError: the clips allow no such episodes.
    """

    def __init__(
        self, bank: FeatureBank, options: EpisodeOptions, seed: int, *, rank: int = 0, world_size: int = 1, replay: int = 0
    ) -> None:
        self.bank, self.share, self.replay = bank, Share(options, rank, world_size), replay
        self.loader = NothingToRead()
        self.classes, self._code = np.unique(bank.labels, return_inverse=True)
        self.sampler = EpisodeSampler(
            bank.labels, ways=options.ways, shots=options.shots, queries=options.queries, seed=seed, groups=bank.groups
        )

    def batch(self, step: int) -> TrainBatch:
        """This process's part of the batch of one step; ``clips`` holds tokens and log-weights."""
        episodes = self.share.episodes(step % self.replay if self.replay else step)
        drawn = [self.sampler(episode) for episode in episodes]
        rows = np.concatenate([np.concatenate([episode.support, episode.query]) for episode in drawn])
        tokens, log_weight = torch.tensor(self.bank.tokens[rows]).float(), torch.tensor(self.bank.log_weight[rows])
        return TrainBatch(
            step,
            {TOKENS: tokens, LOG_WEIGHT: log_weight},
            torch.isfinite(log_weight).any(-1),
            *self.share.labels(),
            torch.from_numpy(self._code[rows]),
            episodes,
            rows,
        )

    def stream(self, start: int, stop: int) -> Generator[TrainBatch]:
        """Batches of the steps ``start..stop - 1`` in order."""
        yield from map(self.batch, range(start, stop))


def open_bank(options: DataOptions) -> tuple[FeatureBank, FeatureBank | None]:
    """The clips to train on and those of the validation classes, from the bank that the settings name.

    Raises:
        DataError: no bank, or one made from another manifest than ``data.manifest``, where that is set.
        ConfigError: no clips in the training split.
    """
    bank = FeatureBank.open(options.bank)
    if options.manifest:
        bank.check(manifest=Manifest.from_csv(options.manifest, group=options.group or None))
    split = bank.table["split"].to_numpy(str)
    train = split == options.train_split if options.train_split else np.ones(len(bank), dtype=bool)
    validation = split == options.val_split if options.val_split else np.zeros(len(bank), dtype=bool)
    if not train.any():
        raise ConfigError(f"the feature bank {options.bank} has no clips in the split {options.train_split!r}; set data.train_split")
    return bank.subset(train), bank.subset(validation) if validation.any() else None


def freeze_encoder(model: AFMIR, bank: FeatureBank) -> None:
    """Holds backbones and projections fixed, after checking that they are those that made the bank.

    Raises:
        DataError: the bank was made by other weights, or at another size or number of frames.
    """
    bank.check(model)
    for part in (model.backbones, model.projections):
        part.requires_grad_(requires_grad=False)


def without_key(bank: FeatureBank) -> FeatureBank:
    """A bank whose model has been checked and no longer changes: hashing it anew at every validation would tell nothing."""
    return replace(bank, meta={name: value for name, value in bank.meta.items() if name != "key"})
