/* Settings of the environment. SPDX-License-Identifier: MIT */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* secure_getenv */
#endif
#include "core/environment.h"

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_SETTINGS = 16, MOST_SHOWN = 200 };

static _Atomic(const char *) said[MOST_SETTINGS];

const char *mtl_setting(const char *name) {
    const char *value = secure_getenv(name);
    return value && *value ? value : NULL;
}

/* Whether nobody has asked before. */
static bool is_first(const char *name) {
    for (int i = 0; i < MOST_SETTINGS; i++) {
        const char *other = NULL;
        if (atomic_compare_exchange_strong(&said[i], &other, name)) return true;
        if (strcmp(other, name) == 0) return false;
    }
    return false;
}

void mtl_setting_ignored(const char *name, const char *value, const char *format, ...) {
    if (!is_first(name)) return;
    int saved = errno;
    char shown[MOST_SHOWN + 1], words[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(words, sizeof words, format, arguments); // NOLINT: clang-tidy 14 takes the list for uninitialized
    va_end(arguments);
    snprintf(shown, sizeof shown, "%s", value);
    for (char *at = shown; *at; at++) { /* one line, and nothing that a terminal obeys */
        if ((unsigned char)*at < ' ' || *at == 0x7f) *at = '?';
    }
    fprintf(stderr, "metalloid: %s=%s is ignored: %s\n", name, shown, words);
    errno = saved;
}
