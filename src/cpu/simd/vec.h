/* The vectors that SIMD kernels are written in. SPDX-License-Identifier: MIT
 *
 * Each file of this folder is compiled for every instruction set, and twice for each: `real` is float, or double where a tensor of
 * the call is float64. A `vec` holds LANES reals. + - * / and comparisons are the compiler's vector extensions; what those
 * cannot say is a vec_ function, most of them here; the few that need an instruction by name stand in the header of its ISA. */
#ifndef METALLOID_CPU_SIMD_VEC_H
#define METALLOID_CPU_SIMD_VEC_H

#include "cpu/kernels.h"

#include <math.h>

#if defined(MTL_ISA_AVX2)
#define MTL_ISA      avx2
#define VECTOR_BYTES 32
#elif defined(MTL_ISA_AVX512)
#define MTL_ISA      avx512
#define VECTOR_BYTES 64
#elif defined(MTL_ISA_AVX512_BF16)
#define MTL_ISA      avx512_bf16
#define VECTOR_BYTES 64
#elif defined(MTL_ISA_NEON)
#define MTL_ISA      neon
#define VECTOR_BYTES 16
#elif defined(MTL_ISA_NEON_BF16)
#define MTL_ISA      neon_bf16
#define VECTOR_BYTES 16
#else
#error "no instruction set is named"
#endif

#define INLINE static inline __attribute__((always_inline))

/* kernel name -> mtl_avx2_rms_norm_f32 */
#define MTL_SIMD_NAME_(isa, name, suffix) mtl_##isa##_##name##_##suffix
#define MTL_SIMD_NAME(isa, name, suffix)  MTL_SIMD_NAME_(isa, name, suffix)
#ifdef MTL_IN_DOUBLE
typedef double real;
typedef int64_t real_int;
typedef uint64_t real_bits;
#define SIMD(name)  MTL_SIMD_NAME(MTL_ISA, name, f64)
#define PLAIN(name) MTL_SIMD_NAME(plain, name, f64) /* for what the fast kernel leaves to it */
#define real_load   mtl_load_double
#define real_store  mtl_store_double
#define REAL_DTYPE  MTL_F64
#else
typedef float real;
typedef int32_t real_int;
typedef uint32_t real_bits;
#define SIMD(name)  MTL_SIMD_NAME(MTL_ISA, name, f32)
#define PLAIN(name) MTL_SIMD_NAME(plain, name, f32)
#define real_load   mtl_load_float
#define real_store  mtl_store_float
#define REAL_DTYPE  MTL_F32
#endif

enum { LANES = VECTOR_BYTES / sizeof(real) };
typedef real vec __attribute__((vector_size(VECTOR_BYTES)));
typedef real_int vec_int __attribute__((vector_size(VECTOR_BYTES))); /* comparisons give 0 or -1 a lane */
typedef real_bits vec_bits __attribute__((vector_size(VECTOR_BYTES)));

typedef uint16_t vec_half __attribute__((vector_size(LANES * 2))); /* float16 or bfloat16 */

INLINE vec vec_set(real x) { return x - (vec){0}; }
INLINE vec vec_zero(void) { return (vec){0}; }

INLINE vec vec_load(const real *from) {
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}
INLINE void vec_store(real *to, vec v) { memcpy(to, &v, sizeof v); }

INLINE vec vec_select(vec_int mask, vec yes, vec no) { return (vec)(((vec_int)yes & mask) | ((vec_int)no & ~mask)); }
INLINE vec vec_abs(vec v) { return (vec)((vec_int)v & ~(vec_int)vec_set(-(real)0)); }

/* Lane i is i < count. */
INLINE vec_int vec_first(int64_t count) {
    vec_int lane = {0};
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane < (real_int)(count < 0 ? 0 : count > LANES ? LANES : count);
}

#if defined(__x86_64__)
#include "cpu/simd/vec_x86.h"
#elif defined(__aarch64__)
#include "cpu/simd/vec_neon.h"
#endif

/* 0 or -1 a lane, from LANES bytes of which non-zero ones are true. */
#ifndef VEC_HAS_NONZERO_BYTES
INLINE vec_int vec_nonzero_bytes(const char *from) {
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    bytes b;
    memcpy(&b, from, sizeof b);
    return __builtin_convertvector(b, vec_int) != 0;
}
#endif

/* Asks for a line that is needed soon, into the second-level cache: the first has too few lines under way to keep memory busy. It may lie
 * past the end of what is read. */
INLINE void prefetch(const void *address) { __builtin_prefetch(address, 0, 2); }
/* The same into the first-level cache, for rows read one after the other, faster than the processor asks for them. */
INLINE void prefetch_near(const void *address) { __builtin_prefetch(address, 0, 3); }
enum { AHEAD = 4096 }; /* so many bytes, where rows are read one after the other */

