"""The training recipe that benchmarks of training take for standard, and its options on a command line."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from amd_fast.data.manifest import Manifest
from amd_fast.training.config import DataOptions, EpisodeOptions, ModelOptions, TrainConfig

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """5-way 1-shot with three queries, RGB and flow, 8 frames of 224 x 224, two ResNet-50; smaller for tests.

    Attributes:
        model: Name of the model.
        frames, size: Of a clip; pixels.
        ways, shots, queries: Of an episode.
        per_step: Episodes of a step.
    """

    model: str = "afmir_resnet50"
    frames: int = 8
    size: int = 224
    ways: int = 5
    shots: int = 1
    queries: int = 3
    per_step: int = 1

    @property
    def clips(self) -> int:
        """Clips of a step."""
        return self.per_step * self.ways * (self.shots + self.queries)

    def config(self, manifest: Path, output: Path, *, data: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        """The library's configuration of a run: everything the recipe does not say is the library's default.

        Clips are not kept in memory: what is measured is reading them, or a batch that is never read.
        """
        reading = DataOptions(manifest=str(manifest), frames=self.frames, size=self.size, cache="none", **(data or {}))
        changes.setdefault("model", ModelOptions(name=self.model))
        episode = EpisodeOptions(self.ways, self.shots, self.queries, self.per_step)
        return TrainConfig(output=str(output), data=reading, episode=episode, **changes)


def write_manifest(folder: Path, names: list[str], labels: list[str], **columns: Any) -> Path:
    """Writes a manifest of training clips; further columns as in :class:`~amd_fast.data.manifest.Manifest`."""
    table = pd.DataFrame({"path": names, "label": labels, "split": "train", **columns})
    path = folder / "manifest.csv"
    Manifest(table, folder).to_csv(path)
    return path


def add_options(parser: argparse.ArgumentParser, kind: type[Any]) -> None:
    """One option for each field of a dataclass, of the type of its default."""
    for field in dataclasses.fields(kind):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)


def chosen(options: argparse.Namespace, kind: type[Options]) -> Options:
    """The dataclass with the options that were given."""
    return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})  # type: ignore[arg-type]
