"""The training loop: episodes in, checkpoints and a history out; stops itself on NaN, continues exactly after a kill."""

from __future__ import annotations

import json
import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from amd_fast.data.loader import ClipLoader, further_modalities
from amd_fast.data.manifest import Manifest
from amd_fast.errors import CheckpointError, ConfigError, TrainingError
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.evaluation.protocol import Condition, Features, calibrate, calibration_condition, evaluate_condition
from amd_fast.files import write_atomically
from amd_fast.models.afmir import AFMIR
from amd_fast.models.registry import create_model
from amd_fast.progress import console, progress_bar
from amd_fast.training.batches import EpisodeBatches, TrainBatch
from amd_fast.training.checkpoint import load_model, load_state, save_model, save_state
from amd_fast.training.config import TrainConfig
from amd_fast.training.heads import MultiTaskHeads
from amd_fast.training.history import History

logger = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a training run leaves behind.

    Attributes:
        folder: the run folder.
        history: one row per logged step (losses) or validation (accuracies).
        best_accuracy: validation accuracy of the best checkpoint, or None without validation classes.
        clips_lost: clips that could not be decoded, with the reason.
    """

    folder: Path
    history: pd.DataFrame
    best_accuracy: float | None
    clips_lost: dict[str, str] = field(default_factory=dict)

    def model(self) -> AFMIR:
        """The best model of the run."""
        return load_model(self.folder)


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> TrainResult:
    """Trains a model.

    Args:
        config: everything that determines the run.
        resume: continue from the run folder's last checkpoint (from the start where there is none yet).
        progress: show progress bars.

    Raises:
        ConfigError, DataError: the configuration or the clips do not allow the run.
        TrainingError: the loss or a gradient became NaN or infinite; the message names step and episodes.
        CheckpointError: a checkpoint cannot be written, or does not belong to this configuration.
    """
    trainer = Trainer(config, resume=resume, progress=progress)
    return trainer.run()


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 for mixed precision, or None; ``auto`` asks whether the processor has instructions for it."""
    if name == "auto":
        has = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if has else None
    return torch.bfloat16 if name == "bf16" else None


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and convolutions, none for biases, norms, temperatures and embeddings."""
    decay = [p for p in module.parameters() if p.requires_grad and p.dim() >= 2]
    rest = [p for p in module.parameters() if p.requires_grad and p.dim() < 2]
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def learning_rate_factor(step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then half a cosine down to 0 at ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + float(np.cos(np.pi * (step - warmup) / max(total - warmup, 1))))


class Trainer:
    """One training run in one process; see :func:`train`."""

    def __init__(self, config: TrainConfig, *, resume: bool = False, progress: bool = True) -> None:
        self.config, self.progress = config, progress
        self.folder = Path(config.output)
        self.device = choose_device(config.device)
        self.precision = choose_precision(config.precision, self.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self._open_folder(resume)
        self._open_data()
        self._build_model()
        self.step = 0
        self.best: float | None = None
        self.history = History(self.folder, tensorboard=config.tensorboard)
        if resume and self._last.exists():
            self._restore()

    @property
    def _last(self) -> Path:
        return self.folder / "checkpoints" / "last.pt"

    def _open_folder(self, resume: bool) -> None:
        if self._last.exists() and not resume:
            raise CheckpointError(f"{self.folder} already holds a run; pass --resume to continue it, or choose another output folder")
        write_atomically(self.folder / "config.yaml", self.config.to_yaml().encode(), error=CheckpointError)

    def _open_data(self) -> None:
        options = self.config.data
        if not options.manifest:
            raise ConfigError("data.manifest is not set; make a manifest with 'amd-fast index FOLDER' or 'amd-fast synth FOLDER'")
        manifest = Manifest.from_csv(options.manifest, group=options.group or None)
        self.manifest = manifest.subset(split=options.train_split) if options.train_split else manifest
        wanted = self.config.model.modalities
        absent = set(further_modalities(wanted)) - set(further_modalities(wanted, manifest))
        if absent:
            raise ConfigError(f"{options.manifest} has no column for the modalities {sorted(absent)}; columns hold the paths of .npy files")
        loader = self._loader(self.manifest, options.cache_frames)
        self.batches = EpisodeBatches(self.manifest, loader, self.config.episode, self.config.seed)
        has_validation = bool(options.val_split) and options.val_split in set(manifest.table["split"])
        self.validation = manifest.subset(split=options.val_split) if has_validation else None
        if self.validation is not None and set(self.validation.classes) & set(self.manifest.classes):
            shared = sorted(set(self.validation.classes) & set(self.manifest.classes))[:5]
            raise ConfigError(f"classes {shared} are in both the training and the validation split; validation needs classes of its own")

        if self.validation is not None:
            self.validation_loader = self._loader(self.validation, 1)

    def _loader(self, manifest: Manifest, cache_frames: int) -> ClipLoader:
        options = self.config.data
        return ClipLoader(
            manifest,
            self.config.model.modalities,
            frames=options.frames,
            size=options.size,
            flip=options.flip,
            scale=(options.smallest_crop, 1.0),
            colour=options.colour_jitter,
            speed=options.speed_jitter,
            cache=options.cache,
            cache_frames=cache_frames,
            workers=options.workers,
        )

    def _build_model(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.recipe = {
            "name": config.model.name,
            "modalities": list(config.model.modalities),
            "frames": config.data.frames,
            "size": config.data.size,
            **config.model.options,
        }
        self.model = create_model(
            **{**self.recipe, "modalities": tuple(config.model.modalities)}, pretrained=config.model.pretrained, loss=config.loss
        ).to(self.device)
        self.recipe["loss"] = config.to_dict()["loss"]
        if config.model.weights:
            self._start_from(load_model(config.model.weights))
        self.heads = MultiTaskHeads(len(self.model.views), len(self.model.modalities), self.model.dim, len(self.batches.classes)).to(
            self.device
        )
        if config.compile:
            for backbone in self.model.backbones.values():
                backbone.compile(fullgraph=True)
        self.trained = nn.ModuleList([self.model, self.heads])
        self.optimiser = torch.optim.AdamW(
            parameter_groups(self.trained, config.optimiser.weight_decay), lr=config.optimiser.learning_rate, fused=True
        )

    def _start_from(self, other: AFMIR) -> None:
        """Takes over what another model has under the same name in the same shape, but not what its agent learned."""
        own = self.model.state_dict()
        shared = {
            name: value
            for name, value in other.state_dict().items()
            if name in own and value.shape == own[name].shape and not name.startswith("generative_model.")
        }
        if not any(name.startswith("backbones.") for name in shared):
            raise ConfigError(f"nothing in {self.config.model.weights} fits this model; model.name, modalities or options differ")
        self.model.load_state_dict(shared, strict=False)
        logger.info("took over %d of %d arrays from %s", len(shared), len(own), self.config.model.weights)

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.precision is None else torch.autocast(self.device.type, self.precision)

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        """All loss terms of a batch (means over queries or clips), ``total`` included."""
        options, model = self.config.tasks, self.model
        clips = {name: clip.to(self.device, non_blocking=True) for name, clip in batch.clips.items()}
        episodes, shots = batch.support_label.shape
        with self._autocast():
            tokens, log_weight = model.encode(clips, batch.present.to(self.device))
        tokens = tokens.float()
        descriptors, there = model.describe(tokens, log_weight), model.views_present(log_weight)
        tasks = self.heads(descriptors, there, batch.base_class.to(self.device))
        descriptors, there = (value.unflatten(0, (episodes, -1)) for value in (descriptors, there))
        match = model.match(
            descriptors[:, :shots],
            batch.support_label.to(self.device),
            descriptors[:, shots:],
            there[:, :shots],
            there[:, shots:],
            ways=self.config.episode.ways,
        )
        distilling = self.step >= options.distillation_start * self.config.optimiser.steps
        output = model.judge(match, batch.query_label.to(self.device), distillation=None if distilling else 0.0)
        assert output.terms is not None and output.loss is not None
        total = options.episodic * output.loss + options.classification * tasks.classification + options.regression * tasks.regression
        terms = {name: getattr(output.terms, name).mean() for name in ("task", "distillation", "cross_entropy")}
        return {"total": total, **terms, "classification": tasks.classification, "regression": tasks.regression}

    def _advance(self, batch: TrainBatch) -> dict[str, Tensor]:
        """One optimisation step."""
        options = self.config.optimiser
        factor = learning_rate_factor(self.step, options.warmup_steps, options.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = options.learning_rate * factor
        self.trained.train()
        terms = self.losses(batch)
        self.optimiser.zero_grad(set_to_none=True)
        terms["total"].backward()
        limit = options.clip_norm or float("inf")
        terms["gradient_norm"] = torch.nn.utils.clip_grad_norm_(self.trained.parameters(), limit)
        self._check_finite(terms, batch)
        self.optimiser.step()
        return {name: value.detach() for name, value in terms.items()}

    def _check_finite(self, terms: dict[str, Tensor], batch: TrainBatch) -> None:
        bad = [name for name, value in terms.items() if not torch.isfinite(value)]
        if bad:
            raise TrainingError(
                f"{', '.join(bad)} became NaN or infinite at step {self.step} (episodes {list(batch.episodes)}, seed {self.config.seed}). "
                f"The last good checkpoint is {self._last}. Try a lower optimiser.learning_rate or precision=fp32."
            )

    def run(self) -> TrainResult:
        """Trains to the end and returns the result."""
        config, total = self.config, self.config.optimiser.steps
        if self.step < total:
            self.batches.loader.fill_cache(progress=self.progress)
        validation_every = config.validation.every or total
        started = time.monotonic()
        with progress_bar(disable=not self.progress) as bar:
            task = bar.add_task("training", total=total, completed=self.step, note="")
            for batch in self.batches.stream(self.step, total):
                terms = self._advance(batch)
                self.step += 1
                if self.step % 10 == 0 or self.step == total:
                    values = {name: float(value) for name, value in terms.items()}
                    self.history.add(self.step, "train", values)
                    bar.update(task, note=f"loss {values['total']:.3f}")
                if self.validation is not None and (self.step % validation_every == 0 or self.step == total):
                    self._validate()
                if self.step % config.checkpoint_every == 0 or self.step == total:
                    self._save()
                bar.advance(task)
        self.history.close()
        if self.validation is None:
            save_model(self.model, self.folder / "checkpoints" / "best.safetensors", self.recipe)
        lost = {str(self.manifest.file(position)): reason for position, reason in self.batches.loader.lost.items()}
        logger.info("trained %d steps in %.1f s", total, time.monotonic() - started)
        return TrainResult(self.folder, self.history.table(), self.best, lost)

    def _validate(self) -> None:
        """Calibrates on half of the validation episodes, scores the other half, keeps the model where it is the best so far."""
        assert self.validation is not None
        options = self.config.validation
        bank = FeatureBank.build(self.model, self.validation, loader=self.validation_loader, progress=False)
        condition = Condition(self.config.episode.ways, self.config.episode.shots, 1, options.episodes, self.config.seed)
        condition = calibration_condition(bank, condition)
        features = Features.of(self.model, bank)
        precision = calibrate(self.model, features, condition, start=options.episodes)
        scores = evaluate_condition(self.model, features, condition)
        accuracy = {name: float((value.argmax(-1) == scores.target).mean()) for name, value in scores.log_probs.items()}
        self.history.add(self.step, "validation", {**accuracy, "precision": precision})
        if self.progress:
            shown = "  ".join(f"{name} {value:.1%}" for name, value in accuracy.items())
            console.print(f"step {self.step}: validation accuracy  {shown}  (precision {precision:.2f})")
        if self.best is None or accuracy["ami"] >= self.best:
            self.best = accuracy["ami"]
            save_model(self.model, self.folder / "checkpoints" / "best.safetensors", self.recipe)

    def _save(self) -> None:
        save_state(
            self._last,
            {
                "config_hash": self.config.hash(),
                "step": self.step,
                "best": self.best,
                "model": self.model.state_dict(),
                "heads": self.heads.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "random": torch.get_rng_state(),
            },
        )

    def _restore(self) -> None:
        state = load_state(self._last, self.config.hash())
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["random"])
        self.step, self.best = int(state["step"]), state["best"]
        self.history.cut(self.step)
        if self.progress:
            console.print(f"continuing {self.folder} at step {self.step} of {self.config.optimiser.steps}")


def read_history(folder: Path) -> pd.DataFrame:
    """The history of a run folder, one row per record of ``metrics.jsonl``."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return pd.DataFrame([json.loads(line) for line in lines])
