"""GPU memory that a configuration takes, computed from tensor shapes: nothing is run, and no GPU is needed.

The backbones are run once on tensors without data, under the configuration's precision, and what autograd would keep for the backward
pass is added up, each storage once. Not counted: the CUDA context, workspaces of cuDNN and cuBLAS, what the allocator leaves unused, and
everything behind the backbones, which works on a few tokens per clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from amd_fast.models.registry import create_model
from amd_fast.training.blocks import blocks_of, set_training
from amd_fast.training.config import TrainConfig

_FLOAT = 4
"""Bytes of a float32, in which weights, gradients, moments and clips are kept at every precision."""


class Memory(NamedTuple):
    """Bytes on one GPU.

    Attributes:
        weights: parameters and buffers.
        gradients: of the trained parameters.
        moments: AdamW's two per trained parameter.
        clips: the pixels of a micro-batch.
        activations: kept for the backward pass of a micro-batch, and a block's once more where they are computed again. Of frozen
            backbones nothing is kept; what their largest block would keep is taken as the bound of what its forward pass needs.
    """

    weights: int
    gradients: int
    moments: int
    clips: int
    activations: int

    @property
    def total(self) -> int:
        """All of it together."""
        return sum(self)


def estimate(config: TrainConfig, *, processes: int = 1) -> Memory:
    """Memory of each of ``processes`` GPUs, which hold a whole model each (``parallel=ddp``).

    Raises:
        ConfigError: unknown model or backbone.
    """
    options, episode = config.model, config.episode
    episodes = max(episode.per_step // (processes * config.optimiser.accumulate), 1)
    images = episodes * episode.ways * (episode.shots + episode.queries) * config.data.frames
    overrides: dict[str, Any] = {"frames": config.data.frames, "size": config.data.size, **options.options}
    with torch.device("meta"):
        model = create_model(options.name, modalities=tuple(options.modalities), **overrides)
    set_training(model, config.batch_norm)
    found = []
    with FakeTensorMode():
        for name in options.modalities:
            pixels = torch.empty(images, model.channels[name], config.data.size, config.data.size)
            found.append(kept_for_backward(model.backbones[name], pixels, bf16=config.precision == "bf16"))
    model.backbones.requires_grad_(not options.freeze_backbones)
    trained = [value for value in model.parameters() if value.requires_grad]
    if options.freeze_backbones:
        activations = max(kept.largest for kept in found)
    elif config.checkpoint_activations:
        activations = sum(kept.between for kept in found) + max(kept.largest for kept in found)
    else:
        activations = sum(kept.everything for kept in found)
    return Memory(
        _bytes([*model.parameters(), *model.buffers()]),
        _bytes(trained),
        2 * _bytes(trained),
        images * sum(model.channels.values()) * config.data.size**2 * _FLOAT,
        activations,
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)


class Kept(NamedTuple):
    """Bytes that autograd keeps of a forward pass, weights and images left out.

    Attributes:
        everything: all of it.
        between: what is kept with activation checkpointing: the inputs of the blocks and what is used outside of them.
        largest: what the block that keeps most keeps.
    """

    everything: int
    between: int
    largest: int


def kept_for_backward(backbone: nn.Module, images: Tensor, *, bf16: bool) -> Kept:
    """What autograd keeps of a forward pass.

    Args:
        backbone: in the mode it is trained in, on any device, ``meta`` included.
        images: ``[N, channels, height, width]``, on the device to compute for; tensors of a ``FakeTensorMode`` need no memory.
        bf16: under mixed precision.
    """
    weights = {
        name: torch.empty(value.shape, dtype=value.dtype, device=images.device).requires_grad_(value.requires_grad)
        for name, value in [*backbone.named_parameters(), *backbone.named_buffers()]
    }
    own = {_storage(value)[0] for value in [*weights.values(), images]}
    kept: dict[int, dict[int, int]] = {}  # by block, -1 outside of all; storages by identity
    inputs: dict[int, int] = {}
    inside = [-1]

    def note(tensor: Tensor) -> Tensor:
        identity, size = _storage(tensor)
        if identity not in own:
            kept.setdefault(inside[0], {})[identity] = size
        return tensor

    precision: AbstractContextManager[Any] = torch.autocast(images.device.type, torch.bfloat16) if bf16 else nullcontext()
    with ExitStack() as stack:
        for context in (_watched_blocks(backbone, inside, inputs), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)):
            stack.enter_context(context)
        stack.enter_context(precision)
        output = torch.func.functional_call(backbone, weights, images)
    # The output is alive up to here: what autograd keeps goes with it, and identities are used again.
    assert output.requires_grad
    blocks = [sum(part.values()) for number, part in kept.items() if number >= 0]
    everything = {identity: size for part in kept.values() for identity, size in part.items()}
    return Kept(sum(everything.values()), sum((inputs | kept.get(-1, {})).values()), max(blocks, default=0))


@contextmanager
def _watched_blocks(backbone: nn.Module, inside: list[int], inputs: dict[int, int]) -> Iterator[None]:
    """While open, ``inside[0]`` is the number of the block that runs, and ``inputs`` fills with what blocks are given."""
    handles = []
    for number, block in enumerate(blocks_of(backbone)):

        def enter(module: nn.Module, given: tuple[Any, ...], number: int = number) -> None:
            inside[0] = number
            inputs.update(_storage(value) for value in given if isinstance(value, Tensor))

        def leave(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            inside[0] = -1

        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Identity and bytes of what holds a tensor's numbers."""
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()
