"""The kernels on a GPU: right in every dtype, capturable in a CUDA graph, whole under torch.compile, and good to train with.

Needs torch, triton, pytest and numpy. Shapes and tolerances are those of the benchmarks' registry.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

pytest.importorskip("triton")
import torch

from amd_fast import ops
from amd_fast.bench import load

pytestmark = pytest.mark.gpu

registry, workloads, providers = load("shapes"), load("workloads"), load("providers")

ELEMENTS = 1 << 22
SHAPES = [shape.capped(ELEMENTS) for shape in registry.select()]
ODD = [
    registry.AttentionShape("odd-sizes", 37, modalities=3, frames=7, heads=3, width=20),
    registry.AttentionShape("many-queries", 11, modalities=12, frames=5, heads=2, width=48),
    registry.AttentionShape("one-token", 5, modalities=1, frames=1, heads=1, width=16),
    registry.LossShape("odd-sizes", 1001, views=4, classes=7),
    registry.LossShape("largest", 65, views=9, classes=1024),
]
SMALL = [registry.AttentionShape("small", 64), registry.LossShape("small", 256)]


def name(value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else f"{value.op}-{value.name}"


def make(shape: Any, dtype: torch.dtype) -> Any:
    return workloads.make(shape, dtype, torch.device("cuda"))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*itertools.product([*SHAPES, *ODD], (torch.float32, torch.bfloat16)), *itertools.product(ODD, (torch.float16,))],
    ids=name,
)
def test_values_and_gradients(shape: Any, dtype: torch.dtype) -> None:
    case = make(shape, dtype)
    assert case.check(providers.ours(case, "triton")) <= 1.0


@pytest.mark.parametrize("shape", SMALL, ids=name)
def test_repeated_runs_agree_bit_for_bit(shape: Any) -> None:
    case = make(shape, torch.bfloat16)
    forward = providers.ours(case, "triton")

    def once() -> list[torch.Tensor]:
        outputs = forward()
        return [*outputs.values(), *case.gradients(outputs).values()]

    assert all(torch.equal(first, second) for first, second in zip(once(), once(), strict=True))


@pytest.mark.parametrize("shape", SMALL, ids=name)
def test_capture_in_a_graph(shape: Any) -> None:
    """Forward and backward, replayed on other numbers than were captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case, other = make(shape, torch.float32), workloads.make(shape, torch.float32, torch.device("cuda"), seed=1)
        forward = providers.ours(case, "triton")
        for _ in range(2):
            case.gradients(forward())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = forward()
            results = {**outputs, **case.gradients(outputs)}
        with torch.no_grad():
            for key, tensor in case.inputs.items():
                tensor.copy_(other.inputs[key])
            case.incoming.copy_(other.incoming)
        graph.replay()
        expected = providers.ours(other, "triton")()
        expected |= other.gradients(expected)
        torch.cuda.synchronize()
    assert all(torch.equal(results[key], expected[key]) for key in expected)


@pytest.mark.parametrize("shape", SMALL, ids=name)
def test_fullgraph_compile(shape: Any) -> None:
    case = make(shape, torch.float32)
    eager = providers.ours(case, "triton")
    compiled = torch.compile(eager, fullgraph=True)
    case.check(compiled)
    for first, second in zip(compiled().values(), eager().values(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", SMALL, ids=name)
def test_nothing_waits_for_the_device(shape: Any) -> None:
    case = make(shape, torch.float32)
    forward = providers.ours(case, "triton")
    case.gradients(forward())
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.gradients(forward())
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_auto_takes_the_kernel_and_says_so() -> None:
    query = torch.randn(4, 3, 2, 16, device="cuda")
    key = torch.randn(4, 8, 2, 16, device="cuda")
    assert "runs as triton" in ops.explain("cross_modal_attention", query, key, key)


def test_peak_memory_is_inputs_and_results_alone() -> None:
    """Forward and backward of attention hold the results, the gradients and the evidence: nothing of size R x N x H."""
    case = make(dataclasses.replace(SMALL[0], batch=2048), torch.bfloat16)
    forward = providers.ours(case, "triton")
    peak = load("timing").peak_memory(lambda: case.gradients(forward()), torch.device("cuda"))
    query, key = case.inputs["query"], case.inputs["key"]
    evidence = 4 * query[..., 0].numel()
    expected = 2 * query.nbytes + 2 * key.nbytes + 2 * evidence  # output and dq, dk and dv, evidence and its zero gradient
    assert peak <= 1.05 * expected + (4 << 20)


def test_same_learning_curve_as_the_reference() -> None:
    """A read-out and a classifier trained through both ops, with the kernels and with the reference."""
    curves = {}
    for impl in ("triton", "reference"):
        torch.manual_seed(0)
        from amd_fast.active_inference import GenerativeModel

        key = torch.randn(128, 16, 4, 32, device="cuda")
        target = torch.randint(0, 5, (128,), device="cuda")
        key[torch.arange(128), :, 0, target] += 1.0
        query = torch.randn(3, 4, 32, device="cuda", requires_grad=True)
        classify = torch.nn.Linear(128, 5).cuda()
        model = GenerativeModel(3, evidence=("certainty",)).cuda()
        optimizer = torch.optim.Adam([query, *classify.parameters()], lr=1e-2)
        losses = []
        for _ in range(60):
            output, _ = ops.cross_modal_attention(query.expand(128, -1, -1, -1), key, key, impl=impl)
            loss = ops.free_energy_loss(classify(output.flatten(2)), target, model, impl=impl).total.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves[impl] = torch.stack(losses)
    assert curves["triton"][-1] < 0.7 * curves["triton"][0]
    torch.testing.assert_close(curves["triton"], curves["reference"], rtol=1e-2, atol=1e-3)
