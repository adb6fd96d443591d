/* The mixing losses of one head at a time, in tiles of both matrices, with the gradients computed in the forward pass.

   A row of tiles is held for the teacher, and for the cosine one for the student: O(L) scratch. Left of the diagonal
   tile the decay between s and t is row_t col_s, from s to the end of the block before t's and from there to t; both are
   at most 1, and where every col_s of a tile is 0 the student's half of it is left out. W is dL/dM over a factor of its
   row. d log_a is the reverse cumulative sum of <C, dC> - <B, dB>. Padded tokens are dropped beforehand.

   Names: L tokens kept, N width of B and C, K of q and k; t rows, s columns; wB are the columns B times their weight. */

#include "tiles.h"

enum { TILE = 64, AREA = TILE * TILE };
#define UNSEEN ((real)-1e30)

typedef struct {
  const real *at;
  int64_t batch, token, head;
} View;

typedef struct {
  int64_t batch, length, heads, width, key_width, window; /* window 0: none */
  int64_t cosine, gradients;
  double scale, softcap; /* softcap 0: none */
  View C, B, log_a, w, q, k;
  const real *D, *sinks;                /* [H]; sinks may be null */
  const uint8_t *valid;                 /* [B, L], may be null */
  double *loss;                         /* [B, H], summed over rows for the cosine */
  real *dC, *dB, *dlog_a, *dw, *dD;     /* [B, L, H, N] twice, [B, L, H] twice, [B, H]; zeros at padded tokens */
} Problem;

/* Of one head: the tokens kept, and their vectors as products take them. `tokens` is padded to whole tiles with zeros. */
typedef struct {
  const Problem *p;
  int64_t b, h, count, tiles, ldn, ldk;
  int64_t *kept;
  double *cum;
  real *wB, *wB_turned, *k_turned, *dwB; /* [tiles][TILE][ldn], [tiles][N][TILE], [tiles][K][TILE], as wB */
  real *A, *M;                           /* a row of tiles */
  real *q, *C, *rowC, *dC, *spare;       /* of one block of rows, or columns */
  real *col;                             /* [tiles * TILE], of this block of rows */
} Head;

static const real *row(const View *view, int64_t b, int64_t t, int64_t h) {
  return view->at + b * view->batch + t * view->token + h * view->head;
}

static void open_head(Head *k) {
  const Problem *p = k->p;
  k->count = 0;
  for (int64_t t = 0; t < p->length; t++)
    if (!p->valid || p->valid[k->b * p->length + t]) k->kept[k->count++] = t;
  k->tiles = (k->count + TILE - 1) / TILE;
  double sum = 0;
  for (int64_t i = 0; i < k->count; i++) k->cum[i] = sum += *row(&p->log_a, k->b, k->kept[i], k->h);
  for (int64_t j = 0; j < k->tiles; j++) {
    int64_t rows = min_i(TILE, k->count - j * TILE);
    real *wB = k->wB + j * TILE * k->ldn, *keys = k->spare;
    memset(wB, 0, (size_t)(TILE * k->ldn) * sizeof(real));
    memset(keys, 0, (size_t)(TILE * k->ldk) * sizeof(real));
    for (int64_t s = 0; s < rows; s++) {
      int64_t token = k->kept[j * TILE + s];
      real w = *row(&p->w, k->b, token, k->h);
      const real *B = row(&p->B, k->b, token, k->h), *key = row(&p->k, k->b, token, k->h);
      for (int64_t n = 0; n < p->width; n++) wB[s * k->ldn + n] = w * B[n];
      for (int64_t n = 0; n < p->key_width; n++) keys[s * k->ldk + n] = key[n];
    }
    transpose(TILE, p->width, wB, k->ldn, k->wB_turned + j * p->width * TILE, TILE);
    transpose(TILE, p->key_width, keys, k->ldk, k->k_turned + j * p->key_width * TILE, TILE);
  }
  if (p->gradients) memset(k->dwB, 0, (size_t)(k->tiles * TILE * k->ldn) * sizeof(real));
}

