"""Clips, a model and fixtures that the classifier's tests share (loaded with runpy: tests are no package)."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import amd_fast
from amd_fast import FewShotClassifier

made_videos = runpy.run_path(str(Path(__file__).with_name("made_videos.py")))
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
