"""Device code of the free-energy loss: three kernels, and the functions they are made of.

A program takes some queries and reads their logits once, as one tile ``[ROWS, BLOCK_V, BLOCK_C]``. Everything that follows, active
inference, fusion and all terms, is a reduction of that tile or a function of the few numbers ``[ROWS, BLOCK_V]`` it leaves.

``ROW_PER_THREAD``: for few classes every thread owns whole queries, so that nothing crosses threads. A compiler that sees
consecutive addresses spreads a query over neighbouring threads instead, and then spends more on exchanging sums of five classes
than on the classes. It spreads first the dimension that it believes to be the most contiguous in memory; of equals, one version of
Triton takes the first and another the last. So ``_address`` calls the queries contiguous, which they are not, and takes back
whatever is known of the alignment, so that nothing can follow from it but loads of single elements through each thread's own
pointers. Where the classes are spread over threads, it puts the queries before the views in the same way. Neighbouring
queries share cache lines: nothing is read from memory twice. Entries that only pad a tile are constants to the compiler (the
last line of ``_read_views``), which then drops all work on them. Stores are left to the compiler, which exchanges the tile
through shared memory to write it in order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exp(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], tl.float32, is_pure=True, pack=1)
    return tl.exp(x)


@triton.jit
def _log(x, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        log2 = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        return log2 * 0.6931471805599453
    return tl.log(x)


@triton.jit
def _xlogx(x, APPROXIMATE: tl.constexpr):
    return tl.where(x > 1.2e-38, x * _log(x, APPROXIMATE), 0.0)  # below lie numbers that the approximation takes for 0


@triton.jit
def _one_if_zero(x):
    return tl.where(x == 0, 1.0, x)


@triton.jit
def _finite_or_zero(x):
    """x, 0 where it is -inf: exp(-inf - 0) is the 0 that a class or view left out needs, exp(-inf + inf) is NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _log_softmax(x, APPROXIMATE: tl.constexpr):
    """Ln softmax over the second dimension and the logarithm of its sum ``[ROWS]``, -inf where all are -inf."""
    peak = _finite_or_zero(tl.max(x, axis=1))
    total = tl.sum(_exp(x - peak[:, None], APPROXIMATE), axis=1)
    log_total = peak + _log(_one_if_zero(total), APPROXIMATE)
    return x - log_total[:, None], tl.where(total == 0, float("-inf"), log_total)


