"""The measurement: which clips, who returns the right frames, then all contenders in turns, round by round."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import torch

from amd_fast.data.decode import VideoReader
from amd_fast.data.names import VIDEO_SUFFIXES
from amd_fast.errors import DataError

from .. import machine
from .contenders import Contender, Group, libraries, versions
from .work import Clip, Truth, Work

METHOD = (
    "All contenders read all clips in every round, one after the other, starting with another one each time. Wall seconds per round with "
    "'threads' threads, and the processor seconds of the whole process, which a machine that is busy with other things distorts less. "
    "OpenCV and torch are held to one thread within each of ours. 'faults': clips of which other frames came back than a full decode shows."
)


@dataclass
class Result:
    """What one contender did: seconds per round, wall and processor; which clips it got wrong, or why it was not timed."""

    group: Group
    name: str
    peer: bool
    clips: int
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def exact(self) -> bool:
        """Whether all frames were right."""
        return not self.faults and not self.reason

    def rate(self, quantile: Literal["best", "median", "worst"] = "median") -> float:
        """Clips per second: of the best, the median or the worst round."""
        if quantile == "median":
            return self.clips / statistics.median(self.wall)
        return self.clips / (min(self.wall) if quantile == "best" else max(self.wall))


@dataclass
class Report:
    """Everything that was measured."""

    machine: dict[str, Any]
    work: Work
    threads: int
    clips: list[dict[str, Any]]
    results: list[Result]
    stages: dict[str, float]
    missing: list[str]
    advice: list[str] = field(default_factory=list)
    trial: dict[str, float] = field(default_factory=dict)
    folders: dict[str, float] = field(default_factory=dict)

    def ratio(self, group: Group, *, exact: bool, clock: str = "wall") -> tuple[str, float, list[float]] | None:
        """The fastest peer of a group, and how many times longer it takes than ours: in the best rounds, and round by round.

        Args:
            group: the contenders to compare.
            exact: only peers that returned the right frames.
            clock: "wall" or "processor".
        """
        members = [result for result in self.results if result.group == group and result.wall]
        mine = next((result for result in members if not result.peer), None)
        peers = [result for result in members if result.peer and (result.exact or not exact)]
        if mine is None or not peers:
            return None
        peer = min(peers, key=lambda result: min(getattr(result, clock)))
        theirs, own = getattr(peer, clock), getattr(mine, clock)
        return peer.name, min(theirs) / min(own), [a / b for a, b in zip(theirs, own, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        ratios = [
            {"group": group, "clock": clock, "exact_peers_only": exact, "peer": found[0], "best": found[1], "rounds": found[2]}
            for group in dict.fromkeys(result.group for result in self.results)
            for clock in ("wall", "processor")
            for exact in (True, False)
            if (found := self.ratio(group, exact=exact, clock=clock))
        ]
        return {"method": METHOD, **dataclasses.asdict(self), "ratios": ratios}


def find_clips(source: str | os.PathLike[str], work: Work, limit: int) -> tuple[list[Clip], list[dict[str, Any]], list[str]]:
    """The clips to read, evenly chosen, the largest first; what is known about each; and what was left out, with the reason.

    Raises:
        DataError: there is nothing to read.
    """
    paths = _paths(source)
    step = max(len(paths) / limit, 1.0)
    chosen = [paths[int(k * step)] for k in range(min(limit, len(paths)))]
    clips, facts, left_out = [], [], []
    for path in sorted(chosen, key=lambda path: -os.path.getsize(path) if os.path.isfile(path) else 0):
        try:
            with VideoReader(path) as reader:
                info, keyframes = reader.check(), len(reader.table.keyframes)
        except DataError as error:
            left_out.append(str(error))
            continue
        clips.append(Clip(path, info.frames, work.indices(info.frames), info.codec))
        known = {
            "name": clips[-1].name,
            "bytes": os.path.getsize(path),
            "frames_per_keyframe": info.frames / keyframes if keyframes else None,
        }
        facts.append(known | {key: getattr(info, key) for key in ("codec", "width", "height", "frames", "fps")})
    if not clips:
        raise DataError(
            f"{os.fspath(source)!r} holds no video that can be read{': ' + left_out[0] if left_out else ''}; give a manifest or a folder"
        )
    return clips, facts, left_out


def _paths(source: str | os.PathLike[str]) -> list[str]:
    if os.path.isdir(source):
        return sorted(str(path) for path in Path(source).rglob("*") if path.name.lower().endswith(VIDEO_SUFFIXES))
    from amd_fast.data import Manifest

    manifest = Manifest.from_csv(source)
    return list(dict.fromkeys(str(manifest.file(row)) for row in range(len(manifest))))


@contextmanager
def single_threaded() -> Iterator[None]:
    """OpenCV and torch use no threads of their own."""
    before = cv2.getNumThreads(), torch.get_num_threads()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before[0])
        torch.set_num_threads(before[1])


def measure(
    contenders: Sequence[Contender],
    clips: Sequence[Clip],
    work: Work,
    *,
    threads: int,
    rounds: int,
    progress: Callable[[str], object] = print,
) -> list[Result]:
    """Checks every contender on every clip, then times those that can read them all, in turns."""
    results = {contender: Result(contender.group, contender.name, contender.peer, len(clips)) for contender in contenders}
    with single_threaded(), ThreadPoolExecutor(threads, thread_name_prefix="bench") as pool:
        for clip in clips:
            truth = Truth(clip, work)
            for contender in contenders:
                _check(contender, clip, truth, results[contender])
        running = [contender for contender in contenders if not results[contender].reason]
        for number in range(rounds):
            start = number % max(len(running), 1)
            for contender in running[start:] + running[:start]:
                gc.collect()
                wall, processor = time.perf_counter(), time.process_time()
                _read_all(contender, clips, pool)
                results[contender].wall.append(time.perf_counter() - wall)
                results[contender].processor.append(time.process_time() - processor)
            progress(f"round {number + 1} of {rounds}")
    return list(results.values())


def _read_all(contender: Contender, clips: Sequence[Clip], pool: ThreadPoolExecutor) -> None:
    if contender.load is not None:
        contender.load(clips)
    else:
        for _ in pool.map(contender.read, clips):  # each result is dropped as soon as it is there
            pass


def _check(contender: Contender, clip: Clip, truth: Truth, result: Result) -> None:
    """Notes what is wrong with what a contender returns; a peer's failure is a line of the report, ours is raised."""
    if result.reason:
        return
    try:
        (read,) = contender.load([clip]) if contender.load is not None else [contender.read(clip)]
    except Exception as error:
        if not contender.peer:
            raise
        result.reason = f"{clip.name}: {type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
        return
    if (fault := truth.fault(read["rgb"].cpu())) is not None:
        result.faults[clip.name] = fault


