"""Clips decoded, cut, resized, recoloured, mirrored and normalised by NVIDIA DALI: on a GPU with NVDEC, or on the CPU.

Every choice is made before DALI sees a clip: which frames (``sampling``), which packets they need (``cut``), which square, mirrored or
not, which change of colours (``ClipTransform.draw``). So the clips show what PyAV's path shows. Two things differ a little:

* pixels, by other rounding, chroma interpolation and filters: by ``PIXEL_TOLERANCE`` grey levels on average at most;
* flow is computed on the square the network sees, not on the whole picture: the same motion in the same units, with another border.

On a GPU the flow comes from NVIDIA's optical flow engine, on the CPU from DIS as everywhere.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import cv2
import numpy as np
import torch
from torch import Tensor

from amd_fast.data.clips import PathLike, read_array
from amd_fast.data.cut import cut_stream
from amd_fast.data.dali_graph import Parts, Sample, definition, flow_grid, inputs_of, load_dali
from amd_fast.data.decode import VideoReader
from amd_fast.data.decoders import choose_decoder, dali_obstacle
from amd_fast.data.flow import DEFAULT_PRESET, FlowPreset, dis_flow
from amd_fast.data.pixels import scaled_size
from amd_fast.data.readers import open_clip
from amd_fast.data.sampling import segment_indices
from amd_fast.data.views import FLOW_LIMIT, FLOW_UNIT, RESIZE_RATIO, ClipTransform, RawClip, View
from amd_fast.errors import AmdFastError, ConfigError, DataError, DecodeError
from amd_fast.resources import available_cores

PIXEL_TOLERANCE = 2.5
"""Mean absolute difference, in grey levels, that a clip without change of colours may have from the same clip read by PyAV."""
_INSTEAD = "use decoder='auto' or 'pyav' for it"


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
    """Reads clips with DALI. Use it from one thread; it decodes in several.

    Args:
        modalities: names, in order; those other than rgb and flow come from the jobs' ``extra``.
        frames, size: frames per clip T and side of the square pictures, pixels.
        device: "cuda" (or "cuda:1") or "cpu"; where the results lie.
        threads: of DALI and of the demultiplexing; 0: one per core.
        batch_size: clips decoded at a time.
        flow_preset: of DIS, on the CPU.

    Raises:
        ImplementationError: DALI cannot run here.
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
    ) -> None:
        self.modalities, self.frames, self.size, self.device = tuple(modalities), frames, size, torch.device(device)
        choose_decoder(None, "dali", self.device)
        if not {"rgb", "flow"} & set(self.modalities):
            raise ConfigError(f"DALI decodes videos, and none of {list(self.modalities)} comes from one; use decoder='pyav'")
        self._threads, self._batch_size, self._preset = threads or available_cores(), batch_size, flow_preset
        self._short_side = round(size * RESIZE_RATIO)
        self._rgb, self._flow = "rgb" in self.modalities, "flow" in self.modalities
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="demux")
        self._turned: dict[str, bool] = {}
        self._pipelines: dict[Parts, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and frees DALI's memory."""
        self._pool.shutdown()
        self._pipelines.clear()

    def load(self, jobs: Sequence[ClipJob]) -> list[dict[str, Tensor] | DataError]:
        """Reads clips.

        Returns:
            For each job ``{modality: float32 [T, channels, size, size]}`` on the device, or the error that says why this clip cannot be
            read so, names its file and gives the remedy. The errors of one clip leave the others as they are.
        """
        results: list[dict[str, Tensor] | DataError] = []
        prepared = self._pool.map(self._prepare, jobs)
        while chunk := list(itertools.islice(prepared, self._batch_size)):  # the next ones are prepared meanwhile
            good = [item for item in chunk if isinstance(item, Sample)]
            done = iter(self._decode(good))
            results += [next(done) if isinstance(item, Sample) else item for item in chunk]
        return results

    def _prepare(self, job: ClipJob) -> Sample | DataError:
        try:
            with open_clip(job.path) as reader:
                return self._sample(job, reader) if isinstance(reader, VideoReader) else _refused(job.path, "it is no video file")
        except DataError as error:
            return error
        except (AmdFastError, MemoryError):
            raise
        except Exception as error:  # damaged files find their way into every corner of a demultiplexer
            return _refused(job.path, f"unexpected {type(error).__name__} ({error})")

    def _sample(self, job: ClipJob, reader: VideoReader) -> Sample:
        obstacle = dali_obstacle(reader.codec, self.device.type)
        if obstacle is not None:
            raise _refused(job.path, obstacle)
        if "flow" in job.extra:
            raise _refused(job.path, "its flow is precomputed, and this computes it")
        if self._is_turned(reader):
            raise _refused(job.path, "its pictures are stored turned, and DALI does not turn them back")
        count = job.frame_count or reader.frame_count
        index = segment_indices(count, self.frames, job.rng)
        pictures = index if self._rgb else index[:0]
        first = np.clip(index, 0, max(count - 2, 0)) if self._flow else index[:0]
        wanted, places = np.unique(np.concatenate([pictures, first, first + 1]), return_inverse=True)
        cut = cut_stream(reader, wanted)
        if cut is None:
            raise _refused(job.path, "the order of its frames is not known without decoding it")
        if cut.hidden and self.device.type == "cuda":
            raise _refused(job.path, "it holds pictures that are not shown, which DALI counts on a GPU")
        width, height = scaled_size(cut.width, cut.height, self._short_side)
        view = job.transform.draw(height, width, job.rng)
        moments = (index + 0.5) / count
        further = RawClip({name: read_array(path, name, moments, self._short_side) for name, path in job.extra.items()})
        pairs = places[len(pictures) :].reshape(2, -1).T
        shown = {name: clip.numpy() for name, clip in job.transform.apply(further, view).items()}
        return Sample(reader.path, cut, places[: len(pictures)], pairs, view, shown)

    def _is_turned(self, reader: VideoReader) -> bool:
        """Whether the container asks for a rotation, which a decoded frame says; kept, so that it is decoded once."""
        if reader.path not in self._turned:
            self._turned[reader.path] = reader.turns != 0
        return self._turned[reader.path]

    def _decode(self, samples: Sequence[Sample]) -> list[dict[str, Tensor] | DataError]:
        if not samples:
            return []
        try:
            return [self._in_order(clip) for clip in self._run(samples)]
        except RuntimeError as error:  # one bad sample fails its batch, without a name
            self._pipelines.clear()
            if len(samples) > 1:
                return [result for sample in samples for result in self._decode([sample])]
            reason = " ".join(str(error).split("Current pipeline object")[0].split())
            return [DecodeError(f"cannot decode {samples[0].path!r} with DALI ({reason}); {_INSTEAD}")]

    def _run(self, samples: Sequence[Sample]) -> Iterable[dict[str, Tensor]]:
        parts = Parts(self._rgb, self._flow).of(samples)
        if parts not in self._pipelines:
            self._pipelines[parts] = self._built(parts)
        pipeline = self._pipelines[parts]
        backwards = self.device.type == "cuda" and self._flow and _flow_goes_back(self.device.index or 0)
        for name, values in inputs_of(samples, parts, backwards=backwards).items():
            pipeline.feed_input(name, values)
        outputs = [torch.from_dlpack(output.as_tensor()) for output in pipeline.run()]
        clips = [{name: torch.from_numpy(clip).to(self.device) for name, clip in sample.further.items()} for sample in samples]
        if self._rgb:
            for clip, rgb in zip(clips, outputs[0].clone(), strict=True):
                clip["rgb"] = rgb
        if self._flow:
            for clip, sample, found in zip(clips, samples, outputs[-1], strict=True):
                clip["flow"] = _flow_units(self._vectors(found), sample.view, self.size)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # DALI writes its next batch where these outputs lie
        return clips

    def _vectors(self, found: Tensor) -> Tensor:
        """Flow ``[T, h, w, 2]`` in pixels: every other one of those the GPU found, or computed here from the pairs of grey pictures."""
        if self.device.type == "cuda":
            return found[::2]
        grey = found[..., 0].numpy()
        flows = self._pool.map(lambda k: dis_flow(grey[k], grey[k + 1], preset=self._preset), range(0, len(grey), 2))
        return torch.from_numpy(np.stack(list(flows)))

    def _in_order(self, clip: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: clip[name] for name in self.modalities if name in clip}

    def _built(self, parts: Parts) -> Any:
        gpu = (self.device.index or 0) if self.device.type == "cuda" else None
        graph = definition(self.size, parts, gpu)
        return graph(batch_size=self._batch_size, num_threads=self._threads, device_id=gpu, prefetch_queue_depth=1)


def _refused(path: PathLike, reason: str) -> DecodeError:
    return DecodeError(f"cannot decode {os.fspath(path)!r} with DALI: {reason}; {_INSTEAD}")


def _flow_units(vectors: Tensor, view: View, size: int) -> Tensor:
    """Flow as the network gets it, as ``ClipTransform`` does it, from vectors ``[T, h, w, 2]`` in pixels of the square of side ``size``."""
    planes = vectors.permute(0, 3, 1, 2)
    if planes.shape[-1] != size:  # one vector per cell of a grid
        planes = torch.nn.functional.interpolate(planes, size=(size, size), mode="bilinear", align_corners=False)
    if view.mirrored:
        planes = planes.flip(-1) * planes.new_tensor([-1.0, 1.0]).view(2, 1, 1)
    return (planes / (FLOW_UNIT * size)).clamp(-FLOW_LIMIT, FLOW_LIMIT) * view.speed


@functools.cache
def _flow_goes_back(gpu: int) -> bool:
    """Whether the engine's vectors say where the second frame's content was, and not where the first frame's goes.

    DALI's text leaves it open; asked once, with a texture that moves four pixels to the right.
    """
    dali, fn, types = load_dali()

    side, step = 224, 4
    noise = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8 + 1, 3), dtype=np.uint8)
    texture = cv2.resize(noise, (side + 8, side), interpolation=cv2.INTER_CUBIC)
    pair = np.stack([texture[:, step : step + side], texture[:, :side]])

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=gpu, prefetch_queue_depth=1)
    def graph() -> Any:
        frames = fn.external_source(source=lambda: [pair], dtype=types.UINT8, ndim=4, layout="FHWC")
        return fn.optical_flow(frames.gpu(), output_grid=flow_grid(gpu))

    (found,) = graph().run()
    return bool(np.median(np.array(found.as_cpu().at(0))[0, ..., 0]) < 0)
