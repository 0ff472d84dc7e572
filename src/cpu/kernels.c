/* The kernels of this processor: every instruction set is one table, filled here. SPDX-License-Identifier: MIT */
#include "cpu/kernels.h"
#include "core/environment.h"
#include "cpu/features.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

/* The table of an instruction set, from its kernels' names. */
#define DECLARE(isa, name)                                                 \
    void mtl_##isa##_##name##_f32(const void *, int64_t, int64_t, void *); \
    void mtl_##isa##_##name##_f64(const void *, int64_t, int64_t, void *);
#define IN_FLOAT(isa, name)  .name = mtl_##isa##_##name##_f32,
#define IN_DOUBLE(isa, name) .name = mtl_##isa##_##name##_f64,
#define TABLE(isa)            \
    MTL_KERNELS(DECLARE, isa) \
    static const mtl_cpu_isa isa = {#isa, {MTL_KERNELS(IN_FLOAT, isa)}, {MTL_KERNELS(IN_DOUBLE, isa)}};

TABLE(plain)
#if defined(__x86_64__)
TABLE(avx2)
TABLE(avx512)
TABLE(avx512_bf16)
#elif defined(__aarch64__)
TABLE(neon)
TABLE(neon_bf16)
#endif

static const mtl_cpu_isa *available[4];
static int available_count;
static const mtl_cpu_isa *chosen;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void offer(const mtl_cpu_isa *isa, bool runs_here) {
    if (runs_here) available[available_count++] = isa;
}

static void choose(void) {
    unsigned features = mtl_cpu_features();
    (void)features;
    offer(&plain, true);
#if defined(__x86_64__)
    offer(&avx2, features & MTL_AVX2);
    offer(&avx512, features & MTL_AVX512);
    offer(&avx512_bf16, features & MTL_AVX512_BF16);
#elif defined(__aarch64__)
    offer(&neon, features & MTL_NEON);
    offer(&neon_bf16, features & MTL_NEON_BF16);
#endif
    chosen = available[available_count - 1];
    static const char name[] = "METALLOID_CPU_ISA";
    const char *wanted = mtl_setting(name);
    char names[64] = "";
    for (int i = 0; wanted && i < available_count; i++) {
        if (strcmp(wanted, available[i]->name) == 0) {
            chosen = available[i];
            return;
        }
        size_t length = strlen(names);
        snprintf(names + length, sizeof names - length, "%s%s", i ? ", " : "", available[i]->name);
    }
    if (wanted) mtl_setting_ignored(name, wanted, "this processor has %s; %s is used instead", names, chosen->name);
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
