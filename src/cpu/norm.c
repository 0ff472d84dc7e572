/* rms_norm, layer_norm and their sums with a residual: an item is a row. SPDX-License-Identifier: MIT */
#include "cpu/kernels.h"

static metalloid_status run(const metalloid_context *context, const char *op, mtl_kernel kernel, mtl_norm_args *args) {
    if (args->length == 0 || args->rows.count == 0) return METALLOID_OK;
    int64_t cost = args->length * (args->residual.data ? 16 : 8);
    /* A row each of weights, bias, x and residual, as reals. */
    size_t scratch = (size_t)args->length * 4 * (args->in_double ? sizeof(double) : sizeof(float));
    args->stream =
        mtl_cpu_streams((double)args->rows.count * (double)args->length * (double)mtl_dtype_size(args->out.dtype));
    return mtl_cpu_run(context, op, kernel, args, args->rows.count, cost, scratch);
}

metalloid_status mtl_cpu_rms_norm(const metalloid_context *context, const char *op, mtl_norm_args *args) {
    return run(context, op, mtl_cpu_kernels_for(context, args->in_double)->rms_norm, args);
}

metalloid_status mtl_cpu_layer_norm(const metalloid_context *context, const char *op, mtl_norm_args *args) {
    return run(context, op, mtl_cpu_kernels_for(context, args->in_double)->layer_norm, args);
}
