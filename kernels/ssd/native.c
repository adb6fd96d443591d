/* The selective scan in chunks of tokens, a head at a time, forwards, backwards and by one token [Mamba-2, section 6].

   What chunked.py does, with everything between inputs and outputs in scratch that stays in the caches: of a chunk the
   scores C B^T, of a head the state, and backwards the states before its chunks, which are computed again. Strides are in
   elements; the last dimension is always contiguous.

   Names: L length, H heads, G groups, P width of a head, N of a state; t reads and s writes within a chunk of Q tokens. */

#include "tiles.h"

enum { CHUNK = 64 };

typedef struct {
  real *at;
  int64_t batch, token, head;
} View;

typedef struct {
  int64_t batch, length, heads, groups, width, state;
  View x, log_a, B, C, w, dy;                             /* w.at may be null: all 1 */
  const real *D, *initial, *dfinal;                       /* [H], [B, H, P, N] twice; each may be null */
  const int64_t *segment;                                 /* [B, L], may be null */
  real *y, *final;                                        /* [B, L, H, P], [B, H, P, N] */
  real *dx, *dlog_a, *dB, *dC, *dw, *dD, *dinitial;       /* as their inputs, contiguous; dD [B, H] */
} Problem;

/* One chunk of one head: decays from the state before it, to the state after it, and between its tokens. */
typedef struct {
  int64_t start, tokens;
  double cum[CHUNK];
  real read[CHUNK], write[CHUNK], carry;
  const int64_t *segment; /* of its tokens, or null */
} Chunk;

static const real *row(const View *view, int64_t b, int64_t t, int64_t h) {
  return view->at + b * view->batch + t * view->token + h * view->head;
}

/* Documents end where the segment changes: what would cross such a border is 0. */
static void open_chunk(Chunk *chunk, const Problem *p, int64_t b, int64_t h, int64_t start) {
  chunk->start = start;
  chunk->tokens = min_i(CHUNK, p->length - start);
  double sum = 0;
  for (int64_t t = 0; t < chunk->tokens; t++) chunk->cum[t] = sum += *row(&p->log_a, b, start + t, h);
  for (int64_t t = 0; t < chunk->tokens; t++) {
    chunk->read[t] = exp_negative((real)chunk->cum[t]);
    chunk->write[t] = exp_negative((real)(sum - chunk->cum[t]));
  }
  chunk->carry = chunk->read[chunk->tokens - 1];
  chunk->segment = p->segment ? p->segment + b * p->length + start : NULL;
  if (!chunk->segment) return;
  int64_t before = chunk->segment[start ? -1 : 0], last = chunk->segment[chunk->tokens - 1];
  for (int64_t t = 0; t < chunk->tokens; t++) {
    if (chunk->segment[t] != before) chunk->read[t] = 0;
    if (chunk->segment[t] != last) chunk->write[t] = 0;
  }
  if (before != last) chunk->carry = 0;
}

/* Row t of scores times its decays, zero after the diagonal as far as products look. */
INLINE void decay_row(const Chunk *chunk, int64_t t, int64_t ld, real *scores) {
  for (int64_t s = 0; s <= t; s++) scores[s] *= exp_negative((real)(chunk->cum[t] - chunk->cum[s]));
  for (int64_t s = t + 1; s < ld; s++) scores[s] = 0;
  if (chunk->segment)
    for (int64_t s = 0; s < t && chunk->segment[s] != chunk->segment[t]; s++) scores[s] = 0;
}

/* The weighted inputs w x of a chunk, rows of `ld`. */
static void pack_inputs(const Problem *p, const Chunk *chunk, int64_t b, int64_t h, real *weighted, int64_t ld) {
  for (int64_t t = 0; t < chunk->tokens; t++) {
    const real *x = row(&p->x, b, chunk->start + t, h);
    real w = p->w.at ? *row(&p->w, b, chunk->start + t, h) : 1;
    for (int64_t i = 0; i < p->width; i++) weighted[t * ld + i] = w * x[i];
  }
}

/* Copies rows of `width` that are `stride` apart into scratch of row length ld, each times factor[row] or 1. */
static void pack(int64_t rows, int64_t width, const real *from, int64_t stride, const real *factor, real *to, int64_t ld) {
  for (int64_t t = 0; t < rows; t++) {
    real scale = factor ? factor[t] : 1;
    for (int64_t i = 0; i < width; i++) to[t * ld + i] = from[t * stride + i] * scale;
  }
}

