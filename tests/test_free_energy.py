"""free_energy_loss: the definition against a plain loop, its extreme values, its gradients, its contract with PyTorch."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from amd_fast.kernels.free_energy import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from amd_fast.active_inference import GenerativeModel, certainty, fuse
from amd_fast.errors import ConfigError, ImplementationError
from amd_fast.ops import explain, free_energy_loss
from amd_fast.ops.free_energy import FreeEnergyLoss, choose

INF = math.inf
TERMS = ("total", "task", "distillation", "cross_entropy")
CHANNELS = ("certainty", "surprise", "agreement", "log_evidence")


def make_model(views: int, channels: int = 2, bins: int = 6, precision: float = 3.0, seed: int = 0) -> GenerativeModel:
    """A generative model whose arrays are all random."""
    generator = torch.Generator().manual_seed(seed)

    def columns(shape: tuple[int, ...], dim: int) -> Tensor:
        values = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.05
        return values / values.sum(dim, keepdim=True)

    model = GenerativeModel(views, CHANNELS[:channels], bins, precision)
    model.likelihood.copy_(columns((views, channels, bins, views), 2))
    model.outcome_likelihood.copy_(columns((2, views, views), 0))
    model.state_prior.copy_(columns((views,), 0))
    model.habit.copy_(columns((views,), 0))
    return model


def make_inputs(
    rows: tuple[int, ...] = (7,), views: int = 3, classes: int = 5, channels: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, targets and context evidence (None for a single channel)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*rows, views, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, rows, generator=generator)
    context = torch.rand(*rows, views, channels - 1, generator=generator, dtype=torch.float64)
    return logits.to(dtype), target, context.to(torch.promote_types(dtype, torch.float32)) if channels > 1 else None


def make_presence(rows: tuple[int, ...], views: int, seed: int = 0) -> Tensor:
    return torch.rand(*rows, views, generator=torch.Generator().manual_seed(seed)) > 0.4


def log_sum_exp(values: list[float]) -> float:
    peak = max(values, default=-INF)
    return peak if peak == -INF else peak + math.log(sum(math.exp(x - peak) for x in values))


def loop_log_posterior(logits: list[float], tau: float) -> list[float]:
    scaled = [z / tau for z in logits]
    return [z - log_sum_exp(scaled) for z in scaled]


def loop_inference(
    log_p: dict[int, list[float]], context: list[list[float]], model: GenerativeModel
) -> tuple[dict[int, float], dict[int, float]]:
    """q(s) and ln pi over the views that are there (the keys of log_p)."""
    likelihood, outcome = model.likelihood.tolist(), model.outcome_likelihood.tolist()
    log_preference, prior, habit = model.log_preference.tolist(), model.state_prior.tolist(), model.habit.tolist()
    channels, bins = len(likelihood[0]), len(likelihood[0][0])
    score = {s: math.log(prior[s]) for s in log_p}
    for v in log_p:
        entropy = -sum(math.exp(x) * x for x in log_p[v] if x > -INF)
        number = sum(x > -INF for x in log_p[v])
        evidence = [1 - entropy / math.log(number) if number > 1 else 1.0, *context[v]]
        for k in range(channels):
            position = min(max(evidence[k], 0.0), 1.0) * (bins - 1)
            for o in range(bins):
                for s in log_p:
                    score[s] += max(0.0, 1 - abs(position - o)) * math.log(likelihood[v][k][o][s])
    state = {s: math.exp(score[s] - log_sum_exp(list(score.values()))) for s in log_p}
    weight = {}
    for u in log_p:
        risk = ambiguity = 0.0
        for o in range(2):
            predicted = sum(state[s] * outcome[o][s][u] for s in log_p)
            risk += predicted * (math.log(predicted) - log_preference[o])
            ambiguity -= sum(state[s] * outcome[o][s][u] * math.log(outcome[o][s][u]) for s in log_p)
        weight[u] = math.log(habit[u]) - float(model.precision) * (risk + ambiguity)
    return state, {u: weight[u] - log_sum_exp(list(weight.values())) for u in log_p}


def loop_row(
    logits: list[list[float]],
    y: int,
    context: list[list[float]],
    present: list[bool],
    model: GenerativeModel,
    temperature: float,
    margin: float,
    distillation_weight: float,
    cross_entropy_weight: float,
) -> dict[str, Any]:
    """Sections 4 and 5 of the design for one query, in Python floats: nothing shared with the code under test."""
    views = range(len(logits))
    there = [v for v in views if present[v] and max(logits[v]) > -INF]
    if not there:
        return {**dict.fromkeys(TERMS, 0.0), "state": [0.0 for _ in views], "policy": [0.0 for _ in views], "group": -1}
    log_p = {v: loop_log_posterior(logits[v], 1.0) for v in there}
    state, log_policy = loop_inference(log_p, context, model)
    policy = [math.exp(log_policy[u]) if u in there else 0.0 for u in views]

    task = -log_sum_exp([log_policy[u] + log_p[u][y] for u in there])
    cross_entropy = -sum(log_p[v][y] for v in there)
    distillation = 0.0
    teachers = [u for u in there if all(policy[u] - policy[w] > margin for w in views if w != u)]
    for u in teachers:
        teacher = loop_log_posterior(logits[u], temperature)
        for v in there:
            student = loop_log_posterior(logits[v], temperature)
            divergence = sum(math.exp(a) * (a - b) for a, b in zip(teacher, student, strict=True) if math.exp(a) > 0)
            distillation += policy[u] * temperature**2 * divergence * (v != u)
    return {
        "total": task + distillation_weight * distillation + cross_entropy_weight * cross_entropy,
        "task": task,
        "distillation": distillation,
        "cross_entropy": cross_entropy,
        "state": [state.get(s, 0.0) for s in views],
        "policy": policy,
        "group": teachers[0] if teachers else -1,
    }


def loop_oracle(
    logits: Tensor, target: Tensor, context: Tensor | None, model: GenerativeModel, present: Tensor | None, **numbers: float
) -> FreeEnergyLoss:
    """loop_row over all rows."""
    settings_ = {"temperature": 1.0, "margin": 0.1, "distillation_weight": 1.0, "cross_entropy_weight": 1.0, **numbers}
    lead, (views, classes) = target.shape, logits.shape[-2:]
    flat = logits.double().reshape(-1, views, classes).tolist()
    contexts = [[[] for _ in range(views)]] * len(flat) if context is None else context.double().reshape(len(flat), views, -1).tolist()
    there = [[True] * views] * len(flat) if present is None else present.reshape(len(flat), views).tolist()
    rows = [loop_row(z, y, c, p, model, **settings_) for z, y, c, p in zip(flat, target.reshape(-1).tolist(), contexts, there, strict=True)]
    dtypes = {name: torch.int64 if name == "group" else torch.float64 for name in FreeEnergyLoss._fields}
    values = [torch.tensor([row[name] for row in rows], dtype=dtype) for name, dtype in dtypes.items()]
    return FreeEnergyLoss(*(value.reshape((*lead, *value.shape[1:])) for value in values))


def assert_same(got: FreeEnergyLoss, want: FreeEnergyLoss, atol: float = 1e-10, rtol: float = 1e-10) -> None:
    for name, have, expected in zip(FreeEnergyLoss._fields, got, want, strict=True):
        torch.testing.assert_close(have, expected, atol=atol, rtol=rtol, check_dtype=False, msg=lambda m, name=name: f"{name}: {m}")


def gradient(term: str, logits: Tensor, *args: Any, function: Any = free_energy_loss, **kwargs: Any) -> Tensor:
    """Gradient of the (unevenly weighted) sum of one term with respect to the logits."""
    leaf = logits.detach().clone().requires_grad_()
    value = getattr(function(leaf, *args, **kwargs), term)
    weights = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
    (value * weights).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


SHAPES: dict[str, dict[str, Any]] = {
    "episode": {"rows": (2, 5), "views": 3, "classes": 5, "channels": 2},
    "one view": {"rows": (4,), "views": 1, "classes": 5, "channels": 2},
    "one class": {"rows": (4,), "views": 2, "classes": 1, "channels": 2},
    "certainty alone": {"rows": (4,), "views": 2, "classes": 3, "channels": 1},
    "all channels": {"rows": (3,), "views": 4, "classes": 7, "channels": 4},
    "no leading dimension": {"rows": (), "views": 2, "classes": 3, "channels": 2},
    "no rows": {"rows": (0,), "views": 3, "classes": 5, "channels": 2},
}
NUMBERS = {"temperature": 2.0, "margin": 0.05, "distillation_weight": 0.7, "cross_entropy_weight": 0.3}


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


# ---- gradients


@pytest.mark.parametrize("term", TERMS)
def test_gradients_equal_finite_differences_of_the_loop_with_beliefs_held_fixed(term: str) -> None:
    """gradcheck would move the beliefs with the logits; hold them at their values by a model that does not listen to the evidence."""
    logits, target, context = make_inputs((4,))
    model = make_model(3)
    model.likelihood.copy_(torch.full_like(model.likelihood, 1 / 6))
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()

    def stop_teacher(z: Tensor) -> Tensor:
        return getattr(free_energy_loss(z, target, model, context_evidence=context, present=present, **NUMBERS), term)

    if term in ("task", "cross_entropy"):
        assert torch.autograd.gradcheck(stop_teacher, logits.requires_grad_())
        return
    # The teacher is held fixed too: move one student at a time, and compare in the students only.
    group = free_energy_loss(logits, target, model, context_evidence=context, present=present, **NUMBERS).group
    grad = torch.autograd.grad(stop_teacher(logits.requires_grad_()).sum(), logits)[0]
    assert (group >= 0).any()
    for row, view, c in [(r, v, c) for r in range(4) for v in range(3) if v != group[r] for c in range(5)]:
        step = torch.zeros_like(logits)
        step[row, view, c] = 1e-6
        difference = (stop_teacher(logits.detach() + step) - stop_teacher(logits.detach() - step)).sum() / 2e-6
        assert grad[row, view, c].item() == pytest.approx(difference.item(), abs=1e-8)
    if term == "distillation":
        taught = group >= 0
        assert (grad[torch.arange(4)[taught], group[taught]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_closed_form_equals_autograd_of_the_definition(dtype: torch.dtype, term: str, temperature: float) -> None:
    logits, target, context = make_inputs((3, 8), dtype=dtype)
    logits[0, :4, :, 4] = -INF
    target[0, :4] %= 4
    model, present = make_model(3), make_presence((3, 8), 3)
    arrays = (model.likelihood, model.outcome_likelihood, model.log_preference, model.state_prior, model.habit, model.precision)
    numbers = {**NUMBERS, "temperature": temperature}
    closed = gradient(term, logits, target, model, context_evidence=context, present=present, **numbers)
    defined = gradient(term, logits, target, context, *arrays, present=present, function=reference.free_energy_loss, **numbers)
    torch.testing.assert_close(closed, defined)
    assert closed.abs().max() > 0.01


def test_gradients_flow_to_the_logits_alone() -> None:
    logits, target, context = make_inputs()
    assert context is not None
    context.requires_grad_()
    loss = free_energy_loss(logits.requires_grad_(), target, make_model(3), context_evidence=context)
    assert not loss.policy.requires_grad
    assert not loss.state.requires_grad
    loss.total.sum().backward()
    assert context.grad is None
    assert logits.grad is not None


def test_several_terms_and_expanded_gradients_add_up() -> None:
    logits, target, context = make_inputs((3, 4))
    model = make_model(3)
    leaf = logits.clone().requires_grad_()
    loss = free_energy_loss(leaf, target, model, context_evidence=context, **NUMBERS)
    (loss.total.mean() + 2 * loss.task.sum() + loss.distillation.sum() - loss.cross_entropy.mean()).backward()

    def part(term: str, factor: float) -> Tensor:
        other = logits.clone().requires_grad_()
        value = getattr(free_energy_loss(other, target, model, context_evidence=context, **NUMBERS), term)
        value.backward(torch.full_like(value, factor))
        assert other.grad is not None
        return other.grad

    torch.testing.assert_close(
        leaf.grad, part("total", 1 / 12) + part("task", 2.0) + part("distillation", 1.0) + part("cross_entropy", -1 / 12)
    )


def test_strided_inputs_give_the_same() -> None:
    logits, target, context = make_inputs((4, 6))
    assert context is not None
    model, present = make_model(3), make_presence((4, 6), 3)
    want = free_energy_loss(logits, target, model, context_evidence=context, present=present)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (logits, target, context, present)]
    assert not strided[0].is_contiguous()
    got = free_energy_loss(strided[0], strided[1], model, context_evidence=strided[2], present=strided[3])
    assert_same(got, want, atol=0, rtol=0)


def test_inputs_are_not_modified_and_a_second_derivative_is_refused() -> None:
    logits, target, context = make_inputs()
    model = make_model(3)
    before = [x.clone() for x in (logits, *model.buffers())]
    leaf = logits.requires_grad_()
    loss = free_energy_loss(leaf, target, model, context_evidence=context)
    grad = torch.autograd.grad(loss.total.square().sum(), leaf, create_graph=True)[0]
    assert all(torch.equal(old, new) for old, new in zip(before, (leaf, *model.buffers()), strict=True))
    assert leaf._version == 0
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_terms_of_weight_zero_do_not_enter() -> None:
    logits, target, context = make_inputs()
    loss = free_energy_loss(logits, target, make_model(3), context_evidence=context, distillation_weight=0, cross_entropy_weight=0)
    assert torch.equal(loss.total, loss.task)
    assert loss.total.data_ptr() != loss.task.data_ptr()
    assert (loss.distillation > 0).any()


def test_autocast_leaves_the_precision_alone() -> None:
    logits, target, context = make_inputs(dtype=torch.float32)
    model = make_model(3)
    want = free_energy_loss(logits, target, model, context_evidence=context)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(free_energy_loss(logits, target, model, context_evidence=context), want, atol=0, rtol=0)


# ---- contract with PyTorch


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


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("value", [-1, 5])
def test_a_class_out_of_range_is_named(value: int, compiled: bool) -> None:
    logits, target, context = make_inputs()
    target[3] = value
    function = torch.compile(free_energy_loss, fullgraph=True, backend="eager") if compiled else free_energy_loss
    with pytest.raises(ValueError, match=r"target: got values .* expected 0 to 4; number"):
        function(logits, target, make_model(3), context_evidence=context)


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


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_the_kernels_compile_for_gpus_that_are_not_here_without_spills(target: str) -> None:
    """The usual episode and the largest size; ``amd-fast compile`` goes through the whole table."""
    compile_ahead = pytest.importorskip("amd_fast.compile_ahead")
    pytest.importorskip("triton")
    wanted = re.compile(r"pack V=9|(forward|backward) V=(3 C=5|9 C=1024) .*")
    specs = [spec for spec in compile_ahead.iterate_specs("free_energy_loss", target) if wanted.fullmatch(spec.label)]
    assert len(specs) == 7
    for spec in specs:
        compiled = compile_ahead.compile_spec("free_energy_loss", spec, target)
        assert compiled.spills == 0, compiled
