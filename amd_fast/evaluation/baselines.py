"""Baselines in the same episodes: what a few lines of NumPy reach on the same clips, and a regression on the model's own descriptors.

Three descriptors of a decoded clip and two classifiers of an episode's support clips, combined in ``BASELINES``. They are here to be
beaten, and so are made as strong as such descriptors get: vectors are of unit length, histograms are compared as Hellinger does (the
square root of the masses), and a clip's overall brightness and contrast do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from amd_fast.errors import DataError
from amd_fast.evaluation.logistic import logistic_log_probs
from amd_fast.evaluation.statistics import mean_interval
from amd_fast.progress import track
from amd_fast.resources import available_cores

if TYPE_CHECKING:
    from amd_fast.data.manifest import Manifest
    from amd_fast.evaluation.bank import FeatureBank
    from amd_fast.evaluation.scores import ConditionScores
    from amd_fast.models.afmir import AFMIR

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

IMAGE_SIDE = 16  # mean frames and frame differences are compared at 16 x 16
FLOW_GRID = 4
FLOW_ORIENTATIONS = 8
# Speeds in parts of the short side per frame: 1/16 to 8 pixels on a side of 128, in octaves.
SPEED_EDGES = np.concatenate([[0.0], 2.0 ** np.arange(-11, -3), [np.inf]])
TEMPERATURE = 0.1  # of the cosine: changes the probabilities, not the decisions
INVERSE_REGULARISATION = 10.0  # C of the logistic regression on vectors of unit length

# Name of a baseline -> (its descriptor, its classifier).
BASELINES: dict[str, tuple[str, str]] = {
    "nearest centroid, mean frame": ("mean frame", "centroid"),
    "nearest centroid, frame differences": ("frame differences", "centroid"),
    "nearest centroid, flow histogram": ("flow histogram", "centroid"),
    "logistic regression, flow histogram": ("flow histogram", "logistic"),
    "logistic regression, the model's descriptors": ("model", "logistic"),
}


def baseline_features(raw: Mapping[str, NDArray[Any]]) -> dict[str, Floats]:
    """Descriptors of one decoded clip, each float32 [d] of unit length (or zero where there is nothing to describe).

    - "mean frame" (d = 768): mean over the T frames, reduced to 16 x 16 by area, per colour channel minus its mean over the image.
    - "frame differences" (d = 256): mean over t of |grey[t+1] - grey[t]|, reduced to 16 x 16, square root. Zero for one frame.
    - "flow histogram" (d = 128 + 9): mass of flow per cell of a 4 x 4 grid and orientation (8 bins, shared between the two nearest),
      weighted by speed; and the histogram of speeds over all pixels in octaves; each half sums to 1/2, square root.

    Args:
        raw: "rgb" uint8 [T, H, W, 3]; "flow" [T, h, w, 2] in pixels per frame, optional (no flow histogram without it).

    Raises:
        DataError: no "rgb", or arrays of another shape.
    """
    rgb = np.asarray(raw["rgb"]) if "rgb" in raw else None
    if rgb is None or rgb.ndim != 4 or rgb.shape[-1] != 3:
        raise DataError(f"baselines need 'rgb' as [T, H, W, 3]; got {'nothing' if rgb is None else rgb.shape}; decode it as a modality")
    features = {"mean frame": _mean_frame(rgb), "frame differences": _frame_differences(rgb)}
    if "flow" in raw:
        flow = np.asarray(raw["flow"])
        if flow.ndim != 4 or flow.shape[-1] != 2:
            raise DataError(f"baselines need 'flow' as [T, h, w, 2]; got {flow.shape}")
        features["flow histogram"] = _flow_histogram(flow)
    return features


def score_baseline(name: str, features: Floats, support: Ints, query: Ints, ways: int, shots: int) -> Floats:
    """Log-probabilities [E, Q, ways], float32, of one baseline in E episodes.

    "nearest centroid": cosine between a query and the mean of a class's support vectors, softmax at temperature 0.1.
    "logistic regression": C = 10, fitted on the support clips of each episode, see :mod:`amd_fast.evaluation.logistic`.

    Args:
        name: A key of ``BASELINES``.
        features: The descriptor that ``BASELINES`` names for it, one row per clip, [n, d].
        support: Rows of the support clips, [E, ways * shots], class by class.
        query: Rows of the query clips, [E, Q].
        ways: Classes per episode.
        shots: Support clips per class.

    Raises:
        DataError: an unknown baseline, or a support that is not ways * shots wide.
    """
    if name not in BASELINES:
        raise DataError(f"unknown baseline {name!r}; choose one of {', '.join(map(repr, BASELINES))}")
    if support.shape[1] != ways * shots:
        raise DataError(f"support has {support.shape[1]} clips per episode, expected {ways} ways x {shots} shots = {ways * shots}")
    if BASELINES[name][1] == "logistic":
        return logistic_log_probs(features, support, query, ways, strength=INVERSE_REGULARISATION)
    return _centroid(features, support, query, ways, shots)


def evaluate_baselines(
    manifest: Manifest,
    conditions: Sequence[ConditionScores],
    *,
    rows: pd.DataFrame | None = None,
    frames: int = 8,
    short_side: int = 128,
    descriptors: Floats | None = None,
    workers: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Score every baseline on the very episodes of an evaluation.

    Args:
        manifest: The clips.
        conditions: The evaluated conditions, with ``support_id``.
        rows: The table whose rows the episodes' ids count (the feature bank's, which lacks clips that could not be decoded), by
            column "path"; the manifest's own where None.
        frames: Frames per clip.
        short_side: Pixels of the shorter side the clips are decoded at.
        descriptors: The model's own, one row per clip, see :func:`model_descriptors`: logistic regression on them is scored as well.
        workers: Decoding threads; 0: one per core.
        progress: Show progress bars.

    Returns:
        One row per condition and baseline: condition, shots, method, episodes, accuracy and ci95 in percent.

    Raises:
        DataError: conditions without support ids, or rows whose path the manifest does not hold.
    """
    for c in conditions:
        if c.support_id is None:
            raise DataError(f"condition {c.name!r} does not record its support clips; fill ConditionScores.support_id to score baselines")
    used = np.unique(np.concatenate([np.concatenate([c.query_id.ravel(), np.asarray(c.support_id).ravel()]) for c in conditions]))
    features = _manifest_features(manifest, used, rows, frames, short_side, workers, progress)
    if descriptors is not None:
        features["model"] = descriptors
    tables = [
        baseline_table(
            features, np.asarray(c.support_id), c.query_id, c.target, ways=c.ways, shots=c.shots, condition=c.name, progress=progress,
        )
        for c in conditions
    ]  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def model_descriptors(model: AFMIR, bank: FeatureBank) -> Floats:
    """Descriptors of all views of every clip of a bank, each view of unit length, side by side, ``[n, V * D]`` float32.

    A view that a clip lacks is 0, and the row is of unit length where the clip lacks none.
    """
    descriptors, present = bank.describe(model)
    unit = torch.nn.functional.normalize(descriptors, dim=-1) * present[..., None]
    return (unit / unit.shape[1] ** 0.5).flatten(1).cpu().numpy()


