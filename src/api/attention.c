/* scaled_dot_product_attention. SPDX-License-Identifier: MIT */
#include "api/attention.h"
#include "api/backend.h"
#include "core/options.h"

static const char op_name[] = "scaled_dot_product_attention";

/* ---- shared with kv_cache_sdpa_update ----------------------------------------------------------------------------- */

/* An empty operand is never read. It still gets an address and no strides, which keeps the arithmetic on addresses defined. */
static char nothing[8];

mtl_attention_operand mtl_attention_operand_of(const mtl_view *view, int head_axis) {
    if (view->elements == 0) return (mtl_attention_operand){nothing, view->dtype, {0, 0, 0, 0}};
    return (mtl_attention_operand){
        view->data,
        view->dtype,
        {view->stride[0], view->stride[head_axis], view->stride[3 - head_axis], view->stride[3]}};
}

void mtl_attention_set_key_mask(mtl_attention_args *args, const mtl_view *key_mask) {
    if (!mtl_present(key_mask) || key_mask->elements == 0) return;
    args->key_mask.data = key_mask->data;
    args->key_mask.dtype = key_mask->dtype;
    args->key_mask.stride[0] = key_mask->stride[0];
    args->key_mask.stride[1] = key_mask->stride[1];
}

metalloid_status mtl_attention_check_heads(int64_t q_heads, int64_t kv_heads, const char *op) {
    MTL_REQUIRE(kv_heads ? q_heads % kv_heads == 0 : q_heads == 0, op,
                "the heads of q must be a multiple of the key/value heads, got %lld and %lld", (long long)q_heads,
                (long long)kv_heads);
    return METALLOID_OK;
}

metalloid_status mtl_attention_check_scale(double scale, const char *op) {
    MTL_REQUIRE(isfinite(scale), op, "scale must be finite, got %g", scale);
    return METALLOID_OK;
}

/* ---- the options -------------------------------------------------------------------------------------------------- */

static int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

static metalloid_status set_visible(mtl_attention_args *args, const metalloid_attention_options *options) {
    MTL_REQUIRE(options->window >= 0, op_name, "window must be 1 or more, or 0 for none, got %lld",
                (long long)options->window);
    int64_t lowest = -args->q_len, highest = args->kv_len, offset = options->causal_offset, first;
    if (offset == METALLOID_CAUSAL_OFFSET_DEFAULT) offset = args->kv_len - args->q_len;
    args->first_visible = lowest;
    args->last_visible = highest;
    if (mtl_option_flag(&options->causal) || options->window) args->last_visible = clamp(offset, lowest, highest);
    if (options->window) {
        bool overflow = __builtin_sub_overflow(offset, options->window - 1, &first);
        args->first_visible = overflow ? lowest : clamp(first, lowest, highest);
    }
    return METALLOID_OK;
}

static metalloid_status set_mask(mtl_attention_args *args, const mtl_view *mask) {
    const int64_t target[4] = {args->batch, args->q_heads, args->q_len, args->kv_len};
    if (!mtl_present(mask)) return METALLOID_OK;
    MTL_TRY(mtl_check_rank(mask, op_name, 0, 4));
    for (int axis = 0; axis < mask->rank; axis++) {
        int64_t wanted = target[4 - mask->rank + axis], got = mask->shape[axis];
        MTL_REQUIRE(got == 1 || got == wanted, op_name,
                    "mask must broadcast to {%lld, %lld, %lld, %lld}: its axis %d must have extent 1 or %lld, got %lld",
                    (long long)target[0], (long long)target[1], (long long)target[2], (long long)target[3], axis,
                    (long long)wanted, (long long)got);
    }
    if (mask->elements == 0) return METALLOID_OK;
    args->mask.data = mask->data;
    args->mask.dtype = mask->dtype;
    for (int axis = 0; axis < mask->rank; axis++)
        args->mask.stride[4 - mask->rank + axis] = mask->stride[axis]; /* 0 at extent 1 */
    return METALLOID_OK;
}

/* A floating mask and the sinks may be narrower than q, k, v, but must not ask for wider arithmetic. */
static metalloid_status check_promotes(const mtl_view *view, mtl_dtype dtype) {
    if (!mtl_present(view) || !(MTL_FLOATING >> view->dtype & 1)) return METALLOID_OK;
    MTL_REQUIRE(mtl_promote(view->dtype, dtype) == dtype, op_name,
                "%s must have a dtype that promotes to %s, that of q, k and v, got %s", view->name,
                mtl_dtype_name(dtype), mtl_dtype_name(view->dtype));
    return METALLOID_OK;
}

/* ---- the call ----------------------------------------------------------------------------------------------------- */

