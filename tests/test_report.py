"""The report is one well-formed file that shows the numbers of the result, whatever the classes are called."""

from __future__ import annotations

import base64
import re
import runpy
import shutil
import xml.dom.minidom
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from amd_fast.data.manifest import Manifest
from amd_fast.data.readers import open_clip
from amd_fast.data.synth.writing import synthesize
from amd_fast.errors import DataError
from amd_fast.evaluation import plots
from amd_fast.evaluation.baselines import BASELINES
from amd_fast.evaluation.report import write_report
from amd_fast.evaluation.result import EvaluationResult
from amd_fast.evaluation.scores import ConditionScores
from amd_fast.evaluation.seeds import seed_table
from amd_fast.evaluation.tables import accuracy_text, number, other_run_remark, p_value, signed, table_of
from amd_fast.evaluation.thumbnails import examples

make_scores = runpy.run_path(str(Path(__file__).with_name("evaluation_scores.py")))["make_scores"]
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Collects ids, text and tags, and refuses elements that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        named = dict(attrs)
        if named.get("id"):
            self.ids.append(str(named["id"]))
        self.links += [str(v) for k, v in attrs if k in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and "style" not in self.open:
            self.text.append(data.strip())


def history(steps: int = 100) -> pd.DataFrame:
    rows: list[dict[str, object]] = [
        {"step": s, "kind": "train", "total": 2 / s, "task": 1 / s, "learning_rate": 1e-3} for s in range(1, steps + 1)
    ]
    rows += [{"step": s, "kind": "validation", "rgb": 0.4, "ami": 0.5 + s / 1000, "precision": 2.0} for s in (50, 100)]
    return pd.DataFrame(rows)


def test_full_report_is_well_formed_and_self_contained(tmp_path: Path) -> None:
    result = EvaluationResult([make_scores(), make_scores(seed=1, name="damaged, 1-shot", damage=True)], {"title": "A <b> & c"})
    baselines = pd.DataFrame(
        {"condition": "clean, 1-shot", "method": list(BASELINES), "accuracy": 30.0 + np.arange(len(BASELINES)), "ci95": 1.0}
    )
    rows = {"variant": ["full", "no <x>"], "accuracy": [80.0, 79], "difference": [np.nan, -1], "p": [np.nan, 1e-9]}
    ablations = pd.DataFrame({"condition": "clean, 1-shot", **rows})
    facts = {"command": "amd-fast evaluate", "config": {"model": {"width": 8}}, "clips lost": 0}
    path = write_report(result, tmp_path / "report.html", history=history(), ablations=ablations, baselines=baselines, facts=facts)
    page = path.read_text()
    reader = Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert "script" not in reader.tags
    assert all(link.startswith("#") and link[1:] in reader.ids for link in reader.links)
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(reader.ids)
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    text = " ".join(reader.text)
    for wanted in ("class 3 <&>", "A <b> & c", "no <x>", "1.0 × 10⁻⁹", "amd-fast evaluate", '"width": 8', *BASELINES):
        assert wanted in text, wanted
    assert accuracy_text(100 * result.accuracy, result.summary().query("method == 'ami'")["ci95"].iloc[0]) in text
    assert not re.search(r"\bnan\b", text)


def test_colours_of_the_page_are_all_defined(tmp_path: Path) -> None:
    page = write_report(EvaluationResult([make_scores()]), tmp_path / "r.html", history=history()).read_text()
    style = page[page.index("<style>") : page.index("</style>")]
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", page)) <= set(re.findall(r"--([a-z0-9-]+):", style))
    dark = style[style.index("prefers-color-scheme: dark") :]
    assert {f"{v}:" for v in plots.VARIABLES.values()} <= set(re.findall(r"--([a-z0-9-]+:)", dark))
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert not re.search(r"(fill|stroke): #", drawings)  # every colour follows the page's mode


def test_charts_are_valid_xml_with_text_kept_as_text() -> None:
    name = 'a "b" <c> & $x$'
    svg = plots.accuracy_chart([name, "ami"], [50.0, 60], [1.0, float("nan")], chance=20, views=(name,), limits=(10, 70))
    assert name in "".join(t.firstChild.data for t in xml.dom.minidom.parseString(svg).getElementsByTagName("text"))
    assert svg == plots.accuracy_chart([name, "ami"], [50.0, 60], [1.0, float("nan")], chance=20, views=(name,), limits=(10, 70))


def test_numbering_keeps_references_inside_a_drawing() -> None:
    svg = '<svg><clipPath id="p1"/><path id="m" clip-path="url(#p1)"/><use xlink:href="#m"/></svg>'
    want = '<svg><clipPath id="d7-p1"/><path id="d7-m" clip-path="url(#d7-p1)"/><use xlink:href="#d7-m"/></svg>'
    assert plots.number_ids(svg, "d7") == want


def test_charts_leave_the_callers_matplotlib_alone() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.curves_chart({"total": (np.arange(100.0), np.ones(100))}, "loss", ())
    assert dict(mpl.rcParams) == before


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("views", [("rgb",), ("rgb", "flow", "thermal", "depth", "audio", "pose", "lidar", "joint")])
def test_few_and_many_views(tmp_path: Path, views: tuple[str, ...]) -> None:
    for episodes, damage in ((1, False), (3, True)):
        result = EvaluationResult([make_scores(episodes=episodes, views=views, damage=damage)])
        reader = Reader(write_report(result, tmp_path / "r.html", history=history(1)).read_text())
        assert ("trust" in reader.ids) == (len(views) > 1)


def test_many_classes_get_a_table_instead_of_a_matrix(tmp_path: Path) -> None:
    reader = Reader(write_report(EvaluationResult([make_scores(pool=60)]), tmp_path / "r.html").read_text())
    assert "What is taken for what" in reader.text
    assert "true class" not in reader.text


def test_the_headline_does_not_claim_what_the_test_does_not_show(tmp_path: Path) -> None:
    c = make_scores()
    same = ConditionScores(**{**c.__dict__, "log_probs": {**c.log_probs, "uniform": c.log_probs["ami"]}})
    worse = ConditionScores(**{**c.__dict__, "log_probs": {**c.log_probs, "ami": np.full_like(c.log_probs["ami"], -np.log(4))}})
    page = write_report(EvaluationResult([same]), tmp_path / "same.html").read_text()
    assert "no clear difference from uniform fusion" in page
    page = write_report(EvaluationResult([worse]), tmp_path / "worse.html").read_text()
    assert re.search(r'<li class="worse">−\d+\.\d points against uniform fusion', page)
    assert '<li class="better">' not in page


def test_tables_of_meta_are_shown_and_arguments_win(tmp_path: Path) -> None:
    result = EvaluationResult([make_scores()], {"ablations": [{"variant": "from meta", "accuracy": 1.0}]})
    assert "from meta" in write_report(result, tmp_path / "a.html").read_text()
    page = write_report(result, tmp_path / "b.html", ablations=pd.DataFrame({"variant": ["from argument"]})).read_text()
    assert "from argument" in page
    assert "from meta" not in page


def test_history_without_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="step and kind"):
        write_report(EvaluationResult([make_scores()]), tmp_path / "r.html", history=pd.DataFrame({"step": [1], "loss": [2.0]}))
    assert not list(tmp_path.iterdir())


