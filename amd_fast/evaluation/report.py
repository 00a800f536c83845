"""The HTML report of an evaluation: one file that needs nothing beside it, for screen, phone and paper, light and dark."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from amd_fast.evaluation import plots, sections
from amd_fast.evaluation.result import EvaluationResult, Tables, jsonable, write_text
from amd_fast.evaluation.scores import AMI, UNIFORM, ConditionScores
from amd_fast.evaluation.sections import Section, of_condition
from amd_fast.evaluation.tables import auc, number, p_value, percent, signed

if TYPE_CHECKING:
    from amd_fast.data.manifest import Manifest

TEMPLATES = Path(__file__).parent / "templates"
SIGNIFICANT = 0.05
TABLES_IN_META = ("history", "ablations", "baselines", "seeds", "title")


@dataclass(frozen=True)
class Card:
    """The headline of one condition; ``remarks`` are (tone, text), the tone one of better, worse, even, note."""

    name: str
    accuracy: str
    half_width: str
    position: float
    low: float
    high: float
    chance: float
    uniform: float
    remarks: list[tuple[str, str]]


def write_report(
    result: EvaluationResult,
    path: str | os.PathLike[str],
    *,
    history: pd.DataFrame | None = None,
    ablations: pd.DataFrame | None = None,
    baselines: pd.DataFrame | None = None,
    seeds: pd.DataFrame | None = None,
    facts: Mapping[str, Any] | None = None,
    clips: Manifest | None = None,
    tables: Tables | None = None,
) -> Path:
    """Write the report of an evaluation as one HTML file, whole or not at all.

    What is not given is taken from ``result.meta`` ("history", "ablations", "baselines", "seeds"), and left out where it is not there.

    Args:
        result: The evaluation.
        path: The HTML file.
        history: Records of training: step, kind ("train" with loss terms, "validation" with an accuracy in 0..1 per method).
        ablations: condition, variant, accuracy in percent, difference in points, p, or any other columns.
        baselines: condition, method, accuracy and ci95 in percent, as ``evaluate_baselines`` gives them.
        seeds: What :func:`~amd_fast.evaluation.seeds.seed_table` gives of one system.
        facts: What is to be known about the run (command, versions, hashes), added to ``result.meta``.
        clips: The evaluated clips, row by row, to show pictures of some; files that are gone are passed over.
        tables: What ``result.tables()`` gave, where it is at hand.

    Raises:
        DataError: a history without step and kind.
    """
    meta = result.meta
    passed = {"history": history, "ablations": ablations, "baselines": baselines, "seeds": seeds}
    given = {k: pd.DataFrame(meta[k]) if t is None and meta.get(k) is not None else t for k, t in passed.items()}
    tables = tables or result.tables()
    known = {**{k: v for k, v in meta.items() if k not in TABLES_IN_META}, **(facts or {})}
    shown: list[Section | None] = [
        sections.accuracy_section(result, tables),
        sections.test_section(tables.tests),
        sections.seed_section(given["seeds"]),
        sections.ablation_section(given["ablations"]),
        sections.baseline_section(result, tables, given["baselines"]),
        sections.policy_section(result, tables),
        sections.example_section(result, clips),
        sections.class_section(result, tables),
        sections.confusion_section(result),
        sections.calibration_section(result),
        sections.history_section(given["history"], result.conditions[0].views),
        sections.facts_section(result),
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(
        title=str(meta.get("title", "Few-shot evaluation")),
        lede=_lede(result),
        cards=[_card(tables, c) for c in result.conditions],
        sections=[s for s in shown if s is not None and (s.charts or s.tables or s.examples)],
        facts=_facts(known),
        style=Markup((TEMPLATES / "report.css").read_text()),
    )
    path = Path(path)
    write_text(path, _number_drawings(page))
    return path


def _number_drawings(page: str) -> str:
    """Gives every drawing of the page ids of its own."""
    head, *drawings = page.split("<svg ")
    parts = [head]
    for number_, drawing in enumerate(drawings):
        inside, rest = drawing.split("</svg>", 1)
        parts.append(plots.number_ids(f"<svg {inside}</svg>", f"d{number_}") + rest)
    return "".join(parts)


def _lede(result: EvaluationResult) -> str:
    first = result.conditions[0]
    ways, shots, episodes, classes = (
        _range(values)
        for values in (
            [c.ways for c in result.conditions],
            [c.shots for c in result.conditions],
            [c.episodes for c in result.conditions],
            [len(c.classes) for c in result.conditions],
        )
    )
    views = ", ".join(first.views)
    return (
        f"{ways}-way, {shots}-shot: in each episode, {ways} classes are to be told apart from {shots} example "
        f"clip{'s' if shots != '1' else ''} of each. {episodes} episodes per condition, drawn from {classes} classes. "
        f"Views of a clip: {views}. "
        f"Guessing would be right {100 / first.ways:.3g} % of the time."
    )


def _range(values: Sequence[int]) -> str:
    distinct = sorted(set(values))
    return " or ".join(number(v) for v in distinct) if len(distinct) < 3 else f"{number(distinct[0])} to {number(distinct[-1])}"


def _card(tables: Tables, c: ConditionScores) -> Card:
    summary = {row["method"]: row for row in of_condition(tables.summary, c).to_dict("records")}
    tests = {row["against"]: row for row in of_condition(tables.tests, c).to_dict("records")}
    value, half = float(summary[AMI]["accuracy"]), float(summary[AMI]["ci95"])
    remarks = [_remark("uniform fusion", tests[UNIFORM])]
    best = max((v for v in c.views if v in summary), key=lambda v: float(summary[v]["accuracy"]), default=None)
    if best is not None:
        remarks.append(_remark(f"the best single view ({best})", tests[best]))
    known = [row["auc"] for row in of_condition(tables.reliability, c).to_dict("records") if row["question"] == "known damage"]
    if known and not np.isnan(known[0]):
        remarks.append(("note", f"tells the damaged modality: AUC {auc(known[0])}"))
    spread = 0.0 if np.isnan(half) else half
    return Card(
        name=c.name,
        accuracy=percent(value),
        half_width="one episode, no interval" if np.isnan(half) else f"± {percent(half)}",
        position=value,
        low=max(value - spread, 0),
        high=min(value + spread, 100),
        chance=100 / c.ways,
        uniform=float(summary[UNIFORM]["accuracy"]),
        remarks=remarks,
    )


def _remark(other: str, test: Mapping[Hashable, Any]) -> tuple[str, str]:
    gap, p = float(test["difference"]), float(test["p_holm"])
    if np.isnan(p):
        return "note", f"{signed(gap)} points against {other}"
    if p >= SIGNIFICANT:
        return "even", f"no clear difference from {other} ({signed(gap)}, p\u00a0=\u00a0{p_value(p)})"
    tone, word = ("better", "over") if gap > 0 else ("worse", "against")
    bound = "p\u00a0<\u00a00.001" if p < 0.001 else f"p\u00a0=\u00a0{p_value(p)}"
    return tone, f"{signed(gap)} points {word} {other} ({bound})"


def _facts(known: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(name, text, whether it is a block) of every fact; nested ones as JSON."""
    facts = []
    for name, value in known.items():
        plain = jsonable(value)
        flat = not isinstance(plain, dict | list)
        if isinstance(plain, dict) and len(plain) <= 6 and not any(isinstance(v, dict | list) for v in plain.values()):
            plain, flat = ", ".join(f"{k}: {_scalar(v)}" for k, v in plain.items()), True
        text = _scalar(plain) if flat else json.dumps(plain, indent=2, ensure_ascii=False)
        facts.append((str(name).replace("_", " "), text, not flat or "\n" in text))
    return sorted(facts, key=lambda fact: fact[2])


def _scalar(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)
