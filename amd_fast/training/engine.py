"""The training loop, for one process and for many: episodes in, checkpoints and a history out.

With several processes (torchrun) every rank computes its share of a step's episodes. Losses are means over the whole step, so the
gradient is that of one process with the same episodes. Nothing in a step waits for the device: its numbers are read one step later.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import amd_fast
from amd_fast.errors import CheckpointError, ConfigError, TrainingError, TrainingInterrupted
from amd_fast.evaluation.protocol import Condition
from amd_fast.files import write_atomically
from amd_fast.models.afmir import AFMIR
from amd_fast.models.registry import create_model
from amd_fast.progress import console, progress_bar
from amd_fast.training.batches import TrainBatch
from amd_fast.training.blocks import set_training
from amd_fast.training.checkpoint import Checkpoints, full_weights, load_model, write_model
from amd_fast.training.config import TrainConfig
from amd_fast.training.distributed import World, choose_device, joined, lost_connection
from amd_fast.training.history import History
from amd_fast.training.interruption import StopRequest
from amd_fast.training.mirror import RunMirror
from amd_fast.training.objective import TERMS
from amd_fast.training.optimisation import make_optimiser, set_learning_rate
from amd_fast.training.phases import BACKWARD, COMMUNICATION, COPY, FORWARD, OPTIMISER, phase
from amd_fast.training.preparation import build_objective, choose_precision, open_data, spread
from amd_fast.training.validation import Validated, build_bank, copy_agent, validate

logger = logging.getLogger(__name__)

_LOG_EVERY = 10


@dataclass
class TrainResult:
    """What a training run leaves behind.

    Attributes:
        folder: the run folder, a str where it is a URI.
        history: one row per logged step (losses) or validation (accuracies).
        best_accuracy: validation accuracy of the best checkpoint, or None without validation classes.
        clips_lost: clips that could not be decoded, with the reason.
    """

    folder: Path | str
    history: pd.DataFrame
    best_accuracy: float | None
    clips_lost: dict[str, str] = field(default_factory=dict)

    def model(self) -> AFMIR:
        """The best model of the run."""
        return load_model(self.folder)


def train(config: TrainConfig, *, resume: bool = False, progress: bool = True) -> TrainResult:
    """Trains a model; started by torchrun, as one of several processes.

    Args:
        config: everything that determines the run.
        resume: continue from the run folder's last checkpoint (from the start where there is none yet).
        progress: show progress bars (rank 0 alone).

    Raises:
        ConfigError, DataError: the configuration or the clips do not allow the run.
        TrainingError: the loss or a gradient became NaN or infinite (the message names step, ranks and episodes), or another rank was lost.
        TrainingInterrupted: SIGTERM or SIGUSR1 asked it to stop; everything is saved.
        CheckpointError: a checkpoint cannot be written, or does not belong to this configuration.
    """
    with joined(config.device, config.timeout) as world:
        mirror = RunMirror(config.output)
        start = world.on_first(lambda: open_folder(config, mirror, resume=resume))
        trainer = Trainer(config, progress=progress, world=world, mirror=mirror)
        if start is not None:
            trainer.load(start)
        return trainer.run()


def open_folder(config: TrainConfig, mirror: RunMirror, *, resume: bool) -> Path | None:
    """Writes the configuration into the run folder; returns the state to start from.

    Raises:
        CheckpointError: the folder holds a run that is not to be continued, or one with another configuration.
    """
    mirror.pull(resume=resume)
    checkpoints = Checkpoints(mirror.folder, World())
    last = checkpoints.last()
    if last is not None:
        if not resume:
            raise CheckpointError(f"{config.output} already holds a run; pass --resume to continue it, or choose another output folder")
        checkpoints.describe(last, config)
    write_atomically(mirror.folder / "config.yaml", config.to_yaml().encode(), error=CheckpointError)
    mirror.push()
    return last


def seed_of(*numbers: int) -> int:
    """A 63-bit seed from several numbers: different numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Pending(NamedTuple):
    """The numbers of a step, perhaps still on their way from the device.

    Attributes:
        step: 0-based.
        episodes: of this rank.
        shares: ``[E, len(TERMS)]`` on the device: this rank's episodes alone.
        values: ``[len(TERMS) + 2]`` in host memory: means over the step, stop requests of all ranks, norm of the gradient.
        ready: what to wait for before ``values`` are read, None on a CPU.
    """

    step: int
    episodes: range
    shares: Tensor
    values: Tensor
    ready: torch.cuda.Event | None