def baseline_table(
    features: Mapping[str, Floats],
    support: Ints,
    query: Ints,
    target: Ints,
    *,
    ways: int,
    shots: int,
    condition: str = "",
    progress: bool = False,
) -> pd.DataFrame:
    """Accuracy of every baseline whose descriptor is given; columns as ``evaluate_baselines``.

    Args:
        features: Descriptor name -> [n, d], as stacked from ``baseline_features``; "model" for the model's own.
        support: Rows of the support clips, [E, ways * shots], class by class.
        query: Rows of the query clips, [E, Q].
        target: True way of each query, [E, Q].
        ways: Classes per episode.
        shots: Support clips per class.
        condition: Written into the first column.
        progress: Show a progress bar.
    """
    table = []
    chosen = [name for name, (descriptor, _) in BASELINES.items() if descriptor in features]
    for name in track(chosen, f"baselines {condition}".strip(), disable=not progress):
        log_probs = score_baseline(name, features[BASELINES[name][0]], support, query, ways, shots)
        accuracy = mean_interval(100 * (log_probs.argmax(-1) == target).mean(axis=-1))
        row = {"condition": condition, "shots": shots, "method": name, "episodes": len(support)}
        table.append({**row, "accuracy": accuracy.mean, "ci95": accuracy.half_width})
    return pd.DataFrame(table, columns=["condition", "shots", "method", "episodes", "accuracy", "ci95"])


