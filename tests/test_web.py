"""The web page's server over HTTP: what it takes, what it refuses, and who sees what.

The model is tiny and untrained: what is tested is the way from an upload to an answer, not whether the answer is right.
"""

from __future__ import annotations

import json
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="the web page needs the extra web")
pytest.importorskip("uvicorn", reason="the web page needs the extra web")
pytest.importorskip("httpx", reason="the test client needs httpx")

from fastapi.testclient import TestClient

from amd_fast import FewShotClassifier, create_model
from amd_fast.cli import main
from amd_fast.errors import ConfigError, DataError, DecodeError
from amd_fast.web.app import COOKIE, create_app
from amd_fast.web.guard import own_hosts
from amd_fast.web.reading import check_container
from amd_fast.web.sessions import UNKNOWN, Limits, Session, Sessions, action_name

URL = "http://testserver"
LIMITS = Limits(upload_bytes=200_000, sessions=3, clips=12)
SHARED = runpy.run_path(str(Path(__file__).with_name("web_clips.py")))
MOVES, write_clip = SHARED["MOVES"], SHARED["write_clip"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    """Four clips of each of three actions."""
    folder = tmp_path_factory.mktemp("clips")
    return {move: [write_clip(folder / f"{move}{n}.webm", move, 10 * m + n).read_bytes() for n in range(4)] for m, move in enumerate(MOVES)}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return create_model("afmir_small", size=32, frames=4)


@pytest.fixture(scope="module")
def running(model: Any) -> Iterator[TestClient]:
    """The server; a single process decodes, and lives as long as the module."""
    with TestClient(create_app(FewShotClassifier(model), limits=LIMITS, processes=1), base_url=URL) as client:
        yield client


@pytest.fixture
def browser(running: TestClient) -> TestClient:
    """A browser that has not been here before; whoever was here before is forgotten."""
    running.app.state.service.sessions._sessions.clear()  # type: ignore[attr-defined]
    running.app.state.service.limits = LIMITS  # type: ignore[attr-defined]
    return another(running)


def another(client: TestClient) -> TestClient:
    """A second browser at the same server."""
    return TestClient(client.app, base_url=URL, headers={"Origin": URL}, raise_server_exceptions=False)


def add(browser: TestClient, action: str, clip: bytes, name: str = "clip.webm") -> Any:
    return browser.post("/api/clips", params={"action": action, "name": name}, content=clip)


def teach(browser: TestClient, clips: dict[str, list[bytes]], number: int = 1) -> None:
    for move in MOVES:
        for clip in clips[move][:number]:
            assert add(browser, move, clip).status_code == 201


def uploads(browser: TestClient) -> list[Path]:
    return list(browser.app.state.service.folder.iterdir())  # type: ignore[attr-defined]


def test_enrol_and_ask(browser: TestClient, clips: dict[str, list[bytes]]) -> None:
    before = browser.get("/api/actions").json()
    assert before["actions"] == [] and not before["kept"]
    teach(browser, clips)
    first = browser.get("/api/actions").json()["actions"]
    assert {action["name"]: len(action["clips"]) for action in first} == dict.fromkeys(MOVES, 1)
    picture = browser.get(f"/api/clips/{first[0]['clips'][0]['number']}")
    assert picture.headers["content-type"] == "image/jpeg" and picture.content[:3] == b"\xff\xd8\xff"
    answered = browser.post("/api/answers", content=clips["down"][0])  # one that was shown: every view has to find it again
    assert answered.status_code == 200
    answer = answered.json()
    assert answer["label"] == "down" and answer["known"]
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    assert sum(answer["policy"].values()) == pytest.approx(1, abs=1e-5)
    assert set(answer["views"]) == {"rgb", "flow", "joint"}
    assert all(max(view, key=view.get) == "down" for view in answer["views"].values())
    assert uploads(browser) == []


def test_the_answer_is_the_classifiers(browser: TestClient, clips: dict[str, list[bytes]], model: Any, tmp_path: Path) -> None:
    teach(browser, clips, 2)
    files = [(tmp_path / f"{move}{n}.webm", move) for move in MOVES for n in range(3)]
    for path, move in files:
        path.write_bytes(clips[move][int(path.stem[-1])])
    shown = [(str(path), move) for path, move in files if not path.stem.endswith("2")]
    classifier = FewShotClassifier(model).fit([path for path, _ in shown], [move for _, move in shown])
    for path, move in files:
        if path.stem.endswith("2"):
            answer = browser.post("/api/answers", params={"false_unknown": 0}, content=clips[move][2]).json()
            expected = classifier.predict_proba([path])[0]
            assert [answer["probabilities"][name] for name in classifier.classes_] == pytest.approx(expected, abs=1e-5)


def test_unknown(browser: TestClient, clips: dict[str, list[bytes]]) -> None:
    teach(browser, clips)
    assert browser.get("/api/actions").json()["questions"] == 0
    assert browser.post("/api/answers", params={"false_unknown": 0.5}, content=clips["down"][3]).json()["known"]  # cannot tell yet
    for move in MOVES:
        add(browser, move, clips[move][1])
    assert browser.get("/api/actions").json()["questions"] == 6
    answer = browser.post("/api/answers", params={"false_unknown": 1}, content=clips["down"][3]).json()
    assert not answer["known"] and answer["label"] == UNKNOWN
    assert browser.post("/api/answers", params={"false_unknown": 0}, content=clips["down"][3]).json()["known"]
    assert browser.post("/api/answers", params={"false_unknown": 1.5}, content=clips["down"][3]).status_code == 422


def test_nothing_to_choose_from(browser: TestClient, clips: dict[str, list[bytes]]) -> None:
    add(browser, "right", clips["right"][0])
    refused = browser.post("/api/answers", content=clips["right"][1])
    assert refused.status_code == 422 and "at least two actions" in refused.json()["error"]


def test_removing(browser: TestClient, clips: dict[str, list[bytes]]) -> None:
    teach(browser, clips)
    number = browser.get("/api/actions").json()["actions"][0]["clips"][0]["number"]
    for move, left in (("down", ["right", "still"]), ("right", ["still"]), ("still", [])):
        state = browser.delete("/api/actions", params={"action": move}).json()
        assert [action["name"] for action in state["actions"]] == left
    assert browser.get(f"/api/clips/{number}").status_code == 404
    again = browser.delete("/api/actions", params={"action": "down"})
    assert again.status_code == 422 and "no action 'down'" in again.json()["error"]
    assert add(browser, "down", clips["down"][0]).status_code == 201


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"this is text, renamed to .mp4\n" * 40, "not a video that can be read"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "not a video that can be read"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video that can be read"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a video that can be read"),
        (b"", "empty"),
    ],
)
def test_wrong_files(browser: TestClient, content: bytes, words: str) -> None:
    refused = add(browser, "wave", content, "holiday.mp4")
    assert refused.status_code == 422
    assert words in refused.json()["error"] and "/tmp" not in refused.json()["error"]
    assert uploads(browser) == []
    assert COOKIE not in refused.cookies and len(browser.app.state.service.sessions) == 0  # type: ignore[attr-defined]


