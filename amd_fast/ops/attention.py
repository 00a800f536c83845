"""The op ``amd_fast::cross_modal_attention``: its contract towards PyTorch (schema, fake, autograd) and its public function.

The operation is defined in ``kernels/cross_modal_attention/reference.py``. The op is opaque to the compiler: one node in the
graph under ``torch.compile(fullgraph=True)``, in ``torch.export`` and in AOTInductor. The implementation is chosen inside the
op, and the Triton one imported only when it runs.

Where the reference runs, the op stands back: plain autograd keeps the reference's copies and softmax for the backward pass, and was
measured two to three times faster there than the closed form, which makes them again; and a compiler for the CPU fuses what it sees.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amd_fast.kernels.cross_modal_attention import config as configurations
from amd_fast.kernels.cross_modal_attention import reference, sdpa
from amd_fast.ops.dispatch import Choice, argument_error, inlines, interpreting, prepare_interpreter, select, shape_text

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NAME = "cross_modal_attention"
# Elements of a head's keys (tokens times width) where torch's fused attention, forward and backward together, was measured faster
# on the CPU than the reference and its autograd. Without gradients it was the faster one everywhere.
_LARGE = range(1 << 11, 1 << 16)

_library = torch.library.Library("amd_fast", "FRAGMENT")
_library.define(
    "cross_modal_attention(Tensor query, Tensor key, Tensor value, Tensor? log_weight, float? scale, str impl) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "cross_modal_attention_backward(Tensor grad_output, Tensor? grad_log_evidence, Tensor query, Tensor key, Tensor value, "
    "Tensor? log_weight, Tensor output, Tensor log_evidence, float? scale, str impl, bool log_weight_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def cross_modal_attention(
    query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None = None, *, scale: float | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention of R queries over a weighted set of N tokens, with the evidence of each read-out.

    ``softmax_n(scale <query, key[n]> + log_weight[n])`` weighs ``value``; the evidence is the logarithm of the softmax's
    denominator. The order of the tokens has no influence. A token with log-weight -inf has none either and gets exactly zero
    gradient, provided it holds finite numbers; a query that sees no token gives output 0 and evidence -inf.

    Differentiable in query, key, value and log_weight, also through the evidence; once, or any number of times where the reference
    runs. Sums are taken in float32 (float64 for
    float64 inputs). Works under ``torch.compile(fullgraph=True)`` and ``torch.export``.

    Args:
        query: ``[B, R, H, d]``; float16, bfloat16, float32 or float64; any strides.
        key: ``[B, N, H, d]``, same dtype and device.
        value: ``[B, N, H, d]``, same dtype and device.
        log_weight: ``[B, N]``, or broadcastable to ``[B, R, N]`` (two dimensions always mean ``[B, N]``), any floating dtype.
            None means zeros.
        scale: Factor of the inner product, ``1 / sqrt(d)`` by default.
        impl: ``"auto"``, ``"triton"`` or ``"reference"``, see :func:`amd_fast.explain`.

    Returns:
        Output ``[B, R, H, d]`` in the dtype of ``query``, and log-evidence ``[B, R, H]`` in float32 (float64 for float64).

    Raises:
        ArgumentError: (a ValueError) wrong rank, sizes, dtype or device; the message names the argument and the remedy.
        ImplementationError: ``impl="triton"`` and the kernel cannot run here.
    """
    _check(query, key, value)
    if log_weight is not None:
        log_weight = _per_row(log_weight, query, key)
    module = _without_the_op(query, key, value, log_weight, impl)
    if module is not None:
        return _plainly(module, query, key, value, log_weight, scale)
    output, log_evidence = _Attention.apply(query, key, value, log_weight, scale, impl)
    return output, log_evidence


def _without_the_op(query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None, impl: str) -> ModuleType | None:
    """What runs as it is, without an op and gradients of our own, None where those are needed."""
    if torch.compiler.is_compiling():
        return reference if inlines(query.device, impl) else None
    chosen = choose(query, key, value, log_weight, impl=impl).implementation
    if chosen == "sdpa":
        return None if _trains(query, key, value, log_weight) else sdpa
    return reference if chosen == "reference" else None


