/* Pair i turns by position * scale * inv_freq[i]; with qk_norm_rope after rms_norm of the head. SPDX-License-Identifier: MIT
 *
 * The angle is formed and reduced in double: k = round(angle 2/pi), r = angle - k pi/2 with pi/2 in two doubles, which an fma
 * subtracts without error worth naming up to 2^30; beyond, and for float64 tensors, the C library's functions serve. sin and cos of r are
 * polynomials (minimax, relative error 5e-12 and 1e-13), rounded to real. A block of time steps has its table made once for all
 * heads; its rows are then turned in the order in which they lie in memory. */
#include "cpu/simd/sums.h"

#ifdef MTL_IN_DOUBLE
typedef long double angle_real;
#define angle_pow powl
#else
typedef double angle_real;
#define angle_pow pow
#endif

/* ---- cosines and sines ------------------------------------------------------------------------------------------------ */

#ifndef MTL_IN_DOUBLE
enum { ANGLES = VECTOR_BYTES / sizeof(double) };
typedef double angle_vec __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t angle_int __attribute__((vector_size(VECTOR_BYTES)));

INLINE angle_vec angle_set(double x) { return x - (angle_vec){0}; }

/* False where an angle is too large (or NaN). */
INLINE bool sine_and_cosine(angle_vec angle, angle_vec *sine, angle_vec *cosine) {
    angle_int magnitude = (angle_int)angle & INT64_MAX, too_large = magnitude > (angle_int)angle_set(0x1p30);
    int64_t any = 0;
    for (int i = 0; i < ANGLES; i++) any |= too_large[i];
    if (any) return false;
    const angle_vec magic = angle_set(0x1.8p52);
    angle_vec shifted = angle * 0x1.45f306dc9c883p-1 + magic, k = shifted - magic;
    angle_int quadrant = (angle_int)shifted;
    angle_vec r =
        angle_fma(k, angle_set(-0x1.1a62633145c07p-54), angle_fma(k, angle_set(-0x1.921fb54442d18p+0), angle));
    angle_vec u = r * r;
    angle_vec s = angle_fma(angle_set(0x1.6cd5ebde03ab8p-19), u, angle_set(-0x1.a00f9397b5c4ap-13));
    s = angle_fma(s, u, angle_set(0x1.11110889f6264p-7));
    s = angle_fma(s, u, angle_set(-0x1.5555554ca9351p-3));
    s = angle_fma(s * u, r, r);
    angle_vec c = angle_fma(angle_set(-0x1.24290ab1d5b2dp-22), u, angle_set(0x1.a01117950fb60p-16));
    c = angle_fma(c, u, angle_set(-0x1.6c16b88c0012ep-10));
    c = angle_fma(c, u, angle_set(0x1.5555554f429c5p-5));
    c = angle_fma(c, u, angle_set(-0.5));
    c = angle_fma(c, u, angle_set(1));
    /* Quadrants 1 and 3 swap the two; the sine changes its sign in 2 and 3, the cosine in 1 and 2. */
    angle_int swap = -(quadrant & 1), sine_sign = (quadrant & 2) << 62, cosine_sign = ((quadrant + 1) & 2) << 62;
    *sine = (angle_vec)((((angle_int)s & ~swap) | ((angle_int)c & swap)) ^ sine_sign);
    *cosine = (angle_vec)((((angle_int)c & ~swap) | ((angle_int)s & swap)) ^ cosine_sign);
    return true;
}
#endif

