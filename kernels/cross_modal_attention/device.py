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
def pair_of_program(heads):
    """Video and head of the pair of a program that has one alone."""
    pair = tl.program_id(0)
    return (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)


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
def _tile(pointer, base, index, stride, keep, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Pointers and mask ``[P, L, D]`` of several vectors per pair.

    What one warp does not fill along a vector, it shall fill with other pairs before it takes further tokens: the sums over the
    tokens of a pair then cross the fewest threads. The compiler goes by contiguity, and of equals one version of Triton takes the
    first and another the last. So the pairs are called contiguous; loads are as wide as the last dimension allows, which nothing
    false is said of.
    """
    lane = tl.arange(0, BLOCK_WIDTH)
    mask = keep[:, :, None]
    if WIDTH != BLOCK_WIDTH:
        mask = mask & (lane < WIDTH)[None, None, :]
    place = pointer + (base[:, None, None] + index.to(tl.int64)[None, :, None] * stride + lane[None, None, :])
    return tl.max_contiguous(place, [2, 1, BLOCK_WIDTH]), mask


@triton.jit
def load_tile(pointer, base, index, stride, keep, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Several vectors per pair, ``[P, L, D]``: number ``index [L]`` behind ``base [P]``, 0 where ``keep [P, L]`` is False."""
    place, mask = _tile(pointer, base, index, stride, keep, WIDTH, BLOCK_WIDTH)
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, base, index, stride, keep, tile, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The inverse of :func:`load_tile`."""
    place, mask = _tile(pointer, base, index, stride, keep, WIDTH, BLOCK_WIDTH)
    tl.store(place, tile, mask=mask)


@triton.jit
def _block(index, stride, keep, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Offsets and mask ``[L, D]`` of vectors of one pair."""
    lane = tl.arange(0, BLOCK_WIDTH)
    mask = keep[:, None]
    if WIDTH != BLOCK_WIDTH:
        mask = mask & (lane < WIDTH)[None, :]
    return index.to(tl.int64)[:, None] * stride + lane[None, :], mask


@triton.jit
def load_block(pointer, index, stride, keep, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Vectors of one pair, ``[L, D]``: number ``index [L]`` behind ``pointer``, 0 where ``keep [L]`` is False."""
    offset, mask = _block(index, stride, keep, WIDTH, BLOCK_WIDTH)
    return tl.load(pointer + offset, mask=mask, other=0.0)


@triton.jit
def store_block(pointer, index, stride, keep, block, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The inverse of :func:`load_block`, rounded to what ``pointer`` holds."""
    offset, mask = _block(index, stride, keep, WIDTH, BLOCK_WIDTH)
    tl.store(pointer + offset, block, mask=mask)


@triton.jit
def load_weights(pointer, base, first, first_stride, second, second_stride, keep, WEIGHTED: tl.constexpr, ACC: tl.constexpr):
    """Log-weights ``[I, J]`` of a video's queries and tokens, in either order: 0 where none are given, -inf where ``keep`` is False."""
    if WEIGHTED:
        offset = first.to(tl.int64)[:, None] * first_stride + second.to(tl.int64)[None, :] * second_stride
        return tl.load(pointer + base + offset, mask=keep, other=float("-inf")).to(ACC)
    return tl.where(keep, 0.0, float("-inf")).to(ACC)


@triton.jit
def diagonal(square):
    """``[R, R] -> [R]``."""
    index = tl.arange(0, square.shape[0])
    return tl.sum(tl.where(index[:, None] == index[None, :], square, 0.0), axis=0)


@triton.jit
def finite_or_zero(evidence):
    """The evidence, 0 where it is -inf: exp(-inf - 0) is the 0 that a query without tokens needs, exp(-inf + inf) is NaN."""
    return tl.where(evidence == float("-inf"), 0.0, evidence)
