"""A day of training's reading in minutes: many episodes of tiny clips, watching memory, files and threads of this process.

    python -m benchmarks.soak --episodes 100000 --decoded 5000

The first ``--decoded`` episodes open and decode files, with faults now and then; the others are made from the clips decoded by then, kept
in memory. Prints a line every twentieth part, and fails where the second half holds more than the first.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pandas as pd

from amd_fast.data.loader import ClipLoader
from amd_fast.data.manifest import Manifest
from amd_fast.training.batches import EpisodeBatches
from amd_fast.training.config import EpisodeOptions

_CLASSES, _CLIPS, _FRAMES, _SIDE = 8, 12, 8, 24
_SLACK = 8 * 2**20  # bytes an allocator may take or give back between two looks
_PER_STEP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=100_000)
    parser.add_argument("--decoded", type=int, default=5_000, help="episodes whose clips are decoded from files")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker-kind", choices=("thread", "process"), default="thread")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = _write_clips(Path(folder))
        kind = options.worker_kind
        reading = {"frames": 2, "size": 16, "workers": options.workers, "worker_kind": kind, "max_lost": 0.2, "timeout": 30.0}
        parts: tuple[tuple[Literal["none", "ram"], int], ...] = (("none", options.decoded), ("ram", options.episodes - options.decoded))
        for cache, episodes in parts:
            loader = ClipLoader(manifest, ("rgb",), cache=cache, **reading)
            loader.fill_cache(progress=False)
            _watch(EpisodeBatches(manifest, loader, EpisodeOptions(ways=3, queries=1, per_step=_PER_STEP), seed=0), episodes, cache)
            loader.close()


def _watch(batches: EpisodeBatches, episodes: int, cache: str) -> None:
    steps = episodes // _PER_STEP
    every = max(steps // 20, 1)
    looks = []
    started = time.monotonic()
    for batch in batches.stream(0, steps):
        if (batch.step + 1) % every == 0:
            looks.append((_resident(), len(os.listdir("/proc/self/fd")), threading.active_count()))
            rate = (batch.step + 1) * _PER_STEP / (time.monotonic() - started)
            memory, files, threads = looks[-1]
            print(
                f"cache={cache}  {(batch.step + 1) * _PER_STEP:>7} episodes  {memory / 2**20:7.1f} MiB  {files} files  {threads} threads  "
                f"{len(batches.loader.lost)} lost  {rate:.0f} episodes/s",
                flush=True,
            )
        if cache == "none" and batch.step in (steps // 4, steps // 2):  # a file goes bad in the middle
            Path(batches.loader.manifest.file(int(batch.positions[0]))).write_bytes(b"not a video")
    half = len(looks) // 2
    first, second = (np.array(part).max(0) for part in (looks[:half], looks[half:]))
    if second[0] > first[0] + _SLACK or second[1] > first[1] + 2 or second[2] > first[2]:
        raise SystemExit(f"grown from {first.tolist()} to {second.tolist()} (bytes, files, threads)")


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


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
