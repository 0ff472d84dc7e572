/* y = (x - mean) / sqrt(var + eps) * weight + bias, of x or of x + residual. SPDX-License-Identifier: MIT
 *
 * Three passes over a row that is in the cache after the first. The mean of the first pass, rounded to a real, is only a shift: the
 * second pass sums d = x - shift and d^2, so that with delta = mean(d), var = mean(d^2) - delta^2 and x - mean = d - delta. A
 * mean of 1e4 deviations, whose own rounding is a visible part of a deviation, does no harm that way. */
#include "cpu/simd/sums.h"

/* Deviations whose squares leave float32's normal range. */
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

INLINE void norm_row(const char *x, mtl_dtype x_dtype, const char *weight, mtl_dtype weight_dtype, const char *bias,
                     mtl_dtype bias_dtype, char *out, mtl_dtype out_dtype, bool stream, int64_t length, double eps) {
    int64_t size = mtl_dtype_size(x_dtype), weight_size = mtl_dtype_size(weight_dtype),
            bias_size = mtl_dtype_size(bias_dtype), out_size = mtl_dtype_size(out_dtype), i = 0;
    real shift = (real)(sum_row(x, x_dtype, length, 0).sum / (double)length);
    row_sums deviations = sum_row(x, x_dtype, length, shift);
    double delta = deviations.sum / (double)length;
    double variance = deviations.squares / (double)length - delta * delta;
    variance = (variance < 0 ? 0 : variance) + eps;
    if (variance < 1e-28) {
        tiny_row(x, x_dtype, weight, weight_dtype, bias, bias_dtype, out, out_dtype, length, eps);
        return;
    }
    double inverse = 1 / sqrt(variance);
    vec minus = vec_set(shift), offset = vec_set((real)delta), factor = vec_set((real)inverse);
    for (; i + LANES <= length; i += LANES) {
        prefetch(x + (length + i) * size); /* the next row */
        vec d = (vec_load_as(x + i * size, x_dtype) - minus) - offset;
        vec v = vec_fma(d * factor, vec_load_as(weight + i * weight_size, weight_dtype),
                        vec_load_as(bias + i * bias_size, bias_dtype));
        vec_put_as(stream, out + i * out_size, out_dtype, v);
    }
    if (i < length) {
        vec d = (vec_load_part(x + i * size, x_dtype, length - i) - minus) - offset;
        vec v = vec_fma(d * factor, vec_load_part(weight + i * weight_size, weight_dtype, length - i),
                        vec_load_part(bias + i * bias_size, bias_dtype, length - i));
        vec_store_part(out + i * out_size, out_dtype, v, length - i);
    }
}

#define NORM_HAS_BIAS
#include "cpu/simd/norm.h"

void SIMD(layer_norm)(const void *args, int64_t begin, int64_t end, void *scratch) {
    norm_kernel(args, begin, end, scratch);
}
