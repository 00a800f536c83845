"""AFMIR under Lightning, and in the form of the Hugging Face hub, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import amd_fast
from amd_fast.errors import CheckpointError, ConfigError, WeightsError
from amd_fast.training.batches import TrainBatch
from amd_fast.training.checkpoint import load_model, save_model
from amd_fast.training.config import EpisodeOptions, OptimiserOptions, TaskOptions
from amd_fast.training.objective import TERMS

WAYS, T, SIZE, CLASSES = 3, 2, 16, 6
RECIPE: dict[str, Any] = {
    "name": "afmir_small",
    "modalities": ["rgb", "flow"],
    "dim": 16,
    "heads": 2,
    "frames": T,
    "size": SIZE,
    "backbone_options": {"width": 8, "base": 4},
    "loss": {"margin": 0.2},
}
OPTIONS = EpisodeOptions(ways=WAYS, shots=1, queries=2, per_step=2)


def make_batch(step: int) -> TrainBatch:
    generator = torch.Generator().manual_seed(step)
    clips = 2 * WAYS * 3
    present = torch.ones(clips, 2, dtype=torch.bool)
    present[step, 1] = False
    classes = torch.arange(WAYS)
    return TrainBatch(
        step,
        {name: torch.randn(clips, T, channels, SIZE, SIZE, generator=generator) for name, channels in (("rgb", 3), ("flow", 2))},
        present,
        classes.expand(2, -1).contiguous(),
        classes.repeat_interleave(2).expand(2, -1).contiguous(),
        torch.randint(CLASSES, (clips,), generator=generator),
        range(2 * step, 2 * step + 2),
        np.zeros(clips, np.int64),
    )


class Episodes(IterableDataset):
    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[TrainBatch]:
        return (make_batch(step) for step in range(self.number))


def make_module(**options: Any) -> Any:
    pytest.importorskip("lightning")
    from amd_fast.adapters import AFMIRModule
    from amd_fast.models.afmir import LossOptions

    torch.manual_seed(0)
    recipe = {**RECIPE, "modalities": ("rgb", "flow"), "loss": LossOptions(margin=0.2)}
    return AFMIRModule(amd_fast.create_model(**recipe), CLASSES, OPTIONS, **options)


def fit(module: Any, folder: Path, **options: Any) -> Any:
    from lightning.pytorch import Trainer

    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=folder, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers
        trainer.fit(module, DataLoader(Episodes(4), batch_size=None), DataLoader(Episodes(2), batch_size=None))
    return trainer


def test_lightning_trains_with_the_engines_loss_and_gradients(tmp_path: Path) -> None:
    module, reference = make_module(), make_module().train()
    seen: list[torch.Tensor] = []
    module.on_before_optimizer_step = lambda optimiser: seen.extend(p.grad.clone() for p in module.parameters() if p.grad is not None)
    module.optimiser_options.clip_norm = 0.0
    trainer = fit(module, tmp_path, fast_dev_run=True)
    batch = make_batch(0)
    labels = (batch.support_label, batch.query_label, batch.base_class)
    shares = reference.objective(batch.clips, batch.present, *labels, reference.objective.count(batch.present), 0.0)
    shares[:, 0].sum().backward()
    wanted = [p.grad for p in reference.parameters() if p.grad is not None]
    assert len(seen) == len(wanted) > 10
    for got, gradient in zip(seen, wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6)
    for name, value in zip(TERMS, shares.sum(0), strict=True):
        torch.testing.assert_close(trainer.callback_metrics[name], value.detach(), rtol=1e-4, atol=1e-6)
    assert {"val_loss", "val_accuracy", "precision"} <= trainer.callback_metrics.keys()


def test_lightning_schedules_distillation_and_rate_and_calibrates_on_validation(tmp_path: Path) -> None:
    module = make_module(
        tasks=TaskOptions(distillation_start=0.5), optimiser=OptimiserOptions(steps=4, warmup_steps=2, learning_rate=0.01, clip_norm=0.1)
    )
    counts = module.model.generative_model.counts.clone()
    weights: list[Any] = []
    plain = module.objective.forward
    module.objective.forward = lambda *inputs: weights.append(inputs[-1]) or plain(*inputs)
    rates: list[float] = []
    module.on_before_optimizer_step = lambda optimiser: rates.append(optimiser.param_groups[0]["lr"])
    trainer = fit(module, tmp_path, max_steps=4, num_sanity_val_steps=1)
    assert weights == [0.0, 0.0, None, None] and trainer.global_step == 4
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])
    assert module.model.generative_model.counts.sum() > counts.sum()


def test_lightning_missing_is_said_with_its_extra() -> None:
    code = """
