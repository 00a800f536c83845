"""What the classifier is given wrongly, each named in the error, and what is unusual and allowed."""

from __future__ import annotations

import json
import runpy
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone

import amd_fast
from amd_fast import FewShotClassifier
from amd_fast.errors import ConfigError, DataError

SHARED = runpy.run_path(str(Path(__file__).with_name("classifier_clips.py")))
model, clips, labels, fitted = (SHARED[name] for name in ("model", "clips", "labels", "fitted"))
blobs, make_model = SHARED["blobs"], SHARED["make_model"]


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
