"""What the classifier says of one clip, in full."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One clip's answer and what it rests on.

    Attributes:
        clip: path of the clip, or its position where it came as an array.
        label: the class; the classifier's ``unknown`` label where ``known`` is False; None where the clip could not be read.
        confidence: probability of the most probable class, 0 to 1.
        typicality: how familiar the clip looks beside the enrolled ones, a p-value in (0, 1], see :mod:`amd_fast.classifier.calibration`.
        known: False where the typicality is too low for an enrolled class, and for a clip that could not be read.
        probabilities: by class, summing to 1.
        trusted: the view that the agent trusts most.
        policy: trust in each view, summing to 1; 0 for a view that the clip or a class lacks.
        views: each view's own probabilities by class; a view that is missing is not in it.
        free_energy: of the agent's inference about which view is reliable.
        error: why the clip could not be read; empty otherwise.
    """

    clip: str
    label: Any = None
    confidence: float = float("nan")
    typicality: float = float("nan")
    known: bool = False
    probabilities: dict[Any, float] = field(default_factory=dict)
    trusted: str = ""
    policy: dict[str, float] = field(default_factory=dict)
    views: dict[str, dict[Any, float]] = field(default_factory=dict)
    free_energy: float = float("nan")
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with classes as text; what is not there (of a clip that could not be read) is None or empty."""
        there = not self.error
        return {
            "clip": self.clip,
            "label": None if self.label is None else str(self.label),
            "confidence": self.confidence if there else None,
            "typicality": self.typicality if there else None,
            "known": self.known,
            "probabilities": {str(name): value for name, value in self.probabilities.items()},
            "trusted": self.trusted,
            "policy": dict(self.policy),
            "views": {view: {str(name): value for name, value in found.items()} for view, found in self.views.items()},
            "free_energy": self.free_energy if there else None,
            "error": self.error,
        }
