/* Option structs that grow without breaking a compiled caller. SPDX-License-Identifier: MIT */
#ifndef METALLOID_CORE_OPTIONS_H
#define METALLOID_CORE_OPTIONS_H

#include "core/status.h"

/* `from` starts with the size its caller was compiled with. A smaller struct than this library's keeps the defaults for the fields
 * that it does not have; of a larger one, what this library does not know must be zero. NULL: the defaults. */
metalloid_status mtl_options_read(void *to, const void *defaults, size_t known, const void *from, const char *op);

#endif
