/* rope and qk_norm_rope on CUDA. SPDX-License-Identifier: MIT */
#include "cuda/driver.h"

enum {
    VECTOR = 16,
    THREADS = 128,
    WARP = 32,
    MOST_PAIRS = 256,      /* of the fast kernel */
    TABLE = 1024,          /* as in rope.cu: pairs of a block's time steps */
    PLACES = 4,            /* for heads in a block, where there are as many: what shares cosines and sines */
    HEADS = 2,             /* of a thread at most, as in rope.cu */
    ANY = 12,              /* the general kernel's place after 3 dtypes x 4 */
    MOST_BLOCKS = 65535,   /* along y and z */
    THREADS_WANTED = 2048, /* of a multiprocessor, over the whole call */
};

#define NAMES(dtype) \
    "rope_" #dtype, "rope_" #dtype "_traditional", "norm_rope_" #dtype, "norm_rope_" #dtype "_traditional"
static const char *const names[] = {NAMES(f32), NAMES(f16), NAMES(bf16), "rope_any"};

static bool aligned(int64_t a, int64_t b) { return (a | b) % VECTOR == 0; }

/* The threads that turn a head in the fast kernel; 0: it does not serve the call. */
static int lanes_of_head(const mtl_rope_args *args) {
    mtl_dtype dtype = args->side[0].x.dtype;
    int64_t two_vectors = 2 * VECTOR / mtl_dtype_size(dtype), dims = args->angles.dims;
    if (dims % two_vectors != 0 || args->head_dim % two_vectors != 0) return 0;
    int64_t lanes = args->head_dim / two_vectors;
    if (dims / 2 > MOST_PAIRS || lanes > THREADS || (args->normed && (lanes > WARP || (lanes & (lanes - 1)) != 0)))
        return 0;
    for (const mtl_rope_side *side = args->side; side < args->side + args->sides; side++) {
        bool fast = side->heads.count < INT32_MAX / 2 && side->x.dtype == dtype && side->out.dtype == dtype &&
                    mtl_cuda_vectors(side->x, &side->heads, MTL_ROPE_X) &&
                    mtl_cuda_vectors(side->out, &side->heads, MTL_ROPE_OUT) &&
                    aligned(side->x_batch_stride, side->x_time_stride) &&
                    aligned(side->out_batch_stride, side->out_time_stride) && mtl_cuda_weights(side->weight);
        if (!fast) return 0;
    }
    return (int)lanes;
}

static int heads_in_row(const mtl_cuda_loop *heads) { return heads->rank ? (int)heads->shape[heads->rank - 1] : 1; }

/* Groups of so many heads instead of heads, none across two rows of the last axis. */
static void group_heads(mtl_cuda_rope_side *side, int heads) {
    enum { X = MTL_ROPE_X, OUT = MTL_ROPE_OUT, FIRST_HEAD };
    mtl_cuda_loop *loop = &side->heads;
    side->heads_in_row = heads_in_row(loop);
    side->x_step = side->out_step = 0;
    for (int axis = 0; axis < loop->rank; axis++) loop->stride[axis][FIRST_HEAD] = 0;
    if (loop->rank == 0 || loop->count == 0) return;
    int last = loop->rank - 1, groups = (side->heads_in_row + heads - 1) / heads;
    side->x_step = loop->stride[last][X];
    side->out_step = loop->stride[last][OUT];
    loop->stride[last][X] *= heads;
    loop->stride[last][OUT] *= heads;
    loop->stride[last][FIRST_HEAD] = heads;
    loop->count = loop->count / loop->shape[last] * groups;
    loop->shape[last] = groups;
}