def _manifest_features(
    manifest: Manifest, used: Ints, rows: pd.DataFrame | None, frames: int, short_side: int, workers: int, progress: bool
) -> dict[str, Floats]:
    """Descriptors of the clips ``used``, in arrays indexed like ``rows``; the other rows are zero."""
    from amd_fast.data.clips import decode_clip

    position = {path: i for i, path in enumerate(manifest.table["path"])}
    paths = (manifest.table if rows is None else rows)["path"].tolist()
    unknown = [paths[i] for i in used if paths[i] not in position]
    if unknown:
        raise DataError(f"{len(unknown)} evaluated clips are not in the manifest (first: {unknown[0]}); pass the one they were taken from")

    def one(row: int) -> dict[str, Floats]:
        file = manifest.file(position[paths[row]])
        return baseline_features(decode_clip(file, frames, short_side=short_side, modalities=("rgb", "flow")))

    features: dict[str, Floats] = {}
    with ThreadPoolExecutor(workers or available_cores()) as pool:
        described = track(pool.map(one, used.tolist()), "describing clips for the baselines", total=len(used), disable=not progress)
        for row, clip in zip(used, described, strict=True):
            for name, vector in clip.items():
                features.setdefault(name, np.zeros((len(paths), len(vector)), np.float32))[row] = vector
    return features


def _mean_frame(rgb: NDArray[Any]) -> Floats:
    small = _reduce(rgb.mean(axis=0, dtype=np.float32))
    return _unit(small - small.mean(axis=(0, 1)))


def _frame_differences(rgb: NDArray[Any]) -> Floats:
    grey = rgb.astype(np.float32).mean(axis=-1)
    if len(grey) < 2:
        return np.zeros(IMAGE_SIDE**2, np.float32)
    return _unit(np.sqrt(_reduce(np.abs(np.diff(grey, axis=0)).mean(axis=0))))


def _flow_histogram(flow: NDArray[Any]) -> Floats:
    frames, height, width, _ = flow.shape
    u, v = np.moveaxis(flow.astype(np.float32), -1, 0) / min(height, width)
    speed = np.hypot(u, v)
    turn = np.arctan2(v, u) / (2 * np.pi) * FLOW_ORIENTATIONS  # in bins; negative angles wrap below
    lower = np.floor(turn)
    share = turn - lower
    rows = np.arange(height) * FLOW_GRID // height
    columns = np.arange(width) * FLOW_GRID // width
    cell = np.broadcast_to(rows[:, None] * FLOW_GRID + columns, (frames, height, width)) * FLOW_ORIENTATIONS
    first, second = (cell + (lower.astype(np.int64) + step) % FLOW_ORIENTATIONS for step in (0, 1))
    bins = FLOW_GRID**2 * FLOW_ORIENTATIONS
    oriented = np.bincount(first.ravel(), weights=(speed * (1 - share)).ravel(), minlength=bins)
    oriented += np.bincount(second.ravel(), weights=(speed * share).ravel(), minlength=bins)
    speeds, _ = np.histogram(speed, SPEED_EDGES)
    masses = np.concatenate([_mass(oriented), _mass(speeds)]) / 2
    return np.sqrt(masses).astype(np.float32)


def _reduce(image: Floats) -> Floats:
    """Area mean of an image [H, W(, c)] on a 16 x 16 grid: each pixel counts by how much of it lies in the cell."""
    for axis in (0, 1):
        image = np.moveaxis(np.tensordot(_overlap(image.shape[axis]), image, axes=(1, axis)), 0, axis)
    return image


def _overlap(size: int) -> Floats:
    """Weights [16, size] of the area mean along one side."""
    edges = np.linspace(0, size, IMAGE_SIDE + 1)
    low, high = np.maximum(edges[:-1, None], np.arange(size)), np.minimum(edges[1:, None], np.arange(1, size + 1))
    return (np.clip(high - low, 0, None) * IMAGE_SIDE / size).astype(np.float32)


def _mass(counts: NDArray[Any]) -> Floats:
    total = counts.sum()
    return counts / total if total > 0 else np.full(len(counts), 1 / len(counts))


def _unit(vector: Floats) -> Floats:
    vector = vector.ravel().astype(np.float32)
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def _centroid(features: Floats, support: Ints, query: Ints, ways: int, shots: int, chunk: int = 256) -> Floats:
    out = np.empty((len(query), query.shape[1], ways), np.float32)
    for first in range(0, len(query), chunk):  # a chunk of episodes at once keeps the gathered clips in the cache
        rows = slice(first, first + chunk)
        centroid = features[support[rows]].reshape(-1, ways, shots, features.shape[1]).mean(axis=2)
        centroid /= np.maximum(np.linalg.norm(centroid, axis=-1, keepdims=True), 1e-12)
        asked = features[query[rows]]
        asked = asked / np.maximum(np.linalg.norm(asked, axis=-1, keepdims=True), 1e-12)
        logits = np.einsum("eqd,ekd->eqk", asked, centroid, optimize=True) / TEMPERATURE
        out[rows] = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return out
