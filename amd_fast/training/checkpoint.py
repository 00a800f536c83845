"""Checkpoints: models and whole training states as safetensors files with a description inside; each is written whole or not at all.

Nothing in a file is ever executed: no pickle is read. A training state is one file whatever the number of processes, so that any
number of them can go on with it. Random numbers need no state: every step seeds its own from (seed, step, rank).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from amd_fast.errors import CheckpointError
from amd_fast.files import write_atomically
from amd_fast.models.afmir import AFMIR, LossOptions
from amd_fast.models.registry import create_model
from amd_fast.models.weights import take_weights
from amd_fast.storage import is_remote, join, lease, plain
from amd_fast.training.config import TrainConfig
from amd_fast.training.distributed import World

FORMAT = "amd_fast model 1"
STATE_FORMAT = "amd_fast training state 2"
_OPTIMISER = "optimiser."
_POINTER = "last"


def full_weights(module: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers, gathered where they are spread over ranks (which all have to call this), on the module's device."""
    return cast(dict[str, Tensor], get_model_state_dict(module, options=StateDictOptions(full_state_dict=True)))


def save_model(model: AFMIR, path: Path, recipe: dict[str, Any]) -> None:
    """Saves a model's weights and ``recipe``, the arguments of :func:`~amd_fast.create_model` that make it again."""
    write_model(full_weights(model), path, recipe)


def write_model(weights: Mapping[str, Tensor], path: Path, recipe: dict[str, Any]) -> None:
    """:func:`save_model` of weights that are gathered already."""
    # One entry of metadata, for safetensors writes several in any order: the same model should give the same bytes.
    _write(path, weights, {"format": FORMAT, "recipe": recipe})


def _write(path: Path, tensors: Mapping[str, Tensor], description: dict[str, Any]) -> None:
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {"amd_fast": json.dumps(description, sort_keys=True)}
    write_atomically(path, save_tensors(plain, metadata=metadata), error=CheckpointError)


