"""``amd-fast doctor`` says what is there, and survives what is absent or broken."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from amd_fast import cli, env_report


def rows(section: str) -> dict[str, env_report.Row]:
    return {row.name: row for row in env_report.collect() if row.section == section}


def break_import(monkeypatch: pytest.MonkeyPatch, module: str, error: Exception) -> None:
    """Make importing a module (and all below it) raise."""
    genuine = importlib.import_module

    def importing(name: str, package: str | None = None) -> Any:
        if name == module or name.startswith(module + "."):
            raise error
        return genuine(name, package)

    monkeypatch.setattr(importlib, "import_module", importing)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["section"] for row in report["rows"]} == {section for section, _ in env_report.PROBES}
    assert report["ok"] == all(row["ok"] for row in report["rows"])
    assert all(row["remedy"] for row in report["rows"] if not row["ok"])


def test_table_tells_every_finding(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    findings = [env_report.Row("one", "good", "yes"), env_report.Row("two", "bad [sic]", "no", False, "do [this]")]
    monkeypatch.setattr(env_report, "collect", lambda: findings)
    env_report.doctor_command()
    text = capsys.readouterr().out
    for part in ("one", "good", "yes", "two", "bad [sic]", "do [this]", "warn", "1 of 2 findings need attention"):
        assert part in text


def test_every_op_and_the_decoder_are_explained() -> None:
    from amd_fast.ops.dispatch import OPS

    explained = rows("implementation of each op")
    assert set(OPS) <= set(explained)
    assert all("because" in explained[op].value for op in OPS)
    assert "because" in rows("video decoding")["decoder"].value


def test_a_probe_that_raises_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Iterator[env_report.Finding]:
        yield "before", "seen"
        raise OSError("libcuda.so.1: cannot open\nmore")

    def sound() -> Iterator[env_report.Finding]:
        yield "after", "seen"

    monkeypatch.setattr(env_report, "PROBES", (("first", broken), ("second", sound)))
    before, failed, after = env_report.collect()
    assert (before.name, after.name) == ("before", "after")
    assert not failed.ok and failed.value == "OSError: libcuda.so.1: cannot open" and failed.remedy


@pytest.mark.parametrize(
    ("module", "section", "name"),
    [("triton", "implementation of each op", "triton"), ("nvidia.dali", "video decoding", "NVIDIA DALI")],
)
def test_optional_package(monkeypatch: pytest.MonkeyPatch, module: str, section: str, name: str) -> None:
    with monkeypatch.context() as patch:
        break_import(patch, module, ModuleNotFoundError(f"No module named {module!r}", name=module))
        absent = rows(section)[name]
    assert absent.ok and absent.value == "not installed" and "pip install" in absent.remedy
    with monkeypatch.context() as patch:
        break_import(patch, module, RuntimeError("driver too old"))
        broken = rows(section)[name]
    assert not broken.ok and broken.value == "RuntimeError: driver too old" and broken.remedy


@pytest.mark.parametrize("gpu", [False, True])
def test_the_c_compiler_that_triton_calls(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setenv("CC", "/opt/cc")
    assert env_report._c_compiler() == ("/opt/cc", True, "")
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: None)
    value, ok, remedy = env_report._c_compiler()
    assert value == "none found" and ok is not gpu and "apt install gcc" in remedy


def test_needed_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    break_import(monkeypatch, "cv2", ImportError("libGL.so.1: cannot open shared object file"))
    row = rows("packages")["import cv2"]
    assert not row.ok and "libGL" in row.value and "opencv-python-headless" in row.remedy


def test_without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    findings = rows("video decoding")
    assert findings and not all(row.ok for row in findings.values())


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env_report, "PACKAGES", {"no-such-package": True})
    row = rows("packages")["no-such-package"]
    assert not row.ok and row.remedy == "pip install no-such-package"


def test_packages_are_those_that_setup_declares(repository: Path) -> None:
    text = (repository / "setup.py").read_text(encoding="utf-8").lower()
    assert not [name for name in env_report.PACKAGES if not name.startswith("nvidia-dali") and name.lower() not in text]


def test_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'probe.cpp:1: fatal error: Python.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    value, ok, remedy = env_report._compiler()
    assert not ok and "Python.h" in value and "python3-dev" in remedy
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    assert env_report._compiler()[1:] == (False, "point CXX at a working compiler")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert env_report._compiler()[0] == "no C++ compiler"


def test_driver_without_a_torch_that_sees_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 580.1, 143771 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    findings = rows("GPU")
    assert findings["driver sees"].value == "NVIDIA H200, 580.1, 143771 MiB"
    assert not findings["torch sees"].ok and "driver" in findings["torch sees"].remedy


def test_memory_and_cores_of_this_machine() -> None:
    import torch

    assert env_report.GIB / 4 < env_report.total_memory() < 2**50
    assert env_report.usable_cores() >= min(1, torch.get_num_threads())
