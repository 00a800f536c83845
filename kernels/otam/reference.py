"""OTAM's soft alignment, defined in plain PyTorch: the log-domain recursion, its gradient, and a faster form for CPUs.

Cao et al., "Few-Shot Video Classification via Temporal Alignment" (CVPR 2020): the distance matrix ``D [Tq, Ts]`` gets a column of
zeros at either end, so that an alignment may begin and end at any query frame, and

    gamma(l, m) = D(l, m) + softmin of  gamma(l-1, m-1), gamma(l, m-1)                     in the inner columns
                                        gamma(l-1, m-1), gamma(l-1, m), gamma(l, m-1)      in the first column of D and the last of zeros
    softmin(x)  = -lambda ln sum exp(-x / lambda)

over the predecessors that exist; the cost is gamma in the last row of the last column.

With A = exp(-gamma / lambda) and W = exp(-D / lambda) the recursion is one of products and sums, and three things follow that all
forms here use. A column needs nothing but the column before it, so it is one step:  A(l, m) = W(l, m) (A(l-1, m-1) + A(l, m-1)).
The first column of zeros is A = 1, so A(l, 1) = W(l, 1) (2 + A(l-1, 1)) below the first row. And the last column sums up to
exp(-cost / lambda) = 2 sum_l A(l, Ts) - A(Tq, Ts). The gradient is the share of the alignments that pass a cell,
A(l, m) B(l, m) / Z with B = dZ/dA from the recursion backwards.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The product form multiplies up to Tq + Ts factors of exp(-|D| / lambda) in float64, which ends at exp(-708).
_LARGEST_EXPONENT = 650.0
_BLOCK = 2048  # pairs taken together by the product form: what it holds then stays in a core's cache


def otam_alignment(distances: Tensor, smoothing: float, query_frames: Tensor | None = None, support_frames: Tensor | None = None) -> Tensor:
    """Cost of the soft alignment, in the log domain.

    Args:
        distances: ``[P, Tq, Ts]`` float32 or float64; +inf forbids a cell.
        smoothing: lambda, positive.
        query_frames, support_frames: ``[P]`` int64, how many leading rows and columns count; None: all of them.

    Returns:
        ``[P]``; 0 for a pair without a row or a column.
    """
    ends = _log_end_weights(distances, query_frames)
    log_a = _log_columns(distances / -smoothing, support_frames)[-1]
    cost = -smoothing * torch.logsumexp(log_a + ends, -1)
    return _without_empty(cost, query_frames, support_frames)


def otam_alignment_backward(
    grad_cost: Tensor, distances: Tensor, smoothing: float, query_frames: Tensor | None = None, support_frames: Tensor | None = None
) -> Tensor:
    """Gradient ``[P, Tq, Ts]`` of the distances; ``grad_cost`` is ``[P]``, the rest as in :func:`otam_alignment`."""
    log_w = distances / -smoothing
    log_a = _log_columns(log_w, support_frames)
    log_b = _log_end_weights(distances, query_frames)
    total = torch.logsumexp(log_a[-1] + log_b, -1, keepdim=True)
    total = torch.where(total == -math.inf, 0.0, total)  # no alignment is allowed: every share below is exp(-inf) = 0
    shares = []
    for column in reversed(range(distances.shape[2])):
        if column == 0:  # a cell of the first column also passes its sum on to the one below
            rows = list(log_b.unbind(-1))
            for row in reversed(range(len(rows) - 1)):
                rows[row] = torch.logaddexp(rows[row], log_w[:, row + 1, 0] + rows[row + 1])
            log_b = torch.stack(rows, -1)
        share = torch.exp(log_a[column] + log_b - total)
        moved = log_w[:, :, column] + log_b
        before = torch.cat([torch.logaddexp(moved[:, :-1], moved[:, 1:]), moved[:, -1:]], -1)
        counts = _counts(column, support_frames)
        shares.append(share if counts is None else torch.where(counts, share, 0.0))
        log_b = before if counts is None else torch.where(counts, before, log_b)
    grad = torch.stack(shares[::-1], -1) * grad_cost[:, None, None]
    return _without_empty(grad, query_frames, support_frames)


def _log_columns(log_w: Tensor, support_frames: Tensor | None) -> list[Tensor]:
    """Ln A of every column, each ``[P, Tq]``; a column that does not count repeats the one before it."""
    rows = [log_w[:, 0, 0]]
    for row in range(1, log_w.shape[1]):
        rows.append(log_w[:, row, 0] + torch.logaddexp(rows[-1], torch.full_like(rows[-1], math.log(2.0))))
    columns = [torch.stack(rows, -1)]
    for column in range(1, log_w.shape[2]):
        last = columns[-1]
        here = log_w[:, :, column] + torch.cat([last[:, :1], torch.logaddexp(last[:, :-1], last[:, 1:])], -1)
        counts = _counts(column, support_frames)
        columns.append(here if counts is None else torch.where(counts, here, last))
    return columns


def _counts(column: int, support_frames: Tensor | None) -> Tensor | None:
    return None if support_frames is None else (column < support_frames)[:, None]


def _log_end_weights(distances: Tensor, query_frames: Tensor | None) -> Tensor:
    """``[P, Tq]``: an alignment that ends in the last row can do so in one way, in the other rows in two."""
    pairs, rows, _ = distances.shape
    row = torch.arange(rows, device=distances.device)
    last = (torch.full((pairs,), rows, device=distances.device) if query_frames is None else query_frames)[:, None] - 1
    ways = distances.new_tensor([math.log(2.0), 0.0, -math.inf])
    return ways[(row >= last).long() + (row > last).long()]


def _without_empty(values: Tensor, query_frames: Tensor | None, support_frames: Tensor | None) -> Tensor:
    """Zeros for pairs without a frame on either side."""
    for frames in (query_frames, support_frames):
        if frames is not None:
            values = torch.where((frames > 0).reshape(-1, *[1] * (values.dim() - 1)), values, 0.0)
    return values


def fits_product_form(distances: Tensor, smoothing: float) -> bool:
    """Whether no product of the fast form can leave float64. Looks at the values: for CPU tensors, where that costs little."""
    if not distances.numel():
        return True
    least, most = distances.aminmax()
    largest = max(-float(least), float(most)) / smoothing  # NaN compares as False below
    return largest * sum(distances.shape[1:]) <= _LARGEST_EXPONENT


def otam_alignment_products(
    distances: Tensor, smoothing: float, query_frames: Tensor | None = None, support_frames: Tensor | None = None
) -> Tensor:
    """The same cost by products in float64: no exponential or logarithm inside the recursion. Needs :func:`fits_product_form`."""
    cost = distances.new_empty(len(distances))
    for first in range(0, len(distances), _BLOCK):
        here = slice(first, first + _BLOCK)
        w = _factors(distances[here], smoothing)
        a = _product_columns(w, None if support_frames is None else support_frames[here], keep=False)[0]
        ends = _end_weights(w, None if query_frames is None else query_frames[here])
        cost[here] = torch.log((a * ends).sum(0)).mul_(-smoothing)
    return _without_empty(cost, query_frames, support_frames)


def otam_alignment_products_backward(
    grad_cost: Tensor, distances: Tensor, smoothing: float, query_frames: Tensor | None = None, support_frames: Tensor | None = None
) -> Tensor:
    """The same gradient by products in float64."""
    w = _factors(distances, smoothing)
    a = _product_columns(w, support_frames, keep=True)
    b = _end_weights(w, query_frames).expand_as(w[0]).clone()
    scale = grad_cost.double() / (a[-1] * b).sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    grad = torch.empty_like(w)
    for column in reversed(range(len(w))):
        if column == 0:
            for row in reversed(range(len(b) - 1)):
                b[row] += w[0, row + 1] * b[row + 1]
        torch.mul(a[column], b, out=grad[column])
        before = w[column] * b
        before[:-1] += before[1:].clone()
        if support_frames is None:
            b = before
        else:
            counts = column < support_frames
            grad[column] *= counts
            b = torch.where(counts, before, b)
    return _without_empty((grad * scale).permute(2, 1, 0).to(distances.dtype), query_frames, support_frames)


def _factors(distances: Tensor, smoothing: float) -> Tensor:
    """W ``[Ts, Tq, P]`` float64: pairs last, so that every step of the recursion runs along them."""
    return (distances.permute(2, 1, 0).contiguous().to(torch.float64) * (-1.0 / smoothing)).exp_()


def _product_columns(w: Tensor, support_frames: Tensor | None, *, keep: bool) -> list[Tensor]:
    """A of every column ``[Tq, P]``, or of the last one alone."""
    a = torch.empty_like(w[0])
    a[0] = w[0, 0]
    for row in range(1, len(a)):
        torch.add(a[row - 1], 2.0, out=a[row]).mul_(w[0, row])
    columns = [a]
    for column in range(1, len(w)):
        here = a.clone()
        here[1:] += a[:-1]
        here *= w[column]
        a = here if support_frames is None else torch.where(column < support_frames, here, a)
        columns.append(a)
    return columns if keep else columns[-1:]


def _end_weights(w: Tensor, query_frames: Tensor | None) -> Tensor:
    """``[Tq, 1]``, or ``[Tq, P]`` where the numbers of rows differ."""
    row = torch.arange(w.shape[1])[:, None]
    last = (torch.tensor([w.shape[1]]) if query_frames is None else query_frames) - 1
    return 2.0 * (row < last) + 1.0 * (row == last)
