"""Kernels on the matrix units for sets of any size: one pair per program, its tokens block by block, each read once.

The forward pass keeps a running softmax. The backward pass is one kernel where one block holds all queries: what it must know of a
query before it meets the first token, sum_n p dp, is the inner product of the output and its gradient. It is taken the way that dp is
taken, by the matrix units: where one token has all the weight, the two are the same number, and their difference is exactly 0. But the
output was rounded, and so the gradient of the log-weights, which keeps every digit of float32, is left to other kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import diagonal, finite_or_zero, load_block, load_weights, pair_of_program, store_block


@triton.jit(do_not_specialize=["heads", "rows", "tokens"])
def stream_forward(
    query, key, value, log_weight, output, log_evidence,
    heads, rows, tokens, scale,
    query_b, query_r, query_h, key_b, key_n, key_h, value_b, value_n, value_h, weight_b, weight_r, weight_n,
    WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and evidence of ``BLOCK_ROWS`` queries of one pair; a token that none of them can see is not read.

    Grid: (pairs, rows / BLOCK_ROWS).
    """
    video, head = pair_of_program(heads)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_kept = row < rows
    q = load_block(query + video * query_b + head * query_h, row, query_r, row_kept, WIDTH, BLOCK_WIDTH)
    key += video * key_b + head * key_h
    value += video * value_b + head * value_h
    peak = tl.full([BLOCK_ROWS], float("-inf"), dtype=ACC)
    total = tl.zeros([BLOCK_ROWS], dtype=ACC)
    out = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], dtype=ACC)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        kept = row_kept[:, None] & (token < tokens)[None, :]
        weight = load_weights(log_weight, video * weight_b, row, weight_r, token, weight_n, kept, WEIGHTED, ACC)
        seen = tl.max(weight, axis=0) > float("-inf")
        k = load_block(key, token, key_n, seen, WIDTH, BLOCK_WIDTH)
        v = load_block(value, token, value_n, seen, WIDTH, BLOCK_WIDTH)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + weight
        new_peak = tl.maximum(peak, tl.max(score, axis=1))
        shift = finite_or_zero(new_peak)
        decay = tl.exp(peak - shift)
        probability = tl.exp(score - shift[:, None])
        total = total * decay + tl.sum(probability, axis=1)
        out = out * decay[:, None] + tl.dot(probability.to(v.dtype), v, input_precision=PRECISION)
        peak = new_peak
    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)
    place = video * rows * heads + head
    store_block(output + place * WIDTH, row, heads * WIDTH, row_kept, out * (1.0 / safe_total)[:, None], WIDTH, BLOCK_WIDTH)
    evidence = tl.where(empty, float("-inf"), peak + tl.log(safe_total))
    tl.store(log_evidence + place + row * heads, evidence, mask=row_kept)


@triton.jit(do_not_specialize=["heads", "rows", "tokens"])
def stream_backward(
    grad_output, grad_log_evidence, query, key, value, log_weight, output, log_evidence,
    grad_query, grad_key, grad_value,
    heads, rows, tokens, scale,
    query_b, query_r, query_h, key_b, key_n, key_h, value_b, value_n, value_h, weight_b, weight_r, weight_n,
    WEIGHTED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of query, key and value of one pair. Grid: (pairs)."""
    video, head = pair_of_program(heads)
    row = tl.arange(0, BLOCK_ROWS)
    row_kept = row < rows
    place = video * rows * heads + head
    token_place = video * tokens * heads + head
    q = load_block(query + video * query_b + head * query_h, row, query_r, row_kept, WIDTH, BLOCK_WIDTH)
    do = load_block(grad_output + place * WIDTH, row, heads * WIDTH, row_kept, WIDTH, BLOCK_WIDTH)
    out = load_block(output + place * WIDTH, row, heads * WIDTH, row_kept, WIDTH, BLOCK_WIDTH)
    evidence = tl.load(log_evidence + place + row * heads, mask=row_kept, other=float("-inf"))
    grad_evidence = tl.load(grad_log_evidence + place + row * heads, mask=row_kept, other=0.0)
    baseline = diagonal(tl.dot(out, tl.trans(do), input_precision=PRECISION)) - tl.where(evidence == float("-inf"), 0.0, grad_evidence)
    shift = finite_or_zero(evidence)
    key += video * key_b + head * key_h
    value += video * value_b + head * value_h
    dq = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], dtype=ACC)
    for start in range(0, tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        token_kept = token < tokens
        kept = token_kept[:, None] & row_kept[None, :]
        weight = load_weights(log_weight, video * weight_b, token, weight_n, row, weight_r, kept, WEIGHTED, ACC)
        k = load_block(key, token, key_n, token_kept, WIDTH, BLOCK_WIDTH)
        v = load_block(value, token, value_n, token_kept, WIDTH, BLOCK_WIDTH)
        score = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + weight
        probability = tl.exp(score - shift[None, :])
        grad_probability = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        grad_score = probability * (grad_probability - baseline[None, :])
        dv = tl.dot(probability.to(do.dtype), do, input_precision=PRECISION)
        store_block(grad_value + token_place * WIDTH, token, heads * WIDTH, token_kept, dv, WIDTH, BLOCK_WIDTH)
        factor = grad_score.to(q.dtype)
        dk = tl.dot(factor, q, input_precision=PRECISION) * scale
        store_block(grad_key + token_place * WIDTH, token, heads * WIDTH, token_kept, dk, WIDTH, BLOCK_WIDTH)
        dq += tl.dot(tl.trans(factor), k, input_precision=PRECISION)
    store_block(grad_query + place * WIDTH, row, heads * WIDTH, row_kept, dq * scale, WIDTH, BLOCK_WIDTH)
