"""Metrics equal scikit-learn's, and the tables of an evaluation equal loops over its queries."""

from __future__ import annotations

import gzip
import json
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from amd_fast.errors import DataError
from amd_fast.evaluation import metrics
from amd_fast.evaluation.result import EvaluationResult
from amd_fast.evaluation.scores import ConditionScores

HELPERS = runpy.run_path(str(Path(__file__).with_name("evaluation_scores.py")))
make_scores, log_softmax = HELPERS["make_scores"], HELPERS["log_softmax"]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 9), n=st.integers(1, 200))
def test_class_scores_equal_sklearn(seed: int, classes: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    true, guess = rng.integers(0, classes, n), rng.integers(0, classes, n)
    confusion = metrics.confusion_counts(true, guess, classes)
    np.testing.assert_array_equal(confusion, sk.confusion_matrix(true, guess, labels=range(classes)))
    want = sk.precision_recall_fscore_support(true, guess, labels=range(classes), zero_division=0)
    got = metrics.class_scores(confusion)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(np.nan_to_num(mine), theirs, atol=1e-12)
    macro = sk.precision_recall_fscore_support(true, guess, average="macro", zero_division=0)[:3]
    np.testing.assert_allclose(got.macro(), macro, atol=1e-12)


@pytest.mark.parametrize("ways", [2, 5])
def test_brier_is_the_summed_squared_error(ways: int) -> None:
    rng = np.random.default_rng(ways)
    log_probs, target = log_softmax(rng.normal(size=(50, 6, ways)).astype(np.float64)), rng.integers(0, ways, (50, 6))
    probs = np.exp(log_probs.astype(np.float64)).reshape(-1, ways)
    want = ways * sk.mean_squared_error(np.eye(ways)[target.ravel()], probs)
    assert metrics.brier_score(log_probs, target) == pytest.approx(want, abs=1e-6)
    chance = np.full((3, 4, ways), -np.log(ways))
    assert metrics.brier_score(chance, target[:3, :4]) == pytest.approx(1 - 1 / ways)


def test_brier_takes_impossible_classes() -> None:
    log_probs = np.array([[[0.0, -np.inf], [-np.inf, 0.0]]], dtype=np.float32)
    assert metrics.brier_score(log_probs, np.array([[0, 0]])) == pytest.approx(1.0)


def test_calibration_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    log_probs, target = log_softmax(rng.normal(size=(80, 5, 4)) * 2), rng.integers(0, 4, (80, 5))
    got = metrics.calibration(log_probs, target, bins=10)
    confidence, hit = np.exp(log_probs.max(-1).astype(np.float64)).ravel(), (log_probs.argmax(-1) == target).ravel()
    error = 0.0
    for b in range(10):
        inside = [i for i, c in enumerate(confidence) if got.edges[b] < c <= got.edges[b + 1]]
        assert got.queries[b] == len(inside)
        if inside:
            assert got.accuracy[b] == pytest.approx(hit[inside].mean())
            assert got.confidence[b] == pytest.approx(confidence[inside].mean())
            error += len(inside) / len(hit) * abs(hit[inside].mean() - confidence[inside].mean())
        else:
            assert np.isnan(got.accuracy[b])
    assert got.error == pytest.approx(error)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 300), levels=st.integers(1, 20))
