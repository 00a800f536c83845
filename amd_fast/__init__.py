"""amd_fast: few-shot action recognition from video with several modalities, inferring clip by clip which one to trust.

Public names are imported on first use, so ``import amd_fast`` needs neither a GPU, nor triton, nor DALI.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amd_fast.lazy import attach

if TYPE_CHECKING:  # what type checkers and editors see; a test compares these names with _PUBLIC and _MODULES
    from amd_fast import adapters, data, errors, evaluation, models, ops, storage, training
    from amd_fast.active_inference import Beliefs, GenerativeModel, fuse
    from amd_fast.classifier import Answer, FewShotClassifier
    from amd_fast.evaluation.bank import FeatureBank
    from amd_fast.evaluation.comparison import compare
    from amd_fast.evaluation.protocol import evaluate
    from amd_fast.evaluation.result import EvaluationResult
    from amd_fast.models.afmir import AFMIR, EpisodeOutput
    from amd_fast.models.matchers import list_matchers
    from amd_fast.models.registry import create_model, list_models
    from amd_fast.ops import explain
    from amd_fast.training.checkpoint import load_model
    from amd_fast.training.config import TrainConfig
    from amd_fast.training.engine import TrainResult, train

__version__ = "0.1.0"

_PUBLIC = {
    "AFMIR": "amd_fast.models.afmir",
    "Answer": "amd_fast.classifier",
    "FewShotClassifier": "amd_fast.classifier",
    "EpisodeOutput": "amd_fast.models.afmir",
    "create_model": "amd_fast.models.registry",
    "list_models": "amd_fast.models.registry",
    "list_matchers": "amd_fast.models.matchers",
    "Beliefs": "amd_fast.active_inference",
    "GenerativeModel": "amd_fast.active_inference",
    "fuse": "amd_fast.active_inference",
    "explain": "amd_fast.ops",
    "FeatureBank": "amd_fast.evaluation.bank",
    "EvaluationResult": "amd_fast.evaluation.result",
    "compare": "amd_fast.evaluation.comparison",
    "evaluate": "amd_fast.evaluation.protocol",
    "TrainConfig": "amd_fast.training.config",
    "TrainResult": "amd_fast.training.engine",
    "load_model": "amd_fast.training.checkpoint",
    "train": "amd_fast.training.engine",
}
# The packages behind the functions train() and evaluate() are called training and evaluation, so that neither hides the other.
_MODULES = ("adapters", "data", "errors", "evaluation", "models", "ops", "storage", "training")

__all__ = [
    "AFMIR",
    "Answer",
    "Beliefs",
    "EpisodeOutput",
    "EvaluationResult",
    "FeatureBank",
    "FewShotClassifier",
    "GenerativeModel",
    "TrainConfig",
    "TrainResult",
    "__version__",
    "adapters",
    "compare",
    "create_model",
    "data",
    "errors",
    "evaluate",
    "evaluation",
    "explain",
    "fuse",
    "list_matchers",
    "list_models",
    "load_model",
    "models",
    "ops",
    "storage",
    "train",
    "training",
]

__getattr__, __dir__ = attach(__name__, _PUBLIC, _MODULES)
