"""The benchmark of the demo's training step: what it writes, and that the page shows what was recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.step import measure, table


@pytest.mark.slow
def test_the_parts_of_a_step_make_up_the_step(tmp_path: Path) -> None:
    result = measure(tmp_path, classes=10, clips_per_class=4, steps=2, repeats=1)
    (run,) = result["runs"]
    assert sum(run["parts"].values()) == pytest.approx(run["seconds"]) and run["clips_per_second"] > 0
    assert run["parts"]["backward"] > 0 and "The step is bound by" in run["bound"]
    assert str(tmp_path) not in json.dumps(result)
    assert f"| **step** | {run['seconds'] * 1e3:.1f} ms |" in table(result)


def test_the_page_shows_what_was_recorded(repository: Path) -> None:
    page = (repository / "docs" / "clusters.md").read_text(encoding="utf-8")
    files = sorted((repository / "benchmarks" / "results").glob("step-*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        assert file.name in page and result["machine"]["commit"] in page
        assert table(result) in page
