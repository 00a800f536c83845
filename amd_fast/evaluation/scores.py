"""The scores of every query of an evaluation, under every method."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amd_fast.errors import DataError
from amd_fast.evaluation import metrics

AMI = "ami"
UNIFORM = "uniform"
NORMALISED_WITHIN = 1e-3  # probabilities of half-precision models sum to 1 within this


@dataclass(frozen=True)
class ConditionScores:
    """Scores of one evaluation condition, for example "damaged, 1-shot": E episodes of ``ways`` classes with Q queries each.

    Attributes:
        name: What the condition is called in tables.
        ways: Classes per episode.
        shots: Support clips per class.
        queries: Query clips per class.
        seed: Seed of the episodes.
        classes: Names of all classes in the pool, C of them.
        episode_classes: int64 [E, ways], indices into ``classes``.
        query_id: int64 [E, Q], manifest rows of the query clips.
        target: int64 [E, Q], the true way of each query, 0..ways-1.
        log_probs: Method -> float32 [E, Q, ways] of normalised log-probabilities (-inf allowed); in order: each single view,
            "uniform", "ami". A view that is missing from a clip gives it uniform probabilities.
        policy: float32 [E, Q, V], whom the active inference trusts; rows sum to 1.
        views: Names of the V views.
        damaged_modality: str [E, Q], the modality known to be damaged, "" for none; None where nothing is known.
        damage: str [E, Q], the kind of damage, "" for none; None where nothing is known.
        support_id: int64 [E, ways * shots], manifest rows of the support clips, where recorded.
        present: bool [E, Q, V], which views exist for each query; None where all do. Absent ones do not count in ``reliability``.
        protocol: SHA-256 of the episodes by the names of their clips, as in a file of `amd-fast episodes`; "" where unknown.
        episode_keys: str [E], a hash of each episode's clips; made from rows and class names where not given.

    Raises:
        DataError: arrays whose shapes, ranges or normalisation contradict this.
    """

    name: str
    ways: int
    shots: int
    queries: int
    seed: int
    classes: list[str]
    episode_classes: NDArray[np.int64]
    query_id: NDArray[np.int64]
    target: NDArray[np.int64]
    log_probs: dict[str, NDArray[np.float32]]
    policy: NDArray[np.float32]
    views: tuple[str, ...]
    damaged_modality: NDArray[np.str_] | None = None
    damage: NDArray[np.str_] | None = None
    support_id: NDArray[np.int64] | None = None
    present: NDArray[np.bool_] | None = None
    protocol: str = ""
    episode_keys: NDArray[np.str_] | None = None

    def __post_init__(self) -> None:
        shape = np.shape(self.target)
        if len(shape) != 2 or 0 in shape:
            raise DataError(f"condition {self.name!r}: target has shape {shape}, expected [episodes, queries] with at least one of each")
        episodes, queries = shape
        expected: dict[str, tuple[Any, tuple[int, ...]]] = {
            "episode_classes": (self.episode_classes, (episodes, self.ways)),
            "query_id": (self.query_id, shape),
            "policy": (self.policy, (*shape, len(self.views))),
            **{f"log_probs[{m!r}]": (p, (*shape, self.ways)) for m, p in self.log_probs.items()},
        }
        optional = {"damaged_modality": self.damaged_modality, "damage": self.damage}
        expected.update({n: (a, shape) for n, a in optional.items() if a is not None})
        if self.present is not None:
            expected["present"] = (self.present, (*shape, len(self.views)))
        for name, (array, wanted) in expected.items():
            if np.shape(array) != wanted:
                raise DataError(f"condition {self.name!r}: {name} has shape {np.shape(array)}, expected {wanted} ({episodes=}, {queries=})")
        for method in (AMI, UNIFORM):
            if method not in self.log_probs:
                raise DataError(f"condition {self.name!r}: log_probs has {self.methods}, but no {method!r}; every evaluation scores it")
        self._check_values()

    def _check_values(self) -> None:
        for name, array, below in (("target", self.target, self.ways), ("episode_classes", self.episode_classes, len(self.classes))):
            if array.min() < 0 or array.max() >= below:
                raise DataError(f"condition {self.name!r}: {name} holds {array.min()}..{array.max()}, expected 0..{below - 1}")
        for method, log_probs in self.log_probs.items():
            total = np.exp(log_probs, dtype=np.float64).sum(axis=-1)
            wrong = ~(np.abs(total - 1) <= NORMALISED_WITHIN)  # true for NaN as well
            if wrong.any():
                e, q = (int(i) for i in np.argwhere(wrong)[0])
                raise DataError(
                    f"condition {self.name!r}: probabilities of {method!r} sum to {total[e, q]:.6g} in episode {e}, query {q} "
                    f"({int(wrong.sum())} such queries); normalise them with log_softmax, and give a missing view uniform ones"
                )

    @property
    def methods(self) -> list[str]:
        """Names of the methods, in the order of the tables."""
        return list(self.log_probs)

    @property
    def episodes(self) -> int:
        """Number of episodes, E."""
        return len(self.target)

    @cached_property
    def true_class(self) -> NDArray[np.integer]:
        """Index into ``classes`` of every query: int64 [E, Q]."""
        return metrics.pool_labels(self.episode_classes, self.target)

    def episode_accuracy(self, method: str = AMI) -> NDArray[np.floating]:
        """Accuracy of a method in each episode, 0..1: float64 [E]."""
        return metrics.episode_accuracy(self.scores(method), self.target)

    def correct(self, method: str = AMI) -> NDArray[np.bool_]:
        """Whether a method classified each query correctly: bool [E, Q]."""
        return metrics.predicted(self.scores(method)) == self.target

    def confusion_counts(self, method: str = AMI) -> NDArray[np.integer]:
        """Confusion matrix over the classes of the pool, int64 [C, C], rows true."""
        guess = metrics.pool_labels(self.episode_classes, metrics.predicted(self.scores(method)))
        return metrics.confusion_counts(self.true_class, guess, len(self.classes))

    def scores(self, method: str) -> NDArray[np.float32]:
        """Log-probabilities of a method [E, Q, ways]; raises DataError for an unknown one."""
        if method not in self.log_probs:
            raise DataError(f"condition {self.name!r} has no method {method!r}; it has {', '.join(self.log_probs)}")
        return self.log_probs[method]

    def keys(self) -> NDArray[np.str_]:
        """A hash of the clips of each episode, str [E]: equal for the same episodes."""
        if self.episode_keys is not None:
            return self.episode_keys
        names = np.asarray(self.classes, dtype=object)[self.episode_classes].tolist()
        supports = [[]] * self.episodes if self.support_id is None else self.support_id.tolist()
        asked = zip(names, self.query_id.tolist(), self.target.tolist(), supports, strict=True)
        return np.array([hashlib.sha256(json.dumps(episode).encode()).hexdigest()[:16] for episode in asked])
