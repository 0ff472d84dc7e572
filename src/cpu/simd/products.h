/* Products of matrices, a register tile at a time. SPDX-License-Identifier: MIT
 *
 * TILE_ROWS x 2 vectors of sums stay in registers while the rows of `a` are broadcast, an element at a time, against
 * rows of `b` that are vectors. `paired`: what is multiplied are words of two bfloat16 (vec.h). */
#ifndef METALLOID_CPU_SIMD_PRODUCTS_H
#define METALLOID_CPU_SIMD_PRODUCTS_H

#include "cpu/simd/vec.h"

enum {
    TILE_ROWS = VECTOR_BYTES == 32 ? 6 : 12, /* what 16 registers hold, and 32 */
    TILE = 2 * LANES,                        /* columns */
};

INLINE vec broadcast(bool paired, const real *from) { return paired ? vec_broadcast_pair(from) : vec_set(*from); }
INLINE vec multiply_add(bool paired, vec a, vec b, vec sum) {
    return paired ? vec_dot_pairs(a, b, sum) : vec_fma(a, b, sum);
}

/* c[r][0..vectors LANES) = scale times the sum over i of a[r][i] b[i][..], or, where `factor` is given, the sum
 * added to factor[r] c[r]. */
INLINE void multiply_tile(bool paired, int rows, int vectors, const real *a, int64_t a_stride, const real *b,
                          int64_t b_stride, int64_t depth, real *c, int64_t c_stride, const real *factor, real scale) {
    vec sum[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) {
        for (int j = 0; j < vectors; j++) sum[r][j] = vec_zero();
    }
    for (int64_t i = 0; i < depth; i++) {
        vec x[2];
        for (int j = 0; j < vectors; j++) x[j] = vec_load(b + i * b_stride + j * LANES);
        for (int r = 0; r < rows; r++) {
            vec y = broadcast(paired, a + r * a_stride + i);
            for (int j = 0; j < vectors; j++) sum[r][j] = multiply_add(paired, y, x[j], sum[r][j]);
        }
    }
    for (int r = 0; r < rows; r++) {
        real *to = c + r * c_stride;
        for (int j = 0; j < vectors; j++) {
            vec v = factor ? vec_fma(vec_load(to + j * LANES), vec_set(factor[r]), sum[r][j]) : sum[r][j] * scale;
            vec_store(to + j * LANES, v);
        }
    }
}

/* multiply_tile for up to TILE_ROWS rows. */
INLINE void multiply_rows(bool paired, int64_t rows, int vectors, const real *a, int64_t a_stride, const real *b,
                          int64_t b_stride, int64_t depth, real *c, int64_t c_stride, const real *factor, real scale) {
#define ROWS_CASE(count)                                                                                    \
    case count:                                                                                             \
        multiply_tile(paired, count, vectors, a, a_stride, b, b_stride, depth, c, c_stride, factor, scale); \
        break;
    switch (rows) {
        ROWS_CASE(1)
        ROWS_CASE(2)
        ROWS_CASE(3)
        ROWS_CASE(4)
        ROWS_CASE(5)
#if VECTOR_BYTES != 32
        ROWS_CASE(6)
        ROWS_CASE(7)
        ROWS_CASE(8)
        ROWS_CASE(9)
        ROWS_CASE(10)
        ROWS_CASE(11)
#endif
    default: ROWS_CASE(TILE_ROWS)
    }
#undef ROWS_CASE
}

/* The same for any number of rows, and of columns in whole tiles. */
static inline void multiply(int64_t rows, const real *a, int64_t a_stride, const real *b, int64_t b_stride,
                            int64_t depth, real *c, int64_t c_stride, int64_t columns, const real *factor, real scale) {
    /* Columns outermost: a tile's columns of b stay in the first-level cache. */
    for (int64_t column = 0; column < columns; column += TILE) {
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            const real *from = a + r * a_stride, *across = b + column, *by = factor ? factor + r : NULL;
            real *to = c + r * c_stride + column;
            multiply_rows(false, rows - r, 2, from, a_stride, across, b_stride, depth, to, c_stride, by, scale);
        }
    }
}

#endif
