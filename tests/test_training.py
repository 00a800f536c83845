"""Training on real video files: learning, exact resume after SIGKILL, bad input, honest stops."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from amd_fast.data.loader import ClipLoader
from amd_fast.data.manifest import Manifest
from amd_fast.data.synth.writing import synthesize
from amd_fast.errors import CheckpointError, ConfigError, DataError, TrainingError
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.files import write_atomically
from amd_fast.training import engine
from amd_fast.training.batches import EpisodeBatches
from amd_fast.training.checkpoint import load_model
from amd_fast.training.config import (
    DataOptions,
    EpisodeOptions,
    ModelOptions,
    OptimiserOptions,
    TaskOptions,
    TrainConfig,
    ValidationOptions,
)
from amd_fast.training.engine import Trainer, learning_rate_factor, train


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic set: real H.264 files, classes split into train, val and test."""
    folder = tmp_path_factory.mktemp("synth")
    synthesize(folder, classes=16, clips_per_class=5, size=48, workers=1, progress=False)
    return folder / "manifest.csv"


def configure(manifest: Path, output: Path, steps: int = 6, **changes: object) -> TrainConfig:
    config = TrainConfig(
        output=str(output),
        threads=1,
        precision="fp32",
        checkpoint_every=2,
        tensorboard=False,
        model=ModelOptions(options={"dim": 32, "backbone_options": {"base": 8}}),
        data=DataOptions(manifest=str(manifest), size=32, frames=4, workers=1),
        episode=EpisodeOptions(ways=3, shots=1, queries=1),
        optimiser=OptimiserOptions(steps=steps, warmup_steps=2),
        validation=ValidationOptions(every=3, episodes=10),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    return {f"{part}.{name}": value for part in ("model", "heads") for name, value in state[part].items()}


def test_a_run_leaves_a_model_a_history_and_its_configuration(manifest: Path, tmp_path: Path) -> None:
    config = configure(manifest, tmp_path / "run", tensorboard=True)
    result = train(config, progress=False)
    assert result.best_accuracy is not None and 0 <= result.best_accuracy <= 1
    assert TrainConfig.from_yaml(tmp_path / "run" / "config.yaml") == config
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "validation"] == [3, 6]
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    model = result.model()
    assert not model.training and model.size == 32 and model.frames == 4
    assert model.generative_model.counts.sum() > 0


def test_training_learns_the_classes_it_is_shown(manifest: Path, tmp_path: Path) -> None:
    options = DataOptions(manifest=str(manifest), size=32, frames=4, workers=1, val_split="")
    optimiser = OptimiserOptions(steps=80, learning_rate=5e-3, warmup_steps=5)
    config = configure(manifest, tmp_path / "run", data=options, optimiser=optimiser, tasks=TaskOptions(episodic=0.0))
    history = train(config, progress=False).history
    assert history["classification"].iloc[-3:].mean() < 0.8 * np.log(10)  # ten training classes


def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(manifest: Path, tmp_path: Path) -> None:
    whole = configure(manifest, tmp_path / "whole", steps=8)
    train(whole, progress=False)
    killed = tmp_path / "killed"
    config_file = tmp_path / "config.yaml"
    config_file.write_text(replace(whole, output=str(killed)).to_yaml())
    script = "import sys; from amd_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "train", "--config", str(config_file), "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(Path(engine.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.Random(os.getpid()).uniform(0, 0.3))  # anywhere: also in the middle of writing a checkpoint
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True)
    expected, got = weights(tmp_path / "whole"), weights(killed)
    assert expected.keys() == got.keys()
    different = [name for name in expected if not torch.equal(expected[name], got[name])]
    assert not different
    best = [(folder / "checkpoints" / "best.safetensors").read_bytes() for folder in (tmp_path / "whole", killed)]
    assert best[0] == best[1]
    lines = [(folder / "metrics.jsonl").read_text() for folder in (tmp_path / "whole", killed)]
    assert lines[0] == lines[1]


