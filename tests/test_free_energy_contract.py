"""free_energy_loss: its contract with PyTorch, bad input, and its kernels in Triton's interpreter."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amd_fast.errors import ConfigError, ImplementationError
from amd_fast.ops import explain, free_energy_loss
from amd_fast.ops.free_energy import choose

_cases = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("free_energy_cases.py"))))
NUMBERS, make_model, make_inputs, make_presence = _cases.NUMBERS, _cases.make_model, _cases.make_inputs, _cases.make_presence


def test_opcheck() -> None:
    logits, target, context = make_inputs()
    model, present = make_model(3), make_presence((7,), 3)
    arrays = (model.likelihood, model.outcome_likelihood, model.log_preference, model.state_prior, model.habit, model.precision)
    forward, backward = torch.ops.amd_fast.free_energy_loss.default, torch.ops.amd_fast.free_energy_loss_backward.default
    for weights in ((1.0, 1.0), (0.0, 0.0)):
        torch.library.opcheck(forward, (logits, target, context, present, *arrays, 1.0, 0.1, *weights, "auto"))
    torch.library.opcheck(forward, (logits.float(), target, None, None, arrays[0][:, :1], *arrays[1:], 1.0, 0.1, 1.0, 1.0, "reference"))
    outputs = forward(logits, target, context, present, *arrays, 1.0, 0.1, 1.0, 1.0, "auto")
    grads = [torch.randn(7, dtype=torch.float64), None, torch.randn(7, dtype=torch.float64), None]
    saved = (logits, target, present, outputs[7], outputs[8], outputs[6])
    torch.library.opcheck(backward, (*grads, *saved, 1.0, 1.0, 1.0, "auto"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_a_full_graph_equals_eager(dynamic: bool) -> None:
    model = make_model(3)

    def step(z: Tensor, y: Tensor, c: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        loss = free_energy_loss(2 * z, y, model, context_evidence=c, present=p, **NUMBERS)
        return loss.total.mean() + loss.distillation.sum(), loss.policy, loss.group

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in ((2, 6), (3, 4)):
        logits, target, context = make_inputs(rows, dtype=torch.float32)
        present = make_presence(rows, 3)
        results = []
        for function in (step, compiled):
            leaf = logits.clone().requires_grad_()
            value, policy, group = function(leaf, target, context, present)
            value.backward()
            results.append((value, policy, group, leaf.grad))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


class LossModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.agent = make_model(3)

    def forward(self, logits: Tensor, target: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return tuple(free_energy_loss(logits, target, self.agent, context_evidence=context))


def test_export_keeps_the_op_and_takes_other_batch_sizes() -> None:
    logits, target, context = make_inputs((4,), dtype=torch.float32)
    rows = torch.export.Dim("rows", min=1, max=1000)
    program = torch.export.export(LossModule(), (logits, target, context), dynamic_shapes=({0: rows}, {0: rows}, {0: rows}))
    assert any("free_energy_loss" in str(node.target) for node in program.graph.nodes)
    other = make_inputs((9,), dtype=torch.float32, seed=3)
    for got, want in zip(program.module()(*other), LossModule()(*other), strict=True):
        torch.testing.assert_close(got, want)


def bad_calls() -> dict[str, tuple[dict[str, Any], str]]:
    logits, target, context = make_inputs()
    good: dict[str, Any] = {"view_logits": logits, "target": target, "generative_model": make_model(3), "context_evidence": context}
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "rank": ({"view_logits": logits[0, 0]}, "view_logits: got shape"),
        "dtype of the logits": ({"view_logits": logits.long()}, "view_logits: got torch.int64"),
        "no classes": ({"view_logits": logits[..., :0]}, "view_logits: got shape"),
        "one target per view": ({"target": target[:, None].expand(7, 3)}, "target: got shape"),
        "dtype of the target": ({"target": target.int()}, "target: got torch.int32"),
        "number of views": ({"generative_model": make_model(2)}, "generative_model: got likelihood"),
        "no context": ({"context_evidence": None}, "context_evidence: got None"),
        "too much context": ({"context_evidence": torch.rand(7, 3, 2)}, "context_evidence: got shape"),
        "integer context": ({"context_evidence": torch.ones(7, 3, 1).long()}, "context_evidence: got torch.int64"),
        "context of other rows": ({"context_evidence": torch.rand(6, 3, 1)}, "context_evidence: got shape"),
        "present as floats": ({"present": torch.ones(7, 3)}, "present: got torch.float32"),
        "present per row": ({"present": torch.ones(7).bool()}, "present: got torch.bool of shape"),
        "temperature": ({"temperature": 0.0}, "temperature: got 0.0"),
        "margin": ({"margin": -0.1}, "margin: got -0.1"),
        "weight": ({"distillation_weight": math.nan}, "distillation_weight: got nan"),
        "device": ({"target": target.to("meta")}, "target: got device meta"),
        "model on another device": ({"generative_model": make_model(3).to("meta")}, "generative_model.likelihood: got device meta"),
    }
    return {name: ({**good, **change}, message) for name, (change, message) in changes.items()}


@pytest.mark.parametrize("case", bad_calls())
def test_bad_input_is_named_with_what_was_expected_and_the_remedy(case: str) -> None:
    arguments, message = bad_calls()[case]
    with pytest.raises(ValueError, match=r"expected .*; ") as caught:
        free_energy_loss(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", bad_calls())
def test_bad_input_says_the_same_under_compile(case: str, dynamic: bool) -> None:
    """The compiler wraps the error in its own, whose message holds ours."""
    arguments, message = bad_calls()[case]
    torch._dynamo.reset()
    with pytest.raises((ValueError, RuntimeError), match=r"expected .*; ") as caught:
        torch.compile(free_energy_loss, fullgraph=True, dynamic=dynamic, backend="eager")(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("value", [-1, 5])
def test_a_class_out_of_range_is_named(value: int, compiled: bool) -> None:
    logits, target, context = make_inputs()
    target[3] = value
    torch._dynamo.reset()
    function = torch.compile(free_energy_loss, fullgraph=True, backend="eager") if compiled else free_energy_loss
    with pytest.raises(ValueError, match=r"target: got values .* expected 0 to 4; number"):
        function(logits, target, make_model(3), context_evidence=context)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("views", "classes", "what"), [(10, 5, "10 views"), (2, 1025, "1025 classes")])
def test_sizes_over_the_kernels_limits_are_named_under_compile(
    views: int, classes: int, what: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the choice comes before any kernel is imported
    torch._dynamo.reset()
    logits, target, context = make_inputs(views=views, classes=classes)
    function = torch.compile(free_energy_loss, fullgraph=True, dynamic=dynamic, backend="eager")
    with pytest.raises(ImplementationError, match=f"view_logits has {what} and the kernel takes up to .*impl='reference'"):
        function(logits, target, make_model(views), context_evidence=context, impl="triton")


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_kernel_by_name_is_refused_on_the_cpu_under_compile(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    torch._dynamo.reset()
    logits, target, context = make_inputs()
    function = torch.compile(free_energy_loss, fullgraph=True, dynamic=dynamic, backend="eager")
    with pytest.raises(ImplementationError, match="impl='triton' cannot run here"):
        function(logits, target, make_model(3), context_evidence=context, impl="triton")


def test_the_choice_is_explained_and_a_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    logits, target, context = make_inputs()
    model = make_model(3)
    assert "runs as reference because" in explain("free_energy_loss", logits, target, model, context_evidence=context)
    assert choose(logits, impl="reference").implementation == "reference"
    with pytest.raises(ImplementationError, match="impl='triton' cannot run here"):
        free_energy_loss(logits, target, model, context_evidence=context, impl="triton")
    with pytest.raises(ConfigError, match="got impl='fast'"):
        free_energy_loss(logits, target, model, context_evidence=context, impl="fast")


# ---- the kernels, in a process of their own


@pytest.mark.slow
def test_the_kernels_in_tritons_interpreter(repository: Path) -> None:
    """The interpreter has to be asked for before Triton is imported, and would stay on for every test after."""
    pytest.importorskip("triton")
    paths = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(repository / "tests" / "test_free_energy_kernel.py")]
    run = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
