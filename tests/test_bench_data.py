"""The benchmark of reading videos: same work for all, wrong frames found and named, the report. No test looks at the clock."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from amd_fast import bench, cli
from amd_fast.data.clips import ClipTransform, RawClip
from amd_fast.data.decode import VideoReader
from amd_fast.errors import ConfigError, DataError

made = runpy.run_path(str(Path(__file__).with_name("made_videos.py")))
video: Callable[[str], Path] = made["video"]

work_module = bench.load("data.work")
contenders = bench.load("data.contenders")
run = bench.load("data.run")
advice = bench.load("data.advice")
report_module = bench.load("data.report")

WORK = work_module.Work(frames=4, size=56, short_side=64)
NAMES = ("h264_b", "mpeg4_avi_packed", "vp9_webm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three small clips of three codecs, and a file that is none."""
    source = tmp_path / "videos"
    source.mkdir()
    for name in NAMES:
        path = video(name)
        (source / f"{name}{path.suffix}").write_bytes(path.read_bytes())
    (source / "broken.mp4").write_bytes(b"no video")
    return source


def clip(name: str = "h264_b") -> Any:
    with VideoReader(video(name)) as reader:
        return work_module.Clip(str(video(name)), reader.frame_count, WORK.indices(reader.frame_count), reader.codec)


def shifted(by: int) -> Any:
    """A peer that returns the frames ``by`` later than asked, on every clip."""
    right = contenders.pyav_linear(WORK)

    def read(asked: Any) -> Mapping[str, torch.Tensor]:
        later = tuple(min(index + by, asked.frame_count - 1) for index in asked.indices)
        return dict(right.read(work_module.Clip(asked.path, asked.frame_count, later)))

    return contenders.Contender(f"shifted by {by}", "video", read)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_are_here_return_the_same_frames(name: str) -> None:
    asked = clip(name)
    truth = work_module.Truth(asked, WORK)
    assert [made["number"](truth.squares[index]) >= 0 for index in asked.indices]
    for contender in (contenders.ours(WORK, "video"), contenders.pyav_linear(WORK), contenders.opencv(WORK)):
        tensor = contender.read(asked)["rgb"]
        assert tensor.shape == (4, 3, 56, 56) and tensor.dtype == torch.float32
        assert truth.fault(tensor) is None, contender.name


def test_truth_is_the_full_decode() -> None:
    asked = clip()
    expected = made["linear_frames"](video("h264_b"))
    squares = work_module.Truth(asked, WORK).squares
    assert set(asked.indices) <= squares.keys()
    for index, square in squares.items():
        grey = WORK.square(expected[index]).astype(float)
        luma = square.astype(float) @ [0.299, 0.587, 0.114]
        assert np.abs(grey - luma).mean() < 24  # video levels against full range: the same picture
        others = [np.abs(WORK.square(frame).astype(float) - luma).mean() for frame in expected]
        assert int(np.argmin(others)) == index


@pytest.mark.parametrize("by", [1, 2, -1])
def test_a_shifted_frame_is_found_and_named(by: int) -> None:
    asked = clip()
    results = run.measure([contenders.ours(WORK, "video"), shifted(by)], [asked], WORK, threads=1, rounds=1, progress=lambda line: None)
    mine, wrong = results
    assert mine.exact and not wrong.exact
    first = asked.indices[0]
    assert wrong.faults == {asked.name: f"asked for frame {first}, got {first + by}"}
    assert len(wrong.wall) == 1, "who is wrong is timed all the same, and marked"


def test_wrong_pixels_and_shapes_are_found() -> None:
    asked = clip()
    truth = work_module.Truth(asked, WORK)
    tensor = contenders.ours(WORK, "video").read(asked)["rgb"]
    assert "grey levels" in truth.fault(tensor + 0.5)
    assert "grey levels" in truth.fault(torch.full_like(tensor, torch.nan))
    assert "shape" in truth.fault(tensor[:, :, :-1])


def test_failing_peers_are_a_line_and_ours_an_error() -> None:
    def fail(asked: Any) -> Mapping[str, torch.Tensor]:
        raise RuntimeError("no such codec\nand more")

    peer = contenders.Contender("failing", "video", fail)
    (result,) = run.measure([peer], [clip()], WORK, threads=1, rounds=2, progress=lambda line: None)
    assert result.reason.endswith("RuntimeError: no such codec") and not result.wall
    own = contenders.Contender("ours", "video", fail, peer=False)
    with pytest.raises(RuntimeError, match="no such codec"):
        run.measure([own], [clip()], WORK, threads=1, rounds=1, progress=lambda line: None)


def test_flow_is_cut_and_scaled_as_ours() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(0, 4, (4, 64, 85, 2)).astype(np.float32)
    pictures = [np.zeros((96, 128, 3), np.uint8)] * 8
    pending = iter(vectors)
    peer = WORK.flow(pictures, lambda first, second: next(pending))
    mine = ClipTransform(56, ("flow",), train=False)(RawClip(flow=vectors))["flow"]
    torch.testing.assert_close(peer, mine)
    for contender in (contenders.ours(WORK, "flow"), contenders.opencv(WORK, flow=True)):
        assert contender.read(clip())["flow"].shape == (4, 2, 56, 56)


