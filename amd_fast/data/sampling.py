"""Which frames of a clip are looked at: one per segment, as in temporal segment networks (Wang et al., ECCV 2016)."""

from __future__ import annotations

import numpy as np

from amd_fast.errors import DataError


def segment_indices(frames: int, count: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Cut a video into ``count`` segments of equal length and take one frame from each.

    Segment k covers ``[k * frames / count, (k + 1) * frames / count)``. Without ``rng`` the frame at its centre is
    taken (test), with ``rng`` one drawn uniformly inside it (training). A video shorter than ``count`` repeats frames.

    Args:
        frames: number of frames in the video, at least 1.
        count: number of frames wanted, at least 1.
        rng: source of the random offsets, or None for the centres.

    Returns:
        int64 ``[count]``, ascending, every value in ``[0, frames)``.

    Raises:
        DataError: ``frames`` or ``count`` is below 1.
    """
    if frames < 1:
        raise DataError(f"a video needs at least 1 frame to sample from, got frames={frames}; leave empty videos out of the manifest")
    if count < 1:
        raise DataError(f"the number of frames sampled per clip must be at least 1, got {count}")
    segment = np.arange(count, dtype=np.int64)
    if rng is None:
        return (2 * segment + 1) * frames // (2 * count)  # in integers, so exact on every platform
    position = np.floor((segment + rng.random(count)) * (frames / count)).astype(np.int64)
    return np.minimum(position, frames - 1)  # rounding may reach the end of the last segment
