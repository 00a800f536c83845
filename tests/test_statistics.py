"""Intervals and tests equal scipy and statsmodels, and the 95 % interval covers the truth 95 times in 100."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.anova import AnovaRM
from statsmodels.stats.multitest import multipletests

from amd_fast.errors import DataError
from amd_fast.evaluation import statistics
from amd_fast.evaluation.result import EvaluationResult

make_scores = runpy.run_path(str(Path(__file__).with_name("evaluation_scores.py")))["make_scores"]


def accuracies(episodes: int = 60, k: int = 4, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(episodes, 1)) * 0.1
    return np.clip(np.round((0.6 + 0.03 * np.arange(k) + shared + 0.1 * rng.normal(size=(episodes, k))) * 10) / 10, 0, 1)


def test_mean_interval_equals_scipy() -> None:
    x = accuracies()[:, 0]
    got = statistics.mean_interval(x)
    assert (got.low, got.high) == pytest.approx(stats.norm.interval(0.95, loc=x.mean(), scale=stats.sem(x)))
    assert got.half_width == pytest.approx(1.959964 * x.std(ddof=1) / np.sqrt(len(x)))


def test_interval_covers_the_truth() -> None:
    """2 000 simulated evaluations of 400 episodes: five queries each, difficulty varying between episodes."""
    rng = np.random.default_rng(1)
    difficulty = rng.beta(6, 3, size=(2000, 400))
    runs = rng.binomial(5, difficulty) / 5
    normal = [statistics.mean_interval(r) for r in runs]
    bootstrap = [statistics.bootstrap_interval(r, resamples=1000, seed=i) for i, r in enumerate(runs)]
    for intervals in (normal, bootstrap):
        covered = np.mean([i.low <= 6 / 9 <= i.high for i in intervals])
        assert 0.935 <= covered <= 0.965


def test_interval_speaks_of_the_clips_at_hand() -> None:
    """Episodes share clips: the interval covers the accuracy on episodes of this pool of clips, not that on clips nobody has seen."""
    rng = np.random.default_rng(2)
    chance_right = rng.beta(2, 1, size=(2000, 60))  # of each clip of a pool, 2 / 3 on average over all pools
    runs = [rng.binomial(1, pool[rng.integers(0, 60, (400, 5))]).mean(1) for pool in chance_right]
    intervals = [statistics.mean_interval(run) for run in runs]
    of_pool = np.mean([i.low <= pool.mean() <= i.high for i, pool in zip(intervals, chance_right, strict=True)])
    of_all = np.mean([i.low <= 2 / 3 <= i.high for i in intervals])
    assert 0.935 <= of_pool <= 0.965  # three binomial standard errors of 2 000 simulations are 1.5 points
    assert of_all < 0.75


def test_bootstrap_equals_scipy() -> None:
    x = accuracies(episodes=200)[:, 0]
    got = statistics.bootstrap_interval(x, resamples=20_000)
    want = stats.bootstrap((x,), np.mean, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=2e-3)
    assert got == statistics.bootstrap_interval(x, resamples=20_000)


def test_paired_t_equals_scipy() -> None:
    a, b = accuracies()[:, :2].T
    got, want = statistics.paired_t(a, b), stats.ttest_rel(a, b)
    assert (got.t, got.p, got.df) == pytest.approx((want.statistic, want.pvalue, want.df))
    assert (got.low, got.high) == pytest.approx(tuple(want.confidence_interval()))
    assert got.effect == pytest.approx(got.t / np.sqrt(len(a)))


def test_welch_equals_scipy() -> None:
    a, b = accuracies()[:, 0], accuracies(episodes=35, seed=4)[:, 3]
    got, want = statistics.welch_t(a, b), stats.ttest_ind(a, b, equal_var=False)
    assert (got.t, got.p, got.df) == pytest.approx((want.statistic, want.pvalue, want.df))
    assert (got.low, got.high) == pytest.approx(tuple(want.confidence_interval()))


@pytest.mark.filterwarnings("error")
def test_degenerate_differences_have_notes() -> None:
    a = accuracies()[:, 0]
    assert statistics.paired_t(a, a)[3:6] == (0.0, 59, 1.0)
    shifted = statistics.paired_t(np.ones(5), np.zeros(5))
    assert shifted.p == 0
    assert shifted.note == "constant difference"
    assert np.isnan(statistics.paired_t(a[:1], a[:1]).p)
    assert np.isnan(statistics.welch_t(a[:1], a).p)
    assert statistics.welch_t(np.ones(3), np.ones(4)).p == 1
    assert statistics.anova_repeated(np.stack([a, a], 1)).p == 1
    assert statistics.anova_repeated(np.stack([a, a + 1], 1)).p == 0
    percent = 100 * np.random.default_rng(0).integers(0, 4, 5000) / 3 + 1e3  # what is left is rounding, of numbers of this size
    assert statistics.anova_repeated(np.stack([percent, percent], 1)).note == "equal in every episode"
    assert statistics.anova_one_way([np.ones(3), np.ones(3)]).p == 1
    assert statistics.anova_one_way([np.ones(3), np.zeros(3)]).p == 0
    with pytest.raises(DataError, match="welch_t"):
        statistics.paired_t(a, a[:5])


def test_holm_equals_statsmodels_and_skips_nan() -> None:
    p = np.random.default_rng(0).random(8) ** 3
    np.testing.assert_allclose(statistics.holm(p), multipletests(p, method="holm")[1])
    got = statistics.holm([*p, np.nan])
    np.testing.assert_allclose(got[:8], statistics.holm(p))
    assert np.isnan(got[8])


def test_one_way_anova_equals_scipy() -> None:
    groups = [accuracies(seed=i, episodes=20 + i)[:, i] for i in range(3)]
    got, want = statistics.anova_one_way(groups), stats.f_oneway(*groups)
    assert (got.f, got.p) == pytest.approx((want.statistic, want.pvalue))
    assert got.effect == pytest.approx(got.f * got.df_between / (got.f * got.df_between + got.df_error))


@pytest.mark.parametrize("k", [2, 3, 5])
def test_repeated_measures_anova_equals_statsmodels(k: int) -> None:
    x = accuracies(episodes=25, k=k)
    long = pd.DataFrame({"episode": np.repeat(np.arange(25), k), "system": np.tile(np.arange(k), 25), "y": x.ravel()})
    want = AnovaRM(long, "y", "episode", within=["system"]).fit().anova_table.iloc[0]
    got = statistics.anova_repeated(x)
    assert (got.f, got.df_between, got.df_error, got.p) == pytest.approx(tuple(want[["F Value", "Num DF", "Den DF", "Pr > F"]]))
    if k == 2:  # two systems: the t-test squared, nothing to correct for
        assert got.f == pytest.approx(statistics.paired_t(x[:, 0], x[:, 1]).t ** 2)
        assert got.p_corrected == pytest.approx(got.p)


def test_greenhouse_geisser_by_hand() -> None:
    """Epsilon from the eigenvalues of the covariance of orthonormal contrasts, another way to the same number."""
    x = accuracies(episodes=30, k=4) * np.array([1, 1, 2, 5])
    contrasts = np.linalg.qr(np.column_stack([np.ones(4), np.eye(4)[:, :3]]))[0][:, 1:]
    eigenvalues = np.linalg.eigvalsh(np.cov(x @ contrasts, rowvar=False))
    epsilon = eigenvalues.sum() ** 2 / (3 * (eigenvalues**2).sum())
    got = statistics.anova_repeated(x)
    assert got.p_corrected == pytest.approx(stats.f.sf(got.f, 3 * epsilon, 3 * 29 * epsilon))


def test_tests_table_is_paired_and_corrected() -> None:
    c = make_scores()
    table = EvaluationResult([c]).tests().set_index("against")
    assert list(table.index) == ["rgb", "flow", "joint", "uniform"]
    want = stats.ttest_rel(c.episode_accuracy("ami"), c.episode_accuracy("flow"))
    assert table.loc["flow", "t"] == pytest.approx(want.statistic)
    np.testing.assert_allclose(table["p_holm"], multipletests(table["p"], method="holm")[1])