/* For one position: pairs cosines, pairs sines. */
static void make_table(real *cosines, real *sines, const mtl_rope_angles *angles, const angle_real *inv_freqs,
                       int64_t position) {
    int64_t i = 0, pairs = angles->dims / 2;
    angle_real scaled = (angle_real)position * (angle_real)angles->scale;
#ifdef MTL_IN_DOUBLE
    for (; i < pairs; i++) {
        cosines[i] = (real)cosl(scaled * inv_freqs[i]);
        sines[i] = (real)sinl(scaled * inv_freqs[i]);
    }
#else
    for (; i + ANGLES <= pairs; i += ANGLES) {
        angle_vec angle, sine, cosine;
        memcpy(&angle, inv_freqs + i, sizeof angle);
        angle *= scaled;
        if (!sine_and_cosine(angle, &sine, &cosine)) break;
        for (int j = 0; j < ANGLES; j++) {
            sines[i + j] = (real)sine[j];
            cosines[i + j] = (real)cosine[j];
        }
    }
    for (; i < pairs; i++) {
        double angle = scaled * inv_freqs[i], cosine = cos(angle), sine = sin(angle);
        if (!isfinite(angle)) mtl_rope_turn_far(angles, i, position, &cosine, &sine);
        cosines[i] = (real)cosine;
        sines[i] = (real)sine;
    }
#endif
}

/* A thread decodes token after token of one model, and a power costs more than a sine: the last table is kept. */
enum { KEPT_PAIRS = 128 };
static _Thread_local struct {
    double base;
    int64_t dims;
    angle_real inv_freqs[KEPT_PAIRS];
} kept;

static const angle_real *make_inv_freqs(angle_real *scratch, const mtl_rope_angles *angles) {
    int64_t pairs = angles->dims / 2;
    if (angles->freqs.data) {
        for (int64_t i = 0; i < pairs; i++) {
            angle_real freq =
                (angle_real)mtl_load_double(angles->freqs.data + i * angles->freqs.stride, angles->freqs.dtype);
            scratch[i] = angles->inverse ? freq : 1 / freq;
        }
        return scratch;
    }
    if (kept.base == angles->base && kept.dims == angles->dims) return kept.inv_freqs;
    angle_real *inv_freqs = pairs <= KEPT_PAIRS ? kept.inv_freqs : scratch;
    for (int64_t i = 0; i < pairs; i++) {
        inv_freqs[i] = angle_pow((angle_real)angles->base, -(angle_real)(2 * i) / (angle_real)angles->dims);
    }
    if (pairs <= KEPT_PAIRS) {
        kept.base = angles->base;
        kept.dims = angles->dims;
    }
    return inv_freqs;
}

/* ---- rows --------------------------------------------------------------------------------------------------------------- */

/* (x1 cos - x2 sin, x1 sin + x2 cos); a pair whose sine is 0 is unrotated and takes nothing from an infinite partner. */
INLINE void turn_halves(const char *x, char *out, mtl_dtype dtype, int64_t pairs, const real *cosines,
                        const real *sines, bool stream) {
    int64_t size = mtl_dtype_size(dtype);
    int64_t i = 0;
    for (; i + LANES <= pairs; i += LANES) {
        prefetch(x + AHEAD + i * size);
        prefetch(x + AHEAD + (pairs + i) * size);
        vec x1 = vec_load_as(x + i * size, dtype), x2 = vec_load_as(x + (pairs + i) * size, dtype);
        vec c = vec_load(cosines + i), s = vec_load(sines + i);
        vec_int still = s == vec_zero();
        vec_put_as(stream, out + i * size, dtype, vec_select(still, x1, vec_fma(x1, c, -(x2 * s))));
        vec_put_as(stream, out + (pairs + i) * size, dtype, vec_select(still, x2, vec_fma(x1, s, x2 * c)));
    }
    if (i < pairs) {
        int64_t count = pairs - i;
        vec x1 = vec_load_upto(x + i * size, dtype, count), x2 = vec_load_upto(x + (pairs + i) * size, dtype, count);
        vec c = vec_load_upto(cosines + i, REAL_DTYPE, count), s = vec_load_upto(sines + i, REAL_DTYPE, count);
        vec_int still = s == vec_zero();
        vec_store_upto(out + i * size, dtype, vec_select(still, x1, vec_fma(x1, c, -(x2 * s))), count);
        vec_store_upto(out + (pairs + i) * size, dtype, vec_select(still, x2, vec_fma(x1, s, x2 * c)), count);
    }
}

