/* What a call needs beside its arguments. SPDX-License-Identifier: MIT */
#include "core/context.h"
#include "core/threads.h"

#include <stdatomic.h>
#include <stdlib.h>

enum { ALIGNMENT = 64 };

static atomic_int process_threads; /* 0: mtl_default_threads() */

static void *default_allocate(void *user, size_t bytes) {
    (void)user;
    return bytes > SIZE_MAX - ALIGNMENT ? NULL
                                        : aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
}

static void default_release(void *user, void *pointer) {
    (void)user;
    free(pointer);
}

static const metalloid_allocator default_allocator = {default_allocate, default_release, NULL};

metalloid_status metalloid_context_create(metalloid_context **context) {
    MTL_REQUIRE(context, "context_create", "%s must not be NULL", "context");
    metalloid_context *created = malloc(sizeof *created);
    if (!created) return mtl_fail(METALLOID_OUT_OF_MEMORY, "context_create: out of memory");
    *created = (metalloid_context){.allocator = default_allocator};
    *context = created;
    return METALLOID_OK;
}

void metalloid_context_destroy(metalloid_context *context) { free(context); }

metalloid_status metalloid_context_set_threads(metalloid_context *context, int threads) {
    MTL_REQUIRE(context, "context_set_threads", "%s must not be NULL", "context");
    MTL_REQUIRE(threads >= 0 && threads <= MTL_MOST_THREADS, "context_set_threads", "threads must be 0 to %d, got %d",
                (int)MTL_MOST_THREADS, threads);
    context->threads = threads;
    return METALLOID_OK;
}

metalloid_status metalloid_context_set_allocator(metalloid_context *context, const metalloid_allocator *allocator) {
    MTL_REQUIRE(context, "context_set_allocator", "%s must not be NULL", "context");
    MTL_REQUIRE(!allocator || (allocator->allocate && allocator->release), "context_set_allocator", "%s",
                "allocator must have both allocate and release");
    context->allocator = allocator ? *allocator : default_allocator;
    return METALLOID_OK;
}

metalloid_status metalloid_context_set_stream(metalloid_context *context, void *stream) {
    MTL_REQUIRE(context, "context_set_stream", "%s must not be NULL", "context");
    context->stream = stream;
    return METALLOID_OK;
}

metalloid_status metalloid_set_num_threads(int threads) {
    MTL_REQUIRE(threads >= 0 && threads <= MTL_MOST_THREADS, "set_num_threads", "threads must be 0 to %d, got %d",
                (int)MTL_MOST_THREADS, threads);
    atomic_store_explicit(&process_threads, threads, memory_order_relaxed);
    return METALLOID_OK;
}

int metalloid_get_num_threads(void) {
    int threads = atomic_load_explicit(&process_threads, memory_order_relaxed);
    return threads ? threads : mtl_default_threads();
}

void *mtl_allocate(const metalloid_context *context, size_t bytes) {
    const metalloid_allocator *allocator = context ? &context->allocator : &default_allocator;
    return allocator->allocate(allocator->user, bytes);
}

void mtl_release(const metalloid_context *context, void *pointer) {
    const metalloid_allocator *allocator = context ? &context->allocator : &default_allocator;
    if (pointer) allocator->release(allocator->user, pointer);
}
