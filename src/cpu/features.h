/* What the processor can do, as far as kernels ask. SPDX-License-Identifier: MIT */
#ifndef METALLOID_CPU_FEATURES_H
#define METALLOID_CPU_FEATURES_H

#include <stddef.h>

enum {
    MTL_AVX2 = 1 << 0,   /* with FMA and F16C, which every processor with AVX2 but VIA's has */
    MTL_AVX512 = 1 << 1, /* F, BW, DQ, VL */
    MTL_AVX512_BF16 = 1 << 2,
    MTL_NEON = 1 << 3, /* aarch64 */
    MTL_NEON_BF16 = 1 << 4,
};

/* Read once from the processor and the operating system. */
unsigned mtl_cpu_features(void);
void mtl_cpu_features_in_words(unsigned features, char *text, size_t size);

#endif