def _plainly(
    module: ModuleType, query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    # Autocast would take the products in half precision; the op's sums are float32 by contract.
    with torch.autocast(query.device.type, enabled=False):
        output, log_evidence = module.cross_modal_attention(query, key, value, log_weight, scale)
    return output, log_evidence


def _trains(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_weight: Tensor | None = None,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Choice:
    """The implementation that a call with these arguments runs, and why. Looks at devices, dtypes, sizes and who wants gradients."""
    return select(_NAME, impl, query.device, obstacle=_obstacle(query), library=_library_is_faster(query, key, value, log_weight))


def usually(device: torch.device, impl: str = "auto") -> Choice:
    """The implementation that most calls on this device run, and why."""
    return select(_NAME, impl, device, library=f"{_FUSED} where no gradient is wanted" if device.type == "cpu" else None)


_FUSED = "torch's own fused attention was measured fastest on the CPU"


def _library_is_faster(query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None) -> str | None:
    if not sdpa.serves(query, key):
        return None
    if not _trains(query, key, value, log_weight):
        return f"{_FUSED} where no gradient is wanted"
    # It has no gradient with respect to the log-weights.
    if key.shape[1] * key.shape[3] in _LARGE and not (log_weight is not None and log_weight.requires_grad):
        return f"{_FUSED} where the keys of a head are {_LARGE.start} to {_LARGE.stop - 1} numbers"
    return None


def _obstacle(query: Tensor) -> str | None:
    """Why the kernel cannot take these arguments, None where it can."""
    if query.dtype == torch.float64 and not interpreting():
        return "the kernel takes float64 in Triton's interpreter only, for checking; GPUs are served in float16, bfloat16 and float32"
    if query.dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter computes bfloat16 wrongly; check in float16, float32 or float64"
    return configurations.obstacle(query.shape[3])


@functools.cache
def _triton_kernels() -> ModuleType:
    if interpreting():
        prepare_interpreter()
    return importlib.import_module("amd_fast.kernels.cross_modal_attention.triton")


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor, length in (("query", query, "R"), ("key", key, "N"), ("value", value, "N")):
        if tensor.dim() != 4:
            raise argument_error(
                name,
                f"{tensor.dim()} dimensions {shape_text(tensor)}",
                f"4 dimensions [B, {length}, H, d]",
                "split the feature width into heads: x.unflatten(-1, (heads, -1))",
            )
        if tensor.dtype not in _DTYPES:
            raise argument_error(name, tensor.dtype, "float16, bfloat16, float32 or float64", f"convert it: {name}.float()")
        if tensor.dtype != query.dtype:
            raise argument_error(name, tensor.dtype, f"{query.dtype} as in query", f"convert it: {name}.to(query.dtype)")
        if tensor.device != query.device:
            raise argument_error(name, f"device {tensor.device}", f"{query.device} as in query", f"move it: {name}.to(query.device)")
    batch, _, heads, width = query.shape
    if width == 0:
        raise argument_error("query", f"head width 0 in {shape_text(query)}", "at least 1", "check the number of heads")
    if key.shape[0] != batch or key.shape[2] != heads or key.shape[3] != width:
        raise argument_error(
            "key", shape_text(key), f"[B={int(batch)}, N, H={int(heads)}, d={int(width)}] as in query", "give both the same batch and heads"
        )
    if value.shape != key.shape:
        raise argument_error("value", shape_text(value), f"{shape_text(key)} as in key", "give every token one key and one value")


def _per_row(log_weight: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Log-weights as ``[B, R or 1, N]``. The row dimension is not expanded: one weight for all rows is read, and summed, once."""
    batch, rows, tokens = query.shape[0], query.shape[1], key.shape[1]
    if not log_weight.dtype.is_floating_point:
        raise argument_error(
            "log_weight",
            log_weight.dtype,
            "a floating dtype",
            "turn a mask of the tokens to keep into log-weights: torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)",
        )
    if log_weight.device != query.device:
        raise argument_error("log_weight", f"device {log_weight.device}", f"{query.device} as in query", "move it to the query's device")
    given = log_weight
    if log_weight.dim() <= 2:
        log_weight = log_weight.unsqueeze(-2) if log_weight.dim() else log_weight.reshape(1, 1)
    if log_weight.dim() == 2:
        log_weight = log_weight.unsqueeze(0)
    fits = log_weight.dim() == 3 and all(
        have == 1 or have == want for have, want in zip(log_weight.shape, (batch, rows, tokens), strict=False)
    )
    if not fits:
        raise argument_error(
            "log_weight",
            shape_text(given),
            f"[B={int(batch)}, N={int(tokens)}], or broadcastable to [B={int(batch)}, R={int(rows)}, N={int(tokens)}]",
            "give one log-weight per token, or add a leading dimension to weights [R, N]: log_weight[None]",
        )
    return log_weight.expand(batch, log_weight.shape[1], tokens)


class _Attention(torch.autograd.Function):
    """Ties the two ops together for autograd. Saves inputs and results, nothing of size R x N."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None, scale: float | None, impl: str
    ) -> tuple[Tensor, Tensor]:
        output, log_evidence = _forward_op(query, key, value, log_weight, scale, impl)
        ctx.save_for_backward(query, key, value, log_weight, output, log_evidence)
        ctx.scale, ctx.impl = scale, impl
        ctx.set_materialize_grads(False)
        return output, log_evidence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_log_evidence: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, log_weight, output, log_evidence = ctx.saved_tensors
        if grad_output is None and grad_log_evidence is None:
            return (None,) * 6
        weighted = log_weight is not None and ctx.needs_input_grad[3]
        # Incoming gradients may be expanded (stride 0 after .sum()); a kernel reads them as they would be stored.
        grads = _backward_op(
            query.new_zeros(query.shape) if grad_output is None else grad_output.contiguous(),
            None if grad_log_evidence is None else grad_log_evidence.contiguous(),
            query,
            key,
            value,
            log_weight,
            output,
            log_evidence,
            ctx.scale,
            ctx.impl,
            weighted,
        )
        return grads[0], grads[1], grads[2], grads[3] if weighted else None, None, None


def _forward(query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None, scale: float | None, impl: str) -> tuple[Tensor, Tensor]:
    chosen = choose(query, key, value, log_weight, impl=impl).implementation
    if chosen == "triton":
        output, log_evidence = _triton_kernels().cross_modal_attention(query, key, value, log_weight, scale)
        return output, log_evidence
    return _plainly(sdpa if chosen == "sdpa" else reference, query, key, value, log_weight, scale)


def _forward_fake(
    query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None, scale: float | None, impl: str
) -> tuple[Tensor, Tensor]:
    evidence_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=evidence_dtype)


def _backward(
    grad_output: Tensor,
    grad_log_evidence: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_weight: Tensor | None,
    output: Tensor,
    log_evidence: Tensor,
    scale: float | None,
    impl: str,
    log_weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = choose(query, key, value, log_weight, impl=impl).implementation
    if chosen == "sdpa" and grad_log_evidence is None and not log_weight_gradient:
        grads = sdpa.cross_modal_attention_backward(grad_output, query, key, value, log_weight, output, log_evidence, scale)
        return *grads, query.new_empty(0)
    grad_evidence = torch.zeros_like(log_evidence) if grad_log_evidence is None else grad_log_evidence
    inputs = (grad_output, grad_evidence, query, key, value, log_weight)
    if chosen == "triton":
        grads = _triton_kernels().cross_modal_attention_backward(*inputs, output, log_evidence, scale, log_weight_gradient)
    else:
        with torch.autocast(query.device.type, enabled=False):
            grads = reference.cross_modal_attention_backward(*inputs, log_evidence, scale)
    return grads[0], grads[1], grads[2], grads[3] if log_weight_gradient and grads[3] is not None else query.new_empty(0)


def _backward_fake(
    grad_output: Tensor,
    grad_log_evidence: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_weight: Tensor | None,
    output: Tensor,
    log_evidence: Tensor,
    scale: float | None,
    impl: str,
    log_weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weighted = log_weight.new_empty(log_weight.shape) if log_weight_gradient and log_weight is not None else query.new_empty(0)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), weighted


_library.impl("cross_modal_attention", _forward, "CompositeExplicitAutograd")
_library.impl("cross_modal_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("amd_fast::cross_modal_attention", _forward_fake, lib=_library)
torch.library.register_fake("amd_fast::cross_modal_attention_backward", _backward_fake, lib=_library)
_forward_op = torch.ops.amd_fast.cross_modal_attention.default
_backward_op = torch.ops.amd_fast.cross_modal_attention_backward.default
