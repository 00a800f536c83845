"""Settings of the whole suite. Imports nothing but pytest at the top: `make gpu` runs where little else is installed."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(autouse=True)
def _ordinary_priority() -> Iterator[None]:
    """No test leaves its thread at another priority: everything the worker starts later would have it too."""
    known = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    yield
    if known is not None and os.sched_getscheduler(0) != known:
        os.sched_setscheduler(0, known, os.sched_param(0))
        pytest.fail("this test (or a library that it calls) changed the scheduling class of its thread")


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


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of a real S3 server on the loopback (moto's)."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A new bucket of that server (boto3's), the environment set for it, and an empty cache of remote files."""
    import boto3
    import s3fs

    from amd_fast.storage import remote

    settings = {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AMD_FAST_CACHE": str(tmp_path / "cache"),
        "AMD_FAST_REMOTE_TIMEOUT": "20",  # the machine may be busy; tests of what fails set less
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AMD_FAST_CACHE_GB", raising=False)
    monkeypatch.setattr(remote, "_silent", {})
    s3fs.S3FileSystem.clear_instance_cache()  # clients keep the address that they were made with
    name = "b-" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:20]
    return boto3.resource("s3").create_bucket(Bucket=name)
