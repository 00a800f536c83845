"""Charts of the report as SVG to be placed inside HTML.

Matplotlib draws them with stand-in colours, which are then replaced by CSS variables of the page (``--ink``, ``--ami``, ``--view-1`` ...):
the same file is right in light mode, in dark mode and on paper. Text stays text, backgrounds stay transparent, and equal input gives equal
bytes.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from amd_fast.evaluation.metrics import Calibration

P = ParamSpec("P")

# Stand-in colour -> CSS variable.
INK, SOFT, GRID, CHANCE, HEAT = "#010101", "#020202", "#030303", "#040404", "#050505"
AMI, UNIFORM, JOINT, OTHER = "#0a0a0a", "#0b0b0b", "#0c0c0c", "#0d0d0d"
VIEW_COLOURS = ("#1a0000", "#1b0000", "#1c0000", "#1d0000", "#1e0000", "#1f0000")
VARIABLES = {
    INK: "ink", SOFT: "soft", GRID: "grid", CHANCE: "chance", HEAT: "heat", AMI: "ami", UNIFORM: "uniform", JOINT: "joint", OTHER: "other",
    **{c: f"view-{i + 1}" for i, c in enumerate(VIEW_COLOURS)},
}  # fmt: skip
FONT = "DejaVu Sans"  # comes with matplotlib; the page's own font takes its place
WIDTH = 4.7  # inches; 338 units of the drawing, legible on a phone
MAX_LABEL = 26
SMOOTH_ABOVE = 40  # points of a training curve above which a moving average is drawn over it
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "amd_fast", "text.parse_math": False, "font.family": FONT, "font.size": 9.5,
    "text.color": INK, "axes.labelcolor": SOFT, "axes.edgecolor": GRID, "xtick.color": SOFT, "ytick.color": INK,
    "axes.labelsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 9.5, "legend.fontsize": 9, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.8, "xtick.major.size": 0, "ytick.major.size": 0, "lines.solid_capstyle": "round",
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip


def colour_of(method: str, views: Sequence[str]) -> str:
    """Stand-in colour of a method or view: AMI, uniform fusion and the joint view have their own, the others by their place."""
    named = {"ami": AMI, "uniform": UNIFORM, "joint": JOINT}
    if method in named:
        return named[method]
    alone = [v for v in views if v != "joint"]
    return VIEW_COLOURS[alone.index(method) % len(VIEW_COLOURS)] if method in alone else OTHER


def variable_of(method: str, views: Sequence[str]) -> str:
    """Name of the CSS variable behind ``colour_of``."""
    return VARIABLES[colour_of(method, views)]


def _chart(draw: Callable[P, tuple[Figure, str]]) -> Callable[P, str]:
    """Runs a drawing function under the report's style and turns its (figure, description) into SVG."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> str:
        with mpl.rc_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # only measured in this font, never drawn with it
            mpl.rcdefaults()
            mpl.rcParams.update(STYLE)
            return _svg(*draw(*args, **kwargs))

    return wrapper


def _svg(figure: Figure, description: str) -> str:
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", lambda m: f"{m[1]}: var(--{VARIABLES[m[2]]})" if m[2] in VARIABLES else m[0], text)
    text = re.sub(rf"font-family: '?{FONT}'?[^;\"]*", "font-family: var(--font)", text)
    # Inside a page, the drawing's own style sheet would hold for the whole page.
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[0-9.]+pt"', "", text, count=2)
    label = description.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def number_ids(svg: str, prefix: str) -> str:
    """Makes the ids of a drawing unique in the page that holds several."""
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    return re.sub(r'href="#', f'href="#{prefix}-', svg)


def short(name: str, limit: int = MAX_LABEL) -> str:
    """A name cut to fit beside an axis."""
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _plain_axes(figure: Figure, grid: str = "x") -> Axes:
    axes = figure.add_subplot()
    axes.grid(visible=False, axis="y" if grid == "x" else "x")
    return axes


