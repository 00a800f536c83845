"""Which implementation runs: a named one never falls back, auto says why, nothing is asked of a device."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from amd_fast.kernels.common.gpu import Gpu

import amd_fast
from amd_fast.errors import AmdFastError, ConfigError, ImplementationError
from amd_fast.ops import dispatch

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())
    dispatch._compiler_missing.cache_clear()
    dispatch._too_old.cache_clear()


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An image without a C compiler, in which Triton has built nothing yet."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield
    dispatch._compiler_missing.cache_clear()


def test_reference_by_name_runs_anywhere() -> None:
    for device in (CPU, GPU, torch.device("mps")):
        assert dispatch.select("op", "reference", device, obstacle="none of your business").implementation == "reference"


def test_triton_by_name_never_falls_back() -> None:
    with pytest.raises(ImplementationError, match=r"op: impl='triton' cannot run here.*'cpu'.*TRITON_INTERPRET=1.*impl='auto'"):
        dispatch.select("op", "triton", CPU)


@pytest.mark.skipif(dispatch._triton_missing() is not None, reason="triton is not installed")
def test_triton_by_name_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.select("op", "triton", GPU).implementation == "triton"
    assert dispatch.select("op", "triton", GPU, slower="it is slower here").implementation == "triton"
    with pytest.raises(ImplementationError, match="head width 7"):
        dispatch.select("op", "triton", GPU, obstacle="head width 7 is not a multiple of 8")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.select("op", "triton", CPU).implementation == "triton"


@pytest.mark.skipif(dispatch._triton_missing() is not None, reason="triton is not installed")
def test_auto_prefers_the_kernel_only_where_it_runs_and_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.select("op", "auto", GPU).implementation == "triton"
    assert dispatch.select("op", "auto", GPU, slower="it is slower here") == ("reference", "it is slower here")
    assert dispatch.select("op", "auto", GPU, obstacle="too wide") == ("reference", "too wide")
    assert dispatch.select("op", "auto", CPU).implementation == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.select("op", "auto", CPU).implementation == "reference"


def test_the_library_stands_in_where_it_is_faster_and_the_kernel_does_not_run() -> None:
    assert dispatch.select("op", "auto", CPU, library="it was measured faster") == ("sdpa", "it was measured faster")
    assert dispatch.select("op", "reference", CPU, library="it was measured faster").implementation == "reference"
    assert dispatch.select("op", "auto", GPU, obstacle="too wide", library="faster than the reference").implementation == "sdpa"
    with pytest.raises(ImplementationError):
        dispatch.select("op", "triton", CPU, library="it was measured faster")


def test_missing_triton_is_the_reason_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton_missing", lambda: "the package triton is not installed")
    assert dispatch.select("op", "auto", GPU) == ("reference", "the package triton is not installed")
    with pytest.raises(ImplementationError, match="not installed"):
        dispatch.select("op", "triton", GPU)


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.skipif(dispatch._triton_missing() is not None, reason="triton is not installed")
def test_without_a_c_compiler_auto_takes_the_reference_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.select("op", "auto", GPU).implementation == "reference"
    with pytest.raises(ImplementationError, match=r"no C compiler.*apt install gcc.*CC"):
        dispatch.select("op", "triton", GPU)
    assert dispatch.select("op", "auto", GPU, library="faster than the reference").implementation == "sdpa"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.select("op", "triton", CPU).implementation == "triton"  # the interpreter builds nothing


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.skipif(dispatch._triton_missing() is not None, reason="triton is not installed")
@pytest.mark.parametrize("found", ["CC", "gcc", "clang", "cache"])
def test_a_compiler_is_looked_for_where_triton_looks(found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if found == "CC":
        monkeypatch.setenv("CC", "zig cc")
    elif found == "cache":  # what it would build has been built, and came with the image
        (tmp_path / "ABC").mkdir()
        (tmp_path / "ABC" / "cuda_utils.so").touch()
    else:
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == found else None)
    assert dispatch.select("op", "auto", GPU).implementation == "triton"


@pytest.mark.skipif(dispatch._triton_missing() is not None, reason="triton is not installed")
@pytest.mark.parametrize(("capability", "chosen"), [((7, 0), "reference"), ((7, 5), "reference"), ((8, 0), "triton"), ((12, 0), "triton")])
def test_gpus_that_triton_does_not_support_are_named(capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "gpu_of", lambda device: Gpu("Test GPU", "sm", 1 << 16, capability))
    monkeypatch.setattr(dispatch, "_compiler_missing", lambda: None)
    assert dispatch.select("op", "auto", GPU).implementation == chosen
    if chosen == "reference":
        version = ".".join(map(str, capability))
        with pytest.raises(ImplementationError, match=f"supports GPUs from compute capability 8.0 and the Test GPU has {version}"):
            dispatch.select("op", "triton", GPU)
    dispatch._too_old.cache_clear()


def test_unknown_implementation_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="op: got impl='cuda', expected one of 'auto', 'triton', 'reference'"):
        dispatch.select("op", "cuda", CPU)


def test_auto_logs_each_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="amd_fast.ops"):
        for _ in range(3):
            dispatch.select("op", "auto", CPU)
            dispatch.select("op", "reference", CPU)
        dispatch.select("another", "auto", CPU)
    assert [record.getMessage().split(" because ")[0] for record in caplog.records] == ["op runs as reference", "another runs as reference"]


def test_explain_without_arguments_speaks_about_this_machine() -> None:
    text = amd_fast.explain("cross_modal_attention")
    assert text.startswith("cross_modal_attention on cpu tensors runs as sdpa because torch's own fused attention was measured fastest")
    assert len(text.splitlines()) == (2 if torch.cuda.is_available() else 1)


def test_explain_with_arguments_speaks_about_the_call() -> None:
    query, tokens = torch.zeros(2, 3, 1, 16), torch.zeros(2, 4, 1, 16)
    assert "reference because it was asked for by name" in amd_fast.explain(
        "cross_modal_attention", query, tokens, tokens, impl="reference"
    )
    with pytest.raises(ImplementationError):
        amd_fast.explain("cross_modal_attention", query, tokens, tokens, impl="triton")


def test_explain_names_the_ops_it_knows() -> None:
    with pytest.raises(ConfigError, match=r"explain: got op 'attention', expected one of 'cross_modal_attention'.*check the spelling"):
        amd_fast.explain("attention")


def test_argument_errors_are_value_errors_with_got_expected_and_remedy() -> None:
    error = dispatch.argument_error("key", 3, "4", "add one")
    assert isinstance(error, ValueError) and isinstance(error, AmdFastError)
    assert str(error) == "key: got 3, expected 4; add one"


def test_importing_and_running_the_ops_initialises_no_device_and_imports_no_triton() -> None:
    program = (
        "import sys, torch\n"
        "import amd_fast.ops as ops\n"
        "x = torch.zeros(1, 1, 1, 16)\n"
        "ops.cross_modal_attention(x, x, x)\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'amd_fast.kernels.cross_modal_attention.triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
