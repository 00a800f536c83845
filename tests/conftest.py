"""Settings of the whole suite. Imports nothing but pytest at the top: `make gpu` runs where little else is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the active-inference oracle; looking for an accelerator takes it seconds

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass
else:
    # Machines of unknown speed: no deadlines. The same examples every time: a failure can be repeated by whoever reads it.
    settings.register_profile("amd_fast", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("amd_fast")

REPOSITORY = Path(__file__).resolve().parent.parent


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
