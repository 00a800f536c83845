"""Launching every op once at the usual shapes, so that Triton's cache holds their kernels before the first training step.

Batches are tiny: how many videos or rows there are makes no other program.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from amd_fast import ops
from amd_fast.active_inference import GenerativeModel
from amd_fast.bench import load
from amd_fast.errors import ImplementationError

DTYPES = (torch.bfloat16, torch.float32)

_LAUNCHERS = {
    "cross_modal_attention": "amd_fast.kernels.cross_modal_attention.triton",
    "free_energy_loss": "amd_fast.kernels.free_energy.triton",
    "otam_alignment": "amd_fast.kernels.otam.triton",
}
# What an installation has in the place of the benchmarks' registry: two modalities and their joint view, and one modality.
_USUAL = {
    "cross_modal_attention": [
        SimpleNamespace(rows=rows, tokens=tokens, heads=heads, width=512 // heads)
        for rows, tokens in ((3, 16), (1, 8), (3, 64))
        for heads in (8, 4)
    ],
    "free_energy_loss": [
        SimpleNamespace(views=views, classes=classes, channels=2, bins=8) for views in (3, 4, 1) for classes in (5, 10, 20, 64)
    ],
}
_ALIGNMENTS = [SimpleNamespace(frames=frames) for frames in (8, 4, 16)]
_BATCH = 2
_EVIDENCE = ("certainty", "surprise", "agreement", "log_evidence")


class Warmed(NamedTuple):
    """How many calls, forward and backward, were made, and how many kernels Triton has at hand for them."""

    calls: int
    kernels: int


def warm(
    names: Iterable[str],
    device: torch.device,
    dtypes: Sequence[torch.dtype] = DTYPES,
    shapes: Mapping[str, Sequence[Any]] | None = None,
) -> Warmed:
    """Run the kernels of these ops forward and backward, once per shape and dtype.

    Args:
        names: Ops, of ``cross_modal_attention``, ``free_energy_loss`` and ``otam_alignment``.
        device: A GPU; a CPU in Triton's interpreter, which builds nothing.
        dtypes: Of features and logits; distances are float32.
        shapes: By op; by default those of the benchmarks' registry, or a few usual ones where there is no source tree.

    Raises:
        ImplementationError: The kernels cannot run on this device.
    """
    calls, names = 0, list(names)
    for name in names:
        for shape in usual_shapes(name) if shapes is None else shapes[name]:
            for results in _CALLS[name](shape, dtypes, device):
                (torch.stack([result.float().sum() for result in results]).sum()).backward()
                calls += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a kernel that fails does so here, not in someone's first step
    return Warmed(calls, sum(map(_at_hand, names)))


def usual_shapes(name: str) -> Sequence[Any]:
    """The shapes of the benchmarks' registry, or those of a few usual models where there is none."""
    if name == "otam_alignment":
        return _ALIGNMENTS
    try:
        shapes: Sequence[Any] = load("shapes").SHAPES[name]
    except ImplementationError:
        return _USUAL[name]
    return shapes


def _attention(shape: Any, dtypes: Sequence[torch.dtype], device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    for dtype in dtypes:
        query, key, value = (
            torch.zeros(_BATCH, length, shape.heads, shape.width, dtype=dtype, device=device, requires_grad=True)
            for length in (shape.rows, shape.tokens, shape.tokens)
        )
        for learned in (False, True):  # the model's log-weights say what is missing; others may be learned
            log_weight = torch.zeros(_BATCH, shape.rows, shape.tokens, device=device, requires_grad=learned)
            yield ops.cross_modal_attention(query, key, value, log_weight, impl="triton")


def _loss(shape: Any, dtypes: Sequence[torch.dtype], device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    model = GenerativeModel(shape.views, _EVIDENCE[: shape.channels], shape.bins).to(device)
    target, present = (
        torch.zeros(_BATCH, dtype=torch.int64, device=device),
        torch.ones(_BATCH, shape.views, dtype=torch.bool, device=device),
    )
    context = torch.zeros(_BATCH, shape.views, shape.channels - 1, device=device)
    for dtype in dtypes:
        logits = torch.zeros(_BATCH, shape.views, shape.classes, dtype=dtype, device=device, requires_grad=True)
        for temperature in (1.0, 2.0):
            terms = ops.free_energy_loss(
                logits, target, model, context_evidence=context, present=present, temperature=temperature, impl="triton"
            )
            yield (terms.total,)


def _alignment(shape: Any, dtypes: Sequence[torch.dtype], device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    distances = torch.zeros(_BATCH, shape.frames, shape.frames, device=device, requires_grad=True)
    for one in (distances, distances.mT):
        yield (ops.otam_alignment(one, impl="triton"),)


_CALLS = {"cross_modal_attention": _attention, "free_energy_loss": _loss, "otam_alignment": _alignment}


def _at_hand(name: str) -> int:
    """Programs of an op that this process has loaded, whether it compiled them or found them in the cache."""
    functions = vars(importlib.import_module(_LAUNCHERS[name])).values()
    return sum(len(caches[0]) for function in functions for caches in getattr(function, "device_caches", {}).values())
