/* kv_cache_sdpa_update: attention over a cache that this call extends. SPDX-License-Identifier: MIT */
#include "api/attention.h"
#include "api/backend.h"

static const char op[] = "kv_cache_sdpa_update";

static metalloid_status check_same_dtype(const mtl_view *rows, const mtl_view *cache) {
    MTL_REQUIRE(rows->dtype == cache->dtype, op, "%s must be %s as %s is, got %s", rows->name,
                mtl_dtype_name(cache->dtype), cache->name, mtl_dtype_name(rows->dtype));
    return METALLOID_OK;
}

metalloid_status metalloid_kv_cache_sdpa_update(metalloid_context *context, const DLTensor *q_tensor,
                                                const DLTensor *new_k_tensor, const DLTensor *new_v_tensor,
                                                DLTensor *k_cache_tensor, DLTensor *v_cache_tensor, int64_t offset,
                                                const DLTensor *key_mask_tensor, double scale, DLTensor *out_tensor) {
    mtl_view q, new_k, new_v, k_cache, v_cache, key_mask, out;
    MTL_TRY(mtl_view_required(&q, q_tensor, op, "q", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&new_k, new_k_tensor, op, "new_k", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&new_v, new_v_tensor, op, "new_v", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&k_cache, k_cache_tensor, op, "k_cache", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&v_cache, v_cache_tensor, op, "v_cache", MTL_FLOATING));
    MTL_TRY(mtl_view_optional(&key_mask, key_mask_tensor, op, "key_mask", MTL_INTEGER | MTL_BOOLEAN));
    MTL_TRY(mtl_view_required(&out, out_tensor, op, "out", MTL_FLOATING));

    MTL_TRY(mtl_check_rank(&q, op, 4, 4));
    int64_t batch = q.shape[0], q_len = q.shape[1], q_heads = q.shape[2], head_dim = q.shape[3];
    MTL_TRY(mtl_check_shape(&k_cache, op, 4, (int64_t[]){batch, -1, -1, head_dim}));
    int64_t kv_len = k_cache.shape[1], kv_heads = k_cache.shape[2];
    MTL_TRY(mtl_check_shape(&v_cache, op, 4, (int64_t[]){batch, kv_len, kv_heads, -1}));
    int64_t value_dim = v_cache.shape[3];
    MTL_TRY(mtl_check_shape(&new_k, op, 4, (int64_t[]){batch, q_len, kv_heads, head_dim}));
    MTL_TRY(mtl_check_shape(&new_v, op, 4, (int64_t[]){batch, q_len, kv_heads, value_dim}));
    MTL_TRY(mtl_check_shape(&out, op, 4, (int64_t[]){batch, q_heads, q_len, value_dim}));
    if (mtl_present(&key_mask)) MTL_TRY(mtl_check_shape(&key_mask, op, 2, (int64_t[]){batch, kv_len}));
    MTL_TRY(mtl_attention_check_heads(q_heads, kv_heads, op));
    MTL_TRY(check_same_dtype(&new_k, &k_cache));
    MTL_TRY(check_same_dtype(&new_v, &v_cache));
    MTL_REQUIRE(q_len <= kv_len, op, "new_k must have at most the %lld time steps of k_cache, got %lld",
                (long long)kv_len, (long long)q_len);
    MTL_REQUIRE(offset >= 0 && offset <= kv_len - q_len, op,
                "offset must lie in [0, %lld], so that the new keys fit the cache, got %lld",
                (long long)(kv_len - q_len), (long long)offset);
    MTL_TRY(mtl_attention_check_scale(scale, op));

    DLDevice device;
    const mtl_view *all[] = {&q, &new_k, &new_v, &k_cache, &v_cache, &key_mask, &out};
    MTL_TRY(mtl_check_device(all, 7, op, &device));
    const mtl_view *outputs[] = {&k_cache, &v_cache, &out}, *inputs[] = {&q, &new_k, &new_v, &key_mask};
    MTL_TRY(mtl_check_overlap(outputs, 3, inputs, 4, NULL, op));
    if (new_k.elements == 0 && new_v.elements == 0 && out.elements == 0) return METALLOID_OK;

    mtl_attention_args args = {
        .batch = batch,
        .q_heads = q_heads,
        .kv_heads = kv_heads,
        .q_len = q_len,
        .kv_len = kv_len,
        .head_dim = head_dim,
        .value_dim = value_dim,
        .q = mtl_attention_operand_of(&q, 2),
        .k = mtl_attention_operand_of(&k_cache, 2),
        .v = mtl_attention_operand_of(&v_cache, 2),
        .out = mtl_attention_operand_of(&out, 1),
        .scale = scale,
        .first_visible = -q_len,
        .last_visible = q_len > 1 ? offset : kv_len, /* one query sees every key that key_mask allows */
        .append = {mtl_attention_operand_of(&new_k, 2), mtl_attention_operand_of(&new_v, 2), offset},
        .device = device,
        .in_double = mtl_any_double(all, 7)};
    mtl_attention_set_key_mask(&args, &key_mask);
    return MTL_RUN(attention, context, op, &args);
}
