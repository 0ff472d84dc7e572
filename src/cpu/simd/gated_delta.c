/* The gated delta rule (Yang et al. 2024, arXiv:2412.06464), in two forms. SPDX-License-Identifier: MIT
 *
 *   S <- S gamma_t;  S <- S + beta_t (v_t - S k_t) k_t^T;  out_t = S q_t
 *
 * A few steps (decoding) go one by one. A pass over a row s of S decays it and forms s.k and s.q together; with
 * delta = beta (v - s.k), out = s.q + delta (k.q), and a second pass over the row, now in the first-level cache, adds
 * delta k. Four rows go together, so that k, q and gamma are loaded once for them. Rows that can be loaded as vectors
 * are read and written where they lie, no scratch between.
 *
 * Many steps go in chunks, as products of matrices (DeltaNet's chunks, Yang et al. 2024, arXiv:2406.06484, with decay).
 * With S the state before the chunk, G_t = gamma_1 ... gamma_t and R_tj = gamma_(j+1) ... gamma_t, the rule unrolls to
 *
 *   delta_t = beta_t (v_t - G_t S k_t - sum over j < t of R_tj (k_j.k_t) delta_j)
 *   out_t   = G_t S q_t + sum over j <= t of R_tj (k_j.q_t) delta_j
 *   S       = G_C S + sum over j of R_Cj delta_j k_j^T
 *
 * The system for delta is triangular and is solved forward, eight steps at a time. S is kept transposed, in blocks of
 * value features, so that time and key features are the rows of every product and value features the lanes. What
 * depends on keys alone serves all value heads of a key head. Once a chunk, a state passes
 * through the first-level cache.
 *
 * Numerics: R is formed by multiplying decays on, row after row. Nothing is divided, so a decay of 0 or products that
 * underflow are nothing special. Decays by channel are multiplied onto the keys instead (k_j R_tj, k_t G_t): again the
 * recurrence's own products, none above 1. Keys that make the rule grow (beta |k|^2 > 2) cost twice the rounding error
 * that steps have, as all do. Decays that make it grow, and whatever is not finite, would spread through the products
 * in other ways than through the rule: a chunk with a decay outside [-1, 1] or NaN, or with anything above MOST, goes
 * by steps. A masked step is not read at all: chunks are made of the steps that are left. */
#include "cpu/simd/products.h"

enum {
    ROWS = MTL_GATED_DELTA_ROWS,
    STEPS = MTL_GATED_DELTA_STEPS,
    SQUARE = 8, /* steps of the triangular system that are solved in registers */
    ROWS_AHEAD = 16,
};

#define MOST ((real)0x1p40)

static char *step(mtl_strided operand, int64_t batch, int64_t time, int64_t head) {
    return operand.data + batch * operand.stride[0] + time * operand.stride[1] + head * operand.stride[2];
}

static mtl_row features(mtl_strided operand) { return (mtl_row){operand.data, operand.stride[3], operand.dtype}; }

static char *state_row(mtl_strided state, int64_t batch, int64_t head, int64_t row) {
    return state.data + batch * state.stride[0] + head * state.stride[1] + row * state.stride[2];
}

static bool is_masked(const mtl_gated_delta_args *args, int64_t batch, int64_t time) {
    return args->mask.data && mtl_load_integer(step(args->mask, batch, time, 0), args->mask.dtype) == 0;
}

/* ROWS value features of a head, or what is left of them. */
typedef struct {
    int64_t batch, head, k_head, first, rows;
} block_place;

static block_place block_at(const mtl_gated_delta_args *args, int64_t index) {
    int64_t blocks = mtl_gated_delta_blocks(args);
    block_place place = {.batch = index / blocks / args->v_heads, .head = index / blocks % args->v_heads};
    place.k_head = place.head / (args->v_heads / args->k_heads);
    place.first = index % blocks * ROWS;
    place.rows = args->value_dim - place.first < ROWS ? args->value_dim - place.first : ROWS;
    return place;
}

static void read_values(const mtl_gated_delta_args *args, block_place at, int64_t time, real *v) {
    read_row(v, step(args->v, at.batch, time, at.head) + at.first * args->v.stride[3], features(args->v), at.rows);
}