def stages(clips: Sequence[Clip], work: Work, rounds: int) -> dict[str, float]:
    """Shares of our own time, in one thread: opening and demultiplexing, decoding, colours and size, cut and normalisation."""
    from amd_fast.data.clips import ClipTransform, RawClip

    names = ("open", "decode", "convert and resize", "cut and normalise")
    transform = ClipTransform(work.size, ("rgb",), train=False)
    total = dict.fromkeys(names, 0.0)
    with single_threaded():
        for clip in clips:
            taken = []
            for _ in range(rounds):
                clock = [time.thread_time()]
                with VideoReader(clip.path) as reader:
                    clock.append(time.thread_time())
                    frames = reader.frames(clip.indices)
                    clock.append(time.thread_time())
                    pixels = reader.pixels(frames, short_side=work.short_side)
                    clock.append(time.thread_time())
                transform(RawClip(rgb=pixels))
                clock.append(time.thread_time())
                taken.append([after - before for before, after in itertools.pairwise(clock)])
            for name, seconds in zip(names, min(taken, key=sum), strict=True):
                total[name] += seconds
    return {name: seconds / sum(total.values()) for name, seconds in total.items()}


def facts(contenders: Sequence[Contender]) -> dict[str, Any]:
    """The machine, and the versions of what was measured."""
    return machine.describe(torch.device("cpu")) | {"versions": versions(contenders), "ffmpeg of PyAV": libraries()}
