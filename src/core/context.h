/* What a call needs beside its arguments. SPDX-License-Identifier: MIT */
#ifndef METALLOID_CORE_CONTEXT_H
#define METALLOID_CORE_CONTEXT_H

#include "core/status.h"

struct mtl_cpu_isa;

struct metalloid_context {
    int threads; /* 0: the process-wide count */
    metalloid_allocator allocator;
    void *stream;                  /* CUDA's, NULL for the legacy default stream */
    const struct mtl_cpu_isa *isa; /* NULL: the one picked for the process; `metalloid check` compares others with it */
};

static inline int mtl_threads(const metalloid_context *context) {
    return context && context->threads ? context->threads : metalloid_get_num_threads();
}

/* Workspace of one call, aligned to 64 bytes; NULL when there is none to be had. */
void *mtl_allocate(const metalloid_context *context, size_t bytes);
void mtl_release(const metalloid_context *context, void *pointer);

#endif
