"""OTAM's soft alignment against a plain loop written from the paper: costs, gradients, lengths, extremes, and the op's contract."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from amd_fast.kernels.otam import reference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import amd_fast
from amd_fast.errors import ArgumentError, ImplementationError
from amd_fast.ops import otam_alignment

INF = math.inf
FORMS = {"reference": reference.otam_alignment, "products": reference.otam_alignment_products}
BACKWARD = {"reference": reference.otam_alignment_backward, "products": reference.otam_alignment_products_backward}


def paper(distances: Tensor, smoothing: float) -> float:
    """Cao et al. 2020, equations 4 to 6, cell by cell: a column of zeros at either end, relaxed boundaries in the outer columns."""
    padded = [[0.0, *row, 0.0] for row in distances.tolist()]
    rows, last = len(padded), len(padded[0]) - 1
    gamma = [[0.0] * (last + 1) for _ in padded]
    for row in range(rows):
        for column in range(1, last + 1):
            before = [gamma[row][column - 1]]
            if row:
                before.append(gamma[row - 1][column - 1])
                if column in (1, last):
                    before.append(gamma[row - 1][column])
            least = min(before)
            soft = least - smoothing * math.log(sum(math.exp((least - value) / smoothing) for value in before))
            gamma[row][column] = padded[row][column] + soft
    return gamma[-1][-1]


def cosines(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def costs(distances: Tensor, smoothing: float) -> Tensor:
    return torch.tensor([paper(pair, smoothing) for pair in distances], dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@given(rows=st.integers(1, 7), columns=st.integers(1, 7), smoothing=st.sampled_from([0.05, 0.1, 1.0, 20.0]), seed=st.integers(0, 99))
def test_costs_equal_the_papers_recursion(form: str, rows: int, columns: int, smoothing: float, seed: int) -> None:
    distances = cosines(3, rows, columns, seed=seed)
    torch.testing.assert_close(FORMS[form](distances, smoothing), costs(distances, smoothing), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_frames_that_do_not_count_might_as_well_not_be_there(form: str) -> None:
    distances = cosines(6, 5, 4)
    rows, columns = torch.tensor([5, 3, 1, 4, 0, 2]), torch.tensor([4, 1, 3, 2, 2, 0])
    cost = FORMS[form](distances, 0.1, rows, columns)
    weight = torch.linspace(1, 2, 6, dtype=torch.float64)
    grad = BACKWARD[form](weight, distances, 0.1, rows, columns)
    for pair, (high, wide) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        within = torch.zeros(5, 4, dtype=torch.bool)
        within[:high, :wide] = True
        assert (grad[pair][~within] == 0).all()
        if high and wide:
            alone = distances[pair : pair + 1, :high, :wide]
            assert cost[pair].item() == pytest.approx(paper(alone[0], 0.1), abs=1e-12)
            torch.testing.assert_close(grad[pair, :high, :wide], BACKWARD[form](weight[pair : pair + 1], alone, 0.1)[0])
        else:
            assert cost[pair] == 0


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_finite_differences(form: str) -> None:
    distances, weight = cosines(2, 4, 5), torch.tensor([0.5, -2.0], dtype=torch.float64)
    grad = BACKWARD[form](weight, distances, 0.3)
    for place in torch.cartesian_prod(*map(torch.arange, distances.shape)).tolist():
        step = torch.zeros_like(distances)
        step[tuple(place)] = 1e-6
        slope = (FORMS[form](distances + step, 0.3) - FORMS[form](distances - step, 0.3)) / 2e-6
        assert grad[tuple(place)].item() == pytest.approx((slope * weight).sum().item(), abs=1e-8)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_op_passes_gradcheck_with_lengths_and_transposed_inputs(impl: str) -> None:
    distances = cosines(2, 3, 4, 5).requires_grad_()
    rows, columns = torch.tensor([[5, 3, 1]]), torch.tensor([[4], [2]])
    assert torch.autograd.gradcheck(lambda d: otam_alignment(d.mT, 0.2, query_frames=rows, support_frames=columns, impl=impl), distances)
    otam_alignment(distances, impl=impl).sum().backward()  # an expanded gradient
    assert distances.grad is not None and torch.isfinite(distances.grad).all()


def test_each_row_of_the_gradient_is_a_share_of_the_alignments() -> None:
    """Every alignment passes every inner column once, so a column's shares sum to 1."""
    grad = BACKWARD["reference"](torch.ones(3, dtype=torch.float64), cosines(3, 6, 5), 0.1)
    assert (grad >= 0).all()
    torch.testing.assert_close(grad[:, :, 1:].sum(1), torch.ones(3, 4, dtype=torch.float64))


