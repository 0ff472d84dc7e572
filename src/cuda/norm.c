/* The norms on CUDA: which kernel, and how many threads a row. SPDX-License-Identifier: MIT */
#include "cuda/driver.h"

enum {
    VECTOR = 16, /* bytes */
    MOST_THREADS = 512,
    MOST_VECTORS = 8, /* of a thread */
    KERNELS = 8,      /* of a dtype */
    ANY = 3 * KERNELS,
    FEWEST_THREADS = 4, /* of a row */
    WARP = 32,
    LONG_ROW = 512,      /* vectors, for whose sum half as many threads are too many */
    BLOCK_VECTORS = 256, /* of short rows together */
    MANY = 16,           /* rows for each multiprocessor */
};

#define NAMES(op, dtype)                                                                                            \
#op "_" #dtype "_1", #op "_" #dtype "_2", #op "_" #dtype "_4", #op "_" #dtype "_8", "add_" #op "_" #dtype "_1", \
        "add_" #op "_" #dtype "_2", "add_" #op "_" #dtype "_4", "add_" #op "_" #dtype "_8"
static const char *const rms_norm_names[] = {NAMES(rms_norm, f32), NAMES(rms_norm, f16), NAMES(rms_norm, bf16),
                                             "rms_norm_any"};
static const char *const layer_norm_names[] = {NAMES(layer_norm, f32), NAMES(layer_norm, f16), NAMES(layer_norm, bf16),
                                               "layer_norm_any"};

static mtl_cuda_kernel kernel_of(mtl_cuda_image image, int index) {
    const char *const *names = image == MTL_CUDA_IMAGE_rms_norm ? rms_norm_names : layer_norm_names;
    return (mtl_cuda_kernel){image, index, names[index]};
}

/* Rows of one dtype whose every vector is aligned, short enough for the registers of a block. */
static bool is_fast(const mtl_norm_args *args) {
    const mtl_row *rows[] = {[MTL_NORM_X] = &args->x,
                             [MTL_NORM_OUT] = &args->out,
                             [MTL_NORM_RESIDUAL] = &args->residual,
                             [MTL_NORM_SUM] = &args->sum};
    mtl_dtype dtype = args->x.dtype;
    int64_t bytes = args->length * mtl_dtype_size(dtype);
    if (bytes % VECTOR != 0 || bytes > MOST_VECTORS * MOST_THREADS * VECTOR) return false;
    for (int i = 0; i < args->rows.operands; i++) {
        if (rows[i]->dtype != dtype || !mtl_cuda_vectors(*rows[i], &args->rows, i)) return false;
    }
    return mtl_cuda_weights(args->weight) && mtl_cuda_weights(args->bias);
}

static metalloid_status launch(const mtl_cuda_call *call, mtl_cuda_image image, const mtl_norm_args *args, bool fast,
                               mtl_cuda_norm_args *norm) {
    int64_t rows = norm->rows.count;
    if (!fast) {
        mtl_cuda_grid grid = {.blocks = rows < 65536 ? rows : 65536, .threads = 256, .overlaps = true};
        return mtl_cuda_launch(call, kernel_of(image, ANY), grid, norm);
    }
    int64_t vectors = args->length * mtl_dtype_size(args->x.dtype) / VECTOR;
    /* Few threads for many rows whose sums are long or that a warp can hold, many for others: the sum over a row is
     * quicker the fewer hold it, its reading the more do. */
    bool many = rows >= (int64_t)call->device->multiprocessors * MANY, added = args->residual.data;
    bool few_threads =
        many && !added && (image == MTL_CUDA_IMAGE_layer_norm || vectors <= 4 * WARP || vectors > LONG_ROW);
    int each = few_threads ? 4 : 2, step;
    while (each * MOST_THREADS < vectors) each *= 2;
    mtl_cuda_grid grid = {.threads = many ? FEWEST_THREADS : WARP, .rows = 1, .overlaps = true};
    while (grid.threads < WARP && grid.threads * each < vectors) grid.threads *= 2;
    if (grid.threads * each < vectors) {
        grid.threads = (int)((vectors + each * WARP - 1) / (each * WARP)) * WARP;
    } else { /* Short rows share a block: hardware hands out one in a while. */
        while (each > 1 && grid.threads * each / 2 >= vectors) each /= 2;
        grid.rows = 2 * WARP / grid.threads;
        while (many && grid.rows * vectors < BLOCK_VECTORS && grid.rows * grid.threads < MOST_THREADS) grid.rows *= 2;
    }
    for (step = 0; 1 << step < each;) step++;
    grid.blocks = (rows + grid.rows - 1) / grid.rows;
    return mtl_cuda_launch(call, kernel_of(image, (int)args->x.dtype * KERNELS + (added ? 4 : 0) + step), grid, norm);
}

static metalloid_status run(const metalloid_context *context, const char *op, mtl_cuda_image image,
                            const mtl_norm_args *args) {
    mtl_cuda_call call;
    MTL_TRY(mtl_cuda_begin(&call, context, op, args->device, args->in_double));
    mtl_cuda_norm_args norm = {.length = args->length,
                               .eps = args->eps,
                               .eps_in_float = (float)args->eps,
                               .per_length = 1 / (float)args->length,
                               .x = mtl_cuda_row_of(args->x),
                               .residual = mtl_cuda_row_of(args->residual),
                               .weight = mtl_cuda_row_of(args->weight),
                               .bias = mtl_cuda_row_of(args->bias),
                               .sum = mtl_cuda_row_of(args->sum),
                               .out = mtl_cuda_row_of(args->out)};
    mtl_loop outer;
    mtl_cuda_cut_loop(&args->rows, &outer, &norm.rows);
    bool fast = is_fast(args);
    if (args->length == 0) outer.count = 0;
    metalloid_status status = METALLOID_OK;
    mtl_cursor at;
    mtl_cursor_seek(&at, &outer, 0);
    for (int64_t i = 0; i < outer.count && status == METALLOID_OK; i++, mtl_cursor_next(&at)) {
        norm.x.data = args->x.data + at.offset[MTL_NORM_X];
        norm.out.data = args->out.data + at.offset[MTL_NORM_OUT];
        if (args->residual.data) {
            norm.residual.data = args->residual.data + at.offset[MTL_NORM_RESIDUAL];
            norm.sum.data = args->sum.data + at.offset[MTL_NORM_SUM];
        }
        status = launch(&call, image, args, fast, &norm);
    }
    return mtl_cuda_end(&call, status);
}

metalloid_status mtl_cuda_rms_norm(const metalloid_context *context, const char *op, const mtl_norm_args *args) {
    return run(context, op, MTL_CUDA_IMAGE_rms_norm, args);
}

metalloid_status mtl_cuda_layer_norm(const metalloid_context *context, const char *op, const mtl_norm_args *args) {
    return run(context, op, MTL_CUDA_IMAGE_layer_norm, args);
}
