"""The op ``amd_fast::otam_alignment``: its contract towards PyTorch (schema, fake, autograd) and its public function.

The operation is defined in ``kernels/otam/reference.py``. The op is opaque to the compiler, as the others are; the implementation is
chosen inside it. On a CPU ``auto`` takes the product form: the recursion without exponentials and logarithms.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amd_fast.kernels.otam import config as configurations
from amd_fast.kernels.otam import reference
from amd_fast.ops.dispatch import Choice, argument_error, interpreting, prepare_interpreter, select, shape_text

_NAME = "otam_alignment"
_PRODUCTS = "products"

_library = torch.library.Library("amd_fast", "FRAGMENT")
_library.define(
    "otam_alignment(Tensor distances, float smoothing, Tensor? query_frames, Tensor? support_frames, str impl) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "otam_alignment_backward(Tensor grad_cost, Tensor distances, float smoothing, Tensor? query_frames, Tensor? support_frames, str impl) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def otam_alignment(
    distances: Tensor,
    smoothing: float = 0.1,
    *,
    query_frames: Tensor | None = None,
    support_frames: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cost of aligning a query's frames with a support clip's, in order (OTAM, Cao et al., CVPR 2020).

    Every support frame is matched to one query frame, and later ones to the same or the next; the alignment begins and ends at any
    query frame. The minimum over all alignments is smoothed by ``smoothing``, so the cost of equal sequences lies below zero. One
    direction: the other is that of ``distances.mT``. Differentiable once, in the distances; sums are taken in float32 (float64 for
    float64 distances). Works under ``torch.compile(fullgraph=True)`` and ``torch.export``.

    Args:
        distances: ``[..., Tq, Ts]`` frame distances, any floating dtype, any strides; +inf forbids two frames to be matched.
        smoothing: lambda, positive, in the unit of the distances.
        query_frames, support_frames: ``[...]`` int64, how many leading frames of either side count; None: all. Where one is 0, so
            are cost and gradient.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``, see :func:`amd_fast.explain`.

    Returns:
        ``[...]`` float32 (float64 for float64 distances).

    Raises:
        ArgumentError: (a ValueError) wrong rank, sizes, dtype, device or range; the message names the argument and the remedy.
        ImplementationError: ``impl="triton"`` and the kernel cannot run here.
    """
    _check(distances, smoothing, query_frames, support_frames)
    lead = distances.shape[:-2]
    if distances.dtype not in (torch.float32, torch.float64):
        distances = distances.float()
    lengths = (None if frames is None else frames.expand(lead).reshape(-1) for frames in (query_frames, support_frames))
    cost: Tensor = _Alignment.apply(distances.reshape(-1, *distances.shape[-2:]), float(smoothing), *lengths, impl)
    return cost.reshape(lead)


def choose(distances: Tensor, smoothing: float = 0.1, *, impl: str = "auto", **_: Any) -> Choice:
    """The implementation that a call with these arguments runs, and why. Looks at devices, dtypes and sizes only."""
    return _on_cpu(select(_NAME, impl, distances.device, obstacle=_obstacle(distances)), distances.device, impl)


def usually(device: torch.device, impl: str = "auto") -> Choice:
    """The implementation that most calls on this device run, and why."""
    return _on_cpu(select(_NAME, impl, device), device, impl)


def _on_cpu(chosen: Choice, device: torch.device, impl: str) -> Choice:
    if impl == "auto" and device.type == "cpu":
        return Choice(
            _PRODUCTS, "on a CPU the recursion is faster in products than in logarithms (in these, where products would underflow)"
        )
    return chosen


def _obstacle(distances: Tensor) -> str | None:
    if distances.dtype == torch.float64 and not interpreting():
        return "the kernel takes float64 in Triton's interpreter only, for checking; GPUs are served in float32"
    return configurations.obstacle(*distances.shape[-2:])


@functools.cache
def _triton_kernels() -> ModuleType:
    if interpreting():
        prepare_interpreter()
    return importlib.import_module("amd_fast.kernels.otam.triton")


