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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from amd_fast.data.augment import ColourChange, change_colour, draw_colour, draw_speed
from amd_fast.data.flow import FlowPreset, dis_flow
from amd_fast.data.flow_folder import read_flow_folder
from amd_fast.data.readers import ClipReader, open_clip
from amd_fast.data.sampling import segment_indices
from amd_fast.errors import ConfigError, DataError, ImplementationError
from amd_fast.storage import lease

__all__ = ["FLOW_UNIT", "RESIZE_RATIO", "ClipTransform", "RawClip", "View", "decode_clip", "decode_draws", "read_clip", "segment_indices"]

RESIZE_RATIO = 8 / 7
"""Short side of the decoded frames over the side of the crop, as 256 is to 224."""
FLOW_UNIT = 1 / 56
"""Displacement that counts as 1, as a share of the picture's side."""
FLOW_LIMIT = 5.0
"""Largest displacement kept, in units."""
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
_STATISTICS_PIXELS = 4096  # per frame, at most, that median and standard deviation are taken from

PathLike = str | os.PathLike[str]


class RawClip(dict[str, np.ndarray]):
    """Decoded, untransformed frames of one clip: a dict from modality to array, all with the same number of frames T first.

    ``rgb`` uint8 ``[T, H, W, 3]``; ``flow`` float16 ``[T, H, W, 2]``, pixels of this resolution per frame, (x, y);
    others float16 or float32 ``[T, h, w]`` or ``[T, h, w, c]``, of the same field of view. Modalities the clip lacks are absent.
    """

    @property
    def frames(self) -> int:
        """Number of frames T; 0 where no modality is present."""
        return next((len(array) for array in self.values()), 0)

    @property
    def nbytes(self) -> int:
        """Memory held by the arrays, bytes."""
        return sum(array.nbytes for array in self.values())


