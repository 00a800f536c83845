"""What borrowed networks share: first convolutions for other channels, colours as in their training, packages that may be missing."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amd_fast.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What is taken out of colours before a clip reaches a network (:mod:`amd_fast.data.views`)."""


def adapt_first_convolution(weight: Tensor, channels: int) -> Tensor:
    """Weights of a convolution over 3 colours, made to take ``channels``: the colour mean, repeated and scaled by 3 / channels.

    The response to an input that is equal in all channels stays the same, so the statistics of later layers still fit.

    Args:
        weight: ``[out, 3, *kernel]``, images or clips.
        channels: input channels of the result, ``[out, channels, *kernel]``.
    """
    if channels == weight.shape[1]:
        return weight
    return weight.mean(1, keepdim=True).repeat(1, channels, *[1] * (weight.dim() - 2)) * (weight.shape[1] / channels)


class Renormalise(nn.Module):
    """Colours with one mean and standard deviation taken out, made to have another one taken out. ``[..., 3, h, w]``."""

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        new_mean, new_std, old_mean, old_std = (
            torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std, IMAGENET_MEAN, IMAGENET_STD)
        )
        self.register_buffer("scale", (old_std / new_std).float())
        self.register_buffer("shift", ((old_mean - new_mean) / new_std).float())

    def forward(self, images: Tensor) -> Tensor:
        """``[..., 3, h, w] -> [..., 3, h, w]``."""
        return images * self.scale.to(images.dtype) + self.shift.to(images.dtype)


def normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> nn.Module:
    """From our clips' normalisation to the network's own; nothing to do where it says none or the same."""
    if mean is None or std is None or (tuple(mean), tuple(std)) == (IMAGENET_MEAN, IMAGENET_STD):
        return nn.Identity()
    return Renormalise(mean, std)


def module_for(package: str, what: str) -> Any:
    """Imports a package that is not among the requirements.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"{what} needs the package {package} ({error}): pip install 'amd_fast[adapters]'") from error
