"""Export: the parts give what the model gives, hold no op of the library, take any number of clips, and are checked in a fresh process."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import amd_fast
from amd_fast.data.views import ClipTransform, RawClip
from amd_fast.errors import CheckpointError, ConfigError, DataError, ImplementationError
from amd_fast.export import Encoder, Format, Head, check, export_package, load_package, package, programs, verify
from amd_fast.export.package import describe, preparation_of, recorded_episode
from amd_fast.export.programs import made_inputs, parts_of

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


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of ``make_model()``."""
    folder = tmp_path_factory.mktemp("export") / "package"
    export_package(make_model(), folder, format="torch-export")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "head"])
@torch.no_grad()
def test_programs_hold_no_op_of_the_library_and_take_other_numbers_of_clips(exported: Path, name: str) -> None:
    model = make_model()
    program, module = torch.export.load(exported / f"{name}.pt2"), parts_of(model)[name]
    assert not [node for node in program.graph.nodes if "amd_fast" in str(node.target)]
    for sizes in ((1, 2, 1, 2), (3, 5, 2, 5), (4, 1, 3, 1)):
        inputs = made_inputs(model, sizes, sum(sizes))[name]
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
def test_a_package_is_refused_when_it_was_changed_or_gives_other_numbers(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    shutil.copytree(exported, folder)
    told = load_package(folder).description
    outputs = {*(f"encoder.{name}" for name in Encoder.outputs), *(f"head.{name}" for name in Head.outputs)}
    assert set(told["largest_difference"]) == set(told["tolerance"]) == outputs
    assert check.compare(folder) == (told["largest_difference"], [])
    path = folder / "episode-1.safetensors"
    recorded = load_file(path)
    recorded["expected.log_probs"] += 0.01
    save_file(recorded, path)
    for refuse, error in ((verify, ImplementationError), (load_package, CheckpointError)):
        with pytest.raises(error, match=r"episode-1\.safetensors was changed"):
            refuse(folder)
    told["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "package.json").write_text(json.dumps(told))
    assert [line.partition(" is off by 0.01")[0] for line in check.compare(folder)[1]] == ["episode-1.safetensors: head.log_probs"]


def test_what_the_fresh_process_says_is_believed(tmp_path: Path) -> None:
    told = {"wrong": [], "without_amd_fast": True, "largest_difference": {"head.policy": 0.5}}
    script = tmp_path / "check.py"
    script.write_text(f"print({json.dumps(json.dumps(told))})")
    assert verify(tmp_path) == {"head.policy": 0.5}
    refused = {
        json.dumps(told | {"without_amd_fast": False}): "loading it imports amd_fast",
        json.dumps(told | {"wrong": ["head.policy is off"]}): "head.policy is off",
        "nothing of use": "the process ended with status 0",
    }
    for said, message in refused.items():
        script.write_text(f"print({json.dumps(said)})")
        with pytest.raises(ImplementationError, match=f"{message}; export the model again"):
            verify(tmp_path)
    script.write_text("raise SystemError('out of order')")
    with pytest.raises(ImplementationError, match="SystemError: out of order"):
        verify(tmp_path)


def test_no_package_is_left_where_a_part_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no graph\nand more")

    monkeypatch.setattr(torch.export, "export", broken)
    with pytest.raises(ImplementationError, match=r"encoder of this model cannot be exported: no graph; afmir_small with"):
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
