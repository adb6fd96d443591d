"""The mixing losses on a GPU, a tile of both matrices at a time: statistics of rows, gradients by rows and columns.

With the loss's dL/dM = beta_t (alpha_t M - A), where A = 2^(x - shift_t) and x are the teacher's scores to base 2:

    frobenius  shift = log2 sum 2^x, alpha = 1, and beta = 1 / |M - A|, known last and applied outside
    cosine     shift = max x (the cosine is blind to the scale of a row), alpha = <M,A> / <M,M>, beta = 1 / (|M| |A|)

Left of the diagonal tile the decay between s and t is exp2(rest_s + between + upto_t): from s to the end of its block,
over the blocks between, and from the start of t's block to t. All three are at most 0, so that nothing overflows and
only diagonal tiles exponentiate every element of the decay. `between` is summed while walking away from the diagonal,
smallest distance first, and stays as precise as a single decay.

What needs one number per token and not per pair comes as a line that the loops only load: write_s = w_s 2^rest_s, and
for the columns, where with far = 2^between

    beta_t (alpha_t M - A) 2^(between + upto_t) = <B_s,C_t> write_s far^2 gain_t - 2^(x + level_t + between),
    gain_t = alpha_t beta_t 2^(2 upto_t), level_t = log2 beta_t + upto_t - shift_t

A line has a number for every row of every block, so that none of its loads is masked.

A program owns Q rows t (or columns s) of one head. N state width, K key width.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

# below every score, and finite, so that differences from it are numbers
LOWEST = tl.constexpr(-3e38)
INFINITE = tl.constexpr(float("inf"))
# a row of M whose squares sum to no more counts as zeros, as 1 / <M,M> may overflow
SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def _load(ptr, first, tokens, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, Q: tl.constexpr, WHOLE: tl.constexpr):
    """Rows first.. of a head [Q, BLOCK], with zeros where there are none; WHOLE where all Q rows are there."""
    row, column = tl.arange(0, Q)[:, None], tl.arange(0, BLOCK)[None, :]
    at = ptr + first.to(tl.int64) * stride + (row * stride + column)
    if WHOLE and WIDTH == BLOCK:
        return tl.load(at)
    if WHOLE:
        return tl.load(at, mask=column < WIDTH, other=0.0)
    inside = row < tokens - first
    if WIDTH != BLOCK:
        inside = inside & (column < WIDTH)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(ptr, value, first, tokens, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, Q: tl.constexpr):
    row, column = tl.arange(0, Q)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (row < tokens - first) & (column < WIDTH)
    at = ptr + first.to(tl.int64) * stride + (row * stride + column)
    tl.store(at, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scores(dots, scale, softcap, CAPPED: tl.constexpr):
    """To base 2: `scale` holds log2(e), or for capped scores 1 / cap, and then `softcap` is cap log2(e)."""
    x = dots * scale
    if CAPPED:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x) - 1.0)
    return x


@triton.jit
def _masked(value, t, s, window, valid, other, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr):
    """`other` where row t does not see column s; t, s and valid (of s) broadcast to the tile."""
    if CAUSAL:
        value = tl.where(t >= s, value, other)
    if WINDOW:
        value = tl.where(t - s < window, value, other)
    if PADDED:
        value = tl.where(valid, value, other)
    return value


@triton.jit
def _online(peak, x, t, s, window, valid, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr):
    """The higher peak, the factor that brings earlier sums to it, and 2^(x - peak)."""
    x = _masked(x, t, s, window, valid, LOWEST, CAUSAL, WINDOW, PADDED)
    higher = tl.maximum(peak, tl.max(x, 1))
    # a tile of which nothing is seen leaves the peak at LOWEST and would count as ones
    a = _masked(tl.exp2(x - higher[:, None]), t, s, window, valid, 0.0, CAUSAL, WINDOW, PADDED)
    return higher, tl.exp2(peak - higher), a


@triton.jit
def _head(ptr, b, h, tokens, stride, WIDTH: tl.constexpr):
    return ptr + b * tokens * stride + h * WIDTH


@triton.jit
def statistics_kernel(
    C_ptr, B_ptr, q_ptr, k_ptr, upto_ptr, write_ptr, w_ptr, D_ptr, sink_ptr, valid_ptr,
    shift_ptr, alpha_ptr, beta_ptr, level_ptr, gain_ptr, loss_ptr,
    tokens, heads, stride_n, stride_k, scale, softcap, window,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, Q: tl.constexpr,
    COSINE: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr, SINK: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """shift, and for the cosine alpha, beta and the loss of a block of rows."""
    blocks = tl.num_programs(0)
    # the longest rows first
    block = blocks - 1 - tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h, first = bh // heads, bh % heads, block * Q
    q_ptr, k_ptr = _head(q_ptr, b, h, tokens, stride_k, K), _head(k_ptr, b, h, tokens, stride_k, K)
    C_ptr, B_ptr = _head(C_ptr, b, h, tokens, stride_n, N), _head(B_ptr, b, h, tokens, stride_n, N)
    line = bh * blocks * Q
    place = tl.arange(0, Q)
    t = first + place
    inside = t < tokens
    q = _load(q_ptr, first, tokens, stride_k, K, BLOCK_K, Q, False)
    upto = tl.load(upto_ptr + line + t)
    read = tl.exp2(upto)
    peak = tl.full((Q,), LOWEST, tl.float32)
    # sums over a row of 2^(x - peak), A^2, M A and M^2
    total = tl.zeros((Q,), tl.float32)
    aa, ma, mm = total, total, total
    between = 0.0
    if COSINE:
        C = _load(C_ptr, first, tokens, stride_n, N, BLOCK_N, Q, False)
    for step in range(0, block):
        start = (block - 1 - step) * Q
        s = start + place
        k = _load(k_ptr, start, tokens, stride_k, K, BLOCK_K, Q, True)
        x = _scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, CAPPED)
        valid = (tl.load(valid_ptr + b * blocks * Q + s) != 0)[None, :] if PADDED else True
        peak, keep, a = _online(peak, x, t[:, None], s[None, :], window, valid, False, WINDOW, PADDED)
        total = total * keep + tl.sum(a, 1)
        if COSINE:
            B = _load(B_ptr, start, tokens, stride_n, N, BLOCK_N, Q, True)
            write = tl.load(write_ptr + line + s) * tl.exp2(between)
            M = tl.dot(C, tl.trans(B), input_precision=PRECISION) * write[None, :]
            aa = aa * keep * keep + tl.sum(a * a, 1)
            ma = ma * keep + tl.sum(M * a, 1)
            mm += tl.sum(M * M, 1)
            between += tl.load(upto_ptr + line + start + Q - 1)
    k = _load(k_ptr, first, tokens, stride_k, K, BLOCK_K, Q, False)
    x = _scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, CAPPED)
    valid_t = tl.load(valid_ptr + b * blocks * Q + t) != 0 if PADDED else inside
    peak, keep, a = _online(peak, x, t[:, None], t[None, :], window, valid_t[None, :], True, WINDOW, PADDED)
    total = total * keep + tl.sum(a, 1)
    if COSINE:
        B = _load(B_ptr, first, tokens, stride_n, N, BLOCK_N, Q, False)
        decay = _diagonal_decay(upto, place) * tl.load(w_ptr + line + t)[None, :]
        M = tl.dot(C, tl.trans(B), input_precision=PRECISION) * decay
        M += tl.where((place[:, None] == place[None, :]) & valid_t[None, :], tl.load(D_ptr + h), 0.0)
        aa = aa * keep * keep + tl.sum(a * a, 1)
        ma = ma * keep * read + tl.sum(M * a, 1)
        mm = mm * read * read + tl.sum(M * M, 1)
        some = (mm > SMALLEST) & valid_t
        mm, aa = tl.where(some, mm, 1.0), tl.where(some, aa, 1.0)
        alpha = tl.where(some, ma / mm, 0.0)
        beta = tl.where(some, tl.rsqrt(mm) * tl.rsqrt(aa), 0.0)
        gain = alpha * beta * read * read
        level = tl.where(some, upto - peak - 0.5 * (tl.log2(mm) + tl.log2(aa)), -INFINITE)
        tl.store(alpha_ptr + line + t, alpha)
        tl.store(beta_ptr + line + t, beta)
        loss = tl.where(valid_t, 1.0 - tl.where(some, ma * beta, 0.0), 0.0)
        tl.store(loss_ptr + bh * blocks + block, tl.sum(loss, 0))
        shift = peak
    else:
        if SINK:
            sink = tl.load(sink_ptr + h)
            higher = tl.maximum(peak, sink)
            total, peak = total * tl.exp2(peak - higher) + tl.exp2(sink - higher), higher
        shift = peak + tl.log2(tl.where(total > 0, total, 1.0))
        gain = read * read
        level = tl.where(valid_t, upto - shift, -INFINITE)
    # rows that are not there attend to nothing
    tl.store(shift_ptr + line + t, tl.where(valid_t, shift, INFINITE))
    tl.store(level_ptr + line + t, level)
    tl.store(gain_ptr + line + t, gain)


@triton.jit
def _diagonal_decay(upto, place):
    """exp2(log-decay from s to t) for s <= t of one block, [t, s]; 0 elsewhere."""
    lower = tl.minimum(upto[:, None] - upto[None, :], 0.0)
    return tl.where(place[:, None] >= place[None, :], tl.exp2(lower), 0.0)


@triton.jit
def rows_kernel(
    C_ptr, B_ptr, q_ptr, k_ptr, upto_ptr, write_ptr, w_ptr, D_ptr, valid_ptr, shift_ptr, alpha_ptr, beta_ptr,
    dC_ptr, read_ptr, skip_ptr, loss_ptr, tokens, heads, stride_n, stride_k, scale, softcap, window,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, Q: tl.constexpr,
    COSINE: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr, WANT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dC, <C, dC> and dD of a block of rows; for the Frobenius norm the sum of squares."""
    blocks = tl.num_programs(0)
    block = blocks - 1 - tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h, first = bh // heads, bh % heads, block * Q
    q_ptr, k_ptr = _head(q_ptr, b, h, tokens, stride_k, K), _head(k_ptr, b, h, tokens, stride_k, K)
    C_ptr, B_ptr = _head(C_ptr, b, h, tokens, stride_n, N), _head(B_ptr, b, h, tokens, stride_n, N)
    line = bh * blocks * Q
    place = tl.arange(0, Q)
    t = first + place
    inside = t < tokens
    q = _load(q_ptr, first, tokens, stride_k, K, BLOCK_K, Q, False)
    C = _load(C_ptr, first, tokens, stride_n, N, BLOCK_N, Q, False)
    upto = tl.load(upto_ptr + line + t)
    shift = tl.load(shift_ptr + line + t)
    read = tl.exp2(upto)
    read_M = read
    if COSINE:
        alpha = tl.load(alpha_ptr + line + t)
        read_M = read * alpha
    dC = tl.zeros((Q, BLOCK_N), tl.float32)
    # by element: sums over rows would cost every step an exchange between threads
    squares = tl.zeros((Q, Q // 2), tl.float32)
    between = 0.0
    # in a branch, or the tiles that the diagonal tile needs take registers throughout the loop (120 of them on sm_80)
    if block > 0:
        for step in range(0, block):
            start = (block - 1 - step) * Q
            s = start + place
            k = _load(k_ptr, start, tokens, stride_k, K, BLOCK_K, Q, True)
            B = _load(B_ptr, start, tokens, stride_n, N, BLOCK_N, Q, True)
            x = _scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, CAPPED)
            valid = (tl.load(valid_ptr + b * blocks * Q + s) != 0)[None, :] if PADDED else True
            A = _masked(tl.exp2(x - shift[:, None]), t[:, None], s[None, :], window, valid, 0.0, False, WINDOW, PADDED)
            write = tl.load(write_ptr + line + s) * tl.exp2(between)
            M = tl.dot(C, tl.trans(B), input_precision=PRECISION) * write[None, :]
            residual = M * read_M[:, None] - A
            if not COSINE:
                even, odd = tl.split(residual.reshape(Q, Q // 2, 2))
                squares += even * even
                squares += odd * odd
            if WANT:
                dC = tl.dot((residual * write[None, :]).to(B.dtype), B, dC, input_precision=PRECISION)
            between += tl.load(upto_ptr + line + start + Q - 1)
        dC *= read[:, None]
    k = _load(k_ptr, first, tokens, stride_k, K, BLOCK_K, Q, False)
    B = _load(B_ptr, first, tokens, stride_n, N, BLOCK_N, Q, False)
    x = _scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, softcap, CAPPED)
    valid = tl.load(valid_ptr + b * blocks * Q + t) != 0 if PADDED else inside
    A = tl.exp2(x - shift[:, None])
    A = _masked(A, t[:, None], t[None, :], window, valid[None, :], 0.0, True, WINDOW, PADDED)
    decay = _diagonal_decay(upto, place) * tl.load(w_ptr + line + t)[None, :]
    here = (place[:, None] == place[None, :]) & valid[None, :]
    M = tl.dot(C, tl.trans(B), input_precision=PRECISION) * decay + tl.where(here, tl.load(D_ptr + h), 0.0)
    if COSINE:
        M *= alpha[:, None]
    residual = M - A
    if not COSINE:
        tl.store(loss_ptr + bh * blocks + block, tl.sum(squares) + tl.sum(residual * residual))
    if WANT:
        dC = tl.dot((residual * decay).to(B.dtype), B, dC, input_precision=PRECISION)
        skip = tl.sum(tl.where(here, residual, 0.0), 1)
        if COSINE:
            beta = tl.load(beta_ptr + line + t)
            dC *= beta[:, None]
            skip *= beta
        _store(_head(dC_ptr, b, h, tokens, stride_n, N), dC, first, tokens, stride_n, N, BLOCK_N, Q)
        tl.store(read_ptr + line + t, tl.sum(dC * C.to(tl.float32), 1))
        tl.store(skip_ptr + bh * blocks + block, tl.sum(skip, 0))


@triton.jit
def columns_kernel(
    C_ptr, B_ptr, q_ptr, k_ptr, upto_ptr, write_ptr, w_ptr, D_ptr, valid_ptr, shift_ptr, alpha_ptr, beta_ptr,
    fade_ptr, level_ptr, gain_ptr, dB_ptr, dw_ptr, tokens, heads, stride_n, stride_k, scale, softcap, window,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, Q: tl.constexpr,
    COSINE: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dB and dw of a block of columns; tiles are [s, t], so that their product with C needs no transposition."""
    blocks = tl.num_programs(0)
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h, first = bh // heads, bh % heads, block * Q
    q_ptr, k_ptr = _head(q_ptr, b, h, tokens, stride_k, K), _head(k_ptr, b, h, tokens, stride_k, K)
    C_ptr, B_ptr = _head(C_ptr, b, h, tokens, stride_n, N), _head(B_ptr, b, h, tokens, stride_n, N)
    line = bh * blocks * Q
    place = tl.arange(0, Q)
    s = first + place
    inside = s < tokens
    k = _load(k_ptr, first, tokens, stride_k, K, BLOCK_K, Q, False)
    B = _load(B_ptr, first, tokens, stride_n, N, BLOCK_N, Q, False)
    write = tl.load(write_ptr + line + s)
    valid = tl.load(valid_ptr + b * blocks * Q + s) != 0 if PADDED else inside
    dB = tl.zeros((Q, BLOCK_N), tl.float32)
    between = 0.0
    # sums that skip the loop must not enter the wait at its end as zeros: ptxas would serialise all of its products
    if block + 1 < blocks:
        for other in range(block + 1, blocks):
            start = other * Q
            t = start + place
            q = _load(q_ptr, start, tokens, stride_k, K, BLOCK_K, Q, False)
            C = _load(C_ptr, start, tokens, stride_n, N, BLOCK_N, Q, False)
            x = _scores(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap, CAPPED)
            A = tl.exp2(x + (tl.load(level_ptr + line + t) + between)[None, :])
            A = _masked(A, t[None, :], s[:, None], window, valid[:, None], 0.0, False, WINDOW, PADDED)
            far = tl.exp2(between)
            M = tl.dot(B, tl.trans(C), input_precision=PRECISION) * (write * far * far)[:, None]
            residual = M * tl.load(gain_ptr + line + t)[None, :] - A
            dB = tl.dot(residual.to(C.dtype), C, dB, input_precision=PRECISION)
            between += tl.load(upto_ptr + line + start + Q - 1)
        dB *= tl.load(fade_ptr + line + s)[:, None]
    q = _load(q_ptr, first, tokens, stride_k, K, BLOCK_K, Q, False)
    C = _load(C_ptr, first, tokens, stride_n, N, BLOCK_N, Q, False)
    x = _scores(tl.dot(k, tl.trans(q), input_precision=PRECISION), scale, softcap, CAPPED)
    shift = tl.load(shift_ptr + line + s)
    A = tl.exp2(x - shift[None, :])
    A = _masked(A, s[None, :], s[:, None], window, valid[:, None], 0.0, True, WINDOW, PADDED)
    upto, w = tl.load(upto_ptr + line + s), tl.load(w_ptr + line + s)
    decay = tl.trans(_diagonal_decay(upto, place))
    M = tl.dot(B, tl.trans(C), input_precision=PRECISION) * decay * w[:, None]
    M += tl.where((place[:, None] == place[None, :]) & valid[:, None], tl.load(D_ptr + h), 0.0)
    if COSINE:
        M *= tl.load(alpha_ptr + line + s)[None, :]
        decay *= tl.load(beta_ptr + line + s)[None, :]
    dB = tl.dot(((M - A) * decay).to(C.dtype), C, dB, input_precision=PRECISION)
    tl.store(dw_ptr + line + s, tl.sum(dB * B.to(tl.float32), 1))
    _store(_head(dB_ptr, b, h, tokens, stride_n, N), dB * w[:, None], first, tokens, stride_n, N, BLOCK_N, Q)
