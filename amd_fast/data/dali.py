"""Clips decoded, cut, resized, recoloured, mirrored and normalised by NVIDIA DALI: on a GPU with NVDEC, or on the CPU.

Every choice is made before DALI sees a clip: which frames (``sampling``), which packets they need (``cut``), which square, mirrored or
not, which change of colours (``ClipTransform.draw``). So the clips show what PyAV's path shows. Two things differ a little:

* pixels, by other rounding, chroma interpolation and filters: by ``PIXEL_TOLERANCE`` grey levels on average at most;
* flow is computed on the square the network sees, not on the whole picture: the same motion in the same units, with another border.

On a GPU the flow comes from NVIDIA's optical flow engine, on the CPU from DIS as everywhere.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from amd_fast.data.child import Failure
from amd_fast.data.clips import PathLike
from amd_fast.data.cutting import CutJob, Cutting, Refused, failure_of
from amd_fast.data.dali_check import check_dali, examine, explained, lacks_memory, reason_of
from amd_fast.data.dali_graph import Parts, Sample, definition, inputs_of
from amd_fast.data.decoders import choose_decoder, stream_obstacle
from amd_fast.data.flow import DEFAULT_PRESET, FlowPreset, dis_flow
from amd_fast.data.lane import Lane
from amd_fast.data.one_thread import Call, OneThread
from amd_fast.data.views import FLOW_LIMIT, FLOW_UNIT, ClipTransform, View
from amd_fast.data.workers import CancelledError, Workers
from amd_fast.errors import ConfigError, DataError, DecodeError, ImplementationError
from amd_fast.resources import available_cores

PIXEL_TOLERANCE = 2.5
"""Mean absolute difference, in grey levels, that a clip without change of colours may have from the same clip read by PyAV."""
_GRACE = 150.0  # seconds that a batch may take longer than a clip: the driver compiles, and the first clips fill its memory
_AT_ONCE = 32  # files cut while as many are decoded
_NAMED = 3  # clips named where a batch hangs

_DALI_ERRORS = (RuntimeError, ValueError, IndexError, MemoryError)  # what its C++ raises; torch's out-of-memory error is a RuntimeError

Clip = dict[str, Tensor]


@dataclass(frozen=True)
class ClipJob:
    """One clip to read.

    Attributes:
        path: the video.
        transform: what is done to it; of the decoder's size and modalities.
        rng: source of randomness in training, used for the frames, then for the view, as PyAV's path does; None in test.
        frame_count: number of frames in the video, if known.
        extra: files of further modalities, see :func:`~amd_fast.data.clips.decode_clip`.
    """

    path: PathLike
    transform: ClipTransform
    rng: np.random.Generator | None = None
    frame_count: int | None = None
    extra: Mapping[str, PathLike] = field(default_factory=dict)


class DaliDecoder:
    """Reads clips with DALI.

    Files are opened and cut by workers, each within ``timeout`` seconds; DALI itself works in a thread of its own, which is given up if
    it does not come back from a batch within 150 seconds more. There are at most ``2 x threads + 1`` threads, ``threads`` of them
    DALI's (as many again for DIS where flow is wanted on the CPU); on a GPU they queue their work on a stream of their own.

    Memory on the device, bytes: with B = ``batch_size``, F frames decoded per clip (T for rgb, 2 T for flow, 3 T for both), pictures of
    W x H, made w x h (shorter side 8/7 of ``size``) and then squares of ``size``::

        B x (3 F (W H + w h + size^2) + 27 T size^2 for rgb + (6 + 16) T size^2 for flow) for each pipeline,
        and (12 for rgb + 8 for flow) T size^2 for each clip of up to 64 files that wait to be taken

    (27 = 3 channels of 1 byte, then twice of 4; the flow's pairs are pictures, then vectors of 8 bytes). There is one pipeline,
    and one more for batches with colours that are not those of BT.601. DALI keeps the largest it ever needed, and on a GPU NVDEC's
    surfaces besides: up to 20 x 1.5 W H for each of the B streams. On the host: the cut streams of up to 64 files.

    Args:
        modalities: names, in order; those other than rgb and flow come from the jobs' ``extra``.
        frames, size: frames per clip T and side of the square pictures, pixels.
        device: "cuda" (or "cuda:1") or "cpu"; where the results lie.
        threads: of DALI, and of the demultiplexing in :meth:`load`; 0: one per core.
        batch_size: clips decoded at a time.
        flow_preset: of DIS, on the CPU.
        timeout: seconds to open and cut a file in, before it counts as lost.

    Raises:
        ImplementationError: DALI cannot run here, or fails to decode two pictures made for the purpose; says why, and what to do.
        ConfigError: neither rgb nor flow is wanted.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        frames: int,
        size: int,
        *,
        device: str | torch.device = "cpu",
        threads: int = 0,
        batch_size: int = 16,
        flow_preset: FlowPreset = DEFAULT_PRESET,
        timeout: float = 60.0,
    ) -> None:
        self.modalities, self.frames, self.size = tuple(modalities), frames, size
        choose_decoder(None, "dali", device)
        if not {"rgb", "flow"} & set(self.modalities):
            raise ConfigError(f"DALI decodes videos, and none of {list(self.modalities)} comes from one; use decoder='pyav'")
        self.lane = Lane(device)
        """Where the work on the device is queued."""
        self.device = self.lane.device
        self.cutting = Cutting(self.modalities, frames, size, self.device.type)
        """What workers do for this decoder."""
        self._threads, self._batch_size, self._preset, self._timeout = threads or available_cores(), batch_size, flow_preset, timeout
        self._parts = Parts("rgb" in self.modalities, "flow" in self.modalities)
        self._pipelines: dict[Parts, Any] = {}
        self._workers: Workers[CutJob, list[Sample] | Refused] | None = None
        self._upright: set[str] = set()
        self._lock = threading.Lock()
        self._dis = ThreadPoolExecutor(self._threads, "dis") if self._parts.flow and self.device.type == "cpu" else None
        self._thread = OneThread("dali", "NVIDIA DALI", timeout + _GRACE, self.lane.entered)
        self._backwards = self._checked()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and frees DALI's memory."""
        self._thread.submit(self._pipelines.clear, str)
        self._thread.close()
        if self._dis is not None:
            self._dis.shutdown(wait=False)
        if self._workers is not None:
            self._workers.close()

    def load(self, jobs: Sequence[ClipJob]) -> list[Clip | DataError]:
        """Reads clips.

        Returns:
            For each job ``{modality: float32 [T, channels, size, size]}`` on the device, or the error that says why this clip cannot be
            read so, names its file and gives the remedy. The errors of one clip leave the others as they are.

        Raises:
            ImplementationError: DALI does not work any more.
        """
        with self._lock:
            if self._workers is None:
                self._workers = Workers(self.cutting, self._threads, timeout=self._timeout)
        cuts = [CutJob(job.path, ((job.transform, job.rng),), job.frame_count, job.extra) for job in jobs]
        results: list[Clip | DataError] = [{}] * len(jobs)
        for number, outcome in self.read(cuts, self._workers):
            results[number] = outcome[0] if isinstance(outcome, list) else DecodeError(failure_of(outcome).reason)
        self.lane.hand_over(tensor for clip in results if isinstance(clip, dict) for tensor in clip.values())
        return results

    def read(
        self,
        jobs: Sequence[CutJob],
        workers: Workers[Any, Any],
        cancelled: threading.Event | None = None,
    ) -> Iterator[tuple[int, list[Clip] | Refused | Failure]]:
        """Reads files, from any thread: the next ones are cut while DALI decodes.

        Args:
            jobs: the files.
            workers: do :attr:`cutting`.
            cancelled: set by whoever does not want the clips any more.

        Yields:
            Number of a job with its clips, or with why there are none: to DALI's account, or to the file's. The clips lie in the
            decoder's lane.

        Raises:
            ImplementationError: DALI does not work any more.
            CancelledError: ``cancelled`` was set.
        """
        unfinished: Iterator[tuple[int, list[Clip] | Refused | Failure]] = iter(())
        for first in range(0, len(jobs), _AT_ONCE):
            cuts = self._cut(jobs[first : first + _AT_ONCE], workers, cancelled)
            calls = self._submitted([sample for cut in cuts if isinstance(cut, list) for sample in cut])
            yield from unfinished
            unfinished = self._finished(first, cuts, calls)
        yield from unfinished

    def _cut(
        self, jobs: Sequence[CutJob], workers: Workers[Any, Any], cancelled: threading.Event | None
    ) -> list[list[Sample] | Refused | Failure]:
        if cancelled is not None and cancelled.is_set():
            raise CancelledError
        outcomes: dict[int, list[Sample] | Refused | Failure] = {}
        upright = [replace(job, upright=str(job) in self._upright) for job in jobs]
        outcomes |= workers.run(upright, outcomes.__setitem__, cancelled=cancelled)
        self._upright.update(str(jobs[number]) for number, outcome in outcomes.items() if isinstance(outcome, list))
        return [outcomes[number] for number in range(len(jobs))]

    def _submitted(self, samples: Sequence[Sample]) -> deque[Call[list[Clip | Refused]]]:
        batches = [samples[first : first + self._batch_size] for first in range(0, len(samples), self._batch_size)]
        return deque(self._thread.submit(partial(self._decode, batch), partial(_names, batch)) for batch in batches)

    def _finished(
        self, first: int, cuts: Sequence[list[Sample] | Refused | Failure], calls: deque[Call[list[Clip | Refused]]]
    ) -> Iterator[tuple[int, list[Clip] | Refused | Failure]]:
        done: deque[Clip | Refused] = deque()
        for number, cut in enumerate(cuts, first):
            if not isinstance(cut, list):
                yield number, cut
                continue
            while len(done) < len(cut):
                decoded: list[Clip | Refused] = self._thread.wait(calls.popleft())
                done += decoded
            clips = [done.popleft() for _ in cut]
            refusal = next((clip for clip in clips if isinstance(clip, Refused)), None)
            yield number, [clip for clip in clips if isinstance(clip, dict)] if refusal is None else refusal

    # What follows runs in DALI's thread.

    def _decode(self, samples: Sequence[Sample]) -> list[Clip | Refused]:
        obstacles = [stream_obstacle(sample.cut, self.device.type) for sample in samples]
        pairs = list(zip(samples, obstacles, strict=True))
        done = iter(self._tried([sample for sample, obstacle in pairs if obstacle is None]))
        return [next(done) if obstacle is None else Refused(sample.path, obstacle) for sample, obstacle in pairs]

    def _tried(self, samples: Sequence[Sample], *, works: bool = False) -> list[Clip | Refused]:
        """Decodes clips. One bad clip fails its batch, without a name: what fails is tried again in halves, if DALI works at all."""
        if not samples:
            return []
        try:
            return list(self._run(samples))
        except _DALI_ERRORS as error:
            self._pipelines.clear()  # after a failure they promise nothing
            if not works:
                self._raise_if_broken()
            if len(samples) == 1:
                if lacks_memory(error):
                    raise _broken(self.device, f"{_names(samples)}: {explained(error)}") from error
                return [Refused(samples[0].path, reason_of(error))]
        half = len(samples) // 2
        return [*self._tried(samples[:half], works=True), *self._tried(samples[half:], works=True)]

    def _raise_if_broken(self) -> None:
        problem = examine(self.device, rgb=self._parts.rgb, flow=self._parts.flow).problem
        if problem is not None:
            raise _broken(self.device, problem)

    def _run(self, samples: Sequence[Sample]) -> list[Clip]:
        parts = self._parts.of(samples)
        if parts not in self._pipelines:
            graph = definition(self.size, parts, self.lane.gpu)
            options = {"batch_size": self._batch_size, "num_threads": self._threads, "device_id": self.lane.gpu}
            self._pipelines[parts] = graph(**options, prefetch_queue_depth=1)
        pipeline = self._pipelines[parts]
        for name, values in inputs_of(samples, parts, backwards=self._backwards).items():
            pipeline.feed_input(name, values)
        outputs = [torch.from_dlpack(output.as_tensor()) for output in pipeline.run()]
        clips = [{name: torch.from_numpy(clip).to(self.device) for name, clip in sample.further.items()} for sample in samples]
        if parts.rgb:
            for clip, rgb in zip(clips, outputs[0].clone(), strict=True):
                clip["rgb"] = rgb
        if parts.flow:
            for clip, sample, found in zip(clips, samples, outputs[-1], strict=True):
                clip["flow"] = _flow_units(self._vectors(found), sample.view, self.size)
        self.lane.wait()  # DALI writes its next batch where these outputs lie
        return [{name: clip[name] for name in self.modalities if name in clip} for clip in clips]

    def _vectors(self, found: Tensor) -> Tensor:
        """Flow ``[T, h, w, 2]`` in pixels: every other one of those the GPU found, or computed here from the pairs of grey pictures."""
        if self._dis is None:
            return found[::2]
        grey = found[..., 0].numpy()
        flows = self._dis.map(lambda k: dis_flow(grey[k], grey[k + 1], preset=self._preset), range(0, len(grey), 2))
        return torch.from_numpy(np.stack(list(flows)))

    def _checked(self) -> bool:
        """Whether the flow's pairs are to be turned round."""
        ask = partial(check_dali, self.device, rgb=self._parts.rgb, flow=self._parts.flow)
        check = self._thread.wait(self._thread.submit(ask, lambda: "two pictures made to try it out"))
        if check.problem is not None:
            raise _broken(self.device, check.problem)
        return check.backwards


def _names(samples: Sequence[Sample]) -> str:
    paths = list(dict.fromkeys(sample.path for sample in samples))
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return ", ".join(paths[:_NAMED]) + more


def _broken(device: torch.device, problem: str) -> ImplementationError:
    return ImplementationError(f"NVIDIA DALI does not work on {device}: {problem}; or use decoder='pyav'")


def _flow_units(vectors: Tensor, view: View, size: int) -> Tensor:
    """Flow as the network gets it, as ``ClipTransform`` does it, from vectors ``[T, h, w, 2]`` in pixels of the square of side ``size``."""
    planes = vectors.permute(0, 3, 1, 2)
    if planes.shape[-1] != size:  # one vector per cell of a grid
        planes = torch.nn.functional.interpolate(planes, size=(size, size), mode="bilinear", align_corners=False)
    if view.mirrored:
        planes = planes.flip(-1) * planes.new_tensor([-1.0, 1.0]).view(2, 1, 1)
    return (planes / (FLOW_UNIT * size)).clamp(-FLOW_LIMIT, FLOW_LIMIT) * view.speed
