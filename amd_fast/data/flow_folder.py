"""Precomputed optical flow, as video toolboxes leave it on disk: numbered grey pictures of x and of y.

A picture's value v, 0 to 255, stands for a displacement of ``(2 v / 255 - 1) * FLOW_BOUND`` pixels a frame, of the picture itself: x to
the right, y downwards, from its frame to the next; 127 and 128 are next to no motion. Layouts, in a folder per clip:

* two folders of pictures, ``flow_x`` and ``flow_y`` (or ``x`` and ``y``, ``u`` and ``v``);
* one folder with ``flow_x_00001.jpg`` and ``flow_y_00001.jpg`` (or ``x_00001.jpg`` and ``y_00001.jpg``, and so on).

The n-th flow is the n-th pair by number, wherever the numbers start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import cv2
import numpy as np

from amd_fast.data.pixels import resize, scaled_size
from amd_fast.errors import DataError

FLOW_BOUND = 20.0
"""Displacement that the brightest grey level stands for, pixels a frame: what the extractors clip to."""

_AXES = {"x": "x", "u": "x", "y": "y", "v": "y"}
_FOLDER = re.compile(r"(?:flow)?[_-]?([xyuv])", re.IGNORECASE)
_PICTURE = re.compile(r"(?:(?:flow)?[_-]?([xyuv])[_-]?|.*?)(\d+)\.(?:jpe?g|png)", re.IGNORECASE | re.DOTALL)


def flow_count(path: str | os.PathLike[str]) -> int:
    """Number of flows in a folder; a clip of n frames has n - 1, or n with the last repeated.

    Raises:
        DataError: as :func:`read_flow_folder`.
    """
    return len(_pairs(os.fspath(path)))


def read_flow_folder(
    path: str | os.PathLike[str],
    index: Iterable[int],
    *,
    short_side: int | None = None,
    size: tuple[int, int] | None = None,
    bound: float = FLOW_BOUND,
) -> np.ndarray:
    """Reads precomputed flow.

    Args:
        path: folder of one clip.
        index: positions of the frames whose flow to the next is wanted, in any order; one past the end gives the last.
        short_side: pixels of the result's shorter side; None for the size as stored.
        size: width and height of the result instead, where it has to fit pictures that are there already.
        bound: displacement the brightest grey level stands for, pixels of the stored picture.

    Returns:
        float16 ``[T, h, w, 2]``: (x, y), pixels of this resolution a frame, as in a ``RawClip``.

    Raises:
        DataError: no such folder, no pairs of pictures, a picture that cannot be decoded, or pictures of different sizes.
    """
    folder = os.fspath(path)
    pairs = _pairs(folder)
    positions = [min(int(i), len(pairs) - 1) for i in index]
    if positions and min(positions) < 0:
        raise _error(folder, f"flow {min(positions)} was asked for", "flows count from 0")
    read = {i: [_grey(name) for name in pairs[i]] for i in dict.fromkeys(positions)}
    sizes = {picture.shape for pair in read.values() for picture in pair}
    if len(sizes) > 1:
        raise _error(folder, f"its pictures differ in size ({', '.join(f'{w} x {h}' for h, w in sorted(sizes))})", "extract the flow again")
    flows = {i: _vectors(np.stack(pair, axis=-1), size, short_side, bound) for i, pair in read.items()}
    return np.stack([flows[i] for i in positions])


def _vectors(pictures: np.ndarray, size: tuple[int, int] | None, short_side: int | None, bound: float) -> np.ndarray:
    vectors = pictures.astype(np.float32) * np.float32(2 * bound / 255) - np.float32(bound)
    height, width = vectors.shape[:2]
    target = size or scaled_size(width, height, short_side)
    factors = np.array([target[0] / width, target[1] / height], dtype=np.float32)
    return (resize(vectors, target) * factors).astype(np.float16)


def _pairs(folder: str) -> list[tuple[str, str]]:
    """Files of x and y, in order of their numbers."""
    series = _series(folder)
    common = sorted(series["x"].keys() & series["y"].keys())
    if not common:
        raise _error(
            folder,
            f"it holds no pairs of flow pictures ({len(series['x'])} of x, {len(series['y'])} of y)",
            "expected flow_x and flow_y folders of numbered JPEGs, or flow_x_00001.jpg and flow_y_00001.jpg side by side",
        )
    odd = sorted(series["x"].keys() ^ series["y"].keys())
    if odd:
        raise _error(folder, f"picture {odd[0]} has x or y alone", "copy or extract the flow again")
    return [(series["x"][number], series["y"][number]) for number in common]


def _series(folder: str) -> dict[str, dict[int, str]]:
    series: dict[str, dict[int, str]] = {"x": {}, "y": {}}
    for name in _listed(folder):
        if (axis := _FOLDER.fullmatch(name)) and os.path.isdir(os.path.join(folder, name)):
            inside = os.path.join(folder, name)
            numbered = ((found, file) for file in _listed(inside) if (found := _PICTURE.fullmatch(file)))
            series[_AXES[axis[1].lower()]] |= {int(found[2]): os.path.join(inside, file) for found, file in numbered}
        elif (found := _PICTURE.fullmatch(name)) and found[1]:
            series[_AXES[found[1].lower()]][int(found[2])] = os.path.join(folder, name)
    return series


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise _error(folder, f"the folder cannot be read ({error.strerror})", "check the path") from error


def _grey(name: str) -> np.ndarray:
    try:
        picture = cv2.imdecode(np.fromfile(name, np.uint8), cv2.IMREAD_GRAYSCALE)
    except (OSError, cv2.error):
        picture = None
    if picture is None:
        raise _error(os.path.dirname(name), f"{os.path.basename(name)!r} cannot be decoded", "copy or extract the flow again")
    return picture


def _error(folder: str, reason: str, remedy: str) -> DataError:
    return DataError(f"cannot read flow from {folder!r}: {reason}; {remedy}")
