/* Sums over a row. SPDX-License-Identifier: MIT
 *
 * A block is summed in four vectors of reals, at most 64 additions to a lane, and the blocks in double: the rounding of a lane's sum,
 * which for a constant row has always the same sign, then stays below 1e-6 of it however long the row is. */
#ifndef METALLOID_CPU_SIMD_SUMS_H
#define METALLOID_CPU_SIMD_SUMS_H

#include "cpu/simd/vec.h"

enum { SUM_BLOCK = 256 * LANES };

typedef struct {
    double sum, squares;
} row_sums;

/* Of x - shift and of its square; what the caller does not use costs nothing. */
INLINE row_sums sum_row(const char *x, mtl_dtype dtype, int64_t length, real shift) {
    int64_t size = mtl_dtype_size(dtype);
    row_sums total = {0, 0};
    vec minus = vec_set(shift);
    for (int64_t first = 0; first < length; first += SUM_BLOCK) {
        int64_t count = length - first < SUM_BLOCK ? length - first : SUM_BLOCK, i = 0;
        const char *block = x + first * size;
        vec sum[4], squares[4];
        for (int j = 0; j < 4; j++) sum[j] = squares[j] = vec_zero();
        for (; i + 4 * LANES <= count; i += 4 * LANES) {
            for (int j = 0; j < 4; j++) {
                vec d = vec_load_as(block + (i + j * LANES) * size, dtype) - minus;
                sum[j] += d;
                squares[j] = vec_fma(d, d, squares[j]);
            }
        }
        for (; i < count; i += LANES) {
            vec d = vec_load_upto(block + i * size, dtype, count - i) - minus;
            if (count - i < LANES) d = vec_select(vec_first(count - i), d, vec_zero());
            sum[0] += d;
            squares[0] = vec_fma(d, d, squares[0]);
        }
        total.sum += (double)vec_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
        total.squares += (double)vec_sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    }
    return total;
}

#endif
