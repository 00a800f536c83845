"""``amd-fast evaluate``: encode the clips once, score episodes, write tables and the report."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.table import Table

import amd_fast
from amd_fast.data.manifest import Manifest
from amd_fast.errors import ConfigError, DataError
from amd_fast.evaluation.ablations import ablate
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.evaluation.baselines import evaluate_baselines
from amd_fast.evaluation.protocol import Condition, evaluate
from amd_fast.evaluation.result import EvaluationResult
from amd_fast.models.afmir import AFMIR
from amd_fast.progress import console


def evaluate_command(
    run: str,
    manifest: str | None = None,
    split: str = "test",
    calibration_split: str = "val",
    calibration_manifest: str | None = None,
    ways: int = 5,
    shots: list[int] = [1, 5],  # noqa: B006 (never changed; jsonargparse shows it as the default)
    queries: int = 1,
    episodes: int = 10000,
    seed: int = 0,
    classes: list[str] = [],  # noqa: B006
    frames: int = 0,
    group: str | None = None,
    output: str | None = None,
    ablations: bool = False,
    baselines: bool = False,
    compare: str | None = None,
    device: str = "auto",
) -> None:
    """Score a trained model on few-shot episodes over classes it has never seen, and write tables and a report.

    Args:
        run: Run folder of `amd-fast train`, or a .safetensors file of a model.
        manifest: Manifest with the clips; by default the one the run was trained on.
        split: Split whose classes are tested; "all" for the whole manifest.
        calibration_split: Split of the validation classes, on which the trust in the views is calibrated; "none" to use it as saved.
        calibration_manifest: Manifest that split is taken from; by default the tested one, or the run's own where that has no such split.
        ways: Classes per episode.
        shots: Support clips per class; each number is a condition of its own.
        queries: Query clips per class.
        episodes: Episodes per condition.
        seed: Seed of the episodes.
        classes: Only these of the split's classes; by default all.
        frames: Frames sampled per clip; 0 for as many as in training. The read-out takes any number.
        group: Column of the manifest that names the source recording, where it is not "group".
        output: Folder for the results; by default evaluation/ in the run folder.
        ablations: Also score the method with parts of the inference taken away.
        baselines: Also score nearest-centroid and logistic-regression baselines on the same episodes.
        compare: Another run's folder, scored on the same episodes and compared (for example one trained without distillation).
        device: auto, cpu, cuda, ...
    """
    from amd_fast.training.checkpoint import load_model
    from amd_fast.training.engine import choose_device

    folder = Path(run) if Path(run).is_dir() else Path(run).resolve().parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    table = Manifest.from_csv(manifest, group=group) if manifest else _trained_on(folder)
    model = load_model(run).to(choose_device(device))
    model.frames = frames or model.frames
    tested = _part(table, split).subset(classes=classes or None)
    calibration = _calibration(table, tested, folder, calibration_manifest, calibration_split)
    bank, calibration_bank = FeatureBank.build(model, tested), None if calibration is None else FeatureBank.build(model, calibration)
    asked = {"ways": ways, "queries": queries, "episodes": episodes, "seed": seed}
    result = evaluate(model, bank, shots=tuple(shots), calibration=calibration_bank, **asked)
    extras: dict[str, Any] = {}
    conditions = [Condition(ways, count, queries, episodes, seed) for count in shots]
    if ablations:
        extras["ablations"] = _ablations(model, bank, calibration_bank, table, conditions)
    if compare is not None:
        other = _other_run(compare, result, tested, calibration, shots, asked)
        extras["ablations"] = pd.concat([extras["ablations"], other]) if ablations else other
    if baselines:
        extras["baselines"] = evaluate_baselines(tested, list(result.conditions), rows=bank.table, frames=model.frames)
    target = Path(output) if output else folder / "evaluation"
    print_result(result)
    result.save(target, history=_history(folder), facts=facts(table, model, run), **extras)
    console.print(f"report: {target / 'report.html'}", soft_wrap=True)


def _part(manifest: Manifest, split: str) -> Manifest:
    return manifest if split == "all" else manifest.subset(split=split)


def _calibration(table: Manifest, tested: Manifest, folder: Path, manifest: str | None, split: str) -> Manifest | None:
    """The clips of the validation classes, from the first manifest that has them; None where the agent is used as it was saved."""
    if split in ("none", ""):
        return None
    if manifest is not None:
        return _part(Manifest.from_csv(manifest), split)
    found = next((each for each in (table, _own(folder)) if each is not None and split in set(each.table["split"])), None)
    if found is None:
        console.print(f"no clips in the split {split!r} to calibrate on: the trust in the views is used as it was saved with the model")
        return None
    chosen = found.subset(split=split)
    if found is table and not set(chosen.classes).isdisjoint(tested.classes):
        raise ConfigError("calibration and tested classes overlap; give --calibration-split classes of its own, or none")
    return chosen


def _own(folder: Path) -> Manifest | None:
    """The manifest a run was trained on, where it can still be read."""
    try:
        return _trained_on(folder)
    except (ConfigError, DataError):
        return None


def _trained_on(folder: Path) -> Manifest:
    from amd_fast.training.config import TrainConfig

    path = folder / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{folder} has no config.yaml to tell which manifest it was trained on; pass --manifest")
    data = TrainConfig.from_yaml(path).data
    return Manifest.from_csv(data.manifest, group=data.group or None)


def _history(folder: Path) -> pd.DataFrame | None:
    from amd_fast.training.engine import read_history

    return read_history(folder) if (folder / "metrics.jsonl").exists() else None


def _ablations(
    model: AFMIR, bank: FeatureBank, calibration: FeatureBank | None, manifest: Manifest, conditions: list[Condition]
) -> pd.DataFrame:
    if calibration is None:
        raise ConfigError("--ablations needs validation classes to calibrate on; set --calibration-split")
    train = manifest.subset(split="train")
    train_bank = FeatureBank.build(model, train) if len(train) else None
    return pd.concat([ablate(model, bank, calibration, condition, train=train_bank) for condition in conditions], ignore_index=True)


def _other_run(
    run: str, result: EvaluationResult, tested: Manifest, calibration: Manifest | None, shots: list[int], asked: dict[str, int]
) -> pd.DataFrame:
    """AMI and every view of another run on the same episodes, as rows for the ablation table."""
    from amd_fast.evaluation.statistics import paired_t
    from amd_fast.training.checkpoint import load_model

    other = load_model(run)
    other_bank = FeatureBank.build(other, tested)
    learning = None if calibration is None else FeatureBank.build(other, calibration)
    there = evaluate(other, other_bank, shots=tuple(shots), calibration=learning, **asked)
    rows = []
    for mine, theirs in zip(result.conditions, there.conditions, strict=True):
        for method in theirs.methods:
            if method in mine.methods:
                test = paired_t(theirs.episode_accuracy(method), mine.episode_accuracy(method))
                row: dict[str, object] = {"condition": mine.name, "variant": f"{Path(run).name}: {method}"}
                row |= {"accuracy": 100 * float(theirs.episode_accuracy(method).mean()), "difference": 100 * test.difference, "p": test.p}
                rows.append(row)
    return pd.DataFrame(rows)


def print_result(result: EvaluationResult) -> None:
    """The table of accuracies, one column per condition."""
    summary = result.summary()
    table = Table(title="accuracy, % (± 95 % interval over episodes)")
    table.add_column("method")
    conditions = list(dict.fromkeys(summary["condition"]))
    for name in conditions:
        table.add_column(name, justify="right")
    for method in dict.fromkeys(summary["method"]):
        cells = []
        for name in conditions:
            row = summary[(summary["condition"] == name) & (summary["method"] == method)].iloc[0]
            cells.append(f"{row['accuracy']:.1f} ± {row['ci95']:.1f}")
        table.add_row(method, *cells)
    console.print(table)


def facts(manifest: Manifest, model: AFMIR, run: str) -> dict[str, Any]:
    """What a reader of the report needs to reproduce it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": " ".join(["amd-fast", *sys.argv[1:]]),
        "model": run,
        "modalities": ", ".join(model.modalities),
        "manifest hash": manifest.hash(),
        "split hash": manifest.split_hash(),
        "damaged clips marked": "yes" if "damage" in manifest.table else "no",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {gpu}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "amd_fast": f"{amd_fast.__version__} ({_commit()})",
    }


def _commit() -> str:
    """The commit of a source checkout, or 'installed'."""
    root = Path(amd_fast.__file__).parent.parent
    if not (root / ".git").exists():
        return "installed"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown commit"
    return done.stdout.strip() or "unknown commit"
