"""Packages: a folder with both programs of a model, what they take and give, recorded episodes, and a check that needs torch alone."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

import amd_fast
from amd_fast.data.views import FLOW_LIMIT, FLOW_UNIT, IMAGENET_MEAN, IMAGENET_STD, RESIZE_RATIO
from amd_fast.errors import CheckpointError, ConfigError, DataError, ImplementationError
from amd_fast.export import check
from amd_fast.export.programs import Format, made_inputs, parts_of, require_compiler, write_program
from amd_fast.files import write_atomically, written_folder
from amd_fast.models.afmir import AFMIR
from amd_fast.progress import progress_bar
from amd_fast.storage import plain
from amd_fast.storage.remote import exists

FORMAT = "amd_fast package 2"
CHECK = "check.py"
_EPISODES = ((3, 2, 3), (2, 1, 2))
"""Support clips, query clips and classes of the recorded episodes."""
_ROUNDING = 16
_STAGES = ("recording episodes", "exporting the encoder", "exporting the head", "checking in a fresh process")


class Package(NamedTuple):
    """An exported package, loaded.

    Attributes:
        encoder: clips to tokens, see :class:`~amd_fast.export.Encoder`.
        head: tokens of support and query to the posterior, see :class:`~amd_fast.export.Head`.
        description: what ``package.json`` holds.
    """

    encoder: Callable[..., tuple[Tensor, ...]]
    head: Callable[..., tuple[Tensor, ...]]
    description: dict[str, Any]


def export_package(
    model: AFMIR, output: str | os.PathLike[str], *, format: Format = "aotinductor", progress: bool = False
) -> dict[str, Any]:
    """Writes the package of a model.

    A fresh process, in which this library is not imported, loads it and compares it with the model on the recorded episodes before it
    takes its place.

    Args:
        model: on the device that the programs are for; it is put into evaluation mode.
        output: folder that does not exist yet, or its URI.
        format: "aotinductor": compiled for this kind of machine, for Python and C++; "torch-export": graphs that torch runs on any machine.
        progress: show a progress bar on a terminal.

    Returns:
        what ``package.json`` holds: versions, inputs and outputs with shapes, types and ranges, how pixels are prepared, largest
        differences from the model, hashes.

    Raises:
        ConfigError: unknown format.
        DataError: the folder exists or cannot be written.
        ImplementationError: no C++ compiler; a part cannot be exported, or gives other numbers than the model.
    """
    if format not in get_args(Format):
        raise ConfigError(f"format={format!r}; choose {' or '.join(map(repr, get_args(Format)))}")
    if exists(output):
        raise DataError(f"{plain(output)} exists; name a folder that does not, or delete it first")
    if format == "aotinductor":
        require_compiler()
    model = model.eval()
    stages = _stages(progress)
    with written_folder(output) as folder:
        next(stages)
        recorded = [recorded_episode(model, sizes, number) for number, sizes in enumerate(_EPISODES)]
        for number, episode in enumerate(recorded):
            write_atomically(folder / _episode(number), save_tensors(episode))
        tolerance = allowed_differences(model, recorded)
        for name, part in parts_of(model).items():
            next(stages)
            with torch.no_grad():
                write_program(part, name, folder / f"{name}.pt2", format, {"device": _device(model)})
        next(stages)
        write_atomically(folder / CHECK, Path(check.__file__).read_bytes())
        description = describe(model, format) | {"tolerance": tolerance}
        description["sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
        _write_description(folder, description)
        description["largest_difference"] = verify(folder)
        _write_description(folder, description)
        next(stages, None)
    return description


def verify(folder: str | os.PathLike[str]) -> dict[str, float]:
    """Runs a package's own check in a fresh process, see :mod:`amd_fast.export.check`.

    Returns:
        largest difference from the recorded value of every output, by ``part.output``.

    Raises:
        ImplementationError: it cannot be loaded here, or gives other numbers.
    """
    done = subprocess.run([sys.executable, str(Path(folder) / CHECK)], capture_output=True, text=True, check=False)
    try:
        told: dict[str, Any] = json.loads(done.stdout)
        faults: list[str] = told["wrong"] or ([] if told["without_amd_fast"] else ["loading it imports amd_fast"])
    except ValueError:
        told, faults = {}, done.stderr.splitlines()[-1:] or [f"the process ended with status {done.returncode}"]
    if faults or done.returncode:
        raise ImplementationError(
            f"the package {folder} is not good here: {faults[0]}; export the model again, with the torch of this machine"
        )
    return dict(told["largest_difference"])


def load_package(folder: str | os.PathLike[str]) -> Package:
    """Loads an exported package. Its programs are code, so load those of people you trust alone.

    Raises:
        CheckpointError: it is not one, was changed since it was written, or cannot be loaded by this torch.
    """
    folder = Path(folder)
    remedy = "make one with 'amd-fast export'"
    try:
        description = json.loads((folder / check.DESCRIPTION).read_text())
        if description["format"] != FORMAT:
            raise CheckpointError(f"the package {folder} has the format {description['format']!r}, this version reads {FORMAT!r}; {remedy}")
        wrong = check.changed_files(folder, description)
        if wrong:
            raise CheckpointError(f"the package {folder} is not as it was written: {wrong[0]}; copy it again, or {remedy}")
        encoder, head = (check.load_program(folder, part, description["programs"]) for part in check.PARTS)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"cannot load a package from {folder} ({error}); {remedy}") from error
    return Package(encoder, head, description)


@torch.no_grad()
def recorded_episode(model: AFMIR, sizes: tuple[int, int, int], seed: int) -> dict[str, Tensor]:
    """An episode of random clips, and what the model makes of it.

    Args:
        model: in evaluation mode.
        sizes: support clips, query clips and classes.
        seed: of the random numbers.

    Returns:
        the encoder's inputs by name, support clips first, ``support_labels``, ``classes``, and every output of both programs as
        ``expected.<output>``; on the CPU.
    """
    support, query, ways = sizes
    parts = parts_of(model)
    made = made_inputs(model, (support + query, support, query, ways), seed)
    tokens, log_weight = parts["encoder"](*made["encoder"])
    labels, classes = made["head"][2], made["head"][5]
    answer = parts["head"](tokens[:support], log_weight[:support], labels, tokens[support:], log_weight[support:], classes)
    expected = dict(zip((*parts["encoder"].outputs, *parts["head"].outputs), (tokens, log_weight, *answer), strict=True))
    given = dict(zip(parts["encoder"].inputs, made["encoder"], strict=True)) | {"support_labels": labels, "classes": classes}
    tensors = given | {check.EXPECTED + name: value for name, value in expected.items()}
    return {name: value.cpu().contiguous().clone() for name, value in tensors.items()}


@torch.no_grad()
def allowed_differences(model: AFMIR, episodes: list[dict[str, Tensor]]) -> dict[str, float]:
    """What rounding may change in every output, by ``part.output``: sixteen times the model's distance from float64 on these episodes.

    Measured rather than assumed: an agent of high precision, or a network that finds hardly any difference between two clips, makes much
    of rounding. Two roundings meet, the model's and the program's, and from episode to episode they differ by several times.
    """
    precise = copy.deepcopy(model).double()
    device = next(model.parameters()).device
    allowed: dict[str, float] = {}
    for episode in episodes:
        given = {name: (value.double() if value.is_floating_point() else value).to(device) for name, value in episode.items()}
        shots, tokens, weight = len(given["support_labels"]), given["expected.tokens"], given["expected.log_weight"].float()
        for name, part in parts_of(precise).items():
            if name == "encoder":
                outputs = part(*(given[key] for key in part.inputs))
            else:
                sides = (tokens[:shots], weight[:shots], given["support_labels"], tokens[shots:], weight[shots:], given["classes"])
                outputs = part(*sides)
            for output, value in zip(part.outputs, outputs, strict=True):
                off = (value - given[check.EXPECTED + output]).abs().nan_to_num()
                key = f"{name}.{output}"
                allowed[key] = max(allowed.get(key, 0.0), _ROUNDING * float(off.max()))
    return allowed


def describe(model: AFMIR, format: Format) -> dict[str, Any]:
    """``package.json`` without tolerances, differences and hashes. Shapes name what is free; a range of None has no bound."""
    frames, size, views, dim = model.frames, model.size, len(model.views), model.dim
    modalities = len(model.modalities)
    preparation = {name: preparation_of(name) for name in model.modalities}
    inputs = [
        _tensor(name, ["clips", frames, width, size, size], "float32", preparation[name].get("range"))
        for name, width in model.channels.items()
    ]
    sides = [
        _tensor(f"{side}_{name}", [side, modalities, *shape], "float32", limits)
        for side in ("support", "query")
        for name, shape, limits in (("tokens", [frames, dim], None), ("log_weight", [frames], ["-inf", 0]))
    ]
    labels = _tensor("support_labels", ["support"], "int64", [0, "classes - 1"])
    return {
        "format": FORMAT,
        "programs": format,
        "device": _device(model),
        "made_with": _made_with(model),
        "views": list(model.views),
        "modalities": preparation,
        "frames": frames,
        "size": size,
        "short_side": round(size * RESIZE_RATIO),
        "encoder": {
            "inputs": [*inputs, _tensor("present", ["clips", modalities], "bool", None)],
            "outputs": [
                _tensor("tokens", ["clips", modalities, frames, dim], "float32", None),
                _tensor("log_weight", ["clips", modalities, frames], "float32", ["-inf", 0]),
            ],
        },
        "head": {
            "inputs": [*sides[:2], labels, *sides[2:], _tensor("classes", ["classes"], "int64", [0, "classes - 1"])],
            "outputs": [
                _tensor("log_probs", ["query", "classes"], "float32", ["-inf", 0]),
                _tensor("view_log_probs", ["query", views, "classes"], "float32", ["-inf", 0]),
                _tensor("policy", ["query", views], "float32", [0, 1]),
            ],
        },
        "free": {name: {"least": 1, "most": None} for name in ("clips", "support", "query", "classes")},
        "episodes": [_episode(number) for number in range(len(_EPISODES))],
    }


def preparation_of(modality: str) -> dict[str, Any]:
    """How the encoder wants the pixels of a modality, in plain values: ``(value / divide_by - mean) / std`` for rgb."""
    if modality == "rgb":
        mean, std = IMAGENET_MEAN.astype(float).round(6), IMAGENET_STD.astype(float).round(6)
        limits = [round(float(((0 - mean) / std).min()), 4), round(float(((1 - mean) / std).max()), 4)]
        return {"channels": "red, green, blue", "divide_by": 255, "mean": mean.tolist(), "std": std.tolist(), "range": limits}
    if modality == "flow":
        meaning = "x and y displacement to the next frame of the video, pixels of the size x size picture, over (unit * size)"
        return {"channels": meaning, "unit": FLOW_UNIT, "range": [-FLOW_LIMIT, FLOW_LIMIT]}
    return {"channels": "as the sensor gives them", "subtract": "median of the clip", "divide_by": "standard deviation of the clip"}


def _tensor(name: str, shape: list[Any], dtype: str, limits: list[Any] | None) -> dict[str, Any]:
    return {"name": name, "shape": shape, "dtype": dtype, "range": limits}


def _made_with(model: AFMIR) -> dict[str, Any]:
    return {
        "amd_fast": amd_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(_device(model)) if _device(model).startswith("cuda") else None,
    }


def _device(model: AFMIR) -> str:
    return str(next(model.parameters()).device)


def _episode(number: int) -> str:
    return f"episode-{number}.safetensors"


def _write_description(folder: Path, description: dict[str, Any]) -> None:
    write_atomically(folder / check.DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())


def _stages(progress: bool) -> Iterator[None]:
    """Shows which stage is at work, from one ``next`` to the following."""
    with progress_bar(disable=not progress) as bar:
        task = bar.add_task(_STAGES[0], total=len(_STAGES), note="")
        for number, stage in enumerate(_STAGES):
            bar.update(task, description=stage, completed=number)
            yield
        bar.update(task, completed=len(_STAGES))
