"""The kernels on a GPU: right in every dtype, capturable in a CUDA graph, whole under torch.compile, and good to train with.

Needs torch, triton and pytest. Shapes and tolerances are those of the benchmarks' registry. Without a GPU,
``test_gpu_interpreted.py`` runs what it can of this file in Triton's interpreter, at small sizes: the tests are tested before a GPU is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from typing import Any

import pytest

pytest.importorskip("triton")
import torch
from torch import Tensor

from amd_fast import ops
from amd_fast.bench import load

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")] if INTERPRETED else [pytest.mark.gpu]
of_a_gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no streams, graphs or memory of its own")
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter is silently wrong in bfloat16

registry, workloads, providers = load("shapes"), load("workloads"), load("providers")

ELEMENTS = 1 << (10 if INTERPRETED else 22)
SHAPES = [shape.capped(ELEMENTS) for shape in registry.select()]
if INTERPRETED:
    SHAPES = [shape for shape in SHAPES if shape.name in ("episode", "long-clips", "twenty-ways", "two-views")]
ODD = [
    registry.AttentionShape("odd-sizes", 37, modalities=3, frames=7, heads=3, width=20),
    registry.AttentionShape("many-queries", 11, modalities=12, frames=5, heads=2, width=48),
    registry.AttentionShape("one-token", 5, modalities=1, frames=1, heads=1, width=16),
    registry.LossShape("odd-sizes", 1001, views=4, classes=7),
    registry.LossShape("largest", 65, views=9, classes=1024),
]
if INTERPRETED:
    ODD = [shape.capped(ELEMENTS) for shape in ODD]
SMALL = [registry.AttentionShape("small", 64), registry.LossShape("small", 256)]
if INTERPRETED:
    SMALL = [shape.capped(ELEMENTS) for shape in SMALL]


def name(value: Any) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else f"{value.op}-{value.name}"


def name_of_dtype(value: torch.dtype) -> str:
    return str(value).removeprefix("torch.")


def make(shape: Any, dtype: torch.dtype) -> Any:
    return workloads.make(shape, dtype, DEVICE)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*itertools.product([*SHAPES, *ODD], (torch.float32, HALF)), *itertools.product([] if INTERPRETED else ODD, (torch.float16,))],
    ids=name,
)
def test_values_and_gradients(shape: Any, dtype: torch.dtype) -> None:
    case = make(shape, dtype)
    assert case.check(providers.ours(case, "triton")) <= 1.0


# Videos, queries, tokens, heads, width: one for each of the three ways in which the kernels go about it, and no tokens at all.
READ_OUTS = {
    "few-queries": (5, 3, 16, 2, 32),
    "more-queries": (3, 12, 20, 2, 16),
    "many-tokens": (2, 3, 140, 1, 16),
    "no-tokens": (3, 2, 0, 2, 16),
}


def read_out(sizes: tuple[int, ...], dtype: torch.dtype, per_row: bool, strided: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Query, key, value and log-weights of which a third is -inf and one video's all are, and gradients of both results."""
    batch, rows, tokens, heads, width = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    inputs = [normal(batch, length, heads, width).to(dtype) for length in (rows, tokens, tokens)]
    weight = normal(batch, rows, tokens) if per_row else normal(batch, tokens)
    weight[torch.rand(weight.shape, generator=generator) < 0.3] = -math.inf
    weight[0] = -math.inf
    inputs.append(weight)
    if strided:  # heads before tokens, and every second of them, as slices of a larger projection are
        inputs = [torch.stack([x, x], 1).transpose(0, 2).contiguous().transpose(0, 2)[:, 0] for x in inputs]
    return [x.to(DEVICE) for x in inputs], [normal(batch, rows, heads, width).to(DEVICE, dtype), normal(batch, rows, heads).to(DEVICE)]


