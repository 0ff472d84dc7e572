/* Pair i turns by position * scale * inv_freq[i]; with qk_norm_rope after rms_norm of the head. SPDX-License-Identifier: MIT
 *
 * The angle is formed and reduced in double: k = round(angle 2/pi), r = angle - k pi/2 with pi/2 in two doubles, which an fma
 * subtracts without error worth naming up to 2^30; beyond, and for float64 tensors, the C library's functions serve. sin and cos of r are
 * polynomials (minimax, relative error 5e-12 and 1e-13), rounded to real. Positions that follow each other, up to 16 of them, are turned
 * on from the first in double: 15 products of numbers with that error stay below 1e-10.
 *
 * A block of time steps has its table made once for all heads; its rows are then turned in the order in which they lie in memory, each
 * byte read and written once (a head that is normed is read a second time from the cache). */
#include "cpu/simd/sums.h"

#ifdef MTL_IN_DOUBLE
typedef long double angle_real;
#define angle_pow powl
#else
typedef double angle_real;
#define angle_pow pow
#endif

enum {
    STEPS_A_RUN = 16,                             /* whose turns come from each other */
    ENTRIES = sizeof(long double) / sizeof(real), /* reals of scratch for an angle */
};

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

/* Of one pair. */
static void make_turn(real *cosine, real *sine, const mtl_rope_angles *angles, const angle_real *inv_freqs,
                      int64_t pair, int64_t position) {
    angle_real angle = (angle_real)position * (angle_real)angles->scale * inv_freqs[pair];
#ifdef MTL_IN_DOUBLE
    *cosine = (real)cosl(angle);
    *sine = (real)sinl(angle);
#else
    double c = cos(angle), s = sin(angle);
    if (!isfinite(angle)) mtl_rope_turn_far(angles, pair, position, &c, &s);
    *cosine = (real)c;
    *sine = (real)s;
#endif
}

#ifndef MTL_IN_DOUBLE
/* Pairs [i, i + width * ANGLES) of the tables: a turn waits for the last step's, so that several are under way. */
INLINE void make_columns(real *tables, int64_t entry, int64_t to_sines, const mtl_rope_angles *angles,
                         const angle_real *inv_freqs, const int64_t *positions, int64_t first, int64_t steps, int64_t i,
                         int width) {
    typedef float angle_floats __attribute__((vector_size(VECTOR_BYTES / 2)));
    angle_vec frequency[4], c[4] = {{0}}, s[4] = {{0}}, step_c[4] = {{0}}, step_s[4] = {{0}};
    bool steady = steps > 1, known = false;
    memcpy(frequency, inv_freqs + i, (size_t)width * sizeof *frequency);
    for (int j = 0; j < width; j++)
        steady = steady && sine_and_cosine(frequency[j] * angles->scale, &step_s[j], &step_c[j]);
    for (int64_t step = 0; step < steps; step++) {
        real *row = tables + step * entry + i;
        int64_t position = positions[step];
        if (known && steady && (first + step) % STEPS_A_RUN && position == positions[step - 1] + 1 && position) {
            for (int j = 0; j < width; j++) {
                angle_vec turned = angle_fma(c[j], step_c[j], -(s[j] * step_s[j]));
                s[j] = angle_fma(s[j], step_c[j], c[j] * step_s[j]);
                c[j] = turned;
            }
        } else {
            known = true;
            for (int j = 0; j < width; j++) {
                angle_vec angle = frequency[j] * ((double)position * angles->scale);
                known = sine_and_cosine(angle, &s[j], &c[j]) && known;
            }
        }
        if (!known) {
            for (int j = 0; j < width * ANGLES; j++)
                make_turn(row + j, row + to_sines + j, angles, inv_freqs, i + j, position);
            continue;
        }
        for (int j = 0; j < width; j++) {
            angle_floats cosines = __builtin_convertvector(c[j], angle_floats),
                         sines = __builtin_convertvector(s[j], angle_floats);
            memcpy(row + j * ANGLES, &cosines, sizeof cosines);
            memcpy(row + j * ANGLES + to_sines, &sines, sizeof sines);
        }
    }
}
#endif