def clips_of(c: ConditionScores, folder: Path) -> Manifest:
    """A manifest with a file for every row that the queries name; only the first few can be read."""
    made = synthesize(folder / "made", classes=6, clips_per_class=4, size=48, damage=False, workers=1, progress=False)
    count = int(c.query_id.max()) + 1
    paths = [str(made.file(row)) if row < len(made) else str(folder / f"gone & {row}.mp4") for row in range(count)]
    return Manifest(pd.DataFrame({"path": paths, "label": "x"}), folder)


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> tuple[ConditionScores, Manifest]:
    c = make_scores(episodes=60)
    c = replace(c, query_id=c.query_id % 24)
    return c, clips_of(c, tmp_path_factory.mktemp("pictured"))


@pytest.mark.parametrize("right", [True, False])
def test_the_clips_shown_are_the_surest_ones(pictured: tuple[ConditionScores, Manifest], right: bool) -> None:
    c, clips = pictured
    found = examples(c, clips, right=right, count=3)
    wanted: list[tuple[float, str, str]] = []  # by a loop: certainty, class, clip; no class and no clip twice
    everything = [(float(c.log_probs["ami"][e, q].max()), e, q) for e in range(c.episodes) for q in range(c.target.shape[1])]
    for sure, e, q in sorted(everything, key=lambda item: -item[0]):
        label, clip = c.classes[c.episode_classes[e, c.target[e, q]]], str(clips.table["path"][c.query_id[e, q]])
        if bool(c.correct()[e, q]) == right and label not in {w[1] for w in wanted} and clip not in {w[2] for w in wanted}:
            wanted.append((100 * np.exp(sure), label, clip))
    assert [(x.truth, x.clip) for x in found] == [w[1:] for w in wanted[:3]]
    assert [x.sure for x in found] == pytest.approx([w[0] for w in wanted[:3]], rel=1e-6)
    for x in found:
        assert x.right == right == (x.answer == x.truth) and [b.view for b in x.beliefs] == list(c.views)
        assert sum(b.trust for b in x.beliefs) == pytest.approx(100, abs=1e-3)
        packed = np.frombuffer(base64.b64decode(x.picture.partition(",")[2]), np.uint8)
        picture = cv2.imdecode(packed, cv2.IMREAD_COLOR)
        assert picture.shape == (x.height, x.width, 3) == (96, 3 * 96 + 6, 3)
        with open_clip(x.clip) as reader:
            last = reader.pixels(reader.frames([reader.frame_count - 1]), short_side=96)[0]
        assert np.abs(picture[:, -96:, ::-1].astype(float) - last).mean() < 6  # JPEG's losses