/* The decay of every key feature. */
static void read_gamma(const mtl_gated_delta_args *args, block_place at, int64_t time, real *gamma) {
    const char *from = step(args->gamma, at.batch, time, at.head);
    if (args->gamma.stride[3] != 0) {
        read_row(gamma, from, features(args->gamma), args->key_dim);
        return;
    }
    real of_head = args->key_dim ? real_load(from, args->gamma.dtype) : 0;
    for (int64_t i = 0; i < args->key_dim; i++) gamma[i] = of_head;
}

static void write_out(const mtl_gated_delta_args *args, block_place at, int64_t time, const real *out) {
    write_row(step(args->out, at.batch, time, at.head) + at.first * args->out.stride[3], features(args->out), out,
              at.rows);
}

INLINE real dot(const real *a, const real *b, int64_t padded) {
    vec products = vec_zero();
    for (int64_t i = 0; i < padded; i += LANES) products = vec_fma(vec_load(a + i), vec_load(b + i), products);
    return vec_sum(products);
}

/* ---- step by step ------------------------------------------------------------------------------------------------ */

/* `count` rows of `padded` reals, read at `from`, written at `to`, which may be the same. What lies between the key
 * dimension and the padding is 0 in q and k, and so stays out of all sums. */
INLINE void step_rows(const real *from, int64_t from_stride, real *to, int64_t to_stride, int64_t padded, int count,
                      const real *q, const real *k, const real *gamma, real kq, real beta, const real *v, real *out) {
    vec with_k[4], with_q[4];
    for (int r = 0; r < count; r++) with_k[r] = with_q[r] = vec_zero();
    for (int64_t i = 0; i < padded; i += LANES) {
        vec k_lanes = vec_load(k + i), q_lanes = vec_load(q + i), decay = vec_load(gamma + i);
        for (int r = 0; r < count; r++) {
            prefetch((const char *)(from + i) + (r + ROWS_AHEAD) * from_stride * (int64_t)sizeof(real));
            if (to != from)
                __builtin_prefetch((char *)(to + i) + (r + ROWS_AHEAD) * to_stride * (int64_t)sizeof(real), 1, 2);
            vec s = vec_load(from + r * from_stride + i) * decay;
            vec_store(to + r * to_stride + i, s);
            with_k[r] = vec_fma(s, k_lanes, with_k[r]);
            with_q[r] = vec_fma(s, q_lanes, with_q[r]);
        }
    }
    vec delta[4];
    for (int r = 0; r < count; r++) {
        real d = beta * (v[r] - vec_sum(with_k[r]));
        out[r] = vec_sum(with_q[r]) + d * kq;
        delta[r] = vec_set(d);
    }
    for (int64_t i = 0; i < padded; i += LANES) {
        vec k_lanes = vec_load(k + i);
        for (int r = 0; r < count; r++) {
            real *s = to + r * to_stride + i;
            vec_store(s, vec_fma(delta[r], k_lanes, vec_load(s)));
        }
    }
}

/* Rows of the state as step_rows takes them. */
static bool taken_in_place(const mtl_gated_delta_args *args, mtl_strided state) {
    return in_place_row(features(state), REAL_DTYPE) && args->key_dim % LANES == 0 &&
           state.stride[2] % (int64_t)sizeof(real) == 0;
}

