"""``amd-fast evaluate``: encode the clips once, score episodes, write tables and the report."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.table import Table

import amd_fast
from amd_fast.data.decoders import DecoderName
from amd_fast.data.manifest import SPLITS, Manifest
from amd_fast.errors import ConfigError, DataError
from amd_fast.evaluation.ablations import ablate
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.evaluation.baselines import evaluate_baselines, model_descriptors
from amd_fast.evaluation.protocol import Condition, evaluate
from amd_fast.evaluation.protocol_file import EpisodeList
from amd_fast.evaluation.result import EvaluationResult
from amd_fast.evaluation.seeds import seed_table
from amd_fast.evaluation.statistics import paired_t
from amd_fast.models.afmir import AFMIR
from amd_fast.progress import console
from amd_fast.storage import base_name, exists, is_remote, join, open_folder, parent


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
    crops: int = 1,
    group: str | None = None,
    bank: str | None = None,
    protocol: list[str] = [],  # noqa: B006
    seeds: int = 1,
    output: str | None = None,
    ablations: bool = False,
    baselines: bool = False,
    compare: str | None = None,
    note: str = "",
    decoder: DecoderName | None = None,
    device: str = "auto",
) -> None:
    """Score a trained model on few-shot episodes over classes it has never seen, and write tables and a report.

    Every single view, their uniform fusion and the adaptive one are scored on the same episodes. Clips are decoded and encoded first, which
    takes most of the time; from a bank of `amd-fast extract` it takes seconds.

    Args:
        run: Run folder of `amd-fast train`, or a .safetensors file of a model; or the URI of one, such as s3://bucket/runs/first.
        manifest: Manifest with the clips; by default the one the run was trained on.
        split: Split whose classes are tested; "all" for the whole manifest.
        calibration_split: Split of the validation classes, on which the trust in the views is calibrated; "none" to use the trust that was
            saved with the model.
        calibration_manifest: Manifest that split is taken from; by default the tested one, or the run's own where that has no such split.
        ways: Classes per episode.
        shots: Support clips per class; each number is a condition of its own.
        queries: Query clips per class.
        episodes: Episodes per condition.
        seed: Seed of the episodes.
        classes: Only these of the split's classes; by default all.
        frames: Frames sampled per clip; 0 for as many as in training. The read-out takes any number.
        crops: Squares per frame along the picture's longer side; 1 for the centre alone.
        group: Column of the manifest that names the source recording; by default the one of training, or "group" with --manifest.
        bank: Bank of `amd-fast extract` to take the clips from, in place of decoding and encoding them; its frames, crops and group hold.
        protocol: Files of `amd-fast episodes`, each a condition of its own; in place of ways, shots, queries, episodes and seed.
        seeds: Repeat with this many seeds of the episodes, from --seed on; the report is on the first, with a table over all of them.
        output: Folder for the results, or its URI; by default evaluation/ in the run folder.
        ablations: Also score the method with parts of the inference taken away; takes calibration classes.
        baselines: Also score nearest-centroid and logistic-regression baselines on the same episodes.
        compare: Another run's folder, scored on the same episodes and compared (for example one trained without distillation).
        note: Remark to keep with the results, shown at the end of the report.
        decoder: Of clips that are in no bank: auto (DALI where the GPU decodes their codec, else PyAV), dali or pyav, which is then never
            replaced; by default pyav where the run was trained with data.decoder pyav, else auto. Baselines always read with PyAV.
        device: Where to compute, and where DALI decodes: auto (a GPU where there is one), cpu, cuda, cuda:1, ...
    """
    folder = run_folder(run)
    source = None if bank is None else _open_bank(bank, manifest, group, frames, crops)
    table = source.manifest if source is not None else Manifest.from_csv(manifest, group=group) if manifest else trained_on(folder, group)
    tested = _part(table, split).subset(classes=classes or None)
    calibration = _calibration(table, tested, folder, calibration_manifest, calibration_split)
    lists = tuple(EpisodeList.read(path) for path in protocol)
    if seeds < 1 or (seeds > 1 and lists):
        raise ConfigError(f"--seeds must be at least 1, and 1 where --protocol lists the episodes; got {seeds}")
    reader = decoder or usual_decoder(folder)
    asked = _Asked(tested, calibration, tuple(shots), ways, queries, episodes, seed, frames, crops, reader, device, source, lists)
    model, clips, learning = asked.banks(run)
    result = asked.evaluate(model, clips, learning)
    result.meta.update(facts(table, model, run), **({"note": note} if note else {}))  # results.json and report.html both show them
    extras: dict[str, Any] = {"history": _history(folder)}
    tables = [asked.ablations(model, clips, learning, table)] if ablations else []
    tables += [asked.other_run(compare, result)] if compare is not None else []
    if tables:
        extras["ablations"] = pd.concat(tables, ignore_index=True)
    if baselines:
        own = model_descriptors(model, clips)
        extras["baselines"] = evaluate_baselines(tested, result.conditions, rows=clips.table, frames=model.frames, descriptors=own)
    if seeds > 1:
        further = [replace(asked, seed=seed + number).evaluate(model, clips, learning) for number in range(1, seeds)]
        extras["seeds"] = seed_table({"": [result, *further]}).drop(columns=["system", "same_episodes", "sd_rest"])
    target = output or join(folder, "evaluation")
    print_result(result)
    with open_folder(target) as written:
        result.save(written, clips=clips.manifest, **extras)
    console.print(f"report: {join(target, 'report.html')}", soft_wrap=True)


def _open_bank(path: str, manifest: str | None, group: str | None, frames: int, crops: int) -> FeatureBank:
    """The bank of ``--bank``, checked against the manifest where one is named too."""
    if frames or crops != 1 or (group and manifest is None):
        raise ConfigError("--frames, --crops and --group are those of the bank; give them to 'amd-fast extract' instead")
    bank = FeatureBank.open(path)
    if manifest is not None:
        bank.check(manifest=Manifest.from_csv(manifest, group=group))
    return bank


@dataclass(frozen=True)
class _Asked:
    """What is asked of every model that is scored: clips, episodes, and how the clips are read."""

    tested: Manifest
    calibration: Manifest | None
    shots: tuple[int, ...]
    ways: int
    queries: int
    episodes: int
    seed: int
    frames: int
    crops: int
    decoder: DecoderName
    device: str
    source: FeatureBank | None
    lists: tuple[EpisodeList, ...]

    def banks(self, run: str) -> tuple[AFMIR, FeatureBank, FeatureBank | None]:
        """A run's model, with the banks of the tested and of the calibration clips."""
        from amd_fast.training.checkpoint import load_model
        from amd_fast.training.engine import choose_device

        model = load_model(run).to(choose_device(self.device))
        model.frames = self.frames or model.frames
        if self.source is not None:
            model.frames = int(self.source.meta["key"]["transform"]["frames"])
            self.source.check(model)
        return model, self.bank(model, self.tested), None if self.calibration is None else self.bank(model, self.calibration)

    def bank(self, model: AFMIR, clips: Manifest) -> FeatureBank:
        """Clips as rows of the bank that was given, or encoded now where they are not in it."""
        if self.source is not None and clips.root == self.source.manifest.root:
            held = self.source.table["path"].isin(set(clips.table["path"])).to_numpy()
            if held.sum() == len(clips):
                return self.source.subset(held)
        return FeatureBank.build(model, clips, crops=self.crops, decoder=self.decoder)

    def evaluate(self, model: AFMIR, bank: FeatureBank, learning: FeatureBank | None) -> EvaluationResult:
        return evaluate(
            model,
            bank,
            ways=self.ways,
            shots=self.shots,
            queries=self.queries,
            episodes=self.episodes,
            seed=self.seed,
            calibration=learning,
            listed=self.lists,
        )

    def ablations(self, model: AFMIR, bank: FeatureBank, learning: FeatureBank | None, table: Manifest) -> pd.DataFrame:
        if learning is None:
            raise ConfigError("--ablations needs validation classes to calibrate on; set --calibration-split")
        train = self.bank(model, table.subset(split="train")) if "train" in set(table.table["split"]) else None
        drawn = [Condition(self.ways, count, self.queries, self.episodes, self.seed) for count in self.shots]
        conditions = [Condition.of(each) for each in self.lists] or drawn
        return pd.concat([ablate(model, bank, learning, condition, train=train) for condition in conditions], ignore_index=True)

    def other_run(self, run: str, result: EvaluationResult) -> pd.DataFrame:
        """AMI and every view of another run on the same episodes, as rows for the ablation table."""
        there = self.evaluate(*self.banks(run))
        rows: list[dict[str, object]] = []
        for mine, theirs in zip(result.conditions, there.conditions, strict=True):
            for method in (name for name in theirs.methods if name in mine.methods):
                test = paired_t(theirs.episode_accuracy(method), mine.episode_accuracy(method))
                row: dict[str, object] = {"condition": mine.name, "variant": f"{Path(run).name}: {method}"}
                row |= {"accuracy": 100 * float(theirs.episode_accuracy(method).mean()), "difference": 100 * test.difference, "p": test.p}
                rows.append(row)
        return pd.DataFrame(rows)


