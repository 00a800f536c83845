"""Training on two hosts (network namespaces joined by a veth pair): as on one host, and what becomes of it when the link is cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from amd_fast.data.synth.writing import synthesize
from amd_fast.training.config import DataOptions, EpisodeOptions, ModelOptions, OptimiserOptions, TrainConfig, ValidationOptions

pytestmark = pytest.mark.slow

INTERFACE = "veth"
ADDRESSES = ("10.231.0.1", "10.231.0.2")
STEPS = 30
TIMEOUT = 15.0
GRACE = 45.0  # for the roll call after it, and a busy machine
PATIENCE = 240.0


class Hosts:
    """Two network namespaces, each with a loopback and one end of a link.

    Args:
        name: of the namespaces; nobody else on this machine may use it.
    """

    def __init__(self, name: str) -> None:
        self.names = (f"{name}-0", f"{name}-1")
        self.processes: list[subprocess.Popen[str]] = []

    def connect(self) -> None:
        """Makes the namespaces and the link; raises CalledProcessError where that is not allowed."""
        for host in self.names:
            self._ip("netns", "add", host)
        self._ip("-n", self.names[0], "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", self.names[1])
        for host, address in zip(self.names, ADDRESSES, strict=True):
            self._ip("-n", host, "link", "set", "lo", "up")
            self._ip("-n", host, "addr", "add", f"{address}/24", "dev", INTERFACE)
            self._ip("-n", host, "link", "set", INTERFACE, "up")

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    def link(self, state: str) -> None:
        """Sets the link ``up`` or ``down``."""
        self._ip("-n", self.names[0], "link", "set", INTERFACE, state)

    def train(self, config: TrainConfig) -> None:
        """Starts a process on each host by torchrun; they train together."""
        for number, host in enumerate(self.names):
            # torchrun looks up the machine's name to find out who keeps the store, and namespaces have no name of their own.
            meeting = ["--rdzv-endpoint", f"{ADDRESSES[0]}:29500", "--rdzv-conf", f"is_host={int(number == 0)}"]
            options = ["--nnodes", "2", "--rdzv-backend", "c10d", *meeting, "--local-addr", ADDRESSES[number]]
            self.processes.append(torchrun(config, number, options, before=("ip", "netns", "exec", host)))

    def workers(self) -> list[int]:
        """The processes that train, by number."""
        running = [process.pid for process in self.processes if process.poll() is None]
        return [int(child) for pid in running for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def wait(self) -> list[int]:
        """The exit statuses of what runs, once all of it has ended."""
        statuses = [process.wait(PATIENCE) for process in self.processes]
        self.processes.clear()
        return statuses

    def close(self) -> None:
        """Ends what still runs, and removes the namespaces (and with them the link)."""
        for number in self.workers():  # torchrun starts them as sessions of their own
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        for process in self.processes:
            process.kill()
            process.wait()
        for host in self.names:
            subprocess.run(["ip", "netns", "delete", host], check=False, capture_output=True)


def torchrun(config: TrainConfig, number: int, options: list[str], *, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Starts ``amd-fast train`` by torchrun, with its output in ``host-<number>.log`` in the run folder."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "asked.yaml").write_text(config.to_yaml())
    own = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": INTERFACE} if before else {})
    command = [*before, sys.executable, "-m", "torch.distributed.run", *options, "-m", "amd_fast.cli"]
    with (output / f"host-{number}.log").open("w") as log:
        return subprocess.Popen(
            [*command, "train", "--config", str(output / "asked.yaml")],
            env={**os.environ, **own},
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def able() -> None:
    """Skips where there can be no such hosts."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("there is no `ip` here, which makes network namespaces")
    found = Hosts(f"amd-fast-try-{os.getpid()}")
    try:
        found.connect()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here (root and CAP_NET_ADMIN are needed): {error.stderr.strip()}")
    finally:
        found.close()


@pytest.fixture
def hosts(able: None) -> Iterator[Hosts]:
    """Two hosts with a link between them."""
    found = Hosts(f"amd-fast-{os.getpid()}")
    try:
        found.connect()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def clips(able: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic set."""
    folder = tmp_path_factory.mktemp("synth")
    synthesize(folder, classes=10, clips_per_class=3, size=48, workers=1, progress=False)
    return folder / "manifest.csv"


def configure(manifest: Path, output: Path) -> TrainConfig:
    return TrainConfig(
        output=str(output),
        threads=1,
        device="cpu",
        precision="fp32",
        batch_norm="frozen",
        checkpoint_every=2,
        tensorboard=False,
        timeout=TIMEOUT,
        model=ModelOptions(options={"dim": 32, "backbone_options": {"base": 8}}),
        data=DataOptions(manifest=str(manifest), size=32, frames=4, workers=1, val_split=""),
        episode=EpisodeOptions(ways=3, queries=1, per_step=2),
        optimiser=OptimiserOptions(steps=STEPS, warmup_steps=2),
        validation=ValidationOptions(every=STEPS, episodes=10),
    )


def logs(output: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(output.glob("host-*.log")))


def until(condition: Callable[[], bool], output: Path) -> None:
    """Waits for something; fails with what the hosts said."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, logs(output)
        time.sleep(0.02)


def ended(process: int) -> bool:
    """Whether a process is gone, or all that is missing is that its parent takes notice."""
    status = Path(f"/proc/{process}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def reached(output: Path) -> int:
    """Steps of the newest checkpoint."""
    pointer = output / "checkpoints" / "last"
    return int(pointer.read_text().removeprefix("step-").removesuffix(".safetensors")) if pointer.exists() else 0


def outcome(output: Path) -> tuple[bytes, str]:
    """The last training state, and the history."""
    return (output / "checkpoints" / (output / "checkpoints" / "last").read_text()).read_bytes(), (output / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def on_one_host(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """What two processes on one host end with."""
    output = tmp_path_factory.mktemp("one host") / "run"
    process = torchrun(configure(clips, output), 0, ["--standalone", "--nproc-per-node", "2"])
    assert process.wait(PATIENCE) == 0, logs(output)
    return outcome(output)


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_two_hosts_train_as_one_does_and_a_link_that_is_cut_for_some_seconds_only_delays_them(
    seconds: float, hosts: Hosts, clips: Path, on_one_host: tuple[bytes, str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    hosts.train(configure(clips, output))
    if seconds:
        until(lambda: reached(output) > 0, output)
        hosts.link("down")
        time.sleep(1.0)  # whatever was under way
        before = reached(output)
        time.sleep(seconds)
        assert 0 < before == reached(output) < STEPS, "the link was not cut in the middle of training"
        hosts.link("up")
    assert hosts.wait() == [0, 0], logs(output)
    assert outcome(output) == on_one_host


def test_a_link_that_stays_cut_ends_all_processes_within_the_time_limit(hosts: Hosts, clips: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    hosts.train(configure(clips, output))
    until(lambda: reached(output) > 0, output)
    workers = hosts.workers()
    assert len(workers) == 2
    hosts.link("down")
    cut = time.monotonic()
    until(lambda: all(map(ended, workers)), output)
    assert time.monotonic() - cut < TIMEOUT + GRACE
    for number in range(2):
        said = (output / f"host-{number}.log").read_text()
        assert f"rank {number} lost the connection to another rank at step" in said and "--resume goes on from the last checkpoint" in said
    assert hosts.processes[0].wait(PATIENCE) == 1  # the other torchrun waits for the store on this host as long as the kernel does
