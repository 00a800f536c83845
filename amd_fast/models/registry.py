"""Models by name: :func:`create_model` and :func:`list_models`."""

from __future__ import annotations

import difflib
from fnmatch import fnmatch
from typing import Any

from amd_fast.errors import ConfigError
from amd_fast.models.afmir import AFMIR

_MODELS: dict[str, dict[str, Any]] = {
    "afmir_small": {"backbone": "small", "dim": 128, "heads": 4},
    "afmir_resnet18": {"backbone": "resnet18", "dim": 512, "heads": 8},
    "afmir_resnet34": {"backbone": "resnet34", "dim": 512, "heads": 8},
    "afmir_resnet50": {"backbone": "resnet50", "dim": 512, "heads": 8},
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern, sorted."""
    return sorted(name for name in _MODELS if fnmatch(name, pattern))


def create_model(name: str, *, modalities: tuple[str, ...] = ("rgb", "flow"), pretrained: bool = False, **overrides: Any) -> AFMIR:
    """Makes a model by name.

    Args:
        name: one of :func:`list_models`.
        modalities: names of the modalities, in order.
        pretrained: start the backbones from ImageNet weights (downloaded on first use).
        **overrides: any argument of :class:`~amd_fast.models.afmir.AFMIR`; None leaves the model's own value.

    Raises:
        ConfigError: unknown name or argument value.
        WeightsError: the pretrained weights cannot be had.
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=1)
        raise ConfigError(f"unknown model {name!r}{f'; did you mean {near[0]!r}?' if near else ''} Known: {', '.join(list_models())}")
    options = _MODELS[name] | {key: value for key, value in overrides.items() if value is not None}
    return AFMIR(tuple(modalities), pretrained=pretrained, **options)
