"""Cross-modal attention as Triton kernels: which kernels run a shape, and how they are launched.

The unit of work is a *pair*, one head of one video: R queries over N tokens. Pairs are tiny and very many. Four routes, chosen by
shape and direction alone (``config.py``):

``rows``
    All tokens of a pair lie in registers and the queries pass by one at a time, in float32 throughout (``rows.py``).
``set``
    One block of queries and one of tokens on the matrix units, a warp or two for each pair (``sets.py``).
``stream``
    The same block by block, for sets of any size (``stream.py``).
``tiles``
    What these do not take: gradients of many queries, wide heads in float32, the log-weights' gradient in large sets (``tiles.py``).

Every result is owned by one program, so nothing is added atomically and repeated runs agree bit for bit. The backward pass
recomputes the softmax from the evidence; it needs nothing of size R x N. The gradient of the log-weights
is written per head and summed by PyTorch: 4 bytes per token and head beside the d elements of key and value each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..common.gpu import gpu_of, on_device
from ..common.tables import ceil_div, power_of_two
from . import config as configurations
from .config import LaunchConfig, Shape
from .rows import rows_backward, rows_forward
from .sets import set_backward, set_forward
from .stream import stream_backward, stream_forward
from .tiles import tiles_backward_queries, tiles_backward_tokens, tiles_forward

_FORWARD = {"rows": rows_forward, "set": set_forward, "stream": stream_forward, "tiles": tiles_forward}


def cross_modal_attention(
    query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Forward pass; arguments and results as in the reference, ``log_weight`` as ``[B, R or 1, N]``.

    Returns:
        Output ``[B, R, H, d]`` and log-evidence ``[B, R, H]``, contiguous.
    """
    query, key, value = (_unit_stride(tensor) for tensor in (query, key, value))
    batch, rows, heads, _ = query.shape
    output = query.new_empty(query.shape)
    log_evidence = query.new_empty((batch, rows, heads), dtype=_accumulation(query)[0])
    if output.numel() == 0:
        return output, log_evidence
    shape = _shape(query, key, value)
    route = configurations.route(shape, "forward")
    launch = _config(f"{route}_forward", shape, query)
    grid = _grid(query, launch) if route == "rows" else _grid(query, launch, rows, launch.block_rows)
    arguments = (query, key, value, log_weight, output, log_evidence)
    with on_device(query):
        _FORWARD[route][grid](
            *arguments, *_numbers(query, key, value, log_weight, scale, route), WEIGHTED=log_weight is not None,
            **_constants(query, launch, route),
        )  # fmt: skip
    return output, log_evidence


