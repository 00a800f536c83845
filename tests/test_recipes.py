"""Recipes: each builds its configuration, its model at full size (without memory) and runs a step at a small size."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from amd_fast import cli
from amd_fast.errors import ConfigError
from amd_fast.models.backbones import create_backbone
from amd_fast.training.blocks import prepare_blocks
from amd_fast.training.command import _with_local_config, build_parser
from amd_fast.training.config import DataOptions, EpisodeOptions, OptimiserOptions, TrainConfig, ValidationOptions
from amd_fast.training.engine import train
from amd_fast.training.memory import estimate, kept_for_backward
from amd_fast.training.recipes import list_recipes, recipe, recipe_path

BASES = [name for name in list_recipes() if not name.startswith("with_")]
CHANGES = [name for name in list_recipes() if name.startswith("with_")]
ALONE = ("with_one_gpu_of_11gb",)
"""Changes that are for one process."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small real files, classes split into train, val and test."""
    from amd_fast.data.synth.writing import synthesize

    folder = tmp_path_factory.mktemp("synth")
    synthesize(folder, classes=12, clips_per_class=4, size=48, workers=1, progress=False)
    return folder / "manifest.csv"


def _needs_of(*names: str) -> None:
    if "with_vit_b16" in names:
        pytest.importorskip("timm")


def tiny(config: TrainConfig, manifest: Path, output: Path) -> TrainConfig:
    """The recipe with its switches as they are, and small in every size; without a network, backbones start at random."""
    small: dict[str, Any] = {"backbone": "small", "backbone_options": {"base": 8}, "dim": 32, "heads": 4}
    if str(config.model.options.get("backbone", "")).startswith("timm:"):
        small |= {"backbone": "timm:test_vit", "backbone_options": {}}
    return replace(
        config,
        output=str(output),
        device="cpu",
        threads=1,
        compile=False,
        tensorboard=False,
        model=replace(config.model, pretrained=False, options=config.model.options | small),
        data=replace(config.data, manifest=str(manifest), size=32, frames=4, workers=1),
        episode=replace(config.episode, ways=2, queries=1, per_step=config.optimiser.accumulate),
        optimiser=replace(config.optimiser, steps=1),
        validation=ValidationOptions(episodes=4),
    )


def parsed(arguments: list[str]) -> TrainConfig:
    """What ``amd-fast train`` makes of its arguments."""
    parser = build_parser()
    namespace = parser.instantiate(parser.parse_args(_with_local_config(arguments)))
    return TrainConfig(
        **{key: value for key, value in vars(namespace).items() if key not in ("config", "resume", "replay_step", "profile")}
    )


@pytest.mark.parametrize("names", [[name] for name in BASES] + [["hmdb51_resnet50", name] for name in CHANGES], ids="+".join)
def test_a_recipe_runs_a_step(names: list[str], manifest: Path, tmp_path: Path) -> None:
    _needs_of(*names)
    config = recipe(*names)
    assert parsed([part for name in names for part in ("--config", f"recipe:{name}")]) == config
    result = train(tiny(config, manifest, tmp_path / "run"), progress=False)
    assert result.best_accuracy is not None


@pytest.mark.parametrize("name", BASES + CHANGES)
def test_the_memory_a_recipe_states_is_the_computed_one(name: str) -> None:
    _needs_of(name)
    text = recipe_path(name).read_text(encoding="utf-8")
    stated = re.search(r"memory(?: per GPU)?, computed and not measured: ([\d.]+) GB", text, re.IGNORECASE)
    assert stated, "a recipe states the memory it takes, and that this is computed"
    names = [name] if name in BASES else ["hmdb51_resnet50", name]
    memory = estimate(recipe(*names), processes=1 if name in ALONE else 8)
    assert f"{memory.total / 1e9:.1f}" == stated[1]
    if name in ALONE:
        assert memory.total < 0.8 * 11e9, "too little is left of 11 GB for what is not computed"


