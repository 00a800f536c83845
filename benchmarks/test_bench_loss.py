"""``pytest benchmarks/``: free_energy_loss, one call at a time, with pytest-benchmark's statistics, comparisons and profiles."""

from __future__ import annotations

from typing import Any

from benchmarks import suite
from benchmarks.shapes import Direction


@suite.parameters("free_energy_loss")
def test_free_energy_loss(benchmark: Any, shape: str, provider: str, direction: Direction) -> None:
    suite.run(benchmark, "free_energy_loss", shape, provider, direction)
