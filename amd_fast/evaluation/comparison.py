"""Comparison of several evaluations: analysis of variance and every pair, on the same episodes; ``amd-fast compare``."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.table import Table

from amd_fast.errors import ConfigError, DataError
from amd_fast.evaluation import statistics
from amd_fast.evaluation.result import EvaluationResult, jsonable, write_text
from amd_fast.evaluation.scores import AMI
from amd_fast.evaluation.seeds import seed_table
from amd_fast.evaluation.tables import NOTHING, p_value, signed
from amd_fast.progress import console

Result = EvaluationResult | str | os.PathLike[str]
Floats = NDArray[np.floating]
UNPAIRED = "different episodes: unpaired"


def compare(results: Mapping[str, Result | Sequence[Result]], *, method: str = AMI, unpaired: bool = False) -> pd.DataFrame:
    """Compare several evaluations: analyses of variance and every pair of systems, for each condition that all of them hold.

    The unit is the episode. A system given as several evaluations (training seeds) counts with its mean accuracy in each episode there;
    that says which of *these* networks are better. Where every system has two seeds or more, the pairs are tested a second time
    with the seed as the unit (Welch's test of the seeds' means), which says which way of training is better.

    Args:
        results: Name of each system -> its result, the folder it was saved in, or a list of these; at least two systems.
        method: Method whose per-episode accuracy is compared, "ami" unless told otherwise.
        unpaired: Take runs on different episodes all the same, by Welch's test and the one-way ANOVA.

    Returns:
        One row per test: condition, test, a, b, difference and its 95 % bounds (percentage points), statistic (t or F), df, df_error, p,
        p_corrected (Holm over the pairs of a condition; Greenhouse-Geisser for the repeated-measures ANOVA), effect (Cohen's d_z or d;
        partial eta squared for the repeated-measures ANOVA, eta squared for the one-way ANOVA), note.

    Raises:
        DataError: fewer than two systems, no condition in common, a run without that method, or runs scored on different episodes (names
            the first that differs) without ``unpaired``.
    """
    if len(results) < 2:
        raise DataError(f"compare got {len(results)} run(s); give at least two, as {{name: result}}")
    tables = {name: [episodes_of(run) for run in as_list(runs)] for name, runs in results.items()}
    rows: list[dict[str, object]] = []
    for condition in shared_conditions(tables):
        parts = {name: [table[table["condition"] == condition] for table in runs] for name, runs in tables.items()}
        difference = _first_difference(parts)
        if difference and not unpaired:
            raise DataError(
                f"{condition}: {difference}. Compare runs on the same list of episodes (amd-fast episodes, evaluate --protocol), "
                "or ask for unpaired tests"
            )
        rows += _compare_condition(
            condition, {name: [_accuracy(run, method) for run in runs] for name, runs in parts.items()}, not difference
        )
    return pd.DataFrame(rows)


def as_list(runs: Result | Sequence[Result]) -> list[Result]:
    """One result or several, as a list."""
    return [runs] if isinstance(runs, EvaluationResult | str | os.PathLike) else list(runs)


def episodes_of(run: Result) -> pd.DataFrame:
    """The table of episodes of a result, or of the folder it was saved in (an evaluation's own, or the run's around it).

    Raises:
        DataError: there is no such table.
    """
    if isinstance(run, EvaluationResult):
        return run.episodes
    found = next((path for path in (Path(run) / "episodes.csv.gz", Path(run) / "evaluation" / "episodes.csv.gz") if path.is_file()), None)
    if found is None:
        raise DataError(f"{run} holds no evaluation (episodes.csv.gz); run 'amd-fast evaluate {run}' first")
    table = pd.read_csv(found, keep_default_na=False, dtype={"condition": str, "classes": str, "clips": str})
    if not {"condition", "episode", "classes", "clips"} <= set(table.columns):
        raise DataError(f"{found} was written by another version (its columns are {', '.join(table.columns)}); evaluate again")
    return table


def shared_conditions(tables: Mapping[str, Sequence[pd.DataFrame]]) -> list[str]:
    """Conditions that all tables hold, in the first one's order.

    Raises:
        DataError: there is none.
    """
    held = {name: [set(table["condition"]) for table in runs] for name, runs in tables.items()}
    common = set.intersection(*(each for runs in held.values() for each in runs))
    first = next(iter(tables.values()))[0]
    shared = [name for name in dict.fromkeys(first["condition"]) if name in common]
    if not shared:
        each = "; ".join(f"{name}: {', '.join(sorted(set.union(*runs)))}" for name, runs in held.items())
        raise DataError(f"compare found no condition that all runs hold ({each}); evaluate them with the same settings")
    return shared


def _first_difference(parts: Mapping[str, Sequence[pd.DataFrame]]) -> str:
    """Says where runs were scored on different episodes; "" where all are the same."""
    runs = [(name, run) for name, each in parts.items() for run in each]
    name, first = runs[0]
    for other, run in runs[1:]:
        count = min(len(first), len(run))
        differing = first["clips"].to_numpy()[:count] != run["clips"].to_numpy()[:count]
        if differing.any():
            row = int(differing.argmax())
            return (
                f"{name!r} and {other!r} were scored on different episodes; the first that differs is episode {row} "
                f"({first['classes'].iloc[row]} in {name!r}, {run['classes'].iloc[row]} in {other!r}; "
                f"{int(differing.sum())} of {count} differ)"
            )
        if len(first) != len(run):
            return f"{name!r} has {len(first)} episodes and {other!r} {len(run)}; the first that only one has is episode {count}"
    return ""


def _accuracy(run: pd.DataFrame, method: str) -> Floats:
    name = f"accuracy_{method}"
    if name not in run.columns:
        held = ", ".join(column.removeprefix("accuracy_") for column in run.columns if column.startswith("accuracy_"))
        raise DataError(f"a run has no method {method!r}; it has {held}")
    return 100 * run[name].to_numpy(dtype=np.float64)


def _compare_condition(condition: str, runs: Mapping[str, Sequence[Floats]], paired: bool) -> list[dict[str, object]]:
    same_length = {name: len({len(run) for run in each}) == 1 for name, each in runs.items()}
    values = {name: np.mean(each, axis=0) if same_length[name] else np.concatenate(each) for name, each in runs.items()}
    together, note = list(values.values()), "" if paired else UNPAIRED
    rows = []
    if paired:
        rows.append(_anova_row(condition, "repeated-measures ANOVA", values, statistics.anova_repeated(np.stack(together, axis=1)), ""))
        note_one_way = "takes the episodes for independent of each other, so finds less"
    else:
        note_one_way = note
    rows.append(_anova_row(condition, "one-way ANOVA", values, statistics.anova_one_way(together), note_one_way))
    test = statistics.paired_t if paired else statistics.welch_t
    rows += _pair_rows(condition, "paired t" if paired else "Welch t", values, test, note)
    if all(len(each) > 1 for each in runs.values()):
        means = {name: np.array([run.mean() for run in each]) for name, each in runs.items()}
        rows += _pair_rows(condition, "Welch t over seeds", means, statistics.welch_t, "the seed is the unit")
    return rows


def _anova_row(condition: str, name: str, values: Mapping[str, Floats], anova: statistics.Anova, note: str) -> dict[str, object]:
    return {
        "condition": condition, "test": name, "a": ", ".join(values), "b": "", "difference": math.nan, "ci_low": math.nan,
        "ci_high": math.nan, "statistic": anova.f, "df": anova.df_between, "df_error": anova.df_error, "p": anova.p,
        "p_corrected": anova.p_corrected, "effect": anova.effect, "note": "; ".join(filter(None, (note, anova.note))),
    }  # fmt: skip


def _pair_rows(condition: str, name: str, values: Mapping[str, Floats], test: Any, note: str) -> list[dict[str, object]]:
    pairs = list(itertools.combinations(values, 2))
    outcomes: list[statistics.TTest] = [test(values[a], values[b]) for a, b in pairs]
    corrected = statistics.holm([outcome.p for outcome in outcomes])
    return [
        {
            "condition": condition, "test": name, "a": a, "b": b, "difference": o.difference, "ci_low": o.low, "ci_high": o.high,
            "statistic": o.t, "df": o.df, "df_error": math.nan, "p": o.p, "p_corrected": float(p), "effect": o.effect,
            "note": "; ".join(filter(None, (note, o.note))),
        }
        for (a, b), o, p in zip(pairs, outcomes, corrected, strict=True)
    ]  # fmt: skip


def compare_command(runs: list[str], method: str = AMI, output: str | None = None, unpaired: bool = False) -> None:
    """Compare evaluated runs on the same episodes: analyses of variance, paired t-tests with Holm's correction, effect sizes.

    Args:
        runs: NAME=FOLDER of each evaluated run; a name that comes several times stands for training seeds of one system.
        method: Method whose accuracy is compared, such as ami, uniform or rgb.
        output: Folder for comparison.csv, seeds.csv and comparison.json.
        unpaired: Compare runs that were scored on different episodes as well, by unpaired tests.
    """
    named: dict[str, list[Result]] = {}
    for run in runs:
        name, equals, folder = run.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"give each run as NAME=FOLDER, got {run!r}")
        named.setdefault(name, []).append(folder)
    table, seeds = compare(named, method=method, unpaired=unpaired), seed_table(named, methods=(method,))
    if output is not None:
        folder_ = Path(output)
        write_text(folder_ / "comparison.csv", table.to_csv(index=False, lineterminator="\n"))
        write_text(folder_ / "seeds.csv", seeds.to_csv(index=False, lineterminator="\n"))
        content = {"method": method, "runs": named, "tests": jsonable(table), "seeds": jsonable(seeds)}
        write_text(folder_ / "comparison.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    print_seeds(seeds)
    _print(table)


def print_seeds(table: pd.DataFrame) -> None:
    """The table of :func:`~amd_fast.evaluation.seeds.seed_table`, condition by condition."""
    for condition, rows in table.groupby("condition", sort=False):
        shown = Table(title=f"accuracy, %: {condition}")
        for name in ("system", "method", "seeds", "episodes", "accuracy", "sd of seeds", "sd of episodes"):
            shown.add_column(name, justify="left" if name in ("system", "method") else "right")
        for row in rows.to_dict("records"):
            half = (float(row["ci_high"]) - float(row["ci_low"])) / 2
            spread = NOTHING if math.isnan(row["sd_seeds"]) else f"{row['sd_seeds']:.2f}"
            cells = [str(row[name]) for name in ("system", "method", "seeds", "episodes")]
            shown.add_row(*cells, f"{row['accuracy']:.1f} ± {half:.1f}", spread, f"{row['sd_episodes']:.1f}")
        console.print(shown)


def _print(table: pd.DataFrame) -> None:
    for condition, rows in table.groupby("condition", sort=False):
        shown = Table(title=f"tests, differences in points: {condition}")
        for name in ("test", "difference", "t or F", "p", "corrected", "effect"):
            shown.add_column(name, justify="left" if name == "test" else "right", min_width=17 if name == "test" else None)
        for row in rows.to_dict("records"):
            name = f"{row['test']}: {row['a']} - {row['b']}" if row["b"] else str(row["test"])
            gap = f"{signed(row['difference'])} ({signed(row['ci_low'])} to {signed(row['ci_high'])})" if row["b"] else ""
            shown.add_row(name, gap, f"{row['statistic']:.2f}", p_value(row["p"]), p_value(row["p_corrected"]), f"{row['effect']:.3f}")
        console.print(shown)
