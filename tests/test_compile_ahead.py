"""Every kernel in every configuration that the tables and the benchmarks' shapes select, compiled for GPUs that are not here."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
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
# The configurations were chosen with the lock's Triton; other versions hand out registers otherwise. Bytes.
SPILLS = 0 if metadata.version("triton").startswith("3.6.") else 64
KERNELS = list(
    dict.fromkeys((op, spec.label.split()[0]) for op in compile_ahead._SPECS for spec in compile_ahead.iterate_specs(op, "sm_80"))
)


def compiled_here(op: str, kernel: str, target: str) -> list[Any]:
    """What matters most for every GPU, and of what differs from it a share for each: ``amd-fast compile`` takes everything."""
    specs = [spec for spec in compile_ahead.iterate_specs(op, target) if spec.label.split()[0] == kernel and spec.importance < 2]
    usual = [spec for spec in specs if spec.importance == 0]
    others = [spec for spec in specs if spec.importance == 1]
    return usual + others[compile_ahead.TARGETS.index(target) :: len(compile_ahead.TARGETS)]


@pytest.mark.slow
@pytest.mark.parametrize("target", compile_ahead.TARGETS)
@pytest.mark.parametrize(("op", "kernel"), KERNELS)
def test_every_configuration_compiles_without_spills(op: str, kernel: str, target: str) -> None:
    specs = compiled_here(op, kernel, target)
    assert specs
    for spec in specs:
        compiled = compile_ahead.compile_spec(op, spec, target)
        assert compiled.spills <= SPILLS, compiled
        assert 0 < compiled.registers <= REGISTERS.get(target, 255), compiled
        assert compiled.shared_memory <= compile_ahead._SHARED_MEMORY[target], compiled
        if op == "cross_modal_attention":
            assert compiled.shared_memory <= attention_bound(spec, target), compiled


@pytest.mark.parametrize("target", compile_ahead.TARGETS)
@pytest.mark.parametrize("label", ["forward V=3 C=5 K=2 bf16 tau=1", "forward V=2 C=5 K=4 fp32 tau", "backward V=3 C=5 bf16 tau=1"])
def test_few_classes_never_cross_threads(label: str, target: str) -> None:
    """How Triton spreads a tile over threads differs between its versions; the kernels' hints must hold in each."""
    spec = next(spec for spec in compile_ahead.iterate_specs("free_energy_loss", target) if spec.label.startswith(f"{label} "))
    assert spec.constants["ROW_PER_THREAD"]
    kernel = compile_ahead.build("free_energy_loss", spec, target)
    assert threads_of_first_tile(kernel)[1:] == [1, 1]
    if target.startswith("sm_"):
        program = kernel.asm["ptx"]
        assert "shfl" not in program
        width = {"bf16": 16, "fp32": 32}[label.split()[-2]]
        assert f"ld.global.b{width}" in program and not re.search(r"ld\.global\.v\d\.b16", program), "logits are read one by one"


@pytest.mark.parametrize("target", compile_ahead.TARGETS)
@pytest.mark.parametrize("kernel", ["rows_forward", "rows_backward"])
def test_small_sets_are_spread_by_pairs_before_tokens(kernel: str, target: str) -> None:
    specs = [spec for spec in compile_ahead.iterate_specs("cross_modal_attention", target) if spec.label.startswith(f"{kernel} d=16 N=8 ")]
    pairs = specs[0].constants["PAIRS"]
    along_pairs, along_tokens, along_vectors = threads_of_first_tile(compile_ahead.build("cross_modal_attention", specs[0], target))
    assert along_pairs == min(pairs, along_pairs * along_tokens) > 1, (along_pairs, along_tokens, along_vectors)


@pytest.mark.parametrize("kernel", ["set_forward d=64 N=16 16-bit", "stream_forward d=64 N=64 16-bit"])
def test_products_run_on_amds_matrix_units(kernel: str) -> None:
    """Which take 16 queries or none."""
    spec = next(spec for spec in compile_ahead.iterate_specs("cross_modal_attention", "gfx942") if spec.label.startswith(kernel))
    assert "v_mfma" in compile_ahead.build("cross_modal_attention", spec, "gfx942").asm["amdgcn"]


