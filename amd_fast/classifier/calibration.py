"""What a support set tells about itself: every clip is asked as if it were new, with its recording left out of the support.

Two sets of such questions. *Known*: a clip against all others (of other recordings); it has a right answer. *Unknown*: a clip against
the support without its class; whatever is answered is wrong. From the first follow the trust in the views and the confidence below
which a clip is called unknown.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from amd_fast.active_inference import GenerativeModel
from amd_fast.classifier.spaces import DEFAULT_SCALE, PlainSpace, Space
from amd_fast.models.afmir import EpisodeOutput, weigh_views
from amd_fast.models.matchers import Clips, Match

_LARGEST = 4_000_000  # support clips times classes scored together: bounds the memory of a block of questions
_SCALES = tuple(DEFAULT_SCALE * 2.0 ** (step / 2) for step in range(-12, 9))


class Asked(NamedTuple):
    """Questions, one episode each: ``clip [E]`` the query, ``label [E, S]`` of the support (``ways``: left out), ``target [E]``."""

    clip: Tensor
    label: Tensor
    target: Tensor
    ways: int


@dataclass(frozen=True)
class Calibration:
    """How clips are judged.

    Attributes:
        agent: weighs the views.
        scale: ``[V]`` temperatures of plain views; None with a model, which has learned its own.
        threshold: confidence below which a clip is unknown; -inf where that is not calibrated.
        questions: number of support clips that could be asked.
    """

    agent: GenerativeModel
    scale: Tensor | None
    threshold: float
    questions: int


def known_questions(labels: np.ndarray, groups: np.ndarray, ways: int) -> Asked:
    """Every clip whose class is left with another recording of it, against the clips of other recordings.

    Args:
        labels: int ``[S]`` in 0..ways-1.
        groups: ``[S]`` source recordings; clips of the query's own are left out.
        ways: number of classes.
    """
    same = groups[:, None] == groups[None]
    label = np.where(same, ways, labels[None])
    left = (label[:, :, None] == np.arange(ways)).sum(1)  # [S, ways]
    # A recording may hold several classes; then only questions that leave every class some clip can be asked.
    usable = np.flatnonzero((left > 0).all(1))
    return Asked(torch.from_numpy(usable), torch.from_numpy(label[usable]), torch.from_numpy(labels[usable]), ways)


def unknown_questions(labels: np.ndarray, groups: np.ndarray, ways: int) -> Asked:
    """Every clip against the support without its class: no answer is right (``target`` is -1)."""
    own = labels[:, None]
    label = np.where(labels[None] > own, labels[None] - 1, labels[None])
    label = np.where((groups[:, None] == groups[None]) | (labels[None] == own), ways - 1, label)
    left = (label[:, :, None] == np.arange(ways - 1)).sum(1)
    usable = np.flatnonzero((left > 0).all(1)) if ways > 2 else np.zeros(0, np.int64)
    return Asked(torch.from_numpy(usable), torch.from_numpy(label[usable]), torch.full((len(usable),), -1), ways - 1)


def ask(space: Space, clips: Clips, asked: Asked, scale: Tensor | None = None) -> Match:
    """Scores of the questions, one query each: ``logits [E, 1, V, ways]`` and so on."""
    number = len(clips.present)
    block = max(1, _LARGEST // max(1, number * asked.ways))
    parts = []
    for start in range(0, len(asked.clip), block):
        rows = slice(start, start + block)
        support = _repeated(clips, len(asked.clip[rows]))
        query = clips.take(asked.clip[rows, None].to(clips.present.device))
        with torch.inference_mode():
            parts.append(space.match(support, query, asked.label[rows].to(clips.present.device), asked.ways, scale))
    return Match(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _repeated(clips: Clips, times: int) -> Clips:
    """The same clips as the support of several episodes, without a copy."""
    rows = {name: value[:, None].expand(-1, times, *value.shape[1:]) for name, value in clips.rows.items()}
    numbers = {name: value.expand(times, *value.shape) for name, value in clips.numbers.items()}
    return Clips(rows, numbers, clips.present.expand(times, *clips.present.shape))


def calibrate(
    space: Space,
    agent: GenerativeModel,
    clips: Clips,
    labels: np.ndarray,
    groups: np.ndarray,
    *,
    learn_trust: bool,
    false_unknown: float | None,
) -> Calibration:
    """Calibrates on the support.

    Args:
        space: where clips are compared.
        agent: as it was before; not changed.
        clips, labels, groups: the support, ``labels`` int ``[S]`` counting classes from 0.
        learn_trust: fit the agent's precision on the known questions.
        false_unknown: largest share of known clips that may be called unknown; None for no threshold.
    """
    ways = int(labels.max()) + 1
    agent = copy.deepcopy(agent)
    plain = isinstance(space, PlainSpace)
    scale = torch.full((len(space.views),), DEFAULT_SCALE, dtype=torch.float64) if plain else None
    if ways < 2 or (not plain and not learn_trust and false_unknown is None):
        return Calibration(agent, scale, -math.inf, 0)
    asked = known_questions(labels, groups, ways)
    if not len(asked.clip):
        return Calibration(agent, scale, -math.inf, 0)
    match = ask(space, clips, asked, scale)
    target = asked.target.to(match.logits.device)[:, None]
    if scale is not None:
        scale = _fit_scale(match, target)
        match = match._replace(logits=match.logits * (DEFAULT_SCALE / scale)[:, None])
    output = weigh_views(match, agent)
    if learn_trust:
        agent.fit_precision(output.view_log_probs, agent.observe(output.evidence), target, present=output.present)
        output = weigh_views(match, agent)
    threshold = -math.inf if false_unknown is None else lower_quantile(confidence_of(output)[:, 0].cpu().numpy(), false_unknown)
    return Calibration(agent, scale, threshold, len(asked.clip))


def confidence_of(output: EpisodeOutput) -> Tensor:
    """``[E, Q]`` probability of the most probable class."""
    return output.log_probs.amax(-1).exp()


def lower_quantile(scores: np.ndarray, share: float) -> float:
    """The threshold below which at most ``share`` of new scores fall, if they are exchangeable with these.

    It is the k-th smallest of n scores, k = floor(share (n + 1)), as in split conformal prediction: P(new score < k-th smallest)
    <= k / (n + 1). With too few scores for k >= 1 nothing can be promised and it is -inf.
    """
    k = math.floor(share * (len(scores) + 1) + 1e-9)
    return float(np.sort(scores)[k - 1]) if k >= 1 else -math.inf


def _fit_scale(match: Match, target: Tensor) -> Tensor:
    """The temperature of each view under which the known questions' right answers are most probable, on a grid of half octaves."""
    picked: list[float] = []
    for view in range(match.logits.shape[2]):
        logits, there = match.logits[:, 0, view], match.present[:, 0, view]
        loss = _loss_by_scale(logits[there], target[there, 0])
        picked.append(min(_SCALES, key=loss) if bool(there.any()) else DEFAULT_SCALE)
    return torch.tensor(picked, dtype=torch.float64)


def _loss_by_scale(logits: Tensor, target: Tensor) -> Callable[[float], float]:
    return lambda scale: float(torch.nn.functional.cross_entropy(logits * (DEFAULT_SCALE / scale), target)) if len(target) else 0.0
