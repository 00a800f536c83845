"""Active sample inference and the free-energy distillation loss in plain PyTorch: the definition of correctness.

A discrete active-inference agent looks at every query clip and infers which of its V views to trust; the loss then teaches the
views. Both are this project's own realisation of the idea, see the documentation of the method. The functions here take
tensors only, know nothing of the library around them, and are shared by :class:`amd_fast.GenerativeModel`, by the op's CPU
path, by the tests and by the benchmarks.

Sizes: V views, C classes, K channels of evidence, O observation bins, S = U = V hidden states ("view s is the reliable one")
and policies ("attend to view u"), any leading dimensions ``...``.

A view takes part in a row where ``present`` allows it and at least one of its logits is above -inf. A row none of whose views
takes part has policy 0, state 0, group -1, and every term 0 with zero gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Beliefs(NamedTuple):
    """What the agent infers for each row.

    Attributes:
        state: ``[..., S]`` posterior q(s) that view s is the reliable one.
        free_energy: ``[...]`` variational free energy F in nats, at its minimum: minus the log evidence.
        expected_free_energy: ``[..., U]`` G_u, risk plus ambiguity, in nats.
        policy: ``[..., U]`` posterior over whom to trust; exactly 0 for a view that is not there.
    """

    state: Tensor
    free_energy: Tensor
    expected_free_energy: Tensor
    policy: Tensor


class FreeEnergyLoss(NamedTuple):
    """The terms of the loss, one row per query, in nats; every term is differentiable in the logits.

    Attributes:
        total: ``[...]`` task + distillation_weight * distillation + cross_entropy_weight * cross_entropy.
        task: ``[...]`` task free energy, -ln sum_u pi_u p_u(y).
        distillation: ``[...]`` tempered KL divergence from the teacher to the other views, weighted by the teacher's policy.
        cross_entropy: ``[...]`` sum over the views of -ln p_v(y).
        state: ``[..., S]`` posterior over the reliable view (no gradient).
        policy: ``[..., U]`` posterior over whom to trust (no gradient).
        group: ``[...]`` int64 index of the teacher, -1 where no policy stands out.
    """

    total: Tensor
    task: Tensor
    distillation: Tensor
    cross_entropy: Tensor
    state: Tensor
    policy: Tensor
    group: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


def takes_part(view_logits: Tensor, present: Tensor | None) -> Tensor:
    """``[..., V]`` bool: the view is present and allows at least one class. NaN logits take part, so that they are seen."""
    allowed = (view_logits != -math.inf).any(-1)
    return allowed if present is None else allowed & present


def certainty(view_logits: Tensor) -> Tensor:
    """1 - H(p)/ln C of each posterior p = softmax(view_logits), in [0, 1].

    C counts the classes above -inf, so padding an episode with absent classes changes nothing. With a single class the
    certainty is 1; with none it is 0.

    Args:
        view_logits: ``[..., C]`` floating point; log-probabilities serve as well.

    Returns:
        ``[...]`` in the accumulation dtype.
    """
    logits = view_logits.to(accumulation_dtype(view_logits.dtype))
    allowed = logits != -math.inf
    return _certainty_of(tempered_log_softmax(torch.where(allowed.any(-1, keepdim=True), logits, 0.0), 1.0), allowed)


def _certainty_of(log_probs: Tensor, allowed: Tensor) -> Tensor:
    """:func:`certainty` from log-probabilities over the classes that are ``allowed``."""
    entropy = -torch.where(allowed, log_probs.exp() * torch.where(allowed, log_probs, 0.0), 0.0).sum(-1)
    count = allowed.sum(-1).to(log_probs.dtype)
    relative = entropy / torch.where(count > 1, count, 2.0).log()
    return torch.where(count > 1, (1.0 - relative).clamp(0.0, 1.0), (count == 1).to(log_probs.dtype))


def soft_bins(evidence: Tensor, num_bins: int) -> Tensor:
    """Soft observation: linear interpolation between the two nearest of O bin centres b / (O - 1), b = 0..O-1.

    Args:
        evidence: ``[...]`` in [0, 1]; values outside count as the nearer end.
        num_bins: O, at least 2.

    Returns:
        ``[..., O]`` non-negative, summing to 1.
    """
    position = evidence.clamp(0.0, 1.0).unsqueeze(-1) * (num_bins - 1)
    bins = torch.arange(num_bins, device=evidence.device, dtype=evidence.dtype)
    return (1.0 - (position - bins).abs()).clamp_min(0.0)


def masked_log_softmax(log_weight: Tensor) -> Tensor:
    """log_softmax over the last dimension in which rows of only -inf stay -inf instead of turning to NaN."""
    total = torch.logsumexp(log_weight, -1, keepdim=True)
    return log_weight - torch.where(total == -math.inf, 0.0, total)


def infer_log_policy(
    observation: Tensor,
    likelihood: Tensor,
    outcome_likelihood: Tensor,
    log_preference: Tensor,
    state_prior: Tensor,
    habit: Tensor,
    precision: Tensor,
    present: Tensor | None = None,
) -> tuple[Beliefs, Tensor]:
    """Posterior over the reliable view and over whom to trust, in closed form.

        q(s)   = softmax_s( ln D[s] + sum_vko o_vk[o] ln A[v,k][o,s] )
        F      = -ln sum_s D[s] prod_vko A[v,k][o,s]^o_vk[o]
        Q_u(o) = sum_s q(s) A_c[o,s,u]
        G_u    = sum_o Q_u(o) (ln Q_u(o) - C[o]) - sum_s q(s) sum_o A_c[o,s,u] ln A_c[o,s,u]
        pi_u   = softmax_u( -gamma G_u + ln E[u] )

    A view that is not there contributes no term, its state and its policy have probability exactly 0, and the prior over the
    states that remain is renormalised (so F is the free energy of the smaller model). A likelihood of 0 counts as the smallest
    positive number, so that one impossible observation cannot turn a row into NaN.

    Args:
        observation: ``[..., V, K, O]`` soft observations; its dtype is the one computed in.
        likelihood: ``[V, K, O, S]`` A, each column over O sums to 1.
        outcome_likelihood: ``[2, S, U]`` A_c, index 0 = correct.
        log_preference: ``[2]`` C, normalised log-probabilities.
        state_prior: ``[S]`` D.
        habit: ``[U]`` E.
        precision: ``[]`` gamma, at least 0.
        present: ``[..., V]`` bool, None where every view is there.

    Returns:
        The beliefs, and ``[..., U]`` ln pi (-inf for absent views).
    """
    dtype = observation.dtype
    log_likelihood = likelihood.to(dtype).clamp_min(torch.finfo(dtype).tiny).log()
    outcome = outcome_likelihood.to(dtype)
    log_prior, log_habit = state_prior.to(dtype).log(), habit.to(dtype).log()
    if present is not None:
        observation = torch.where(present[..., None, None], observation, 0.0)
        log_prior = torch.where(present, log_prior, -math.inf)
        log_habit = torch.where(present, log_habit, -math.inf)
    joint = masked_log_softmax(log_prior) + torch.einsum("...vko,vkos->...s", observation, log_likelihood)
    log_evidence = torch.logsumexp(joint, -1)
    free_energy = torch.where(log_evidence == -math.inf, 0.0, -log_evidence)
    state = masked_log_softmax(joint).exp()

    predicted = torch.einsum("...s,osu->...ou", state, outcome)
    risk = (torch.xlogy(predicted, predicted) - predicted * log_preference.to(dtype).unsqueeze(-1)).sum(-2)
    ambiguity = -torch.einsum("...s,su->...u", state, torch.xlogy(outcome, outcome).sum(0))
    expected_free_energy = risk + ambiguity
    log_policy = masked_log_softmax(log_habit - precision.to(dtype) * expected_free_energy)
    return Beliefs(state, free_energy, expected_free_energy, log_policy.exp()), log_policy


def teacher_of(policy: Tensor, margin: float) -> Tensor:
    """``[...]`` int64: the view whose policy exceeds every other by more than the margin, -1 where there is none."""
    best, index = policy.max(-1)
    others = policy.masked_fill(torch.arange(policy.shape[-1], device=policy.device) == index.unsqueeze(-1), -math.inf)
    return torch.where((best > 0) & (best - others.amax(-1) > margin), index, -1)


def tempered_log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """``tau * ln softmax(logits / tau)``: on this scale differences stay finite however small tau is."""
    shifted, _, total = _softmax_parts(logits, temperature)
    return shifted - temperature * total.log()


def _softmax_parts(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits less their maximum, exp(those / tau), and the sum of the latter over the classes.

    By hand: PyTorch's softmax takes four times as long on the CPU where there are few classes, as an episode has.
    """
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    masses = torch.exp(shifted if temperature == 1.0 else shifted / temperature)
    return shifted, masses, masses.sum(-1, keepdim=True)


