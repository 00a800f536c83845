"""``import amd_fast`` needs neither a GPU, nor triton, nor DALI, and pulls in nothing heavy before it is used."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import amd_fast

# Wraps every finder instead of raising: find_spec() then answers None too, as where a package is not installed.
ABSENT = """
import sys

class Without:
    names = ("triton", "nvidia", "jax", "tensorboard")

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.names else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run_fresh(code: str, repository: Path) -> str:
    """Output of Python code in a new process without a GPU, the checkout on its path; fails where the process does."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    settings = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", **hidden}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=repository, env=settings, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_packages_are_absent(repository: Path) -> None:
    code = """
import importlib.util
print(importlib.util.find_spec("triton"))
try:
    import triton
except ImportError as error:
    print(error)
"""
    assert run_fresh(ABSENT + code, repository) == "None\nNo module named 'triton'"


def test_everything_public_without_triton_dali_and_gpu(repository: Path) -> None:
    run_fresh(ABSENT + "import amd_fast\nfor name in amd_fast.__all__:\n    getattr(amd_fast, name)", repository)


def test_ops_run_without_triton_dali_and_gpu(repository: Path) -> None:
    code = """
import amd_fast
import torch

query, key = torch.randn(3, 2, 2, 8, requires_grad=True), torch.randn(3, 5, 2, 8)
output, evidence = amd_fast.ops.cross_modal_attention(query, key, key)
(output.sum() + evidence.sum()).backward()
assert output.shape == (3, 2, 2, 8) and evidence.shape == (3, 2, 2) and query.grad is not None

model = amd_fast.GenerativeModel(3, evidence=("certainty",))
logits = torch.randn(4, 3, 5, requires_grad=True)
loss = amd_fast.ops.free_energy_loss(logits, torch.tensor([0, 1, 2, 3]), model)
loss.total.sum().backward()
assert torch.isfinite(logits.grad).all()
try:
    amd_fast.ops.cross_modal_attention(query, key, key, impl="triton")
except amd_fast.errors.ImplementationError as error:
    print(error)
"""
    assert "triton" in run_fresh(ABSENT + code, repository)


def test_models_build_without_triton_dali_and_gpu(repository: Path) -> None:
    code = "import amd_fast\nfor name in amd_fast.list_models():\n    print(name)\namd_fast.create_model(amd_fast.list_models()[0])"
    assert run_fresh(ABSENT + code, repository)


BARE = ABSENT.replace('"tensorboard"', '"tensorboard", "rich", "numpy", "pandas", "matplotlib", "jsonargparse", "fsspec", "PIL"').replace(
    '"triton", ', ""
)


@pytest.mark.slow
def test_the_benchmarks_run_and_write_with_torch_and_triton_alone(repository: Path, tmp_path: Path) -> None:
    options = f"--device cpu --op free_energy_loss --shapes episode --directions forward --max-elements 300 --output {tmp_path}"
    code = f"""
import sys
import amd_fast.tune
from benchmarks.__main__ import main
sys.argv = ["benchmarks", *{options.split()!r}]
print("status", main())
print(sorted({{"rich", "numpy", "pandas", "matplotlib"}} & set(sys.modules)))
"""
    lines = run_fresh(BARE + code, repository).splitlines()
    header = next(line for line in lines if line.startswith("ratio"))
    assert header.index("shape") == lines[lines.index(header) + 1].index("episode"), "columns stand below each other"
    assert lines[-2:] == ["status 0", "[]"]
    (file,) = tmp_path.iterdir()
    results = json.loads(file.read_text())["results"]
    assert {entry["provider"] for entry in results if entry["time"]} > {"amd_fast", "reference"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import amd_fast", ["torch", "numpy", "pandas", "cv2", "av", "triton"]),
        ("import amd_fast.cli; amd_fast.cli.usage()", ["torch", "numpy", "pandas", "jsonargparse", "rich"]),
        ("import amd_fast.data", ["torch", "cv2", "triton"]),
        ("import amd_fast.ops", ["triton", "pandas", "cv2", "torchvision"]),
    ],
)
def test_import_stays_light(repository: Path, statement: str, absent: list[str]) -> None:
    code = f"import sys\n{statement}\nprint(sorted(set({absent!r}) & set(sys.modules)))"
    assert run_fresh(code, repository) == "[]"


def test_importing_asks_no_device(repository: Path) -> None:
    code = "import amd_fast.ops.attention, amd_fast.ops.free_energy, amd_fast.models, torch\nprint(torch.cuda.is_initialized())"
    assert run_fresh(code, repository) == "False"


def test_static_and_lazy_public_names_agree() -> None:
    tree = ast.parse(Path(amd_fast.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {**amd_fast._PUBLIC, **dict.fromkeys(amd_fast._MODULES, "amd_fast")}
    assert sorted(amd_fast.__all__) == sorted(["__version__", *seen])


def test_unknown_public_name() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        amd_fast.no_such_name  # noqa: B018
