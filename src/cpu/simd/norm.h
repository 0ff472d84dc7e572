/* The rows of a norm. SPDX-License-Identifier: MIT
 *
 * Included by rms_norm.c and layer_norm.c after they define norm_start, norm_settle, norm_apply and norm_tiny_row.
 *
 * A row is passed over twice: its sums are gathered, then it is written. Both passes are one loop, which writes a row while it gathers
 * the next: the next comes from memory and this one, a row behind, from the cache, so that memory is read and written all the time and no
 * row waits for its own sums. Each byte of x is read once from memory and each of out written once.
 *
 * The sum with a residual is stored rounded; unrounded it stays in scratch for the second pass, but where `sum` itself is unrounded. What
 * the loop cannot take where it lies (see norm.c of cpu/) goes through a row of reals in scratch. */

/* A row on its way in. `row`: x + residual, not rounded. */
typedef struct {
    const char *x, *residual;
    char *sum;
    real *row;
    bool stream;
} norm_input;

/* A row on its way out. */
typedef struct {
    const char *x, *weight, *bias;
    char *out;
    bool stream;
    norm_terms terms;
} norm_output;

INLINE void prefetch_two(const char *from, int64_t size) {
    for (int64_t i = 0; i < 2 * LANES * size; i += 64) prefetch(from + i);
}

/* 2 LANES elements at i, or `count` < LANES, the other lanes 0. */
INLINE vec_two take_two(const norm_input *in, mtl_dtype dtype, bool added, int64_t i) {
    int64_t at = i * mtl_dtype_size(dtype);
    prefetch_two(in->x + at + AHEAD, mtl_dtype_size(dtype));
    vec_two v = vec_load_two(in->x + at, dtype);
    if (!added) return v;
    prefetch_two(in->residual + at + AHEAD, mtl_dtype_size(dtype));
    vec_two r = vec_load_two(in->residual + at, dtype);
    v.low += r.low;
    v.high += r.high;
    vec_put_two(in->stream, in->sum + at, dtype, v);
    if (dtype != REAL_DTYPE || in->sum != (char *)in->row) {
        vec_store(in->row + i, v.low);
        vec_store(in->row + i + LANES, v.high);
    }
    return v;
}

INLINE vec take_upto(const norm_input *in, mtl_dtype dtype, bool added, int64_t i, int64_t count) {
    int64_t at = i * mtl_dtype_size(dtype);
    vec v = vec_load_upto(in->x + at, dtype, count);
    if (!added) return v;
    v += vec_load_upto(in->residual + at, dtype, count);
    vec_store_upto(in->sum + at, dtype, v, count);
    vec_store_upto(in->row + i, REAL_DTYPE, v, count);
    return v;
}

typedef struct {
    mtl_dtype x, weight, bias;
} norm_dtypes;

INLINE void put_two(const norm_output *out, norm_dtypes from, mtl_dtype to, int64_t i) {
    vec_two v = vec_load_two(out->x + i * mtl_dtype_size(from.x), from.x);
    vec_two w = vec_load_two(out->weight + i * mtl_dtype_size(from.weight), from.weight), b = {{0}, {0}};
    if (NORM_HAS_BIAS) b = vec_load_two(out->bias + i * mtl_dtype_size(from.bias), from.bias);
    v.low = norm_apply(&out->terms, v.low, w.low, b.low);
    v.high = norm_apply(&out->terms, v.high, w.high, b.high);
    vec_put_two(out->stream, out->out + i * mtl_dtype_size(to), to, v);
}

INLINE void put_upto(const norm_output *out, norm_dtypes from, mtl_dtype to, int64_t i, int64_t count) {
    vec v = vec_load_upto(out->x + i * mtl_dtype_size(from.x), from.x, count);
    vec w = vec_load_upto(out->weight + i * mtl_dtype_size(from.weight), from.weight, count);
    vec b = NORM_HAS_BIAS ? vec_load_upto(out->bias + i * mtl_dtype_size(from.bias), from.bias, count) : vec_zero();
    vec_store_upto(out->out + i * mtl_dtype_size(to), to, norm_apply(&out->terms, v, w, b), count);
}

