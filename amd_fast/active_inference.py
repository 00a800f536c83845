"""Active sample inference: a discrete active-inference agent that works out, query by query, which view to trust.

One agent per query clip, all of a batch at once. Its hidden state says which view is reliable, its policies say which view to
attend to, and its preferences (for being correct) stand where reinforcement learning has a reward. Inference is in closed form
(:func:`amd_fast.kernels.free_energy.reference.infer_log_policy` gives the formulas and is shared with the loss); learning is
Bayesian and conjugate. The realisation is this project's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from amd_fast.errors import ConfigError, DataError
from amd_fast.kernels.free_energy.reference import Beliefs, accumulation_dtype, certainty, infer_log_policy, masked_log_softmax, soft_bins

__all__ = ["Beliefs", "GenerativeModel", "certainty", "fuse"]

# Channel -> whether it is expected to be high (+1) or low (-1) in the view that is reliable.
CHANNELS = {"certainty": 1, "surprise": -1, "agreement": 1, "log_evidence": 1}

# Strength of the initial counts, in pseudo-observations: about one per bin, and ten outcomes per (state, policy).
_EVIDENCE_SLOPE = 0.5
_OUTCOME_COUNT = 10.0
_CORRECT_IF_RELIABLE, _CORRECT_OTHERWISE = 0.9, 0.3

# gamma is searched on this grid (0 included), then refined between the neighbours of the best.
_PRECISION_GRID = (0.0, *(2.0 ** (step / 4) for step in range(-40, 41)))

Pool = Literal["linear", "log"]


class GenerativeModel(nn.Module):
    """The agent's generative model: Dirichlet counts, the arrays they imply, preferences, habits and precision.

    All arrays are buffers in float64 (and stay float64 when the network around them is cast), so they are checkpointed and can
    be set by hand. Inference runs in the dtype of the observation.

    With a view missing, its evidence contributes no term, its state and its policy get probability exactly 0, and the prior over
    the remaining states is renormalised.

    Args:
        num_views: V, the number of views; hidden states and policies number the same.
        evidence: Names of the K channels, each a key of ``CHANNELS``; the first is ``"certainty"``.
        num_bins: O, bins per channel, at least 2.
        precision: gamma, at least 0; 0 means that only habits speak, which is uniform fusion.
        preference: How strongly (correct, wrong) outcomes are preferred, two positive numbers; normalised here.
        learn_precision: Whether :meth:`fit_precision` may change the precision; for ablations.

    Attributes:
        likelihood: ``[V, K, O, S]`` ``A[v,k][o,s]`` = P(observation o of channel k of view v | view s is the reliable one).
        outcome_likelihood: ``[2, S, U]`` A_c[o,s,u] = P(outcome o | s, attending to view u), index 0 = correct.
        log_preference: ``[2]`` log-probabilities of the preferred outcomes.
        state_prior: ``[S]`` D, uniform.
        habit: ``[U]`` E, uniform.
        precision: ``[]`` gamma.
        counts, outcome_counts: Dirichlet counts behind the two likelihoods, of the same shapes.

    Raises:
        ConfigError: An argument is out of range or names an unknown channel.
    """

    likelihood: Tensor
    outcome_likelihood: Tensor
    log_preference: Tensor
    state_prior: Tensor
    habit: Tensor
    precision: Tensor
    counts: Tensor
    outcome_counts: Tensor

    def __init__(
        self,
        num_views: int,
        evidence: Sequence[str] = ("certainty", "surprise"),
        num_bins: int = 8,
        precision: float = 1.0,
        preference: Sequence[float] = (0.95, 0.05),
        *,
        learn_precision: bool = True,
    ) -> None:
        super().__init__()
        _check_settings(num_views, evidence, num_bins, precision, preference)
        self.num_views, self.num_bins, self.evidence = num_views, num_bins, tuple(evidence)
        self.learn_precision = learn_precision
        preferred = torch.tensor(preference, dtype=torch.float64)
        self.register_buffer("log_preference", (preferred / preferred.sum()).log())
        self.register_buffer("state_prior", torch.full((num_views,), 1.0 / num_views, dtype=torch.float64))
        self.register_buffer("habit", torch.full((num_views,), 1.0 / num_views, dtype=torch.float64))
        self.register_buffer("precision", torch.tensor(float(precision), dtype=torch.float64))
        counts, outcome_counts = self._initial_counts()
        self.register_buffer("counts", counts)
        self.register_buffer("outcome_counts", outcome_counts)
        self.register_buffer("likelihood", counts / counts.sum(2, keepdim=True))
        self.register_buffer("outcome_likelihood", outcome_counts / outcome_counts.sum(0, keepdim=True))

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"num_views={self.num_views}, evidence={self.evidence}, num_bins={self.num_bins}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GenerativeModel:
        # Follow the network to its device but not to its precision: counts in half precision stop counting at 2048.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype or tensor.is_meta else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def _initial_counts(self) -> tuple[Tensor, Tensor]:
        """Counts that say "evidence is evidence": in the reliable view, and only there, it points the way its channel should."""
        views, bins = self.num_views, self.num_bins
        rise = torch.linspace(1.0 - _EVIDENCE_SLOPE, 1.0 + _EVIDENCE_SLOPE, bins, dtype=torch.float64)
        direction = torch.stack([rise if CHANNELS[name] > 0 else rise.flip(0) for name in self.evidence])
        reliable = torch.eye(views, dtype=torch.bool)
        counts = torch.where(reliable[:, None, None, :], direction[None, :, :, None], direction.flip(1)[None, :, :, None])
        correct = torch.full((views, views), _CORRECT_OTHERWISE, dtype=torch.float64).fill_diagonal_(_CORRECT_IF_RELIABLE)
        return counts, _OUTCOME_COUNT * torch.stack([correct, 1.0 - correct])

    @torch.no_grad()
    def reset_counts(self) -> None:
        """Forget what was learned: initial counts, and the likelihoods they imply."""
        counts, outcome_counts = self._initial_counts()
        self.counts.copy_(counts)
        self.outcome_counts.copy_(outcome_counts)
        self._update_likelihoods()

    def _update_likelihoods(self) -> None:
        self.likelihood.copy_(self.counts / self.counts.sum(2, keepdim=True))
        self.outcome_likelihood.copy_(self.outcome_counts / self.outcome_counts.sum(0, keepdim=True))

    def observe(self, evidence: Tensor) -> Tensor:
        """Soft observation: each value is shared between the two nearest of O bin centres b / (O - 1).

        Args:
            evidence: ``[..., V, K]`` floating point in [0, 1] (values outside count as the nearer end), channels in the model's order.

        Returns:
            ``[..., V, K, O]`` in the accumulation dtype, summing to 1 over O.

        Raises:
            DataError: The last two dimensions are not V and K.
        """
        expected = (self.num_views, len(self.evidence))
        if tuple(evidence.shape[-2:]) != expected:
            raise DataError(
                f"evidence: got shape {tuple(evidence.shape)}, expected [..., {expected[0]} views, {expected[1]} channels]; "
                f"stack the channels {self.evidence} in the last dimension"
            )
        return soft_bins(evidence.to(accumulation_dtype(evidence.dtype)), self.num_bins)

    def infer(self, observation: Tensor, present: Tensor | None = None) -> Beliefs:
        """Posterior over the reliable view and over whom to trust.

        Args:
            observation: ``[..., V, K, O]`` floating point, from :meth:`observe`; its dtype is the one computed in.
            present: ``[..., V]`` bool, None where every view is there.

        Returns:
            Beliefs; a row without any view has state and policy 0.

        Raises:
            DataError: A shape does not fit the model.
        """
        self._check_observation(observation, present)
        return self._infer(observation, present)[0]

    def _infer(self, observation: Tensor, present: Tensor | None) -> tuple[Beliefs, Tensor]:
        # Autocast would take the sums over the evidence in half precision.
        with torch.autocast(observation.device.type, enabled=False):
            return infer_log_policy(
                observation,
                self.likelihood,
                self.outcome_likelihood,
                self.log_preference,
                self.state_prior,
                self.habit,
                self.precision,
                present,
            )

    @torch.no_grad()
    def learn(self, observation: Tensor, correct: Tensor, present: Tensor | None = None) -> None:
        """Add what labelled queries teach to the counts (conjugate Bayesian learning) and renew the likelihoods.

        The label tells which views were right, and so which states are possible; right views share the responsibility equally:

            some views right, some wrong:  r(s) = correct_s / sum correct;  a[v,k][o,s] += o_vk[o] r(s)  and  a_c as below
            all or none right:             r(s) = 1 / number of views there;  a_c alone, for nothing tells the states apart
            a_c[outcome of u, s, u] += r(s)

        Views that are not there are neither states, nor observations, nor policies. A query in which only one of several views
        is there compares nothing and is left out.

        With torch.distributed running, increments are summed over all ranks: every rank calls this equally often.

        Args:
            observation: ``[..., V, K, O]`` from :meth:`observe`.
            correct: ``[..., V]`` bool, the view's own posterior ranks the right class first.
            present: ``[..., V]`` bool, None where every view is there.

        Raises:
            DataError: A shape does not fit the model, or ``correct`` is not bool.
        """
        self._check_observation(observation, present)
        if correct.dtype != torch.bool or correct.shape != observation.shape[:-2]:
            raise DataError(
                f"correct: got {correct.dtype} of shape {tuple(correct.shape)}, expected bool of shape {tuple(observation.shape[:-2])}; "
                "compare the argmax of every view's posterior with the label"
            )
        there = torch.ones_like(correct) if present is None else present
        observation = torch.where(there[..., None, None], observation.to(torch.float64), 0.0)
        right = correct & there
        number, number_right = there.sum(-1, keepdim=True), right.sum(-1, keepdim=True)
        decided = (number_right > 0) & (number_right < number)
        compared = number >= min(2, self.num_views)
        # As float64 before the division: two integers would be divided in float32.
        states = torch.where(decided, right, there).to(torch.float64)
        share = torch.where(compared, states / states.sum(-1, keepdim=True).clamp_min(1.0), 0.0)
        outcome = torch.stack([right, ~correct & there], -2).to(torch.float64)
        views = self.num_views
        # Flattened, so that the sum over queries is one matrix product however many leading dimensions there are.
        learned = observation.flatten(-3).reshape(-1, self.counts[..., 0].numel()).T @ torch.where(decided, share, 0.0).reshape(-1, views)
        learned_outcome = outcome.reshape(-1, 2 * views).T @ share.reshape(-1, views)
        self.counts += _sum_over_ranks(learned.reshape(self.counts.shape))
        self.outcome_counts += _sum_over_ranks(learned_outcome.reshape(2, views, views).transpose(1, 2).contiguous())
        self._update_likelihoods()

    @torch.no_grad()
    def fit_precision(self, view_log_probs: Tensor, observation: Tensor, target: Tensor, present: Tensor | None = None) -> float:
        """Set gamma to the value that minimises the free energy of labelled queries, and return it.

        The free energy is the mean of -ln sum_u pi_u(gamma) p_u(y), the negative log evidence of the fused posterior. It need not be
        convex in gamma, so a grid (0, then 2^-10 to 2^10 in quarter octaves) finds the basin and a golden-section search the
        minimum in it. Of equal values the smallest gamma wins, so evidence that tells nothing gives 0: uniform fusion under
        uniform habits. Rows in which no view allows the label are left out: their free energy is infinite for every gamma.

        With torch.distributed running, the mean is over the queries of all ranks, which all call this.

        Args:
            view_log_probs: ``[..., V, C]`` log-posteriors of the views.
            observation: ``[..., V, K, O]`` from :meth:`observe`.
            target: ``[...]`` int64 classes.
            present: ``[..., V]`` bool, None where every view is there.

        Returns:
            gamma, at least 0; unchanged where no row can be used.

        Raises:
            DataError: A shape does not fit.
        """
        self._check_observation(observation, present)
        if view_log_probs.shape[:-1] != observation.shape[:-2] or target.shape != view_log_probs.shape[:-2]:
            raise DataError(
                f"view_log_probs and target: got shapes {tuple(view_log_probs.shape)} and {tuple(target.shape)}, "
                f"expected {tuple(observation.shape[:-2])} + [classes] and {tuple(observation.shape[:-3])}"
            )
        index = target[..., None, None].expand(*view_log_probs.shape[:-1], 1)
        label_log_prob = view_log_probs.to(torch.float64).gather(-1, index).squeeze(-1)
        energy = self._infer(observation.to(torch.float64), present)[0].expected_free_energy
        log_habit = self.habit.log().expand_as(energy)
        if present is not None:
            log_habit = torch.where(present, log_habit, -math.inf)
        usable = ((label_log_prob > -math.inf) & (log_habit > -math.inf)).any(-1)
        energy, log_habit, label_log_prob = energy[usable], log_habit[usable], label_log_prob[usable]
        number = float(_sum_over_ranks(usable.sum().to(torch.float64)))
        if number == 0 or not self.learn_precision:
            return float(self.precision)

        def free_energy(gamma: float) -> float:
            log_policy = masked_log_softmax(log_habit - gamma * energy)
            return float(_sum_over_ranks(-torch.logsumexp(log_policy + label_log_prob, -1).sum())) / number

        best = _minimise(free_energy, _PRECISION_GRID)
        self.precision.fill_(best)
        return best

    def _check_observation(self, observation: Tensor, present: Tensor | None) -> None:
        expected = (self.num_views, len(self.evidence), self.num_bins)
        if not observation.is_floating_point() or observation.ndim < 3 or tuple(observation.shape[-3:]) != expected:
            raise DataError(
                f"observation: got {observation.dtype} of shape {tuple(observation.shape)}, expected floating point "
                f"[..., {expected[0]} views, {expected[1]} channels, {expected[2]} bins]; make it with GenerativeModel.observe"
            )
        if present is not None and (present.dtype != torch.bool or present.shape != observation.shape[:-2]):
            raise DataError(
                f"present: got {present.dtype} of shape {tuple(present.shape)}, expected bool of shape {tuple(observation.shape[:-2])}; "
                "leave it out where every view is there"
            )


def fuse(view_log_probs: Tensor, policy: Tensor, pool: Pool = "linear") -> Tensor:
    """Fused log-posterior: the mixture sum_u pi_u p_u, or the log-linear pool prod_u p_u^pi_u renormalised.

    Views of policy 0 have no influence, whatever their values. Where every policy is 0 the result is uniform.

    Args:
        view_log_probs: ``[..., V, C]`` log-posteriors of the views.
        policy: ``[..., V]`` probabilities (broadcastable), summing to 1.
        pool: ``"linear"`` or ``"log"``.

    Returns:
        ``[..., C]`` log-probabilities. The log-linear pool of views that together rule out every class is uniform.

    Raises:
        ConfigError: Unknown pool.
        DataError: The shapes do not fit.
    """
    if pool not in get_args(Pool):
        raise ConfigError(f"pool: got {pool!r}, expected one of {', '.join(map(repr, get_args(Pool)))}")
    if policy.ndim == 0 or policy.shape[-1] != view_log_probs.shape[-2]:
        raise DataError(
            f"policy: got shape {tuple(policy.shape)}, expected [..., {view_log_probs.shape[-2]}] "
            f"for view_log_probs of shape {tuple(view_log_probs.shape)}; one probability per view"
        )
    weight = policy.unsqueeze(-1).to(view_log_probs.dtype)
    trusted = weight > 0
    if pool == "linear":
        log_weight = torch.where(trusted, weight, 1.0).log()
        terms = torch.where(trusted, view_log_probs + log_weight, -math.inf)
        # A class that every trusted view rules out stays at -inf without making the gradient of logsumexp NaN.
        ruled_out = (terms == -math.inf).all(-2, keepdim=True)
        mixture = torch.logsumexp(torch.where(ruled_out, 0.0, terms), -2).masked_fill(ruled_out.squeeze(-2), -math.inf)
    else:
        mixture = torch.where(trusted, weight * torch.where(trusted, view_log_probs, 0.0), 0.0).sum(-2)
    nothing = (mixture == -math.inf).all(-1, keepdim=True)
    return torch.log_softmax(torch.where(nothing, 0.0, mixture), -1)


def _check_settings(num_views: int, evidence: Sequence[str], num_bins: int, precision: float, preference: Sequence[float]) -> None:
    def require(condition: bool, name: str, got: Any, expected: str) -> None:
        if not condition:
            raise ConfigError(f"{name}: got {got!r}, expected {expected}")

    require(num_views >= 1, "num_views", num_views, "at least 1")
    require(num_bins >= 2, "num_bins", num_bins, "at least 2")
    require(math.isfinite(precision) and precision >= 0, "precision", precision, "a finite number, at least 0")
    require(
        len(preference) == 2 and all(0 < p < math.inf for p in preference),
        "preference",
        preference,
        "two positive numbers, correct and wrong",
    )
    known = ", ".join(CHANNELS)
    require(not isinstance(evidence, str), "evidence", evidence, "a sequence of channel names, such as ('certainty', 'surprise')")
    require(len(evidence) > 0 and evidence[0] == "certainty", "evidence", tuple(evidence), "'certainty' as the first channel")
    require(
        set(evidence) <= set(CHANNELS) and len(set(evidence)) == len(evidence),
        "evidence",
        tuple(evidence),
        f"distinct channels among {known}",
    )


def _sum_over_ranks(value: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value


def _minimise(function: Callable[[float], float], grid: Sequence[float], tolerance: float = 1e-9) -> float:
    """Smallest argument of the least value: over an ascending grid, then by golden section between the best one's neighbours."""
    values = [function(point) for point in grid]
    best = min(range(len(grid)), key=lambda i: values[i])
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    f_left, f_right = function(left), function(right)
    while high - low > tolerance * max(high, 1e-3):
        if f_left <= f_right:
            high, right, f_right = right, left, f_left
            left = high - ratio * (high - low)
            f_left = function(left)
        else:
            low, left, f_left = left, right, f_right
            right = low + ratio * (high - low)
            f_right = function(right)
    refined, value = (left, f_left) if f_left <= f_right else (right, f_right)
    return refined if value < values[best] else grid[best]
