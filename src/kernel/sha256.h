/* SHA-256 (FIPS 180-4): names of cache entries, and whether they are what was written. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_SHA256_H
#define METALLOID_KERNEL_SHA256_H

#include <stddef.h>
#include <stdint.h>

typedef struct mtl_sha256 {
    uint32_t state[8];
    uint64_t bytes;
    unsigned char block[64];
} mtl_sha256;

typedef struct mtl_digest {
    unsigned char bytes[32];
} mtl_digest;

void mtl_sha256_begin(mtl_sha256 *hash);
void mtl_sha256_add(mtl_sha256 *hash, const void *bytes, size_t count);
mtl_digest mtl_sha256_end(mtl_sha256 *hash);

#endif
