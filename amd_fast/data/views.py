"""What is shown of a clip: the square that is cut out, its size, its colours and their scale, drawn once and applied to all modalities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from amd_fast.data.augment import ColourChange, change_colour, draw_colour, draw_speed
from amd_fast.errors import ConfigError, DataError

RESIZE_RATIO = 8 / 7
"""Short side of the decoded frames over the side of the crop, as 256 is to 224."""
FLOW_UNIT = 1 / 56
"""Displacement that counts as 1, as a share of the picture's side."""
FLOW_LIMIT = 5.0
"""Largest displacement kept, in units."""
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
_NORMALISED = np.arange(256, dtype=np.float32) * (1 / (255 * IMAGENET_STD[:, None])) - IMAGENET_MEAN[:, None] / IMAGENET_STD[:, None]
"""What each of the 256 values becomes, per channel."""
_STATISTICS_PIXELS = 4096  # per frame, at most, that median and standard deviation are taken from


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
        picked = slice(None) if index is None else frames  # nothing is copied where all are taken
        result = {}
        for name in (name for name in self.modalities if name in raw):
            if name in _VIDEO:
                cut = _cut(raw[name], picked, view, self.size)
                result[name] = torch.from_numpy(_VIDEO[name](cut[:, :, ::-1] if view.mirrored else cut, self.size / view.side, view))
            else:
                result[name] = torch.from_numpy(_sensor(raw[name], frames, view.box, self.size, view.mirrored))
        return result


def _cut(array: np.ndarray, frames: np.ndarray | slice, view: View, size: int) -> np.ndarray:
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
    for picture, planes in zip(pixels, result, strict=True):
        for values, table, plane in zip(cv2.split(picture), _NORMALISED, planes, strict=True):
            cv2.LUT(values, table, dst=plane)
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
