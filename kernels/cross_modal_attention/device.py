"""Device functions shared by the kernels of cross-modal attention: which pairs a program has, and moving their vectors."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pairs_of_program(pairs, heads, PAIRS: tl.constexpr):
    """Video and head of each pair of this program, and which of them exist. int64: offsets can pass 2^31."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    return pair // heads, pair % heads, pair < pairs


@triton.jit
def _vectors(base, keep, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Offsets and mask ``[P, D]`` of one vector per pair."""
    lane = tl.arange(0, BLOCK_WIDTH)
    mask = keep[:, None]
    if WIDTH != BLOCK_WIDTH:
        mask = mask & (lane < WIDTH)[None, :]
    return base[:, None] + lane[None, :], mask


@triton.jit
def load_vectors(pointer, base, keep, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """One vector per pair, ``[P, D]``: at ``base [P]``, 0 where ``keep [P]`` is False."""
    offset, mask = _vectors(base, keep, WIDTH, BLOCK_WIDTH)
    return tl.load(pointer + offset, mask=mask, other=0.0)


@triton.jit
def store_vectors(pointer, base, keep, vectors, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The inverse of :func:`load_vectors`."""
    offset, mask = _vectors(base, keep, WIDTH, BLOCK_WIDTH)
    tl.store(pointer + offset, vectors, mask=mask)


@triton.jit
def _tile(base, index, stride, keep, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Offsets and mask ``[P, L, D]`` of several vectors per pair."""
    lane = tl.arange(0, BLOCK_WIDTH)
    mask = keep[:, :, None]
    if WIDTH != BLOCK_WIDTH:
        mask = mask & (lane < WIDTH)[None, None, :]
    return base[:, None, None] + index.to(tl.int64)[None, :, None] * stride + lane[None, None, :], mask


@triton.jit
def load_tile(pointer, base, index, stride, keep, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Several vectors per pair, ``[P, L, D]``: number ``index [L]`` behind ``base [P]``, 0 where ``keep [P, L]`` is False."""
    offset, mask = _tile(base, index, stride, keep, WIDTH, BLOCK_WIDTH)
    return tl.load(pointer + offset, mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, base, index, stride, keep, tile, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The inverse of :func:`load_tile`."""
    offset, mask = _tile(base, index, stride, keep, WIDTH, BLOCK_WIDTH)
    tl.store(pointer + offset, tile, mask=mask)


@triton.jit
def finite_or_zero(evidence):
    """The evidence, 0 where it is -inf: exp(-inf - 0) is the 0 that a query without tokens needs, exp(-inf + inf) is NaN."""
    return tl.where(evidence == float("-inf"), 0.0, evidence)


@triton.jit
def pair_dot(left, right, PRECISION: tl.constexpr):
    """Matrix product per pair, ``[P, I, K] x [P, K, J] -> [P, I, J]``.

    Triton gives the warps of a batched product one pair each. A program with a single pair has to spread it over its warps.
    """
    if left.shape[0] == 1:
        flat_left = tl.reshape(left, [left.shape[1], left.shape[2]])
        flat_right = tl.reshape(right, [right.shape[1], right.shape[2]])
        product = tl.dot(flat_left, flat_right, input_precision=PRECISION)
        return tl.reshape(product, [1, left.shape[1], right.shape[2]])
    return tl.dot(left, right, input_precision=PRECISION)