def test_clips_are_chosen_from_folders_and_manifests(folder: Path) -> None:
    clips, facts, left_out = run.find_clips(folder, WORK, 10)
    assert {found.name.partition(".")[0] for found in clips} == set(NAMES)
    assert [fact["name"] for fact in facts] == [found.name for found in clips]
    assert len(left_out) == 1 and "broken.mp4" in left_out[0]
    assert [fact["bytes"] for fact in facts] == sorted((fact["bytes"] for fact in facts), reverse=True)
    table = pd.DataFrame({"path": [f"videos/{path.name}" for path in sorted(folder.iterdir())[1:]], "label": ["a", "b", "c"]})
    table.to_csv(folder.parent / "some.csv", index=False)
    listed, _, _ = run.find_clips(folder.parent / "some.csv", WORK, 10)
    assert {found.path for found in listed} == {found.path for found in clips}
    assert len(run.find_clips(folder.parent / "some.csv", WORK, 2)[0]) == 2
    (folder.parent / "empty").mkdir()
    with pytest.raises(DataError, match="no video"):
        run.find_clips(folder.parent / "empty", WORK, 10)


def test_ratios_are_taken_round_by_round_from_the_fastest_peer() -> None:
    results = [
        run.Result("video", "amd_fast", False, 10, wall=[1.0, 2.0], processor=[1.0, 1.0]),
        run.Result("video", "slow", True, 10, wall=[4.0, 4.0], processor=[3.0, 3.0]),
        run.Result("video", "wrong", True, 10, wall=[1.5, 5.0], processor=[4.0, 4.0], faults={"a.avi": "asked for frame 4, got 2"}),
        run.Result("video", "failed", True, 10, reason="a.avi: RuntimeError"),
    ]
    found = run.Report({}, WORK, 2, [], results, {}, [])
    assert found.ratio("video", exact=True) == ("slow", 4.0, [4.0, 2.0])
    assert found.ratio("video", exact=False) == ("wrong", 1.5, [1.5, 2.5])
    assert found.ratio("video", exact=False, clock="processor") == ("slow", 3.0, [3.0, 3.0])
    assert found.ratio("flow", exact=True) is None
    assert [results[0].rate(which) for which in ("best", "worst")] == [10.0, 5.0]


def test_the_command_measures_advises_and_writes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    options = ["--clips", "9", "--rounds", "1", "--frames", "4", "--size", "56", "--output", str(tmp_path / "out")]
    assert cli.main(["bench", "data", str(folder), *options]) == 0
    assert torch.get_num_threads() == before
    shown = " ".join(capsys.readouterr().out.split())
    assert "broken.mp4" in shown and "Where our time goes" in shown and "Keyframes are" in shown and "Folders of JPEG files" in shown
    (numbers,) = (tmp_path / "out").glob("data-*.json")
    assert numbers.with_suffix(".svg").read_text().count("</svg>") == 1
    content = json.loads(numbers.read_text())
    assert {"method", "machine", "work", "threads", "clips", "results", "stages", "missing", "advice", "trial", "folders", "ratios"} == set(
        content
    )
    assert {"cpu", "commit", "versions", "load", "ffmpeg of PyAV"} <= set(content["machine"])
    assert sum(content["stages"].values()) == pytest.approx(1.0)
    assert {result["group"] for result in content["results"]} == {"video", "flow", "frame folder"}
    for result in content["results"]:
        assert len(result["wall"]) == len(result["processor"]) == (0 if result["reason"] else 1)
        if not result["peer"]:
            assert not result["faults"] and not result["reason"]
    assert content["trial"]["clips"] == 3 and content["folders"]["size_ratio"] > 0
    assert {ratio["group"] for ratio in content["ratios"]} == {"video", "flow", "frame folder"}


def test_advice_has_its_reasons() -> None:
    facts = [{"name": "a.mp4", "width": 640, "height": 360, "frames": 300, "frames_per_keyframe": 150.0}]
    report = run.Report({"load": [9.0], "cores": 2}, work_module.Work(), 2, facts, [], {"decode": 0.6, "convert and resize": 0.4}, [])
    report.trial = {"clips": 1, "gop": 19, "speedup": 3.0, "size_ratio": 0.5}
    text = " ".join(advice.advise(report))
    assert (
        "150 frames apart" in text and "3.0 times faster" in text and "would pay" in text and "resize them once" in text and "busy" in text
    )
    report.trial["speedup"] = 1.0
    assert "leave the files as they are" in " ".join(advice.advise(report))


def test_options_out_of_range() -> None:
    with pytest.raises(ConfigError, match="rounds"):
        bench.data_command("videos", rounds=0)
