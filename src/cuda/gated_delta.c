/* gated_delta_update on CUDA. SPDX-License-Identifier: MIT */
#include "cuda/driver.h"

enum {
    VECTOR = 16,
    THREADS = 128,
    GROUPS = THREADS / 8, /* of the lanes that hold a row */
    WARP = 32,
    ROWS_OF_BLOCK = 64, /* of the chunks' kernel */
    FORMS = 3,          /* a step, steps, steps with a channel's own gamma */
    ANY = 27,           /* the general kernel's place after 3 dtypes x 3 dimensions x FORMS */
};

#define FORM_NAMES(dtype, dim)                                                 \
    "gated_delta_step_" #dtype "_" #dim, "gated_delta_steps_" #dtype "_" #dim, \
        "gated_delta_steps_" #dtype "_" #dim "_channels"
#define NAMES(dtype) FORM_NAMES(dtype, 64), FORM_NAMES(dtype, 128), FORM_NAMES(dtype, 256)
static const char *const names[] = {NAMES(f32), NAMES(f16), NAMES(bf16), "gated_delta_any"};

/* Of the two Chunks of gated_delta.cu. */
static int shared_memory(int64_t key_dim, bool per_channel) {
    int64_t steps = key_dim > 128 ? 8 : 16, gamma = per_channel ? key_dim : 1;
    return (int)(2 * steps * (2 * key_dim + gamma + GROUPS + 2) * (int64_t)sizeof(float));
}

static mtl_cuda_strided strided(mtl_strided operand) {
    return (mtl_cuda_strided){
        operand.data, (int)operand.dtype, {operand.stride[0], operand.stride[1], operand.stride[2], operand.stride[3]}};
}

/* Features side by side, each row of them aligned to `bytes`. */
static bool aligned(mtl_strided operand, int64_t bytes) {
    int64_t odd = (int64_t)((uintptr_t)operand.data % (uintptr_t)bytes);
    for (int axis = 0; axis < 3; axis++) odd |= operand.stride[axis] % bytes;
    return !operand.data || (odd == 0 && operand.stride[3] == mtl_dtype_size(operand.dtype));
}

static bool is_fast(const mtl_gated_delta_args *args) {
    mtl_dtype dtype = args->q.dtype;

    return (args->key_dim == 64 || args->key_dim == 128 || args->key_dim == 256) && args->k.dtype == dtype &&
           aligned(args->q, VECTOR) && aligned(args->k, VECTOR) && aligned(args->state, VECTOR) &&
           aligned(args->initial_state, VECTOR) && (!args->initial_state.data || args->initial_state.dtype == MTL_F32);
}

/* ---- in chunks --------------------------------------------------------------------------------------------------- */

/* What gated_delta_chunks.cu needs for `args`; 0 stages where it does not serve them. */
typedef struct chunked {
    int index, stages; /* of kernels; chunks on their way */
    bool v_copies, out_copies;
    int64_t tile;  /* bytes of k of a chunk in one bfloat16 */
    int64_t stage; /* bytes */
    int parts, prepare_memory, memory;
} chunked;

