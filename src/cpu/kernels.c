/* The kernels of this processor: every instruction set is one table, filled here. SPDX-License-Identifier: MIT */
#include "cpu/kernels.h"
#include "cpu/features.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define DECLARE(isa, name)                                                 \
    void mtl_##isa##_##name##_f32(const void *, int64_t, int64_t, void *); \
    void mtl_##isa##_##name##_f64(const void *, int64_t, int64_t, void *);
#define DECLARE_PLAIN(name) DECLARE(plain, name)
MTL_KERNELS(DECLARE_PLAIN)

#define PLAIN_F32(name) .name = mtl_plain_##name##_f32,
#define PLAIN_F64(name) .name = mtl_plain_##name##_f64,
static const mtl_cpu_isa plain = {"plain", {MTL_KERNELS(PLAIN_F32)}, {MTL_KERNELS(PLAIN_F64)}};

#if defined(__x86_64__)
#define DECLARE_AVX2(name) DECLARE(avx2, name)
MTL_SIMD_KERNELS(DECLARE_AVX2)
static void fill_avx2(mtl_cpu_isa *isa) {
#define FILL_AVX2(kernel)                           \
    isa->in_float.kernel = mtl_avx2_##kernel##_f32; \
    isa->in_double.kernel = mtl_avx2_##kernel##_f64;
    MTL_SIMD_KERNELS(FILL_AVX2)
}
#endif

#if defined(__aarch64__)
#define DECLARE_NEON(name) DECLARE(neon, name) DECLARE(neon_bf16, name)
MTL_SIMD_KERNELS(DECLARE_NEON)
static void fill_neon(mtl_cpu_isa *isa) {
#define FILL_NEON(kernel)                           \
    isa->in_float.kernel = mtl_neon_##kernel##_f32; \
    isa->in_double.kernel = mtl_neon_##kernel##_f64;
    MTL_SIMD_KERNELS(FILL_NEON)
}
static void fill_neon_bf16(mtl_cpu_isa *isa) {
#define FILL_NEON_BF16(kernel)                           \
    isa->in_float.kernel = mtl_neon_bf16_##kernel##_f32; \
    isa->in_double.kernel = mtl_neon_bf16_##kernel##_f64;
    MTL_SIMD_KERNELS(FILL_NEON_BF16)
}
#endif

/* An instruction set starts as a copy of the one before it. */
static mtl_cpu_isa tables[4];
static const mtl_cpu_isa *available[4];
static int available_count;
static const mtl_cpu_isa *chosen;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void offer(const char *name, void (*fill)(mtl_cpu_isa *isa)) {
    mtl_cpu_isa *isa = &tables[available_count];
    *isa = *available[available_count - 1];
    isa->name = name;
    fill(isa);
    available[available_count++] = isa;
}

static void choose(void) {
    unsigned features = mtl_cpu_features();
    (void)features;
    available[available_count++] = &plain;
#if defined(__x86_64__)
    if (features & MTL_AVX2) offer("avx2", fill_avx2);
#elif defined(__aarch64__)
    if (features & MTL_NEON) offer("neon", fill_neon);
    if (features & MTL_NEON_BF16) offer("neon_bf16", fill_neon_bf16);
#endif
    chosen = available[available_count - 1];
    const char *wanted = getenv("METALLOID_CPU_ISA");
    for (int i = 0; wanted && i < available_count; i++) {
        if (strcmp(wanted, available[i]->name) == 0) chosen = available[i];
    }
}

int mtl_cpu_isas(const mtl_cpu_isa *const **isas) {
    pthread_once(&once, choose);
    *isas = available;
    return available_count;
}

const mtl_cpu_kernels *mtl_cpu_kernels_for(const metalloid_context *context, bool in_double) {
    pthread_once(&once, choose);
    const mtl_cpu_isa *isa = context && context->isa ? context->isa : chosen;
    return in_double ? &isa->in_double : &isa->in_float;
}

const char *metalloid_cpu_isa(void) {
    pthread_once(&once, choose);
    return chosen->name;
}
