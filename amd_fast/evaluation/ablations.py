"""Ablations of the inference at test time: the same network, the same episodes, one thing taken away."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from amd_fast.active_inference import GenerativeModel
from amd_fast.evaluation.bank import FeatureBank
from amd_fast.evaluation.protocol import (
    Condition,
    Features,
    calibrate,
    calibration_condition,
    evaluate_condition,
    restored,
    test_conditions,
)
from amd_fast.evaluation.statistics import paired_t
from amd_fast.models.afmir import AFMIR

FULL = "full method"


def without_channel(model: AFMIR, name: str) -> AFMIR:
    """The same network (weights shared) with a generative model that does not see one evidence channel."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.evidence = tuple(channel for channel in model.evidence if channel != name)
    agent = model.generative_model
    other.generative_model = GenerativeModel(agent.num_views, other.evidence, agent.num_bins).to(agent.likelihood.device)
    return other


def without_view(features: Features, views: tuple[str, ...], name: str) -> Features:
    """The same clips with one view taken away from every clip."""
    clips = features.clips
    keep = torch.tensor([view != name for view in views], device=clips.present.device)
    return features._replace(clips=clips._replace(present=clips.present & keep))


def _variants(
    model: AFMIR, test: Features, learning: Features, condition: Condition, train: Features | None
) -> Iterator[tuple[str, AFMIR, Features]]:
    """Calibrates each variant in turn and hands it out ready to be scored."""

    def calibrated(which: AFMIR, on: Features) -> AFMIR:
        calibrate(which, on, calibration_condition(on.bank, condition))
        return which

    yield FULL, calibrated(model, learning), test
    for gamma in (1.0, 16.0):
        model.generative_model.precision.fill_(gamma)
        yield f"gamma fixed at {gamma:g}", model, test
    if train is not None:
        yield "counts learned on the training classes", calibrated(model, train), test
    if "joint" in model.views:
        calibrated(model, without_view(learning, model.views, "joint"))
        yield "no joint view", model, without_view(test, model.views, "joint")
    for channel in model.evidence[1:]:
        yield f"no {channel} channel", calibrated(without_channel(model, channel), learning), test


def ablate(
    model: AFMIR,
    bank: FeatureBank,
    calibration: FeatureBank,
    condition: Condition,
    *,
    train: FeatureBank | None = None,
    calibration_episodes: int = 1000,
) -> pd.DataFrame:
    """Accuracy of AMI with parts of the inference taken away, beside the full method, on the same episodes.

    Args:
        model: left as it is.
        bank: test clips.
        calibration: clips of the validation classes.
        condition: shape, number and seed of the episodes; where the manifest marks damage, clean and damaged queries are scored apart.
        train: clips of the training classes, for "counts learned on the training classes".
        calibration_episodes: episodes the counts are learned on.

    Returns:
        One row per condition and variant: accuracy and difference from the full method in points, its 95 % half width, paired t-test p.
    """
    test, learning = Features.of(model, bank), Features.of(model, calibration)
    training = None if train is None else Features.of(model, train)
    learn = replace(condition, episodes=calibration_episodes, seed=condition.seed + 1)
    rows: list[dict[str, object]] = []
    full: dict[str, NDArray[np.floating]] = {}
    with restored(model):
        for name, variant, features in _variants(model, test, learning, learn, training):
            for asked in test_conditions(bank, condition):
                accuracy = evaluate_condition(variant, features, asked).episode_accuracy()
                full.setdefault(asked.name, accuracy)
                row: dict[str, object] = {"condition": asked.name, "variant": name, "accuracy": 100 * accuracy.mean()}
                if name != FULL:
                    test_ = paired_t(accuracy, full[asked.name])
                    row |= {"difference": 100 * test_.difference, "p": test_.p}
                rows.append(row)
    return pd.DataFrame(rows).sort_values("condition", kind="stable").reset_index(drop=True)
