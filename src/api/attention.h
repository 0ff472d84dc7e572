/* What scaled_dot_product_attention and kv_cache_sdpa_update share of their checks. SPDX-License-Identifier: MIT */
#ifndef METALLOID_API_ATTENTION_H
#define METALLOID_API_ATTENTION_H

#include "core/operations.h"

/* A view of rank 4, {B, N, T, D} or {B, T, N, D}: head_axis is 1 or 2, the time axis the other one. */
mtl_attention_operand mtl_attention_operand_of(const mtl_view *view, int head_axis);
void mtl_attention_set_key_mask(mtl_attention_args *args, const mtl_view *key_mask);

metalloid_status mtl_attention_check_heads(int64_t q_heads, int64_t kv_heads, const char *op);
metalloid_status mtl_attention_check_scale(double scale, const char *op);

#endif
