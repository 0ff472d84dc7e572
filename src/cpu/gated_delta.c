/* gated_delta_update: the rows of a head's state have nothing to do with each other, so blocks of them are done apart,
 * over all time steps. In chunks, what depends on keys alone is computed once for the blocks of an item that share a
 * key head: an item then has as many as leave every thread its share. Bits do not depend on the cut.
 * SPDX-License-Identifier: MIT */
#include "cpu/kernels.h"

enum { MOST_STATES = 512 << 10 }; /* bytes of an item: what stays in a second-level cache */

#define SHARED_COST 0.6 /* of what a block costs */

static int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* The run of blocks, a divisor of a key head's, for which the busiest thread is done first. A chunk's products of keys
 * and queries cost an item 2 STEPS key_dim multiply-adds a step; a block costs it 3 ROWS key_dim and a little. */
static int64_t blocks_of_item(const mtl_gated_delta_args *args, int64_t threads) {
    int64_t group = mtl_gated_delta_blocks(args) * (args->v_heads / args->k_heads), heads = args->batch * args->k_heads;
    int64_t state = MTL_GATED_DELTA_ROWS * args->key_dim * (int64_t)sizeof(float), best = 1;
    double least = INFINITY;
    for (int64_t blocks = 1; blocks <= group && blocks * state <= MOST_STATES; blocks++) {
        if (group % blocks) continue;
        double rounds = (double)quotient_up(heads * (group / blocks), threads);
        double time = rounds * ((double)blocks + SHARED_COST);
        if (time <= least) {
            least = time;
            best = blocks;
        }
    }
    return best;
}

metalloid_status mtl_cpu_gated_delta(const metalloid_context *context, const char *op, mtl_gated_delta_args *args) {
    bool out_empty = args->time == 0, state_empty = args->key_dim == 0;
    if (args->batch == 0 || args->v_heads == 0 || args->value_dim == 0 || (out_empty && state_empty))
        return METALLOID_OK; /* so that extents without memory behind them are not counted through */
    mtl_kernel kernel = mtl_cpu_kernels_for(context, args->in_double)->gated_delta;
    bool few = args->time < MTL_GATED_DELTA_FEW;
    args->blocks = few ? 1 : blocks_of_item(args, mtl_threads(context));
    int64_t all = args->batch * args->v_heads * mtl_gated_delta_blocks(args);
    int64_t rows = args->value_dim < MTL_GATED_DELTA_ROWS ? args->value_dim : MTL_GATED_DELTA_ROWS;
    /* Few steps: the state in and out. Many: three products with it a step. */
    int64_t cost = args->blocks * rows * (args->key_dim + 1) * (args->time + 8);
    return mtl_cpu_run(context, op, kernel, args, quotient_up(all, args->blocks), cost, mtl_gated_delta_scratch(args));
}
