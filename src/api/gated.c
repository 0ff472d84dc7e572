/* The checks that swiglu and geglu share. SPDX-License-Identifier: MIT */
#include "api/gated.h"

metalloid_status mtl_gated_check(mtl_gated_args *args, const char *op, const DLTensor *gate, const DLTensor *up,
                                 DLTensor *out) {
    mtl_view gate_view, up_view, out_view;
    MTL_TRY(mtl_view_required(&gate_view, gate, op, "gate", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&up_view, up, op, "up", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&out_view, out, op, "out", MTL_FLOATING));
    MTL_TRY(mtl_check_same_shape(&up_view, &gate_view, op));
    MTL_TRY(mtl_check_same_shape(&out_view, &gate_view, op));

    DLDevice device;
    const mtl_view *all[] = {[MTL_GATED_GATE] = &gate_view, [MTL_GATED_UP] = &up_view, [MTL_GATED_OUT] = &out_view};
    MTL_TRY(mtl_check_device(all, 3, op, &device));
    const mtl_view *outputs[] = {&out_view};
    const unsigned aliases[] = {3}; /* gate or up */
    MTL_TRY(mtl_check_overlap(outputs, 1, all, 2, aliases, op));

    mtl_loop_init(&args->rows, gate_view.rank, 3, all);
    int64_t stride[3];
    args->length = mtl_loop_take_row(&args->rows, stride);
    args->gate = (mtl_row){gate_view.data, stride[MTL_GATED_GATE], gate_view.dtype};
    args->up = (mtl_row){up_view.data, stride[MTL_GATED_UP], up_view.dtype};
    args->out = (mtl_row){out_view.data, stride[MTL_GATED_OUT], out_view.dtype};
    args->tanh = false;
    args->device = device;
    args->in_double = mtl_any_double(all, 3);
    return METALLOID_OK;
}
