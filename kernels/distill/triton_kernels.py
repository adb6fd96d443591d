"""Losses and gradients of a chunk's logits in one Triton kernel, a program for each token.

Rows are read in blocks: once for the log-sum-exps, online; once more for KL(q||p) and the Jensen-Shannon divergence,
whose gradients contain a sum of their own; and once to write the gradients. Sums are float32,
exponentials and logarithms to base 2: with y = s log2(e) / tau, log q = ln2 (y - log2 sum 2^y). q is the student, p the
teacher.
"""

# ruff: noqa: C901, RUF059
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# FLOOR of objective.py, to base 2, and its IGNORED
FLOOR2: tl.constexpr = tl.constexpr(-144.26950408889634)
IGNORED: tl.constexpr = tl.constexpr(-100)
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
# below every logit, and finite, so that differences from it are numbers
LOWEST: tl.constexpr = tl.constexpr(-3e38)


@triton.jit
def _logits(raw, bias_ptr, columns, inside, scale, softcap, BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """Logits in float32 from a row of h W^T, and their slope towards it."""
    z = raw.to(tl.float32)
    if BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    z *= scale
    slope = scale
    if CAPPED:
        bend = 2.0 * tl.sigmoid(z * (2.0 / softcap)) - 1.0
        z = softcap * bend
        slope = scale * (1.0 - bend * bend)
    return z, slope


@triton.jit
def _load(row_ptr, bias_ptr, columns, inside, scale, softcap, BIAS: tl.constexpr, CAPPED: tl.constexpr):
    raw = tl.load(row_ptr + columns, mask=inside, other=0.0)
    return _logits(raw, bias_ptr, columns, inside, scale, softcap, BIAS, CAPPED)


@triton.jit
def _online(peak, total, y):
    """A running maximum, LOWEST at first, and the sum of 2^(y - maximum), one block further."""
    higher = tl.maximum(peak, tl.max(y, axis=0))
    return higher, total * tl.exp2(peak - higher) + tl.sum(tl.exp2(y - higher), axis=0)


@triton.jit
def _both(log_a, log_b):
    """log2(2^a + 2^b)."""
    peak = tl.maximum(log_a, log_b)
    return peak + tl.log2(tl.exp2(log_a - peak) + tl.exp2(log_b - peak))


@triton.jit
def _divergence(log_q, log_p, inside, beta, LOSS: tl.constexpr):
    """For each token of the vocabulary, to base 2: its term of the divergence, q, and what q is weighted with."""
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    if LOSS == "reverse_kl":
        slope = log_q - tl.maximum(log_p, FLOOR2)
        term = q * slope
    elif LOSS == "jsd":
        # where both probabilities underflow they weigh nothing, and the floor keeps 0 times the logarithm 0
        log_m = tl.log2(tl.maximum(beta * p + (1.0 - beta) * q, TINY))
        slope = log_q - log_m
        term = beta * p * (log_p - log_m) + (1.0 - beta) * q * slope
    else:
        slope = q - p
        term = p * (log_p - log_q)
    return tl.where(inside, term, 0.0), tl.where(inside, q, 0.0), slope


@triton.jit
def _labelled(labels_ptr, share_ptr, row):
    """A row's label, 0 where it has none, and the weight of its cross-entropy."""
    label = tl.load(labels_ptr + row)
    known = label != IGNORED
    return tl.where(known, label, 0), tl.where(known, tl.load(share_ptr), 0.0)


@triton.jit
def heads_kernel(
    student_ptr, teacher_ptr, grads_ptr, q_bias_ptr, p_bias_ptr, labels_ptr, share_ptr, losses_ptr,
    student_stride, teacher_stride, grads_stride, vocabulary,
    temperature, beta, q_scale, p_scale, q_cap, p_cap,
    LOSS: tl.constexpr, Q_BIAS: tl.constexpr, Q_CAPPED: tl.constexpr, P_BIAS: tl.constexpr,
    P_CAPPED: tl.constexpr, LABELS: tl.constexpr, GRADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses[r] = tau^2 d(p, q) + share * cross-entropy of row r; grads[r] its gradient for h W^T + b.

    grads may be student.
    """
    row = tl.program_id(0).to(tl.int64)
    q_ptr, p_ptr = student_ptr + row * student_stride, teacher_ptr + row * teacher_stride
    out_ptr = grads_ptr + row * grads_stride
    rate, low = (1.0 / temperature) * LOG2E, float("-inf")
    lowest = tl.full([], LOWEST, tl.float32)
    peak_q, sum_q, peak_p, sum_p, peak_z, sum_z = lowest, 0.0, lowest, 0.0, lowest, 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        z, _ = _load(q_ptr, q_bias_ptr, columns, inside, q_scale, q_cap, Q_BIAS, Q_CAPPED)
        t, _ = _load(p_ptr, p_bias_ptr, columns, inside, p_scale, p_cap, P_BIAS, P_CAPPED)
        peak_q, sum_q = _online(peak_q, sum_q, tl.where(inside, z * rate, low))
        peak_p, sum_p = _online(peak_p, sum_p, tl.where(inside, t * rate, low))
        if LABELS:
            peak_z, sum_z = _online(peak_z, sum_z, tl.where(inside, z * LOG2E, low))
    log_sum_q, log_sum_p, log_sum_z = peak_q + tl.log2(sum_q), peak_p + tl.log2(sum_p), 0.0

    label, share, ce = 0, 0.0, 0.0
    if LABELS:
        log_sum_z = peak_z + tl.log2(sum_z)
        label, share = _labelled(labels_ptr, share_ptr, row)
        z_label, bend_label = _load(q_ptr, q_bias_ptr, label, True, q_scale, q_cap, Q_BIAS, Q_CAPPED)
        ce = share * (log_sum_z * LN2 - z_label)
        # before other warps write over that logit
        tl.debug_barrier()

    terms, centres = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if LOSS != "kl":
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            z, _ = _load(q_ptr, q_bias_ptr, columns, inside, q_scale, q_cap, Q_BIAS, Q_CAPPED)
            t, _ = _load(p_ptr, p_bias_ptr, columns, inside, p_scale, p_cap, P_BIAS, P_CAPPED)
            term, q, slope = _divergence(z * rate - log_sum_q, t * rate - log_sum_p, inside, beta, LOSS)
            terms += term
            centres += q * slope
    centre = tl.sum(centres, axis=0)

    if GRADS or LOSS == "kl":
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            z, bend = _load(q_ptr, q_bias_ptr, columns, inside, q_scale, q_cap, Q_BIAS, Q_CAPPED)
            t, _ = _load(p_ptr, p_bias_ptr, columns, inside, p_scale, p_cap, P_BIAS, P_CAPPED)
            term, q, slope = _divergence(z * rate - log_sum_q, t * rate - log_sum_p, inside, beta, LOSS)
            if LOSS == "kl":
                terms += term
                grad = slope * temperature
            elif LOSS == "reverse_kl":
                grad = q * (slope - centre) * (LN2 * temperature)
            else:
                grad = q * (slope - centre) * ((1.0 - beta) * LN2 * temperature)
            if LABELS:
                grad += share * (tl.exp2(z * LOG2E - log_sum_z) - tl.where(columns == label, 1.0, 0.0))
            if GRADS:
                tl.store(out_ptr + columns, (grad * bend).to(grads_ptr.dtype.element_ty), mask=inside)
    tl.store(losses_ptr + row, tl.sum(terms, axis=0) * (LN2 * temperature * temperature) + ce)


@triton.jit
def buckets_kernel(
    student_ptr, grads_ptr, bias_ptr, indices_ptr, log_probs_ptr, log_tail_ptr, labels_ptr, share_ptr, losses_ptr,
    student_stride, grads_stride, vocabulary, known, temperature, scale, softcap,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, LABELS: tl.constexpr, GRADS: tl.constexpr, KNOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As heads_kernel, for a teacher of `known` tokens and a tail.

    The known tokens' logits are taken out of the row first, and -inf marks their places, so that the rest is whatever
    is not -inf; their gradients are written last.
    """
    row = tl.program_id(0).to(tl.int64)
    row_ptr, out_ptr = student_ptr + row * student_stride, grads_ptr + row * grads_stride
    rate, low = (1.0 / temperature) * LOG2E, float("-inf")
    kept = tl.arange(0, KNOWN)
    have = kept < known
    index = tl.load(indices_ptr + row * known + kept, mask=have, other=0)
    z_known, bend_known = _load(row_ptr, bias_ptr, index, have, scale, softcap, BIAS, CAPPED)
    label, share, z_label = 0, 0.0, 0.0
    if LABELS:
        label, share = _labelled(labels_ptr, share_ptr, row)
        z_label, bend_label = _load(row_ptr, bias_ptr, label, True, scale, softcap, BIAS, CAPPED)
    tl.debug_barrier()
    tl.store(row_ptr + index, tl.full([KNOWN], low, tl.float32).to(student_ptr.dtype.element_ty), mask=have)
    tl.debug_barrier()

    lowest = tl.full([], LOWEST, tl.float32)
    peak_y, sum_y, peak_z, sum_z = lowest, 0.0, lowest, 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        raw = tl.load(row_ptr + columns, mask=inside, other=low).to(tl.float32)
        rest = raw != low
        z, _ = _logits(tl.where(rest, raw, 0.0), bias_ptr, columns, inside, scale, softcap, BIAS, CAPPED)
        peak_y, sum_y = _online(peak_y, sum_y, tl.where(rest, z * rate, low))
        if LABELS:
            peak_z, sum_z = _online(peak_z, sum_z, tl.where(rest, z * LOG2E, low))
    peak_known, sum_known = _online(lowest, 0.0, tl.where(have, z_known * rate, low))
    # finite where no token is left, and then below all others
    log_rest = peak_y + tl.log2(tl.maximum(sum_y, TINY))
    log_sum = _both(peak_known + tl.log2(sum_known), log_rest)
    log_sum_z, ce = 0.0, 0.0
    if LABELS:
        peak_label, sum_label = _online(lowest, 0.0, tl.where(have, z_known * LOG2E, low))
        log_sum_z = _both(peak_label + tl.log2(sum_label), peak_z + tl.log2(tl.maximum(sum_z, TINY)))
        ce = share * (log_sum_z * LN2 - z_label)

    log_p = tl.load(log_probs_ptr + row * known + kept, mask=have, other=0.0)
    log_tail = tl.load(log_tail_ptr + row)
    p = tl.where(have, tl.exp2(log_p * LOG2E), 0.0)
    tail = tl.exp2(log_tail * LOG2E)
    log_q = z_known * rate - log_sum
    terms = tl.where(have, p * (log_p - log_q * LN2), 0.0)
    kl = tl.sum(terms, axis=0) + tail * (log_tail - (log_rest - log_sum) * LN2)
    tl.store(losses_ptr + row, kl * temperature * temperature + ce)

    if GRADS:
        excess = (tl.exp2(log_rest - log_sum) - tail) * temperature
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            raw = tl.load(row_ptr + columns, mask=inside, other=low).to(tl.float32)
            rest = raw != low
            z, bend = _logits(tl.where(rest, raw, 0.0), bias_ptr, columns, inside, scale, softcap, BIAS, CAPPED)
            grad = excess * tl.exp2(tl.where(rest, z * rate - log_rest, low))
            if LABELS:
                grad += share * (tl.exp2(z * LOG2E - log_sum_z) - tl.where(columns == label, 1.0, 0.0))
            tl.store(out_ptr + columns, (grad * bend).to(grads_ptr.dtype.element_ty), mask=rest)
        grad_known = (tl.exp2(log_q) - p) * temperature
        if LABELS:
            grad_known += share * (tl.exp2(z_known * LOG2E - log_sum_z) - tl.where(index == label, 1.0, 0.0))
        tl.store(out_ptr + index, (grad_known * bend_known).to(grads_ptr.dtype.element_ty), mask=have)
