/* Custom kernels: what a kernel keeps, and what a checked call of it is. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_KERNEL_H
#define METALLOID_KERNEL_KERNEL_H

#include "core/context.h"
#include "core/tensor.h"
#include "kernel/source.h"

/* The kernel compiled for some types. Variants are added, never taken away, while the kernel lives. */
typedef struct mtl_variant {
    struct mtl_variant *next;
    uint64_t hash;
    size_t key_length;
    const unsigned char *key;
    int (*run)(void *group, char *stacks, unsigned long begin, unsigned long end); /* CPU */
    int stack_bits;
    void *function; /* CUDA: a CUfunction */
    int running; /* CUDA: threadgroups that a multiprocessor has at a time, where mtl_cuda_line says how large they are */
} mtl_variant;

struct metalloid_kernel {
    mtl_definition definition;
    mtl_mentions mentions;
    metalloid_kernel_language language;
    int shared_memory; /* CUDA: dynamic, of a block */
    size_t image;      /* bytes of source, which is a precompiled kernel's image */
    metalloid_math_mode math_mode;
    bool ensure_row_contiguous, debug, address_sanitizer;
    int64_t most_iterations;
    char *fallback_compiler; /* or NULL */
    struct mtl_variant *_Atomic variants;
};

/* A call after its checks. */
typedef struct mtl_launch {
    const mtl_view *inputs, *outputs; /* inputs are row-contiguous where the kernel wants that */
    mtl_types types;
    uint32_t grid[3], threadgroup[3];
    bool has_init_value;
    double init_value;
    const volatile int *interrupted; /* or NULL */

    /* Of each input, where the source mentions it, else NULL: `rank` of them. */
    const int *const *shapes;
    const int64_t *const *strides;
    const int *ranks;

    const metalloid_kernel_scalar *scalars; /* of a precompiled kernel */
    int scalar_count;

    const unsigned char *key; /* everything that the compiled kernel depends on beside the definition */
    size_t key_length;
} mtl_launch;

/* Sets all elements of a row-contiguous array in CPU memory; integers get the nearest value that they have. */
void mtl_kernel_fill(const mtl_view *output, double value);

/* What a launch on the CPU of arrays such as these would compile, ahead of it; only their types are looked at. */
metalloid_status mtl_kernel_compile(metalloid_kernel *kernel, const metalloid_kernel_call *given);
metalloid_status mtl_kernel_compile_cpu(metalloid_kernel *kernel, const mtl_launch *launch);

metalloid_status mtl_kernel_launch_cpu(const metalloid_context *context, metalloid_kernel *kernel,
                                       const mtl_launch *launch);

/* Inputs that are `strided` are copied first; `inputs` and `outputs` are the launch's. A scalar may be in CPU memory. */
metalloid_status mtl_kernel_launch_cuda(const metalloid_context *context, metalloid_kernel *kernel,
                                        const mtl_launch *launch, const bool *strided, mtl_view *inputs,
                                        mtl_view *outputs);

#endif
