/* add_layer_norm. SPDX-License-Identifier: MIT */
#include "api/backend.h"
#include "api/norm.h"

metalloid_status metalloid_add_layer_norm(metalloid_context *context, const DLTensor *x, const DLTensor *residual,
                                          const DLTensor *weight, const DLTensor *bias, double eps, DLTensor *sum,
                                          DLTensor *out) {
    mtl_norm_tensors tensors = {
        .x = x, .residual = residual, .weight = weight, .bias = bias, .sum = sum, .out = out, .added = true};
    mtl_norm_args args;
    MTL_TRY(mtl_norm_check(&args, "add_layer_norm", &tensors, eps));
    return MTL_RUN(layer_norm, context, "add_layer_norm", &args);
}
