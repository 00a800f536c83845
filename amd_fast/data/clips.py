"""From a video file to what the network sees: sample frames, decode, compute flow, crop, flip, normalise.

Two steps, so that decoded clips can be kept in memory and augmented anew each time: ``decode_clip`` gives a ``RawClip`` of plain
arrays, ``ClipTransform`` turns it into float32 tensors ``[T, channels, size, size]``, one per modality:

* ``rgb``: ImageNet mean and standard deviation taken out, 3 channels;
* ``flow``: from frame t to t + 1 (x, y), 2 channels, in units of ``FLOW_UNIT`` (1/56) of the picture's side per frame, which is
  pixels / 4 at 224 x 224, and the same number for the same motion at any size; clipped to +-5 units (20 pixels at 224, the field's habit);
* any further modality: median taken out and divided by the standard deviation, per clip and channel, over the whole picture, so
  that sensors of any unit come in the same range.

A modality a clip lacks is absent from the mapping.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from amd_fast.data.decoders import DECODERS, choose_decoder
from amd_fast.data.flow import DEFAULT_PRESET, FlowPreset, dis_flow
from amd_fast.data.flow_folder import read_flow_folder
from amd_fast.data.readers import ClipReader, open_clip
from amd_fast.data.sampling import segment_indices
from amd_fast.data.views import FLOW_UNIT, RESIZE_RATIO, ClipTransform, RawClip, View
from amd_fast.errors import ConfigError, DataError
from amd_fast.storage import lease

__all__ = ["FLOW_UNIT", "RESIZE_RATIO", "ClipTransform", "RawClip", "View", "decode_clip", "decode_draws", "read_clip", "segment_indices"]

PathLike = str | os.PathLike[str]


def decode_clip(
    path: PathLike,
    frames: int,
    *,
    short_side: int,
    modalities: Sequence[str],
    extra: Mapping[str, PathLike] | None = None,
    rng: np.random.Generator | None = None,
    frame_count: int | None = None,
    flow_preset: FlowPreset = DEFAULT_PRESET,
) -> RawClip:
    """Sample and decode a clip.

    Args:
        path: video file.
        frames: frames T to sample, one per segment of the video (see ``segment_indices``).
        short_side: pixels of the frames' shorter side.
        modalities: which to read: "rgb", "flow", and names of ``extra``; names missing there are absent from the result.
        extra: ``.npy`` files of further modalities, ``[n, h, w]`` or ``[n, h, w, c]``, covering the same time span as the video with
            any number n of frames. Made smaller if their shorter side exceeds ``short_side``. Under "flow" a folder of precomputed
            flow, see ``flow_folder``, which is then read and not computed.
        rng: source of random offsets inside the segments (training), or None for their centres.
        frame_count: number of frames in the video, if known; spares counting them, and opening the video where only ``extra`` is read.
        flow_preset: speed against accuracy, see ``dis_flow``.

    Raises:
        DecodeError: the video cannot be decoded.
        DataError: a ``.npy`` file cannot be used, or an argument is out of range; names the file and the remedy.
    """
    [clip] = decode_draws(
        path,
        frames,
        [rng],
        short_side=short_side,
        modalities=modalities,
        extra=extra,
        frame_count=frame_count,
        flow_preset=flow_preset,
    )
    return clip


def decode_draws(
    path: PathLike,
    frames: int,
    draws: Sequence[np.random.Generator | None],
    *,
    short_side: int,
    modalities: Sequence[str],
    extra: Mapping[str, PathLike] | None = None,
    frame_count: int | None = None,
    flow_preset: FlowPreset = DEFAULT_PRESET,
) -> list[RawClip]:
    """Sample a clip several times, in one pass over its file: every wanted frame is decoded once, whichever draws want it.

    Args:
        path, frames, short_side, modalities, extra, frame_count, flow_preset: as for :func:`decode_clip`.
        draws: at least one source of randomness, as ``rng`` of :func:`decode_clip`.

    Returns:
        One clip per draw, equal to what :func:`decode_clip` gives for it.

    Raises:
        DecodeError, DataError: as :func:`decode_clip`.
    """
    if min(frames, short_side, 1 if frame_count is None else frame_count) < 1:
        got = f"got {frames=}, {short_side=}, {frame_count=}"
        raise DataError(f"clip {os.fspath(path)!r}: frames, short_side and frame_count must be at least 1, {got}")
    wanted = dict.fromkeys(modalities)
    files = {name: file for name, file in (extra or {}).items() if name in wanted}
    flow_folder = files.pop("flow", None)
    if flow_folder is not None:
        del wanted["flow"]
    arrays: dict[str, np.ndarray] = {}
    if frame_count is None or "rgb" in wanted or "flow" in wanted:
        with open_clip(path) as reader:
            frame_count = frame_count or reader.frame_count
            index = _sampled(frame_count, frames, draws)
            arrays.update(_read_video(reader, index, frame_count, short_side, wanted, flow_preset))
    else:
        index = _sampled(frame_count, frames, draws)
    if flow_folder is not None:
        size = arrays["rgb"].shape[2:0:-1] if "rgb" in arrays else None
        arrays["flow"] = read_flow_folder(flow_folder, index, short_side=short_side, size=size)
    for name, file in files.items():
        arrays[name] = read_array(file, name, (index + 0.5) / frame_count, short_side)
    starts = range(0, len(index), frames)
    return [RawClip({name: array[start : start + frames] for name, array in arrays.items()}) for start in starts]


def _sampled(frame_count: int, frames: int, draws: Sequence[np.random.Generator | None]) -> np.ndarray:
    return np.concatenate([segment_indices(frame_count, frames, rng) for rng in draws])


def _read_video(
    reader: ClipReader, index: np.ndarray, frame_count: int, short_side: int, wanted: Mapping[str, None], flow_preset: FlowPreset
) -> dict[str, np.ndarray]:
    first = np.clip(index, 0, max(frame_count - 2, 0)) if "flow" in wanted else index[:0]  # the last frame has no successor: (t-1, t)
    first, pair_of = np.unique(first, return_inverse=True)  # frames repeat in short clips and between draws
    pictures = index if "rgb" in wanted else index[:0]
    decoded = reader.frames(np.concatenate([pictures, first, first + 1]))
    count, pairs = len(pictures), len(first)
    result = {}
    if count:
        result["rgb"] = reader.pixels(decoded[:count], short_side=short_side)
    if pairs:
        grey = reader.pixels(decoded[count:], short_side=short_side, pixel_format="gray")
        flows = [dis_flow(grey[t], grey[pairs + t], preset=flow_preset) for t in range(pairs)]
        halves = torch.from_numpy(np.stack(flows)).half().numpy()  # faster than numpy, which rounds the same
        result["flow"] = halves[pair_of]
    return result


def read_array(path: PathLike, name: str, moments: np.ndarray, short_side: int) -> np.ndarray:
    """Frames of a further modality at moments given as shares (0 to 1) of the time span; see :func:`decode_clip` for the file."""
    array = _open_array(path, name)
    picked = np.minimum((moments * len(array)).astype(np.int64), len(array) - 1)
    taken = np.asarray(array[picked])
    taken = taken if taken.dtype == np.float16 else taken.astype(np.float32)
    height, width = taken.shape[1:3]
    if min(height, width) <= short_side:
        return taken
    size = (max(1, round(width * short_side / min(height, width))), max(1, round(height * short_side / min(height, width))))
    shrunk = [cv2.resize(frame.astype(np.float32), size, interpolation=cv2.INTER_AREA) for frame in taken]
    return np.stack(shrunk).reshape(len(taken), size[1], size[0], *taken.shape[3:]).astype(taken.dtype)


def _open_array(path: PathLike, name: str) -> np.ndarray:
    where = f"modality {name!r}: {os.fspath(path)!r}"
    remedy = "store it with numpy.save as numbers [frames, h, w] or [frames, h, w, channels], or clear the clip's entry for this modality"
    try:
        with lease(path) as file:  # mapped, the file stays readable even where the cache drops it
            array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{where} cannot be read ({error}); {remedy}") from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{where} holds several arrays; {remedy}")
    if array.ndim not in (3, 4) or 0 in array.shape or array.dtype.kind not in "buif":
        raise DataError(f"{where} has shape {list(array.shape)} and type {array.dtype}; {remedy}")
    return array


def read_clip(
    path: PathLike,
    frames: int = 8,
    size: int = 224,
    modalities: Sequence[str] = ("rgb",),
    decoder: str = "auto",
    *,
    extra: Mapping[str, PathLike] | None = None,
    train: bool = False,
    flip: bool = False,
    rng: np.random.Generator | None = None,
) -> dict[str, Tensor]:
    """Read one clip, ready for the network.

    Args:
        path: video file.
        frames: frames T, one per segment of the video: at its centre in test, at random inside it in training.
        size: side of the square pictures, pixels.
        modalities: "rgb", "flow", and names of ``extra``.
        decoder: "auto", "dali" (on the GPU where there is one) or "pyav" (FFmpeg on the CPU); auto takes PyAV, which has read a single
            clip before DALI has started.
        extra: ``.npy`` file of each further modality, see ``decode_clip``.
        train: random frames and crops, else centres.
        flip: in training, mirror half of the clips.
        rng: source of randomness in training; a fresh one if None.

    Returns:
        ``{modality: float32 [T, channels, size, size]}`` in the order of ``modalities``; see the module's text for the values.

    Raises:
        DecodeError: the video cannot be decoded; names the file and the remedy.
        DataError: a further modality's file is not given or cannot be used.
        ImplementationError: the decoder cannot run here.
        ConfigError: no such decoder, or ``size`` out of range.
    """
    if decoder not in DECODERS:
        raise ConfigError(f"unknown decoder {decoder!r}; choose one of {', '.join(map(repr, DECODERS))}")
    missing = [name for name in modalities if name not in ("rgb", "flow") and name not in (extra or {})]
    if missing:
        raise DataError(
            f"no file for modality {missing[0]!r} of {os.fspath(path)!r}; 'rgb' and 'flow' come from the video, "
            f"others need extra={{{missing[0]!r}: 'file.npy'}}"
        )
    transform = ClipTransform(size, modalities, train=train, flip=flip)
    randomness = (rng or np.random.default_rng()) if train else None
    if decoder == "dali":
        return _read_with_dali(path, frames, transform, rng=randomness, extra=extra or {})
    raw = decode_clip(path, frames, short_side=round(size * RESIZE_RATIO), modalities=modalities, extra=extra, rng=randomness)
    return transform(raw, randomness)


def _read_with_dali(path: PathLike, frames: int, transform: ClipTransform, **job: Any) -> dict[str, Tensor]:
    from amd_fast.data.dali import ClipJob, DaliDecoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with open_clip(path) as reader:
        choose_decoder(getattr(reader, "codec", None), "dali", device)
    with DaliDecoder(transform.modalities, frames, transform.size, device=device, threads=1, batch_size=1) as decoder:
        (clip,) = decoder.load([ClipJob(path, transform, **job)])
    if isinstance(clip, DataError):
        raise clip
    return {name: tensor.cpu() for name, tensor in clip.items()}