@triton.jit
def pack_model(
    likelihood, outcome_likelihood, log_preference, state_prior, habit, precision, table,
    V: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, TINY: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The generative model as the forward pass reads it, one table in the accumulation dtype, logarithms taken. Grid: (VKOV / BLOCK).

    ln A [V, K, O, S], A_c[0] [S, U], A_c[1] [S, U], -sum_o A_c ln A_c [S, U], ln D [S], ln E [U], C [2], gamma.
    """
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = entry < V * K * BINS * V
    value = tl.load(likelihood + entry, mask=kept, other=1.0).to(ACC)
    tl.store(table + entry, tl.log(tl.maximum(value, TINY, propagate_nan=tl.PropagateNan.ALL)), mask=kept)
    if tl.program_id(0) == 0:
        table += V * K * BINS * V
        square = tl.arange(0, BLOCK_V * BLOCK_V)
        inside = square < V * V
        correct = tl.load(outcome_likelihood + square, mask=inside, other=1.0).to(ACC)
        wrong = tl.load(outcome_likelihood + V * V + square, mask=inside, other=1.0).to(ACC)
        tl.store(table + square, correct, mask=inside)
        tl.store(table + V * V + square, wrong, mask=inside)
        tl.store(table + 2 * V * V + square, -_xlogx(correct, False) - _xlogx(wrong, False), mask=inside)
        table += 3 * V * V
        view = tl.arange(0, BLOCK_V)
        tl.store(table + view, tl.log(tl.load(state_prior + view, mask=view < V, other=1.0).to(ACC)), mask=view < V)
        tl.store(table + V + view, tl.log(tl.load(habit + view, mask=view < V, other=1.0).to(ACC)), mask=view < V)
        tl.store(table + 2 * V, tl.load(log_preference).to(ACC))
        tl.store(table + 2 * V + 1, tl.load(log_preference + 1).to(ACC))
        tl.store(table + 2 * V + 2, tl.load(precision).to(ACC))


@triton.jit
def _address(base, offset, LAST: tl.constexpr, ROW_PER_THREAD: tl.constexpr):
    """Pointers ``[ROWS, BLOCK_V, LAST]``, with hints on how to spread them over the threads (see the head of this file)."""
    place = base + offset
    if ROW_PER_THREAD:
        place = tl.max_contiguous(tl.multiple_of(place, [1, 1, 1]), [2, 1, 1])
    elif LAST > 2:  # of two, it would be no more contiguous than the queries are called
        place = tl.max_contiguous(place, [2, 1, LAST])
    return place


@triton.jit
def _address_of_views(base, row, V: tl.constexpr, STEP: tl.constexpr, BLOCK_V: tl.constexpr, ROW_PER_THREAD: tl.constexpr):
    """Pointers ``[ROWS, BLOCK_V]`` to what has ``STEP`` numbers for each view of a query, with the same hints."""
    place = base + row[:, None] * (V * STEP) + tl.arange(0, BLOCK_V)[None, :] * STEP
    if ROW_PER_THREAD:
        place = tl.max_contiguous(tl.multiple_of(place, [1, 1]), [2, 1])
    return place


@triton.jit
def _read_views(
    logits, present, row, rows,
    PRESENT: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
    ROW_PER_THREAD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Logits less each view's maximum ``[ROWS, BLOCK_V, BLOCK_C]``, and the number of each view's classes ``[ROWS, BLOCK_V]``.

    The number is 0 in views that take no part; whatever their logits hold has to be masked by it at the end.
    """
    view = tl.arange(0, BLOCK_V)
    column = tl.arange(0, BLOCK_C)
    inside = (view < V)[None, :, None] & (column < C)[None, None, :]
    exists = (row < rows)[:, None]
    offset = row[:, None, None] * (V * C) + view[None, :, None] * C + column[None, None, :]
    place = _address(logits, offset, BLOCK_C, ROW_PER_THREAD)
    z = tl.load(place, mask=inside & exists[:, :, None], other=float("-inf")).to(ACC)
    number = tl.sum(tl.where(inside, (z != float("-inf")).to(tl.int32), 0), axis=2)  # NaN counts, so that it is seen
    if PRESENT:
        mask = exists & (view < V)[None, :]
        there = tl.load(_address_of_views(present, row, V, 1, BLOCK_V, ROW_PER_THREAD), mask=mask, other=0)
        number = tl.where((there != 0) & (view < V)[None, :], number, 0)
    peak = _finite_or_zero(tl.max(z, axis=2))
    return tl.where(inside, z - peak[:, :, None], float("-inf")), number


@triton.jit
def _masses(z, tau, TEMPERED: tl.constexpr, APPROXIMATE: tl.constexpr):
    """exp(z / tau), and its sum over the classes."""
    masses = _exp(z * (1.0 / tau), APPROXIMATE) if TEMPERED else _exp(z, APPROXIMATE)
    return masses, _one_if_zero(tl.sum(masses, axis=2))


@triton.jit
def _certainty(z, masses, total, log_total, number, APPROXIMATE: tl.constexpr):
    """1 - H(p)/ln C of every view."""
    entropy = log_total - tl.sum(masses * _finite_or_zero(z), axis=2) / total
    certainty = 1.0 - entropy / _log(tl.maximum(number, 2).to(total.dtype), APPROXIMATE)
    return tl.where(number > 1, certainty, 1.0)


@triton.jit
def _evidence_of_states(
    evidence, there, log_likelihood,
    V: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr, BLOCK_V: tl.constexpr, ROW_PER_THREAD: tl.constexpr,
):  # fmt: skip
    """Sum over views and the two nearest bins of o ln A ``[ROWS, S]``, for one channel; ``log_likelihood`` begins at that channel."""
    view = tl.arange(0, BLOCK_V)
    inside = (view < V)[None, :, None] & (view < V)[None, None, :]
    position = tl.clamp(evidence, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL) * (BINS - 1)
    low = tl.minimum(tl.maximum(position.to(tl.int32), 0), BINS - 2)  # within the table even for NaN
    share = (position - low.to(position.dtype))[:, :, None]
    entry = log_likelihood + (view[None, :] * (K * BINS * V) + low * V)[:, :, None]
    place = _address(entry, view[None, None, :], BLOCK_V, ROW_PER_THREAD)
    below = tl.load(place, mask=inside, other=0.0)
    above = tl.load(_address(place, V, BLOCK_V, ROW_PER_THREAD), mask=inside, other=0.0)
    return tl.sum(tl.where(inside & there[:, :, None], below + share * (above - below), 0.0), axis=1)


@triton.jit
def _infer_log_policy(scores, there, table, V: tl.constexpr, BLOCK_V: tl.constexpr, APPROXIMATE: tl.constexpr):
    """q(s) and ln pi_u ``[ROWS, BLOCK_V]`` from the evidence of the states; ``table`` begins at A_c[0]."""
    view = tl.arange(0, BLOCK_V)
    is_view = view < V
    log_prior = tl.load(table + 3 * V * V + view, mask=is_view, other=float("-inf"))
    log_habit = tl.load(table + 3 * V * V + V + view, mask=is_view, other=float("-inf"))
    log_state, _ = _log_softmax(tl.where(there, scores + log_prior[None, :], float("-inf")), APPROXIMATE)
    state = _exp(log_state, APPROXIMATE)
    entry = view[:, None] * V + view[None, :]
    square = is_view[:, None] & is_view[None, :]
    q = state[:, :, None]
    correct = tl.sum(q * tl.load(table + entry, mask=square, other=0.0)[None, :, :], axis=1)
    wrong = tl.sum(q * tl.load(table + V * V + entry, mask=square, other=0.0)[None, :, :], axis=1)
    ambiguity = tl.sum(q * tl.load(table + 2 * V * V + entry, mask=square, other=0.0)[None, :, :], axis=1)
    numbers = table + 3 * V * V + 2 * V
    risk = _xlogx(correct, APPROXIMATE) - correct * tl.load(numbers) + _xlogx(wrong, APPROXIMATE) - wrong * tl.load(numbers + 1)
    weight = log_habit[None, :] - tl.load(numbers + 2) * (risk + ambiguity)
    log_policy, _ = _log_softmax(tl.where(there, weight, float("-inf")), APPROXIMATE)
    return state, log_policy


@triton.jit
def _find_teacher(policy, margin, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """Index of the teacher or -1, and its policy or 0, ``[ROWS]``."""
    view = tl.arange(0, BLOCK_V)[None, :]
    best = tl.max(policy, axis=1)
    index = tl.argmax(policy, axis=1)
    second = tl.max(tl.where((view < V) & (view != index[:, None]), policy, float("-inf")), axis=1)
    teaches = (best > 0) & (best - second > margin)
    return tl.where(teaches, index, -1), tl.where(teaches, best, 0.0)


@triton.jit
def _teacher_of(tile, group, BLOCK_V: tl.constexpr):
    """The teacher's classes ``[ROWS, 1, BLOCK_C]``: exactly the numbers it has in the tile, 0 without a teacher."""
    chosen = tl.arange(0, BLOCK_V)[None, :] == group[:, None]
    return tl.sum(tl.where(chosen[:, :, None], tile, 0.0), axis=1)[:, None, :]


@triton.jit
def _divergence(z, there, log_total, group, tau, TEMPERED: tl.constexpr, BLOCK_V: tl.constexpr, APPROXIMATE: tl.constexpr):
    """Sum over the students of tau^2 KL(teacher || student) ``[ROWS]``, on the scale tau ln p, where every difference is finite.

    The teacher's numbers are taken from the tile it is compared with, not computed anew: equal views differ by exactly 0 however
    the compiler contracts products and sums.
    """
    if TEMPERED:
        _, total = _masses(z, tau[:, :, None], True, APPROXIMATE)
        log_total = tau * _log(total, APPROXIMATE)
    scaled = z - log_total[:, :, None]
    teacher = _teacher_of(scaled, group, BLOCK_V)
    probability = _exp(teacher * (1.0 / tau)[:, :, None], APPROXIMATE) if TEMPERED else _exp(teacher, APPROXIMATE)
    one = tau * tl.sum(tl.where(probability > 0, probability * (teacher - scaled), 0.0), axis=2)
    student = there & (tl.arange(0, BLOCK_V)[None, :] != group[:, None])
    return tl.sum(tl.where(student, one, 0.0), axis=1)


@triton.jit(do_not_specialize=["rows"])
def free_energy_forward(
    logits, target, context, present, table,
    total_loss, task_loss, distillation_loss, cross_entropy_loss, state_out, policy_out, group_out, responsibility_out, teacher_policy_out,
    rows, temperature: tl.float64, margin: tl.float64, distillation_weight: tl.float64, cross_entropy_weight: tl.float64,
    PRESENT: tl.constexpr, TEMPERED: tl.constexpr, V: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr, C: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, ROW_PER_THREAD: tl.constexpr, ACC: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Beliefs, all terms and the factors of the gradient for ``ROWS`` queries. Grid: (rows / ROWS)."""
    tau = tl.full([1, 1], temperature, ACC)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    view = tl.arange(0, BLOCK_V)
    kept = exists[:, None] & (view < V)[None, :]
    z, number = _read_views(logits, present, row, rows, PRESENT, V, C, BLOCK_V, BLOCK_C, ROW_PER_THREAD, ACC)
    there = number > 0

    masses, total = _masses(z, tau[:, :, None], False, APPROXIMATE)
    log_total = _log(total, APPROXIMATE)
    certainty = _certainty(z, masses, total, log_total, number, APPROXIMATE)
    scores = _evidence_of_states(certainty, there, table, V, K, BINS, BLOCK_V, ROW_PER_THREAD)
    for k in range(1, K):
        address = _address_of_views(context + (k - 1), row, V, K - 1, BLOCK_V, ROW_PER_THREAD)
        evidence = tl.load(address, mask=kept, other=0.0).to(ACC)
        scores += _evidence_of_states(evidence, there, table + k * BINS * V, V, K, BINS, BLOCK_V, ROW_PER_THREAD)
    state, log_policy = _infer_log_policy(scores, there, table + V * K * BINS * V, V, BLOCK_V, APPROXIMATE)
    policy = _exp(log_policy, APPROXIMATE)
    place = row[:, None] * V + view[None, :]
    # Every result is stored as soon as it is known, which frees what it was made of.
    tl.store(state_out + place, state, mask=kept)
    tl.store(policy_out + place, policy, mask=kept)

    label = tl.load(target + row, mask=exists, other=0)
    is_label = tl.arange(0, BLOCK_C)[None, :] == label[:, None]
    label_log_prob = tl.sum(tl.where(is_label[:, None, :], z, 0.0), axis=2) - log_total
    label_log_prob = tl.where(((label >= 0) & (label < C))[:, None], label_log_prob, float("nan"))
    trusted = tl.where(there, log_policy + label_log_prob, float("-inf"))
    log_responsibility, log_evidence = _log_softmax(trusted, APPROXIMATE)
    task = tl.where(tl.sum(number, axis=1) > 0, -log_evidence, 0.0)
    cross_entropy = -tl.sum(tl.where(there, label_log_prob, 0.0), axis=1)
    tl.store(responsibility_out + place, tl.where(there, _exp(log_responsibility, APPROXIMATE), 0.0), mask=kept)
    tl.store(task_loss + row, task, mask=exists)
    tl.store(cross_entropy_loss + row, cross_entropy, mask=exists)

    group, teacher_policy = _find_teacher(policy, tl.full([1], margin, ACC), V, BLOCK_V)
    tl.store(group_out + row, group.to(tl.int64), mask=exists)
    tl.store(teacher_policy_out + row, teacher_policy, mask=exists)
    divergence = _divergence(z, there, log_total, group, tau, TEMPERED, BLOCK_V, APPROXIMATE)
    distillation = tl.where(group >= 0, teacher_policy * divergence, 0.0)
    share = tl.full([1], distillation_weight, ACC)
    fit_share = tl.full([1], cross_entropy_weight, ACC)
    loss = task + tl.where(share > 0, share * distillation, 0.0) + tl.where(fit_share > 0, fit_share * cross_entropy, 0.0)
    tl.store(distillation_loss + row, distillation, mask=exists)
    tl.store(total_loss + row, loss, mask=exists)


@triton.jit
def _grad(pointer, row, exists, GIVEN: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    if GIVEN:
        return tl.load(pointer + row, mask=exists, other=0.0).to(ACC)
    return tl.zeros([ROWS], ACC)


@triton.jit(do_not_specialize=["rows"])
def free_energy_backward(
    grad_total, grad_task, grad_distillation, grad_cross_entropy,
    logits, target, present, responsibility, teacher_policy, group, grad_logits,
    rows, temperature: tl.float64, distillation_weight: tl.float64, cross_entropy_weight: tl.float64,
    TOTAL: tl.constexpr, TASK: tl.constexpr, DISTILLATION: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
    PRESENT: tl.constexpr, TEMPERED: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, ROW_PER_THREAD: tl.constexpr, ACC: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits of ``ROWS`` queries from the factors of the forward pass. Grid: (rows / ROWS)."""
    tau = tl.full([1, 1, 1], temperature, ACC)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    view = tl.arange(0, BLOCK_V)
    column = tl.arange(0, BLOCK_C)
    z, number = _read_views(logits, present, row, rows, PRESENT, V, C, BLOCK_V, BLOCK_C, ROW_PER_THREAD, ACC)

    of_total = _grad(grad_total, row, exists, TOTAL, ROWS, ACC)
    task = _grad(grad_task, row, exists, TASK, ROWS, ACC) + of_total
    teaching = _grad(grad_distillation, row, exists, DISTILLATION, ROWS, ACC) + tl.full([1], distillation_weight, ACC) * of_total
    fitting = _grad(grad_cross_entropy, row, exists, CROSS_ENTROPY, ROWS, ACC) + tl.full([1], cross_entropy_weight, ACC) * of_total
    teaching *= tl.full([1], temperature, ACC) * tl.load(teacher_policy + row, mask=exists, other=0.0)
    kept = exists[:, None] & (view < V)[None, :]
    share = tl.load(_address_of_views(responsibility, row, V, 1, BLOCK_V, ROW_PER_THREAD), mask=kept, other=0.0)
    fit = task[:, None] * share + fitting[:, None]

    masses, total = _masses(z, tau, False, APPROXIMATE)
    probs = masses * (1.0 / total)[:, :, None]
    tempered = probs
    if TEMPERED:
        tempered_masses, tempered_total = _masses(z, tau, True, APPROXIMATE)
        tempered = tempered_masses * (1.0 / tempered_total)[:, :, None]
    # The teacher's numbers are taken from the tile: its own gradient, and that of its equals, is exactly 0.
    gap = tempered - _teacher_of(tempered, tl.load(group + row, mask=exists, other=-1).to(tl.int32), BLOCK_V)
    # 64 bits would cost registers; a class that 32 cannot hold has made its row NaN in the forward pass.
    is_label = column[None, :] == tl.load(target + row, mask=exists, other=0).to(tl.int32)[:, None]
    grad = fit[:, :, None] * (probs - is_label[:, None, :].to(ACC)) + teaching[:, None, None] * gap
    grad = tl.where((number > 0)[:, :, None], grad, 0.0)
    offset = row[:, None, None] * (V * C) + view[None, :, None] * C + column[None, None, :]
    tl.store(grad_logits + offset, grad.to(grad_logits.dtype.element_ty), mask=kept[:, :, None] & (column < C)[None, None, :])
