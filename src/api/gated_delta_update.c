/* gated_delta_update. SPDX-License-Identifier: MIT */
#include "api/backend.h"

/* An empty operand is never read, but the place of its items is still computed: it gets an address, and no strides. */
static char nothing[8];

/* Strides by axis; a missing last axis (gamma and beta of a head) has stride 0. */
static mtl_strided strided(const mtl_view *view) {
    if (!mtl_present(view)) return (mtl_strided){.data = NULL};
    if (view->elements == 0) return (mtl_strided){.data = nothing, .dtype = view->dtype};
    mtl_strided operand = {.data = view->data, .dtype = view->dtype};
    for (int axis = 0; axis < view->rank; axis++) operand.stride[axis] = view->stride[axis];
    return operand;
}

metalloid_status metalloid_gated_delta_update(metalloid_context *context, const DLTensor *q_tensor,
                                              const DLTensor *k_tensor, const DLTensor *v_tensor,
                                              const DLTensor *gamma_tensor, const DLTensor *beta_tensor,
                                              const DLTensor *initial_state_tensor, const DLTensor *mask_tensor,
                                              DLTensor *out_tensor, DLTensor *state_tensor) {
    static const char op[] = "gated_delta_update";
    mtl_view q, k, v, gamma, beta, initial_state, mask, out, state;
    MTL_TRY(mtl_view_required(&q, q_tensor, op, "q", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&k, k_tensor, op, "k", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&v, v_tensor, op, "v", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&gamma, gamma_tensor, op, "gamma", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&beta, beta_tensor, op, "beta", MTL_FLOATING));
    MTL_TRY(mtl_view_optional(&initial_state, initial_state_tensor, op, "initial_state", MTL_FLOATING));
    MTL_TRY(mtl_view_optional(&mask, mask_tensor, op, "mask", MTL_INTEGER | MTL_BOOLEAN));
    MTL_TRY(mtl_view_required(&out, out_tensor, op, "out", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&state, state_tensor, op, "state", 1 << MTL_F32 | 1 << MTL_F64));

    MTL_TRY(mtl_check_rank(&q, op, 4, 4));
    MTL_TRY(mtl_check_rank(&v, op, 4, 4));
    int64_t batch = q.shape[0], time = q.shape[1], k_heads = q.shape[2], key_dim = q.shape[3], v_heads = v.shape[2],
            value_dim = v.shape[3];
    MTL_TRY(mtl_check_same_shape(&k, &q, op));
    MTL_TRY(mtl_check_shape(&v, op, 4, (int64_t[]){batch, time, -1, -1}));
    MTL_REQUIRE(k_heads ? v_heads % k_heads == 0 : v_heads == 0, op,
                "v must have a multiple of the %lld heads of q and k, got %lld", (long long)k_heads,
                (long long)v_heads);
    MTL_TRY(mtl_check_shape(&gamma, op, gamma.rank == 3 ? 3 : 4, (int64_t[]){batch, time, v_heads, key_dim}));
    MTL_TRY(mtl_check_shape(&beta, op, 3, (int64_t[]){batch, time, v_heads}));
    if (mtl_present(&mask)) MTL_TRY(mtl_check_shape(&mask, op, 2, (int64_t[]){batch, time}));
    const int64_t state_shape[] = {batch, v_heads, value_dim, key_dim};
    if (mtl_present(&initial_state)) MTL_TRY(mtl_check_shape(&initial_state, op, 4, state_shape));
    MTL_TRY(mtl_check_same_shape(&out, &v, op));
    MTL_TRY(mtl_check_shape(&state, op, 4, state_shape));

    DLDevice device;
    const mtl_view *all[] = {&q, &k, &v, &gamma, &beta, &initial_state, &out, &state, &mask};
    MTL_TRY(mtl_check_device(all, 9, op, &device));
    const mtl_view *outputs[] = {&out, &state}, *inputs[] = {&q, &k, &v, &gamma, &beta, &mask, &initial_state};
    const unsigned aliases[] = {0, 1 << 6}; /* state may be initial_state */
    MTL_TRY(mtl_check_overlap(outputs, 2, inputs, 7, aliases, op));

    mtl_gated_delta_args args = {.batch = batch,
                                 .time = time,
                                 .k_heads = k_heads,
                                 .v_heads = v_heads,
                                 .key_dim = key_dim,
                                 .value_dim = value_dim,
                                 .q = strided(&q),
                                 .k = strided(&k),
                                 .v = strided(&v),
                                 .gamma = strided(&gamma),
                                 .beta = strided(&beta),
                                 .initial_state = strided(&initial_state),
                                 .mask = strided(&mask),
                                 .out = strided(&out),
                                 .state = strided(&state),
                                 .device = device,
                                 .in_double = mtl_any_double(all, 8)};
    return MTL_RUN(gated_delta, context, op, &args);
}
