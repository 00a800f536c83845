"""What a launch has to know of the GPU that the tensors are on."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Gpu(NamedTuple):
    """Name and architecture as the driver gives them (``"NVIDIA H200"``, ``"sm_90"``), bytes of shared memory that a program can have.

    The compute capability is NVIDIA's; AMD's numbers mean something else.
    """

    name: str
    architecture: str
    shared_memory: int
    capability: tuple[int, int] = (0, 0)


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Properties of a device never change: asked once, and without waiting for the device. The interpreter's CPU has no limits."""
    if device.type != "cuda":
        return Gpu("default", "any", 1 << 30)
    properties: Any = torch.cuda.get_device_properties(device)  # torch describes fewer attributes than there are
    architecture = getattr(properties, "gcnArchName", "").split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 1 << 16)
    return Gpu(properties.name, architecture, shared_memory, (properties.major, properties.minor))


_HERE = contextlib.nullcontext()


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)
