"""Launch configurations of the OTAM kernels: how many pairs of sequences a program takes, and with how many warps.

Configurations are checked in, one table per GPU in ``configs/*.json``, never searched at run time: the GPU's own table, else one of
the same architecture, else ``default.json``; there, the entry whose number of frames is nearest.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from importlib.resources import files
from typing import Any, NamedTuple

MAX_FRAMES = 16
KERNELS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is launched.

    Attributes:
        pairs: Pairs of sequences per program; a thread keeps a column of its pair's alignment in registers.
        warps: Warps per program.
    """

    pairs: int
    warps: int


def obstacle(query_frames: int, support_frames: int) -> str | None:
    """Why the kernels cannot take sequences of these lengths, None where they can."""
    most = max(query_frames, support_frames)
    return f"the sequences have {most} frames and the kernel takes up to {MAX_FRAMES}" if most > MAX_FRAMES else None


def choose(kernel: str, frames: int, table: dict[str, list[dict[str, int]]]) -> LaunchConfig:
    """The configuration of ``kernel`` for query sequences of ``frames`` frames."""
    nearest = min(table[kernel], key=lambda entry: abs(math.log2(entry["frames"] / max(frames, 1))))
    return LaunchConfig(nearest["pairs"], nearest["warps"])


@functools.cache
def load_table(device_name: str, architecture: str) -> dict[str, list[dict[str, int]]]:
    """The table for a GPU: by name, else of the same architecture, else the default one.

    Args:
        device_name: As the driver gives it, for example ``"NVIDIA H200"``.
        architecture: For example ``"sm_90"`` or ``"gfx942"``.
    """
    tables = [json.loads(file.read_text()) for file in files(__package__).joinpath("configs").iterdir() if file.name.endswith(".json")]
    for key, value in (("device", device_name), ("architecture", architecture), ("device", "default")):
        for table in tables:
            if table[key] == value:
                return dict(table["kernels"])
    raise FileNotFoundError("kernels/otam/configs/default.json is missing; install the package again")


class CompileSpec(NamedTuple):
    """One variant of one kernel, for compiling it without running it.

    Attributes:
        kernel: The Triton function.
        label: What tells this variant from the others of the kernel.
        signature: Triton type of every argument that is not a constant, by name.
        constants: Value of every constant, by name.
        divisible: Arguments known to be multiples of 16, as they are in a launch with aligned tensors.
        warps: Warps per program.
        stages: Depth of the software pipeline.
        bytes_per_element: Bytes that must cross the memory bus per distance, each tensor moved once.
    """

    kernel: Any
    label: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: frozenset[str]
    warps: int
    stages: int
    bytes_per_element: float


def compile_specs(shared_memory: int) -> list[CompileSpec]:
    """Every kernel in every configuration of the default table; none needs shared memory."""
    from .ahead import spec

    table = load_table("default", "any")
    return [spec(kernel, entry["frames"], choose(kernel, entry["frames"], table)) for kernel in KERNELS for entry in table[kernel]]