static void do_steps(const mtl_gated_delta_args *args, int64_t begin, int64_t end, real *scratch) {
    int64_t key_dim = args->key_dim, padded = (key_dim + LANES - 1) / LANES * LANES;
    real *q = scratch, *k = q + padded, *gamma = k + padded, *staged = gamma + padded;
    real v[ROWS], out[ROWS];
    bool in_place =
        taken_in_place(args, args->state) && (!args->initial_state.data || taken_in_place(args, args->initial_state));
    for (int64_t i = key_dim; i < padded; i++) q[i] = k[i] = gamma[i] = 0;
    for (int64_t index = begin; index < end; index++) {
        block_place at = block_at(args, index);
        char *state = state_row(args->state, at.batch, at.head, at.first);
        const char *initial =
            args->initial_state.data ? state_row(args->initial_state, at.batch, at.head, at.first) : NULL;
        const real *from = staged;
        real *to = staged;
        int64_t from_stride = padded, to_stride = padded;
        if (in_place) {
            to = (real *)(void *)state;
            to_stride = args->state.stride[2] / (int64_t)sizeof(real);
        }
        if (in_place && initial) {
            from = (const real *)(const void *)initial;
            from_stride = args->initial_state.stride[2] / (int64_t)sizeof(real);
        } else if (!initial) { /* one row of zeros for all, until there is something else */
            memset(staged, 0, (size_t)padded * sizeof(real));
            from_stride = 0;
        } else {
            for (int64_t row = 0; row < at.rows; row++) {
                real *s = staged + row * padded;
                read_row(s, initial + row * args->initial_state.stride[2], features(args->initial_state), key_dim);
                for (int64_t i = key_dim; i < padded; i++) s[i] = 0;
            }
        }
        if (!in_place && !initial) {
            memset(staged, 0, (size_t)(at.rows * padded) * sizeof(real));
            from_stride = padded;
        }
        for (int64_t time = 0; time < args->time; time++) {
            if (is_masked(args, at.batch, time)) {
                memset(out, 0, sizeof out);
                write_out(args, at, time, out);
                continue;
            }
            read_row(q, step(args->q, at.batch, time, at.k_head), features(args->q), key_dim);
            read_row(k, step(args->k, at.batch, time, at.k_head), features(args->k), key_dim);
            read_gamma(args, at, time, gamma);
            read_values(args, at, time, v);
            real beta = real_load(step(args->beta, at.batch, time, at.head), args->beta.dtype);
            real kq = dot(k, q, padded);
            int64_t row = 0;
            for (; row + 4 <= at.rows; row += 4)
                step_rows(from + row * from_stride, from_stride, to + row * to_stride, to_stride, padded, 4, q, k,
                          gamma, kq, beta, v + row, out + row);
            for (; row < at.rows; row++)
                step_rows(from + row * from_stride, from_stride, to + row * to_stride, to_stride, padded, 1, q, k,
                          gamma, kq, beta, v + row, out + row);
            write_out(args, at, time, out);
            from = to;
            from_stride = to_stride;
        }
        if (in_place && from == to) continue;
        for (int64_t row = 0; row < at.rows; row++)
            write_row(state + row * args->state.stride[2], features(args->state), from + row * from_stride, key_dim);
    }
}

/* ---- chunk by chunk ---------------------------------------------------------------------------------------------- */

/* The working set of a chunk. Rows of q and k have `padded` reals, of matrices over steps STEPS, of blocks ROWS. */
typedef struct {
    const mtl_gated_delta_args *args;
    int64_t padded, batch, k_head, count; /* steps of the chunk */
    int64_t time[STEPS];
    bool by_channel, bounded;
    real *k, *q;                    /* as given */
    real *k_decayed, *q_decayed;    /* times G_t, where decay is by channel */
    real *keys;                     /* transposed: a row a feature; times R_Cj, where decay is by channel */
    real *with_keys, *with_queries; /* [t][j]: k_j.k_t, k_j.q_t (times R_tj, where decay is by channel) */
    real *from_before, *to_out;     /* [t][j]: -beta_t R_tj k_j.k_t for j < t, R_tj k_j.q_t for j <= t, else 0 */
    real *gamma, *state_factor;     /* a feature's decay in a step and in the whole chunk */
    real *delta, *out;              /* rows of a block */
    real beta[STEPS], decay[STEPS], step_factor[STEPS], rest[STEPS]; /* of a head: beta, gamma, G_t and R_Cj or 1 */
} chunk;

static bool all_bounded(const real *from, int64_t stride, int64_t rows, int64_t columns) {
    vec_int found = {0};
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t i = 0; i < columns; i += LANES)
            found |= ~(vec_abs(vec_load(from + row * stride + i)) <= vec_set(MOST));
    }
    bool any = false;
    for (int lane = 0; lane < LANES; lane++) any |= found[lane] != 0;
    return !any;
}

/* to[j][i] = from[i][j]; both extents are of whole vectors. */
static void transpose(real *to, int64_t to_stride, const real *from, int64_t from_stride, int64_t rows,
                      int64_t columns) {
    for (int64_t i = 0; i < rows; i += LANES) {
        for (int64_t j = 0; j < columns; j += LANES) {
            vec square[LANES];
            for (int r = 0; r < LANES; r++) square[r] = vec_load(from + (i + r) * from_stride + j);
            vec_transpose(square);
            for (int r = 0; r < LANES; r++) vec_store(to + (j + r) * to_stride + i, square[r]);
        }
    }
}

