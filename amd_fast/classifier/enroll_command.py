"""``amd-fast enroll``: add clips to a gallery, or begin one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from rich.table import Table
from rich.text import Text

from amd_fast.classifier.estimator import FewShotClassifier
from amd_fast.classifier.gallery import FACTS
from amd_fast.classifier.sources import clips_below, complain, silenced
from amd_fast.errors import ConfigError, DataError
from amd_fast.progress import console
from amd_fast.storage import exists, is_remote, join

INCOMPLETE = 1
"""Exit status where some clips could not be read and the others were."""


def enroll_command(
    gallery: str,
    clips: list[str],
    name: str | None = None,
    model: str | None = None,
    group: str | None = None,
    false_unknown: float = 0.1,
    crops: int = 1,
    workers: int = 0,
    progress: bool = True,
) -> int:
    """Add clips of new or known actions to a gallery, from which `amd-fast predict` recognises them.

    Clips that cannot be read are named and left out; the exit status is then 1.

    Args:
        gallery: Folder of the gallery, or its URI; made where there is none.
        clips: Videos or folders of videos of the action --name; or, without --name, a folder with one subfolder of videos per action.
        name: The action that all these clips show.
        model: Run folder or .safetensors file of the model a new gallery is made with and keeps. Without one, clips are compared by
            frame differences and optical flow, which need no training.
        group: Regular expression with one capture group on clip names that tells the source recording, so that clips of one
            recording do not judge each other.
        false_unknown: Of a new gallery: share of clips of its actions that may be called unknown.
        crops: Of a new gallery: squares read of each clip along the picture's longer side.
        workers: Threads that read clips; 0 is one per core.
        progress: Show a progress bar on a terminal.
    """
    paths, labels = _listed(clips, name)
    groups = None if group is None else [_recording(group, path) for path in paths]
    there = exists(join(gallery, FACTS))
    if not there and not is_remote(gallery) and os.path.isdir(gallery) and os.listdir(gallery):
        raise DataError(f"{gallery} is a folder that is no gallery and not empty; give a gallery, or a new folder")
    if there and model is not None:
        raise ConfigError(f"{gallery} keeps the model it was made with; leave out --model, or enroll into a new folder")
    if there:
        classifier = FewShotClassifier.load(gallery)
    else:
        classifier = FewShotClassifier(model, unknown="unknown", false_unknown=false_unknown, crops=crops)
    classifier.set_params(unreadable="skip", workers=workers, progress=progress)
    with silenced():
        classifier.partial_fit(paths, labels, groups=groups)
    classifier.save(gallery)
    complain(classifier.lost_)
    _show(classifier, gallery)
    return INCOMPLETE if classifier.lost_ else 0


def _listed(clips: list[str], name: str | None) -> tuple[list[str], list[str]]:
    """Paths and labels."""
    if name is not None:
        if not name.strip():
            raise DataError("the action's name is empty; give one with --name")
        paths = clips_below(clips)
        return paths, [name] * len(paths)
    found: list[tuple[str, str]] = []
    for root in clips:
        folders = sorted(path for path in Path(root).glob("*/") if not path.name.startswith("."))
        if not folders:
            raise DataError(f"{root} has no subfolders to take actions from; give --name for the action these clips show")
        for folder in folders:
            found += [(path, folder.name) for path in clips_below([str(folder)])]
    return [path for path, _ in found], [label for _, label in found]


def _recording(pattern: str, path: str) -> str:
    """What the expression captures of a clip's name, without its ending."""
    try:
        match = re.search(pattern, os.path.splitext(os.path.basename(path))[0])
        return match[1] if match else ""
    except (re.error, IndexError) as error:
        raise ConfigError(
            f"--group {pattern!r} is no regular expression with one capture group ({error}); give one like '(.+)_c\\d+'"
        ) from error


def _show(classifier: FewShotClassifier, gallery: str) -> None:
    table = Table("action", "clips")
    for label, count in classifier.shots().items():
        table.add_row(Text(str(label)), str(count))
    console.print(table)
    asked = len(classifier.calibration().familiarity)
    needed = 1 / classifier.false_unknown - 1 if classifier.false_unknown else float("inf")
    if asked < needed < float("inf"):
        console.print(f"Nothing is called unknown yet: that takes {needed:.0f} clips with another one of their action, here are {asked}.")
    console.print(Text(f"Gallery: {gallery}"), soft_wrap=True)
