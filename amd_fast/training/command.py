"""``amd-fast train``: the configuration's fields are the options, a YAML file may set them, the command line has the last word.

What is slow to import is imported by the functions that use it: until then, too, the command listens to requests to stop.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from amd_fast.errors import TrainingInterrupted
from amd_fast.training.interruption import EXIT_INTERRUPTED, EndOnRequest

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from amd_fast.training.config import TrainConfig
    from amd_fast.training.engine import TrainResult


def build_parser() -> ArgumentParser:
    """The parser of ``amd-fast train``."""
    from jsonargparse import ActionYesNo, ArgumentParser

    from amd_fast.training.config import TrainConfig

    parser = ArgumentParser(
        prog="amd-fast train",
        description="Train a model on a manifest. Example: amd-fast train --data.manifest clips/manifest.csv --output runs/first. "
        "Several GPUs: torchrun --nproc-per-node 4 -m amd_fast.cli train ... "
        f"SIGTERM and SIGUSR1 save, stop, and exit with status {EXIT_INTERRUPTED}.",
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with settings, e.g. the config.yaml of an earlier run, or recipe:NAME (see 'amd-fast recipes'); "
        "of several, later ones win",
    )
    parser.add_argument(
        "--resume", action=ActionYesNo(no_prefix="no-"), default=False, help="continue the run in --output from its last checkpoint"
    )
    parser.add_argument(
        "--replay-step",
        type=int | None,
        default=None,
        help="run this one step (0-based) of the run in --output again, from the last checkpoint before it, and show the loss terms "
        "of its episodes; nothing is written",
    )
    parser.add_argument(
        "--profile",
        type=int | None,
        default=None,
        help="profile this many steps of a new run instead of training: a table of where a step's time goes, and a Chrome trace in the "
        "folder profile/ of --output; no checkpoint is read or written",
    )
    parser.add_class_arguments(TrainConfig)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Entry point: parses, trains, says what came out and where it lies; 75 where it was asked to stop and has saved everything."""
    with EndOnRequest():
        return _main(arguments)


def _main(arguments: Sequence[str]) -> int:
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from amd_fast.progress import console
    from amd_fast.training.config import TrainConfig
    from amd_fast.training.engine import train
    from amd_fast.training.profile import profile_training
    from amd_fast.training.replay import replay_step

    parser = build_parser()
    namespace = parser.instantiate(parser.parse_args(_with_local_config(arguments)))
    values = {key: value for key, value in vars(namespace).items() if key not in ("config", "resume", "replay_step", "profile")}
    config = TrainConfig(**values)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(format=f"rank {rank}: %(message)s" if "RANK" in os.environ else "%(message)s")
    handler = get_error_handler()
    handler.initialize()
    try:
        if namespace.replay_step is not None:
            replay_step(config, namespace.replay_step)
            return 0
        if namespace.profile is not None:
            profile_training(config, namespace.profile)
            return 0
        result = train(config, resume=namespace.resume)
    except TrainingInterrupted as stop:
        if rank == 0:
            console.print(str(stop), markup=False)
        return EXIT_INTERRUPTED
    except Exception as error:
        handler.record_exception(error)  # for torchrun's summary of who failed first, and why
        raise
    if rank == 0:
        _report(config, result)
    return 0


def _with_local_config(arguments: Sequence[str]) -> list[str]:
    """The arguments, with a ``--config`` that is a URI replaced by a local copy, and ``recipe:NAME`` by its file."""
    from amd_fast.storage import local
    from amd_fast.training.recipes import PREFIX, recipe_path

    def file(given: str) -> str:
        return str(recipe_path(given.removeprefix(PREFIX)) if given.startswith(PREFIX) else local(given))

    split = [part for given in arguments for part in (given.split("=", 1) if given.startswith("--config=") else [given])]
    return [file(value) if before == "--config" else value for before, value in zip(["", *split], split, strict=False)]


def _report(config: TrainConfig, result: TrainResult) -> None:
    from amd_fast.progress import console
    from amd_fast.storage import join

    best = join(result.folder, "checkpoints", "best.safetensors")
    accuracy = "" if result.best_accuracy is None else f", validation accuracy {result.best_accuracy:.1%}"
    console.print(f"trained {config.optimiser.steps} steps{accuracy}; best model: {best}")
    if result.clips_lost:
        console.print(f"[yellow]{len(result.clips_lost)} clips could not be decoded and were replaced by others of their class:[/yellow]")
        for file, reason in list(result.clips_lost.items())[:10]:
            console.print(f"  {file}: {reason}", markup=False)