static void read_state(const chunk *c, block_place at, real *state) {
    const mtl_strided *initial = &c->args->initial_state;
    real *rows = c->k;
    memset(rows, 0, (size_t)(ROWS * c->padded) * sizeof(real));
    for (int64_t row = 0; row < at.rows && initial->data; row++)
        read_row(rows + row * c->padded, state_row(*initial, at.batch, at.head, at.first + row), features(*initial),
                 c->args->key_dim);
    transpose(state, ROWS, rows, c->padded, ROWS, c->padded);
}

static void write_state(const chunk *c, block_place at, const real *state) {
    const mtl_strided *to = &c->args->state;
    real *rows = c->k;
    transpose(rows, c->padded, state, ROWS, c->padded, ROWS);
    for (int64_t row = 0; row < at.rows; row++)
        write_row(state_row(*to, at.batch, at.head, at.first + row), features(*to), rows + row * c->padded,
                  c->args->key_dim);
}

/* The next steps that are not masked, their keys and queries, and, where decay is a head's, the products of these. */
static int64_t begin_chunk(chunk *c, int64_t time) {
    const mtl_gated_delta_args *args = c->args;
    int64_t length = args->key_dim;
    c->count = 0;
    for (; time < args->time && c->count < STEPS; time++) {
        if (!is_masked(args, c->batch, time)) c->time[c->count++] = time;
    }
    for (int64_t t = 0; t < STEPS; t++) {
        real *k = c->k + t * c->padded, *q = c->q + t * c->padded;
        int64_t given = t < c->count ? length : 0;
        if (given) {
            read_row(k, step(args->k, c->batch, c->time[t], c->k_head), features(args->k), length);
            read_row(q, step(args->q, c->batch, c->time[t], c->k_head), features(args->q), length);
        }
        memset(k + given, 0, (size_t)(c->padded - given) * sizeof(real));
        memset(q + given, 0, (size_t)(c->padded - given) * sizeof(real));
    }
    c->bounded = all_bounded(c->k, c->padded, c->count, c->padded);
    if (c->by_channel || !c->bounded) return time;
    transpose(c->keys, STEPS, c->k, c->padded, STEPS, c->padded);
    for (int64_t j = 0; j < c->count; j += TILE) { /* what lies above the diagonal is not used */
        multiply(c->count - j, c->k + j * c->padded, c->padded, c->keys + j, STEPS, length,
                 c->with_keys + j * STEPS + j, STEPS, TILE, NULL, 1);
        multiply(c->count - j, c->q + j * c->padded, c->padded, c->keys + j, STEPS, length,
                 c->with_queries + j * STEPS + j, STEPS, TILE, NULL, 1);
    }
    return time;
}

/* Row t of the two triangular matrices; the products there are `decay` times short of what they should be. */
static void finish_row(chunk *c, int64_t t, const real *decay) {
    for (int64_t j = 0; j < STEPS; j += LANES) {
        vec factor = vec_load(decay + j);
        vec before = vec_set(-c->beta[t]) * (factor * vec_load(c->with_keys + t * STEPS + j));
        vec here = factor * vec_load(c->with_queries + t * STEPS + j);
        vec_store(c->from_before + t * STEPS + j, vec_select(vec_first(t - j), before, vec_zero()));
        vec_store(c->to_out + t * STEPS + j, vec_select(vec_first(t + 1 - j), here, vec_zero()));
    }
}

/* Decay of a head. False where it is outside [-1, 1]. */
static bool decay_by_head(chunk *c) {
    real products[STEPS] = {0}, so_far = 1; /* R_tj */
    for (int64_t t = 0; t < c->count; t++) {
        if (!(fabs((double)c->decay[t]) <= 1)) return false;
        vec gamma = vec_set(c->decay[t]);
        for (int64_t j = 0; j < STEPS; j += LANES) vec_store(products + j, vec_load(products + j) * gamma);
        products[t] = 1;
        c->step_factor[t] = so_far *= c->decay[t];
        finish_row(c, t, products);
    }
    memcpy(c->rest, products, sizeof products);
    for (int64_t i = 0; i < c->padded; i++) c->state_factor[i] = so_far;
    return true;
}

