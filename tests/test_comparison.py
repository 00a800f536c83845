"""Several runs compared: the tests equal scipy's and statsmodels', other episodes are refused, seeds and episodes are kept apart."""

from __future__ import annotations

import json
import runpy
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.formula.api import mixedlm, ols
from statsmodels.stats.anova import AnovaRM, anova_lm
from statsmodels.stats.multitest import multipletests

from amd_fast.cli import main
from amd_fast.errors import DataError
from amd_fast.evaluation.comparison import compare
from amd_fast.evaluation.result import EvaluationResult
from amd_fast.evaluation.seeds import seed_spread, seed_table

make_scores = runpy.run_path(str(Path(__file__).with_name("evaluation_scores.py")))["make_scores"]


def on_the_same_episodes(seed: int, **changes: object) -> EvaluationResult:
    base, other = make_scores(**changes), make_scores(seed=seed, **changes)
    return EvaluationResult([replace(base, log_probs=other.log_probs)])


@pytest.fixture(scope="module")
def runs() -> dict[str, EvaluationResult]:
    return {name: on_the_same_episodes(seed) for name, seed in (("a", 0), ("b", 9), ("c", 10))}


def test_every_test_equals_the_library(runs: dict[str, EvaluationResult]) -> None:
    table = compare(runs)
    assert list(table["test"]) == ["repeated-measures ANOVA", "one-way ANOVA", "paired t", "paired t", "paired t"]
    values = {name: 100 * run.conditions[0].episode_accuracy() for name, run in runs.items()}
    long = pd.DataFrame([(name, e, v) for name, row in values.items() for e, v in enumerate(row)], columns=["system", "episode", "y"])
    want = AnovaRM(long, "y", "episode", within=["system"]).fit().anova_table.iloc[0]
    got = table.iloc[0]
    assert tuple(got[["statistic", "df", "df_error", "p"]]) == pytest.approx(tuple(want))
    assert got["effect"] == pytest.approx(want["F Value"] * 2 / (want["F Value"] * 2 + want["Den DF"]))  # partial eta squared
    f = stats.f_oneway(*values.values())
    assert tuple(table.iloc[1][["statistic", "p"]]) == pytest.approx((f.statistic, f.pvalue))
    pairs = table.iloc[2:]
    for _, row in pairs.iterrows():
        t = stats.ttest_rel(values[row["a"]], values[row["b"]])
        low, high = t.confidence_interval()
        assert tuple(row[["statistic", "p", "ci_low", "ci_high"]]) == pytest.approx((t.statistic, t.pvalue, low, high))
        assert row["effect"] == pytest.approx(t.statistic / np.sqrt(len(values["a"])))  # Cohen's d_z
    np.testing.assert_allclose(pairs["p_corrected"], multipletests(pairs["p"], method="holm")[1])


Runs = dict[str, EvaluationResult]


def test_saved_runs_compare_to_the_same_numbers(tmp_path: Path, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs["a"].save(tmp_path / "a")
    runs["b"].save(tmp_path / "run b" / "evaluation")
    pd.testing.assert_frame_equal(compare({"a": tmp_path / "a", "b": str(tmp_path / "run b")}), compare({k: runs[k] for k in "ab"}))
    folders = [f"a={tmp_path / 'a'}", f"b={tmp_path / 'run b'}"]
    assert main(["compare", *folders, "--output", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert table["p"].tolist() == pytest.approx(compare({k: runs[k] for k in "ab"})["p"].tolist())
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["test"] for row in content["tests"]] == table["test"].tolist() and len(content["seeds"]) == 2
    assert "ANOVA" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "a")]) == 2
    assert "NAME=FOLDER" in capsys.readouterr().err
    with pytest.raises(DataError, match="holds no evaluation"):
        compare({"a": tmp_path / "a", "b": tmp_path})


def test_other_episodes_are_refused_and_the_first_is_named(runs: dict[str, EvaluationResult]) -> None:
    c = runs["b"].conditions[0]
    query = c.query_id.copy()
    query[17, 1] += 1
    one_differs = EvaluationResult([replace(c, query_id=query)])
    with pytest.raises(DataError, match=r"first that differs is episode 17 \(class.* 1 of 40 differ\)"):
        compare({"a": runs["a"], "b": one_differs})
    shorter = EvaluationResult([make_scores(seed=2, episodes=30)])
    with pytest.raises(DataError, match="first that differs is episode 0"):
        compare({"a": runs["a"], "b": shorter})
    table = compare({"a": runs["a"], "b": shorter}, unpaired=True)
    assert list(table["test"]) == ["one-way ANOVA", "Welch t"]
    assert table["note"].str.contains("different episodes").all()
    want = stats.ttest_ind(*(100 * r.conditions[0].episode_accuracy() for r in (runs["a"], shorter)), equal_var=False)
    assert table.iloc[1]["p"] == pytest.approx(want.pvalue)


def test_more_episodes_of_the_same_seed_are_other_episodes() -> None:
    c = make_scores()
    arrays = {f.name: getattr(c, f.name)[:25] for f in fields(c) if isinstance(getattr(c, f.name), np.ndarray)}
    part = replace(c, **arrays, log_probs={k: v[:25] for k, v in c.log_probs.items()})
    with pytest.raises(DataError, match=r"40 episodes and 'b' 25; the first that only one has is episode 25"):
        compare({"a": EvaluationResult([c]), "b": EvaluationResult([part])})


