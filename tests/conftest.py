"""Settings of the whole suite. Imports nothing but pytest at the top: `make gpu` runs where little else is installed."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the active-inference oracle; looking for an accelerator takes it seconds
# What the compiler built under one environment can fail to load under another: each checkout and environment has its own.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / f"inductor-{ENVIRONMENT}"))
# A pool of compiling processes costs more to start than the few small graphs of these tests take to compile.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass
else:
    # Machines of unknown speed: no deadlines. The same examples every time: a failure can be repeated by whoever reads it.
    settings.register_profile("amd_fast", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("amd_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU here"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout under test."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real clips beside the checkout; tests that use it are skipped where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real clips at {folder}")
    return folder
