"""Training on real video files: learning, exact resume after SIGKILL, bad input, honest stops."""

import json
import os
import random
import resource
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from amd_fast.data.manifest import Manifest
from amd_fast.data.synth.writing import synthesize
from amd_fast.errors import CheckpointError, ConfigError, DataError, TrainingError
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.training import engine
from amd_fast.training.batches import TrainBatch
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
from amd_fast.training.engine import Trainer, train
from amd_fast.training.interruption import EXIT_INTERRUPTED
from amd_fast.training.optimisation import learning_rate_factor
from amd_fast.training.replay import replay_step


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
    """The last checkpoint: weights, buffers and optimiser state."""
    return load_file(folder / "checkpoints" / (folder / "checkpoints" / "last").read_text())


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
    while not (killed / "checkpoints" / "last").exists() and process.poll() is None and time.monotonic() < deadline:
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
    kept = tmp_path / "run" / "checkpoints" / "step-000002.safetensors"
    good = kept.read_bytes()
    kept.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="damaged"):
        train(config, resume=True, progress=False)
    kept.write_bytes(good.replace(b"training state 2", b"training state 9"))
    with pytest.raises(CheckpointError, match="format 'amd_fast training state 9'"):
        train(config, resume=True, progress=False)
    kept.unlink()
    with pytest.raises(CheckpointError, match="which is gone"):
        train(config, resume=True, progress=False)


def test_a_checkpoint_that_does_not_fit_the_model_is_refused(manifest: Path, tmp_path: Path) -> None:
    """As after an update of the library that renames or reshapes weights."""
    config = configure(manifest, tmp_path / "run", steps=2)
    train(config, progress=False)
    path = tmp_path / "run" / "checkpoints" / "step-000002.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    save_file({**state, "heads.bias": state["heads.bias"][:1].clone()}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"1 arrays differ in name or shape, the first is heads\.bias"):
        train(config, resume=True, progress=False)


def test_the_newest_checkpoints_are_kept(manifest: Path, tmp_path: Path) -> None:
    train(configure(manifest, tmp_path / "run", steps=7, keep_checkpoints=2), progress=False)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.safetensors",
        "last",
        "step-000006.safetensors",
        "step-000007.safetensors",
    ]
    assert (folder / "last").read_text() == "step-000007.safetensors"


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """One clip of a step's batch turns to NaN."""
    whole = Trainer.accumulate

    def accumulate(self: Trainer, batch: TrainBatch) -> torch.Tensor:
        if self.step == step:
            batch.clips["rgb"][-1] = float("nan")
        return whole(self, batch)

    monkeypatch.setattr(Trainer, "accumulate", accumulate)


def test_nan_stops_with_step_and_episodes(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, 3)
    config = configure(
        manifest,
        tmp_path / "run",
        episode=EpisodeOptions(ways=3, queries=1, per_step=2),
        batch_norm="frozen",
        validation=ValidationOptions(),
    )
    with pytest.raises(TrainingError, match=r"step 3 \(episodes \[6, 7\], seed 0\). rank 0: episode 7 \(task") as caught:
        train(config, progress=False)
    last = tmp_path / "run" / "checkpoints" / "step-000002.safetensors"
    assert str(last) in str(caught.value) and f"--config {tmp_path / 'run' / 'config.yaml'} --replay-step 3" in str(caught.value)
    assert (last.parent / "last").read_text() == last.name and all(value.isfinite().all() for value in load_file(last).values())


def test_a_step_is_replayed_exactly(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(manifest, tmp_path / "run", steps=20, checkpoint_every=8, episode=EpisodeOptions(ways=3, queries=1, per_step=2))
    history = train(config, progress=False).history
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    table = replay_step(config, 9, progress=False)  # two steps after the checkpoint of step 8 would be 9 and 10
    assert list(table["episode"]) == [18, 19]
    logged = history[(history["kind"] == "train") & (history["step"] == 10)].iloc[0]
    for name in ("total", "task", "distillation", "classification"):
        assert table[name].mean() == pytest.approx(logged[name], rel=1e-6)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    with pytest.raises(ConfigError, match="there is no step 20"):
        replay_step(config, 20)
    poison(monkeypatch, 9)
    assert replay_step(config, 9, progress=False)["total"].isna().sum() >= 1


def test_a_full_disk_leaves_the_last_good_checkpoint(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full from the second checkpoint on: a limit on the size of files is the same to the process."""
    config = configure(manifest, tmp_path / "run", steps=6, validation=ValidationOptions(every=100, episodes=10))
    save = Trainer.save

    def limited(self: Trainer) -> None:
        if self.step < 4:
            return save(self)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            return save(self)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)

    monkeypatch.setattr(Trainer, "save", limited)
    with pytest.raises(CheckpointError, match=r"File too large.*last good checkpoint is .*step-000002"):
        train(config, progress=False)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last", "step-000002.safetensors"]
    monkeypatch.setattr(Trainer, "save", save)
    train(config, resume=True, progress=False)
    assert (folder / "last").read_text() == "step-000006.safetensors"


def test_a_signal_saves_and_leaves_with_its_own_status(manifest: Path, tmp_path: Path) -> None:
    """SIGTERM at any moment: exit status 75, and with --resume the same end as without."""
    whole = configure(manifest, tmp_path / "whole", steps=30, checkpoint_every=100)
    train(whole, progress=False)
    config_file = tmp_path / "config.yaml"
    config_file.write_text(replace(whole, output=str(tmp_path / "stopped")).to_yaml())
    command = [sys.executable, "-m", "amd_fast.cli", "train", "--config", str(config_file), "--resume"]
    environment = {**os.environ, "PYTHONPATH": str(Path(engine.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED == 75
    assert "stopped by SIGTERM" in output and "--resume" in output
    subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True)
    expected, got = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


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
