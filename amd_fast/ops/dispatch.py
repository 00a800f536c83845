"""Which implementation of an op runs, and why.

Every op takes ``impl="auto" | "triton" | "reference"``. A name is a demand: it runs, or :class:`ImplementationError` says why
it cannot. ``auto`` takes the Triton kernel on a GPU wherever it runs, unless the op names shapes at which something else was
measured faster (none does so far), and on a CPU what was measured fastest there, torch's own fused attention among it. It logs its
choice once. The choice depends on the device, on the shapes and on whether gradients are wanted, is made again inside the op (so an
exported program chooses where it is loaded), and never synchronises: of the device it only asks, once, what model it is. Under
``torch.compile`` for the CPU the reference is no op but part of the graph, which the compiler then fuses.

To plug in, an op's module (listed in ``OPS``) has a function ``choose(*args, impl="auto") -> Choice`` that takes the op's
arguments and ends in :func:`select`. Where more than the device decides, it also has ``usually(device, impl) -> Choice``, for calls
of which only the device is known.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from amd_fast.errors import ArgumentError, ConfigError, ImplementationError
from amd_fast.kernels.common.gpu import gpu_of

IMPLEMENTATIONS = ("auto", "triton", "reference")

OPS = {
    "cross_modal_attention": "amd_fast.ops.attention",
    "free_energy_loss": "amd_fast.ops.free_energy",
    "otam_alignment": "amd_fast.ops.otam",
}

_LEAST_CAPABILITY = (8, 0)

_logger = logging.getLogger("amd_fast.ops")
_logged: set[tuple[str, Choice]] = set()


class Choice(NamedTuple):
    """The implementation that runs (``"triton"``, ``"reference"`` or ``"sdpa"``) and the reason, a clause that completes "because"."""

    implementation: str
    reason: str


def argument_error(name: str, got: object, expected: str, remedy: str) -> ArgumentError:
    """The error for a bad argument: names it, what was got, what was expected, and what to do."""
    return ArgumentError(f"{name}: got {got}, expected {expected}; {remedy}")


def shape_text(shape: torch.Tensor | Sequence[int]) -> str:
    """The shape in plain numbers, ``(2, 3)``: in a graph compiled for any size the symbols would make a message unreadable."""
    shape = shape.shape if isinstance(shape, torch.Tensor) else shape
    sizes = ", ".join([f"{int(size)}" for size in shape])  # the compiler can trace this, and not str(size)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors, for checking and not for speed."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def prepare_interpreter() -> None:
    """Let Triton's interpreter run loops with bounds known only at run time; call before launching a kernel under it.

    Up to 3.6 it turns its one-element arrays into Python integers by ``int(array)``, which NumPy refuses since 2.4.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index


@functools.cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    return None


@functools.cache
def _compiler_missing() -> str | None:
    """Triton builds a small C program at a kernel's first launch; slim images have nothing to build it with."""
    knobs = sys.modules.get("triton.knobs")
    if c_compiler() is not None or (knobs is not None and getattr(knobs.build, "impl", None) is not None) or _built_before():
        return None
    return "Triton finds no C compiler, which it needs at the first launch (apt install gcc, or point CC at one)"


def c_compiler() -> str | None:
    """The C compiler that Triton would call, None where there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _built_before() -> bool:
    """Whether Triton's cache, which an image can bring along, holds what it built where there was a compiler."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))
    return any(cache.glob("*/cuda_utils*")) or any(cache.glob("*/hip_utils*"))