static void scale_rows(int64_t rows, int64_t width, const real *factor, real *c, int64_t ld) {
  for (int64_t t = 0; t < rows; t++)
    for (int64_t i = 0; i < width; i++) c[t * ld + i] *= factor[t];
}

static int64_t chunk_rows(const Problem *p) { return min_i(CHUNK, p->length); }

static void forward_head(const Problem *p, int64_t b, int64_t h, real *block) {
  const int64_t P = p->width, N = p->state, ldp = padded(P), ldn = padded(N), g = h / (p->heads / p->groups);
  const int64_t Q = chunk_rows(p), ldq = padded(Q), bh = b * p->heads + h;
  real *state = take(&block, N * ldp), *weighted = take(&block, Q * ldp), *out = take(&block, Q * ldp);
  real *written = take(&block, Q * ldn), *turned = take(&block, N * ldq), *scores = take(&block, Q * ldq);
  if (p->initial) transpose(P, N, p->initial + bh * P * N, N, state, ldp);
  else memset(state, 0, (size_t)(N * ldp) * sizeof(real));
  for (int64_t start = 0; start < p->length; start += CHUNK) {
    Chunk chunk;
    open_chunk(&chunk, p, b, h, start);
    const int64_t q = chunk.tokens;
    const real *B = row(&p->B, b, start, g), *C = row(&p->C, b, start, g);
    pack_inputs(p, &chunk, b, h, weighted, ldp);
    pack(q, N, B, p->B.token, chunk.write, written, ldn);
    transpose(q, N, B, p->B.token, turned, ldq);
    product(q, q, N, C, p->C.token, 1, turned, ldq, scores, ldq, 0, RESULT_LOWER);
    for (int64_t t = 0; t < q; t++) decay_row(&chunk, t, ldq, scores + t * ldq);
    if (start || p->initial) {
      product(q, P, N, C, p->C.token, 1, state, ldp, out, ldp, 0, ALL);
      scale_rows(q, ldp, chunk.read, out, ldp);
      for (int64_t i = 0; i < N * ldp; i++) state[i] *= chunk.carry;
    } else memset(out, 0, (size_t)(q * ldp) * sizeof(real));
    product(q, P, q, scores, ldq, 1, weighted, ldp, out, ldp, 1, A_LOWER);
    product(N, P, q, written, 1, ldn, weighted, ldp, state, ldp, 1, ALL);
    real D = p->D ? p->D[h] : 0;
    for (int64_t t = 0; t < q; t++) {
      const real *x = row(&p->x, b, start + t, h);
      real *y = p->y + ((b * p->length + start + t) * p->heads + h) * P;
      for (int64_t i = 0; i < P; i++) y[i] = out[t * ldp + i] + D * x[i];
    }
  }
  transpose(N, P, state, ldp, p->final + bh * P * N, N);
}

/* Heads first .. stop of all batch entries; 1 where there is no memory. */
int ssd_forward(const Problem *p, int64_t first, int64_t stop) {
  const int64_t ldp = padded(p->width), ldn = padded(p->state), Q = chunk_rows(p), ldq = padded(Q);
  real *block = scratch(p->state * (ldp + ldq) + Q * (2 * ldp + ldn + ldq) + 6 * 64);
  if (!block) return 1;
  for (int64_t i = first; i < stop; i++) forward_head(p, i / p->heads, i % p->heads, block);
  free(block);
  return 0;
}

/* The states [P, N] before every chunk, and last the one after all of them. */
static void all_states(const Problem *p, int64_t b, int64_t h, real *states, real *weighted, real *written) {
  const int64_t P = p->width, N = p->state, ldp = padded(P), ldn = padded(N), g = h / (p->heads / p->groups);
  if (p->initial) pack(P, N, p->initial + (b * p->heads + h) * P * N, N, NULL, states, ldn);
  else memset(states, 0, (size_t)(P * ldn) * sizeof(real));
  for (int64_t start = 0; start < p->length; start += CHUNK) {
    Chunk chunk;
    open_chunk(&chunk, p, b, h, start);
    pack_inputs(p, &chunk, b, h, weighted, ldp);
    pack(chunk.tokens, N, row(&p->B, b, start, g), p->B.token, chunk.write, written, ldn);
    real *next = states + P * ldn;
    for (int64_t i = 0; i < P * ldn; i++) next[i] = chunk.carry * states[i];
    product(P, N, chunk.tokens, weighted, 1, ldp, written, ldn, next, ldn, 1, ALL);
    states = next;
  }
}

