"""Accuracy on one's own clips: the classifier with and without a model beside scikit-learn on descriptors without training.

Repeated cross-validation by source recording: no clip is answered from another clip of its recording. The same folds, clips and labels
for everyone; of the training side at most ``shots`` clips per class are enrolled, drawn anew in every fold.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import NearestCentroid

import amd_fast
from amd_fast.data.clips import decode_clip
from amd_fast.evaluation.baselines import INVERSE_REGULARISATION, baseline_features
from amd_fast.progress import track

Fold = tuple[np.ndarray, np.ndarray]
FOLDS = 5


def folds(labels: np.ndarray, groups: np.ndarray, shots: int, repeats: int) -> Iterator[Fold]:
    """Rows to enroll and rows to ask. A class that the training side of a fold lacks is not asked there."""
    for seed in range(repeats):
        splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        rng = np.random.default_rng(seed)
        for train, test in splitter.split(labels, labels, groups):
            picked = [rng.permutation(train[labels[train] == label])[:shots] for label in np.unique(labels[train])]
            yield np.concatenate(picked), test[np.isin(labels[test], labels[train])]


def accuracy(found: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Plain and balanced accuracy in percent over all answers, and the spread of the plain one over the repeats.

    Args:
        found: labels and answers of every fold, repeat by repeat.
    """
    repeats = [tuple(map(np.concatenate, zip(*found[start : start + FOLDS], strict=True))) for start in range(0, len(found), FOLDS)]
    plain = [100 * float(np.mean(label == answer)) for label, answer in repeats]
    balanced = [100 * balanced_accuracy_score(label, answer) for label, answer in repeats]
    return {"accuracy": float(np.mean(plain)), "spread": float(np.std(plain, ddof=1)), "balanced": float(np.mean(balanced))}


def measure(manifest: str, models: Sequence[str], *, shots: Sequence[int], repeats: int, least: int) -> list[dict[str, Any]]:
    """One row per number of shots and method.

    Args:
        manifest: CSV with path, label and source_video.
        models: run folders.
        shots: most clips enrolled per class.
        repeats: of the cross-validation.
        least: classes with fewer clips are left out.
    """
    table = pd.read_csv(manifest)
    table = table[table["label"].map(table["label"].value_counts()) >= least].reset_index(drop=True)
    files = [Path(manifest).parent / path for path in table["path"]]
    labels, groups = table["label"].to_numpy(str), table["source_video"].to_numpy(str)
    methods: dict[str, tuple[Any, Any]] = {}
    decoded = [decode_clip(file, 8, short_side=128, modalities=("rgb", "flow")) for file in track(files, "decoding")]
    vectors = pd.DataFrame([baseline_features(clip) for clip in decoded])
    for name in vectors:
        rows = np.stack(list(vectors[name]))
        methods[f"NearestCentroid, {name}"] = NearestCentroid(), rows
        methods[f"LogisticRegression, {name}"] = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=500), rows
    methods["FewShotClassifier()"] = amd_fast.FewShotClassifier(), decoded
    for run in models:
        estimator = amd_fast.FewShotClassifier(amd_fast.load_model(run))
        methods[f"FewShotClassifier({Path(run).name!r})"] = estimator, estimator.describe(files)
    found = []
    for count, (name, (estimator, samples)) in itertools.product(shots, methods.items()):
        answers = []
        for train, test in folds(labels, groups, count, repeats):
            given: list[Any] = [samples[row] for row in train]
            asked: list[Any] = [samples[row] for row in test]
            if isinstance(samples, np.ndarray):
                given, asked = np.stack(given), np.stack(asked)  # type: ignore[assignment]
            known = {"groups": groups[train]} if isinstance(estimator, amd_fast.FewShotClassifier) else {}
            answers.append((labels[test], estimator.fit(given, labels[train], **known).predict(asked)))
        found.append({"data": Path(manifest).parent.name, "shots": count, "method": name, **accuracy(answers)})
    return found
