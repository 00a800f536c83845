"""What ``amd-fast bench data`` does once its options are read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from amd_fast.progress import console as messages

from .. import machine
from ..report import wide_console
from . import advice, report, run
from .contenders import Group, available
from .work import Work


def bench_data(
    source: str,
    *,
    work: Work,
    clips: int,
    rounds: int,
    threads: int,
    flow: bool,
    frame_folders: bool,
    trial: bool,
    output: str | None,
) -> run.Report:
    """Measures, prints, and writes where ``output`` names a folder."""
    chosen, facts, left_out = run.find_clips(source, work, clips)
    groups: list[Group] = ["video"]
    if flow:
        groups.append("flow")
    if frame_folders:
        groups.append("frame folder")
    cost: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        if frame_folders:
            chosen, cost = advice.extract_frames(chosen, work, Path(folder) / "frames")
        contenders, missing = available(work, groups, chosen, threads)
        results = run.measure(contenders, chosen, work, threads=threads, rounds=rounds, progress=messages.print)
        tried = advice.try_short_gop(chosen, work, Path(folder)) if trial else {}
    shares = run.stages(chosen, work, min(rounds, 3))
    timed = [contender for contender, result in zip(contenders, results, strict=True) if result.wall]
    done = run.Report(run.facts(timed), work, threads, facts, results, shares, missing + left_out, trial=tried, folders=cost)
    done.advice = advice.advise(done)
    report.show(done, wide_console())
    if output is not None:
        for path in report.write(done, Path(output), f"data-{machine.file_stem(run.device_of(timed))}"):
            messages.print(f"wrote {os.fspath(path)}", soft_wrap=True)
    return done
