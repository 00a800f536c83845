"""Tables of the report: how each kind of number is written."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

NOTHING = "–"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Columns of tables made elsewhere, as they are named in the page.
LABELS = {
    "accuracy": "accuracy, %",
    "ci95": "± 95 %, points",
    "difference": "difference, points",
    "p_holm": "p (Holm)",
    "macro_f1": "macro F1, %",
    "p_corrected": "p (corrected)",
    "cohen_dz": "Cohen's dz",
}


@dataclass(frozen=True)
class Row:
    """A row of written cells; ``strong`` rows are set off."""

    cells: list[str]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table ready to be set: headers with whether they stand over numbers, and rows in groups with a heading or ""."""

    headers: list[tuple[str, bool]]
    groups: list[tuple[str, list[Row]]]
    caption: str = ""
    folded: str | None = None


def table_of(
    frame: pd.DataFrame, *, strong: str | None = None, group: str | None = "condition", caption: str = "", folded: str | None = None,
    digits: int | None = None,
) -> Table:  # fmt: skip
    """Write a data frame.

    Args:
        frame: Column names tell how numbers are written: percentages with one decimal, differences with a sign, p values in powers of ten.
        strong: First cell of rows to be set off.
        group: Column whose value becomes a heading over the rows that share it, where there is such a column.
        caption: Line over the table.
        folded: Title under which the table is folded away; None leaves it open.
        digits: Significant digits of numbers whose column says nothing else.
    """
    grouped = group is not None and group in frame.columns
    columns = [c for c in frame.columns if not grouped or c != group]
    headers = [(LABELS.get(str(c), str(c).replace("_", " ")), _is_numeric(frame[c])) for c in columns]
    groups: dict[str, list[Row]] = {}
    for record in frame.to_dict("records"):
        heading = str(record[group]) if grouped else ""
        cells = [_written(label, record[c], digits) for c, (label, _) in zip(columns, headers, strict=True)]
        groups.setdefault(heading, []).append(Row(cells, strong is not None and str(record[columns[0]]) == strong))
    return Table(headers, list(groups.items()), caption, folded)


def _is_numeric(column: pd.Series) -> bool:
    """Numbers, and texts made of them such as "81.2 ± 0.4", stand right."""
    if pd.api.types.is_numeric_dtype(column):
        return True
    return any(sign in str(v) for v in column for sign in (" ± ", " to ")) and all(str(v)[:1] in "+−–0123456789" for v in column)


def _written(label: str, value: Any, digits: int | None) -> str:
    if value is None or value is pd.NA or (isinstance(value, float | np.floating) and math.isnan(value)):
        return NOTHING
    if not isinstance(value, numbers.Number) or isinstance(value, bool | np.bool_):
        return {"ami": "AMI", "uniform": "uniform fusion"}.get(str(value), str(value))
    if isinstance(value, numbers.Integral):
        return number(int(value))
    real = float(value)  # type: ignore[arg-type]
    if label.startswith("difference"):
        return signed(real)
    if label == "p" or label.startswith("p ("):
        return p_value(real)
    if "%" in label:
        return percent(real)
    if label.startswith("AUC"):
        return auc(real)
    if label in ("df", "df error"):
        return f"{real:,.0f}".replace(",", " ") if real == round(real) else f"{real:.1f}"
    if not math.isfinite(real):
        return "∞" if real > 0 else "−∞"
    text = f"{real:.{digits}g}" if digits else f"{real:.1f}" if label == "t" else f"{real:.3f}" if abs(real) < 10 else f"{real:.1f}"
    return text.replace("-", "−")


def number(value: int) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u202f").replace("-", "−")


def percent(value: float) -> str:
    """A percentage with one decimal."""
    return NOTHING if math.isnan(value) else f"{value:.1f}".replace("-", "−")


def signed(value: float) -> str:
    """A difference with its sign; one decimal, two below a tenth."""
    if math.isnan(value):
        return NOTHING
    text = f"{value:+.1f}" if abs(value) >= 0.1 or value == 0 else f"{value:+.2f}"
    return text.replace("-", "−").replace("+0.00", "0.0").replace("−0.00", "0.0").replace("+0.0", "0.0", int(value == 0))


def auc(value: float) -> str:
    """An area under a curve with three decimals."""
    return NOTHING if math.isnan(value) else f"{value:.3f}"


def p_value(value: float) -> str:
    """A p value: three decimals down to 0.001, powers of ten below."""
    if math.isnan(value):
        return NOTHING
    if value < 1e-300:
        return "< 10⁻³⁰⁰"
    if value >= 0.001:
        return f"{value:.3f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"


def accuracy_text(mean: float, half_width: float) -> str:
    """A percentage and its interval."""
    return percent(mean) if math.isnan(half_width) else f"{percent(mean)} ± {half_width:.1f}"


def other_run_remark(table: pd.DataFrame) -> str:
    """Says in words where this run beats another one it was compared with, and where the other beats it (p < 0.05, paired t-test).

    Rows of another run are those whose variant reads "run: method"; other rows are left out. Empty where there is no such row.
    """
    rows = table[table["variant"].astype(str).str.contains(": ", regex=False)]
    remarks = []
    for run, part in rows.groupby(rows["variant"].astype(str).str.split(": ").str[0], sort=False):
        clear = part[part["p"] < 0.05]
        ahead, behind = (_named(clear[clear["difference"] * sign > 0]) for sign in (-1, 1))
        remarks.append(
            f"Against the run \u201c{run}\u201d this one gains in {ahead or 'nothing'}, and loses in {behind or 'nothing'}; "
            f"the other {len(part) - len(clear)} of {len(part)} differences are within chance (p of 0.05 or more)."
        )
    return " ".join(remarks)


def _named(rows: pd.DataFrame) -> str:
    return "; ".join(
        f"{str(variant).split(': ')[-1]} ({condition}, {abs(difference):.1f} points)"
        for variant, condition, difference in zip(rows["variant"], rows["condition"], rows["difference"], strict=True)
    )
