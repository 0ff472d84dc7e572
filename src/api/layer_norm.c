/* layer_norm. SPDX-License-Identifier: MIT */
#include "api/backend.h"
#include "api/norm.h"

metalloid_status metalloid_layer_norm(metalloid_context *context, const DLTensor *x, const DLTensor *weight,
                                      const DLTensor *bias, double eps, DLTensor *out) {
    mtl_norm_args args;
    MTL_TRY(mtl_norm_check(&args, "layer_norm", &(mtl_norm_tensors){.x = x, .weight = weight, .bias = bias, .out = out},
                           eps));
    return MTL_RUN(layer_norm, context, "layer_norm", &args);
}
