"""Kernels on the matrix units for what the others do not take: more queries than one block holds, wide vectors of float32, and the
gradient of the log-weights of large sets.

The backward pass is two kernels, one owned by the queries, one owned by the tokens, so that every sum has one owner and no atomics are
needed.

A float32 vector wider than 128 leaves the registers: every warp would hold the whole of it, twice over where TF32 stands in for
float32. So vectors can be cut into ``PARTS``, the first dimension of every block: each warp holds one part, and only the scores cross
warps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import finite_or_zero, load_weights, pair_of_program


@triton.jit
def _parts(index, stride, keep, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Offsets and mask ``[P, L, D]`` of vectors of one pair, in parts."""
    lane = (tl.arange(0, PARTS) * BLOCK_WIDTH)[:, None] + tl.arange(0, BLOCK_WIDTH)[None, :]
    offset = index.to(tl.int64)[None, :, None] * stride + lane[:, None, :]
    mask = tl.broadcast_to(keep[None, :, None], offset.shape)
    if WIDTH != BLOCK_WIDTH * PARTS:
        mask = mask & (lane < WIDTH)[:, None, :]
    return offset, mask


@triton.jit
def _load(pointer, index, stride, keep, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """Vectors of one pair, ``[P, L, D]``: number ``index [L]`` behind ``pointer``, 0 where ``keep [L]`` is False."""
    offset, mask = _parts(index, stride, keep, WIDTH, BLOCK_WIDTH, PARTS)
    return tl.load(pointer + offset, mask=mask, other=0.0)


@triton.jit
def _store(pointer, index, stride, keep, tile, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """The inverse of :func:`_load`."""
    offset, mask = _parts(index, stride, keep, WIDTH, BLOCK_WIDTH, PARTS)
    tl.store(pointer + offset, tile, mask=mask)


@triton.jit
def _dot(left, right, PRECISION: tl.constexpr):
    """Matrix product per part, ``[P, I, K] x [P, K, J] -> [P, I, J]``.

    Triton gives the warps of a batched product one part each. A vector in one part has to spread it over the warps.
    """
    if left.shape[0] == 1:
        flat_left = tl.reshape(left, [left.shape[1], left.shape[2]])
        flat_right = tl.reshape(right, [right.shape[1], right.shape[2]])
        product = tl.dot(flat_left, flat_right, input_precision=PRECISION)
        return tl.reshape(product, [1, left.shape[1], right.shape[2]])
    return tl.dot(left, right, input_precision=PRECISION)


@triton.jit
def _inner_products(left, right, PRECISION: tl.constexpr):
    """``[P, I, D] x [P, J, D] -> [P, I, J]``: of whole vectors, the same in every part."""
    product = _dot(left, tl.permute(right, (0, 2, 1)), PRECISION)
    if left.shape[0] == 1:
        return product
    return tl.broadcast_to(tl.sum(product, axis=0)[None, :, :], product.shape)


@triton.jit
def _one_part(numbers):
    """``[P, ...] -> [...]`` of numbers that all parts have in common."""
    return tl.max(numbers, axis=0)


@triton.jit(do_not_specialize=["heads", "rows", "tokens"])
def tiles_forward(
    query, key, value, log_weight, output, log_evidence,
    heads, rows, tokens, scale,
    query_b, query_r, query_h, key_b, key_n, key_h, value_b, value_n, value_h, weight_b, weight_r, weight_n,
    WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Output and evidence of ``BLOCK_ROWS`` queries of one pair. Grid: (pairs, rows / BLOCK_ROWS)."""
    video, head = pair_of_program(heads)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_kept = row < rows
    q = _load(query + video * query_b + head * query_h, row, query_r, row_kept, WIDTH, BLOCK_WIDTH, PARTS)
    key += video * key_b + head * key_h
    value += video * value_b + head * value_h
    peak = tl.full([PARTS, BLOCK_ROWS], float("-inf"), dtype=ACC)
    total = tl.zeros([PARTS, BLOCK_ROWS], dtype=ACC)
    out = tl.zeros([PARTS, BLOCK_ROWS, BLOCK_WIDTH], dtype=ACC)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        kept = row_kept[:, None] & (token < tokens)[None, :]
        weight = load_weights(log_weight, video * weight_b, row, weight_r, token, weight_n, kept, WEIGHTED, ACC)
        k = _load(key, token, key_n, token < tokens, WIDTH, BLOCK_WIDTH, PARTS)
        v = _load(value, token, value_n, token < tokens, WIDTH, BLOCK_WIDTH, PARTS)
        score = _inner_products(q, k, PRECISION) * scale + weight[None, :, :]
        new_peak = tl.maximum(peak, tl.max(score, axis=2))
        shift = finite_or_zero(new_peak)
        decay = tl.exp(peak - shift)
        probability = tl.exp(score - shift[:, :, None])
        total = total * decay + tl.sum(probability, axis=2)
        out = out * decay[:, :, None] + _dot(probability.to(v.dtype), v, PRECISION)
        peak = new_peak
    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)
    place = video * rows * heads + head
    _store(output + place * WIDTH, row, heads * WIDTH, row_kept, out * (1.0 / safe_total)[:, :, None], WIDTH, BLOCK_WIDTH, PARTS)
    evidence = _one_part(tl.where(empty, float("-inf"), peak + tl.log(safe_total)))
    tl.store(log_evidence + place + row * heads, evidence, mask=row_kept)


@triton.jit(do_not_specialize=["heads", "rows", "tokens"])
def tiles_backward_queries(
    grad_output, grad_log_evidence, query, key, value, log_weight, log_evidence, baselines, grad_query,
    heads, rows, tokens, scale,
    query_b, query_r, query_h, key_b, key_n, key_h, value_b, value_n, value_h, weight_b, weight_r, weight_n,
    WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradient of ``BLOCK_ROWS`` queries of one pair, and the baseline sum_n p dp - de that the tokens' kernel needs.

    The tokens are read twice: the baseline has to be known before it can be subtracted, and subtracting it from finished sums
    instead would cancel. Grid: (pairs, rows / BLOCK_ROWS).
    """
    video, head = pair_of_program(heads)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_kept = row < rows
    place = video * rows * heads + head
    q = _load(query + video * query_b + head * query_h, row, query_r, row_kept, WIDTH, BLOCK_WIDTH, PARTS)
    do = _load(grad_output + place * WIDTH, row, heads * WIDTH, row_kept, WIDTH, BLOCK_WIDTH, PARTS)
    evidence = tl.load(log_evidence + place + row * heads, mask=row_kept, other=float("-inf"))
    grad_evidence = tl.load(grad_log_evidence + place + row * heads, mask=row_kept, other=0.0)
    shift = finite_or_zero(evidence)
    key += video * key_b + head * key_h
    value += video * value_b + head * value_h
    baseline = -tl.broadcast_to(tl.where(evidence == float("-inf"), 0.0, grad_evidence)[None, :], [PARTS, BLOCK_ROWS])
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        kept = row_kept[:, None] & (token < tokens)[None, :]
        weight = load_weights(log_weight, video * weight_b, row, weight_r, token, weight_n, kept, WEIGHTED, ACC)
        k = _load(key, token, key_n, token < tokens, WIDTH, BLOCK_WIDTH, PARTS)
        v = _load(value, token, value_n, token < tokens, WIDTH, BLOCK_WIDTH, PARTS)
        score = _inner_products(q, k, PRECISION) * scale + weight[None, :, :]
        grad_probability = _inner_products(do, v, PRECISION)
        baseline += tl.sum(tl.exp(score - shift[None, :, None]) * grad_probability, axis=2)
    tl.store(baselines + place + row * heads, _one_part(baseline), mask=row_kept)
    dq = tl.zeros([PARTS, BLOCK_ROWS, BLOCK_WIDTH], dtype=ACC)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        kept = row_kept[:, None] & (token < tokens)[None, :]
        weight = load_weights(log_weight, video * weight_b, row, weight_r, token, weight_n, kept, WEIGHTED, ACC)
        k = _load(key, token, key_n, token < tokens, WIDTH, BLOCK_WIDTH, PARTS)
        v = _load(value, token, value_n, token < tokens, WIDTH, BLOCK_WIDTH, PARTS)
        score = _inner_products(q, k, PRECISION) * scale + weight[None, :, :]
        grad_probability = _inner_products(do, v, PRECISION)
        grad_score = tl.exp(score - shift[None, :, None]) * (grad_probability - baseline[:, :, None])
        dq += _dot(grad_score.to(k.dtype), k, PRECISION)
    _store(grad_query + place * WIDTH, row, heads * WIDTH, row_kept, dq * scale, WIDTH, BLOCK_WIDTH, PARTS)


@triton.jit(do_not_specialize=["heads", "rows", "tokens"])
def tiles_backward_tokens(
    grad_output, query, key, value, log_weight, log_evidence, baselines, grad_key, grad_value, grad_weight,
    heads, rows, tokens, scale,
    query_b, query_r, query_h, key_b, key_n, key_h, value_b, value_n, value_h, weight_b, weight_r, weight_n,
    WEIGHTED: tl.constexpr, WEIGHT_GRAD: tl.constexpr, PER_ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BLOCK_TOKENS`` tokens of one pair, key, value and log-weight. Grid: (pairs, tokens / BLOCK_TOKENS)."""
    video, head = pair_of_program(heads)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_kept = token < tokens
    place = video * rows * heads + head
    token_place = video * tokens * heads + head
    k = _load(key + video * key_b + head * key_h, token, key_n, token_kept, WIDTH, BLOCK_WIDTH, PARTS)
    v = _load(value + video * value_b + head * value_h, token, value_n, token_kept, WIDTH, BLOCK_WIDTH, PARTS)
    query += video * query_b + head * query_h
    dk = tl.zeros([PARTS, BLOCK_TOKENS, BLOCK_WIDTH], dtype=ACC)
    dv = tl.zeros([PARTS, BLOCK_TOKENS, BLOCK_WIDTH], dtype=ACC)
    dw = tl.zeros([PARTS, BLOCK_TOKENS], dtype=ACC)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        row_kept = row < rows
        kept = row_kept[:, None] & token_kept[None, :]
        q = _load(query, row, query_r, row_kept, WIDTH, BLOCK_WIDTH, PARTS)
        do = _load(grad_output + place * WIDTH, row, heads * WIDTH, row_kept, WIDTH, BLOCK_WIDTH, PARTS)
        evidence = tl.load(log_evidence + place + row * heads, mask=row_kept, other=float("-inf"))
        baseline = tl.load(baselines + place + row * heads, mask=row_kept, other=0.0)
        weight = load_weights(log_weight, video * weight_b, row, weight_r, token, weight_n, kept, WEIGHTED, ACC)
        score = _inner_products(q, k, PRECISION) * scale + weight[None, :, :]
        probability = tl.exp(score - finite_or_zero(evidence)[None, :, None])
        grad_score = probability * (_inner_products(do, v, PRECISION) - baseline[None, :, None])
        dv += _dot(tl.permute(probability, (0, 2, 1)).to(do.dtype), do, PRECISION)
        dk += _dot(tl.permute(grad_score, (0, 2, 1)).to(q.dtype), q, PRECISION)
        if PER_ROW:
            tl.store(grad_weight + (place + row * heads)[:, None] * tokens + token[None, :], _one_part(grad_score), mask=kept)
        elif WEIGHT_GRAD:
            dw += tl.sum(grad_score, axis=1)
    _store(grad_key + token_place * WIDTH, token, heads * WIDTH, token_kept, dk * scale, WIDTH, BLOCK_WIDTH, PARTS)
    _store(grad_value + token_place * WIDTH, token, heads * WIDTH, token_kept, dv, WIDTH, BLOCK_WIDTH, PARTS)
    if WEIGHT_GRAD and not PER_ROW:
        tl.store(grad_weight + (video * heads + head) * tokens + token, _one_part(dw), mask=token_kept)
