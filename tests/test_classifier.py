"""The classifier: scikit-learn's own checks, brute-force oracles, calibration, galleries on disk, and wrong input."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import amd_fast
from amd_fast import FewShotClassifier
from amd_fast.classifier import inputs
from amd_fast.classifier.calibration import ENOUGH, Calibration
from amd_fast.classifier.spaces import SCALE
from amd_fast.data import RawClip, read_clip
from amd_fast.data.readers import open_clip
from amd_fast.errors import CheckpointError, ConfigError, DataError
from amd_fast.training.checkpoint import save_model

made_videos = runpy.run_path(str(Path(__file__).with_name("made_videos.py")))
RECIPE = {"name": "afmir_small", "modalities": ["rgb", "flow"], "dim": 32, "frames": 4, "size": 24, "loss": {}}
CLASSES, SHOTS, FRAMES = 3, 4, 12


def write_clip(path: Path, number: int) -> str:
    """A texture in a colour of its own, moving at a speed of its own."""
    colour, speed = np.random.default_rng(number).random(3), 1 + number % 5

    def show(index: int, width: int, height: int) -> np.ndarray:
        return (made_videos["picture"](speed * index, width, height) * colour).astype(np.uint8)

    made_videos["write_video"](path, "mpeg4", FRAMES, width=40, height=32, show=show)
    return str(path)


def make_model(**changed: Any) -> amd_fast.AFMIR:
    torch.manual_seed(0)
    options = {"modalities": ("rgb", "flow"), "dim": 32, "frames": 4, "size": 24, **changed}
    model = amd_fast.create_model("afmir_small", **options).eval()
    with torch.no_grad():  # an untrained network sees little difference between clips: let it make more of it
        model.matcher.log_temperature.sub_(4.0)
    return model


@pytest.fixture(scope="module")
def model() -> amd_fast.AFMIR:
    return make_model()


@pytest.fixture(scope="module")
def model_file(model: amd_fast.AFMIR, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(model, path, dict(RECIPE))
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``CLASSES x SHOTS`` clips to enroll, class by class, and five to ask."""
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"{number:02}.mp4", number) for number in range(CLASSES * SHOTS + 5)]


@pytest.fixture(scope="module")
def labels() -> list[str]:
    return [name for name in ("jump", "run", "wave") for _ in range(SHOTS)]


@pytest.fixture(scope="module")
def fitted(model: amd_fast.AFMIR, clips: list[str], labels: list[str]) -> FewShotClassifier:
    return FewShotClassifier(model).fit(clips[: len(labels)], labels)


def blobs(classes: int, each: int, width: int = 6, spread: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width)) * 3
    return np.repeat(centres, each, 0) + spread * rng.normal(size=(classes * each, width)), np.repeat(np.arange(classes), each)


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


# Calibration.


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


# Galleries.


@pytest.fixture
def gallery(model_file: Path, clips: list[str], labels: list[str], tmp_path: Path) -> Path:
    FewShotClassifier(model_file, unknown="?").fit(clips[: len(labels)], labels).save(tmp_path / "gallery")
    return tmp_path / "gallery"


def test_gallery_round_trip(gallery: Path, model_file: Path, clips: list[str], labels: list[str]) -> None:
    first = FewShotClassifier(model_file, unknown="?").fit(clips[: len(labels)], labels)
    again = FewShotClassifier.load(gallery)
    assert again.get_params() == {**first.get_params(), "model": str(gallery / "model.safetensors")}
    np.testing.assert_array_equal(again.predict_proba(clips), first.predict_proba(clips))
    assert again.clips_.equals(first.clips_) and again.predict(clips).tolist() == first.predict(clips).tolist()
    assert sorted(os.listdir(gallery)) == ["clips.safetensors", "gallery.json", "model.safetensors"]
    again.partial_fit(clips[-1:], ["sit"]).save(gallery)
    assert FewShotClassifier.load(gallery).classes_.tolist() == ["jump", "run", "sit", "wave"]


@pytest.mark.parametrize("target", [["a", "b"], [3, 1], [2.0, 1.0], [True, False]])
def test_labels_survive(target: list[Any], tmp_path: Path) -> None:
    vectors = np.arange(8.0).reshape(4, 2)
    first = FewShotClassifier().fit(vectors, np.repeat(target, 2))
    first.save(tmp_path / "gallery")
    again = FewShotClassifier.load(tmp_path / "gallery")
    assert again.classes_.tolist() == first.classes_.tolist() and again.classes_.dtype.kind == first.classes_.dtype.kind
    np.testing.assert_array_equal(again.predict_proba(vectors), first.predict_proba(vectors))


