"""Several processes that train one model: what torchrun starts, what they tell each other, and what is said when one of them is lost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amd_fast import errors
from amd_fast.errors import AmdFastError, ConfigError, TrainingInterrupted

T = TypeVar("T")

_ROLL_CALL = 5.0
"""Seconds that the other ranks have to answer after one of them was lost."""


@dataclass(frozen=True)
class World:
    """This process among those that train together; the defaults are a process alone.

    Attributes:
        rank, size: number of this process and of all.
        local_rank, local_size: the same on this machine.
        control: gloo group for small things between the processes' main threads, None for a process alone.
        timeout: seconds that one rank waits for the others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    control: Any = None
    timeout: float = 600.0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes files and talks."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all ranks, in place, without waiting for the device."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: T) -> list[T]:
        """A plain value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def on_first(self, action: Callable[[], T]) -> T:
        """Runs ``action`` on rank 0 alone; every rank gets its result, or its error."""
        outcome: list[Any] = [None, None]
        error: AmdFastError | None = None
        if self.first:
            try:
                outcome[0] = action()
            except AmdFastError as caught:
                error, outcome[1] = caught, (type(caught).__name__, str(caught))
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0, group=self.control)
        if error is not None:
            raise error
        if outcome[1] is not None:
            name, message = outcome[1]
            raise getattr(errors, name, AmdFastError)(message)
        return outcome[0]

    def share_buffers(self, module: nn.Module) -> None:
        """Gives every rank rank 0's buffers (statistics of batch normalisation drift apart while ranks see different clips)."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def roll_call(self) -> str:
        """After the connection to a rank was lost: which ranks do not answer. Every rank that comes here answers the others.

        Goes through the store that the ranks met in, which torchrun keeps: collectives are of no use once one has failed.
        """
        life = f"amd_fast roll call {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        try:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_ROLL_CALL))
            store.set(f"{life} {self.rank}", "here")
            absent, deadline = list(range(self.size)), time.monotonic() + _ROLL_CALL
            while absent and time.monotonic() < deadline:
                absent = [rank for rank in absent if not store.check([f"{life} {rank}"])]
                time.sleep(0.1)
        except (KeyError, RuntimeError):
            return "The process in whose store the ranks met does not answer either"
        if not absent:
            return "All ranks answer: the connection between them was interrupted"
        return f"{'Rank' if len(absent) == 1 else 'Ranks'} {', '.join(map(str, absent))} did not answer within {_ROLL_CALL:.0f} s"


def lost_connection(error: BaseException) -> bool:
    """Whether an error says that another rank went away or does not answer (rather than that something is wrong here)."""
    return isinstance(error, dist.DistError) or any(
        part in str(error) for part in ("gloo/transport", "Connection closed by peer", "[gloo]")
    )


@contextmanager
def joined(device: str, timeout: float) -> Iterator[World]:
    """Joins the processes that torchrun started (or the group that exists already); outside of torchrun, this process is alone.

    Args:
        device: ``TrainConfig.device``; GPUs talk through NCCL, CPUs through gloo.
        timeout: seconds that one rank waits for the others in any exchange before it gives up.

    Raises:
        ConfigError: torchrun may restart processes, but was started so that they would look for dead ones.
    """
    own = not dist.is_initialized()
    if own and not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
        yield World()
        return
    if own:
        _check_restarts()
    wait = timedelta(seconds=timeout)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if own:
        chosen = choose_device(device, local_rank, int(os.environ["WORLD_SIZE"]))
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            dist.init_process_group("nccl", timeout=wait, device_id=chosen)
        else:
            dist.init_process_group("gloo", timeout=wait)
    world = World(
        dist.get_rank(),
        dist.get_world_size(),
        local_rank,
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        dist.new_group(backend="gloo", timeout=wait),
        timeout,
    )
    try:
        yield world
    except TrainingInterrupted:
        _leave(own)
        raise
    # After any other error this rank leaves without ceremony: saying goodbye would wait for ranks that may be gone.
    _leave(own)


def _check_restarts() -> None:
    # https://github.com/pytorch/pytorch/issues/135712: the store outlives the processes, and with it the addresses they left there.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise ConfigError(
            "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment (on every machine): without it, "
            "processes that were started again wait for the addresses of dead ones"
        )


def _leave(own: bool) -> None:
    if own:
        dist.barrier()  # a rank that leaves while another still takes its connections down can make that one wait for ever
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """``auto`` is the GPU where there is one; with several processes, each takes the GPU of its local rank.

    Raises:
        ConfigError: one particular GPU was asked for, for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if world_size > 1 and device.type == "cuda":
        if ":" in name:
            raise ConfigError(f"device={name!r} would put all {world_size} processes on one GPU; pass device=cuda, or start one process")
        return torch.device("cuda", local_rank)
    return device
