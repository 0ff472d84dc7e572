/* Element types and the conversions between storage and arithmetic. SPDX-License-Identifier: MIT
 *
 * float16 and bfloat16 are storage only. Widening is exact; narrowing rounds once, to nearest even, keeps infinities, gives
 * infinity above the range, subnormals below it, and a quiet NaN for NaN. */
#ifndef METALLOID_CORE_DTYPE_H
#define METALLOID_CORE_DTYPE_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum mtl_dtype {
    MTL_F32,
    MTL_F16,
    MTL_BF16,
    MTL_F64,
    MTL_BOOL,
    MTL_I8,
    MTL_I16,
    MTL_I32,
    MTL_I64,
    MTL_U8,
    MTL_U16,
    MTL_U32,
    MTL_U64,
    MTL_C64, /* complex64: custom kernels alone have it */
    MTL_DTYPES
} mtl_dtype;

/* Sets of dtypes, as bits. */
enum {
    MTL_FLOATING = 1 << MTL_F32 | 1 << MTL_F16 | 1 << MTL_BF16 | 1 << MTL_F64,
    MTL_INTEGER = 1 << MTL_I8 | 1 << MTL_I16 | 1 << MTL_I32 | 1 << MTL_I64 | 1 << MTL_U8 | 1 << MTL_U16 | 1 << MTL_U32 |
                  1 << MTL_U64,
    MTL_BOOLEAN = 1 << MTL_BOOL,
    MTL_REAL = MTL_FLOATING | MTL_INTEGER
};

static inline int64_t mtl_dtype_size(mtl_dtype dtype) {
    static const uint8_t size[MTL_DTYPES] = {4, 2, 2, 8, 1, 1, 2, 4, 8, 1, 2, 4, 8, 8};
    return size[dtype];
}

const char *mtl_dtype_name(mtl_dtype dtype);

static inline uint32_t mtl_float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float mtl_bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float mtl_bf16_to_float(uint16_t bf16) { return mtl_bits_float((uint32_t)bf16 << 16); }

static inline uint16_t mtl_float_to_bf16(float x) {
    uint32_t bits = mtl_float_bits(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float mtl_f16_to_float(uint16_t f16) {
    uint32_t sign = (uint32_t)(f16 & 0x8000) << 16, magnitude = f16 & 0x7fff;
    if (magnitude >= 0x7c00) return mtl_bits_float(sign | 0x7f800000 | magnitude << 13);
    if (magnitude < 0x400)
        return mtl_bits_float(sign | mtl_float_bits((float)magnitude * 0x1p-24f)); /* no float32 subnormal arises */
    return mtl_bits_float(sign | ((magnitude << 13) + 0x38000000));
}

static inline uint16_t mtl_float_to_f16(float x) {
    uint32_t bits = mtl_float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and up round to infinity */
    if (magnitude < 0x38800000) { /* subnormal: the addition of 1/2 makes the hardware round at 2^-24 */
        return (uint16_t)(sign | (mtl_float_bits(mtl_bits_float(magnitude) + 0.5f) - 0x3f000000));
    }
    return (uint16_t)(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

/* To float32 with "round to odd", from which a second rounding to a narrower type is as good as a single one
 * (Boldo & Melquiond 2008, doi:10.1109/TC.2007.70819). */
static inline float mtl_double_to_odd_float(double x) {
    float nearest = (float)x;
    if ((double)nearest == x || isnan(x)) return nearest;
    if (mtl_float_bits(nearest) & 1) return nearest;
    /* The neighbour on the other side of x is odd; an overflow to infinity comes back to the largest float, which is odd. */
    bool outward = fabs((double)nearest) < fabs(x);
    return mtl_bits_float(outward ? mtl_float_bits(nearest) + 1 : mtl_float_bits(nearest) - 1);
}

/* One element as float (float64 is rounded) or double, and back. Integers are read by value, bool as 0 or 1. */
double mtl_load_double(const void *element, mtl_dtype dtype);
int64_t mtl_load_integer(const void *element, mtl_dtype dtype); /* integer dtypes; uint64 above INT64_MAX saturates */

static inline float mtl_load_float(const void *element, mtl_dtype dtype) {
    uint16_t half;
    float single;
    switch (dtype) {
    case MTL_F32: memcpy(&single, element, sizeof single); return single;
    case MTL_F16: memcpy(&half, element, sizeof half); return mtl_f16_to_float(half);
    case MTL_BF16: memcpy(&half, element, sizeof half); return mtl_bf16_to_float(half);
    default: return (float)mtl_load_double(element, dtype);
    }
}

static inline void mtl_store_double(void *element, mtl_dtype dtype, double x) {
    uint16_t half;
    float single;
    switch (dtype) {
    case MTL_F64: memcpy(element, &x, sizeof x); return;
    case MTL_F16:
        half = mtl_float_to_f16(mtl_double_to_odd_float(x));
        memcpy(element, &half, sizeof half);
        return;
    case MTL_BF16:
        half = mtl_float_to_bf16(mtl_double_to_odd_float(x));
        memcpy(element, &half, sizeof half);
        return;
    default:
        single = (float)x;
        memcpy(element, &single, sizeof single);
        return;
    }
}

static inline void mtl_store_float(void *element, mtl_dtype dtype, float x) {
    uint16_t half;
    switch (dtype) {
    case MTL_F32: memcpy(element, &x, sizeof x); return;
    case MTL_F16:
        half = mtl_float_to_f16(x);
        memcpy(element, &half, sizeof half);
        return;
    case MTL_BF16:
        half = mtl_float_to_bf16(x);
        memcpy(element, &half, sizeof half);
        return;
    default: mtl_store_double(element, dtype, (double)x); return;
    }
}

#endif