def test_a_run_is_not_overwritten_and_a_foreign_checkpoint_is_refused(manifest: Path, tmp_path: Path) -> None:
    config = configure(manifest, tmp_path / "run", steps=2)
    train(config, progress=False)
    with pytest.raises(CheckpointError, match="--resume"):
        train(config, progress=False)
    with pytest.raises(CheckpointError, match="another configuration"):
        train(replace(config, seed=1), resume=True, progress=False)
    (tmp_path / "run" / "checkpoints" / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="damaged"):
        train(config, resume=True, progress=False)


def test_nan_stops_with_step_and_episodes(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = Trainer.losses

    def broken(self: Trainer, batch: object) -> dict[str, torch.Tensor]:
        terms = losses(self, batch)  # type: ignore[arg-type]
        return {**terms, "total": terms["total"] * (float("nan") if self.step == 3 else 1.0)}

    monkeypatch.setattr(Trainer, "losses", broken)
    with pytest.raises(TrainingError, match=r"step 3 \(episodes \[3\]") as caught:
        train(configure(manifest, tmp_path / "run"), progress=False)
    assert "last.pt" in str(caught.value)
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["step"] == 2


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    write_atomically(path, b"good", error=CheckpointError)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_atomically(path, b"better", error=CheckpointError)
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


def test_wrong_data_settings_are_named(manifest: Path, tmp_path: Path) -> None:
    for options, message in (
        (DataOptions(manifest=""), r"data\.manifest is not set"),
        (DataOptions(manifest=str(manifest), train_split="train", val_split="train"), "both the training and the validation split"),
    ):
        with pytest.raises(ConfigError, match=message):
            Trainer(configure(manifest, tmp_path / message.replace(" ", "_"), data=options), progress=False)
    with pytest.raises(DataError, match="no clips in split 'nothing'"):
        Trainer(configure(manifest, tmp_path / "split", data=DataOptions(manifest=str(manifest), train_split="nothing")), progress=False)
    with pytest.raises(ConfigError, match="no column for the modalities"):
        Trainer(configure(manifest, tmp_path / "modality", model=ModelOptions(modalities=["rgb", "thermal"])), progress=False)
    with pytest.raises(ConfigError, match=r"unknown setting optimiser\.speed"):
        TrainConfig.from_dict({"optimiser": {"speed": 3}})
    with pytest.raises(ConfigError, match=r"episode\.ways"):
        TrainConfig(episode=EpisodeOptions(ways=1))


def test_validation_never_touches_test_classes(manifest: Path, tmp_path: Path) -> None:
    """A trap: the test clips' files are garbage, so touching one would be noticed."""
    table = Manifest.from_csv(manifest)
    trap = Manifest(table.table.assign(path=[str(table.file(i)) for i in range(len(table))]), tmp_path)
    test = trap.table["split"] == "test"
    trap.table.loc[test, "path"] = [str(tmp_path / f"missing{i}.mp4") for i in range(int(test.sum()))]
    trap.to_csv(tmp_path / "trap.csv")
    data = DataOptions(manifest=str(tmp_path / "trap.csv"), size=32, frames=4, workers=1)
    result = train(configure(manifest, tmp_path / "run", data=data), progress=False)
    assert not result.clips_lost


def test_a_file_lost_after_indexing_is_replaced_by_a_clip_of_its_class(manifest: Path, tmp_path: Path) -> None:
    table = Manifest.from_csv(manifest).subset(split="train")
    absolute = table.table.assign(path=[str(table.file(i)) for i in range(len(table))])
    absolute.loc[0, "path"] = str(tmp_path / "gone.mp4")
    loader = ClipLoader(Manifest(absolute, tmp_path), ("rgb",), frames=4, size=32, workers=1)
    batch, again = (loader.load(np.array([0, 1]), (0, 0)) for _ in range(2))
    assert list(loader.lost) == [0] and "gone.mp4" in loader.lost[0]
    assert batch.positions[0] != 0 and absolute["label"][batch.positions[0]] == absolute["label"][0]
    assert torch.equal(batch.clips["rgb"], again.clips["rgb"])
    absolute["path"] = [str(tmp_path / f"gone{i}.mp4") for i in range(len(absolute))]
    with pytest.raises(DataError, match="no clip of class"):
        ClipLoader(Manifest(absolute, tmp_path), ("rgb",), frames=4, size=32, workers=1).load(np.array([0]), (0,))


@pytest.mark.parametrize("cache", ["ram", "none"])
def test_batches_depend_on_the_step_alone(manifest: Path, cache: str) -> None:
    table = Manifest.from_csv(manifest).subset(split="train")
    options = EpisodeOptions(ways=3, shots=1, queries=1, per_step=2)

    def batches(workers: int) -> EpisodeBatches:
        loader = ClipLoader(table, ("rgb", "flow"), frames=4, size=32, workers=workers, cache=cache)  # type: ignore[arg-type]
        loader.fill_cache(progress=False)
        return EpisodeBatches(table, loader, options, seed=3)

    first, second = batches(1), batches(2)
    streamed = list(first.stream(2, 5))
    assert [batch.step for batch in streamed] == [2, 3, 4]
    for batch in reversed(streamed):
        other = second.batch(batch.step)
        assert batch.episodes == other.episodes == range(2 * batch.step, 2 * batch.step + 2)
        for name in ("rgb", "flow"):
            assert torch.equal(batch.clips[name], other.clips[name])
        assert torch.equal(batch.base_class, other.base_class)
        labels = batch.base_class.view(2, -1)
        assert torch.equal(labels[:, :3], labels[:, 3:])  # queries follow the support class by class
    assert not torch.equal(streamed[0].clips["rgb"], streamed[1].clips["rgb"])


def test_an_error_in_the_reading_thread_reaches_the_training_loop(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Manifest.from_csv(manifest).subset(split="train")
    loader = ClipLoader(table, ("rgb",), frames=4, size=32, workers=1)
    batches = EpisodeBatches(table, loader, EpisodeOptions(ways=3, queries=1), seed=0)
    monkeypatch.setattr(batches, "batch", lambda step: (_ for _ in ()).throw(DataError(f"step {step} lost")))
    with pytest.raises(DataError, match="step 7 lost"):
        next(batches.stream(7, 9))


def test_learning_rate_rises_then_falls_to_nothing() -> None:
    factors = [learning_rate_factor(step, 10, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1.0
    assert all(a > b for a, b in pairwise(factors[10:])) and factors[100] == pytest.approx(0.0)


def test_model_file_round_trip_and_refusals(manifest: Path, tmp_path: Path) -> None:
    result = train(configure(manifest, tmp_path / "run", steps=3), progress=False)
    model, again = result.model(), load_model(tmp_path / "run" / "checkpoints" / "best.safetensors")
    clip = {"rgb": torch.randn(2, 4, 3, 32, 32), "flow": torch.randn(2, 4, 2, 32, 32)}
    with torch.no_grad():
        torch.testing.assert_close(again.encode(clip)[0], model.encode(clip)[0], rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="cannot read a model"):
        load_model(tmp_path / "nothing")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(CheckpointError, match=r"text\.safetensors"):
        load_model(tmp_path / "text.safetensors")


def test_feature_bank_round_trip_and_lost_clips(manifest: Path, tmp_path: Path) -> None:
    import amd_fast

    table = Manifest.from_csv(manifest).subset(split="val")
    absolute = table.table.assign(path=[str(table.file(i)) for i in range(len(table))])
    absolute.loc[2, "path"] = str(tmp_path / "gone.mp4")
    model = amd_fast.create_model("afmir_small", dim=32, size=32, frames=4)
    bank = FeatureBank.build(model, Manifest(absolute, tmp_path), tmp_path / "bank", batch=3, workers=1, progress=False)
    assert len(bank) == len(table) - 1 and bank.meta["clips_lost"] == 1
    opened = FeatureBank.open(tmp_path / "bank")
    assert np.array_equal(opened.tokens, bank.tokens) and list(opened.labels) == list(bank.labels) and opened.meta == bank.meta
    for first, second in zip(opened.describe(model), bank.describe(model), strict=True):
        assert torch.equal(first, second)
    (tmp_path / "bank" / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="build it again"):
        FeatureBank.open(tmp_path / "bank")
    with pytest.raises(DataError, match="not a feature bank"):
        FeatureBank.open(tmp_path)
