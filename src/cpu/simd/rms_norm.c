/* y = x / sqrt(mean(x^2) + eps) * weight, of x or of x + residual. SPDX-License-Identifier: MIT
 *
 * Traffic: each byte of x once from memory and once from the cache, when the next row is asked for; each of out once. A row so small that its squares leave
 * float32's normal range is done again in double. */
#include "cpu/simd/sums.h"

static void tiny_row(const char *x, mtl_dtype x_dtype, const char *weight, mtl_dtype weight_dtype, char *out,
                     mtl_dtype out_dtype, int64_t length, double eps) {
    int64_t size = mtl_dtype_size(x_dtype), weight_size = mtl_dtype_size(weight_dtype);
    double squares = 0;
    for (int64_t i = 0; i < length; i++)
        squares += mtl_load_double(x + i * size, x_dtype) * mtl_load_double(x + i * size, x_dtype);
    double inverse = 1 / sqrt(squares / (double)length + eps);
    for (int64_t i = 0; i < length; i++) {
        double y =
            mtl_load_double(x + i * size, x_dtype) * inverse * mtl_load_double(weight + i * weight_size, weight_dtype);
        mtl_store_double(out + i * mtl_dtype_size(out_dtype), out_dtype, y);
    }
}

INLINE void norm_row(const char *x, mtl_dtype x_dtype, const char *weight, mtl_dtype weight_dtype, const char *bias,
                     mtl_dtype bias_dtype, char *out, mtl_dtype out_dtype, bool stream, int64_t length, double eps) {
    (void)bias, (void)bias_dtype;
    int64_t size = mtl_dtype_size(x_dtype), weight_size = mtl_dtype_size(weight_dtype),
            out_size = mtl_dtype_size(out_dtype), i = 0;
    double mean_square = sum_row(x, x_dtype, length, 0).squares / (double)length + eps;
    if (mean_square < 1e-28) {
        tiny_row(x, x_dtype, weight, weight_dtype, out, out_dtype, length, eps);
        return;
    }
    vec inverse = vec_set((real)(1 / sqrt(mean_square)));
    for (; i + LANES <= length; i += LANES) {
        if (size > 2) prefetch(x + (length + i) * size); /* 16-bit rows keep the processor busier than memory */
        vec v = vec_load_as(x + i * size, x_dtype) * inverse * vec_load_as(weight + i * weight_size, weight_dtype);
        vec_put_as(stream, out + i * out_size, out_dtype, v);
    }
    if (i < length) {
        vec v = vec_load_part(x + i * size, x_dtype, length - i) * inverse *
                vec_load_part(weight + i * weight_size, weight_dtype, length - i);
        vec_store_part(out + i * out_size, out_dtype, v, length - i);
    }
}

#include "cpu/simd/norm.h"

void SIMD(rms_norm)(const void *args, int64_t begin, int64_t end, void *scratch) {
    norm_kernel(args, begin, end, scratch);
}
