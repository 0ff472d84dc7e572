/* qk_norm_rope. SPDX-License-Identifier: MIT */
#include "api/backend.h"
#include "api/rope.h"

metalloid_status metalloid_qk_norm_rope(metalloid_context *context, const DLTensor *q_tensor, const DLTensor *k_tensor,
                                        const DLTensor *q_weight_tensor, const DLTensor *k_weight_tensor, double eps,
                                        int64_t dims, const metalloid_rope_options *options, DLTensor *q_out_tensor,
                                        DLTensor *k_out_tensor) {
    static const char op[] = "qk_norm_rope";
    mtl_rope_args args = {.sides = 2, .normed = true, .eps = eps};
    mtl_rope_tensors tensors;
    mtl_view q, k, q_weight, k_weight, q_out, k_out;
    MTL_TRY(mtl_view_required(&q, q_tensor, op, "q", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&k, k_tensor, op, "k", MTL_FLOATING));
    MTL_TRY(mtl_view_optional(&q_weight, q_weight_tensor, op, "q_weight", MTL_FLOATING));
    MTL_TRY(mtl_view_optional(&k_weight, k_weight_tensor, op, "k_weight", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&q_out, q_out_tensor, op, "q_out", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&k_out, k_out_tensor, op, "k_out", MTL_FLOATING));
    MTL_TRY(mtl_check_eps(eps, op));
    MTL_TRY(mtl_rope_read_options(&args, &tensors, options, dims, op));

    MTL_TRY(mtl_check_rank(&q, op, 4, 4));
    int time_axis = mtl_rope_time_axis(&q, tensors.time_axis);
    int64_t k_shape[4] = {q.shape[0], q.shape[1], q.shape[2], q.shape[3]};
    k_shape[time_axis == 1 ? 2 : 1] = -1; /* any number of heads */
    MTL_TRY(mtl_check_shape(&k, op, 4, k_shape));
    if (mtl_present(&q_weight)) MTL_TRY(mtl_check_shape(&q_weight, op, 1, &q.shape[3]));
    if (mtl_present(&k_weight)) MTL_TRY(mtl_check_shape(&k_weight, op, 1, &q.shape[3]));
    MTL_TRY(mtl_check_same_shape(&q_out, &q, op));
    MTL_TRY(mtl_check_same_shape(&k_out, &k, op));

    DLDevice device;
    const mtl_view *all[] = {&q, &k, &q_weight, &k_weight, &q_out, &k_out, &tensors.freqs, &tensors.positions};
    MTL_TRY(mtl_check_device(all, 8, op, &device));
    MTL_TRY(mtl_rope_check_extents(&args, &tensors, &q, op));
    const mtl_view *outputs[] = {&q_out, &k_out},
                   *inputs[] = {&q, &k, &q_weight, &k_weight, &tensors.freqs, &tensors.positions};
    const unsigned aliases[] = {1, 2}; /* q_out may be q, k_out may be k */
    MTL_TRY(mtl_check_overlap(outputs, 2, inputs, 6, aliases, op));

    mtl_rope_fill_side(&args.side[0], &q, &q_out, time_axis);
    mtl_rope_fill_side(&args.side[1], &k, &k_out, time_axis);
    args.side[0].weight = mtl_row_of(&q_weight);
    args.side[1].weight = mtl_row_of(&k_weight);
    args.device = device;
    args.in_double = mtl_any_double(all, 6);
    return MTL_RUN(rope, context, op, &args);
}
