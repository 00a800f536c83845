"""The SLURM script: its syntax, and its core with stand-ins for srun and scontrol, which run and ask to stop what SLURM would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from amd_fast.data.synth.writing import synthesize
from amd_fast.training.config import DataOptions, EpisodeOptions, ModelOptions, OptimiserOptions, TrainConfig

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
TASKS = 2

SRUN = """#!/bin/bash
# Starts the tasks of a job step; sends SIGUSR1 to all once there is a checkpoint, if asked to; ends with the largest status.
shift  # --kill-on-bad-exit=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!)
done
if [ -n "${STOP_AFTER:-}" ]; then
    while [ ! -e "$STOP_AFTER" ] && kill -0 "${tasks[0]}"; do sleep 0.05; done
    kill -USR1 "${tasks[@]}"
fi
worst=0
for task in "${tasks[@]}"; do wait "$task"; status=$?; [ "$status" -gt "$worst" ] && worst=$status; done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) echo localhost; echo elsewhere;;
    *) echo "$@" >> "$REQUESTS";;
esac
"""


@pytest.fixture
def script(repository: Path) -> Path:
    return repository / "docs" / "examples" / "slurm.sbatch"


def test_the_syntax_is_right(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert all(line.startswith("#") for line in script.read_text().split("set -uo pipefail")[0].splitlines()), "directives come first"


@pytest.mark.slow
def test_a_job_that_is_asked_to_stop_is_queued_again_and_then_finishes(script: Path, repository: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "clips", classes=10, clips_per_class=3, size=48, workers=1, progress=False)
    config = TrainConfig(
        threads=1,
        device="cpu",
        precision="fp32",
        checkpoint_every=2,
        tensorboard=False,
        batch_norm="frozen",
        model=ModelOptions(options={"dim": 32, "backbone_options": {"base": 8}}),
        data=DataOptions(manifest=str(tmp_path / "clips" / "manifest.csv"), size=32, frames=4, workers=1, val_split=""),
        episode=EpisodeOptions(ways=3, queries=1, per_step=TASKS),
        optimiser=OptimiserOptions(steps=40),
    )
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    requests, output = tmp_path / "requests", tmp_path / "run"
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(repository),
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        "CONFIG": str(tmp_path / "run.yaml"),
        "OUTPUT": str(output),
        "REQUESTS": str(requests),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": str(TASKS),
        "SLURM_NTASKS_PER_NODE": str(TASKS),
    }

    def submit(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", str(script)], env={**environment, **more}, capture_output=True, text=True, timeout=280, check=False)

    first = submit(STOP_AFTER=str(output / "checkpoints" / "last"))
    assert first.returncode == 75, first.stdout + first.stderr
    assert requests.read_text() == f"requeue {os.getpid()}\n"
    reached = int((output / "checkpoints" / "last").read_text().removeprefix("step-").removesuffix(".safetensors"))
    assert 2 <= reached < 40
    second = submit()
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"at step {reached} of 40" in " ".join(second.stdout.split())
    assert requests.read_text().count("requeue") == 1, "a finished job is not queued again"