/* Decay by channel, onto the keys: `keys` holds k_j R_tj, takes k_t in, and is multiplied with k_t and q_t. */
static bool decay_by_channel(chunk *c, int64_t head) {
    const mtl_gated_delta_args *args = c->args;
    int64_t length = args->key_dim;
    real ones[STEPS];
    for (int64_t j = 0; j < STEPS; j++) ones[j] = c->step_factor[j] = c->rest[j] = 1;
    for (int64_t i = 0; i < c->padded; i++) c->state_factor[i] = 1;
    memset(c->keys, 0, (size_t)(c->padded * STEPS) * sizeof(real));
    for (int64_t t = 0; t < c->count; t++) {
        const real *k = c->k + t * c->padded, *q = c->q + t * c->padded;
        read_row(c->gamma, step(args->gamma, c->batch, c->time[t], head), features(args->gamma), length);
        vec_int outside = {0};
        for (int64_t i = 0; i < c->padded; i += LANES) {
            vec gamma = vec_load(c->gamma + i), factor = vec_load(c->state_factor + i) * gamma;
            outside |= ~(vec_abs(gamma) <= vec_set(1));
            vec_store(c->state_factor + i, factor);
            vec_store(c->k_decayed + t * c->padded + i, vec_load(k + i) * factor);
            vec_store(c->q_decayed + t * c->padded + i, vec_load(q + i) * factor);
        }
        for (int lane = 0; lane < LANES; lane++) {
            if (outside[lane]) return false;
        }
        for (int64_t j = 0; j <= t; j += LANES) {
            vec_int this = vec_first(t + 1 - j) & ~vec_first(t - j);
            vec sum_k = vec_zero(), sum_q = vec_zero();
            for (int64_t i = 0; i < length; i++) {
                real *keys = c->keys + i * STEPS + j;
                vec key = vec_select(this, vec_set(k[i]), vec_load(keys) * vec_set(c->gamma[i]));
                vec_store(keys, key);
                sum_k = vec_fma(key, vec_set(k[i]), sum_k);
                sum_q = vec_fma(key, vec_set(q[i]), sum_q);
            }
            vec_store(c->with_keys + t * STEPS + j, sum_k);
            vec_store(c->with_queries + t * STEPS + j, sum_q);
        }
        finish_row(c, t, ones);
    }
    return true;
}

/* What the blocks of a value head share. False where they have to go by steps. */
static bool begin_head(chunk *c, int64_t head) {
    const mtl_gated_delta_args *args = c->args;
    for (int64_t t = 0; t < c->count; t++) {
        c->beta[t] = real_load(step(args->beta, c->batch, c->time[t], head), args->beta.dtype);
        c->decay[t] = c->by_channel ? 1 : real_load(step(args->gamma, c->batch, c->time[t], head), args->gamma.dtype);
    }
    if (!c->bounded || !(c->by_channel ? decay_by_channel(c, head) : decay_by_head(c))) return false;
    int64_t rest = (c->count + SQUARE - 1) / SQUARE * SQUARE - c->count; /* to whole squares */
    memset(c->from_before + c->count * STEPS, 0, (size_t)(rest * STEPS) * sizeof(real));
    memset(c->to_out + c->count * STEPS, 0, (size_t)(rest * STEPS) * sizeof(real));
    return true;
}

/* x[t] += sum over j < t of factors[t][j] x[j], in place, for the SQUARE rows of x. */
static void solve_square(const real *factors, real *x, int64_t columns) {
    for (int64_t column = 0; column < columns; column += LANES) {
        vec row[SQUARE];
        for (int t = 0; t < SQUARE; t++) row[t] = vec_load(x + t * ROWS + column);
        for (int j = 0; j < SQUARE - 1; j++) {
            for (int t = j + 1; t < SQUARE; t++) row[t] = vec_fma(vec_set(factors[t * STEPS + j]), row[j], row[t]);
        }
        for (int t = 1; t < SQUARE; t++) vec_store(x + t * ROWS + column, row[t]);
    }
}

/* Rows of steps lie far apart, out of reach of the processor's own prefetching: what is wanted after the products, and
 * the next chunk's keys and queries, are asked for a few at a time between products. Inlined, because gcc drops calls
 * of functions that do nothing but prefetch. */
INLINE void prefetch_row(const char *row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) prefetch(row + i);
}

