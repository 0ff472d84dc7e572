/* Compiled kernels, kept from one process to the next. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_CACHE_H
#define METALLOID_KERNEL_CACHE_H

#include "kernel/compiler.h"
#include "kernel/sha256.h"

/* What a compiled object is made from. */
typedef struct mtl_build {
    const mtl_compiler *compiler;
    const char *const *arguments; /* all but the files; end with a NULL */
    const char *unit;             /* the translation unit */
    size_t unit_length;
    mtl_digest key; /* of everything that the object depends on */

    /* For a debugger: the texts that the unit's #line directives name, kept beside the object; NULL: none. */
    const char *source, *header;
} mtl_build;

/* The object of this key as the dynamic loader's handle: from the cache, or compiled and put there. Where the cache cannot be used
 * (another user's, no space) the object is compiled all the same and kept for this process alone. NULL: it does not compile,
 * and `log` has the reason in words. */
void *mtl_cache_get(const mtl_build *build, mtl_text *log);

/* Bytes that no dynamic loader reads, such as a GPU's machine code, under a key of everything that they were made from. What is found
 * is the caller's to free; storing may fail, and nothing is said about it. */
bool mtl_cache_load(const mtl_digest *key, char **bytes, size_t *length);
void mtl_cache_store(const mtl_digest *key, const char *bytes, size_t length);

#endif