def kept_by_autograd(backbone: torch.nn.Module, images: torch.Tensor) -> int:
    """Bytes of all different storages that a real forward pass has autograd keep."""
    own = {value.untyped_storage().data_ptr() for value in [*backbone.parameters(), *backbone.buffers(), images]}
    found: dict[int, int] = {}

    def note(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value), torch.autocast("cpu", torch.bfloat16):
        output = backbone(images)
    assert output.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_computed_activations_are_those_that_a_real_pass_keeps(name: str) -> None:
    backbone = create_backbone(name, 2).to(memory_format=torch.channels_last).eval()
    images = torch.randn(3, 2, 64, 64)
    kept = kept_for_backward(backbone, images, bf16=True)
    assert kept.everything == kept_by_autograd(backbone, images)
    if name == "resnet18":
        prepare_blocks(backbone, compiled=False, checkpointed=True)
        assert kept.between == kept_by_autograd(backbone, images) < kept.everything - kept.largest


@pytest.mark.parametrize(
    ("override", "views"),
    [
        ("--model.options.asi false", ["rgb", "flow", "joint"]),
        ("--loss.distillation 0", ["rgb", "flow", "joint"]),
        ("--model.modalities [rgb]", ["rgb"]),
        ("--model.modalities [flow]", ["flow"]),
        ("--model.options.matcher otam", ["rgb", "flow", "joint"]),
        ("--model.options.matcher bi_mhm", ["rgb", "flow", "joint"]),
    ],
)
def test_ablations_are_overrides_of_a_recipe(override: str, views: list[str], manifest: Path, tmp_path: Path) -> None:
    config = parsed(["--config", "recipe:hmdb51_resnet50", *override.split()])
    assert config != recipe("hmdb51_resnet50")
    result = train(tiny(config, manifest, tmp_path / "run"), progress=False)
    model = result.model()
    assert list(model.views) == views
    if "asi" in override:
        assert model.generative_model.precision == 0, "trust was inferred"
        policy = model.generative_model.infer(model.generative_model.observe(torch.rand(5, 3, 2))).policy
        torch.testing.assert_close(policy, torch.full((5, 3), 1 / 3, dtype=policy.dtype))


def test_frozen_backbones_stay_as_they_are(manifest: Path, tmp_path: Path) -> None:
    def weights(steps: int) -> dict[str, Any]:
        config = tiny(recipe("hmdb51_resnet50", "with_frozen_backbones"), manifest, tmp_path / str(steps))
        config = replace(config, optimiser=OptimiserOptions(steps=steps, learning_rate=0.1), data=replace(config.data, val_split=""))
        return train(config, progress=False).model().state_dict()

    first, second = weights(1), weights(3)
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert "projections" in changed and "backbones" not in changed


def test_freezing_needs_frozen_statistics() -> None:
    with pytest.raises(ConfigError, match="batch_norm=frozen"):
        replace(recipe("hmdb51_resnet50", "with_frozen_backbones"), batch_norm="per_rank")


def test_later_changes_win_and_unknown_recipes_are_refused() -> None:
    config = recipe("hmdb51_resnet50", "with_one_gpu_of_11gb")
    assert (config.optimiser.accumulate, config.optimiser.steps) == (8, recipe("hmdb51_resnet50").optimiser.steps)
    with pytest.raises(ConfigError, match=r"known: .*hmdb51_resnet50"):
        recipe("nothing")


def test_the_command_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "--show", "hmdb51_resnet50"]) == 0
    assert TrainConfig.from_dict(yaml.safe_load(capsys.readouterr().out)) == recipe("hmdb51_resnet50")
    assert cli.main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in list_recipes())


def test_memory_grows_with_what_is_computed_at_once() -> None:
    whole = TrainConfig(episode=EpisodeOptions(per_step=4), data=DataOptions(size=32), precision="fp32")
    parts = replace(whole, optimiser=OptimiserOptions(accumulate=4))
    assert estimate(whole).activations == pytest.approx(4 * estimate(parts).activations, rel=0.01)
    assert estimate(whole, processes=4) == estimate(parts)