/* The same for neighbours: the table has each cosine twice, and each sine as -sin, sin. */
INLINE void turn_neighbours(const char *x, char *out, mtl_dtype dtype, int64_t dims, const real *cosines,
                            const real *sines, bool stream) {
    int64_t size = mtl_dtype_size(dtype);
    int64_t i = 0;
    for (; i + LANES <= dims; i += LANES) {
        prefetch(x + AHEAD + i * size);
        vec v = vec_load_as(x + i * size, dtype), c = vec_load(cosines + i), s = vec_load(sines + i);
        v = vec_select(s == vec_zero(), v, vec_fma(v, c, vec_swap_neighbours(v) * s));
        vec_put_as(stream, out + i * size, dtype, v);
    }
    if (i < dims) {
        int64_t count = dims - i;
        vec v = vec_load_upto(x + i * size, dtype, count);
        vec c = vec_load_upto(cosines + i, REAL_DTYPE, count), s = vec_load_upto(sines + i, REAL_DTYPE, count);
        vec_store_upto(out + i * size, dtype, vec_select(s == vec_zero(), v, vec_fma(v, c, vec_swap_neighbours(v) * s)),
                       count);
    }
}

INLINE void turn(const char *x, char *out, mtl_dtype dtype, const mtl_rope_angles *angles, const real *table,
                 bool stream) {
    if (angles->traditional) turn_neighbours(x, out, dtype, angles->dims, table, table + angles->dims, stream);
    else turn_halves(x, out, dtype, angles->dims / 2, table, table + angles->dims, stream);
}

static void norm_head(real *head, int64_t length, const real *weight, double eps) {
    double mean_square = sum_row((const char *)head, REAL_DTYPE, length, 0).squares / (double)length + eps;
    if (mean_square < 1e-28) { /* squares out of float32's normal range */
        mean_square = 0;
        for (int64_t i = 0; i < length; i++) mean_square += (double)head[i] * (double)head[i];
        double inverse = 1 / sqrt(mean_square / (double)length + eps);
        for (int64_t i = 0; i < length; i++) head[i] = (real)((double)head[i] * inverse * (double)weight[i]);
        return;
    }
    vec inverse = vec_set((real)(1 / sqrt(mean_square)));
    for (int64_t i = 0; i < length; i += LANES) {
        int64_t count = length - i;
        vec v = vec_load_upto(head + i, REAL_DTYPE, count) * inverse * vec_load_upto(weight + i, REAL_DTYPE, count);
        vec_store_upto(head + i, REAL_DTYPE, v, count);
    }
}

typedef struct {
    const mtl_rope_args *args;
    const mtl_rope_side *side;
    real *head;         /* scratch for one head */
    const real *weight; /* of the side, widened */
} row_work;

static void do_row(const row_work *work, const char *x, char *out, const real *table) {
    const mtl_rope_args *args = work->args;
    const mtl_rope_side *side = work->side;
    int64_t dims = args->angles.dims;
    mtl_dtype dtype = side->x.dtype;
    if (!args->normed && in_place_row(side->x, dtype) && in_place_row(side->out, dtype)) {
        int64_t half = dims / 2 * mtl_dtype_size(dtype);
        bool stream = args->stream && can_stream(out) && half % VECTOR_BYTES == 0;
        if (dtype == REAL_DTYPE) turn(x, out, REAL_DTYPE, &args->angles, table, stream);
#ifndef MTL_IN_DOUBLE
        else if (dtype == MTL_F16) turn(x, out, MTL_F16, &args->angles, table, stream);
        else if (dtype == MTL_BF16) turn(x, out, MTL_BF16, &args->angles, table, stream);
#endif
        if (dtype == REAL_DTYPE || dtype == MTL_F16 || dtype == MTL_BF16) {
            int64_t size = mtl_dtype_size(dtype);
            if (x != out && dims < args->head_dim)
                memcpy(out + dims * size, x + dims * size, (size_t)((args->head_dim - dims) * size));
            return;
        }
    }
    bool as_it_is = !args->normed && side->x.dtype == side->out.dtype; /* the rest is copied bit for bit */
    int64_t length = as_it_is ? dims : args->head_dim;
    read_row(work->head, x, side->x, length);
    if (args->normed) norm_head(work->head, length, work->weight, args->eps);
    turn((const char *)work->head, (char *)work->head, REAL_DTYPE, &args->angles, table, false);
    for (int64_t i = length; i < args->head_dim; i++) {
        memmove(out + i * side->out.stride, x + i * side->x.stride, (size_t)mtl_dtype_size(side->x.dtype));
    }
    write_row(out, side->out, work->head, length);
}

