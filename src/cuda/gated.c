/* swiglu and geglu on CUDA. SPDX-License-Identifier: MIT */
#include "cuda/driver.h"

enum {
    VECTOR = 16,
    VECTORS = 1, /* of a thread, as in gated.cuh */
    THREADS = 128,
    ANY = 3,
    MOST_CHUNKS = 1024,
    MOST_ROWS = 65535, /* the grid's limit */
};

static bool is_fast(const mtl_gated_args *args) {
    const mtl_row *rows[] = {[MTL_GATED_GATE] = &args->gate, [MTL_GATED_UP] = &args->up, [MTL_GATED_OUT] = &args->out};
    mtl_dtype dtype = args->gate.dtype;
    bool fast = args->length * mtl_dtype_size(dtype) % VECTOR == 0;
    for (int i = 0; i < 3 && fast; i++) fast = rows[i]->dtype == dtype && mtl_cuda_vectors(*rows[i], &args->rows, i);
    return fast;
}

/* `kernels`: of float32, float16, bfloat16 and the general one. */
static metalloid_status run(const metalloid_context *context, const char *op, const mtl_cuda_kernel *kernels,
                            const mtl_gated_args *args) {
    mtl_cuda_call call;
    MTL_TRY(mtl_cuda_begin(&call, context, op, args->device, args->in_double));
    mtl_cuda_gated_args gated = {.length = args->length,
                                 .gate = mtl_cuda_row_of(args->gate),
                                 .up = mtl_cuda_row_of(args->up),
                                 .out = mtl_cuda_row_of(args->out)};
    mtl_loop outer;
    mtl_cuda_cut_loop(&args->rows, &outer, &gated.rows);
    bool fast = is_fast(args);
    int64_t a_block = fast ? (int64_t)THREADS * VECTORS * VECTOR / mtl_dtype_size(args->gate.dtype) : THREADS;
    int64_t chunks = (args->length + a_block - 1) / a_block;
    if (!fast && chunks > MOST_CHUNKS) chunks = MOST_CHUNKS;
    if (args->length == 0) outer.count = 0;
    mtl_cuda_kernel kernel = kernels[fast ? (int)args->gate.dtype : ANY];

    metalloid_status status = METALLOID_OK;
    mtl_cursor at;
    mtl_cursor_seek(&at, &outer, 0);
    for (int64_t i = 0; i < outer.count && status == METALLOID_OK; i++, mtl_cursor_next(&at)) {
        gated.gate.data = args->gate.data + at.offset[MTL_GATED_GATE];
        gated.up.data = args->up.data + at.offset[MTL_GATED_UP];
        gated.out.data = args->out.data + at.offset[MTL_GATED_OUT];
        for (gated.first_row = 0; gated.first_row < gated.rows.count && status == METALLOID_OK;
             gated.first_row += MOST_ROWS) {
            int64_t rows = gated.rows.count - gated.first_row;
            mtl_cuda_grid grid = {
                .blocks = chunks, .y = rows < MOST_ROWS ? (int)rows : MOST_ROWS, .threads = THREADS, .overlaps = true};
            status = mtl_cuda_launch(&call, kernel, grid, &gated);
        }
    }
    return mtl_cuda_end(&call, status);
}

#define KERNELS(image, op, first)                                                                       \
    {                                                                                                   \
        {MTL_CUDA_IMAGE_##image, first, #op "_f32"}, {MTL_CUDA_IMAGE_##image, (first) + 1, #op "_f16"}, \
            {MTL_CUDA_IMAGE_##image, (first) + 2, #op "_bf16"}, {                                       \
            MTL_CUDA_IMAGE_##image, (first) + 3, #op "_any"                                             \
        }                                                                                               \
    }

metalloid_status mtl_cuda_swiglu(const metalloid_context *context, const char *op, const mtl_gated_args *args) {
    static const mtl_cuda_kernel kernels[] = KERNELS(swiglu, swiglu, 0);
    return run(context, op, kernels, args);
}

metalloid_status mtl_cuda_geglu(const metalloid_context *context, const char *op, const mtl_gated_args *args) {
    static const mtl_cuda_kernel kernels[2][4] = {KERNELS(geglu, geglu_erf, 0), KERNELS(geglu, geglu_tanh, 4)};
    return run(context, op, kernels[args->tanh], args);
}