/* Row after row of cosines and, `to_sines` further on, sines: one for each position. */
static void make_tables(real *tables, int64_t entry, int64_t to_sines, const mtl_rope_angles *angles,
                        const angle_real *inv_freqs, const int64_t *positions, int64_t first, int64_t steps) {
    int64_t i = 0, pairs = angles->dims / 2;
    (void)first;
#ifndef MTL_IN_DOUBLE
    for (; i + 4 * ANGLES <= pairs; i += 4 * ANGLES)
        make_columns(tables, entry, to_sines, angles, inv_freqs, positions, first, steps, i, 4);
    for (; i + ANGLES <= pairs; i += ANGLES)
        make_columns(tables, entry, to_sines, angles, inv_freqs, positions, first, steps, i, 1);
#endif
    for (int64_t step = 0; step < steps; step++) {
        real *row = tables + step * entry;
        for (int64_t pair = i; pair < pairs; pair++)
            make_turn(row + pair, row + to_sines + pair, angles, inv_freqs, pair, positions[step]);
        for (int64_t pair = pairs - 1; angles->traditional && pair >= 0;
             pair--) { /* each twice, as neighbours take them */
            real *sines = row + to_sines;
            row[2 * pair] = row[2 * pair + 1] = row[pair];
            sines[2 * pair + 1] = sines[pair];
            sines[2 * pair] = -sines[2 * pair + 1];
        }
    }
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

INLINE void prefetch_two(const char *from, int64_t size) {
    for (int64_t i = 0; i < 2 * LANES * size; i += 64) prefetch(from + i);
}

/* (x1 cos - x2 sin, x1 sin + x2 cos); a pair whose sine is 0 is unrotated and takes nothing from an infinite partner. */
INLINE void rotate(vec *x1, vec *x2, const real *cosines, const real *sines, int64_t count) {
    vec c = vec_load_upto(cosines, REAL_DTYPE, count), s = vec_load_upto(sines, REAL_DTYPE, count), a = *x1, b = *x2;
    vec_int still = s == vec_zero();
    *x1 = vec_select(still, a, vec_fma(a, c, -(b * s)));
    *x2 = vec_select(still, b, vec_fma(a, s, b * c));
}

/* The same of neighbours, with the sines' signs. */
INLINE vec rotate_neighbours(vec x, const real *cosines, const real *sines, int64_t count) {
    vec c = vec_load_upto(cosines, REAL_DTYPE, count), s = vec_load_upto(sines, REAL_DTYPE, count);
    return vec_select(s == vec_zero(), x, vec_fma(x, c, vec_swap_neighbours(x) * s));
}

/* Rows one after the other, where they lie. */
typedef struct {
    const char *x;
    char *out;
    const real *table;
    int64_t count, x_step, out_step, table_step, to_sines;
    int64_t ahead; /* from here to what is read after these rows; 0: all is in the cache */
    bool stream;
} row_run;

/* A row's first `dims` features, times inverse and weight where it is normed. */
INLINE void turn_row(const row_run *run, const char *x, char *out, const real *table, mtl_dtype dtype, bool traditional,
                     int64_t dims, bool normed, vec inverse, const real *weight) {
    int64_t size = mtl_dtype_size(dtype), i = 0, pairs = dims / 2, second = pairs * size;
    const real *cosines = table, *sines = table + run->to_sines;
    if (traditional) {
        for (; i + 2 * LANES <= dims; i += 2 * LANES) {
            if (run->ahead) prefetch_two(x + run->ahead + i * size, size);
            vec_two v = vec_load_two(x + i * size, dtype);
            if (normed) {
                v.low = v.low * inverse * vec_load(weight + i);
                v.high = v.high * inverse * vec_load(weight + i + LANES);
            }
            v.low = rotate_neighbours(v.low, cosines + i, sines + i, LANES);
            v.high = rotate_neighbours(v.high, cosines + i + LANES, sines + i + LANES, LANES);
            vec_put_two(run->stream, out + i * size, dtype, v);
        }
        for (; i < dims; i += LANES) {
            int64_t count = dims - i;
            vec v = vec_load_upto(x + i * size, dtype, count);
            if (normed) v = v * inverse * vec_load_upto(weight + i, REAL_DTYPE, count);
            vec_store_upto(out + i * size, dtype, rotate_neighbours(v, cosines + i, sines + i, count), count);
        }
        return;
    }
    for (; i + 2 * LANES <= pairs; i += 2 * LANES) {
        if (run->ahead) {
            prefetch_two(x + run->ahead + i * size, size);
            prefetch_two(x + run->ahead + second + i * size, size);
        }
        vec_two a = vec_load_two(x + i * size, dtype), b = vec_load_two(x + second + i * size, dtype);
        if (normed) {
            a.low = a.low * inverse * vec_load(weight + i);
            a.high = a.high * inverse * vec_load(weight + i + LANES);
            b.low = b.low * inverse * vec_load(weight + pairs + i);
            b.high = b.high * inverse * vec_load(weight + pairs + i + LANES);
        }
        rotate(&a.low, &b.low, cosines + i, sines + i, LANES);
        rotate(&a.high, &b.high, cosines + i + LANES, sines + i + LANES, LANES);
        vec_put_two(run->stream, out + i * size, dtype, a);
        vec_put_two(run->stream, out + second + i * size, dtype, b);
    }
    for (; i < pairs; i += LANES) {
        int64_t count = pairs - i;
        vec a = vec_load_upto(x + i * size, dtype, count), b = vec_load_upto(x + second + i * size, dtype, count);
        if (normed) {
            a = a * inverse * vec_load_upto(weight + i, REAL_DTYPE, count);
            b = b * inverse * vec_load_upto(weight + pairs + i, REAL_DTYPE, count);
        }
        rotate(&a, &b, cosines + i, sines + i, count);
        vec_store_upto(out + i * size, dtype, a, count);
        vec_store_upto(out + second + i * size, dtype, b, count);
    }
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
} side_work;

/* One row of any dtypes and strides, or one to be normed in double, by way of scratch. */
static void do_row(const side_work *work, const row_run *run, const char *x, char *out, const real *table) {
    const mtl_rope_args *args = work->args;
    const mtl_rope_side *side = work->side;
    int64_t dims = args->angles.dims;
    bool as_it_is = !args->normed && side->x.dtype == side->out.dtype; /* the rest is copied bit for bit */
    int64_t length = as_it_is ? dims : args->head_dim;
    row_run staged = {.to_sines = run->to_sines};
    read_row(work->head, x, side->x, length);
    if (args->normed) norm_head(work->head, length, work->weight, args->eps);
    turn_row(&staged, (const char *)work->head, (char *)work->head, table, REAL_DTYPE, args->angles.traditional, dims,
             false, vec_zero(), NULL);
    for (int64_t i = length; i < args->head_dim; i++) {
        memmove(out + i * side->out.stride, x + i * side->x.stride, (size_t)mtl_dtype_size(side->x.dtype));
    }
    write_row(out, side->out, work->head, length);
}

/* Rows whose sums are taken together: one after the other, each would wait for its own square root and division. */
enum { ROWS_A_GROUP = 8 };

INLINE void do_rows_in_place(const side_work *work, const row_run *run, mtl_dtype dtype, bool traditional,
                             bool normed) {
    const mtl_rope_args *args = work->args;
    int64_t dims = args->angles.dims, length = args->head_dim, size = mtl_dtype_size(dtype);
    const char *x = run->x;
    char *out = run->out;
    const real *table = run->table;
    double mean_squares[ROWS_A_GROUP] = {0}, inverses[ROWS_A_GROUP];
    for (int64_t row = 0; row < run->count; row++) {
        vec inverse = vec_zero();
        int64_t place = row % ROWS_A_GROUP;
        if (normed && place == 0) {
            for (int64_t i = 0; i < ROWS_A_GROUP && row + i < run->count; i++)
                mean_squares[i] = sum_row(x + i * run->x_step, dtype, length, 0).squares / (double)length + args->eps;
            for (int i = 0; i < ROWS_A_GROUP; i++) inverses[i] = 1 / sqrt(mean_squares[i]);
        }
        if (normed) inverse = vec_set((real)inverses[place]);
        if (normed && mean_squares[place] < 1e-28) {
            do_row(work, run, x, out, table);
        } else {
            turn_row(run, x, out, table, dtype, traditional, dims, normed, inverse, work->weight);
            for (int64_t i = dims; normed && i < length; i += LANES) {
                vec v = vec_load_upto(x + i * size, dtype, length - i);
                v = v * inverse * vec_load_upto(work->weight + i, REAL_DTYPE, length - i);
                vec_store_upto(out + i * size, dtype, v, length - i);
            }
            if (!normed && dims < length && x != out)
                memcpy(out + dims * size, x + dims * size, (size_t)((length - dims) * size));
        }
        x += run->x_step;
        out += run->out_step;
        table += run->table_step;
    }
}

static void do_rows(const side_work *work, const row_run *run) {
    const mtl_rope_side *side = work->side;
    mtl_dtype dtype = side->x.dtype;
    bool normed = work->args->normed, traditional = work->args->angles.traditional;
    if (in_place_row(side->x, dtype) && in_place_row(side->out, dtype)) {
#define IN_PLACE_CASE(of, t, n)                                 \
    if (dtype == (of) && traditional == (t) && normed == (n)) { \
        do_rows_in_place(work, run, of, t, n);                  \
        return;                                                 \
    }
#define IN_PLACE_CASES(of)          \
    IN_PLACE_CASE(of, false, false) \
    IN_PLACE_CASE(of, false, true)  \
    IN_PLACE_CASE(of, true, false)  \
    IN_PLACE_CASE(of, true, true)
        IN_PLACE_CASES(REAL_DTYPE)
#ifndef MTL_IN_DOUBLE
        IN_PLACE_CASES(MTL_F16)
        IN_PLACE_CASES(MTL_BF16)
#endif
    }
    for (int64_t row = 0; row < run->count; row++)
        do_row(work, run, run->x + row * run->x_step, run->out + row * run->out_step,
               run->table + row * run->table_step);
}

/* Steps [first, first + steps) of a row of the batch, in the order in which they lie in memory. */
static void do_side(const side_work *work, int64_t batch, int64_t first, int64_t steps, const real *tables,
                    int64_t entry, int64_t to_sines) {
    const mtl_rope_args *args = work->args;
    const mtl_rope_side *side = work->side;
    const mtl_loop *heads = &side->heads;
    int64_t x_time = side->x_time_stride, out_time = side->out_time_stride, size = mtl_dtype_size(side->out.dtype);
    const char *x = side->x.data + batch * side->x_batch_stride + first * x_time;
    char *out = side->out.data + batch * side->out_batch_stride + first * out_time;
    bool whole = args->angles.dims / 2 * size % VECTOR_BYTES == 0 && out_time % VECTOR_BYTES == 0;
    int last = heads->rank - 1;
    bool time_outside = last >= 0 && heads->stride[last][MTL_ROPE_X] < x_time; /* {B, T, N, D} */
    row_run run = {.to_sines = to_sines};
    mtl_cursor at;
    if (time_outside && heads->rank == 1) { /* a run of heads a step */
        int64_t out_head = heads->stride[0][MTL_ROPE_OUT];
        run.count = heads->count;
        run.x_step = heads->stride[0][MTL_ROPE_X];
        run.out_step = out_head;
        run.stream = args->stream && can_stream(out) && whole && out_head % VECTOR_BYTES == 0;
        run.ahead = args->stream ? AHEAD : 0;
        for (int64_t step = 0; step < steps; step++) {
            run.x = x + step * x_time;
            run.out = out + step * out_time;
            run.table = tables + step * entry;
            do_rows(work, &run);
        }
        return;
    }
    run.x_step = x_time;
    run.out_step = out_time;
    run.table_step = entry;
    run.count = time_outside ? 1 : steps;
    for (int64_t step = 0; step < steps; step += run.count) { /* a run of steps a head */
        mtl_cursor_seek(&at, heads, 0);
        for (int64_t j = 0; j < heads->count; j++) {
            int64_t here = at.offset[MTL_ROPE_X];
            run.x = x + here + step * x_time;
            run.out = out + at.offset[MTL_ROPE_OUT] + step * out_time;
            run.table = tables + step * entry;
            run.stream = args->stream && can_stream(run.out) && whole;
            mtl_cursor_next(&at);
            run.ahead = j + 1 < heads->count ? at.offset[MTL_ROPE_X] - here : run.count * x_time - here;
            if (!args->stream) run.ahead = 0;
            do_rows(work, &run);
        }
    }
}

void SIMD(rope)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_rope_args *args = arguments;
    const mtl_rope_angles *angles = &args->angles;
    int64_t pairs = angles->dims / 2;
    int64_t to_sines = angles->traditional ? angles->dims : pairs, entry = 2 * to_sines;
    angle_real *inv_freq_scratch = scratch;
    const angle_real *inv_freqs = make_inv_freqs(inv_freq_scratch, angles);
    real *tables = (real *)(inv_freq_scratch + pairs),
         *head = tables + mtl_rope_most_steps(args) * ENTRIES * angles->dims;
    real *weights[2] = {head + args->head_dim, head + 2 * args->head_dim};
    for (int i = 0; args->normed && i < args->sides && i < 2; i++) {
        mtl_row weight = args->side[i].weight;
        if (weight.data) read_row(weights[i], weight.data, weight, args->head_dim);
        else
            for (int64_t j = 0; j < args->head_dim; j++) weights[i][j] = 1;
    }
    /* Longer runs of memory than a block's, as long as the tables fit. */
    int64_t most = MTL_ROPE_BLOCK * ENTRIES * angles->dims / entry, made = -1, positions[MTL_ROPE_BLOCK * ENTRIES],
            items;
    for (int64_t item = begin; item < end; item += items) {
        mtl_rope_block block = mtl_rope_block_at(args, item);
        int64_t batch = block.batch, first = block.first, steps = block.steps;
        items = 1;
        while (args->batch == 1 && item + items < end && steps + MTL_ROPE_BLOCK <= most)
            steps += mtl_rope_block_at(args, item + items++).steps;
        if (first != made) {
            for (int64_t step = 0; step < steps; step++)
                positions[step] = mtl_rope_position(angles, batch, first + step);
            make_tables(tables, entry, to_sines, angles, inv_freqs, positions, first, steps);
        }
        made = mtl_rope_batch_shares(angles) ? first : -1;
        for (int i = 0; i < args->sides; i++) {
            side_work work = {args, &args->side[i], head, weights[i]};
            if (work.side->heads.count) do_side(&work, batch, first, steps, tables, entry, to_sines);
        }
    }
    if (args->stream) vec_stream_end();
}
