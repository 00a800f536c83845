"""Requests to stop that come while ``amd-fast train`` starts: the status of a requeue at once, wherever it is."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from amd_fast.training.interruption import EXIT_INTERRUPTED
from tests.ports import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the moments are read from Linux' /proc")
ROOT = Path(__file__).parents[1]
PATIENCE = 120.0


def listens(process: subprocess.Popen[str]) -> bool:
    """SIGTERM no longer ends the process by itself."""
    caught = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) & 1 << (signal.SIGTERM - 1))


def imports_torch(process: subprocess.Popen[str]) -> bool:
    """The main thread is busy loading libraries, where Python runs no signal handlers."""
    return "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text()


def waits_for_others(process: subprocess.Popen[str]) -> bool:
    """Rank 0 keeps the store in which the ranks meet, and the other one never comes."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", int(PORT))) == 0


PORT = str(free_port())


@pytest.mark.parametrize(
    ("moment", "number"),
    [(listens, signal.SIGUSR1), (listens, signal.SIGTERM), (imports_torch, signal.SIGTERM), (waits_for_others, signal.SIGTERM)],
)
def test_a_request_before_training_ends_the_command_with_the_status_of_a_requeue(
    moment: Callable[[subprocess.Popen[str]], bool], number: signal.Signals, tmp_path: Path
) -> None:
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": PORT} if moment is waits_for_others else {}
    command = [sys.executable, "-m", "amd_fast.cli", "train", "--device", "cpu", "--output", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **group}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE
        while not moment(process):
            assert process.poll() is None and time.monotonic() < deadline, "it never came to that moment"
            time.sleep(0.001)
        process.send_signal(number)
        try:
            _, said = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == EXIT_INTERRUPTED
    assert f"stopped by {number.name}" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def run(code: str) -> subprocess.CompletedProcess[str]:
    """A script that has what it needs."""
    start = "import os, signal, sys, time\nfrom amd_fast.training.interruption import EndOnRequest, StopRequest\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", start + code], env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def test_the_command_listens_before_anything_slow_is_imported() -> None:
    done = run(
        "import amd_fast.cli, amd_fast.training.command\nprint(sorted({'torch', 'numpy', 'jsonargparse', 'rich'} & set(sys.modules)))"
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_signal_for_a_forked_process_does_not_end_its_parent() -> None:
    done = run(
        "with EndOnRequest():\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        time.sleep(10)\n"
        "        os._exit(1)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "    time.sleep(0.2)\n"
    )
    assert (done.returncode, done.stdout) == (0, f"{-signal.SIGTERM}\n"), done.stderr


def test_training_remembers_a_request_and_afterwards_it_ends_the_process_again() -> None:
    done = run(
        "with EndOnRequest():\n"
        "    with StopRequest() as stop:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.2)\n"
        "        print(stop.signal, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    time.sleep(10)\n"
    )
    assert (done.returncode, done.stdout) == (EXIT_INTERRUPTED, "SIGTERM\n"), done.stderr


def test_signals_do_what_they_did_before_once_the_command_is_left() -> None:
    done = run("with EndOnRequest():\n    pass\nprint(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, signal.set_wakeup_fd(-1))")
    assert done.stdout == "True -1\n", done.stderr
