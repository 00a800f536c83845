"""Cores and memory that this process may use, on the machine or within its control group."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_UNKNOWN = 1 << 30
"""Bytes taken to be free where the system does not say."""
_GROUP = Path("/sys/fs/cgroup")
_MEMORY = Path("/proc/meminfo")


def usable_cores() -> int:
    """Cores that the system lets this process run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_cores() -> int:
    """Cores this process should use: its share, where ``torchrun`` started several processes on this machine."""
    return max(1, usable_cores() // local_processes())


def local_processes() -> int:
    """Processes that ``torchrun`` started on this machine and that share it; one without ``torchrun``."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def total_memory() -> int:
    """Bytes of memory this process may use: the machine's, or the control group's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _group("memory.max")
    return total if limit is None else min(total, limit)


def free_memory(device: torch.device | None = None) -> int:
    """Bytes free on a GPU, or for this process in the machine: what can be had without swapping, caches of files included."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        [line] = [line for line in _MEMORY.read_text(encoding="ascii").splitlines() if line.startswith("MemAvailable:")]
        free = int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return _UNKNOWN
    limit, used = _group("memory.max"), _group("memory.current")
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _group(name: str) -> int | None:
    """A number of the control group; nothing where there is none or no limit."""
    try:
        text = (_GROUP / name).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
