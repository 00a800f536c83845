"""The HTML report of an evaluation: one file that needs nothing beside it, for screen, phone and paper, light and dark."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from numpy.typing import NDArray

from amd_fast.errors import DataError
from amd_fast.evaluation import metrics, plots
from amd_fast.evaluation.result import AMI, CALIBRATION_BINS, UNIFORM, ConditionScores, EvaluationResult, jsonable, write_text
from amd_fast.evaluation.tables import Table, accuracy_text, auc, number, other_run_remark, p_value, percent, signed, table_of

TEMPLATES = Path(__file__).parent / "templates"
SIGNIFICANT = 0.05
MATRIX_CLASSES = 40  # a larger confusion matrix cannot be read; its most frequent confusions can
CONFUSIONS_SHOWN = 12
HISTORY_ROWS = 40
TABLES_IN_META = ("history", "ablations", "baselines", "title")
NOT_A_LOSS = ("rate", "lr", "norm", "second", "time", "accuracy", "scale", "precision")


class Tables(NamedTuple):
    """The tables of a result, made once for all sections."""

    summary: pd.DataFrame
    tests: pd.DataFrame
    reliability: pd.DataFrame


@dataclass(frozen=True)
class Chart:
    """A drawing with its caption, the numbers behind it, and whether it takes the whole width of the page."""

    title: str
    svg: Markup
    table: Table | None = None
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the report. ``more`` is folded away under ``more_title``: the same for further conditions."""

    id: str
    title: str
    text: str = ""
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    more: list[Chart] = field(default_factory=list)
    more_title: str = "Other conditions"


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
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of an evaluation as one HTML file, whole or not at all.

    What is not given is taken from ``result.meta`` ("history", "ablations", "baselines"), and left out where it is not there either.

    Args:
        result: The evaluation.
        path: The HTML file.
        history: Records of training: step, kind ("train" with loss terms, "validation" with an accuracy in 0..1 per method).
        ablations: condition, variant, accuracy in percent, difference in points, p, or any other columns.
        baselines: condition, method, accuracy and ci95 in percent, as ``evaluate_baselines`` gives them.
        facts: What is to be known about the run (command, versions, hashes), added to ``result.meta``.

    Raises:
        DataError: a history without step and kind.
    """
    meta = result.meta
    passed = {"history": history, "ablations": ablations, "baselines": baselines}
    given = {k: pd.DataFrame(meta[k]) if t is None and meta.get(k) is not None else t for k, t in passed.items()}
    tables = Tables(result.summary(), result.tests(), result.reliability())
    known = {**{k: v for k, v in meta.items() if k not in TABLES_IN_META}, **(facts or {})}
    sections: list[Section | None] = [
        _accuracy_section(result, tables),
        _test_section(tables.tests),
        _ablation_section(given["ablations"]),
        _baseline_section(result, tables, given["baselines"]),
        _policy_section(result, tables),
        _class_section(result),
        _confusion_section(result),
        _calibration_section(result),
        _history_section(given["history"], result.conditions[0].views),
        _facts_section(result),
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.jinja").render(
        title=str(meta.get("title", "Few-shot evaluation")),
        lede=_lede(result),
        cards=[_card(tables, c) for c in result.conditions],
        sections=[s for s in sections if s is not None and (s.charts or s.tables)],
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
    summary = {row["method"]: row for row in _of(tables.summary, c).to_dict("records")}
    tests = {row["against"]: row for row in _of(tables.tests, c).to_dict("records")}
    value, half = float(summary[AMI]["accuracy"]), float(summary[AMI]["ci95"])
    remarks = [_remark("uniform fusion", tests[UNIFORM])]
    best = max((v for v in c.views if v in summary), key=lambda v: float(summary[v]["accuracy"]), default=None)
    if best is not None:
        remarks.append(_remark(f"the best single view ({best})", tests[best]))
    known = [row["auc"] for row in _of(tables.reliability, c).to_dict("records") if row["question"] == "known damage"]
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


def _of(table: pd.DataFrame, c: ConditionScores) -> pd.DataFrame:
    return table[table["condition"] == c.name]


def _limits(values: Iterable[float], chance: float) -> tuple[float, float]:
    """Bounds of an accuracy axis shared by several charts: whole tens that hold all values and chance."""
    held = [v for v in [*values, chance] if not np.isnan(v)]
    return max(0.0, np.floor((min(held) - 2) / 10) * 10), min(103.0, np.ceil((max(held) + 2) / 10) * 10)


def _accuracy_section(result: EvaluationResult, tables: Tables) -> Section:
    summary = tables.summary
    chance = min(100 / c.ways for c in result.conditions)
    limits = _limits(pd.concat([summary["accuracy"] - summary["ci95"].fillna(0), summary["accuracy"] + summary["ci95"].fillna(0)]), chance)
    charts = []
    for c in result.conditions:
        rows = _of(summary, c)
        svg = plots.accuracy_chart(
            rows["method"].tolist(), rows["accuracy"].tolist(), rows["ci95"].tolist(), chance=100 / c.ways, views=c.views, limits=limits
        )
        charts.append(Chart(c.name, Markup(svg), _summary_table(rows)))
    text = (
        "Mean accuracy over episodes with its 95 % interval; the dashed line is chance. Uniform fusion averages the views; AMI weights "
        "them by the trust inferred clip by clip."
    )
    return Section("accuracy", "Accuracy by method", text, charts)


def _summary_table(rows: pd.DataFrame) -> Table:
    shown = pd.DataFrame(
        {
            "method": rows["method"],
            "accuracy, %": [accuracy_text(a, h) for a, h in zip(rows["accuracy"], rows["ci95"], strict=True)],
            "bootstrap, %": [f"{percent(a)} to {percent(b)}" for a, b in zip(rows["bootstrap_low"], rows["bootstrap_high"], strict=True)],
            "macro F1, %": rows["macro_f1"],
            "precision, %": rows["precision"],
            "recall, %": rows["recall"],
            "ECE, %": rows["ece"],
            "Brier": rows["brier"],
        }
    )
    episodes, queries = (number(int(rows[k].iloc[0])) for k in ("episodes", "queries"))
    return table_of(shown, strong=AMI, caption=f"{episodes} episodes, {queries} queries")


def _test_section(tests: pd.DataFrame) -> Section:
    shown = pd.DataFrame(
        {
            "condition": tests["condition"],
            "AMI against": tests["against"],
            "difference, points": tests["difference"],
            "95 % interval": [f"{signed(a)} to {signed(b)}" for a, b in zip(tests["ci_low"], tests["ci_high"], strict=True)],
            "t": tests["t"],
            "p": tests["p"],
            "p (Holm)": tests["p_holm"],
            "Cohen's dz": tests["cohen_dz"],
        }
    )
    if (tests["note"] != "").any():
        shown["note"] = tests["note"]
    text = "Paired t-tests of the accuracies per episode, corrected by Holm's method within each condition."
    return Section("tests", "Is AMI better?", text, tables=[table_of(shown)])


def _ablation_section(table: pd.DataFrame | None) -> Section | None:
    if table is None or table.empty:
        return None
    text = "The same episodes with one part of the method changed. Differences are points from the full method, p from paired t-tests."
    return Section("ablations", "What each part is worth", f"{text} {other_run_remark(table)}".strip(), tables=[table_of(table)])


def _baseline_section(result: EvaluationResult, tables: Tables, table: pd.DataFrame | None) -> Section | None:
    if table is None or table.empty:
        return None
    text = "Descriptors without learning, classified by nearest centroid or logistic regression, on the same episodes. Dashed line: chance."
    if not {"condition", "method", "accuracy", "ci95"} <= set(table.columns):
        return Section("baselines", "Simple baselines", text, tables=[table_of(table)])
    summary, charts = tables.summary, []
    pairs = [(c, table[table["condition"] == c.name]) for c in result.conditions]
    own = summary[summary["method"] == AMI]
    chance = min(100 / c.ways for c in result.conditions)
    limits = _limits([*table["accuracy"], *own["accuracy"], *(own["accuracy"] + own["ci95"].fillna(0))], chance)
    for c, rows in pairs:
        if rows.empty:
            continue
        both = pd.concat([rows, _of(own, c)])
        methods, values, half = (both[k].tolist() for k in ("method", "accuracy", "ci95"))
        svg = plots.accuracy_chart(methods, values, half, chance=100 / c.ways, views=c.views, limits=limits)
        charts.append(Chart(c.name, Markup(svg), table_of(rows.drop(columns=["condition"]))))
    return Section("baselines", "Simple baselines", text, charts, [] if charts else [table_of(table)])


def _policy_section(result: EvaluationResult, tables: Tables) -> Section | None:
    charts = []
    known = [c for c in result.conditions if c.damage is not None and c.damaged_modality is not None and len(c.views) > 1]
    for shots in dict.fromkeys(c.shots for c in known):
        groups, damaged, table = _policy_groups([c for c in known if c.shots == shots])
        svg = plots.policy_chart(groups, damaged, known[0].views)
        caption = "Dot: median; thick: the middle half; thin: 10 to 90 % of the queries. A cross marks the damaged modality."
        charts.append(Chart(f"{shots}-shot", Markup(svg), table_of(table), caption))
    reliability = tables.reliability
    if reliability.empty or all(len(c.views) < 2 for c in result.conditions):
        return None
    pooled = reliability[reliability["view"].isin(["all"])]
    overview = pooled.pivot_table(index="condition", columns="question", values="auc", sort=False, dropna=False).reset_index()
    overview.columns = [c if c == "condition" else f"AUC: {c}" for c in overview.columns]
    full = reliability.rename(columns={"auc": "AUC"})
    text = (
        "How well the policy says which view to trust, as areas under ROC curves (0.5: not at all, 1: always). Known damage: the damaged "
        "modality gets less trust than the others. View correct: a view gets more trust where it is right."
    )
    written = [table_of(overview, group=None), table_of(full.drop(columns=["shots"]), folded="Every view")]
    return Section("trust", "Whom the policy trusts", text, charts, written)


def _policy_groups(conditions: Sequence[ConditionScores]) -> tuple[dict[str, NDArray[Any]], dict[str, str], pd.DataFrame]:
    """Policy [n, V] of the queries by known damage over all conditions, the damaged modality of each group, and a table of them."""
    policy = np.concatenate([c.policy.reshape(-1, len(c.views)) for c in conditions])
    modality, kind = (np.concatenate([np.asarray(getattr(c, a)).ravel() for c in conditions]) for a in ("damaged_modality", "damage"))
    right = {m: np.concatenate([c.correct(m).ravel() for c in conditions]) for m in (UNIFORM, AMI)}
    groups, damaged, rows = {}, {}, []
    order = {m: i for i, m in enumerate(("", *conditions[0].views))}
    for m, k in sorted(set(zip(modality.tolist(), kind.tolist(), strict=True)), key=lambda pair: (order.get(pair[0], len(order)), *pair)):
        name = "clean" if not m and not k else f"{m or 'unknown'}: {k or 'damaged'}"
        among = (modality == m) & (kind == k)
        groups[name], damaged[name] = policy[among], m
        mean = 100 * policy[among].mean(axis=0, dtype=np.float64)
        trust = {f"trust in {v}, %": t for v, t in zip(conditions[0].views, mean, strict=True)}
        accuracy = {f"{'AMI' if n == AMI else n}, %": 100 * r[among].mean() for n, r in right.items()}
        rows.append({"damage": name, "queries": int(among.sum()), **trust, **accuracy})
    return groups, damaged, pd.DataFrame(rows)


def _class_section(result: EvaluationResult) -> Section:
    per_class, charts = result.per_class(), []
    for c in result.conditions:
        rows = _of(per_class, c)
        wide = rows.pivot_table(index="class", columns="method", values="accuracy", sort=False)[c.methods]
        queries = rows[rows["method"] == AMI].set_index("class")["queries"]
        wide = wide[queries.reindex(wide.index) > 0].sort_values([AMI, UNIFORM], ascending=False, kind="stable")
        svg = plots.class_chart(wide, c.views, 100 / c.ways)
        table = wide.rename(columns={m: f"{m}, %" for m in c.methods}).reset_index()
        table.insert(1, "queries", queries.reindex(wide.index).to_numpy())
        absent = [str(n) for n, q in queries.items() if q == 0]
        caption = f"Never queried: {', '.join(absent)}." if absent else ""
        charts.append(Chart(c.name, Markup(svg), table_of(table), caption))
    text = "Share of each class's queries that were recognised, best class first. Large dots: AMI."
    return Section("classes", "Accuracy by class", text, charts[:2], more=charts[2:])


def _confusion_section(result: EvaluationResult) -> Section:
    charts, tables = [], []
    for c in result.conditions:
        share = result.confusion(c.name, offered=True)
        frequent = _frequent_confusions(share, result.confusion(c.name))
        if len(share) <= MATRIX_CLASSES:
            data = share.reset_index().rename(columns={"true": "true class, %"})
            charts.append(Chart(c.name, Markup(plots.confusion_chart(share)), table_of(data), wide=True))
        if not frequent.empty:
            tables.append(table_of(frequent, caption=f"Most frequent confusions, {c.name}"))
    text = (
        "AMI's answers: of the queries of a class (row) for which another class (column) was among the possible answers, the percentage "
        "that was taken for it."
    )
    return Section("confusion", "What is taken for what", text, charts[:1], tables[:1], charts[1:])


def _frequent_confusions(share: pd.DataFrame, counts: pd.DataFrame) -> pd.DataFrame:
    values = share.to_numpy(dtype=float, copy=True)
    np.fill_diagonal(values, np.nan)
    order = np.argsort(np.where(np.isnan(values), 0, -values), axis=None, kind="stable")[:CONFUSIONS_SHOWN]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, values.shape), strict=True) if values[i, j] > 0]
    names, taken = list(share.index), counts.to_numpy()
    return pd.DataFrame(
        [{"class": names[i], "taken for": names[j], "how often, %": values[i, j], "queries": taken[i, j]} for i, j in pairs]
    )


def _calibration_section(result: EvaluationResult) -> Section:
    charts = []
    for c in result.conditions:
        diagrams = {m: metrics.calibration(c.scores(m), c.target, CALIBRATION_BINS) for m in c.methods}
        rows = [
            {"method": m, "confidence, %": 100 * d.confidence[b], "accuracy, %": 100 * d.accuracy[b], "queries": int(d.queries[b])}
            for m, d in diagrams.items()
            for b in np.flatnonzero(d.queries)
        ]
        charts.append(Chart(c.name, Markup(plots.calibration_chart(diagrams, c.views)), table_of(pd.DataFrame(rows))))
    text = "Accuracy of the answers given with a certain confidence. On the dashed line, 70 % sure is right 7 times in 10."
    return Section("calibration", "Can the probabilities be believed?", text, charts[:2], more=charts[2:])


def _history_section(history: pd.DataFrame | None, views: Sequence[str]) -> Section | None:
    if history is None or history.empty:
        return None
    if not {"step", "kind"} <= set(history.columns):
        raise DataError(f"history has columns {', '.join(map(str, history.columns))}; it needs step and kind, as metrics.jsonl holds them")
    charts = []
    train, validation = (history[history["kind"] == k].dropna(axis=1, how="all") for k in ("train", "validation"))
    numeric = [c for c in train.select_dtypes("number").columns if c != "step"]
    losses = [c for c in numeric if not any(word in c.lower() for word in NOT_A_LOSS)]
    if losses:
        thin = train.iloc[:: -(-len(train) // HISTORY_ROWS)][["step", *losses]]
        caption = "" if len(thin) == len(train) else f"The table holds one record in {-(-len(train) // HISTORY_ROWS)}."
        svg = plots.curves_chart(_series(train, losses), "loss", views)
        charts.append(Chart("Training loss", Markup(svg), table_of(thin, digits=4), caption))
    scored = [c for c in validation.select_dtypes("number").columns if c not in ("step", "precision")]
    if scored:
        in_percent = validation[["step", *scored]].copy()
        in_percent[scored] *= 100
        svg = plots.curves_chart(_series(in_percent, scored), "accuracy, %", views)
        columns = {c: f"{c}, %" for c in scored}
        charts.append(Chart("Accuracy on the validation classes", Markup(svg), table_of(in_percent.rename(columns=columns))))
    text = "Losses on the training classes, and accuracy on the validation classes, by which the model was chosen." if scored else ""
    return Section("training", "Training", text, charts)


def _series(table: pd.DataFrame, names: Sequence[str]) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    finite = {n: table[np.isfinite(table[n].to_numpy(dtype=float))] for n in names}
    return {n: (t["step"].to_numpy(dtype=float), t[n].to_numpy(dtype=float)) for n, t in finite.items() if len(t)}


def _facts_section(result: EvaluationResult) -> Section:
    rows = [
        {
            "condition": c.name, "ways": c.ways, "shots": c.shots, "queries per class": c.queries, "episodes": c.episodes,
            "classes": len(c.classes), "seed": str(c.seed), "episodes SHA-256": c.protocol[:16] or "–",
        }
        for c in result.conditions
    ]  # fmt: skip
    text = "Episodes with the same hash hold the same clips in the same order; results can then be compared clip by clip."
    return Section("run", "How this was made", text, tables=[table_of(pd.DataFrame(rows), group=None)])


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
