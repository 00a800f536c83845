"""Frame backbones: images of one modality in, one token per frame out.

Every backbone maps ``[N, channels, height, width]`` to ``[N, width]`` and says its width in ``.width``.
The first convolution is made for the modality's own number of channels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from urllib.error import URLError

import torch
from torch import Tensor, nn

from amd_fast.errors import ConfigError, WeightsError

CHANNELS = {"rgb": 3, "flow": 2}
"""Channels of the modalities that are decoded from the video itself; any other modality has one unless told otherwise."""


def channels_of(modality: str) -> int:
    """Number of channels of a modality: 3 for rgb, 2 for flow, 1 for anything else (thermal, depth, ...)."""
    return CHANNELS.get(modality, 1)


class SmallBackbone(nn.Module):
    """Four strided convolutions, global average and maximum pooling: for small images and machines without a GPU.

    Args:
        channels: input channels.
        width: width of the token of a frame.
        base: channels of the first convolution; the others have 2, 4 and 4 times as many.
    """

    def __init__(self, channels: int, width: int = 128, base: int = 32) -> None:
        super().__init__()
        sizes = (channels, base, 2 * base, 4 * base, 4 * base)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.project = nn.Linear(2 * sizes[-1], width)
        self.width = width

    def forward(self, images: Tensor) -> Tensor:
        """``[N, channels, h, w] -> [N, width]``."""
        maps = self.features(images.contiguous(memory_format=torch.channels_last))
        return self.project(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1))


def adapt_first_convolution(weight: Tensor, channels: int) -> Tensor:
    """Weights of a convolution over 3 colours, made to take ``channels``: the colour mean, repeated and scaled by 3 / channels.

    The response to an input that is equal in all channels stays the same, so the statistics of later layers still fit.
    """
    if channels == weight.shape[1]:
        return weight
    return weight.mean(1, keepdim=True).repeat(1, channels, 1, 1) * (weight.shape[1] / channels)


def _resnet(name: str, channels: int, pretrained: bool) -> nn.Module:
    import torchvision

    weights = torchvision.models.get_model_weights(name)["DEFAULT"] if pretrained else None
    try:
        network = torchvision.models.get_model(name, weights=weights)
    except (URLError, OSError, RuntimeError) as error:
        raise WeightsError(
            f"the ImageNet weights of {name} could not be fetched ({error}). Without a network, download "
            f"{weights.url if weights else name} elsewhere and put it into {torch.hub.get_dir()}/checkpoints, or pass pretrained=False."
        ) from error
    width = int(network.fc.in_features)
    if channels != 3:
        old = network.conv1
        network.conv1 = nn.Conv2d(channels, old.out_channels, 7, stride=2, padding=3, bias=False)
        with torch.no_grad():
            network.conv1.weight.copy_(adapt_first_convolution(old.weight, channels))
    network.fc = nn.Identity()
    network.width = width
    return network


def _small(channels: int, pretrained: bool, **options: int) -> nn.Module:
    if pretrained:
        raise WeightsError("there are no published weights for the small backbone; pass pretrained=False or choose a resnet")
    return SmallBackbone(channels, **options)


BACKBONES: dict[str, Callable[..., nn.Module]] = {"small": _small}
for _name in ("resnet18", "resnet34", "resnet50"):
    BACKBONES[_name] = lambda channels, pretrained, _name=_name: _resnet(_name, channels, pretrained)


def create_backbone(name: str, channels: int, *, pretrained: bool = False, **options: int) -> nn.Module:
    """A backbone by name for images of ``channels`` channels.

    Raises:
        ConfigError: the name is unknown.
        WeightsError: ``pretrained`` was asked for and the weights cannot be had.
    """
    if name not in BACKBONES:
        raise ConfigError(f"unknown backbone {name!r}; choose one of {', '.join(BACKBONES)}")
    return BACKBONES[name](channels, pretrained, **options)