def test_small_smoothing_finds_the_best_alignment_and_large_values_stay_finite() -> None:
    distances = 1e4 * cosines(4, 5, 5)
    assert not reference.fits_product_form(distances, 0.1)
    cost = otam_alignment(distances, 0.1)  # products would be 0 here: auto takes the logarithms
    hard = costs(distances, 1e-3 * 1e4)  # 40 times below the gaps between alignments
    torch.testing.assert_close(cost, hard, rtol=1e-3, atol=1.0)
    distances.requires_grad_()
    otam_alignment(distances, 0.1).sum().backward()
    assert distances.grad is not None and torch.isfinite(distances.grad).all()
    for largest in (0.0, 2.0, 30.0, 1e6):
        values = largest * torch.rand(8, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(otam_alignment(values), otam_alignment(values, impl="reference"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_forbidden_cells_are_avoided_and_get_no_gradient(impl: str) -> None:
    distances = cosines(2, 4, 4)
    distances[0, 1, 2] = INF
    distances[1] = INF
    distances.requires_grad_()
    cost = otam_alignment(distances, impl=impl)
    lifted = torch.where(torch.isinf(distances), 1e3, distances)
    assert cost[0].item() == pytest.approx(paper(lifted[0].detach(), 0.1), abs=1e-9)
    assert cost[1] == INF
    cost[0].backward()
    assert distances.grad is not None and torch.isfinite(distances.grad).all() and distances.grad[0, 1, 2] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    distances = cosines(5, 8, 8).to(dtype)
    exact = costs(distances.double(), 0.1)
    for impl in ("auto", "reference"):
        cost = otam_alignment(distances, impl=impl)
        assert cost.dtype == torch.float32
        torch.testing.assert_close(cost.double(), exact, rtol=4 * torch.finfo(torch.float32).eps, atol=2e-6)


def test_any_leading_dimensions_and_no_pairs() -> None:
    distances = cosines(2, 3, 4, 4)
    torch.testing.assert_close(otam_alignment(distances).flatten(), otam_alignment(distances.flatten(0, 1)))
    assert otam_alignment(distances[0, 0]).shape == ()
    assert otam_alignment(distances[:0]).shape == (0, 3)


def test_bad_arguments_are_named() -> None:
    distances = cosines(2, 3, 4)
    for call, words in (
        (lambda: otam_alignment(distances[0, 0]), "distances: got shape"),
        (lambda: otam_alignment(distances.long()), "distances: got torch.int64"),
        (lambda: otam_alignment(distances, 0.0), "smoothing: got 0.0"),
        (lambda: otam_alignment(distances, query_frames=torch.ones(2)), "query_frames: got torch.float32"),
        (lambda: otam_alignment(distances, support_frames=torch.ones(3, dtype=torch.int64)), "support_frames: got"),
    ):
        with pytest.raises(ArgumentError, match=words):
            call()
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(ImplementationError, match="never falls back"):
            otam_alignment(distances, impl="triton")


def test_explain_says_what_runs() -> None:
    assert "runs as products" in amd_fast.explain("otam_alignment", cosines(2, 3, 4))
    assert "runs as reference" in amd_fast.explain("otam_alignment", cosines(2, 3, 4), impl="reference")


def test_opcheck_and_one_graph() -> None:
    distances, lengths = cosines(3, 4, 5), torch.tensor([4, 2, 3])
    forward, backward = torch.ops.amd_fast.otam_alignment.default, torch.ops.amd_fast.otam_alignment_backward.default
    torch.library.opcheck(forward, (distances, 0.1, lengths, None, "auto"))
    torch.library.opcheck(backward, (torch.ones(3, dtype=torch.float64), distances, 0.1, lengths, None, "auto"))
    leaf = distances.clone().requires_grad_()
    compiled = torch.compile(lambda d: otam_alignment(d, 0.2, query_frames=lengths), fullgraph=True, backend="aot_eager")
    results = [(cost := call(leaf), *torch.autograd.grad(cost.square().sum(), leaf)) for call in (
        compiled, lambda d: otam_alignment(d, 0.2, query_frames=lengths)
    )]  # fmt: skip
    torch.testing.assert_close(results[0], results[1])


def test_the_kernels_in_tritons_interpreter(repository: Path) -> None:
    """The interpreter has to be asked for before Triton is imported, and would stay on for every test after."""
    pytest.importorskip("triton")
    paths = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(repository / "tests" / "test_otam_kernel.py")]
    run = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
