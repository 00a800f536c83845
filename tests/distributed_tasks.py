"""What the processes of tests/test_distributed.py do: run by each of them, with ``TASK``, ``OPTIONS`` and ``OUTPUT`` given.

Processes that torchrun did not start get its environment variables as ``ENVIRONMENT``.
"""

import faulthandler
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from amd_fast import cli
from amd_fast.errors import AmdFastError
from amd_fast.training.batches import TrainBatch
from amd_fast.training.blocks import set_training
from amd_fast.training.config import TrainConfig
from amd_fast.training.distributed import joined
from amd_fast.training.engine import Trainer, train
from amd_fast.training.replay import replay_step

os.environ.update(globals().get("ENVIRONMENT", {}))

RANK = int(os.environ.get("RANK", "0"))


def lacking(batch: TrainBatch) -> TrainBatch:
    """Flow is missing from a third of the clips, by episode and place alone: more of it in some ranks' clips than in others'."""
    clips = len(batch.present) // len(batch.episodes)
    for row in range(len(batch.present)):
        episode, place = batch.episodes[row // clips], row % clips
        if (episode + place) % (2 + episode % 2) == 0:
            batch.present[row, 1] = False
    return batch


def gradients(config: TrainConfig) -> dict[str, Any]:
    """Gradients and loss of the first step, as every rank has them after the exchange."""
    with joined(config.device, config.timeout) as world:
        trainer = Trainer(config, progress=False, world=world)
        trainer.data.batches.loader.fill_cache(progress=False)
        set_training(trainer.objective, config.batch_norm)
        batch = lacking(trainer.data.batches.batch(0))
        shares = world.sum(trainer.accumulate(batch).sum(0))
        found = {}
        for name, parameter in trainer.objective.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, f"{name} has no gradient"
            found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        buffers = {name: value.clone() for name, value in trainer.objective.named_buffers()}
        trainer.data.close()
        return {"gradients": found, "terms": shares, "episodes": list(batch.episodes), "buffers": buffers}


def whole(config: TrainConfig, *, resume: bool = False) -> dict[str, Any]:
    """A training run; what this rank has at its end."""
    kept: dict[str, Any] = {}
    seen: list[int] = []
    losses: list[list[float]] = []
    advance, finish, settle = Trainer.advance, Trainer._finish, Trainer._settle

    def watched(self: Trainer, batch: TrainBatch) -> Any:
        seen.extend(batch.episodes)
        return advance(self, batch)

    def read(self: Trainer, pending: Any) -> dict[str, float]:
        values = settle(self, pending)
        losses.append([values[name] for name in sorted(values)])
        return values

    def last(self: Trainer) -> Any:
        kept["agent"] = {name: value.clone() for name, value in self.model.generative_model.state_dict().items()}
        return finish(self)

    Trainer.advance, Trainer._finish, Trainer._settle = watched, last, read  # type: ignore[method-assign]
    try:
        result = train(config, resume=resume, progress=False)
    finally:
        Trainer.advance, Trainer._finish, Trainer._settle = advance, finish, settle  # type: ignore[method-assign]
    return {**kept, "episodes": seen, "losses": losses, "best": result.best_accuracy}


def resumed(config: TrainConfig) -> dict[str, Any]:
    return whole(config, resume=True)


def replayed(config: TrainConfig) -> dict[str, Any]:
    """Step 5 once more."""
    return {"table": replay_step(config, 5, progress=False).to_dict("list")}


def before_step(step: int, action: Callable[[Trainer, TrainBatch], None]) -> None:
    accumulate = Trainer.accumulate

    def changed(self: Trainer, batch: TrainBatch) -> torch.Tensor:
        if self.step == step:
            action(self, batch)
        return accumulate(self, batch)

    Trainer.accumulate = changed  # type: ignore[method-assign]


def poisoned(config: TrainConfig) -> dict[str, Any]:
    """A clip of rank 1 is NaN at step 3."""
    if RANK == 1:
        before_step(3, lambda trainer, batch: batch.clips["rgb"][-1].fill_(float("nan")))
    return whole(config)


def killed(config: TrainConfig) -> dict[str, Any]:
    """Rank 1 dies at step 3."""
    if RANK == 1:
        before_step(3, lambda trainer, batch: os.kill(os.getpid(), signal.SIGKILL))
    return whole(config)


def hanging(config: TrainConfig) -> dict[str, Any]:
    """Rank 1 stops at step 3 and stays."""
    if RANK == 1:
        before_step(3, lambda trainer, batch: os.kill(os.getpid(), signal.SIGSTOP))
    return whole(config)


def broken(config: TrainConfig) -> dict[str, Any]:
    """Rank 1 raises an error of its own at step 3."""

    def fail(trainer: Trainer, batch: TrainBatch) -> None:
        raise ValueError("something of rank 1's own")

    if RANK == 1:
        before_step(3, fail)
    return whole(config)


def no_space(config: TrainConfig) -> dict[str, Any]:
    """Rank 0 cannot write its second checkpoint."""
    import resource

    def fill(trainer: Trainer, batch: TrainBatch) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

    if RANK == 0:
        before_step(3, fill)
    return whole(config)


def interrupted(config: TrainConfig) -> dict[str, Any]:
    """``amd-fast train``, and rank 1 alone is asked to stop at step 3."""
    if RANK == 1:
        before_step(3, lambda trainer, batch: os.kill(os.getpid(), signal.SIGUSR1))
    Path(config.output).mkdir(parents=True, exist_ok=True)
    file = Path(config.output) / f"asked.{RANK}.yaml"
    file.write_text(config.to_yaml())
    return {"status": cli.main(["train", "--config", str(file)])}


def killed_once(config: TrainConfig) -> dict[str, Any]:
    """``amd-fast train --resume`` under torchrun; rank 1 dies at step 5 of its first life."""
    if RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        before_step(5, lambda trainer, batch: os.kill(os.getpid(), signal.SIGKILL))
    return {"status": cli.main(["train", "--config", str(Path(config.output) / "asked.yaml"), "--resume"])}


def run(task: str, options: dict[str, Any], output: str) -> None:
    # Of all threads, where the test ends a process that should have ended by itself; open to the last moment of the process.
    faulthandler.enable(os.open(f"{output}.{RANK}.stacks", os.O_WRONLY | os.O_CREAT))
    torch.set_num_threads(1)
    started = time.monotonic()
    try:
        outcome = globals()[task](TrainConfig.from_dict(options))
    except AmdFastError as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    outcome["seconds"] = time.monotonic() - started
    Path(f"{output}.{RANK}").write_bytes(pickle.dumps(outcome))


if __name__ == "__main__":
    if "TASK" not in globals():  # started by torchrun
        TASK, options_file, OUTPUT = sys.argv[1:]
        OPTIONS = json.loads(Path(options_file).read_text())
    run(TASK, OPTIONS, OUTPUT)