def test_files_that_are_gone_are_passed_over(tmp_path: Path, pictured: tuple[ConditionScores, Manifest]) -> None:
    c, clips = pictured
    gone = Manifest(clips.table.assign(path=[f"gone/{i}.mp4" for i in range(len(clips))]), tmp_path)
    assert examples(c, gone, right=True) == []
    page = write_report(EvaluationResult([c]), tmp_path / "r.html", clips=gone).read_text()
    assert "Clearest" not in page
    half = Manifest(clips.table.assign(path=[p if i % 2 else f"gone/{i}" for i, p in enumerate(clips.table["path"])]), tmp_path)
    assert all(Path(x.clip).is_file() for x in examples(c, half, right=True))


@pytest.mark.skipif(shutil.which("chromium") is None and shutil.which("google-chrome") is None, reason="no Chromium here")
def test_in_a_browser(tmp_path: Path, pictured: tuple[ConditionScores, Manifest]) -> None:
    """No errors, nothing wider than a phone, light and dark differ and can be read, and print shows everything that is open."""
    playwright = pytest.importorskip("playwright.sync_api")
    c, clips = pictured
    long_names = [f"a_class_with_a_very_long_name_and_no_space_in_it_number_{i}" for i in range(len(c.classes))]
    result = EvaluationResult([replace(c, classes=long_names), replace(c, name="damaged, 1-shot")])
    facts = {"command": "amd-fast evaluate " + "x" * 200, "config": {"a": {"b": "y" * 200}}}
    path = write_report(result, tmp_path / "report.html", history=history(), facts=facts, clips=clips)
    problems: list[str] = []
    backgrounds = {}
    with playwright.sync_playwright() as tool:
        binary = shutil.which("chromium") or shutil.which("google-chrome")
        browser = tool.chromium.launch(executable_path=binary, args=["--no-sandbox", "--disable-dev-shm-usage"])
        for width, scheme in ((360, "light"), (1280, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page = context.new_page()
            page.on("console", lambda message: problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else problems.append(request.url))
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate("[...document.images].every(image => image.naturalWidth > 200)")
            assert page.evaluate("document.images.length") >= 6
            ink, backgrounds[scheme] = (
                page.evaluate(f"getComputedStyle(document.body).{name}.match(/[0-9]+/g).slice(0, 3).map(Number)")
                for name in ("color", "backgroundColor")
            )
            assert abs(np.mean(ink) - np.mean(backgrounds[scheme])) > 150
            if scheme == "dark":
                page.emulate_media(media="print")
                assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
            context.close()
        browser.close()
    assert problems == []
    assert np.mean(backgrounds["light"]) > 200 and np.mean(backgrounds["dark"]) < 60


def test_other_seeds_have_a_table(tmp_path: Path) -> None:
    runs = [EvaluationResult([make_scores(seed=seed)]) for seed in range(3)]
    seeds = seed_table({"": runs})
    runs[0].save(tmp_path, seeds=seeds)
    assert "95 % interval over seeds" in (tmp_path / "report.html").read_text()
    assert len(pd.read_csv(tmp_path / "seeds.csv")) == 5


def test_numbers_are_written_for_readers() -> None:
    assert [signed(v) for v in (1.26, -0.04, 0.0, -3, float("nan"))] == ["+1.3", "−0.04", "0.0", "−3.0", "–"]
    assert [signed(v) for v in (0.001, -0.001)] == ["0.0", "0.0"]
    assert [p_value(v) for v in (0.5, 0.00123, 1.2e-40, 0.0, float("nan"))] == ["0.500", "0.001", "1.2 × 10⁻⁴⁰", "< 10⁻³⁰⁰", "–"]
    assert number(10_000) == "10\u202f000"
    assert accuracy_text(81.25, float("nan")) == "81.2"
    table = table_of(pd.DataFrame({"method": ["ami"], "difference": [-1.0], "p_holm": [0.2], "n": [3], "x": [np.inf]}), strong="ami")
    assert table.groups[0][1][0].cells == ["AMI", "−1.0", "0.200", "3", "∞"]
    assert table.groups[0][1][0].strong


def test_the_remark_on_another_run_says_what_the_differences_say() -> None:
    rows = [
        ("clean", "full method", 90.0, float("nan"), float("nan")),
        ("clean", "plain: rgb", 88.0, -2.0, 0.001),
        ("clean", "plain: flow", 92.0, 1.5, 0.01),
        ("clean", "plain: ami", 90.1, 0.1, 0.7),
    ]
    table = pd.DataFrame(rows, columns=["condition", "variant", "accuracy", "difference", "p"])
    text = other_run_remark(table)
    assert "gains in rgb (clean, 2.0 points)" in text and "loses in flow (clean, 1.5 points)" in text and "1 of 3" in text
    assert "gains in nothing" in other_run_remark(table[table["p"] > 0.5])
    assert other_run_remark(table[table["variant"] == "full method"]) == ""
