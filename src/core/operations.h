/* The checked arguments of every operation, as api/ hands them to a backend. SPDX-License-Identifier: MIT
 *
 * Strides are in bytes. An operand whose data is NULL is not there (or the operation is empty and there is nothing to do). */
#ifndef METALLOID_CORE_OPERATIONS_H
#define METALLOID_CORE_OPERATIONS_H

#include "core/tensor.h"

/* The last axis of an operand; a loop beside it gives the start of each row. */
typedef struct mtl_row {
    char *data;
    int64_t stride;
    mtl_dtype dtype;
} mtl_row;

static inline mtl_row mtl_row_of(const mtl_view *view) {
    if (!mtl_present(view) || view->rank == 0) return (mtl_row){view->data, 0, view->rank < 0 ? MTL_F32 : view->dtype};
    return (mtl_row){view->data, view->stride[view->rank - 1], view->dtype};
}

/* How the CPU backend's fast kernels go through a norm: rows where they lie; those too, with the unrounded sums in scratch; or whole rows
 * of reals in scratch. */
typedef enum mtl_norm_layout { MTL_NORM_IN_PLACE, MTL_NORM_SUM_KEPT, MTL_NORM_STAGED } mtl_norm_layout;

/* rms_norm, layer_norm, add_rms_norm, add_layer_norm. */
typedef struct mtl_norm_args {
    mtl_loop rows;  /* operands MTL_NORM_X, _OUT and, where there is a residual, _RESIDUAL, _SUM */
    int64_t length; /* of a row */
    double eps;
    mtl_row x, residual, weight, bias, sum, out;
    DLDevice device;
    bool in_double;
    bool stream; /* the CPU backend's to set: results go past the caches */
    mtl_norm_layout layout;
} mtl_norm_args;

enum { MTL_NORM_X, MTL_NORM_OUT, MTL_NORM_RESIDUAL, MTL_NORM_SUM };

/* swiglu, geglu: elementwise, so that the last axis of the merged loop is the row, cut into runs. */
typedef struct mtl_gated_args {
    mtl_loop rows; /* the outer axes; operands MTL_GATED_GATE, _UP, _OUT */
    int64_t length;
    int64_t runs, run; /* a row is `runs` items of `run` elements, the last perhaps shorter */
    mtl_row gate, up, out;
    bool tanh; /* geglu's approximation */
    DLDevice device;
    bool in_double;
    bool stream;
} mtl_gated_args;

enum { MTL_GATED_GATE, MTL_GATED_UP, MTL_GATED_OUT };

/* Where rope's angles come from. */
typedef struct mtl_rope_angles {
    int64_t dims;
    bool traditional;
    double scale, base;
    mtl_row freqs; /* {dims/2}; data NULL: base */
    bool inverse;  /* freqs are inverse frequencies */
    int64_t offset;
    struct {
        const char *data; /* NULL: offset + t */
        mtl_dtype dtype;
        int64_t batch_stride, time_stride;
        bool each_token; /* position_ids; else a start, to which t is added */
    } positions;
} mtl_rope_angles;

static inline int64_t mtl_rope_position(const mtl_rope_angles *angles, int64_t batch, int64_t time) {
    if (!angles->positions.data) return angles->offset + time;
    const char *at = angles->positions.data + batch * angles->positions.batch_stride;
    if (angles->positions.each_token)
        return mtl_load_integer(at + time * angles->positions.time_stride, angles->positions.dtype);
    return mtl_load_integer(at, angles->positions.dtype) + time;
}

/* One tensor that is rotated. */
typedef struct mtl_rope_side {
    mtl_row x, out, weight; /* weight: qk_norm_rope's */
    int64_t x_batch_stride, x_time_stride, out_batch_stride, out_time_stride;
    mtl_loop heads; /* every other leading axis; operands MTL_ROPE_X, _OUT */
} mtl_rope_side;

enum { MTL_ROPE_X, MTL_ROPE_OUT };

/* rope: one side. qk_norm_rope: two, each head normed before it turns. */
typedef struct mtl_rope_args {
    mtl_rope_angles angles;
    int64_t batch, time, head_dim;
    int sides;
    mtl_rope_side side[2];
    bool normed;
    double eps;
    DLDevice device;
    bool in_double;
    bool stream;
} mtl_rope_args;

/* scaled_dot_product_attention. */
typedef struct mtl_attention_operand {
    char *data;
    mtl_dtype dtype;
    int64_t stride[4]; /* batch, head, time, feature; 0 where broadcast */
} mtl_attention_operand;

typedef struct mtl_attention_args {
    int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim;
    mtl_attention_operand q, k, v, out;
    double scale, softcap; /* softcap 0: none */
    /* Causal and window in one: query i sees keys i + first_visible to i + last_visible. Both within [-q_len, kv_len], where every
     * value does what a further one would. */
    int64_t first_visible, last_visible;
    mtl_attention_operand mask; /* batch, head, query, key */
    struct {
        const char *data;
        mtl_dtype dtype;
        int64_t stride[2]; /* batch, key */
    } key_mask;
    mtl_row sinks;
    struct {
        char *data;
        mtl_dtype dtype;
        int64_t stride[3]; /* batch, head, query */
    } logsumexp;
    struct {
        mtl_attention_operand k,
            v;          /* kv_cache_sdpa_update: q_len keys and values, first copied into k and v; data NULL: none */
        int64_t offset; /* in time */
    } append;
    DLDevice device;
    bool in_double;
    struct { /* how the CPU backend cuts the work: its own to fill in, see cpu/attention.h */
        int64_t group, rows, row_blocks, key_ranges;
        double *states;
    } cut;
} mtl_attention_args;

typedef struct mtl_cross_entropy_args {
    mtl_loop rows; /* operands MTL_CROSS_ENTROPY_LOGITS, _TARGETS, _LOSS */
    int64_t classes;
    mtl_row logits, targets, loss;
    bool has_ignore_index;
    int64_t ignore_index;
    DLDevice device;
    bool in_double;
    struct { /* how the CPU backend cuts rows: its own to fill in, see its entry point */
        int64_t pieces, length;
        struct mtl_logits_piece *done;
        _Atomic int64_t *left; /* pieces of a row that are not done */
    } cut;
} mtl_cross_entropy_args;

enum { MTL_CROSS_ENTROPY_LOGITS, MTL_CROSS_ENTROPY_TARGETS, MTL_CROSS_ENTROPY_LOSS };

/* An operand of up to four axes, with its strides by axis. */
typedef struct mtl_strided {
    char *data; /* NULL: not there */
    mtl_dtype dtype;
    int64_t stride[4];
} mtl_strided;

typedef struct mtl_gated_delta_args {
    int64_t batch, time, k_heads, v_heads, key_dim, value_dim;
    mtl_strided q, k, v, gamma, beta, out; /* batch, time, head, feature; the last is 0 for a head's own gamma */
    mtl_strided initial_state, state;      /* batch, head, value feature, key feature */
    mtl_strided mask;                      /* batch, time */
    DLDevice device;
    int64_t blocks; /* how many an item has; the backend's */
    bool in_double;
} mtl_gated_delta_args;

#endif
