"""Installing amd_fast: our kernels are found in every install state, and the package called ``kernels`` is never shadowed.

Hugging Face's ``kernels`` registers a setuptools hook (``egg_info.writers``) that imports it while any project is built, from
that project's root: a folder ``kernels/`` there that is importable breaks the build. Each test installs a copy of the checkout
into an environment that shares this one's packages through links, with and without that package.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("setuptools")
pytest.importorskip("pip")

OTHERS = ("absent", "stand-in", "installed")
OURS = re.compile(r"(kernels|amd[_-]fast|__editable__.*amd_fast.*)([-.].*)?$")

PROBE = """
import importlib.resources, importlib.util, json, sys
import amd_fast
names = sys.argv[1:]
kernels = {name: importlib.util.find_spec(f"amd_fast.kernels.{name}").origin for name in names}
folders = {name: importlib.resources.files(f"amd_fast.kernels.{name}") for name in names}
files = {name: sorted(file.name for file in folder.iterdir() if file.name != "__pycache__") for name, folder in folders.items()}
other = importlib.util.find_spec("kernels")
print(json.dumps({"package": amd_fast.__file__, "kernels": kernels, "files": files, "other": other and other.origin}))
"""

# Prints the names of everything setup.py declares, of all extras.
READ_SETUP = """
import re, setuptools
found = {}
setuptools.setup = found.update
exec(compile(open("setup.py", encoding="utf-8").read(), "setup.py", "exec"), {"__file__": "setup.py", "__name__": "setup"})
requirements = [*found["install_requires"], *(name for extra in found["extras_require"].values() for name in extra)]
print(*(re.match(r"[\\w.-]+", name)[0].lower().replace("_", "-") for name in requirements))
"""


class Installation(NamedTuple):
    """An environment, the copy of the checkout to install there, and the file of the other package (None where it is absent)."""

    python: Path
    checkout: Path
    other: Path | None

    @property
    def packages(self) -> Path:
        return next(self.python.parent.parent.glob("lib/python*/site-packages"))

    def run(self, *arguments: str, cwd: Path, **environment: str) -> str:
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(
            [self.python, *arguments], cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pip(self, *arguments: str) -> None:
        self.run("-m", "pip", *arguments, "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", cwd=self.checkout)

    def probe(self, cwd: Path, **environment: str) -> dict:
        names = [folder.parent.name for folder in self.checkout.glob("kernels/*/__init__.py")]
        assert names
        return json.loads(self.run("-c", PROBE, *names, cwd=cwd, **environment))


def make_environment(folder: Path, other: str) -> tuple[Path, Path | None]:
    """Virtual environment with links to the running one's packages; returns its interpreter and the file of ``kernels``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    linked = {}
    for source in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        linked.update({entry.name: entry for entry in Path(source).iterdir()})
    for name, entry in linked.items():
        theirs = name == "kernels" or name.startswith("kernels-")
        if name.endswith(".pth") or name == "__pycache__" or (OURS.match(name) and not (theirs and other == "installed")):
            continue
        (packages / name).symlink_to(entry)
    if other == "stand-in":
        write_stand_in(packages)
    return folder / "bin" / "python", None if other == "absent" else packages / "kernels" / "__init__.py"


def write_stand_in(packages: Path) -> None:
    """A package ``kernels`` with the same setuptools hook as Hugging Face's."""
    (packages / "kernels").mkdir()
    (packages / "kernels" / "__init__.py").touch()
    (packages / "kernels" / "locking.py").write_text("def write_egg_lockfile(cmd, basename, filename):\n    pass\n")
    information = packages / "kernels-0.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.1\n")
    (information / "entry_points.txt").write_text("[egg_info.writers]\nkernels.lock = kernels.locking:write_egg_lockfile\n")


