"""The benchmark of reading videos: same work for all, wrong frames found and named, the report. No test looks at the clock."""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from amd_fast import bench, cli, storage
from amd_fast.data.clips import ClipTransform, RawClip
from amd_fast.data.decode import VideoReader
from amd_fast.data.decoders import dali_installed
from amd_fast.errors import ConfigError, DataError, DecodeError

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
    (folder.parent / "frames.csv").write_text(f"path,label\nvideos,a\nvideos/{NAMES[0]}.mp4,a\n")
    _, _, left_out = run.find_clips(folder.parent / "frames.csv", WORK, 10)
    assert len(left_out) == 1 and "videos: it is a folder of frames" in left_out[0]
    (folder.parent / "empty").mkdir()
    with pytest.raises(DataError, match="no video"):
        run.find_clips(folder.parent / "empty", WORK, 10)


def results(**changes: Any) -> list[Any]:
    """As on a GPU: our two ways, the one of ``auto`` first, and peers."""
    dali = run.Result("video", "amd_fast, DALI (cuda)", False, 10, wall=[1.0, 2.0], processor=[1.0, 1.0], setting="dali")
    return [
        dataclasses.replace(dali, **changes),
        run.Result("video", "amd_fast", False, 10, wall=[2.0, 8.0], processor=[5.0, 5.0], setting="pyav"),
        run.Result("video", "slow", True, 10, wall=[4.0, 4.0], processor=[3.0, 3.0]),
        run.Result("video", "wrong", True, 10, wall=[1.5, 5.0], processor=[4.0, 4.0], faults={"a.avi": "asked for frame 4, got 2"}),
        run.Result("video", "failed", True, 10, reason="a.avi: RuntimeError"),
    ]


def test_ratios_are_taken_round_by_round_of_everyone_over_ours() -> None:
    found = run.Report({}, WORK, 2, [], results(), {}, [])
    ratios = {(ratio.other, ratio.clock): ratio for ratio in found.ratios("video")}
    assert [name for name, clock in ratios if clock == "wall"] == ["amd_fast", "slow", "wrong"]
    assert {ratio.ours for ratio in ratios.values()} == {"amd_fast, DALI (cuda)"}
    assert ratios["slow", "wall"].rounds == [4.0, 2.0] and str(ratios["slow", "wall"]) == "3.00 (2.00 to 4.00)"
    assert ratios["slow", "processor"].rounds == [3.0, 3.0]
    of_wall = [(ratio.peer, ratio.exact) for ratio in ratios.values() if ratio.clock == "wall"]
    assert of_wall == [(False, True), (True, True), (True, False)]
    assert found.ratios("flow") == []
    written = {(each["other"], each["clock"]): each for each in found.to_json()["ratios"]}
    slow = written["slow", "wall"]
    assert (slow["median"], slow["lowest"], slow["highest"], slow["rounds"]) == (3.0, 2.0, 4.0, [4.0, 2.0])
    assert [found.results[0].rate(which) for which in ("best", "worst")] == [10.0, 5.0]


def test_the_table_shows_what_is_published_of_a_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    machine = {"device": "a GPU", "cpu": "a CPU", "commit": "c", "load": None}
    refused = {"b.avi": "it is turned"}
    found = run.Report(machine, WORK, 2, [{}] * 10, results(refused=refused), {}, [], advice=["an advice"])
    report_module.show(found, report_module.Console(width=200))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert rows[0][2:] == ["1", "1", "right; PyAV reads 1 of 10"]
    assert {row[0]: row[2:] for row in rows[1:]} == {
        "amd_fast": ["3.00 (2.00 to 4.00)", "5.00 (5.00 to 5.00)", "right"],
        "slow": ["3.00 (2.00 to 4.00)", "3.00 (3.00 to 3.00)", "right"],
        "wrong": ["2.00 (1.50 to 2.50)", "4.00 (4.00 to 4.00)", "wrong on 1 of 10"],
    }


def test_the_advice_is_what_to_set_here_and_peers_are_named_apart() -> None:
    def said(*of: Any) -> str:
        return " ".join(advice.advise(run.Report({}, WORK, 2, [], list(of), {}, [])))

    dali, pyav, *peers = results()
    text = said(dali, pyav, *peers)
    assert "`--data.decoder auto`, the default, reads 6.7 clips/s here, by DALI, PyAV 2.0: there is nothing to set." in text
    assert "Of other libraries that return the right frames slow is the fastest: 3.00 (2.00 to 4.00) times our time." in text
    assert "Wrong frames come from wrong" in text
    slower = dataclasses.replace(dali, wall=[50.0, 50.0])
    assert "by DALI: PyAV reads 2.0, so set `--data.decoder pyav`, and `--decoder` where you evaluate or extract." in said(slower, pyav)
    wrong = dataclasses.replace(dali, faults={"a.avi": "asked for frame 4, got 2"})
    assert "so set `--data.decoder pyav`" in said(wrong, pyav)
    assert "by PyAV: DALI reads 6.7, so set `--data.decoder dali`." in said(pyav, dali)
    losing = dataclasses.replace(dali, refused={"a.avi": "it is turned"})
    text = said(pyav, losing)
    assert "by PyAV, DALI 6.7: there is nothing to set." in text
    assert "DALI refuses 1 of 10 clips, which `--data.decoder auto` has PyAV read and `--data.decoder dali` would lose." in text
    assert "by PyAV: there is nothing to set." in said(pyav, *peers)


