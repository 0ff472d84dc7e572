/* The operations by name, for callers that hold arrays by other means than Python objects: XLA's handlers (xla.c) and MLX's
 * primitive, which is compiled where it is used. SPDX-License-Identifier: MIT
 *
 * Nothing here needs another header than the C library's: the package ships this one to compile the primitive against. */
#ifndef METALLOID_PYTHON_OPERATIONS_H
#define METALLOID_PYTHON_OPERATIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MTL_OPERATIONS_CAPSULE  "metalloid._native.operations"
#define MTL_KERNEL_CALL_CAPSULE "metalloid._native.kernel_call" /* Kernel.prepare's */

/* An array: DLPack's dtype, strides in elements, NULL for row-major contiguous. */
typedef struct mtl_operand {
    void *data;
    const int64_t *shape, *strides;
    int32_t rank;
    uint8_t code, bits;
} mtl_operand;

/* A call. Inputs, reals and integers stand in the order that operations.c lists; of the inputs only those whose bit is set in `given`. */
typedef struct mtl_operands {
    const mtl_operand *inputs, *outputs;
    uint32_t given;
    int32_t input_count, output_count;
    const double *reals;
    const int64_t *integers;
    bool on_cuda;
    int32_t device_id;
    void *stream; /* CUDA's */
} mtl_operands;

/* What the capsule holds. Functions may be called from any thread, with or without the GIL. */
typedef struct mtl_operations {
    size_t size;                                             /* sizeof(mtl_operations) */
    int (*find)(const char *name);                           /* -1 where there is none */
    int (*run)(int operation, const mtl_operands *operands); /* a metalloid_status */
    const char *(*last_error)(void);                         /* of this thread */
    int (*launch)(const void *call,
                  const mtl_operands *operands); /* of a custom kernel: what MTL_KERNEL_CALL_CAPSULE holds, arrays */
} mtl_operations;

/* ---- within the extension module ------------------------------------------------------------------------------------------ */

enum { MTL_MOST_INPUTS = 8, MTL_MOST_OUTPUTS = 3, MTL_MOST_REALS = 3, MTL_MOST_INTEGERS = 4 };

enum {
    MTL_RMS_NORM,
    MTL_LAYER_NORM,
    MTL_ADD_RMS_NORM,
    MTL_ADD_LAYER_NORM,
    MTL_ROPE,
    MTL_QK_NORM_ROPE,
    MTL_SWIGLU,
    MTL_GEGLU,
    MTL_SCALED_DOT_PRODUCT_ATTENTION,
    MTL_KV_CACHE_SDPA_UPDATE,
    MTL_CROSS_ENTROPY,
    MTL_GATED_DELTA_UPDATE,
    MTL_OPERATION_COUNT
};

/* In the order of a call's arrays and numbers; each list ends with NULL. */
typedef struct mtl_operation_names {
    const char *name, *inputs[MTL_MOST_INPUTS + 1], *reals[MTL_MOST_REALS + 1], *integers[MTL_MOST_INTEGERS + 1];
} mtl_operation_names;

const mtl_operation_names *mtl_operation_names_of(int operation);
int mtl_operation_find(const char *name);
int mtl_operation_run(int operation, const mtl_operands *operands);

/* The checks of a call alone; of its arrays only shapes and dtypes are looked at, but `data` must be distinct. */
int mtl_operation_check(int operation, const mtl_operands *operands);

int mtl_kernel_call_launch(const void *call, const mtl_operands *operands);

extern const mtl_operations mtl_operations_table;

#endif