/* Writes the row `out` where there is one, and gathers the sums of x - shift of the row `in` where there is one. The order of additions
 * does not depend on which. */
INLINE row_sums norm_pass(const norm_output *out, norm_dtypes from, const norm_input *in, bool added, real shift,
                          mtl_dtype dtype, int64_t length) {
    row_sums total = {0, 0};
    vec minus = vec_set(shift);
    (void)minus; /* rms_norm takes nothing away */
    for (int64_t first = 0; first < length; first += SUM_BLOCK) {
        int64_t end = length - first < SUM_BLOCK ? length : first + SUM_BLOCK, i = first;
        vec sum[4], squares[4];
        for (int j = 0; j < 4; j++) sum[j] = squares[j] = vec_zero();
        for (; i + 4 * LANES <= end; i += 4 * LANES) {
            for (int j = 0; j < 4; j += 2) {
                if (in) {
                    vec_two v = take_two(in, dtype, added, i + j * LANES);
                    vec low = NORM_HAS_BIAS ? v.low - minus : v.low, high = NORM_HAS_BIAS ? v.high - minus : v.high;
                    sum[j] += low;
                    sum[j + 1] += high;
                    squares[j] = vec_fma(low, low, squares[j]);
                    squares[j + 1] = vec_fma(high, high, squares[j + 1]);
                }
                if (out) put_two(out, from, dtype, i + j * LANES);
            }
        }
        for (; i < end; i += LANES) {
            int64_t count = end - i;
            if (in) {
                vec v = take_upto(in, dtype, added, i, count);
                if (NORM_HAS_BIAS) v -= minus;
                if (count < LANES) v = vec_select(vec_first(count), v, vec_zero());
                sum[0] += v;
                squares[0] = vec_fma(v, v, squares[0]);
            }
            if (out) put_upto(out, from, dtype, i, count);
        }
        if (!in) continue;
        if (NORM_HAS_BIAS) total.sum += (double)vec_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
        total.squares += (double)vec_sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    }
    return total;
}

static norm_input norm_input_at(const mtl_norm_args *args, const mtl_cursor *at, real *row) {
    norm_input in = {.x = args->x.data + at->offset[MTL_NORM_X]};
    if (!args->residual.data) return in;
    in.residual = args->residual.data + at->offset[MTL_NORM_RESIDUAL];
    in.sum = args->sum.data + at->offset[MTL_NORM_SUM];
    in.stream = args->stream && can_stream(in.sum);
    in.row = row ? row : (real *)(void *)in.sum;
    return in;
}

/* rows: two of reals where sums are kept in scratch, else NULL. */
INLINE void norm_rows(const mtl_norm_args *args, int64_t begin, int64_t end, const char *weight, const char *bias,
                      real *rows, bool added, mtl_dtype dtype, norm_dtypes from) {
    int64_t length = args->length;
    if (added) from.x = REAL_DTYPE;
    mtl_cursor at;
    mtl_cursor_seek(&at, &args->rows, begin);
    norm_input in = norm_input_at(args, &at, rows);
    real shift = norm_start(in.x, in.residual, dtype, length);
    row_sums sums = norm_pass(NULL, from, &in, added, shift, dtype, length);
    for (int64_t item = begin; item < end; item++) {
        norm_output out = {.x = added ? (const char *)in.row : in.x, .weight = weight, .bias = bias};
        out.out = args->out.data + at.offset[MTL_NORM_OUT];
        out.stream = args->stream && can_stream(out.out);
        bool tiny = !norm_settle(&out.terms, sums, shift, out.x, from.x, length, args->eps);
        if (tiny) norm_tiny_row(&out, from, dtype, length, args->eps);
        if (item + 1 < end) {
            mtl_cursor_next(&at);
            in = norm_input_at(args, &at, rows && in.row == rows ? rows + length : rows);
            shift = norm_start(in.x, in.residual, dtype, length);
            if (tiny) sums = norm_pass(NULL, from, &in, added, shift, dtype, length);
            else sums = norm_pass(&out, from, &in, added, shift, dtype, length);
        } else if (!tiny) {
            norm_pass(&out, from, NULL, added, 0, dtype, length);
        }
    }
    if (args->stream) vec_stream_end();
}

