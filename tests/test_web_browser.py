"""The web page in a real browser (headless Chromium): everything that its users do, by mouse and keyboard, on screens wide and narrow."""

from __future__ import annotations

import os
import runpy
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="the web page needs the extra web")
pytest.importorskip("uvicorn", reason="the web page needs the extra web")
pytest.importorskip("playwright.sync_api", reason="needs playwright to drive a browser")
import uvicorn
from playwright import sync_api as playwright

from amd_fast import FewShotClassifier, create_model
from amd_fast.web.app import create_app
from amd_fast.web.guard import own_hosts
from amd_fast.web.sessions import Limits

SHARED = runpy.run_path(str(Path(__file__).with_name("web_clips.py")))
MOVES: tuple[str, ...] = SHARED["MOVES"]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (CHROMIUM in the environment names one)"),
]
PATIENCE = 60_000  # milliseconds: the machine may be busy
SERIOUS = {"serious", "critical"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("clips")
    return {
        move: [str(SHARED["write_clip"](folder / f"{move}{n}.webm", move, 10 * m + n)) for n in range(3)] for m, move in enumerate(MOVES)
    }


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A real server, with a tiny untrained model."""
    torch.manual_seed(0)
    classifier = FewShotClassifier(create_model("afmir_small", size=32, frames=4))
    app = create_app(classifier, limits=Limits(upload_bytes=100_000), hosts=own_hosts("127.0.0.1"), processes=1)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *camera])
        yield browser
        browser.close()


class Opened:
    """The page in a browser profile of its own; remembers what went wrong in it."""

    def __init__(self, chromium: Any, address: str, **options: Any) -> None:
        self.context = chromium.new_context(viewport={"width": 900, "height": 800}, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda said: self.problems.append(said.text) if "Content Security Policy" in said.text else None)
        self.page.on("request", lambda asked: None if asked.url.startswith((address, "blob:")) else self.problems.append(asked.url))
        self.page.goto(address)
        self.page.wait_for_selector("#actions > *")

    def teach(self, action: str, files: list[str]) -> None:
        self.page.fill("#action", action)
        self.page.set_input_files("#teach-file", files)
        self.page.click("text=Add clips")
        self.page.wait_for_selector(f"#teach .status:has-text('Added to “{action}”')")

    def ask(self, file: str) -> str:
        self.page.set_input_files("#ask-file", file)
        self.page.click("text=Recognise")
        self.page.wait_for_selector("#answer:not([hidden])")
        return str(self.page.inner_text("#answer-label"))

    def actions(self) -> list[str]:
        return list(self.page.locator(".action h3").all_inner_texts())

    def widths(self) -> tuple[int, int]:
        found = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        return found[0], found[1]


@pytest.fixture
def opened(chromium: Any, address: str) -> Iterator[Opened]:
    found = Opened(chromium, address)
    yield found
    found.context.close()
    assert found.problems == []


def accessible(page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    found = axe.Axe().run(page).response["violations"]
    assert [(violation["id"], violation["nodes"][0]["html"]) for violation in found if violation["impact"] in SERIOUS] == []


def test_enrol_three_actions_and_ask(opened: Opened, clips: dict[str, list[str]]) -> None:
    page = opened.page
    assert "No actions yet" in page.inner_text("#actions")
    for move in MOVES:
        opened.teach(move, clips[move][:2])
    assert opened.actions() == sorted(MOVES)
    pictures = page.locator(".clips img")
    assert pictures.count() == 6
    page.wait_for_selector(".action:last-child img")
    for number in range(6):
        pictures.nth(number).scroll_into_view_if_needed()
    widths = [pictures.nth(number).evaluate("async image => { await image.decode(); return image.naturalWidth; }") for number in range(6)]
    assert min(widths) > 0
    answer = opened.ask(clips["down"][0])  # one that was shown: an untrained model knows it again
    assert answer.startswith("down") and page.inner_text("#said") == "down"
    shares = page.locator("#shares li").all_inner_texts()
    assert len(shares) == 3 and shares[0].startswith("down")
    table = page.inner_text("#views")
    for word in ("rgb", "flow", "joint", "Trust", *MOVES):
        assert word in table
    page.click("[aria-label='Remove down']")
    page.wait_for_selector("#teach .status:has-text('Removed “down”')")
    assert opened.actions() == ["right", "still"]
    page.reload()
    page.wait_for_selector(".action")
    assert opened.actions() == ["right", "still"]


def test_unknown(opened: Opened, clips: dict[str, list[str]]) -> None:
    for move in MOVES[:2]:
        opened.teach(move, clips[move][:1])
    assert "takes 9 clips" in opened.page.inner_text("#unknown-hint")
    for move in MOVES[:2]:
        opened.teach(move, clips[move][1:])
    opened.page.select_option("#unknown", "0.25")
    assert opened.page.inner_text("#unknown-hint") == ""
    opened.page.route("**/api/answers*", lambda route: route.continue_(url=route.request.url.replace("0.25", "1")))  # all clips are
    answer = opened.ask(clips["still"][0])
    assert answer.startswith("Unknown") and "none of your actions" in answer
    accessible(opened.page)


def test_errors_stand_beside_what_caused_them(opened: Opened, clips: dict[str, list[str]], tmp_path: Path) -> None:
    page = opened.page
    page.click("text=Add clips")
    assert page.inner_text("#action-error") == "Give the action a name."
    page.fill("#action", "wave")
    page.click("text=Add clips")
    assert page.inner_text("#teach-error") == "Choose a clip first." and page.inner_text("#action-error") == ""
    (tmp_path / "text.mp4").write_text("no video, whatever its name says\n" * 20)
    page.set_input_files("#teach-file", [str(tmp_path / "text.mp4"), clips["right"][0]])
    page.click("text=Add clips")
    page.wait_for_selector("#teach-error:has-text('text.mp4: This file is not a video')")
    assert opened.actions() == ["wave"]  # the other one was taken
    assert page.get_attribute("#teach-file", "aria-invalid") == "true"
    (tmp_path / "large.mp4").write_bytes(bytes(100_001))
    page.set_input_files("#ask-file", str(tmp_path / "large.mp4"))
    page.click("text=Recognise")
    assert page.inner_text("#ask-error") == "The file is larger than 0.1 MB. Give a shorter or smaller clip."
    page.set_input_files("#ask-file", clips["right"][0])
    page.click("text=Recognise")
    page.wait_for_selector("#ask-error:has-text('at least two actions')")
    accessible(page)
    opened.context.set_offline(True)
    page.click("text=Recognise")
    page.wait_for_selector("#ask-error:has-text('cannot be reached')")


def test_names_are_text(opened: Opened, clips: dict[str, list[str]]) -> None:
    name = "<img src=x onerror=alert(1)> & <b>more</b>"
    opened.teach(name, clips["right"][:1])
    assert opened.actions() == [name]
    opened.page.click(".action button")
    opened.page.wait_for_selector(".empty")


def test_two_users_at_once(opened: Opened, chromium: Any, address: str, clips: dict[str, list[str]]) -> None:
    other = Opened(chromium, address)
    opened.teach("mine", clips["right"][:1])
    other.teach("theirs", clips["right"][:1])
    opened.teach("mine too", clips["down"][:1])
    other.teach("theirs too", clips["still"][:1])
    for user, own in ((opened, "mine"), (other, "theirs")):
        user.page.reload()
        user.page.wait_for_selector(".action")
        assert user.actions() == [own, f"{own} too"]
        assert user.ask(clips["right"][0]).startswith(own)
    other.context.close()


def test_keyboard_alone(opened: Opened, clips: dict[str, list[str]]) -> None:
    page = opened.page

    def go_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", f"nothing shows that {selector} has the focus"
                return
        raise AssertionError(f"Tab does not reach {selector}")

    def choose(file: str) -> None:
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Space")
        chooser.value.set_files(file)

    for move in MOVES[:2]:
        go_to("#action")
        page.keyboard.press("Control+A")
        page.keyboard.type(move)
        go_to("#teach-file")
        choose(clips[move][0])
        go_to("#teach .primary")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"#teach .status:has-text('Added to “{move}”')")
    go_to("#ask-file")
    choose(clips["down"][0])
    go_to("#ask .primary")
    page.keyboard.press("Space")
    page.wait_for_selector("#answer-label:has-text('down')")
    go_to("[aria-label='Remove down']")
    page.keyboard.press("Enter")
    page.wait_for_selector("#teach .status:has-text('Removed')")
    assert opened.actions() == ["right"]
    assert page.evaluate("() => document.activeElement.id") == "action"  # and not lost with the button


def test_camera(opened: Opened) -> None:
    """Chromium's stand-in for a camera: record, add, recognise, and watch."""
    page = opened.page
    for name in ("one", "two"):
        page.fill("#action", name)
        page.click("#teach .record")
        page.wait_for_selector("#teach .status:has-text('Recording')")
        page.wait_for_selector("#teach .preview:not([hidden])")
        page.wait_for_timeout(700)
        page.click("#teach .record")
        page.wait_for_selector(f"#teach .status:has-text('Added to “{name}”')")
    page.click("#ask .live")
    page.wait_for_selector("#answer:not([hidden])")
    assert page.inner_text("#answer-clip") == "recording"
    page.click("#teach .record")  # takes the camera over
    page.wait_for_selector("#ask .live[aria-pressed=false]")
    page.wait_for_selector("#teach .preview:not([hidden])")
    page.click("#teach .record")
    page.wait_for_selector("#teach .preview", state="hidden")
    assert page.is_hidden("#ask .preview")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_light_and_dark(chromium: Any, address: str, clips: dict[str, list[str]], scheme: str) -> None:
    opened = Opened(chromium, address, color_scheme=scheme, reduced_motion="reduce")
    page = opened.page
    page.set_viewport_size({"width": 360, "height": 740})
    accessible(page)
    opened.teach("a_name_without_any_spaces_that_is_as_long_as_names_may_be", clips["right"])
    opened.teach("down", clips["down"])
    assert opened.ask(clips["down"][0]).startswith("down")
    accessible(page)
    scrolled, shown = opened.widths()
    assert scrolled <= shown == 360
    back = page.evaluate("() => getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").split(",")
    assert (int(back[0]) < 60) == (scheme == "dark")
    assert page.evaluate("() => getComputedStyle(document.querySelector('.track i')).transitionDuration") in ("0s", "")
    opened.context.close()
    assert opened.problems == []
