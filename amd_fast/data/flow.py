"""Optical flow on the CPU: dense inverse search (Kroeger et al., ECCV 2016) as implemented by OpenCV."""

from __future__ import annotations

from typing import Any, Literal, get_args

import cv2
import numpy as np

from amd_fast.errors import DataError

FlowPreset = Literal["ultrafast", "fast", "balanced", "medium"]
DEFAULT_PRESET: FlowPreset = "balanced"
"""Of all flow that is computed on the CPU: "medium" where frames are small, otherwise nearly as accurate in less than half of the time."""

_PRESETS: dict[str, int] = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "balanced": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,  # with what _solver changes
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}
_SAFE_SIDE = 32
_LARGE_SIDE = 128  # smaller pictures need every patch, and cost little
_MIN_SIDE = 16  # below this the coarsest level of the search holds no whole 8 x 8 patch


def dis_flow(first: np.ndarray, second: np.ndarray, *, preset: FlowPreset = DEFAULT_PRESET) -> np.ndarray:
    """Optical flow that carries ``first`` to ``second``: ``second[y + v, x + u]`` shows what ``first[y, x]`` shows.

    Args:
        first: the earlier frame, uint8 ``[h, w]`` (grey) or ``[h, w, 3]`` (RGB), both sides at least 16.
        second: the later frame, same shape.
        preset: "ultrafast", "fast", "balanced" or "medium": slower is more accurate. All but "balanced" are OpenCV's own.

    Returns:
        float32 ``[h, w, 2]``: (u, v), the displacement in x (to the right) and y (downwards), in pixels of the given frames.

    Raises:
        DataError: frames of unequal shape, another dtype or layout, too small, or an unknown preset.
    """
    if preset not in _PRESETS:
        raise DataError(f"unknown optical flow preset {preset!r}; choose one of {', '.join(get_args(FlowPreset))}")
    if first.shape != second.shape:
        raise DataError(f"optical flow needs two frames of equal shape, got {first.shape} and {second.shape}")
    # The search starts from zero, not from a given flow: the result depends on these two frames alone.
    height, width = first.shape[:2]
    flow: np.ndarray = _solver(preset, min(height, width)).calc(_padded(_grey(first)), _padded(_grey(second)), None)
    return np.ascontiguousarray(flow[:height, :width])


def _solver(preset: FlowPreset, side: int) -> Any:
    """A new solver each time: small frames make OpenCV change a solver's patches and scales for all calls that follow."""
    solver: Any = cv2.DISOpticalFlow.create(_PRESETS[preset])
    if preset == "balanced" and side >= _LARGE_SIDE:  # as fine as "medium", but fewer patches, steps for each, and rounds of smoothing
        solver.setPatchStride(4)
        solver.setGradientDescentIterations(12)
        solver.setVariationalRefinementIterations(2)
    return solver


def _padded(grey: np.ndarray) -> np.ndarray:
    """Repeats the last row or column of small and narrow pictures: OpenCV reads beyond the end of theirs at the coarse levels."""
    height, width = grey.shape
    least = max(_SAFE_SIDE, max(height, width) // 4)
    below, right = max(0, least - height), max(0, least - width)
    return cv2.copyMakeBorder(grey, 0, below, 0, right, cv2.BORDER_REPLICATE) if below or right else grey


def _grey(frame: np.ndarray) -> np.ndarray:
    if frame.dtype != np.uint8 or frame.ndim not in (2, 3) or (frame.ndim == 3 and frame.shape[2] != 3):
        raise DataError(f"optical flow needs uint8 frames [h, w] or [h, w, 3], got {frame.dtype} {list(frame.shape)}")
    if min(frame.shape[:2]) < _MIN_SIDE:
        raise DataError(
            f"optical flow needs frames of at least {_MIN_SIDE} x {_MIN_SIDE} pixels, got {frame.shape[1]} x {frame.shape[0]}; "
            "decode at a larger size or leave the flow modality out"
        )
    return np.ascontiguousarray(frame) if frame.ndim == 2 else cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
