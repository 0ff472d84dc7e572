/* cross_entropy: an item is a row of logits. SPDX-License-Identifier: MIT */
#include "cpu/kernels.h"

metalloid_status mtl_cpu_cross_entropy(const metalloid_context *context, const char *op,
                                       const mtl_cross_entropy_args *args) {
    mtl_kernel kernel = mtl_cpu_kernels_for(context, args->in_double)->cross_entropy;
    return mtl_cpu_run(context, op, kernel, args, args->rows.count, args->classes * 4, 0);
}