def test_roc_auc_equals_sklearn(seed: int, n: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    score, positive = rng.integers(0, levels, n) / levels, rng.random(n) < 0.4
    if positive.all() or not positive.any():
        assert np.isnan(metrics.roc_auc(score, positive))
    else:
        assert metrics.roc_auc(score, positive) == pytest.approx(sk.roc_auc_score(positive, score))


def test_summary_equals_sklearn_over_all_queries() -> None:
    c = make_scores()
    row = EvaluationResult([c]).summary().set_index("method").loc["ami"]
    true, guess = [], []
    for e in range(c.episodes):
        for q in range(c.target.shape[1]):
            true.append(c.episode_classes[e, c.target[e, q]])
            guess.append(c.episode_classes[e, c.log_probs["ami"][e, q].argmax()])
    assert row["accuracy"] == pytest.approx(100 * sk.accuracy_score(true, guess))
    assert row["macro_f1"] == pytest.approx(100 * sk.f1_score(true, guess, average="macro"))
    assert row["precision"] == pytest.approx(100 * sk.precision_score(true, guess, average="macro"))
    assert row["recall"] == pytest.approx(100 * sk.recall_score(true, guess, average="macro"))
    assert row["queries"] == len(true)


def test_confusion_where_offered_equals_a_loop() -> None:
    c = make_scores(episodes=15)
    counts, chances = np.zeros((9, 9)), np.zeros((9, 9))
    for e in range(c.episodes):
        for q in range(c.target.shape[1]):
            i = c.episode_classes[e, c.target[e, q]]
            chances[i, c.episode_classes[e]] += 1
            counts[i, c.episode_classes[e, c.log_probs["flow"][e, q].argmax()]] += 1
    result = EvaluationResult([c])
    np.testing.assert_array_equal(result.confusion(method="flow"), counts)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(result.confusion(method="flow", offered=True), 100 * counts / chances)


def test_reliability_follows_its_definition() -> None:
    c = make_scores()
    assert c.damaged_modality is not None
    table = EvaluationResult([c]).reliability().set_index(["question", "view"])["auc"]
    hit = c.damaged_modality != ""
    for i, m in enumerate(("rgb", "flow")):
        want = sk.roc_auc_score(c.damaged_modality[hit] == m, -c.policy[hit][:, i])
        assert table["known damage", m] == pytest.approx(want)
    known = np.stack([c.damaged_modality[hit] == m for m in ("rgb", "flow")], -1)
    assert table["known damage", "all"] == pytest.approx(sk.roc_auc_score(known.ravel(), -c.policy[hit][:, :2].ravel()))
    correct = np.stack([c.correct(v) for v in c.views], -1)
    assert table["view correct", "joint"] == pytest.approx(sk.roc_auc_score(correct[..., 2].ravel(), c.policy[..., 2].ravel()))
    mixed = correct.any(-1) & ~correct.all(-1)
    assert table["view correct, views disagree", "all"] == pytest.approx(sk.roc_auc_score(correct[mixed].ravel(), c.policy[mixed].ravel()))


def test_reliability_leaves_absent_views_out() -> None:
    c = make_scores()
    present = np.random.default_rng(5).random(c.policy.shape) < 0.7
    table = EvaluationResult([ConditionScores(**{**c.__dict__, "present": present})]).reliability().set_index(["question", "view"])
    row = table.loc[("view correct", "flow")]
    there = present[..., 1]
    assert row["positives"] + row["negatives"] == there.sum()
    assert row["auc"] == pytest.approx(sk.roc_auc_score(c.correct("flow")[there], c.policy[..., 1][there]))


def test_perfect_policy_has_auc_one() -> None:
    c = make_scores(views=("rgb", "flow"))
    assert c.damaged_modality is not None
    trust = np.where(c.damaged_modality[..., None] == np.array(["rgb", "flow"]), 0.1, 0.9).astype(np.float32)
    table = EvaluationResult([ConditionScores(**{**c.__dict__, "policy": trust})]).reliability()
    assert (table[table["question"] == "known damage"]["auc"] == 1).all()


def test_accuracy_and_episodes_agree() -> None:
    result = EvaluationResult([make_scores(), make_scores(name="damaged, 1-shot", seed=1)])
    table = result.episodes
    assert len(table) == 80
    assert table[table["condition"] == "clean, 1-shot"]["accuracy_ami"].mean() == pytest.approx(result.accuracy)
    low, high = result.confidence_interval
    assert low < result.accuracy < high
    assert table["classes"].str.count(" \\| ").eq(3).all()
    np.testing.assert_allclose(table[[c for c in table if c.startswith("policy_")]].sum(axis=1), 1, atol=1e-6)


def test_relabelling_the_pool_changes_no_number() -> None:
    c = make_scores()
    order = np.random.default_rng(3).permutation(len(c.classes))
    renamed = ConditionScores(**{**c.__dict__, "classes": [f"z{i}" for i in range(9)], "episode_classes": order[c.episode_classes]})
    pd.testing.assert_frame_equal(EvaluationResult([c]).summary(), EvaluationResult([renamed]).summary())


def test_save_is_deterministic_and_complete(tmp_path) -> None:
    for folder in ("a", "b"):
        EvaluationResult([make_scores()], {"seed": 1, "nan": float("nan"), "folder": tmp_path}).save(tmp_path / folder)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["episodes.csv.gz", "per_class.csv", "reliability.csv", "report.html", "results.json", "summary.csv", "tests.csv"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["meta"]["nan"] is None
    assert results["conditions"][0]["chance"] == 0.25
    with gzip.open(tmp_path / "a" / "episodes.csv.gz", "rt") as stream:
        assert len(pd.read_csv(stream)) == 40


def test_save_names_a_file_in_the_way(tmp_path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="it is a file"):
        EvaluationResult([make_scores()]).save(tmp_path / "taken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": np.full((40, 8), 7)}, "expected 0..3"),
        ({"policy": np.zeros((40, 8, 2))}, "policy has shape"),
        ({"log_probs": {"rgb": np.zeros((40, 8, 4))}}, "no 'ami'"),
        ({"episode_classes": np.zeros((40, 3), int)}, "episode_classes has shape"),
        ({"target": np.zeros((0, 8), int)}, "at least one of each"),
    ],
)
def test_bad_scores_are_refused(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ConditionScores(**{**make_scores().__dict__, **change})


def test_probabilities_that_are_none_are_refused() -> None:
    c = make_scores()
    broken = {m: p.copy() for m, p in c.log_probs.items()}
    broken["flow"][3, 2] = np.nan
    with pytest.raises(DataError, match=r"'flow' sum to nan in episode 3, query 2 \(1 such"):
        ConditionScores(**{**c.__dict__, "log_probs": broken})


@pytest.mark.filterwarnings("error")
def test_single_view_single_episode_no_damage_and_unqueried_class(tmp_path) -> None:
    c = make_scores(episodes=1, views=("rgb",), damage=False)
    result = EvaluationResult([c])
    assert np.isnan(result.confidence_interval).all()
    assert result.tests()["note"].eq("needs at least two episodes").all()
    assert result.per_class()["accuracy"].isna().sum() == 5 * 3
    assert not result.reliability()["question"].eq("known damage").any()
    result.save(tmp_path)


def test_calibration_bins_are_closed_on_the_right() -> None:
    half = metrics.calibration(np.log([[[0.5, 0.5]]]), np.array([[0]]), bins=10)
    assert np.flatnonzero(half.queries).tolist() == [4]
    sure = metrics.calibration(np.array([[[0.0, -np.inf]]]), np.array([[0]]), bins=10)
    assert np.flatnonzero(sure.queries).tolist() == [9]
