"""Many small training runs, each hit by one fault at a random moment and then resumed: what is left behind, and what it ends as.

``PYTHONPATH=. python tests/fault_campaign.py --runs 50 --seed 0`` prints a table; tests/test_fault_campaign.py does a few.

* ``kill``: SIGKILL; ``term``: SIGTERM.
* ``size``: no file may grow beyond a random size from some moment on; ``disk``: the run folder's file system, a tmpfs of its own, is
  filled (needs root).
* ``clip``: a clip that is trained on is deleted, cut short, emptied or overwritten with noise.

A run passes where (1) it ended on its own terms: finished, asked to go on later, dead of the signal, or with an error of ours; (2) every
checkpoint that it left can be loaded; (3) resumed without the fault it finishes; (4) and ends with the weights and the history of
the undisturbed run, bit for bit (after ``clip``, which changes what is seen: with a model that loads and is finite).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

FAULTS = ("kill", "term", "size", "disk", "clip")
EXPECTED = {"kill": {0, -9}, "term": {0, 75, -15}, "size": {0, 2}, "disk": {0, 2}, "clip": {0}}
LIMIT = 600.0
"""Seconds in which a run has to end, whatever happened to it."""


class Outcome(NamedTuple):
    """One row of the table; ``wrong`` is empty where the run passed."""

    number: int
    fault: str
    moment: float
    status: int
    step: int
    wrong: str


def configuration(clips: Path, output: Path) -> dict[str, Any]:
    """A run of some seconds that validates, keeps checkpoints and reads its clips anew all the time."""
    return {
        "output": str(output),
        "device": "cpu",
        "threads": 1,
        "precision": "fp32",
        "checkpoint_every": 2,
        "tensorboard": False,
        "model": {"options": {"dim": 32, "backbone_options": {"base": 8}}},
        "data": {"manifest": str(clips / "manifest.csv"), "size": 32, "frames": 4, "workers": 1, "cache": "none"},
        "episode": {"ways": 3, "queries": 1},
        "optimiser": {"steps": 40, "warmup_steps": 2},
        "validation": {"every": 10, "episodes": 10},
    }


class Campaign:
    """The runs and what they are compared with.

    Args:
        folder: for everything.
        seed: of the faults.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        from amd_fast.data.synth.writing import synthesize

        self.folder, self.seed = folder, seed
        self.context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([f"amd_fast.training.{name}" for name in ("replay", "profile", "command")])
        self.clips = folder / "clips"
        synthesize(self.clips, classes=12, clips_per_class=4, size=48, workers=1, progress=False)
        self.context.Process(target=int).start()  # the server is up, and everything is imported, before time is taken
        started = time.monotonic()
        calm = self.start(self.clips, folder / "calm")
        calm.join(LIMIT)
        assert calm.exitcode == 0, self.log(folder / "calm").read_text()
        self.seconds = time.monotonic() - started
        self.state, self.history = final_state(folder / "calm")

    def start(self, clips: Path, output: Path) -> Any:
        """A process that does ``amd-fast train --resume``, its output in a file beside the run folder."""
        file = output.with_suffix(".json")
        file.write_text(json.dumps(configuration(clips, output)))
        values = {"FILE": str(file), "LOG": str(self.log(output))}
        process = self.context.Process(target=runpy.run_path, args=(__file__, values, "__main__"), daemon=True)
        process.start()
        return process

    def log(self, output: Path) -> Path:
        """What a run says: beside the place of the run, whose disk may be full."""
        return self.folder / f"{output.parent.name}-{output.name}.log"

    def run(self, number: int, fault: str) -> Outcome:
        """One run with its fault, and its resumption."""
        chance = random.Random(f"{self.seed} {number}")
        place = self.folder / f"run-{number:03}"
        place.mkdir()
        clips = self.clips
        if fault == "clip":
            clips = place / "clips"
            shutil.copytree(self.clips, clips)
        if fault == "disk":
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], check=True)
        try:
            return self._run(number, fault, chance, place, clips)
        finally:
            if fault == "disk":
                subprocess.run(["umount", "--lazy", str(place)], check=True)

    def _run(self, number: int, fault: str, chance: random.Random, place: Path, clips: Path) -> Outcome:
        output = place / "run"
        process = self.start(clips, output)
        moment = chance.uniform(0.0, self.seconds)
        process.join(moment)
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                strike(fault, process.pid, chance, place, clips)
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            return Outcome(number, fault, moment, -9, -1, f"still running after {LIMIT:.0f} s")
        status, log = process.exitcode, self.log(output).read_text()
        wrong = [] if status in EXPECTED[fault] else [f"status {status}"]
        wrong += ["a traceback"] if "Traceback" in log else []
        wrong += broken(output)
        step = last_step(output)
        (place / "filler").unlink(missing_ok=True)
        again = self.start(clips, output)
        again.join(LIMIT)
        if again.exitcode is None:
            again.kill()
            wrong.append(f"resumed: still running after {LIMIT:.0f} s")
        elif again.exitcode != 0:
            wrong.append(f"resumed: status {again.exitcode}: {self.log(output).read_text()[-300:]}")
        else:
            wrong += broken(output)
            state, history = final_state(output)
            if fault != "clip" and (state != self.state or history != self.history):
                wrong.append("other weights or another history than undisturbed")
        if wrong:
            wrong.append(log[-400:])
        return Outcome(number, fault, moment, status, step, "; ".join(wrong))