def threads_of_first_tile(kernel: Any) -> list[int]:
    """Threads of a warp along each of the three dimensions of the first tile that a kernel reads."""
    text = kernel.asm["ttgir"]
    name = next(name for name in re.findall(r"= (?:tt\.load|amdg\.buffer_load) .*, (#\w+)>", text) if f"{name} = #ttg.blocked" in text)
    layout = re.search(rf"^{name} = #ttg\.blocked<\{{.*?threadsPerWarp = \[([\d, ]+)\]", text, re.MULTILINE)
    assert layout is not None
    return [int(number) for number in layout.group(1).split(",")]


def attention_bound(spec: Any, target: str) -> int:
    """What the filter by shared memory believes this variant needs."""
    from amd_fast.kernels.cross_modal_attention import config

    item_size, width, launch = attention_configuration(spec)
    shape = config.Shape(item_size, width, 16, launch.block_tokens)
    return config.shared_memory_bound(spec.label.split()[0], launch, shape, target.startswith("sm_"))


def attention_configuration(spec: Any) -> tuple[int, int, Any]:
    """Size of an element, width of the block that holds a head, and how the kernel is launched."""
    from amd_fast.kernels.cross_modal_attention import config

    constants = spec.constants
    parts, blocks = constants.get("PARTS", 1), (constants.get("BLOCK_ROWS", 1), constants["BLOCK_TOKENS"])
    launch = config.LaunchConfig(constants.get("PAIRS", 1), *blocks, spec.warps, spec.stages, parts)
    return 2 if spec.signature["key"] == "*bf16" else 4, constants["BLOCK_WIDTH"] * parts, launch


@pytest.mark.parametrize("target", compile_ahead.TARGETS)
def test_what_the_benchmarks_shapes_launch_is_among_them(target: str) -> None:
    for shape in load("shapes").SHAPES["cross_modal_attention"]:
        compiled = [attention_launch(spec) for spec in compile_ahead.iterate_specs(shape.op, target)]
        for item_size in (2, 4):
            for launch in attention_launches(shape, item_size, target):
                assert launch in compiled, (shape, launch)
    for shape in load("shapes").SHAPES["free_energy_loss"]:
        compiled = [loss_launch(spec) for spec in compile_ahead.iterate_specs(shape.op, target)]
        for launch in loss_launches(shape, target):
            assert launch in compiled, (shape, launch)


def attention_launch(spec: Any) -> tuple[Any, ...]:
    return spec.label.split()[0], *attention_configuration(spec)


def attention_launches(shape: Any, item_size: int, target: str) -> list[tuple[Any, ...]]:
    from amd_fast.kernels.cross_modal_attention import config

    key = config.Shape.of(item_size, shape.width, shape.rows, shape.tokens)
    launches = []
    for kernel in config.KERNELS:
        route, _, pass_ = kernel.partition("_")
        if route == config.route(key, pass_.split("_")[0]):
            launch = config.choose(kernel, key, config.load_table("any", target), compile_ahead._SHARED_MEMORY[target])
            launches.append((kernel, item_size, key.width, launch))
    return launches


def loss_launch(spec: Any) -> tuple[Any, ...]:
    constants = spec.constants
    return spec.label.split()[0], *(constants.get(name) for name in ("V", "C", "ROWS", "TEMPERED")), spec.warps


def loss_launches(shape: Any, target: str) -> list[tuple[Any, ...]]:
    from amd_fast.kernels.free_energy import config

    launches = []
    for kernel in config.KERNELS:
        table, shared_memory = config.load_table("any", target), compile_ahead._SHARED_MEMORY[target]
        launch = config.choose(kernel, config.Shape.of(shape.views, shape.classes), table, shared_memory)
        launches += [(kernel, shape.views, shape.classes, launch.rows, tempered, launch.warps) for tempered in (False, True)]
    return launches


class Recorder:
    """Stands for a kernel: keeps how it was launched."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self.launches.append((self.kernel, arguments, constants))


def program(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """The program that Triton would compile for a launch: kernel, types, constants, what is divisible by 16, warps, stages."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    constants = dict(constants)
    warps, stages, _ = (constants.pop(name, 1) for name in ("num_warps", "num_stages", "enable_fp_fusion"))
    binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    specialized = dict(zip(kernel.arg_names, binder(*arguments, **constants)[1], strict=True))
    types = {name: kind for name, (kind, _) in specialized.items() if kind != "constexpr"}
    values = {name: value for name, (kind, value) in specialized.items() if kind == "constexpr"}
    return kernel, types, values, {name for name in types if specialized[name][1] == "D"}, warps, stages