INLINE void prefetch_steps(const chunk *c, block_place at, int64_t first, int64_t count) {
    const mtl_gated_delta_args *args = c->args;
    for (int64_t t = first; t < first + count; t++) {
        prefetch_row(step(args->v, at.batch, c->time[t], at.head) + at.first * args->v.stride[3],
                     at.rows * mtl_dtype_size(args->v.dtype));
        prefetch_row(step(args->out, at.batch, c->time[t], at.head) + at.first * args->out.stride[3],
                     at.rows * mtl_dtype_size(args->out.dtype));
        if (at.first > 0 || c->time[t] + STEPS >= args->time) continue;
        prefetch_row(step(args->k, at.batch, c->time[t] + STEPS, at.k_head),
                     args->key_dim * mtl_dtype_size(args->k.dtype));
        prefetch_row(step(args->q, at.batch, c->time[t] + STEPS, at.k_head),
                     args->key_dim * mtl_dtype_size(args->q.dtype));
    }
}

/* A block's part of the chunk. False, and the state as it was, where it has to go by steps. */
static bool do_block(chunk *c, block_place at, real *state) {
    const mtl_gated_delta_args *args = c->args;
    const real *k = c->by_channel ? c->k_decayed : c->k, *q = c->by_channel ? c->q_decayed : c->q;
    real ones[SQUARE], v[ROWS] = {0};
    for (int i = 0; i < SQUARE; i++) ones[i] = 1;
    int64_t columns = (at.rows + TILE - 1) / TILE * TILE, squares = (c->count + SQUARE - 1) / SQUARE * SQUARE;
    for (int64_t t = 0; t < c->count; t += TILE_ROWS) {
        int64_t rows = c->count - t < TILE_ROWS ? c->count - t : TILE_ROWS;
        prefetch_steps(c, at, t, rows);
        multiply(rows, k + t * c->padded, c->padded, state, ROWS, args->key_dim, c->delta + t * ROWS, ROWS, columns,
                 NULL, 1);
        multiply(rows, q + t * c->padded, c->padded, state, ROWS, args->key_dim, c->out + t * ROWS, ROWS, columns, NULL,
                 1);
    }
    for (int64_t t = 0; t < c->count; t++) {
        read_values(args, at, c->time[t], v);
        vec beta = vec_set(c->beta[t]), factor = vec_set(c->step_factor[t]);
        real *delta = c->delta + t * ROWS;
        for (int64_t i = 0; i < columns; i += LANES)
            vec_store(delta + i, beta * (vec_load(v + i) - factor * vec_load(delta + i)));
    }
    memset(c->delta + c->count * ROWS, 0, (size_t)((squares - c->count) * ROWS) * sizeof(real));
    memset(c->out + c->count * ROWS, 0, (size_t)((squares - c->count) * ROWS) * sizeof(real));
    for (int64_t t = 0; t < squares; t += SQUARE) {
        if (t)
            multiply(SQUARE, c->from_before + t * STEPS, STEPS, c->delta, ROWS, t, c->delta + t * ROWS, ROWS, columns,
                     ones, 1);
        solve_square(c->from_before + t * STEPS + t, c->delta + t * ROWS, columns);
        multiply(SQUARE, c->to_out + t * STEPS, STEPS, c->delta, ROWS, t + SQUARE, c->out + t * ROWS, ROWS, columns,
                 c->step_factor + t, 1);
    }
    if (!all_bounded(c->delta, ROWS, c->count, columns) || !all_bounded(c->out, ROWS, c->count, columns)) return false;
    for (int64_t t = 0; t < c->count; t++) write_out(args, at, c->time[t], c->out + t * ROWS);
    for (int64_t t = 0; t < c->count && !c->by_channel; t++) {
        real *delta = c->delta + t * ROWS;
        for (int64_t i = 0; i < columns; i += LANES) vec_store(delta + i, vec_load(delta + i) * vec_set(c->rest[t]));
    }
    multiply(args->key_dim, c->keys, STEPS, c->delta, ROWS, c->count, state, ROWS, columns, c->state_factor, 1);
    return true;
}