def _read(path: Path, *, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a file; raises what safetensors and the operating system raise."""
    with safe_open(path, "pt") as file:
        description = json.loads((file.metadata() or {}).get("amd_fast", "{}"))
        return description, {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118 (no dictionary)


def model_file(path: str | os.PathLike[str]) -> str:
    """The model's file: the best one of a run folder (or its URI), or the path itself."""
    path = plain(path)
    if os.path.isdir(path) or (is_remote(path) and not path.endswith(".safetensors")):
        return str(join(path, "checkpoints", "best.safetensors"))
    return path


def read_model(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Recipe and weights of a model saved by :func:`save_model`, or of the best one of a run folder; either can be a URI.

    Raises:
        CheckpointError: no such file, or not a model of this library.
    """
    path = model_file(path)
    try:
        with lease(path, error=CheckpointError) as file:
            description, tensors = _read(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read a model from {path} ({error}); give a run folder or a .safetensors file of amd_fast") from error
    if description.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a model of amd_fast (its format is {description.get('format')!r}, expected {FORMAT!r})")
    return description["recipe"], tensors


def load_model(path: str | os.PathLike[str]) -> AFMIR:
    """Loads a model saved by :func:`save_model`, or the best one of a run folder; either can be a URI.

    Raises:
        CheckpointError: no such file, not a model of this library, or weights that do not fit.
    """
    recipe, tensors = read_model(path)
    recipe["loss"] = LossOptions(**recipe["loss"])
    model = create_model(recipe.pop("name"), modalities=tuple(recipe.pop("modalities")), **recipe)
    take_weights(model, tensors, path)
    return model


class Checkpoints:
    """The training states in ``<run folder>/checkpoints``: ``step-000123.safetensors`` holds the state after 123 steps.

    The file ``last`` names the newest; it is written after that one is complete, and before older ones are removed.

    Args:
        folder: run folder.
        world: rank 0 reads and writes, all ranks give and take.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self._world = folder / "checkpoints", world

    def last(self) -> Path | None:
        """The newest state, or None."""
        try:
            path = self.folder / (self.folder / _POINTER).read_text().strip()
        except FileNotFoundError:
            return None
        if not path.is_file():
            raise CheckpointError(f"{self.folder / _POINTER} names {path.name}, which is gone; write the name of another one there")
        return path

    def before(self, step: int) -> Path | None:
        """The newest state that is there of at most ``step`` steps, or None."""
        known = [path for path in sorted(self.folder.glob("step-*.safetensors")) if int(path.stem.removeprefix("step-")) <= step]
        return known[-1] if known else None

    def describe(self, path: Path, config: TrainConfig) -> dict[str, Any]:
        """What is written about a state.

        Raises:
            CheckpointError: it is damaged, of another version of the format, or of another configuration.
        """
        try:
            description, _ = _read(path, tensors=False)
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"the checkpoint {path} is damaged ({error}); {self._others(path)}") from error
        if description.get("format") != STATE_FORMAT:
            raise CheckpointError(
                f"the checkpoint {path} has the format {description.get('format')!r}, this library reads {STATE_FORMAT!r}"
            )
        if description["config_hash"] != config.hash():
            now = config.essence()
            differing = [f"{key} ({was!r}, now {now.get(key)!r})" for key, was in description["config"].items() if now.get(key) != was]
            raise CheckpointError(
                f"the checkpoint {path} belongs to another configuration: {', '.join(differing) or 'a setting is new'}; "
                "resume with the run folder's own config.yaml, or choose another output folder"
            )
        return description

    def _others(self, path: Path) -> str:
        others = [other.name for other in sorted(self.folder.glob("step-*.safetensors")) if other != path]
        if others:
            return f"write the name of another one, {others[-1]}, into {self.folder / _POINTER}"
        return f"delete {self.folder} to start again"

    def save(self, module: nn.Module, optimiser: torch.optim.Optimizer, facts: dict[str, Any], *, keep: int) -> None:
        """Saves a state (all ranks call this) and removes all but the ``keep`` newest.

        Args:
            module: what is trained.
            optimiser: its optimiser.
            facts: plain values; ``step`` among them.
            keep: at least 1.

        Raises:
            CheckpointError: on every rank: the disk is full or cannot be written; older states are as they were.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = cast(dict[str, Tensor], get_model_state_dict(module, options=options))
        moments = cast(dict[str, Any], get_optimizer_state_dict(module, optimiser, options=options))

        def write() -> None:
            tensors = dict(weights)
            for name, values in moments["state"].items():
                tensors |= {f"{_OPTIMISER}{name}:{key}": value for key, value in values.items()}
            path = self.folder / f"step-{facts['step']:06d}.safetensors"
            try:
                _write(path, tensors, {"format": STATE_FORMAT, **facts})
                write_atomically(self.folder / _POINTER, path.name.encode(), error=CheckpointError)
            except CheckpointError as error:
                last = self.last()
                kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
                raise CheckpointError(f"{error}; {kept}") from error
            for old in sorted(self.folder.glob("step-*.safetensors"))[:-keep]:
                with suppress(OSError):  # one that cannot be removed does no harm
                    old.unlink()

        self._world.on_first(write)

    def load(self, path: Path, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Loads weights and optimiser state (all ranks call this; rank 0 reads).

        Raises:
            CheckpointError: on every rank: they do not fit, or the file is damaged.
        """
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self._world.size > 1)
        expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        current = get_optimizer_state_dict(module, optimiser, options=StateDictOptions(full_state_dict=True))
        tensors: dict[str, Tensor] = {}

        def read() -> None:
            try:
                tensors.update(_read(path)[1])
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"the checkpoint {path} is damaged ({error}); {self._others(path)}") from error
            got = {name: tuple(value.shape) for name, value in tensors.items() if not name.startswith(_OPTIMISER)}
            if wrong := sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)):
                raise CheckpointError(
                    f"the checkpoint {path} does not fit the model: {len(wrong)} arrays differ in name or shape, the first is {wrong[0]}; "
                    "it was written by another version of this library or with other modalities"
                )

        self._world.on_first(read)
        moments: dict[str, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith(_OPTIMISER)]:
            parameter, _, key = name.removeprefix(_OPTIMISER).rpartition(":")
            moments.setdefault(parameter, {})[key] = tensors.pop(name)
        set_model_state_dict(module, cast(dict[str, Any], tensors), options=options)
        state: dict[str, Any] = {"state": moments, "param_groups": current["param_groups"]} if self._world.first else {}
        set_optimizer_state_dict(module, optimiser, state, options=options)
        _match_layouts(optimiser)


def _match_layouts(optimiser: torch.optim.Optimizer) -> None:
    """Lays moments out in memory as their parameters are (channels last, say): the fused optimiser goes through both in memory order."""
    for parameter, state in optimiser.state.items():
        for key, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter).copy_(value)
