"""The graph that DALI runs: what it is fed for each clip, and what it does to it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from amd_fast.data.augment import ColourChange
from amd_fast.data.colours import from_bt601
from amd_fast.data.cut import CutStream
from amd_fast.data.views import IMAGENET_MEAN, IMAGENET_STD, RESIZE_RATIO, View


@dataclass(frozen=True)
class Sample:
    """What DALI gets of one clip, and what is added to its answer.

    Attributes:
        path: the video.
        cut: the stream that DALI decodes.
        pictures: positions of the clip's pictures among the frames decoded.
        pairs: the same ``[T, 2]`` of the frames that the flow leads from and to.
        view: what is shown.
        further: clips of further modalities.
    """

    path: str
    cut: CutStream
    pictures: np.ndarray
    pairs: np.ndarray
    view: View
    further: dict[str, np.ndarray]


class Parts(NamedTuple):
    """Which parts a pipeline has."""

    rgb: bool
    flow: bool
    colour: bool = False
    mended: bool = False

    def of(self, samples: Sequence[Sample]) -> Parts:
        """With the further parts that some of the samples need: the others go through them unchanged."""
        return self._replace(
            colour=self.rgb and any(sample.view.colour for sample in samples),
            mended=any(from_bt601(sample.cut.colour_space) is not None for sample in samples),
        )


def load_dali() -> tuple[Any, Any, Any]:
    """The package, its operators and its types: imported late, for it takes most of a second and is not everywhere."""
    return tuple(importlib.import_module(name) for name in ("nvidia.dali", "nvidia.dali.fn", "nvidia.dali.types"))  # type: ignore[return-value]


def inputs_of(samples: Sequence[Sample], parts: Parts, *, backwards: bool = False) -> dict[str, list[np.ndarray]]:
    """What the pipeline of :func:`definition` is fed, by the names of its inputs; ``backwards`` swaps the frames of the pairs."""
    boxes = [sample.view.box for sample in samples]
    inputs = {
        "data": [np.frombuffer(sample.cut.data, np.uint8) for sample in samples],
        "frames": [sample.cut.frames for sample in samples],
        "box_start": [np.array([top, left], np.float32) for left, top, _, _ in boxes],
        "box_end": [np.array([top + height, left + width], np.float32) for left, top, width, height in boxes],
    }
    if parts.mended:
        matrices = [from_bt601(sample.cut.colour_space) for sample in samples]
        inputs["matrix"] = [np.eye(3, dtype=np.float32) if matrix is None else matrix for matrix in matrices]
    if parts.rgb:
        inputs["pictures"] = [sample.pictures.astype(np.int32) for sample in samples]
        inputs["mirrored"] = [np.array(sample.view.mirrored, np.int32) for sample in samples]
    if parts.flow:
        inputs["pairs"] = [(sample.pairs[:, ::-1] if backwards else sample.pairs).ravel().astype(np.int32) for sample in samples]
    if parts.colour:
        changes = [sample.view.colour or ColourChange((1.0, 1.0, 1.0), 0.0, False) for sample in samples]
        inputs["gain"] = [np.array(change.gain, np.float32).reshape(1, 3, 1, 1) for change in changes]
        inputs["offset"] = [np.array(change.offset, np.float32) for change in changes]
        inputs["grey"] = [np.array(change.grey, np.float32) for change in changes]
    return inputs


def definition(size: int, parts: Parts, gpu: int | None) -> Any:
    """The graph; its outputs are rgb float32 ``[T, 3, size, size]`` if wanted, then of the flow's pairs: grey pictures or vectors."""
    dali, fn, types = load_dali()

    def fed(name: str, dtype: Any, ndim: int) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim)

    def recoloured(clip: Any) -> Any:  # the same as augment.change_colour
        mean = fn.reductions.mean(clip, axes=[0, 2, 3], keep_dims=True)
        changed = (clip - mean) * fed("gain", types.FLOAT, 4) + (mean + fed("offset", types.FLOAT, 0))
        return changed + fed("grey", types.FLOAT, 0) * (fn.reductions.mean(changed, axes=[1], keep_dims=True) - changed)

    def flow_of(pairs: Any) -> Any:
        if gpu is None:
            return fn.color_space_conversion(pairs, image_type=types.RGB, output_type=types.GRAY)
        return fn.optical_flow(pairs, output_grid=flow_grid(gpu))

    @dali.pipeline_def
    def graph() -> Any:
        decoded = fn.decoders.video(
            fed("data", types.UINT8, 1), frames=fed("frames", types.INT32, 1), device="cpu" if gpu is None else "mixed", pad_mode="none"
        )
        # To the short side first, as PyAV's path does it. Of DALI's filters Gaussian is the closest to averaging over a pixel's area.
        filters = {"min_filter": types.INTERP_GAUSSIAN, "mag_filter": types.INTERP_LINEAR}
        small = fn.resize(decoded, resize_shorter=round(size * RESIZE_RATIO), **filters)
        box = {"roi_start": fed("box_start", types.FLOAT, 1), "roi_end": fed("box_end", types.FLOAT, 1), "roi_relative": True}
        cut = fn.resize(small, size=[size, size], **box, **filters)
        if parts.mended:  # a matrix on the colours and a resize may change places, and here are the fewest pixels
            cut = fn.coord_transform(cut, M=fed("matrix", types.FLOAT, 2), dtype=types.UINT8)
        outputs = []
        if parts.rgb:
            rgb = fn.crop_mirror_normalize(
                fn.sequence_rearrange(cut, new_order=fed("pictures", types.INT32, 1)),
                mirror=fed("mirrored", types.INT32, 0),
                mean=(255 * IMAGENET_MEAN).tolist(),
                std=(255 * IMAGENET_STD).tolist(),
                dtype=types.FLOAT,
                output_layout="FCHW",
            )
            outputs.append(recoloured(rgb) if parts.colour else rgb)
        if parts.flow:
            outputs.append(flow_of(fn.sequence_rearrange(cut, new_order=fed("pairs", types.INT32, 1))))
        return tuple(outputs)

    return graph


def flow_grid(gpu: int) -> int:
    """Pixels per side of the cells that the optical flow engine gives one vector for; Turing knows 4 alone."""
    return 1 if torch.cuda.get_device_capability(gpu) >= (8, 0) else 4
