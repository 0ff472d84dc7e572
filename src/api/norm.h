/* The checks that the four norms share. SPDX-License-Identifier: MIT */
#ifndef METALLOID_API_NORM_H
#define METALLOID_API_NORM_H

#include "core/operations.h"

typedef struct mtl_norm_tensors {
    const DLTensor *x, *residual, *weight, *bias;
    DLTensor *sum, *out;
    bool added; /* residual and sum take part */
} mtl_norm_tensors;

metalloid_status mtl_norm_check(mtl_norm_args *args, const char *op, const mtl_norm_tensors *tensors, double eps);

#endif
