/* rope and qk_norm_rope: an item is a block of time steps of one row of the batch, all heads of both sides. Items go through the
 * batch first, so that its rows can share a block's cosines and sines. SPDX-License-Identifier: MIT */
#include "cpu/kernels.h"

enum { TURN_COST = 128 }; /* of a cosine and a sine, as memory traffic */

metalloid_status mtl_cpu_rope(const metalloid_context *context, const char *op, mtl_rope_args *args) {
    mtl_kernel kernel = mtl_cpu_kernels_for(context, args->in_double)->rope;
    int64_t heads = 0;
    for (int i = 0; i < args->sides; i++) heads += args->side[i].heads.count;
    if (heads == 0 || args->batch == 0 || args->time == 0) return METALLOID_OK;
    int64_t cost = heads * args->head_dim * 8 + args->angles.dims / 2 * TURN_COST;
    args->stream = mtl_cpu_streams((double)args->batch * (double)args->time * (double)heads * (double)args->head_dim *
                                   (double)mtl_dtype_size(args->side[0].out.dtype));
    int64_t blocks = args->time / MTL_ROPE_BLOCK + (args->time % MTL_ROPE_BLOCK != 0);
    return mtl_cpu_run(context, op, kernel, args, args->batch * blocks, cost * mtl_rope_most_steps(args),
                       mtl_rope_scratch(args));
}

mtl_rope_block mtl_rope_block_at(const mtl_rope_args *args, int64_t item) {
    mtl_rope_block block = {.batch = item % args->batch, .first = item / args->batch * MTL_ROPE_BLOCK};
    int64_t left = args->time - block.first;
    block.steps = left < MTL_ROPE_BLOCK ? left : MTL_ROPE_BLOCK;
    return block;
}

void mtl_rope_turn_far(const mtl_rope_angles *angles, int64_t pair, int64_t position, double *cosine, double *sine) {
    long double inv_freq;
    if (angles->freqs.data) {
        long double freq =
            (long double)mtl_load_double(angles->freqs.data + pair * angles->freqs.stride, angles->freqs.dtype);
        inv_freq = angles->inverse ? freq : 1 / freq;
    } else {
        inv_freq = powl((long double)angles->base, -(long double)(2 * pair) / (long double)angles->dims);
    }
    long double angle = (long double)position * (long double)angles->scale * inv_freq;
    *cosine = (double)cosl(angle);
    *sine = (double)sinl(angle);
}