def strike(fault: str, pid: int, chance: random.Random, place: Path, clips: Path) -> None:
    """Does to a process, or to what it needs, what the fault says."""
    if fault in ("kill", "term"):
        os.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGTERM)
    elif fault == "size":
        limit = chance.randrange(100_000)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
    elif fault == "disk":
        with suppress(OSError), open(place / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    else:
        victim = chance.choice(sorted((clips / "train").rglob("*.mp4")))
        content = victim.read_bytes()
        how = chance.choice(("delete", "cut", "empty", "noise"))
        if how == "delete":
            victim.unlink()
        else:
            victim.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": chance.randbytes(len(content))}[how])


def broken(output: Path) -> list[str]:
    """What cannot be loaded of a run folder's checkpoints."""
    from safetensors.torch import load_file

    from amd_fast.training.checkpoint import load_model

    folder, found = output / "checkpoints", []
    for path in sorted(folder.glob("step-*.safetensors")):
        try:
            if not all(bool(value.isfinite().all()) for value in load_file(path).values()):
                found.append(f"{path.name} is not finite")
        except Exception as error:
            found.append(f"{path.name} cannot be loaded: {error}")
    if (folder / "last").exists() and not (folder / (folder / "last").read_text()).is_file():
        found.append("'last' names a file that is not there")
    if (folder / "best.safetensors").exists():
        try:
            load_model(output)
        except Exception as error:
            found.append(f"best.safetensors cannot be loaded: {error}")
    return found


def last_step(output: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    pointer = output / "checkpoints" / "last"
    return int(pointer.read_text().removeprefix("step-").removesuffix(".safetensors")) if pointer.exists() else 0


def final_state(output: Path) -> tuple[dict[str, list[Any]], list[str]]:
    """All weights, moments and the agent of the newest checkpoint, and the history."""
    from safetensors.torch import load_file

    folder = output / "checkpoints"
    state = {name: value.tolist() for name, value in load_file(folder / (folder / "last").read_text()).items()}
    return state, (output / "metrics.jsonl").read_text().splitlines()


def child() -> None:
    """``amd-fast train --resume`` in this process, its output in a file."""
    log = os.open(globals()["LOG"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from amd_fast import cli

    status = cli.main(["train", "--config", globals()["FILE"], "--resume"])
    sys.stdout.flush()
    os._exit(status)


def available() -> list[str]:
    """The faults that can be made here."""
    return [fault for fault in FAULTS if fault != "disk" or (os.geteuid() == 0 and shutil.which("mount"))]


def main() -> int:
    """The campaign as a command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="*", choices=available(), default=available())
    options = parser.parse_args()
    faults, outcomes = options.faults, []
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), options.seed)
        print(f"undisturbed: {campaign.seconds:.1f} s", flush=True)
        for number in range(options.runs):
            outcomes.append(campaign.run(number, faults[number % len(faults)]))
            print(*outcomes[-1][:2], f"at {outcomes[-1].moment:.1f} s: status {outcomes[-1].status}, step {outcomes[-1].step};",
                  outcomes[-1].wrong or "good", flush=True)  # fmt: skip
    for fault in faults:
        of_kind = [outcome for outcome in outcomes if outcome.fault == fault]
        statuses = Counter(outcome.status for outcome in of_kind)
        print(f"{fault:5} {len(of_kind):3} runs, {sum(not outcome.wrong for outcome in of_kind):3} good; statuses {dict(statuses)}")
    return int(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    if "FILE" in globals():
        child()
    sys.exit(main())
