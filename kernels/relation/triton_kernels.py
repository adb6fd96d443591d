"""The relation loss on a GPU, a tile of both relations at a time: log-sums of rows, then the loss and its gradient.

With Q = 2^(x - a_t) and P = 2^(y - b_t), x and y the scores to base 2 and a and b their log-sums over a row, the
gradient of the scores is Q - P, and token i's is scale sum_j (Q[i,j] - P[i,j] + Q[j,i] - P[j,i]) X_j. Scores are
symmetric: one tile of them gives Q[i,j] with the log-sums of its rows and Q[j,i] with those of its columns. So a
program owns a block of tokens i for good, walks all others, and adds to one accumulator; no atomics, no second kernel.

Tokens that count come first in each sequence, `counts` of them. What is behind them is loaded as 0, has a log-sum of
ABSENT and so no probability; only as columns of rows that count must it be masked. A causal walk meets it there on no
tile but the diagonal one, whose causal mask hides it.

B batch, L length, H relation heads, J and K widths of the student's and the teacher's; tiles are Q x Q.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# below every score and above every log-sum, and finite, so that differences are numbers
LOWEST = tl.constexpr(-1e30)
ABSENT = tl.constexpr(1e30)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load(ptr, first, count, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, Q: tl.constexpr):
    """Tokens first.. of a head [Q, BLOCK], with zeros behind the `count` of them."""
    row, column = tl.arange(0, Q)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = row < count - first
    if WIDTH != BLOCK:
        inside = inside & (column < WIDTH)
    return tl.load(ptr + first.to(tl.int64) * stride + (row * stride + column), mask=inside, other=0.0)


@triton.jit
def _scores(own, other, scale, PRECISION: tl.constexpr):
    """To base 2: `scale` holds log2(e)."""
    return tl.dot(own, tl.trans(other), input_precision=PRECISION) * scale


@triton.jit
def _online(peak, total, x):
    """The highest score of each row so far, and the sum of 2^(score - peak)."""
    higher = tl.maximum(peak, tl.max(x, 1))
    return higher, total * tl.exp2(peak - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)


@triton.jit
def log_sums_kernel(
    x_ptr, y_ptr, counts_ptr, a_ptr, b_ptr, length, heads, stride_x, stride_y, scale_x, scale_y,
    J: tl.constexpr, K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, Q: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 sum_s 2^score of a block of rows, for the student and for the teacher."""
    # the longest rows first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    batch, h, first = bh // heads, bh % heads, block * Q
    x_ptr, y_ptr = x_ptr + batch * length * stride_x + h * J, y_ptr + batch * length * stride_y + h * K
    count = tl.load(counts_ptr + batch)
    place = tl.arange(0, Q)
    t = first + place
    own_x = _load(x_ptr, first, count, stride_x, J, BLOCK_J, Q)
    own_y = _load(y_ptr, first, count, stride_y, K, BLOCK_K, Q)
    peak_x = tl.full((Q,), LOWEST, tl.float32)
    peak_y, total_x = peak_x, tl.zeros((Q,), tl.float32)
    total_y = total_x
    if CAUSAL:
        before = place[:, None] >= place[None, :]
        x, y = _scores(own_x, own_x, scale_x, PRECISION), _scores(own_y, own_y, scale_y, PRECISION)
        peak_x, total_x = _online(peak_x, total_x, tl.where(before, x, LOWEST))
        peak_y, total_y = _online(peak_y, total_y, tl.where(before, y, LOWEST))
    last = tl.where(first < count, block if CAUSAL else tl.cdiv(count, Q), 0)
    for other in range(0, last):
        start = other * Q
        x = _scores(own_x, _load(x_ptr, start, count, stride_x, J, BLOCK_J, Q), scale_x, PRECISION)
        y = _scores(own_y, _load(y_ptr, start, count, stride_y, K, BLOCK_K, Q), scale_y, PRECISION)
        if not CAUSAL:
            there = (start + place < count)[None, :]
            x, y = tl.where(there, x, LOWEST), tl.where(there, y, LOWEST)
        peak_x, total_x = _online(peak_x, total_x, x)
        peak_y, total_y = _online(peak_y, total_y, y)
    a = tl.where(t < count, peak_x + tl.log2(tl.maximum(total_x, 1.0)), ABSENT)
    b = tl.where(t < count, peak_y + tl.log2(tl.maximum(total_y, 1.0)), ABSENT)
    line = bh * length
    tl.store(a_ptr + line + t, a, mask=t < length)
    tl.store(b_ptr + line + t, b, mask=t < length)


@triton.jit
def _residual(x, y):
    """Q - P, and P, from their logs to base 2."""
    p = tl.exp2(y)
    return tl.exp2(x) - p, p


