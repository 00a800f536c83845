"""The Triton kernels of free_energy_loss against the float64 reference: on a GPU, or in Triton's interpreter on the CPU.

The interpreter has to be asked for before Triton is imported, so without a GPU this file runs in a process of its own, started by
``test_free_energy_contract.py``. Memory that is not written holds NaN here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU; test_free_energy_contract.py runs this file in Triton's interpreter", allow_module_level=True)

from amd_fast.kernels.free_energy import config
from torch import Tensor, nn

from amd_fast.active_inference import GenerativeModel
from amd_fast.errors import ImplementationError
from amd_fast.ops import free_energy as op
from amd_fast.ops import free_energy_loss
from amd_fast.ops.free_energy import choose

DEVICE = "cpu" if INTERPRETED else "cuda"
INF = math.inf
TERMS = ("total", "task", "distillation", "cross_entropy")
NAMES = (*TERMS, "state", "policy", "group", "responsibility", "teacher_policy")
CHANNELS = ("certainty", "surprise", "agreement", "log_evidence")
NUMBERS = {"temperature": 2.0, "margin": 0.2, "distillation_weight": 0.7, "cross_entropy_weight": 0.3}

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


def make_model(views: int, channels: int = 2, bins: int = 6, seed: int = 0) -> GenerativeModel:
    generator = torch.Generator().manual_seed(seed)

    def columns(shape: tuple[int, ...], dim: int) -> Tensor:
        values = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.05
        return values / values.sum(dim, keepdim=True)

    model = GenerativeModel(views, CHANNELS[:channels], bins, precision=3.0)
    model.likelihood.copy_(columns((views, channels, bins, views), 2))
    model.outcome_likelihood.copy_(columns((2, views, views), 0))
    model.state_prior.copy_(columns((views,), 0))
    model.habit.copy_(columns((views,), 0))
    return model.to(DEVICE)


def make_call(
    rows: int = 5,
    views: int = 3,
    classes: int = 5,
    channels: int = 2,
    dtype: torch.dtype = torch.float64,
    mask: str = "some",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of a call: logits with some classes ruled out, targets, model, context and presence."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, views, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (rows,), generator=generator)
    absent = torch.rand(rows, 1, classes, generator=generator) < 0.2
    absent.scatter_(2, target[:, None, None], False)
    context = torch.rand(rows, views, channels - 1, generator=generator, dtype=torch.float64)
    present = torch.rand(rows, views, generator=generator) > {"some": 0.3, "all": 1.0, "none": -1.0}[mask]
    return {
        "view_logits": logits.masked_fill(absent, -INF).to(dtype).to(DEVICE),
        "target": target.to(DEVICE),
        "generative_model": make_model(views, channels, seed=seed),
        "context_evidence": context.to(torch.promote_types(dtype, torch.float32)).to(DEVICE) if channels > 1 else None,
        "present": None if mask == "none" else present.to(DEVICE),
    }


def outputs_of(call: dict[str, Any], impl: str, numbers: dict[str, float]) -> dict[str, Tensor]:
    """All results of the op, its gradient's factors included."""
    model = call["generative_model"]
    arrays = (model.likelihood, model.outcome_likelihood, model.log_preference, model.state_prior, model.habit, model.precision)
    settings_ = {"temperature": 1.0, "margin": 0.1, "distillation_weight": 1.0, "cross_entropy_weight": 1.0, **numbers}
    values = op._forward(call["view_logits"], call["target"], call["context_evidence"], call["present"], *arrays, *settings_.values(), impl)
    return dict(zip(NAMES, values, strict=True))


def gradient(call: dict[str, Any], impl: str, term: str, numbers: dict[str, float]) -> Tensor:
    """Gradient of the unevenly weighted sum of one term, or of all four of them ("all")."""
    leaf = call["view_logits"].detach().clone().requires_grad_()
    loss = free_energy_loss(**{**call, "view_logits": leaf}, impl=impl, **numbers)
    chosen = [getattr(loss, name) for name in (TERMS if term == "all" else (term,))]
    weights = torch.linspace(0.5, 2.0, len(chosen[0]), dtype=chosen[0].dtype, device=DEVICE)
    torch.stack([(value * weights).sum() * (i + 1) for i, value in enumerate(chosen)]).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], atol: float = 1e-11) -> None:
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=atol, rtol=1e-11, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


