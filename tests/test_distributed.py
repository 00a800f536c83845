"""Training by several processes on the CPU (gloo): the same as one process, and an end that is bounded and named when one is lost."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from amd_fast.data.synth.writing import synthesize
from amd_fast.errors import ConfigError
from amd_fast.training.config import (
    DataOptions,
    EpisodeOptions,
    ModelOptions,
    OptimiserOptions,
    TaskOptions,
    TrainConfig,
    ValidationOptions,
)
from amd_fast.training.distributed import joined
from tests.ports import free_port

TASKS = Path(__file__).with_name("distributed_tasks.py")
STEPS = 8


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic set: real H.264 files, classes split into train, val and test."""
    folder = tmp_path_factory.mktemp("synth")
    synthesize(folder, classes=12, clips_per_class=4, size=48, workers=1, progress=False)
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch.distributed.fsdp", "amd_fast.training.replay", "amd_fast.training.profile", "amd_fast.training.command", "amd_fast.cli"]
    )
    return context


def configure(manifest: Path, output: Path, **changes: Any) -> TrainConfig:
    """A run whose result depends on the number of processes by rounding alone."""
    settings: dict[str, Any] = {
        "output": str(output),
        "threads": 1,
        "device": "cpu",
        "precision": "fp32",
        "batch_norm": "frozen",
        "checkpoint_every": 2,
        "keep_checkpoints": 10,
        "tensorboard": False,
        "timeout": 60.0,
        "model": ModelOptions(options={"dim": 32, "backbone_options": {"base": 8}}),
        "data": DataOptions(manifest=str(manifest), size=32, frames=4, workers=1),
        "episode": EpisodeOptions(ways=3, shots=1, queries=1, per_step=4),
        "tasks": TaskOptions(regression=1.0),
        "optimiser": OptimiserOptions(steps=STEPS, warmup_steps=2),
        "validation": ValidationOptions(every=4, episodes=11),
    }
    return TrainConfig(**{**settings, **changes})


class Group:
    """Processes that train together, started as torchrun would but left to themselves.

    Args:
        context: starts them.
        size: their number; 1 is a process alone, outside of any group.
        task: function of distributed_tasks.py.
        config: what it is called with.
    """

    def __init__(self, context: ForkServerContext, size: int, task: str, config: TrainConfig) -> None:
        port = free_port()
        folder = Path(config.output)
        self.output = folder.parent / f"{task}.{size}.{folder.name}"
        self.processes = []
        for rank in range(size):
            together = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
            environment = {"MASTER_ADDR": "localhost", **{key: str(value) for key, value in together.items()}} if size > 1 else {}
            values = {"TASK": task, "OPTIONS": config.to_dict(), "OUTPUT": str(self.output), "ENVIRONMENT": environment}
            process = context.Process(target=runpy.run_path, args=(str(TASKS), values, "__main__"), daemon=True)
            process.start()
            self.processes.append(process)

    def outcome(self, rank: int, *, within: float = 240) -> dict[str, Any]:
        """What a rank left behind."""
        self.processes[rank].join(within)
        if self.processes[rank].exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGABRT)
            self.processes[rank].join(10)
            self.kill()
            stacks = Path(f"{self.output}.{rank}.stacks").read_text() or "nothing: it left no stack, as one does that had gone unnoticed"
            pytest.fail(f"rank {rank} was still running after {within} s, in (innermost call first)\n{stacks}")
        return pickle.loads(Path(f"{self.output}.{rank}").read_bytes())

    def outcomes(self) -> list[dict[str, Any]]:
        """What all ranks left behind."""
        return [self.outcome(rank) for rank in range(len(self.processes))]

    def kill(self) -> None:
        """Ends what still runs."""
        for process in self.processes:
            process.kill()
            process.join()


def last_state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / (folder / "checkpoints" / "last").read_text())


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    """The same names, and values that differ by no more than ``tolerance`` times the largest value of their tensor (or 1)."""
    assert first.keys() == second.keys()
    wrong = {
        name: float((value - second[name]).abs().max())
        for name, value in first.items()
        if (value - second[name]).abs().max() > tolerance * max(1.0, float(value.abs().max()))
    }
    assert not wrong