@triton.jit
def _divergence(x, y, p, residual):
    """Of each row, in nats, from x = log2 Q, y = log2 P, P, and Q - P.

    Sums of P and of Q being 1, their difference adds nothing, but it takes away the first order of the log-sums' error.
    """
    return tl.sum(p * (y - x) * LN2 + residual, 1)


@triton.jit
def gradient_kernel(
    x_ptr, y_ptr, counts_ptr, a_ptr, b_ptr, dx_ptr, loss_ptr, length, heads, stride_x, stride_y, scale_x, scale_y,
    gradient_scale, J: tl.constexpr, K: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, Q: tl.constexpr,
    CAUSAL: tl.constexpr, WANT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of the divergences of a block of rows, and where wanted its tokens' gradient."""
    blocks = tl.num_programs(0)
    block = blocks - 1 - tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    batch, h, first = bh // heads, bh % heads, block * Q
    x_ptr, y_ptr = x_ptr + batch * length * stride_x + h * J, y_ptr + batch * length * stride_y + h * K
    a_ptr, b_ptr = a_ptr + bh * length, b_ptr + bh * length
    count = tl.load(counts_ptr + batch)
    place = tl.arange(0, Q)
    t = first + place
    own_x = _load(x_ptr, first, count, stride_x, J, BLOCK_J, Q)
    own_y = _load(y_ptr, first, count, stride_y, K, BLOCK_K, Q)
    own_a = tl.load(a_ptr + t, mask=t < count, other=ABSENT)
    own_b = tl.load(b_ptr + t, mask=t < count, other=ABSENT)
    dx = tl.zeros((Q, BLOCK_J), tl.float32)
    loss = tl.zeros((Q,), tl.float32)
    if CAUSAL:
        before = place[:, None] >= place[None, :]
        x, y = _scores(own_x, own_x, scale_x, PRECISION), _scores(own_y, own_y, scale_y, PRECISION)
        x = tl.where(before, x, LOWEST) - own_a[:, None]
        y = tl.where(before, y, LOWEST) - own_b[:, None]
        rows, p = _residual(x, y)
        loss += _divergence(x, y, p, rows)
        if WANT:
            rows += tl.trans(rows)
            dx = tl.dot(rows.to(own_x.dtype), own_x, dx, input_precision=PRECISION)
    last = tl.where(first < count, block if CAUSAL else tl.cdiv(count, Q), 0)
    for other in range(0, last):
        start = other * Q
        s = start + place
        other_x = _load(x_ptr, start, count, stride_x, J, BLOCK_J, Q)
        other_y = _load(y_ptr, start, count, stride_y, K, BLOCK_K, Q)
        x, y = _scores(own_x, other_x, scale_x, PRECISION), _scores(own_y, other_y, scale_y, PRECISION)
        if not CAUSAL:
            x, y = tl.where((s < count)[None, :], x, LOWEST), tl.where((s < count)[None, :], y, LOWEST)
        rows, p = _residual(x - own_a[:, None], y - own_b[:, None])
        loss += _divergence(x - own_a[:, None], y - own_b[:, None], p, rows)
        if WANT:
            if not CAUSAL:
                a = tl.load(a_ptr + s, mask=s < count, other=ABSENT)[None, :]
                b = tl.load(b_ptr + s, mask=s < count, other=ABSENT)[None, :]
                columns, p = _residual(x - a, y - b)
                rows += columns
            dx = tl.dot(rows.to(other_x.dtype), other_x, dx, input_precision=PRECISION)
    if CAUSAL and WANT:
        for other in range(block + 1, tl.cdiv(count, Q)):
            start = other * Q
            s = start + place
            other_x = _load(x_ptr, start, count, stride_x, J, BLOCK_J, Q)
            other_y = _load(y_ptr, start, count, stride_y, K, BLOCK_K, Q)
            a = tl.load(a_ptr + s, mask=s < count, other=ABSENT)[None, :]
            b = tl.load(b_ptr + s, mask=s < count, other=ABSENT)[None, :]
            x, y = _scores(own_x, other_x, scale_x, PRECISION), _scores(own_y, other_y, scale_y, PRECISION)
            columns, p = _residual(x - a, y - b)
            dx = tl.dot(columns.to(other_x.dtype), other_x, dx, input_precision=PRECISION)
    tl.store(loss_ptr + bh * blocks + block, tl.sum(loss, 0))
    if WANT:
        column = tl.arange(0, BLOCK_J)[None, :]
        at = dx_ptr + batch * length * stride_x + h * J + t.to(tl.int64)[:, None] * stride_x + column
        dx = tl.where((t < count)[:, None], dx * gradient_scale, 0.0)
        tl.store(at, dx, mask=(t < length)[:, None] & (column < J))
