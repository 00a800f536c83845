"""``amd-fast doctor``: the machine, the versions, and what will run here and why.

Each probe is a function that returns rows; one that raises becomes a row saying so, so that a broken package never hides the
rest. Nothing is downloaded and no weights are looked for.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from json import dumps
from pathlib import Path

from amd_fast.resources import total_memory, usable_cores

GIB = 1024**3
MIN_FREE_DISK = 2 * GIB
MIN_SHARED_MEMORY = GIB
BROKEN = "see the message, and reinstall the package it names"
COMMAND_TIMEOUT = 60.0  # seconds for nvidia-smi and for the compiler, which may sit on a slow network drive


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        section: Heading it stands under.
        name: What was looked at.
        value: What was found.
        ok: Whether everything that depends on it works.
        remedy: What to do where it is not ok, or how to get more where it is; may be empty.
    """

    section: str
    name: str
    value: str
    ok: bool = True
    remedy: str = ""


# Distribution, and whether the main job needs it. DALI's name ends in the CUDA version it was built for.
PACKAGES: dict[str, bool] = {
    "torch": True,
    "torchvision": True,
    "numpy": True,
    "pandas": True,
    "scipy": True,
    "scikit-learn": True,
    "statsmodels": True,
    "av": True,
    "opencv-python-headless": True,
    "rich": True,
    "PyYAML": True,
    "jsonargparse": True,
    "safetensors": True,
    "tensorboard": True,
    "matplotlib": True,
    "Jinja2": True,
    "triton": False,
    "nvidia-dali-cuda130": False,
    "nvidia-dali-cuda120": False,
}
# Another distribution that brings the same module.
STAND_INS = {"opencv-python-headless": ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")}
# Packages with native code can be installed and still not load; these are imported to see.
NATIVE_MODULES = {"torch": "torch", "torchvision": "torchvision", "cv2": "opencv-python-headless", "av": "av"}
INPUT_CODECS = ("h264", "hevc", "mpeg4", "vp9", "vp8", "av1", "mjpeg")
OUTPUT_CODECS = {"libx264": "H.264 mp4", "libvpx-vp9": "VP9 webm"}


def collect() -> list[Row]:
    """Run every probe and return the rows in order of sections."""
    rows: list[Row] = []
    for section, probe in PROBES:
        try:
            for finding in probe():  # one by one: what came before an error stays
                rows.append(Row(section, *finding))  # noqa: PERF401
        except Exception as error:  # a probe looks at things that may be broken in any way; that is its finding
            rows.append(Row(section, probe.__name__.strip("_").replace("_", " "), _describe(error), False, BROKEN))
    return rows


# What a probe yields: name, value, and where wanted ok and remedy.
Finding = tuple[str, str] | tuple[str, str, bool] | tuple[str, str, bool, str]


def _describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _output(command: list[str]) -> str | None:
    """Standard output of a command, None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(distribution: str) -> str | None:
    for name in (distribution, *STAND_INS.get(distribution, ())):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


# Machine


def _machine() -> Iterator[Finding]:
    from amd_fast import __file__ as source
    from amd_fast import __version__

    yield "amd_fast", f"{__version__} from {Path(source).parent}"
    old = sys.version_info < (3, 11)
    yield "python", f"{platform.python_version()} at {sys.executable}", not old, "install Python 3.11 or newer" if old else ""
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "processor", f"{_processor()}, {usable_cores()} of {os.cpu_count()} cores usable"
    yield "memory", f"{total_memory() / GIB:.1f} GiB"
    yield _space("disk", Path.cwd(), MIN_FREE_DISK, "free some space, or work in another folder: a demo run writes under 1 GiB")
    shared = Path("/dev/shm")
    if shared.is_dir():
        remedy = "loader workers pass clips through it; start a container with --shm-size=8g"
        yield _space("shared memory", shared, MIN_SHARED_MEMORY, remedy)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _space(name: str, folder: Path, least: int, remedy: str) -> Finding:
    free = shutil.disk_usage(folder).free
    enough = free >= least
    return name, f"{free / GIB:.1f} GiB free at {folder}", enough, "" if enough else remedy


# Packages


def _packages() -> Iterator[Finding]:
    for distribution, needed in PACKAGES.items():
        found = _version(distribution)
        if found is not None:
            yield distribution, found
        elif needed:
            yield distribution, "not installed", False, f"pip install {distribution}"
        elif distribution == "triton":
            yield distribution, "not installed", True, "pip install triton (Linux), for the fused kernels on a GPU"
    for module, distribution in NATIVE_MODULES.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # native code can fail to load in any way
            yield f"import {module}", _describe(error), False, f"pip install --force-reinstall {distribution}"


# GPU


def _gpu() -> Iterator[Finding]:
    driver = _output(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"])
    if driver:
        yield "driver sees", "; ".join(driver.splitlines())

    import torch

    build = torch.version.cuda or torch.version.hip
    yield "torch built for", f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if build else "CPU only"
    if not torch.cuda.is_available():
        remedy = ""
        if driver:
            remedy = "update the driver, or install the torch build that matches it: https://pytorch.org/get-started/locally"
        yield "torch sees", "no GPU; everything runs on the CPU", not driver, remedy
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, capability {properties.major}.{properties.minor}"
        yield f"torch sees {index}", text


# What will run


def _implementations() -> Iterator[Finding]:
    from amd_fast.ops.dispatch import OPS, explain

    for op in OPS:
        for line in explain(op).splitlines():
            yield op, line.removeprefix(op).strip()
    yield "triton", *_loads("triton", "the reference runs instead; on Linux: pip install triton")
    yield "C compiler for triton", *_c_compiler()


def _c_compiler() -> tuple[str, bool, str]:
    """The compiler that Triton calls at a kernel's first launch: wanted where there is a GPU."""
    import torch

    from amd_fast.ops.dispatch import c_compiler

    compiler = c_compiler()
    if compiler is None:
        return "none found", not torch.cuda.is_available(), "for the fused kernels on a GPU: apt install gcc, or point CC at one"
    return compiler, True, ""


def _loads(module: str, remedy: str) -> tuple[str, bool, str]:
    """Whether an optional module loads: absent is fine and present is fine, present and broken is not."""
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            return "not installed", True, remedy
        return _describe(error), False, remedy
    except Exception as error:  # native code can fail to load in any way
        return _describe(error), False, remedy
    return f"{getattr(loaded, '__version__', 'version unknown')} loads", True, ""


def _decoder() -> Iterator[Finding]:
    import av

    from amd_fast.data.decoders import choose_decoder

    choice = choose_decoder(None)
    yield "decoder", f"{choice.decoder}, because {choice.reason}"
    available = av.codecs_available
    missing = [codec for codec in INPUT_CODECS if codec not in available]
    wheels = "PyAV's own wheels hold them all: pip install --force-reinstall --only-binary :all: av"
    yield "reads", ", ".join(codec for codec in INPUT_CODECS if codec in available), not missing, wheels if missing else ""
    for codec, product in OUTPUT_CODECS.items():
        writes = codec in available
        yield f"writes {product}", "yes" if writes else "no", writes, "" if writes else wheels
    yield "NVIDIA DALI", *_loads("nvidia.dali", "not needed; for decoding on an NVIDIA GPU: pip install 'amd_fast[dali]'")


def _precision_and_compilation() -> Iterator[Finding]:
    import torch

    yield "CPU vectors", torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        native, device, instead = torch.cuda.is_bf16_supported(including_emulation=False), "GPU", "float16"
    else:
        native, device, instead = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(), "CPU", "float32"
    if native:
        yield "bfloat16", f"native on the {device}"
    else:
        yield "bfloat16", f"emulated on this {device}, which is slow", True, f"train in {instead} here"
    yield "torch.compile", *_compiler()


def _compiler() -> tuple[str, bool, str]:
    """Whether the C++ compiler that torch.compile calls builds a Python extension with OpenMP, by building one."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler", False, "everything runs without torch.compile; for it: apt install g++"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <omp.h>\nint probe() { return omp_get_max_threads(); }\n", encoding="ascii")
        include = f"-I{sysconfig.get_paths()['include']}"
        command = [compiler, "-shared", "-fPIC", "-fopenmp", include, str(source), "-o", str(Path(folder, "probe.so"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            return _describe(error), False, "point CXX at a working compiler"
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), "it failed without a message")
        return f"{compiler} cannot build an extension: {complaint.strip()}", False, "apt install g++ libgomp1 python3-dev"
    return f"works with {compiler}", True, ""


PROBES: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("machine", _machine),
    ("packages", _packages),
    ("GPU", _gpu),
    ("implementation of each op", _implementations),
    ("video decoding", _decoder),
    ("precision and compilation", _precision_and_compilation),
)


def doctor_command(*, json: bool = False) -> None:
    """Show the machine, the versions of what is installed, and what will run here and why, with a remedy for what is wrong.

    Args:
        json: Print JSON (a list of rows and an overall verdict) instead of a table.
    """
    rows = collect()
    if json:
        print(dumps({"ok": all(row.ok for row in rows), "rows": [asdict(row) for row in rows]}, indent=2))
        return
    _print_table(rows)


def _print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for section in dict.fromkeys(row.section for row in rows):
        table = Table(title=section, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(width=4)
        table.add_column(min_width=24, overflow="fold")
        table.add_column(overflow="fold")
        for row in (row for row in rows if row.section == section):
            value = Text(row.value)
            if row.remedy:
                value.append(f"\n→ {row.remedy}", style="dim" if row.ok else "yellow")
            table.add_row(Text("ok", style="green") if row.ok else Text("warn", style="bold yellow"), Text(row.name), value)
        console.print(table)
        console.print()
    warnings = sum(not row.ok for row in rows)
    if warnings:
        console.print(f"{warnings} of {len(rows)} findings need attention.", style="yellow")
    else:
        console.print("Everything needed is here.", style="green")


if __name__ == "__main__":
    from amd_fast.cli import main

    sys.exit(main(["doctor", *sys.argv[1:]]))
