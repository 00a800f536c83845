"""Filling Triton's cache by launching every op: the calls that are made, in Triton's interpreter in the place of a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")
import torch

from amd_fast import compile_ahead, warm_cache
from amd_fast.bench import load
from amd_fast.errors import ImplementationError

INTERPRETED = """
import torch
from types import SimpleNamespace as Shape
from amd_fast import ops, warm_cache
from amd_fast.kernels.cross_modal_attention import config

kinds = set()
choose = config.choose
config.choose = lambda kernel, *rest: kinds.add(kernel) or choose(kernel, *rest)
shapes = {
    "cross_modal_attention": [Shape(rows=2, tokens=3, heads=2, width=8), Shape(rows=40, tokens=5, heads=1, width=16)],
    "free_energy_loss": [Shape(views=2, classes=3, channels=2, bins=4), Shape(views=1, classes=2, channels=1, bins=3)],
    "otam_alignment": [Shape(frames=2)],
}
warmed = warm_cache.warm(shapes, torch.device("cpu"), (torch.float32,), shapes)
assert warmed == (2 * 2 + 2 * 2 + 2, 0), warmed
assert kinds == {"rows_forward", "rows_backward", "stream_forward", "tiles_backward_queries", "tiles_backward_tokens"}, kinds
"""


def test_every_op_is_launched_forward_and_backward() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_shapes_are_the_registrys_or_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = load("shapes").SHAPES
    for name in registry:
        assert warm_cache.usual_shapes(name) == registry[name]

    def no_source_tree(_: str) -> None:
        raise ImplementationError("not a source tree")

    monkeypatch.setattr(warm_cache, "load", no_source_tree)
    for name in compile_ahead._SPECS:
        assert len(warm_cache.usual_shapes(name)) >= 3


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(ImplementationError, match="TRITON_INTERPRET"):
        warm_cache.warm(["otam_alignment"], torch.device("cpu"))


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("obstacle", [None, "there is no C compiler"])
def test_the_command_warms_the_cache_where_a_gpu_runs_the_kernels(
    gpu: bool, obstacle: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("amd_fast.ops.dispatch.triton_obstacle", lambda device: obstacle)
    monkeypatch.setattr(warm_cache, "warm", lambda names, device: calls.append((names, device)) or warm_cache.Warmed(10, 17))
    monkeypatch.setattr(compile_ahead, "compile_all", lambda *arguments: [])
    compile_ahead.compile_command(ops=["free_energy_loss"])
    said = " ".join(capsys.readouterr().out.split())
    assert calls == ([(("free_energy_loss",), torch.device("cuda", 0))] if gpu and obstacle is None else [])
    assert ("17 kernels are in Triton's cache" in said) == bool(calls)
    assert ("nothing was run on the GPU: there is no C compiler" in said) == (gpu and obstacle is not None)


def test_kernels_at_hand_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        warm_cache.importlib,
        "import_module",
        lambda _: SimpleNamespace(one=SimpleNamespace(device_caches={0: ({"a": 1, "b": 2}, {})}), two=3),
    )
    assert warm_cache._at_hand("free_energy_loss") == 2
