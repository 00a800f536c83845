"""The Triton kernels of otam_alignment against the reference: on a GPU, or in Triton's interpreter on the CPU.

The interpreter has to be asked for before Triton is imported, so without a GPU this file runs in a process of its own, started by
``test_otam.py``. Memory that is not written holds NaN here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU; test_otam.py runs this file in Triton's interpreter", allow_module_level=True)

from amd_fast.kernels.otam import config, reference
from torch import Tensor

from amd_fast.errors import ImplementationError
from amd_fast.ops import otam_alignment
from amd_fast.ops.otam import choose

DEVICE = "cpu" if INTERPRETED else "cuda"
EXACT = torch.float64 if INTERPRETED else torch.float32  # GPUs are served in float32
TIGHT = {"rtol": 1e-11, "atol": 1e-11}

UNITS = 1 if INTERPRETED else 4  # of rounding: the elementary functions of a GPU add some

# The interpreter computes in NumPy, which reports exp and log of infinities that are wanted here.
pytestmark = [pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")]
if not INTERPRETED:
    pytestmark.append(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


def make(pairs: int, rows: int, columns: int, dtype: torch.dtype = EXACT, seed: int = 0) -> Tensor:
    return (2 * torch.rand(pairs, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(DEVICE, dtype)


def both(distances: Tensor, impl: str, **lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Costs, and the gradient of their unevenly weighted sum."""
    leaf = distances.detach().requires_grad_()
    cost = otam_alignment(leaf, 0.1, impl=impl, **lengths)
    (grad,) = torch.autograd.grad((cost * torch.linspace(0.5, 2.0, len(cost), dtype=cost.dtype, device=DEVICE)).sum(), leaf)
    return cost.detach(), grad


def assert_right(distances: Tensor, rows: list[int] | slice = slice(None), **lengths: Tensor) -> None:
    """Costs, and gradients of some of the pairs: in float64 the reference's, in float32 no worse than twice its error, and rounding."""
    got, low = both(distances, "triton", **lengths), both(distances, "reference", **lengths)
    if distances.dtype == torch.float64:
        torch.testing.assert_close(got[0], low[0], **TIGHT)
        torch.testing.assert_close(got[1][rows], low[1][rows], **TIGHT)
        return
    exact = both(distances.double(), "reference", **lengths)
    for mine, theirs, truth in ((got[0], low[0], exact[0]), (got[1][rows], low[1][rows], exact[1][rows])):
        finite = truth.isfinite()
        assert torch.equal(mine[~finite].double(), truth[~finite])
        if finite.any():
            rounding = UNITS * torch.finfo(torch.float32).eps * (1 + truth[finite].abs().max())
            allowed = 2 * ((theirs.double() - truth)[finite].abs().max() + rounding)
            assert (mine.double() - truth)[finite].abs().max() <= allowed


@pytest.mark.parametrize(("pairs", "rows", "columns"), [(7, 8, 8), (130, 2, 3), (3, 1, 5), (3, 5, 1), (2, 1, 1), (2, 16, 16), (0, 4, 4)])
def test_costs_and_gradients_equal_the_reference(pairs: int, rows: int, columns: int) -> None:
    assert_right(make(pairs, rows, columns))


def test_lengths_either_or_both_equal_the_reference() -> None:
    distances = make(6, 5, 4)
    rows = torch.tensor([5, 3, 1, 4, 0, 2], device=DEVICE)
    columns = torch.tensor([4, 1, 3, 2, 2, 0], device=DEVICE)
    for lengths in ({"query_frames": rows}, {"support_frames": columns}, {"query_frames": rows, "support_frames": columns}):
        assert_right(distances, **lengths)


def test_strided_inputs_give_the_same() -> None:
    distances = make(5, 4, 6)
    for view in (distances.mT.contiguous().mT, distances.permute(1, 2, 0).contiguous().permute(2, 0, 1), distances.repeat(2, 1, 1)[::2]):
        if torch.equal(view, distances):
            assert not view.is_contiguous()
            assert torch.equal(both(view, "triton")[0], both(distances, "triton")[0])
            assert torch.equal(both(view, "triton")[1], both(distances, "triton")[1])


def test_forbidden_and_enormous_distances_match_the_reference() -> None:
    distances = make(4, 4, 4)
    distances[0, 1, 2] = math.inf
    distances[1] = math.inf
    distances[2] *= 1e4
    assert_right(distances, rows=[0, 2, 3])


def test_errors_in_float32_stay_within_twice_those_of_pytorch() -> None:
    assert_right(make(200, 8, 8, torch.float32))


@pytest.mark.skipif(not INTERPRETED, reason="float64 is for the interpreter")
def test_gradients_equal_finite_differences() -> None:
    distances = make(2, 3, 4).requires_grad_()
    rows = torch.tensor([3, 2])
    assert torch.autograd.gradcheck(lambda d: otam_alignment(d, 0.2, query_frames=rows, impl="triton"), distances)


def test_repeated_runs_and_other_launches_agree_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    distances = make(150, 4, 4, torch.float32)
    want = both(distances, "triton")
    assert all(torch.equal(*pair) for pair in zip(both(distances, "triton"), want, strict=True))
    monkeypatch.setattr(config, "choose", lambda *_: config.LaunchConfig(pairs=32, warps=1))
    assert all(torch.equal(*pair) for pair in zip(both(distances, "triton"), want, strict=True))


def test_long_sequences_are_refused_by_name_and_left_to_the_reference_by_auto() -> None:
    distances = make(2, config.MAX_FRAMES + 1, 4)
    with pytest.raises(ImplementationError, match="the kernel takes up to"):
        otam_alignment(distances, impl="triton")
    assert choose(distances).implementation != "triton"
    assert torch.isfinite(otam_alignment(distances)).all()


def test_opcheck_and_a_compiled_graph_with_the_kernel_inside() -> None:
    distances, lengths = make(3, 3, 4), torch.tensor([3, 1, 2], device=DEVICE)
    torch.library.opcheck(torch.ops.amd_fast.otam_alignment.default, (distances, 0.1, lengths, None, "triton"))
    grad = torch.ones(3, dtype=distances.dtype, device=DEVICE)
    torch.library.opcheck(torch.ops.amd_fast.otam_alignment_backward.default, (grad, distances, 0.1, lengths, None, "triton"))
    compiled = torch.compile(lambda d: otam_alignment(d, 0.1, impl="triton"), fullgraph=True, backend="aot_eager")
    tolerance = TIGHT if INTERPRETED else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(compiled(distances), reference.otam_alignment(distances, 0.1), **tolerance)
