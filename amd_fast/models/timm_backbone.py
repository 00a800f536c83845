"""Image backbones of timm: ``timm:<name>``, for example ``timm:vit_base_patch16_clip_224`` or ``timm:resnet18``."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor, nn

from amd_fast.errors import ConfigError, DataError, WeightsError
from amd_fast.models.inflation import adapt_first_convolution, module_for, normalisation

PREFIX = "timm:"


def _timm() -> Any:
    return module_for("timm", PREFIX)


def list_timm() -> list[str]:
    """Names of timm's networks as backbones, ``timm:...``, sorted.

    Raises:
        ConfigError: timm is not installed.
    """
    return [PREFIX + name for name in sorted(_timm().list_models())]


class TimmBackbone(nn.Module):
    """One network of timm without its classifier: the pooled features are the token of a frame.

    Where timm's network is made for one size of image, it is made for ``size``; pretrained position embeddings are then interpolated by
    timm. Colours are normalised as in the training of the published weights. The first convolution is made for other channels, if
    pretrained by :func:`~amd_fast.models.inflation.adapt_first_convolution`.

    Args:
        name: timm's name, without the prefix.
        channels: input channels.
        pretrained: load the published weights (downloaded on first use).
        size: side of the images, pixels.
        **options: passed on to ``timm.create_model``, e.g. ``drop_path_rate``.

    Raises:
        ConfigError: timm is not installed, does not know the name or an option, or has no such network for this size.
        WeightsError: the weights cannot be had.
    """

    def __init__(self, name: str, channels: int, *, pretrained: bool = False, size: int = 224, **options: Any) -> None:
        super().__init__()
        _check_name(name)
        self.name, self.size = name, size
        self.network = _network(name, channels, size, options)
        patch = _patch_of(self.network)
        if any(size % side for side in patch):
            near = max(patch[0], size // patch[0] * patch[0])
            raise ConfigError(
                f"{PREFIX}{name} cuts images into patches of {patch[0]} pixels, which do not fill {size}; choose a size such as {near} or "
                f"{near + patch[0]} (data.size in training, size in create_model)"
            )
        self.width = int(getattr(self.network, "head_hidden_size", None) or self.network.num_features)
        cfg = self.network.pretrained_cfg
        self.normalise = normalisation(cfg.get("mean"), cfg.get("std")) if channels == 3 else nn.Identity()
        if pretrained:
            self.network.load_state_dict(_pretrained(name, channels, size, options))
        self._fixed = _is_fixed(self.network)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, channels, size, size] -> [N, width]``.

        Raises:
            DataError: images of another size than the network is made for.
        """
        if self._fixed and tuple(images.shape[-2:]) != (self.size, self.size):
            raise DataError(
                f"{PREFIX}{self.name} was made for images of {self.size} x {self.size}, got {images.shape[-2]} x {images.shape[-1]}; "
                "read clips at that size, or make the model with size=..."
            )
        features: Tensor = self.network(self.normalise(images))
        return features


def _check_name(name: str) -> None:
    timm = _timm()
    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ConfigError(f"timm has no network {name!r}; {'near it: ' + ', '.join(near) if near else 'timm.list_models() names them'}")


def _network(name: str, channels: int, size: int, options: dict[str, Any]) -> Any:
    timm = _timm()
    arguments = {"pretrained": False, "num_classes": 0, "in_chans": channels, **options}
    fixed = bool(getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False))
    try:
        if fixed and "img_size" not in options:
            return timm.create_model(name, **arguments, img_size=size)
        return timm.create_model(name, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(
            f"timm cannot make {name!r} for {channels} channels and images of {size} pixels with {options or 'no further options'}: {error}"
        ) from error


def _pretrained(name: str, channels: int, size: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """The published weights, the first convolution made for the channels. All others have the shapes of a network for this size."""
    timm = _timm()
    arguments: dict[str, Any] = {"pretrained": True, "num_classes": 0, **options}
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        arguments.setdefault("img_size", size)
    try:
        source = timm.create_model(name, **arguments)
    except Exception as error:  # timm, the hub's client and its transport have a dozen kinds for "no network" and "no such file"
        raise WeightsError(
            f"the weights of {PREFIX}{name} cannot be had ({error}). With a network, try again; without one, copy the cache of a machine "
            "that has them (HF_HOME, by default ~/.cache/huggingface), or pass pretrained=False."
        ) from error
    state: dict[str, Tensor] = source.state_dict()
    first = source.pretrained_cfg.get("first_conv")
    for layer in [first] if isinstance(first, str) else first or []:
        state[f"{layer}.weight"] = adapt_first_convolution(state[f"{layer}.weight"], channels)
    return state


def _patch_of(network: Any) -> tuple[int, int]:
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    return (int(patch[0]), int(patch[1])) if isinstance(patch, (tuple, list)) else (int(patch), int(patch))


def _is_fixed(network: Any) -> bool:
    return bool(network.pretrained_cfg.get("fixed_input_size"))
