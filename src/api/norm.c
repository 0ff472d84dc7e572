/* The checks that the four norms share. SPDX-License-Identifier: MIT */
#include "api/norm.h"

metalloid_status mtl_norm_check(mtl_norm_args *args, const char *op, const mtl_norm_tensors *tensors, double eps) {
    mtl_view x, residual = mtl_absent(), weight, bias, sum = mtl_absent(), out;
    MTL_TRY(mtl_view_required(&x, tensors->x, op, "x", MTL_FLOATING));
    if (tensors->added) MTL_TRY(mtl_view_required(&residual, tensors->residual, op, "residual", MTL_FLOATING));
    MTL_TRY(mtl_view_optional(&weight, tensors->weight, op, "weight", MTL_FLOATING));
    MTL_TRY(mtl_view_optional(&bias, tensors->bias, op, "bias", MTL_FLOATING));
    if (tensors->added) MTL_TRY(mtl_view_required(&sum, tensors->sum, op, "sum", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&out, tensors->out, op, "out", MTL_FLOATING));
    MTL_TRY(mtl_check_eps(eps, op));

    MTL_TRY(mtl_check_rank(&x, op, 1, MTL_MAX_RANK));
    int64_t length = x.shape[x.rank - 1];
    if (mtl_present(&residual)) MTL_TRY(mtl_check_same_shape(&residual, &x, op));
    if (mtl_present(&weight)) MTL_TRY(mtl_check_shape(&weight, op, 1, &length));
    if (mtl_present(&bias)) MTL_TRY(mtl_check_shape(&bias, op, 1, &length));
    if (mtl_present(&sum)) MTL_TRY(mtl_check_same_shape(&sum, &x, op));
    MTL_TRY(mtl_check_same_shape(&out, &x, op));

    DLDevice device;
    const mtl_view *all[] = {&x, &residual, &weight, &bias, &sum, &out};
    MTL_TRY(mtl_check_device(all, 6, op, &device));
    const mtl_view *outputs[] = {&out, &sum}, *inputs[] = {&x, &residual, &weight, &bias};
    const unsigned aliases[] = {3, 3}; /* x or residual */
    MTL_TRY(mtl_check_overlap(outputs, 2, inputs, 4, aliases, op));

    const mtl_view *in_rows[] = {
        [MTL_NORM_X] = &x, [MTL_NORM_OUT] = &out, [MTL_NORM_RESIDUAL] = &residual, [MTL_NORM_SUM] = &sum};
    mtl_loop_init(&args->rows, x.rank - 1, tensors->added ? 4 : 2, in_rows);
    args->length = length;
    args->eps = eps;
    args->x = mtl_row_of(&x);
    args->residual = mtl_row_of(&residual);
    args->weight = mtl_row_of(&weight);
    args->bias = mtl_row_of(&bias);
    args->sum = mtl_row_of(&sum);
    args->out = mtl_row_of(&out);
    args->device = device;
    args->in_double = mtl_any_double(all, 6);
    return METALLOID_OK;
}
