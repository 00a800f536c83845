"""Training from files as the field writes it: DataLoader workers that decode with PyAV, flow by OpenCV, eager float32."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from amd_fast.data.episodes import EpisodeSampler
from amd_fast.data.manifest import Manifest
from amd_fast.training.batches import Share, TrainBatch

from ..data.contenders import farneback, pyav_pictures
from ..data.work import Clip, Work
from ..recipe import Recipe

READS = "DataLoader, PyAV + Farneback"


class PlainClips(Dataset[dict[str, Tensor]]):
    """Clips by number: the frames at the centres of the segments, resized, cut and normalised, and Farneback's flow to the next ones."""

    def __init__(self, manifest: Path, recipe: Recipe) -> None:
        table = Manifest.from_csv(manifest)
        self.work = Work(recipe.frames, recipe.size, round(recipe.size * 8 / 7))
        counts = table.table["frames"].to_numpy(int)
        self.labels = np.unique(table.labels, return_inverse=True)[1]
        self.clips = [Clip(str(table.file(row)), int(count), self.work.indices(int(count))) for row, count in enumerate(counts)]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        clip = self.clips[index]
        pairs = [number for pair in clip.pairs for number in pair]
        pictures = pyav_pictures(clip.path, [*clip.indices, *pairs])
        rgb = self.work.finish([pictures[number] for number in clip.indices])
        flow = self.work.flow([pictures[number] for number in pairs], farneback)
        return {"rgb": rgb, "flow": flow, "label": torch.tensor(self.labels[index])}


class _Episodes:
    """Endless lists of clips, one per step."""

    def __init__(self, manifest: Manifest, recipe: Recipe) -> None:
        self.sampler = EpisodeSampler(
            manifest.labels, ways=recipe.ways, shots=recipe.shots, queries=recipe.queries, seed=0, groups=manifest.groups
        )
        self.per_step = recipe.per_step

    def __iter__(self) -> Iterator[list[int]]:
        step = 0
        while True:
            episodes = [self.sampler(number) for number in range(step * self.per_step, (step + 1) * self.per_step)]
            yield [int(clip) for support, query, _ in episodes for clip in (*support, *query)]
            step += 1


def batches(manifest: Path, recipe: Recipe, workers: int, device: torch.device) -> Generator[TrainBatch]:
    """Batches of a DataLoader, in page-locked memory where they go to a GPU."""
    # A fork would copy what threads of this process hold, a GPU's context among it.
    loader: DataLoader[Any] = DataLoader(
        PlainClips(manifest, recipe),
        batch_sampler=_Episodes(Manifest.from_csv(manifest), recipe),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_alone,
        multiprocessing_context="spawn",
        timeout=120,
    )
    share = Share(recipe.config(manifest, manifest.parent).episode, 0, 1)
    support, query = share.labels()
    present = torch.ones(recipe.clips, 2, dtype=torch.bool)
    positions = np.arange(recipe.clips)
    for step, clips in enumerate(loader):
        yield TrainBatch(step, clips, present, support, query, clips.pop("label"), share.episodes(step), positions)


def _alone(worker: int) -> None:
    cv2.setNumThreads(0)
