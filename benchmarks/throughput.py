"""How many clips per second a stream of batches gives, without what was read ahead before the clock starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch


class Rate(NamedTuple):
    """Clips per second over a number of batches."""

    clips_per_second: float
    batches: int


def rate(
    batches: Iterator[Any], *, clips: int, at_once: int, seconds: float, device: torch.device, use: Callable[[Any], object] = id
) -> Rate:
    """Takes batches for ``seconds``, those that were being read at the start not counted.

    Args:
        batches: Endless.
        clips: Of a batch.
        at_once: Batches read at the same time: they arrive together, and are counted together.
        seconds: Least time to count for.
        device: Waited for at both ends.
        use: What is done with a batch; nothing where reading alone is measured.
    """

    def round_of_batches() -> float:
        for _ in range(at_once):
            use(next(batches))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    started = now = round_of_batches()
    count = 0
    while count == 0 or now - started < seconds:
        now = round_of_batches()
        count += at_once
    return Rate(count * clips / (now - started), count)
