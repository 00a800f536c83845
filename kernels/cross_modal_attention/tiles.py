"""Kernels on the matrix units, batched over the pairs of a program, for many queries or large sets.

Where queries and tokens of a pair each fit one block, the backward pass is one kernel that reads everything once. Elsewhere it
is two: one owned by the queries, one owned by the tokens, so that every sum has one owner and no atomics are needed.
A token that no query of the block can see is not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import finite_or_zero, first_parts, inner_products, load_tile, pair_dot, pairs_of_program, store_tile


@triton.jit
def _log_weights(log_weight, video, row, token, keep, weight_b, weight_r, weight_n, ACC: tl.constexpr):
    """Log-weights ``[P, R, N]``; ``keep`` has the same shape, and what it leaves out is -inf."""
    offset = row.to(tl.int64)[None, :, None] * weight_r + token.to(tl.int64)[None, None, :] * weight_n
    offset += (video * weight_b)[:, None, None]
    return tl.load(log_weight + offset, mask=keep, other=float("-inf")).to(ACC)


@triton.jit
def _visible(
    log_weight, video, row, token, exists, rows, tokens, weight_b, weight_r, weight_n, WEIGHTED: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Log-weights ``[P, R, N]``, -inf outside the set, and ``[P, N]``: the tokens that some query of the block can see."""
    keep = exists[:, None, None] & (row < rows)[None, :, None] & (token < tokens)[None, None, :]
    if WEIGHTED:
        weight = _log_weights(log_weight, video, row, token, keep, weight_b, weight_r, weight_n, ACC)
    else:
        weight = tl.where(keep, 0.0, float("-inf")).to(ACC)
    return weight, tl.max(weight, axis=1) > float("-inf")


