"""What the classifier fits to its support: how familiar a clip must look, and how far the agent's trust goes."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone

import amd_fast
from amd_fast import FewShotClassifier
from amd_fast.classifier.calibration import ENOUGH, Calibration

SHARED = runpy.run_path(str(Path(__file__).with_name("classifier_clips.py")))
model, clips, labels, fitted = (SHARED[name] for name in ("model", "clips", "labels", "fitted"))
blobs = SHARED["blobs"]


def test_familiarity_is_that_of_a_classifier_without_the_recording() -> None:
    vectors, target = blobs(3, 5, spread=2.0)
    groups = np.array([f"{label}-{number // 2}" for number, label in enumerate(target)])
    classifier = FewShotClassifier().fit(vectors, target, groups=groups)
    expected = []
    for row in range(len(vectors)):
        rest = groups != groups[row]
        means = np.stack([vectors[rest & (target == c)].mean(0) for c in range(3)])
        apart = np.mean([np.linalg.norm(means[a] - means[b]) for a in range(3) for b in range(3) if a != b])
        expected.append(np.log(apart / np.linalg.norm(vectors[row] - means, axis=1).min()))
    np.testing.assert_allclose(classifier.calibration().familiarity, np.sort(expected), rtol=1e-9)


def test_only_clips_with_another_recording_are_asked() -> None:
    vectors, target = blobs(3, 3)
    one_recording = np.array([f"{label}" if label == 0 else f"{label}-{number}" for number, label in enumerate(target)])
    assert len(FewShotClassifier().fit(vectors, target, groups=one_recording).calibration().familiarity) == 6
    assert len(FewShotClassifier().fit(vectors[::3], target[::3]).calibration().familiarity) == 0


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.floats(0, 1))
def test_typicality_is_a_conformal_p_value(scores: list[int], share: float) -> None:
    """Of exchangeable scores, each in turn the new one, at most ``share`` get a typicality of at most ``share``: ties included."""
    found = []
    for row in range(len(scores)):
        others = np.sort(np.array(scores[:row] + scores[row + 1 :], dtype=float))
        [typicality] = Calibration(amd_fast.GenerativeModel(1), others).typicality(np.array([scores[row]], dtype=float))
        assert 0 < typicality <= 1
        found.append(typicality)
    assert np.mean(np.array(found) <= share) <= share + 1e-12


def test_unknown_clips_and_false_alarms() -> None:
    vectors, target = blobs(4, 30, spread=1.0)
    more = blobs(4, 400, spread=1.0)
    centres = np.stack([vectors[target == c].mean(0) for c in range(4)])
    fresh = np.repeat(centres, 100, 0) + np.random.default_rng(5).normal(size=(400, 6))
    classifier = FewShotClassifier(unknown=-1, false_unknown=0.1).fit(vectors, target)
    assert np.mean(classifier.predict(fresh) == -1) < 0.15
    assert np.mean(classifier.predict(more[0] + 40) == -1) == 1
    assert not np.any(clone(classifier).set_params(false_unknown=0.0).fit(vectors, target).predict(more[0] + 40) == -1)
    assert classifier.predict(vectors + 40).dtype.kind in "iO"
    named = FewShotClassifier(unknown="?").fit(vectors, np.array(list("abcd"))[target])
    assert set(named.predict(np.concatenate([vectors, vectors + 40]))) == {"a", "b", "c", "d", "?"}


def test_too_few_clips_call_nothing_unknown() -> None:
    vectors, target = blobs(3, 2)
    classifier = FewShotClassifier(unknown=-1, false_unknown=0.1).fit(vectors, target)
    with pytest.warns(UserWarning, match=r"false_unknown=0.1 takes 9; enroll more"):
        assert not np.any(classifier.predict(vectors + 100) == -1)


def test_the_trust_is_fitted_to_the_support(fitted: FewShotClassifier, clips: list[str], labels: list[str]) -> None:
    """The precision is the one that a loop over classifiers without each clip finds."""
    model, rows = fitted.model, []
    for row in range(len(labels)):
        rest = [number for number in range(len(labels)) if number != row]
        without = FewShotClassifier(model, trust="saved").fit([clips[n] for n in rest], [labels[n] for n in rest])
        [judged] = without._judged([clips[row]])
        rows.append(judged.output)
    target = torch.tensor([sorted(set(labels)).index(label) for label in labels])[:, None]
    agent = fitted.space_.new_agent()
    evidence, log_probs = (torch.cat([getattr(row, name) for row in rows]) for name in ("evidence", "view_log_probs"))
    expected = agent.fit_precision(log_probs, agent.observe(evidence), target)
    assert len(labels) >= ENOUGH
    assert float(fitted.calibration().agent.precision) == pytest.approx(expected, rel=1e-3, abs=1e-6)
