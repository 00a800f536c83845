"""Training from a feature bank: the same episodes and losses as from the clips, and backbones that stay as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from amd_fast.data.manifest import Manifest
from amd_fast.data.synth.writing import synthesize
from amd_fast.errors import ConfigError, DataError
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.training.checkpoint import load_model
from amd_fast.training.config import DataOptions, EpisodeOptions, ModelOptions, OptimiserOptions, TrainConfig, ValidationOptions
from amd_fast.training.engine import Trainer, train
from amd_fast.training.objective import TOKENS
from amd_fast.training.token_batches import TokenBatches

EPISODE = EpisodeOptions(ways=3, shots=1, queries=2, per_step=4)


def config(folder: Path, output: str, **data: str) -> TrainConfig:
    return TrainConfig(
        output=str(folder / output), threads=1, tensorboard=False, device="cpu", precision="fp32",
        model=ModelOptions(options={"dim": 32}, weights=str(folder / "first") if data else ""),
        data=DataOptions(**{"manifest": str(folder / "manifest.csv"), "size": 32, "frames": 2, "workers": 1, **data}),  # type: ignore[arg-type]
        episode=EPISODE if data else EpisodeOptions(ways=3, queries=1),
        optimiser=OptimiserOptions(steps=6 if data else 2, warmup_steps=1),
        validation=ValidationOptions(every=3, episodes=10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest, a run trained on its clips, and the bank of that run."""
    path = tmp_path_factory.mktemp("bank training")
    made = synthesize(path / "made", classes=14, clips_per_class=4, size=48, damage=False, workers=1, progress=False)
    made.to_csv(path / "manifest.csv")
    train(config(path, "first"), progress=False)
    FeatureBank.build(load_model(path / "first"), Manifest.from_csv(path / "manifest.csv"), path / "bank", progress=False)
    return path


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_episodes_are_those_of_the_clips(folder: Path, world_size: int) -> None:
    bank = FeatureBank.open(folder / "bank")
    part = bank.subset((bank.table["split"] == "train").to_numpy())
    whole = [TokenBatches(part, EPISODE, 3).batch(step) for step in range(3)]
    ranks = [list(TokenBatches(part, EPISODE, 3, rank=rank, world_size=world_size).stream(0, 3)) for rank in range(world_size)]
    for step in range(3):
        size = len(part.tokens[:1]) * 3 * 3
        for rank in range(world_size):
            batch = ranks[rank][step]
            assert list(batch.episodes) == list(range(4 * step + rank, 4 * step + 4, world_size))
            wanted = whole[step].positions.reshape(4, size)[rank::world_size].ravel()
            assert batch.positions.tolist() == wanted.tolist()
            np.testing.assert_array_equal(batch.clips[TOKENS].numpy(), part.tokens[wanted])
            classes = np.unique(part.labels)
            assert [classes[code] for code in batch.base_class] == part.labels[wanted].tolist()
    with pytest.raises(ConfigError, match="shared out evenly"):
        TokenBatches(part, EPISODE, 3, world_size=3)


def test_losses_equal_those_of_the_clips_encoded_by_the_same_backbones(folder: Path) -> None:
    trainer = Trainer(config(folder, "unused", bank=str(folder / "bank")), progress=False)
    batch = trainer.data.batches.batch(0)
    model, objective = trainer.model.eval(), trainer.objective.eval()
    table = Manifest.from_csv(folder / "manifest.csv").subset(split="train")
    from amd_fast.data.loader import ClipLoader

    loaded = ClipLoader(table, model.modalities, frames=2, size=32, workers=1).load_test(batch.positions)
    labels = (batch.support_label, batch.query_label, batch.base_class, objective.count(batch.present), None)
    with torch.no_grad():
        from_tokens, from_clips = (objective(clips, batch.present, *labels) for clips in (batch.clips, loaded.clips))
    np.testing.assert_allclose(from_tokens.numpy(), from_clips.numpy(), rtol=1e-4, atol=1e-6)


def test_training_leaves_backbones_as_they_are_and_improves_the_rest(folder: Path) -> None:
    for path in (folder / "made").rglob("*.mp4"):
        assert path.is_file()
    result = train(config(folder, "second", bank=str(folder / "bank")), progress=False)
    before, after = (load_file(folder / name / "checkpoints" / "best.safetensors") for name in ("first", "second"))
    frozen = [name for name in before if name.startswith(("backbones.", "projections."))]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["readout.query.weight"], after["readout.query.weight"])
    assert result.best_accuracy is not None and (result.history["kind"] == "validation").sum() == 2
    FeatureBank.open(folder / "bank").check(result.model())  # the bank serves the new model as well


def test_a_bank_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    other = config(folder, "other", bank=str(folder / "bank"))
    other.model.weights = ""
    with pytest.raises(DataError, match="other weights"):
        train(other, progress=False)
    smaller = Manifest.from_csv(folder / "manifest.csv").subset(split="train")
    smaller.to_csv(tmp_path / "smaller.csv")
    with pytest.raises(DataError, match="other manifest"):
        train(config(folder, "third", bank=str(folder / "bank"), manifest=str(tmp_path / "smaller.csv")), progress=False)
    with pytest.raises(ConfigError, match="no clips in the split 'nothing'"):
        train(config(folder, "fourth", bank=str(folder / "bank"), train_split="nothing"), progress=False)
