/* rms_norm, layer_norm and their sums with a residual: an item is a row. SPDX-License-Identifier: MIT */
#include "cpu/kernels.h"

static bool is_contiguous(mtl_row row, mtl_dtype dtype) {
    return row.dtype == dtype && row.stride == mtl_dtype_size(dtype);
}

static mtl_norm_layout layout_of(const mtl_norm_args *args) {
    mtl_dtype dtype = args->x.dtype, real = args->in_double ? MTL_F64 : MTL_F32;
    bool in_place = is_contiguous(args->x, dtype) && is_contiguous(args->out, dtype) &&
                    (dtype == real || (!args->in_double && (dtype == MTL_F16 || dtype == MTL_BF16)));
    if (args->residual.data) in_place &= is_contiguous(args->residual, dtype) && is_contiguous(args->sum, dtype);
    if (args->weight.data) in_place &= is_contiguous(args->weight, dtype) || is_contiguous(args->weight, real);
    mtl_dtype weight = args->weight.data ? args->weight.dtype : real;
    if (args->bias.data) in_place &= is_contiguous(args->bias, weight) || is_contiguous(args->bias, real);
    if (!in_place) return MTL_NORM_STAGED;
    return args->residual.data && (dtype != real || args->stream) ? MTL_NORM_SUM_KEPT : MTL_NORM_IN_PLACE;
}

static metalloid_status run(const metalloid_context *context, const char *op, mtl_kernel kernel, mtl_norm_args *args,
                            bool has_bias) {
    if (args->length == 0 || args->rows.count == 0) return METALLOID_OK;
    int64_t cost = args->length * (args->residual.data ? 16 : 8);
    args->stream =
        mtl_cpu_streams((double)args->rows.count * (double)args->length * (double)mtl_dtype_size(args->out.dtype));
    args->layout = layout_of(args);
    bool staged = args->layout == MTL_NORM_STAGED;
    int rows = (staged || !args->weight.data) + (has_bias && (staged || !args->bias.data)) +
               (args->layout == MTL_NORM_IN_PLACE ? 0 : 2);
    if (rows == 0) rows = 1; /* the plain kernels' */
    size_t scratch = (size_t)rows * (size_t)args->length * (args->in_double ? sizeof(double) : sizeof(float));
    return mtl_cpu_run(context, op, kernel, args, args->rows.count, cost, scratch);
}

metalloid_status mtl_cpu_rms_norm(const metalloid_context *context, const char *op, mtl_norm_args *args) {
    return run(context, op, mtl_cpu_kernels_for(context, args->in_double)->rms_norm, args, false);
}

metalloid_status mtl_cpu_layer_norm(const metalloid_context *context, const char *op, mtl_norm_args *args) {
    return run(context, op, mtl_cpu_kernels_for(context, args->in_double)->layer_norm, args, true);
}
