/* y = x / sqrt(mean(x^2) + eps) * weight, of x or of x + residual. SPDX-License-Identifier: MIT
 *
 * A row so small that its squares leave float32's normal range is done again in double. */
#include "cpu/simd/sums.h"

#define NORM_HAS_BIAS 0

typedef struct {
    vec factor; /* 1 / sqrt(mean(x^2) + eps) */
} norm_terms;

INLINE real norm_start(const char *x, const char *residual, mtl_dtype dtype, int64_t length) {
    return (void)x, (void)residual, (void)dtype, (void)length, 0;
}

/* False where the row is to be done in double. */
INLINE bool norm_settle(norm_terms *terms, row_sums sums, real shift, const char *x, mtl_dtype dtype, int64_t length,
                        double eps) {
    (void)shift, (void)x, (void)dtype;
    double mean_square = sums.squares / (double)length + eps;
    terms->factor = vec_set((real)(1 / sqrt(mean_square)));
    return !(mean_square < 1e-28);
}

INLINE vec norm_apply(const norm_terms *terms, vec x, vec weight, vec bias) {
    return (void)bias, x * terms->factor * weight;
}

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
#define norm_tiny_row(row, from, to, length, eps) \
    tiny_row((row)->x, (from).x, (row)->weight, (from).weight, (row)->out, to, length, eps)

#include "cpu/simd/norm.h"

void SIMD(rms_norm)(const void *args, int64_t begin, int64_t end, void *scratch) {
    norm_kernel(args, begin, end, scratch);
}