def cross_modal_attention_backward(
    grad_output: Tensor,
    grad_log_evidence: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_weight: Tensor | None,
    output: Tensor,
    log_evidence: Tensor,
    scale: float | None = None,
    log_weight_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Backward pass; arguments and results as in the reference, ``log_weight`` as ``[B, R or 1, N]``, with the forward pass's output.

    ``grad_output``, ``grad_log_evidence`` and ``output`` must be contiguous. The gradient of ``log_weight`` is None where
    ``log_weight_gradient`` is False.
    """
    query, key, value = (_unit_stride(tensor) for tensor in (query, key, value))
    (batch, rows, heads, _), tokens = query.shape, key.shape[1]
    grad_query, grad_key, grad_value = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    weighted = log_weight is not None and log_weight_gradient
    per_row = weighted and log_weight is not None and log_weight.shape[1] == rows and rows != 1
    # A gradient that is not wanted is never written; something has to stand for its address.
    partial = log_evidence.new_empty((batch, rows if per_row else 1, heads, tokens)) if weighted else log_evidence
    if grad_key.numel() == 0 or grad_query.numel() == 0:
        for grad in (grad_query, grad_key, grad_value, *([partial] if weighted else [])):
            grad.zero_()
    else:
        grads = (grad_query, grad_key, grad_value, partial)
        saved = (grad_output, grad_log_evidence, query, key, value, log_weight, output, log_evidence)
        flags = {"WEIGHTED": log_weight is not None, "WEIGHT_GRAD": weighted, "PER_ROW": per_row}
        with on_device(query):
            _launch_backward(saved, grads, scale, flags)
    if not weighted or log_weight is None:
        return grad_query, grad_key, grad_value, None
    grad_weight = partial.squeeze(2) if heads == 1 else partial.sum(2)
    return grad_query, grad_key, grad_value, grad_weight.sum_to_size(log_weight.shape).to(log_weight.dtype)


def _launch_backward(saved: tuple[Any, ...], grads: tuple[Tensor, ...], scale: float | None, flags: dict[str, bool]) -> None:
    grad_output, grad_log_evidence, query, key, value, log_weight, _, log_evidence = saved
    shape = _shape(query, key, value)
    route = configurations.route(shape, "backward", flags["WEIGHT_GRAD"])
    numbers = _numbers(query, key, value, log_weight, scale, route)
    if route == "tiles":
        _launch_tiles_backward(saved, grads, shape, numbers, flags)
        return
    launch = _config(f"{route}_backward", shape, query)
    grid, constants = _grid(query, launch), _constants(query, launch, route)
    if route == "stream":
        stream_backward[grid](*saved, *grads[:3], *numbers, WEIGHTED=flags["WEIGHTED"], **constants)
    else:
        kernel = rows_backward if route == "rows" else set_backward
        inputs = (grad_output, grad_log_evidence, query, key, value, log_weight, log_evidence)
        kernel[grid](*inputs, *grads, *numbers, **flags, **constants)


def _launch_tiles_backward(
    saved: tuple[Any, ...], grads: tuple[Tensor, ...], shape: Shape, numbers: tuple[int | float, ...], flags: dict[str, bool]
) -> None:
    """First the queries' gradient, and with it what the tokens' kernel needs to know of each query."""
    grad_output, grad_log_evidence, query, key, value, log_weight, _, log_evidence = saved
    baselines = torch.empty_like(log_evidence)
    inputs = (query, key, value, log_weight, log_evidence, baselines)
    launch = _config("tiles_backward_queries", shape, query)
    grid, constants = _grid(query, launch, query.shape[1], launch.block_rows), _constants(query, launch, "tiles")
    tiles_backward_queries[grid](grad_output, grad_log_evidence, *inputs, grads[0], *numbers, WEIGHTED=flags["WEIGHTED"], **constants)
    launch = _config("tiles_backward_tokens", shape, query)
    grid, constants = _grid(query, launch, key.shape[1], launch.block_tokens), _constants(query, launch, "tiles")
    tiles_backward_tokens[grid](grad_output, *inputs, *grads[1:], *numbers, **flags, **constants)


def _unit_stride(tensor: Tensor) -> Tensor:
    """The kernels read a head's vector as consecutive elements; any other stride may be anything."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _accumulation(tensor: Tensor) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if tensor.dtype == torch.float64 else (torch.float32, tl.float32)


def _precision(query: Tensor) -> str:
    """Products of float32 on the matrix units: three TF32 products keep float32's accuracy on NVIDIA; AMD has them in float32."""
    return "tf32x3" if query.is_cuda and not torch.version.hip else "ieee"


def _shape(query: Tensor, key: Tensor, value: Tensor) -> Shape:
    aligned = not any(stride % 16 for stride in (*key.stride()[:3], *value.stride()[:3]))
    return Shape.of(query.element_size(), query.shape[3], query.shape[1], key.shape[1], aligned)


def _numbers(
    query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None, scale: float | None, route: str
) -> tuple[int | float, ...]:
    """Sizes, scale and strides, as all kernels take them; for those of the route ``rows`` the number of pairs before."""
    batch, rows, heads, width = query.shape
    weight: tuple[int, ...] = (0, 0, 0)
    if log_weight is not None:
        weight = log_weight.stride()
        if log_weight.shape[1] == 1:
            weight = (weight[0], 0, weight[2])
    sizes = (heads, rows, key.shape[1], 1.0 / math.sqrt(width) if scale is None else scale)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *weight)
    return (batch * heads, *sizes, *strides) if route == "rows" else (*sizes, *strides)


def _constants(query: Tensor, launch: LaunchConfig, route: str) -> Mapping[str, Any]:
    """What a kernel is compiled for, but for the flags that say what is there and wanted."""
    return _constants_of(query.shape[3], _accumulation(query)[1], _precision(query), launch, route)


@functools.lru_cache(maxsize=4096)
def _constants_of(width: int, accumulation: tl.dtype, precision: str, launch: LaunchConfig, route: str) -> Mapping[str, Any]:
    constants = {
        "WIDTH": width,
        "BLOCK_WIDTH": max(16, power_of_two(width)) // launch.parts,
        "BLOCK_TOKENS": launch.block_tokens,
        "ACC": accumulation,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        # Contraction to fused multiply-add is asked for by name: Triton's default for it is about to change.
        "enable_fp_fusion": True,
    }
    if route == "rows":
        return constants | {"PAIRS": launch.pairs}
    parts = {"PARTS": launch.parts} if route == "tiles" else {}
    return constants | {"BLOCK_ROWS": launch.block_rows, "PRECISION": precision, **parts}


def _grid(query: Tensor, launch: LaunchConfig, length: int = 1, block: int = 1) -> tuple[int, int]:
    """Programs: pairs, then blocks of queries or tokens."""
    return ceil_div(query.shape[0] * query.shape[2], launch.pairs), ceil_div(length, block)


def _config(kernel: str, shape: Shape, tensor: Tensor) -> LaunchConfig:
    return _config_on(kernel, shape, tensor.device)


@functools.cache
def _config_on(kernel: str, shape: Shape, device: torch.device) -> LaunchConfig:
    gpu = gpu_of(device)
    return configurations.choose(kernel, shape, configurations.load_table(gpu.name, gpu.architecture), gpu.shared_memory)
