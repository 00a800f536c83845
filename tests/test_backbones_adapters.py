"""Backbones of timm and of transformers: shapes, channels, sizes, order of tokens, weights, checkpoints. Nothing is downloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import amd_fast
from amd_fast.errors import ConfigError, DataError, WeightsError
from amd_fast.models.backbones import create_backbone, frame_features
from amd_fast.models.inflation import IMAGENET_MEAN, IMAGENET_STD, Renormalise, adapt_first_convolution
from amd_fast.training.checkpoint import load_model, save_model

TINY: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8}
VIDEO = ("videomae", "timesformer")
T, SIZE = 4, 16


def video(kind: str, channels: int = 3, **options: Any) -> torch.nn.Module:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    return create_backbone(f"hf:{kind}", channels, size=SIZE, frames=T, **{**TINY, **options}).eval()


def clips(channels: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, T, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(channels))


def vit(channels: int, **options: Any) -> torch.nn.Module:
    pytest.importorskip("timm")
    options = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8, **options}
    return create_backbone("timm:vit_tiny_patch16_224", channels, size=32, **options).eval()


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("dimensions", [0, 1, 2])
def test_convolutions_made_for_other_channels_respond_alike(channels: int, dimensions: int) -> None:
    kernel, size = [2, 3, 3][-dimensions - 1 :], [4, 5, 5][-dimensions - 1 :]
    weight = torch.randn(6, 3, *kernel, dtype=torch.float64)
    convolve = [torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d][dimensions]
    grey = torch.randn(2, 1, *size, dtype=torch.float64)
    expand = [1] * (dimensions + 1)
    expected = convolve(grey.repeat(1, 3, *expand), weight)
    torch.testing.assert_close(convolve(grey.repeat(1, channels, *expand), adapt_first_convolution(weight, channels)), expected)


def test_renormalised_colours_are_those_of_the_networks_own_mean_and_deviation() -> None:
    pixels = torch.rand(2, 3, 4, 4)
    column = lambda values: torch.tensor(values)[:, None, None]  # noqa: E731
    ours = (pixels - column(IMAGENET_MEAN)) / column(IMAGENET_STD)
    wanted = (pixels - column((0.5, 0.4, 0.3))) / column((0.2, 0.5, 0.1))
    torch.testing.assert_close(Renormalise((0.5, 0.4, 0.3), (0.2, 0.5, 0.1))(ours), wanted)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_timm_networks_take_any_channels_and_the_models_size(channels: int) -> None:
    network = vit(channels)
    tokens = frame_features(network, torch.randn(2, 3, channels, 32, 32))
    assert tokens.shape == (2, 3, network.width) == (2, 3, 16)
    with pytest.raises(DataError, match=r"32 x 32, got 48 x 48"):
        network(torch.randn(1, channels, 48, 48))


def test_timm_convolutional_network_takes_any_size() -> None:
    pytest.importorskip("timm")
    network = create_backbone("timm:test_resnet", 2, size=64).eval()
    assert network(torch.randn(1, 2, 40, 40)).shape == (1, network.width)


def test_timm_pretrained_weights_come_from_a_file_and_are_made_to_fit(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(1)
    source = timm.create_model("test_resnet", pretrained=False)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.safetensors"), "hf_hub_id": None}}
    network = create_backbone("timm:test_resnet", 2, pretrained=True, **overlay).eval()
    first = source.pretrained_cfg["first_conv"]
    state = network.network.state_dict()
    for name, value in state.items():
        wanted = source.state_dict()[name]
        torch.testing.assert_close(value, adapt_first_convolution(wanted, 2) if name == f"{first}.weight" else wanted)
    colours = create_backbone("timm:test_resnet", 3, pretrained=True, **overlay).eval()
    images = torch.randn(2, 3, 32, 32)
    source.reset_classifier(0)
    mean, std = colours.network.pretrained_cfg["mean"], colours.network.pretrained_cfg["std"]
    torch.testing.assert_close(colours(images), source.eval()(Renormalise(mean, std)(images)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm:resnet81", {}, "near it: .*resnet"),
        ("timm:vit_tiny_patch16_224", {"size": 40}, "patches of 16 pixels, which do not fill 40; choose a size such as 32 or 48"),
        ("timm:test_resnet", {"no_such_option": 1}, "no_such_option"),
        ("nonsense", {}, "timm:<name> or hf:<model id>"),
    ],
)
def test_what_timm_cannot_make_is_said(name: str, options: dict[str, Any], message: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=message):
        create_backbone(name, 3, **options)


@pytest.mark.parametrize("package", ["timm", "transformers"])
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package}.*amd_fast\[adapters\]"):
        create_backbone("timm:resnet18" if package == "timm" else "hf:videomae", 3)


@pytest.mark.parametrize("kind", VIDEO)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_video_networks_give_a_token_per_frame(kind: str, channels: int) -> None:
    network = video(kind, channels)
    tokens = frame_features(network, clips(channels))
    assert tokens.shape == (2, T, network.width) == (2, T, 16)
    tokens.square().sum().backward()
    assert all(p.grad is not None for name, p in network.named_parameters() if "projection" in name)


def test_videomae_tokens_are_those_of_their_tubelet() -> None:
    network = video("videomae")
    hidden = network.network(pixel_values=network.normalise(clips(3))).last_hidden_state
    patches = (SIZE // 8) ** 2
    tokens = network(clips(3))
    for frame in range(T):
        step = frame // 2
        torch.testing.assert_close(tokens[:, frame], hidden[:, step * patches : (step + 1) * patches].mean(1))


def test_timesformer_tokens_follow_their_frame() -> None:
    """Without attention in time, a frame's token depends on no other frame: so the order of the tokens is seen."""
    network = video("timesformer", num_hidden_layers=1)
    for layer in network.network.encoder.layer:
        layer.temporal_dense.weight.data.zero_()
        layer.temporal_dense.bias.data.zero_()
    torch.nn.init.normal_(network.network.embeddings.cls_token)
    before, changed = clips(3), clips(3)
    changed[:, 2] += 1.0
    moved = (network(changed) - network(before)).abs().amax((0, 2))
    assert moved[2] > 1e-3 and moved[[0, 1, 3]].max() < 1e-5


