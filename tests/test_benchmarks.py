"""The benchmarks measure what they say: shapes, the check before the clock, the clock's turns, the table, JSON, two revisions."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from amd_fast import bench
from amd_fast.errors import ConfigError, ImplementationError

shapes = bench.load("shapes")
workloads = bench.load("workloads")
providers = bench.load("providers")
run = bench.load("run")
report = bench.load("report")
timing = bench.load("timing")
compare = bench.load("compare")
machine = bench.load("machine")

CPU = torch.device("cpu")
TINY = (shapes.AttentionShape("tiny", 3, frames=4, heads=2, width=16), shapes.LossShape("tiny", 7))


@pytest.fixture(autouse=True)
def quick_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e9)


def some(*names: str) -> Any:
    """The providers with these names, for ``run``."""
    return lambda op: [provider for provider in providers.providers(op) if provider.name in names]


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.op)
@pytest.mark.parametrize("direction", shapes.DIRECTIONS)
def test_traffic_is_the_bytes_of_the_tensors(shape: Any, direction: str) -> None:
    case = workloads.make(shape, torch.float32, CPU)
    outputs = workloads.reference(case)
    grads = case.gradients(outputs)
    inputs = sum(tensor.nbytes for tensor in case.inputs.values())
    leaves = sum(grad.nbytes for grad in grads.values())
    teacher = 8 * shape.batch if case.model else 0
    forward = inputs + sum(tensor.nbytes for tensor in outputs.values()) + teacher
    backward = inputs + case.incoming.nbytes + leaves
    if case.model:
        backward += outputs["policy"].nbytes + teacher - case.inputs["context_evidence"].nbytes
    else:
        backward += outputs["log_evidence"].nbytes
    assert shape.traffic(direction, 4) == {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def test_shapes_are_selected_in_turn_and_cut_down() -> None:
    chosen = shapes.select()
    assert [shape.op for shape in chosen[:4]] == ["cross_modal_attention", "free_energy_loss"] * 2
    assert [(shape.op, shape.name) for shape in shapes.select(["free_energy_loss"], ["episode"])] == [("free_energy_loss", "episode")]
    assert {type(shape) for shape in shapes.select(None, ["episode"])} == {shapes.AttentionShape, shapes.LossShape}
    assert all(shape.capped(5000).elements <= 5000 or shape.capped(5000).batch == 1 for shape in chosen)
    assert all(shape.capped(1 << 40) == shape for shape in chosen)
    with pytest.raises(ConfigError, match=r"epidose.*episode"):
        shapes.select(None, ["epidose"])
    with pytest.raises(ConfigError, match=r"attention.*cross_modal_attention"):
        shapes.select(["attention"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.op)
def test_right_results_pass_and_wrong_ones_do_not(shape: Any, dtype: torch.dtype) -> None:
    case = workloads.make(shape, dtype, CPU)
    assert case.check(lambda: workloads.reference(case)) <= 1.0
    for provider in providers.providers(shape.op):
        if provider.name in ("amd_fast", "loop"):
            forward = provider.build(case)
            if dtype == torch.float32 or provider.name == "amd_fast":
                assert case.check(forward) <= 1.0

    def slightly_wrong() -> dict[str, torch.Tensor]:
        return {name: tensor * (1.1 if name in ("output", "task") else 1.0) for name, tensor in workloads.reference(case).items()}

    def nan_in_one_place() -> dict[str, torch.Tensor]:
        outputs = workloads.reference(case)
        first = next(iter(outputs))
        return {**outputs, first: outputs[first].index_fill(0, torch.tensor([1]), float("nan"))}

    for wrong in (slightly_wrong, nan_in_one_place):
        with pytest.raises(workloads.WrongError, match="is off by"):
            case.check(wrong)


def test_a_wrong_gradient_is_wrong() -> None:
    case = workloads.make(TINY[0], torch.float32, CPU)

    def without_gradient_of_key() -> dict[str, torch.Tensor]:
        inputs = {**case.inputs, "key": case.inputs["key"].detach() + 0.0 * case.inputs["key"]}
        return dict(workloads.reference(workloads.dataclasses.replace(case, inputs=inputs)))

    with pytest.raises(workloads.WrongError, match="grad_key"):
        case.check(without_gradient_of_key)


def test_only_both_ends_of_a_large_batch_are_compared() -> None:
    case = workloads.make(shapes.LossShape("large", 2000), torch.float32, CPU)
    assert len(case.probe) == 512
    assert case.probe.min() == 0
    assert case.probe.max() == 1999
    assert case.check(lambda: workloads.reference(case)) <= 1.0


def test_sdpa_computes_the_same_and_says_what_it_lacks() -> None:
    result = run.run(TINY[:1], [torch.float32], CPU, directions=["forward"], chosen=some("amd_fast", "sdpa-math", "xformers"), seconds=0.01)
    by_name = {entry.provider: entry for entry in result.results}
    assert by_name["sdpa-math"].status == "ok"
    assert by_name["sdpa-math"].reason == "without the evidence"
    assert by_name["xformers"].status == "skipped"
    assert by_name["xformers"].time is None


def failing_with(error: BaseException) -> Any:
    def build(case: Any) -> Any:
        raise error

    return build


def table_of(result: Any) -> str:
    with io.StringIO() as file:
        report.show(result, Console(file=file, width=250))
        return file.getvalue()


def test_whoever_fails_or_is_wrong_is_a_line_and_not_the_end() -> None:
    def wrong(case: Any) -> Any:
        return lambda: {name: 2 * tensor for name, tensor in workloads.reference(case).items()}

    builds = {
        "broken": failing_with(OSError("no such library")),
        "wrong": wrong,
        "large": failing_with(torch.OutOfMemoryError("CUDA out of memory")),
        "elsewhere": failing_with(providers.UnavailableError("not here")),
        "reference": lambda case: lambda: workloads.reference(case),
    }
    peers = [providers.Provider(name, "any", build) for name, build in builds.items()]
    result = run.run(TINY[1:], [torch.float32], CPU, directions=["both"], chosen=lambda op: peers, seconds=0.01)
    assert {entry.provider: entry.status for entry in result.results} == {
        "broken": "failed", "wrong": "wrong", "large": "failed", "elsewhere": "skipped", "reference": "ok"
    }  # fmt: skip
    assert "no such library" in result.results[0].reason
    assert "is off by" in result.results[1].reason
    assert result.results[2].reason == "out of memory"
    assert [bool(entry.time) for entry in result.results] == [False] * 4 + [True]
    assert result.faults == 0, "none of them is ours"


@pytest.mark.parametrize(
    ("error", "status"), [(ZeroDivisionError("in the kernel"), "failed"), (workloads.WrongError("output is off by 1"), "wrong")]
)
def test_where_ours_fails_the_run_goes_on_and_its_end_says_so(
    error: Exception, status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = providers.Provider(providers.OURS, TINY[0].op, failing_with(error))
    monkeypatch.setattr(providers, "PROVIDERS", (failing, *some("reference")(TINY[0].op), *some("amd_fast")(TINY[1].op)))
    options = {"shapes": ["episode"], "directions": ["forward"], "device": "cpu", "max_elements": 2000}
    assert bench.bench_command(**options, output=str(tmp_path)) == 1
    assert f"amd_fast: {status}: " in (shown := capsys.readouterr().out)
    assert f"{providers.OURS} failed or was wrong in 1 of 3 lines" in shown
    written = report.read(tmp_path, machine.file_stem(CPU))
    assert [(entry.op, entry.provider, entry.status) for entry in written.results] == [
        ("cross_modal_attention", "amd_fast", status),
        ("cross_modal_attention", "reference", "ok"),
        ("free_energy_loss", "amd_fast", "ok"),
    ]
    monkeypatch.setattr(providers, "PROVIDERS", tuple(some("amd_fast")(TINY[1].op)))
    assert bench.bench_command(**options) == 0


def test_too_little_memory_under_the_clock_costs_that_provider_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def hungry(case: Any) -> Any:
        def forward() -> Any:
            calls.append("")
            if len(calls) > 6:  # the check and the first calls have passed
                raise torch.OutOfMemoryError("CUDA out of memory")
            return workloads.reference(case)

        return forward

    chosen = [providers.Provider("hungry", "any", hungry), *some("amd_fast")(TINY[1].op)]
    result = run.run(TINY[1:], [torch.float32], CPU, chosen=lambda op: chosen, seconds=0.01)
    lines = {(entry.provider, entry.direction): entry for entry in result.results}
    assert [lines["hungry", direction].status for direction in shapes.DIRECTIONS] == ["failed"] * 3
    assert lines["hungry", "both"].reason == "out of memory"
    assert all(lines["amd_fast", direction].time for direction in shapes.DIRECTIONS)
    # What fails later than that, when its memory is measured, has no time either.
    monkeypatch.setattr(timing, "peak_memory", lambda call, device: calls.index("not there"))
    result = run.run(TINY[1:], [torch.float32], CPU, directions=["both"], chosen=some("amd_fast"), seconds=0.01)
    assert [(entry.status, entry.time) for entry in result.results] == [("failed", None)]


def test_inputs_that_cannot_be_made_are_named_and_cost_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    make = workloads.make

    def short_of_memory(shape: Any, *arguments: Any) -> Any:
        if shape.op == "cross_modal_attention":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(shape, *arguments)

    monkeypatch.setattr(run, "make", short_of_memory)
    result = run.run(TINY, [torch.float32], CPU, directions=["forward"], chosen=some("amd_fast"), seconds=0.01)
    assert [entry.op for entry in result.results] == ["free_energy_loss"]
    assert result.left_out[0].startswith("cross_modal_attention tiny")
    assert result.left_out[0].endswith("out of memory")


def test_a_run_that_is_killed_leaves_what_it_had_and_can_be_resumed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(case: Any) -> Any:
        raise KeyboardInterrupt

    stem = machine.file_stem(CPU)
    options = {"shapes": ["episode"], "directions": ["forward"], "device": "cpu", "max_elements": 2000, "output": str(tmp_path)}
    ours = {op: some("amd_fast")(op) for op in shapes.SHAPES}
    attention, loss = shapes.SHAPES
    monkeypatch.setattr(providers, "PROVIDERS", (*ours[attention], providers.Provider("killing", loss, interrupted)))
    with pytest.raises(KeyboardInterrupt):
        bench.bench_command(**options)
    left = report.read(tmp_path, stem)
    assert [entry.op for entry in left.results] == [attention]
    assert left.running.startswith("free_energy_loss episode")
    assert [path.name for path in tmp_path.iterdir()] == [f"{stem}.json"]

    monkeypatch.setattr(providers, "PROVIDERS", (*ours[attention], *ours[loss]))
    assert bench.bench_command(**options, resume=True) == 0
    resumed = report.read(tmp_path, stem)
    assert resumed.results[0] == left.results[0], "what is known is not measured again"
    assert [entry.op for entry in resumed.results] == [attention, loss]
    assert (resumed.running, resumed.ended) == ("", [left.running])
    # Numbers of other code are not mixed with these.
    monkeypatch.setattr(machine, "commit", lambda: "another")
    assert bench.bench_command(**options, resume=True) == 0
    assert report.read(tmp_path, stem).results[0] != left.results[0]


def test_what_ended_a_process_is_tried_last(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(run, "_measure", lambda shape, *rest: order.append(shape.op))
    earlier = run.Report(machine.describe(CPU), 1e9, [], [], running=run.title_of(TINY[0], torch.float32))
    run.run(TINY, [torch.float32], CPU, earlier=earlier)
    assert order == [TINY[1].op, TINY[0].op]


def test_a_gpu_that_is_lost_ends_the_process_and_the_next_one_measures_the_rest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fatal = providers.Provider("fatal", TINY[0].op, failing_with(RuntimeError("illegal memory access")))
    monkeypatch.setattr(providers, "PROVIDERS", (fatal, *some("amd_fast")(TINY[0].op), *some("amd_fast")(TINY[1].op)))
    answered = run._recover

    def recover(device: torch.device) -> None:
        raise run.DeviceLostError("illegal memory access")

    options = {"shapes": ["episode"], "directions": ["forward"], "device": "cpu", "max_elements": 2000, "output": str(tmp_path)}
    monkeypatch.setattr(run, "_recover", recover)
    assert bench.bench_command(**options) == bench.EXIT_LOST
    left = report.read(tmp_path, machine.file_stem(CPU))
    assert [(entry.provider, entry.status) for entry in left.results] == [("fatal", "failed")]
    assert all("the GPU stopped answering at cross_modal_attention episode" in line for line in left.left_out)
    assert len(left.left_out) == 2
    monkeypatch.setattr(run, "_recover", answered)
    assert bench.bench_command(**options, resume=True) == 0
    resumed = report.read(tmp_path, machine.file_stem(CPU))
    assert [(entry.op, entry.provider, entry.status) for entry in resumed.results] == [
        ("cross_modal_attention", "fatal", "failed"),
        ("cross_modal_attention", "amd_fast", "ok"),
        ("free_energy_loss", "amd_fast", "ok"),
    ]
    assert resumed.left_out == []


def test_the_figures_that_were_promised_come_first() -> None:
    types = [torch.bfloat16, torch.float32]
    order = [(shape.op, shape.name, dtype) for shape, dtype in run.in_order(shapes.select(), types)]
    attention, loss = shapes.SHAPES
    assert order[:6] == [
        (attention, "feature-bank", torch.bfloat16),
        (loss, "feature-bank", torch.float32),
        (attention, "spatial-tokens", torch.bfloat16),
        (loss, "two-views", torch.float32),
        (attention, "episode", torch.bfloat16),
        (loss, "episode", torch.float32),
    ]
    assert order.index((attention, "feature-bank", torch.float32)) < 12, "not after everything in bfloat16"
    assert len(set(order)) == len(order) == 2 * len(shapes.select())


def test_a_shape_takes_no_more_than_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    measure = timing.measure

    def noting(calls: Any, device: Any, seconds: float, failed: Any) -> Any:
        given.append(seconds)
        return measure(calls, device, 1e-3, failed)

    monkeypatch.setattr(timing, "measure", noting)
    monkeypatch.setattr(run, "_TIMING_SECONDS", 0.6)
    run.run(TINY[1:], [torch.float32], CPU, chosen=some("amd_fast", "reference"), seconds=0.3)
    assert given == [pytest.approx(0.1)] * 3, "shared by two providers in three directions"
    monkeypatch.setattr(run, "_CASE_SECONDS", 0.0)
    result = run.run(TINY[1:], [torch.float32], CPU, directions=["both"], chosen=some("amd_fast", "reference"))
    assert {entry.reason for entry in result.results} == {"the 0 s for a shape were spent"}
    compiling = [[provider.name for provider in providers.providers(op)][-2:] for op in shapes.SHAPES]
    assert compiling[0] == ["torch.compile", "flex_attention"], "those that compile for long are left to the end"
    assert compiling[1][-1] == "torch.compile"


def test_what_matters_most_is_timed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(run, "_time", lambda case, direction, *rest: order.append(direction))
    run.run(TINY[1:], [torch.float32], CPU, chosen=some("amd_fast"))
    assert order == ["both", "forward", "backward"]


def test_providers_take_turns() -> None:
    order: list[str] = []
    timings = timing.measure({name: lambda name=name: order.append(name) for name in "ab"}, CPU, 1e-4)
    turns = "".join(order).replace("aa", "a").replace("bb", "b")
    while "aa" in turns or "bb" in turns:
        turns = turns.replace("aa", "a").replace("bb", "b")
    assert turns == "ab" * 6  # once to see how long it takes, then five rounds
    assert timings["a"].p20 <= timings["a"].p50 <= timings["a"].p80


def test_ratio_is_to_the_fastest_peer_that_does_the_whole_work() -> None:
    def entry(provider: str, median: float, peer: bool) -> Any:
        timed = timing.Timing(median, median, median, 1, "wall")
        return run.Result("op", "shape", "", "float32", "both", provider, "ok", peer=peer, time=timed)

    group = [entry("amd_fast", 2.0, False), entry("slow", 9.0, True), entry("fast", 3.0, True), entry("part", 0.1, False)]
    assert report.ratio(group) == 1.5
    assert report.ratio(group[1:]) is None
    assert report.ratio(group[:1]) is None


def test_budget_leaves_out_and_says_so() -> None:
    result = run.run(TINY, [torch.float32], CPU, chosen=some("reference"), budget=-1.0)
    assert result.results == []
    assert len(result.left_out) == 2
    assert "free_energy_loss tiny" in result.left_out[1]


def test_report_table_json_and_plot(tmp_path: Path) -> None:
    result = run.run(
        TINY, [torch.float32], CPU, directions=["forward"], chosen=some("amd_fast", "reference", "flex_attention"), seconds=0.01
    )
    with Console(file=(tmp_path / "table").open("w+"), width=250) as console:
        report.show(result, console)
    text = (tmp_path / "table").read_text()
    assert "flex_attention: skipped: its backward pass needs a GPU" in text
    assert text.index("ratio") < text.index("shape")
    written = report.write(result, tmp_path / "results", "here")
    assert [path.name for path in written] == ["here.json", "here.svg"]
    numbers = json.loads(written[0].read_text())
    assert {"device", "torch", "triton", "commit", "date", "load", "load_after"} <= set(numbers["machine"])
    assert numbers["method"]
    first = numbers["results"][0]
    assert first["bandwidth"] == pytest.approx(first["bytes"] / first["time"]["p50"])
    assert first["of_copy"] == pytest.approx(first["bandwidth"] / numbers["copy_bandwidth"])
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["here.json", "here.svg"]


@pytest.mark.parametrize(("slow", "said"), [(1.9, False), (2.1, True)])
def test_a_noisy_machine_is_mentioned(slow: float, said: bool, tmp_path: Path) -> None:
    time = timing.Timing(1.0, 1.5, slow, 10, "wall")
    result = run.Result("op", "shape", "", "float32", "both", "amd_fast", "ok", time=time)
    with Console(file=(tmp_path / "table").open("w+"), width=250) as console:
        report.show(run.Report(machine.describe(CPU), 1e9, [result], []), console)
    assert ("not quiet" in (tmp_path / "table").read_text()) == said


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match=r"dtypes.*float64"):
        bench.bench_command(dtypes=["float64"])
    with pytest.raises(ConfigError, match="directions"):
        bench.bench_command(directions=["sideways"])
    if not torch.cuda.is_available():
        with pytest.raises(ImplementationError, match="no GPU"):
            bench.bench_command(device="cuda")


def test_outside_of_a_source_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "_REPOSITORY", tmp_path)
    with pytest.raises(ImplementationError, match="source tree"):
        bench.load("shapes")


def test_another_package_called_benchmarks_is_not_ours(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("")
    code = "import benchmarks; from amd_fast import bench; print(bench.load('shapes').__file__)"
    environment = {"PYTHONPATH": f"{tmp_path}:{repository}", "PATH": "/usr/bin"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.stdout.strip() == str(repository / "benchmarks" / "shapes.py"), result.stderr


def test_two_revisions_take_turns(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    asked: list[str] = []

    def answer(worker: str, request: dict[str, Any]) -> float:
        asked.append(worker)
        return {"base": 3.0, "here": 2.0}[worker]

    monkeypatch.setattr(compare, "_worktree", lambda base: contextlib.nullcontext(Path("base")))
    monkeypatch.setattr(compare, "_worker", lambda folder, device: contextlib.nullcontext("here" if folder == repository else "base"))
    monkeypatch.setattr(compare, "_ask", answer)
    result = compare.compare("HEAD~1", TINY[:1], [torch.float32], CPU, ["forward"])
    assert asked == ["base", "here"] * 5
    assert result.rows[0]["ratio"] == 1.5


def test_another_revision_is_measured_and_leaves_nothing_behind(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not machine.revision("HEAD"):
        pytest.skip("no git here")
    monkeypatch.setattr(compare, "_TURNS", 1)
    monkeypatch.setattr(compare.tempfile, "tempdir", str(tmp_path))
    result = compare.compare("HEAD", TINY[1:], [torch.float32], CPU, ["forward"])
    assert result.rows[0]["ratio"] > 0
    assert list(tmp_path.iterdir()) == []
    trees = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in trees
    with pytest.raises(ConfigError, match="no-such-revision"):
        compare.compare("no-such-revision", TINY, [torch.float32], CPU, ["forward"])
