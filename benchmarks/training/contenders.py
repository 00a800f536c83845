"""Ways to train the same model on the same batch: the peer, and this library's own trainer under some settings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amd_fast.data.manifest import Manifest
from amd_fast.training.batches import Share, TrainBatch
from amd_fast.training.blocks import set_training
from amd_fast.training.config import ModelOptions, TaskOptions, TrainConfig
from amd_fast.training.distributed import World
from amd_fast.training.engine import Pending, Trainer
from amd_fast.training.optimisation import parameter_groups, set_learning_rate
from amd_fast.training.preparation import build_objective

from ..recipe import Recipe, write_manifest

PEER, OURS, COMPILED = "eager float32", "amd_fast", "amd_fast, compile=True"
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    OURS: {},
    "amd_fast, precision=fp32": {"precision": "fp32"},
    "amd_fast, impl=reference": {"impl": "reference"},
    COMPILED: {"compile": True},
}
"""Ours, the slowest to prepare last. Against the first, each of the others shows what one setting does."""
_CLASSES = 64  # to classify among, as many as Kinetics-100 trains on


class Outcome(NamedTuple):
    """What a step says of itself: its loss, and the norm of its gradient before clipping."""

    loss: float
    gradient_norm: float


def configure(recipe: Recipe, manifest: Path, device: torch.device, *, impl: str = "auto", **changes: Any) -> TrainConfig:
    """The configuration of a step with every loss term in it; ``changes`` are settings of :class:`TrainConfig`."""
    model = ModelOptions(name=recipe.model, options={} if impl == "auto" else {"impl": impl})
    tasks = TaskOptions(distillation_start=0.0)
    data = {"decoder": "pyav", "workers": 1}  # nothing is read
    return recipe.config(manifest, manifest.parent / "run", data=data, device=str(device), model=model, tasks=tasks, **changes)


@contextmanager
def unread_manifest(recipe: Recipe) -> Iterator[Path]:
    """A manifest for what makes a trainer; its clips are never opened."""
    with tempfile.TemporaryDirectory() as folder:
        labels = [f"class {number:02d}" for number in range(max(_CLASSES, recipe.ways)) for _ in range(recipe.shots + recipe.queries)]
        yield write_manifest(Path(folder), [f"{number}.mp4" for number in range(len(labels))], labels)


def fixed_batch(recipe: Recipe, manifest: Path, device: torch.device) -> TrainBatch:
    """A batch of noise on the device: neither reading nor copying clips is part of the step."""
    generator = torch.Generator().manual_seed(0)
    share = Share(recipe.config(manifest, manifest.parent).episode, 0, 1)
    support, query = share.labels()
    shapes = {name: (recipe.clips, recipe.frames, channels, recipe.size, recipe.size) for name, channels in (("rgb", 3), ("flow", 2))}
    clips = {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}
    present = torch.ones(recipe.clips, len(clips), dtype=torch.bool, device=device)
    of_class = torch.cat([support, query], 1).flatten()
    positions = torch.arange(recipe.clips).numpy()
    labels = (support.to(device), query.to(device), of_class.to(device))
    return TrainBatch(0, clips, present, *labels, share.episodes(0), positions)


class Peer:
    """Eager float32, as training loops are usually written: no autocast, no compiler, plain layout, plain AdamW, plain ops.

    PyTorch's own defaults otherwise. Waits for nothing: a loop that reads its loss in every step would be slower.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        classes = len(Manifest.from_csv(config.data.manifest).classes)
        self.objective, _ = build_objective(config, classes, device, None, World())
        # Newer torch has the overload.
        self.objective.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, unused-ignore]
        self.objective.train()
        self.options, self.device = config.optimiser, device
        self.optimiser = torch.optim.AdamW(parameter_groups(self.objective, self.options.weight_decay))
        set_learning_rate(self.optimiser, self.options, 0)

    def gradients(self, batch: TrainBatch, clip_norm: float) -> Tensor:
        """Forward and backward; loss and norm of the gradient, which is then clipped."""
        self.optimiser.zero_grad(set_to_none=True)
        on_device = {name: clip.to(self.device, non_blocking=True) for name, clip in batch.clips.items()}
        labels = (label.to(self.device, non_blocking=True) for label in (batch.support_label, batch.query_label, batch.base_class))
        present = batch.present.to(self.device, non_blocking=True)
        loss = self.objective(on_device, present, *labels, self.objective.count(present), None)[:, 0].sum()
        loss.backward()
        return torch.stack([loss.detach(), torch.nn.utils.clip_grad_norm_(self.objective.parameters(), clip_norm)])

    def __call__(self, batch: TrainBatch) -> Tensor:
        """A step; its loss first, the norm of its gradient last."""
        values = self.gradients(batch, self.options.clip_norm)
        self.optimiser.step()
        return values


class Ours:
    """The library's trainer, which looks at the numbers of a step one step later, as it does in training."""

    def __init__(self, config: TrainConfig) -> None:
        self.trainer = Trainer(config, progress=False)
        self.objective = self.trainer.objective
        set_training(self.objective, config.batch_norm)
        self._before: Pending | None = None

    def __call__(self, batch: TrainBatch) -> Tensor:
        """A step; its loss first, the norm of its gradient last, perhaps still on their way from the device."""
        pending, before = self.trainer.advance(batch), self._before
        if before is not None and before.ready is not None:
            before.ready.synchronize()
        self._before = pending
        return pending.values

    def close(self) -> None:
        """Ends the readers."""
        self.trainer.data.close()


Step = Callable[[TrainBatch], Tensor]


def outcome(step: Step, batch: TrainBatch, device: torch.device) -> Outcome:
    """Takes a step and waits for its numbers."""
    values = step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Outcome(float(values[0]), float(values[-1]))
