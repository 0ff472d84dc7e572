/* rope and qk_norm_rope: an item is a block of time steps of one batch row, all heads of both sides. SPDX-License-Identifier: MIT */
#include "cpu/kernels.h"

metalloid_status mtl_cpu_rope(const metalloid_context *context, const char *op, const mtl_rope_args *args) {
    mtl_kernel kernel = mtl_cpu_kernels_for(context, args->in_double)->rope;
    int64_t blocks = (args->time + MTL_ROPE_BLOCK - 1) / MTL_ROPE_BLOCK, heads = 0;
    for (int i = 0; i < args->sides; i++) heads += args->side[i].heads.count;
    if (heads == 0) return METALLOID_OK;
    int64_t cost = heads * args->head_dim * 8 * (args->time < MTL_ROPE_BLOCK ? args->time : MTL_ROPE_BLOCK);
    return mtl_cpu_run(context, op, kernel, args, args->batch * blocks, cost, mtl_rope_scratch(args));
}
