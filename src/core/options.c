/* Option structs that grow without breaking a compiled caller. SPDX-License-Identifier: MIT */
#include "core/options.h"

enum { MOST_BYTES = 4096 }; /* no option struct comes near; a larger size is an uninitialized one */

metalloid_status mtl_options_read(void *to, const void *defaults, size_t known, const void *from, const char *op) {
    memcpy(to, defaults, known);
    if (!from) return METALLOID_OK;
    size_t size;
    memcpy(&size, from, sizeof size);
    /* Every version of a struct ends at a multiple of its alignment; another size would cut a pointer in two. */
    MTL_REQUIRE(size >= sizeof size && size <= MOST_BYTES && size % _Alignof(int64_t) == 0, op,
                "options.size must be the size of the struct, got %zu", size);
    for (size_t i = known; i < size; i++) {
        MTL_REQUIRE(((const char *)from)[i] == 0, op, "options has a field at byte %zu that this version does not know",
                    i);
    }
    memcpy(to, from, size < known ? size : known);
    memcpy(to, &known, sizeof known);
    return METALLOID_OK;
}
