/* One new token beside a window and a state: moves the ring, writes the token that leaves into the state, and answers
   every query head over one normaliser. What plain.py does, without its forty operations.

   B batch, G key/value heads, H query heads, P head width, Q = P + 1, N prototypes, S sinks, R window. All tensors are
   contiguous; what is written is not what is read. */

#include "tiles.h"

typedef struct {
  int64_t batch, heads, groups, width, window, sinks, states, turned, tables;
  double scale, softcap, headroom;
  const real *q, *k, *v, *ring_k, *ring_v, *sink_k, *sink_v;
  const uint8_t *valid, *ring_valid, *filled;
  const int64_t *seen;
  const real *state, *key_map, *key_bias, *query_map, *query_bias, *dt_map, *dt_bias, *A_log, *gate, *cos, *sin;
  real *answer, *new_ring_k, *new_ring_v, *new_sink_k, *new_sink_v, *new_state;
  uint8_t *new_ring_valid, *new_filled;
  int64_t *new_seen;
} Problem;

/* What is the same for all heads of a row: whether its oldest token leaves, its place in the text, and where it goes. */
typedef struct {
  int leaves, enters;
  int64_t slot;
} Leaving;

static Leaving leaving(const Problem *p, int64_t b) {
  const uint8_t *valid = p->ring_valid + b * p->window;
  int64_t rank = p->seen[b];
  for (int64_t i = 0; i < p->window; i++) rank -= valid[i];
  Leaving out = {valid[0], valid[0] && rank >= p->sinks, valid[0] && rank < p->sinks ? rank : -1};
  return out;
}

static real exp_any(real x) {
#ifdef DOUBLE
  return exp(x);
#else
  return expf(x);
#endif
}

static real capped(const Problem *p, real x) {
  return p->softcap > 0 ? (real)(p->softcap * tanh(x / p->softcap)) : x;
}

/* Against the angle of this token's position, whatever the tables' size. */
static void turned_back(const Problem *p, int64_t b, const real *x, real *out) {
  int64_t half = p->turned / 2;
  const real *cos_ = p->cos + (p->tables > 1 ? b : 0) * p->turned, *sin_ = p->sin + (p->tables > 1 ? b : 0) * p->turned;
  for (int64_t i = 0; i < p->width; i++) {
    if (i >= p->turned) {
      out[i] = x[i];
      continue;
    }
    real size = (real)fmax(hypot(cos_[i], sin_[i]), 1e-12);
    real other = i < half ? -x[i + half] : x[i - half];
    out[i] = (x[i] * cos_[i] - other * sin_[i]) / size;
  }
}

/* The ring and the sinks of one key/value head with the new token in them. */
static void move(const Problem *p, const real *ring, const real *sink, const real *new, real *new_ring, real *new_sink,
                 int64_t bg, int64_t slot) {
  const int64_t P = p->width, R = p->window, S = p->sinks;
  memcpy(new_ring + bg * R * P, ring + (bg * R + 1) * P, (size_t)((R - 1) * P) * sizeof(real));
  memcpy(new_ring + (bg * R + R - 1) * P, new + bg * P, (size_t)P * sizeof(real));
  if (S) memcpy(new_sink + bg * S * P, sink + bg * S * P, (size_t)(S * P) * sizeof(real));
  if (slot >= 0) memcpy(new_sink + (bg * S + slot) * P, ring + bg * R * P, (size_t)P * sizeof(real));
}

/* S = exp(-dt A) S + dt [v; 1] softmax(key_map k + key_bias) for the token that leaves. */
static void remember(const Problem *p, int64_t b, int64_t g, int enters, real *k, real *weights) {
  const int64_t P = p->width, N = p->states, bg = b * p->groups + g, count = (P + 1) * N;
  const real *old = p->state + bg * count, *v = p->ring_v + bg * p->window * P;
  real *state = p->new_state + bg * count;
  if (!enters) {
    memcpy(state, old, (size_t)count * sizeof(real));
    return;
  }
  const real *left = p->ring_k + bg * p->window * P;
  if (p->turned) turned_back(p, b, left, k);
  else memcpy(k, left, (size_t)P * sizeof(real));
  real top = -INFINITY, sum = 0, dt = p->dt_bias[g] + dot(P, p->dt_map + g * P, k);
  for (int64_t n = 0; n < N; n++) {
    weights[n] = p->key_bias[g * N + n] + dot(P, p->key_map + (g * N + n) * P, k);
    top = weights[n] > top ? weights[n] : top;
  }
  for (int64_t n = 0; n < N; n++) sum += weights[n] = exp_negative(weights[n] - top);
  for (int64_t n = 0; n < N; n++) weights[n] /= sum;
  dt = dt > 20 ? dt : (real)log1p(exp(dt));
  real keep = (real)exp(-dt * exp(p->A_log[g]));
  for (int64_t i = 0; i <= P; i++) {
    real add = dt * (i < P ? v[i] : 1);
    for (int64_t n = 0; n < N; n++) state[i * N + n] = keep * old[i * N + n] + add * weights[n];
  }
}

