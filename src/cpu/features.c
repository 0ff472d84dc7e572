/* What the processor can do, as far as kernels ask. SPDX-License-Identifier: MIT */
#include "cpu/features.h"

#include <stdbool.h>
#include <stdio.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP2_BF16
#define HWCAP2_BF16 (1 << 14)
#endif
#endif

unsigned mtl_cpu_features(void) {
    unsigned features = 0;
#if defined(__x86_64__)
    unsigned eax, ebx, ecx, edx;
    bool f16c =
        __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C); /* clang 14's built-in does not know this one */
    __builtin_cpu_init(); /* the built-ins ask the operating system for its part (XCR0) as well */
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c) features |= MTL_AVX2;
    if ((features & MTL_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        features |= MTL_AVX512;
        if (__builtin_cpu_supports("avx512bf16")) features |= MTL_AVX512_BF16;
    }
#elif defined(__aarch64__)
    features |= MTL_NEON;
#if defined(__linux__)
    if (getauxval(AT_HWCAP2) & HWCAP2_BF16) features |= MTL_NEON_BF16;
#endif
#endif
    return features;
}

void mtl_cpu_features_in_words(unsigned features, char *text, size_t size) {
    static const char *const words[] = {"avx2+fma+f16c", "avx512f+bw+dq+vl", "avx512_bf16", "neon", "neon_bf16"};
    size_t used = 0;
    *text = '\0';
    for (unsigned i = 0; i < sizeof words / sizeof *words && used < size; i++) {
        if (features >> i & 1) used += (size_t)snprintf(text + used, size - used, "%s%s", used ? " " : "", words[i]);
    }
}
