"""What a worker does for DALI: open one file, make every choice about its clips, and cut out the packets that they need.

It runs in the loader's workers, threads or processes, so that a file that hangs or crashes what reads it costs its clip alone. It
touches no GPU: a process that did would take memory of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from amd_fast.data.child import Failure
from amd_fast.data.clips import PathLike, read_array
from amd_fast.data.cut import cut_stream
from amd_fast.data.dali_graph import Sample
from amd_fast.data.decode import VideoReader
from amd_fast.data.decoders import codec_obstacle
from amd_fast.data.pixels import scaled_size
from amd_fast.data.readers import open_clip
from amd_fast.data.sampling import segment_indices
from amd_fast.data.views import RESIZE_RATIO, ClipTransform, RawClip
from amd_fast.errors import AmdFastError, DataError

Draw = tuple[ClipTransform, np.random.Generator | None]


@dataclass(frozen=True)
class Refused:
    """Why DALI does not read a file that PyAV may well read; as text with the file's name and the remedy."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"cannot decode {self.path!r} with DALI: {self.reason}; use decoder='auto' or 'pyav' for it"


@dataclass(frozen=True)
class CutJob:
    """One file, and what is wanted of it.

    Attributes:
        path: the video.
        draws: of each clip, what is done to it, and the source of randomness in training.
        frame_count: frames of the video, if known.
        extra: files of further modalities.
        upright: whether its pictures are known not to be stored turned, which otherwise its first one has to be decoded for.
    """

    path: PathLike
    draws: tuple[Draw, ...]
    frame_count: int | None = None
    extra: Mapping[str, PathLike] = field(default_factory=dict)
    upright: bool = False

    def __str__(self) -> str:
        return os.fspath(self.path)


@dataclass(frozen=True)
class Cutting:
    """Does :class:`CutJob`; the same in a thread and in a process.

    Args:
        modalities: in order.
        frames, size: frames per clip T and side of the network's images, pixels.
        device: kind of the device that decodes: "cuda" or "cpu".
    """

    modalities: tuple[str, ...]
    frames: int
    size: int
    device: str

    def __call__(self, job: CutJob) -> list[Sample] | Refused | Failure:
        """What DALI gets of each clip; or why it gets nothing, and whether the file itself is to blame.

        Raises:
            AmdFastError: a wrong setting, which no other clip would mend.
            MemoryError: there is no memory left.
        """
        if "flow" in job.extra:
            return Refused(str(job), "its flow is precomputed, and this computes it")
        try:
            with open_clip(job.path) as reader:
                return self._samples(job, reader) if isinstance(reader, VideoReader) else Refused(str(job), "it is no video file")
        except (DataError, OSError) as error:
            return Failure(str(error))
        except (AmdFastError, MemoryError):
            raise
        except Exception as error:  # damaged files find their way into every corner of a demultiplexer
            return Refused(str(job), f"unexpected {type(error).__name__} ({error})")

    def _samples(self, job: CutJob, reader: VideoReader) -> list[Sample] | Refused:
        obstacle = codec_obstacle(reader.codec, self.device)
        if obstacle is None and not job.upright and reader.turns:
            obstacle = "its pictures are stored turned, and DALI does not turn them back"
        samples = []
        for transform, rng in job.draws if obstacle is None else ():
            sample = self._sample(job, reader, transform, rng)
            if sample is None:
                return Refused(str(job), "the order of its frames is not known without decoding it")
            samples.append(sample)
        return samples if obstacle is None else Refused(str(job), obstacle)

    def _sample(self, job: CutJob, reader: VideoReader, transform: ClipTransform, rng: np.random.Generator | None) -> Sample | None:
        short_side, count = round(self.size * RESIZE_RATIO), job.frame_count or reader.frame_count
        index = segment_indices(count, self.frames, rng)
        pictures = index if "rgb" in self.modalities else index[:0]
        first = np.clip(index, 0, max(count - 2, 0)) if "flow" in self.modalities else index[:0]
        wanted, places = np.unique(np.concatenate([pictures, first, first + 1]), return_inverse=True)
        cut = cut_stream(reader, wanted)
        if cut is None:
            return None
        width, height = scaled_size(cut.width, cut.height, short_side)
        view = transform.draw(height, width, rng)
        moments = (index + 0.5) / count
        further = RawClip({name: read_array(path, name, moments, short_side) for name, path in job.extra.items()})
        pairs = places[len(pictures) :].reshape(2, -1).T
        shown = {name: clip.numpy() for name, clip in transform.apply(further, view).items()}
        return Sample(reader.path, cut, places[: len(pictures)], pairs, view, shown)


def failure_of(problem: Failure | Refused) -> Failure:
    """As a failure, where nobody else is to read the file."""
    return problem if isinstance(problem, Failure) else Failure(str(problem))
