"""Traps for a protocol that leaks: what training and validation may not look at is poisoned, and nothing may change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from amd_fast.data.manifest import Manifest
from amd_fast.data.synth.writing import synthesize
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.evaluation.protocol import evaluate
from amd_fast.training.config import DataOptions, EpisodeOptions, ModelOptions, OptimiserOptions, TrainConfig, ValidationOptions
from amd_fast.training.engine import train


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return synthesize(tmp_path_factory.mktemp("made"), classes=12, clips_per_class=4, size=48, damage=False, workers=1, progress=False)


def trained(clips: Manifest, folder: Path) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
    """Weights of the best model and the history (losses and validation accuracies) of a short training on a manifest."""
    clips.to_csv(folder / "manifest.csv")
    config = TrainConfig(
        output=str(folder / "run"),
        threads=1,
        tensorboard=False,
        device="cpu",
        precision="fp32",
        model=ModelOptions(options={"dim": 32}),
        data=DataOptions(manifest=str(folder / "manifest.csv"), size=32, frames=2, workers=1),
        episode=EpisodeOptions(ways=2, queries=1),
        optimiser=OptimiserOptions(steps=6, warmup_steps=2),
        validation=ValidationOptions(every=3, episodes=20),
    )
    result = train(config, progress=False)
    return load_file(result.folder / "checkpoints" / "best.safetensors"), result.history


def test_training_and_validation_never_look_at_test_classes(tmp_path: Path, clips: Manifest) -> None:
    table = clips.table.copy()
    table["path"] = [str(clips.file(row)) for row in range(len(clips))]
    test = (table["split"] == "test").to_numpy()
    assert 0 < test.sum() < len(table)
    poisoned = table.copy()
    for row in np.flatnonzero(test):  # files that nobody can read, under labels that mix all classes
        file = tmp_path / f"poison {row}.mp4"
        file.write_bytes(b"not a video")
        poisoned.loc[row, "path"] = str(file)
    poisoned.loc[test, "label"] = np.roll(table.loc[test, "label"].to_numpy(), 3)
    poisoned.loc[test, "group"] = table["group"].iloc[0]
    runs = []
    for name, rows in (("clean", table), ("poisoned", poisoned), ("absent", table[~test])):
        (tmp_path / name).mkdir()
        runs.append(trained(Manifest(rows, tmp_path), tmp_path / name))
    weights, history = runs[0]
    assert (history["kind"] == "validation").sum() == 2
    for other, other_history in runs[1:]:
        assert all(torch.equal(value, other[name]) for name, value in weights.items())
        pd.testing.assert_frame_equal(history, other_history)


def test_the_trap_is_seen_by_what_does_look(tmp_path: Path, clips: Manifest) -> None:
    """The same poison on validation classes changes the validation, or the test above would prove nothing."""
    table = clips.table.assign(path=[str(clips.file(row)) for row in range(len(clips))])
    validation = (table["split"] == "val").to_numpy()
    poisoned = table.copy()
    poisoned.loc[validation, "label"] = np.roll(table.loc[validation, "label"].to_numpy(), 3)
    histories = []
    for name, rows in (("clean", table), ("poisoned", poisoned)):
        (tmp_path / name).mkdir()
        histories.append(trained(Manifest(rows, tmp_path), tmp_path / name)[1])
    assert not histories[0].equals(histories[1])


def test_an_evaluation_carries_nothing_from_one_episode_to_the_next() -> None:
    """What is answered in an episode does not depend on how many others are asked: the agent does not go on learning in the test."""
    import amd_fast

    torch.manual_seed(0)
    model = amd_fast.create_model("afmir_small", dim=32).eval()
    label = np.repeat([f"class {i}" for i in range(6)], 8)
    tokens = np.random.default_rng(0).normal(size=(48, 2, 3, 32)).astype(np.float32)
    table = pd.DataFrame({"path": [f"{i}.mp4" for i in range(48)], "label": label, "group": [str(i) for i in range(48)]})
    bank = FeatureBank(tokens, np.zeros((48, 2, 3), np.float32), table, {})
    learning = FeatureBank(tokens[::-1].copy(), bank.log_weight, table, {})
    many, few = (evaluate(model, bank, episodes=n, calibration=learning, calibration_episodes=40).conditions[0] for n in (80, 40))
    np.testing.assert_allclose(few.log_probs["ami"], many.log_probs["ami"][:40], atol=1e-6)
