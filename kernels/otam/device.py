"""Device code of OTAM's soft alignment: one pair of sequences per thread.

A program takes ``PAIRS`` pairs and walks over the columns of their distance matrices. The state of the recursion, one number per
query frame, is a tuple of vectors over the pairs: everything stays in registers and no thread needs another's. The work per
distance is one exponential and one logarithm, so that the kernel is bound by reading the distances, which it does once. The
formulas stand in ``reference.py``.
"""

# ruff: noqa: RUF005  (Triton compiles sums of tuples, not stars)
# Tuples grow while the compiler unrolls a loop.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _log_add(x, y):
    """ln(exp x + exp y); -inf for two of them."""
    peak = tl.maximum(x, y)
    difference = tl.minimum(x, y) - peak
    return tl.where(peak == float("-inf"), peak, peak + tl.log(1.0 + tl.exp(difference)))


@triton.jit
def _log_w(distances, place, exists, scale):
    """Ln W of one cell of every pair; 0 beyond the last pair."""
    return tl.load(distances + place, mask=exists, other=0.0) * scale


@triton.jit
def _pairs(query_frames, support_frames, pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LENGTHS: tl.constexpr, PAIRS: tl.constexpr):
    """Numbers of this program's pairs, which of them exist, and how many rows and columns of each count."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    exists = pair < pairs
    if LENGTHS:
        rows = tl.load(query_frames + pair, mask=exists, other=0).to(tl.int32)
        columns = tl.load(support_frames + pair, mask=exists, other=0).to(tl.int32)
    else:
        rows = tl.full([PAIRS], ROWS, tl.int32)
        columns = tl.full([PAIRS], COLUMNS, tl.int32)
    return pair, exists, rows, columns


@triton.jit
def _first_column(distances, base, exists, scale, row_stride, ROWS: tl.constexpr, ACC: tl.constexpr):
    """Ln A of the first column, from the top down: A(l) = W(l) (2 + A(l - 1))."""
    last = _log_w(distances, base, exists, scale)
    state = (last,)
    for row in tl.static_range(1, ROWS):
        last = _log_w(distances, base + row * row_stride, exists, scale) + _log_add(last, tl.full(last.shape, LN2, ACC))
        state = state + (last,)
    return state


@triton.jit
def _next_column(state, distances, base, exists, scale, row_stride, counts, ROWS: tl.constexpr):
    """Ln A of a column from the one before it; where the column does not count it is the one before it."""
    here = (tl.where(counts, _log_w(distances, base, exists, scale) + state[0], state[0]),)
    for row in tl.static_range(1, ROWS):
        value = _log_w(distances, base + row * row_stride, exists, scale) + _log_add(state[row - 1], state[row])
        here = here + (tl.where(counts, value, state[row]),)
    return here


@triton.jit
def _end_weights(rows, ROWS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr):
    """Logarithm of the number of ways in which an alignment can end in a row: two, one in the last row, none below it."""
    weights = ()
    for row in tl.static_range(0, ROWS):
        two = tl.full([PAIRS], LN2, ACC)  # a bare constant would be rounded to float32
        weights = weights + (tl.where(row < rows - 1, two, tl.where(row == rows - 1, 0.0, float("-inf"))),)
    return weights


@triton.jit
def _log_total(state, weights, ROWS: tl.constexpr):
    """Ln Z."""
    total = state[0] + weights[0]
    for row in tl.static_range(1, ROWS):
        total = _log_add(total, state[row] + weights[row])
    return total


@triton.jit(do_not_specialize=["pairs"])
def otam_forward(
    distances, query_frames, support_frames, cost, columns,
    pairs, pair_stride, row_stride, column_stride, smoothing: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LENGTHS: tl.constexpr, KEEP: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Costs of ``PAIRS`` pairs; where asked to ``KEEP`` them, ln A of all cells instead. Grid: (pairs / PAIRS)."""
    pair, exists, rows, counted = _pairs(query_frames, support_frames, pairs, ROWS, COLUMNS, LENGTHS, PAIRS)
    scale = tl.full([PAIRS], -1.0 / smoothing, ACC)
    base = pair * pair_stride
    out = columns + pair * (ROWS * COLUMNS)
    state = _first_column(distances, base, exists, scale, row_stride, ROWS, ACC)
    if KEEP:
        for row in tl.static_range(0, ROWS):
            tl.store(out + row * COLUMNS, state[row], mask=exists)
    for column in range(1, COLUMNS):
        state = _next_column(state, distances, base + column * column_stride, exists, scale, row_stride, column < counted, ROWS)
        if KEEP:
            for row in tl.static_range(0, ROWS):
                tl.store(out + row * COLUMNS + column, state[row], mask=exists)
    if not KEEP:
        total = _log_total(state, _end_weights(rows, ROWS, PAIRS, ACC), ROWS)
        tl.store(cost + pair, tl.where((rows > 0) & (counted > 0), total / scale, 0.0), mask=exists)


@triton.jit(do_not_specialize=["pairs"])
def otam_backward(
    grad_cost, distances, query_frames, support_frames, grad_distances,
    pairs, pair_stride, row_stride, column_stride, smoothing: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LENGTHS: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of ``PAIRS`` pairs' distances, in the place of the ln A that the forward kernel left there. Grid: (pairs / PAIRS)."""
    pair, exists, rows, counted = _pairs(query_frames, support_frames, pairs, ROWS, COLUMNS, LENGTHS, PAIRS)
    scale = tl.full([PAIRS], -1.0 / smoothing, ACC)
    base = pair * pair_stride
    out = grad_distances + pair * (ROWS * COLUMNS)
    back = _end_weights(rows, ROWS, PAIRS, ACC)
    total = tl.load(out + COLUMNS - 1, mask=exists, other=0.0) + back[0]
    for row in tl.static_range(1, ROWS):
        total = _log_add(total, tl.load(out + row * COLUMNS + COLUMNS - 1, mask=exists, other=0.0) + back[row])
    total = tl.where(total == float("-inf"), 0.0, total)
    share = tl.load(grad_cost + pair, mask=exists, other=0.0)
    share = tl.where((rows > 0) & (counted > 0), share, 0.0)
    for step in range(1, COLUMNS):
        column = COLUMNS - step
        counts = column < counted
        top = base + column * column_stride
        before = ()
        below = total
        for up in tl.static_range(0, ROWS):  # from the bottom up, so that what a row passes on is at hand for the row above
            place = out + (ROWS - 1 - up) * COLUMNS + column
            old = back[ROWS - 1 - up]
            passed = tl.exp(tl.load(place, mask=exists, other=0.0) + old - total)
            tl.store(place, tl.where(counts & (share != 0.0), passed * share, 0.0), mask=exists)
            moved = _log_w(distances, top + (ROWS - 1 - up) * row_stride, exists, scale) + old
            joined = _log_add(moved, below) if up > 0 else moved
            before = (tl.where(counts, joined, old),) + before
            below = moved
        back = before
    # In the first column a cell also passes its sum on to the one below.
    below = back[ROWS - 1]
    for up in tl.static_range(0, ROWS):
        if up > 0:
            passed_on = _log_w(distances, base + (ROWS - up) * row_stride, exists, scale) + below
            below = _log_add(back[ROWS - 1 - up], passed_on)
        place = out + (ROWS - 1 - up) * COLUMNS
        passed = tl.exp(tl.load(place, mask=exists, other=0.0) + below - total)
        tl.store(place, tl.where(share != 0.0, passed * share, 0.0), mask=exists)