/* What is needed of the rows of block i. */
static void open_rows(Head *k, int64_t i, real *row_factor) {
  const Problem *p = k->p;
  int64_t start = i * TILE, rows = min_i(TILE, k->count - start);
  double ref = start ? k->cum[start - 1] : 0;
  memset(k->q, 0, (size_t)(TILE * k->ldk) * sizeof(real));
  memset(k->C, 0, (size_t)(TILE * k->ldn) * sizeof(real));
  memset(k->rowC, 0, (size_t)(TILE * k->ldn) * sizeof(real));
  for (int64_t t = 0; t < TILE; t++) row_factor[t] = 0;
  for (int64_t t = 0; t < rows; t++) {
    int64_t token = k->kept[start + t];
    const real *q = row(&p->q, k->b, token, k->h), *C = row(&p->C, k->b, token, k->h);
    row_factor[t] = exp_negative((real)(k->cum[start + t] - ref));
    for (int64_t n = 0; n < p->key_width; n++) k->q[t * k->ldk + n] = q[n] * (real)p->scale;
    for (int64_t n = 0; n < p->width; n++) k->C[t * k->ldn + n] = C[n];
    for (int64_t n = 0; n < p->width; n++) k->rowC[t * k->ldn + n] = C[n] * row_factor[t];
  }
  for (int64_t s = 0; s < start; s++) k->col[s] = exp_negative((real)(ref - k->cum[s]));
}

static int dead(const real *col) {
  real largest = 0;
  for (int64_t s = 0; s < TILE; s++) largest = col[s] > largest ? col[s] : largest;
  return largest == 0;
}

/* Scores of block of rows i and tile j, masked, and the rows' highest so far. */
static void score_tile(const Head *k, int64_t i, int64_t j, real *peak) {
  const Problem *p = k->p;
  real *tile = k->A + j * AREA;
  int64_t rows = min_i(TILE, k->count - i * TILE), columns = min_i(TILE, k->count - j * TILE);
  const int64_t *at_t = k->kept + i * TILE, *at_s = k->kept + j * TILE;
  if (p->window && at_t[0] - at_s[columns - 1] >= p->window) {
    for (int64_t e = 0; e < AREA; e++) tile[e] = UNSEEN;
    return;
  }
  product(rows, TILE, p->key_width, k->q, k->ldk, 1, k->k_turned + j * p->key_width * TILE, TILE, tile, TILE, 0, ALL);
  if (p->softcap > 0) {
    real cap = (real)p->softcap, inverse = (real)(1 / p->softcap);
    for (int64_t e = 0; e < rows * TILE; e++) {
      real small = exp_negative(-2 * (real)fabs(tile[e]) * inverse), size = cap * (1 - small) / (1 + small);
      tile[e] = tile[e] < 0 ? -size : size;
    }
  }
  int64_t partly = p->window && at_t[rows - 1] - at_s[0] >= p->window;
  for (int64_t t = 0; t < rows; t++) {
    real *x = tile + t * TILE, highest = UNSEEN;
    if (i == j)
      for (int64_t s = t + 1; s < TILE; s++) x[s] = UNSEEN;
    if (partly)
      for (int64_t s = 0; s < columns; s++) x[s] = at_t[t] - at_s[s] >= p->window ? UNSEEN : x[s];
    for (int64_t s = 0; s < TILE; s++) highest = x[s] > highest ? x[s] : highest;
    if (highest > peak[t]) peak[t] = highest;
  }
}

/* The teacher's rows of block i into A: probabilities, or for the cosine, which is blind to it, without their divisor. */
static void attention(Head *k, int64_t i) {
  const Problem *p = k->p;
  int64_t rows = min_i(TILE, k->count - i * TILE);
  real peak[TILE];
  for (int64_t t = 0; t < TILE; t++) peak[t] = UNSEEN;
  for (int64_t j = 0; j <= i; j++) score_tile(k, i, j, peak);
  double total[TILE] = {0};
  if (p->sinks && !p->cosine)
    for (int64_t t = 0; t < rows; t++) {
      if (p->sinks[k->h] > peak[t]) peak[t] = p->sinks[k->h];
      total[t] = exp_negative(p->sinks[k->h] - peak[t]);
    }
  for (int64_t j = 0; j <= i; j++)
    for (int64_t t = 0; t < rows; t++) {
      real *x = k->A + j * AREA + t * TILE, sum = 0;
      for (int64_t s = 0; s < TILE; s++) x[s] = exp_negative(x[s] - peak[t]), sum += x[s];
      total[t] += sum;
    }
  if (p->cosine) return;
  for (int64_t j = 0; j <= i; j++)
    for (int64_t t = 0; t < rows; t++) {
      real *x = k->A + j * AREA + t * TILE, share = (real)(1 / total[t]);
      for (int64_t s = 0; s < TILE; s++) x[s] *= share;
    }
}