def _teacher_logits_index(group: Tensor, num_classes: int) -> Tensor:
    return group.clamp_min(0)[..., None, None].expand(*group.shape, 1, num_classes)


def _divergence_from_teacher(scaled: Tensor, group: Tensor, temperature: float) -> Tensor:
    """``[..., V]`` tau^2 KL( stopgrad p_t^(tau) || p_v^(tau) ) for every view v, from ``scaled = tau ln p^(tau)``.

    Of view 0 where there is no teacher.
    """
    teacher = scaled.gather(-2, _teacher_logits_index(group, scaled.shape[-1])).detach()
    probs = (teacher / temperature).exp()
    return temperature * torch.where(probs > 0, probs * (teacher - scaled), 0.0).sum(-1)


def free_energy_loss_with_factors(
    view_logits: Tensor,
    target: Tensor,
    context_evidence: Tensor | None,
    likelihood: Tensor,
    outcome_likelihood: Tensor,
    log_preference: Tensor,
    state_prior: Tensor,
    habit: Tensor,
    precision: Tensor,
    temperature: float = 1.0,
    margin: float = 0.1,
    distillation_weight: float = 1.0,
    cross_entropy_weight: float = 1.0,
    present: Tensor | None = None,
) -> tuple[FreeEnergyLoss, Tensor, Tensor]:
    """:func:`free_energy_loss` and what its gradient needs besides the logits.

    Returns:
        The terms; ``[..., V]`` responsibility r_v = pi_v p_v(y) / sum_u pi_u p_u(y); ``[...]`` teacher's policy pi_t, 0 without one.
    """
    dtype = accumulation_dtype(view_logits.dtype)
    usable = takes_part(view_logits, present)
    any_usable = usable.any(-1)
    logits = torch.where(usable.unsqueeze(-1), view_logits.to(dtype), 0.0)
    log_probs = tempered_log_softmax(logits, 1.0)
    with torch.no_grad():
        evidence = _certainty_of(log_probs, logits != -math.inf).unsqueeze(-1)
        if context_evidence is not None:
            evidence = torch.cat([evidence, context_evidence.to(dtype)], -1)
        observation = soft_bins(evidence, likelihood.shape[-2])
        beliefs, log_policy = infer_log_policy(
            observation, likelihood, outcome_likelihood, log_preference, state_prior, habit, precision, usable
        )
        group = teacher_of(beliefs.policy, margin)
        teacher_policy = beliefs.policy.gather(-1, group.clamp_min(0).unsqueeze(-1)).squeeze(-1) * (group >= 0)

    # On a GPU an index out of range would end the process's every later call, and looking at it would make the host wait.
    classes = log_probs.shape[-1]
    index = target.clamp(0, classes - 1)[..., None, None].expand(*usable.shape, 1)
    in_range = ((target >= 0) & (target < classes)).unsqueeze(-1)
    label_log_prob = torch.where(in_range, log_probs.gather(-1, index).squeeze(-1), math.nan)
    # ln pi itself, not the logarithm of pi: a policy that underflows still explains a label the others rule out.
    trusted = torch.where(any_usable.unsqueeze(-1), log_policy + label_log_prob, 0.0)
    task = torch.where(any_usable, -torch.logsumexp(trusted, -1), 0.0)
    responsibility = torch.where(usable, masked_log_softmax(trusted.detach()).exp(), 0.0)
    cross_entropy = -torch.where(usable, label_log_prob, 0.0).sum(-1)

    is_teacher = torch.arange(usable.shape[-1], device=group.device) == group.unsqueeze(-1)
    taught = usable & ~is_teacher & (group >= 0).unsqueeze(-1)
    scaled = log_probs if temperature == 1.0 else tempered_log_softmax(logits, temperature)
    divergence = _divergence_from_teacher(scaled, group, temperature)
    distillation = teacher_policy * torch.where(taught, divergence, 0.0).sum(-1)

    total = task
    if distillation_weight:
        total = total + distillation_weight * distillation
    if cross_entropy_weight:
        total = total + cross_entropy_weight * cross_entropy
    terms = FreeEnergyLoss(total, task, distillation, cross_entropy, beliefs.state, beliefs.policy, group)
    return terms, responsibility, teacher_policy


