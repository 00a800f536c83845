"""Tuning, with a clock that the test sets: what is tried, what is refused, what ends up in the table.

The kernels run in Triton's interpreter, which must be chosen before triton is imported: so in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
import torch
from amd_fast.kernels.common import tables

from amd_fast import tune
from amd_fast.errors import ImplementationError

GPU = tune.Gpu("Test GPU 1", "sm_00", 100_000)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ImplementationError, match="torch sees none"):
        tune.tune_command()


def test_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def shapes() -> list[Any]:
    registry = tune.load("shapes")
    return [registry.AttentionShape("tiny", 3, frames=4, heads=2, width=16), registry.LossShape("tiny", 40)]


def jobs() -> list[Any]:
    return [(shape, job) for shape in shapes() for job in tune._jobs(shape, torch.float32, GPU)]


def test_every_kernel_of_a_shape_is_a_job() -> None:
    kernels = [(shape.op, job.kernel, job.direction) for shape, job in jobs()]
    assert kernels == [
        ("cross_modal_attention", "rows_forward", "forward"),
        ("cross_modal_attention", "rows_backward", "backward"),
        ("free_energy_loss", "forward", "forward"),
        ("free_energy_loss", "backward", "backward"),
    ]
    large = tune.load("shapes").AttentionShape("large", 1, frames=400)
    assert [job.direction for job in tune._jobs(large, torch.bfloat16, GPU)] == ["forward", "backward"]


def every_registered_job() -> list[Any]:
    registry = tune.load("shapes").SHAPES
    return [
        (shape, job)
        for op in registry
        for shape in registry[op]
        for dtype in (torch.bfloat16, torch.float32)
        for job in tune._jobs(shape, dtype, GPU)
    ]


def test_candidates_are_what_a_lookup_gives() -> None:
    for shape, job in every_registered_job():
        config = tune._module(shape.op, "config")
        table = config.load_table(GPU.name, GPU.architecture)
        entries = tune.candidates(shape.op, job.kernel, job.key, job.sizes, job.present, GPU)
        launches = [config.choose(job.kernel, job.key, {job.kernel: [entry]}, GPU.shared_memory) for entry in entries]
        assert launches[0] == config.choose(job.kernel, job.key, table, GPU.shared_memory), "the one in use comes first"
        assert len(set(launches)) == len(launches) > 1
        assert all(set(entry) == set(table[job.kernel][0]) for entry in entries), "entries have the table's fields"


def test_shared_memory_limits_the_candidates() -> None:
    for shape, job in every_registered_job():
        small = GPU._replace(shared_memory=20_000)
        config = tune._module(shape.op, "config")
        if shape.op == "cross_modal_attention":
            for entry in tune.candidates(shape.op, job.kernel, job.key, job.sizes, job.present, small):
                launch = config.choose(job.kernel, job.key, {job.kernel: [entry]}, small.shared_memory)
                smallest = launch.pairs == 1 and launch.stages == 1 and launch.block_rows <= 16
                # As little as AMD's have, whose products of float32 need no halves.
                assert smallest or config.shared_memory_bound(job.kernel, launch, job.key, emulated=False) <= small.shared_memory


def test_table_is_read_back_by_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape, job in jobs():
        config, launcher = tune._module(shape.op, "config"), tune._module(shape.op, "triton")
        entry = {**job.present, "warps": 2 * job.present["warps"]}
        tuned = [tune.Tuned(shape.op, job.kernel, "tiny", entry, 2.0, 1.0, 2, 0)]
        path = tmp_path / shape.op / job.kernel / "configs" / tune.table_path(shape.op, GPU).name
        assert path.name == "test-gpu-1.json"
        before = config.load_table(GPU.name, GPU.architecture)
        default = Path(config.__file__).parent / "configs" / "default.json"
        path.parent.mkdir(parents=True)
        shutil.copy(default, path.parent)
        monkeypatch.setattr(config, "files", lambda package, folder=path.parents[1]: folder)
        monkeypatch.setattr(launcher, "gpu_of", lambda device: GPU)
        config.load_table.cache_clear()
        launcher._config_on.cache_clear()
        assert launcher._config_on(job.kernel, job.key, torch.device("cpu")).warps == job.present["warps"]
        tune.write_table(path, shape.op, GPU, tuned)
        assert launcher._config_on(job.kernel, job.key, torch.device("cpu")).warps == entry["warps"], "what is cached is forgotten"
        written = json.loads(path.read_text())
        assert written["measured"]["torch"] == torch.__version__
        assert written["kernels"] == {job.kernel: [entry]}, "what was measured and nothing else"
        after = config.load_table(GPU.name, GPU.architecture)
        assert config.choose(job.kernel, job.key, after, GPU.shared_memory).warps == entry["warps"]
        others = [kernel for kernel in config.KERNELS if kernel != job.kernel]
        assert all(after[kernel] == before[kernel] for kernel in others)
        assert len(after[job.kernel]) - len(before[job.kernel]) in (0, 1)
        monkeypatch.undo()
        config.load_table.cache_clear()
        launcher._config_on.cache_clear()


def test_what_was_measured_before_is_kept_and_measured_again_replaced(tmp_path: Path) -> None:
    ((_, attention), _, (_, loss), _) = jobs()
    for op, job in (("cross_modal_attention", attention), ("free_energy_loss", loss)):
        first, other = job.present, {**job.present, next(iter(job.sizes)): 1}
        for entry in (first, other, {**first, "warps": 16}):  # two ops in one folder, as with --output
            tune.write_table(tmp_path / f"{op}.json", op, GPU, [tune.Tuned(op, job.kernel, "tiny", entry, 2.0, 1.0, 2, 0)])
        kernels = json.loads((tmp_path / f"{op}.json").read_text())["kernels"]
        assert kernels == {job.kernel: [other, {**first, "warps": 16}]}
    another = GPU._replace(name="Test GPU 2")
    tune.write_table(tmp_path / "free_energy_loss.json", "free_energy_loss", another, [])
    assert json.loads((tmp_path / "free_energy_loss.json").read_text())["kernels"] == {}


def test_what_is_mended_in_the_default_table_reaches_a_gpu_that_was_measured(tmp_path: Path) -> None:
    def entry(tokens: int, warps: int) -> tune.Entry:
        return {"item_size": 2, "width": 64, "tokens": tokens, "pairs": 1, "warps": warps}

    measured = {"device": "NVIDIA H100", "architecture": "sm_90", "kernels": {"rows_forward": [entry(16, 8)]}}
    default = {"device": "default", "architecture": "any", "kernels": {"rows_forward": [entry(16, 1), entry(32, 1)], "new": [entry(16, 2)]}}
    for name, table in (("default", default), ("h100", measured)):
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
    expected = {"rows_forward": [entry(16, 8), entry(32, 1)], "new": [entry(16, 2)]}
    assert tables.table_for(tmp_path, "NVIDIA H100", "sm_90") == expected
    assert tables.table_for(tmp_path, "NVIDIA H200", "sm_90") == expected
    assert tables.tables_for(tmp_path, "sm_90") == [expected], "compiled ahead as well"
    assert tables.table_for(tmp_path, "AMD", "gfx942") == default["kernels"]
    assert tables.tables_for(tmp_path, "gfx942") == [default["kernels"]]
    (tmp_path / "default.json").unlink()
    with pytest.raises(FileNotFoundError, match="install the package again"):
        tables.table_for(tmp_path, "NVIDIA H100", "sm_90")


def test_a_shape_that_does_not_fit_or_a_kernel_that_fails_costs_no_other_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    workloads = tune.load("workloads")
    make = workloads.make

    def short_of_memory(shape: Any, *arguments: Any) -> Any:
        if shape.name == "large":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(shape, *arguments)

    def fails_backward(case: Any, job: Any, *rest: Any) -> tune.Tuned:
        if job.direction == "backward":
            raise RuntimeError("no such instruction\nand more")
        return tune.Tuned(case.shape.op, job.kernel, str(case.dtype), job.present, 2.0, 1.0, 2, 0)

    monkeypatch.setattr(workloads, "make", short_of_memory)
    monkeypatch.setattr(tune, "_tune_kernel", fails_backward)
    said: list[str] = []
    saved: list[tune.Tuned] = []
    large = tune.load("shapes").AttentionShape("large", 3, frames=40)
    types = (torch.bfloat16, torch.float32)
    found = tune.tune([large, *shapes()], types, torch.device("cpu"), GPU, 1e6, progress=said.append, save=saved.append)
    assert found == saved
    assert [(result.kernel, result.shape) for result in found] == [
        ("set_forward", "torch.bfloat16"),
        ("forward", "torch.float32"),
        ("rows_forward", "torch.float32"),
    ], "the loss is given float32 where it is benchmarked"
    assert said.count("no such instruction") == 3
    assert sum("out of memory" in line for line in said) == 2


# --- what runs in the interpreter -------------------------------------------------------------------------------------------


plain_candidates, plain_forced = tune.candidates, tune._forced
running: list[tuple[tune._Job, tune.Entry]] = []


def with_other_warps(op: str, kernel: str, key: Any, sizes: tune.Entry, present: tune.Entry, gpu: tune.Gpu) -> list[tune.Entry]:
    """The candidates that differ from the present entry in their warps alone: the interpreter is slow."""
    entries = plain_candidates(op, kernel, key, sizes, present, gpu)
    return [entry for entry in entries if {**entry, "warps": 0} == {**present, "warps": 0}]


def noting(op: str, job: tune._Job, entry: tune.Entry, gpu: tune.Gpu) -> Any:
    running.append((job, entry))
    return plain_forced(op, job, entry, gpu)


def run_tune(cost: Callable[[int], float], budget: float = 1e6) -> list[tune.Tuned]:
    """Tune with a clock by which a call takes what ``cost`` makes of the warps it was launched with."""

    def clock(calls: Mapping[str, tune.Call]) -> dict[str, float]:
        times = {}
        for name, call in calls.items():
            call()
            times[name] = cost(running[-1][1]["warps"])
        return times

    tune.candidates, tune._forced = with_other_warps, noting
    return tune.tune(shapes(), (torch.float32,), torch.device("cpu"), GPU, budget, quick=clock, thorough=clock)


def check_fastest_is_found() -> None:
    tuned = run_tune(lambda warps: 1.0 / warps)
    assert [result.kernel for result in tuned] == ["rows_forward", "rows_backward", "forward", "backward"]
    for (_, job), result in zip(jobs(), tuned, strict=True):
        assert result.entry == {**job.present, "warps": 2 * job.present["warps"]}
        assert result.after == result.before / 2
        assert result.refused == 0
        assert result.tried > 1


def check_wrong_ones_are_refused() -> None:
    """A kernel that is wrong with many warps: the fastest right one wins."""
    workloads = tune.load("workloads")
    check = workloads.Case.check

    def picky(case: Any, forward: Any) -> float:
        job, entry = running[-1]
        if entry["warps"] > job.present["warps"]:
            raise workloads.WrongError("too many warps")
        return float(check(case, forward))

    workloads.Case.check = picky
    tuned = run_tune(lambda warps: 1.0 / warps)
    workloads.Case.check = check
    assert tuned
    for result in tuned:
        job = next(job for _, job in jobs() if job.kernel == result.kernel)
        assert result.entry == job.present
        assert result.refused == 1


def check_not_worth_it() -> None:
    for (_, job), result in zip(jobs(), run_tune(lambda warps: 1.0 - 0.001 * warps), strict=True):
        assert result.entry == job.present


def check_budget() -> None:
    assert run_tune(lambda warps: 1.0, budget=-1.0) == []


if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
