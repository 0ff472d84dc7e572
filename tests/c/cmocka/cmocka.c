/* Runs one test after the other; a failed assertion jumps out of its test. SPDX-License-Identifier: MIT */
#include <cmocka.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

enum { PASSED, FAILED, SKIPPED };
static jmp_buf leave;

void print_message(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
}

void cmocka_fail(const char *file, int line, const char *format, ...) {
    fprintf(stderr, "%s:%d: ", file, line);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\n");
    longjmp(leave, FAILED);
}

void cmocka_skip(void) { longjmp(leave, SKIPPED); }

void cmocka_compare(intmax_t a, intmax_t b, const char *what, const char *file, int line) {
    if (a != b) cmocka_fail(file, line, "%s are not equal: %jd, %jd", what, a, b);
}

static int outcome_of(const struct CMUnitTest *test) {
    void *state = NULL;
    switch (setjmp(leave)) {
    case 0: test->run(&state); return PASSED;
    case FAILED: return FAILED;
    default: return SKIPPED;
    }
}

int cmocka_run_group(const char *group, const struct CMUnitTest *tests, size_t count, void *setup, void *teardown) {
    static const char *const words[] = {"      OK", " FAILED ", " SKIPPED"};
    int number[] = {0, 0, 0};
    if (setup || teardown) abort();
    for (size_t i = 0; i < count; i++) {
        fprintf(stderr, "[ RUN      ] %s\n", tests[i].name);
        int outcome = outcome_of(&tests[i]);
        fprintf(stderr, "[ %s ] %s\n", words[outcome], tests[i].name);
        number[outcome]++;
    }
    fprintf(stderr, "%s: %d passed, %d failed, %d skipped\n", group, number[PASSED], number[FAILED], number[SKIPPED]);
    return number[FAILED];
}