def free_energy_loss(
    view_logits: Tensor,
    target: Tensor,
    context_evidence: Tensor | None,
    likelihood: Tensor,
    outcome_likelihood: Tensor,
    log_preference: Tensor,
    state_prior: Tensor,
    habit: Tensor,
    precision: Tensor,
    temperature: float = 1.0,
    margin: float = 0.1,
    distillation_weight: float = 1.0,
    cross_entropy_weight: float = 1.0,
    present: Tensor | None = None,
) -> FreeEnergyLoss:
    """Active inference and the distillation loss for each row; differentiable in the logits through autograd.

    With p_v the views' posteriors, pi and q(s) the beliefs of :func:`infer_log_policy` held fixed (no gradient passes), and t the
    teacher, the one view whose policy exceeds every other by more than ``margin``:

        task          = min_q KL(q || pi) - sum_u q_u ln p_u(y) = -ln sum_u pi_u p_u(y)
        distillation  = pi_t sum_{v != t} tau^2 KL( stopgrad p_t^(tau) || p_v^(tau) ),    0 without a teacher
        cross_entropy = sum_v -ln p_v(y)

    A label that a view rules out (logit -inf) has an infinite cross-entropy; the task term stays finite while a trusted view allows it.

    Args:
        view_logits: ``[..., V, C]`` float16, bfloat16, float32 or float64; -inf marks a class absent from the episode.
        target: ``[...]`` int64 class y in 0..C-1; a value outside makes its row, and the row of the gradient, NaN.
        context_evidence: ``[..., V, K-1]`` in [0, 1], channels 1..K-1 (channel 0, certainty, comes from the logits); None if K = 1.
        likelihood, outcome_likelihood, log_preference, state_prior, habit, precision: see :func:`infer_log_policy`.
        temperature: tau, above 0.
        margin: delta, at least 0.
        distillation_weight, cross_entropy_weight: weights in the total; a term of weight 0 does not enter it.
        present: ``[..., V]`` bool, None where every view is there.

    Returns:
        Terms in the accumulation dtype (float32; float64 for float64 logits).
    """
    return free_energy_loss_with_factors(
        view_logits,
        target,
        context_evidence,
        likelihood,
        outcome_likelihood,
        log_preference,
        state_prior,
        habit,
        precision,
        temperature,
        margin,
        distillation_weight,
        cross_entropy_weight,
        present,
    )[0]


