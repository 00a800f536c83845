"""Progress where there is no terminal: a line a minute, on the standard error stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from amd_fast import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "console", progress.Console(force_terminal=False))
    return now


def every_25_seconds(count: int, clock: list[float]) -> Iterator[int]:
    for number in range(count):
        yield number
        clock[0] += 25.0


def test_a_batch_job_sees_a_line_a_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    seen = list(progress.track(every_25_seconds(8, clock), "reading", unit=3, total=60))
    printed = capsys.readouterr()
    assert seen == list(range(8))
    assert printed.out.strip() == ""
    # The clock moves when the next item is asked for: four items are done after 75 s, seven after 150 s.
    assert printed.err.splitlines() == ["reading: 12 of 60, 0.2/s, 5 min left", "reading: 21 of 60, 0.1/s, 5 min left"]


def test_nothing_is_known_of_the_end_of_a_stream(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(progress.track(every_25_seconds(4, clock), "reading"))) == 4
    assert capsys.readouterr().err == "reading: 4, 0.1/s\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_silence_is_kept_where_asked_for(
    terminal: bool, clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "console", progress.Console(force_terminal=terminal))
    assert len(list(progress.track(every_25_seconds(8, clock), "reading", disable=True))) == 8
    assert capsys.readouterr().err == ""
