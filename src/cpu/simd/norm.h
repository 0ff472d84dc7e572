/* The rows of a norm. SPDX-License-Identifier: MIT
 *
 * Included by rms_norm.c and layer_norm.c after they define norm_row (and NORM_HAS_BIAS). Models' layouts (contiguous, one dtype, weights
 * of that dtype or float32) are read and written where they lie, once from memory: the second pass over a row finds it in the cache. The
 * sum with a residual, not rounded, stays in scratch for it. Everything else goes through a row of reals in scratch. */

typedef struct {
    const char *data;
    mtl_dtype dtype;
} norm_weights;

/* Weights (or bias) that the direct loops can take; otherwise widened, or `fill` where there are none, into scratch. */
static norm_weights settle_weights(mtl_row weights, int64_t length, mtl_dtype x_dtype, real fill, real *scratch) {
    if (weights.data && (in_place_row(weights, x_dtype) || in_place_row(weights, REAL_DTYPE))) {
        return (norm_weights){weights.data, weights.dtype};
    }
    if (weights.data) read_row(scratch, weights.data, weights, length);
    else
        for (int64_t i = 0; i < length; i++) scratch[i] = fill;
    return (norm_weights){(const char *)scratch, REAL_DTYPE};
}

/* row = x + residual, and that rounded to sum. */
INLINE void add_row(real *row, const char *x, const char *residual, char *sum, mtl_dtype dtype, bool stream,
                    int64_t length) {
    int64_t size = mtl_dtype_size(dtype), i = 0;
    for (; i + LANES <= length; i += LANES) {
        prefetch(x + AHEAD + i * size);
        prefetch(residual + AHEAD + i * size);
        vec v = vec_load_as(x + i * size, dtype) + vec_load_as(residual + i * size, dtype);
        vec_store(row + i, v);
        vec_put_as(stream, sum + i * size, dtype, v);
    }
    if (i < length) {
        vec v = vec_load_part(x + i * size, dtype, length - i) + vec_load_part(residual + i * size, dtype, length - i);
        vec_store_part(row + i, REAL_DTYPE, v, length - i);
        vec_store_part(sum + i * size, dtype, v, length - i);
    }
}

INLINE void norm_rows(const mtl_norm_args *args, int64_t begin, int64_t end, norm_weights weight, norm_weights bias,
                      mtl_dtype dtype, mtl_dtype weight_dtype, mtl_dtype bias_dtype, real *row) {
    int64_t length = args->length;
    mtl_cursor at;
    mtl_cursor_seek(&at, &args->rows, begin);
    for (int64_t item = begin; item < end; item++, mtl_cursor_next(&at)) {
        const char *x = args->x.data + at.offset[MTL_NORM_X];
        char *out = args->out.data + at.offset[MTL_NORM_OUT];
        bool stream = args->stream && can_stream(out);
        if (args->residual.data) {
            char *sum = args->sum.data + at.offset[MTL_NORM_SUM];
            const char *residual = args->residual.data + at.offset[MTL_NORM_RESIDUAL];
            add_row(row, x, residual, sum, dtype, args->stream && can_stream(sum), length);
            norm_row((const char *)row, REAL_DTYPE, weight.data, weight_dtype, bias.data, bias_dtype, out, dtype,
                     stream, length, args->eps);
        } else {
            norm_row(x, dtype, weight.data, weight_dtype, bias.data, bias_dtype, out, dtype, stream, length, args->eps);
        }
    }
    if (args->stream) vec_stream_end();
}

static void norm_rows_staged(const mtl_norm_args *args, int64_t begin, int64_t end, norm_weights weight,
                             norm_weights bias, real *row) {
    mtl_cursor at;
    mtl_cursor_seek(&at, &args->rows, begin);
    for (int64_t item = begin; item < end; item++, mtl_cursor_next(&at)) {
        read_row(row, args->x.data + at.offset[MTL_NORM_X], args->x, args->length);
        if (args->residual.data) {
            real *residual = row + args->length;
            read_row(residual, args->residual.data + at.offset[MTL_NORM_RESIDUAL], args->residual, args->length);
            for (int64_t i = 0; i < args->length; i++) row[i] += residual[i];
            write_row(args->sum.data + at.offset[MTL_NORM_SUM], args->sum, row, args->length);
        }
        norm_row((const char *)row, REAL_DTYPE, weight.data, REAL_DTYPE, bias.data, REAL_DTYPE, (char *)row, REAL_DTYPE,
                 false, args->length, args->eps);
        write_row(args->out.data + at.offset[MTL_NORM_OUT], args->out, row, args->length);
    }
}

/* scratch: 4 rows of reals: weight, bias, the row, its residual. */
static void norm_kernel(const mtl_norm_args *args, int64_t begin, int64_t end, real *scratch) {
    int64_t length = args->length;
    mtl_dtype dtype = args->x.dtype;
    bool direct = in_place_row(args->x, dtype) && in_place_row(args->out, dtype) &&
                  (!args->residual.data || (in_place_row(args->residual, dtype) && in_place_row(args->sum, dtype)));
    if (!direct) dtype = REAL_DTYPE;
    norm_weights weight = settle_weights(args->weight, length, dtype, 1, scratch);
#ifdef NORM_HAS_BIAS
    norm_weights bias = settle_weights(args->bias, length, dtype, 0, scratch + length);
#else
    norm_weights bias = {NULL, REAL_DTYPE};
#endif
    real *row = scratch + 2 * length;
    if (!direct) {
        norm_rows_staged(args, begin, end, weight, bias, row);
        return;
    }
#define NORM_CASE(x, w, b)                                          \
    if (dtype == (x) && weight.dtype == (w) && bias.dtype == (b)) { \
        norm_rows(args, begin, end, weight, bias, x, w, b, row);    \
        return;                                                     \
    }
    NORM_CASE(REAL_DTYPE, REAL_DTYPE, REAL_DTYPE)
#ifndef MTL_IN_DOUBLE
    NORM_CASE(MTL_F16, MTL_F32, MTL_F32)
    NORM_CASE(MTL_F16, MTL_F16, MTL_F32)
    NORM_CASE(MTL_BF16, MTL_F32, MTL_F32)
    NORM_CASE(MTL_BF16, MTL_BF16, MTL_F32)
#ifdef NORM_HAS_BIAS
    NORM_CASE(MTL_F16, MTL_F16, MTL_F16)
    NORM_CASE(MTL_BF16, MTL_BF16, MTL_BF16)
#endif
#endif
    /* Weight and bias of two dtypes, or x in another precision than the arithmetic. */
    weight = settle_weights(args->weight, length, REAL_DTYPE, 1, scratch);
#ifdef NORM_HAS_BIAS
    bias = settle_weights(args->bias, length, REAL_DTYPE, 0, scratch + length);
#endif
    norm_rows_staged(args, begin, end, weight, bias, row);
}
