"""``amd-fast train``: the configuration's fields are the options, a YAML file may set them, the command line has the last word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ActionYesNo, ArgumentParser

from amd_fast.progress import console
from amd_fast.training.config import TrainConfig
from amd_fast.training.engine import train


def build_parser() -> ArgumentParser:
    """The parser of ``amd-fast train``."""
    parser = ArgumentParser(
        prog="amd-fast train",
        description="Train a model on a manifest. Example: amd-fast train --data.manifest clips/manifest.csv --output runs/first",
    )
    parser.add_argument("--config", action="config", help="YAML file with settings, e.g. the config.yaml of an earlier run")
    parser.add_argument(
        "--resume", action=ActionYesNo(no_prefix="no-"), default=False, help="continue the run in --output from its last checkpoint"
    )
    parser.add_class_arguments(TrainConfig)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Entry point: parses, trains, says what came out and where it lies."""
    parser = build_parser()
    namespace = parser.instantiate(parser.parse_args(list(arguments)))
    values = {key: value for key, value in vars(namespace).items() if key not in ("config", "resume")}
    config = TrainConfig(**values)
    result = train(config, resume=namespace.resume)
    best = Path(result.folder) / "checkpoints" / "best.safetensors"
    accuracy = "" if result.best_accuracy is None else f", validation accuracy {result.best_accuracy:.1%}"
    console.print(f"trained {config.optimiser.steps} steps{accuracy}; best model: {best}")
    if result.clips_lost:
        console.print(f"[yellow]{len(result.clips_lost)} clips could not be decoded and were replaced by others of their class:[/yellow]")
        for file, reason in list(result.clips_lost.items())[:10]:
            console.print(f"  {file}: {reason}", markup=False)
    return 0