static chunked in_chunks(const mtl_cuda_call *call, const mtl_gated_delta_args *args) {
    enum { SQUARE = MTL_CUDA_CHUNK * MTL_CUDA_CHUNK * 2, OWN = 8192 };
    int64_t dim = args->key_dim, size = mtl_dtype_size(args->q.dtype), most = call->device->shared_memory;
    chunked c = {.tile = MTL_CUDA_CHUNK * dim * 2, .parts = args->q.dtype == MTL_BF16 ? 1 : 2};
    if (!is_fast(args) || args->time < MTL_CUDA_CHUNK || dim > 128 || args->gamma.stride[3] != 0) return c;
    c.index = 2 * ((int)args->q.dtype * 2 + (dim == 128));
    bool in_vectors = args->value_dim * size % VECTOR == 0; /* rows of v and out, as far as their layouts allow */
    c.v_copies = in_vectors && args->v.dtype == args->q.dtype && aligned(args->v, VECTOR);
    c.out_copies = in_vectors && args->out.dtype == args->q.dtype && aligned(args->out, VECTOR);
    int64_t diagonal = 6144, keys = 2 * c.parts * c.tile; /* prepare: keys, then L and blocks on its diagonal */
    c.prepare_memory = (int)(keys > 2 * SQUARE + diagonal ? keys : 2 * SQUARE + diagonal);
    c.stage = keys + 4 * SQUARE + (int64_t)sizeof(mtl_cuda_gated_delta_decays) +
              MTL_CUDA_CHUNK * ROWS_OF_BLOCK * (c.v_copies ? size : (int64_t)sizeof(float));
    int64_t stages = c.prepare_memory <= most - OWN ? (most - MTL_CUDA_SIGNALS) / c.stage : 0;
    c.stages = stages < MTL_CUDA_STAGES ? (int)stages : MTL_CUDA_STAGES;
    c.memory = (int)(c.stages * c.stage + MTL_CUDA_SIGNALS);
    return c;
}

static void advance(mtl_cuda_strided *operand, int64_t steps) {
    if (operand->data) operand->data += steps * operand->stride[1];
}

static metalloid_status update_in_chunks(const mtl_cuda_call *call, chunked c, mtl_cuda_gated_delta_args *delta) {
    enum { PREPARE_THREADS = 128, CHUNK_THREADS = 256 };
    static const int64_t most_memory = (int64_t)512 << 20;
    static const char *const kernels[] = {
        "gated_delta_prepare_f32_64",  "gated_delta_chunks_f32_64",    "gated_delta_prepare_f32_128",
        "gated_delta_chunks_f32_128",  "gated_delta_prepare_f16_64",   "gated_delta_chunks_f16_64",
        "gated_delta_prepare_f16_128", "gated_delta_chunks_f16_128",   "gated_delta_prepare_bf16_64",
        "gated_delta_chunks_bf16_64",  "gated_delta_prepare_bf16_128", "gated_delta_chunks_bf16_128"};
    mtl_cuda_gated_delta_chunks_args args = {
        .stages = c.stages, .stage_bytes = (int)c.stage, .v_copies = c.v_copies, .out_copies = c.out_copies};
    int64_t heads = delta->batch * delta->v_heads, chunks = (delta->time + MTL_CUDA_CHUNK - 1) / MTL_CUDA_CHUNK;
    int64_t matrices = heads * 4 * MTL_CUDA_CHUNK * MTL_CUDA_CHUNK * 2; /* bytes of a chunk */
    int64_t keys = c.parts > 1 ? delta->batch * delta->k_heads * 4 * c.tile : 0;
    int64_t decays = heads * (int64_t)sizeof(mtl_cuda_gated_delta_decays), live = heads * (int64_t)sizeof(uint64_t);
    int64_t bytes = matrices + keys + decays + live, at_once = most_memory / bytes;
    at_once = at_once < 1 ? 1 : at_once > chunks ? chunks : at_once;

    CUdeviceptr memory;
    MTL_TRY(mtl_cuda_allocate(call, (size_t)(at_once * bytes), &memory));
    args.matrices = (char *)memory;
    args.keys = args.matrices + at_once * matrices;
    args.decays = (mtl_cuda_gated_delta_decays *)(void *)(args.keys + at_once * keys);
    args.live = (unsigned *)(void *)(args.decays + at_once * heads);
    metalloid_status status = METALLOID_OK;
    int64_t time = delta->time;
    for (int64_t first = 0; first < chunks && status == METALLOID_OK; first += at_once) {
        args.chunks = chunks - first < at_once ? chunks - first : at_once;
        delta->time = first + args.chunks < chunks ? args.chunks * MTL_CUDA_CHUNK : time - first * MTL_CUDA_CHUNK;
        args.delta = *delta;
        mtl_cuda_grid grid = {
            .blocks = heads * args.chunks, .threads = PREPARE_THREADS, .shared_memory = c.prepare_memory};
        mtl_cuda_kernel kernel = {MTL_CUDA_IMAGE_gated_delta_chunks, c.index, kernels[c.index]};
        status = mtl_cuda_launch(call, kernel, grid, &args);
        grid = (mtl_cuda_grid){.blocks = heads,
                               .y = (int)((delta->value_dim + ROWS_OF_BLOCK - 1) / ROWS_OF_BLOCK),
                               .threads = CHUNK_THREADS,
                               .shared_memory = c.memory};
        kernel = (mtl_cuda_kernel){MTL_CUDA_IMAGE_gated_delta_chunks, c.index + 1, kernels[c.index + 1]};
        if (status == METALLOID_OK) status = mtl_cuda_launch(call, kernel, grid, &args);
        mtl_cuda_strided *of_steps[] = {&delta->q,    &delta->k,   &delta->v,   &delta->gamma,
                                        &delta->beta, &delta->out, &delta->mask};
        for (int i = 0; i < 7; i++) advance(of_steps[i], args.chunks * MTL_CUDA_CHUNK);
        delta->initial_state = delta->state;
    }
    mtl_cuda_release(call, memory);
    return status;
}