/* The same, as the rule says it. */
static void do_block_by_steps(const chunk *c, block_place at, real *state) {
    const mtl_gated_delta_args *args = c->args;
    int64_t length = args->key_dim;
    real v[ROWS] = {0}, out[ROWS];
    for (int64_t t = 0; t < c->count; t++) {
        const real *k = c->k + t * c->padded, *q = c->q + t * c->padded;
        read_gamma(args, at, c->time[t], c->gamma);
        read_values(args, at, c->time[t], v);
        vec kq = vec_set(dot(k, q, c->padded)), beta = vec_set(c->beta[t]);
        for (int64_t column = 0; column < at.rows; column += LANES) {
            vec with_k = vec_zero(), with_q = vec_zero();
            for (int64_t i = 0; i < length; i++) {
                vec s = vec_load(state + i * ROWS + column) * vec_set(c->gamma[i]);
                vec_store(state + i * ROWS + column, s);
                with_k = vec_fma(s, vec_set(k[i]), with_k);
                with_q = vec_fma(s, vec_set(q[i]), with_q);
            }
            vec delta = beta * (vec_load(v + column) - with_k);
            vec_store(out + column, vec_fma(delta, kq, with_q));
            for (int64_t i = 0; i < length; i++) {
                real *s = state + i * ROWS + column;
                vec_store(s, vec_fma(delta, vec_set(k[i]), vec_load(s)));
            }
        }
        write_out(args, at, c->time[t], out);
    }
}

/* Blocks [begin, end), which share their key head. */
static void do_chunks(chunk *c, int64_t begin, int64_t end, real *states) {
    const mtl_gated_delta_args *args = c->args;
    int64_t size = c->padded * ROWS;
    for (int64_t index = begin; index < end; index++)
        read_state(c, block_at(args, index), states + (index - begin) * size);
    if (args->mask.data) {
        const real zeros[ROWS] = {0};
        for (int64_t time = 0; time < args->time; time++) {
            if (!is_masked(args, c->batch, time)) continue;
            for (int64_t index = begin; index < end; index++) write_out(args, block_at(args, index), time, zeros);
        }
    }
    for (int64_t time = 0; time < args->time;) {
        time = begin_chunk(c, time);
        if (c->count == 0) break;
        int64_t head = -1;
        bool as_chunk = false;
        for (int64_t index = begin; index < end; index++) {
            block_place at = block_at(args, index);
            if (at.head != head) as_chunk = begin_head(c, at.head);
            head = at.head;
            real *state = states + (index - begin) * size;
            if (!as_chunk || !do_block(c, at, state)) do_block_by_steps(c, at, state);
        }
    }
    for (int64_t index = begin; index < end; index++)
        write_state(c, block_at(args, index), states + (index - begin) * size);
}

void SIMD(gated_delta)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_gated_delta_args *args = arguments;
    int64_t per_head = mtl_gated_delta_blocks(args), all = args->batch * args->v_heads * per_head;
    int64_t first = begin * args->blocks, last = end * args->blocks < all ? end * args->blocks : all;
    if (args->time < MTL_GATED_DELTA_FEW) {
        do_steps(args, first, last, scratch);
        return;
    }
    chunk state = {.args = args, .padded = (args->key_dim + LANES - 1) / LANES * LANES}, *c = &state;
    c->by_channel = args->gamma.stride[3] != 0;
    int64_t rows = STEPS * c->padded, square = STEPS * STEPS;
    c->k = scratch;
    c->q = c->k + rows;
    c->keys = c->q + rows;
    c->k_decayed = c->keys + rows;
    c->q_decayed = c->k_decayed + rows;
    c->with_keys = c->q_decayed + rows;
    c->with_queries = c->with_keys + square;
    c->from_before = c->with_queries + square;
    c->to_out = c->from_before + square;
    c->delta = c->to_out + square;
    c->out = c->delta + STEPS * ROWS;
    c->gamma = c->out + STEPS * ROWS;
    c->state_factor = c->gamma + c->padded;
    real *states = c->state_factor + c->padded;
    for (int64_t i = 0; i < c->padded; i++) c->gamma[i] = 0;
    int64_t group = args->v_heads / args->k_heads * per_head;
    while (first < last) { /* as many blocks as fit, of one key head */
        int64_t stop = (first / group + 1) * group;
        if (stop > first + args->blocks) stop = first + args->blocks;
        if (stop > last) stop = last;
        block_place at = block_at(args, first);
        c->batch = at.batch;
        c->k_head = at.k_head;
        do_chunks(c, first, stop, states);
        first = stop;
    }
}
