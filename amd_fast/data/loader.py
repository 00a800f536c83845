"""Clips of a manifest by position: decoded ahead in threads or processes, optionally kept in memory, never stopped by one bad file."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from amd_fast.data.child import Failure
from amd_fast.data.clips import RESIZE_RATIO, ClipTransform, RawClip
from amd_fast.data.decoders import DecoderName, choose_decoder
from amd_fast.data.lane import Lane
from amd_fast.data.losses import Losses
from amd_fast.data.manifest import Manifest
from amd_fast.data.reading import ClipReading, ReadJob, Seed, views_of_a_test
from amd_fast.data.workers import WorkerKind, Workers
from amd_fast.errors import ConfigError, ImplementationError
from amd_fast.progress import track
from amd_fast.resources import available_cores, free_memory, local_processes

if TYPE_CHECKING:
    from amd_fast.data.cutting import CutJob, Refused
    from amd_fast.data.dali import DaliDecoder
    from amd_fast.data.dali_reading import DaliReading

logger = logging.getLogger(__name__)

_RAW_BYTES = 7  # per pixel of a decoded frame: 3 of colour, 4 of flow


@dataclass
class ClipBatch:
    """Clips ready for the network.

    Attributes:
        clips: ``{modality: float32 [n, T, channels, size, size]}``; zeros where a clip lacks the modality.
        present: bool ``[n, M]``.
        positions: int64 ``[n]``, the manifest row each clip really came from.
    """

    clips: dict[str, Tensor]
    present: Tensor
    positions: np.ndarray


def further_modalities(modalities: Sequence[str], manifest: Manifest | None = None) -> list[str]:
    """The modalities that do not come from the video itself; with a manifest, those it has a column for, precomputed flow included."""
    if manifest is None:
        return [name for name in modalities if name not in ("rgb", "flow")]
    return [name for name in modalities if name != "rgb" and name in manifest.table]


class BatchBuilder:
    """A batch that is filled row by row, from any thread; a row can be filled again. It lies on the loader's device.

    Args:
        rows: number of clips n.
        loader: tells modalities, frames, size and channels.
        pinned: take page-locked memory, from which a GPU copies while it computes; for batches on the CPU.
    """

    def __init__(self, rows: int, loader: ClipLoader, *, pinned: bool = False) -> None:
        self._rows, self._loader, self._pinned = rows, loader, pinned and loader.device.type == "cpu"
        self._lock = threading.Lock()
        self._tensors: dict[str, Tensor] = {}
        self._arrays: dict[str, np.ndarray] = {}  # the same memory, on the CPU
        self._present = np.zeros((rows, len(loader.modalities)), dtype=bool)
        self.positions = np.full(rows, -1, dtype=np.int64)
        """Manifest row of the clip each row holds, -1 where it holds none."""

    def put(self, row: int, position: int, clip: Mapping[str, np.ndarray | Tensor]) -> Failure | None:
        """Fills a row; a clip whose shape is not that of the others is refused."""
        with self._loader.lane.entered():
            for name, array in clip.items():
                expected = self._tensor(name, array.shape).shape[1:]
                if array.shape != expected:
                    return Failure(
                        f"its {name} is {list(array.shape)} where other clips have {list(expected)}; leave it out, or convert it"
                    )
            for name, array in clip.items():
                if name in self._arrays:
                    self._arrays[name][row] = array  # by numpy: torch would start a team of threads in each worker
                else:
                    self._tensors[name][row] = torch.as_tensor(array)
        self._present[row] = [name in clip for name in self._loader.modalities]
        self.positions[row] = position
        return None

    def finish(self) -> ClipBatch:
        """The batch, for the thread's current stream. A modality that no clip has gets the channels the loader was told."""
        loader = self._loader
        with loader.lane.entered():
            for place, name in enumerate(loader.modalities):
                tensor = self._tensor(name, (loader.frames, loader.channels.get(name, 1), loader.size, loader.size))
                tensor[torch.from_numpy(~self._present[:, place])] = 0
        loader.lane.hand_over(self._tensors.values())
        clips = {name: self._tensors[name] for name in loader.modalities}
        return ClipBatch(clips, torch.from_numpy(self._present), self.positions)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        with self._lock:
            if name not in self._tensors:
                tensor = torch.empty(self._rows, *shape, pin_memory=self._pinned, device=self._loader.device)
                if tensor.device.type == "cpu":
                    self._arrays[name] = tensor.numpy()
                self._tensors[name] = tensor
            return self._tensors[name]