SHAPES: dict[str, dict[str, int]] = {
    "episode": {"rows": 7, "views": 3, "classes": 5},
    "one view": {"rows": 3, "views": 1, "classes": 5},
    "one class": {"rows": 3, "views": 2, "classes": 1},
    "certainty alone": {"rows": 3, "views": 2, "classes": 3, "channels": 1},
    "nine views, all channels": {"rows": 3, "views": 9, "classes": 7, "channels": 4},
    "many classes": {"rows": 2, "views": 3, "classes": 1024},
    "one row more than a program takes": {"rows": 129, "views": 2, "classes": 5},
    "no rows": {"rows": 0, "views": 3, "classes": 5},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", ["none", "some", "all"])
def test_results_equal_the_float64_reference(shape: str, mask: str) -> None:
    call = make_call(**SHAPES[shape], mask=mask)
    want = outputs_of(call, "reference", NUMBERS)
    assert_same(outputs_of(call, "triton", NUMBERS), want)
    if shape == "episode" and mask != "all":
        assert {-1, 2} <= set(want["group"].tolist())  # with and without a teacher


@pytest.mark.parametrize("term", [*TERMS, "all"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shape", ["episode", "one view", "nine views, all channels", "no rows"])
def test_gradients_equal_the_float64_reference(term: str, temperature: float, shape: str) -> None:
    call, numbers = make_call(**SHAPES[shape]), {**NUMBERS, "temperature": temperature}
    got, want = gradient(call, "triton", term, numbers), gradient(call, "reference", term, numbers)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-11)
    if shape == "episode":
        assert want.abs().max() > 0.01


@pytest.mark.skipif(not INTERPRETED, reason="every size is compiled anew, for seconds each")
def test_any_size_equals_the_reference() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.given(
        rows=st.integers(0, 4),
        views=st.integers(1, 5),
        classes=st.integers(1, 40),
        channels=st.integers(1, 4),
        mask=st.sampled_from(["none", "some", "all"]),
        temperature=st.sampled_from([0.3, 1.0]),
        margin=st.sampled_from([0.0, 0.6]),
        seed=st.integers(0, 99),
    )
    @hypothesis.settings(max_examples=15)
    def check(rows: int, views: int, classes: int, channels: int, mask: str, temperature: float, margin: float, seed: int) -> None:
        call, numbers = make_call(rows, views, classes, channels, mask=mask, seed=seed), {"temperature": temperature, "margin": margin}
        assert_same(outputs_of(call, "triton", numbers), outputs_of(call, "reference", numbers))
        torch.testing.assert_close(gradient(call, "triton", "total", numbers), gradient(call, "reference", "total", numbers))

    check()


# The interpreter is silently wrong in bfloat16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])])
@pytest.mark.parametrize("shape", ["episode", "nine views, all channels", "many classes"])
def test_errors_stay_within_twice_those_of_pytorch_at_the_same_precision(dtype: torch.dtype, shape: str) -> None:
    # Enough rows for the largest error of each to be typical of it.
    call = make_call(**{**SHAPES[shape], "rows": 8 if shape == "many classes" else 64}, dtype=dtype)
    exact_call = {
        **call,
        "view_logits": call["view_logits"].double(),
        "context_evidence": None if call["context_evidence"] is None else call["context_evidence"].double(),
    }
    got, low, exact = (outputs_of(c, impl, NUMBERS) for c, impl in ((call, "triton"), (call, "reference"), (exact_call, "reference")))
    assert torch.equal(got.pop("group"), exact.pop("group"))

    def assert_within_budget(name: str, mine: Tensor, theirs: Tensor, truth: Tensor) -> None:
        units = 4 if mine.is_cuda and mine.dtype == torch.float32 else 1  # what the elementary functions of a GPU add
        rounding = units * torch.finfo(mine.dtype).eps * (1 + truth.abs().max())
        budget = 2 * ((theirs.double() - truth).abs().max() + rounding)
        error = (mine.double() - truth).abs().max()
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"

    for name in exact:
        assert_within_budget(name, got[name], low[name], exact[name])
    for term in TERMS:
        grads = [gradient(c, impl, term, NUMBERS) for c, impl in ((call, "triton"), (call, "reference"), (exact_call, "reference"))]
        assert grads[0].dtype == dtype
        assert_within_budget(f"gradient of {term}", *grads)


@pytest.mark.parametrize("term", ["task", "cross_entropy"])
def test_gradients_equal_finite_differences(term: str) -> None:
    """With a model that does not listen to the evidence the beliefs stay where they are when the logits move."""
    call = make_call(2, 2, 3)
    call["generative_model"].likelihood.fill_(1 / 6)
    call["view_logits"] = torch.randn(2, 2, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: getattr(free_energy_loss(**{**call, "view_logits": z}, impl="triton"), term), call["view_logits"]
    )


def test_students_gradients_equal_finite_differences() -> None:
    call = make_call(1, 2, 3, mask="none")
    call["generative_model"].likelihood.fill_(1 / 6)
    call["view_logits"] = torch.randn(1, 2, 3, dtype=torch.float64, device=DEVICE)
    numbers = {**NUMBERS, "margin": 0.0}
    teacher = int(outputs_of(call, "triton", numbers)["group"])
    grad = gradient(call, "triton", "distillation", numbers)
    assert (grad[0, teacher] == 0).all()
    for c in range(3):
        step = torch.zeros_like(call["view_logits"])
        step[0, 1 - teacher, c] = 1e-6
        ends = [outputs_of({**call, "view_logits": call["view_logits"] + s}, "triton", numbers)["distillation"] for s in (step, -step)]
        # gradient() weighs the first row by 0.5
        assert grad[0, 1 - teacher, c].item() == pytest.approx(0.5 * (ends[0] - ends[1]).item() / 2e-6, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-30, 1.0, 1e4])
def test_finite_at_extreme_logits_and_temperatures(dtype: torch.dtype, temperature: float) -> None:
    call, numbers = make_call(30, dtype=dtype, mask="none"), {"temperature": temperature, "margin": 0.0}
    logits = call["view_logits"]
    call["view_logits"] = torch.where(logits == -INF, logits, logits.sign() * 1e4)
    got, want = (outputs_of(call, impl, numbers) for impl in ("triton", "reference"))
    assert all(torch.isfinite(value).all() for value in got.values())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    for name in NAMES:
        torch.testing.assert_close(got[name], want[name], atol=tolerance, rtol=tolerance)
    assert torch.isfinite(gradient(call, "triton", "all", numbers)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_teacher_equal_to_student_is_exactly_zero_with_zero_gradient(dtype: torch.dtype, temperature: float) -> None:
    call, numbers = make_call(9, 3, 37, dtype=dtype, mask="none"), {"temperature": temperature, "margin": 0.0}
    call["view_logits"] = call["view_logits"][:, :1].expand(9, 3, 37)
    got = outputs_of(call, "triton", numbers)
    assert (got["group"] >= 0).all()
    assert (got["distillation"] == 0).all()
    assert (gradient(call, "triton", "distillation", numbers) == 0).all()


def test_a_missing_view_has_no_influence_and_no_gradient_whatever_it_holds() -> None:
    call = make_call(9)
    call["present"][0] = False
    spoilt = {name: value.clone() if isinstance(value, Tensor) else value for name, value in call.items()}
    spoilt["view_logits"][~call["present"]] = torch.nan
    spoilt["context_evidence"][~call["present"]] = torch.nan
    want = outputs_of(call, "triton", NUMBERS)
    assert_same(outputs_of(spoilt, "triton", NUMBERS), want, atol=0)
    assert all((want[name][0] == 0).all() for name in (*TERMS, "policy", "state", "responsibility"))
    grad = gradient(spoilt, "triton", "all", NUMBERS)
    assert torch.isfinite(grad).all()
    assert (grad[~call["present"]] == 0).all()


def test_nan_inputs_are_not_hidden_and_stay_in_their_row() -> None:
    for name in ("view_logits", "context_evidence"):
        call = make_call(mask="none")
        call[name][2, 1, 0] = torch.nan
        try:
            total = outputs_of(call, "triton", NUMBERS)["total"]
        except Exception as error:
            if "All-NaN slice" not in str(error):
                raise
            pytest.skip("this Triton's interpreter takes its maxima from NumPy, which refuses rows of NaN alone; kernels on a GPU do not")
        assert total.isnan().tolist() == [row == 2 for row in range(5)]


def test_a_class_out_of_range_makes_its_row_nan_where_it_cannot_be_refused() -> None:
    from amd_fast.kernels.free_energy import reference
    from amd_fast.kernels.free_energy import triton as launcher

    call = make_call()
    model = call["generative_model"]
    arrays = (model.likelihood, model.outcome_likelihood, model.log_preference, model.state_prior, model.habit, model.precision)
    call["target"][1], call["target"][3] = -1, 5
    call["present"][:, 0] = True
    call["present"][3, 1] = False
    outputs, grads = {}, {}
    for name, module in (("triton", launcher), ("reference", reference)):
        inputs = (call["view_logits"], call["target"])
        given = module.free_energy_loss_with_factors(*inputs, call["context_evidence"], *arrays, 2.0, 0.1, 1.0, 1.0, call["present"])
        values = (*given[0], *given[1:]) if name == "reference" else given
        outputs[name] = dict(zip(NAMES, values, strict=True))
        factors = (outputs[name]["responsibility"], outputs[name]["teacher_policy"], outputs[name]["group"])
        ones = torch.ones_like(outputs[name]["total"])
        grads[name] = module.free_energy_loss_backward(ones, None, None, None, *inputs, call["present"], *factors, 2.0, 1.0, 1.0)
    assert_same(outputs["triton"], outputs["reference"])
    torch.testing.assert_close(grads["triton"], grads["reference"], equal_nan=True)
    for name in ("total", "task", "cross_entropy"):
        assert outputs["reference"][name].isnan().tolist() == [False, True, False, True, False]
    assert outputs["reference"]["distillation"].isfinite().all()
    wrong = torch.tensor([False, True, False, True, False], device=DEVICE)[:, None] & call["present"]
    assert torch.equal(grads["reference"].isnan(), wrong[..., None].expand(5, 3, 5))


def test_impossible_observations_and_forbidden_policies_match_the_reference() -> None:
    call = make_call(mask="none")
    model = call["generative_model"]
    model.likelihood[0, 0, :3] = 0.0
    model.habit[1] = 0.0
    model.state_prior[2] = 0.0
    got = outputs_of(call, "triton", NUMBERS)
    assert_same(got, outputs_of(call, "reference", NUMBERS))
    assert (got["policy"][:, 1] == 0).all()


def test_strided_inputs_and_float32_models_give_the_same() -> None:
    call = make_call(6)
    want = outputs_of(call, "triton", NUMBERS)
    strided = {
        **call,
        "view_logits": call["view_logits"].transpose(0, 2).contiguous().transpose(0, 2),
        "context_evidence": call["context_evidence"].transpose(0, 1).contiguous().transpose(0, 1),
        "present": call["present"].T.contiguous().T,
        "target": torch.stack([call["target"], call["target"]], 1)[:, 0],
    }
    assert not strided["view_logits"].is_contiguous()
    assert_same(outputs_of(strided, "triton", NUMBERS), want, atol=0)
    torch.testing.assert_close(gradient(strided, "triton", "total", NUMBERS), gradient(call, "triton", "total", NUMBERS), atol=0, rtol=0)

    class Float32Model:
        def __init__(self, model: GenerativeModel) -> None:
            for name, value in model.named_buffers():
                setattr(self, name, value.float())

    narrow = outputs_of({**call, "generative_model": Float32Model(call["generative_model"])}, "triton", NUMBERS)
    torch.testing.assert_close(narrow["policy"], want["policy"], atol=1e-5, rtol=0)


def test_repeated_runs_agree_bit_for_bit_however_the_rows_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from amd_fast.kernels.free_energy import triton as launcher

    call = make_call(11, dtype=torch.float32)
    want, want_grad = outputs_of(call, "triton", NUMBERS), gradient(call, "triton", "all", NUMBERS)
    assert_same(outputs_of(call, "triton", NUMBERS), want, atol=0)
    monkeypatch.setattr(launcher, "_config", lambda *_: config.LaunchConfig(rows=4, warps=1, row_per_thread=False))
    shared = outputs_of(call, "triton", NUMBERS)
    for name in NAMES:  # sums may be taken in another order
        torch.testing.assert_close(shared[name], want[name], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient(call, "triton", "all", NUMBERS), want_grad, atol=1e-6, rtol=1e-6)


def test_sizes_over_the_limits_are_refused_by_name_and_left_to_the_reference_by_auto() -> None:
    for views, classes, what in ((10, 5, "10 views"), (2, 1025, "1025 classes")):
        call = make_call(2, views, classes)
        with pytest.raises(ImplementationError, match=f"view_logits has {what} and the kernel takes up to"):
            free_energy_loss(**call, impl="triton")
        assert choose(call["view_logits"]).implementation == "reference"
        assert torch.isfinite(free_energy_loss(**call).total).all()


def test_opcheck_with_the_kernel_inside() -> None:
    call = make_call()
    model = call["generative_model"]
    arrays = (model.likelihood, model.outcome_likelihood, model.log_preference, model.state_prior, model.habit, model.precision)
    forward, backward = torch.ops.amd_fast.free_energy_loss.default, torch.ops.amd_fast.free_energy_loss_backward.default
    numbers = (2.0, 0.1, 1.0, 1.0)
    arguments = (call["view_logits"], call["target"], call["context_evidence"], call["present"], *arrays, *numbers, "triton")
    torch.library.opcheck(forward, arguments)
    outputs = forward(*arguments)
    grads = [torch.randn_like(outputs[0]), None, torch.randn_like(outputs[0]), None]
    saved = (call["view_logits"], call["target"], call["present"], outputs[7], outputs[8], outputs[6])
    torch.library.opcheck(backward, (*grads, *saved, 2.0, 1.0, 1.0, "triton"))


def test_the_kernel_runs_inside_a_compiled_graph() -> None:
    call = make_call(6, dtype=torch.float32)

    def step(z: Tensor) -> Tensor:
        return free_energy_loss(**{**call, "view_logits": 2 * z}, impl="triton", **NUMBERS).total.mean()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = call["view_logits"].clone().requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0])


def test_training_follows_the_same_curve_with_the_kernels_and_with_the_reference() -> None:
    """Eight steps on the same episodes; float64, so that only a wrong formula could part the curves."""
    curves = []
    for impl in ("triton", "reference"):
        call = make_call(12, 3, 5, mask="none")
        torch.manual_seed(0)
        features = torch.randn(12, 8, dtype=torch.float64, device=DEVICE)
        heads = nn.ModuleList(nn.Linear(8, 5, dtype=torch.float64, device=DEVICE) for _ in range(3))
        optimizer = torch.optim.Adam(heads.parameters(), lr=0.1)
        curve = []
        for _ in range(8):
            logits = torch.stack([head(features) for head in heads], 1)
            loss = free_energy_loss(**{**call, "view_logits": logits}, impl=impl, **NUMBERS).total.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    assert curves[0][-1] < 0.5 * curves[0][0]
