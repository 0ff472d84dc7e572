/* cross_entropy on CUDA: a block to a row. SPDX-License-Identifier: MIT */
#include "cuda/driver.h"

metalloid_status mtl_cuda_cross_entropy(const metalloid_context *context, const char *op,
                                        const mtl_cross_entropy_args *args) {
    enum { ANY = 3, FEW = 128, MANY = 256, LONG_ROW = 65536 };
    static const mtl_cuda_kernel kernels[] = {{MTL_CUDA_IMAGE_cross_entropy, 0, "cross_entropy_f32"},
                                              {MTL_CUDA_IMAGE_cross_entropy, 1, "cross_entropy_f16"},
                                              {MTL_CUDA_IMAGE_cross_entropy, 2, "cross_entropy_bf16"},
                                              {MTL_CUDA_IMAGE_cross_entropy, 3, "cross_entropy_any"}};
    mtl_cuda_call call;
    MTL_TRY(mtl_cuda_begin(&call, context, op, args->device, args->in_double));
    mtl_cuda_cross_entropy_args entropy = {.classes = args->classes,
                                           .logits = mtl_cuda_row_of(args->logits),
                                           .targets = mtl_cuda_row_of(args->targets),
                                           .loss = mtl_cuda_row_of(args->loss),
                                           .has_ignore_index = args->has_ignore_index,
                                           .ignore_index = args->ignore_index};
    mtl_loop outer;
    mtl_cuda_cut_loop(&args->rows, &outer, &entropy.rows);
    bool side_by_side = args->logits.stride == mtl_dtype_size(args->logits.dtype);
    mtl_cuda_kernel kernel = kernels[side_by_side && args->classes <= INT32_MAX ? (int)args->logits.dtype : ANY];

    metalloid_status status = METALLOID_OK;
    mtl_cursor at;
    mtl_cursor_seek(&at, &outer, 0);
    for (int64_t i = 0; i < outer.count && status == METALLOID_OK; i++, mtl_cursor_next(&at)) {
        entropy.logits.data = args->logits.data + at.offset[MTL_CROSS_ENTROPY_LOGITS];
        entropy.targets.data = args->targets.data + at.offset[MTL_CROSS_ENTROPY_TARGETS];
        entropy.loss.data = args->loss.data + at.offset[MTL_CROSS_ENTROPY_LOSS];
        mtl_cuda_grid grid = {
            .blocks = entropy.rows.count, .threads = args->classes > LONG_ROW ? MANY : FEW, .overlaps = true};
        status = mtl_cuda_launch(&call, kernel, grid, &entropy);
    }
    return mtl_cuda_end(&call, status);
}