class ClipLoader:
    """Reads clips of a manifest.

    Nothing waits without a bound: a clip that takes longer than ``timeout`` is lost, like one that cannot be decoded or whose
    decoder crashes its process. Lost clips are logged by name and listed in :attr:`lost`.

    Memory: besides the batches that others hold and the cache, at most one clip per worker is in the works, that is
    ``workers x T x (7 x width x height + 4 x size^2 x channels)`` bytes (frames resized to a shorter side of 8/7 of ``size``;
    7 = 3 bytes of colour and 4 of flow; channels of all modalities together), times the places of the batch that want the same
    clip, plus the compressed file. A process has its own interpreter and libraries besides, and shared memory for one result.
    What DALI takes besides is said by :class:`~amd_fast.data.dali.DaliDecoder`.

    Args:
        manifest: the clips.
        modalities: names in order; other than rgb and flow they are manifest columns with ``.npy`` paths. A column
            "flow" holds folders of precomputed flow, see ``flow_folder``; clips without one have it computed.
        frames, size: frames per clip T and side of the network's images, pixels.
        flip, scale, colour, speed: augmentation of training clips, see :class:`~amd_fast.data.clips.ClipTransform`.
        cache: keep decoded clips in memory: ``"ram"``, ``"none"``, or ``"auto"`` (where they fit into a quarter of the free memory).
        cache_frames: frames kept in the cache per sampled frame; with 1 the centre views are cached, for tests that are repeated.
        workers: threads or processes that decode, or open and cut the files for DALI, which has as many threads of its own besides;
            0: one per core.
        worker_kind: ``"thread"``, ``"process"``, or ``"auto"`` (threads). Processes survive a decoder's crash, and a clip that hangs can
            be ended; both give the same clips.
        timeout: seconds to read a clip in, before it counts as lost.
        max_lost: largest share of the clips read so far that may be lost, from ten lost clips on.
        decoder: "auto", "dali" or "pyav", see :func:`~amd_fast.data.decoders.explain_decoder`. With "auto", clips that DALI does not
            read as they are (rotated ones, rare codecs) are read by PyAV, and all of them where DALI does not work: that is tried with
            two pictures, and logged once. With a cache PyAV reads all; with "dali" there is none.
        device: where DALI decodes, and where the batches then lie; without it they lie on the CPU.
        channels: channels of further modalities, needed only to fill in for clips that lack them.
    """

    def __init__(
        self,
        manifest: Manifest,
        modalities: Sequence[str],
        *,
        frames: int,
        size: int,
        flip: bool = False,
        scale: tuple[float, float] = (0.7, 1.0),
        colour: float = 0.0,
        speed: float = 1.0,
        cache: Literal["auto", "ram", "none"] = "none",
        cache_frames: int = 2,
        workers: int = 0,
        worker_kind: Literal["auto", "thread", "process"] = "auto",
        timeout: float = 60.0,
        max_lost: float = 0.1,
        decoder: DecoderName = "auto",
        device: str | torch.device = "cpu",
        channels: Mapping[str, int] | None = None,
    ) -> None:
        self.manifest, self.modalities, self.frames, self.size = manifest, tuple(modalities), frames, size
        self.channels = {"rgb": 3, "flow": 2, **(channels or {})}
        self._extra = further_modalities(modalities, manifest)
        for name in further_modalities(modalities) if len(manifest) else ():
            if name not in self._extra:
                logger.warning(
                    "the manifest in %s has no column %r: that modality counts as missing from all its clips", manifest.root, name
                )
        self._counts = manifest.table["frames"].to_numpy(int)
        self._short_side = round(size * RESIZE_RATIO)
        self._cache: dict[int, RawClip] | None = {} if self._cached_at_all(cache, cache_frames, decoder) else None
        self._cache_frames = cache_frames
        self.losses = Losses(len(manifest), max_lost)
        augment = ClipTransform(size, self.modalities, train=True, flip=flip, scale=scale, colour=colour, speed=speed)
        kind: WorkerKind = "thread" if worker_kind == "auto" else worker_kind
        reading = ClipReading(self.modalities, frames, size, augment)
        self._only_dali = decoder == "dali"
        dali = self._dali_decoder(decoder, device, workers, timeout)
        self.lane = Lane("cpu") if dali is None else dali.lane
        """Where work on the device is queued."""
        self.device = self.lane.device
        """Where the batches lie."""
        self._workers: Workers[Any, Any] = Workers(
            _work(reading, dali),
            workers or available_cores(),
            kind=kind,
            timeout=timeout,
            slot=2 * frames * size**2 * 4 * sum(self.channels.get(name, 1) for name in self.modalities),
            here=_in_memory,
        )
        self._dali = None if dali is None else _dali_reading(reading, dali, self._workers)

    @property
    def lost(self) -> dict[int, str]:
        """Clips that could not be read, by position, with the reason."""
        return dict(self.losses.reasons)

    def processes(self) -> list[int]:
        """Process ids of the workers, where they are processes."""
        return self._workers.processes()

    def close(self) -> None:
        """Ends the workers. (They also end when nothing refers to the loader any more.)"""
        self._workers.close()
        if self._dali is not None:
            self._dali.close()

    def _cached_at_all(self, cache: str, cache_frames: int, decoder: DecoderName) -> bool:
        if cache == "ram" and decoder == "dali":
            raise ConfigError("the cache keeps clips that PyAV decodes, so decoder='dali' has none; use cache='none' or decoder='auto'")
        return cache == "ram" or (cache == "auto" and decoder != "dali" and self._fits(cache_frames))

    def _dali_decoder(self, decoder: DecoderName, device: str | torch.device, threads: int, timeout: float) -> DaliDecoder | None:
        """What decodes in place of PyAV, None where PyAV reads every clip: all those of a cache, among others."""
        if self._cache is not None:
            return None
        codecs = [codec or None for codec in dict.fromkeys(self.manifest.table["codec"])]
        choices = [choose_decoder(codec, decoder, device) for codec in codecs]
        if all(choice.decoder == "pyav" for choice in choices):
            return None
        if decoder == "auto" and not {"rgb", "flow"} & set(self.modalities):
            return None
        from amd_fast.data.dali import DaliDecoder

        try:
            return DaliDecoder(self.modalities, self.frames, self.size, device=device, threads=threads, timeout=timeout)
        except ImplementationError as error:
            if decoder == "dali":
                raise
            _warn_once(f"PyAV reads the clips: {error}")
            return None

    def fill_cache(self, *, progress: bool = True) -> None:
        """Decodes every clip into the cache (nothing to do without one).

        Raises:
            DataError: too many clips are lost.
        """
        if self._cache is None:
            return
        cache, todo = self._cache, [position for position in range(len(self.manifest)) if position not in self._cache]
        chunk = 32
        for start in track(range(0, len(todo), chunk), "decoding clips", unit=chunk, total=len(todo), disable=not progress):
            positions = todo[start : start + chunk]

            def keep(number: int, clips: list[Any], positions: list[int] = positions) -> None:
                cache[positions[number]] = clips[0]

            self._run([(position, self._job(position, self.frames * self._cache_frames)) for position in positions], keep)

    def fill(self, builder: BatchBuilder, wanted: Mapping[int, tuple[int, Seed]], *, cancelled: threading.Event | None = None) -> None:
        """Puts augmented training clips into a batch. Places that want the same clip share one pass over its file.

        Measured on 24 H.264 clips of 320 x 240, 8 frames twice: a shared pass takes 0.63 of the CPU time of two (0.93 with flow,
        which is computed for either).

        Args:
            builder: the batch.
            wanted: position and seed by row of the batch; all randomness of a clip comes from its seed.
            cancelled: set by whoever does not want the batch any more.

        Rows whose clip is lost are not filled: see :attr:`lost`.

        Raises:
            DataError: too many clips are lost, or the storage does not answer.
        """
        places: dict[int, list[int]] = {}
        for row, (position, _) in wanted.items():
            places.setdefault(position, []).append(row)
        jobs = [(position, self._job(position, self.frames, [wanted[row][1] for row in rows])) for position, rows in places.items()]
        rows_of = list(places.values())

        def accept(number: int, clips: list[Any]) -> Failure | None:
            refused = [builder.put(row, jobs[number][0], clip) for row, clip in zip(rows_of[number], clips, strict=True)]
            return next((failure for failure in refused if failure), None)

        self._run(jobs, accept, cancelled)

    def load_test(self, positions: np.ndarray, crops: int = 1) -> ClipBatch:
        """Clips as in a test; those that cannot be read are left out (see ``positions`` of the result and :attr:`lost`).

        Args:
            positions: manifest rows; one that comes twice is read once.
            crops: 1 for the centre; more for that many largest squares, evenly along the picture's longer side.

        Returns:
            ``crops`` rows per clip in ``clips`` and ``present``, one clip after the other; ``positions`` has one entry per clip.

        Raises:
            ConfigError: fewer than one crop.
            DataError: too many clips are lost, or the storage does not answer.
        """
        views_of_a_test(self.size, self.modalities, crops)  # a wrong number is refused before any clip is read
        builder = BatchBuilder(len(positions) * crops, self)
        rows_of: dict[int, list[int]] = {}
        for place, position in enumerate(positions.tolist()):
            rows_of.setdefault(position, []).append(place * crops)
        if self._cache is not None and self._cache_frames == 1:
            self._cache_centres(list(rows_of))
        jobs = [(position, self._job(position, self.frames, views=crops)) for position in rows_of]

        def accept(number: int, clips: list[Any]) -> Failure | None:
            position = jobs[number][0]
            refused = [builder.put(row + view, position, clip) for row in rows_of[position] for view, clip in enumerate(clips)]
            return next((failure for failure in refused if failure), None)

        self._run(jobs, accept)
        return _compact(builder.finish(), crops)

    def _cache_centres(self, positions: Sequence[int]) -> None:
        cache = self._cache
        assert cache is not None
        jobs = [(position, self._job(position, self.frames)) for position in positions if position not in cache]
        self._run(jobs, lambda number, clips: cache.__setitem__(jobs[number][0], clips[0]))

    def _run(
        self,
        jobs: Sequence[tuple[int, ReadJob]],
        accept: Callable[[int, list[Any]], Failure | None],
        cancelled: threading.Event | None = None,
    ) -> None:
        """Has clips read, except those known to be lost; what fails is lost from now on."""
        self.losses.see(position for position, _ in jobs)
        numbers = [number for number, (position, _) in enumerate(jobs) if position not in self.losses.reasons]
        failures: dict[int, Failure] = {}
        if self._dali is not None:
            tried = [number for number in numbers if self._only_dali or self._dali.takes(jobs[number][1])]
            problems = self._try_dali(self._dali, tried, jobs, accept, cancelled)
            failures = {number: problem for number, problem in problems.items() if isinstance(problem, Failure)}
            done = set(tried) - (problems.keys() - failures.keys())
            numbers = [number for number in numbers if number not in done]
        failures |= _done(self._workers, numbers, jobs, accept, cancelled)
        for number, failure in sorted(failures.items()):
            position, job = jobs[number]
            self.losses.add(position, job.path, failure.reason)

    def _try_dali(
        self,
        dali: DaliReading,
        numbers: Sequence[int],
        jobs: Sequence[tuple[int, ReadJob]],
        accept: Callable[[int, list[Any]], Failure | None],
        cancelled: threading.Event | None,
    ) -> dict[int, Failure | Refused]:
        """Has jobs done by DALI; what it refuses is for PyAV, unless DALI was named, and so is everything once it does not work at all."""
        from amd_fast.data.cutting import Refused, failure_of

        try:
            problems = _done(dali, numbers, jobs, accept, cancelled)
        except ImplementationError as error:
            if self._only_dali:
                raise
            _warn_once(f"PyAV reads the clips from now on: {error}")
            return {number: Refused(jobs[number][1].path, str(error)) for number in numbers}
        return {number: failure_of(problem) for number, problem in problems.items()} if self._only_dali else problems

    def _job(self, position: int, frames: int, seeds: Sequence[Seed] = (), views: int = 0) -> ReadJob:
        return ReadJob(
            path=str(self.manifest.file(position)),
            extra={name: str(file) for name, file in self.manifest.extra(position, self._extra).items()},
            frame_count=int(self._counts[position]),
            frames=frames,
            seeds=tuple(seeds),
            views=views,
            raw=self._cached(position, training=bool(seeds)),
        )

    def _cached(self, position: int, *, training: bool) -> RawClip | None:
        """The clip in memory: any frames of it for training, exactly the centre ones for a test."""
        if self._cache is None or not (training or self._cache_frames == 1):
            return None
        return self._cache.get(position)

    def _fits(self, cache_frames: int) -> bool:
        table = self.manifest.table
        ratio = np.maximum(table["width"], table["height"]) / np.maximum(np.minimum(table["width"], table["height"]), 1)
        needed = float(ratio.sum()) * self._short_side**2 * self.frames * cache_frames * _RAW_BYTES
        return needed < 0.25 * free_memory() / local_processes()


