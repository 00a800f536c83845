"""Compiling every kernel for named GPUs on a machine without one, and reporting what each needs of a GPU.

Where a GPU is at hand, its kernels are launched as well, which leaves them in Triton's cache (``warm_cache.py``).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib
import importlib.util
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from amd_fast.errors import ConfigError, ImplementationError
from amd_fast.files import write_atomically
from amd_fast.progress import console, track, wide_console
from amd_fast.resources import available_cores

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

# Most shared memory a program can have, in bytes (CUDA programming guide, table of compute capabilities; CDNA 3 ISA guide).
_SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}

# Where each op lists its kernels: a function from a device's shared memory and architecture to the specs of what would run there.
_SPECS = {
    "cross_modal_attention": "amd_fast.kernels.cross_modal_attention.config:compile_specs",
    "free_energy_loss": "amd_fast.kernels.free_energy.config:compile_specs",
    "otam_alignment": "amd_fast.kernels.otam.config:compile_specs",
}


class KernelSpec(Protocol):
    """One variant of one kernel, as an op's ``compile_specs(shared_memory, architecture)`` lists it.

    Attributes:
        kernel: The Triton function.
        label: What tells this variant from the others of the op, the kernel's name first.
        signature: Triton type of every argument that is not constant, by name (``"*bf16"``, ``"i32"``).
        constants: Value of every other argument, by name.
        divisible: Arguments known to be multiples of 16.
        warps: Warps per program.
        stages: Depth of the software pipeline.
        bytes_per_element: Memory traffic per element of the op's main input, each tensor moved once.

    A spec may also have ``importance`` (above 1: what is rarely launched) and ``amd_constants``: values of constants that differ on AMD.
    """

    kernel: Any
    label: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: Iterable[str]
    warps: int
    stages: int
    bytes_per_element: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one variant needs on one GPU.

    Attributes:
        op: Name of the op.
        label: The variant.
        target: The GPU architecture.
        warps: Warps per program.
        registers: Registers per thread (vector registers on AMD).
        spills: Bytes per thread that did not fit the registers and go through memory; 0 is what is wanted.
        shared_memory: Bytes of shared memory per program.
        bytes_per_element: Memory traffic per element of the op's main input, each tensor moved once.
        error: Why it does not compile, empty where it does; the numbers are then 0.
        rare: It runs in unusual launches alone: a command that finds spills there says so and goes on.
    """

    op: str
    label: str
    target: str
    warps: int
    registers: int
    spills: int
    shared_memory: int
    bytes_per_element: float
    error: str = ""
    rare: bool = False


def compile_command(
    targets: list[str] | None = None,
    ops: list[str] | None = None,
    output: str | None = None,
    workers: int = 0,
) -> None:
    """Compile every kernel ahead of time for named GPUs, which need not be here, and say what each needs.

    Where torch sees a GPU, the ops are also run once at the usual shapes, so that nothing is left to compile in a first step.

    Args:
        targets: GPU architectures, of sm_80, sm_90, sm_100, sm_120, gfx942; all of them by default.
        ops: Ops whose kernels to compile; all of them by default.
        output: JSON file to write the same numbers to.
        workers: Processes that compile at the same time; 0 means one per processor.
    """
    names = _known("ops", ops, tuple(_SPECS))
    results = compile_all(_known("targets", targets, TARGETS), names, workers or available_cores())
    _print(results)
    _warm(names)
    if output is not None:
        _write(results, Path(output))
    failed = [result for result in results if result.error]
    spilled = [result for result in results if result.spills and not result.rare]
    if failed:
        raise ImplementationError(f"{len(failed)} of {len(results)} variants do not compile, the first one: {failed[0].error}")
    if spilled:
        first = f"{spilled[0].label} on {spilled[0].target}"
        raise ImplementationError(f"{len(spilled)} of {len(results)} variants spill registers, the first one {first}; give it more warps")


def _warm(names: Iterable[str]) -> None:
    """Fill Triton's cache for the GPU at hand, where there is one that runs the kernels."""
    import torch

    if not torch.cuda.is_available():
        return
    from amd_fast.ops.dispatch import triton_obstacle
    from amd_fast.warm_cache import warm

    device = torch.device("cuda", torch.cuda.current_device())
    obstacle = triton_obstacle(device)
    if obstacle is not None:
        console.print(f"nothing was run on the GPU: {obstacle}")
        return
    warmed = warm(names, device)
    console.print(f"{warmed.kernels} kernels are in Triton's cache for this GPU, after {warmed.calls} calls, each forward and backward")


def compile_all(targets: Iterable[str], ops: Iterable[str], workers: int = 1) -> list[Compiled]:
    """Compile every variant of the ops for every target, in the order of the arguments."""
    if importlib.util.find_spec("triton") is None:
        raise ImplementationError("compiling kernels needs the package triton, which is not installed: pip install triton")
    jobs = [(op, index, target) for target in targets for op in ops for index in range(len(_specs(op, target)))]
    if workers == 1:
        return [_compile_job(job) for job in track(jobs, "compiling")]
    context = multiprocessing.get_context("spawn")  # a forked process would share the compiler's threads and locks
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(track(pool.map(_compile_job, jobs, chunksize=4), "compiling", total=len(jobs)))