/* The student's tile j of block of rows i; on the diagonal with its decays, which are left in `decay`. */
static void student(const Head *k, int64_t i, int64_t j, const real *row_factor, real *M, real *decay) {
  const Problem *p = k->p;
  int64_t rows = min_i(TILE, k->count - i * TILE);
  product(rows, TILE, p->width, k->C, k->ldn, 1, k->wB_turned + j * p->width * TILE, TILE, M, TILE, 0,
          i == j ? RESULT_LOWER : ALL);
  for (int64_t t = 0; t < rows; t++) {
    real *m = M + t * TILE;
    if (j < i) {
      const real *col = k->col + j * TILE;
      for (int64_t s = 0; s < TILE; s++) m[s] *= row_factor[t] * col[s];
      continue;
    }
    real *d = decay + t * TILE;
    const double *cum = k->cum + i * TILE;
    for (int64_t s = 0; s <= t; s++) d[s] = exp_negative((real)(cum[t] - cum[s])), m[s] *= d[s];
    for (int64_t s = t + 1; s < TILE; s++) d[s] = m[s] = 0;
    m[t] += p->D[k->h];
  }
}

/* Takes up W, a tile of dL/dM over the factors of its rows: dC of this block, dwB of those columns, and dD. The diagonal
   tile comes last and carries all of its decay already; what came before still lacks that of its rows. */
static void add_gradients(Head *k, int64_t i, int64_t j, real *W, const real *decay, const real *row_factor,
                          const real *factor, double *dD) {
  const Problem *p = k->p;
  int64_t rows = min_i(TILE, k->count - i * TILE), columns = min_i(TILE, k->count - j * TILE);
  for (int64_t t = 0; t < rows; t++) {
    real *x = W + t * TILE;
    const real *d = i == j ? decay + t * TILE : k->col + j * TILE;
    if (i == j) *dD += x[t] * factor[t];
    for (int64_t s = 0; s < TILE; s++) x[s] *= d[s] * factor[t];
  }
  if (i == j)
    for (int64_t t = 0; t < rows; t++)
      for (int64_t n = 0; n < k->ldn; n++) k->dC[t * k->ldn + n] *= row_factor[t];
  real *wB = k->wB + j * TILE * k->ldn, *dwB = k->dwB + j * TILE * k->ldn;
  product(rows, p->width, columns, W, TILE, 1, wB, k->ldn, k->dC, k->ldn, 1, i == j ? A_LOWER : ALL);
  product(columns, p->width, rows, W, 1, TILE, i == j ? k->C : k->rowC, k->ldn, dwB, k->ldn, 1, i == j ? A_UPPER : ALL);
}

/* Of block of rows i: the sum of squares of M - A. The gradients lack the division by the norm. */
static double frobenius_rows(Head *k, int64_t i, const real *row_factor, double *dD) {
  int64_t rows = min_i(TILE, k->count - i * TILE);
  real ones[TILE], decay[AREA];
  for (int64_t t = 0; t < TILE; t++) ones[t] = 1;
  double squares = 0;
  for (int64_t j = 0; j <= i; j++) {
    real *A = k->A + j * AREA, *M = k->M;
    int64_t alive = j == i || !dead(k->col + j * TILE);
    if (alive) student(k, i, j, row_factor, M, decay);
    else memset(M, 0, AREA * sizeof(real));
    for (int64_t t = 0; t < rows; t++) {
      real *a = A + t * TILE, *m = M + t * TILE, sum = 0;
      for (int64_t s = 0; s < TILE; s++) a[s] = m[s] - a[s], sum += a[s] * a[s];
      squares += sum;
    }
    if (k->p->gradients && alive) add_gradients(k, i, j, A, decay, row_factor, ones, dD);
  }
  return squares;
}

/* Of block of rows i: the sum of 1 - cos. A row of zeros has cosine 0 and gradient 0. */
static double cosine_rows(Head *k, int64_t i, const real *row_factor, double *dD) {
  int64_t rows = min_i(TILE, k->count - i * TILE);
  real decay[AREA], alpha[TILE], factor[TILE];
  double mm[TILE] = {0}, ma[TILE] = {0}, aa[TILE] = {0}, loss = 0;
  for (int64_t j = 0; j <= i; j++) {
    real *A = k->A + j * AREA, *M = k->M + j * AREA;
    if (j == i || !dead(k->col + j * TILE)) student(k, i, j, row_factor, M, decay);
    else memset(M, 0, AREA * sizeof(real));
    for (int64_t t = 0; t < rows; t++) {
      const real *a = A + t * TILE, *m = M + t * TILE;
      mm[t] += dot(TILE, m, m), ma[t] += dot(TILE, m, a), aa[t] += dot(TILE, a, a);
    }
  }
  for (int64_t t = 0; t < rows; t++) {
    double norms = sqrt(mm[t]) * sqrt(aa[t]);
    int some = mm[t] > 0;
    loss += 1 - (some ? ma[t] / norms : 0);
    alpha[t] = some ? (real)(ma[t] / mm[t]) : 0;
    factor[t] = some ? (real)(1 / norms) : 0;
  }
  if (!k->p->gradients) return loss;
  for (int64_t j = 0; j <= i; j++) {
    real *A = k->A + j * AREA, *M = k->M + j * AREA;
    if (j < i && dead(k->col + j * TILE)) continue;
    for (int64_t t = 0; t < rows; t++)
      for (int64_t s = 0; s < TILE; s++) A[t * TILE + s] = alpha[t] * M[t * TILE + s] - A[t * TILE + s];
    add_gradients(k, i, j, A, decay, row_factor, factor, dD);
  }
  return loss;
}

