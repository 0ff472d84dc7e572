/* geglu. SPDX-License-Identifier: MIT */
#include "api/backend.h"
#include "api/gated.h"

metalloid_status metalloid_geglu(metalloid_context *context, const DLTensor *gate, const DLTensor *up,
                                 metalloid_gelu approximate, DLTensor *out) {
    mtl_gated_args args;
    MTL_REQUIRE(approximate == METALLOID_GELU_ERF || approximate == METALLOID_GELU_TANH, "geglu",
                "approximate must be METALLOID_GELU_ERF or METALLOID_GELU_TANH, got %d", (int)approximate);
    MTL_TRY(mtl_gated_check(&args, "geglu", gate, up, out));
    args.tanh = approximate == METALLOID_GELU_TANH;
    return MTL_RUN(geglu, context, "geglu", &args);
}
