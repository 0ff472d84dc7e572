/* How attention's work is cut, and how its partial results come together. SPDX-License-Identifier: MIT
 *
 * The queries of all heads that share a key/value head form one list, by query first: row r is query r / group of the group's head
 * r % group. A block of rows attends to its keys block by block, so that a key or value is read once for the whole block. An item
 * is a block of rows and a range of its keys. Results do not depend on the thread count.
 *
 * A row's state is three things, kept in double, whatever the kernel computes in: the largest score so far, -infinity before the
 * first visible key; the sum of exp(score - largest); and the sum of exp(score - largest) v. Softmax and its normalizer follow from
 * it for any part of the keys, and two states combine into one (Milakov & Gimelshein 2018, arXiv:1805.02867). */
#ifndef METALLOID_CPU_ATTENTION_H
#define METALLOID_CPU_ATTENTION_H

#include "cpu/kernels.h"

#include <float.h>

enum {
    MTL_ATTENTION_ROWS = 192,  /* of a block, at most: the more, the less it costs to bring keys and values in */
    MTL_ATTENTION_TILE = 12,   /* a block has a multiple of so many rows, unless it has all of them */
    MTL_ATTENTION_FEW = 8,     /* with so many rows, all in one block, a kernel may take keys and values as they lie */
    MTL_ATTENTION_KEYS = 128,  /* of a block */
    MTL_ATTENTION_RANGES = 64, /* of keys, at most, for a block of rows */
    MTL_ATTENTION_LANES = 32,  /* kernels may pad staged rows to a multiple of this */
};

/* state[MTL_STATE_VALUES + d] is the sum of feature d of the values. */
enum { MTL_STATE_LARGEST, MTL_STATE_SUM, MTL_STATE_VALUES };

static inline int64_t mtl_attention_padded(int64_t length) {
    return (length + MTL_ATTENTION_LANES - 1) / MTL_ATTENTION_LANES * MTL_ATTENTION_LANES;
}

typedef struct mtl_attention_item {
    int64_t batch, kv_head;
    int64_t first_row, rows;
    int64_t first_key, end_key;
    double *
        states; /* where the item's states go, row by row, to be combined; NULL: it has all keys and finishes its rows */
} mtl_attention_item;

mtl_attention_item mtl_attention_item_at(const mtl_attention_args *args, int64_t index);

static inline int64_t mtl_attention_query(const mtl_attention_args *args, int64_t row) { return row / args->cut.group; }
static inline int64_t mtl_attention_head(const mtl_attention_args *args, int64_t kv_head, int64_t row) {
    return kv_head * args->cut.group + row % args->cut.group;
}

static inline bool mtl_attention_is_few(const mtl_attention_args *args) { return args->cut.rows <= MTL_ATTENTION_FEW; }

static inline int64_t mtl_attention_state_length(const mtl_attention_args *args) {
    return MTL_STATE_VALUES + args->value_dim;
}

/* Where the states of a block's range of keys begin. */
static inline double *mtl_attention_states(const mtl_attention_args *args, int64_t row_block, int64_t range) {
    return args->cut.states +
           (row_block * args->cut.key_ranges + range) * args->cut.rows * mtl_attention_state_length(args);
}

/* Whether all scores of a row are alike and weigh nothing: what is asked for is the number of keys that it sees. */
static inline bool mtl_attention_is_counting(const mtl_attention_args *args) {
    return args->head_dim == 0 && args->value_dim == 0 && !args->key_mask.data &&
           (!args->mask.data || args->mask.stride[3] == 0);
}

#endif