@_chart
def accuracy_chart(
    names: Sequence[str],
    accuracy: Sequence[float],
    half_width: Sequence[float],
    *,
    chance: float,
    views: Sequence[str],
    limits: tuple[float, float],
) -> tuple[Figure, str]:
    """Accuracy and 95 % interval of each method, in percent, one row each, over the line of chance."""
    figure = Figure(figsize=(WIDTH, 0.29 * len(names) + 0.62), layout="constrained")
    axes = _plain_axes(figure)
    rows = np.arange(len(names))[::-1]
    colours = [colour_of(n, views) for n in names]
    half = np.nan_to_num(np.asarray(half_width, dtype=float))
    axes.axvline(chance, color=CHANCE, linewidth=1.2, linestyle=(0, (3, 3)))
    axes.hlines(rows, np.asarray(accuracy) - half, np.asarray(accuracy) + half, colors=colours, linewidth=3, alpha=0.45)
    axes.scatter(accuracy, rows, c=colours, s=[52 if n == "ami" else 34 for n in names], zorder=3)
    for row, value, width in zip(rows, accuracy, half_width, strict=True):
        text = f"{value:.1f}" if np.isnan(width) else f"{value:.1f} ± {width:.1f}"
        axes.text(1.03, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5)
    axes.set_yticks(rows, [_label(n) for n in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(*limits)
    axes.set_xlabel("accuracy, %")
    return figure, "Accuracy: " + ", ".join(f"{n} {a:.1f} %" for n, a in zip(names, accuracy, strict=True)) + f"; chance {chance:.1f} %"


def _label(method: str) -> str:
    return {"ami": "AMI", "uniform": "uniform fusion"}.get(method, short(method, 38))


@_chart
def curves_chart(series: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], ylabel: str, views: Sequence[str]) -> tuple[Figure, str]:
    """Lines over training steps, name -> (steps, values); long ones with a moving average over the raw values."""
    figure = Figure(figsize=(WIDTH, 2.75), layout="constrained")
    axes = _plain_axes(figure, grid="y")
    fallback = iter([*VIEW_COLOURS, OTHER] * 4)
    everything = np.concatenate([y for _, y in series.values()])
    for name, (steps, values) in series.items():
        colour = colour_of(name, views)
        colour = next(fallback) if colour == OTHER else colour
        width = 2.4 if name in ("ami", "total") else 1.5
        if len(values) > SMOOTH_ABOVE:
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
            values = pd.Series(values).rolling(len(values) // 15, center=True, min_periods=1).mean().to_numpy()
        axes.plot(steps, values, color=colour, linewidth=width, label=_label(name), marker="o" if len(values) == 1 else None)
    low, high = float(everything.min()), float(np.quantile(everything, 0.995))
    margin = 0.06 * (high - low or 1.0)
    axes.set_ylim(low - margin, high + margin)
    axes.set_xlabel("training step")
    axes.set_ylabel(ylabel)
    figure.legend(loc="outside upper left", ncols=3, handlelength=1.2, columnspacing=1.2)
    return figure, f"{ylabel} over training steps: {', '.join(series)}"


@_chart
def confusion_chart(table: pd.DataFrame) -> tuple[Figure, str]:
    """Confusion matrix in percent, rows true, columns predicted; NaN (the two never met) is left empty."""
    values, names = table.to_numpy(dtype=float), [short(str(n), 22) for n in table.index]
    count = len(names)
    side = max(2.6, min(0.27 * count + 0.4, 7.0))
    figure = Figure(figsize=(side + 1.7, side + 1.3), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(visible=False)
    size = 8.0 if count <= 20 else max(4.5, 160 / count)
    cells = list(zip(*np.nonzero(~np.isnan(values)), strict=True))
    boxes = [Rectangle((j - 0.46, i - 0.46), 0.92, 0.92) for i, j in cells]
    shades = [to_rgba(HEAT, round(float(0.04 + 0.0076 * values[cell]), 3)) for cell in cells]
    axes.add_collection(PatchCollection(boxes, facecolors=shades, linewidths=0))
    for i, j in cells if count <= 24 else ():
        if values[i, j] >= 0.5:
            colour = INK if i == j or values[i, j] > 20 else SOFT
            text = axes.text(j, i, f"{values[i, j]:.0f}", ha="center", va="center", fontsize=size, color=colour)
            text.set_in_layout(False)  # it lies inside the axes; measuring hundreds of them takes seconds
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xticks(range(count), names, rotation=55, ha="right", rotation_mode="anchor", fontsize=size + 0.5)
    axes.set_yticks(range(count), names, fontsize=size + 0.5)
    axes.tick_params(axis="x", labelcolor=INK)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlabel("taken for")
    axes.set_ylabel("true class")
    return figure, f"Confusion matrix of {count} classes, in percent of the queries for which the column's class was an answer"


@_chart
def policy_chart(groups: Mapping[str, NDArray[np.floating]], damaged: Mapping[str, str], views: Sequence[str]) -> tuple[Figure, str]:
    """Distribution of the policy over the views, for groups of queries.

    Args:
        groups: Name of the group -> policy [n, V].
        damaged: Name of the group -> its damaged modality, "" where clean; that one is drawn as a cross.
        views: Names of the V views.
    """
    figure = Figure(figsize=(WIDTH, len(groups) * (0.16 * len(views) + 0.16) + 0.95), layout="constrained")
    axes = _plain_axes(figure)
    for row, (name, policy) in enumerate(groups.items()):
        for i, view in enumerate(views):
            y, colour = row + (i - (len(views) - 1) / 2) * (0.78 / len(views)), colour_of(view, views)
            low, first, median, third, high = np.quantile(policy[:, i] * 100, [0.1, 0.25, 0.5, 0.75, 0.9])
            axes.hlines(y, low, high, colors=colour, linewidth=1.2, alpha=0.6)
            axes.hlines(y, first, third, colors=colour, linewidth=4.5, alpha=0.45)
            axes.scatter(median, y, color=colour, s=30, zorder=3, marker="X" if damaged[name] == view else "o", linewidths=0)
        if row:
            axes.axhline(row - 0.5, color=GRID, linewidth=0.8)
    axes.set_yticks(range(len(groups)), [short(n) for n in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("trust (policy mass), %")
    handles = [Line2D([], [], color=colour_of(v, views), marker="o", linewidth=3, label=v) for v in views]
    handles.append(Line2D([], [], color=SOFT, marker="X", linewidth=0, markeredgewidth=0, label="damaged"))
    figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=1.2, columnspacing=1.2)
    return figure, "Trust in each view, by known damage: median, middle half and 10 to 90 % of the queries"


@_chart
def class_chart(table: pd.DataFrame, views: Sequence[str], chance: float) -> tuple[Figure, str]:
    """Accuracy per class as a dot plot; ``table`` has classes as index, one column per method, in percent, best class first."""
    figure = Figure(figsize=(WIDTH, 0.215 * len(table) + 1.0), layout="constrained")
    axes = _plain_axes(figure)
    rows = np.arange(len(table))
    axes.axvline(chance, color=CHANCE, linewidth=1.2, linestyle=(0, (3, 3)))
    low, high = table.min(axis=1).to_numpy(), table.max(axis=1).to_numpy()
    axes.hlines(rows, low, high, colors=GRID, linewidth=1.6)
    for method in table.columns:
        leading = method == "ami"
        axes.scatter(
            table[method], rows, color=colour_of(method, views), s=46 if leading else 17, zorder=4 if leading else 3,
            alpha=1 if leading else 0.75, linewidths=0, label=_label(method),
        )  # fmt: skip
    axes.set_yticks(rows, [short(str(n)) for n in table.index])
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.set_xlim(min(0.0 if np.isnan(low).all() else float(np.nanmin(low)), chance) - 3, 103)
    axes.set_xlabel("accuracy, %")
    figure.legend(loc="outside upper left", ncols=5, handletextpad=0.1, columnspacing=0.8)
    return figure, f"Accuracy of each of {len(table)} classes by method"


@_chart
def calibration_chart(diagrams: Mapping[str, Calibration], views: Sequence[str]) -> tuple[Figure, str]:
    """Reliability diagram: accuracy over confidence of each method; the diagonal is perfect."""
    height = 3.0
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.125, 0.16, 0.8 * height / WIDTH, 0.8))  # a square, the legend to its right
    axes.plot([0, 100], [0, 100], color=CHANCE, linewidth=1.2, linestyle=(0, (3, 3)))
    for method, diagram in diagrams.items():
        filled, leading = diagram.queries > 0, method == "ami"
        x, y = diagram.confidence[filled] * 100, diagram.accuracy[filled] * 100
        colour = colour_of(method, views)
        look: dict[str, Any] = {"color": colour, "alpha": 1 if leading else 0.6, "zorder": 4 if leading else 3}
        axes.plot(x, y, linewidth=1.6 if leading else 1.0, label=f"{_label(method)} ({diagram.error * 100:.1f})", **look)
        size = 6 + 90 * np.sqrt(diagram.queries[filled] / max(diagram.queries.sum(), 1))
        axes.scatter(x, y, s=size * (0.9 if leading else 0.45), linewidths=0, **look)
    axes.set_xlim(0, 102)
    axes.set_ylim(0, 102)
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0.63, 0.98)}
    figure.legend(title="calibration error, %", alignment="left", fontsize=8, title_fontsize=8, handlelength=0.9, **place)
    return figure, "Reliability diagram: " + ", ".join(f"{m} error {d.error * 100:.1f} %" for m, d in diagrams.items())