def _part(manifest: Manifest, split: str) -> Manifest:
    return manifest if split == "all" else manifest.subset(split=split)


def _calibration(table: Manifest, tested: Manifest, folder: Path | str, manifest: str | None, split: str) -> Manifest | None:
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


def _own(folder: Path | str) -> Manifest | None:
    """The manifest a run was trained on, where it can still be read."""
    try:
        return trained_on(folder)
    except (ConfigError, DataError):
        return None


def run_folder(run: str) -> Path | str:
    """The run folder that a run or a model file in it belongs to; a str where it is a URI."""
    if is_remote(run):
        place = parent(run) if run.endswith(".safetensors") else run.rstrip("/")
        return parent(place) if base_name(place) == "checkpoints" else place
    folder = Path(run) if Path(run).is_dir() else Path(run).resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder


def trained_on(folder: Path | str, group: str | None = None) -> Manifest:
    """The manifest a run was trained on; ``group`` names another column of recordings than in training.

    Raises:
        ConfigError: there is no config.yaml to tell.
    """
    from amd_fast.training.config import TrainConfig

    path = join(folder, "config.yaml")
    if not exists(path):
        raise ConfigError(f"{folder} has no config.yaml to tell which manifest it was trained on; pass --manifest")
    data = TrainConfig.from_yaml(path).data
    return Manifest.from_csv(data.manifest, group=group or data.group or None)


