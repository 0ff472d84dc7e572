/* The checks that rope and qk_norm_rope share. SPDX-License-Identifier: MIT */
#ifndef METALLOID_API_ROPE_H
#define METALLOID_API_ROPE_H

#include "core/operations.h"

/* What the options name, as views. */
typedef struct mtl_rope_tensors {
    mtl_view freqs, positions; /* absent where base and offset serve */
    metalloid_time_axis time_axis;
} mtl_rope_tensors;

/* Reads the options and checks what does not depend on x. */
metalloid_status mtl_rope_read_options(mtl_rope_args *args, mtl_rope_tensors *tensors,
                                       const metalloid_rope_options *given, int64_t dims, const char *op);

/* The axis of `x` that time runs along. */
int mtl_rope_time_axis(const mtl_view *x, metalloid_time_axis time_axis);

/* With the extents of `x` known: dims, the shape of the positions, and the range of each of them. */
metalloid_status mtl_rope_check_extents(mtl_rope_args *args, const mtl_rope_tensors *tensors, const mtl_view *x,
                                        const char *op);

void mtl_rope_fill_side(mtl_rope_side *side, const mtl_view *x, const mtl_view *out, int time_axis);

#endif
