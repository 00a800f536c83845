"""The benchmark of reading for training: its videos, a process per number of cores, what is left out; and what `make gpu` runs."""

from __future__ import annotations

import itertools
import json
import os
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from amd_fast import bench
from amd_fast.data.manifest import Manifest
from amd_fast.resources import usable_cores

clips = bench.load("feeding.clips")
run = bench.load("feeding.run")
tasks = bench.load("feeding.tasks")
report_module = bench.load("feeding.report")
TINY = bench.load("recipe").Recipe("afmir_small", frames=2, size=32, ways=3, queries=1)
VIDEO = clips.Video("h264", 64, 48, 12)
SECOND = clips.Video("h264", 48, 64, 12)


def task(kind: str, video: Any = VIDEO, manifest: str = "") -> Any:
    return tasks.Task(kind, video.name, video.codec, manifest)


@pytest.mark.parametrize(("codec", "gop"), [("h264", 250), ("h264", 5), ("hevc", 5)])
def test_videos_move_and_have_keyframes_where_they_are_wanted(codec: str, gop: int, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    assert clips.write_video(path, clips.Video(codec, 96, 64, gop), 12) == 12
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == codec
        frames = list(container.decode(video=0))
    keyframes = [number for number, frame in enumerate(frames) if frame.key_frame]
    assert keyframes == list(range(0, 12, gop)) and len(frames) == 12
    pictures = [frame.to_ndarray(format="gray").astype(float) for frame in frames]
    assert all(np.abs(after - before).mean() > 0.5 for before, after in itertools.pairwise(pictures))


def test_a_set_is_an_episode_of_one_video_under_many_names(tmp_path: Path) -> None:
    manifest = Manifest.from_csv(clips.synthesise(VIDEO, tmp_path / "set", TINY, 0.4))
    assert len(manifest) == TINY.clips and len(manifest.classes) == TINY.ways and len(set(manifest.groups)) == TINY.clips
    assert manifest.table["frames"].tolist() == [10] * TINY.clips and set(manifest.table["codec"]) == {"h264"}
    assert len({Path(manifest.file(row)).read_bytes() for row in range(len(manifest))}) == 1


def test_kinds_begin_with_the_first_of_everything() -> None:
    names = [video.name for video in clips.kinds(["h264", "hevc"], ["320x240", "1280x720"], [250, 12])]
    assert len(set(names)) == 8 and names[:2] == ["h264 320x240 gop 250", "hevc 320x240 gop 250"]


@pytest.mark.slow
def test_the_command_measures_on_fewer_cores_and_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One core of however many there are, in a process that has just that one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seen: list[str] = []
    popen = subprocess.Popen

    def watched(command: list[str], **options: Any) -> Any:
        seen.append(str(len(os.sched_getaffinity(0))))
        return popen(command, **options)

    monkeypatch.setattr(subprocess, "Popen", watched)
    options = {"model": "afmir_small", "frames": 2, "size": 32, "ways": 3, "queries": 1, "steps": 1, "seconds": 0.05, "length": 0.4}
    chosen = ["--codecs", "h264", "--pictures", "64x48", "--gops", "12", "--cores", "1", "4096", "--output", str(tmp_path)]
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["feeding", *chosen, *arguments])
    before = os.sched_getaffinity(0)
    assert bench.load("feeding.__main__").main() == 0
    assert os.sched_getaffinity(0) == before and "1" in seen
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    step, read = report["rows"]
    assert (step["kind"], read["kind"]) == ("step", "read") and {step["cores"], read["cores"]} == {1}
    assert read["clips_per_second"] > 0 and 0 <= step["waiting"] <= 1 and step["decoder"] == read["decoder"] == "pyav"
    assert step["waiting"] == pytest.approx(step["parts"]["wait for data"] / step["step_seconds"])
    assert report["left_out"] == [f"4096 cores: this machine has {usable_cores()}"]
    assert report["videos"][0]["video"] == VIDEO.name and report["machine"]["decoders"]["av"]
    shown = capsys.readouterr().out
    assert "1 core" in shown and "share that waits for data" in shown and "left out: 4096 cores" in shown