/* Adds `weight` times a value to the sums, and the weight to the mass behind them. */
INLINE void add_value(int64_t P, real weight, const real *v, real *restrict sums) {
  for (int64_t i = 0; i < P; i++) sums[i] += weight * v[i];
  sums[P] += weight;
}

/* What one query head answers. `near` has room for S + R logits, `far` for N, `q_far` for P and `sums` for P + 1. */
static void answer_head(const Problem *p, int64_t b, int64_t g, int64_t h, real *near, real *far, real *q_far,
                        real *sums) {
  const int64_t P = p->width, R = p->window, S = p->sinks, N = p->states, bg = b * p->groups + g;
  const real *q = p->q + (b * p->heads + h) * P;
  const real *k[2] = {p->new_sink_k + bg * S * P, p->new_ring_k + bg * R * P};
  const real *v[2] = {p->new_sink_v + bg * S * P, p->new_ring_v + bg * R * P};
  const uint8_t *seen[2] = {p->new_filled + b * S, p->new_ring_valid + b * R};
  const int64_t many[2] = {S, R};
#ifdef DOUBLE
  real top = -8.9e307;
#else
  real top = -1.7014117e38f;
#endif
  for (int part = 0, at = 0; part < 2; part++)
    for (int64_t e = 0; e < many[part]; e++, at++)
      if (seen[part][e]) {
        near[at] = capped(p, (real)p->scale * dot(P, q, k[part] + e * P));
        top = near[at] > top ? near[at] : top;
      }
  if (N) {
    const real *u = q;
    if (p->turned) turned_back(p, b, q, q_far), u = q_far;
    real most = -INFINITY;
    for (int64_t n = 0; n < N; n++) {
      far[n] = capped(p, p->query_bias[h * N + n] + dot(P, p->query_map + (h * N + n) * P, u));
      most = far[n] > most ? far[n] : most;
    }
    most -= (real)p->headroom;
    top = most > top ? most : top;
  }
  memset(sums, 0, (size_t)(P + 1) * sizeof(real));
  for (int part = 0, at = 0; part < 2; part++)
    for (int64_t e = 0; e < many[part]; e++, at++)
      if (seen[part][e]) add_value(P, exp_negative(near[at] - top), v[part] + e * P, sums);
  if (N && p->gate[h] > 0) {
    const real *state = p->new_state + bg * (P + 1) * N;
    /* up to e^headroom, so no exp_negative */
    for (int64_t n = 0; n < N; n++) far[n] = p->gate[h] * exp_any(far[n] - top);
    for (int64_t i = 0; i <= P; i++) sums[i] += dot(N, state + i * N, far);
  }
  real mass = sums[P] > 1.17549435e-38f ? sums[P] : 1.17549435e-38f;
  for (int64_t i = 0; i < P; i++) p->answer[(b * p->heads + h) * P + i] = sums[i] / mass;
}

/* Rows of the batch from `first` to `stop`. */
int window_step(const Problem *p, int64_t first, int64_t stop) {
  const int64_t P = p->width, R = p->window, S = p->sinks, per = p->heads / p->groups;
  real *block = scratch(S + R + p->states + 2 * P + 1 + 4 * 64);
  if (!block) return 1;
  real *rest = block, *near = take(&rest, S + R), *far = take(&rest, p->states), *turned = take(&rest, P);
  real *sums = take(&rest, P + 1);
  for (int64_t b = first; b < stop; b++) {
    Leaving left = leaving(p, b);
    uint8_t valid = p->valid ? p->valid[b] : 1;
    memcpy(p->new_ring_valid + b * R, p->ring_valid + b * R + 1, (size_t)(R - 1));
    p->new_ring_valid[b * R + R - 1] = valid;
    if (S) memcpy(p->new_filled + b * S, p->filled + b * S, (size_t)S);
    if (left.slot >= 0) p->new_filled[b * S + left.slot] = 1;
    p->new_seen[b] = p->seen[b] + valid;
    for (int64_t g = 0; g < p->groups; g++) {
      int64_t bg = b * p->groups + g;
      move(p, p->ring_k, p->sink_k, p->k, p->new_ring_k, p->new_sink_k, bg, left.slot);
      move(p, p->ring_v, p->sink_v, p->v, p->new_ring_v, p->new_sink_v, bg, left.slot);
      if (p->states) remember(p, b, g, left.enters, turned, far);
      for (int64_t i = 0; i < per; i++) answer_head(p, b, g, g * per + i, near, far, turned, sums);
    }
  }
  free(block);
  return 0;
}