typedef struct {
  real *dstate, *dstate_turned, *states, *weighted, *weighted_turned, *dy, *B, *C, *B_turned, *scores, *dscores, *dx, *dB,
      *dC;
  double *change;
} Work;

/* Gradients of one chunk of one head, given in dstate that of the state after it; leaves there that of the state before.
   `change` gets <C, dC> - <B, dB>, of which the decay's gradient is the sum over later tokens. */
static void backward_chunk(const Problem *p, const Chunk *chunk, int64_t b, int64_t h, const real *before, Work *k,
                           double *dD) {
  const int64_t P = p->width, N = p->state, ldp = padded(P), ldn = padded(N), ldq = padded(chunk_rows(p));
  const int64_t per = p->heads / p->groups, g = h / per, q = chunk->tokens, start = chunk->start;
  const View *dy_view = &p->dy;
  pack_inputs(p, chunk, b, h, k->weighted, ldp);
  transpose(q, P, k->weighted, ldp, k->weighted_turned, ldq);
  pack(q, P, row(dy_view, b, start, h), dy_view->token, NULL, k->dy, ldp);
  pack(q, N, row(&p->B, b, start, g), p->B.token, NULL, k->B, ldn);
  pack(q, N, row(&p->C, b, start, g), p->C.token, NULL, k->C, ldn);
  transpose(q, N, k->B, ldn, k->B_turned, ldq);
  transpose(N, P, k->dstate, ldp, k->dstate_turned, ldn);

  product(q, q, N, k->C, ldn, 1, k->B_turned, ldq, k->scores, ldq, 0, RESULT_LOWER);
  product(q, q, P, k->dy, ldp, 1, k->weighted_turned, ldq, k->dscores, ldq, 0, RESULT_LOWER);
  for (int64_t t = 0; t < q; t++) {
    real decay[CHUNK], *scores = k->scores + t * ldq, *dscores = k->dscores + t * ldq;
    for (int64_t s = 0; s < ldq; s++) decay[s] = 1;
    decay_row(chunk, t, ldq, decay);
    for (int64_t s = 0; s <= t; s++) scores[s] *= decay[s], dscores[s] *= decay[s];
    for (int64_t s = t + 1; s < ldq; s++) scores[s] = dscores[s] = 0;
  }
  product(q, P, N, k->B, ldn, 1, k->dstate, ldp, k->dx, ldp, 0, ALL);
  scale_rows(q, ldp, chunk->write, k->dx, ldp);
  product(q, P, q, k->scores, 1, ldq, k->dy, ldp, k->dx, ldp, 1, A_UPPER);
  product(q, N, P, k->weighted, ldp, 1, k->dstate_turned, ldn, k->dB, ldn, 0, ALL);
  scale_rows(q, ldn, chunk->write, k->dB, ldn);
  product(q, N, q, k->dscores, 1, ldq, k->C, ldn, k->dB, ldn, 1, A_UPPER);
  product(q, N, P, k->dy, ldp, 1, before, ldn, k->dC, ldn, 0, ALL);
  scale_rows(q, ldn, chunk->read, k->dC, ldn);
  product(q, N, q, k->dscores, ldq, 1, k->B, ldn, k->dC, ldn, 1, A_LOWER);

  for (int64_t t = 0; t < q; t++) {
    int64_t token = b * p->length + start + t, at = (token * p->heads + h), at_group = (token * p->groups + g) * N;
    const real *x = row(&p->x, b, start + t, h), *dx = k->dx + t * ldp, *dy = k->dy + t * ldp;
    real w = p->w.at ? *row(&p->w, b, start + t, h) : 1, D = p->D ? p->D[h] : 0;
    for (int64_t i = 0; i < P; i++) p->dx[at * P + i] = w * dx[i] + D * dy[i];
    if (p->dw) p->dw[at] = dot(P, dx, x);
    *dD += dot(P, dy, x);
    k->change[start + t] = (double)dot(N, k->C + t * ldn, k->dC + t * ldn) - dot(N, k->B + t * ldn, k->dB + t * ldn);
    for (int64_t n = 0; n < N; n++) {
      p->dC[at_group + n] = (h % per ? p->dC[at_group + n] : 0) + k->dC[t * ldn + n];
      p->dB[at_group + n] = (h % per ? p->dB[at_group + n] : 0) + k->dB[t * ldn + n];
    }
  }
  scale_rows(q, ldn, chunk->read, k->C, ldn);
  for (int64_t i = 0; i < N * ldp; i++) k->dstate[i] *= chunk->carry;
  product(N, P, q, k->C, 1, ldn, k->dy, ldp, k->dstate, ldp, 1, ALL);
}

