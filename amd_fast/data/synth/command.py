"""The command ``amd-fast synth``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from amd_fast.data.manifest import Manifest
from amd_fast.data.synth.writing import MANIFEST, synthesize
from amd_fast.storage import join


def synth_command(
    output: str,
    classes: int = 80,
    clips: int = 20,
    size: int = 96,
    seed: int = 0,
    codec: str = "h264",
    damage: bool = True,
    workers: int | None = None,
) -> None:
    """Write a synthetic few-shot action set of real video files, split by class into train, val and test.

    Args:
        output: Folder to write to. An unfinished set with the same settings is completed.
        classes: Number of classes, shared out over train, val and test as 48 : 12 : 20.
        clips: Clips of a training class; a validation class has 60 % of it clean and as many damaged, a test class 80 %.
        size: Width and height of the videos in pixels.
        seed: Chooses everything that varies between clips; the same seed gives the same files.
        codec: Either h264 (mp4) or vp9 (webm).
        damage: Whether validation and test classes also have clips with sensor damage.
        workers: Processes; by default one for each core.
    """
    manifest = synthesize(output, classes=classes, clips_per_class=clips, size=size, seed=seed, codec=codec, damage=damage, workers=workers)
    console = Console()
    console.print(_summary(manifest))
    console.print(f"Manifest: {join(manifest.root, MANIFEST)}", soft_wrap=True)


def _summary(manifest: Manifest) -> Table:
    table = Table("split", "classes", "clips", "damaged rgb", "damaged flow", title="Synthetic action set")
    for split, rows in manifest.table.groupby("split", sort=False):
        damaged = rows["damaged_modality"].value_counts()
        table.add_row(str(split), str(rows["label"].nunique()), str(len(rows)), str(damaged.get("rgb", 0)), str(damaged.get("flow", 0)))
    return table
