"""Export: the parts give what the model gives, hold no op of the library, take any number of clips, and are checked in a fresh process."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import amd_fast
from amd_fast.data.views import ClipTransform, RawClip
from amd_fast.errors import CheckpointError, ConfigError, DataError, ImplementationError
from amd_fast.export import Encoder, Format, Head, export_package, load_package, package, programs, verify
from amd_fast.export.package import describe, preparation_of, recorded_episode
from amd_fast.export.programs import made_inputs, parts_of, trace

T, SIZE = 2, 16


def make_model(matcher: str = "prototype", *modalities: str) -> amd_fast.AFMIR:
    torch.manual_seed(0)
    options = {"width": 8, "base": 4}
    names = modalities or ("rgb", "flow")
    return amd_fast.create_model(
        "afmir_small", modalities=names, dim=8, heads=2, frames=T, size=SIZE, backbone_options=options, matcher=matcher
    ).eval()


@pytest.mark.parametrize("matcher", ["prototype", "bi_mhm"])
@torch.no_grad()
def test_encoder_and_head_give_what_the_model_gives(matcher: str) -> None:
    model = make_model(matcher)
    clips = {name: torch.randn(7, T, width, SIZE, SIZE) for name, width in model.channels.items()}
    present = torch.ones(7, 2, dtype=torch.bool)
    present[5, 1] = False
    labels = torch.tensor([1, 0, 2, 0])
    direct = model(
        {name: clip[:4] for name, clip in clips.items()},
        labels,
        {name: clip[4:] for name, clip in clips.items()},
        support_present=present[:4],
        query_present=present[4:],
    )
    tokens, log_weight = Encoder(model)(*clips.values(), present)
    log_probs, view_log_probs, policy = Head(model)(tokens[:4], log_weight[:4], labels, tokens[4:], log_weight[4:], torch.arange(3))
    torch.testing.assert_close(log_probs, direct.log_probs)
    torch.testing.assert_close(view_log_probs, direct.view_log_probs)
    torch.testing.assert_close(policy, direct.beliefs.policy)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "head"])
@torch.no_grad()
def test_graphs_hold_no_op_of_the_library_and_take_other_numbers_of_clips(name: str) -> None:
    model = make_model()
    module = parts_of(model)[name]
    program = trace(module, made_inputs(model)[name])
    assert not [node for node in program.graph.nodes if "amd_fast" in str(node.target)]
    for sizes in ((1, 2, 1, 2), (3, 5, 2, 5)):
        inputs = made_inputs(model, sizes, 1)[name]
        for got, wanted in zip(program.module()(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_description_says_what_goes_in_and_comes_out() -> None:
    model = make_model("prototype", "rgb", "thermal")
    description = describe(model, "torch-export")
    sizes = {"clips": 5, "support": 3, "query": 2, "classes": 3}
    made, episode = made_inputs(model, (5, 3, 2, 3), 0), recorded_episode(model, (3, 2, 3), 0)
    for name, part in parts_of(model).items():
        assert [entry["name"] for entry in description[name]["inputs"]] == list(part.inputs)
        assert [entry["name"] for entry in description[name]["outputs"]] == list(part.outputs)
        tensors = dict(zip(part.inputs, made[name], strict=True)) | {key: episode[f"expected.{key}"] for key in part.outputs}
        for entry in (*description[name]["inputs"], *description[name]["outputs"]):
            tensor = tensors[entry["name"]]
            assert [sizes.get(size, size) for size in entry["shape"]] == list(tensor.shape)
            assert f"torch.{entry['dtype']}" == str(tensor.dtype)
    assert set(description["free"]) == set(sizes)


def test_the_described_preparation_is_what_clips_are_read_with() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (T, SIZE, SIZE, 3), dtype=np.uint8)
    vectors = rng.normal(0, 2, (T, SIZE, SIZE, 2)).astype(np.float16)
    heat = rng.normal(20, 5, (T, SIZE, SIZE)).astype(np.float32)
    raw = RawClip(rgb=pixels, flow=vectors, thermal=heat)
    read = ClipTransform(SIZE, ("rgb", "flow", "thermal"), train=False, resize_ratio=1.0)(raw)
    rgb, flow = preparation_of("rgb"), preparation_of("flow")
    prepared = {
        "rgb": (pixels / rgb["divide_by"] - rgb["mean"]) / rgb["std"],
        "flow": np.clip(vectors.astype(float) / (flow["unit"] * SIZE), *flow["range"]),
        "thermal": ((heat - np.median(heat)) / heat.std())[..., None],
    }
    for name, wanted in prepared.items():
        np.testing.assert_allclose(read[name].numpy(), wanted.transpose(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
        low, high = preparation_of(name).get("range", [-np.inf, np.inf])
        assert low - 1e-4 <= read[name].min() and read[name].max() <= high + 1e-4


@pytest.mark.slow
def test_a_package_is_checked_in_a_fresh_process_and_refused_when_it_gives_other_numbers(tmp_path: Path) -> None:
    model, folder = make_model("prototype", "rgb"), tmp_path / "package"
    told = export_package(model, folder, format="torch-export")
    loaded = load_package(folder)
    assert loaded.description == told and list(told["modalities"]) == ["rgb"] and told["frames"] == T
    assert (
        set(told["largest_difference"])
        == set(told["tolerance"])
        == {
            *(f"encoder.{name}" for name in Encoder.outputs),
            *(f"head.{name}" for name in Head.outputs),
        }
    )
    inputs = made_inputs(model, (4, 3, 2, 3), 9)
    with torch.no_grad():
        for program, (name, module) in zip((loaded.encoder, loaded.head), parts_of(model).items(), strict=True):
            for got, wanted in zip(program(*inputs[name]), module(*inputs[name]), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    # An episode that was changed is noticed by its hash; with the hash changed too, by its numbers.
    path = folder / "episode-1.safetensors"
    recorded = load_file(path)
    recorded["expected.log_probs"] += 0.01
    save_file(recorded, path)
    with pytest.raises(CheckpointError, match=r"episode-1\.safetensors was changed"):
        load_package(folder)
    told["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "package.json").write_text(json.dumps(told))
    with pytest.raises(ImplementationError, match=r"episode-1\.safetensors: head\.log_probs is off by 0\.01"):
        verify(folder)


def test_no_package_is_left_where_a_part_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no graph\nand more")

    monkeypatch.setattr(torch.export, "export", broken)
    with pytest.raises(ImplementationError, match=r"encoder of this model cannot be exported: no graph; models of afmir_"):
        export_package(make_model("prototype", "rgb"), tmp_path / "package", format="torch-export")
    assert not list(tmp_path.iterdir())


def test_no_package_is_left_where_a_part_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("the compiler gave up\nand more")

    monkeypatch.setattr(package, "require_compiler", lambda: None)
    monkeypatch.setattr(programs, "trace", lambda part, example: None)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", broken)
    with pytest.raises(ImplementationError, match=r"encoder of this model cannot be compiled: the compiler gave up; --format torch-export"):
        export_package(make_model("prototype", "rgb"), tmp_path / "package")
    assert not list(tmp_path.iterdir())


def test_without_a_compiler_the_remedy_is_named_before_anything_is_done(tmp_path: Path) -> None:
    from torch._inductor import config

    missing = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(ImplementationError, match=r"needs a C\+\+ compiler.*CXX.*torch-export"):
        export_package(make_model("prototype", "rgb"), tmp_path / "package")
    assert not list(tmp_path.iterdir())


def test_unknown_formats_and_folders_that_exist_are_refused(tmp_path: Path) -> None:
    model: Any = make_model("prototype", "rgb")
    with pytest.raises(ConfigError, match=" or ".join(map(repr, get_args(Format)))):
        export_package(model, tmp_path / "package", format="onnx")  # type: ignore[arg-type]
    (tmp_path / "kept").write_text("mine")
    for path in (tmp_path, tmp_path / "kept"):
        with pytest.raises(DataError, match=f"{path.name} exists; name a folder that does not"):
            export_package(model, path)
    assert (tmp_path / "kept").read_text() == "mine"


def test_what_is_no_package_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="amd-fast export"):
        load_package(tmp_path)
    for content in ({"format": "amd_fast package 1"}, {"format": "amd_fast package 2"}, []):
        (tmp_path / "package.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match="amd-fast export"):
            load_package(tmp_path)
