"""The sections of the report: what is drawn, what stands in tables, and what is said about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from numpy.typing import NDArray

from amd_fast.errors import DataError
from amd_fast.evaluation import metrics, plots
from amd_fast.evaluation.result import CALIBRATION_BINS, EvaluationResult, Tables
from amd_fast.evaluation.scores import AMI, UNIFORM, ConditionScores
from amd_fast.evaluation.tables import Table, accuracy_text, number, other_run_remark, percent, signed, table_of
from amd_fast.evaluation.thumbnails import Example, examples

if TYPE_CHECKING:
    from amd_fast.data.manifest import Manifest

MATRIX_CLASSES = 40  # a larger confusion matrix cannot be read; its most frequent confusions can
CONFUSIONS_SHOWN = 12
HISTORY_ROWS = 40
EXAMPLE_CONDITIONS = 2  # conditions that clips are shown of: where queries may be damaged, clean and damaged ones
NOT_A_LOSS = ("rate", "lr", "norm", "second", "time", "accuracy", "scale", "precision")


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
    examples: list[tuple[str, list[Example]]] = field(default_factory=list)
    more_title: str = "Other conditions"


def of_condition(table: pd.DataFrame, c: ConditionScores) -> pd.DataFrame:
    """The rows of one condition."""
    return table[table["condition"] == c.name]


def _limits(values: Iterable[float], chance: float) -> tuple[float, float]:
    """Bounds of an accuracy axis shared by several charts: whole tens that hold all values and chance."""
    held = [v for v in [*values, chance] if not np.isnan(v)]
    return max(0.0, np.floor((min(held) - 2) / 10) * 10), min(103.0, np.ceil((max(held) + 2) / 10) * 10)


def accuracy_section(result: EvaluationResult, tables: Tables) -> Section:
    """Accuracy of every method, condition by condition."""
    summary = tables.summary
    chance = min(100 / c.ways for c in result.conditions)
    limits = _limits(pd.concat([summary["accuracy"] - summary["ci95"].fillna(0), summary["accuracy"] + summary["ci95"].fillna(0)]), chance)
    charts = []
    for c in result.conditions:
        rows = of_condition(summary, c)
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


def test_section(tests: pd.DataFrame) -> Section:
    """AMI tested against every other method."""
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


def seed_section(table: pd.DataFrame | None) -> Section | None:
    """Accuracy over several seeds of the episodes, where they were asked for."""
    if table is None or table.empty:
        return None
    columns = {
        "condition": "condition", "method": "method", "seeds": "seeds", "episodes": "episodes per seed", "accuracy": "accuracy, %",
        "interval": "95 % interval over seeds", "sd_seeds": "sd between seeds, points", "sd_episodes": "sd between episodes, points",
    }  # fmt: skip
    interval = [f"{percent(low)} to {percent(high)}" for low, high in zip(table["ci_low"], table["ci_high"], strict=True)]
    shown = table.assign(interval=interval)[list(columns)].rename(columns=columns)
    text = (
        "The same with other seeds of the episodes. The spread between seeds is what is left once chance between episodes is taken out "
        "(random-effects analysis of variance); at 0, one seed tells as much as another."
    )
    return Section("seeds", "Other seeds", text, tables=[table_of(shown, strong=AMI)])


def ablation_section(table: pd.DataFrame | None) -> Section | None:
    """What taking parts of the method away changes, where that was asked."""
    if table is None or table.empty:
        return None
    text = "The same episodes with one part of the method changed. Differences are points from the full method, p from paired t-tests."
    return Section("ablations", "What each part is worth", f"{text} {other_run_remark(table)}".strip(), tables=[table_of(table)])


def baseline_section(result: EvaluationResult, tables: Tables, table: pd.DataFrame | None) -> Section | None:
    """Simple baselines beside AMI, where they were scored."""
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
        both = pd.concat([rows, of_condition(own, c)])
        methods, values, half = (both[k].tolist() for k in ("method", "accuracy", "ci95"))
        svg = plots.accuracy_chart(methods, values, half, chance=100 / c.ways, views=c.views, limits=limits)
        charts.append(Chart(c.name, Markup(svg), table_of(rows.drop(columns=["condition"]))))
    return Section("baselines", "Simple baselines", text, charts, [] if charts else [table_of(table)])


def policy_section(result: EvaluationResult, tables: Tables) -> Section | None:
    """Whom the policy trusts, where there is a choice."""
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


def example_section(result: EvaluationResult, clips: Manifest | None) -> Section | None:
    """Pictures of the clearest successes and failures, where the clips are at hand."""
    if clips is None:
        return None
    kinds = (("Clearest successes", True), ("Clearest failures", False))
    chosen = [
        (f"{title}, {c.name}", found)
        for c in result.conditions[:EXAMPLE_CONDITIONS]
        for title, right in kinds
        if (found := examples(c, clips, right=right))
    ]
    text = (
        "First, middle and last frame of the clips that AMI was surest of, rightly and wrongly, no class twice. For each view: its own "
        "answer, how sure it was of it, and how far the policy trusted it."
    )
    return Section("examples", "Clips", text, examples=chosen) if chosen else None


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


def class_section(result: EvaluationResult, tables: Tables) -> Section:
    """Accuracy class by class."""
    charts = []
    for c in result.conditions:
        rows = of_condition(tables.per_class, c)
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


def confusion_section(result: EvaluationResult) -> Section:
    """Confusion matrices, or the most frequent confusions of many classes."""
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


def calibration_section(result: EvaluationResult) -> Section:
    """Reliability diagrams."""
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


def history_section(history: pd.DataFrame | None, views: Sequence[str]) -> Section | None:
    """Losses and validation accuracy over training; raises DataError for a history without step and kind."""
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


def facts_section(result: EvaluationResult) -> Section:
    """How the episodes were made; the facts of the run follow below it."""
    rows = [
        {
            "condition": c.name, "ways": c.ways, "shots": c.shots, "queries per class": c.queries, "episodes": c.episodes,
            "classes": len(c.classes), "seed": str(c.seed), "episodes SHA-256": c.protocol[:16] or "–",
        }
        for c in result.conditions
    ]  # fmt: skip
    text = "Episodes with the same hash hold the same clips in the same order; results can then be compared clip by clip."
    return Section("run", "How this was made", text, tables=[table_of(pd.DataFrame(rows), group=None)])