def test_a_model_given_as_an_object_is_bound_by_its_hash(
    fitted: FewShotClassifier, model: amd_fast.AFMIR, clips: list[str], tmp_path: Path
) -> None:
    fitted.save(tmp_path / "gallery")
    with pytest.raises(CheckpointError, match="holds no model"):
        FewShotClassifier.load(tmp_path / "gallery")
    other = make_model()
    with torch.no_grad():
        other.generative_model.precision.fill_(2.0)
    with pytest.raises(CheckpointError, match="another model"):
        FewShotClassifier.load(tmp_path / "gallery", model=other)
    again = FewShotClassifier.load(tmp_path / "gallery", model=model)
    np.testing.assert_array_equal(again.predict_proba(clips), fitted.predict_proba(clips))


def _rename_a_class(gallery: Path) -> None:
    text = (gallery / "gallery.json").read_text()
    (gallery / "gallery.json").write_text(text.replace('"jump"', '"fall"'))


def _change_a_clip(gallery: Path) -> None:
    tensors = load_file(gallery / "clips.safetensors")
    tensors["descriptors"][0] += 1
    save_file(tensors, gallery / "clips.safetensors")


def _flip_a_bit_of_the_model(gallery: Path) -> None:
    content = bytearray((gallery / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (gallery / "model.safetensors").write_bytes(content)


TAMPERING = {
    "gallery.json has another hash": _rename_a_class,
    "clips.safetensors has another hash": _change_a_clip,
    "model.safetensors has another hash": _flip_a_bit_of_the_model,
    "lacks clips.safetensors": lambda gallery: (gallery / "clips.safetensors").unlink(),
    "is not a gallery": lambda gallery: (gallery / "gallery.json").write_text("{"),
    "is not a gallery this version can read": lambda gallery: (gallery / "gallery.json").write_text('{"format": "other"}'),
}


@pytest.mark.parametrize("message", TAMPERING)
def test_a_tampered_gallery_is_refused(message: str, gallery: Path) -> None:
    TAMPERING[message](gallery)
    with pytest.raises(CheckpointError, match=message):
        FewShotClassifier.load(gallery)


# Wrong input.


def test_one_clip_as_two_classes(model: amd_fast.AFMIR, clips: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is given as 'a' and as 'b'"):
        FewShotClassifier(model).fit([clips[0], clips[1], clips[0]], ["a", "b", "b"])
    copy = str(shutil.copy(clips[0], tmp_path / "copy.mp4"))
    classifier = FewShotClassifier(model).fit(clips[:2], ["a", "b"])
    with pytest.raises(DataError, match=r"copy.mp4 and .*00.mp4 are the same clip"):
        classifier.partial_fit([copy], ["b"])
    assert classifier.shots() == {"a": 1, "b": 1}


def test_a_clip_that_cannot_be_read(model: amd_fast.AFMIR, clips: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    broken = str(tmp_path / "broken.mp4")
    with pytest.raises(DataError, match=r"broken.mp4.*unreadable='skip'"):
        FewShotClassifier(model).fit([*clips[:2], broken], ["a", "b", "b"])
    classifier = FewShotClassifier(model, unreadable="skip", batch=2)
    with pytest.warns(UserWarning, match=r"1 of 5 clips cannot be read.*broken.mp4"):
        classifier.fit([broken, *clips[:4]], list("aaabb"))
    assert list(classifier.lost_) == [broken] and classifier.shots() == {"a": 2, "b": 2}
    found = classifier.predict([clips[0], broken, clips[3]])
    assert found[1] is None and {found[0], found[2]} <= {"a", "b"}
    assert np.isnan(classifier.predict_proba([clips[0], broken])).tolist() == [[False, False], [True, True]]
    answer = classifier.explain([broken])[0]
    assert "broken.mp4" in answer.error and answer.label is None and json.dumps(answer.to_dict(), allow_nan=False)
    with pytest.raises(DataError, match="no clip of 'b' can be read"):
        classifier.fit([clips[0], broken], ["a", "b"])
    with pytest.raises(DataError, match="none of the 1 clips can be read"):
        classifier.fit([broken], ["a"])


def test_two_hundred_classes(clips: list[str]) -> None:
    vectors, target = blobs(200, 3, width=16, spread=0.3)
    classifier = FewShotClassifier(unknown=-1).fit(vectors, target)
    assert len(classifier.classes_) == 200 and len(classifier.calibration().familiarity) == 500
    assert classifier.score(vectors, target) > 0.85


def test_a_single_class(model: amd_fast.AFMIR, clips: list[str]) -> None:
    classifier = FewShotClassifier(model, unknown="?").fit(clips[:3], ["a"] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert classifier.predict(clips[3:5]).tolist() == ["a", "a"]
        assert np.allclose(classifier.predict_proba(clips[3:5]), 1)
    with pytest.raises(DataError, match="'a' is the only class"):
        classifier.forget("a")


def test_a_class_without_a_modality(clips: list[str], tmp_path: Path) -> None:
    model = make_model(modalities=("rgb", "thermal"))
    rng = np.random.default_rng(0)
    paths = [str(shutil.copy(clip, tmp_path / Path(clip).name)) for clip in clips[:7]]
    for path in paths[:4]:
        np.save(path.replace(".mp4", ".thermal.npy"), rng.random((10, 6, 8)).astype(np.float32))
    both = FewShotClassifier(model).fit(paths[:4], list("aabb"))
    with_thermal, without = both.explain([paths[0], paths[5]])
    assert with_thermal.policy["thermal"] > 0 and without.policy["thermal"] == 0 and "thermal" not in without.views
    lacking = FewShotClassifier(model).fit([*paths[:4], paths[4], paths[5]], list("aabbcc"))
    for answer in lacking.explain(paths):
        assert answer.policy["thermal"] == 0 and sum(answer.probabilities.values()) == pytest.approx(1)


WRONG: dict[str, tuple[Any, Any, str]] = {
    "labels": (["00", "01"], ["a"], "2 clips and 1 labels"),
    "one path": ("00", ["a"], "single path"),
    "nothing": ([], [], "0 sample"),
    "no file": (["00", "none.mp4"], ["a", "b"], "none.mp4.*there is no such file"),
    "one array": (np.zeros((4, 8, 8, 3), np.uint8), ["a"], "wrap it in a list"),
    "floats": ([np.zeros((4, 8, 8, 3))], ["a"], r"clip 0: rgb is float64 \[4, 8, 8, 3\], expected uint8"),
    "no frames": ([np.zeros((0, 8, 8, 3), np.uint8)], ["a"], "holds no frames"),
    "no modality": ([{"depth": np.zeros((4, 8, 8))}], ["a"], "none of the modalities rgb, flow"),
    "vectors": (np.zeros((2, 5)), ["a", "b"], "5 numbers, this model's have 3 views x 32 = 96"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case: str, model: amd_fast.AFMIR, clips: list[str]) -> None:
    given, target, message = WRONG[case]
    if isinstance(given, list):
        given = [clips[int(item)] if isinstance(item, str) and item.isdigit() else item for item in given]
    with pytest.raises(DataError, match=message):
        FewShotClassifier(model).fit(given, target)


def test_kinds_are_not_mixed(fitted: FewShotClassifier, clips: list[str]) -> None:
    with pytest.raises(DataError, match="fitted with clips"):
        FewShotClassifier().fit(clips[:2], ["a", "b"]).predict(np.zeros((2, 3)))
    with pytest.raises(DataError, match="fitted with vectors"):
        FewShotClassifier().fit(np.eye(2), ["a", "b"]).predict(clips)
    with pytest.raises(ValueError, match="X has 3 features, but FewShotClassifier is expecting 2"):
        FewShotClassifier().fit(np.eye(2), ["a", "b"]).predict(np.zeros((2, 3)))
    with pytest.raises(DataError, match="together"):
        clone(fitted).fit(clips[:2], ["a", "b"]).partial_fit(np.zeros((1, 96)), ["c"])
    with pytest.raises(ConfigError, match="compares frames"):
        FewShotClassifier(make_model(matcher="otam")).fit(np.zeros((2, 96)), ["a", "b"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trust": "blind"}, "trust='blind'"),
        ({"unreadable": "ignore"}, "unreadable='ignore'"),
        ({"false_unknown": 2}, "false_unknown=2"),
        ({"batch": 0}, "at least 1"),
        ({"model": 5}, "model is int"),
        ({"unknown": "a"}, "also the label"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        FewShotClassifier(**settings).fit(np.eye(2), ["a", "b"])


def test_labels_outside_the_announced_classes() -> None:
    with pytest.raises(DataError, match=r"labels \['c'\] are not among"):
        FewShotClassifier().partial_fit(np.eye(2), ["a", "c"], classes=["a", "b"])
