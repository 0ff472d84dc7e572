/* Status codes and the thread's last message. SPDX-License-Identifier: MIT */
#include "core/status.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define MTL_STRING_(x) #x
#define MTL_STRING(x)  MTL_STRING_(x)

static _Thread_local char last_error[512];

/* What a compiler says is longer: then this, which goes with the thread. */
static _Thread_local char *long_error;
static pthread_key_t long_error_key;
static bool has_key;

__attribute__((constructor)) static void make_key(void) { has_key = pthread_key_create(&long_error_key, free) == 0; }
__attribute__((destructor)) static void delete_key(void) {
    if (!has_key) return;
    free(long_error);
    long_error = NULL;
    pthread_key_delete(long_error_key);
}

static void keep_long(char *text) {
    free(long_error);
    long_error = text;
    pthread_setspecific(long_error_key, text);
}

metalloid_status mtl_fail(metalloid_status status, const char *format, ...) {
    va_list arguments, again;
    va_start(arguments, format);
    va_copy(again, arguments);
    int length = vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    if (long_error) keep_long(NULL);
    if (length >= (int)sizeof last_error && has_key) {
        char *text = malloc((size_t)length + 1);
        if (text) {
            vsnprintf(text, (size_t)length + 1, format, again);
            keep_long(text);
        }
    }
    va_end(again);
    return status;
}

const char *metalloid_last_error(void) { return long_error ? long_error : last_error; }

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
