"""What a support set tells about itself: every enrolled clip is asked as if it were new, with its recording left out of the support.

Two things follow from the answers, which are known. How sharply the agent should decide whom to trust: its precision is the one that
explains them best. And how unfamiliar a clip of an enrolled class may look: the familiarity of a clip is

    mean over the views it has of ln(mean distance between the classes / distance to the nearest class)

and its typicality the conformal p-value (1 + number of enrolled clips that looked no more familiar) / (1 + number asked). Were a new
clip of an enrolled class exchangeable with the enrolled ones, its typicality would be at most alpha with probability at most alpha.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from amd_fast.active_inference import GenerativeModel
from amd_fast.classifier.spaces import Space
from amd_fast.models.afmir import weigh_views
from amd_fast.models.matchers import Clips, Match

ENOUGH = 9
"""Questions from which the precision is fitted to them; with fewer the saved one was not measured to be worse."""
MOST = 500
"""Clips that are asked at most, evenly among those there are: bounds the time that hundreds of classes take."""
_LARGEST = 4_000_000  # support clips times classes scored together: bounds the memory of a block of questions


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
        familiarity: float64 ``[n]``, of the enrolled clips that could be asked, ascending.
    """

    agent: GenerativeModel
    familiarity: np.ndarray

    def typicality(self, familiarity: np.ndarray) -> np.ndarray:
        """Share of the enrolled clips that looked no more familiar when they were asked, the new one counted among them, in (0, 1]."""
        return (1 + np.searchsorted(self.familiarity, familiarity, side="right")) / (1 + len(self.familiarity))


def familiarity_of(match: Match) -> np.ndarray:
    """Float64 ``[E, Q]``, see the module's text; -inf for a clip without any view.

    Which views the agent trusts does not count: measured on clips of unknown classes, the mean over all views told them apart best.
    """
    tiny = torch.finfo(torch.float32).tiny
    ratio = (match.spread[:, None].clamp(min=tiny) / match.distance.amin(-1).clamp(min=tiny)).double().log()
    number = match.present.sum(-1)
    mean = torch.where(match.present, ratio, 0.0).sum(-1) / number.clamp(min=1)
    found: np.ndarray = torch.where(number > 0, mean, -torch.inf).cpu().numpy()
    return found


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
    usable = usable[np.linspace(0, len(usable) - 1, min(len(usable), MOST)).astype(np.int64)]
    return Asked(torch.from_numpy(usable), torch.from_numpy(label[usable]), torch.from_numpy(labels[usable]), ways)


def ask(space: Space, clips: Clips, asked: Asked) -> Match:
    """Scores of the questions, one query each: ``logits [E, 1, V, ways]`` and so on."""
    number = len(clips.present)
    block = max(1, _LARGEST // max(1, number * asked.ways))
    parts = []
    for start in range(0, len(asked.clip), block):
        rows = slice(start, start + block)
        support = _repeated(clips, len(asked.clip[rows]))
        query = clips.take(asked.clip[rows, None].to(clips.present.device))
        with torch.inference_mode():
            parts.append(space.match(support, query, asked.label[rows].to(clips.present.device), asked.ways))
    return Match(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _repeated(clips: Clips, times: int) -> Clips:
    """The same clips as the support of several episodes, without a copy."""
    rows = {name: value[:, None].expand(-1, times, *value.shape[1:]) for name, value in clips.rows.items()}
    numbers = {name: value.expand(times, *value.shape) for name, value in clips.numbers.items()}
    return Clips(rows, numbers, clips.present.expand(times, *clips.present.shape))


def calibrate(space: Space, agent: GenerativeModel, clips: Clips, labels: np.ndarray, groups: np.ndarray, *, trust: bool) -> Calibration:
    """Calibrates on the support.

    Args:
        space: where clips are compared.
        agent: as it was before; not changed.
        clips, labels, groups: the support, ``labels`` int ``[S]`` counting classes from 0.
        trust: fit the agent's precision.
    """
    asked = known_questions(labels, groups, int(labels.max()) + 1)
    if asked.ways < 2 or not len(asked.clip):
        return Calibration(agent, np.zeros(0))
    match = ask(space, clips, asked)
    if trust and len(asked.clip) >= ENOUGH:
        agent = copy.deepcopy(agent)
        output = weigh_views(match, agent)
        target = asked.target.to(match.logits.device)[:, None]
        agent.fit_precision(output.view_log_probs, agent.observe(output.evidence), target, present=output.present)
    return Calibration(agent, np.sort(familiarity_of(match)[:, 0]))
