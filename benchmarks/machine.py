"""What a measurement is worth nothing without: the machine, the versions, the commit, the load."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def describe(device: torch.device) -> dict[str, object]:
    """The machine as it is written into results."""
    facts: dict[str, object] = {
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        facts["cuda"], facts["hip"] = torch.version.cuda, torch.version.hip
        facts["multiprocessors"], facts["memory"] = properties.multi_processor_count, properties.total_memory
    return facts


def environment(tree: Path = REPOSITORY) -> dict[str, str]:
    """Of a process that runs the code of a source tree, and finds what this process was told to look for on PYTHONPATH."""
    given = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree), *given])}


def load() -> list[float] | None:
    """Processes that wanted a processor, averaged over the last 1, 5 and 15 minutes."""
    return [round(average, 2) for average in os.getloadavg()] if hasattr(os, "getloadavg") else None


def device_name(device: torch.device) -> str:
    """Of the GPU as the driver gives it, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's own name for itself."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def file_stem(device: torch.device) -> str:
    """A file name for results of this device: ``nvidia-h200``, ``cpu-amd-epyc``."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return name if device.type == "cuda" else f"cpu-{name}"


def revision(name: str) -> str:
    """The commit that git calls ``name``, empty where it knows none."""
    return _output("git", "-C", str(REPOSITORY), "rev-parse", "--verify", "--quiet", "--short=12", f"{name}^{{commit}}")


def commit() -> str:
    """The commit of the source tree, with a plus where the code differs from it; ``unknown`` outside of git."""
    changed = _output(
        "git", "-C", str(REPOSITORY), "status", "--porcelain", "--untracked-files=no", "--", "amd_fast", "kernels", "benchmarks"
    )
    return f"{head}{'+' if changed else ''}" if (head := revision("HEAD")) else "unknown"


def version(package: str) -> str | None:
    """Of an installed package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def decoders() -> dict[str, str | None]:
    """Versions of the packages that decode videos."""
    return {"av": version("av"), "dali": version("nvidia-dali-cuda130") or version("nvidia-dali-cuda120")}


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