static void backward_head(const Problem *p, int64_t b, int64_t h, Work *k) {
  const int64_t P = p->width, N = p->state, ldp = padded(P), ldn = padded(N), bh = b * p->heads + h;
  const int64_t chunks = (p->length + CHUNK - 1) / CHUNK;
  all_states(p, b, h, k->states, k->weighted, k->B);
  double at_end = 0;
  memset(k->dstate, 0, (size_t)(N * ldp) * sizeof(real));
  if (p->dfinal) {
    const real *dfinal = p->dfinal + bh * P * N, *final = k->states + chunks * P * ldn;
    transpose(P, N, dfinal, N, k->dstate, ldp);
    for (int64_t i = 0; i < P; i++) at_end += dot(N, dfinal + i * N, final + i * ldn);
  }
  double dD = 0;
  for (int64_t i = chunks - 1; i >= 0; i--) {
    Chunk chunk;
    open_chunk(&chunk, p, b, h, i * CHUNK);
    backward_chunk(p, &chunk, b, h, k->states + i * P * ldn, k, &dD);
  }
  double sum = at_end;
  for (int64_t t = p->length - 1; t >= 0; t--) {
    sum += k->change[t];
    p->dlog_a[(b * p->length + t) * p->heads + h] = (real)sum;
  }
  if (p->dD) p->dD[bh] = (real)dD;
  if (p->dinitial) transpose(N, P, k->dstate, ldp, p->dinitial + bh * P * N, N);
}

/* Groups first .. stop of all batch entries, whose heads share dB and dC; 1 where there is no memory. */
int ssd_backward(const Problem *p, int64_t first, int64_t stop) {
  const int64_t P = p->width, N = p->state, ldp = padded(P), ldn = padded(N), Q = chunk_rows(p), ldq = padded(Q);
  const int64_t chunks = (p->length + CHUNK - 1) / CHUNK, per = p->heads / p->groups;
  real *block = scratch((chunks + 2) * P * ldn + N * (ldp + ldq) + P * ldq + Q * (3 * ldp + 4 * ldn + 2 * ldq) + 14 * 64);
  double *change = malloc((size_t)p->length * sizeof(double));
  if (!block || !change) {
    free(block), free(change);
    return 1;
  }
  real *rest = block;
  Work k = {.change = change};
  k.dstate = take(&rest, N * ldp), k.dstate_turned = take(&rest, P * ldn), k.states = take(&rest, (chunks + 1) * P * ldn);
  k.weighted = take(&rest, Q * ldp), k.weighted_turned = take(&rest, P * ldq), k.dy = take(&rest, Q * ldp);
  k.B = take(&rest, Q * ldn), k.C = take(&rest, Q * ldn), k.B_turned = take(&rest, N * ldq);
  k.scores = take(&rest, Q * ldq), k.dscores = take(&rest, Q * ldq);
  k.dx = take(&rest, Q * ldp), k.dB = take(&rest, Q * ldn), k.dC = take(&rest, Q * ldn);
  for (int64_t i = first; i < stop; i++)
    for (int64_t h = 0; h < per; h++) backward_head(p, i / p->groups, i % p->groups * per + h, &k);
  free(block), free(change);
  return 0;
}

/* One token: updates `final` [B, H, P, N] in place and writes y [B, H, P]; the views have no token stride. */
int ssd_step(const Problem *p, int64_t first, int64_t stop) {
  const int64_t P = p->width, N = p->state;
  for (int64_t bh = first; bh < stop; bh++) {
    int64_t b = bh / p->heads, h = bh % p->heads, g = h / (p->heads / p->groups);
    const real *x = row(&p->x, b, 0, h), *B = row(&p->B, b, 0, g), *C = row(&p->C, b, 0, g);
    real keep = exp_negative(*row(&p->log_a, b, 0, h)), w = p->w.at ? *row(&p->w, b, 0, h) : 1, D = p->D ? p->D[h] : 0;
    for (int64_t i = 0; i < P; i++) {
      real *restrict state = p->final + (bh * P + i) * N, add = w * x[i], sum = 0;
      for (int64_t n = 0; n < N; n++) {
        state[n] = keep * state[n] + add * B[n];
        sum += state[n] * C[n];
      }
      p->y[bh * P + i] = sum + D * x[i];
    }
  }
  return 0;
}
