"""Export: the parts give what the model gives, hold no op of the library, take any number of clips, and are checked in a fresh process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import amd_fast
from amd_fast.errors import CheckpointError, ImplementationError
from amd_fast.export import Encoder, Head, export_package, load_package, made_inputs, trace, verify
from amd_fast.package_check import RECORDED, differences

T, SIZE = 2, 16
CPU = torch.device("cpu")


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
@pytest.mark.parametrize("part", [Encoder, Head])
@torch.no_grad()
def test_graphs_hold_no_op_of_the_library_and_take_other_numbers_of_clips(part: type[nn.Module]) -> None:
    model = make_model()
    module = part(model)
    name = part.__name__.lower()
    program = trace(module, made_inputs(model, (2, 6, 4, 3), 0, CPU)[name])  # type: ignore[arg-type]
    assert not [node for node in program.graph.nodes if "amd_fast" in str(node.target)]
    for sizes in ((1, 2, 1, 2), (3, 5, 2, 5)):
        inputs = made_inputs(model, sizes, 1, CPU)[name]
        for got, wanted in zip(program.module()(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_package_is_checked_in_a_fresh_process_and_refused_when_it_gives_other_numbers(tmp_path: Path) -> None:
    model = make_model("prototype", "rgb")
    export_package(model, tmp_path / "package")
    package = load_package(tmp_path / "package")
    assert package.description["modalities"] == ["rgb"] and package.description["frames"] == T
    inputs = made_inputs(model, (4, 3, 2, 3), 9, CPU)
    with torch.no_grad():
        for program, module, name in ((package.encoder, Encoder(model), "encoder"), (package.head, Head(model), "head")):
            for got, wanted in zip(program(*inputs[name]), module(*inputs[name]), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    recorded = load_file(tmp_path / "package" / RECORDED)
    recorded["head.1.output.log_probs"] += 0.01
    save_file(recorded, tmp_path / "package" / RECORDED)
    assert [line.partition(" is off")[0] for line in differences(tmp_path / "package")] == ["head, input 1: log_probs"]
    with pytest.raises(ImplementationError, match=r"head, input 1: log_probs is off by 0\.01"):
        verify(tmp_path / "package")


def test_no_package_is_left_where_a_part_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no graph\nand more")

    monkeypatch.setattr(torch.export, "export", broken)
    with pytest.raises(ImplementationError, match=r"encoder of this model cannot be exported: no graph$"):
        export_package(make_model("prototype", "rgb"), tmp_path / "package")
    assert not list(tmp_path.iterdir())


def test_what_is_no_package_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="export_package"):
        load_package(tmp_path)
    (tmp_path / "package.json").write_text(json.dumps({"format": "amd_fast package 1"}))
    with pytest.raises(CheckpointError, match="export_package"):
        load_package(tmp_path)
