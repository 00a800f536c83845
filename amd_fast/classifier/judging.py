"""From what the agent makes of a batch of clips to labels and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from amd_fast.classifier.answers import Answer
from amd_fast.classifier.calibration import Calibration, familiarity_of
from amd_fast.classifier.inputs import ReadClip
from amd_fast.classifier.spaces import Arrays, Space
from amd_fast.models.afmir import EpisodeOutput, weigh_views
from amd_fast.models.matchers import Clips

_CHUNK = 256  # queries scored together


@dataclass(frozen=True)
class Judged:
    """A batch of clips as the classifier sees them.

    Attributes:
        read: how each clip was read.
        readable: bool ``[n]``.
        output: what the agent says of those that could be read, as one episode ``[1, readable, ...]``; None where there are none.
        probabilities: float64 ``[n, classes]``, NaN for a clip that could not be read.
        typicality: float64 ``[n]``, see :mod:`amd_fast.classifier.calibration`; NaN for a clip that could not be read.
        known: bool ``[n]``, whether the clip looks like one of an enrolled class.
    """

    read: list[ReadClip]
    readable: np.ndarray
    output: EpisodeOutput | None
    probabilities: np.ndarray
    typicality: np.ndarray
    known: np.ndarray

    def labels(self, classes: np.ndarray, unknown: Any) -> list[Any]:
        """The most probable class of each clip, or ``unknown``; None where it could not be read and there is no such label."""
        best = classes[np.nan_to_num(self.probabilities, nan=0.0).argmax(-1)].tolist()
        return [label if known else unknown for label, known in zip(best, self.known, strict=True)]

    def answers(self, classes: np.ndarray, views: Sequence[str], unknown: Any) -> list[Answer]:
        """Everything about each clip."""
        labels, place = self.labels(classes, unknown), np.cumsum(self.readable) - 1
        found = []
        for row, clip in enumerate(self.read):
            if clip.error or self.output is None:
                found.append(Answer(clip.name, unknown, error=clip.error))
            else:
                shares = dict(zip(classes.tolist(), self.probabilities[row].tolist(), strict=True))
                found.append(self._answer(row, int(place[row]), views, labels[row], shares))
        return found

    def _answer(self, row: int, place: int, views: Sequence[str], label: Any, probabilities: dict[Any, float]) -> Answer:
        assert self.output is not None
        policy = self.output.beliefs.policy[0, place].tolist()
        own = {
            view: dict(zip(probabilities, self.output.view_log_probs[0, place, number].exp().tolist(), strict=True))
            for number, view in enumerate(views)
            if bool(self.output.present[0, place, number])
        }
        return Answer(
            clip=self.read[row].name,
            label=label,
            confidence=max(probabilities.values()),
            typicality=float(self.typicality[row]),
            known=bool(self.known[row]),
            probabilities=probabilities,
            trusted=views[int(np.argmax(policy))],
            policy=dict(zip(views, policy, strict=True)),
            views=own,
            free_energy=float(self.output.beliefs.free_energy[0, place]),
        )


def judge(
    space: Space,
    support: Clips,
    labels: np.ndarray,
    ways: int,
    arrays: Arrays,
    read: list[ReadClip],
    calibration: Calibration,
    false_unknown: float,
) -> Judged:
    """Judges a batch of encoded clips.

    Args:
        space: where clips are compared.
        support: the enrolled clips.
        labels: int ``[S]``, their classes in 0..ways-1.
        ways: number of classes.
        arrays: of the clips that could be read, in order.
        read: how each clip was read.
        calibration: the agent, and how familiar the enrolled clips looked.
        false_unknown: a clip is unknown where its typicality is at most this.
    """
    readable = np.array([not clip.error for clip in read], dtype=bool)
    probabilities = np.full((len(read), ways), np.nan)
    typicality = np.full(len(read), np.nan)
    if not readable.any():
        return Judged(read, readable, None, probabilities, typicality, readable)
    device = support.present.device
    with torch.inference_mode():
        seen = support.take(torch.arange(len(labels), device=device)[None])
        classes = torch.from_numpy(labels)[None].to(device)
        outputs, familiar = [], []
        for start in range(0, int(readable.sum()), _CHUNK):
            query = space.read({name: value[start : start + _CHUNK] for name, value in arrays.items()})
            asked = query.take(torch.arange(len(query.present), device=device)[None])
            match = space.match(seen, asked, classes, ways)
            outputs.append(weigh_views(match, calibration.agent))
            familiar.append(familiarity_of(match)[0])
    output = _joined(outputs)
    probabilities[readable] = output.log_probs[0].double().softmax(-1).cpu().numpy()
    typicality[readable] = calibration.typicality(np.concatenate(familiar))
    return Judged(read, readable, output, probabilities, typicality, typicality > false_unknown)


def _joined(outputs: Sequence[EpisodeOutput]) -> EpisodeOutput:
    """Chunks of queries of one episode as one."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    fields = ("log_probs", "view_log_probs", "evidence", "present")
    values = {name: torch.cat([getattr(output, name) for output in outputs], 1) for name in fields}
    beliefs = type(first.beliefs)(*(torch.cat(parts, 1) for parts in zip(*(output.beliefs for output in outputs), strict=True)))
    return EpisodeOutput(beliefs=beliefs, loss=None, terms=None, **values)