class Trainer:
    """One training run; see :func:`train`. Making one reads files but writes none.

    Args:
        config: everything that determines the run.
        progress: show progress bars (rank 0 alone).
        world: this process among those that train together.
        mirror: takes what is saved to the store, where the run folder is a URI.
    """

    def __init__(self, config: TrainConfig, *, progress: bool = True, world: World | None = None, mirror: RunMirror | None = None) -> None:
        self.config, self.world = config, world or World()
        self.progress = progress and self.world.first
        self.mirror = mirror or RunMirror(config.output)
        self.folder = self.mirror.folder
        self.device = choose_device(config.device, self.world.local_rank, self.world.size)
        self.precision = choose_precision(config.precision, self.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        self._check_shares()
        self.data = open_data(config, self.world, self.device)
        self.objective, self.recipe = build_objective(config, len(self.data.batches.classes), self.device, self.precision, self.world)
        self.model = self.objective.model
        self.parallel = spread(self.objective, config, self.world, self.device)
        self.optimiser = make_optimiser(self.objective, config.optimiser)
        self.step = 0
        self.best: float | None = None
        self.checkpoints = Checkpoints(self.folder, self.world)
        self.history: History | None = None
        self.stop = StopRequest()

    def _check_shares(self) -> None:
        config, size = self.config, self.world.size
        parts = size * config.optimiser.accumulate
        if config.episode.per_step % parts:
            raise ConfigError(
                f"episode.per_step ({config.episode.per_step}) must be a multiple of processes x optimiser.accumulate "
                f"({size} x {config.optimiser.accumulate}); it counts the episodes of all of them together"
            )
        if config.validation.episodes < size:
            raise ConfigError(f"validation.episodes ({config.validation.episodes}) must be at least the number of processes ({size})")

    @property
    def _distillation(self) -> float | None:
        """Weight of distillation at this step: none before its start, then the model's own."""
        start = self.config.tasks.distillation_start * self.config.optimiser.steps
        return None if self.step >= start else 0.0

    def accumulate(self, batch: TrainBatch) -> Tensor:
        """Forward and backward of this rank's episodes of one step; gradients are then those of the mean over all ranks' episodes.

        Returns:
            Shares of the loss terms ``[E, len(TERMS)]`` of this rank's episodes, without gradient.
        """
        torch.manual_seed(seed_of(self.config.seed, self.step, self.world.rank))
        present = batch.present.to(self.device, non_blocking=True)
        with phase(COMMUNICATION):
            count = self.world.sum(self.objective.count(present))
        shares = []
        for number, part in enumerate(self._micro_batches(batch, present), start=1):
            with self._synchronised(last=number == self.config.optimiser.accumulate):
                with phase(FORWARD):
                    share = self.parallel(*part, count, self._distillation)
                # Both DDP and FSDP take the mean over the ranks, where the sum of the shares is asked for.
                with phase(BACKWARD):
                    (share[:, 0].sum() * self.world.size).backward()
            shares.append(share.detach())
        return torch.cat(shares)

    def _micro_batches(self, batch: TrainBatch, present: Tensor) -> Iterator[tuple[Any, ...]]:
        episodes = len(batch.support_label)
        clips = len(present) // episodes
        size = episodes // self.config.optimiser.accumulate
        for first in range(0, episodes, size):
            of_episode, of_clip = slice(first, first + size), slice(first * clips, (first + size) * clips)
            with phase(COPY):
                part = (
                    {name: clip[of_clip].to(self.device, non_blocking=True) for name, clip in batch.clips.items()},
                    present[of_clip],
                    *(label[of_episode].to(self.device, non_blocking=True) for label in (batch.support_label, batch.query_label)),
                    batch.base_class[of_clip].to(self.device, non_blocking=True),
                )
            yield part

    def _synchronised(self, *, last: bool) -> Any:
        """Gradients are exchanged once a step, with the last micro-batch."""
        if isinstance(self.objective, FSDPModule):
            self.objective.set_requires_gradient_sync(last)
        elif isinstance(self.parallel, DistributedDataParallel) and not last:
            return self.parallel.no_sync()
        return nullcontext()

    def advance(self, batch: TrainBatch) -> Pending:
        """One optimisation step."""
        options = self.config.optimiser
        set_learning_rate(self.optimiser, options, self.step)
        self.optimiser.zero_grad(set_to_none=True)
        shares = self.accumulate(batch)
        with phase(OPTIMISER):
            norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), options.clip_norm or float("inf"))
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            self.optimiser.step()
        asked = torch.full((1,), float(bool(self.stop)), device=self.device)
        with phase(COMMUNICATION):
            values = torch.cat([self.world.sum(torch.cat([shares.sum(0), asked])), norm.reshape(1)])
        return self._fetch(shares, values, batch.episodes)

    def _fetch(self, shares: Tensor, values: Tensor, episodes: range) -> Pending:
        if self.device.type != "cuda":
            return Pending(self.step, episodes, shares, values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Pending(self.step, episodes, shares, host, ready)

    def run(self) -> TrainResult:
        """Trains to the end and returns the result."""
        try:
            with self.stop:
                return self._run()
        except RuntimeError as error:
            if self.world.size > 1 and lost_connection(error):
                raise self._lost_rank(error) from error
            raise
        finally:
            self.data.close()

    def _run(self) -> TrainResult:
        config, total = self.config, self.config.optimiser.steps
        if self.world.first:
            self.history = History(self.folder, tensorboard=config.tensorboard)
            self.history.cut(self.step)
        if self.step < total:
            self.data.batches.loader.fill_cache(progress=self.progress)
        started, first = time.monotonic(), self.step
        pending: deque[Pending] = deque()
        set_training(self.objective, config.batch_norm)
        with progress_bar(disable=not self.progress) as bar:
            task = bar.add_task("training", total=total, completed=self.step, note="")
            for batch in self.data.batches.stream(self.step, total):
                pending.append(self.advance(batch))
                self.step += 1
                due = self.due()
                # Every rank sees the same numbers, one step late, and so all take the same way here.
                stop = False
                while len(pending) > (0 if due else 1):
                    values = self._settle(pending.popleft())
                    bar.update(task, note=f"loss {values['total']:.3f}")
                    stop = stop or values["stop"] > 0
                if "validation" in due:
                    self._validate()  # before a stop too: a run that goes on from this step does not come back to it
                if stop:
                    self._interrupt(pending)
                if "checkpoint" in due:
                    self.save()
                bar.advance(task)
        logger.info("trained %d steps in %.1f s", total - first, time.monotonic() - started)
        return self._finish()

    def due(self) -> set[str]:
        """What is to be done after :attr:`step` steps: ``validation``, ``checkpoint``."""
        config = self.config
        end, due = self.step == config.optimiser.steps, set()
        if self.data.validation is not None and (end or (config.validation.every and self.step % config.validation.every == 0)):
            due.add("validation")
        if end or self.step % config.checkpoint_every == 0:
            due.add("checkpoint")
        return due

    def _settle(self, pending: Pending) -> dict[str, float]:
        """Reads the numbers of a step; stops all ranks where they are not finite."""
        if pending.ready is not None:
            pending.ready.synchronize()
        values = dict(zip((*TERMS, "stop", "gradient_norm"), pending.values.tolist(), strict=True))
        if not np.isfinite(list(values.values())).all():
            raise TrainingError(self._explain_bad(pending, values))
        done = pending.step + 1
        if self.history is not None and (done % _LOG_EVERY == 0 or done == self.config.optimiser.steps):
            self.history.add(done, "train", {name: value for name, value in values.items() if name != "stop"})
        return values

    def _explain_bad(self, pending: Pending, values: dict[str, float]) -> str:
        """The message about a step with numbers that are not finite; every rank comes here after the same step."""
        fine = torch.isfinite(pending.shares).cpu()
        own = {
            episode: [name for name, good in zip(TERMS[1:], row[1:].tolist(), strict=True) if not good] or ["total"]
            for episode, row in zip(pending.episodes, fine, strict=True)
            if not row.all()
        }
        found = [
            f"rank {rank}: episode {episode} ({', '.join(names)})"
            for rank, bad in enumerate(self.world.gather(own))
            for episode, names in bad.items()
        ]
        names = [name for name, value in values.items() if not np.isfinite(value)]
        every = self.world.gather(pending.episodes)
        episodes = sorted(episode for part in every for episode in part)
        where = "; ".join(found) or "in the backward pass: the losses themselves are finite"
        last = self.world.on_first(self.checkpoints.last)
        return (
            f"{', '.join(names)} became NaN or infinite at step {pending.step} (episodes {episodes}, seed {self.config.seed}). "
            f"{where}. The last good checkpoint is {last}. To run this step alone: {self.replay_command(pending.step)}. "
            "Try a lower optimiser.learning_rate or precision=fp32."
        )

    def replay_command(self, step: int) -> str:
        """The command that runs one step again."""
        start = "amd-fast" if self.world.size == 1 else f"torchrun --nproc-per-node {self.world.local_size} -m amd_fast.cli"
        return f"{start} train --config {self.folder / 'config.yaml'} --replay-step {step}"

    def _interrupt(self, pending: deque[Pending]) -> None:
        while pending:
            self._settle(pending.popleft())
        self.save()
        signals = sorted({name for name in self.world.gather(self.stop.signal) if name})
        raise TrainingInterrupted(
            f"stopped by {' and '.join(signals)} after step {self.step} of {self.config.optimiser.steps}; "
            f"everything is saved, --resume goes on from {self.world.on_first(self.checkpoints.last)}"
        )

    def _lost_rank(self, error: RuntimeError) -> TrainingError:
        return TrainingError(
            f"rank {self.world.rank} lost the connection to another rank at step {self.step} ({str(error).splitlines()[0]}). "
            f"{self.world.roll_call()}. A rank that is lost died, hangs, or was cut off: look at its own messages (torchrun names the "
            f"first that failed). The same command with --resume goes on from the last checkpoint in {self.checkpoints.folder}"
        )

    def _finish(self) -> TrainResult:
        best = self.folder / "checkpoints" / "best.safetensors"
        if self.data.validation is None:
            weights = full_weights(self.model)
            self.world.on_first(lambda: write_model(weights, best, self.recipe))
        lost = {str(self.data.manifest.file(position)): reason for position, reason in self.data.batches.loader.lost.items()}
        lost = {file: reason for part in self.world.gather(lost) for file, reason in part.items()}
        table = pd.DataFrame()
        if self.history is not None:
            self.history.close()
            table = self.history.table()
        return TrainResult(self.world.on_first(self.mirror.finish), table, self.best, lost)

    def calibrate(self) -> tuple[AFMIR, Validated]:
        """Teaches the agent on half of the validation episodes and scores the other half; writes nothing.

        Returns:
            The whole model as it was scored, and its scores.
        """
        config = self.config
        self.world.share_buffers(self.objective)
        model, bank = self._whole_model(), self.data.validation_bank
        if bank is None:
            assert self.data.validation is not None and self.data.validation_loader is not None
            bank = build_bank(model, self.data.validation, self.data.validation_loader, self.world)
        condition = Condition(config.episode.ways, config.episode.shots, 1, config.validation.episodes, config.seed)
        validated = validate(model, bank, condition, self.world)
        if model is not self.model:
            copy_agent(model, self.model.generative_model)
        set_training(self.objective, config.batch_norm)
        return model, validated

    def _validate(self) -> None:
        """Calibrates, and keeps the model where it is the best so far."""
        model, (accuracy, precision) = self.calibrate()
        if self.history is not None:
            self.history.add(self.step, "validation", {**accuracy, "precision": precision})
        if self.progress:
            shown = "  ".join(f"{name} {value:.1%}" for name, value in accuracy.items())
            console.print(f"step {self.step}: validation accuracy  {shown}  (precision {precision:.2f})")
        if self.best is None or accuracy["ami"] >= self.best:
            self.best = accuracy["ami"]
            weights = model.state_dict()
            self.world.on_first(lambda: write_model(weights, self.folder / "checkpoints" / "best.safetensors", self.recipe))

    def _whole_model(self) -> AFMIR:
        """The model itself or, where its weights are spread over the ranks, a copy that is not."""
        if not isinstance(self.objective, FSDPModule):
            return self.model
        whole = create_model(**{**self.recipe, "modalities": tuple(self.model.modalities), "loss": self.config.loss}).to(self.device)
        whole.load_state_dict(full_weights(self.model))
        return whole

    def save(self) -> None:
        """Saves the state after :attr:`step` steps."""
        self.world.share_buffers(self.objective)
        facts = {
            "step": self.step,
            "best": self.best,
            "config": self.config.essence(),
            "config_hash": self.config.hash(),
            "world_size": self.world.size,
            "versions": {"amd_fast": amd_fast.__version__, "torch": str(torch.__version__)},
        }
        self.checkpoints.save(self.objective, self.optimiser, facts, keep=self.config.keep_checkpoints)
        self.world.on_first(self.mirror.push)

    def load(self, path: Path) -> None:
        """Goes back to a saved state, of any number of processes.

        Raises:
            CheckpointError: it does not belong to this configuration or model.
        """
        facts = self.world.on_first(lambda: self.checkpoints.describe(path, self.config))
        self.checkpoints.load(path, self.objective, self.optimiser)
        self.step, self.best = int(facts["step"]), facts["best"]
        now = {"torch": str(torch.__version__), "processes": self.world.size}
        before = {"torch": facts["versions"]["torch"], "processes": facts["world_size"]}
        if now != before and self.world.first:
            logger.warning(
                "%s was written with %s, this is %s: the same episodes follow, numbers may differ by rounding", path, before, now
            )
        if self.progress:
            console.print(f"continuing {self.config.output} at step {self.step} of {self.config.optimiser.steps}")
