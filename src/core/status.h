/* How a call says what went wrong. SPDX-License-Identifier: MIT */
#ifndef METALLOID_CORE_STATUS_H
#define METALLOID_CORE_STATUS_H

#include <metalloid/metalloid.h>

#if defined(__GNUC__)
#define MTL_PRINTF(message, first) __attribute__((format(printf, message, first), cold))
#else
#define MTL_PRINTF(message, first)
#endif

/* Keeps the message for metalloid_last_error() and returns the status, so that a check is one return statement. */
metalloid_status mtl_fail(metalloid_status status, const char *format, ...) MTL_PRINTF(2, 3);

/* Every message starts with the operation: "rope: dims must be even and 2 or more, got 7". */
#define MTL_REQUIRE(condition, op, format, ...)                                                        \
    do {                                                                                               \
        if (!(condition)) return mtl_fail(METALLOID_INVALID_ARGUMENT, "%s: " format, op, __VA_ARGS__); \
    } while (0)

#define MTL_TRY(call)                                        \
    do {                                                     \
        metalloid_status mtl_status_ = (call);               \
        if (mtl_status_ != METALLOID_OK) return mtl_status_; \
    } while (0)

#endif
