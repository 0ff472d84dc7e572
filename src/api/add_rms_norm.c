/* add_rms_norm. SPDX-License-Identifier: MIT */
#include "api/backend.h"
#include "api/norm.h"

metalloid_status metalloid_add_rms_norm(metalloid_context *context, const DLTensor *x, const DLTensor *residual,
                                        const DLTensor *weight, double eps, DLTensor *sum, DLTensor *out) {
    mtl_norm_tensors tensors = {.x = x, .residual = residual, .weight = weight, .sum = sum, .out = out, .added = true};
    mtl_norm_args args;
    MTL_TRY(mtl_norm_check(&args, "add_rms_norm", &tensors, eps));
    return MTL_RUN(rms_norm, context, "add_rms_norm", &args);
}
