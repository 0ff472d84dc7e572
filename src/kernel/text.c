/* Text that grows. SPDX-License-Identifier: MIT */
#include "kernel/text.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Room for `count` more bytes and the NUL. */
static bool reserve(mtl_text *text, size_t count) {
    if (text->failed) return false;
    size_t needed;
    if (__builtin_add_overflow(text->length, count, &needed) || __builtin_add_overflow(needed, 1, &needed)) {
        text->failed = true;
        return false;
    }
    if (needed <= text->capacity) return true;
    size_t capacity = needed < 256 ? 256 : needed + needed / 2;
    char *data = realloc(text->data, capacity);
    if (!data) {
        text->failed = true;
        return false;
    }
    text->data = data;
    text->capacity = capacity;
    return true;
}

void mtl_text_add(mtl_text *text, const char *bytes, size_t count) {
    if (!reserve(text, count)) return;
    if (count) memcpy(text->data + text->length, bytes, count);
    text->length += count;
    text->data[text->length] = '\0';
}

void mtl_text_add_string(mtl_text *text, const char *string) { mtl_text_add(text, string, strlen(string)); }

void mtl_text_format(mtl_text *text, const char *format, ...) {
    va_list arguments, again;
    va_start(arguments, format);
    va_copy(again, arguments);
    int count = vsnprintf(NULL, 0, format, arguments);
    va_end(arguments);
    text->failed |= count < 0; /* beyond INT_MAX bytes */
    if (reserve(text, (size_t)count)) {
        vsnprintf(text->data + text->length, (size_t)count + 1, format, again);
        text->length += (size_t)count;
    }
    va_end(again);
}

void mtl_text_free(mtl_text *text) {
    free(text->data);
    *text = (mtl_text){0};
}
