"""Where a loader's work on a device is queued: apart from the training step's, so that neither waits for the other."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class Lane:
    """A CUDA stream of its own on a CUDA device; nothing at all on the CPU.

    Kernels, copies and allocations between ``with lane.entered():`` and its end are queued there, in whatever thread. What was made
    there is used elsewhere only after :meth:`hand_over`.

    Args:
        device: "cuda" stands for the current one, from now on.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else torch.device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @property
    def gpu(self) -> int | None:
        """Index of the GPU; None on the CPU."""
        return self.device.index if self._stream is not None else None

    def entered(self) -> AbstractContextManager[object]:
        """Work goes here, and this is the thread's current device."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self) -> None:
        """Blocks this thread until what is queued here is done, and only that."""
        if self._stream is not None:
            self._stream.synchronize()

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """Lets the thread's current stream use tensors made here.

        That stream waits for what is queued here so far, and the thread does not. The tensors' memory is not given to anything else
        here until that stream is done with them.
        """
        if self._stream is None:
            return
        consumer = torch.cuda.current_stream(self.device)
        consumer.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(consumer)
