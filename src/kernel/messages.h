/* What a compiler says of a kernel, in terms of the user's text. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_MESSAGES_H
#define METALLOID_KERNEL_MESSAGES_H

#include "core/status.h"
#include "kernel/source.h"

/* The failure of a kernel that does not compile: behind `hint` and what a compiler cannot know its messages about the
 * translation, as ones about `source` and `header`. */
metalloid_status mtl_does_not_compile(const char *op, const mtl_definition *definition, const mtl_text *hint,
                                      const mtl_text *log);

/* The messages alone. */
void mtl_explain(mtl_text *out, const mtl_definition *definition, const char *log);

#endif
