/* What these tests use of cmocka, where they are cross-compiled and cmocka for the target is not at hand: the same names, nothing
 * else. SPDX-License-Identifier: MIT */
#ifndef METALLOID_TESTS_CMOCKA_H
#define METALLOID_TESTS_CMOCKA_H

#include <stddef.h>
#include <stdint.h>

struct CMUnitTest {
    const char *name;
    void (*run)(void **state);
};

#define cmocka_unit_test(function) \
    { #function, function }
#define cmocka_run_group_tests_name(group, tests, setup, teardown) \
    cmocka_run_group(group, tests, sizeof tests / sizeof *tests, setup, teardown)
#define cmocka_run_group_tests(tests, setup, teardown) cmocka_run_group_tests_name(#tests, tests, setup, teardown)
/* The number of tests that failed. Groups have no set-up: both must be NULL. */
int cmocka_run_group(const char *group, const struct CMUnitTest *tests, size_t count, void *setup, void *teardown);

__attribute__((format(printf, 1, 2))) void print_message(const char *format, ...);
#define print_error print_message
/* Both leave the running test; as in cmocka, only the test's own thread may call them. */
__attribute__((noreturn)) void cmocka_skip(void);
__attribute__((noreturn, format(printf, 3, 4))) void cmocka_fail(const char *file, int line, const char *format, ...);

#define skip()                          cmocka_skip()
#define fail()                          cmocka_fail(__FILE__, __LINE__, "failed")
#define fail_msg(...)                   cmocka_fail(__FILE__, __LINE__, __VA_ARGS__)

#define assert_true(condition)          ((condition) ? (void)0 : cmocka_fail(__FILE__, __LINE__, "not true: %s", #condition))
#define assert_false(condition)         assert_true(!(condition))
#define assert_null(pointer)            assert_true((pointer) == NULL)
#define assert_non_null(pointer)        assert_true((pointer) != NULL)
#define assert_ptr_equal(a, b)          assert_true((const void *)(a) == (const void *)(b))
#define assert_string_equal(a, b)       assert_true(strcmp(a, b) == 0)
#define assert_string_not_equal(a, b)   assert_true(strcmp(a, b) != 0)
#define assert_memory_equal(a, b, size) assert_true(memcmp(a, b, size) == 0)
#define assert_int_equal(a, b)          cmocka_compare((intmax_t)(a), (intmax_t)(b), #a " and " #b, __FILE__, __LINE__)
void cmocka_compare(intmax_t a, intmax_t b, const char *what, const char *file, int line);

#include <string.h>

#endif
