/* Products of matrices, a register tile at a time. SPDX-License-Identifier: MIT
 *
 * TILE_ROWS x 2 vectors of sums stay in registers while the rows of `a` are broadcast, an element at a time, against
 * rows of `b` that are vectors. `paired`: what is multiplied are words of two bfloat16 (vec.h). */
#ifndef METALLOID_CPU_SIMD_PRODUCTS_H
#define METALLOID_CPU_SIMD_PRODUCTS_H

#include "cpu/simd/vec.h"

enum {
    TILE_ROWS = VECTOR_BYTES == 64 ? 12 : 6, /* what the registers hold */
    TILE = 2 * LANES,                        /* columns */
};

INLINE vec broadcast(bool paired, const real *from) { return paired ? vec_broadcast_pair(from) : vec_set(*from); }
INLINE vec multiply_add(bool paired, vec a, vec b, vec sum) {
    return paired ? vec_dot_pairs(a, b, sum) : vec_fma(a, b, sum);
}

/* c[r][0..TILE) = scale times the sum over i of a[r][i] b[i][0..TILE), or, where `factor` is given, the sum added to
 * factor[r] c[r]. */
INLINE void multiply_tile(bool paired, int rows, const real *a, int64_t a_stride, const real *b, int64_t b_stride,
                          int64_t depth, real *c, int64_t c_stride, const real *factor, real scale) {
    vec sum[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = vec_zero();
    for (int64_t i = 0; i < depth; i++) {
        vec b0 = vec_load(b + i * b_stride), b1 = vec_load(b + i * b_stride + LANES);
        for (int r = 0; r < rows; r++) {
            vec x = broadcast(paired, a + r * a_stride + i);
            sum[r][0] = multiply_add(paired, x, b0, sum[r][0]);
            sum[r][1] = multiply_add(paired, x, b1, sum[r][1]);
        }
    }
    for (int r = 0; r < rows; r++) {
        real *to = c + r * c_stride;
        for (int j = 0; j < 2; j++) {
            vec v = factor ? vec_fma(vec_load(to + j * LANES), vec_set(factor[r]), sum[r][j]) : sum[r][j] * scale;
            vec_store(to + j * LANES, v);
        }
    }
}

INLINE void multiply_as(bool paired, int64_t rows, const real *a, int64_t a_stride, const real *b, int64_t b_stride,
                        int64_t depth, real *c, int64_t c_stride, int64_t columns, const real *factor, real scale) {
    /* Columns outermost: a tile's columns of b stay in the first-level cache. */
    for (int64_t column = 0; column < columns; column += TILE) {
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
#define TILE_CASE(count)                                                                       \
    case count:                                                                                \
        multiply_tile(paired, count, a + r * a_stride, a_stride, b + column, b_stride, depth,  \
                      c + r * c_stride + column, c_stride, factor ? factor + r : NULL, scale); \
        break;
            switch (rows - r) {
                TILE_CASE(1)
                TILE_CASE(2)
                TILE_CASE(3)
                TILE_CASE(4)
                TILE_CASE(5)
#if VECTOR_BYTES == 64
                TILE_CASE(6)
                TILE_CASE(7)
                TILE_CASE(8)
                TILE_CASE(9)
                TILE_CASE(10)
                TILE_CASE(11)
#endif
            default: TILE_CASE(TILE_ROWS)
            }
#undef TILE_CASE
        }
    }
}

static void multiply(bool paired, int64_t rows, const real *a, int64_t a_stride, const real *b, int64_t b_stride,
                     int64_t depth, real *c, int64_t c_stride, int64_t columns, const real *factor, real scale) {
    if (HAS_PAIRS && paired)
        multiply_as(true, rows, a, a_stride, b, b_stride, depth, c, c_stride, columns, factor, scale);
    else multiply_as(false, rows, a, a_stride, b, b_stride, depth, c, c_stride, columns, factor, scale);
}

#endif
