"""free_energy_loss: the definition against a plain loop, its invariances, its extreme values."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from amd_fast.active_inference import certainty, fuse
from amd_fast.ops import free_energy_loss
from amd_fast.ops.free_energy import FreeEnergyLoss

_cases = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("free_energy_cases.py"))))
INF, TERMS, NUMBERS, make_model, make_inputs, make_presence, loop_oracle, assert_same, gradient = (
    _cases.INF,
    _cases.TERMS,
    _cases.NUMBERS,
    _cases.make_model,
    _cases.make_inputs,
    _cases.make_presence,
    _cases.loop_oracle,
    _cases.assert_same,
    _cases.gradient,
)

SHAPES: dict[str, dict[str, Any]] = {
    "episode": {"rows": (2, 5), "views": 3, "classes": 5, "channels": 2},
    "one view": {"rows": (4,), "views": 1, "classes": 5, "channels": 2},
    "one class": {"rows": (4,), "views": 2, "classes": 1, "channels": 2},
    "certainty alone": {"rows": (4,), "views": 2, "classes": 3, "channels": 1},
    "all channels": {"rows": (3,), "views": 4, "classes": 7, "channels": 4},
    "no leading dimension": {"rows": (), "views": 2, "classes": 3, "channels": 2},
    "no rows": {"rows": (0,), "views": 3, "classes": 5, "channels": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formulas_written_as_loops(shape: str, masked: bool) -> None:
    size = SHAPES[shape]
    logits, target, context = make_inputs(**size)
    model = make_model(size["views"], size["channels"])
    present = make_presence(size["rows"], size["views"]) if masked else None
    got = free_energy_loss(logits, target, model, context_evidence=context, present=present, **NUMBERS)
    if target.numel():
        assert_same(got, loop_oracle(logits, target, context, model, present, **NUMBERS))
    assert got.total.shape == target.shape
    assert got.policy.shape == got.state.shape == (*target.shape, size["views"])
    assert got.group.dtype == torch.int64


@given(
    rows=st.integers(1, 4),
    views=st.integers(1, 5),
    classes=st.integers(1, 9),
    channels=st.integers(1, 4),
    bins=st.integers(2, 9),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    temperature=st.sampled_from([0.3, 1.0, 4.0]),
    margin=st.sampled_from([0.0, 0.1, 0.6]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_equals_the_loops_at_any_size(
    rows: int, views: int, classes: int, channels: int, bins: int, scale: float, temperature: float, margin: float, seed: int
) -> None:
    logits, target, context = make_inputs((rows,), views, classes, channels, seed=seed)
    absent = torch.rand(classes, generator=torch.Generator().manual_seed(seed)) < 0.3
    absent[target] = False
    logits = (scale * logits).masked_fill(absent, -INF)
    model, present = make_model(views, channels, bins, seed=seed), make_presence((rows,), views, seed)
    got = free_energy_loss(logits, target, model, context_evidence=context, present=present, temperature=temperature, margin=margin)
    assert_same(got, loop_oracle(logits, target, context, model, present, temperature=temperature, margin=margin), atol=1e-9)


def test_agrees_with_the_generative_model_and_with_the_fused_posterior() -> None:
    """The loss infers what GenerativeModel.infer infers, and its task term is the evidence of what fuse() predicts with."""
    logits, target, context = make_inputs((4, 6))
    assert context is not None
    model, present = make_model(3), make_presence((4, 6), 3)
    present[..., 0] = True
    evidence = torch.cat([certainty(logits).unsqueeze(-1), context], -1)
    beliefs = model.infer(model.observe(evidence), present)
    loss = free_energy_loss(logits, target, model, context_evidence=context, present=present)
    torch.testing.assert_close(loss.state, beliefs.state)
    torch.testing.assert_close(loss.policy, beliefs.policy)
    fused = fuse(logits.log_softmax(-1), beliefs.policy)
    torch.testing.assert_close(loss.task, -fused.gather(-1, target.unsqueeze(-1)).squeeze(-1))


def test_single_view_is_the_ordinary_cross_entropy() -> None:
    logits, target, context = make_inputs(views=1)
    loss = free_energy_loss(logits, target, make_model(1), context_evidence=context)
    expected = nn.functional.cross_entropy(logits.squeeze(-2), target, reduction="none")
    torch.testing.assert_close(loss.task, expected)
    torch.testing.assert_close(loss.cross_entropy, expected)
    assert (loss.distillation == 0).all()
    assert (loss.group == 0).all()


def test_views_permute() -> None:
    logits, target, context = make_inputs()
    assert context is not None
    model, order = make_model(3), torch.tensor([2, 0, 1])
    permuted = make_model(3)
    permuted.likelihood.copy_(model.likelihood[order][..., order])
    permuted.outcome_likelihood.copy_(model.outcome_likelihood[:, order][:, :, order])
    permuted.state_prior.copy_(model.state_prior[order])
    permuted.habit.copy_(model.habit[order])
    loss = free_energy_loss(logits, target, model, context_evidence=context)
    other = free_energy_loss(logits[:, order], target, permuted, context_evidence=context[:, order])
    for term in TERMS:
        torch.testing.assert_close(getattr(other, term), getattr(loss, term))
    torch.testing.assert_close(other.policy, loss.policy[:, order])
    torch.testing.assert_close(torch.where(other.group < 0, -1, order[other.group]), loss.group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_inputs_lose_only_their_own_rounding(dtype: torch.dtype) -> None:
    logits, target, context = make_inputs((40,), dtype=dtype)
    model = make_model(3)
    got = free_energy_loss(logits, target, model, context_evidence=context)
    want = loop_oracle(logits, target, context, model, None)
    assert got.total.dtype == torch.float32
    keep = (want.policy.topk(2).values.diff().abs().squeeze(-1) - 0.1).abs() > 1e-4  # whose teacher rounding cannot change
    for name in TERMS:
        torch.testing.assert_close(getattr(got, name)[keep], getattr(want, name)[keep].float(), atol=2e-5, rtol=2e-5)
    assert gradient("total", logits, target, model, context_evidence=context).dtype == dtype


# ---- extreme values


def all_finite(loss: FreeEnergyLoss) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1.0, 1e4])
def test_finite_at_extreme_logits_and_temperatures(dtype: torch.dtype, temperature: float) -> None:
    logits, target, context = make_inputs((60,), dtype=dtype)
    model = make_model(3)
    logits = logits.sign() * 1e4
    logits[:20, :, 3] = -INF
    target[:20] = target[:20] % 3
    numbers = {"temperature": temperature, "margin": 0.0}
    loss = free_energy_loss(logits, target, model, context_evidence=context, **numbers)
    assert all_finite(loss)
    assert (loss.distillation >= 0).all()
    assert loss.task.max() > 1e4
    for term in TERMS:
        grad = gradient(term, logits, target, model, context_evidence=context, **numbers)
        assert torch.isfinite(grad).all()
        assert (grad[:20, :, 3] == 0).all()


def test_temperature_towards_zero_approaches_the_margin_of_the_teachers_choice() -> None:
    """tau^2 KL is about tau times how far the student ranks the teacher's first class below its own: it vanishes with tau."""
    logits, target, context = make_inputs((40,))
    model = make_model(3)
    for temperature in (1e-3, 1e-9):
        loss = free_energy_loss(logits, target, model, context_evidence=context, temperature=temperature, margin=0.0)
        teacher = logits[torch.arange(40), loss.group]
        behind = logits.amax(-1) - logits.gather(-1, teacher.argmax(-1)[:, None, None].expand(40, 3, 1)).squeeze(-1)
        expected = temperature * loss.policy.amax(-1) * behind.sum(-1)
        torch.testing.assert_close(loss.distillation, expected, rtol=0.02, atol=20 * temperature**2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_teacher_equal_to_student_is_exactly_zero_with_zero_gradient(dtype: torch.dtype, temperature: float) -> None:
    logits, target, context = make_inputs((30,), views=1, classes=37, channels=2, dtype=dtype)
    assert context is not None
    logits = logits.expand(30, 3, 37)
    context = torch.rand(30, 3, 1, generator=torch.Generator().manual_seed(0), dtype=context.dtype)
    numbers = {"temperature": temperature, "margin": 0.0}
    loss = free_energy_loss(logits, target, make_model(3), context_evidence=context, **numbers)
    assert (loss.group >= 0).all()
    assert (loss.distillation == 0).all()
    assert (gradient("distillation", logits, target, make_model(3), context_evidence=context, **numbers) == 0).all()


def test_padding_an_episode_with_absent_classes_changes_nothing() -> None:
    logits, target, context = make_inputs()
    padded = torch.cat([logits, torch.full((7, 3, 4), -INF, dtype=logits.dtype)], -1)
    model = make_model(3)
    assert_same(
        free_energy_loss(padded, target, model, context_evidence=context),
        free_energy_loss(logits, target, model, context_evidence=context),
        atol=1e-12,
    )
    grad = gradient("total", padded, target, model, context_evidence=context)
    torch.testing.assert_close(grad[..., :5], gradient("total", logits, target, model, context_evidence=context))
    assert (grad[..., 5:] == 0).all()


def test_a_missing_view_has_no_influence_and_no_gradient_whatever_it_holds() -> None:
    logits, target, context = make_inputs((9,))
    assert context is not None
    model, present = make_model(3), make_presence((9,), 3)
    present[0] = False
    want = free_energy_loss(logits, target, model, context_evidence=context, present=present)
    spoilt, spoilt_context = logits.clone(), context.clone()
    spoilt[~present], spoilt_context[~present] = torch.nan, torch.nan
    assert_same(free_energy_loss(spoilt, target, model, context_evidence=spoilt_context, present=present), want, atol=0, rtol=0)
    assert all(value[0] == 0 for value in want[:4])
    assert (want.policy[~present] == 0).all()
    for term in TERMS:
        grad = gradient(term, spoilt, target, model, context_evidence=spoilt_context, present=present)
        assert torch.isfinite(grad).all()
        assert (grad[~present] == 0).all()
    silent = torch.where(present.unsqueeze(-1), logits, -INF)
    assert_same(free_energy_loss(silent, target, model, context_evidence=context), want, atol=0, rtol=0)


def test_nan_logits_are_not_hidden() -> None:
    logits, target, context = make_inputs()
    logits[2, 1, 3] = torch.nan
    loss = free_energy_loss(logits, target, make_model(3), context_evidence=context)
    assert loss.total.isnan().tolist() == [row == 2 for row in range(7)]


def test_a_label_one_view_rules_out_leaves_the_task_finite() -> None:
    logits, target, context = make_inputs((5,))
    logits[torch.arange(5), 0, target] = -INF
    loss = free_energy_loss(logits, target, make_model(3), context_evidence=context, cross_entropy_weight=0.0, distillation_weight=0.0)
    assert torch.isfinite(loss.task).all()
    assert torch.isfinite(loss.total).all()
    assert (loss.cross_entropy == INF).all()
    assert torch.isfinite(gradient("task", logits, target, make_model(3), context_evidence=context)).all()
