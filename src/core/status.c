/* Status codes and the thread's last message. SPDX-License-Identifier: MIT */
#include "core/status.h"

#include <stdarg.h>
#include <stdio.h>

#define MTL_STRING_(x) #x
#define MTL_STRING(x)  MTL_STRING_(x)

static _Thread_local char last_error[512];

metalloid_status mtl_fail(metalloid_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

const char *metalloid_last_error(void) { return last_error; }

const char *metalloid_status_string(metalloid_status status) {
    switch (status) {
    case METALLOID_OK: return "ok";
    case METALLOID_INVALID_ARGUMENT: return "invalid argument";
    case METALLOID_OUT_OF_MEMORY: return "out of memory";
    case METALLOID_UNSUPPORTED: return "unsupported device";
    case METALLOID_DEVICE_FAILURE: return "device failure";
    case METALLOID_COMPILE_FAILED: return "compilation failed";
    case METALLOID_KERNEL_FAILED: return "kernel stopped";
    }
    return "unknown status";
}

const char *metalloid_version(void) {
    return MTL_STRING(METALLOID_VERSION_MAJOR) "." MTL_STRING(METALLOID_VERSION_MINOR) "." MTL_STRING(
        METALLOID_VERSION_PATCH);
}