void SIMD(rope)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_rope_args *args = arguments;
    const mtl_rope_angles *angles = &args->angles;
    int64_t pairs = angles->dims / 2;
    int64_t entry = 2 * angles->dims; /* reals of a table: for halves only the first pairs of each dims are used */
    angle_real *inv_freq_scratch = scratch;
    const angle_real *inv_freqs = make_inv_freqs(inv_freq_scratch, angles);
    real *tables = (real *)(inv_freq_scratch + pairs), *head = tables + mtl_rope_most_steps(args) * entry;
    real *weights[2] = {head + args->head_dim, head + 2 * args->head_dim};
    for (int i = 0; args->normed && i < args->sides; i++) {
        mtl_row weight = args->side[i].weight;
        if (weight.data) read_row(weights[i], weight.data, weight, args->head_dim);
        else
            for (int64_t j = 0; j < args->head_dim; j++) weights[i][j] = 1;
    }
    int64_t made = -1; /* the block whose tables are there */
    for (int64_t item = begin; item < end; item++) {
        mtl_rope_block block = mtl_rope_block_at(args, item);
        int64_t batch = block.batch, first = block.first, steps = block.steps;
        for (int64_t step = 0; first != made && step < steps; step++) {
            real *cosines = tables + step * entry, *sines = cosines + angles->dims;
            make_table(cosines, sines, angles, inv_freqs, mtl_rope_position(angles, batch, first + step));
            for (int64_t i = pairs - 1; angles->traditional && i >= 0; i--) {
                cosines[2 * i] = cosines[2 * i + 1] = cosines[i];
                sines[2 * i + 1] = sines[i];
                sines[2 * i] = -sines[2 * i + 1];
            }
        }
        made = mtl_rope_batch_shares(angles) ? first : -1;
        for (int i = 0; i < args->sides; i++) {
            const mtl_rope_side *side = &args->side[i];
            if (side->heads.count == 0) continue;
            row_work work = {args, side, head, weights[i]};
            const char *x = side->x.data + batch * side->x_batch_stride + first * side->x_time_stride;
            char *out = side->out.data + batch * side->out_batch_stride + first * side->out_time_stride;
            mtl_cursor at;
            mtl_cursor_seek(&at, &side->heads, 0);
            int last = side->heads.rank - 1;
            bool time_outside =
                last >= 0 && side->heads.stride[last][MTL_ROPE_X] < side->x_time_stride; /* {B, T, N, D} */
            if (time_outside) {
                for (int64_t step = 0; step < steps; step++) {
                    mtl_cursor_seek(&at, &side->heads, 0);
                    for (int64_t j = 0; j < side->heads.count; j++, mtl_cursor_next(&at)) {
                        do_row(&work, x + at.offset[MTL_ROPE_X] + step * side->x_time_stride,
                               out + at.offset[MTL_ROPE_OUT] + step * side->out_time_stride, tables + step * entry);
                    }
                }
                continue;
            }
            for (int64_t j = 0; j < side->heads.count; j++, mtl_cursor_next(&at)) {
                for (int64_t step = 0; step < steps; step++) {
                    do_row(&work, x + at.offset[MTL_ROPE_X] + step * side->x_time_stride,
                           out + at.offset[MTL_ROPE_OUT] + step * side->out_time_stride, tables + step * entry);
                }
            }
        }
    }
    if (args->stream) vec_stream_end();
}