@pytest.mark.parametrize("kind", VIDEO)
def test_video_networks_load_published_weights_from_a_folder_and_stretch_positions(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **TINY, image_size=SIZE, num_frames=T)
    torch.manual_seed(2)
    source = transformers.AutoModel.from_config(config).eval()
    if kind == "timesformer":
        torch.nn.init.normal_(source.embeddings.time_embeddings)
        torch.nn.init.normal_(source.embeddings.position_embeddings)
    source.save_pretrained(tmp_path)
    same = create_backbone(f"hf:{tmp_path}", 3, pretrained=True, size=SIZE, frames=T).eval()
    torch.testing.assert_close(
        same.network(pixel_values=clips(3)).last_hidden_state, source(pixel_values=clips(3)).last_hidden_state, rtol=1e-5, atol=1e-6
    )
    other = create_backbone(f"hf:{tmp_path}", 2, pretrained=True, size=2 * SIZE, frames=2 * T).eval()
    assert other(torch.randn(1, 2 * T, 2, 2 * SIZE, 2 * SIZE)).shape == (1, 2 * T, 16)
    weight = "embeddings.patch_embeddings.projection.weight"
    torch.testing.assert_close(other.network.state_dict()[weight], adapt_first_convolution(source.state_dict()[weight], 2))
    if kind == "timesformer":
        stretched = other.network.embeddings.position_embeddings[0]
        torch.testing.assert_close(stretched[0], source.embeddings.position_embeddings[0, 0])
        assert len(stretched) == 17 and len(other.network.embeddings.time_embeddings[0]) == 2 * T