def test_what_the_budget_does_not_reach_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = run.Plan([VIDEO, SECOND], [1], length=0.2, budget=1e-6)
    monkeypatch.setattr(run, "_run", lambda *_: pytest.fail("a process was started"))
    report = run.measure(TINY, plan, tmp_path)
    assert report.good and not report.rows
    assert [line.partition(":")[0] for line in report.left_out] == [VIDEO.name, SECOND.name]


def test_what_is_found_on_one_number_of_cores_is_kept_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies_on_two(job: tasks.Job, cores: int, folder: Path) -> str:
        if cores == 2:
            raise KeyboardInterrupt
        Path(job.results).write_text(json.dumps({"kind": "read", "video": VIDEO.name, "decoder": "pyav", "clips_per_second": 5.0}) + "\n")
        return ""

    monkeypatch.setattr(run, "_run", dies_on_two)
    monkeypatch.setattr(run, "_possible", lambda report, wanted: list(wanted))
    kept = tmp_path / "kept.json"
    write = partial(bench.load("feeding.report").write, path=kept)
    with pytest.raises(KeyboardInterrupt):
        run.measure(TINY, run.Plan([VIDEO], [1, 2], length=0.2), tmp_path, keep=write)
    assert [(row["cores"], row["clips_per_second"]) for row in json.loads(kept.read_text())["rows"]] == [(1, 5.0)]


def test_tasks_that_a_process_did_not_come_to_are_listed_and_those_of_a_dead_one_failed(tmp_path: Path) -> None:
    results = tmp_path / "1.jsonl"
    job = tasks.Job([task("step"), task("read"), task("step", SECOND)], TINY, 0.1, 1, 10.0, str(results))
    results.write_text(json.dumps({"kind": "step", "video": VIDEO.name, "decoder": "pyav", "waiting": 0.5, "step_seconds": 1.0}) + "\n")
    late, dead = (run.Report({}, TINY, 1.0) for _ in range(2))
    run._collect(late, job, 1, "")
    run._collect(dead, job, 1, "exit status -11")
    assert [row["waiting"] for row in late.rows] == [0.5] and late.good
    assert late.left_out == [
        f"{kind}, {video.name}, cores 1: its share of the budget was spent" for kind, video in (("read", VIDEO), ("step", SECOND))
    ]
    assert [row.get("failed") for row in dead.rows] == [None, "exit status -11", "exit status -11"] and not dead.good


def test_a_process_is_ended_when_its_time_is_up_and_one_that_dies_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(interpreter))
    monkeypatch.setattr(run, "GRACE", 0.2)
    job = tasks.Job([task("read")], TINY, 0.1, 1, 0.0, str(tmp_path / "1.jsonl"))
    endings = (("exec sleep 60", ""), ("echo and so on >&2; echo no memory >&2; exit 3", "no memory"), ("kill -9 $$", "status -9"))
    started = time.monotonic()
    for script, reason in endings:
        interpreter.write_text(f"#!/bin/sh\n{script}\n")
        interpreter.chmod(interpreter.stat().st_mode | stat.S_IXUSR)
        assert run._run(job, 1, tmp_path).endswith(reason)
    assert time.monotonic() - started < 30, "it was waited for"


def test_a_process_finds_what_this_one_was_told_to_look_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "near.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "/elsewhere"]))
    environment = run.machine.environment()
    assert environment["PYTHONPATH"] == os.pathsep.join([str(run.machine.REPOSITORY), str(tmp_path), "/elsewhere"])
    subprocess.run([sys.executable, "-c", "import near, benchmarks.feeding"], env=environment, cwd="/", check=True, timeout=60)


