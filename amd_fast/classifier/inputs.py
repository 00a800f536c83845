"""What a classifier is given: paths of clips, decoded clips, or vectors; read in threads, each failure under its own name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import scipy.sparse

from amd_fast.classifier.spaces import Space
from amd_fast.data.clips import RawClip, decode_clip
from amd_fast.data.flow import dis_flow
from amd_fast.data.layouts import beside
from amd_fast.data.pixels import resize, scaled_size
from amd_fast.data.sampling import segment_indices
from amd_fast.errors import DataError
from amd_fast.progress import track
from amd_fast.resources import available_cores
from amd_fast.storage import is_remote, plain

_ACCEPTED = (
    "give a list of paths, of uint8 arrays [T, H, W, 3], of {modality: array} mappings with T frames each, or a 2-D array of descriptors"
)


@dataclass(frozen=True)
class ReadClip:
    """A clip as it was read: its name, the decoded frames and their digest, or why there are none."""

    name: str
    raw: RawClip | None
    digest: str
    error: str = ""

    def without_frames(self) -> ReadClip:
        """The same without the decoded frames, which take memory."""
        return replace(self, raw=None)


def is_clips(samples: Any) -> bool:
    """Whether these are clips (paths, pictures, mappings of modalities) rather than vectors."""
    if isinstance(samples, (str, os.PathLike)):
        raise DataError(f"got the single path {os.fspath(samples)!r}; give a list of paths")
    if isinstance(samples, np.ndarray) and samples.dtype.kind not in "OUS":
        return samples.ndim in (4, 5)
    if hasattr(samples, "dtypes") and samples.ndim == 2 and any(dtype.kind in "biuf" for dtype in samples.dtypes):
        return False
    if scipy.sparse.issparse(samples):
        return False
    listed = clip_list(samples)
    if not listed and isinstance(samples, (list, tuple)):
        return True
    first = next(iter(listed), None)
    return isinstance(first, (str, os.PathLike, Mapping)) or getattr(first, "ndim", 0) == 4


def clip_list(samples: Any) -> list[Any]:
    """The clips one by one; a column of paths, as pandas and column transformers give them, is taken as a list."""
    if hasattr(samples, "to_numpy"):
        samples = samples.to_numpy()
    if isinstance(samples, np.ndarray) and samples.ndim == 2 and samples.shape[1] == 1:
        samples = samples[:, 0]
    if isinstance(samples, np.ndarray) and samples.ndim == 4:
        raise DataError("got one clip [T, H, W, 3] where a list of clips is expected; wrap it in a list")
    return list(samples) if hasattr(samples, "__iter__") else []


def read_clips(clips: Sequence[Any], space: Space, *, batch: int, workers: int, progress: bool) -> Iterator[list[ReadClip]]:
    """Reads clips in order, ``batch`` at a time: while one batch is used, the next is being read."""
    blocks = [range(start, min(start + batch, len(clips))) for start in range(0, len(clips), batch)]
    with ThreadPoolExecutor(workers or available_cores()) as pool:

        def submit(block: range) -> list[Any]:
            return [pool.submit(read_clip, clips[number], number, space) for number in block]

        coming = submit(blocks[0]) if blocks else []
        for place in track(range(len(blocks)), "reading clips", unit=batch, total=len(clips), disable=not progress):
            current, coming = coming, submit(blocks[place + 1]) if place + 1 < len(blocks) else []
            yield [future.result() for future in current]


def read_clip(clip: Any, number: int, space: Space) -> ReadClip:
    """Reads one clip; what is wrong with a file or an array is part of the result, never an exception."""
    name = os.fspath(clip) if isinstance(clip, (str, os.PathLike)) else f"clip {number}"
    try:
        raw = _decode(clip, space) if isinstance(clip, (str, os.PathLike)) else _sample(clip, name, space)
        return ReadClip(name, raw, _digest(raw))
    except (DataError, OSError) as error:
        return ReadClip(name, None, "", str(error))
    except Exception as error:  # damaged files find their way into every corner of a decoder
        return ReadClip(name, None, "", f"cannot read {name!r}: unexpected {type(error).__name__} ({error})")


def _decode(path: str | os.PathLike[str], space: Space) -> RawClip:
    further = [name for name in space.modalities if name not in ("rgb", "flow")]
    extra: dict[str, str] = {}
    if further and not is_remote(path):
        local = Path(plain(path))
        found = beside(local.parent, local.name, further)
        extra = {name: str(local.parent / file) for name, file in found.items() if file}
    return decode_clip(path, modalities=space.modalities, extra=extra, **space.decoding)  # type: ignore[arg-type]


def _sample(clip: Any, name: str, space: Space) -> RawClip:
    """``T`` frames of a decoded clip, as they would be taken from its file.

    Flow is computed where it is not given: from ``luma`` uint8 ``[T, H, W]``, as a decoder gives it, or else from the colours. (These lose
    a grey level to rounding, which the flow of near-still pictures feels.)
    """
    given = dict(clip) if isinstance(clip, Mapping) else {"rgb": clip}
    arrays = {key: np.asarray(array) for key, array in given.items() if key in space.modalities}
    lengths = {key: len(array) for key, array in arrays.items() if array.ndim >= 3}
    if len(lengths) != len(arrays) or 0 in lengths.values():
        raise DataError(f"{name}: { ({key: list(array.shape) for key, array in arrays.items()}) } holds no frames; {_ACCEPTED}")
    rgb = arrays.get("rgb")
    if rgb is not None and (rgb.dtype != np.uint8 or rgb.ndim != 4 or rgb.shape[-1] != 3):
        raise DataError(f"{name}: rgb is {rgb.dtype} {list(rgb.shape)}, expected uint8 [T, H, W, 3]")
    if not arrays:
        raise DataError(f"{name} has none of the modalities {', '.join(space.modalities)}; {_ACCEPTED}")
    result = RawClip()
    frames, side = space.decoding["frames"], space.decoding["short_side"]
    for key, array in arrays.items():
        taken = array[segment_indices(len(array), frames)]
        result[key] = _shrink(taken, side) if key == "rgb" else taken
    luma = given.get("luma", rgb)
    if luma is not None and "flow" in space.modalities and "flow" not in result:
        result["flow"] = flow_of(luma, segment_indices(len(luma), frames), side)
    return result


def _shrink(frames: np.ndarray, short_side: int) -> np.ndarray:
    size = scaled_size(frames.shape[2], frames.shape[1], short_side)
    return np.stack([resize(np.ascontiguousarray(frame), size) for frame in frames])


def flow_of(pictures: np.ndarray, index: np.ndarray, short_side: int) -> np.ndarray:
    """Flow float16 ``[T, H, W, 2]`` from the pictures at ``index`` to the ones after them; uint8 ``[n, H, W]`` or ``[n, H, W, 3]``."""
    first = np.clip(index, 0, max(len(pictures) - 2, 0))
    second = np.minimum(first + 1, len(pictures) - 1)
    grey = _shrink(pictures[np.concatenate([first, second])], short_side)
    if grey.ndim == 4:
        grey = np.stack([cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in grey])
    pairs = len(first)
    return np.stack([dis_flow(grey[t], grey[pairs + t]) for t in range(pairs)]).astype(np.float16)


def _digest(raw: RawClip) -> str:
    """SHA-256 (hex) of a clip's decoded frames: the same video under another name, or in another container, has the same."""
    names = ["rgb"] if "rgb" in raw else sorted(raw)
    digest = hashlib.sha256()
    for name in names:
        array = np.ascontiguousarray(raw[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
