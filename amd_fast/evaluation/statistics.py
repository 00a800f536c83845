"""Intervals, paired and unpaired tests, and analysis of variance.

The unit of every test is the *episode*: queries of one episode share its support clips and so are not independent of each other.
Tests come from scipy and statsmodels; the one formula written out here is the repeated-measures ANOVA, because statsmodels'
``AnovaRM`` builds a design matrix with a column per episode and cannot take thousands of them (a test holds the two equal).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from amd_fast.errors import DataError

Floats = NDArray[np.floating]
NORMAL_95 = 1.959963984540054  # 97.5th percentile of the standard normal distribution
BOOTSTRAP_RESAMPLES = 2000
TOO_FEW = "needs at least two episodes"


class Interval(NamedTuple):
    """A mean and its 95 % interval; the bounds are NaN for a single episode."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the length of the interval, the number after the +-."""
        return (self.high - self.low) / 2


class TTest(NamedTuple):
    """Outcome of a two-sample t-test. ``difference`` is mean(a) - mean(b); ``effect`` is Cohen's dz (paired) or d (unpaired)."""

    difference: float
    low: float
    high: float
    t: float
    df: float
    p: float
    effect: float
    note: str


class Anova(NamedTuple):
    """Outcome of an analysis of variance. ``effect`` is (partial) eta squared; ``p_corrected`` the Greenhouse-Geisser p or NaN."""

    f: float
    df_between: float
    df_error: float
    p: float
    p_corrected: float
    effect: float
    note: str


def mean_interval(values: Floats) -> Interval:
    """Mean of per-episode values [E] with the normal 95 % interval, mean +- 1.96 s/sqrt(E), s with E - 1 degrees of freedom.

    It covers the accuracy that infinitely many episodes *of the same clips* would have. Episodes share clips, so for clips nobody has
    seen it is too narrow, however many episodes are drawn.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = NORMAL_95 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def bootstrap_interval(values: Floats, *, resamples: int = BOOTSTRAP_RESAMPLES, seed: int = 0) -> Interval:
    """Mean of per-episode values [E] with the percentile bootstrap 95 % interval over episodes; a function of its arguments alone.

    Accuracies of an episode take few distinct values, so a resample is drawn as one multinomial sample of their counts: the same
    distribution as drawing E episodes with replacement, without E x resamples draws.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    levels, counts = np.unique(values, return_counts=True)
    draws = np.random.Generator(np.random.PCG64(seed)).multinomial(len(values), counts / len(values), size=resamples)
    low, high = np.quantile(draws @ levels / len(values), [0.025, 0.975])
    return Interval(mean, float(low), float(high))


def paired_t(a: Floats, b: Floats) -> TTest:
    """Two-sided paired t-test of per-episode values a, b [E] (``scipy.stats.ttest_rel``) with Cohen's dz = mean(a-b)/std(a-b).

    Equal in every episode gives t = 0, p = 1; a constant difference, which has no variance to test, p = 0 with a note.
    Raises DataError where the lengths differ.
    """
    from scipy import stats

    if len(a) != len(b):
        raise DataError(f"paired t-test of {len(a)} against {len(b)} episodes: it needs the same ones; use welch_t instead")
    gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    mean, df = float(gap.mean()), len(gap) - 1
    if df < 1:
        return TTest(mean, math.nan, math.nan, math.nan, df, math.nan, math.nan, TOO_FEW)
    if np.ptp(gap) == 0:
        if mean == 0:
            return TTest(0.0, 0.0, 0.0, 0.0, df, 1.0, 0.0, "equal in every episode")
        return TTest(mean, mean, mean, math.copysign(math.inf, mean), df, 0.0, math.copysign(math.inf, mean), "constant difference")
    outcome = stats.ttest_rel(a, b)
    low, high = outcome.confidence_interval(0.95)
    return TTest(mean, float(low), float(high), float(outcome.statistic), df, float(outcome.pvalue), mean / float(gap.std(ddof=1)), "")