def attention_launched(rows: int, tokens: int, heads: int, width: int, dtype: str, weights: str, odd: bool) -> list[Any]:
    import torch
    from amd_fast.kernels.cross_modal_attention import config as configurations
    from amd_fast.kernels.cross_modal_attention import triton as launcher

    def vectors(length: int) -> Any:
        return torch.empty(2, length, heads, width + odd, dtype=getattr(torch, dtype))[..., :width]

    launches: list[Any] = []
    weight = None if weights == "none" else torch.empty(2, 1 if weights == "shared" else rows, tokens)
    with pytest.MonkeyPatch.context() as patch:
        for name in configurations.KERNELS:
            patch.setattr(launcher, name, Recorder(getattr(launcher, name), launches))
        patch.setattr(launcher, "_FORWARD", {name: getattr(launcher, f"{name}_forward") for name in launcher._FORWARD})
        patch.setattr(launcher, "_precision", lambda query: "tf32x3")
        query, key, value = vectors(rows), vectors(tokens), vectors(tokens)
        output, evidence = launcher.cross_modal_attention(query, key, value, weight)
        gradient = weights != "row given"
        launcher.cross_modal_attention_backward(output, evidence, query, key, value, weight, output, evidence, log_weight_gradient=gradient)
    return [program(*launch) for launch in launches]