def test_loading_such_weights_leaves_torch_as_it_was(tmp_path: Path) -> None:
    """Afterwards ``with torch.device(...)`` still rules every function that makes tensors; in a process where it was never used before."""
    transformers = pytest.importorskip("transformers")
    transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model("videomae", **TINY, image_size=SIZE, num_frames=T)
    ).save_pretrained(tmp_path)
    code = f"""
import torch
from amd_fast.models.backbones import create_backbone
create_backbone("hf:{tmp_path}", 3, pretrained=True, size={SIZE}, frames={T})
with torch.device("meta"):
    assert torch.linspace(0, 1, 3).is_meta
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("kind", "size", "frames", "options", "message"),
    [
        ("videomae", 20, T, {}, "choose a size such as 16 or 24"),
        ("videomae", SIZE, 3, {}, "choose frames=2 or a multiple"),
        ("videomae", SIZE, T, {"num_frames": 8}, "follow from the model's"),
        ("timesformer", SIZE, T, {"tubelet": 3}, r"no options \['tubelet'\]"),
        ("timesformer", SIZE, T, {"attention_type": "space_only"}, "space_only"),
    ],
)
def test_what_video_networks_cannot_take_is_said(kind: str, size: int, frames: int, options: dict[str, Any], message: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=message):
        create_backbone(f"hf:{kind}", 3, size=size, frames=frames, **{**TINY, **options})


@pytest.mark.parametrize("kind", VIDEO)
def test_clips_of_another_length_or_size_are_refused(kind: str) -> None:
    network = video(kind)
    for shape in ((1, T + 2, 3, SIZE, SIZE), (1, T, 3, SIZE, 2 * SIZE)):
        with pytest.raises(DataError, match="was made for 4 frames of 16 x 16"):
            network(torch.zeros(shape))


def test_offline_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    transformers, timm = pytest.importorskip("transformers"), pytest.importorskip("timm")

    def offline(*args: object, **options: object) -> None:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(WeightsError, match=r"no route to host.*HF_HOME"):
        create_backbone("hf:MCG-NJU/videomae-base", 3)
    with pytest.raises(WeightsError, match="without weights"):
        create_backbone("hf:videomae", 3, pretrained=True, size=SIZE, frames=T, **TINY)
    plain = timm.create_model

    monkeypatch.setattr(timm, "create_model", lambda *a, **o: offline() if o.get("pretrained") else plain(*a, **o))
    with pytest.raises(WeightsError, match="pretrained=False"):
        create_backbone("timm:test_resnet", 3, pretrained=True)


@pytest.mark.parametrize("kind", ["timm:test_vit", "hf:videomae", "hf:timesformer"])
def test_a_model_with_a_borrowed_backbone_goes_through_episodes_and_checkpoints(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("timm" if kind.startswith("timm") else "transformers")
    torch.manual_seed(0)
    size = 32
    options = {"num_classes": 0} if kind.startswith("timm") else TINY
    recipe = {"name": kind, "modalities": ["rgb", "flow"], "dim": 16, "heads": 2, "size": size, "frames": T, "backbone_options": options}
    model = amd_fast.create_model(**{**recipe, "modalities": ("rgb", "flow")})
    assert model.backbones["rgb"].width != 0 and model.dim == 16
    sides = [{name: torch.randn(count, T, model.channels[name], size, size) for name in model.modalities} for count in (4, 3)]
    labels, targets = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 1])
    output = model(sides[0], labels, sides[1], targets)
    assert output.loss is not None
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    save_model(model, tmp_path / "model.safetensors", {**recipe, "loss": {}})
    again = load_model(tmp_path / "model.safetensors")
    torch.testing.assert_close(again(sides[0], labels, sides[1]).log_probs, model(sides[0], labels, sides[1]).log_probs)


def test_a_hub_models_recipe_needs_no_hub(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("videomae", **TINY, image_size=SIZE, num_frames=T)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    network = create_backbone(f"hf:{tmp_path}", 2, pretrained=True, size=SIZE, frames=T).eval()
    recipe = json.loads(json.dumps(network.recipe))
    assert recipe["backbone"] == "hf:videomae" and str(tmp_path) not in json.dumps(recipe)
    again = create_backbone(recipe["backbone"], 2, size=SIZE, frames=T, **recipe["backbone_options"]).eval()
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(again(clips(2)), network(clips(2)))


def test_list_models_names_borrowed_ones_when_asked() -> None:
    pytest.importorskip("timm")
    assert "timm:vit_base_patch16_clip_224" in amd_fast.list_models("timm:vit_*")
    assert amd_fast.list_models("hf:*") == ["hf:timesformer", "hf:videomae"]
    assert not any(":" in name for name in amd_fast.list_models())