def decode_clip(
    path: PathLike,
    frames: int,
    *,
    short_side: int,
    modalities: Sequence[str],
    extra: Mapping[str, PathLike] | None = None,
    rng: np.random.Generator | None = None,
    frame_count: int | None = None,
    flow_preset: FlowPreset = "medium",
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
    flow_preset: FlowPreset = "medium",
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
        result["flow"] = np.stack(flows).astype(np.float16)[pair_of]
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


@dataclass(frozen=True, slots=True)
class View:
    """What is shown of one clip: everything that is random about it, drawn once and the same for all decoders and modalities.

    Attributes:
        height, width: of the upright picture that the square is cut from, pixels.
        left, top, side: the square, pixels of that picture.
        mirrored: whether left and right are swapped.
        colour: the change of colours, None for none.
        speed: factor on the flow.
    """

    height: int
    width: int
    left: int
    top: int
    side: int
    mirrored: bool = False
    colour: ColourChange | None = None
    speed: float = 1.0

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, width and height of the square as shares of the picture."""
        return self.left / self.width, self.top / self.height, self.side / self.width, self.side / self.height


class ClipTransform:
    """Crop, flip and normalise a ``RawClip``: the same cut for all its frames, at proportional places for all its modalities.

    In training a random square (its side a random share of the picture's shorter side) is resized to ``size``; in test the centre
    square. Flow follows: resized by a factor, its vectors are multiplied by it; mirrored, its x component changes sign.

    Args:
        size: side of the result, pixels.
        modalities: which to give, in order; those a clip lacks are left out.
        train: random crops, else the centre.
        flip: in training, mirror half of the clips. Leave off where mirrored actions are different classes.
        scale: in training, range of the square's side as a share of the shorter side.
        colour: in training, strength of colour jitter, see :func:`~amd_fast.data.augment.draw_colour`; 0: none.
        speed: in training, the flow is multiplied by a random factor in ``[1 / speed, speed]``; 1: none.
        resize_ratio: in test, shorter side over the square's side.
        place: in test, instead of the centre, the largest square at this place along the longer side, 0 (left or top) to 1.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        size: int,
        modalities: Sequence[str],
        *,
        train: bool,
        flip: bool = False,
        scale: tuple[float, float] = (0.7, 1.0),
        colour: float = 0.0,
        speed: float = 1.0,
        resize_ratio: float = RESIZE_RATIO,
        place: float | None = None,
    ) -> None:
        if size < 1 or not 0 < scale[0] <= scale[1] <= 1 or resize_ratio < 1 or colour < 0 or speed < 1:
            needs = "size >= 1, 0 < scale[0] <= scale[1] <= 1, resize_ratio >= 1, colour >= 0 and speed >= 1"
            raise ConfigError(f"a clip transform needs {needs}, got {size=}, {scale=}, {resize_ratio=}, {colour=}, {speed=}")
        self.size, self.modalities, self.train, self.flip = size, tuple(modalities), train, flip
        self.scale, self.resize_ratio, self.place, self.colour, self.speed = scale, resize_ratio, place, colour, speed

    def __call__(
        self, raw: RawClip, rng: np.random.Generator | None = None, index: Sequence[int] | np.ndarray | None = None
    ) -> dict[str, Tensor]:
        """Transform one clip.

        Args:
            raw: the decoded clip; not changed.
            rng: source of the random crop; needed in training, not used in test.
            index: positions of the frames to take, where ``raw`` holds more than needed.

        Returns:
            ``{modality: float32 [T, channels, size, size]}``, contiguous.

        Raises:
            ConfigError: training without ``rng``.
            DataError: ``index`` lies outside the clip.
        """
        present = [name for name in self.modalities if name in raw]
        if not present:
            return {}
        leading = next((name for name in ("rgb", "flow") if name in raw), present[0])
        height, width = raw[leading].shape[1:3]
        return self.apply(raw, self.draw(height, width, rng), index)

    def draw(self, height: int, width: int, rng: np.random.Generator | None = None) -> View:
        """Decides everything that is random about one clip, so that every decoder does the same to it.

        Args:
            height, width: of the upright picture after its resize to the short side, pixels.
            rng: source of randomness; needed in training, not used in test. Which numbers are taken depends on the settings alone,
                not on the clip.

        Raises:
            ConfigError: training without ``rng``.
        """
        shorter = min(height, width)
        if not self.train and self.place is not None:
            return View(height, width, round((width - shorter) * self.place), round((height - shorter) * self.place), shorter)
        if not self.train:
            side = max(1, round(shorter / self.resize_ratio))
            return View(height, width, (width - side) // 2, (height - side) // 2, side)
        if rng is None:
            raise ConfigError("random crops need a source of randomness; pass rng=numpy.random.default_rng(seed), or use train=False")
        share, x, y, coin = rng.random(4)  # always four numbers, so that settings do not shift the stream
        low, high = self.scale
        side = max(1, round(shorter * (low + (high - low) * share)))
        return View(
            height,
            width,
            left=int(x * (width - side + 1)),
            top=int(y * (height - side + 1)),
            side=side,
            mirrored=bool(self.flip and coin < 0.5),
            colour=draw_colour(self.colour, rng) if self.colour > 0 and "rgb" in self.modalities else None,
            speed=draw_speed(self.speed, rng) if self.speed > 1 and "flow" in self.modalities else 1.0,
        )

    def apply(self, raw: RawClip, view: View, index: Sequence[int] | np.ndarray | None = None) -> dict[str, Tensor]:
        """Transforms one clip as decided; arguments, result and errors as in a call."""
        frames = np.arange(raw.frames) if index is None else np.asarray(index, dtype=np.int64)
        if frames.size and not (frames.min() >= 0 and frames.max() < raw.frames):
            raise DataError(f"the clip holds {raw.frames} frames, got index {frames.tolist()}; decode more frames or sample fewer")
        result = {}
        for name in (name for name in self.modalities if name in raw):
            if name in _VIDEO:
                cut = _cut(raw[name], frames, view, self.size)
                result[name] = torch.from_numpy(_VIDEO[name](cut[:, :, ::-1] if view.mirrored else cut, self.size / view.side, view))
            else:
                result[name] = torch.from_numpy(_sensor(raw[name], frames, view.box, self.size, view.mirrored))
        return result


def _cut(array: np.ndarray, frames: np.ndarray, view: View, size: int) -> np.ndarray:
    """The view's square of the given frames, resized to ``size``: ``[T, size, size, channels]``."""
    cut = array[frames, view.top : view.top + view.side, view.left : view.left + view.side]
    if view.side == size:
        return cut
    if cut.dtype == np.float16:
        cut = cut.astype(np.float32)
    method = cv2.INTER_AREA if view.side > size else cv2.INTER_LINEAR
    return np.stack([cv2.resize(frame, (size, size), interpolation=method) for frame in cut])


def _normalise_rgb(pixels: np.ndarray, factor: float, view: View) -> np.ndarray:
    result = np.empty((len(pixels), 3, *pixels.shape[1:3]), dtype=np.float32)
    planes = pixels.transpose(0, 3, 1, 2)
    for channel in range(3):  # a scalar factor per plane keeps numpy in its vectorised loop
        np.multiply(planes[:, channel], 1 / (255 * IMAGENET_STD[channel]), out=result[:, channel])
        result[:, channel] -= IMAGENET_MEAN[channel] / IMAGENET_STD[channel]
    return result if view.colour is None else change_colour(result, view.colour)


def _normalise_flow(vectors: np.ndarray, factor: float, view: View) -> np.ndarray:
    units = factor / (FLOW_UNIT * vectors.shape[1])
    result = np.empty((len(vectors), 2, *vectors.shape[1:3]), dtype=np.float32)
    planes = vectors.transpose(0, 3, 1, 2)
    np.multiply(planes[:, 0], np.float32(-units if view.mirrored else units), out=result[:, 0])
    np.multiply(planes[:, 1], np.float32(units), out=result[:, 1])
    np.clip(result, -FLOW_LIMIT, FLOW_LIMIT, out=result)
    return result if view.speed == 1 else result * np.float32(view.speed)


_VIDEO: dict[str, Callable[[np.ndarray, float, View], np.ndarray]] = {"rgb": _normalise_rgb, "flow": _normalise_flow}


def _sensor(array: np.ndarray, frames: np.ndarray, box: tuple[float, float, float, float], size: int, mirrored: bool) -> np.ndarray:
    """Cut a box (left, top, width, height as shares of the picture) out of a further modality, and standardise it.

    Sensors can be tiny (24 x 32), so the box is kept to fractions of a pixel. Missing values (not finite) count as the median.
    """
    pictures = array if array.ndim == 4 else array[..., None]
    height, width, channels = pictures.shape[1:]
    centre, spread = _location_and_spread(pictures)
    left, top, box_width, box_height = box[0] * width, box[1] * height, box[2] * width / size, box[3] * height / size
    # Output pixel i has its centre at i + 1/2; mirrored, it is read from the other end.
    to_input = np.array([[box_width, 0, left + box_width / 2 - 0.5], [0, box_height, top + box_height / 2 - 0.5]])
    if mirrored:
        to_input[0] = [-box_width, 0, left + (size - 0.5) * box_width - 0.5]
    result = np.empty((len(frames), channels, size, size), dtype=np.float32)
    for t, frame in enumerate(frames):
        values = (pictures[frame].astype(np.float32) - centre) / spread
        np.nan_to_num(values, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        for channel in range(channels):
            result[t, channel] = cv2.warpAffine(
                values[..., channel], to_input, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
            )
    return result


def _location_and_spread(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and standard deviation per channel over a clip; 0 and 1 where a channel holds no finite value, 1 for a constant one."""
    step = max(1, int(np.ceil(np.sqrt(pictures.shape[1] * pictures.shape[2] / _STATISTICS_PIXELS))))
    sample = pictures[:, ::step, ::step].reshape(-1, pictures.shape[3]).astype(np.float64)
    centre, spread = np.zeros(sample.shape[1], np.float32), np.ones(sample.shape[1], np.float32)
    for channel, values in enumerate(sample.T):
        finite = values[np.isfinite(values)]
        if finite.size:
            centre[channel] = np.median(finite)
            spread[channel] = finite.std() or 1.0
    return centre, spread


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
        decoder: "auto" or "pyav" (FFmpeg on the CPU).
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
    _check_decoder(decoder)
    missing = [name for name in modalities if name not in _VIDEO and name not in (extra or {})]
    if missing:
        raise DataError(
            f"no file for modality {missing[0]!r} of {os.fspath(path)!r}; 'rgb' and 'flow' come from the video, "
            f"others need extra={{{missing[0]!r}: 'file.npy'}}"
        )
    transform = ClipTransform(size, modalities, train=train, flip=flip)
    randomness = (rng or np.random.default_rng()) if train else None
    raw = decode_clip(path, frames, short_side=round(size * RESIZE_RATIO), modalities=modalities, extra=extra, rng=randomness)
    return transform(raw, randomness)


def _check_decoder(decoder: str) -> None:
    if decoder == "dali":
        raise ImplementationError("decoder 'dali' is not built yet in this version; use decoder='auto' or 'pyav'")
    if decoder not in ("auto", "pyav"):
        raise ConfigError(f"unknown decoder {decoder!r}; choose 'auto' or 'pyav'")