def results_of(inputs: list[Tensor], grads: list[Tensor], impl: str, through: str) -> list[Tensor]:
    """Output, evidence, and the gradients of all four inputs through one of the results or both."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = ops.cross_modal_attention(*leaves, impl=impl)
    chosen = {"output": slice(0, 1), "evidence": slice(1, 2), "both": slice(0, 2)}[through]
    wide = [grad.to(result.dtype) for grad, result in zip(grads, results, strict=True)]
    found = torch.autograd.grad(results[chosen], leaves, wide[chosen], allow_unused=True)
    return [x.detach() for x in (*results, *(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)))]


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=name_of_dtype)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("per_row", [False, True], ids=["shared-weights", "weights-per-row"])
@pytest.mark.parametrize("sizes", READ_OUTS.values(), ids=READ_OUTS)
def test_gradients_of_all_inputs_through_both_results(sizes: tuple[int, ...], per_row: bool, strided: bool, dtype: torch.dtype) -> None:
    inputs, grads = read_out(sizes, dtype, per_row, strided)
    assert all(x.is_contiguous() != strided or not x.numel() for x in inputs)
    for through in ("both", "evidence"):
        got, low = (results_of(inputs, grads, impl, through) for impl in ("triton", "reference"))
        exact = results_of([x.double() for x in inputs], [x.double() for x in grads], "reference", through)
        for place, (mine, theirs, truth) in enumerate(zip(got, low, exact, strict=True)):
            finite = truth.isfinite()
            assert torch.equal(mine[~finite].double(), truth[~finite]), (through, place)
            if finite.any():
                units = 1 if mine.dtype == HALF else 4  # as in the benchmarks' check
                rounding = units * torch.finfo(mine.dtype).eps * (1 + truth[finite].abs().max())
                allowed = 2 * ((theirs.double() - truth)[finite].abs().max() + rounding)
                assert (mine.double() - truth)[finite].abs().max() <= allowed, (through, place)
        assert not got[0][0].any() and (got[1][0] == -math.inf).all(), "a video that shows nothing"
        assert not any(grad[0].any() for grad in got[2:])
        unseen = (inputs[3] == -math.inf) if not per_row else (inputs[3] == -math.inf).all(1)
        assert not any(grad[unseen].any() for grad in got[3:5]), "what is not seen has no gradient"


@pytest.mark.parametrize("shape", SMALL, ids=name)
def test_repeated_runs_agree_bit_for_bit(shape: Any) -> None:
    case = make(shape, HALF)
    forward = providers.ours(case, "triton")

    def once() -> list[torch.Tensor]:
        outputs = forward()
        return [*outputs.values(), *case.gradients(outputs).values()]

    assert all(torch.equal(first, second) for first, second in zip(once(), once(), strict=True))


@of_a_gpu
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
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    case.check(compiled)
    for first, second in zip(compiled().values(), eager().values(), strict=True):
        assert torch.equal(first, second)


@of_a_gpu
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


@of_a_gpu
def test_auto_takes_the_kernel_and_says_so() -> None:
    query = torch.randn(4, 3, 2, 16, device="cuda")
    key = torch.randn(4, 8, 2, 16, device="cuda")
    assert "runs as triton" in ops.explain("cross_modal_attention", query, key, key)


@of_a_gpu
def test_peak_memory_is_inputs_and_results_alone() -> None:
    """Forward and backward of attention hold the results, the gradients and the evidence: nothing of size R x N x H."""
    case = make(dataclasses.replace(SMALL[0], batch=2048), torch.bfloat16)
    forward = providers.ours(case, "triton")
    peak = load("timing").peak_memory(lambda: case.gradients(forward()), torch.device("cuda"))
    query, key = case.inputs["query"], case.inputs["key"]
    evidence = 4 * query[..., 0].numel()
    expected = 2 * query.nbytes + 2 * key.nbytes + 2 * evidence  # output and dq, dk and dv, evidence and its zero gradient
    assert peak <= 1.05 * expected + (4 << 20)


@of_a_gpu
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
