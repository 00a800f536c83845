"""The classifier's galleries on disk: what comes back, what they are bound to, and that a changed one is refused."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import amd_fast
from amd_fast import FewShotClassifier
from amd_fast.errors import CheckpointError
from amd_fast.training.checkpoint import save_model

SHARED = runpy.run_path(str(Path(__file__).with_name("classifier_clips.py")))
model, clips, labels, fitted = (SHARED[name] for name in ("model", "clips", "labels", "fitted"))
make_model = SHARED["make_model"]
RECIPE = {"name": "afmir_small", "modalities": ["rgb", "flow"], "dim": 32, "frames": 4, "size": 24, "loss": {}}


@pytest.fixture(scope="module")
def model_file(model: amd_fast.AFMIR, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(model, path, dict(RECIPE))
    return path


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