metalloid_status metalloid_scaled_dot_product_attention(metalloid_context *context, const DLTensor *q_tensor,
                                                        const DLTensor *k_tensor, const DLTensor *v_tensor,
                                                        double scale, const metalloid_attention_options *given,
                                                        DLTensor *out_tensor) {
    const metalloid_attention_options defaults = METALLOID_ATTENTION_OPTIONS_INIT;
    metalloid_attention_options options;
    MTL_TRY(mtl_options_read(&options, &defaults, sizeof options, given, op_name));

    mtl_view q, k, v, mask, key_mask, sinks, out, logsumexp;
    MTL_TRY(mtl_view_required(&q, q_tensor, op_name, "q", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&k, k_tensor, op_name, "k", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&v, v_tensor, op_name, "v", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&out, out_tensor, op_name, "out", MTL_FLOATING));
    MTL_TRY(mtl_view_optional(&mask, options.mask, op_name, "mask", MTL_REAL | MTL_BOOLEAN));
    MTL_TRY(mtl_view_optional(&key_mask, options.key_mask, op_name, "key_mask", MTL_INTEGER | MTL_BOOLEAN));
    MTL_TRY(mtl_view_optional(&sinks, options.sinks, op_name, "sinks", MTL_FLOATING));
    const mtl_view *floating[] = {&q, &k, &v, &out};
    bool in_double = mtl_any_double(floating, 4);
    MTL_TRY(mtl_view_optional(&logsumexp, options.logsumexp, op_name, "logsumexp",
                              in_double ? 1 << MTL_F64 : 1 << MTL_F32));

    MTL_TRY(mtl_check_rank(&q, op_name, 4, 4));
    MTL_TRY(mtl_check_shape(&k, op_name, 4, (int64_t[]){q.shape[0], -1, -1, q.shape[3]}));
    MTL_TRY(mtl_check_shape(&v, op_name, 4, (int64_t[]){q.shape[0], k.shape[1], k.shape[2], -1}));
    MTL_TRY(mtl_check_shape(&out, op_name, 4, (int64_t[]){q.shape[0], q.shape[1], q.shape[2], v.shape[3]}));
    MTL_TRY(mtl_attention_check_heads(q.shape[1], k.shape[1], op_name));
    if (mtl_present(&key_mask)) MTL_TRY(mtl_check_shape(&key_mask, op_name, 2, (int64_t[]){q.shape[0], k.shape[2]}));
    if (mtl_present(&sinks)) MTL_TRY(mtl_check_shape(&sinks, op_name, 1, &q.shape[1]));
    if (mtl_present(&logsumexp)) MTL_TRY(mtl_check_shape(&logsumexp, op_name, 3, q.shape));
    mtl_dtype promoted = mtl_promote(mtl_promote(q.dtype, k.dtype), v.dtype);
    MTL_TRY(check_promotes(&mask, promoted));
    MTL_TRY(check_promotes(&sinks, promoted));
    MTL_TRY(mtl_attention_check_scale(scale, op_name));
    MTL_REQUIRE(isfinite(options.softcap) && options.softcap >= 0, op_name,
                "softcap must be finite and not negative, got %g", options.softcap);

    mtl_attention_args args = {.batch = q.shape[0],
                               .q_heads = q.shape[1],
                               .kv_heads = k.shape[1],
                               .q_len = q.shape[2],
                               .kv_len = k.shape[2],
                               .head_dim = q.shape[3],
                               .value_dim = v.shape[3],
                               .q = mtl_attention_operand_of(&q, 1),
                               .k = mtl_attention_operand_of(&k, 1),
                               .v = mtl_attention_operand_of(&v, 1),
                               .out = mtl_attention_operand_of(&out, 1),
                               .scale = scale,
                               .softcap = options.softcap,
                               .sinks = mtl_row_of(&sinks),
                               .in_double = in_double};
    MTL_TRY(set_visible(&args, &options));
    MTL_TRY(set_mask(&args, &mask));
    mtl_attention_set_key_mask(&args, &key_mask);
    if (mtl_present(&logsumexp)) {
        args.logsumexp.data = logsumexp.data;
        args.logsumexp.dtype = logsumexp.dtype;
        for (int axis = 0; axis < 3; axis++) args.logsumexp.stride[axis] = logsumexp.stride[axis];
    }

    DLDevice device;
    const mtl_view *all[] = {&q, &k, &v, &out, &mask, &key_mask, &sinks, &logsumexp};
    MTL_TRY(mtl_check_device(all, 8, op_name, &device));
    args.device = device;
    const mtl_view *outputs[] = {&out, &logsumexp}, *inputs[] = {&q, &k, &v, &mask, &key_mask, &sinks};
    MTL_TRY(mtl_check_overlap(outputs, 2, inputs, 6, NULL, op_name));
    if (out.elements == 0 && (!mtl_present(&logsumexp) || logsumexp.elements == 0)) return METALLOID_OK;
    return MTL_RUN(attention, context, op_name, &args);
}
