"""What the pytest-benchmark suites share: one test per shape, provider and pass, the check before the clock."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from . import machine
from .providers import UnavailableError, providers
from .run import CPU_ELEMENTS, calls_of
from .shapes import DIRECTIONS, SHAPES, Direction
from .workloads import Case, make


def parameters(op: str) -> pytest.MarkDecorator:
    """Every shape, provider and pass of an op: ``-k 'episode and sdpa and forward'`` picks some."""
    cases = [
        pytest.param(shape.name, provider.name, direction, id=f"{shape.name}-{provider.name}-{direction}".replace(" ", ""))
        for shape in SHAPES[op]
        for provider in providers(op)
        if provider.whole
        for direction in DIRECTIONS
    ]
    return pytest.mark.parametrize(("shape", "provider", "direction"), cases)


@functools.lru_cache(1)
def _case(op: str, name: str) -> Case:
    device = machine.default_device()
    shape = next(shape for shape in SHAPES[op] if shape.name == name)
    on_cpu = device.type == "cpu"
    return make(shape.capped(CPU_ELEMENTS) if on_cpu else shape, torch.float32 if on_cpu else torch.bfloat16, device)


def run(benchmark: Any, op: str, shape: str, provider: str, direction: Direction) -> None:
    """Check a provider, then let pytest-benchmark time it; a GPU is waited for in every call."""
    case = _case(op, shape)
    torch._dynamo.reset()
    try:
        forward = next(entry for entry in providers(op) if entry.name == provider).build(case)
        case.check(forward)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    call = calls_of(case, forward)[direction]

    def waited() -> None:
        call()
        if case.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op} {shape} {case.shape.sizes} {direction}"
    benchmark.extra_info.update(machine.describe(case.device), bytes=case.shape.traffic(direction, case.dtype.itemsize))
    benchmark.pedantic(waited, rounds=10, iterations=1, warmup_rounds=3)
