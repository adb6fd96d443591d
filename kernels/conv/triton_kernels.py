"""The causal convolution on a GPU: one kernel forwards, one backwards, one for a token of decoding.

The backward kernel walks: each of its rows goes through STEPS tokens with the last inputs and the unfinished gradients
in registers, so that every tensor is read once and only partial sums of dweight and dbias are left to be added.

K width of the convolution; `age` of a tap: how many tokens back it reaches, K-1 to 0.
"""

# ruff: noqa: C901
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _inputs(
    x_ptr, past_ptr, t, c, first, tokens, channels, x_t, past_t, past_c, K: tl.constexpr, PAST: tl.constexpr
):  # fmt: skip
    """Inputs of the tokens `first` + t; those before the sequence come from the past, else they are zero."""
    real = (c < channels)[None, :]
    place = first + t
    at = x_ptr + first.to(tl.int64) * x_t + t[:, None] * x_t + c[None, :]
    x = tl.load(at, mask=((place >= 0) & (place < tokens))[:, None] & real, other=0.0).to(tl.float32)
    if PAST:
        at = past_ptr + (place + K - 1)[:, None] * past_t + c[None, :] * past_c
        x += tl.load(at, mask=((place < 0) & (place > -K))[:, None] & real, other=0.0).to(tl.float32)
    return x


@triton.jit
def _documents(segment_ptr, t, tokens):
    """Documents of tokens; the past belongs to the first token's."""
    return tl.load(segment_ptr + tl.minimum(tl.maximum(t, 0), tokens - 1))


@triton.jit
def _tap(weight_ptr, c, channels, age: tl.constexpr, K: tl.constexpr):
    return tl.load(weight_ptr + c * K + (K - 1 - age), mask=c < channels, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _vector(ptr, c, channels, BLOCK_C: tl.constexpr, THERE: tl.constexpr):
    """One value per channel, zero where there is none."""
    values = tl.zeros((BLOCK_C,), tl.float32)
    if THERE:
        values += tl.load(ptr + c, mask=c < channels, other=0.0).to(tl.float32)
    return values[None, :]


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * x))


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, past_ptr, segment_ptr, y_ptr, tokens, channels, x_b, x_t, past_b, past_t, past_c,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    PAST: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """One tile of outputs; its K shifted inputs overlap, so all but one come from the cache."""
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) * BLOCK_T
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)
    x_ptr += b * x_b
    past_ptr += b * past_b
    segment_ptr += b * tokens
    y = tl.zeros((BLOCK_T, BLOCK_C), tl.float32) + _vector(bias_ptr, c, channels, BLOCK_C, BIAS)
    for age in tl.static_range(K):
        x = _inputs(x_ptr, past_ptr, t - age, c, first, tokens, channels, x_t, past_t, past_c, K, PAST)
        if SEGMENTS:
            same = _documents(segment_ptr, first + t - age, tokens) == _documents(segment_ptr, first + t, tokens)
            x = tl.where(same[:, None], x, 0.0)
        y += x * _tap(weight_ptr, c, channels, age, K)
    if SILU:
        y *= _sigmoid(y)
    at = y_ptr + (b * tokens + first) * channels + t[:, None] * channels + c[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(first + t < tokens)[:, None] & (c < channels)[None, :])