static metalloid_status launch(const mtl_cuda_call *call, const mtl_rope_args *args, int lanes,
                               mtl_cuda_rope_args rope) {
    int64_t heads = 0, groups = 0;
    int row = 1;
    for (int i = 0; i < args->sides; i++) {
        heads += rope.side[i].heads.count;
        if (heads_in_row(&rope.side[i].heads) > row) row = heads_in_row(&rope.side[i].heads);
    }
    if (lanes == 0) {
        int64_t items = args->batch * heads * args->time;
        mtl_cuda_grid grid = {.threads = WARP, .rows = THREADS / WARP, .overlaps = true};
        grid.blocks = (items + grid.rows - 1) / grid.rows;
        if (grid.blocks > 65536) grid.blocks = 65536;
        return mtl_cuda_launch(call, (mtl_cuda_kernel){MTL_CUDA_IMAGE_rope, ANY, names[ANY]}, grid, &rope);
    }
    int64_t wanted = (int64_t)call->device->multiprocessors * THREADS_WANTED;
    rope.heads_a_thread = row > 1 && args->batch * args->time * heads * lanes / wanted >= HEADS ? HEADS : 1;
    /* A block's rows: places for heads by time steps, both powers of two. */
    int needed = (row + rope.heads_a_thread - 1) / rope.heads_a_thread, rows = THREADS / lanes, places = 1, steps = 1;
    int64_t pairs = args->angles.dims / 2;
    while (places < PLACES && places < needed && 2 * places <= rows) places *= 2;
    while (steps < args->time && 2 * steps * places <= rows && 2 * steps * pairs <= TABLE)
        steps *= 2, rope.log2_steps++;
    while (places < needed && 2 * places * steps <= rows) places *= 2;
    while (args->normed && places * steps * lanes < WARP) places *= 2; /* whole warps, as sums over lanes need */
    for (int i = 0; i < args->sides; i++) {
        group_heads(&rope.side[i], places * rope.heads_a_thread);
        groups += rope.side[i].heads.count;
    }
    mtl_cuda_grid grid = {
        .blocks = (args->time + steps - 1) / steps, .threads = lanes, .rows = places * steps, .overlaps = true};
    int index = (int)args->side[0].x.dtype * 4 + (args->normed ? 2 : 0) + (args->angles.traditional ? 1 : 0);
    for (; rope.first_batch < args->batch; rope.first_batch += MOST_BLOCKS) {
        int64_t batches = args->batch - rope.first_batch;
        grid.z = batches < MOST_BLOCKS ? (int)batches : MOST_BLOCKS;
        for (rope.first_group = 0; rope.first_group < groups; rope.first_group += MOST_BLOCKS) {
            int64_t rest = groups - rope.first_group;
            grid.y = rest < MOST_BLOCKS ? (int)rest : MOST_BLOCKS;
            MTL_TRY(mtl_cuda_launch(call, (mtl_cuda_kernel){MTL_CUDA_IMAGE_rope, index, names[index]}, grid, &rope));
        }
    }
    return METALLOID_OK;
}

metalloid_status mtl_cuda_rope(const metalloid_context *context, const char *op, const mtl_rope_args *args) {
    mtl_cuda_call call;
    MTL_TRY(mtl_cuda_begin(&call, context, op, args->device, args->in_double));
    const mtl_rope_angles *angles = &args->angles;
    mtl_cuda_rope_args rope = {.sides = args->sides,
                               .traditional = angles->traditional,
                               .normed = args->normed,
                               .inverse = angles->inverse,
                               .each_token = angles->positions.each_token,
                               .positions_dtype = (int)angles->positions.dtype,
                               .batch = args->batch,
                               .time = args->time,
                               .head_dim = args->head_dim,
                               .dims = angles->dims,
                               .scale = angles->scale,
                               .log2_ratio = angles->freqs.data ? 0 : -2 * log2(angles->base) / (double)angles->dims,
                               .eps = args->eps,
                               .eps_in_float = (float)args->eps,
                               .per_head_dim = 1 / (float)args->head_dim,
                               .freqs = mtl_cuda_row_of(angles->freqs),
                               .offset = angles->offset,
                               .positions = angles->positions.data,
                               .position_batch_stride = angles->positions.batch_stride,
                               .position_time_stride = angles->positions.time_stride};
    mtl_loop outer = {.count = 1};
    int64_t heads = 0;
    for (int i = 0; i < args->sides; i++) {
        const mtl_rope_side *side = &args->side[i];
        rope.side[i] = (mtl_cuda_rope_side){.x = mtl_cuda_row_of(side->x),
                                            .out = mtl_cuda_row_of(side->out),
                                            .weight = mtl_cuda_row_of(side->weight),
                                            .x_batch_stride = side->x_batch_stride,
                                            .x_time_stride = side->x_time_stride,
                                            .out_batch_stride = side->out_batch_stride,
                                            .out_time_stride = side->out_time_stride};
        mtl_loop cut; /* of two sides, which have one axis of heads, nothing is cut */
        mtl_cuda_cut_loop(&side->heads, &cut, &rope.side[i].heads);
        if (args->sides == 1) outer = cut;
        heads += side->heads.count;
    }
    if (heads == 0 || args->batch == 0 || args->time == 0) outer.count = 0;
    int lanes = lanes_of_head(args);
    metalloid_status status = METALLOID_OK;
    mtl_cursor at;
    mtl_cursor_seek(&at, &outer, 0);
    for (int64_t i = 0; i < outer.count && status == METALLOID_OK; i++, mtl_cursor_next(&at)) {
        if (args->sides == 1) {
            rope.side[0].x.data = args->side[0].x.data + at.offset[MTL_ROPE_X];
            rope.side[0].out.data = args->side[0].out.data + at.offset[MTL_ROPE_OUT];
        }
        status = launch(&call, args, lanes, rope);
    }
    return mtl_cuda_end(&call, status);
}
