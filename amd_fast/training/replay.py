"""One training step again: the same weights, episodes and random numbers, with the loss terms of every episode shown."""

from __future__ import annotations

import pandas as pd
import torch
from rich.table import Table

from amd_fast.errors import ConfigError
from amd_fast.progress import console
from amd_fast.training.blocks import set_training
from amd_fast.training.config import TrainConfig
from amd_fast.training.distributed import joined
from amd_fast.training.engine import Trainer
from amd_fast.training.objective import TERMS


def replay_step(config: TrainConfig, step: int, *, progress: bool = True) -> pd.DataFrame:
    """Runs a step of a run that exists as it was run, and writes nothing.

    It starts from the newest checkpoint that is not past the step (or from the beginning where none is left) and trains the steps
    between silently, validations included. On a CPU, with as many processes as the run had, the numbers are the same bit for bit.

    Args:
        config: the run folder's own ``config.yaml``.
        step: 0-based, as in the message of the error.
        progress: say what is done, and show the table.

    Returns:
        One row per episode of the step: ``episode``, ``rank``, its loss terms; ``total`` over all of them is the loss of the step.

    Raises:
        ConfigError: no such step.
        CheckpointError: the checkpoint does not belong to this configuration.
    """
    if not 0 <= step < config.optimiser.steps:
        raise ConfigError(f"there is no step {step}: the run has the steps 0 to {config.optimiser.steps - 1}")
    with joined(config.device, config.timeout) as world:
        trainer = Trainer(config, progress=False, world=world)
        world.on_first(lambda: trainer.mirror.pull(resume=True))
        start = world.on_first(lambda: trainer.checkpoints.before(step))
        if start is not None:
            trainer.load(start)
        if progress and world.first:
            console.print(f"from {start or 'the beginning'}, {step - trainer.step} steps before step {step}")
        trainer.data.batches.loader.fill_cache(progress=False)
        set_training(trainer.objective, config.batch_norm)
        for batch in trainer.data.batches.stream(trainer.step, step):
            trainer.advance(batch)
            trainer.step += 1
            if "validation" in trainer.due():  # what the agent learned there changes the losses that follow
                trainer.calibrate()
        batch = trainer.data.batches.batch(step)
        shares = trainer.accumulate(batch).cpu() * config.episode.per_step
        norms = [p.grad.norm() for p in trainer.objective.parameters() if p.grad is not None]
        own = [{"episode": episode, "rank": world.rank} | terms for episode, terms in zip(batch.episodes, _rows(shares), strict=True)]
        table = pd.DataFrame([row for part in world.gather(own) for row in part]).sort_values("episode", ignore_index=True)
        trainer.data.close()
        finite = all(bool(torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)) for norm in norms)
    if progress and world.first:
        _show(table, step, config.output, finite=finite)
    return table


def _rows(shares: torch.Tensor) -> list[dict[str, float]]:
    return [dict(zip(TERMS, row, strict=True)) for row in shares.tolist()]


def _show(table: pd.DataFrame, step: int, folder: str, *, finite: bool) -> None:
    shown = Table(title=f"step {step} of {folder}: loss terms per episode")
    for name in table.columns:
        shown.add_column(name, justify="right")
    for row in table.itertuples(index=False):
        shown.add_row(*(f"{value:.6g}" for value in row))
    console.print(shown)
    console.print("all gradients are finite" if finite else "[red]gradients are NaN or infinite[/red]")