def free_energy_loss_backward(
    grad_total: Tensor | None,
    grad_task: Tensor | None,
    grad_distillation: Tensor | None,
    grad_cross_entropy: Tensor | None,
    view_logits: Tensor,
    target: Tensor,
    present: Tensor | None,
    responsibility: Tensor,
    teacher_policy: Tensor,
    group: Tensor,
    temperature: float,
    distillation_weight: float,
    cross_entropy_weight: float,
) -> Tensor:
    """Gradient of :func:`free_energy_loss` with respect to the logits, in closed form.

        d task / d z_v          = r_v (p_v - onehot(y))
        d distillation / d z_v  = pi_t tau (p_v^(tau) - p_t^(tau))      for v != t, and 0 for the teacher
        d cross_entropy / d z_v = p_v - onehot(y)

    Args:
        grad_total, grad_task, grad_distillation, grad_cross_entropy: ``[...]`` gradients of the four terms, None for zero.
        view_logits, target, present: as given to the forward pass.
        responsibility, teacher_policy, group: results of :func:`free_energy_loss_with_factors`; no inference is done again.
        temperature, distillation_weight, cross_entropy_weight: as given to the forward pass.

    Returns:
        ``[..., V, C]`` in the dtype of the logits; exactly 0 for views that take no part.
    """
    dtype = responsibility.dtype
    usable = takes_part(view_logits, present)
    logits = torch.where(usable.unsqueeze(-1), view_logits.to(dtype), 0.0)

    def weight_of(grad: Tensor | None, share_of_total: float) -> Tensor:
        own = torch.zeros_like(teacher_policy) if grad is None else grad
        return own if grad_total is None or share_of_total == 0 else own + share_of_total * grad_total

    fit = weight_of(grad_task, 1.0).unsqueeze(-1) * responsibility + weight_of(grad_cross_entropy, cross_entropy_weight).unsqueeze(-1)
    _, masses, total = _softmax_parts(logits, 1.0)
    probs = masses.div_(total)
    grad = fit.unsqueeze(-1) * probs
    # The responsibilities of a row with a class out of range are NaN already.
    index = target.clamp(0, logits.shape[-1] - 1)[..., None, None].expand(*usable.shape, 1)
    grad.scatter_add_(-1, index, -fit.unsqueeze(-1))

    if temperature != 1.0:
        _, masses, total = _softmax_parts(logits, temperature)
        probs = masses.div_(total)
    # The teacher's own row comes out as exactly 0, and so does a student's that equals it: both operands are the same numbers.
    gap = probs.sub_(probs.gather(-2, _teacher_logits_index(group, logits.shape[-1])))
    teaching = temperature * weight_of(grad_distillation, distillation_weight) * teacher_policy
    grad.addcmul_(gap, teaching[..., None, None])
    return grad.masked_fill_(~usable.unsqueeze(-1), 0.0).to(view_logits.dtype)
