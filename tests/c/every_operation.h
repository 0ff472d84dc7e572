/* One sample call of every operation, small (for the tables of bad arguments) or large (worth several threads and, where the operation
 * needs one, a workspace). Static, so that a program links only the operations that it calls. SPDX-License-Identifier: MIT */
#ifndef METALLOID_TESTS_EVERY_OPERATION_H
#define METALLOID_TESTS_EVERY_OPERATION_H

#include "support.h"

typedef enum sample_size { SMALL, LARGE } sample_size;

static inline operation new_operation(const char *name, metalloid_status (*call)(const operation *)) {
    return (operation){.name = name,
                       .call = call,
                       .eps = 1e-5,
                       .scale = 0.25,
                       .rope = METALLOID_ROPE_OPTIONS_INIT,
                       .attention = METALLOID_ATTENTION_OPTIONS_INIT,
                       .cross_entropy = METALLOID_CROSS_ENTROPY_OPTIONS_INIT};
}

/* ---- norms ---------------------------------------------------------------------------------------------------------- */

static inline metalloid_status call_rms_norm(const operation *op) {
    return metalloid_rms_norm(op->context, op->given[0], op->given[1], op->eps, op->given[2]);
}

static inline metalloid_status call_layer_norm(const operation *op) {
    return metalloid_layer_norm(op->context, op->given[0], op->given[1], op->given[2], op->eps, op->given[3]);
}

static inline metalloid_status call_add_rms_norm(const operation *op) {
    return metalloid_add_rms_norm(op->context, op->given[0], op->given[1], op->given[2], op->eps, op->given[3],
                                  op->given[4]);
}

static inline metalloid_status call_add_layer_norm(const operation *op) {
    return metalloid_add_layer_norm(op->context, op->given[0], op->given[1], op->given[2], op->given[3], op->eps,
                                    op->given[4], op->given[5]);
}

/* `added`: with residual and sum; `centred`: layer norm, with bias. */
static inline operation sample_norm(const char *name, metalloid_status (*call)(const operation *), bool added,
                                    bool centred, sample_size size) {
    operation op = new_operation(name, call);
    const int64_t large[] = {12, 4501}, small[] = {3, 2, 7};
    const int64_t *shape = size == LARGE ? large : small;
    int rank = size == LARGE ? 2 : 3;
    int64_t length = shape[rank - 1];
    int x = takes(&op, "x", new_normal(random_floating(), ROWS, rank, shape), REQUIRED | TAKES_FLOATING);
    unsigned aliases = 1u << x;
    if (added)
        aliases |= 1u << takes(&op, "residual", new_normal(random_floating(), STRIDED, rank, shape),
                               REQUIRED | TAKES_FLOATING);
    takes(&op, "weight", new_normal(random_floating(), ROWS, 1, &length), TAKES_FLOATING);
    if (centred) takes(&op, "bias", new_normal(random_floating(), STRIDED, 1, &length), TAKES_FLOATING);
    if (added) {
        int sum = takes(&op, "sum", new_tensor(F32, ROWS, rank, shape), REQUIRED | WRITTEN | TAKES_FLOATING);
        op.argument[sum].may_be_input = aliases;
    }
    int out = takes(&op, "out", new_tensor(F32, ROWS, rank, shape), REQUIRED | WRITTEN | TAKES_FLOATING);
    op.argument[out].may_be_input = aliases;
    return op;
}

static inline operation sample_rms_norm(sample_size size) {
    return sample_norm("rms_norm", call_rms_norm, false, false, size);
}

static inline operation sample_layer_norm(sample_size size) {
    return sample_norm("layer_norm", call_layer_norm, false, true, size);
}

static inline operation sample_add_rms_norm(sample_size size) {
    return sample_norm("add_rms_norm", call_add_rms_norm, true, false, size);
}

static inline operation sample_add_layer_norm(sample_size size) {
    return sample_norm("add_layer_norm", call_add_layer_norm, true, true, size);
}

/* ---- gated activations ---------------------------------------------------------------------------------------------- */

static inline metalloid_status call_swiglu(const operation *op) {
    return metalloid_swiglu(op->context, op->given[0], op->given[1], op->given[2]);
}

static inline metalloid_status call_geglu(const operation *op) {
    return metalloid_geglu(op->context, op->given[0], op->given[1], op->gelu, op->given[2]);
}

static inline operation sample_gated(const char *name, metalloid_status (*call)(const operation *), sample_size size) {
    operation op = new_operation(name, call);
    const int64_t large[] = {3, 13, 1000}, small[] = {2, 3, 5}, *shape = size == LARGE ? large : small;
    takes(&op, "gate", new_normal(random_floating(), STRIDED, 3, shape), REQUIRED | TAKES_FLOATING);
    takes(&op, "up", new_normal(random_floating(), ROWS, 3, shape), REQUIRED | TAKES_FLOATING);
    int out = takes(&op, "out", new_tensor(F32, ROWS, 3, shape), REQUIRED | WRITTEN | TAKES_FLOATING);
    op.argument[out].may_be_input = 3;
    return op;
}

