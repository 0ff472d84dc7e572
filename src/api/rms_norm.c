/* rms_norm. SPDX-License-Identifier: MIT */
#include "api/backend.h"
#include "api/norm.h"

metalloid_status metalloid_rms_norm(metalloid_context *context, const DLTensor *x, const DLTensor *weight, double eps,
                                    DLTensor *out) {
    mtl_norm_args args;
    MTL_TRY(mtl_norm_check(&args, "rms_norm", &(mtl_norm_tensors){.x = x, .weight = weight, .out = out}, eps));
    return MTL_RUN(rms_norm, context, "rms_norm", &args);
}
