"""What is minimised: all loss terms of a micro-batch in one forward pass, as shares of the means over the whole step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from amd_fast.models.afmir import AFMIR
from amd_fast.training.config import EpisodeOptions, TaskOptions
from amd_fast.training.heads import MultiTaskHeads

TERMS = ("total", "task", "distillation", "cross_entropy", "classification", "regression")
"""Loss terms in the order of the last dimension of what :class:`Objective` returns."""
TOKENS, LOG_WEIGHT = "#tokens", "#log_weight"
"""What stands in a batch's ``clips`` where they come from a feature bank, encoded already."""


class Objective(nn.Module):
    """Model and heads with the loss on top: one module, so that it can be wrapped for several processes as a whole.

    Args:
        model, heads: what is trained.
        tasks: weights of the terms.
        episode: shape and number of the episodes of a step, all ranks and micro-batches together.
        precision: dtype of mixed precision in the backbones, None for none.
    """

    def __init__(
        self, model: AFMIR, heads: MultiTaskHeads, tasks: TaskOptions, episode: EpisodeOptions, precision: torch.dtype | None
    ) -> None:
        super().__init__()
        self.model, self.heads = model, heads
        self._tasks, self._episode, self._precision = tasks, episode, precision

    def count(self, present: Tensor) -> Tensor:
        """Number of terms in the means of the heads, ``[M]``, from the clips' modalities ``present [B, M]`` bool.

        Means are over what is there; with several ranks the counts have to be summed before the forward pass.
        """
        log_weight = torch.zeros(present.shape, device=present.device).masked_fill(~present, float("-inf"))
        return self.heads.count(self.model.views_present(log_weight[..., None]))

    def forward(
        self,
        clips: Mapping[str, Tensor],
        present: Tensor,
        support_label: Tensor,
        query_label: Tensor,
        base_class: Tensor,
        count: Tensor,
        distillation: float | None,
    ) -> Tensor:
        """Shares of every term and episode, ``[E, len(TERMS)]`` float32; their sum over all episodes of the step is the mean.

        Args:
            clips, present, support_label, query_label, base_class: see :class:`~amd_fast.training.batches.TrainBatch`.
            count: :meth:`count` summed over the whole step.
            distillation: weight of distillation in place of the model's own, for its schedule.
        """
        model, options = self.model, self._tasks
        episodes, shots = support_label.shape
        if TOKENS in clips:
            tokens, log_weight = clips[TOKENS], clips[LOG_WEIGHT]
        else:
            with nullcontext() if self._precision is None else torch.autocast(present.device.type, self._precision):
                tokens, log_weight = model.encode(clips, present)
            tokens = tokens.float()
        descriptors, there = model.describe(tokens, log_weight), model.views_present(log_weight)
        tasks = self.heads(descriptors, there, base_class, count)
        seen, asked = model.read(tokens, log_weight, descriptors).split(episodes, shots)
        match = model.match_clips(seen, asked, ways=self._episode.ways)  # episodes come class by class
        terms = model.judge(match, query_label, distillation=distillation).terms
        assert terms is not None
        queries = self._episode.per_step * query_label.shape[1]
        parts = {name: getattr(terms, name).sum(1) / queries for name in ("total", "task", "distillation", "cross_entropy")}
        parts |= {name: value.unflatten(0, (episodes, -1)).sum(1) for name, value in tasks._asdict().items()}
        parts["total"] = (
            options.episodic * parts["total"] + options.classification * parts["classification"] + options.regression * parts["regression"]
        )
        return torch.stack([parts[name] for name in TERMS], -1)
