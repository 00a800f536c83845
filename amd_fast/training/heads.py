"""Multi-task heads used in training only: classification over the base classes, and prediction of one modality from another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class TaskLosses(NamedTuple):
    """Each clip's share ``[B]`` of the mean losses: ``classification`` (cross-entropy, nats) and ``regression`` (mean squared error).

    Shares are divided by the number of terms given to :meth:`MultiTaskHeads.forward`, so their sum over all clips counted there,
    wherever these are computed, is the mean.
    """

    classification: Tensor
    regression: Tensor


class MultiTaskHeads(nn.Module):
    """Heads on the descriptors of single clips.

    Args:
        num_views: V.
        num_modalities: M; the first one's descriptor predicts each other's.
        dim: descriptor width D.
        num_classes: base classes.
    """

    def __init__(self, num_views: int, num_modalities: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.num_modalities = num_modalities
        self.weight = nn.Parameter(torch.randn(num_views, num_classes, dim) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(num_views, num_classes))
        self.predict = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, dim)) for _ in range(num_modalities - 1)
        )

    def count(self, present: Tensor) -> Tensor:
        """Number of terms in each mean, float32 ``[M]``: views classified, then clips with both the first and each other modality.

        Args:
            present: ``[B, V]`` bool.
        """
        both = present[:, :1] & present[:, 1 : self.num_modalities]
        return torch.cat([present.sum()[None], both.sum(0)]).float()

    def forward(self, descriptors: Tensor, present: Tensor, classes: Tensor, count: Tensor) -> TaskLosses:
        """Losses of clips ``descriptors [B, V, D]``, ``present [B, V]`` bool, ``classes [B]`` int64 over the base classes.

        Terms of a missing view count as nothing, not as zero error. The predicted descriptor is held fixed: the target does not
        move towards its prediction.

        Args:
            count: ``[M]`` from :meth:`count`, summed over everything that the mean is to be taken of.
        """
        count = count.clamp(min=1)
        logits = torch.einsum("bvd,vcd->bvc", descriptors, self.weight) + self.bias
        error = nn.functional.cross_entropy(logits.flatten(0, 1), classes[:, None].expand(present.shape).flatten(), reduction="none")
        classification = torch.where(present, error.view(present.shape), 0.0).sum(1) / count[0]
        regression = torch.zeros_like(classification)
        for number, head in enumerate(self.predict, start=1):
            squared = (head(descriptors[:, 0]) - descriptors[:, number].detach()).square().mean(-1)
            regression = regression + torch.where(present[:, 0] & present[:, number], squared, 0.0) / count[number]
        return TaskLosses(classification, regression / max(len(self.predict), 1))
