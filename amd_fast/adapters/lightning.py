"""Training under Lightning: the engine's losses, optimiser and calibration, in a ``LightningModule``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from amd_fast.errors import ConfigError
from amd_fast.models.afmir import AFMIR, EpisodeOutput
from amd_fast.training.batches import TrainBatch
from amd_fast.training.config import EpisodeOptions, OptimiserOptions, TaskOptions
from amd_fast.training.heads import MultiTaskHeads
from amd_fast.training.objective import TERMS, Objective
from amd_fast.training.optimisation import learning_rate_factor, parameter_groups

try:
    from lightning.pytorch import LightningModule
except ImportError as error:
    raise ConfigError(f"AFMIRModule needs the package lightning ({error}): pip install 'amd_fast[adapters]'") from error


class AFMIRModule(LightningModule):
    """Trains an AFMIR as ``amd-fast train`` does; batches are :class:`~amd_fast.training.batches.TrainBatch`, one per step and process.

    ``EpisodeBatches.stream`` makes them, or ``DataLoader(dataset, batch_size=None)`` over a dataset of them. Logged are the terms of
    the loss, and of validation ``val_loss`` and ``val_accuracy`` of the fused prediction by the agent as it stood; after the pass the
    agent is calibrated anew on these episodes, which therefore are to be of other classes than the training's.

    With several processes the gradient is the mean of theirs. Losses over clips, of which modalities are missing, are means within
    a process; the engine takes them over all processes.

    Args:
        model: what is trained; afterwards use it as any other, or save it with :func:`amd_fast.training.checkpoint.save_model`
            (Lightning's own checkpoints are pickles).
        base_classes: classes of the training set, for the classification head.
        episode: shape of the episodes; ``per_step`` is their number in a batch of this process.
        tasks, optimiser: as in the training configuration. ``optimiser.steps`` is the length of the learning rate's schedule,
            ``clip_norm`` holds where the Trainer names no ``gradient_clip_val``, ``accumulate`` is left to the Trainer.
    """

    def __init__(
        self,
        model: AFMIR,
        base_classes: int,
        episode: EpisodeOptions,
        *,
        tasks: TaskOptions | None = None,
        optimiser: OptimiserOptions | None = None,
    ) -> None:
        super().__init__()
        self.tasks, self.optimiser_options, self.episode = tasks or TaskOptions(), optimiser or OptimiserOptions(), episode
        heads = MultiTaskHeads(len(model.views), len(model.modalities), model.dim, base_classes)
        self.objective = Objective(model, heads, self.tasks, episode, None)
        self._validated: list[tuple[EpisodeOutput, Tensor]] = []

    @property
    def model(self) -> AFMIR:
        """What is trained."""
        return self.objective.model

    def transfer_batch_to_device(self, batch: TrainBatch, device: torch.device, dataloader_idx: int) -> TrainBatch:
        """The tensors of a batch on the device (Lightning's own way goes through ranges and arrays too)."""
        labels = {
            name: getattr(batch, name).to(device, non_blocking=True) for name in ("present", "support_label", "query_label", "base_class")
        }
        clips = {name: clip.to(device, non_blocking=True) for name, clip in batch.clips.items()}
        return replace(batch, clips=clips, **labels)

    def training_step(self, batch: TrainBatch, batch_index: int) -> Tensor:
        """The total loss, a mean over the batch's queries."""
        start = self.tasks.distillation_start * self.optimiser_options.steps
        distillation = None if self.global_step >= start else 0.0
        count = self.objective.count(batch.present)
        labels = (batch.support_label, batch.query_label, batch.base_class)
        means = self.objective(batch.clips, batch.present, *labels, count, distillation).sum(0)
        self.log_dict(dict(zip(TERMS, means.detach(), strict=True)), batch_size=self.episode.per_step)
        return means[0]

    def validation_step(self, batch: TrainBatch, batch_index: int) -> Tensor:
        """The loss of the episodes, without the tasks beside them."""
        model = self.model
        tokens, log_weight = model.encode(batch.clips, batch.present)
        seen, asked = model.read(tokens, log_weight).split(*batch.support_label.shape)
        output = model.judge(model.match_clips(seen, asked, batch.support_label, ways=self.episode.ways), batch.query_label)
        assert output.loss is not None
        accuracy = (output.log_probs.argmax(-1) == batch.query_label).float().mean()
        self.log_dict({"val_loss": output.loss, "val_accuracy": accuracy}, batch_size=len(batch.query_label), prog_bar=True, sync_dist=True)
        self._validated.append((output, batch.query_label))
        return output.loss

    def on_validation_epoch_end(self) -> None:
        """Calibrates the agent on the episodes of this pass; not after Lightning's sanity check."""
        validated, self._validated = self._validated, []
        if not validated or self.trainer.sanity_checking:
            return
        self.log("precision", self.model.calibrate(*zip(*validated, strict=True)))

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up and half a cosine, no decay of biases and norms."""
        options = self.optimiser_options
        groups = parameter_groups(self.objective, options.weight_decay)
        adamw = torch.optim.AdamW(groups, lr=options.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: learning_rate_factor(step, options.warmup_steps, options.steps))
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """The Trainer's limit, or else the options' own."""
        limit = self.optimiser_options.clip_norm if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, gradient_clip_val=limit or None, gradient_clip_algorithm=gradient_clip_algorithm)
