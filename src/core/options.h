/* Option structs that grow without breaking a compiled caller. SPDX-License-Identifier: MIT */
#ifndef METALLOID_CORE_OPTIONS_H
#define METALLOID_CORE_OPTIONS_H

#include "core/status.h"

#include <string.h>

/* `from` starts with the size its caller was compiled with. A smaller struct than this library's keeps the defaults for the fields
 * that it does not have; of a larger one, what this library does not know must be zero. NULL: the defaults. */
metalloid_status mtl_options_read(void *to, const void *defaults, size_t known, const void *from, const char *op);

/* A flag by its byte, since a bool that holds anything but 0 or 1 must not be read as one. */
static inline bool mtl_option_flag(const bool *flag) {
    unsigned char byte;
    memcpy(&byte, flag, sizeof byte);
    return byte != 0;
}

#endif