/* Writes dC of block of rows i, and <C, dC> of its tokens. */
static void close_rows(const Head *k, int64_t i, double *change) {
  const Problem *p = k->p;
  for (int64_t t = 0; t < min_i(TILE, k->count - i * TILE); t++) {
    real *out = p->dC + ((k->b * p->length + k->kept[i * TILE + t]) * p->heads + k->h) * p->width;
    for (int64_t n = 0; n < p->width; n++) out[n] = k->dC[t * k->ldn + n];
    change[i * TILE + t] = dot(p->width, k->C + t * k->ldn, k->dC + t * k->ldn);
  }
}

/* Writes what depends on later rows too; `factor` is that of all gradients. */
static void close_head(const Head *k, double factor, double dD, const double *change) {
  const Problem *p = k->p;
  double sum = 0;
  for (int64_t i = k->count - 1; i >= 0; i--) {
    int64_t at = (k->b * p->length + k->kept[i]) * p->heads + k->h;
    const real *B = row(&p->B, k->b, k->kept[i], k->h), *dwB = k->dwB + i * k->ldn;
    real w = *row(&p->w, k->b, k->kept[i], k->h), dw = dot(p->width, B, dwB);
    for (int64_t n = 0; n < p->width; n++) p->dB[at * p->width + n] = (real)(dwB[n] * w * factor);
    for (int64_t n = 0; n < p->width; n++) p->dC[at * p->width + n] *= (real)factor;
    p->dw[at] = (real)(dw * factor);
    sum += change[i] - (double)dw * w;
    p->dlog_a[at] = i ? (real)(sum * factor) : 0; /* nothing comes before the first token */
  }
  p->dD[k->b * p->heads + k->h] = (real)(dD * factor);
}

static void one_head(Head *k, double *change) {
  const Problem *p = k->p;
  real row_factor[TILE];
  double loss = 0, dD = 0;
  open_head(k);
  for (int64_t i = 0; i < k->tiles; i++) {
    open_rows(k, i, row_factor);
    memset(k->dC, 0, (size_t)(TILE * k->ldn) * sizeof(real));
    attention(k, i);
    loss += p->cosine ? cosine_rows(k, i, row_factor, &dD) : frobenius_rows(k, i, row_factor, &dD);
    if (p->gradients) close_rows(k, i, change);
  }
  if (!p->cosine) loss = sqrt(loss);
  if (p->gradients) close_head(k, p->cosine ? 1 : loss > 0 ? 1 / loss : 0, dD, change);
  p->loss[k->b * p->heads + k->h] = loss;
}

/* Heads first .. stop of all batch entries; 1 where there is no memory. */
int mixing(const Problem *p, int64_t first, int64_t stop) {
  const int64_t N = p->width, K = p->key_width, ldn = padded(N), ldk = padded(K);
  const int64_t tiles = (p->length + TILE - 1) / TILE, all = tiles * TILE, rows_of_M = p->cosine ? tiles : 1;
  const int64_t gradients = p->gradients ? all * ldn : 0;
  real *block = scratch(all * (ldn + N + K + 1) + gradients + (tiles + rows_of_M) * AREA + TILE * (3 * ldn + 2 * ldk) + 12 * 64);
  double *sums = malloc((size_t)(2 * all + 1) * sizeof(double));
  int64_t *kept = malloc((size_t)(all + 1) * sizeof(int64_t));
  int failed = !block || !sums || !kept;
  real *rest = block;
  Head k = {.p = p, .ldn = ldn, .ldk = ldk, .kept = kept, .cum = sums};
  if (!failed) {
    k.wB = take(&rest, all * ldn), k.wB_turned = take(&rest, all * N), k.k_turned = take(&rest, all * K);
    k.dwB = take(&rest, gradients), k.A = take(&rest, tiles * AREA), k.M = take(&rest, rows_of_M * AREA);
    k.q = take(&rest, TILE * ldk), k.spare = take(&rest, TILE * ldk), k.C = take(&rest, TILE * ldn);
    k.rowC = take(&rest, TILE * ldn), k.dC = take(&rest, TILE * ldn), k.col = take(&rest, all);
    for (int64_t i = first; i < stop; i++) {
      k.b = i / p->heads, k.h = i % p->heads;
      one_head(&k, sums + all);
    }
  }
  free(block), free(sums), free(kept);
  return failed;
}
