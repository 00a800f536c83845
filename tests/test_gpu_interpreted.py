"""The tests of ``test_gpu.py`` themselves, in Triton's interpreter: what is wrong with them should not cost the time of a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_in_the_interpreter(repository: Path) -> None:
    """The interpreter has to be asked for before Triton is imported, and would stay on for every test after."""
    pytest.importorskip("triton")
    paths = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(repository / "tests" / "test_gpu.py")]
    run = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 40


def test_every_test_of_a_kernel_is_among_those_that_run_on_a_gpu(repository: Path) -> None:
    """``benchmarks/gpu.sh`` collects the files that name the marker."""
    kernels = sorted((repository / "tests").glob("test_*_kernel*.py"))
    assert len(kernels) == 3
    for file in (*kernels, repository / "tests" / "test_gpu.py"):
        assert "mark.gpu" in file.read_text(encoding="utf-8"), file.name