/* The two halves of a and b interleaved: a0 b0 a1 b1 ... */
#if VECTOR_BYTES == 64 && !defined(MTL_IN_DOUBLE)
INLINE vec vec_zip_low(vec a, vec b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
INLINE vec vec_zip_high(vec a, vec b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif VECTOR_BYTES == 64 || (VECTOR_BYTES == 32 && !defined(MTL_IN_DOUBLE))
INLINE vec vec_zip_low(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
INLINE vec vec_zip_high(vec a, vec b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#elif VECTOR_BYTES == 32 || !defined(MTL_IN_DOUBLE)
INLINE vec vec_zip_low(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
INLINE vec vec_zip_high(vec a, vec b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#else
INLINE vec vec_zip_low(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 2); }
INLINE vec vec_zip_high(vec a, vec b) { return __builtin_shufflevector(a, b, 1, 3); }
#endif

/* LANES vectors as a square matrix: log2(LANES) perfect shuffles of its rows. */
INLINE void vec_transpose(vec *rows) {
    for (int round = 1; round < LANES; round *= 2) {
        vec next[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = vec_zip_low(rows[i], rows[i + LANES / 2]);
            next[2 * i + 1] = vec_zip_high(rows[i], rows[i + LANES / 2]);
        }
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}

/* ---- reductions, in a fixed order --------------------------------------------------------------------------------------- */

#ifndef VEC_HAS_REDUCTIONS
INLINE real vec_sum(vec v) {
    real lane[LANES];
    vec_store(lane, v);
    for (int half = LANES / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    }
    return lane[0];
}

/* The largest lane; lanes that are NaN may be passed over. */
INLINE real vec_largest(vec v) {
    real lane[LANES];
    vec_store(lane, v);
    for (int half = LANES / 2; half; half /= 2) {
        for (int i = 0; i < half; i++) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
    }
    return lane[0];
}
#endif

/* Lane i is the sum over the lanes of rows[i]; the rows are used up. */
INLINE vec vec_sums(vec *rows) {
#pragma GCC unroll 8
    for (int half = LANES / 2; half; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            rows[i] = vec_zip_low(rows[i], rows[i + half]) + vec_zip_high(rows[i], rows[i + half]);
    }
    return rows[0];
}

/* Lane i is the largest lane of rows[i], where lanes that are NaN may be passed over; the rows are used up. */
INLINE vec vec_largests(vec *rows) {
#pragma GCC unroll 8
    for (int half = LANES / 2; half; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < half; i++)
            rows[i] = vec_max(vec_zip_low(rows[i], rows[i + half]), vec_zip_high(rows[i], rows[i + half]));
    }
    return rows[0];
}

/* ---- pairs of bfloat16 ----------------------------------------------------------------------------------------------------
 *
 * A vec may also hold 2 LANES bfloat16 as pairs, for instructions that multiply pairs and add both products to a float32. Their ISA's
 * header says VEC_HAS_PAIRS. */

#ifdef VEC_HAS_PAIRS
enum { HAS_PAIRS = 1 };
#else /* never called */
enum { HAS_PAIRS = 0 };
INLINE vec vec_dot_pairs(vec a, vec b, vec sum) { return (void)a, (void)b, sum; }
INLINE vec vec_pack_pairs(vec first, vec second) { return (void)second, first; }
INLINE vec vec_broadcast_pair(const void *from) { return (void)from, vec_zero(); }
INLINE vec vec_zip_pairs(const void *a, const void *b) { return (void)a, (void)b, vec_zero(); }
#endif

/* ---- storage -------------------------------------------------------------------------------------------------------------- */

/* LANES elements of a dtype, contiguous. `dtype` is a constant wherever these are called, so that one branch remains. */
INLINE vec vec_load_as(const void *from, mtl_dtype dtype) {
    if (dtype == REAL_DTYPE) return vec_load(from);
#ifndef MTL_IN_DOUBLE
    if (dtype == MTL_F16) return vec_load_f16(from);
    if (dtype == MTL_BF16) return vec_load_bf16(from);
#endif
    vec v = vec_zero();
    for (int i = 0; i < LANES; i++) v[i] = real_load((const char *)from + i * mtl_dtype_size(dtype), dtype);
    return v;
}

INLINE void vec_store_as(void *to, mtl_dtype dtype, vec v) {
    if (dtype == REAL_DTYPE) {
        vec_store(to, v);
        return;
    }
#ifndef MTL_IN_DOUBLE
    if (dtype == MTL_F16 || dtype == MTL_BF16) {
        vec_half half = dtype == MTL_F16 ? vec_to_f16(v) : vec_to_bf16(v);
        memcpy(to, &half, sizeof half);
        return;
    }
#endif
    for (int i = 0; i < LANES; i++) real_store((char *)to + i * mtl_dtype_size(dtype), dtype, v[i]);
}

/* A result larger than the caches (mtl_cpu_streams) goes past them, so that its lines need not be read first. */
#ifdef VEC_HAS_STREAM
INLINE void vec_stream_as(void *to, mtl_dtype dtype, vec v) {
    if (dtype == REAL_DTYPE) vec_stream(to, v);
#ifndef MTL_IN_DOUBLE
    else if (dtype == MTL_F16) vec_stream_half(to, vec_to_f16(v));
    else if (dtype == MTL_BF16) vec_stream_half(to, vec_to_bf16(v));
#endif
    else vec_store_as(to, dtype, v);
}
INLINE bool can_stream(const char *to) { return (uintptr_t)to % STREAM_ALIGNMENT == 0; }
#else
INLINE void vec_stream_as(void *to, mtl_dtype dtype, vec v) { vec_store_as(to, dtype, v); }
INLINE void vec_stream_end(void) {}
INLINE bool can_stream(const char *to) { return (void)to, false; }
#endif

INLINE void vec_put_as(bool stream, void *to, mtl_dtype dtype, vec v) {
    if (stream) vec_stream_as(to, dtype, v);
    else vec_store_as(to, dtype, v);
}

/* 2 LANES elements, contiguous, for loops that know nothing but whole ones: 16-bit elements then come and go as full registers. */
typedef struct {
    vec low, high;
} vec_two;

INLINE vec_two vec_load_two(const void *from, mtl_dtype dtype) {
#ifdef VEC_HAS_TWO_BF16
    if (dtype == MTL_BF16) {
        vec_two v;
        vec_load_two_bf16(from, &v.low, &v.high);
        return v;
    }
#endif
    return (vec_two){vec_load_as(from, dtype), vec_load_as((const char *)from + LANES * mtl_dtype_size(dtype), dtype)};
}

INLINE void vec_put_two(bool stream, void *to, mtl_dtype dtype, vec_two v) {
#ifdef VEC_HAS_TWO_HALVES
    if (dtype == MTL_F16 || dtype == MTL_BF16) {
        vec halves = dtype == MTL_F16 ? vec_to_two_f16(v.low, v.high) : vec_to_two_bf16(v.low, v.high);
        if (stream) vec_stream(to, halves);
        else memcpy(to, &halves, sizeof halves);
        return;
    }
#endif
    vec_put_as(stream, to, dtype, v.low);
    vec_put_as(stream, (char *)to + LANES * mtl_dtype_size(dtype), dtype, v.high);
}

/* The first `count` < LANES elements; the other lanes are 0, and are not stored. */
INLINE vec vec_load_part(const void *from, mtl_dtype dtype, int64_t count) {
    char padded[LANES * sizeof(double)] = {0};
    memcpy(padded, from, (size_t)(count * mtl_dtype_size(dtype)));
    return vec_load_as(padded, dtype);
}

INLINE void vec_store_part(void *to, mtl_dtype dtype, vec v, int64_t count) {
    char padded[LANES * sizeof(double)];
    vec_store_as(padded, dtype, v);
    memcpy(to, padded, (size_t)(count * mtl_dtype_size(dtype)));
}

INLINE vec vec_load_upto(const void *from, mtl_dtype dtype, int64_t count) {
    return count >= LANES ? vec_load_as(from, dtype) : vec_load_part(from, dtype, count);
}

INLINE void vec_store_upto(void *to, mtl_dtype dtype, vec v, int64_t count) {
    if (count >= LANES) vec_store_as(to, dtype, v);
    else vec_store_part(to, dtype, v, count);
}

/* A row of any dtype and stride to reals, and back. */
INLINE void read_contiguous(real *to, const char *from, mtl_dtype dtype, int64_t length) {
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) vec_store(to + i, vec_load_as(from + i * mtl_dtype_size(dtype), dtype));
    for (; i < length; i++) to[i] = real_load(from + i * mtl_dtype_size(dtype), dtype);
}

INLINE void write_contiguous(char *to, mtl_dtype dtype, const real *from, int64_t length) {
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) vec_store_as(to + i * mtl_dtype_size(dtype), dtype, vec_load(from + i));
    for (; i < length; i++) real_store(to + i * mtl_dtype_size(dtype), dtype, from[i]);
}

static inline void read_row(real *to, const char *from, mtl_row row, int64_t length) {
    if (row.stride == mtl_dtype_size(row.dtype)) {
        switch (row.dtype) {
        case MTL_F32: read_contiguous(to, from, MTL_F32, length); return;
        case MTL_F16: read_contiguous(to, from, MTL_F16, length); return;
        case MTL_BF16: read_contiguous(to, from, MTL_BF16, length); return;
        case MTL_F64: read_contiguous(to, from, MTL_F64, length); return;
        default: break;
        }
    }
    for (int64_t i = 0; i < length; i++) to[i] = real_load(from + i * row.stride, row.dtype);
}

static inline void write_row(char *to, mtl_row row, const real *from, int64_t length) {
    if (row.stride == mtl_dtype_size(row.dtype)) {
        switch (row.dtype) {
        case MTL_F32: write_contiguous(to, MTL_F32, from, length); return;
        case MTL_F16: write_contiguous(to, MTL_F16, from, length); return;
        case MTL_BF16: write_contiguous(to, MTL_BF16, from, length); return;
        case MTL_F64: write_contiguous(to, MTL_F64, from, length); return;
        default: break;
        }
    }
    for (int64_t i = 0; i < length; i++) real_store(to + i * row.stride, row.dtype, from[i]);
}

/* Whether a kernel can take the row where it lies: contiguous, of a dtype that loads straight into a vec. */
static inline bool in_place_row(mtl_row row, mtl_dtype dtype) {
    return row.dtype == dtype && row.stride == mtl_dtype_size(dtype);
}

#endif
