"""Kernels for few queries over a set that fits in registers: tokens are read once, queries pass by one at a time.

Products are taken on the ordinary arithmetic units, in float32 throughout: with a handful of queries there are only a handful of
operations per byte, so the time is that of reading the tokens, and the only rounding is that of the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import finite_or_zero, load_tile, load_vectors, pairs_of_program, store_tile, store_vectors


@triton.jit(do_not_specialize=["pairs", "heads", "rows", "tokens"])
def rows_forward(
    query, key, value, log_weight, output, log_evidence,
    pairs, heads, rows, tokens, scale,
    query_b, query_r, query_h, key_b, key_n, key_h, value_b, value_n, value_h, weight_b, weight_r, weight_n,
    WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, PAIRS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Output and evidence of ``PAIRS`` pairs. Grid: (pairs / PAIRS)."""
    video, head, exists = pairs_of_program(pairs, heads, PAIRS)
    token = tl.arange(0, BLOCK_TOKENS)
    keep = exists[:, None] & (token < tokens)[None, :]
    k = load_tile(key, video * key_b + head * key_h, token, key_n, keep, WIDTH, BLOCK_WIDTH).to(ACC)
    v = load_tile(value, video * value_b + head * value_h, token, value_n, keep, WIDTH, BLOCK_WIDTH).to(ACC)
    for row in range(rows):
        q = load_vectors(query, video * query_b + row * query_r + head * query_h, exists, WIDTH, BLOCK_WIDTH).to(ACC) * scale
        score = tl.sum(k * q[:, None, :], axis=2)
        if WEIGHTED:
            weight_offset = (video * weight_b + row * weight_r)[:, None] + token.to(tl.int64)[None, :] * weight_n
            score += tl.load(log_weight + weight_offset, mask=keep, other=0.0).to(ACC)
        score = tl.where(keep, score, float("-inf"))
        peak = finite_or_zero(tl.max(score, axis=1))
        probability = tl.exp(score - peak[:, None])
        total = tl.sum(probability, axis=1)
        empty = total == 0.0
        safe_total = tl.where(empty, 1.0, total)
        out = tl.sum(v * probability[:, :, None], axis=1) * (1.0 / safe_total)[:, None]
        place = (video * rows + row) * heads + head
        store_vectors(output, place * WIDTH, exists, out, WIDTH, BLOCK_WIDTH)
        tl.store(log_evidence + place, tl.where(empty, float("-inf"), peak + tl.log(safe_total)), mask=exists)


@triton.jit(do_not_specialize=["pairs", "heads", "rows", "tokens"])
def rows_backward(
    grad_output, grad_log_evidence, query, key, value, log_weight, log_evidence,
    grad_query, grad_key, grad_value, grad_weight,
    pairs, heads, rows, tokens, scale,
    query_b, query_r, query_h, key_b, key_n, key_h, value_b, value_n, value_h, weight_b, weight_r, weight_n,
    WEIGHTED: tl.constexpr, WEIGHT_GRAD: tl.constexpr, PER_ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """All gradients of ``PAIRS`` pairs; that of the log-weights per head ``[B, R or 1, H, N]``. Grid: (pairs / PAIRS)."""
    video, head, exists = pairs_of_program(pairs, heads, PAIRS)
    token = tl.arange(0, BLOCK_TOKENS)
    keep = exists[:, None] & (token < tokens)[None, :]
    k = load_tile(key, video * key_b + head * key_h, token, key_n, keep, WIDTH, BLOCK_WIDTH).to(ACC)
    v = load_tile(value, video * value_b + head * value_h, token, value_n, keep, WIDTH, BLOCK_WIDTH).to(ACC)
    dk = tl.zeros([PAIRS, BLOCK_TOKENS, BLOCK_WIDTH], dtype=ACC)
    dv = tl.zeros([PAIRS, BLOCK_TOKENS, BLOCK_WIDTH], dtype=ACC)
    dw = tl.zeros([PAIRS, BLOCK_TOKENS], dtype=ACC)
    for row in range(rows):
        q = load_vectors(query, video * query_b + row * query_r + head * query_h, exists, WIDTH, BLOCK_WIDTH).to(ACC) * scale
        place = (video * rows + row) * heads + head
        do = load_vectors(grad_output, place * WIDTH, exists, WIDTH, BLOCK_WIDTH).to(ACC)
        evidence = tl.load(log_evidence + place, mask=exists, other=float("-inf"))
        grad_evidence = tl.load(grad_log_evidence + place, mask=exists, other=0.0)
        grad_evidence = tl.where(evidence == float("-inf"), 0.0, grad_evidence)
        score = tl.sum(k * q[:, None, :], axis=2)
        if WEIGHTED:
            weight_offset = (video * weight_b + row * weight_r)[:, None] + token.to(tl.int64)[None, :] * weight_n
            score += tl.load(log_weight + weight_offset, mask=keep, other=0.0).to(ACC)
        score = tl.where(keep, score, float("-inf"))
        probability = tl.exp(score - finite_or_zero(evidence)[:, None])
        grad_probability = tl.sum(v * do[:, None, :], axis=2)
        baseline = tl.sum(probability * grad_probability, axis=1) - grad_evidence
        grad_score = probability * (grad_probability - baseline[:, None])
        dq = tl.sum(k * grad_score[:, :, None], axis=1) * scale
        store_vectors(grad_query, place * WIDTH, exists, dq, WIDTH, BLOCK_WIDTH)
        dk += grad_score[:, :, None] * q[:, None, :]
        dv += probability[:, :, None] * do[:, None, :]
        if PER_ROW:
            tl.store(grad_weight + (place * tokens)[:, None] + token[None, :], grad_score, mask=keep)
        elif WEIGHT_GRAD:
            dw += grad_score
    base = (video * tokens * heads + head) * WIDTH
    store_tile(grad_key, base, token, heads * WIDTH, keep, dk, WIDTH, BLOCK_WIDTH)  # the scale came in with q
    store_tile(grad_value, base, token, heads * WIDTH, keep, dv, WIDTH, BLOCK_WIDTH)
    if WEIGHT_GRAD and not PER_ROW:
        tl.store(grad_weight + ((video * heads + head) * tokens)[:, None] + token[None, :], dw, mask=keep)