static inline operation sample_swiglu(sample_size size) { return sample_gated("swiglu", call_swiglu, size); }

static inline operation sample_geglu(sample_size size) { return sample_gated("geglu", call_geglu, size); }

/* ---- rope ----------------------------------------------------------------------------------------------------------- */

/* Arguments 1 to 4 of rope, 4 to 7 of qk_norm_rope. */
static inline void rope_tensors_taken(operation *op, int64_t batch, int64_t time, int64_t pairs, bool inverse,
                                      bool each_token) {
    takes(op, "freqs", inverse ? NULL : new_tensor(random_floating(), ROWS, 1, &pairs), TAKES_FLOATING | TAKES_INTEGER);
    takes(op, "inv_freqs", inverse ? new_tensor(random_floating(), STRIDED, 1, &pairs) : NULL,
          TAKES_FLOATING | TAKES_INTEGER);
    fill_uniform(op->argument[op->count - (inverse ? 1 : 2)].tensor, 0.5, 4);
    takes(op, "offsets", each_token ? NULL : new_tensor(random_integer(), ROWS, 1, &batch),
          TAKES_INTEGER | RANK_MAY_DROP);
    takes(op, "position_ids", each_token ? new_tensor(random_integer(), STRIDED, SHAPE(batch, time)) : NULL,
          TAKES_INTEGER);
    fill_integers(op->argument[op->count - (each_token ? 1 : 2)].tensor, 0, 100);
    op->rope.base = 0;
}

static inline metalloid_rope_options rope_options_of(const operation *op, int first) {
    metalloid_rope_options options = op->rope;
    options.freqs = op->given[first];
    options.inv_freqs = op->given[first + 1];
    options.offsets = op->given[first + 2];
    options.position_ids = op->given[first + 3];
    return options;
}

static inline metalloid_status call_rope(const operation *op) {
    metalloid_rope_options options = rope_options_of(op, 1);
    return metalloid_rope(op->context, op->given[0], op->dims, op->no_options ? NULL : &options, op->given[5]);
}

static inline operation sample_rope_with(sample_size size, bool inverse, bool each_token) {
    operation op = new_operation("rope", call_rope);
    int64_t batch = 3, heads = size == LARGE ? 8 : 2, time = size == LARGE ? 33 : 5, head_dim = size == LARGE ? 128 : 8;
    op.dims = head_dim - 2;
    takes(&op, "x", new_normal(random_floating(), ROWS, SHAPE(batch, heads, time, head_dim)),
          REQUIRED | TAKES_FLOATING);
    rope_tensors_taken(&op, batch, time, op.dims / 2, inverse, each_token);
    int out = takes(&op, "out", new_tensor(F32, ROWS, SHAPE(batch, heads, time, head_dim)),
                    REQUIRED | WRITTEN | TAKES_FLOATING);
    op.argument[out].may_be_input = 1;
    return op;
}

static inline operation sample_rope(sample_size size) { return sample_rope_with(size, false, true); }

static inline metalloid_status call_qk_norm_rope(const operation *op) {
    metalloid_rope_options options = rope_options_of(op, 4);
    return metalloid_qk_norm_rope(op->context, op->given[0], op->given[1], op->given[2], op->given[3], op->eps,
                                  op->dims, op->no_options ? NULL : &options, op->given[8], op->given[9]);
}

static inline operation sample_qk_norm_rope_with(sample_size size, bool inverse, bool each_token) {
    operation op = new_operation("qk_norm_rope", call_qk_norm_rope);
    int64_t batch = 3, time = size == LARGE ? 33 : 5, head_dim = size == LARGE ? 128 : 8;
    int64_t q_heads = size == LARGE ? 8 : 4, kv_heads = 2;
    op.dims = head_dim - 2;
    takes(&op, "q", new_normal(random_floating(), ROWS, SHAPE(batch, q_heads, time, head_dim)),
          REQUIRED | TAKES_FLOATING);
    takes(&op, "k", new_normal(random_floating(), ROWS, SHAPE(batch, kv_heads, time, head_dim)),
          REQUIRED | TAKES_FLOATING);
    takes(&op, "q_weight", new_normal(random_floating(), ROWS, 1, &head_dim), TAKES_FLOATING);
    takes(&op, "k_weight", new_normal(random_floating(), STRIDED, 1, &head_dim), TAKES_FLOATING);
    rope_tensors_taken(&op, batch, time, op.dims / 2, inverse, each_token);
    int q = takes(&op, "q_out", new_tensor(F32, ROWS, SHAPE(batch, q_heads, time, head_dim)),
                  REQUIRED | WRITTEN | TAKES_FLOATING);
    int k = takes(&op, "k_out", new_tensor(F32, ROWS, SHAPE(batch, kv_heads, time, head_dim)),
                  REQUIRED | WRITTEN | TAKES_FLOATING);
    op.argument[q].may_be_input = 1;
    op.argument[k].may_be_input = 2;
    return op;
}

