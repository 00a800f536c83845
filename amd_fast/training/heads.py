"""Multi-task heads used in training only: classification over the base classes, and prediction of one modality from another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class TaskLosses(NamedTuple):
    """Mean losses of the heads: ``classification`` (cross-entropy, nats) and ``regression`` (mean squared error)."""

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

    def forward(self, descriptors: Tensor, present: Tensor, classes: Tensor) -> TaskLosses:
        """Losses of clips ``descriptors [B, V, D]``, ``present [B, V]`` bool, ``classes [B]`` int64 over the base classes.

        Terms of a missing view count as nothing, not as zero error. The predicted descriptor is held fixed: the target does not
        move towards its prediction.
        """
        logits = torch.einsum("bvd,vcd->bvc", descriptors, self.weight) + self.bias
        error = nn.functional.cross_entropy(logits.flatten(0, 1), classes[:, None].expand(present.shape).flatten(), reduction="none")
        weight = present.flatten().to(error.dtype)
        classification = (error * weight).sum() / weight.sum().clamp(min=1)
        regression = descriptors.new_zeros(())
        for number, head in enumerate(self.predict, start=1):
            both = (present[:, 0] & present[:, number]).to(descriptors.dtype)
            squared = (head(descriptors[:, 0]) - descriptors[:, number].detach()).square().mean(-1)
            regression = regression + (squared * both).sum() / both.sum().clamp(min=1)
        return TaskLosses(classification, regression / max(len(self.predict), 1))
