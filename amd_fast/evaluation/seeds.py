"""Repetition over seeds: how much of the spread of accuracies comes from the seed and how much from the episodes.

Random-effects analysis of variance of the accuracies ``y[s, e]`` of k seeds in E episodes each (Searle, Casella and McCulloch, *Variance
Components*, 1992, chapter 4, balanced data). With MS_s, MS_e and MS_r the mean squares of seeds, episodes and what is left:

* every seed has episodes of its own (episode seeds): ``y = mean + seed + episode``, variances ``(MS_s - MS_e) / E`` and ``MS_e``;
  variance of the mean ``MS_s / kE``, k - 1 degrees of freedom;
* all seeds share the episodes (training seeds): ``y = mean + seed + episode + rest``, variances ``(MS_s - MS_r) / E``,
  ``(MS_e - MS_r) / k`` and ``MS_r``; variance of the mean ``(MS_s + MS_e - MS_r) / kE``, Satterthwaite's degrees of freedom.

A variance estimated below 0 is given as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from amd_fast.errors import DataError
from amd_fast.evaluation.statistics import mean_interval

if TYPE_CHECKING:
    from amd_fast.evaluation.comparison import Result

Floats = NDArray[np.floating]


class SeedSpread(NamedTuple):
    """Mean over seeds with its 95 % interval, and the standard deviations that make it up, in the unit of the values.

    ``seeds`` is NaN for a single seed, from which nothing can be told; ``rest`` (seed and episode together) is NaN where every seed has
    episodes of its own.
    """

    mean: float
    low: float
    high: float
    seeds: float
    episodes: float
    rest: float


def seed_spread(values: Floats, *, same_episodes: bool) -> SeedSpread:
    """Splits the spread of ``values [k, E]``, k seeds of E episodes each.

    Args:
        values: accuracy of each seed in each episode.
        same_episodes: column e is the same episode for every seed.

    Raises:
        DataError: fewer than two episodes.
    """
    from scipy import stats

    values = np.asarray(values, np.float64)
    k, count = values.shape
    if count < 2:
        raise DataError(f"the spread over seeds needs at least two episodes per seed, got {count}")
    mean = float(values.mean())
    if k == 1:
        interval = mean_interval(values[0])
        return SeedSpread(mean, interval.low, interval.high, math.nan, float(values.std(ddof=1)), math.nan)
    of_seeds = count * float(values.mean(1).var(ddof=1))
    if not same_episodes:
        within = float(values.var(axis=1, ddof=1).mean())
        half = float(stats.t.ppf(0.975, k - 1)) * math.sqrt(of_seeds / (k * count))
        return SeedSpread(mean, mean - half, mean + half, _root((of_seeds - within) / count), _root(within), math.nan)
    of_episodes = k * float(values.mean(0).var(ddof=1))
    left = values - values.mean(1, keepdims=True) - values.mean(0) + mean
    rest = float((left**2).sum()) / ((k - 1) * (count - 1))
    total = max(of_seeds + of_episodes - rest, of_seeds, of_episodes)
    spread = of_seeds**2 / (k - 1) + of_episodes**2 / (count - 1) + rest**2 / ((k - 1) * (count - 1))
    df = total**2 / spread if spread > 0 else k - 1.0
    half = float(stats.t.ppf(0.975, df)) * math.sqrt(total / (k * count))
    return SeedSpread(mean, mean - half, mean + half, _root((of_seeds - rest) / count), _root((of_episodes - rest) / k), _root(rest))


def _root(variance: float) -> float:
    return math.sqrt(max(variance, 0.0))


def seed_table(results: Mapping[str, Result | Sequence[Result]], *, methods: Sequence[str] | None = None) -> pd.DataFrame:
    """One row per condition, system and method: accuracy over the seeds and where its spread comes from.

    Args:
        results: Name of each system -> one result or saved folder per seed.
        methods: Methods to show; None: all that every run holds.

    Returns:
        Columns condition, system, method, seeds, episodes (per seed), same_episodes, accuracy, ci_low, ci_high (the interval of the mean
        over seeds), sd_seeds, sd_episodes, sd_rest; in percent and points.

    Raises:
        DataError: runs of one system with different numbers of episodes.
    """
    from amd_fast.evaluation.comparison import as_list, episodes_of, shared_conditions

    tables = {name: [episodes_of(run) for run in as_list(runs)] for name, runs in results.items()}
    rows: list[dict[str, object]] = []
    for condition in shared_conditions(tables):
        for name, runs in tables.items():
            parts = [run[run["condition"] == condition] for run in runs]
            if len({len(part) for part in parts}) > 1:
                raise DataError(
                    f"the runs of {name!r} have {[len(part) for part in parts]} episodes in {condition}; evaluate with the same number"
                )
            same = all((part["clips"].to_numpy() == parts[0]["clips"].to_numpy()).all() for part in parts)
            held = [str(column).removeprefix("accuracy_") for column in parts[0] if str(column).startswith("accuracy_")]
            for method in (
                name for name in held if (methods is None or name in methods) and all(f"accuracy_{name}" in part for part in parts)
            ):
                spread = seed_spread(
                    np.stack([100 * part[f"accuracy_{method}"].to_numpy(np.float64) for part in parts]), same_episodes=same
                )
                rows.append(
                    {
                        "condition": condition, "system": name, "method": method, "seeds": len(parts),
                        "episodes": len(parts[0]), "same_episodes": same, "accuracy": spread.mean, "ci_low": spread.low,
                        "ci_high": spread.high, "sd_seeds": spread.seeds, "sd_episodes": spread.episodes, "sd_rest": spread.rest,
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)
