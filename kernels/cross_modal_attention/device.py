"""Device functions shared by the kernels of cross-modal attention: which pairs a program has, and moving their vectors."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pairs_of_program(pairs, heads, PAIRS: tl.constexpr, PARTS: tl.constexpr = 1):
    """Video and head of each pair of this program, and which of them exist. int64: offsets can pass 2^31.

    ``PARTS`` > 1: the program has one pair, in as many places as its vectors have parts (see :func:`inner_products`).
    """
    pair = tl.program_id(0).to(tl.int64) * (PAIRS // PARTS) + tl.arange(0, PAIRS) // PARTS
    return pair // heads, pair % heads, pair < pairs


@triton.jit
def first_parts(exists, PARTS: tl.constexpr):
    """Which places ``[P]`` write what all parts of a pair have in common."""
    if PARTS == 1:
        return exists
    return exists & (tl.arange(0, exists.shape[0]) % PARTS == 0)


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
def _tile(base, index, stride, keep, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Offsets and mask ``[P, L, D]`` of several vectors per pair, or of a part of each."""
    lane = tl.arange(0, BLOCK_WIDTH)[None, :]
    if PARTS > 1:
        lane += (tl.arange(0, base.shape[0]) % PARTS * BLOCK_WIDTH)[:, None]
    mask = keep[:, :, None]
    if WIDTH != BLOCK_WIDTH * PARTS:
        mask = mask & (lane < WIDTH)[:, None, :]
    return base[:, None, None] + index.to(tl.int64)[None, :, None] * stride + lane[:, None, :], mask


@triton.jit
def load_tile(pointer, base, index, stride, keep, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PARTS: tl.constexpr = 1):
    """Several vectors per pair, ``[P, L, D]``: number ``index [L]`` behind ``base [P]``, 0 where ``keep [P, L]`` is False."""
    offset, mask = _tile(base, index, stride, keep, WIDTH, BLOCK_WIDTH, PARTS)
    return tl.load(pointer + offset, mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, base, index, stride, keep, tile, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PARTS: tl.constexpr = 1):
    """The inverse of :func:`load_tile`."""
    offset, mask = _tile(base, index, stride, keep, WIDTH, BLOCK_WIDTH, PARTS)
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


@triton.jit
def inner_products(left, right, PRECISION: tl.constexpr, PARTS: tl.constexpr):
    """``[P, I, D] x [P, J, D] -> [P, I, J]``; of vectors in parts the sum over the parts, the same in every place.

    A float32 vector wider than 128 leaves the registers: every warp would hold the whole of it, twice over where TF32 stands in for
    float32. Cut into parts that are taken for pairs, each warp holds one part, and only the scores cross warps.
    """
    product = pair_dot(left, tl.permute(right, (0, 2, 1)), PRECISION)
    if PARTS == 1:
        return product
    return tl.broadcast_to(tl.sum(product, axis=0)[None, :, :], product.shape)