metalloid_status mtl_cuda_gated_delta(const metalloid_context *context, const char *op,
                                      const mtl_gated_delta_args *args) {
    mtl_cuda_call call;
    MTL_TRY(mtl_cuda_begin(&call, context, op, args->device, args->in_double));
    mtl_cuda_gated_delta_args delta = {.batch = args->batch,
                                       .time = args->time,
                                       .k_heads = args->k_heads,
                                       .v_heads = args->v_heads,
                                       .key_dim = args->key_dim,
                                       .value_dim = args->value_dim,
                                       .q = strided(args->q),
                                       .k = strided(args->k),
                                       .v = strided(args->v),
                                       .gamma = strided(args->gamma),
                                       .beta = strided(args->beta),
                                       .out = strided(args->out),
                                       .initial_state = strided(args->initial_state),
                                       .state = strided(args->state),
                                       .mask = strided(args->mask)};
    chunked c = in_chunks(&call, args);
    if (c.stages && args->batch && args->v_heads && args->value_dim && args->value_dim <= 65535)
        return mtl_cuda_end(&call, update_in_chunks(&call, c, &delta));
    int64_t most = 65535; /* along y and z */
    bool fast = is_fast(args), per_channel = args->gamma.stride[3] != 0;
    bool step = args->time == 1 && args->v_heads <= most && args->batch <= most;
    int rows_a_group = step && args->key_dim < 128 ? 2 : 1; /* as in gated_delta.cu */
    int64_t a_block = fast ? GROUPS * rows_a_group : THREADS / WARP;
    int64_t blocks = (args->value_dim + a_block - 1) / a_block;
    if (blocks > most) fast = false;
    mtl_cuda_grid grid = {.blocks = blocks ? args->batch * args->v_heads : 0,
                          .y = (int)(blocks < most ? blocks : most)};
    int index = ANY;
    if (fast) {
        int form = step ? 0 : per_channel ? 2 : 1, dim = args->key_dim == 64 ? 0 : args->key_dim == 128 ? 1 : 2;
        index = ((int)args->q.dtype * 3 + dim) * FORMS + form;
        grid.threads = THREADS;
        grid.shared_memory = step ? 0 : shared_memory(args->key_dim, per_channel);
        if (step && grid.blocks) {
            grid.blocks = blocks, grid.y = (int)args->v_heads, grid.z = (int)args->batch;
            grid.overlaps = true;
        }
    } else {
        grid.threads = WARP;
        grid.rows = THREADS / WARP;
    }
    mtl_cuda_kernel kernel = {MTL_CUDA_IMAGE_gated_delta, index, names[index]};
    return mtl_cuda_end(&call, mtl_cuda_launch(&call, kernel, grid, &delta));
}
