"""Kernels on the matrix units for sets that fit one block: one pair, one head of one video, per program.

Everything of a pair is read once and at the start, and nothing waits for anything else that is read. The rows of the forward pass's
products are the queries, of which a matrix unit wants eight; those of the backward pass's are the tokens, so that the products which
make the gradients of key and value take their factors from registers as they are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import finite_or_zero, load_block, load_weights, pair_of_program, store_block


@triton.jit(do_not_specialize=["heads", "rows", "tokens"])
def set_forward(
    query, key, value, log_weight, output, log_evidence,
    heads, rows, tokens, scale,
    query_b, query_r, query_h, key_b, key_n, key_h, value_b, value_n, value_h, weight_b, weight_r, weight_n,
    WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and evidence of one pair. Grid: (pairs)."""
    video, head = pair_of_program(heads)
    row, token = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_TOKENS)
    row_kept, token_kept = row < rows, token < tokens
    k = load_block(key + video * key_b + head * key_h, token, key_n, token_kept, WIDTH, BLOCK_WIDTH)
    v = load_block(value + video * value_b + head * value_h, token, value_n, token_kept, WIDTH, BLOCK_WIDTH)
    q = load_block(query + video * query_b + head * query_h, row, query_r, row_kept, WIDTH, BLOCK_WIDTH)
    kept = row_kept[:, None] & token_kept[None, :]
    weight = load_weights(log_weight, video * weight_b, row, weight_r, token, weight_n, kept, WEIGHTED, ACC)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + weight
    peak = finite_or_zero(tl.max(score, axis=1))
    probability = tl.exp(score - peak[:, None])
    total = tl.sum(probability, axis=1)
    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)
    out = tl.dot(probability.to(v.dtype), v, input_precision=PRECISION) * (1.0 / safe_total)[:, None]
    place = video * rows * heads + head
    store_block(output + place * WIDTH, row, heads * WIDTH, row_kept, out, WIDTH, BLOCK_WIDTH)
    evidence = tl.where(empty, float("-inf"), peak + tl.log(safe_total))
    tl.store(log_evidence + place + row * heads, evidence, mask=row_kept)


@triton.jit(do_not_specialize=["heads", "rows", "tokens"])
def set_backward(
    grad_output, grad_log_evidence, query, key, value, log_weight, log_evidence,
    grad_query, grad_key, grad_value, grad_weight,
    heads, rows, tokens, scale,
    query_b, query_r, query_h, key_b, key_n, key_h, value_b, value_n, value_h, weight_b, weight_r, weight_n,
    WEIGHTED: tl.constexpr, WEIGHT_GRAD: tl.constexpr, PER_ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one pair; that of the log-weights per head ``[B, R or 1, H, N]``. Grid: (pairs)."""
    video, head = pair_of_program(heads)
    row, token = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_TOKENS)
    row_kept, token_kept = row < rows, token < tokens
    place = video * rows * heads + head
    k = load_block(key + video * key_b + head * key_h, token, key_n, token_kept, WIDTH, BLOCK_WIDTH)
    v = load_block(value + video * value_b + head * value_h, token, value_n, token_kept, WIDTH, BLOCK_WIDTH)
    q = load_block(query + video * query_b + head * query_h, row, query_r, row_kept, WIDTH, BLOCK_WIDTH)
    do = load_block(grad_output + place * WIDTH, row, heads * WIDTH, row_kept, WIDTH, BLOCK_WIDTH)
    evidence = tl.load(log_evidence + place + row * heads, mask=row_kept, other=float("-inf"))
    grad_evidence = tl.load(grad_log_evidence + place + row * heads, mask=row_kept, other=0.0)
    grad_evidence = tl.where(evidence == float("-inf"), 0.0, grad_evidence)
    kept = token_kept[:, None] & row_kept[None, :]
    weight = load_weights(log_weight, video * weight_b, token, weight_n, row, weight_r, kept, WEIGHTED, ACC)
    score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + weight
    probability = tl.exp(score - finite_or_zero(evidence)[None, :])
    grad_probability = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    baseline = tl.sum(probability * grad_probability, axis=0) - grad_evidence
    grad_score = probability * (grad_probability - baseline[None, :])
    token_place = (video * tokens * heads + head) * WIDTH
    dv = tl.dot(probability.to(do.dtype), do, input_precision=PRECISION)
    store_block(grad_value + token_place, token, heads * WIDTH, token_kept, dv, WIDTH, BLOCK_WIDTH)
    factor = grad_score.to(q.dtype)
    dk = tl.dot(factor, q, input_precision=PRECISION) * scale
    store_block(grad_key + token_place, token, heads * WIDTH, token_kept, dk, WIDTH, BLOCK_WIDTH)
    dq = tl.dot(tl.trans(factor), k, input_precision=PRECISION) * scale
    store_block(grad_query + place * WIDTH, row, heads * WIDTH, row_kept, dq, WIDTH, BLOCK_WIDTH)
    if PER_ROW:
        tl.store(grad_weight + (place + row * heads)[None, :] * tokens + token[:, None], grad_score, mask=kept)
    elif WEIGHT_GRAD:
        tl.store(grad_weight + (video * heads + head) * tokens + token, tl.sum(grad_score, axis=1), mask=token_kept)
