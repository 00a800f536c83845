"""free_energy_loss: its gradients, and what it leaves as it was."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from amd_fast.kernels.free_energy import reference
from torch import Tensor

from amd_fast.ops import free_energy_loss

_cases = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("free_energy_cases.py"))))
INF, TERMS, NUMBERS, make_model, make_inputs, make_presence, assert_same, gradient = (
    _cases.INF,
    _cases.TERMS,
    _cases.NUMBERS,
    _cases.make_model,
    _cases.make_inputs,
    _cases.make_presence,
    _cases.assert_same,
    _cases.gradient,
)


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
