"""A model as exported programs (``torch.export``) that need torch and nothing of this library.

Two programs, so that clips are encoded once, when they are enrolled:

* the encoder takes clips to tokens;
* the head takes the tokens of support and query to the fused posterior: read-out, matching, active inference, fusion.

The library's own ops are written out as their reference. The number of clips (and in the head of classes) is free, frames and size
are the model's. Models whose matcher is ``prototype`` or ``cosine`` are known to export.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.export import Dim

import amd_fast
from amd_fast.errors import CheckpointError, ImplementationError
from amd_fast.files import write_atomically, written_folder
from amd_fast.kernels.cross_modal_attention import reference as attention
from amd_fast.kernels.otam import reference as otam
from amd_fast.models.afmir import AFMIR
from amd_fast.models.matchers import Clips
from amd_fast.ops.dispatch import OPS
from amd_fast.package_check import DESCRIPTION, PARTS, RECORDED

_SIZES = ((2, 6, 4, 3), (1, 2, 1, 2), (3, 5, 2, 5))
"""Clips of the encoder, support clips, query clips and classes of the recorded inputs; the first ones are exported from."""


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


class Package(NamedTuple):
    """An exported package, loaded.

    Attributes:
        encoder: see :class:`Encoder`.
        head: see :class:`Head`.
        description: what ``package.json`` holds: modalities, channels, frames, size, views, names and shapes of inputs and outputs.
    """

    encoder: Callable[..., tuple[Tensor, ...]]
    head: Callable[..., tuple[Tensor, ...]]
    description: dict[str, Any]


def export_package(model: AFMIR, output: str | Path) -> None:
    """Writes the package of a model in evaluation mode: programs, description, recorded inputs and outputs.

    The package is loaded in a fresh process, and compared there with the model on inputs of several sizes, before it takes its place.

    Args:
        model: on the device that the programs are for.
        output: folder to write.

    Raises:
        ImplementationError: a part cannot be exported, or gives other numbers than the model.
        DataError: the folder cannot be written.
    """
    model = model.eval()
    device = next(model.parameters()).device
    parts: dict[str, Encoder | Head] = {"encoder": Encoder(model), "head": Head(model)}
    recorded: dict[str, Tensor] = {}
    description = _describe(model, parts, device)
    with written_folder(output) as folder, torch.no_grad():
        examples: dict[str, tuple[Tensor, ...]] = {}
        for case, sizes in enumerate(_SIZES):
            made = made_inputs(model, sizes, case, device)
            for name, part in parts.items():
                examples.setdefault(name, made[name])
                values = {"input": (part.inputs, made[name]), "output": (part.outputs, part(*made[name]))}
                for kind, (names, tensors) in values.items():
                    recorded |= {f"{name}.{case}.{kind}.{key}": value for key, value in zip(names, tensors, strict=True)}
        for name, part in parts.items():
            _save(part, name, examples[name], folder / f"{name}.pt2")
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in recorded.items()}
        write_atomically(folder / RECORDED, save_tensors(tensors))
        write_atomically(folder / DESCRIPTION, (json.dumps(description, indent=2) + "\n").encode())
        verify(folder)


def verify(folder: str | Path) -> None:
    """Loads a package in a fresh process and compares it with what was recorded (:mod:`amd_fast.package_check` gives the tolerance).

    Raises:
        ImplementationError: it cannot be loaded here, or gives other numbers.
    """
    command = [sys.executable, "-m", "amd_fast.package_check", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(amd_fast.__file__).resolve().parent.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        said = done.stdout.splitlines()[:1] or done.stderr.splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ImplementationError(f"the package {folder} is not good here: {said[0]}; export it again with the torch of this machine")


def load_package(folder: str | Path) -> Package:
    """Loads an exported package.

    Raises:
        CheckpointError: it is not one.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        encoder, head = (torch.export.load(folder / f"{part}.pt2").module() for part in PARTS)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"cannot load a package from {folder} ({error}); make one with export_package") from error
    return Package(encoder, head, description)


def _describe(model: AFMIR, parts: Mapping[str, Encoder | Head], device: torch.device) -> dict[str, Any]:
    return {
        "format": "amd_fast package 1",
        "amd_fast": amd_fast.__version__,
        "torch": torch.__version__,
        "device": str(device),
        "modalities": list(model.modalities),
        "channels": model.channels,
        "views": list(model.views),
        "frames": model.frames,
        "size": model.size,
        "dim": model.dim,
        "recorded": len(_SIZES),
        **{name: {"inputs": list(part.inputs), "outputs": list(part.outputs)} for name, part in parts.items()},
    }


def made_inputs(model: AFMIR, sizes: tuple[int, int, int, int], seed: int, device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    """Inputs of both parts, random; of several modalities the last is missing from one clip of the encoder and one query."""
    batch, support, query, ways = sizes
    generator = torch.Generator().manual_seed(seed)
    modalities, shape = len(model.modalities), (model.frames, model.dim)
    clips = [torch.randn(batch, model.frames, width, model.size, model.size, generator=generator) for width in model.channels.values()]
    present = torch.ones(batch, modalities, dtype=torch.bool)
    tokens = [torch.randn(count, modalities, *shape, generator=generator) for count in (support, query)]
    log_weights = [torch.zeros(count, modalities, model.frames) for count in (support, query)]
    if modalities > 1:
        present[0, -1] = False
        log_weights[1][0, -1] = float("-inf")
    labels, classes = torch.arange(support) % ways, torch.arange(ways)
    made = {"encoder": (*clips, present), "head": (tokens[0], log_weights[0], labels, tokens[1], log_weights[1], classes)}
    return {name: tuple(value.to(device) for value in values) for name, values in made.items()}


def trace(part: Encoder | Head, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """The part as a graph of plain torch operations, for any number of clips."""
    dimensions = {"support": Dim("support", min=1), "query": Dim("query", min=1), "classes": Dim("classes", min=1)}
    clips = Dim("clips", min=1)
    free = [{0: dimensions.get(key.split("_")[0], clips)} for key in part.inputs]
    shapes: Any = {"inputs": tuple(free)} if isinstance(part, Encoder) else dict(zip(part.inputs, free, strict=True))
    return torch.export.export(part, example, dynamic_shapes=shapes).run_decompositions(_written_out())


def _save(part: Encoder | Head, name: str, example: tuple[Tensor, ...], path: Path) -> None:
    try:
        torch.export.save(trace(part, example), path)
    except Exception as error:  # whichever stage of tracing fails, it is the part that has to be named
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImplementationError(f"the {name} of this model cannot be exported: {reason}") from error


def _written_out() -> dict[Any, Callable[..., Any]]:
    """The library's ops as plain torch operations."""
    for module in OPS.values():
        importlib.import_module(module)  # defines the op

    def attend(query: Tensor, key: Tensor, value: Tensor, log_weight: Tensor | None, scale: float | None, impl: str) -> Any:
        return attention.cross_modal_attention(query, key, value, log_weight, scale)

    def align(distances: Tensor, smoothing: float, query_frames: Tensor | None, support_frames: Tensor | None, impl: str) -> Tensor:
        return otam.otam_alignment(distances, smoothing, query_frames, support_frames)

    return {torch.ops.amd_fast.cross_modal_attention.default: attend, torch.ops.amd_fast.otam_alignment.default: align}
