"""The check before the clock: how far a step's loss and gradient may be from those of the float32 peer.

A computation at a precision with unit roundoff u rounds every layer's weights and results by a share of u. What that does to this loss
and this gradient is measured, not guessed: the peer runs again with every weight and every pixel changed by the share u, up or down at
random, and the largest change seen counts. A layer rounds more than once (its input, its result, its normalisation, the sum with the
shortcut), and half of that again on the way back, hence ``MARGIN``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from amd_fast.training.batches import TrainBatch
from amd_fast.training.objective import Objective

from .contenders import Outcome, Peer, outcome

MARGIN = 4.0
_DRAWS = 3


class WrongStepError(Exception):
    """A step is further from the peer's than its precision explains."""


def unit_roundoff(precision: torch.dtype | None, device: torch.device) -> float:
    """Of mixed precision, or of float32; on a GPU PyTorch computes its convolutions in TensorFloat-32 (11 bits) unless told otherwise."""
    if precision is not None:
        return torch.finfo(precision).eps / 2
    return 2.0**-11 if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else torch.finfo(torch.float32).eps / 2


def allowed_error(peer: Peer, batch: TrainBatch, unit: float) -> Outcome:
    """The largest allowed differences of loss and gradient norm; leaves the peer's weights as they are."""

    def run(part: TrainBatch) -> Outcome:
        return outcome(lambda clips: peer.gradients(clips, float("inf")), part, peer.device)

    exact = run(batch)
    changes = [Outcome(unit * abs(exact.loss), unit * exact.gradient_norm)]
    for draw in range(_DRAWS):
        generator = torch.Generator(peer.device).manual_seed(draw)
        with _changed(peer.objective, unit, generator):
            clips = {name: _shaken(clip, unit, generator) for name, clip in batch.clips.items()}
            found = run(dataclasses.replace(batch, clips=clips))
        changes.append(Outcome(abs(found.loss - exact.loss), abs(found.gradient_norm - exact.gradient_norm)))
    return Outcome(*(MARGIN * max(change) for change in zip(*changes, strict=True)))


def check(found: Outcome, expected: Outcome, allowed: Outcome) -> None:
    """Raises where a step is not what it should be.

    Raises:
        WrongStepError: says what differs, and by how much.
    """
    for name, value, right, most in zip(Outcome._fields, found, expected, allowed, strict=True):
        if not abs(value - right) <= most:
            raise WrongStepError(f"its {name.replace('_', ' ')} is {value:.7g}, the peer's {right:.7g}; {most:.2g} apart is allowed")


@contextmanager
def _changed(objective: Objective, unit: float, generator: torch.Generator) -> Iterator[None]:
    kept = [parameter.detach().clone() for parameter in objective.parameters()]
    try:
        with torch.no_grad():
            for parameter in objective.parameters():
                parameter.copy_(_shaken(parameter, unit, generator))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(objective.parameters(), kept, strict=True):
                parameter.copy_(value)


def _shaken(values: torch.Tensor, unit: float, generator: torch.Generator) -> torch.Tensor:
    """Every number changed by the share ``unit``, up or down."""
    up = torch.randint(0, 2, values.shape, generator=generator, device=values.device, dtype=torch.int8)
    return values * (1 + unit * (2 * up - 1))