import sys
sys.modules["lightning"] = None
import amd_fast.adapters
import amd_fast.errors
try:
    amd_fast.adapters.AFMIRModule
except amd_fast.errors.ConfigError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert "amd_fast[adapters]" in done.stdout


def hub_model() -> Any:
    pytest.importorskip("huggingface_hub")
    from amd_fast.adapters import HubAFMIR

    torch.manual_seed(1)
    model = HubAFMIR(RECIPE).eval()
    model.generative_model.counts.mul_(1.5)
    return model


def log_probs(model: amd_fast.AFMIR) -> torch.Tensor:
    batch = make_batch(0)
    support = {name: clip[:WAYS] for name, clip in batch.clips.items()}
    query = {name: clip[WAYS : 3 * WAYS] for name, clip in batch.clips.items()}
    return model(support, torch.arange(WAYS), query).log_probs


def test_a_folder_holds_the_model_without_a_network_and_without_pickle(tmp_path: Path) -> None:
    model = hub_model()
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == RECIPE
    torch.save(log_probs(model).detach(), tmp_path / "wanted.pt")
    code = """
import pickle, sys, torch
wanted = torch.load("wanted.pt", weights_only=True)
def refuse(*arguments, **options):
    raise AssertionError("a pickle was read")
torch.load = pickle.load = pickle.loads = refuse
sys.path[:0] = sys.argv[1:]
import test_adapters_libraries as tests
from amd_fast.adapters import HubAFMIR
model = HubAFMIR.from_pretrained("model")
assert not model.training and model.loss.margin == 0.2
torch.testing.assert_close(tests.log_probs(model), wanted)
"""
    tests = Path(__file__).resolve().parent
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tests), str(tests.parent)], cwd=tmp_path, env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(log_probs(load_model(tmp_path / "model" / "model.safetensors")), log_probs(model))


def test_push_to_hub_uploads_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    model, uploaded = hub_model(), {}

    def upload(self: object, *, folder_path: Path, **options: Any) -> str:
        uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        return options["repo_id"]

    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, repo_id, **options: huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    assert model.push_to_hub("someone/gestures") == "someone/gestures"
    model.save_pretrained(tmp_path)
    assert uploaded["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    assert uploaded.keys() == {"README.md", "config.json", "model.safetensors"}


def test_a_trained_run_becomes_a_hub_model(tmp_path: Path) -> None:
    model = hub_model()
    save_model(model, tmp_path / "best.safetensors", RECIPE)
    again = type(model).from_run(str(tmp_path / "best.safetensors"))
    torch.testing.assert_close(log_probs(again), log_probs(model))
    assert again.recipe == RECIPE


def test_bad_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hub_model()
    kind = type(model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"someone/nothing.*config\.json and model.safetensors"):
        kind.from_pretrained("someone/nothing")
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    config.write_text(json.dumps({**RECIPE, "dim": 32}))
    with pytest.raises(CheckpointError, match="do not fit"):
        kind.from_pretrained(tmp_path)
    config.write_text(json.dumps({**RECIPE, "name": "no_such_model"}))
    with pytest.raises(ConfigError, match="no_such_model"):
        kind.from_pretrained(tmp_path)
    config.write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        kind.from_pretrained(tmp_path)
    config.write_text(json.dumps(RECIPE))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        kind.from_pretrained(tmp_path)
