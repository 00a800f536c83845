"""``amd-fast enroll`` and ``predict``: files, folders, lists, long videos, and streams served over sockets."""

from __future__ import annotations

import csv
import io
import json
import os
import runpy
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import amd_fast
from amd_fast import FewShotClassifier, cli
from amd_fast.classifier import live, predict_command
from amd_fast.classifier.live import Windows, is_live, watch
from amd_fast.classifier.sources import clips_below
from amd_fast.errors import ConfigError, DataError, DecodeError
from amd_fast.training.checkpoint import save_model

made_videos = runpy.run_path(str(Path(__file__).with_name("made_videos.py")))
write_video, number_in = made_videos["write_video"], made_videos["number"]
RECIPE = {"name": "afmir_small", "modalities": ["rgb", "flow"], "dim": 32, "frames": 4, "size": 24, "loss": {}}
RATE = 25


def write_clip(path: Path, seed: int) -> str:
    colour = np.random.default_rng(seed).random(3)
    path.parent.mkdir(parents=True, exist_ok=True)
    show = lambda index, width, height: (made_videos["picture"](index, width, height) * colour).astype(np.uint8)  # noqa: E731
    return str(write_video(path, "mpeg4", 12, width=40, height=32, show=show))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(amd_fast.create_model("afmir_small", dim=32, frames=4, size=24).eval(), path, dict(RECIPE))
    return str(path)


@pytest.fixture(scope="module")
def actions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two actions of three clips in folders, one of them a level deeper."""
    folder = tmp_path_factory.mktemp("actions")
    for seed, name in enumerate(["run/a_1", "run/a_2", "run/deep/b_1", "wave/a_1", "wave/b_1", "wave/b_2"]):
        write_clip(folder / f"{name}.mp4", seed)
    return folder


@pytest.fixture(scope="module")
def gallery(actions: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("galleries") / "gallery")
    assert cli.main(["enroll", path, str(actions), "--model", model]) == 0
    return path


@pytest.fixture
def broken(tmp_path: Path) -> str:
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    return str(tmp_path / "broken.mp4")


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four seconds whose every picture tells its number."""
    return str(write_video(tmp_path_factory.mktemp("long") / "long.ts", "mpeg4", 4 * RATE))


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# enroll


def test_enroll_folders_and_files(actions: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "gallery")
    assert cli.main(["enroll", path, str(actions), "--model", model]) == 0
    assert FewShotClassifier.load(path).shots() == {"run": 3, "wave": 3}
    more = [write_clip(tmp_path / f"{seed}.mp4", seed) for seed in (20, 21)]
    assert cli.main(["enroll", path, *more, "--name", "sit down"]) == 0
    assert cli.main(["enroll", path, str(actions / "run"), "--name", "run"]) == 0  # known clips count once
    classifier = FewShotClassifier.load(path)
    assert classifier.shots() == {"run": 3, "sit down": 2, "wave": 3} and classifier.unknown == "unknown"
    assert "sit down" in capsys.readouterr().out


def test_enroll_takes_recordings_from_names(actions: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "gallery")
    assert cli.main(["enroll", path, str(actions), "--group", r"(.+)_\d"]) == 0
    assert FewShotClassifier.load(path).clips_["group"].tolist() == ["a", "a", "b", "a", "b", "b"]
    assert cli.main(["enroll", path, str(actions), "--group", "(.+"]) == 2


def test_enroll_leaves_out_what_it_cannot_read(actions: Path, broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "gallery")
    assert cli.main(["enroll", path, broken, str(actions / "run"), "--name", "run"]) == 1
    assert FewShotClassifier.load(path).shots() == {"run": 3}
    assert "broken.mp4" in capsys.readouterr().err
    assert cli.main(["enroll", path, broken, "--name", "wave"]) == 2
    assert FewShotClassifier.load(path).shots() == {"run": 3}


def test_enroll_refuses(actions: Path, gallery: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty" / "class").mkdir(parents=True)
    calls = {
        "has no subfolders": ["enroll", str(tmp_path / "g"), str(actions / "wave")],
        "no videos below": ["enroll", str(tmp_path / "g"), str(tmp_path / "empty")],
        "keeps the model": ["enroll", gallery, str(actions), "--model", model],
        "no gallery and not empty": ["enroll", str(actions), str(actions)],
        "cannot read a model": ["enroll", str(tmp_path / "g"), str(actions), "--model", str(tmp_path / "none")],
        "name is empty": ["enroll", gallery, str(actions), "--name", " "],
        "is given as 'run' and as 'wave'": ["enroll", gallery, str(actions / "run"), "--name", "wave"],
    }
    before = FewShotClassifier.load(gallery).clips_
    for message, arguments in calls.items():
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "g").exists() and FewShotClassifier.load(gallery).clips_.equals(before)


# predict: clips


