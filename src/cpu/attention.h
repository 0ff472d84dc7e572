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
    MTL_ATTENTION_ROWS = 192, /* of a block, at most: the more, the less it costs to bring keys and values in */
    MTL_ATTENTION_TILE = 12,  /* a block has a multiple of so many rows, unless it has all of them */
    MTL_ATTENTION_FEW = 8,    /* with so many rows, all in one block, a kernel may take keys and values as they lie */
    MTL_ATTENTION_KEYS = 128, /* of a block */
    MTL_ATTENTION_LANES = 32, /* kernels may pad staged rows to a multiple of this */
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

/* x exp(difference), where a factor of 0 drops what it multiplies, infinities too: the weight of such a key has underflowed. */
static inline double mtl_attention_rescale(double x, double factor) {
    return factor == 0 && !isnan(x) ? 0 : x * factor;
}

/* The state's sums, in terms of a larger `largest`. */
void mtl_attention_raise(double *state, int64_t length, double largest);

/* Adds the sink to a row's state and writes its output and logsumexp. */
void mtl_attention_finish(const mtl_attention_args *args, int64_t batch, int64_t kv_head, int64_t row, double *state);

#endif
