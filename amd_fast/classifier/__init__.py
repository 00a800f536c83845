"""Recognising actions from a few clips of each: a scikit-learn estimator, the gallery of enrolled clips behind it, live windows."""

from __future__ import annotations

from amd_fast.classifier.answers import Answer
from amd_fast.classifier.estimator import FewShotClassifier

__all__ = ["Answer", "FewShotClassifier"]
