/* The checks that swiglu and geglu share. SPDX-License-Identifier: MIT */
#ifndef METALLOID_API_GATED_H
#define METALLOID_API_GATED_H

#include "core/operations.h"

metalloid_status mtl_gated_check(mtl_gated_args *args, const char *op, const DLTensor *gate, const DLTensor *up,
                                 DLTensor *out);

#endif
