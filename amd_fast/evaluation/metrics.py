"""Metrics of few-shot classification, vectorised over episodes.

Everything takes the log-probabilities of an evaluation as one array ``log_probs [E, Q, ways]`` (E episodes, Q queries each) with
``target [E, Q]`` in ``0..ways-1`` and returns NumPy; nothing loops over episodes. Macro precision, recall and F1 are taken over the
*classes of the pool* (the names behind the ways), not over the ways, which mean something else in every episode.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]


class ClassScores(NamedTuple):
    """Scores per class, each float64 [C] in 0..1, NaN where the class was neither queried nor predicted; ``queries`` is int64 [C]."""

    precision: Floats
    recall: Floats
    f1: Floats
    queries: Ints

    def macro(self) -> tuple[float, float, float]:
        """Unweighted means (precision, recall, F1) over the classes that were queried or predicted, as scikit-learn takes them.

        A class that was queried but never predicted counts with precision 0, one predicted but never queried with recall 0.
        """
        seen = ~np.isnan(self.f1)
        if not seen.any():
            return float("nan"), float("nan"), float("nan")
        return float(self.precision[seen].mean()), float(self.recall[seen].mean()), float(self.f1[seen].mean())


class Calibration(NamedTuple):
    """A reliability diagram: per bin of confidence its edges [bins + 1], mean confidence, accuracy and queries [bins], and the error."""

    edges: Floats
    confidence: Floats
    accuracy: Floats
    queries: Ints
    error: float


def predicted(log_probs: Floats) -> Ints:
    """Most probable way of each query: int64 [E, Q]; the first one where several tie."""
    return log_probs.argmax(axis=-1)


def episode_accuracy(log_probs: Floats, target: Ints) -> Floats:
    """Fraction of each episode's queries that were classified correctly: float64 [E]."""
    return (predicted(log_probs) == target).mean(axis=-1)


def pool_labels(episode_classes: Ints, way: Ints) -> Ints:
    """Class index in the pool of each way: ``episode_classes [E, ways]``, ``way [E, Q]`` -> [E, Q]."""
    return np.take_along_axis(episode_classes, way, axis=1)


def confusion_counts(true: Ints, guess: Ints, classes: int) -> Ints:
    """Confusion matrix, int64 [C, C]: how many queries of class i (row) were taken for class j (column)."""
    flat = true.ravel().astype(np.int64) * classes + guess.ravel()
    return np.bincount(flat, minlength=classes * classes).reshape(classes, classes)


def offered_counts(episode_classes: Ints, true: Ints, classes: int) -> Ints:
    """How many queries of class i (row) came in an episode where class j (column) was one of the answers: int64 [C, C].

    An entry of the confusion matrix divided by this one is the probability that a query of class i is taken for class j where it can be;
    the raw counts also depend on how often the two met.
    """
    episodes, ways = episode_classes.shape
    rows = np.repeat(true[:, :, None], ways, axis=2)
    columns = np.broadcast_to(episode_classes[:, None, :], (episodes, true.shape[1], ways))
    return confusion_counts(rows, columns, classes)


def class_scores(confusion: Ints) -> ClassScores:
    """Precision, recall and F1 of each class from a confusion matrix [C, C] (rows true, columns predicted).

    A ratio 0/0 of a class that occurs counts as 0 (scikit-learn's ``zero_division=0``); a class that does not occur at all is NaN.
    """
    hits = np.diag(confusion).astype(np.float64)
    actual, called = confusion.sum(axis=1), confusion.sum(axis=0)
    absent = (actual + called) == 0
    precision = np.where(absent, np.nan, hits / np.maximum(called, 1))
    recall = np.where(absent, np.nan, hits / np.maximum(actual, 1))
    f1 = np.where(absent, np.nan, 2 * hits / np.maximum(actual + called, 1))
    return ClassScores(precision, recall, f1, actual)


def brier_score(log_probs: Floats, target: Ints) -> float:
    """Multi-class Brier score (Brier 1950), the mean squared error of the probabilities: ``mean_q sum_k (p_k - y_k)^2``.

    It lies in 0..2; chance (p = 1/ways) gives 1 - 1/ways. For two classes it is twice the score ``sklearn.metrics.brier_score_loss``
    gives in its binary form.
    """
    probs = np.exp(log_probs, dtype=np.float64)
    own = np.take_along_axis(probs, target[..., None], axis=-1)[..., 0]
    return float(((probs**2).sum(axis=-1) - 2 * own + 1).mean())


def calibration(log_probs: Floats, target: Ints, bins: int = 15) -> Calibration:
    """Expected calibration error of the top class and the diagram behind it (Guo et al., ICML 2017).

    Confidence is the probability of the predicted class, in ``bins`` equal bins of (0, 1], each closed on the right;
    error = sum_b n_b/n |accuracy_b - confidence_b|. Bins without a query hold NaN.
    """
    confidence = np.exp(log_probs.max(axis=-1), dtype=np.float64).ravel().clip(0, 1)
    correct = (predicted(log_probs) == target).ravel().astype(np.float64)
    edges = np.linspace(0, 1, bins + 1)
    which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    per = np.where(count > 0, count, 1)
    mean_confidence = np.bincount(which, weights=confidence, minlength=bins) / per
    accuracy = np.bincount(which, weights=correct, minlength=bins) / per
    error = float((count / max(len(confidence), 1) * np.abs(accuracy - mean_confidence)).sum())
    empty = count == 0
    return Calibration(edges, np.where(empty, np.nan, mean_confidence), np.where(empty, np.nan, accuracy), count, error)


def roc_auc(score: Floats, positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the probability that a positive scores higher than a negative, ties counting half.

    ``score`` and ``positive`` have the same shape. NaN where one of the two sides is empty: nothing can be ranked then.
    """
    from scipy.stats import rankdata

    positive = positive.ravel()
    above, below = int(positive.sum()), int((~positive).sum())
    if above == 0 or below == 0:
        return float("nan")
    ranks = rankdata(score.ravel())
    return float((ranks[positive].sum() - above * (above + 1) / 2) / (above * below))
