/* The text of src/kernel/msl, which stands before every compiled Metal kernel. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_MSL_H
#define METALLOID_KERNEL_MSL_H

#include <stddef.h>

typedef struct mtl_msl_part {
    const char *name, *text;
    size_t length;
} mtl_msl_part;

extern const mtl_msl_part mtl_msl_parts[]; /* in their order */
extern const int mtl_msl_part_count;

#endif
