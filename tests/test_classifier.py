"""The classifier: scikit-learn's own checks, what it says against brute-force oracles, and how clips are enrolled."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import amd_fast
from amd_fast import FewShotClassifier
from amd_fast.classifier import inputs
from amd_fast.classifier.spaces import SCALE
from amd_fast.data import RawClip, read_clip
from amd_fast.data.readers import open_clip
from amd_fast.errors import DataError

SHARED = runpy.run_path(str(Path(__file__).with_name("classifier_clips.py")))
model, clips, labels, fitted = (SHARED[name] for name in ("model", "clips", "labels", "fitted"))
blobs, make_model, FRAMES, SHOTS = SHARED["blobs"], SHARED["make_model"], SHARED["FRAMES"], SHARED["SHOTS"]


# scikit-learn.


@parametrize_with_checks([FewShotClassifier(), FewShotClassifier(unknown=-9, false_unknown=0.0, trust="saved")])
def test_estimator_checks(estimator: FewShotClassifier, check: Any) -> None:
    check(estimator)


def test_pipeline_cross_validation_and_grid_search() -> None:
    vectors, target = blobs(4, 10)
    assert cross_val_score(make_pipeline(StandardScaler(), FewShotClassifier()), vectors, target, cv=3).mean() > 0.9
    search = GridSearchCV(FewShotClassifier(unknown=-1), {"false_unknown": [0.0, 0.9]}, cv=2).fit(vectors, target)
    assert search.best_params_ == {"false_unknown": 0.0}
    assert search.score(vectors, target) > 0.9


@pytest.mark.parametrize("with_model", [False, True])
def test_paths_go_through_cross_validation_and_clone(with_model: bool, model: amd_fast.AFMIR, clips: list[str], labels: list[str]) -> None:
    estimator = FewShotClassifier(model if with_model else None, workers=1)
    scores = cross_val_score(estimator, np.array(clips[: len(labels)]), labels, cv=2, error_score="raise")
    assert scores.shape == (2,) and ((scores >= 0) & (scores <= 1)).all()
    copy = clone(estimator)
    assert copy.get_params()["workers"] == 1 and not hasattr(copy, "classes_")


# What it says.


def test_vectors_are_compared_with_class_means() -> None:
    support, target = blobs(3, 4, spread=2.0)
    asked = blobs(3, 5, spread=2.0, seed=1)[0]
    means = [support[target == c].mean(0) for c in range(3)]
    unit = np.mean([((means[a] - means[b]) ** 2).sum() for a in range(3) for b in range(3) if a != b])
    expected = []
    for vector in asked:
        logits = [-((vector - mean) ** 2).sum() / (SCALE * unit) for mean in means]
        expected.append(np.exp(logits) / np.exp(logits).sum())
    found = FewShotClassifier().fit(support, target).predict_proba(asked)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_a_model_says_what_its_own_forward_says(model: amd_fast.AFMIR, clips: list[str], labels: list[str]) -> None:
    def read(paths: list[str]) -> dict[str, torch.Tensor]:
        each = [read_clip(path, model.frames, model.size, model.modalities) for path in paths]
        return {name: torch.stack([clip[name] for clip in each]) for name in model.modalities}

    number = torch.tensor([sorted(set(labels)).index(label) for label in labels])
    with torch.inference_mode():
        output = model(read(clips[: len(labels)]), number, read(clips[len(labels) :]))
    answers = FewShotClassifier(model, trust="saved", batch=3).fit(clips[: len(labels)], labels).explain(clips[len(labels) :])
    found = np.array([list(answer.probabilities.values()) for answer in answers])
    # Distances between such similar descriptors keep few digits in float32, and other batches round otherwise.
    np.testing.assert_allclose(found, output.log_probs.double().softmax(-1), atol=0.01)
    policy = np.array([[answer.policy[view] for view in model.views] for answer in answers])
    np.testing.assert_allclose(policy, output.beliefs.policy, atol=0.01)
    own = np.array([[list(answer.views[view].values()) for view in model.views] for answer in answers])
    np.testing.assert_allclose(own, output.view_log_probs.exp(), atol=0.01)
    assert np.ptp(own) > 0.2


@pytest.mark.parametrize("matcher", ["cosine", "bi_mhm", "otam", "trx"])
def test_every_matcher(matcher: str, clips: list[str], labels: list[str]) -> None:
    classifier = FewShotClassifier(make_model(matcher=matcher)).fit(clips[: len(labels)], labels)
    assert np.allclose(classifier.predict_proba(clips).sum(1), 1)
    assert len(classifier.calibration().familiarity) == len(labels)


def test_answers_are_whole(fitted: FewShotClassifier, clips: list[str]) -> None:
    for clip, answer in zip(clips, fitted.explain(clips), strict=True):
        assert answer.clip == clip and not answer.error and answer.known
        assert answer.probabilities[answer.label] == answer.confidence == max(answer.probabilities.values())
        assert sum(answer.policy.values()) == pytest.approx(1, abs=1e-4)
        assert answer.trusted == max(answer.policy, key=lambda view: answer.policy[view])
        assert set(answer.views) == {"rgb", "flow", "joint"}
        assert json.loads(json.dumps(answer.to_dict()))["label"] == answer.label
    assert fitted.predict(clips).tolist() == [answer.label for answer in fitted.explain(clips)]


def test_arrays_are_read_as_files_are(fitted: FewShotClassifier, clips: list[str], labels: list[str]) -> None:
    """At the size that files are read at; other sizes are made smaller after their colours were converted, not before."""
    picked, short_side = clips[:4], fitted.space_.decoding["short_side"]
    with_luma, frames = [], []
    for path in picked:
        with open_clip(path) as reader:
            decoded = reader.frames(range(FRAMES))
            frames.append(reader.pixels(decoded, short_side=short_side))
            with_luma.append({"rgb": frames[-1], "luma": reader.pixels(decoded, short_side=short_side, pixel_format="gray")})
    np.testing.assert_allclose(fitted.predict_proba(with_luma), fitted.predict_proba(picked), atol=1e-4)
    colours = FewShotClassifier(make_model(modalities=("rgb",))).fit(clips[: len(labels)], labels)
    np.testing.assert_allclose(colours.predict_proba(frames), colours.predict_proba(picked), atol=1e-4)
    np.testing.assert_array_equal(colours.predict_proba(np.stack(frames)), colours.predict_proba(frames))
    np.testing.assert_array_equal(colours.predict_proba([RawClip(rgb=clip) for clip in frames]), colours.predict_proba(frames))


def test_descriptors_stand_for_clips(fitted: FewShotClassifier, model: amd_fast.AFMIR, clips: list[str], labels: list[str]) -> None:
    described = FewShotClassifier(model).describe(clips)
    assert described.shape == (len(clips), 3 * 32) and described.dtype == np.float32
    again = FewShotClassifier(model).fit(described[: len(labels)], labels)
    np.testing.assert_allclose(again.predict_proba(described), fitted.predict_proba(clips), atol=1e-3)
    plain = FewShotClassifier().fit(clips[: len(labels)], labels)
    assert plain.describe(clips).shape == (len(clips), 2 * 256)


# Enrolling.


def test_partial_fit_is_fit(fitted: FewShotClassifier, model: amd_fast.AFMIR, clips: list[str], labels: list[str]) -> None:
    order = np.random.default_rng(0).permutation(len(labels))
    grown = FewShotClassifier(model)
    for number in order:
        grown.partial_fit([clips[number]], [labels[number]])
    assert grown.shots() == {"jump": SHOTS, "run": SHOTS, "wave": SHOTS}
    np.testing.assert_allclose(grown.predict_proba(clips), fitted.predict_proba(clips), atol=1e-3)
    grown.forget("run")
    without = [number for number, label in enumerate(labels) if label != "run"]
    again = FewShotClassifier(model).fit([clips[number] for number in without], [labels[number] for number in without])
    np.testing.assert_allclose(grown.predict_proba(clips), again.predict_proba(clips), atol=1e-3)
    with pytest.raises(DataError, match="no class 'run'"):
        grown.forget("run")


def test_a_clip_is_read_once(model: amd_fast.AFMIR, clips: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = inputs._decode
    monkeypatch.setattr(inputs, "_decode", lambda path, space: (read.append(path), original(path, space))[1])
    classifier = FewShotClassifier(model, workers=1).fit(clips[:4], ["a", "a", "b", "b"])
    classifier.partial_fit(clips[4:6], ["c", "c"])
    classifier.predict(clips[6:8])
    assert sorted(read) == clips[:8]


def test_the_same_clip_counts_once(
    fitted: FewShotClassifier, model: amd_fast.AFMIR, clips: list[str], labels: list[str], tmp_path: Path
) -> None:
    copy = shutil.copy(clips[0], tmp_path / "copy.mp4")
    twice = clone(fitted).fit([*clips[: len(labels)], str(copy)], [*labels, "jump"])
    assert twice.shots()["jump"] == SHOTS
    twice.partial_fit([clips[0]], ["jump"])
    np.testing.assert_allclose(twice.predict_proba(clips), fitted.predict_proba(clips), atol=1e-3)


def test_the_model_stays_as_it_is(clips: list[str], labels: list[str]) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classifier = FewShotClassifier(model).fit(clips[: len(labels)], labels)
    classifier.predict(clips)
    assert float(classifier.calibration().agent.precision) != float(model.generative_model.precision)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