def test_predict_says_what_the_classifier_says(gallery: str, actions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", gallery, str(actions), "--format", "jsonl"]) == 0
    found = lines(capsys)
    paths = clips_below([str(actions)])
    expected = FewShotClassifier.load(gallery).explain(paths)
    assert found == [json.loads(json.dumps(answer.to_dict())) for answer in expected] and len(found) == 6
    assert cli.main(["predict", gallery, str(actions), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["label"] for row in rows] == [answer.label for answer in expected]
    for row, answer in zip(rows, expected, strict=True):
        assert float(row["p run"]) == answer.probabilities["run"] and float(row["trust joint"]) == answer.policy["joint"]
    assert cli.main(["predict", gallery, *paths]) == 0
    assert expected[0].label in capsys.readouterr().out


def test_predict_reads_a_list(gallery: str, actions: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = clips_below([str(actions)])[:2]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(paths) + "\n\n"))
    assert cli.main(["predict", gallery, "-", "--format", "jsonl"]) == 0
    assert [found["clip"] for found in lines(capsys)] == paths
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert cli.main(["predict", gallery, "-"]) == 2
    assert "no clips were listed" in capsys.readouterr().err


def test_predict_goes_on_after_a_broken_clip(
    gallery: str, actions: Path, broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = clips_below([str(actions)])[0]
    assert cli.main(["predict", gallery, clip, broken, str(tmp_path / "gone.mp4"), clip, "--format", "jsonl"]) == 1
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert [bool(answer["error"]) for answer in found] == [False, True, True, False]
    assert found[1]["label"] == "unknown" and found[1]["confidence"] is None
    assert "broken.mp4" in captured.err and "gone.mp4" in captured.err
    assert cli.main(["predict", gallery, broken]) == 2
    assert "none of the 1 clips" in capsys.readouterr().err


def test_predict_writes_pictures(gallery: str, actions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cv2

    assert cli.main(["predict", gallery, str(actions / "wave"), "--thumbnails", str(tmp_path / "pictures"), "--format", "jsonl"]) == 0
    found = lines(capsys)
    assert sorted(os.listdir(tmp_path / "pictures")) == [f"{n:06}_{answer['label']}.jpg" for n, answer in enumerate(found, 1)]
    for answer in found:
        picture = cv2.imread(answer["thumbnail"])
        assert picture.shape[0] == 96 and picture.shape[1] == 3 * 120 + 2 * 3


def test_predict_refuses(gallery: str, actions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "gallery"
    shutil.copytree(gallery, copy)
    (copy / "clips.safetensors").write_bytes(b"")
    calls = {
        "was changed after it was written": ["predict", str(copy), str(actions)],
        "is not a gallery": ["predict", str(actions), str(actions)],
        "only one source is watched": ["predict", gallery, "rtsp://camera/1", "rtsp://camera/2"],
        "lengths in seconds": ["predict", gallery, str(actions), "--window", "0"],
        "false_unknown": ["predict", gallery, str(actions), "--false-unknown", "3"],
    }
    for message, arguments in calls.items():
        assert cli.main(arguments) == 2, message
        assert message in capsys.readouterr().err.replace("\n", " ")


# Windows


def test_windows_of_a_file(long_video: str) -> None:
    with Windows(long_video, window=1.0, stride=0.6, short_side=96) as windows:
        found = list(windows)
    assert [(round(each.start, 6), round(each.end, 6)) for each in found] == [(round(0.6 * n, 6), round(1 + 0.6 * n, 6)) for n in range(6)]
    for each in found:
        assert [number_in(picture) for picture in each.frames] == list(range(round(each.start * RATE), round(each.end * RATE)))
        assert each.luma.shape == each.frames.shape[:3] and not each.skipped


@pytest.mark.parametrize(("window", "expected"), [(10.0, [(0.0, 4.0)]), (4.0, [(0.0, 4.0)]), (3.0, [(0.0, 3.0), (1.0, 4.0)])])
def test_the_end_of_a_file(window: float, expected: list[tuple[float, float]], long_video: str) -> None:
    with Windows(long_video, window=window, stride=1.0, short_side=32) as windows:
        assert [(round(each.start, 3), round(each.end, 3)) for each in windows] == expected


def test_a_slow_reader_of_a_file_misses_nothing(long_video: str) -> None:
    with Windows(long_video, window=0.4, stride=0.4, short_side=16) as windows:
        starts = []
        for each in windows:
            time.sleep(0.02)
            starts.append(round(each.start, 3))
    assert starts == [round(0.4 * n, 3) for n in range(10)]


def test_predict_in_windows(gallery: str, long_video: str, broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", gallery, broken, long_video, "--window", "2", "--format", "jsonl"]) == 1
    found = lines(capsys)
    assert [(answer["clip"], answer.get("start"), answer.get("end")) for answer in found] == [
        (broken, None, None), (long_video, 0, 2), (long_video, 1, 3), (long_video, 2, 4),
    ]  # fmt: skip
    classifier = FewShotClassifier.load(gallery)
    for (seen, answer), printed in zip(watch(classifier, long_video, window=2, stride=1), found[1:], strict=True):
        assert printed["probabilities"] == answer.probabilities and seen.start == printed["start"]


def test_which_sources_are_live() -> None:
    live_ones = ["/dev/video0", "rtsp://camera/stream", "tcp://host:1", "udp://@:1234", "http://camera/video", "https://host/live.m3u8"]
    files = ["clip.mp4", "/data/clip.avi", "s3://bucket/clip.mp4", "https://host/clip.mp4?token=1"]
    assert [is_live(source) for source in live_ones + files] == [True] * 6 + [False] * 4


# Streams


class Server:
    """Serves a file over TCP to one client, all of it or at its own pace.

    It may wait in the middle until ``go_on`` is set, and hold the line open at the end.
    """

    def __init__(self, path: str, *, pace: float = 0.0, hold: bool = False, waits: bool = False) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.sent = 0
        self._content, self._pace, self._hold = Path(path).read_bytes(), pace, hold
        self._closed, self.go_on = threading.Event(), threading.Event()
        if not waits:
            self.go_on.set()
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        connection, _ = self.listener.accept()
        with connection:
            try:
                for start in range(0, len(self._content), 4096):
                    if start > len(self._content) // 2:
                        self.go_on.wait(30)
                    connection.sendall(self._content[start : start + 4096])
                    self.sent += 1
                    if self._closed.wait(self._pace):
                        return
                if self._hold:
                    self._closed.wait(30)
            except OSError:
                return

    def close(self) -> None:
        self._closed.set()
        self.go_on.set()
        self.thread.join(10)
        self.listener.close()


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[Server] = []

    def start(path: str, **options: Any) -> Server:
        servers.append(Server(path, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_a_stream_is_watched_to_its_end(gallery: str, long_video: str, serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    url = serve(long_video).url
    assert cli.main(["predict", gallery, url, "--window", "1", "--stride", "0.5", "--format", "jsonl"]) == 0
    found = lines(capsys)
    assert found and {answer["clip"] for answer in found} == {url}
    assert sum(1 + answer["skipped"] for answer in found) == 7  # every window was classified or is counted as passed over
    assert found[-1]["end"] == pytest.approx(4.0)


def test_a_stream_is_never_waited_for(long_video: str, serve: Any) -> None:
    """Whoever takes windows late gets the newest, and nothing piles up meanwhile. The line stays open without a word."""
    server = serve(long_video, hold=True, waits=True)
    with Windows(server.url, window=0.4, stride=0.2, short_side=16) as windows:
        taken = iter(windows)
        first = next(taken)  # of the first half: the rest has not been sent
        server.go_on.set()
        deadline = time.monotonic() + 20
        while (windows._waiting is None or windows._waiting.end < 3.5) and time.monotonic() < deadline:
            time.sleep(0.01)
        second = next(taken)
        assert second.end >= 3.5 and second.skipped >= 5
        assert round((second.end - first.end) / 0.2) == second.skipped + 1
        assert len(windows._frames) <= 0.4 * RATE + 0.2 * RATE + 1
    server.close()
    windows._thread.join(5)
    assert not windows._thread.is_alive()


def test_giving_up_ends_the_reader(gallery: str, long_video: str, serve: Any) -> None:
    found = watch(FewShotClassifier.load(gallery), serve(long_video, pace=0.05).url, window=0.4, stride=0.2)
    next(found)
    found.close()
    assert not any(thread.name.startswith("windows of") for thread in threading.enumerate())


def test_ctrl_c_ends_a_stream_well(
    gallery: str, long_video: str, serve: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add, seen = predict_command._Lines.add, []

    def interrupt(self: Any, found: Any) -> None:
        add(self, found)
        seen.append(found)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(predict_command._Lines, "add", interrupt)
    arguments = ["--window", "0.4", "--stride", "0.2", "--format", "jsonl"]
    assert cli.main(["predict", gallery, serve(long_video, pace=0.02, hold=True).url, *arguments]) == 0
    assert len(lines(capsys)) == 2
    seen.clear()
    assert cli.main(["predict", gallery, long_video, *arguments]) == cli.EXIT_INTERRUPTED


def test_a_stream_that_is_not_there(gallery: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    assert cli.main(["predict", gallery, url]) == 2
    assert f"cannot read '{url}'" in capsys.readouterr().err.replace("\n", "")


def test_a_silent_stream_ends(monkeypatch: pytest.MonkeyPatch, long_video: str, serve: Any) -> None:
    monkeypatch.setattr(live, "_SENDS", 0.5)
    windows = Windows(serve(long_video, hold=True).url, window=1, stride=1, short_side=16)
    with pytest.raises(DecodeError, match="cannot read"), windows as found:
        list(found)


def test_a_window_without_bound_is_refused(monkeypatch: pytest.MonkeyPatch, long_video: str) -> None:
    monkeypatch.setattr(live, "MOST_FRAMES", 30)
    with pytest.raises(ConfigError, match="more than 30 frames"), Windows(long_video, window=2, stride=1, short_side=16) as found:
        list(found)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="there is no such file"),
        Windows(tmp_path / "none.mp4", window=1, stride=1, short_side=16) as found,
    ):
        list(found)