@pytest.mark.parametrize(
    ("rows", "tokens", "width", "dtype"),
    [
        (3, 16, 64, "bfloat16"),
        (9, 16, 64, "bfloat16"),
        (3, 400, 64, "bfloat16"),
        (3, 64, 32, "float32"),
        (9, 320, 128, "float32"),
        (9, 512, 256, "float32"),
    ],
)
@pytest.mark.parametrize(
    ("weights", "masked", "odd"),
    [("row", False, False), ("row given", False, False), ("none", False, False), ("row", True, False), ("shared", True, True)],
)
def test_attention_compiles_what_a_launch_does(
    rows: int, tokens: int, width: int, dtype: str, weights: str, masked: bool, odd: bool
) -> None:
    launched = attention_launched(rows, tokens, 8, width * 3 // 4 if masked else width, dtype, weights, odd)
    assert len(launched) in (2, 3)
    compiled = [spec_program(spec) for spec in compile_ahead.iterate_specs("cross_modal_attention", "sm_90")]
    for one in launched:
        assert one in compiled, one


def spec_program(spec: Any) -> tuple[Any, ...]:
    return spec.kernel, dict(spec.signature), dict(spec.constants), set(spec.divisible), spec.warps, spec.stages


def test_attention_compiles_nothing_anew_for_other_batches() -> None:
    programs = [attention_launched(rows, tokens, heads, 64, "bfloat16", "none", False) for rows, tokens, heads in ((3, 16, 8), (1, 13, 1))]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tempered", [False, True])
def test_the_loss_compiles_what_a_launch_does(dtype: str, tempered: bool) -> None:
    import torch
    from amd_fast.kernels.free_energy import triton as launcher

    channels = 2 if dtype == "bfloat16" else 4
    launches: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("free_energy_forward", "free_energy_backward", "pack_model"):
            patch.setattr(launcher, name, Recorder(getattr(launcher, name), launches))
        patch.setattr(launcher, "_approximate", lambda logits: True)
        logits, target, present = (
            torch.empty(50, 4, 5, dtype=getattr(torch, dtype)),
            torch.zeros(50, dtype=torch.int64),
            torch.ones(50, 4).bool(),
        )
        double = {"dtype": torch.float64}
        model = (torch.ones(4, channels, 8, 4, **double), torch.ones(2, 4, 4, **double), torch.ones(2, **double), torch.ones(4, **double))
        numbers = (2.0 if tempered else 1.0, 0.1, 1.0, 1.0)
        outputs = launcher.free_energy_loss_with_factors(
            logits, target, torch.empty(50, 4, channels - 1), *model, model[3], torch.ones((), **double), *numbers, present
        )
        factors = (outputs[7], outputs[8], outputs[6])
        launcher.free_energy_loss_backward(*outputs[:4], logits, target, present, *factors, numbers[0], 1.0, 1.0)
    compiled = [spec_program(spec) for spec in compile_ahead.iterate_specs("free_energy_loss", "sm_90")]
    pack, *programs = [program(*launch) for launch in launches]
    assert pack[1] == next(types for kernel, types, *_ in compiled if kernel is pack[0])
    assert len(programs) == 2
    for one in programs:
        assert one in compiled, one


@pytest.mark.parametrize("transposed", [False, True])
def test_alignment_compiles_what_a_launch_does(transposed: bool) -> None:
    import torch
    from amd_fast.kernels.otam import triton as launcher

    launches: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("otam_forward", "otam_backward"):
            patch.setattr(launcher, name, Recorder(getattr(launcher, name), launches))
        distances, frames = torch.empty(7, 8, 8), torch.full((7,), 8)
        distances = distances.mT if transposed else distances
        cost = launcher.otam_alignment(distances, 0.1, frames, frames)
        launcher.otam_alignment_backward(cost, distances, 0.1, frames, frames)
    compiled = [spec_program(spec) for spec in compile_ahead.iterate_specs("otam_alignment", "sm_90")]
    assert len(launches) == 3
    for launch in launches:
        assert program(*launch) in compiled, launch


def test_no_program_is_compiled_twice() -> None:
    for op in compile_ahead._SPECS:
        programs = [spec_program(spec) for spec in compile_ahead.iterate_specs(op, "sm_90")]
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


@pytest.mark.parametrize(("importance", "text"), [(1, "8 bytes spilled"), (2, "8 bytes spilled, in rare launches")])
def test_command_fails_where_usual_launches_spill_and_names_the_others(
    importance: int, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = compile_ahead._specs("cross_modal_attention", "sm_90")[0]._replace(importance=importance)
    monkeypatch.setattr(compile_ahead, "_specs", lambda op, target: [spec])
    monkeypatch.setattr(compile_ahead, "_nvidia_usage", lambda cubin: (255, 8))
    expected = pytest.raises(ImplementationError, match="1 of 1 variants spill") if importance < 2 else contextlib.nullcontext()
    with expected:
        compile_ahead.compile_command(targets=["sm_90"], ops=["cross_modal_attention"], workers=1)
    assert capsys.readouterr().out.splitlines()[-1] == f"sm_90 {spec.label}: {text}"


def test_scalars_that_amd_keeps_in_vector_registers_are_no_spills() -> None:
    """The metadata of two kernels as the compiler wrote them: only the second one has memory for what did not fit."""
    text = "    .private_segment_fixed_size: {}\n    .sgpr_spill_count: {}\n    .vgpr_count:     {}\n    .vgpr_spill_count: {}\n"
    assert compile_ahead._amd_usage(text.format(0, 246, 176, 0)) == (176, 0)
    assert compile_ahead._amd_usage(text.format(388, 0, 256, 97)) == (256, 388)


def test_command_reports_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    specs = compile_ahead._specs("cross_modal_attention", "sm_90")[:1]
    monkeypatch.setattr(compile_ahead, "_specs", lambda op, target: specs)
    report = tmp_path / "reports" / "compiled.json"
    compile_ahead.compile_command(targets=["sm_90"], ops=["cross_modal_attention"], output=str(report), workers=1)
    (entry,) = json.loads(report.read_text())
    assert entry["target"] == "sm_90" and entry["spills"] == 0 and entry["registers"] > 0 and not entry["error"]
    assert [file.name for file in report.parent.iterdir()] == ["compiled.json"]
    assert f"│ sm_90  │ {specs[0].label} │ " in capsys.readouterr().out, "where the output is a file, a variant takes one line"
    with pytest.raises(ConfigError, match=r"targets: got 'sm_9', expected any of sm_80, .*; leave it out"):
        compile_ahead.compile_command(targets=["sm_9"])
    broken = specs[0]._replace(constants={**specs[0].constants, "PAIRS": 3})  # tl.arange wants powers of two
    monkeypatch.setattr(compile_ahead, "_specs", lambda op, target: [broken])
    with pytest.raises(ImplementationError, match=r"1 of 1 variants do not compile.*rows_forward.*sm_90"):
        compile_ahead.compile_command(targets=["sm_90"], ops=["cross_modal_attention"], workers=1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"sm_90 {broken.label}: "), "what is wrong is named once more below the table"
