"""What the adapters to episodic training loops share: frames in one long row, labels of any kind, one episode at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from amd_fast.errors import DataError
from amd_fast.models.afmir import AFMIR, EpisodeOutput


class EpisodeAnswer(NamedTuple):
    """One episode's result.

    Attributes:
        output: with the episode axis of length 1.
        classes: ``[ways]`` float64, the support labels that the columns stand for, ascending.
        descriptors: ``[S + Q, V, D]``, support first; None where nobody asked.
    """

    output: EpisodeOutput
    classes: Tensor
    descriptors: Tensor | None

    def as_dict(self) -> dict[str, Tensor]:
        """``logits [Q, way]``, ``view_logits [Q, V, way]``, ``policy [Q, V]``, ``classes [way]``; ``loss`` where it was computed."""
        output = self.output
        result = {
            "logits": output.log_probs[0],
            "view_logits": output.view_log_probs[0],
            "policy": output.beliefs.policy[0],
            "classes": self.classes,
        }
        return result if output.loss is None else result | {"loss": output.loss}


def by_modality(images: Tensor, model: AFMIR, name: str) -> dict[str, Tensor]:
    """Splits images whose channels hold all modalities in the model's order: ``[N, channels, h, w] -> {modality: [N, its own, h, w]}``.

    Raises:
        DataError: another number of channels.
    """
    widths = model.channels
    if images.dim() != 4 or images.shape[1] != sum(widths.values()):
        wanted = " + ".join(f"{count} ({modality})" for modality, count in widths.items())
        raise DataError(
            f"{name}: got {list(images.shape)}, expected [clips * frames, {wanted} channels, height, width]; stack the modalities along "
            "the channels, give them one by one, or make the model with the modalities that there are"
        )
    return dict(zip(widths, images.split(list(widths.values()), 1), strict=True))


def run_episode(
    model: AFMIR,
    support: Mapping[str, Tensor],
    support_labels: Tensor,
    query: Mapping[str, Tensor],
    query_labels: Tensor | None = None,
    *,
    describe: bool = False,
) -> EpisodeAnswer:
    """One episode whose frames lie in one row.

    Args:
        model: runs it.
        support: ``{modality: [S * T, channels, h, w]}``, clip by clip; T follows from the number of labels.
        support_labels: ``[S]``, any dtype and order. Classes are numbered in ascending order of their label.
        query: ``{modality: [Q * T, channels, h, w]}``, of the same T.
        query_labels: ``[Q]`` labels out of the support's; the loss is then computed.
        describe: also return the descriptors.

    Raises:
        DataError: frames that do not make whole clips, a query label that no support clip has.
    """
    shots = support_labels.numel()
    if support_labels.dim() != 1 or shots == 0:
        raise DataError(
            f"support labels: got {list(support_labels.shape)}, expected [clips]; take the batch axis of a data loader away: labels[0]"
        )
    classes, labels = torch.unique(support_labels.double(), return_inverse=True)
    frames = max(_count(support) // shots, 1)
    seen, asked = _clips(support, frames, shots, "support"), _clips(query, frames, None, "query")
    if set(seen) != set(asked):
        raise DataError(f"the support has the modalities {sorted(seen)}, the queries {sorted(asked)}; give both the same")
    tokens, log_weight = model.encode({name: torch.cat([seen[name], asked[name]]) for name in seen})
    descriptors = model.describe(tokens, log_weight) if describe else None
    sides = model.read(tokens, log_weight, descriptors).split(1, shots)
    target = None if query_labels is None else _numbers(query_labels, classes)[None]
    output = model.judge(model.match_clips(*sides, labels[None], ways=len(classes)), target)
    return EpisodeAnswer(output, classes, descriptors)


def _count(images: Mapping[str, Tensor]) -> int:
    if not images:
        raise DataError("no images; give at least one modality")
    return len(next(iter(images.values())))


def _clips(images: Mapping[str, Tensor], frames: int, clips: int | None, name: str) -> dict[str, Tensor]:
    result = {}
    for modality, rows in images.items():
        whole = rows.dim() == 4 and len(rows) > 0 and len(rows) % frames == 0 and clips in (None, len(rows) // frames)
        if not whole:
            many = "clips" if clips is None else clips
            raise DataError(
                f"{name} images of {modality!r}: got {list(rows.shape)}, expected [{many} * {frames} frames, channels, height, width]; "
                "there is one label per support clip, and every clip has the same number of frames"
            )
        result[modality] = rows.unflatten(0, (-1, frames))
    return result


def _numbers(labels: Tensor, classes: Tensor) -> Tensor:
    wanted = labels.to(classes)
    number = torch.searchsorted(classes, wanted).clamp(max=len(classes) - 1)
    unknown = classes[number] != wanted
    if bool(unknown.any()):
        raise DataError(
            f"query label {wanted[unknown][0].item():g} is not among the support's: {[f'{label:g}' for label in classes.tolist()]}"
        )
    return number