def test_what_cannot_be_compared_is_refused(runs: dict[str, EvaluationResult]) -> None:
    with pytest.raises(DataError, match="at least two"):
        compare({"a": runs["a"]})
    with pytest.raises(DataError, match="no condition"):
        compare({"a": runs["a"], "b": EvaluationResult([make_scores(name="other")])})
    with pytest.raises(DataError, match="no method"):
        compare({k: runs[k] for k in "ab"}, method="nonsense")


def test_training_seeds_of_one_system_are_kept_together() -> None:
    ours, plain = ([on_the_same_episodes(seed) for seed in seeds] for seeds in ((0, 1, 2), (3, 4)))
    table = compare({"ours": ours, "plain": plain})
    assert list(table["test"]) == ["repeated-measures ANOVA", "one-way ANOVA", "paired t", "Welch t over seeds"]
    one, two = (np.stack([100 * r.conditions[0].episode_accuracy() for r in system]) for system in (ours, plain))
    t, over = stats.ttest_rel(one.mean(0), two.mean(0)), stats.ttest_ind(one.mean(1), two.mean(1), equal_var=False)
    assert table.iloc[2]["p"] == pytest.approx(t.pvalue) and table.iloc[3]["p"] == pytest.approx(over.pvalue)
    seeds = seed_table({"ours": ours, "plain": plain}, methods=("ami",))
    assert seeds["seeds"].tolist() == [3, 2] and seeds["same_episodes"].all()
    assert seeds["accuracy"].tolist() == pytest.approx([one.mean(), two.mean()])
    apart = seed_table({"x": [EvaluationResult([make_scores(seed=s)]) for s in (0, 1)]})
    assert not apart["same_episodes"].any() and apart["method"].tolist() == ["rgb", "flow", "joint", "uniform", "ami"]
    with pytest.raises(DataError, match=r"\[40, 30\] episodes"):
        seed_table({"x": [EvaluationResult([make_scores(episodes=n)]) for n in (40, 30)]})


def simulated(rng: np.random.Generator, k: int, episodes: int, sd: tuple[float, float, float], shared: bool) -> np.ndarray:
    of_seed = sd[0] * rng.normal(size=(k, 1))
    of_episode = sd[1] * rng.normal(size=(1 if shared else k, episodes))
    return 60 + of_seed + of_episode + sd[2] * rng.normal(size=(k, episodes))


@given(seed=st.integers(0, 1000), k=st.integers(2, 6), episodes=st.integers(2, 30))
def test_variance_components_equal_the_mean_squares_of_statsmodels(seed: int, k: int, episodes: int) -> None:
    values = simulated(np.random.default_rng(seed), k, episodes, (2.0, 3.0, 1.0), True)
    long = pd.DataFrame({"y": values.ravel(), "s": np.repeat(np.arange(k), episodes), "e": np.tile(np.arange(episodes), k)})
    if episodes * k > episodes + k - 1:
        table = anova_lm(ols("y ~ C(s) + C(e)", long).fit())
        squares = table["sum_sq"] / table["df"]
        got = seed_spread(values, same_episodes=True)
        want = [max(x, 0) ** 0.5 for x in ((squares["C(s)"] - squares["Residual"]) / episodes, (squares["C(e)"] - squares["Residual"]) / k)]
        assert (got.seeds, got.episodes, got.rest) == pytest.approx((*want, squares["Residual"] ** 0.5), abs=1e-6)
    f = stats.f_oneway(*values).statistic
    apart = seed_spread(values, same_episodes=False)
    within = values.var(axis=1, ddof=1).mean()
    assert apart.episodes**2 == pytest.approx(within)
    assert apart.seeds**2 == pytest.approx(max((f - 1) * within / episodes, 0), abs=1e-6)


def test_own_episodes_equal_a_mixed_model() -> None:
    """Restricted maximum likelihood gives the same variances as the analysis of variance where the data are balanced."""
    values = simulated(np.random.default_rng(3), 8, 25, (3.0, 2.0, 0.0), False)
    long = pd.DataFrame({"y": values.ravel(), "s": np.repeat(np.arange(8), 25)})
    fitted = mixedlm("y ~ 1", long, groups="s").fit(reml=True)
    got = seed_spread(values, same_episodes=False)
    assert (got.seeds**2, got.episodes**2) == pytest.approx((float(fitted.cov_re.iloc[0, 0]), fitted.scale), rel=1e-3)


@pytest.mark.parametrize("shared", [True, False])
def test_the_interval_over_seeds_covers_the_truth(shared: bool) -> None:
    """2 000 simulated repetitions of five seeds: between 93.5 and 96.5 % hold the truth (three binomial standard errors)."""
    rng = np.random.default_rng(4)
    spreads = [seed_spread(simulated(rng, 5, 40, (2.0, 8.0, 4.0), shared), same_episodes=shared) for _ in range(2000)]
    covered = np.mean([s.low <= 60 <= s.high for s in spreads])
    assert 0.935 <= covered <= 0.965
    assert np.mean([s.seeds**2 for s in spreads]) == pytest.approx(4.0, rel=0.15)
    assert np.mean([s.episodes**2 for s in spreads]) == pytest.approx(64.0 + (0 if shared else 16.0), rel=0.05)


def test_one_seed_has_the_interval_over_episodes() -> None:
    values = simulated(np.random.default_rng(0), 1, 30, (2.0, 8.0, 4.0), True)
    got = seed_spread(values, same_episodes=True)
    assert (got.low, got.high) == pytest.approx(stats.norm.interval(0.95, values.mean(), stats.sem(values[0])))
    assert np.isnan(got.seeds)
    with pytest.raises(DataError, match="two episodes"):
        seed_spread(values[:, :1], same_episodes=True)