def picky(refuses: str, **changes: Any) -> Any:
    """As DALI: a way of ours that reads several clips at once, on a GPU, and refuses those of a name."""
    plain = contenders.ours(WORK, "video")

    def load(clips: list[Any]) -> list[Mapping[str, torch.Tensor]]:
        for asked in clips:
            if refuses in asked.path:
                raise DecodeError(f"cannot decode {asked.path!r} with DALI: it is turned")
        return [plain.read(asked) for asked in clips]

    whole = {"peer": False, "load": load, "setting": "dali", "device": "cuda", "package": "numpy"}
    return contenders.Contender("amd_fast, DALI (cuda)", "video", plain.read, **{**whole, **changes})


def test_a_refused_clip_is_named_and_the_others_are_measured() -> None:
    clips = [clip("h264_b"), clip("vp9_webm")]
    found, plain = run.measure([picky("vp9"), contenders.ours(WORK, "video")], clips, WORK, threads=1, rounds=2, progress=lambda line: None)
    assert found.refused == {clips[1].path: f"cannot decode {clips[1].path!r} with DALI: it is turned"}
    assert found.exact and len(found.wall) == len(plain.wall) == 2 and not plain.refused
    (nothing,) = run.measure([picky("")], clips, WORK, threads=1, rounds=1, progress=lambda line: None)
    assert nothing.reason.startswith("it refuses all clips, such as cannot decode") and not nothing.wall


def test_what_fails_only_later_is_a_line_too() -> None:
    def fail(clips: list[Any]) -> list[Mapping[str, torch.Tensor]]:
        if len(clips) > 1:
            raise RuntimeError("out of memory")
        return [contenders.ours(WORK, "video").read(clips[0])]

    clips = [clip("h264_b"), clip("vp9_webm")]
    (found,) = run.measure([picky("vp9", load=fail)], clips, WORK, threads=1, rounds=2, progress=lambda line: None)
    assert found.reason == "reading all clips: RuntimeError: out of memory" and not found.wall


def test_facts_are_those_of_the_device_that_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, gpu = contenders.ours(WORK, "video"), torch.device("cuda", 0)
    monkeypatch.setattr(run.machine, "default_device", lambda: gpu)
    assert [run.device_of(which).type for which in ([plain], [picky("x"), plain])] == ["cpu", "cuda"]
    monkeypatch.setattr(run.machine, "describe", lambda device: {"device": str(device)})
    assert run.facts([picky("x"), plain])["device"] == "cuda:0"


@pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it reads all of these")
def test_dali_is_ours_and_stays_where_it_reads_some_of_the_clips() -> None:
    clips = [clip("h264_b"), clip("vp9_webm")]
    made, missing = contenders.available(WORK, ["video"], clips, 1)
    assert not any(line.startswith("DALI") for line in missing)
    (found,) = [each for each in made if each.setting == "dali"]
    assert not found.peer and found.name == "amd_fast, DALI (cpu)" and made[0].setting == "pyav"
    (result,) = run.measure([found], clips, WORK, threads=1, rounds=1, progress=lambda line: None)
    assert list(result.refused) == [clips[0].path] and "not h264" in result.refused[clips[0].path]
    assert result.exact and result.wall
    _, missing = contenders.available(WORK, ["video"], clips[:1], 1)
    assert any(line.startswith("DALI: ImplementationError: decoder='dali' cannot be used here: DALI decodes") for line in missing)


def test_clips_in_a_store_are_read_from_their_copies(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_FAST_CACHE", str(tmp_path / "cache"))
    root = "memory://bench-data/videos"
    for path in folder.iterdir():
        storage.write_bytes(f"{root}/a/{path.name}", path.read_bytes())
    rows = "".join(f"videos/a/{name},x\n" for name in (*(path.name for path in folder.iterdir()), "gone.mp4"))
    storage.write_bytes("memory://bench-data/some.csv", f"path,label\n{rows}file://{folder}/{NAMES[0]}.mp4,x\n".encode())
    clips, facts, left_out = run.find_clips("memory://bench-data/some.csv", WORK, 10)
    assert sorted(clip.name.partition(".")[0] for clip in clips) == sorted([*NAMES, NAMES[0]])
    assert {clip.place for clip in clips} >= {f"{root}/a/{NAMES[0]}.mp4", str(folder / f"{NAMES[0]}.mp4")}
    assert [fact["bytes"] for fact in facts] == [Path(clip.path).stat().st_size for clip in clips]
    assert sorted(line.partition(":")[0] for line in left_out) == ["cannot decode 'memory", "cannot read memory"]
    (opened,) = run.measure([contenders.opencv(WORK)], clips, WORK, threads=1, rounds=1, progress=lambda line: None)
    assert opened.exact and opened.wall  # which knows no URIs
    assert len(run.find_clips(root, WORK, 10)[0]) == len(NAMES)


def test_a_store_that_does_not_answer_ends_the_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "some.csv").write_text("path,label\nmemory://far/a.mp4,x\nmemory://far/b.mp4,x\n")
    monkeypatch.setattr(run, "is_unreachable", lambda error: True)
    with pytest.raises(DataError, match=r"memory://far/a\.mp4"):
        run.find_clips(tmp_path / "some.csv", WORK, 10)


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
    assert {ratio["ours"] for ratio in content["ratios"]} <= {result["name"] for result in content["results"] if not result["peer"]}
    assert "`--data.decoder auto`, the default, reads" in shown and "Of other libraries that return the right frames" in shown


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
