"""GenerativeModel: inference against pymdp, learning against a brute-force count, precision against a grid search, fusion, state."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amd_fast.active_inference import Beliefs, GenerativeModel, certainty, fuse
from amd_fast.errors import ConfigError, DataError

INF = math.inf
ALL_CHANNELS = ("certainty", "surprise", "agreement", "log_evidence")


def random_model(views: int, channels: int, bins: int, seed: int) -> GenerativeModel:
    """A model whose arrays are all random, none of them the defaults."""
    rng = np.random.default_rng(seed)

    def columns(shape: tuple[int, ...], axis: int) -> Tensor:
        values = rng.uniform(0.05, 1.0, shape)
        return torch.from_numpy(values / values.sum(axis, keepdims=True))

    model = GenerativeModel(views, ALL_CHANNELS[:channels], bins, precision=float(rng.uniform(0.1, 20)))
    model.likelihood.copy_(columns((views, channels, bins, views), 2))
    model.outcome_likelihood.copy_(columns((2, views, views), 0))
    model.log_preference.copy_(columns((2,), 0).log())
    model.state_prior.copy_(columns((views,), 0))
    model.habit.copy_(columns((views,), 0))
    return model


def some_presence(rows: int, views: int, seed: int) -> Tensor:
    """Random presence with at least one view in every row."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(rows, views, generator=generator) > 0.35
    present[torch.arange(rows), torch.randint(views, (rows,), generator=generator)] = True
    return present


