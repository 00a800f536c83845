"""``pytest benchmarks/``: cross_modal_attention, one call at a time, with pytest-benchmark's statistics, comparisons and profiles."""

from __future__ import annotations

from typing import Any

from benchmarks import suite
from benchmarks.shapes import Direction


@suite.parameters("cross_modal_attention")
def test_cross_modal_attention(benchmark: Any, shape: str, provider: str, direction: Direction) -> None:
    suite.run(benchmark, "cross_modal_attention", shape, provider, direction)