def compile_spec(op: str, spec: KernelSpec, target: str) -> Compiled:
    """Compile one variant for one architecture, without a GPU, and read off what it needs.

    Raises:
        ImplementationError: It does not compile; the message carries the compiler's last line.
    """
    compiled = build(op, spec, target)
    nvidia = target.startswith("sm_")
    registers, spills = _nvidia_usage(compiled.asm["cubin"]) if nvidia else _amd_usage(compiled.asm["amdgcn"])
    numbers = (spec.warps, registers, spills, compiled.metadata.shared, spec.bytes_per_element)
    return Compiled(op, spec.label, target, *numbers, rare=_is_rare(spec))


def build(op: str, spec: KernelSpec, target: str) -> Any:
    """The kernel that Triton makes of one variant for one architecture; its ``asm`` holds every stage of the compilation as text.

    Raises:
        ImplementationError: It does not compile; the message carries the compiler's last line.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = target.startswith("sm_")
    names = spec.kernel.arg_names
    constants = dict(spec.constants) if nvidia else {**spec.constants, **getattr(spec, "amd_constants", {})}
    signature = {name: "constexpr" if name in constants else spec.signature[name] for name in names}
    known: dict[tuple[int, ...], list[list[Any]]] = {(names.index(name),): [["tt.divisibility", 16]] for name in spec.divisible}
    if not nvidia:
        for place, name in enumerate(names):  # a launch there says of every tensor of less than 2 GiB that 32 bits address it
            if signature[name].startswith("*"):
                known.setdefault((place,), []).append(["tt.pointer_range", 32])
    source = ASTSource(spec.kernel, signature, constants, known)
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    options = {"num_warps": spec.warps, "num_stages": spec.stages, "enable_fp_fusion": True}
    try:
        return triton.compile(source, target=gpu, options=options)
    except Exception as error:  # whichever stage of the compiler fails, it is the variant that has to be named
        last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ImplementationError(f"{op}: {spec.label} does not compile for {target}: {last_line}") from error


def iterate_specs(op: str, target: str) -> Iterator[KernelSpec]:
    """Every variant of the op's kernels that a GPU of this architecture would run."""
    yield from _specs(op, target)


@functools.cache
def _specs(op: str, target: str) -> list[KernelSpec]:
    module, function = _SPECS[op].split(":")
    return list(getattr(importlib.import_module(module), function)(_SHARED_MEMORY[target], target))


def _compile_job(job: tuple[str, int, str]) -> Compiled:
    """One job of :func:`compile_all`. A spec cannot cross processes, so its place in the list does."""
    op, index, target = job
    spec = _specs(op, target)[index]
    try:
        return compile_spec(op, spec, target)
    except ImplementationError as error:
        return Compiled(op, spec.label, target, spec.warps, 0, 0, 0, spec.bytes_per_element, str(error), _is_rare(spec))


def _is_rare(spec: KernelSpec) -> bool:
    return getattr(spec, "importance", 0) > 1


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory in use per thread, read from the binary by the tools that Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _tool("cuobjdump", "--dump-resource-usage", file.name)
        usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        local = usage["STACK"] + usage["LOCAL"]
        # The assembler sets a few bytes aside for what it later keeps in registers after all: then no instruction is left that uses them.
        if local and not re.search(r"\b(LDL|STL)\b", _tool("nvdisasm", "-c", file.name)):
            local = 0
    return usage["REG"], local


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch memory per thread, read from the metadata of the assembly.

    Not the spills counted there: scalars that do not fit their registers (masks, most of them) are kept in lanes of vector registers.
    """
    usage = {name: int(number) for name, number in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly)}
    return usage["vgpr_count"], usage["private_segment_fixed_size"]


def _known(name: str, given: list[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    for item in given or ():
        if item not in known:
            raise ConfigError(f"{name}: got {item!r}, expected any of {', '.join(known)}; leave it out for all of them")
    return tuple(given or known)


def _print(results: list[Compiled]) -> None:
    table = Table("target", "kernel and variant", "warps", "registers", "spills", "shared memory", "bytes per element")
    for result in results:
        numbers = [
            str(result.warps),
            str(result.registers),
            str(result.spills),
            str(result.shared_memory),
            f"{result.bytes_per_element:.1f}",
        ]
        style = "red" if result.error or result.spills else None
        table.add_row(result.target, result.label, *(["does not compile"] if result.error else numbers), style=style)
    wide_console().print(table)
    wrong = [result for result in results if result.error or result.spills]
    console.print(f"{len(results)} variants, {len(results) - len(wrong)} without spills, {len(wrong)} with spills or errors")
    for result in wrong:  # again, below a table of a thousand lines
        said = result.error or f"{result.spills} bytes spilled{', in rare launches' if result.rare else ''}"
        console.print(f"{result.target} {result.label}: {said}", style="red", soft_wrap=True)


def _write(results: list[Compiled], path: Path) -> None:
    write_atomically(path, (json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n").encode())
