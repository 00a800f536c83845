"""The measurement: which clips, who returns the right frames, then all contenders in turns, round by round."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import torch
from torch import Tensor

from amd_fast.data.decode import VideoReader
from amd_fast.data.names import VIDEO_SUFFIXES
from amd_fast.errors import DataError
from amd_fast.storage import Lease, is_folder, is_remote, is_unreachable, join, lease, list_below, plain

from .. import machine
from .contenders import Contender, Group, libraries, versions
from .work import Clip, Truth, Work

METHOD = (
    "All contenders read all clips in every round, one after the other, starting with another one each time. Wall seconds per round with "
    "'threads' threads, and the processor seconds of the whole process, which a machine that is busy with other things distorts less. "
    "OpenCV and torch are held to one thread within each of ours. 'faults': clips of which other frames came back than a full decode "
    "shows. 'refused': clips that PyAV read in the place of DALI, within its time. 'ratios': time of another over ours, round by round; "
    "ours is the first that is no peer, which reads as decoder='auto' does."
)
CLOCKS = ("wall", "processor")


@dataclass
class Result:
    """What one contender did: seconds per round, wall and processor; clips it got wrong or refused; or why it was not timed."""

    group: Group
    name: str
    peer: bool
    clips: int
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    setting: str = ""

    @property
    def exact(self) -> bool:
        """Whether all frames were right."""
        return not self.faults and not self.reason

    def rate(self, quantile: Literal["best", "median", "worst"] = "median") -> float:
        """Clips per second: of the best, the median or the worst round."""
        if quantile == "median":
            return self.clips / statistics.median(self.wall)
        return self.clips / (min(self.wall) if quantile == "best" else max(self.wall))


@dataclass(frozen=True)
class Ratio:
    """How many times longer another contender takes than ours, round by round, by one of ``CLOCKS``."""

    group: Group
    clock: str
    ours: str
    other: str
    peer: bool
    exact: bool
    rounds: list[float]

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.rounds)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.rounds):.2f} to {max(self.rounds):.2f})"

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return dataclasses.asdict(self) | {"median": self.median, "lowest": min(self.rounds), "highest": max(self.rounds)}


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

    def ours(self, group: Group) -> Result | None:
        """Ours of a group that others are compared with: the first."""
        return next((result for result in self.results if result.group == group and result.wall and not result.peer), None)

    def ratios(self, group: Group) -> list[Ratio]:
        """All others of a group against ours, by both clocks."""
        mine = self.ours(group)
        others = [result for result in self.results if result.group == group and result.wall and result is not mine]
        return [] if mine is None else [_ratio(mine, other, clock) for other in others for clock in CLOCKS]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        groups = dict.fromkeys(result.group for result in self.results)
        ratios = [ratio.to_json() for group in groups for ratio in self.ratios(group)]
        return {"method": METHOD, **dataclasses.asdict(self), "ratios": ratios}


def _ratio(mine: Result, other: Result, clock: str) -> Ratio:
    rounds = [theirs / own for theirs, own in zip(getattr(other, clock), getattr(mine, clock), strict=True)]
    return Ratio(mine.group, clock, mine.name, other.name, other.peer, other.exact, rounds)


def find_clips(source: str | os.PathLike[str], work: Work, limit: int) -> tuple[list[Clip], list[dict[str, Any]], list[str]]:
    """The clips to read, evenly chosen, the largest first; what is known about each; and what was left out, with the reason.

    Raises:
        DataError: there is nothing to read.
    """
    paths = _paths(source)
    step = max(len(paths) / limit, 1.0)
    found: list[tuple[int, str, Lease]] = []
    left_out: list[str] = []
    for path in (paths[int(k * step)] for k in range(min(limit, len(paths)))):
        try:
            lent = lease(path)
            found.append((_size(path, lent.path), path, lent))
        except DataError as error:
            _leave_out(error, left_out)
    clips, facts = [], []
    for size, path, lent in sorted(found, key=lambda item: -item[0]):
        try:
            with VideoReader(path) as reader:  # whose messages name what the user does
                info, keyframes = reader.check(), len(reader.table.keyframes)
        except DataError as error:
            _leave_out(error, left_out)
            continue
        clips.append(Clip(str(lent.path), info.frames, work.indices(info.frames), info.codec, source=path, lease=lent))
        known = {"name": clips[-1].name, "bytes": size, "frames_per_keyframe": info.frames / keyframes if keyframes else None}
        facts.append(known | {key: getattr(info, key) for key in ("codec", "width", "height", "frames", "fps")})
    if not clips:
        raise DataError(
            f"{os.fspath(source)!r} holds no video that can be read{': ' + left_out[0] if left_out else ''}; give a manifest or a folder"
        )
    return clips, facts, left_out


def _size(path: str, file: Path) -> int:
    """Bytes of a video; 0 for one that is not there, which its reader says better."""
    if file.is_dir():
        raise DataError(f"{path}: it is a folder of frames, and this measures reading videos")
    return file.stat().st_size if file.is_file() else 0


def _leave_out(error: DataError, left_out: list[str]) -> None:
    if is_unreachable(error):  # the others there would fare no better, and each takes its time to say so
        raise error
    left_out.append(str(error))


def _paths(source: str | os.PathLike[str]) -> list[str]:
    if is_folder(source):
        if is_remote(source):
            return [join(source, name) for name in list_below(os.fspath(source)) if name.lower().endswith(VIDEO_SUFFIXES)]
        return sorted(str(path) for path in Path(plain(source)).rglob("*") if path.name.lower().endswith(VIDEO_SUFFIXES))
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
    results = {each: Result(each.group, each.name, each.peer, len(clips), setting=each.setting) for each in contenders}
    with single_threaded(), ThreadPoolExecutor(threads, thread_name_prefix="bench") as pool:
        for clip in clips:
            truth = Truth(clip, work)
            for contender in contenders:
                _check(contender, clip, truth, results[contender])
        for result in results.values():
            if len(result.refused) == len(clips):
                result.reason = f"it refuses all clips, such as {next(iter(result.refused.values()))}"
        for number in range(rounds):
            running = [contender for contender in contenders if not results[contender].reason]
            start = number % max(len(running), 1)
            for contender in running[start:] + running[:start]:
                _time(contender, clips, pool, results[contender])
            progress(f"round {number + 1} of {rounds}")
    return list(results.values())


def _time(contender: Contender, clips: Sequence[Clip], pool: ThreadPoolExecutor, result: Result) -> None:
    """One round of one contender."""
    gc.collect()
    wall, processor = time.perf_counter(), time.process_time()
    try:
        _read_all(contender, clips, pool, result.refused)
    except Exception as error:
        _fail(contender, error, "reading all clips", result)
        return
    result.wall.append(time.perf_counter() - wall)
    result.processor.append(time.process_time() - processor)


def _read_all(contender: Contender, clips: Sequence[Clip], pool: ThreadPoolExecutor, refused: Container[str]) -> None:
    one_by_one = clips
    if contender.load is not None:
        contender.load([clip for clip in clips if clip.place not in refused])
        one_by_one = [clip for clip in clips if clip.place in refused]
    for _ in pool.map(contender.read, one_by_one):  # each result is dropped as soon as it is there
        pass


def _check(contender: Contender, clip: Clip, truth: Truth, result: Result) -> None:
    """Notes what is wrong with what a contender returns, or that it refuses the clip, which is then read in its place."""
    if result.reason:
        return
    try:
        read = _read_one(contender, clip, result)
    except Exception as error:
        _fail(contender, error, clip.name, result)
        return
    if (fault := truth.fault(read["rgb"].cpu())) is not None:
        result.faults[clip.name] = fault


def _read_one(contender: Contender, clip: Clip, result: Result) -> Mapping[str, Tensor]:
    if contender.load is None:
        return contender.read(clip)
    try:
        return contender.load([clip])[0]
    except DataError as error:
        result.refused[clip.place] = str(error)
        return contender.read(clip)


def _fail(contender: Contender, error: Exception, doing: str, result: Result) -> None:
    """A failure of others, or of DALI, which machines can have trouble with of their own, is a line of the report; ours is raised."""
    if not contender.peer and contender.load is None:
        raise error
    result.wall, result.processor = [], []
    result.reason = f"{doing}: {type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"


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


def device_of(contenders: Sequence[Contender]) -> torch.device:
    """The GPU where one of these decodes on it, else the CPU."""
    return machine.default_device() if any(contender.device == "cuda" for contender in contenders) else torch.device("cpu")


def facts(contenders: Sequence[Contender]) -> dict[str, Any]:
    """The machine, and the versions of what was measured."""
    return machine.describe(device_of(contenders)) | {"versions": versions(contenders), "ffmpeg of PyAV": libraries()}
