/* gated_delta_update on CUDA. SPDX-License-Identifier: MIT */
#include "cuda/driver.h"

enum {
    VECTOR = 16,
    THREADS = 128,
    GROUPS = THREADS / 8, /* of the lanes that hold a row */
    ROWS = 2,             /* of a group in a single step */
    WARP = 32,
    FORMS = 3, /* a step, steps, steps with a channel's own gamma */
    ANY = 27,  /* the general kernel's place after 3 dtypes x 3 dimensions x FORMS */
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
    bool fast = is_fast(args), step = args->time == 1, per_channel = args->gamma.stride[3] != 0;
    int64_t a_block = fast ? GROUPS * (step ? ROWS : 1) : THREADS / WARP;
    int64_t blocks = (args->value_dim + a_block - 1) / a_block, most = 65535;
    if (blocks > most) fast = false;
    mtl_cuda_grid grid = {.blocks = blocks ? args->batch * args->v_heads : 0,
                          .y = (int)(blocks < most ? blocks : most)};
    int index = ANY;
    if (fast) {
        int form = step ? 0 : per_channel ? 2 : 1, dim = args->key_dim == 64 ? 0 : args->key_dim == 128 ? 1 : 2;
        index = ((int)args->q.dtype * 3 + dim) * FORMS + form;
        grid.threads = THREADS;
        grid.shared_memory = step ? 0 : shared_memory(args->key_dim, per_channel);
    } else {
        grid.threads = WARP;
        grid.rows = THREADS / WARP;
    }
    mtl_cuda_kernel kernel = {MTL_CUDA_IMAGE_gated_delta, index, names[index]};
    return mtl_cuda_end(&call, mtl_cuda_launch(&call, kernel, grid, &delta));
}
