/* gated_delta_update: the rows of a head's state have nothing to do with each other, so an item is a block of them, over all time
 * steps. SPDX-License-Identifier: MIT */
#include "cpu/kernels.h"

metalloid_status mtl_cpu_gated_delta(const metalloid_context *context, const char *op,
                                     const mtl_gated_delta_args *args) {
    bool out_empty = args->time == 0, state_empty = args->key_dim == 0;
    if (args->batch == 0 || args->v_heads == 0 || args->value_dim == 0 || (out_empty && state_empty))
        return METALLOID_OK; /* so that extents without memory behind them are not counted through */
    mtl_kernel kernel = mtl_cpu_kernels_for(context, args->in_double)->gated_delta;
    int64_t blocks = (args->value_dim + MTL_GATED_DELTA_ROWS - 1) / MTL_GATED_DELTA_ROWS;
    int64_t rows = args->value_dim < MTL_GATED_DELTA_ROWS ? args->value_dim : MTL_GATED_DELTA_ROWS;
    int64_t cost = rows * (args->key_dim + 1) * (args->time + 8);
    return mtl_cpu_run(context, op, kernel, args, args->batch * args->v_heads * blocks, cost,
                       mtl_gated_delta_scratch(args));
}
