/* The arithmetic of the plain kernels. SPDX-License-Identifier: MIT
 *
 * Each file of this folder is compiled twice: `real` is float, or double where a tensor of the call is float64. REAL(name) names
 * the result. Sums run in double: a row of any length then adds no error to speak of, in the simplest order. */
#ifndef METALLOID_CPU_PLAIN_REAL_H
#define METALLOID_CPU_PLAIN_REAL_H

#include "cpu/kernels.h"

#include <math.h>

#ifdef MTL_IN_DOUBLE
typedef double real;
#define REAL(name) name##_f64
#define real_exp   exp
#define real_log   log
#define real_tanh  tanh
#define real_erf   erf
#define real_load  mtl_load_double
#define real_store mtl_store_double
#else
typedef float real;
#define REAL(name) name##_f32
#define real_exp   expf
#define real_log   logf
#define real_tanh  tanhf
#define real_erf   erff
#define real_load  mtl_load_float
#define real_store mtl_store_float
#endif

/* A row between storage and arithmetic; `data` is the row's own first element. */
static inline void read_row(real *to, const char *data, mtl_row row, int64_t length) {
    for (int64_t i = 0; i < length; i++) to[i] = real_load(data + i * row.stride, row.dtype);
}

static inline void write_row(char *data, mtl_row row, const real *from, int64_t length) {
    for (int64_t i = 0; i < length; i++) real_store(data + i * row.stride, row.dtype, from[i]);
}

#endif
