/* Text that grows. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_TEXT_H
#define METALLOID_KERNEL_TEXT_H

#include "core/status.h"

#include <stdbool.h>
#include <stddef.h>

/* Zero-initialized it is empty. Where memory runs out it stays as it is and `failed` is set, so that whoever builds it asks once, at
 * the end. `data` is NULL or ends with a NUL that `length` does not count. */
typedef struct mtl_text {
    char *data;
    size_t length, capacity;
    bool failed;
} mtl_text;

void mtl_text_add(mtl_text *text, const char *bytes, size_t count);
void mtl_text_add_string(mtl_text *text, const char *string);
void mtl_text_format(mtl_text *text, const char *format, ...) MTL_PRINTF(2, 3);
void mtl_text_free(mtl_text *text); /* and leaves it empty */

static inline const char *mtl_text_string(const mtl_text *text) { return text->data ? text->data : ""; }

#endif
