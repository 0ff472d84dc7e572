/* What the machine can do at best: arithmetic and memory. SPDX-License-Identifier: MIT */
#ifndef METALLOID_CEILINGS_H
#define METALLOID_CEILINGS_H

#include <stddef.h>
#include <stdint.h>

/* Chains of fused multiply-adds, or of bfloat16 dot products, that never leave the registers. The result keeps the work alive. */
typedef struct {
    const char *instructions;
    double flops_a_step;
    double (*run)(int64_t steps, double factor);
} arithmetic_ceiling;

/* "float32", "float64" or "bfloat16" (products of two, summed in float32); run is NULL where the processor has no such instruction. */
arithmetic_ceiling find_arithmetic_ceiling(const char *dtype);

/* One thread's part. Sizes are multiples of 256, addresses of 64. */
typedef enum { STORES_CACHED, STORES_STREAMED, STORES_MEMCPY, STORE_KINDS } store_kind;
uint64_t stream_read(const char *from, size_t bytes);
void stream_copy(char *to, const char *from, size_t bytes, store_kind kind);

#endif