static inline operation sample_qk_norm_rope(sample_size size) { return sample_qk_norm_rope_with(size, false, true); }

/* ---- attention ------------------------------------------------------------------------------------------------------ */

static inline metalloid_status call_attention(const operation *op) {
    metalloid_attention_options options = op->attention;
    options.mask = op->given[3];
    options.key_mask = op->given[4];
    options.sinks = op->given[5];
    options.logsumexp = op->given[6];
    return metalloid_scaled_dot_product_attention(op->context, op->given[0], op->given[1], op->given[2], op->scale,
                                                  op->no_options ? NULL : &options, op->given[7]);
}

static inline operation sample_attention_with(sample_size size, element_type mask) {
    operation op = new_operation("scaled_dot_product_attention", call_attention);
    int64_t batch = 2, kv_heads = 2, q_heads = 4, q_len = size == LARGE ? 66 : 3, kv_len = size == LARGE ? 130 : 5;
    int64_t head_dim = size == LARGE ? 80 : 6, value_dim = size == LARGE ? 64 : 7;
    takes(&op, "q", new_normal(F16, ROWS, SHAPE(batch, q_heads, q_len, head_dim)), REQUIRED | TAKES_FLOATING);
    takes(&op, "k", new_normal(F32, ROWS, SHAPE(batch, kv_heads, kv_len, head_dim)), REQUIRED | TAKES_FLOATING);
    takes(&op, "v", new_normal(BF16, STRIDED, SHAPE(batch, kv_heads, kv_len, value_dim)), REQUIRED | TAKES_FLOATING);
    int m = takes(&op, "mask", new_tensor(mask, ROWS, SHAPE(batch, q_heads, q_len, kv_len)),
                  TAKES_FLOATING | TAKES_INTEGER | TAKES_BOOL);
    fill_integers(op.argument[m].tensor, 0, 1);
    int key_mask = takes(&op, "key_mask", new_tensor(BOOL, ROWS, SHAPE(batch, kv_len)), TAKES_INTEGER | TAKES_BOOL);
    fill_integers(op.argument[key_mask].tensor, 0, 1);
    takes(&op, "sinks", new_normal(F16, ROWS, SHAPE(q_heads)), TAKES_FLOATING);
    takes(&op, "logsumexp", new_tensor(F32, STRIDED, SHAPE(batch, q_heads, q_len)), WRITTEN | TAKES_FLOATING);
    takes(&op, "out", new_tensor(F32, ROWS, SHAPE(batch, q_heads, q_len, value_dim)),
          REQUIRED | WRITTEN | TAKES_FLOATING);
    return op;
}

static inline operation sample_attention(sample_size size) { return sample_attention_with(size, F16); }

static inline metalloid_status call_kv_cache(const operation *op) {
    return metalloid_kv_cache_sdpa_update(op->context, op->given[0], op->given[1], op->given[2], op->given[3],
                                          op->given[4], op->offset, op->given[5], op->scale, op->given[6]);
}

static inline operation sample_kv_cache(sample_size size) {
    operation op = new_operation("kv_cache_sdpa_update", call_kv_cache);
    int64_t batch = 2, kv_heads = 2, q_heads = 4, q_len = size == LARGE ? 40 : 3, longest = size == LARGE ? 200 : 7;
    int64_t head_dim = size == LARGE ? 64 : 6, value_dim = size == LARGE ? 48 : 5;
    op.offset = 2;
    takes(&op, "q", new_normal(F32, ROWS, SHAPE(batch, q_len, q_heads, head_dim)), REQUIRED | TAKES_FLOATING);
    takes(&op, "new_k", new_normal(F16, ROWS, SHAPE(batch, q_len, kv_heads, head_dim)), REQUIRED | TAKES_FLOATING);
    takes(&op, "new_v", new_normal(BF16, ROWS, SHAPE(batch, q_len, kv_heads, value_dim)), REQUIRED | TAKES_FLOATING);
    takes(&op, "k_cache", new_normal(F16, ROWS, SHAPE(batch, longest, kv_heads, head_dim)),
          REQUIRED | WRITTEN | TAKES_FLOATING);
    takes(&op, "v_cache", new_normal(BF16, ROWS, SHAPE(batch, longest, kv_heads, value_dim)),
          REQUIRED | WRITTEN | TAKES_FLOATING);
    int key_mask = takes(&op, "key_mask", new_tensor(I32, ROWS, SHAPE(batch, longest)), TAKES_INTEGER | TAKES_BOOL);
    fill_integers(op.argument[key_mask].tensor, 0, 2);
    takes(&op, "out", new_tensor(F32, ROWS, SHAPE(batch, q_heads, q_len, value_dim)),
          REQUIRED | WRITTEN | TAKES_FLOATING);
    return op;
}

