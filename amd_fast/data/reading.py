"""What a worker does for the loader: open one file, and make of it all the clips that a batch wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from amd_fast.data.child import Failure
from amd_fast.data.clips import RESIZE_RATIO, ClipTransform, RawClip, decode_draws
from amd_fast.data.sampling import segment_indices
from amd_fast.errors import AmdFastError, ConfigError, DataError

Seed = tuple[int, ...]


@dataclass(frozen=True)
class ReadJob:
    """One file, and what is wanted of it: augmented clips, one per seed; or so many test views; or the decoded frames as they are.

    Attributes:
        path: the video.
        extra: files of further modalities.
        frame_count: frames of the video.
        frames: frames to decode.
        seeds: of the augmented clips.
        views: number of test views; 0 together with no seeds: the decoded frames.
        raw: the clip where it is in memory already; nothing is opened then.
    """

    path: str
    extra: Mapping[str, str] = field(default_factory=dict)
    frame_count: int = 1
    frames: int = 1
    seeds: tuple[Seed, ...] = ()
    views: int = 0
    raw: RawClip | None = None

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class ClipReading:
    """Does :class:`ReadJob`; the same in a thread and in a process.

    Args:
        modalities: in order.
        frames, size: frames per clip T and side of the network's images, pixels.
        augment: of training clips.
    """

    modalities: tuple[str, ...]
    frames: int
    size: int
    augment: ClipTransform

    def __call__(self, job: ReadJob) -> list[dict[str, np.ndarray]] | Failure:
        """The clips, ``{modality: [T, channels, size, size]}`` float32 (or decoded frames), or why there are none.

        Raises:
            AmdFastError: a wrong setting, which no other clip would mend.
            MemoryError: there is no memory left.
        """
        try:
            if job.seeds:
                return self._augmented(job)
            raw = job.raw if job.raw is not None else self._decode(job, [None])[0]
            return [_arrays(view, raw) for view in views_of_a_test(self.size, self.modalities, job.views)] if job.views else [raw]
        except (DataError, OSError) as error:
            return Failure(str(error))
        except (AmdFastError, MemoryError):
            raise
        except Exception as error:  # damaged files find their way into every corner of a decoder
            return Failure(f"cannot decode {job.path!r}: unexpected {type(error).__name__} ({error})")

    def _augmented(self, job: ReadJob) -> list[dict[str, np.ndarray]]:
        draws = [np.random.default_rng(seed) for seed in job.seeds]
        if job.raw is None:
            clips: Sequence[RawClip] = self._decode(job, draws)  # which draws the frames, and so comes first
            return [_arrays(self.augment, raw, rng) for raw, rng in zip(clips, draws, strict=True)]
        count = job.raw.frames
        return [_arrays(self.augment, job.raw, rng, segment_indices(count, self.frames, rng)) for rng in draws]

    def _decode(self, job: ReadJob, draws: Sequence[np.random.Generator | None]) -> list[RawClip]:
        return decode_draws(
            job.path,
            job.frames,
            draws,
            short_side=round(self.size * RESIZE_RATIO),
            modalities=self.modalities,
            extra=job.extra,
            frame_count=job.frame_count,
        )


def views_of_a_test(size: int, modalities: Sequence[str], crops: int) -> list[ClipTransform]:
    """Transforms of a test: the centre, or ``crops`` squares evenly along the picture's longer side.

    Raises:
        ConfigError: fewer than one crop.
    """
    if crops < 1:
        raise ConfigError(f"the number of test crops must be at least 1, got {crops}")
    if crops == 1:
        return [ClipTransform(size, modalities, train=False)]
    return [ClipTransform(size, modalities, train=False, place=float(place)) for place in np.linspace(0, 1, crops)]


def _arrays(
    transform: ClipTransform, raw: RawClip, rng: np.random.Generator | None = None, index: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    return {name: clip.numpy() for name, clip in transform(raw, rng, index).items()}
