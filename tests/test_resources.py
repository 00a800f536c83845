"""Cores and memory, against what the system says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from amd_fast import resources


def test_cores_are_those_of_the_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5, 6, 7}, raising=False)
    assert resources.usable_cores() == resources.available_cores() == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resources.usable_cores() == 5 and resources.available_cores() == resources.local_processes() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert resources.available_cores() == 1


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(resources, "_GROUP", tmp_path)
    monkeypatch.setattr(resources, "_MEMORY", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable:     400 kB\n")
    return tmp_path


def test_free_memory_is_the_smaller_of_machine_and_group(system: Path) -> None:
    assert resources.free_memory() == 400 * 1024  # no group: not what is free, but what can be had
    (system / "memory.max").write_text("max\n")
    (system / "memory.current").write_text("7\n")
    assert resources.free_memory() == 400 * 1024
    (system / "memory.max").write_text("200000\n")
    assert resources.free_memory() == 199_993 and resources.total_memory() == 200_000
    (system / "memory.current").write_text("300000\n")
    assert resources.free_memory() == 0
    (system / "meminfo").write_text("MemTotal: 900 kB\n")
    assert resources.free_memory() == 1 << 30


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not tell its memory this way")
def test_this_machine() -> None:
    assert 0 < resources.free_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert resources.free_memory() <= resources.total_memory()
