/* The machine's ceilings. SPDX-License-Identifier: MIT
 *
 * Arithmetic: independent chains of multiply-adds, as many as hide the latency of two pipes (four on Arm) and still fit the registers.
 * Compiled with -ffp-contract=fast, so that the product and the sum of a vector become one instruction.
 * Memory: each thread walks one contiguous range. Cached stores read a line before they write it; streamed ones do not. */
#include "ceilings.h"
#include "cpu/features.h"

#include <stdbool.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define UNROLL _Pragma("GCC unroll 32")
#else
#define UNROLL _Pragma("unroll")
#endif

#define FMA_LOOP(name, target, real, vector_bytes, chains)                            \
    target static double name(int64_t steps, double factor) {                         \
        typedef real vector __attribute__((vector_size(vector_bytes)));               \
        vector sum[chains], times = {0}, plus = {0};                                  \
        for (size_t lane = 0; lane < sizeof(vector) / sizeof(real); lane++) {         \
            times[lane] = (real)factor;                                               \
            plus[lane] = (real)(1 - factor);                                          \
        }                                                                             \
        UNROLL for (int c = 0; c < (chains); c++) sum[c] = plus * (real)c;            \
        for (int64_t step = 0; step < steps; step++) {                                \
            UNROLL for (int c = 0; c < (chains); c++) sum[c] = sum[c] * times + plus; \
        }                                                                             \
        UNROLL for (int c = 1; c < (chains); c++) sum[0] += sum[c];                   \
        return (double)sum[0][0];                                                     \
    }                                                                                 \
    enum { name##_flops = 2 * (chains) * (vector_bytes) / (int)sizeof(real) };

#if defined(__x86_64__)

FMA_LOOP(fma_f32_avx2, __attribute__((target("avx2,fma"))), float, 32, 12)
FMA_LOOP(fma_f64_avx2, __attribute__((target("avx2,fma"))), double, 32, 12)
FMA_LOOP(fma_f32_avx512, __attribute__((target("avx512f"))), float, 64, 24)
FMA_LOOP(fma_f64_avx512, __attribute__((target("avx512f"))), double, 64, 24)
FMA_LOOP(fma_f32_any, , float, 16, 12)
FMA_LOOP(fma_f64_any, , double, 16, 12)

#if defined(__GNUC__) && (__GNUC__ >= 10 || defined(__clang__))
#define HAVE_DOT_BF16
__attribute__((target("avx512f,avx512bf16"))) static double dot_bf16_avx512(int64_t steps, double factor) {
    __m512 sum[24], operand = _mm512_set1_ps((float)factor);
    __m512bh pair;
    memcpy(&pair, &operand, sizeof pair);
    UNROLL for (int c = 0; c < 24; c++) sum[c] = _mm512_set1_ps((float)c); /* equal chains would be made one */
    for (int64_t step = 0; step < steps; step++) {
        UNROLL for (int c = 0; c < 24; c++) sum[c] = _mm512_dpbf16_ps(sum[c], pair, pair);
    }
    UNROLL for (int c = 1; c < 24; c++) sum[0] = _mm512_add_ps(sum[0], sum[c]);
    return (double)_mm512_cvtss_f32(sum[0]);
}
#endif

arithmetic_ceiling find_arithmetic_ceiling(const char *dtype) {
    unsigned features = mtl_cpu_features();
    if (strcmp(dtype, "bfloat16") == 0) {
#if defined(HAVE_DOT_BF16)
        if (features & MTL_AVX512_BF16) return (arithmetic_ceiling){"avx512_bf16", 2 * 24 * 32, dot_bf16_avx512};
#endif
        return (arithmetic_ceiling){"", 0, NULL};
    }
    if (strcmp(dtype, "float32") == 0) {
        if (features & MTL_AVX512) return (arithmetic_ceiling){"avx512", fma_f32_avx512_flops, fma_f32_avx512};
        if (features & MTL_AVX2) return (arithmetic_ceiling){"avx2", fma_f32_avx2_flops, fma_f32_avx2};
        return (arithmetic_ceiling){"sse2", fma_f32_any_flops, fma_f32_any};
    }
    if (strcmp(dtype, "float64") == 0) {
        if (features & MTL_AVX512) return (arithmetic_ceiling){"avx512", fma_f64_avx512_flops, fma_f64_avx512};
        if (features & MTL_AVX2) return (arithmetic_ceiling){"avx2", fma_f64_avx2_flops, fma_f64_avx2};
        return (arithmetic_ceiling){"sse2", fma_f64_any_flops, fma_f64_any};
    }
    return (arithmetic_ceiling){"", 0, NULL};
}

#else

FMA_LOOP(fma_f32_any, , float, 16, 24)
FMA_LOOP(fma_f64_any, , double, 16, 24)

arithmetic_ceiling find_arithmetic_ceiling(const char *dtype) {
    if (strcmp(dtype, "float32") == 0) return (arithmetic_ceiling){"128 bit", fma_f32_any_flops, fma_f32_any};
    if (strcmp(dtype, "float64") == 0) return (arithmetic_ceiling){"128 bit", fma_f64_any_flops, fma_f64_any};
    return (arithmetic_ceiling){"", 0, NULL};
}

#endif

/* Memory, by the processor's widest vectors: they reach a few percent more than 16 bytes at a time. */
#define READ_LOOP(name, target, vector_bytes)                                          \
    target static uint64_t name(const char *from, size_t bytes) {                      \
        typedef uint64_t vector __attribute__((vector_size(vector_bytes), may_alias)); \
        const vector *at = (const vector *)(const void *)from;                         \
        vector sum[4] = {{0}};                                                         \
        for (size_t i = 0; i < bytes / sizeof *at; i += 4) {                           \
            UNROLL for (int c = 0; c < 4; c++) sum[c] += at[i + (size_t)c];            \
        }                                                                              \
        sum[0] += sum[1] + sum[2] + sum[3];                                            \
        return sum[0][0] + sum[0][1];                                                  \
    }

#define COPY_LOOP(name, target, vector_bytes, put)                                                      \
    target static void name(char *to, const char *from, size_t bytes) {                                 \
        typedef uint64_t vector __attribute__((vector_size(vector_bytes), may_alias));                  \
        const vector *at = (const vector *)(const void *)from;                                          \
        vector *out = (vector *)(void *)to;                                                             \
        for (size_t i = 0; i < bytes / sizeof *at; i += 4) { /* loads before stores: no memcpy idiom */ \
            vector a = at[i], b = at[i + 1], c = at[i + 2], d = at[i + 3];                              \
            put(out + i, a);                                                                            \
            put(out + i + 1, b);                                                                        \
            put(out + i + 2, c);                                                                        \
            put(out + i + 3, d);                                                                        \
        }                                                                                               \
    }

#define STORE(to, v) (*(to) = (v))
READ_LOOP(read_any, , 16)
COPY_LOOP(copy_any, , 16, STORE)
#if defined(__x86_64__)
#define STREAM_16(to, v) _mm_stream_si128((__m128i *)(void *)(to), (__m128i)(v))
#define STREAM_32(to, v) _mm256_stream_si256((__m256i *)(void *)(to), (__m256i)(v))
#define STREAM_64(to, v) _mm512_stream_si512((__m512i *)(void *)(to), (__m512i)(v))
READ_LOOP(read_avx2, __attribute__((target("avx2"))), 32)
READ_LOOP(read_avx512, __attribute__((target("avx512f"))), 64)
COPY_LOOP(copy_avx2, __attribute__((target("avx2"))), 32, STORE)
COPY_LOOP(copy_avx512, __attribute__((target("avx512f"))), 64, STORE)
COPY_LOOP(stream_any, , 16, STREAM_16)
COPY_LOOP(stream_avx2, __attribute__((target("avx2"))), 32, STREAM_32)
COPY_LOOP(stream_avx512, __attribute__((target("avx512f"))), 64, STREAM_64)
#endif

uint64_t stream_read(const char *from, size_t bytes) {
#if defined(__x86_64__)
    unsigned features = mtl_cpu_features();
    if (features & MTL_AVX512) return read_avx512(from, bytes);
    if (features & MTL_AVX2) return read_avx2(from, bytes);
#endif
    return read_any(from, bytes);
}

void stream_copy(char *to, const char *from, size_t bytes, store_kind kind) {
    if (kind == STORES_MEMCPY) {
        memcpy(to, from, bytes);
        return;
    }
#if defined(__x86_64__)
    unsigned features = mtl_cpu_features();
    bool streamed = kind == STORES_STREAMED;
    if (features & MTL_AVX512) (streamed ? stream_avx512 : copy_avx512)(to, from, bytes);
    else if (features & MTL_AVX2) (streamed ? stream_avx2 : copy_avx2)(to, from, bytes);
    else (streamed ? stream_any : copy_any)(to, from, bytes);
    if (streamed) _mm_sfence();
#else
    copy_any(to, from, bytes);
#endif
}
