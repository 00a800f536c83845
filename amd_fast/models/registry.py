"""Models by name: :func:`create_model` and :func:`list_models`.

A name of this library stands for a backbone and the widths that go with it. ``timm:<name>`` and ``hf:<model id>`` stand for a model
with that backbone and a read-out of 512 numbers and 8 heads.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from amd_fast.errors import ConfigError
from amd_fast.models import timm_backbone, video_backbone
from amd_fast.models.afmir import AFMIR

_MODELS: dict[str, dict[str, Any]] = {
    "afmir_small": {"backbone": "small", "dim": 128, "heads": 4},
    "afmir_resnet18": {"backbone": "resnet18", "dim": 512, "heads": 8},
    "afmir_resnet34": {"backbone": "resnet34", "dim": 512, "heads": 8},
    "afmir_resnet50": {"backbone": "resnet50", "dim": 512, "heads": 8},
}


_BORROWED: dict[str, Any] = {"dim": 512, "heads": 8}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern, sorted.

    Models with a backbone of another library come in only where the pattern asks for them: ``timm:*resnet*`` names what timm has
    (it must be installed), ``hf:*`` the kinds of video networks, of which :func:`create_model` takes any by its id on the hub.
    """
    names = list(_MODELS)
    if pattern.startswith(timm_backbone.PREFIX):
        names = timm_backbone.list_timm()
    elif pattern.startswith(video_backbone.PREFIX):
        names = [video_backbone.PREFIX + name for name in video_backbone.FAMILIES]
    return sorted(name for name in names if fnmatch(name, pattern))


def create_model(name: str, *, modalities: tuple[str, ...] = ("rgb", "flow"), pretrained: bool = False, **overrides: Any) -> AFMIR:
    """Makes a model by name.

    Args:
        name: one of :func:`list_models`, ``timm:<name>``, or ``hf:`` and a model's id on the hub or folder.
        modalities: names of the modalities, in order.
        pretrained: start the backbones from published weights (downloaded on first use).
        **overrides: any argument of :class:`~amd_fast.models.afmir.AFMIR`; None leaves the model's own value.

    Raises:
        ConfigError: unknown name or argument value.
        WeightsError: the pretrained weights cannot be had.
    """
    return AFMIR(tuple(modalities), pretrained=pretrained, **model_arguments(name, overrides))


def model_arguments(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of :class:`~amd_fast.models.afmir.AFMIR` that a name stands for, ``overrides`` other than None in their place.

    Raises:
        ConfigError: unknown name.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if name.startswith((timm_backbone.PREFIX, video_backbone.PREFIX)):
        return {"backbone": name, **_BORROWED, **given}
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=1)
        raise ConfigError(f"unknown model {name!r}{f'; did you mean {near[0]!r}?' if near else ''} Known: {', '.join(list_models())}")
    return _MODELS[name] | given