def _done(
    doer: DaliReading | Workers[Any, Any],
    numbers: Sequence[int],
    jobs: Sequence[tuple[int, ReadJob]],
    accept: Callable[[int, list[Any]], Failure | None],
    cancelled: threading.Event | None,
) -> dict[int, Any]:
    """Has some of the jobs done; the failures by number of the job."""
    failures = doer.run([jobs[number][1] for number in numbers], lambda which, clips: accept(numbers[which], clips), cancelled=cancelled)
    return {numbers[which]: failure for which, failure in failures.items()}


def _work(reading: ClipReading, dali: DaliDecoder | None) -> Callable[[Any], Any]:
    if dali is None:
        return reading
    from amd_fast.data.dali_reading import ReadingOrCutting

    return ReadingOrCutting(reading, dali.cutting)


def _dali_reading(reading: ClipReading, dali: DaliDecoder, workers: Workers[Any, Any]) -> DaliReading:
    from amd_fast.data.dali_reading import DaliReading

    return DaliReading(reading, dali, workers)


@functools.cache
def _warn_once(text: str) -> None:
    """Loaders for training and for validation would say the same."""
    logger.warning(text)


def _in_memory(job: ReadJob | CutJob) -> bool:
    return isinstance(job, ReadJob) and job.raw is not None


def _compact(batch: ClipBatch, crops: int) -> ClipBatch:
    """Leaves out the rows that were not filled; one position per clip."""
    filled = batch.positions >= 0
    if not filled.all():
        keep = torch.from_numpy(np.flatnonzero(filled))
        batch = ClipBatch({name: clip[keep] for name, clip in batch.clips.items()}, batch.present[keep], batch.positions[filled])
    return replace(batch, positions=batch.positions[::crops])
