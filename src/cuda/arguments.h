/* What host code hands to kernels: plain structs that C and CUDA C++ read alike. SPDX-License-Identifier: MIT
 *
 * Strides are in bytes. dtypes are those of core/dtype.h, by value. */
#ifndef METALLOID_CUDA_ARGUMENTS_H
#define METALLOID_CUDA_ARGUMENTS_H

#include <stdint.h>

enum { MTL_CUDA_AXES = 6, MTL_CUDA_OPERANDS = 4 };

typedef struct mtl_cuda_loop {
    int rank;
    int64_t count; /* iterations */
    int64_t shape[MTL_CUDA_AXES];
    int64_t stride[MTL_CUDA_AXES][MTL_CUDA_OPERANDS];
} mtl_cuda_loop;

typedef struct mtl_cuda_row {
    char *data; /* NULL: not there */
    int64_t stride;
    int dtype;
} mtl_cuda_row;

/* rms_norm, layer_norm and their fusions with an addition; loop operands as in core/operations.h. */
typedef struct mtl_cuda_norm_args {
    mtl_cuda_loop rows;
    int64_t length;
    double eps;
    float eps_in_float, per_length; /* 1 / length */
    mtl_cuda_row x, residual, weight, bias, sum, out;
} mtl_cuda_norm_args;

/* swiglu, geglu. */
typedef struct mtl_cuda_gated_args {
    mtl_cuda_loop rows;
    int64_t length;
    int64_t first_row; /* that blocks of y = 0 do */
    mtl_cuda_row gate, up, out;
    int tanh;
} mtl_cuda_gated_args;

typedef struct mtl_cuda_rope_side {
    mtl_cuda_loop heads; /* in the fast kernel: groups of heads, a block's each */
    mtl_cuda_row x, out, weight;
    int64_t x_batch_stride, x_time_stride, out_batch_stride, out_time_stride;
    int64_t x_step, out_step; /* from head to head in a group */
    int heads_in_row;         /* of the loop's last axis, which no group leaves */
} mtl_cuda_rope_side;

typedef struct mtl_cuda_rope_args {
    mtl_cuda_rope_side side[2];
    int sides, traditional, normed, inverse, each_token, positions_dtype;
    int log2_steps, heads_a_thread;   /* the time steps of a block */
    int64_t first_group, first_batch; /* of blocks of y = 0, of z = 0 */
    int64_t batch, time, head_dim, dims;
    double scale, log2_ratio, eps; /* the ratio of a pair's inverse frequency to the one before */
    float eps_in_float, per_head_dim;
    mtl_cuda_row freqs;
    int64_t offset;
    const char *positions;
    int64_t position_batch_stride, position_time_stride;
} mtl_cuda_rope_args;

typedef struct mtl_cuda_cross_entropy_args {
    mtl_cuda_loop rows;
    int64_t classes;
    mtl_cuda_row logits, targets, loss;
    int64_t ignore_index;
    int has_ignore_index;
} mtl_cuda_cross_entropy_args;

typedef struct mtl_cuda_strided {
    char *data;
    int dtype;
    int64_t stride[4];
} mtl_cuda_strided;

/* scaled_dot_product_attention. The queries of all heads that share a key/value head form one list, by query first: row
 * r is query r / group of the group's head r % group. */
typedef struct mtl_cuda_attention_args {
    int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, group;
    mtl_cuda_strided q, k, v, out, mask, key_mask; /* key_mask: batch, key */
    mtl_cuda_row sinks;
    mtl_cuda_strided logsumexp; /* batch, head, query */
    float scale, softcap;
    int64_t first_visible, last_visible; /* query i sees keys i + first_visible to i + last_visible */
    /* Where keys are split: a range's normalized sums, of each row of the batch and key/value head, and their weight in
     * two factors, exp(part_logs) part_sums, which no large score makes coarse. */
    int64_t split_keys; /* of a range */
    int splits;
    int heads_a_turn; /* key/value heads whose blocks are launched together: see attention.cuh's turn_of_block */
    float *parts, *part_logs, *part_sums;
} mtl_cuda_attention_args;

/* The same with q, k and v as the copy engine wants them described: a CUtensorMap each. */
typedef struct mtl_cuda_attention_hopper_args {
    __attribute__((aligned(64))) unsigned char q_map[128], k_map[128], v_map[128], mask_map[128];
    mtl_cuda_attention_args attention;
    int stages;      /* of tiles on their way, in decoding */
    int mask_stages; /* of a mask's tiles, in prefill; 0: there is no mask */
    unsigned items;  /* of rows, in prefill */
    int by_heads;    /* whether they come a head at a time, or those with most to do first, of all heads */
    unsigned *next;  /* which of them comes after each block's first: NULL where they are dealt out */
} mtl_cuda_attention_hopper_args;

/* What kv_cache_sdpa_update writes into the cache first; a mask into rows that the copy engine can read. */
typedef struct mtl_cuda_append_args {
    mtl_cuda_strided from, to;           /* batch, head, time, feature */
    int64_t rows, heads, time, features; /* rows: of all batches, times and heads */
    int size;                            /* of an element: 1, 2 or 4 bytes */
} mtl_cuda_append_args;

typedef struct mtl_cuda_gated_delta_args {
    int64_t batch, time, k_heads, v_heads, key_dim, value_dim;
    mtl_cuda_strided q, k, v, gamma, beta, out, initial_state, state, mask;
} mtl_cuda_gated_delta_args;

/* The same in chunks of MTL_CUDA_CHUNK steps. An item is a chunk of a value head: what of it depends on no state. */
enum { MTL_CUDA_CHUNK = 64, MTL_CUDA_STAGES = 3 /* at most: chunks on their way */, MTL_CUDA_SIGNALS = 64 /* bytes */ };

typedef struct mtl_cuda_gated_delta_decays {
    float from_beginning[MTL_CUDA_CHUNK]; /* of the chunk to each step; NaN where only steps give what the rule says */
    float to_end[MTL_CUDA_CHUNK], gamma[MTL_CUDA_CHUNK], beta[MTL_CUDA_CHUNK];
} mtl_cuda_gated_delta_decays;

typedef struct mtl_cuda_gated_delta_chunks_args {
    mtl_cuda_gated_delta_args delta;
    int64_t chunks;
    char *matrices; /* of an item: four squares of 16-bit numbers */
    char *keys;     /* of a chunk of a key head, where q and k are not bfloat16: both as sums of two that are */
    mtl_cuda_gated_delta_decays *decays; /* of an item */
    unsigned *live;                      /* of an item: a bit to a step */
    int stages, stage_bytes;
    int v_copies, out_copies; /* v, out are of q's type and fit for 16 bytes at once */
} mtl_cuda_gated_delta_chunks_args;

#endif
