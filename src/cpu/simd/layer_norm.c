/* y = (x - mean) / sqrt(var + eps) * weight + bias, of x or of x + residual. SPDX-License-Identifier: MIT
 *
 * One pass sums d = x - shift and d^2, where shift, the mean of the row's first elements, is near its mean (Chan, Golub & LeVeque 1983,
 * doi:10.1080/00031305.1983.10483115). With delta = mean(d), var = mean(d^2) - delta^2 and x - mean = d - delta: two subtractions, of
 * which the first is nearly exact, so that a mean of 1e4 deviations, whose own rounding is a visible part of a deviation, does no harm.
 * Where the first elements are not like the rest, delta^2 above a quarter of var, the sums are taken again about the mean. */
#include "cpu/simd/sums.h"

#define NORM_HAS_BIAS 1

typedef struct {
    vec shift, delta, factor; /* 1 / sqrt(var + eps) */
} norm_terms;

INLINE real norm_start(const char *x, const char *residual, mtl_dtype dtype, int64_t length) {
    int64_t size = mtl_dtype_size(dtype), count = length < 4 * LANES ? length : 4 * LANES;
    vec sum = vec_zero();
    for (int64_t i = 0; i < count; i += LANES) {
        vec v = vec_load_upto(x + i * size, dtype, count - i); /* 0 beyond the row */
        if (residual) v += vec_load_upto(residual + i * size, dtype, count - i);
        sum += v;
    }
    return vec_sum(sum) / (real)count;
}

/* False where the squares of deviations leave float32's normal range. */
INLINE bool norm_settle(norm_terms *terms, row_sums sums, real shift, const char *x, mtl_dtype dtype, int64_t length,
                        double eps) {
    double delta = sums.sum / (double)length, variance = sums.squares / (double)length - delta * delta;
    if (!(4 * delta * delta <= variance)) {
        shift = (real)((double)shift + delta);
        sums = sum_row(x, dtype, length, shift);
        delta = sums.sum / (double)length;
        variance = sums.squares / (double)length - delta * delta;
    }
    variance = (variance < 0 ? 0 : variance) + eps;
    *terms = (norm_terms){vec_set(shift), vec_set((real)delta), vec_set((real)(1 / sqrt(variance)))};
    return !(variance < 1e-28);
}

INLINE vec norm_apply(const norm_terms *terms, vec x, vec weight, vec bias) {
    return vec_fma(((x - terms->shift) - terms->delta) * terms->factor, weight, bias);
}

static void tiny_row(const char *x, mtl_dtype x_dtype, const char *weight, mtl_dtype weight_dtype, const char *bias,
                     mtl_dtype bias_dtype, char *out, mtl_dtype out_dtype, int64_t length, double eps) {
    int64_t size = mtl_dtype_size(x_dtype), weight_size = mtl_dtype_size(weight_dtype),
            bias_size = mtl_dtype_size(bias_dtype);
    double mean = 0, squares = 0;
    for (int64_t i = 0; i < length; i++) mean += mtl_load_double(x + i * size, x_dtype);
    mean /= (double)length;
    for (int64_t i = 0; i < length; i++) {
        double d = mtl_load_double(x + i * size, x_dtype) - mean;
        squares += d * d;
    }
    double inverse = 1 / sqrt(squares / (double)length + eps);
    for (int64_t i = 0; i < length; i++) {
        double y = (mtl_load_double(x + i * size, x_dtype) - mean) * inverse *
                   mtl_load_double(weight + i * weight_size, weight_dtype);
        y += mtl_load_double(bias + i * bias_size, bias_dtype);
        mtl_store_double(out + i * mtl_dtype_size(out_dtype), out_dtype, y);
    }
}
#define norm_tiny_row(row, from, to, length, eps) \
    tiny_row((row)->x, (from).x, (row)->weight, (from).weight, (row)->bias, (from).bias, (row)->out, to, length, eps)

#include "cpu/simd/norm.h"

void SIMD(layer_norm)(const void *args, int64_t begin, int64_t end, void *scratch) {
    norm_kernel(args, begin, end, scratch);
}