def welch_t(a: Floats, b: Floats) -> TTest:
    """Two-sided unpaired t-test with unequal variances of values a [n], b [m] (``scipy.stats.ttest_ind``); d uses the pooled std."""
    from scipy import stats

    mean = float(np.mean(a) - np.mean(b))
    if min(len(a), len(b)) < 2:
        return TTest(mean, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, TOO_FEW)
    pooled = math.sqrt(((len(a) - 1) * np.var(a, ddof=1) + (len(b) - 1) * np.var(b, ddof=1)) / (len(a) + len(b) - 2))
    if pooled == 0:
        p, t = (1.0, 0.0) if mean == 0 else (0.0, math.copysign(math.inf, mean))
        return TTest(mean, mean, mean, t, len(a) + len(b) - 2, p, t, "no variance within either run")
    outcome = stats.ttest_ind(a, b, equal_var=False)
    low, high = outcome.confidence_interval(0.95)
    return TTest(mean, float(low), float(high), float(outcome.statistic), float(outcome.df), float(outcome.pvalue), mean / pooled, "")


def holm(p_values: Sequence[float] | Floats) -> Floats:
    """Holm's step-down correction of a family of p values (``statsmodels.stats.multitest``); NaN stays NaN and is not counted."""
    from statsmodels.stats.multitest import multipletests

    p = np.asarray(p_values, dtype=np.float64)
    corrected = np.full_like(p, np.nan)
    valid = ~np.isnan(p)
    if valid.any():
        corrected[valid] = multipletests(p[valid], method="holm")[1]
    return corrected


def anova_one_way(groups: Sequence[Floats]) -> Anova:
    """One-way ANOVA over independent groups of per-episode values (``scipy.stats.f_oneway``); effect = SS_between / SS_total."""
    from scipy import stats

    if len(groups) < 2 or min(len(g) for g in groups) < 2:
        return Anova(math.nan, len(groups) - 1, math.nan, math.nan, math.nan, math.nan, "needs two groups of two episodes or more")
    everything = np.concatenate(groups)
    grand = everything.mean()
    between = sum(len(g) * (g.mean() - grand) ** 2 for g in groups)
    total = float(((everything - grand) ** 2).sum())
    df = (len(groups) - 1, len(everything) - len(groups))
    if total == 0:
        return Anova(0.0, *df, 1.0, math.nan, 0.0, "all values are equal")
    with warnings.catch_warnings():  # constant groups give F = inf, p = 0: said in the note instead
        warnings.simplefilter("ignore")
        f, p = stats.f_oneway(*groups)
    return Anova(float(f), *df, float(p), math.nan, float(between / total), "" if np.isfinite(f) else "no variance within groups")


def anova_repeated(values: Floats) -> Anova:
    """Repeated-measures ANOVA of ``values [E, k]``: k systems scored on the same E episodes (the subjects).

    F = (SS_systems / (k-1)) / (SS_residual / ((k-1)(E-1))), as ``statsmodels.stats.anova.AnovaRM`` computes it. ``p_corrected`` uses
    Greenhouse and Geisser's epsilon, tr(S)^2 / ((k-1) tr(S^2)) of the double-centred covariance S, for differences of unequal variance.
    """
    from scipy import stats

    values = np.asarray(values, dtype=np.float64)
    episodes, k = values.shape
    if episodes < 2 or k < 2:
        return Anova(math.nan, k - 1, math.nan, math.nan, math.nan, math.nan, "needs two systems and two episodes or more")
    df = (k - 1, (k - 1) * (episodes - 1))
    grand, system, episode = values.mean(), values.mean(axis=0), values.mean(axis=1, keepdims=True)
    ss_system = episodes * float(((system - grand) ** 2).sum())
    ss_residual = float(((values - system - episode + grand) ** 2).sum())
    rounding = 1e-24 * max(float((values**2).sum()), 1.0)
    if ss_residual <= rounding:
        same = ss_system <= rounding
        outcome = (0.0, 1.0, 0.0) if same else (math.inf, 0.0, 1.0)
        return Anova(outcome[0], *df, outcome[1], outcome[1], outcome[2], "equal in every episode" if same else "constant differences")
    f = (ss_system / df[0]) / (ss_residual / df[1])
    centre = np.eye(k) - 1 / k
    spread = centre @ np.atleast_2d(np.cov(values, rowvar=False)) @ centre
    epsilon = min(1.0, float(np.trace(spread) ** 2 / ((k - 1) * (spread**2).sum())))
    corrected = float(stats.f.sf(f, df[0] * epsilon, df[1] * epsilon))
    return Anova(f, *df, float(stats.f.sf(f, *df)), corrected, ss_system / (ss_system + ss_residual), "")
