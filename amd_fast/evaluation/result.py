"""What an evaluation found: tables made of the scores of every query, and the files they are kept in."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from amd_fast.errors import DataError
from amd_fast.evaluation import metrics, statistics
from amd_fast.evaluation.scores import AMI, ConditionScores
from amd_fast.files import write_atomically

if TYPE_CHECKING:
    from amd_fast.data.manifest import Manifest

CALIBRATION_BINS = 15


class Tables(NamedTuple):
    """The tables that are made of a result; see the methods of :class:`EvaluationResult` with these names."""

    summary: pd.DataFrame
    tests: pd.DataFrame
    reliability: pd.DataFrame
    per_class: pd.DataFrame


@dataclass
class EvaluationResult:
    """The outcome of an evaluation under one condition or several; the first is the one that ``accuracy`` speaks of.

    ``meta`` holds what is to be kept with the numbers (command, versions, hashes, configuration), any JSON-like values; the keys "history",
    "ablations" and "baselines" may hold the tables that the report shows under these names.

    ``accuracy`` and ``confidence_interval`` are fractions, 0..1. The tables made for reading (``summary``, ``tests``, ``per_class``) give
    accuracies, their intervals and differences, precision, recall, F1 and calibration error in percent, as the field prints them.
    """

    conditions: list[ConditionScores]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.conditions:
            raise DataError("an evaluation result needs at least one condition, got none")
        names = [c.name for c in self.conditions]
        if len(set(names)) < len(names):
            raise DataError(f"conditions of an evaluation need different names, got {names}")

    def condition(self, name: str | None = None) -> ConditionScores:
        """The condition of that name, or the first one; raises DataError for an unknown name."""
        if name is None:
            return self.conditions[0]
        for condition in self.conditions:
            if condition.name == name:
                return condition
        raise DataError(f"no condition {name!r} in this evaluation; it has {', '.join(repr(c.name) for c in self.conditions)}")

    @property
    def accuracy(self) -> float:
        """Mean accuracy of AMI over the episodes of the first condition, 0..1."""
        return self.interval.mean

    @property
    def confidence_interval(self) -> tuple[float, float]:
        """Normal 95 % interval of ``accuracy`` over episode means; NaN for a single episode."""
        return self.interval.low, self.interval.high

    @property
    def interval(self) -> statistics.Interval:
        """Mean and 95 % interval of AMI's accuracy in the first condition, 0..1."""
        return statistics.mean_interval(self.conditions[0].episode_accuracy())

    def summary(self) -> pd.DataFrame:
        """One row per condition and method.

        Columns: condition, ways, shots, method, episodes, queries (in all), accuracy, ci95 (half width, 1.96 s/sqrt(E) over episode
        means), bootstrap_low, bootstrap_high (percentile bootstrap over episodes, seeded with the condition's seed), macro_f1, precision,
        recall (macro, over the classes of the pool), ece (expected calibration error, 15 bins), all in percent, and brier (mean squared
        error of the probabilities, 0..2).
        """
        return pd.DataFrame([_summary_row(c, m) for c in self.conditions for m in c.methods])

    def tests(self) -> pd.DataFrame:
        """Paired t-tests of AMI's per-episode accuracy against every other method's, one row per condition and method.

        Columns: condition, shots, against, difference (AMI minus the other, percentage points) with its 95 % bounds ci_low and ci_high, t,
        df, p, p_holm (corrected over the tests of the same condition), cohen_dz, note (why a value is NaN).
        """
        rows: list[dict[str, Any]] = []
        for c in self.conditions:
            others = [m for m in c.methods if m != AMI]
            outcomes = [statistics.paired_t(c.episode_accuracy(AMI) * 100, c.episode_accuracy(m) * 100) for m in others]
            corrected = statistics.holm([o.p for o in outcomes])
            for method, o, p_holm in zip(others, outcomes, corrected, strict=True):
                rows.append(
                    {
                        "condition": c.name, "shots": c.shots, "against": method, "difference": o.difference, "ci_low": o.low,
                        "ci_high": o.high, "t": o.t, "df": o.df, "p": o.p, "p_holm": float(p_holm), "cohen_dz": o.effect, "note": o.note,
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    @property
    def episodes(self) -> pd.DataFrame:
        """One row per episode.

        Columns: condition, shots, episode, classes (names joined by " | "), clips (a hash of the episode's clips), accuracy of each method
        ("accuracy_ami", 0..1), mean policy over the queries for each view ("policy_rgb", to six digits).
        """
        return pd.concat([_episode_rows(c) for c in self.conditions], ignore_index=True)

    def reliability(self) -> pd.DataFrame:
        """How well the policy says which modality can be trusted, as areas under ROC curves (0.5 = not at all); one row per question.

        Column ``question`` is one of

        - "known damage": among the queries with a damaged modality, does the damaged one get little trust? Each modality m scores
          -policy[m]; per modality (damaged against another one damaged) and pooled over all (query, modality) pairs. Left out where
          nothing is damaged; modalities that were not evaluated are skipped.
        - "view correct": does a view get more trust where it classifies correctly? Per view over all queries, and pooled over pairs.
        - "view correct, views disagree": the same among the queries that some but not all views get right: where trust matters.

        Further columns: condition, shots, view ("all" = pooled), positives, negatives, auc (NaN where one side is empty).
        """
        rows = [row for c in self.conditions for row in _reliability_rows(c)]
        return pd.DataFrame(rows, columns=["condition", "shots", "question", "view", "positives", "negatives", "auc"])

    def per_class(self) -> pd.DataFrame:
        """One row per condition, class of the pool and method.

        Columns: condition, class, method, queries, accuracy (= recall), precision, f1, in percent; NaN where never queried.
        """
        return pd.concat([_class_rows(c, method) for c in self.conditions for method in c.methods], ignore_index=True)

    def confusion(self, condition: str | None = None, method: str = AMI, *, offered: bool = False) -> pd.DataFrame:
        """Confusion matrix over the classes of the pool (rows true, columns predicted) of one condition, the first unless named.

        Counts; with ``offered`` the percentage of the queries of class i taken for class j among those that came in an episode where j was
        one of the answers (NaN where the two never met).
        """
        c = self.condition(condition)
        table = c.confusion_counts(method)
        if offered:
            chances = metrics.offered_counts(c.episode_classes, c.true_class, len(c.classes))
            table = np.where(chances > 0, 100 * table / np.maximum(chances, 1), np.nan)
        return pd.DataFrame(table, index=pd.Index(c.classes, name="true"), columns=pd.Index(c.classes, name="predicted"))

    def tables(self) -> Tables:
        """The tables of a report, made once for all that show them."""
        return Tables(self.summary(), self.tests(), self.reliability(), self.per_class())

    def to_dict(self, tables: Tables | None = None) -> dict[str, Any]:
        """Everything but the per-episode and per-class tables, as JSON-ready values (NaN and infinities become None).

        Args:
            tables: what :meth:`tables` gave, where it is at hand.
        """
        tables = tables or self.tables()
        facts = [
            {
                "name": c.name,
                "ways": c.ways,
                "shots": c.shots,
                "queries_per_class": c.queries,
                "episodes": c.episodes,
                "seed": c.seed,
                "chance": 1 / c.ways,
                "classes": list(c.classes),
                "views": list(c.views),
                "methods": c.methods,
                "protocol": c.protocol,
            }
            for c in self.conditions
        ]
        return {
            "accuracy": jsonable(self.accuracy),
            "confidence_interval": jsonable(self.confidence_interval),
            "conditions": facts,
            "summary": jsonable(tables.summary),
            "tests": jsonable(tables.tests),
            "reliability": jsonable(tables.reliability),
            "meta": jsonable(self.meta),
        }

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        history: pd.DataFrame | None = None,
        ablations: pd.DataFrame | None = None,
        baselines: pd.DataFrame | None = None,
        seeds: pd.DataFrame | None = None,
        facts: Mapping[str, Any] | None = None,
        clips: Manifest | None = None,
    ) -> Path:
        """Write results.json, summary.csv, tests.csv, reliability.csv, per_class.csv, episodes.csv.gz and report.html into ``folder``.

        Each file appears whole or not at all; existing ones are replaced. The further arguments go to the report (see ``write_report``),
        ``seeds`` into seeds.csv as well.

        Returns:
            The path of report.html.

        Raises:
            DataError: ``folder`` is a file.
        """
        from amd_fast.evaluation.report import write_report

        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise DataError(f"cannot save the evaluation into {folder}: it is a file; name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        tables = self.tables()
        write_text(folder / "results.json", json.dumps(self.to_dict(tables), indent=1, allow_nan=False) + "\n")
        for name, table in {**tables._asdict(), **({} if seeds is None else {"seeds": seeds})}.items():
            write_text(folder / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
        text = self.episodes.to_csv(index=False, lineterminator="\n")
        packed = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as stream:  # no time stamp: same input, same bytes
            stream.write(text.encode(errors="backslashreplace"))
        write_atomically(folder / "episodes.csv.gz", packed.getvalue())
        shown = {"history": history, "ablations": ablations, "baselines": baselines, "seeds": seeds}
        return write_report(self, folder / "report.html", **shown, facts=facts, clips=clips, tables=tables)


def _summary_row(c: ConditionScores, method: str) -> dict[str, Any]:
    log_probs = c.scores(method)
    accuracy = c.episode_accuracy(method) * 100
    normal = statistics.mean_interval(accuracy)
    bootstrap = statistics.bootstrap_interval(accuracy, seed=c.seed)
    precision, recall, f1 = metrics.class_scores(c.confusion_counts(method)).macro()
    return {
        "condition": c.name,
        "ways": c.ways,
        "shots": c.shots,
        "method": method,
        "episodes": c.episodes,
        "queries": c.target.size,
        "accuracy": normal.mean,
        "ci95": normal.half_width,
        "bootstrap_low": bootstrap.low,
        "bootstrap_high": bootstrap.high,
        "macro_f1": 100 * f1,
        "precision": 100 * precision,
        "recall": 100 * recall,
        "ece": 100 * metrics.calibration(log_probs, c.target, CALIBRATION_BINS).error,
        "brier": metrics.brier_score(log_probs, c.target),
    }


def _class_rows(c: ConditionScores, method: str) -> pd.DataFrame:
    scores = metrics.class_scores(c.confusion_counts(method))
    columns: dict[str, Any] = {"condition": c.name, "class": list(c.classes), "method": method, "queries": scores.queries}
    for name, values in (("accuracy", scores.recall), ("precision", scores.precision), ("f1", scores.f1)):
        columns[name] = np.where(scores.queries > 0, values * 100, np.nan)
    return pd.DataFrame(columns)


def _episode_rows(c: ConditionScores) -> pd.DataFrame:
    names = np.asarray(c.classes, dtype=object)[c.episode_classes]
    columns: dict[str, Any] = {
        "condition": c.name,
        "shots": c.shots,
        "episode": np.arange(c.episodes),
        "classes": [" | ".join(row) for row in names],
        "clips": c.keys(),
    }
    columns.update({f"accuracy_{m}": c.episode_accuracy(m) for m in c.methods})
    trust = c.policy.mean(axis=1, dtype=np.float64).round(6)
    columns.update({f"policy_{view}": trust[:, i] for i, view in enumerate(c.views)})
    return pd.DataFrame(columns)


def _reliability_rows(c: ConditionScores) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    exists = np.ones(c.policy.shape, dtype=bool) if c.present is None else c.present.astype(bool)

    def ask(question: str, views: Sequence[str], among: NDArray[np.bool_], sign: int, positive: NDArray[np.bool_]) -> None:
        """Rows of one question about the queries ``among`` [E, Q]; ``positive`` is [E, Q, views]; pooled first where views are several."""
        columns = [c.views.index(v) for v in views]
        score, valid = sign * c.policy[..., columns], exists[..., columns] & among[..., None]
        slices = [(v, np.s_[..., i]) for i, v in enumerate(views)]
        for view, part in ([("all", np.s_[...])] if len(views) > 1 else []) + slices:
            y, s = positive[part][valid[part]], score[part][valid[part]]
            sides = {"positives": int(y.sum()), "negatives": int((~y).sum())}
            rows.append({"condition": c.name, "shots": c.shots, "question": question, "view": view, **sides, "auc": metrics.roc_auc(s, y)})

    if c.damaged_modality is not None:
        modalities = [v for v in c.views if v != "joint"]
        hit = np.isin(c.damaged_modality, modalities)
        if hit.any():
            ask("known damage", modalities, hit, -1, np.stack([c.damaged_modality == m for m in modalities], axis=-1))
    scored = [v for v in c.views if v in c.log_probs]
    if scored:
        correct = np.stack([c.correct(v) for v in scored], axis=-1)
        mixed = np.asarray(correct.any(axis=-1) & ~correct.all(axis=-1))
        ask("view correct", scored, np.ones(mixed.shape, dtype=bool), 1, correct)
        ask("view correct, views disagree", scored, mixed, 1, correct)
    return rows


def jsonable(value: Any) -> Any:
    """JSON-ready form of a value: tables become lists of records, arrays lists, paths strings, NaN and infinities None."""
    if isinstance(value, pd.DataFrame):
        return [jsonable(record) for record in value.to_dict("records")]
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | list | tuple | set):
        return [jsonable(v) for v in (sorted(value, key=str) if isinstance(value, set) else value)]
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def write_text(path: Path, content: str) -> None:
    """Writes UTF-8 text whole or not at all."""
    write_atomically(path, content.encode(errors="backslashreplace"))  # names of files need not be valid UTF-8
