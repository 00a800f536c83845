"""The soak benchmark: it watches all processes, notices growth, and writes what it saw."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import soak

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="memory and files are read from Linux's /proc")


@pytest.mark.slow
def test_a_short_soak_writes_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soak.main(["--episodes", "400", "--decoded", "200", "--flow", "--output", str(tmp_path / "soak.json")])
    seen = json.loads((tmp_path / "soak.json").read_text())
    assert seen["grown"] == [] and seen["options"]["flow"] and "commit" in seen["machine"]
    assert [look["episodes"] for look in seen["looks"] if look["cache"] == "none"] == list(range(10, 201, 10))
    assert seen["looks"][-1]["lost"] == 2  # the files that went bad
    assert "10 episodes" in capsys.readouterr().out.splitlines()[0]


def test_a_soak_may_decode_every_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "_growth", lambda looks: None)  # so few episodes are over before the allocator has settled
    soak.main(["--episodes", "40", "--decoded", "40", "--output", str(tmp_path / "soak.json")])
    seen = json.loads((tmp_path / "soak.json").read_text())
    assert [(look["cache"], look["episodes"]) for look in seen["looks"]] == [("none", episodes) for episodes in (10, 20, 30, 40)]


@pytest.mark.parametrize(
    ("field", "by", "grown"),
    [("memory", 2**23, False), ("memory", 2**23 + 1, True), ("files", 2, False), ("files", 3, True), ("threads", 1, True)],
)
def test_growth_in_the_second_half_is_noticed(field: str, by: int, grown: bool) -> None:
    early = soak.Look("ram", 10, 2**30, 40, 8, 0, 100.0)
    late = dataclasses.replace(early, **{field: getattr(early, field) + by})
    assert (soak._growth([early, early, late, early]) is not None) == grown
    assert soak._growth([late, early, early, early]) is None
    assert soak._growth([late]) is None, "one look alone shows no growth"


def test_children_and_their_children_are_counted() -> None:
    memory, files, threads = soak._held()
    wait = "import time; time.sleep(30)"
    hold = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {wait!r}]); {wait}"
    with subprocess.Popen([sys.executable, "-c", hold]) as child:
        try:
            until = time.monotonic() + 20
            while soak._held()[2] < threads + 2 and time.monotonic() < until:
                time.sleep(0.05)
            more = soak._held()
            assert more[0] > memory + 2 * 2**20 and more[1] >= files + 6 and more[2] >= threads + 2
        finally:
            for process in list(soak._family(Path(f"/proc/{child.pid}")))[::-1]:
                subprocess.run(["kill", process.name], check=False)
