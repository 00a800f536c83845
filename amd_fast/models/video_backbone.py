"""Video backbones of Hugging Face's transformers, VideoMAE and TimeSformer: whole clips in, one token per frame out.

``hf:<model id>`` or ``hf:<folder>`` takes the configuration (and, pretrained, the weights) from there; ``hf:videomae`` and
``hf:timesformer`` take the library's own configuration, changed by ``backbone_options``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amd_fast.errors import ConfigError, DataError, WeightsError
from amd_fast.models.inflation import IMAGENET_MEAN, IMAGENET_STD, adapt_first_convolution, module_for, normalisation

PREFIX = "hf:"


class Family(NamedTuple):
    """What differs between the networks.

    Attributes:
        mean, std: taken out of colours in the published networks' training.
        first: name of the first convolution.
        frame_tokens: ``last_hidden_state, T, tubelet -> [B, T, D]``.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    first: str
    frame_tokens: Callable[[Tensor, int, int], Tensor]


def _tubelets(hidden: Tensor, frames: int, tubelet: int) -> Tensor:
    """VideoMAE: tokens lie step by step. The frames of a tubelet share its token."""
    return hidden.unflatten(1, (frames // tubelet, -1)).mean(2).repeat_interleave(tubelet, 1)


def _patches_first(hidden: Tensor, frames: int, tubelet: int) -> Tensor:
    """TimeSformer: a class token, then the frames of the first patch, of the second, ..."""
    return hidden[:, 1:].unflatten(1, (-1, frames)).mean(1)


FAMILIES = {
    "videomae": Family(IMAGENET_MEAN, IMAGENET_STD, "embeddings.patch_embeddings.projection", _tubelets),
    "timesformer": Family((0.45, 0.45, 0.45), (0.225, 0.225, 0.225), "embeddings.patch_embeddings.projection", _patches_first),
}
"""By the configuration's ``model_type``."""
_GIVEN = ("num_channels", "image_size", "num_frames")  # by the clips, so no options
_BOOKKEEPING = ("transformers_version", "model_type", "architectures", "dtype", "torch_dtype", "_name_or_path", "id2label", "label2id")


class VideoBackbone(nn.Module):
    """A video network of transformers; a frame's token is the mean of its patches' tokens after the last layer.

    The network is made for clips of ``frames`` frames and ``size`` pixels: pretrained position embeddings that are learned are
    interpolated, and the first convolution is made for other channels by :func:`~amd_fast.models.inflation.adapt_first_convolution`.

    Args:
        source: id on the hub, local folder, or a key of ``FAMILIES``.
        channels: input channels.
        pretrained: load the weights of ``source`` (safetensors only; downloaded on first use).
        size: side of the images, pixels; a multiple of the patches'.
        frames: T, a multiple of the tubelet's length (VideoMAE: 2 by default).
        **options: fields of the configuration, in place of those that ``source`` has.

    Raises:
        ConfigError: transformers is not installed, a network of another kind, an unknown option, or sizes that do not fit.
        WeightsError: configuration or weights cannot be had.
    """

    takes_clips = True

    def __init__(self, source: str, channels: int, *, pretrained: bool = False, size: int = 224, frames: int = 8, **options: Any) -> None:
        super().__init__()
        transformers = module_for("transformers", PREFIX)
        config = _configuration(transformers, source, options)
        config.num_channels, config.image_size, config.num_frames = channels, size, frames
        _check_sizes(source, config)
        self.source, self.size, self.frames, self.width = source, size, frames, int(config.hidden_size)
        self._family, self._tubelet = FAMILIES[config.model_type], int(getattr(config, "tubelet_size", 1))
        self.network = transformers.AutoModel.from_config(config)
        self.normalise = normalisation(self._family.mean, self._family.std) if channels == 3 else nn.Identity()
        if pretrained:
            self.network.load_state_dict(_pretrained(transformers, source, options, self.network, self._family))

    @property
    def recipe(self) -> dict[str, Any]:
        """``backbone`` and ``backbone_options`` that make the same network again, without its weights and without asking the hub."""
        config = self.network.config
        kept = {key: value for key, value in config.to_diff_dict().items() if key not in (*_GIVEN, *_BOOKKEEPING)}
        return {"backbone": PREFIX + config.model_type, "backbone_options": kept}

    def forward(self, clips: Tensor) -> Tensor:
        """``[B, frames, channels, size, size] -> [B, frames, width]``.

        Raises:
            DataError: clips of another length or size than the network is made for.
        """
        if clips.shape[1] != self.frames or tuple(clips.shape[-2:]) != (self.size, self.size):
            raise DataError(
                f"{PREFIX}{self.source} was made for {self.frames} frames of {self.size} x {self.size}, got {clips.shape[1]} of "
                f"{clips.shape[-2]} x {clips.shape[-1]}; read clips like that, or make the model with frames=... and size=..."
            )
        hidden = self.network(pixel_values=self.normalise(clips)).last_hidden_state
        return self._family.frame_tokens(hidden, self.frames, self._tubelet)


def _configuration(transformers: Any, source: str, options: dict[str, Any]) -> Any:
    if given := sorted(set(options) & set(_GIVEN)):
        raise ConfigError(f"{PREFIX}{source}: {', '.join(given)} follow from the model's channels, size and frames; leave them out")
    if source in FAMILIES:
        config = transformers.AutoConfig.for_model(source)
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(source)
        except Exception as error:  # the hub's client has a dozen kinds for "no network" and "no such model"
            raise WeightsError(f"the configuration of {PREFIX}{source} cannot be had ({_short(error)}); {_remedy()}") from error
    if config.model_type not in FAMILIES:
        raise ConfigError(f"{PREFIX}{source} is a {config.model_type!r}; video networks known here: {', '.join(FAMILIES)}")
    if unknown := sorted(set(options) - set(config.to_dict())):
        raise ConfigError(f"{PREFIX}{source}: a {config.model_type} has no options {unknown}; it has {', '.join(sorted(config.to_dict()))}")
    config.update(options)
    return config


def _check_sizes(source: str, config: Any) -> None:
    patch, tubelet = int(config.patch_size), int(getattr(config, "tubelet_size", 1))
    if config.image_size % patch:
        near = max(patch, config.image_size // patch * patch)
        raise ConfigError(
            f"{PREFIX}{source} cuts images into patches of {patch} pixels, which do not fill {config.image_size}; choose a size such as "
            f"{near} or {near + patch} (data.size in training, size in create_model)"
        )
    if config.num_frames % tubelet:
        raise ConfigError(
            f"{PREFIX}{source} reads {tubelet} frames at a time, which do not fill {config.num_frames}; choose frames={tubelet} or a "
            "multiple (data.frames in training, frames in create_model)"
        )
    if getattr(config, "attention_type", "") == "space_only":
        raise ConfigError(f"{PREFIX}{source}: attention_type='space_only' is a network for images; use timm: for these")


def _pretrained(transformers: Any, source: str, options: dict[str, Any], network: nn.Module, family: Family) -> dict[str, Tensor]:
    """The weights of ``source``, made to fit the network: channels of the first convolution, learned positions in time and space."""
    if source in FAMILIES:
        raise WeightsError(f"{PREFIX}{source} is a configuration without weights; name a model such as hf:MCG-NJU/videomae-base")
    # torch lists the functions that obey `with torch.device(...)` when it first needs them. transformers puts another function in the
    # place of torch.linspace while it loads a model; a list made just then would hold that one, and linspace obey no more.
    with torch.device("cpu"):
        torch.empty(0)
    try:
        loaded = transformers.AutoModel.from_pretrained(source, use_safetensors=True, **options)
    except Exception as error:  # as above
        raise WeightsError(f"the weights of {PREFIX}{source} cannot be had ({_short(error)}); {_remedy()}") from error
    state: dict[str, Tensor] = loaded.state_dict()
    wanted = network.state_dict()
    first = f"{family.first}.weight"
    state[first] = adapt_first_convolution(state[first], wanted[first].shape[1])
    time, place = "embeddings.time_embeddings", "embeddings.position_embeddings"
    if time in state:
        state[time] = F.interpolate(state[time].mT, size=wanted[time].shape[1], mode="linear").mT
    if place in state and state[place].shape != wanted[place].shape:
        state[place] = _stretched(state[place], wanted[place].shape[1])
    return state


def _stretched(embeddings: Tensor, count: int) -> Tensor:
    """Position embeddings ``[1, 1 + n^2, D]`` of a square of patches and a class token, for another square: bicubic."""
    token, grid = embeddings[:, :1], embeddings[:, 1:]
    before, after = (round((length - 1) ** 0.5) for length in (embeddings.shape[1], count))
    picture = grid.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    resized = F.interpolate(picture, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([token, resized.flatten(2).mT], 1)


def _short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _remedy() -> str:
    return (
        "with a network, check the name; without one, give a local folder with config.json and model.safetensors, or copy the cache of a "
        "machine that has them (HF_HOME, by default ~/.cache/huggingface)"
    )
