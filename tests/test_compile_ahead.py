"""Every kernel in every configuration that the tables and the benchmarks' shapes select, compiled for GPUs that are not here."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from amd_fast import compile_ahead
from amd_fast.bench import load
from amd_fast.errors import ConfigError, ImplementationError

# Registers that a thread can have: on AMD half of them are accumulators of the matrix units.
REGISTERS = {"gfx942": 512}
# The configurations were chosen with the lock's Triton; other versions hand out registers otherwise. Bytes; on AMD, registers.
SPILLS = 0 if metadata.version("triton").startswith("3.6.") else 64
KERNELS = list(
    dict.fromkeys((op, spec.label.split()[0]) for op in compile_ahead._SPECS for spec in compile_ahead.iterate_specs(op, "sm_80"))
)


@pytest.mark.slow
@pytest.mark.parametrize("target", compile_ahead.TARGETS)
@pytest.mark.parametrize(("op", "kernel"), KERNELS)
def test_every_configuration_compiles_without_spills(op: str, kernel: str, target: str) -> None:
    specs = [spec for spec in compile_ahead.iterate_specs(op, target) if spec.label.split()[0] == kernel]
    assert specs
    for spec in specs:
        compiled = compile_ahead.compile_spec(op, spec, target)
        assert compiled.spills <= SPILLS, compiled
        assert 0 < compiled.registers <= REGISTERS.get(target, 255), compiled
        assert compiled.shared_memory <= compile_ahead._SHARED_MEMORY[target], compiled
        if op == "cross_modal_attention":
            assert compiled.shared_memory <= attention_bound(spec), compiled


def attention_bound(spec: Any) -> int:
    """What the filter by shared memory believes this variant needs."""
    from amd_fast.kernels.cross_modal_attention import config

    constants = spec.constants
    item_size = 2 if spec.signature["key"] == "*bf16" else 4
    launch = config.LaunchConfig(constants["PAIRS"], constants.get("BLOCK_ROWS", 1), constants["BLOCK_TOKENS"], spec.warps, spec.stages)
    shape = config.Shape(item_size, constants["WIDTH"], 16, constants["BLOCK_TOKENS"])
    return config.shared_memory_bound(spec.label.split()[0], launch, shape)


@pytest.mark.parametrize("target", compile_ahead.TARGETS)
def test_what_the_benchmarks_shapes_launch_is_among_them(target: str) -> None:
    shared_memory = compile_ahead._SHARED_MEMORY[target]
    for shape in load("shapes").SHAPES["cross_modal_attention"]:
        compiled = [attention_launch(spec) for spec in compile_ahead.iterate_specs(shape.op, target)]
        for item_size in (2, 4):
            for launch in attention_launches(shape, item_size, shared_memory):
                assert launch in compiled, (shape, launch)
    for shape in load("shapes").SHAPES["free_energy_loss"]:
        compiled = [loss_launch(spec) for spec in compile_ahead.iterate_specs(shape.op, target)]
        for launch in loss_launches(shape, shared_memory):
            assert launch in compiled, (shape, launch)


def attention_launch(spec: Any) -> tuple[Any, ...]:
    constants, item_size = spec.constants, 2 if spec.signature["key"] == "*bf16" else 4
    blocks = (constants["PAIRS"], constants.get("BLOCK_ROWS", 1), constants["BLOCK_TOKENS"])
    return spec.label.split()[0], item_size, constants["WIDTH"], *blocks, spec.warps, spec.stages


def attention_launches(shape: Any, item_size: int, shared_memory: int) -> list[tuple[Any, ...]]:
    from amd_fast.kernels.cross_modal_attention import config

    key = config.Shape.of(item_size, shape.width, shape.rows, shape.tokens)
    launches = []
    for kernel in config.KERNELS:
        if kernel.startswith(config.route(key)):
            launch = config.choose(kernel, key, config.load_table("default", "any"), shared_memory)
            blocks = (launch.pairs, launch.block_rows, launch.block_tokens)
            launches.append((kernel, item_size, key.width, *blocks, launch.warps, launch.stages))
    return launches


def loss_launch(spec: Any) -> tuple[Any, ...]:
    constants = spec.constants
    return spec.label.split()[0], *(constants.get(name) for name in ("V", "C", "ROWS", "TEMPERED")), spec.warps


def loss_launches(shape: Any, shared_memory: int) -> list[tuple[Any, ...]]:
    from amd_fast.kernels.free_energy import config

    launches = []
    for kernel in config.KERNELS:
        launch = config.choose(kernel, config.Shape.of(shape.views, shape.classes), config.load_table("default", "any"), shared_memory)
        launches += [(kernel, shape.views, shape.classes, launch.rows, tempered, launch.warps) for tempered in (False, True)]
    return launches


def test_no_program_is_compiled_twice() -> None:
    for op in compile_ahead._SPECS:
        programs = []
        for spec in compile_ahead.iterate_specs(op, "sm_90"):
            constants = sorted((name, str(value)) for name, value in spec.constants.items())
            programs.append((spec.kernel.__name__, constants, sorted(spec.signature.items()), spec.warps, spec.stages))
        repeated = [program for number, program in enumerate(programs) if program in programs[:number]]
        assert not repeated


def test_the_tables_of_an_architecture_are_all_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from amd_fast.kernels.free_energy import config

    def table(device: str, architecture: str, warps: int) -> str:
        entries = [{"views": 3, "classes": 5, "rows": 32, "warps": warps}]
        return json.dumps({"device": device, "architecture": architecture, "kernels": dict.fromkeys(config.KERNELS, entries)})

    (tmp_path / "configs").mkdir()
    for name, device, architecture, warps in (
        ("default", "default", "any", 1),
        ("h100", "NVIDIA H100", "sm_90", 2),
        ("h200", "NVIDIA H200", "sm_90", 8),
    ):
        (tmp_path / "configs" / f"{name}.json").write_text(table(device, architecture, warps))
    monkeypatch.setattr(config, "files", lambda _: tmp_path)
    for architecture, expected in (("sm_90", {2, 8}), ("sm_80", {1})):
        specs = [spec for spec in config.compile_specs(1 << 20, architecture) if not spec.label.startswith("pack")]
        assert {spec.warps for spec in specs} == expected


def test_command_reports_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = compile_ahead._specs("cross_modal_attention", "sm_90")[:1]
    monkeypatch.setattr(compile_ahead, "_specs", lambda op, target: specs)
    report = tmp_path / "reports" / "compiled.json"
    compile_ahead.compile_command(targets=["sm_90"], ops=["cross_modal_attention"], output=str(report), workers=1)
    (entry,) = json.loads(report.read_text())
    assert entry["target"] == "sm_90" and entry["spills"] == 0 and entry["registers"] > 0 and not entry["error"]
    assert [file.name for file in report.parent.iterdir()] == ["compiled.json"]
    with pytest.raises(ConfigError, match=r"targets: got 'sm_9', expected any of sm_80, .*; leave it out"):
        compile_ahead.compile_command(targets=["sm_9"])
    broken = specs[0]._replace(constants={**specs[0].constants, "PAIRS": 3})  # tl.arange wants powers of two
    monkeypatch.setattr(compile_ahead, "_specs", lambda op, target: [broken])
    with pytest.raises(ImplementationError, match=r"1 of 1 variants do not compile.*rows_forward.*sm_90"):
        compile_ahead.compile_command(targets=["sm_90"], ops=["cross_modal_attention"], workers=1)
