"""A day of training's reading in minutes: many episodes of tiny clips, watching memory, files and threads of all processes at work.

    python -m benchmarks.soak --episodes 100000 --decoded 10000 --flow

The first ``--decoded`` episodes open and decode files, with faults now and then; the others are made from the clips decoded by then, kept
in memory. Prints a line every twentieth part, and fails where the second half holds more than the first. Linux alone: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pandas as pd
import torch

from amd_fast.data.loader import ClipLoader
from amd_fast.data.manifest import Manifest
from amd_fast.files import write_atomically
from amd_fast.training.batches import EpisodeBatches
from amd_fast.training.config import EpisodeOptions
from benchmarks.machine import describe

_CLASSES, _CLIPS, _FRAMES, _SIDE = 8, 12, 8, 24
_SLACK = 8 * 2**20  # bytes an allocator may take or give back between two looks
_PER_STEP = 10


@dataclass(frozen=True)
class Look:
    """What all processes together held after so many episodes.

    Attributes:
        cache: where the clips came from: "none" (decoded from files) or "ram".
        episodes: since this part began.
        memory: resident bytes; pages that processes share count once for each.
        files, threads: open file descriptors, and threads.
        lost: clips that could not be decoded.
        rate: episodes per second.
    """

    cache: str
    episodes: int
    memory: int
    files: int
    threads: int
    lost: int
    rate: float


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--episodes", type=int, default=100_000)
    parser.add_argument("--decoded", type=int, default=5_000, help="episodes whose clips are decoded from files")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker-kind", choices=("thread", "process"), default="thread")
    parser.add_argument("--flow", action="store_true", help="read optical flow besides")
    parser.add_argument("--output", help="JSON file for what was seen")
    options = parser.parse_args(arguments)
    modalities = ("rgb", "flow") if options.flow else ("rgb",)
    reading = {"frames": 2, "size": 16, "workers": options.workers, "worker_kind": options.worker_kind, "max_lost": 0.2, "timeout": 30.0}
    parts: list[tuple[Literal["none", "ram"], int]] = [("none", options.decoded)]
    if options.episodes - options.decoded >= _PER_STEP:
        parts.append(("ram", options.episodes - options.decoded))
    looks: list[Look] = []
    with tempfile.TemporaryDirectory() as folder:
        manifest = _write_clips(Path(folder))
        for cache, episodes in parts:
            loader = ClipLoader(manifest, modalities, cache=cache, **reading)
            loader.fill_cache(progress=False)
            batches = EpisodeBatches(manifest, loader, EpisodeOptions(ways=3, queries=1, per_step=_PER_STEP), seed=0)
            looks += _watch(batches, episodes, cache)
            loader.close()
    grown = [fault for cache, _ in parts if (fault := _growth([look for look in looks if look.cache == cache]))]
    if options.output:
        facts = {"machine": describe(torch.device("cpu")), "options": vars(options), "grown": grown}
        content = json.dumps(facts | {"looks": [asdict(look) for look in looks]}, indent=1) + "\n"
        write_atomically(Path(options.output), content.encode())
    if grown:
        sys.exit("; ".join(grown))


def _watch(batches: EpisodeBatches, episodes: int, cache: str) -> Iterator[Look]:
    steps = episodes // _PER_STEP
    every = max(steps // 20, 1)
    started = time.monotonic()
    for batch in batches.stream(0, steps):
        done = (batch.step + 1) * _PER_STEP
        if (batch.step + 1) % every == 0:
            look = Look(cache, done, *_held(), lost=len(batches.loader.lost), rate=done / (time.monotonic() - started))
            print(
                f"cache={cache}  {done:>7} episodes  {look.memory / 2**20:7.1f} MiB  {look.files} files  {look.threads} threads  "
                f"{look.lost} lost  {look.rate:.0f} episodes/s",
                flush=True,
            )
            yield look
        if cache == "none" and batch.step in (steps // 4, steps // 2):  # a file goes bad in the middle
            Path(batches.loader.manifest.file(int(batch.positions[0]))).write_bytes(b"not a video")


def _growth(looks: list[Look]) -> str | None:
    """What the second half holds more of than the first, None where it is nothing."""
    if len(looks) < 2:
        return None
    held = np.array([(look.memory, look.files, look.threads) for look in looks])
    first, second = held[: len(held) // 2].max(0), held[len(held) // 2 :].max(0)
    if (second - first <= (_SLACK, 2, 0)).all():
        return None
    return f"cache={looks[0].cache}: grown from {first.tolist()} to {second.tolist()} (bytes, files, threads)"


def _write_clips(folder: Path) -> Manifest:
    rows = []
    for number in range(_CLASSES * _CLIPS):
        path = folder / f"{number:03}.mp4"
        noise = np.random.default_rng(number).integers(0, 255, (_FRAMES, _SIDE, _SIDE, 3), dtype=np.uint8)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=25)
            stream.width = stream.height = _SIDE
            stream.pix_fmt = "yuv420p"
            for picture in noise:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        rows.append({"path": path.name, "label": f"class {number // _CLIPS}", "frames": _FRAMES, "width": _SIDE, "height": _SIDE})
    return Manifest(pd.DataFrame(rows), folder)


def _held() -> tuple[int, int, int]:
    """Resident bytes, open files and threads of this process and of all that descend from it."""
    memory = files = threads = 0
    for process in _family(Path("/proc/self")):
        try:
            counted = int((process / "statm").read_text().split()[1]), len(os.listdir(process / "fd")), len(os.listdir(process / "task"))
        except OSError:  # it ended meanwhile
            continue
        memory, files, threads = memory + counted[0] * os.sysconf("SC_PAGE_SIZE"), files + counted[1], threads + counted[2]
    return memory, files, threads


def _family(process: Path) -> Iterator[Path]:
    yield process
    try:
        children = " ".join((task / "children").read_text() for task in (process / "task").iterdir())
    except OSError:
        return
    for number in children.split():
        yield from _family(Path("/proc") / number)


if __name__ == "__main__":
    main()
