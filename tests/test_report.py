"""The report is one well-formed file that shows the numbers of the result, whatever the classes are called."""

from __future__ import annotations

import re
import runpy
import xml.dom.minidom
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from amd_fast.errors import DataError
from amd_fast.evaluation import plots
from amd_fast.evaluation.baselines import BASELINES
from amd_fast.evaluation.report import write_report
from amd_fast.evaluation.result import EvaluationResult
from amd_fast.evaluation.scores import ConditionScores
from amd_fast.evaluation.tables import accuracy_text, number, other_run_remark, p_value, signed, table_of

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
    baselines = pd.DataFrame({"condition": "clean, 1-shot", "method": list(BASELINES), "accuracy": [30.0, 31, 32, 33], "ci95": 1.0})
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
