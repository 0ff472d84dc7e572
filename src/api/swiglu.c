/* swiglu. SPDX-License-Identifier: MIT */
#include "api/backend.h"
#include "api/gated.h"

metalloid_status metalloid_swiglu(metalloid_context *context, const DLTensor *gate, const DLTensor *up, DLTensor *out) {
    mtl_gated_args args;
    MTL_TRY(mtl_gated_check(&args, "swiglu", gate, up, out));
    return MTL_RUN(swiglu, context, "swiglu", &args);
}