def usual_decoder(folder: Path | str) -> DecoderName:
    """The decoder where none is named: PyAV for a run that was trained with it by name, whoever did that had a reason; else "auto".

    DALI is not taken over by name: "auto" takes it where it can be had, and a run is often evaluated on another machine.
    """
    from amd_fast.training.config import TrainConfig

    path = join(folder, "config.yaml")
    try:
        return "pyav" if exists(path) and TrainConfig.from_yaml(path).data.decoder == "pyav" else "auto"
    except ConfigError:  # a model's file may lie beside the config.yaml of something else
        return "auto"


def _history(folder: Path | str) -> pd.DataFrame | None:
    from amd_fast.training.history import read_history

    return read_history(folder) if exists(join(folder, "metrics.jsonl")) else None


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
        "split": _split(manifest),
        "split hash": manifest.split_hash(),
        "damaged clips marked": "yes" if "damage" in manifest.table else "no",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {gpu}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "amd_fast": f"{amd_fast.__version__} ({_commit()})",
    }


def _split(manifest: Manifest) -> str:
    """Name of the split, with its classes and clips: ``hmdb51_arn (train 31 classes, 4280 clips; ...)``."""
    parts = {split: part["label"] for split, part in manifest.table.groupby("split", sort=False) if split}
    counts = "; ".join(f"{split} {parts[split].nunique()} classes, {len(parts[split])} clips" for split in SPLITS if split in parts)
    return f"{manifest.split_name or 'unnamed'} ({counts})" if counts else "none"


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
