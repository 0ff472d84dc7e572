/* What a compiler says of a kernel, in terms of the user's text. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_MESSAGES_H
#define METALLOID_KERNEL_MESSAGES_H

#include "kernel/source.h"

/* The compiler's messages about the translation as ones about `source` and `header`, behind what it cannot know. */
void mtl_explain(mtl_text *out, const mtl_definition *definition, const char *log);

#endif
