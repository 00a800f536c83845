"""Packages of AOTInductor: they equal the model, take any number of clips, and run in Python and C++ without this library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from safetensors.torch import save_file

import amd_fast
from amd_fast import cli
from amd_fast.errors import ImplementationError
from amd_fast.export import load_package
from amd_fast.export.package import recorded_episode
from amd_fast.export.programs import made_inputs, parts_of, require_compiler
from amd_fast.models.afmir import AFMIR
from amd_fast.training.checkpoint import load_model, save_model

RELATIVE, ABSOLUTE = 1e-3, 1e-4
EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "examples" / "cpp"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[AFMIR, Path]:
    """A model as a file, and its package, written by the command."""
    try:
        require_compiler()
    except ImplementationError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    recipe = {"dim": 8, "heads": 2, "frames": 2, "size": 16, "backbone_options": {"width": 8, "base": 4}}
    model = amd_fast.create_model("afmir_small", modalities=("rgb", "flow"), **recipe)
    file = folder / "model.safetensors"
    save_model(model, file, {"name": "afmir_small", "modalities": ["rgb", "flow"], "loss": {}, **recipe})
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # the same program, built in less time
        assert cli.main(["export", str(file), str(folder / "package"), "--no-progress"]) == 0
    return load_model(file), folder / "package"


@pytest.mark.slow
@torch.no_grad()
def test_programs_equal_the_model_for_any_number_of_clips(exported: tuple[AFMIR, Path]) -> None:
    model, folder = exported
    package = load_package(folder)
    assert package.description["programs"] == "aotinductor"
    for sizes in ((1, 2, 1, 2), (2, 1, 3, 1), (9, 20, 7, 8)):
        inputs = made_inputs(model, sizes, sum(sizes))
        for program, (name, module) in zip((package.encoder, package.head), parts_of(model).items(), strict=True):
            for got, wanted in zip(program(*inputs[name]), module(*inputs[name]), strict=True):
                torch.testing.assert_close(got, wanted, rtol=RELATIVE, atol=ABSOLUTE)


@pytest.fixture(scope="module")
def predict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ example, built against the torch that is installed."""
    if not shutil.which("cmake") or not any(map(shutil.which, ("c++", "g++", "clang++", os.environ.get("CXX", "c++")))):
        pytest.skip("the C++ example needs cmake and a C++ compiler")
    build = tmp_path_factory.mktemp("build")
    root = Path(torch.__file__).parent
    for command in (["cmake", "-S", str(EXAMPLE), "-B", str(build), f"-DTORCH_ROOT={root}"], ["cmake", "--build", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "predict"


@pytest.mark.slow
def test_the_cpp_example_gives_the_models_probabilities(exported: tuple[AFMIR, Path], predict: Path, tmp_path: Path) -> None:
    model, package = exported
    episode = recorded_episode(model, (6, 4, 3), 5)
    save_file(episode, tmp_path / "episode.safetensors")
    done = subprocess.run([predict, package, tmp_path / "episode.safetensors"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[float(number) for number in re.findall(r"\d\.\d{6}", line)] for line in done.stdout.splitlines() if line.startswith("clip")]
    expected = torch.cat([episode["expected.log_probs"].exp(), episode["expected.policy"]], 1)
    torch.testing.assert_close(torch.tensor(rows), expected, rtol=RELATIVE, atol=ABSOLUTE)
    assert "largest difference from the recorded log-probabilities" in done.stdout


@pytest.mark.slow
def test_the_cpp_example_notices_other_numbers_and_bad_files(exported: tuple[AFMIR, Path], predict: Path, tmp_path: Path) -> None:
    model, package = exported
    episode = recorded_episode(model, (3, 2, 3), 6)
    short = {name: value for name, value in episode.items() if name != "flow"}
    episode["expected.log_probs"] += 0.1
    cases = {"wrong": (episode, 1, ""), "short": (short, 2, "lacks the tensor flow")}
    for name, (tensors, status, message) in cases.items():
        save_file(tensors, tmp_path / name)
        done = subprocess.run([predict, package, tmp_path / name], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, message in done.stderr) == (status, True), done.stdout + done.stderr
    (tmp_path / "text").write_text("no tensors at all")
    done = subprocess.run([predict, package, tmp_path / "text"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "no safetensors file" in done.stderr


def test_the_command_says_which_device_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = amd_fast.create_model("afmir_small", modalities=("rgb",), dim=8, heads=2, frames=2, size=16)
    recipe = {"name": "afmir_small", "modalities": ["rgb"], "loss": {}, "dim": 8, "heads": 2, "frames": 2, "size": 16}
    save_model(model, tmp_path / "model.safetensors", recipe)
    assert cli.main(["export", str(tmp_path / "model.safetensors"), str(tmp_path / "package"), "--device", "abacus"]) == 2
    assert "--device abacus cannot be used here" in capsys.readouterr().err
    assert not (tmp_path / "package").exists()