@triton.jit(do_not_specialize=["pairs", "heads", "rows", "tokens"])
def tiles_forward(
    query, key, value, log_weight, output, log_evidence,
    pairs, heads, rows, tokens, scale,
    query_b, query_r, query_h, key_b, key_n, key_h, value_b, value_n, value_h, weight_b, weight_r, weight_n,
    WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PAIRS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Output and evidence of ``BLOCK_ROWS`` queries of ``PAIRS`` pairs. Grid: (pairs / PAIRS, rows / BLOCK_ROWS)."""
    video, head, exists = pairs_of_program(pairs, heads, PAIRS, PARTS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_kept = exists[:, None] & (row < rows)[None, :]
    q = load_tile(query, video * query_b + head * query_h, row, query_r, row_kept, WIDTH, BLOCK_WIDTH, PARTS)
    peak = tl.full([PAIRS, BLOCK_ROWS], float("-inf"), dtype=ACC)
    total = tl.zeros([PAIRS, BLOCK_ROWS], dtype=ACC)
    out = tl.zeros([PAIRS, BLOCK_ROWS, BLOCK_WIDTH], dtype=ACC)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        weight, seen = _visible(log_weight, video, row, token, exists, rows, tokens, weight_b, weight_r, weight_n, WEIGHTED, ACC)
        k = load_tile(key, video * key_b + head * key_h, token, key_n, seen, WIDTH, BLOCK_WIDTH, PARTS)
        v = load_tile(value, video * value_b + head * value_h, token, value_n, seen, WIDTH, BLOCK_WIDTH, PARTS)
        score = inner_products(q, k, PRECISION, PARTS) * scale + weight
        new_peak = tl.maximum(peak, tl.max(score, axis=2))
        shift = finite_or_zero(new_peak)
        decay = tl.exp(peak - shift)
        probability = tl.exp(score - shift[:, :, None])
        total = total * decay + tl.sum(probability, axis=2)
        out = out * decay[:, :, None] + pair_dot(probability.to(v.dtype), v, PRECISION)
        peak = new_peak
    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)
    place = (video[:, None] * rows + row[None, :]) * heads + head[:, None]
    base = (video * rows * heads + head) * WIDTH
    store_tile(output, base, row, heads * WIDTH, row_kept, out / safe_total[:, :, None], WIDTH, BLOCK_WIDTH, PARTS)
    row_owned = row_kept & first_parts(exists, PARTS)[:, None]
    tl.store(log_evidence + place, tl.where(empty, float("-inf"), peak + tl.log(safe_total)), mask=row_owned)


@triton.jit(do_not_specialize=["pairs", "heads", "rows", "tokens"])
def tiles_backward_tokens(
    grad_output, grad_log_evidence, query, key, value, log_weight, log_evidence, baselines,
    grad_query, grad_key, grad_value, grad_weight,
    pairs, heads, rows, tokens, scale,
    query_b, query_r, query_h, key_b, key_n, key_h, value_b, value_n, value_h, weight_b, weight_r, weight_n,
    WEIGHTED: tl.constexpr, WEIGHT_GRAD: tl.constexpr, PER_ROW: tl.constexpr, FUSED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, PAIRS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BLOCK_TOKENS`` tokens of ``PAIRS`` pairs, key, value and log-weight. Grid: (pairs / PAIRS, tokens / BLOCK_TOKENS).

    ``FUSED``: one block holds all queries and one all tokens, so the gradient of the queries is made here too.
    """
    video, head, exists = pairs_of_program(pairs, heads, PAIRS, PARTS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_kept = exists[:, None] & (token < tokens)[None, :]
    token_owned = first_parts(exists, PARTS)[:, None] & (token < tokens)[None, :]
    k = load_tile(key, video * key_b + head * key_h, token, key_n, token_kept, WIDTH, BLOCK_WIDTH, PARTS)
    v = load_tile(value, video * value_b + head * value_h, token, value_n, token_kept, WIDTH, BLOCK_WIDTH, PARTS)
    dk = tl.zeros([PAIRS, BLOCK_TOKENS, BLOCK_WIDTH], dtype=ACC)
    dv = tl.zeros([PAIRS, BLOCK_TOKENS, BLOCK_WIDTH], dtype=ACC)
    dw = tl.zeros([PAIRS, BLOCK_TOKENS], dtype=ACC)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        row_kept = exists[:, None] & (row < rows)[None, :]
        place = (video[:, None] * rows + row[None, :]) * heads + head[:, None]
        q = load_tile(query, video * query_b + head * query_h, row, query_r, row_kept, WIDTH, BLOCK_WIDTH, PARTS)
        base = (video * rows * heads + head) * WIDTH
        do = load_tile(grad_output, base, row, heads * WIDTH, row_kept, WIDTH, BLOCK_WIDTH, PARTS)
        evidence = tl.load(log_evidence + place, mask=row_kept, other=float("-inf"))
        weight, _ = _visible(log_weight, video, row, token, exists, rows, tokens, weight_b, weight_r, weight_n, WEIGHTED, ACC)
        score = inner_products(q, k, PRECISION, PARTS) * scale + weight
        probability = tl.exp(score - finite_or_zero(evidence)[:, :, None])
        grad_probability = inner_products(do, v, PRECISION, PARTS)
        if FUSED:
            grad_evidence = tl.load(grad_log_evidence + place, mask=row_kept, other=0.0)
            grad_evidence = tl.where(evidence == float("-inf"), 0.0, grad_evidence)
            baseline = tl.sum(probability * grad_probability, axis=2) - grad_evidence
        else:
            baseline = tl.load(baselines + place, mask=row_kept, other=0.0)
        grad_score = probability * (grad_probability - baseline[:, :, None])
        dv += pair_dot(tl.permute(probability, (0, 2, 1)).to(do.dtype), do, PRECISION)
        dk += pair_dot(tl.permute(grad_score, (0, 2, 1)).to(q.dtype), q, PRECISION)
        if FUSED:
            dq = pair_dot(grad_score.to(k.dtype), k, PRECISION) * scale
            store_tile(grad_query, base, row, heads * WIDTH, row_kept, dq, WIDTH, BLOCK_WIDTH, PARTS)
        if PER_ROW:
            kept = row_kept[:, :, None] & token_owned[:, None, :]
            tl.store(grad_weight + (place * tokens)[:, :, None] + token[None, None, :], grad_score, mask=kept)
        elif WEIGHT_GRAD:
            dw += tl.sum(grad_score, axis=1)
    token_base = (video * tokens * heads + head) * WIDTH
    store_tile(grad_key, token_base, token, heads * WIDTH, token_kept, dk * scale, WIDTH, BLOCK_WIDTH, PARTS)
    store_tile(grad_value, token_base, token, heads * WIDTH, token_kept, dv, WIDTH, BLOCK_WIDTH, PARTS)
    if WEIGHT_GRAD and not PER_ROW:
        tl.store(grad_weight + ((video * heads + head) * tokens)[:, None] + token[None, :], dw, mask=token_owned)


@triton.jit(do_not_specialize=["pairs", "heads", "rows", "tokens"])
def tiles_backward_queries(
    grad_output, grad_log_evidence, query, key, value, log_weight, log_evidence, baselines, grad_query,
    pairs, heads, rows, tokens, scale,
    query_b, query_r, query_h, key_b, key_n, key_h, value_b, value_n, value_h, weight_b, weight_r, weight_n,
    WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PAIRS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Gradient of ``BLOCK_ROWS`` queries of ``PAIRS`` pairs, and the baseline sum_n p dp - de that the tokens' kernel needs.

    The tokens are read twice: the baseline has to be known before it can be subtracted, and subtracting it from finished sums
    instead would cancel. Grid: (pairs / PAIRS, rows / BLOCK_ROWS).
    """
    video, head, exists = pairs_of_program(pairs, heads, PAIRS, PARTS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_kept = exists[:, None] & (row < rows)[None, :]
    place = (video[:, None] * rows + row[None, :]) * heads + head[:, None]
    q = load_tile(query, video * query_b + head * query_h, row, query_r, row_kept, WIDTH, BLOCK_WIDTH, PARTS)
    base = (video * rows * heads + head) * WIDTH
    do = load_tile(grad_output, base, row, heads * WIDTH, row_kept, WIDTH, BLOCK_WIDTH, PARTS)
    evidence = tl.load(log_evidence + place, mask=row_kept, other=float("-inf"))
    grad_evidence = tl.load(grad_log_evidence + place, mask=row_kept, other=0.0)
    shift = finite_or_zero(evidence)
    baseline = -tl.where(evidence == float("-inf"), 0.0, grad_evidence)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        weight, seen = _visible(log_weight, video, row, token, exists, rows, tokens, weight_b, weight_r, weight_n, WEIGHTED, ACC)
        k = load_tile(key, video * key_b + head * key_h, token, key_n, seen, WIDTH, BLOCK_WIDTH, PARTS)
        v = load_tile(value, video * value_b + head * value_h, token, value_n, seen, WIDTH, BLOCK_WIDTH, PARTS)
        score = inner_products(q, k, PRECISION, PARTS) * scale + weight
        grad_probability = inner_products(do, v, PRECISION, PARTS)
        baseline += tl.sum(tl.exp(score - shift[:, :, None]) * grad_probability, axis=2)
    tl.store(baselines + place, baseline, mask=row_kept & first_parts(exists, PARTS)[:, None])
    dq = tl.zeros([PAIRS, BLOCK_ROWS, BLOCK_WIDTH], dtype=ACC)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        weight, seen = _visible(log_weight, video, row, token, exists, rows, tokens, weight_b, weight_r, weight_n, WEIGHTED, ACC)
        k = load_tile(key, video * key_b + head * key_h, token, key_n, seen, WIDTH, BLOCK_WIDTH, PARTS)
        v = load_tile(value, video * value_b + head * value_h, token, value_n, seen, WIDTH, BLOCK_WIDTH, PARTS)
        score = inner_products(q, k, PRECISION, PARTS) * scale + weight
        grad_probability = inner_products(do, v, PRECISION, PARTS)
        grad_score = tl.exp(score - shift[:, :, None]) * (grad_probability - baseline[:, :, None])
        dq += pair_dot(grad_score.to(k.dtype), k, PRECISION)
    store_tile(grad_query, base, row, heads * WIDTH, row_kept, dq * scale, WIDTH, BLOCK_WIDTH, PARTS)
