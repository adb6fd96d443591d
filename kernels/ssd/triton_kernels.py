"""The selective scan on a GPU: one kernel that walks a sequence in chunks serves the outputs and all three gradients.

With X_t = w_t x_t and G_t the gradient of the state, every one of them is a scan of the same shape:

    y_t  = sum_{s<=t} a(t,s) (C_t.B_s)  X_s        dX_t = sum_{s>=t} a(s,t) (B_t.C_s)  dy_s
    dC_t = sum_{s<=t} a(t,s) (dy_t.X_s) B_s        dB_t = sum_{s>=t} a(s,t) (X_t.dy_s) C_s

so `_walk` computes out_t = sum_s a (q_t.k_s) v_s in either direction, the state [K, V] in registers, and nothing of
size L but its inputs and output touches memory. Where batch x heads would leave the card idle, the sequence is cut into
sections: a first kernel leaves each section's own state, and a walk starts from the combination of those before it.

K key width (contracted), V value width (of the output), Q chunk length, N state width, P head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# MODE of `_walk`, forwards in time 0: y + D x; 1: dC, <C, dC>, dD; and backwards 2: dx, dw; 3: dB, <B, dB>


@triton.jit
def _chunk_decay(log_a_ptr, segment_ptr, stride_a, before, t, tokens, REVERSE: tl.constexpr, SEGMENTS: tl.constexpr):
    """Of one chunk, in the direction of the walk: cumulative log2-decay, the factors read, write and carry, documents.

    `before` is the token next to the chunk on the side that the state comes from (the chunk's own first if none is).
    """
    inside = t < tokens
    log_a = tl.load(log_a_ptr + t * stride_a, mask=inside, other=0.0).to(tl.float32) * LOG2E
    cum = tl.cumsum(log_a, 0)
    total = tl.sum(log_a, 0)
    from_start = tl.exp2(cum)
    to_end = tl.exp2(tl.minimum(total - cum, 0.0))
    read, write = (to_end, from_start) if REVERSE else (from_start, to_end)
    carry = tl.exp2(total)
    document = t
    if SEGMENTS:
        # padding continues the last document, so that the final state survives it
        document = tl.load(segment_ptr + tl.minimum(t, tokens - 1))
        entering = tl.load(segment_ptr + before)
        leaving = tl.min(document, 0) if REVERSE else tl.max(document, 0)
        read = tl.where(document == entering, read, 0.0)
        write = tl.where(document == leaving, write, 0.0)
        carry = tl.where(entering == leaving, carry, 0.0)
    return cum, read, write, carry, document


@triton.jit
def _rows(ptr, chunk, tokens, stride, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, Q: tl.constexpr):
    """Where a chunk's rows lie from column `first` on, [Q, BLOCK], and which exist.

    Only the chunk's start is a 64-bit number: offsets inside it are small, and wide ones cost registers.
    """
    row, column = tl.arange(0, Q)[:, None], first + tl.arange(0, BLOCK)[None, :]
    inside = row < tokens - chunk * Q
    if WIDTH % BLOCK != 0:
        inside = inside & (column < WIDTH)
    return ptr + (chunk * Q).to(tl.int64) * stride + (row * stride + column), inside


@triton.jit
def _load(ptr, chunk, tokens, stride, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, Q: tl.constexpr):
    at, inside = _rows(ptr, chunk, tokens, stride, first, WIDTH, BLOCK, Q)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _state_offsets(
    first, stride_k, stride_v, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr
):
    key = tl.arange(0, BLOCK_K)[:, None]
    value = first + tl.arange(0, BLOCK_V)[None, :]
    return key * stride_k + value * stride_v, (key < K) & (value < V)


@triton.jit
def _add_chunk(state, k, v, write, carry, PRECISION: tl.constexpr):
    """The state after a chunk."""
    written = (v.to(tl.float32) * write[:, None]).to(v.dtype)
    return tl.dot(tl.trans(k), written, state * carry, input_precision=PRECISION)


@triton.jit
def _section_state(
    k_ptr, v_ptr, log_a_ptr, w_ptr, segment_ptr, state_ptr, carry_ptr, section, tile, tokens, chunks, sections,
    stride_k, stride_v, stride_a, stride_w, stride_state_k, stride_state_v,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, Q: tl.constexpr,
    REVERSE: tl.constexpr, WEIGHTS: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state that a section alone leaves behind, and the factor by which it carries one through."""
    first = section * chunks
    last = tl.minimum(first + chunks, (tokens + Q - 1) // Q)
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    through = 1.0
    for i in range(first, last):
        chunk = last - 1 - (i - first) if REVERSE else i
        t = chunk * Q + tl.arange(0, Q)
        before = tl.minimum(chunk * Q + Q, tokens - 1) if REVERSE else tl.maximum(chunk * Q - 1, 0)
        _, _, write, carry, _ = _chunk_decay(log_a_ptr, segment_ptr, stride_a, before, t, tokens, REVERSE, SEGMENTS)
        if WEIGHTS:
            write *= tl.load(w_ptr + t * stride_w, mask=t < tokens, other=0.0).to(tl.float32)
        k = _load(k_ptr, chunk, tokens, stride_k, 0, K, BLOCK_K, Q)
        v = _load(v_ptr, chunk, tokens, stride_v, tile * BLOCK_V, V, BLOCK_V, Q)
        state = _add_chunk(state, k, v, write, carry, PRECISION)
        through *= carry
    place = sections - 1 - section if REVERSE else section
    offset, inside = _state_offsets(tile * BLOCK_V, stride_state_k, stride_state_v, K, V, BLOCK_K, BLOCK_V)
    tl.store(state_ptr + place * (K * V) + offset, state, mask=inside)
    if tile == 0:
        tl.store(carry_ptr + place, through)


@triton.jit
def _walk(  # noqa: C901  (constexpr branches: each mode compiles to a straight line)
    q_ptr, k_ptr, v_ptr, out_ptr, other_ptr, log_a_ptr, w_ptr, D_ptr, segment_ptr,
    enter_ptr, leave_ptr, local_ptr, carry_ptr, dot_ptr, skip_ptr, section, tile, tokens, chunks, sections,
    stride_q, stride_k, stride_v, stride_out, stride_other, stride_a, stride_w, stride_state_k, stride_state_v,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, Q: tl.constexpr,
    MODE: tl.constexpr, WEIGHTS: tl.constexpr, SKIP: tl.constexpr, SEGMENTS: tl.constexpr,
    ENTER: tl.constexpr, LEAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One section of a walk; pointers are those of its sequence and head."""
    REVERSE: tl.constexpr = MODE >= 2
    offset, inside_state = _state_offsets(tile * BLOCK_V, stride_state_k, stride_state_v, K, V, BLOCK_K, BLOCK_V)
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if ENTER:
        state += tl.load(enter_ptr + offset, mask=inside_state, other=0.0)
    place = sections - 1 - section if REVERSE else section
    for i in range(0, place):
        through = tl.load(carry_ptr + i)
        state = state * through + tl.load(local_ptr + i * (K * V) + offset, mask=inside_state, other=0.0)
    first = section * chunks
    last = tl.minimum(first + chunks, (tokens + Q - 1) // Q)
    skipped = 0.0
    D = 0.0
    if SKIP and (MODE == 0 or MODE == 2):
        D = tl.load(D_ptr).to(tl.float32)
    row, column = tl.arange(0, Q)[:, None], tl.arange(0, Q)[None, :]
    for i in range(first, last):
        chunk = last - 1 - (i - first) if REVERSE else i
        t = chunk * Q + tl.arange(0, Q)
        before = tl.minimum(chunk * Q + Q, tokens - 1) if REVERSE else tl.maximum(chunk * Q - 1, 0)
        cum, read, write, carry, document = _chunk_decay(
            log_a_ptr, segment_ptr, stride_a, before, t, tokens, REVERSE, SEGMENTS
        )
        q = _load(q_ptr, chunk, tokens, stride_q, 0, K, BLOCK_K, Q)
        k = _load(k_ptr, chunk, tokens, stride_k, 0, K, BLOCK_K, Q)
        v = _load(v_ptr, chunk, tokens, stride_v, tile * BLOCK_V, V, BLOCK_V, Q)
        if WEIGHTS:
            w = tl.load(w_ptr + t * stride_w, mask=t < tokens, other=0.0).to(tl.float32)
            if MODE <= 1:
                write *= w
            if MODE == 3:
                read *= w
        # the state before the chunk's own tokens: in the other order both need registers at once
        out = tl.dot(q, state.to(q.dtype), input_precision=PRECISION) * read[:, None]
        state = _add_chunk(state, k, v, write, carry, PRECISION)
        seen = (row <= column) if REVERSE else (row >= column)
        if SEGMENTS:
            seen = seen & (document[:, None] == document[None, :])
        gap = cum[None, :] - cum[:, None] if REVERSE else cum[:, None] - cum[None, :]
        # clamped, because rounding can leave a difference just above 0
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SKIP and MODE == 1:
            # q is dy and k is x here
            skipped += tl.sum(tl.sum(tl.where(row == column, score, 0.0), 1), 0)
        score *= tl.exp2(tl.where(seen, tl.minimum(gap, 0.0), float("-inf")))
        if WEIGHTS and MODE <= 1:
            score *= w[None, :]
        if WEIGHTS and MODE == 3:
            # before the rounding, as MODE 1 has it: dlog_a is a sum of differences of the two, which must cancel
            score *= w[:, None]
        if SKIP and MODE == 0:
            score += tl.where(row == column, D, 0.0)
        out = tl.dot(score.to(v.dtype), v, out, input_precision=PRECISION)
        if MODE >= 1:
            other = _load(other_ptr, chunk, tokens, stride_other, tile * BLOCK_V, V, BLOCK_V, Q).to(tl.float32)
            tl.store(dot_ptr + t, tl.sum(other * out, 1), mask=t < tokens)
        if MODE == 2 and WEIGHTS:
            out *= w[:, None]
        if SKIP and MODE == 2:
            out += D * v.to(tl.float32)
        at, inside = _rows(out_ptr, chunk, tokens, stride_out, tile * BLOCK_V, V, BLOCK_V, Q)
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)
    if LEAVE and place == sections - 1:
        tl.store(leave_ptr + offset, state, mask=inside_state)
    if SKIP and MODE == 1 and tile == 0:
        tl.store(skip_ptr, skipped)


@triton.jit
def _at(ptr, b, h, stride_b, stride_h, share):
    """The start of one sequence and head, of which `share` heads have the same data."""
    return ptr + b * stride_b + h // share * stride_h


@triton.jit
def sections_kernel(
    k_ptr, v_ptr, log_a_ptr, w_ptr, segment_ptr, local_ptr, carry_ptr, tokens, chunks, sections, heads,
    k_b, k_t, k_h, k_share, v_b, v_t, v_h, v_share, a_b, a_t, a_h, w_b, w_t, w_h, state_k, state_v,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, Q: tl.constexpr,
    WEIGHTS: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each section's own state, forwards; the last section's is never needed, so the grid leaves it out."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    _section_state(
        _at(k_ptr, b, h, k_b, k_h, k_share), _at(v_ptr, b, h, v_b, v_h, v_share), _at(log_a_ptr, b, h, a_b, a_h, 1),
        _at(w_ptr, b, h, w_b, w_h, 1), segment_ptr + b * tokens, local_ptr + bh * sections * K * V,
        carry_ptr + bh * sections, tl.program_id(1), tl.program_id(2), tokens, chunks, sections, k_t, v_t, a_t, w_t,
        state_k, state_v, K, V, BLOCK_K, BLOCK_V, Q, False, WEIGHTS, SEGMENTS, PRECISION,
    )  # fmt: skip


@triton.jit
def walk_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, other_ptr, log_a_ptr, w_ptr, D_ptr, segment_ptr,
    enter_ptr, leave_ptr, local_ptr, carry_ptr, dot_ptr, skip_ptr, next_local_ptr, next_carry_ptr,
    tokens, chunks, sections, heads, sequences, tiles,
    q_b, q_t, q_h, q_share, k_b, k_t, k_h, k_share, v_b, v_t, v_h, v_share, other_b, other_t, other_h, other_share,
    out_b, out_t, out_h, a_b, a_t, a_h, w_b, w_t, w_h, state_k, state_v,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, Q: tl.constexpr,
    MODE: tl.constexpr, WEIGHTS: tl.constexpr, SKIP: tl.constexpr, SEGMENTS: tl.constexpr, ENTER: tl.constexpr,
    LEAVE: tl.constexpr, NEXT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One walk over every (sequence x head, section, tile of V).

    NEXT (with MODE 1, the one forward walk of the backward pass): as many tiles again leave the sections' own states
    for the reverse walks that follow, from dy (q) and C (other).
    """
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    section, tile = tl.program_id(1), tl.program_id(2)
    q = _at(q_ptr, b, h, q_b, q_h, q_share)
    other = _at(other_ptr, b, h, other_b, other_h, other_share)
    log_a = _at(log_a_ptr, b, h, a_b, a_h, 1)
    w = _at(w_ptr, b, h, w_b, w_h, 1)
    local, through = bh * sections * K * V, bh * sections
    if NEXT and tile >= tiles:
        if section > 0:
            _section_state(
                q, other, log_a, w, segment_ptr + b * tokens, next_local_ptr + local, next_carry_ptr + through,
                section, tile - tiles, tokens, chunks, sections, q_t, other_t, a_t, w_t, state_k, state_v,
                K, V, BLOCK_K, BLOCK_V, Q, True, False, SEGMENTS, PRECISION,
            )  # fmt: skip
    else:
        _walk(
            q, _at(k_ptr, b, h, k_b, k_h, k_share), _at(v_ptr, b, h, v_b, v_h, v_share),
            out_ptr + b * out_b + h * out_h, other, log_a, w, D_ptr + h, segment_ptr + b * tokens,
            enter_ptr + bh * K * V, leave_ptr + bh * K * V, local_ptr + local, carry_ptr + through,
            dot_ptr + (tile * sequences * heads + bh) * tokens,
            skip_ptr + bh * sections + section, section, tile, tokens, chunks, sections,
            q_t, k_t, v_t, out_t, other_t, a_t, w_t, state_k, state_v,
            K, V, BLOCK_K, BLOCK_V, Q, MODE, WEIGHTS, SKIP, SEGMENTS, ENTER, LEAVE, PRECISION,
        )  # fmt: skip


@triton.jit
def finish_kernel(
    read_ptr, write_ptr, dw_ptr, skip_ptr, state_ptr, dstate_ptr, dlog_a_ptr, dw_out_ptr, dD_ptr,
    tokens, heads, sequences, tiles_n, tiles_p, parts, state_size,
    BLOCK_STATE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    WEIGHTS: tl.constexpr, SKIP: tl.constexpr, LEAVE: tl.constexpr,
):  # fmt: skip
    """dlog_a = reverse-cumsum(<C, dC> - <B, dB>) + <S, dS> of the final state; sums dw and dD over their parts.

    One program per head, so that dD is summed in a fixed order.
    """
    h = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_STATE)
    dD = 0.0
    for b in range(0, sequences):
        bh = b * heads + h
        later = 0.0
        if LEAVE:
            for first in range(0, state_size, BLOCK_STATE):
                at = bh * state_size + first + place
                inside = first + place < state_size
                later += tl.sum(
                    tl.load(state_ptr + at, mask=inside, other=0.0) * tl.load(dstate_ptr + at, mask=inside, other=0.0),
                    0,
                )
        if SKIP:
            section = tl.arange(0, BLOCK_PARTS)
            dD += tl.sum(tl.load(skip_ptr + bh * parts + section, mask=section < parts, other=0.0), 0)
        blocks = (tokens + BLOCK - 1) // BLOCK
        for i in range(0, blocks):
            t = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            inside = t < tokens
            change = tl.zeros((BLOCK,), tl.float32)
            for tile in range(0, tiles_n):
                part = (tile * sequences * heads + bh) * tokens + t
                change += tl.load(read_ptr + part, mask=inside, other=0.0)
                change -= tl.load(write_ptr + part, mask=inside, other=0.0)
            at = (b * tokens + t.to(tl.int64)) * heads + h
            if WEIGHTS:
                dw = tl.zeros((BLOCK,), tl.float32)
                for tile in range(0, tiles_p):
                    part = (tile * sequences * heads + bh) * tokens + t
                    dw += tl.load(dw_ptr + part, mask=inside, other=0.0)
                tl.store(dw_out_ptr + at, dw, mask=inside)
            dlog_a = tl.cumsum(change, 0, reverse=True) + later
            later += tl.sum(change, 0)
            tl.store(dlog_a_ptr + at, dlog_a, mask=inside)
    if SKIP:
        tl.store(dD_ptr + h, dD)


@triton.jit
def step_kernel(
    state_ptr, x_ptr, log_a_ptr, w_ptr, B_ptr, C_ptr, D_ptr, y_ptr, heads, share, state_b, x_b, a_b, w_b, B_b, C_b,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    WEIGHTS: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """One token: the state [P, N] is read and written once, in place."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    inside = (p < P)[:, None] & (n < N)[None, :]
    at = state_ptr + b * state_b + h * P * N + p[:, None] * N + n[None, :]
    B = tl.load(B_ptr + b * B_b + h // share * N + n, mask=n < N, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + b * C_b + h // share * N + n, mask=n < N, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * x_b + h * P + p, mask=p < P, other=0.0).to(tl.float32)
    written = x
    if WEIGHTS:
        written = x * tl.load(w_ptr + b * w_b + h).to(tl.float32)
    decay = tl.exp2(tl.load(log_a_ptr + b * a_b + h).to(tl.float32) * LOG2E)
    state = tl.load(at, mask=inside, other=0.0) * decay + written[:, None] * B[None, :]
    tl.store(at, state, mask=inside)
    y = tl.sum(state * C[None, :], 1)
    if SKIP:
        y += tl.load(D_ptr + h).to(tl.float32) * x
    tl.store(y_ptr + bh * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)
