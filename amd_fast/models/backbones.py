"""Frame backbones: images of one modality in, one token per frame out.

Every backbone maps ``[N, channels, height, width]`` to ``[N, width]`` and says its width in ``.width``; one with ``takes_clips = True``
maps ``[B, T, channels, height, width]`` to ``[B, T, width]``. The first convolution is made for the modality's own number of channels.

Beside those of this module there are the image networks of timm, ``timm:<name>``, and video networks of Hugging Face's transformers,
``hf:<model id, folder, videomae or timesformer>``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from amd_fast.errors import ConfigError, WeightsError
from amd_fast.models import timm_backbone, video_backbone
from amd_fast.models.inflation import adapt_first_convolution

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


def _small(channels: int, pretrained: bool, **options: Any) -> nn.Module:
    if pretrained:
        raise WeightsError("there are no published weights for the small backbone; pass pretrained=False or choose a resnet")
    return SmallBackbone(channels, **options)


BACKBONES: dict[str, Callable[..., nn.Module]] = {"small": _small}
for _name in ("resnet18", "resnet34", "resnet50"):
    BACKBONES[_name] = lambda channels, pretrained, _name=_name: _resnet(_name, channels, pretrained)


def create_backbone(name: str, channels: int, *, pretrained: bool = False, size: int = 224, frames: int = 8, **options: Any) -> nn.Module:
    """A backbone by name for images of ``channels`` channels.

    Args:
        name: a key of ``BACKBONES``, ``timm:...`` or ``hf:...``.
        channels: input channels.
        pretrained: load published weights.
        size, frames: side of the images (pixels) and length of the clips, for networks that are made for one of these.
        **options: passed on to the backbone.

    Raises:
        ConfigError: the name or an option is unknown, or the network cannot take such clips.
        WeightsError: ``pretrained`` was asked for and the weights cannot be had.
    """
    if name.startswith(video_backbone.PREFIX):
        bare = name.removeprefix(video_backbone.PREFIX)
        return video_backbone.VideoBackbone(bare, channels, pretrained=pretrained, size=size, frames=frames, **options)
    network: nn.Module
    if name.startswith(timm_backbone.PREFIX):
        bare = name.removeprefix(timm_backbone.PREFIX)
        network = timm_backbone.TimmBackbone(bare, channels, pretrained=pretrained, size=size, **options)
    elif name in BACKBONES:
        network = BACKBONES[name](channels, pretrained, **options)
    else:
        raise ConfigError(f"unknown backbone {name!r}; choose one of {', '.join(BACKBONES)}, or timm:<name> or hf:<model id>")
    # The layout that convolutions on images are fastest in, on CPUs and GPUs.
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]  # newer torch has the overload


def frame_features(backbone: nn.Module, clips: Tensor) -> Tensor:
    """``[B, T, channels, h, w] -> [B, T, width]``, whichever form the backbone takes."""
    if getattr(backbone, "takes_clips", False):
        return backbone(clips)
    return backbone(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