def test_a_task_that_fails_is_a_line_and_the_next_one_is_done(tmp_path: Path) -> None:
    manifest = str(clips.synthesise(VIDEO, tmp_path / "set", TINY, 0.4))
    results = tmp_path / "1.jsonl"
    job = tasks.Job([task("read", manifest="nowhere.csv"), task("read", manifest=manifest)], TINY, 0.01, 1, 60.0, str(results))
    tasks.run(tasks.Job.from_json(job.to_json()))
    failed, good = map(json.loads, results.read_text().splitlines())
    assert failed["failed"].startswith("DataError") and good["clips_per_second"] > 0
    tasks.run(tasks.Job([task("read")], TINY, 0.1, 1, -1.0, str(results)))
    assert len(results.read_text().splitlines()) == 2, "a task was begun after the budget"


STUB = """#!/bin/sh
case "$1 $2" in
    "-c import "*) case " $ABSENT " in *" ${2#import } "*) exit 1 ;; esac ;;
    "-m pytest") exit 5 ;;
    "-m "*) shift; echo "ran $*"; [ "$1" != "$FAILING" ] || exit "$CODE" ;;
esac
"""


def make_gpu(repository: Path, tmp_path: Path, *, absent: str = "", failing: str = "", code: int = 1) -> tuple[int, list[str]]:
    """What benchmarks/gpu.sh does where an interpreter sees a GPU and lacks some packages: its status and its lines."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    settings = {**os.environ, "PYTHON": str(stub), "ABSENT": absent, "FAILING": failing, "CODE": str(code)}
    settings |= {"RESULTS": str(tmp_path), "BUDGET": "1000"}
    command = ["sh", str(repository / "benchmarks" / "gpu.sh")]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60, check=False)
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


def test_make_gpu_runs_what_can_be_imported_and_says_what_is_missing(repository: Path, tmp_path: Path) -> None:
    status, lines = make_gpu(repository, tmp_path)
    ran = [line.split()[1] for line in lines if line.startswith("ran ")]
    assert status == 0 and ran == ["benchmarks", "benchmarks.training", "benchmarks.feeding"]
    budgets = [int(line.split("--budget ")[1].split()[0]) for line in lines if line.startswith("ran ")]
    assert 400 < budgets[0] <= 450 and 300 < budgets[1] <= 360 and 400 < budgets[2] <= 500, "the shares of what is left of 1000 s"
    status, lines = make_gpu(repository, tmp_path, absent="av nvidia.dali")
    assert status == 0 and [line.split()[1] for line in lines if line.startswith("ran ")] == ["benchmarks", "benchmarks.training"]
    assert f"skipped: the benchmark of decoding and flow, {tmp_path}/python has no working av" in lines
    status, lines = make_gpu(repository, tmp_path, absent="pytest rich numpy pandas matplotlib")
    assert status == 0 and [line.split()[1] for line in lines if line.startswith("ran ")] == ["benchmarks"]
    assert f"skipped: the GPU tests, {tmp_path}/python has no working pytest" in lines
    _, lines = make_gpu(repository, tmp_path, absent="pandas torch")
    assert lines == [f"skipped: {tmp_path}/python has no working torch; install it, or name another interpreter: make PYTHON=... gpu"]


def test_make_gpu_goes_on_after_a_gpu_that_was_lost(repository: Path, tmp_path: Path) -> None:
    status, lines = make_gpu(repository, tmp_path, failing="benchmarks", code=3)
    kernels = [line for line in lines if line.startswith("ran benchmarks ")]
    assert status == 1 and ["--resume" in line for line in kernels] == [False, True, True, True], "three more tries"
    assert sum(line.startswith("ran ") for line in lines) == 6


@pytest.mark.parametrize("failing", ["benchmarks", "benchmarks.training", "benchmarks.feeding"])
def test_make_gpu_fails_where_a_benchmark_does(failing: str, repository: Path, tmp_path: Path) -> None:
    status, lines = make_gpu(repository, tmp_path, failing=failing)
    assert status == 1 and sum(line.startswith("ran ") for line in lines) == 3
