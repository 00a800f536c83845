"""Compiling every kernel for named GPUs on a machine without one, and reporting what each needs of a GPU."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from amd_fast.errors import ConfigError, ImplementationError

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

# Most shared memory a program can have, in bytes (CUDA programming guide, table of compute capabilities; CDNA 3 ISA guide).
_SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}

# Where each op lists its kernels: a function of the architecture and its shared memory to the specs of what would run there.
_SPECS = {
    "cross_modal_attention": "amd_fast.kernels.cross_modal_attention.config:compile_specs",
    "free_energy": "amd_fast.kernels.free_energy.config:compile_specs",
}


class KernelSpec(Protocol):
    """One variant of one kernel, as an op's ``compile_specs(target, shared_memory)`` lists it.

    ``kernel`` is the Triton function, ``signature`` the Triton type of every argument that is not constant (``"*bf16"``,
    ``"i32"``), ``constants`` the value of the others, ``divisible`` the arguments known to be multiples of 16,
    ``bytes_per_element`` the memory traffic per element of the op's main input with every tensor moved once.
    """

    @property
    def kernel(self) -> Any: ...
    @property
    def label(self) -> str: ...
    @property
    def signature(self) -> Mapping[str, str]: ...
    @property
    def constants(self) -> Mapping[str, Any]: ...
    @property
    def divisible(self) -> Iterable[str]: ...
    @property
    def warps(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def bytes_per_element(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one variant needs on one GPU.

    Attributes:
        op: Name of the op.
        label: The variant.
        target: The GPU architecture.
        registers: Registers per thread (vector registers on AMD).
        spills: Bytes (on AMD: registers) that did not fit and go through memory; 0 is what is wanted.
        shared_memory: Bytes of shared memory per program.
        warps: Warps per program.
        bytes_per_element: Memory traffic per element of the op's main input with every tensor moved once.
    """

    op: str
    label: str
    target: str
    registers: int
    spills: int
    shared_memory: int
    warps: int
    bytes_per_element: float


def specs_for(target: str) -> Iterator[tuple[str, KernelSpec]]:
    """Every kernel variant that would run on a GPU of this architecture, with the name of its op."""
    for op, location in _SPECS.items():
        module, function = location.split(":")
        for spec in getattr(importlib.import_module(module), function)(target, _SHARED_MEMORY[target]):
            yield op, spec


def compile_spec(op: str, spec: KernelSpec, target: str) -> Compiled:
    """Compile one variant for one architecture, without a GPU.

    Raises:
        ImplementationError: It does not compile; the message carries the compiler's first line.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = spec.kernel.arg_names
    constants = dict(spec.constants)
    signature = {name: "constexpr" if name in constants else spec.signature[name] for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in spec.divisible}
    source = ASTSource(spec.kernel, signature, constants, divisible)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    options = {"num_warps": spec.warps, "num_stages": spec.stages, "enable_fp_fusion": True}
    try:
        compiled = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # whatever stage of the compiler fails, the variant is what has to be named
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise ImplementationError(f"{op}: {spec.label} does not compile for {target}: {first_line}") from error
    registers, spills = _nvidia_usage(compiled.asm["cubin"]) if "cubin" in compiled.asm else _amd_usage(compiled.asm["amdgcn"])
    return Compiled(op, spec.label, target, registers, spills, compiled.metadata.shared, spec.warps, spec.bytes_per_element)


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, read from the binary by the tool that Triton brings along."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and spilled registers per thread, read from the metadata of the assembly."""
    usage = {name: int(number) for name, number in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly)}
    return usage["vgpr_count"], usage["vgpr_spill_count"] + usage["sgpr_spill_count"]