/* ---- cross entropy -------------------------------------------------------------------------------------------------- */

static inline metalloid_status call_cross_entropy(const operation *op) {
    return metalloid_cross_entropy(op->context, op->given[0], op->given[1], op->no_options ? NULL : &op->cross_entropy,
                                   op->given[2]);
}

static inline operation sample_cross_entropy(sample_size size) {
    operation op = new_operation("cross_entropy", call_cross_entropy);
    int64_t rows = size == LARGE ? 9 : 3, classes = size == LARGE ? 3000 : 7;
    int logits = takes(&op, "logits", new_normal(F16, STRIDED, SHAPE(2, rows, classes)), REQUIRED | TAKES_FLOATING);
    op.argument[logits].free_axes = 1 << 2;
    int targets = takes(&op, "targets", new_tensor(I64, ROWS, SHAPE(2, rows)), REQUIRED | TAKES_INTEGER);
    fill_integers(op.argument[targets].tensor, 0, classes - 1);
    takes(&op, "loss", new_tensor(F32, ROWS, SHAPE(2, rows)), REQUIRED | WRITTEN | TAKES_FLOATING);
    return op;
}

/* ---- gated delta rule ----------------------------------------------------------------------------------------------- */

static inline metalloid_status call_gated_delta(const operation *op) {
    return metalloid_gated_delta_update(op->context, op->given[0], op->given[1], op->given[2], op->given[3],
                                        op->given[4], op->given[5], op->given[6], op->given[7], op->given[8]);
}

static inline operation sample_gated_delta(sample_size size) {
    operation op = new_operation("gated_delta_update", call_gated_delta);
    int64_t batch = 2, time = size == LARGE ? 70 : 3, k_heads = 2, v_heads = 4;
    int64_t key_dim = size == LARGE ? 32 : 5, value_dim = size == LARGE ? 48 : 6;
    takes(&op, "q", new_normal(F32, ROWS, SHAPE(batch, time, k_heads, key_dim)), REQUIRED | TAKES_FLOATING);
    int k = takes(&op, "k", new_tensor(F16, ROWS, SHAPE(batch, time, k_heads, key_dim)), REQUIRED | TAKES_FLOATING);
    fill_uniform(op.argument[k].tensor, -0.1, 0.1);
    takes(&op, "v", new_normal(BF16, ROWS, SHAPE(batch, time, v_heads, value_dim)), REQUIRED | TAKES_FLOATING);
    int gamma = takes(&op, "gamma", new_tensor(F32, STRIDED, SHAPE(batch, time, v_heads, key_dim)),
                      REQUIRED | TAKES_FLOATING | RANK_MAY_DROP);
    fill_uniform(op.argument[gamma].tensor, 0.5, 1);
    int beta = takes(&op, "beta", new_tensor(F16, ROWS, SHAPE(batch, time, v_heads)), REQUIRED | TAKES_FLOATING);
    fill_uniform(op.argument[beta].tensor, 0, 1);
    int initial =
        takes(&op, "initial_state", new_normal(F32, ROWS, SHAPE(batch, v_heads, value_dim, key_dim)), TAKES_FLOATING);
    int mask = takes(&op, "mask", new_tensor(BOOL, ROWS, SHAPE(batch, time)), TAKES_INTEGER | TAKES_BOOL);
    fill_integers(op.argument[mask].tensor, 0, 1);
    takes(&op, "out", new_tensor(F32, ROWS, SHAPE(batch, time, v_heads, value_dim)),
          REQUIRED | WRITTEN | TAKES_FLOATING);
    int state = takes(&op, "state", new_tensor(F32, ROWS, SHAPE(batch, v_heads, value_dim, key_dim)),
                      REQUIRED | WRITTEN | TAKES_FLOATING);
    op.argument[state].may_be_input = 1u << initial;
    return op;
}

/* ---- all of them ---------------------------------------------------------------------------------------------------- */

enum { OPERATIONS = 12 };

static inline void sample_every_operation(operation all[OPERATIONS], sample_size size) {
    operation (*const sample[OPERATIONS])(sample_size) = {
        sample_rms_norm,     sample_layer_norm, sample_add_rms_norm,  sample_add_layer_norm,
        sample_swiglu,       sample_geglu,      sample_rope,          sample_attention,
        sample_qk_norm_rope, sample_kv_cache,   sample_cross_entropy, sample_gated_delta,
    };
    for (int i = 0; i < OPERATIONS; i++) all[i] = sample[i](size);
}

#endif
