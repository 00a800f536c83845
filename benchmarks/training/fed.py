"""Training from video files, end to end: eager float32 fed by DataLoader workers, and ours fed by our own loader."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from amd_fast.data.decoders import choose_decoder
from amd_fast.resources import available_cores
from amd_fast.training.batches import TrainBatch

from ..feeding.clips import Video, synthesise
from ..recipe import Recipe
from ..throughput import rate
from . import plain
from .contenders import OURS, PEER, Ours, Peer, Step, configure
from .run import Fed, free

VIDEO = Video("h264", 320, 240, 250)

Opened = tuple[Step, Iterator[TrainBatch], int]
"""A step, its batches, and how many of these are read at once."""


def measure(recipe: Recipe, device: torch.device, *, seconds: float, length: float, progress: Callable[[str], None]) -> list[Fed]:
    """Clips per second of both, on the same videos and cores.

    Args:
        recipe: What is trained.
        device: Where.
        seconds: Least time to count each for.
        length: Of a video, seconds.
        progress: Is told what is being done.
    """
    with tempfile.TemporaryDirectory() as folder:
        progress(f"encoding {VIDEO.name}")
        manifest = synthesise(VIDEO, Path(folder) / "videos", recipe, length)
        decoder = choose_decoder(VIDEO.codec, "auto", device).decoder
        rows = [(Fed(PEER, plain.READS), _peer), (Fed(OURS, f"ClipLoader, {decoder}"), _ours)]
        for row, opened in rows:
            progress(f"training from files: {row.name}, {row.reads}")
            try:
                with opened(recipe, manifest, device) as (step, batches, at_once):
                    found = rate(batches, clips=recipe.clips, at_once=at_once, seconds=seconds, device=device, use=step)
                row.clips_per_second, row.steps = found.clips_per_second, found.batches
            except torch.OutOfMemoryError:
                row.status, row.reason = "skipped", "out of memory"
            except Exception as error:  # a peer's failure, such as too little shared memory for its workers, is none of ours
                row.status = "skipped" if row.name == PEER else "failed"
                row.reason = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
            free(device)
    peer = rows[0][0].clips_per_second
    for row, _ in rows:
        row.ratio = row.clips_per_second / peer if row.clips_per_second and peer else None
    return [row for row, _ in rows]


@contextmanager
def _peer(recipe: Recipe, manifest: Path, device: torch.device) -> Iterator[Opened]:
    workers = available_cores()
    peer = Peer(configure(recipe, manifest, device, impl="reference"), device)
    with closing(plain.batches(manifest, recipe, workers, device)) as batches:
        yield peer, batches, workers


@contextmanager
def _ours(recipe: Recipe, manifest: Path, device: torch.device) -> Iterator[Opened]:
    config = recipe.config(manifest, manifest.parent / "run", device=str(device))
    with closing(Ours(config)) as ours, closing(ours.trainer.data.batches.stream(0, sys.maxsize)) as batches:
        yield ours, batches, config.data.prefetch