def _check(distances: Tensor, smoothing: float, query_frames: Tensor | None, support_frames: Tensor | None) -> None:
    if distances.dim() < 2 or 0 in distances.shape[-2:]:
        raise argument_error(
            "distances", f"shape {shape_text(distances)}", "[..., Tq, Ts] with at least one frame each", "compare the frames of two clips"
        )
    if not distances.dtype.is_floating_point:
        raise argument_error("distances", distances.dtype, "a floating dtype", "convert it: distances.float()")
    if not 0 < smoothing < math.inf:
        raise argument_error("smoothing", smoothing, "a positive number", "0.1 is usual for cosine distances")
    lead = distances.shape[:-2]
    for name, frames in (("query_frames", query_frames), ("support_frames", support_frames)):
        if frames is None:
            continue
        if frames.dtype != torch.int64 or frames.device != distances.device:
            raise argument_error(
                name, f"{frames.dtype} on {frames.device}", f"torch.int64 on {distances.device}", "convert it: frames.to(distances.device)"
            )
        fits = frames.dim() <= len(lead) and all(
            have == 1 or have == want for have, want in zip(reversed(frames.shape), reversed(lead), strict=False)
        )
        if not fits:
            raise argument_error(name, shape_text(frames), "a number for every pair, [...] as in distances", "add dimensions of size 1")


class _Alignment(torch.autograd.Function):
    """Ties the two ops together for autograd. Saves the inputs alone."""

    @staticmethod
    def forward(
        ctx: Any, distances: Tensor, smoothing: float, query_frames: Tensor | None, support_frames: Tensor | None, impl: str
    ) -> Tensor:
        ctx.save_for_backward(distances, query_frames, support_frames)
        ctx.smoothing, ctx.impl = smoothing, impl
        cost: Tensor = _forward_op(distances, smoothing, query_frames, support_frames, impl)
        return cost

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_cost: Tensor) -> tuple[Tensor | None, ...]:
        distances, query_frames, support_frames = ctx.saved_tensors
        # Incoming gradients may be expanded (stride 0 after .sum()); a kernel reads them as they would be stored.
        grad = _backward_op(grad_cost.contiguous(), distances, ctx.smoothing, query_frames, support_frames, ctx.impl)
        return grad, None, None, None, None


def _form(distances: Tensor, smoothing: float, impl: str) -> str:
    """The choice, after a look at the values where the product form is in question."""
    chosen = choose(distances, smoothing, impl=impl).implementation
    return "reference" if chosen == _PRODUCTS and not reference.fits_product_form(distances, smoothing) else chosen


def _forward(distances: Tensor, smoothing: float, query_frames: Tensor | None, support_frames: Tensor | None, impl: str) -> Tensor:
    arguments = (distances, smoothing, query_frames, support_frames)
    form = _form(distances, smoothing, impl)
    if form == "triton":
        cost: Tensor = _triton_kernels().otam_alignment(*arguments)
        return cost
    return (reference.otam_alignment_products if form == _PRODUCTS else reference.otam_alignment)(*arguments)


def _forward_fake(distances: Tensor, smoothing: float, query_frames: Tensor | None, support_frames: Tensor | None, impl: str) -> Tensor:
    return distances.new_empty(distances.shape[0])


def _backward(
    grad_cost: Tensor, distances: Tensor, smoothing: float, query_frames: Tensor | None, support_frames: Tensor | None, impl: str
) -> Tensor:
    arguments = (grad_cost, distances, smoothing, query_frames, support_frames)
    form = _form(distances, smoothing, impl)
    if form == "triton":
        grad: Tensor = _triton_kernels().otam_alignment_backward(*arguments)
        return grad
    function = reference.otam_alignment_products_backward if form == _PRODUCTS else reference.otam_alignment_backward
    return function(*arguments).contiguous()


def _backward_fake(
    grad_cost: Tensor, distances: Tensor, smoothing: float, query_frames: Tensor | None, support_frames: Tensor | None, impl: str
) -> Tensor:
    return distances.new_empty(distances.shape)


_library.impl("otam_alignment", _forward, "CompositeExplicitAutograd")
_library.impl("otam_alignment_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("amd_fast::otam_alignment", _forward_fake, lib=_library)
torch.library.register_fake("amd_fast::otam_alignment_backward", _backward_fake, lib=_library)
_forward_op = torch.ops.amd_fast.otam_alignment.default
_backward_op = torch.ops.amd_fast.otam_alignment_backward.default
