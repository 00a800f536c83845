"""What is done to the network before it trains: batch normalisation, per-block compilation, activation checkpointing, sharding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from amd_fast.errors import ConfigError

BatchNorm = Literal["per_rank", "sync", "frozen"]


def blocks_of(backbone: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a backbone (residual blocks, transformer layers), outermost first; the backbone itself where it has none.

    A block is a member of a container all of whose members are of one class and have parts of their own.
    """
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        members = list(module.children())
        repeated = isinstance(module, (nn.Sequential, nn.ModuleList)) and len({type(member) for member in members}) == 1
        if repeated and all(any(True for _ in member.children()) for member in members):
            found.extend(members)
        else:
            for member in members:
                look(member)

    look(backbone)
    return found or [backbone]


def normalise_batches(module: nn.Module, how: BatchNorm, device: torch.device, world_size: int) -> nn.Module:
    """Applies ``TrainConfig.batch_norm`` when the network is made; see :func:`set_training` for what ``frozen`` does later.

    Raises:
        ConfigError: statistics cannot be synchronised on this device.
    """
    if how != "sync":
        return module
    if device.type != "cuda":
        raise ConfigError(f"batch_norm=sync needs GPUs (this run is on {device.type}); use batch_norm=per_rank or frozen")
    return nn.SyncBatchNorm.convert_sync_batchnorm(module) if world_size > 1 else module


def set_training(module: nn.Module, how: BatchNorm) -> None:
    """Training mode; frozen batch normalisation keeps its running statistics and normalises with them (its weights are trained)."""
    module.train()
    if how == "frozen":
        for part in module.modules():
            if isinstance(part, _BatchNorm):
                part.eval()


@contextmanager
def _statistics_left_alone(block: nn.Module) -> Iterator[None]:
    """The same computation once more, without counting the batch twice in the running statistics."""
    parts = [part for part in block.modules() if isinstance(part, _BatchNorm) and part.training]
    before = [(buffer, buffer.clone()) for part in parts for buffer in part.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)  # .data: autograd holds these buffers too, and only their values are put back


def prepare_blocks(backbone: nn.Module, *, compiled: bool, checkpointed: bool) -> None:
    """Compiles every block, and has its activations computed again in the backward pass instead of kept, in place.

    Parameters keep their names. Blocks of one class share one compiled graph per shape; they run compiled in training alone, where
    shapes never change.
    """
    for block in blocks_of(backbone):
        forward: Any = block.forward
        if compiled:
            forward = partial(_compiled, _compile(forward), forward, block)
        if checkpointed:
            forward = partial(_checkpointed, forward, block)
        block.forward = forward


def _compile(forward: Any) -> Any:
    # A residual network has more kinds of blocks than one function is compiled for by default.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(forward, fullgraph=True, dynamic=False)


def _compiled(compiled: Any, forward: Any, block: nn.Module, *inputs: Any, **named: Any) -> Any:
    return (compiled if block.training else forward)(*inputs, **named)


def _checkpointed(forward: Any, block: nn.Module, *inputs: Any, **named: Any) -> Any:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_left_alone(block)

    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **named)


def shard(objective: nn.Module, backbones: nn.ModuleDict) -> None:
    """Spreads parameters, gradients and optimiser state over the ranks (FSDP2): each block, each backbone, then what is left.

    Shards are cut from weights in plain order; images come in as channels last instead, so that convolutions still run in that layout.
    """
    objective.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, unused-ignore]  # newer torch has the overload
    for backbone in backbones.values():
        backbone.register_forward_pre_hook(_channels_last)
        for block in blocks_of(backbone):
            if block is not backbone:
                fully_shard(block)
        fully_shard(backbone)
    fully_shard(objective)


def _channels_last(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images for images in inputs)
