"""A model's two programs, encoder and head, traced into graphs of plain torch operations, and compiled where that is asked for."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch._inductor
from torch import Tensor, nn
from torch.export import Dim

from amd_fast.errors import ImplementationError
from amd_fast.kernels.cross_modal_attention import reference as attention
from amd_fast.kernels.otam import reference as otam
from amd_fast.models.afmir import AFMIR
from amd_fast.models.matchers import Clips
from amd_fast.ops.dispatch import OPS

Format = Literal["aotinductor", "torch-export"]
_TRACED = (2, 6, 4, 3)
"""Clips of the encoder, support clips, query clips and classes that programs are traced with: all different, so that none is mixed up."""


class Encoder(nn.Module):
    """Clips to tokens: ``clips [B, T, channels, h, w]`` of each modality, ``present [B, M]`` -> ``[B, M, T, D], [B, M, T]``."""

    inputs: tuple[str, ...]
    outputs = ("tokens", "log_weight")

    def __init__(self, model: AFMIR) -> None:
        super().__init__()
        self.model, self.inputs = model, (*model.modalities, "present")

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """One tensor per name in ``inputs``."""
        *clips, present = inputs
        return self.model.encode(dict(zip(self.model.modalities, clips, strict=True)), present)


class Head(nn.Module):
    """Tokens of support and query to ``log_probs [Q, ways], view_log_probs [Q, V, ways], policy [Q, V]``."""

    inputs = ("support_tokens", "support_log_weight", "support_labels", "query_tokens", "query_log_weight", "classes")
    outputs = ("log_probs", "view_log_probs", "policy")

    def __init__(self, model: AFMIR) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        support_tokens: Tensor,
        support_log_weight: Tensor,
        support_labels: Tensor,
        query_tokens: Tensor,
        query_log_weight: Tensor,
        classes: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``[S, M, T, D], [S, M, T], [S]`` int64 in 0..ways-1, ``[Q, M, T, D], [Q, M, T]``; ``classes [ways]`` int64: 0, 1, ..., ways-1."""
        model = self.model

        def read(tokens: Tensor, log_weight: Tensor) -> Clips:
            return model.read(tokens, log_weight).take(torch.arange(tokens.shape[0], device=tokens.device)[None])

        support, query = read(support_tokens, support_log_weight), read(query_tokens, query_log_weight)
        output = model.judge(model.match_clips(support, query, support_labels[None], ways=classes.shape[0]))
        return output.log_probs[0], output.view_log_probs[0], output.beliefs.policy[0]


def parts_of(model: AFMIR) -> dict[str, Encoder | Head]:
    """Both parts of a model, by name."""
    return {"encoder": Encoder(model), "head": Head(model)}


def made_inputs(model: AFMIR, sizes: tuple[int, int, int, int] = _TRACED, seed: int = 0) -> dict[str, tuple[Tensor, ...]]:
    """Random inputs of both parts, on the model's device.

    Args:
        model: whose shapes they have.
        sizes: clips of the encoder, support clips, query clips and classes of the head.
        seed: of the random numbers.

    Returns:
        tensors by part, in the order of its ``inputs``. Of several modalities the last is missing from the last clip and query.
    """
    batch, support, query, ways = sizes
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    modalities, shape = len(model.modalities), (model.frames, model.dim)
    clips = [_patterns(batch, model.frames, width, model.size, generator) for width in model.channels.values()]
    present = torch.ones(batch, modalities, dtype=torch.bool)
    tokens = [torch.randn(count, modalities, *shape, generator=generator) for count in (support, query)]
    log_weights = [torch.zeros(count, modalities, model.frames) for count in (support, query)]
    if modalities > 1:
        present[-1, -1] = False
        log_weights[1][-1, -1] = float("-inf")
    labels, classes = torch.arange(support) % ways, torch.arange(ways)
    made = {"encoder": (*clips, present), "head": (tokens[0], log_weights[0], labels, tokens[1], log_weights[1], classes)}
    return {name: tuple(value.to(device) for value in values) for name, values in made.items()}


def _patterns(batch: int, frames: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    """Coarse coloured patches, ``[batch, frames, channels, size, size]``.

    Fine noise looks the same in every clip to a network; distances between such clips are all rounding, and nothing could be compared.
    """
    patches = torch.randn(batch, frames, channels, 4, 4, generator=generator) + 2 * torch.randn(
        batch, 1, channels, 1, 1, generator=generator
    )
    return nn.functional.interpolate(patches.flatten(0, 1), size=(size, size)).unflatten(0, (batch, frames))


def trace(part: Encoder | Head, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """The part as a graph of plain torch operations, for any number of clips and classes."""
    dimensions = {"support": Dim("support", min=1), "query": Dim("query", min=1), "classes": Dim("classes", min=1)}
    clips = Dim("clips", min=1)
    free = [{0: dimensions.get(key.split("_")[0], clips)} for key in part.inputs]
    shapes: Any = {"inputs": tuple(free)} if isinstance(part, Encoder) else dict(zip(part.inputs, free, strict=True))
    return torch.export.export(part, example, dynamic_shapes=shapes).run_decompositions(_written_out())


def write_program(part: Encoder | Head, name: str, path: Path, format: Format, metadata: Mapping[str, str]) -> None:
    """Traces a part, compiles it for ``"aotinductor"``, and writes it.

    Args:
        part: in evaluation mode, on the device that the program is for.
        name: for messages.
        path: a file that ends in ``.pt2``.
        format: of the program.
        metadata: text that a C++ program finds in an AOTInductor package.

    Raises:
        ImplementationError: it cannot be traced or compiled.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's tracer warns of torch's own code
        try:
            program = trace(part, made_inputs(part.model)[name])
        except Exception as error:  # whichever stage of tracing fails, it is the part that has to be named
            known = "afmir_small with the matcher prototype is known to export"
            raise ImplementationError(f"the {name} of this model cannot be exported: {_first_line(error)}; {known}") from error
        if format == "torch-export":
            torch.export.save(program, path)
            return
        options = {"aot_inductor.metadata": {**metadata, "inputs": " ".join(part.inputs)}}
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        except Exception as error:
            remedy = "--format torch-export compiles nothing"
            raise ImplementationError(f"the {name} of this model cannot be compiled: {_first_line(error)}; {remedy}") from error


def require_compiler() -> None:
    """Raises ImplementationError where there is no C++ compiler, which AOTInductor needs for whatever device."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ImplementationError(
            "AOTInductor needs a C++ compiler and none was found: install one (Debian and Ubuntu: apt install g++) or name it in the "
            "environment variable CXX; --format torch-export needs none"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _written_out() -> dict[Any, Callable[..., Any]]:
    """The library's ops as plain torch operations."""
    for module in OPS.values():
        importlib.import_module(module)  # defines the op

    def attend(query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None, scale: float | None, impl: str) -> Any:
        return attention.cross_modal_attention(query, key, value, log_weight, scale)

    def align(distances: Tensor, smoothing: float, query_frames: Tensor | None, support_frames: Tensor | None, impl: str) -> Tensor:
        return otam.otam_alignment(distances, smoothing, query_frames, support_frames)

    return {torch.ops.amd_fast.cross_modal_attention.default: attend, torch.ops.amd_fast.otam_alignment.default: align}