def pymdp_beliefs(model: GenerativeModel, observation: Tensor, present: Tensor) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
    """One row through pymdp, on the smaller model that is left without the missing views."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    control = pytest.importorskip("pymdp.control")
    algos, maths = pytest.importorskip("pymdp.algos"), pytest.importorskip("pymdp.maths")
    jnp = jax.numpy
    views = [v for v in range(model.num_views) if present[v]]
    number = len(views)
    likelihood = [jnp.asarray(model.likelihood[v, k][:, views].numpy()) for v in views for k in range(len(model.evidence))]
    seen = [jnp.asarray(observation[v, k].numpy()) for v in views for k in range(len(model.evidence))]
    prior = jnp.asarray((model.state_prior[views] / model.state_prior[views].sum()).numpy())
    state = algos.run_factorized_fpi(likelihood, seen, [prior], A_dependencies=[[0]] * len(seen))[0]
    _, free_energy = maths.calc_vfe([state], [prior], obs=seen, A=likelihood, A_dependencies=[[0]] * len(seen))

    # Factor 0: which view is reliable, stays as it is. Factor 1: which view is attended to, set by the action.
    stay = jnp.eye(number)[:, :, None]
    attend = jnp.broadcast_to(jnp.eye(number)[:, None, :], (number, number, number))
    outcome = jnp.asarray(model.outcome_likelihood[:, views][:, :, views].numpy())
    policies = jnp.asarray([[[0, u]] for u in range(number)])
    policy, negative_energy = control.update_posterior_policies(
        policies,
        [state, jnp.full(number, 1.0 / number)],
        A=[outcome],
        B=[stay, attend],
        C=[jnp.asarray(model.log_preference.numpy())],
        E=jnp.asarray((model.habit[views] / model.habit[views].sum()).numpy()),
        pA=None,
        pB=None,
        A_dependencies=[[0, 1]],
        B_dependencies=[[0], [1]],
        gamma=float(model.precision),
    )
    return np.asarray(state), float(free_energy), -np.asarray(negative_energy), np.asarray(policy)


@pytest.mark.parametrize("views", [1, 2, 3, 4])
@pytest.mark.parametrize("missing", [False, True])
def test_inference_equals_pymdp(views: int, missing: bool) -> None:
    model = random_model(views, channels=2, bins=5, seed=views)  # few different shapes: jax compiles anew for each
    generator = torch.Generator().manual_seed(views)
    observation = model.observe(torch.rand(3, views, len(model.evidence), generator=generator, dtype=torch.float64))
    present = some_presence(3, views, views) if missing else torch.ones(3, views, dtype=torch.bool)
    beliefs = model.infer(observation, present if missing else None)
    for row in range(3):
        state, free_energy, energy, policy = pymdp_beliefs(model, observation[row], present[row])
        there = present[row]
        np.testing.assert_allclose(beliefs.state[row, there], state, atol=1e-10)
        np.testing.assert_allclose(beliefs.free_energy[row], free_energy, atol=1e-10)
        np.testing.assert_allclose(beliefs.expected_free_energy[row, there], energy, atol=1e-10)
        np.testing.assert_allclose(beliefs.policy[row, there], policy, atol=1e-10)
        assert (beliefs.policy[row, ~there] == 0).all()
        assert (beliefs.state[row, ~there] == 0).all()


def test_free_energy_is_the_variational_bound_at_its_minimum() -> None:
    model = random_model(3, 2, 4, seed=0)
    observation = model.observe(torch.rand(5, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    beliefs = model.infer(observation)
    log_likelihood = torch.einsum("rvko,vkos->rs", observation, model.likelihood.log())

    def bound(state: Tensor) -> Tensor:
        return (state * (state.log() - model.state_prior.log() - log_likelihood)).sum(-1)

    torch.testing.assert_close(beliefs.free_energy, bound(beliefs.state), atol=1e-12, rtol=0)
    for _ in range(20):
        other = torch.distributions.Dirichlet(torch.ones(3, dtype=torch.float64)).sample((5,))
        assert (bound(other) >= beliefs.free_energy).all()


def test_a_missing_view_has_no_influence_and_rows_without_views_are_zero() -> None:
    model = random_model(3, 2, 6, seed=1)
    observation = model.observe(torch.rand(4, 3, 2, dtype=torch.float64))
    present = torch.tensor([[True, True, False], [False, True, False], [False, False, False], [True, True, True]])
    expected = model.infer(observation, present)
    spoilt = torch.where(present[..., None, None], observation, torch.nan)
    for got, want in zip(model.infer(spoilt, present), expected, strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0)
    torch.testing.assert_close(expected.policy.sum(-1), torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    assert expected.free_energy[2] == 0
    assert (expected.state[2] == 0).all()


def test_batched_inference_equals_row_by_row_and_follows_the_dtype_of_the_observation() -> None:
    model = random_model(4, 3, 7, seed=2)
    observation = model.observe(torch.rand(2, 3, 4, 3, dtype=torch.float64))
    present = some_presence(6, 4, 0).reshape(2, 3, 4)
    beliefs = model.infer(observation, present)
    for e, q in itertools.product(range(2), range(3)):
        for whole, single in zip(beliefs, model.infer(observation[e, q], present[e, q]), strict=True):
            torch.testing.assert_close(whole[e, q], single, atol=1e-14, rtol=0)
    single = model.infer(observation.float(), present)
    assert all(got.dtype == torch.float32 for got in single)
    torch.testing.assert_close(single.policy, beliefs.policy.float(), atol=1e-5, rtol=0)


def test_precision_zero_is_the_habit_and_a_large_one_picks_the_least_expected_free_energy() -> None:
    model = random_model(3, 2, 5, seed=3)
    observation = model.observe(torch.rand(50, 3, 2, dtype=torch.float64))
    model.precision.fill_(0.0)
    torch.testing.assert_close(model.infer(observation).policy, model.habit.expand(50, 3))
    model.precision.fill_(1e6)
    beliefs = model.infer(observation)
    assert torch.equal(beliefs.policy.argmax(-1), beliefs.expected_free_energy.argmin(-1))


@given(
    evidence=st.lists(st.floats(-0.5, 1.5), min_size=6, max_size=6),
    bins=st.integers(2, 12),
)
@settings(max_examples=50)
def test_soft_binning_interpolates_between_the_two_nearest_centres(evidence: list[float], bins: int) -> None:
    observed = GenerativeModel(3, num_bins=bins).observe(torch.tensor(evidence, dtype=torch.float64).reshape(3, 2)).reshape(6, bins)
    for value, bin_values in zip(evidence, observed.tolist(), strict=True):
        position = min(max(value, 0.0), 1.0) * (bins - 1)
        low = min(int(position), bins - 2)
        expected = [0.0] * bins
        expected[low], expected[low + 1] = 1 - (position - low), position - low
        assert bin_values == pytest.approx(expected, abs=1e-12)


def brute_force_counts(model: GenerativeModel, observation: Tensor, correct: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    counts, outcome_counts = model.counts.clone(), model.outcome_counts.clone()
    for row in range(len(correct)):
        there = [v for v in range(model.num_views) if present[row, v]]
        right = [v for v in there if correct[row, v]]
        if len(there) < min(2, model.num_views):
            continue
        decided = 0 < len(right) < len(there)
        for s in right if decided else there:
            share = 1 / len(right) if decided else 1 / len(there)
            for u in there:
                outcome_counts[0 if correct[row, u] else 1, s, u] += share
                if decided:
                    counts[u, :, :, s] += share * observation[row, u]
    return counts, outcome_counts


@pytest.mark.parametrize("views", [1, 2, 3, 4])
def test_learning_equals_a_brute_force_count(views: int) -> None:
    model = GenerativeModel(views, num_bins=5)
    generator = torch.Generator().manual_seed(views)
    observation = model.observe(torch.rand(40, views, 2, generator=generator, dtype=torch.float64))
    correct = torch.rand(40, views, generator=generator) > 0.5
    present = some_presence(40, views, 5)
    expected = brute_force_counts(model, observation, correct, present)
    observation = torch.where(present[..., None, None], observation, torch.nan)  # what is not there may hold anything
    model.learn(observation.reshape(5, 8, *observation.shape[1:]), correct.reshape(5, 8, views), present.reshape(5, 8, views))
    torch.testing.assert_close(model.counts, expected[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(model.outcome_counts, expected[1], atol=1e-12, rtol=0)
    torch.testing.assert_close(model.likelihood, expected[0] / expected[0].sum(2, keepdim=True))
    torch.testing.assert_close(model.outcome_likelihood, expected[1] / expected[1].sum(0, keepdim=True))


def test_learning_in_parts_equals_learning_at_once_and_can_be_forgotten() -> None:
    whole, parts = GenerativeModel(3), GenerativeModel(3)
    fresh = {name: value.clone() for name, value in whole.state_dict().items()}
    observation, correct = whole.observe(torch.rand(30, 3, 2)), torch.rand(30, 3) > 0.4
    whole.learn(observation, correct)
    for part in range(3):
        parts.learn(observation[part::3], correct[part::3])
    torch.testing.assert_close(parts.counts, whole.counts)
    assert not torch.equal(whole.counts, fresh["counts"])
    whole.reset_counts()
    assert all(torch.equal(value, fresh[name]) for name, value in whole.state_dict().items())


def test_learning_recovers_the_model_that_generated_the_data() -> None:
    """Draw the reliable view, its evidence and the outcomes from known arrays; the counts converge to them."""
    truth, learner = random_model(3, 2, 4, seed=9), GenerativeModel(3, num_bins=4)
    generator = torch.Generator().manual_seed(0)
    rows = 200_000
    state = torch.randint(3, (rows,), generator=generator)
    bins = torch.zeros(rows, 3, 2, dtype=torch.float64)
    for v, k in itertools.product(range(3), range(2)):
        drawn_per_state = torch.multinomial(truth.likelihood[v, k].T, rows, replacement=True, generator=generator)
        bins[:, v, k] = drawn_per_state[state, torch.arange(rows)].double()
    correct = torch.nn.functional.one_hot(state, 3).bool()  # exactly the reliable view is right
    learner.learn(learner.observe(bins / 3), correct)
    torch.testing.assert_close(learner.likelihood, truth.likelihood, atol=0.01, rtol=0)
    torch.testing.assert_close(learner.outcome_likelihood[0], torch.eye(3, dtype=torch.float64), atol=0.01, rtol=0)


def informative_queries(rows: int, damage: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-posteriors of two views of which one is damaged, evidence that hints at which, labels."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(5, (rows,), generator=generator)
    bad = torch.randint(2, (rows,), generator=generator)
    logits = torch.randn(rows, 2, 5, generator=generator, dtype=torch.float64)
    strength = torch.full((rows, 2), 2.5, dtype=torch.float64)
    strength[torch.arange(rows), bad] = 2.5 - damage
    logits[torch.arange(rows), :, target] += strength
    evidence = torch.rand(rows, 2, 2, generator=generator, dtype=torch.float64)
    evidence[torch.arange(rows), bad, 1] = evidence[torch.arange(rows), bad, 1] * 0.5 + 0.5
    return logits.log_softmax(-1), evidence, target


@pytest.mark.parametrize(("damage", "missing"), [(3.0, False), (1.0, False), (0.0, False), (3.0, True)])
def test_fitted_precision_is_the_minimum_of_a_grid_search(damage: float, missing: bool) -> None:
    model = GenerativeModel(2)
    log_probs, evidence, target = informative_queries(400, damage, seed=int(damage))
    present = some_presence(400, 2, 1) if missing else None
    observation = model.observe(evidence)
    model.learn(observation, log_probs.argmax(-1) == target[:, None], present)
    gamma = model.fit_precision(log_probs, observation, target, present)
    assert float(model.precision) == gamma >= 0

    def free_energy(precision: float) -> float:
        model.precision.fill_(precision)
        policy = model.infer(observation, present).policy
        return -(policy * log_probs[torch.arange(400), :, target].exp()).sum(-1).log().mean().item()

    grid = [0.0, *np.geomspace(1e-3, 1000, 3000)]
    assert free_energy(gamma) <= min(free_energy(point) for point in grid) + 1e-12
    if damage == 3.0:
        assert gamma > 0.5


def test_precision_is_zero_where_evidence_misleads_and_unchanged_without_usable_rows() -> None:
    model = GenerativeModel(2, precision=3.0)
    log_probs, evidence, target = informative_queries(300, 3.0, seed=0)
    misleading = model.observe(evidence.flip(-2))
    assert model.fit_precision(log_probs, misleading, target) == 0.0
    model.precision.fill_(3.0)
    assert model.fit_precision(torch.full_like(log_probs, -INF), misleading, target) == 3.0
    assert model.fit_precision(log_probs[:0], misleading[:0], target[:0]) == 3.0


def test_precision_ignores_rows_no_view_can_explain() -> None:
    log_probs, evidence, target = informative_queries(200, 3.0, seed=2)
    model = GenerativeModel(2)
    observation = model.observe(evidence)
    want = model.fit_precision(log_probs[:150], observation[:150], target[:150])
    log_probs[150:] = -INF
    assert model.fit_precision(log_probs, observation, target) == pytest.approx(want, rel=1e-6)


def test_certainty_against_the_entropy_formula() -> None:
    logits = torch.randn(4, 3, 6, dtype=torch.float64) * 3
    probs = logits.softmax(-1)
    torch.testing.assert_close(certainty(logits), 1 + (probs * probs.log()).sum(-1) / math.log(6))
    padded = torch.cat([logits, torch.full((4, 3, 5), -INF, dtype=torch.float64)], -1)
    torch.testing.assert_close(certainty(padded), certainty(logits))
    torch.testing.assert_close(certainty(logits.log_softmax(-1)), certainty(logits))
    assert certainty(torch.tensor([0.0, 0.0, 0.0])).item() == pytest.approx(0.0, abs=1e-6)
    assert certainty(torch.tensor([1e4, 0.0, -1e4])).item() == 1.0
    assert certainty(torch.tensor([-INF, 2.0])).item() == 1.0  # a single class left
    assert certainty(torch.tensor([-INF, -INF])).item() == 0.0
    assert certainty(torch.tensor([1.0])).item() == 1.0


@pytest.mark.parametrize("pool", ["linear", "log"])
def test_fusion_equals_its_formula(pool: str) -> None:
    log_probs = torch.randn(2, 7, 3, 5, dtype=torch.float64).log_softmax(-1)
    policy = torch.rand(2, 7, 3, dtype=torch.float64).softmax(-1)
    fused = fuse(log_probs, policy, pool)
    weights = policy.unsqueeze(-1)
    expected = (weights * log_probs.exp()).sum(-2) if pool == "linear" else log_probs.exp().pow(weights).prod(-2)
    torch.testing.assert_close(fused.exp(), expected / expected.sum(-1, keepdim=True))
    single = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    log_probs[..., 0, :] = torch.nan  # a view without policy may hold anything
    torch.testing.assert_close(fuse(log_probs, single, pool), log_probs[..., 1, :])


@pytest.mark.parametrize("pool", ["linear", "log"])
def test_fusion_stays_finite_where_it_must(pool: str) -> None:
    extreme = torch.tensor([[[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]]]).log_softmax(-1)
    fused = fuse(extreme, torch.tensor([0.5, 0.5]), pool)
    assert torch.isfinite(fused).all()
    assert fused.exp().sum().item() == pytest.approx(1.0)
    nobody = fuse(extreme, torch.zeros(2), pool)
    torch.testing.assert_close(nobody, torch.full((1, 3), -math.log(3)))
    absent = torch.tensor([[[0.0, 1.0, -INF], [1.0, 0.0, -INF]]]).log_softmax(-1).requires_grad_()
    fused = fuse(absent, torch.tensor([0.3, 0.7]), pool)
    assert fused[0, 2] == -INF
    fused[0, :2].sum().backward()
    assert absent.grad is not None
    assert torch.isfinite(absent.grad).all()


def test_the_initial_model_says_that_evidence_is_evidence() -> None:
    model = GenerativeModel(3)
    certainty_of, surprise_of = model.likelihood[:, 0], model.likelihood[:, 1]
    for v, s in itertools.product(range(3), range(3)):
        direction = 1 if v == s else -1
        assert (direction * certainty_of[v, :, s].diff() > 0).all()
        assert (-direction * surprise_of[v, :, s].diff() > 0).all()
    correct = [[0.9 if s == u else 0.3 for u in range(3)] for s in range(3)]
    torch.testing.assert_close(model.outcome_likelihood[0], torch.tensor(correct, dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(model.log_preference.exp(), torch.tensor([0.95, 0.05], dtype=torch.float64))
    evidence = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.2, 0.9]])  # view 0 certain and unsurprised, view 2 the opposite
    beliefs = model.infer(model.observe(evidence))
    assert beliefs.policy.argsort(descending=True).tolist() == [0, 1, 2]


def test_one_view_is_trusted_entirely() -> None:
    model = GenerativeModel(1)
    beliefs = model.infer(model.observe(torch.rand(6, 1, 2)))
    assert isinstance(beliefs, Beliefs)
    assert (beliefs.policy == 1).all()
    assert (beliefs.state == 1).all()


def test_everything_is_in_the_checkpoint_and_counts_keep_their_precision(tmp_path: Path) -> None:
    model = GenerativeModel(2)
    model.learn(model.observe(torch.rand(20, 2, 2)), torch.rand(20, 2) > 0.5)
    model.precision.fill_(2.5)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = GenerativeModel(2)
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    observation = model.observe(torch.rand(3, 2, 2))
    for got, want in zip(other.infer(observation), model.infer(observation), strict=True):
        assert torch.equal(got, want)
    assert {"likelihood", "outcome_likelihood", "log_preference", "state_prior", "habit", "precision", "counts", "outcome_counts"} == set(
        other.state_dict()
    )
    before = other.counts.clone()
    other.to(torch.bfloat16).half()
    assert all(buffer.dtype == torch.float64 for buffer in other.buffers())
    assert torch.equal(other.counts, before)
    assert other.to("meta").counts.is_meta


def test_inference_compiles_with_a_full_graph_and_ignores_autocast() -> None:
    model = random_model(3, 2, 8, seed=4)

    def policy_of(evidence: Tensor, present: Tensor) -> Tensor:
        return model.infer(model.observe(evidence), present).policy

    evidence, present = torch.rand(5, 3, 2), some_presence(5, 3, 3)
    expected = policy_of(evidence, present)
    torch.testing.assert_close(torch.compile(policy_of, fullgraph=True, backend="eager")(evidence, present), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(policy_of(evidence, present), expected, atol=0, rtol=0)


BAD_SETTINGS = {
    "num_views": {"num_views": 0},
    "num_bins": {"num_bins": 1},
    "precision": {"precision": -1.0},
    "preference": {"preference": (1.0, 0.0)},
    "evidence": {"evidence": ("certainty", "luck")},
    "evidence: got": {"evidence": ("surprise",)},
    "evidence: got 'certainty'": {"evidence": "certainty"},
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_named(case: str) -> None:
    with pytest.raises(ConfigError, match=case):
        GenerativeModel(**{"num_views": 2, **BAD_SETTINGS[case]})  # type: ignore[arg-type]


def test_bad_tensors_are_named() -> None:
    model = GenerativeModel(2)
    observation, right = model.observe(torch.rand(4, 2, 2)), torch.ones(4, 2, dtype=torch.bool)
    with pytest.raises(DataError, match="evidence: got shape"):
        model.observe(torch.rand(4, 3, 2))
    with pytest.raises(DataError, match="observation: got"):
        model.infer(torch.rand(4, 2, 2))
    with pytest.raises(DataError, match=r"present: got torch\.float32"):
        model.infer(observation, torch.ones(4, 2))
    with pytest.raises(DataError, match=r"correct: got torch\.float32"):
        model.learn(observation, right.float())
    with pytest.raises(DataError, match="view_log_probs and target"):
        model.fit_precision(torch.zeros(4, 2, 5), observation, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DataError, match="policy: got shape"):
        fuse(torch.zeros(4, 2, 5), torch.ones(4, 3))
    with pytest.raises(ConfigError, match="pool: got"):
        fuse(torch.zeros(4, 2, 5), torch.ones(4, 2), "median")  # type: ignore[arg-type]
