"""Weights: their hash, and taking them over."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from amd_fast.errors import CheckpointError


def weights_hash(weights: Mapping[str, Tensor], *, head: str = "") -> str:
    """SHA-256 (hex) of names, types, shapes and values, whatever their order, and of ``head`` before them."""
    digest = hashlib.sha256(head.encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def take_weights(model: nn.Module, weights: Mapping[str, Tensor], source: object) -> None:
    """Gives a model its weights and puts it into evaluation mode.

    Args:
        model: of the shape that the weights are described with.
        weights: all of them.
        source: where they come from, for the message.

    Raises:
        CheckpointError: they do not fit.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights of {source} do not fit the model described there: {error}") from error
    model.eval()
