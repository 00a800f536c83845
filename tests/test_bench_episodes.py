"""The benchmark of episodes: its loops agree with the library, it refuses a loop that does not, and writes what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import amd_fast
from amd_fast import bench

run = bench.load("episodes.run")
TINY = run.Sizes(classes=6, clips=8, frames=4, dim=16, ways=3, queries=2, episodes=20, loop_episodes=6, rounds=2)


@pytest.mark.parametrize("name", amd_fast.list_matchers())
@pytest.mark.parametrize("shots", [1, 3])
def test_the_loop_agrees_with_ours_and_all_three_are_timed(name: str, shots: int) -> None:
    result = run.measure(name, shots, TINY)
    assert result.error <= run.TOLERANCE
    assert min(result.ours, result.loop, result.floor, result.prepare) > 0
    assert result.ranges["ours"][0] <= result.ours <= result.ranges["ours"][1]


def test_one_modality_has_no_joint_view() -> None:
    one = run.dataclasses.replace(TINY, modalities=1)
    assert run.measure("otam", 1, one).error <= run.TOLERANCE


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = run.Case.ours
    monkeypatch.setattr(run.Case, "ours", lambda *arguments: honest(*arguments) + 1e-4)
    monkeypatch.setattr(run, "_timed", lambda *_: pytest.fail("the clock was started"))
    with pytest.raises(run.WrongResultError, match="bi_mhm, 1-shot: log-posteriors differ by"):
        run.measure("bi_mhm", 1, TINY)


def test_episodes_have_queries_of_their_own_classes_and_no_clip_twice() -> None:
    drawn = run.Case.make("prototype", 3, TINY).drawn
    for support, query in zip(drawn.support, drawn.query, strict=True):
        assert len({*support, *query}) == len(support) + len(query)
        assert (support // TINY.clips)[::3].tolist() == (query // TINY.clips)[::2].tolist()


def test_the_command_writes_machine_method_and_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"classes": 6, "clips": 8, "frames": 4, "dim": 16, "ways": 3, "episodes": 10, "loop-episodes": 4, "rounds": 1}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["episodes", "--matchers", "cosine", "--shots", "1", "--output", str(tmp_path), *arguments])
    assert bench.load("episodes.__main__").main() == 0
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert path.name.startswith("episodes-cpu-") and report["machine"]["torch"] == torch.__version__
    assert report["sizes"]["episodes"] == 10 and report["encoding"] is None and "extrapolated" in report["method"]
    (result,) = report["results"]
    assert result["matcher"] == "cosine" and result["ratio"] == pytest.approx(result["loop"] / result["ours"])
    assert "times faster" in capsys.readouterr().out


@pytest.mark.slow
def test_encoding_anew_gives_the_same_posteriors() -> None:
    encoded = bench.load("episodes.encoding").measure(3, classes=8, clips_per_class=4)
    assert encoded.error <= 1e-4 and encoded.anew > 0
    assert "times faster" in encoded.text()
