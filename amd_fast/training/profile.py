"""``amd-fast train --profile``: some steps under torch.profiler, a Chrome trace of them, and a table of where the time goes."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import amd_fast
from amd_fast.errors import ConfigError, TrainingError
from amd_fast.files import write_atomically
from amd_fast.progress import console
from amd_fast.storage import join
from amd_fast.training.blocks import set_training
from amd_fast.training.config import TrainConfig
from amd_fast.training.distributed import World, joined
from amd_fast.training.engine import Pending, Trainer
from amd_fast.training.phases import STEP, WAIT_FOR_DATA, WAIT_FOR_DEVICE, phase
from amd_fast.training.timeline import break_down, what_bounds


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a training step goes on one rank.

    Attributes:
        rank: number of the process.
        steps: that the means are over.
        seconds: of a step.
        parts: seconds of a step by part, see :mod:`amd_fast.training.timeline`; they sum up to the step.
        clips_per_second: of this rank.
        peak_memory: largest memory of tensors on the GPU, bytes; 0 on a CPU.
    """

    rank: int
    steps: int
    seconds: float
    parts: dict[str, float]
    clips_per_second: float
    peak_memory: int


def profile_training(config: TrainConfig, steps: int, *, progress: bool = True) -> list[StepProfile]:
    """Profiles steps of a training run that starts afresh; no checkpoint is read or written.

    Writes ``profile/rank-<r>.trace.json`` (for chrome://tracing or ui.perfetto.dev) and ``profile/profile.json`` into the run folder.
    Steps before the profiled ones warm up: batches read ahead are used up, and compilers and libraries have chosen what they run.

    Args:
        config: of the run.
        steps: that are profiled.
        progress: show the table (rank 0 alone).

    Returns:
        One entry per rank.

    Raises:
        ConfigError: no steps.
        TrainingError: the loss became NaN or infinite.
    """
    if steps < 1:
        raise ConfigError(f"--profile needs at least one step, got {steps}")
    with joined(config.device, config.timeout) as world:
        trainer = Trainer(config, progress=False, world=world)
        try:
            own = _profile_rank(trainer, steps, world)
        finally:
            trainer.data.close()
        ranks = world.gather(own)
        world.on_first(lambda: _write_summary(config, ranks, trainer.device))
        if progress and world.first:
            _show(config, ranks)
    return ranks


def _profile_rank(trainer: Trainer, steps: int, world: World) -> StepProfile:
    trainer.data.batches.loader.fill_cache(progress=False)
    set_training(trainer.objective, trainer.config.batch_norm)
    on_gpu = trainer.device.type == "cuda"
    warm_up = trainer.config.data.prefetch + 2
    stream = trainer.data.batches.stream(0, warm_up + steps)
    pending: list[Pending] = []

    def advance() -> int:
        with phase(STEP):
            with phase(WAIT_FOR_DATA):
                batch = next(stream)
            pending.append(trainer.advance(batch))
            trainer.step += 1
            if len(pending) > 1:
                with phase(WAIT_FOR_DEVICE):
                    _settle(pending.pop(0))
        return len(batch.present)

    for _ in range(warm_up):
        advance()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        started = time.monotonic()
        clips = sum(advance() for _ in range(steps))
        _settle(pending.pop())
        elapsed = time.monotonic() - started
    peak = torch.cuda.max_memory_allocated(trainer.device) if on_gpu else 0
    parts, number = break_down(_write_trace(profiler, trainer.config, world.rank))
    mean = {name: seconds / number for name, seconds in parts.items()}
    return StepProfile(world.rank, steps, sum(mean.values()), mean, clips / elapsed, peak)


def _settle(pending: Pending) -> None:
    if pending.ready is not None:
        pending.ready.synchronize()
    if not torch.isfinite(pending.values).all():
        raise TrainingError(f"the loss or the gradient became NaN or infinite at step {pending.step}; train without --profile to see where")


def _write_trace(profiler: Any, config: TrainConfig, rank: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        content = file.read_bytes()
    write_atomically(join(config.output, "profile", f"rank-{rank}.trace.json"), content)
    events: list[dict[str, Any]] = json.loads(content)["traceEvents"]
    return events


def _write_summary(config: TrainConfig, ranks: list[StepProfile], device: torch.device) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    content = {
        "bound": what_bounds(_mean_parts(ranks)),
        "device": name,
        "versions": {"amd_fast": amd_fast.__version__, "torch": str(torch.__version__)},
        "config": config.to_dict(),
        "ranks": [asdict(rank) for rank in ranks],
    }
    write_atomically(join(config.output, "profile", "profile.json"), json.dumps(content, indent=1).encode())


def _mean_parts(ranks: list[StepProfile]) -> dict[str, float]:
    return {name: sum(rank.parts[name] for rank in ranks) / len(ranks) for name in ranks[0].parts}


def _show(config: TrainConfig, ranks: list[StepProfile]) -> None:
    parts, total = _mean_parts(ranks), sum(rank.seconds for rank in ranks) / len(ranks)
    table = Table(title=f"a training step of {total * 1e3:.1f} ms, mean of {ranks[0].steps} steps")
    for column in ("", "ms", "share", *(("slowest rank",) if len(ranks) > 1 else ())):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in parts.items():
        if seconds > 0:
            slowest = max(ranks, key=lambda rank: rank.parts[name])
            others = (f"{slowest.parts[name] * 1e3:.1f} ms on {slowest.rank}",) if len(ranks) > 1 else ()
            table.add_row(name, f"{seconds * 1e3:.1f}", f"{seconds / total:.0%}", *others)
    console.print(table)
    memory = f", at most {max(rank.peak_memory for rank in ranks) / 1e9:.1f} GB on a GPU" if ranks[0].peak_memory else ""
    console.print(f"{sum(rank.clips_per_second for rank in ranks):.1f} clips/s over all processes{memory}. {what_bounds(parts)}")
    console.print(f"traces for chrome://tracing or ui.perfetto.dev: {join(config.output, 'profile')}", markup=False)