/* rows: x and residual as reals. */
static void norm_rows_staged(const mtl_norm_args *args, int64_t begin, int64_t end, const real *weight,
                             const real *bias, real *rows) {
    const norm_dtypes reals = {REAL_DTYPE, REAL_DTYPE, REAL_DTYPE};
    int64_t length = args->length;
    norm_input in = {.x = (const char *)rows};
    norm_output out = {.x = in.x, .weight = (const char *)weight, .bias = (const char *)bias, .out = (char *)rows};
    mtl_cursor at;
    mtl_cursor_seek(&at, &args->rows, begin);
    for (int64_t item = begin; item < end; item++, mtl_cursor_next(&at)) {
        read_row(rows, args->x.data + at.offset[MTL_NORM_X], args->x, length);
        if (args->residual.data) {
            real *residual = rows + length;
            read_row(residual, args->residual.data + at.offset[MTL_NORM_RESIDUAL], args->residual, length);
            for (int64_t i = 0; i < length; i++) rows[i] += residual[i];
            write_row(args->sum.data + at.offset[MTL_NORM_SUM], args->sum, rows, length);
        }
        real shift = norm_start(in.x, NULL, REAL_DTYPE, length);
        row_sums sums = norm_pass(NULL, reals, &in, false, shift, REAL_DTYPE, length);
        if (norm_settle(&out.terms, sums, shift, out.x, REAL_DTYPE, length, args->eps))
            norm_pass(&out, reals, NULL, false, 0, REAL_DTYPE, length);
        else norm_tiny_row(&out, reals, REAL_DTYPE, length, args->eps);
        write_row(args->out.data + at.offset[MTL_NORM_OUT], args->out, rows, length);
    }
}

/* Weights or bias, or `otherwise` where there are none, as a row of reals at *free, which moves on. */
static const real *widen(mtl_row weights, int64_t length, real otherwise, real **free) {
    real *row = *free;
    *free += length;
    if (weights.data) read_row(row, weights.data, weights, length);
    else
        for (int64_t i = 0; i < length; i++) row[i] = otherwise;
    return row;
}

static void norm_kernel(const mtl_norm_args *args, int64_t begin, int64_t end, real *scratch) {
    int64_t length = args->length;
    bool in_place = args->layout != MTL_NORM_STAGED;
    const void *weight = args->weight.data, *bias = args->bias.data;
    if (!in_place || !weight) weight = widen(args->weight, length, 1, &scratch);
    if (NORM_HAS_BIAS && (!in_place || !bias)) bias = widen(args->bias, length, 0, &scratch);
    if (!in_place) {
        norm_rows_staged(args, begin, end, weight, bias, scratch);
        return;
    }
    mtl_dtype dtype = args->x.dtype, weight_dtype = args->weight.data ? args->weight.dtype : REAL_DTYPE;
    mtl_dtype bias_dtype = args->bias.data ? args->bias.dtype : REAL_DTYPE;
    real *rows = args->layout == MTL_NORM_SUM_KEPT ? scratch : NULL;
#define NORM_CASE(x, w, b)                                                                                         \
    if (dtype == (x) && weight_dtype == (w) && bias_dtype == (b)) {                                                \
        if (args->residual.data) norm_rows(args, begin, end, weight, bias, rows, true, x, (norm_dtypes){x, w, b}); \
        else norm_rows(args, begin, end, weight, bias, rows, false, x, (norm_dtypes){x, w, b});                    \
        return;                                                                                                    \
    }
    NORM_CASE(REAL_DTYPE, REAL_DTYPE, REAL_DTYPE)
#ifndef MTL_IN_DOUBLE
    NORM_CASE(MTL_F16, MTL_F32, MTL_F32)
    NORM_CASE(MTL_F16, MTL_F16, MTL_F32)
    NORM_CASE(MTL_BF16, MTL_F32, MTL_F32)
    NORM_CASE(MTL_BF16, MTL_BF16, MTL_F32)
#if NORM_HAS_BIAS
    NORM_CASE(MTL_F16, MTL_F16, MTL_F16)
    NORM_CASE(MTL_BF16, MTL_BF16, MTL_BF16)
#endif
#endif
}
