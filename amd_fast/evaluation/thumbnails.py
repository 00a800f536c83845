"""Pictures of the clearest successes and failures of an evaluation, with what every view believed."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from amd_fast.data.readers import open_clip
from amd_fast.errors import DataError
from amd_fast.evaluation import metrics
from amd_fast.evaluation.plots import variable_of
from amd_fast.evaluation.scores import AMI, ConditionScores

if TYPE_CHECKING:
    from amd_fast.data.manifest import Manifest

SHORT_SIDE = 96  # pixels of each frame in the strip
JPEG_QUALITY = 72
GAP = 3  # pixels between the frames
TRIES = 4  # clips tried per picture wanted, where files are gone


@dataclass(frozen=True)
class Belief:
    """What one view said of a clip: its answer, how sure it was of it, and how far the policy trusted it, both in percent."""

    view: str
    colour: str
    answer: str
    right: bool
    sure: float
    trust: float


@dataclass(frozen=True)
class Example:
    """One query: three frames as a JPEG in a data URI with its size in pixels, the truth, AMI's answer, and the views' beliefs."""

    clip: str
    picture: str
    width: int
    height: int
    truth: str
    answer: str
    right: bool
    sure: float
    damage: str
    beliefs: list[Belief]


def examples(c: ConditionScores, clips: Manifest, *, right: bool, count: int = 3) -> list[Example]:
    """The queries that AMI answered with the greatest certainty, rightly or wrongly; no clip and no class twice.

    Args:
        c: scores of a condition; ``query_id`` are rows of ``clips``.
        clips: the evaluated clips. Those whose file cannot be read any more are passed over.
        right: successes or failures.
        count: at most so many.
    """
    found: list[Example] = []
    for tries, (episode, query) in enumerate(_clearest(c, right)):
        if len(found) == count or tries == TRIES * count:
            break
        row = int(c.query_id[episode, query])
        try:
            picture, width, height = strip(str(clips.file(row)))
        except (DataError, OSError):
            continue
        found.append(_example(c, episode, query, str(clips.table["path"].iat[row]), picture, width, height))
    return found


def strip(path: str) -> tuple[str, int, int]:
    """First, middle and last frame of a clip side by side: a JPEG as data URI, its width and height in pixels.

    Raises:
        DataError: the clip cannot be read.
    """
    with open_clip(path) as reader:
        last = max(reader.frame_count - 1, 0)
        frames = reader.pixels(reader.frames([0, last // 2, last]), short_side=SHORT_SIDE)
    width = len(frames) * (frames.shape[2] + GAP) - GAP
    return "data:image/jpeg;base64," + base64.b64encode(as_jpeg(frames)).decode(), width, frames.shape[1]


def as_jpeg(frames: np.ndarray) -> bytes:
    """Frames uint8 ``[n, H, W, 3]`` side by side as a JPEG.

    Raises:
        DataError: they cannot be compressed.
    """
    import cv2

    gap = np.full((frames.shape[1], GAP, 3), 255, np.uint8)
    joined = np.concatenate([part for frame in frames for part in (gap, frame)][1:], axis=1)
    done, packed = cv2.imencode(".jpg", joined[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        raise DataError(f"cannot compress frames of shape {joined.shape} as JPEG")
    return packed.tobytes()


def _clearest(c: ConditionScores, right: bool) -> Iterator[tuple[int, int]]:
    """Episode and query number, most certain answer first, one query per clip and per true class."""
    sure = c.scores(AMI).max(axis=-1)
    order = np.argsort(np.where(c.correct(AMI) == right, -sure, np.inf), axis=None, kind="stable")[: int((c.correct(AMI) == right).sum())]
    clips: set[int] = set()
    classes: set[int] = set()
    for episode, query in zip(*np.unravel_index(order, sure.shape), strict=True):
        clip, label = int(c.query_id[episode, query]), int(c.true_class[episode, query])
        if clip not in clips and label not in classes:
            clips.add(clip)
            classes.add(label)
            yield int(episode), int(query)


def _example(c: ConditionScores, episode: int, query: int, clip: str, picture: str, width: int, height: int) -> Example:
    names = [c.classes[i] for i in c.episode_classes[episode]]
    target = int(c.target[episode, query])

    def said(method: str) -> tuple[str, bool, float]:
        scores = c.scores(method)[episode, query]
        way = int(metrics.predicted(scores))
        return names[way], way == target, 100 * float(np.exp(scores[way]))

    answer, right, sure = said(AMI)
    there = np.ones(len(c.views), bool) if c.present is None else c.present[episode, query]
    beliefs = [
        Belief(view, variable_of(view, c.views), *said(view), 100 * float(c.policy[episode, query, i]))
        for i, view in enumerate(c.views)
        if there[i] and view in c.log_probs
    ]
    damage = "" if c.damage is None else " ".join(filter(None, (str(c.damage[episode, query]), _modality(c, episode, query))))
    return Example(clip, picture, width, height, names[target], answer, right, sure, damage, beliefs)


def _modality(c: ConditionScores, episode: int, query: int) -> str:
    modality = "" if c.damaged_modality is None else str(c.damaged_modality[episode, query])
    return f"({modality})" if modality else ""