@pytest.mark.parametrize(("size", "accumulate", "parallel"), [(2, 1, "ddp"), (2, 2, "ddp"), (4, 1, "ddp"), (2, 2, "fsdp"), (1, 4, "ddp")])
def test_gradients_are_those_of_one_process_with_all_episodes(
    size: int, accumulate: int, parallel: str, manifest: Path, processes: ForkServerContext, alone: dict[str, Any], tmp_path: Path
) -> None:
    """With flow missing from more clips on one rank than on another, so that a mean of the ranks' means would be wrong."""
    optimiser = OptimiserOptions(steps=STEPS, accumulate=accumulate)
    outcomes = Group(processes, size, "gradients", configure(manifest, tmp_path / "run", optimiser=optimiser, parallel=parallel)).outcomes()
    assert sorted(episode for outcome in outcomes for episode in outcome["episodes"]) == alone["episodes"] == [0, 1, 2, 3]
    for outcome in outcomes:
        assert_same(alone["gradients"], outcome["gradients"], 1e-6)
        torch.testing.assert_close(outcome["terms"], alone["terms"], rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def alone(manifest: Path, processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Gradients of one process."""
    return Group(processes, 1, "gradients", configure(manifest, tmp_path_factory.mktemp("alone") / "run")).outcome(0)


@pytest.fixture(scope="module")
def runs(manifest: Path, processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Whole runs of the same configuration by 1, 2 and 4 processes, and by 2 with spread weights; their folders under ``folder``."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name, size, parallel in (("1", 1, "ddp"), ("2", 2, "ddp"), ("4", 4, "ddp"), ("fsdp", 2, "fsdp")):
        found[name] = Group(processes, size, "whole", configure(manifest, folder / name, parallel=parallel)).outcomes()
    return {**found, "folder": [{"path": folder}]}


def curves(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["2", "4", "fsdp"])
def test_a_run_is_the_same_for_any_number_of_processes(name: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    folder = runs["folder"][0]["path"]
    one, several = runs["1"][0], runs[name]
    assert sorted(episode for outcome in several for episode in outcome["episodes"]) == one["episodes"]
    assert len(one["losses"]) == STEPS
    for outcome in several:  # every rank knows the loss of the whole step, all terms of it
        assert_same({"": torch.tensor(one["losses"])}, {"": torch.tensor(outcome["losses"])}, 1e-4)
        assert_same(several[0]["agent"], outcome["agent"])  # and ends with the same agent, bit for bit
    # Adam divides by the size of a gradient, so rounding in one that is nearly 0 can become a part of a step of the learning rate.
    assert_same(one["agent"], several[0]["agent"], 1e-2)
    assert_same(last_state(folder / "1"), last_state(folder / name), 1e-2)
    for first, second in zip(curves(folder / "1"), curves(folder / name), strict=True):
        assert [first["step"], first["kind"]] == [second["step"], second["kind"]]
        assert first.get("total", 0.0) == pytest.approx(second.get("total", 0.0), rel=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_going_on_from_a_checkpoint_ends_as_if_nothing_had_happened(
    size: int, manifest: Path, runs: dict[str, list[dict[str, Any]]], processes: ForkServerContext, tmp_path: Path
) -> None:
    """Train 2N steps == train N, save, go on for N: bit for bit."""
    whole = runs["folder"][0]["path"] / str(size)
    folder = started_again(whole, tmp_path / "run")
    outcomes = Group(processes, size, "resumed", configure(manifest, folder)).outcomes()
    assert sorted(episode for outcome in outcomes for episode in outcome["episodes"]) == list(range(4 * STEPS // 2, 4 * STEPS))
    assert_same(last_state(whole), last_state(folder))
    assert curves(whole) == curves(folder)
    assert (whole / "checkpoints" / "best.safetensors").read_bytes() == (folder / "checkpoints" / "best.safetensors").read_bytes()


@pytest.mark.parametrize(("before", "size", "parallel"), [("2", 1, "ddp"), ("1", 2, "fsdp"), ("fsdp", 2, "ddp")])
def test_another_number_of_processes_goes_on_with_the_same_episodes(
    before: str,
    size: int,
    parallel: str,
    manifest: Path,
    runs: dict[str, list[dict[str, Any]]],
    processes: ForkServerContext,
    tmp_path: Path,
) -> None:
    whole = runs["folder"][0]["path"] / before
    folder = started_again(whole, tmp_path / "run")
    outcomes = Group(processes, size, "resumed", configure(manifest, folder, parallel=parallel)).outcomes()
    assert sorted(episode for outcome in outcomes for episode in outcome["episodes"]) == list(range(4 * STEPS // 2, 4 * STEPS))
    assert_same(last_state(whole), last_state(folder), 1e-2)


def started_again(whole: Path, folder: Path) -> Path:
    """A copy of a run folder as it was after half of the steps."""
    shutil.copytree(whole, folder)
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.stem.removeprefix("step-")) > STEPS // 2:
            path.unlink()
    (folder / "checkpoints" / "last").write_text(f"step-{STEPS // 2:06d}.safetensors")
    return folder


def test_nan_on_one_rank_stops_all_with_rank_episode_and_command(manifest: Path, processes: ForkServerContext, tmp_path: Path) -> None:
    outcomes = Group(processes, 2, "poisoned", configure(manifest, tmp_path / "run")).outcomes()
    for outcome in outcomes:
        assert outcome["error"] == "TrainingError"
        for part in (
            "at step 3 (episodes [12, 13, 14, 15], seed 0). rank 1: episode 15 (task",
            f"The last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-000002.safetensors'}",
            f"torchrun --nproc-per-node 2 -m amd_fast.cli train --config {tmp_path / 'run' / 'config.yaml'} --replay-step 3",
        ):
            assert part in outcome["message"]
    assert not (tmp_path / "run" / "checkpoints" / "step-000004.safetensors").exists()


@pytest.mark.parametrize(("name", "parallel"), [("2", "ddp"), ("fsdp", "fsdp")])
def test_a_step_is_replayed_by_as_many_processes(
    name: str, parallel: str, manifest: Path, runs: dict[str, list[dict[str, Any]]], processes: ForkServerContext
) -> None:
    """From the checkpoint before it, through a step that the run did not save: the same loss of the whole step."""
    folder = runs["folder"][0]["path"] / name
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for outcome in Group(processes, 2, "replayed", configure(manifest, folder, parallel=parallel)).outcomes():
        table = outcome["table"]
        assert table["episode"] == [20, 21, 22, 23] and table["rank"] == [0, 1, 0, 1]
        assert sum(table["total"]) / 4 == pytest.approx(runs[name][0]["losses"][5][-1], rel=1e-6)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_full_disk_stops_all_ranks_and_leaves_the_last_good_checkpoint(
    manifest: Path, processes: ForkServerContext, tmp_path: Path
) -> None:
    config = configure(manifest, tmp_path / "run", validation=ValidationOptions(every=100, episodes=10))
    outcomes = Group(processes, 2, "no_space", config).outcomes()
    for outcome in outcomes:
        assert outcome["error"] == "CheckpointError" and "step-000002.safetensors" in outcome["message"]
    assert (tmp_path / "run" / "checkpoints" / "last").read_text() == "step-000002.safetensors"
    assert last_state(tmp_path / "run")


def test_a_signal_to_one_rank_saves_and_ends_all_with_the_status_of_a_requeue_and_nothing_is_left_out(
    manifest: Path, runs: dict[str, list[dict[str, Any]]], processes: ForkServerContext, tmp_path: Path
) -> None:
    """It comes just before a validation, which a run that goes on after it would not come back to."""
    config = configure(manifest, tmp_path / "run", checkpoint_every=100)
    outcomes = Group(processes, 2, "interrupted", config).outcomes()
    assert [outcome["status"] for outcome in outcomes] == [75, 75]
    assert (tmp_path / "run" / "checkpoints" / "last").read_text() == "step-000004.safetensors"
    Group(processes, 2, "resumed", config).outcomes()
    whole = runs["folder"][0]["path"] / "2"
    assert_same(last_state(whole), last_state(tmp_path / "run"))
    assert curves(whole) == curves(tmp_path / "run")


def test_a_rank_that_dies_is_named_at_once(manifest: Path, processes: ForkServerContext, tmp_path: Path) -> None:
    group = Group(processes, 2, "killed", configure(manifest, tmp_path / "run"))
    outcome = group.outcome(0, within=120)
    assert outcome["error"] == "TrainingError"
    assert "rank 0 lost the connection to another rank at step 3" in outcome["message"]
    assert "Rank 1 did not answer" in outcome["message"] and "--resume" in outcome["message"]
    assert group.processes[1].exitcode == -9


def test_a_rank_that_hangs_is_named_after_the_time_limit(manifest: Path, processes: ForkServerContext, tmp_path: Path) -> None:
    group = Group(processes, 2, "hanging", configure(manifest, tmp_path / "run", timeout=3.0))
    try:
        outcome = group.outcome(0, within=120)
    finally:
        group.kill()
    assert "Rank 1 did not answer" in outcome["message"]


def test_an_error_of_one_rank_is_its_own_and_ends_the_others(manifest: Path, processes: ForkServerContext, tmp_path: Path) -> None:
    group = Group(processes, 2, "broken", configure(manifest, tmp_path / "run"))
    assert "Rank 1 did not answer" in group.outcome(0, within=120)["message"]
    group.processes[1].join(10)
    assert group.processes[1].exitcode == 1


def test_torchrun_starts_again_from_the_last_checkpoint_after_a_kill(
    manifest: Path, runs: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """``--max-restarts``: a killed worker costs the steps since the last checkpoint, and changes nothing."""
    config = configure(manifest, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "asked.yaml").write_text(config.to_yaml())
    (tmp_path / "options.json").write_text(json.dumps(config.to_dict()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    task = [str(TASKS), "killed_once", str(tmp_path / "options.json"), str(tmp_path / "outcome")]
    own = {"PYTHONPATH": str(TASKS.parents[1]), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **own}
    done = subprocess.run([*torchrun, *task], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "at step 4 of 8" in " ".join(done.stdout.split())
    assert_same(last_state(runs["folder"][0]["path"] / "2"), last_state(tmp_path / "run"))


def test_restarts_that_would_wait_for_dead_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    for name, value in (variables | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), joined("cpu", 10.0):
        pass


def test_settings_that_do_not_divide_are_refused(manifest: Path, processes: ForkServerContext, tmp_path: Path) -> None:
    episode = EpisodeOptions(ways=3, queries=1, per_step=3)
    outcomes = Group(processes, 2, "whole", configure(manifest, tmp_path / "run", episode=episode)).outcomes()
    for outcome in outcomes:
        assert outcome["error"] == "ConfigError" and "multiple of processes" in outcome["message"]