@pytest.fixture(scope="module")
def source(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy of what building needs, so that no build leaves anything in the checkout."""
    folder = tmp_path_factory.mktemp("source") / "amd_fast_checkout"
    for name in ("amd_fast", "kernels"):
        shutil.copytree(repository / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (repository / name).is_file():
            shutil.copy(repository / name, folder)
    return folder


@pytest.fixture(params=OTHERS)
def installation(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> Installation:
    other = request.param
    if other == "installed":
        try:
            metadata.distribution("kernels")
        except metadata.PackageNotFoundError:
            pytest.skip("the package kernels is not installed here")
    checkout = tmp_path / "checkout"
    shutil.copytree(source, checkout)
    python, file = make_environment(tmp_path / "environment", other)
    return Installation(python, checkout, file)


def assert_finds(found: dict, package: Path, kernels: Path, other: Path | None, checkout: Path) -> None:
    assert found["package"] == str(package / "__init__.py")
    assert found["kernels"] == {name: str(kernels / name / "__init__.py") for name in found["kernels"]}
    assert found["other"] == (None if other is None else str(other))
    for name, files in found["files"].items():
        assert files == sorted(entry.name for entry in (checkout / "kernels" / name).iterdir() if entry.name != "__pycache__")


def test_source_tree(installation: Installation, tmp_path: Path) -> None:
    _, checkout, other = installation
    for cwd in (tmp_path, checkout):
        assert_finds(installation.probe(cwd, PYTHONPATH=str(checkout)), checkout / "amd_fast", checkout / "kernels", other, checkout)


def test_editable(installation: Installation, tmp_path: Path) -> None:
    _, checkout, other = installation
    installation.pip("install", "--editable", str(checkout))
    for cwd in (tmp_path, checkout):
        assert_finds(installation.probe(cwd), checkout / "amd_fast", checkout / "kernels", other, checkout)
    assert installation.run("-m", "amd_fast.cli", "--version", cwd=tmp_path).startswith("amd_fast ")


def test_wheel(installation: Installation, tmp_path: Path) -> None:
    python, checkout, other = installation
    installation.pip("wheel", str(checkout), "--wheel-dir", str(tmp_path / "wheels"))
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert_wheel_is_complete(wheel, checkout)
    installation.pip("install", str(wheel))
    package = installation.packages / "amd_fast"
    assert_finds(installation.probe(tmp_path), package, package / "kernels", other, checkout)
    command = subprocess.run([python.parent / "amd-fast", "--version"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert command.stdout.startswith("amd_fast ")


def assert_wheel_is_complete(wheel: Path, checkout: Path) -> None:
    """Everything under amd_fast/ and kernels/ is inside, and nothing else but the metadata."""
    expected = {file.relative_to(checkout).as_posix() for file in (checkout / "amd_fast").rglob("*") if file.is_file()}
    expected |= {f"amd_fast/{file.relative_to(checkout).as_posix()}" for file in (checkout / "kernels").glob("*/**/*") if file.is_file()}
    expected = {name for name in expected if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected


def test_kernels_folder_is_not_importable_as_kernels(repository: Path) -> None:
    assert not (repository / "kernels" / "__init__.py").exists(), "kernels/ must stay without __init__.py, see amd_fast/kernels/__init__.py"


def test_lock_pins_every_requirement_and_names_no_place(repository: Path) -> None:
    text = (repository / "requirements.lock").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.match(r"[a-z0-9-]+==[0-9][\w.]*( ; .+)?$", line) for line in lines), "an unpinned line, an address or a path in the lock"
    pinned = {line.partition("==")[0] for line in lines}
    declared = subprocess.run([sys.executable, "-c", READ_SETUP], cwd=repository, capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "pytest", "ruff", "nvidia-dali-cuda130"} <= set(declared)
    assert set(declared) <= pinned, f"not in the lock, run `make lock`: {sorted(set(declared) - pinned)}"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("python", ["no-such-python", "./old-python"])
def test_make_says_which_python_it_needs(repository: Path, tmp_path: Path, python: str) -> None:
    for name in ("Makefile", "setup.py", "requirements.lock"):
        shutil.copy(repository / name, tmp_path)
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(["make", f"PYTHON={python}", "test"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "amd_fast needs Python 3.11 or newer" in done.stderr
    assert "make PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()
