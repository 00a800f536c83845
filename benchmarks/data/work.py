"""The work that every contender does, and what its result must be.

The frames at the centres of T equal segments -> shorter side ``short_side`` -> centre square ``size`` -> ImageNet's mean and standard
deviation taken out -> float32 ``[T, 3, size, size]``; with flow besides ``[T, 2, size, size]`` from each of these frames to the next one.
The numbers of the frames are given to everyone, so that nobody's time goes into counting them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from amd_fast.data.containers import open_container
from amd_fast.data.pixels import resize, scaled_size
from amd_fast.data.sampling import segment_indices
from amd_fast.data.views import FLOW_LIMIT, FLOW_UNIT, IMAGENET_MEAN, IMAGENET_STD
from amd_fast.storage import Lease, base_name

NEIGHBOURS = 4
"""How far to either side of a frame the check looks for the one that was returned instead."""
LOSSY_TOLERANCE = 6.0
"""Mean absolute difference, in grey levels, between a frame and what a contender returns for it: a JPEG's loss is let through."""
_SHIFT_MARGIN = 0.1  # grey levels; frames of a scene that stands still differ by less, and then nobody can say which one it is


@dataclass(frozen=True)
class Clip:
    """One clip to read.

    Attributes:
        path: the video, on this machine: not every contender reads URIs.
        frame_count: its number of frames.
        indices: the frames wanted, in display order.
        codec: FFmpeg's name of its codec.
        folder: the same frames as JPEG files, ``img_00001.jpg`` being frame 0; None where there is none.
        source: where the video really lies, for one that is read from a copy.
        lease: keeps that copy where it is.
    """

    path: str
    frame_count: int
    indices: tuple[int, ...]
    codec: str = ""
    folder: Path | None = None
    source: str = ""
    lease: Lease | None = field(default=None, compare=False, repr=False)

    @property
    def place(self) -> str:
        """Where the video lies, a path or a URI."""
        return self.source or self.path

    @property
    def name(self) -> str:
        """The file's name."""
        return base_name(self.place)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The frames between which flow is wanted; the last frame of a video has no next one."""
        first = np.clip(self.indices, 0, max(self.frame_count - 2, 0))
        return tuple((int(index), min(int(index) + 1, self.frame_count - 1)) for index in first)


@dataclass(frozen=True)
class Work:
    """What is wanted of each clip: frames T, side of the square and the shorter side before the cut, pixels."""

    frames: int = 8
    size: int = 224
    short_side: int = 256

    def indices(self, frame_count: int) -> tuple[int, ...]:
        """The frames at the centres of the segments."""
        return tuple(segment_indices(frame_count, self.frames).tolist())

    def finish(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Resize, cut and normalise RGB pictures (uint8 ``[H, W, 3]``), as every peer does that has no faster way of its own."""
        result = np.empty((len(pictures), 3, self.size, self.size), np.float32)
        for position, picture in enumerate(pictures):
            square = self.square(picture)
            for channel in range(3):
                np.multiply(square[..., channel], 1 / (255 * IMAGENET_STD[channel]), out=result[position, channel])
                result[position, channel] -= IMAGENET_MEAN[channel] / IMAGENET_STD[channel]
        return torch.from_numpy(result)

    def square(self, picture: np.ndarray) -> np.ndarray:
        """The centre square of a picture that is resized to the shorter side."""
        return self.cut(resize(picture, scaled_size(picture.shape[1], picture.shape[0], self.short_side)))

    def cut(self, picture: np.ndarray) -> np.ndarray:
        """The centre square of a picture."""
        top, left = (picture.shape[0] - self.size) // 2, (picture.shape[1] - self.size) // 2
        return picture[top : top + self.size, left : left + self.size]

    def flow(self, pictures: Sequence[np.ndarray], solve: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Tensor:
        """Flow ``[T, 2, size, size]`` in this project's units from 2 T RGB pictures, first and second in turn, by ``solve(grey, grey)``."""
        target = scaled_size(pictures[0].shape[1], pictures[0].shape[0], self.short_side)
        greys = [resize(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), target) for picture in pictures]
        flows = [self.cut(solve(first, second)) for first, second in zip(greys[::2], greys[1::2], strict=True)]
        units = np.stack(flows).transpose(0, 3, 1, 2) / np.float32(FLOW_UNIT * self.size)
        return torch.from_numpy(np.clip(np.ascontiguousarray(units), -FLOW_LIMIT, FLOW_LIMIT))


class Truth:
    """What a full decode shows of a clip: every wanted frame and its neighbours, as uint8 squares.

    Args:
        clip: the clip.
        work: what is wanted of it.
    """

    def __init__(self, clip: Clip, work: Work) -> None:
        self.clip = clip
        self.squares: dict[int, np.ndarray] = {}
        kept = {near for index in clip.indices for near in range(index - NEIGHBOURS, index + NEIGHBOURS + 1)}
        converter = VideoReformatter()
        with open_container(clip.path) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number > max(kept):
                    break
                if number in kept:
                    picture = converter.reformat(frame, format="rgb24").to_ndarray()
                    turns = round(frame.rotation / 90) % 4
                    self.squares[number] = work.square(np.rot90(picture, turns) if turns else picture)

    def fault(self, result: Tensor) -> str | None:
        """What is wrong with a contender's RGB tensor, a clause; None where all frames are right."""
        for position, index in enumerate(self.clip.indices):
            got = result[position].numpy().transpose(1, 2, 0) * IMAGENET_STD + IMAGENET_MEAN
            if got.shape != self.squares[index].shape:
                return f"has shape {list(got.shape)}, expected {list(self.squares[index].shape)}"
            errors = {
                near: float(np.abs(got * 255 - square).mean()) for near, square in self.squares.items() if abs(near - index) <= NEIGHBOURS
            }
            nearest = min(errors, key=errors.__getitem__)
            if nearest != index and errors[index] > 2 * errors[nearest] + _SHIFT_MARGIN:
                return f"asked for frame {index}, got {nearest}"
            if not errors[index] <= LOSSY_TOLERANCE:
                return f"frame {index} differs by {errors[index]:.1f} grey levels on average"
        return None
