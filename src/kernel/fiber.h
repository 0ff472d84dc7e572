/* Memory and schedule of threadgroups on the CPU. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_FIBER_H
#define METALLOID_KERNEL_FIBER_H

#include "kernel/msl/abi_cpu.h"

#include <stdbool.h>

/* What one worker needs: kept from launch to launch, since a region of stacks costs system calls. */
typedef struct mtl_workspace {
    mtl_group *group;
    char *
        stacks; /* mtl_most_threads of 1 << stack_bits bytes, aligned to twice all of them, before the group; NULL: none */
    int stack_bits;
    struct mtl_workspace *next;
} mtl_workspace;

/* With stacks of 1 << stack_bits bytes, or none for 0. `separate`: each threadgroup variable in a block of malloc's of its own, which
 * AddressSanitizer watches. NULL: no memory. */
mtl_workspace *mtl_workspace_take(int stack_bits, bool separate);

/* `reusable`: no, where threads were left in the middle. */
void mtl_workspace_give(mtl_workspace *workspace, bool reusable);

#endif