@functools.cache
def _too_old(device: torch.device) -> str | None:
    """Below 8.0 there are neither bfloat16 nor TF32 products, and Triton promises nothing."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    gpu = gpu_of(device)
    if gpu.capability >= _LEAST_CAPABILITY:
        return None
    have, least = (".".join(map(str, capability)) for capability in (gpu.capability, _LEAST_CAPABILITY))
    return f"Triton supports GPUs from compute capability {least} and the {gpu.name} has {have}"


def triton_obstacle(device: torch.device) -> str | None:
    """Why no Triton kernel can run on tensors of this device; None where one can."""
    missing = _triton_missing()
    if missing is not None:
        return missing
    if interpreting():
        return None
    if device.type == "cuda":
        return _too_old(device) or _compiler_missing()
    return (
        f"Triton kernels run on a GPU and the tensors are on {device.type!r} "
        "(move them to a GPU, or set TRITON_INTERPRET=1 before starting Python to check a kernel without one)"
    )


def exporting() -> bool:
    """Whether a program is being exported, which is loaded and chooses implementations elsewhere."""
    # torch.compiler.is_exporting() is True whenever torch.compile traces it, so the flag behind it is read.
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def inlines(device: torch.device, impl: str) -> bool:
    """Whether a compiler at work should see the reference itself in place of the op: on the CPU, where nothing else would run.

    Not while exporting: an exported program chooses where it is loaded.
    """
    return torch.compiler.is_dynamo_compiling() and not exporting() and device.type == "cpu" and impl in ("auto", "reference")


def select(
    op_name: str,
    impl: str,
    device: torch.device,
    *,
    obstacle: str | None = None,
    slower: str | None = None,
    library: str | None = None,
) -> Choice:
    """Choose the implementation of one call.

    Args:
        op_name: Name of the op, for messages.
        impl: What the caller asked for, one of ``IMPLEMENTATIONS``.
        device: Device of the op's tensors.
        obstacle: Why the op's Triton kernel cannot take these arguments, None where it can.
        slower: Why the kernel, though it could run, is not the fastest choice at these shapes (``auto`` then takes the reference).
        library: Why torch's own fused attention is faster than the reference, None where it is not or cannot be used.

    Raises:
        ConfigError: ``impl`` is not one of ``IMPLEMENTATIONS``.
        ImplementationError: ``impl="triton"`` and the kernel cannot run here.
    """
    if impl not in IMPLEMENTATIONS:
        raise ConfigError(f"{op_name}: got impl={impl!r}, expected one of {', '.join(map(repr, IMPLEMENTATIONS))}; leave it out for 'auto'")
    if impl == "reference":
        return Choice("reference", "it was asked for by name")
    obstacle = triton_obstacle(device) or obstacle
    if impl == "triton":
        if obstacle is not None:
            raise ImplementationError(
                f"{op_name}: impl='triton' cannot run here: {obstacle}. A named implementation never falls back; "
                "use impl='auto' or impl='reference' to run without the kernel."
            )
        return Choice("triton", "it was asked for by name")
    if library is not None and (obstacle is not None or device.type != "cuda"):
        choice = Choice("sdpa", library)
    elif obstacle is not None:
        choice = Choice("reference", obstacle)
    elif device.type != "cuda":
        choice = Choice("reference", "the Triton interpreter is for checking, not for speed; ask for it with impl='triton'")
    elif slower is not None:
        choice = Choice("reference", slower)
    else:
        choice = Choice("triton", "the tensors are on a GPU and the kernel takes these shapes and dtypes")
    _log_once(op_name, choice)
    return choice


def _log_once(op_name: str, choice: Choice) -> None:
    if (op_name, choice) not in _logged:
        _logged.add((op_name, choice))
        _logger.info("%s runs as %s because %s", op_name, choice.implementation, choice.reason)


def explain(op_name: str, *args: Any, **kwargs: Any) -> str:
    """Say which implementation of an op runs, and why.

    Args:
        op_name: One of the keys of ``OPS``; or "decode", for which see :func:`amd_fast.data.explain_decoder`.
        *args: The op's positional arguments, as in a call. Without any, the answer is about this machine in general.
        **kwargs: The op's keyword arguments, ``impl`` among them.

    Returns:
        One sentence, or one line per device of this machine where no arguments are given.

    Raises:
        ConfigError: There is no such op.
        ImplementationError: ``impl="triton"`` is among the arguments and cannot run.
    """
    if op_name == "decode":  # no op, but what its users ask in the same way
        return str(importlib.import_module("amd_fast.data.decoders").explain_decoder(*args, **kwargs))
    if op_name not in OPS:
        raise ConfigError(f"explain: got op {op_name!r}, expected one of {', '.join(map(repr, (*OPS, 'decode')))}; check the spelling")
    module = importlib.import_module(OPS[op_name])
    if args:
        choices = {"": module.choose(*args, **kwargs)}
    else:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        usually = getattr(module, "usually", lambda device, impl: select(op_name, impl, device))
        choices = {f" on {name} tensors": usually(torch.device(name), kwargs.get("impl", "auto")) for name in devices}
    return "\n".join(f"{op_name}{where} runs as {choice.implementation} because {choice.reason}." for where, choice in choices.items())
