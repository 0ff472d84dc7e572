/* swiglu and geglu: an item is a run of elements of one row. SPDX-License-Identifier: MIT */
#include "cpu/kernels.h"

enum { RUN = 4096 }; /* elements: large enough that its start costs nothing, small enough to share out */

static metalloid_status run(const metalloid_context *context, const char *op, mtl_kernel kernel, mtl_gated_args *args) {
    args->run = args->length < RUN ? args->length : RUN;
    if (args->run == 0) return METALLOID_OK;
    args->stream =
        mtl_cpu_streams((double)args->rows.count * (double)args->length * (double)mtl_dtype_size(args->out.dtype));
    args->runs = (args->length + RUN - 1) / RUN;
    return mtl_cpu_run(context, op, kernel, args, args->rows.count * args->runs, args->run * 12,
                       (size_t)args->run * 2 * (args->in_double ? sizeof(double) : sizeof(float)));
}

metalloid_status mtl_cpu_swiglu(const metalloid_context *context, const char *op, mtl_gated_args *args) {
    return run(context, op, mtl_cpu_kernels_for(context, args->in_double)->swiglu, args);
}

metalloid_status mtl_cpu_geglu(const metalloid_context *context, const char *op, mtl_gated_args *args) {
    return run(context, op, mtl_cpu_kernels_for(context, args->in_double)->geglu, args);
}