@triton.jit
def backward_kernel(
    x_ptr, weight_ptr, bias_ptr, past_ptr, segment_ptr, dy_ptr, dx_ptr, dpast_ptr, parts_ptr,
    tokens, channels, x_b, x_t, past_b, past_t, past_c, dy_b, dy_t,
    K: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK_C: tl.constexpr, BIAS: tl.constexpr,
    SILU: tl.constexpr, PAST: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """dx and dpast of ROWS x STEPS tokens, and their share of dweight and dbias [K + 1, C].

    A row begins K-1 tokens early, to have the inputs, and ends K-1 late, for the gradients that come back from there.
    At token t, x1 to x3 are the inputs before it and e0 to e3 what is known of the gradients of tokens t to t-3.
    """
    b = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0) * (ROWS * STEPS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = (c < channels)[None, :]
    row = tl.arange(0, ROWS) * STEPS
    x_ptr += b * x_b
    past_ptr += b * past_b
    dy_ptr += b * dy_b
    segment_ptr += b * tokens
    dx_ptr += b * tokens * channels
    bias = _vector(bias_ptr, c, channels, BLOCK_C, BIAS)
    w0 = _tap(weight_ptr, c, channels, 0, K)
    w1 = _tap(weight_ptr, c, channels, 1, K)
    zero = tl.zeros((ROWS, BLOCK_C), tl.float32)
    x1, x2, x3, e0, e1, e2, e3 = zero, zero, zero, zero, zero, zero, zero
    db, dw0, dw1, dw2, dw3 = zero, zero, zero, zero, zero
    w2, w3 = w1, w1
    if K > 2:
        w2 = _tap(weight_ptr, c, channels, 2, K)
    if K > 3:
        w3 = _tap(weight_ptr, c, channels, 3, K)
    d1 = row
    d2, d3 = d1, d1
    for i in range(0, STEPS + 2 * (K - 1)):
        first = start + i - (K - 1)
        t = first + row
        x0 = _inputs(x_ptr, past_ptr, row, c, first, tokens, channels, x_t, past_t, past_c, K, PAST)
        y1, y2, y3 = x1, x2, x3
        if SEGMENTS:
            d0 = _documents(segment_ptr, t, tokens)
            y1 = tl.where((d1 == d0)[:, None], x1, 0.0)
            y2 = tl.where((d2 == d0)[:, None], x2, 0.0)
            y3 = tl.where((d3 == d0)[:, None], x3, 0.0)
        at = dy_ptr + first.to(tl.int64) * dy_t + row[:, None] * dy_t + c[None, :]
        # of the tokens before the row only the inputs count
        g = tl.load(at, mask=((i >= K - 1) & (t < tokens))[:, None] & real, other=0.0).to(tl.float32)
        if SILU:
            y = bias + x0 * w0 + y1 * w1
            if K > 2:
                y += y2 * w2
            if K > 3:
                y += y3 * w3
            s = _sigmoid(y)
            g *= s + y * s * (1.0 - s)
        g1, g2, g3 = g, g, g
        if SEGMENTS:
            g1 = tl.where((d1 == d0)[:, None], g, 0.0)
            g2 = tl.where((d2 == d0)[:, None], g, 0.0)
            g3 = tl.where((d3 == d0)[:, None], g, 0.0)
        e0 = g * w0
        e1 += g1 * w1
        done = e1
        if K > 2:
            e2 += g2 * w2
            done = e2
        if K > 3:
            e3 += g3 * w3
            done = e3
        # tokens of the next row count there
        own = tl.where(i < STEPS + K - 1, g, 0.0)
        db += own
        dw0 += own * x0
        dw1 += own * y1
        if K > 2:
            dw2 += own * y2
        if K > 3:
            dw3 += own * y3
        place = t - (K - 1)
        at = dx_ptr + (first - (K - 1)).to(tl.int64) * channels + row[:, None] * channels + c[None, :]
        mine = (i >= 2 * (K - 1)) & (place < tokens)
        tl.store(at, done.to(dx_ptr.dtype.element_ty), mask=mine[:, None] & real)
        if PAST:
            at = dpast_ptr + b * (K - 1) * channels + (place + K - 1)[:, None] * channels + c[None, :]
            tl.store(at, done.to(dpast_ptr.dtype.element_ty), mask=((place < 0) & (place > -K))[:, None] & real)
        x1, x2, x3 = x0, x1, x2
        e1, e2, e3 = e0, e1, e2
        if SEGMENTS:
            d1, d2, d3 = d0, d1, d2
    parts_ptr += ((b * tl.num_programs(0) + tl.program_id(0)) * (K + 1)) * channels + c
    tl.store(parts_ptr, tl.sum(dw0, 0), mask=c < channels)
    tl.store(parts_ptr + channels, tl.sum(dw1, 0), mask=c < channels)
    if K > 2:
        tl.store(parts_ptr + 2 * channels, tl.sum(dw2, 0), mask=c < channels)
    if K > 3:
        tl.store(parts_ptr + 3 * channels, tl.sum(dw3, 0), mask=c < channels)
    tl.store(parts_ptr + K * channels, tl.sum(db, 0), mask=c < channels)


@triton.jit
def step_kernel(
    past_ptr, x_ptr, weight_ptr, bias_ptr, y_ptr, channels, past_b, past_t, past_c, x_b,
    K: tl.constexpr, BLOCK_C: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """One token: the past moves up by one, in place."""
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = c < channels
    x = tl.load(x_ptr + b * x_b + c, mask=real, other=0.0)
    at = past_ptr + b * past_b + c * past_c
    y = _vector(bias_ptr, c, channels, BLOCK_C, BIAS) + x.to(tl.float32)[None, :] * _tap(weight_ptr, c, channels, 0, K)
    for k in tl.static_range(K - 1):
        kept = tl.load(at + k * past_t, mask=real, other=0.0)
        y += kept.to(x_ptr.dtype.element_ty).to(tl.float32)[None, :] * _tap(weight_ptr, c, channels, K - 1 - k, K)
        if k > 0:
            tl.store(at + (k - 1) * past_t, kept, mask=real)
    tl.store(at + (K - 2) * past_t, x.to(past_ptr.dtype.element_ty), mask=real)
    if SILU:
        y *= _sigmoid(y)
    tl.store(y_ptr + b * channels + c[None, :], y.to(y_ptr.dtype.element_ty), mask=real[None, :])
