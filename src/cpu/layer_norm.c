/* layer_norm and add_layer_norm: an item is a row. SPDX-License-Identifier: MIT */
#include "cpu/kernels.h"

metalloid_status mtl_cpu_layer_norm(const metalloid_context *context, const char *op, mtl_norm_args *args) {
    if (args->length == 0 || args->rows.count == 0) return METALLOID_OK;
    mtl_kernel kernel = mtl_cpu_kernels_for(context, args->in_double)->layer_norm;
    int64_t cost = args->length * (args->residual.data ? 16 : 8);
    args->stream =
        mtl_cpu_streams((double)args->rows.count * (double)args->length * (double)mtl_dtype_size(args->out.dtype));
    return mtl_cpu_run(context, op, kernel, args, args->rows.count, cost, mtl_norm_scratch(args));
}