def test_lists_of_files_are_not_opened(clips: dict[str, list[bytes]], tmp_path: Path) -> None:
    """A list that names a clip beside it would show whoever uploads it a file of the server's."""
    (tmp_path / "clip").write_bytes(clips["right"][0])
    (tmp_path / "list").write_text("ffconcat version 1.0\nfile clip\n")
    with av.open(str(tmp_path / "list"), options={"protocol_whitelist": "file"}) as opened:
        assert len(list(opened.decode(video=0))) == 12  # FFmpeg does follow it
    check_container(str(tmp_path / "clip"))
    with pytest.raises(DecodeError, match="not a video that can be read"):
        check_container(str(tmp_path / "list"))


def test_cut_off_and_damaged_files(browser: TestClient, clips: dict[str, list[bytes]]) -> None:
    """Whatever is left of a clip is either read or refused with a reason, and the server goes on."""
    clip = clips["right"][0]
    rng = np.random.default_rng(0)
    noisy = bytearray(clip)
    for place in rng.integers(40, len(clip), len(clip) // 8):
        noisy[place] = rng.integers(256)
    for broken in (clip[:60], clip[: len(clip) // 2], bytes(noisy)):
        answered = add(browser, "wave", broken)
        assert answered.status_code in (201, 422)
        assert answered.status_code == 201 or "/tmp" not in answered.json()["error"]
    assert add(browser, "wave", clips["right"][1]).status_code == 201


def test_a_picture_too_large(browser: TestClient, tmp_path: Path) -> None:
    path = tmp_path / "wall.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=5)
        stream.width, stream.height, stream.pix_fmt = 8192, 4096, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuvj420p").reformat(8192, 4096)))
        container.mux(stream.encode(None))
    browser.app.state.service.limits = replace(LIMITS, upload_bytes=10_000_000)  # type: ignore[attr-defined]
    refused = add(browser, "wall", path.read_bytes())
    assert refused.status_code == 422 and "8192 x 4096 pixels" in refused.json()["error"]


def test_too_large(browser: TestClient) -> None:
    refused = add(browser, "wave", bytes(LIMITS.upload_bytes + 1))
    assert refused.status_code == 413 and "0.2 MB" in refused.json()["error"]
    announced = browser.post("/api/clips", params={"action": "x"}, headers={"Content-Length": str(LIMITS.upload_bytes + 1)}, content=b"")
    assert announced.status_code == 413  # before anything of it has come


def test_too_large_without_saying_so(browser: TestClient) -> None:
    parts = (bytes(10_000) for _ in range(LIMITS.upload_bytes // 10_000 + 1))  # sent in parts of unknown number
    assert browser.post("/api/clips", params={"action": "wave"}, content=parts).status_code == 413
    assert uploads(browser) == []


def test_the_same_clip_twice(browser: TestClient, clips: dict[str, list[bytes]]) -> None:
    clip = clips["right"][0]
    assert add(browser, "right", clip).status_code == 201
    again, other = add(browser, "right", clip), add(browser, "left", clip)
    assert again.status_code == other.status_code == 422
    assert "of 'right' already" in again.json()["error"] and "another action already" in other.json()["error"]
    assert [len(action["clips"]) for action in browser.get("/api/actions").json()["actions"]] == [1]


def test_two_browsers_do_not_see_each_other(browser: TestClient, clips: dict[str, list[bytes]]) -> None:
    second = another(browser)
    teach(browser, clips)
    assert add(second, "mine", clips["still"][2]).status_code == 201
    assert [action["name"] for action in second.get("/api/actions").json()["actions"]] == ["mine"]
    assert [action["name"] for action in browser.get("/api/actions").json()["actions"]] == sorted(MOVES)
    assert second.get("/api/clips/3").status_code == 404  # the first one's
    assert second.delete("/api/actions", params={"action": "down"}).status_code == 422
    guesser = another(browser)
    guesser.cookies.set(COOKIE, "guessed")
    assert guesser.get("/api/actions").json()["actions"] == []


def test_the_cookie(browser: TestClient, clips: dict[str, list[bytes]]) -> None:
    cookie = add(browser, "right", clips["right"][0]).headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert len(cookie.split("=")[1].split(";")[0]) >= 32


def test_bounds(browser: TestClient, clips: dict[str, list[bytes]]) -> None:
    others = [another(browser) for _ in range(LIMITS.sessions)]
    for number, other in enumerate(others):
        assert add(other, "right", clips["right"][number]).status_code == 201
    refused = add(browser, "right", clips["right"][0])
    assert refused.status_code == 503 and "try again later" in refused.json()["error"]
    sessions = browser.app.state.service.sessions  # type: ignore[attr-defined]
    sessions._limits = replace(LIMITS, clips=1)
    full = add(others[0], "down", clips["down"][0])
    sessions._limits = replace(LIMITS, memory_bytes=1)
    crowded = add(others[0], "down", clips["down"][0])
    sessions._limits = LIMITS
    assert full.status_code == crowded.status_code == 503
    assert "1 clips are as many" in full.json()["error"] and "memory" in crowded.json()["error"]
    browser.app.state.service.free = 0  # type: ignore[attr-defined]
    busy = add(others[0], "down", clips["down"][0])
    browser.app.state.service.free = LIMITS.uploads  # type: ignore[attr-defined]
    assert busy.status_code == 503 and "busy" in busy.json()["error"]
    assert add(others[0], "down", clips["down"][0]).status_code == 201


def test_sessions_are_forgotten() -> None:
    sessions = Sessions(FewShotClassifier(), replace(LIMITS, idle_seconds=100.0))
    key, session = sessions.begin(None)
    assert sessions.get(key) is session and sessions.begin(key) == (key, session)
    session.used -= 101.0
    sessions.forget_idle()
    assert len(sessions) == 0 and sessions.get(key) is not session


def test_a_slow_clip(clips: dict[str, list[bytes]]) -> None:
    limits = replace(LIMITS, read_seconds=0.001)
    with TestClient(create_app(limits=limits, processes=1), base_url=URL, headers={"Origin": URL}) as browser:
        refused = add(browser, "wave", clips["right"][0])
        assert refused.status_code == 422 and "too long" in refused.json()["error"]
        assert uploads(browser) == []
        folder = browser.app.state.service.folder  # type: ignore[attr-defined]
        assert folder.stat().st_mode & 0o077 == 0  # private
    assert not folder.exists()


def test_requests_of_other_sites_are_refused(browser: TestClient, clips: dict[str, list[bytes]]) -> None:
    teach(browser, clips)
    for origin in ("https://evil.example", "null", "http://testserver.evil.example", ""):
        for refused in (
            browser.post("/api/clips", params={"action": "x"}, content=clips["down"][1], headers={"Origin": origin}),
            browser.delete("/api/actions", params={"action": "down"}, headers={"Origin": origin}),
        ):
            assert refused.status_code == 403
    assert len(browser.get("/api/actions").json()["actions"]) == 3


def test_headers(browser: TestClient) -> None:
    for path in ("/", "/static/page.js", "/api/actions", "/nothing"):
        headers = browser.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"] and "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/docs", "/openapi.json"):
        assert browser.get(path).status_code == 404


def test_nothing_comes_from_elsewhere() -> None:
    from amd_fast.web.app import STATIC

    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "").replace("http://localhost", "")
        assert "//cdn" not in text and "http://" not in text and "https://" not in text.replace("https:// or", ""), file


def test_host_names() -> None:
    assert own_hosts("127.0.0.1") == own_hosts("localhost") == {"localhost", "127.0.0.1", "::1"}
    assert own_hosts("0.0.0.0") is None and own_hosts("::") is None
    assert own_hosts("Studio.lan") == {"studio.lan"} and own_hosts("192.168.1.5") == {"192.168.1.5"}
    client = TestClient(create_app(hosts=own_hosts("127.0.0.1")), base_url="http://127.0.0.1:8000")  # not started: no request gets through
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"Host": "[::1]:8000"}).status_code == 200
    for name in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1"):
        assert client.get("/", headers={"Host": name}).status_code == 421


def test_token() -> None:
    client = TestClient(create_app(token="secret-token"), base_url=URL)
    for path in ("/", "/api/actions", "/static/page.js", "/?token=wrong", "/?token="):
        assert client.get(path).status_code == 401
    client.cookies.set("amd_fast_token", "wrong")
    assert client.get("/").status_code == 401
    client.cookies.clear()
    opened = client.get("/", params={"token": "secret-token"})
    assert opened.status_code == 200 and "httponly; samesite=strict" in opened.headers["set-cookie"].lower()
    assert client.get("/static/page.js").status_code == 200  # by the cookie
    client.cookies.clear()
    assert client.get("/static/page.js").status_code == 401


@pytest.mark.parametrize(
    ("typed", "name"),
    [("  wave \t hand ", "wave hand"), ("<b>&", "<b>&"), ("../../etc", "../../etc"), ("a\x00b\u202ec", "a b c"), ("é" * 60, "é" * 60)],
)
def test_names(typed: str, name: str) -> None:
    assert action_name(typed) == name


@pytest.mark.parametrize(
    ("typed", "words"), [("", "a name"), (" \n", "a name"), ("x" * 61, "61 characters"), ("Unknown", "answer for clips")]
)
def test_names_refused(typed: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        action_name(typed)


def test_a_gallery_to_begin_with(clips: dict[str, list[bytes]], tmp_path: Path) -> None:
    paths = []
    for move in ("right", "down"):
        path = tmp_path / f"{move}.webm"
        path.write_bytes(clips[move][0])
        paths.append(path)
    FewShotClassifier().fit(paths, ["right", "down"]).save(tmp_path / "gallery")
    loaded = FewShotClassifier.load(tmp_path / "gallery")
    with TestClient(create_app(loaded, limits=LIMITS, processes=1), base_url=URL, headers={"Origin": URL}) as browser:
        state = browser.get("/api/actions").json()["actions"]
        assert [(action["name"], action["others"], action["clips"]) for action in state] == [("down", 1, []), ("right", 1, [])]
        assert browser.post("/api/answers", content=clips["right"][0]).json()["label"] == "right"
        assert add(browser, "left", clips["right"][0]).status_code == 422  # the gallery's clip, without a word of where it lies
        assert browser.delete("/api/actions", params={"action": "right"}).status_code == 200
        assert [action["name"] for action in browser.get("/api/actions").json()["actions"]] == ["down"]
        assert len(another(browser).get("/api/actions").json()["actions"]) == 2
    assert sorted(loaded.classes_) == ["down", "right"]


def test_keeping(clips: dict[str, list[bytes]], tmp_path: Path) -> None:
    app = create_app(limits=LIMITS, processes=1, keep=tmp_path / "kept")
    with TestClient(app, base_url=URL, headers={"Origin": URL}) as browser:
        assert browser.get("/api/actions").json()["kept"]
        assert add(browser, "right", clips["right"][0]).status_code == 201
        assert add(browser, "down", clips["down"][0]).status_code == 201
        (folder,) = (tmp_path / "kept").iterdir()
        assert browser.cookies[COOKIE] not in str(folder)
        assert FewShotClassifier.load(folder).shots() == {"down": 1, "right": 1}
        browser.delete("/api/actions", params={"action": "right"})
        assert FewShotClassifier.load(folder).shots() == {"down": 1}
        browser.delete("/api/actions", params={"action": "down"})
        assert list((tmp_path / "kept").iterdir()) == []


def test_classifiers_that_do_not_fit() -> None:
    vectors = FewShotClassifier().fit(np.eye(4), ["a", "b", "c", "d"])
    with pytest.raises(ConfigError, match="neither rgb nor flow"):
        create_app(vectors)
    pictures = [np.full((4, 32, 32, 3), 9 * n, np.uint8) for n in range(2)]
    with pytest.raises(ConfigError, match="got 1"):
        create_app(FewShotClassifier().fit(pictures, [1, 2]))


def test_a_session_alone() -> None:
    assert Session(FewShotClassifier()).summary() == {"actions": [], "questions": 0}


def test_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert main(["serve", "--port", "70000"]) == 2
    assert main(["serve", "--host", "192.0.2.1", "--port", "0"]) == 2  # an address of nobody's, for documentation
    assert main(["serve", "--port", "0", "--max-upload-mb", "0"]) == 2
    assert main(["serve", "--port", "0", "--model", str(tmp_path / "nothing")]) == 2
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--port", "0"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    for words in (
        "in use already",
        "port=70000",
        "cannot listen at 192.0.2.1",
        "max_upload_mb=0",
        "nothing",
        "pip install 'amd_fast[web]'",
    ):
        assert words in said


def endless_upload(address: str) -> int:
    """Sends a clip without an end until the server answers that it is too large; returns how many bytes it took to say so."""
    url = urlsplit(address)
    request = f"POST /api/clips?action=x&{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\nOrigin: http://{url.netloc}\r\n"
    part = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    sent = 0
    with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
        connection.sendall(request.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        while sent < 50_000_000 and not select.select([connection], [], [], 0)[0]:
            connection.sendall(part)
            sent += len(part)
        assert b" 413 " in connection.recv(100)
    return sent


@pytest.mark.slow
def test_command_serves_and_stops() -> None:
    command = [sys.executable, "-m", "amd_fast.cli", "serve", "--port", "0", "--token", "--max-upload-mb", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        import httpx

        assert server.stdout is not None
        address = server.stdout.readline().split()[2]
        assert address.startswith("http://127.0.0.1:") and "token=" in address
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                answered = httpx.get(address, trust_env=False)
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        assert answered.status_code == 200 and "Few-shot actions" in answered.text
        assert httpx.get(address.split("?")[0], trust_env=False).status_code == 401
        assert endless_upload(address) < 5_000_000
        server.send_signal(signal.SIGINT)
        rest, errors = server.communicate(timeout=60)
    assert server.returncode == 0 and "stopped" in rest and "Traceback" not in errors, json.dumps([rest, errors])
