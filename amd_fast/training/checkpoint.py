"""Checkpoints: weights as safetensors with the model's description inside, training state beside them; written whole or not at all."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors

from amd_fast.errors import CheckpointError
from amd_fast.files import write_atomically
from amd_fast.models.afmir import AFMIR, LossOptions
from amd_fast.models.registry import create_model

FORMAT = "amd_fast model 1"
STATE_VERSION = 1


def save_model(model: AFMIR, path: Path, recipe: dict[str, Any]) -> None:
    """Saves a model's weights and ``recipe``, the arguments of :func:`~amd_fast.create_model` that make it again."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    # One entry, for safetensors writes several in any order: the same model should give the same bytes.
    description = json.dumps({"format": FORMAT, "recipe": recipe}, sort_keys=True)
    write_atomically(path, save_tensors(tensors, metadata={"amd_fast": description}), error=CheckpointError)


def load_model(path: str | Path) -> AFMIR:
    """Loads a model saved by :func:`save_model`, or the best one of a run folder.

    Raises:
        CheckpointError: no such file, not a model of this library, or weights that do not fit.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoints" / "best.safetensors"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read a model from {path} ({error}); give a run folder or a .safetensors file of amd_fast") from error
    description = json.loads(metadata.get("amd_fast", "{}"))
    if description.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a model of amd_fast (its format is {description.get('format')!r}, expected {FORMAT!r})")
    recipe = description["recipe"]
    recipe["loss"] = LossOptions(**recipe["loss"])
    model = create_model(recipe.pop("name"), modalities=tuple(recipe.pop("modalities")), **recipe)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"the weights in {path} do not fit the model described there: {error}") from error
    return model.eval()


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Saves everything a run needs to go on: tensors and plain values only."""
    buffer = io.BytesIO()
    torch.save({"version": STATE_VERSION, **state}, buffer)
    write_atomically(path, buffer.getvalue(), error=CheckpointError)


def load_state(path: Path, config_hash: str) -> dict[str, Any]:
    """Loads what :func:`save_state` wrote (tensors and plain values only: nothing in the file is executed).

    Raises:
        CheckpointError: missing, damaged, or of a run with another configuration.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path} to resume from; start without --resume") from error
    except Exception as error:  # torch.load raises many kinds for a damaged file; all mean the same here
        raise CheckpointError(f"the checkpoint {path} is damaged ({error}); delete it to start again") from error
    if state.get("version") != STATE_VERSION:
        raise CheckpointError(f"the checkpoint {path} has version {state.get('version')}, this library writes {STATE_VERSION}")
    if state["config_hash"] != config_hash:
        raise CheckpointError(
            f"the checkpoint {path} belongs to another configuration ({state['config_hash']}, now {config_hash}); "
            "resume with the run folder's own config.yaml, or choose another output folder"
        )
    return state
