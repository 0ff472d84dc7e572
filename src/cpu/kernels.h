/* The CPU backend: its entry points, one a group of operations, and the table of kernels they pick from.
 * SPDX-License-Identifier: MIT */
#ifndef METALLOID_CPU_KERNELS_H
#define METALLOID_CPU_KERNELS_H

#include "core/context.h"
#include "core/operations.h"

/* A kernel does items [begin, end) of a call. What an item is, stands with the kernel's entry point; `scratch` is the running
 * thread's own and has the size that the entry point asked for. */
typedef void (*mtl_kernel)(const void *args, int64_t begin, int64_t end, void *scratch);

/* Every kernel, once, for an instruction set: the tables and declarations are made from this list. */
#define MTL_KERNELS(X, isa) \
    X(isa, rms_norm)        \
    X(isa, layer_norm)      \
    X(isa, swiglu)          \
    X(isa, geglu)           \
    X(isa, rope)            \
    X(isa, attention)       \
    X(isa, attention_merge) \
    X(isa, cross_entropy)   \
    X(isa, gated_delta)

#define MTL_KERNEL_FIELD(isa, name) mtl_kernel name;
typedef struct mtl_cpu_kernels {
    MTL_KERNELS(MTL_KERNEL_FIELD, )
} mtl_cpu_kernels;

/* One instruction set: kernels that compute in float32 and those that compute in float64. */
typedef struct mtl_cpu_isa {
    const char *name;
    mtl_cpu_kernels in_float, in_double;
} mtl_cpu_isa;

/* The instruction sets of this build that this processor has, plain C first, the best last. */
int mtl_cpu_isas(const mtl_cpu_isa *const **isas);

/* The kernels of a call. */
const mtl_cpu_kernels *mtl_cpu_kernels_for(const metalloid_context *context, bool in_double);

/* Runs `kernel` over all items on the context's threads. `item_cost`: the memory traffic of one item in bytes (or, where arithmetic
 * dominates, its multiply-adds / 8), from which it follows how many threads the call is worth. `scratch`: bytes a thread. Nothing
 * has run when METALLOID_OUT_OF_MEMORY comes back. Bits do not depend on the thread count: an item is always done whole. */
metalloid_status mtl_cpu_run(const metalloid_context *context, const char *op, mtl_kernel kernel, const void *args,
                             int64_t items, int64_t item_cost, size_t scratch);

/* Whether results of so many bytes are better written past the caches: they and the operands beside them would not stay there. */
bool mtl_cpu_streams(double bytes);

/* rope's items are blocks of so many time steps: enough to read runs of memory, few enough to share out. */
enum { MTL_ROPE_BLOCK = 16 };

typedef struct mtl_rope_block {
    int64_t batch, first, steps;
} mtl_rope_block;

mtl_rope_block mtl_rope_block_at(const mtl_rope_args *args, int64_t item);

/* The steps of a block, but for the last one. */
static inline int64_t mtl_rope_most_steps(const mtl_rope_args *args) {
    return args->time < MTL_ROPE_BLOCK ? args->time : MTL_ROPE_BLOCK;
}

/* Whether the blocks of one `first` have the same positions throughout the batch. They are items in a row. */
static inline bool mtl_rope_batch_shares(const mtl_rope_angles *angles) { return angles->positions.batch_stride == 0; }

/* Frequencies, a block's cosines and sines (as long double or, each twice, as double), a head and two weights. */
static inline size_t mtl_rope_scratch(const mtl_rope_args *args) {
    size_t dims = (size_t)args->angles.dims, steps = (size_t)mtl_rope_most_steps(args);
    return sizeof(long double) * (dims / 2 + steps * dims) + sizeof(double) * 3 * (size_t)args->head_dim;
}

/* Cosine and sine of a pair whose angle leaves the range of double on its way. */
void mtl_rope_turn_far(const mtl_rope_angles *angles, int64_t pair, int64_t position, double *cosine, double *sine);

/* gated_delta's items are runs of blocks, of so many rows of a head's state each. Calls of fewer than so many steps go
 * step by step, others in chunks. */
enum { MTL_GATED_DELTA_ROWS = 32, MTL_GATED_DELTA_STEPS = 32, MTL_GATED_DELTA_FEW = 6 };

static inline int64_t mtl_gated_delta_blocks(const mtl_gated_delta_args *args) { /* of a head */
    return (args->value_dim + MTL_GATED_DELTA_ROWS - 1) / MTL_GATED_DELTA_ROWS;
}

/* Step by step: a block, and q, k and gamma of a step, each row padded to full vectors. In chunks: the states of an
 * item, the keys and queries of a chunk in five forms, and what lies between steps. */
static inline size_t mtl_gated_delta_scratch(const mtl_gated_delta_args *args) {
    size_t padded = (size_t)(args->key_dim + 15) / 16 * 16, rows = MTL_GATED_DELTA_ROWS, steps = MTL_GATED_DELTA_STEPS;
    size_t reals = args->time < MTL_GATED_DELTA_FEW
                       ? (rows + 3) * padded
                       : ((size_t)args->blocks * rows + 5 * steps + 2) * padded + 4 * steps * steps + 2 * steps * rows;
    return reals * (args->in_double ? sizeof(double) : sizeof(float));
}

/* cross_entropy's items are rows, or pieces of one: the sum of 2^(x log2(e) - shift) over its logits but the target. */
typedef struct mtl_logits_piece {
    double shift, sum;
} mtl_logits_piece;

/* Entry points: how an operation's work is cut into items, and which kernel does it. `op` is for messages. */
metalloid_status mtl_cpu_rms_norm(const metalloid_context *context, const char *op, mtl_norm_args *args);
metalloid_status mtl_cpu_layer_norm(const metalloid_context *context, const char *op, mtl_norm_args *args);
metalloid_status mtl_cpu_swiglu(const metalloid_context *context, const char *op, mtl_gated_args *args);
metalloid_status mtl_cpu_geglu(const metalloid_context *context, const char *op, mtl_gated_args *args);
metalloid_status mtl_cpu_rope(const metalloid_context *context, const char *op, mtl_rope_args *args);
metalloid_status mtl_cpu_attention(const metalloid_context *context, const char *op, const mtl_attention_args *given);
metalloid_status mtl_cpu_cross_entropy(const metalloid_context *context, const char *op, mtl_cross_entropy_args *args);
metalloid_status mtl_cpu_gated_delta(const metalloid_context *context, const char *op, mtl_gated_delta_args *args);

#endif
