/* Contexts, thread counts, versions and messages. SPDX-License-Identifier: MIT */
#include "support.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *no_memory(void *user, size_t bytes) {
    (void)user;
    (void)bytes;
    return NULL;
}

static void nothing_to_release(void *user, void *pointer) {
    (void)user;
    (void)pointer;
}

static void expect_invalid(metalloid_status status, const char *message) {
    assert_int_equal(status, METALLOID_INVALID_ARGUMENT);
    assert_memory_equal(metalloid_last_error(), message, strlen(message));
}

static void the_first_message_of_a_thread_is_empty(void **state) {
    (void)state;
    assert_string_equal(metalloid_last_error(), "");
}

static void contexts_refuse_bad_arguments(void **state) {
    (void)state;
    metalloid_context *context;
    expect_invalid(metalloid_context_create(NULL), "context_create: context ");
    expect_ok(metalloid_context_create(&context));
    expect_invalid(metalloid_context_set_threads(NULL, 1), "context_set_threads: context ");
    expect_invalid(metalloid_context_set_threads(context, -1), "context_set_threads: threads ");
    expect_invalid(metalloid_context_set_threads(context, INT32_MAX), "context_set_threads: threads ");
    expect_invalid(metalloid_context_set_allocator(NULL, NULL), "context_set_allocator: context ");
    metalloid_allocator half = {no_memory, NULL, NULL};
    expect_invalid(metalloid_context_set_allocator(context, &half), "context_set_allocator: allocator ");
    half = (metalloid_allocator){NULL, nothing_to_release, NULL};
    expect_invalid(metalloid_context_set_allocator(context, &half), "context_set_allocator: allocator ");
    expect_invalid(metalloid_context_set_stream(NULL, NULL), "context_set_stream: context ");
    expect_ok(metalloid_context_set_stream(context, NULL));
    metalloid_context_destroy(context);
    metalloid_context_destroy(NULL);
}

static void the_process_wide_count_is_set_and_reset(void **state) {
    (void)state;
    int at_first = metalloid_get_num_threads();
    assert_true(at_first >= 1);
    expect_ok(metalloid_set_num_threads(3));
    assert_int_equal(metalloid_get_num_threads(), 3);
    expect_invalid(metalloid_set_num_threads(-1), "set_num_threads: threads ");
    expect_invalid(metalloid_set_num_threads(INT32_MAX), "set_num_threads: threads ");
    assert_int_equal(metalloid_get_num_threads(), 3);
    expect_ok(metalloid_set_num_threads(0));
    assert_int_equal(metalloid_get_num_threads(), at_first);
}

static void every_status_has_words(void **state) {
    (void)state;
    static const metalloid_status all[] = {METALLOID_OK, METALLOID_INVALID_ARGUMENT, METALLOID_OUT_OF_MEMORY,
                                           METALLOID_UNSUPPORTED};
    for (int i = 0; i < 4; i++) {
        assert_true(strlen(metalloid_status_string(all[i])) > 0);
        for (int j = 0; j < i; j++)
            assert_string_not_equal(metalloid_status_string(all[i]), metalloid_status_string(all[j]));
    }
    metalloid_status unknown;
    int number = 99;
    memcpy(&unknown, &number, sizeof unknown);
    assert_non_null(metalloid_status_string(unknown));
}

static void the_version_is_the_header_s(void **state) {
    (void)state;
    char expected[64];
    snprintf(expected, sizeof expected, "%d.%d.%d", METALLOID_VERSION_MAJOR, METALLOID_VERSION_MINOR,
             METALLOID_VERSION_PATCH);
    assert_string_equal(metalloid_version(), expected);
}

static void the_instruction_set_has_a_name(void **state) {
    (void)state;
    assert_true(strlen(metalloid_cpu_isa()) > 0);
    const char *wanted = getenv("METALLOID_CPU_ISA");
    if (wanted && strcmp(wanted, "plain") == 0) assert_string_equal(metalloid_cpu_isa(), "plain");
}

static void *fail_elsewhere(void *seen) {
    int64_t shape = 1;
    float data = 0;
    DLTensor x = {.data = &data, .device = {kDLCPU, 0}, .ndim = 1, .dtype = dtype_code(F32), .shape = &shape};
    const char *before = metalloid_last_error();
    bool empty_at_first = strlen(before) == 0;
    bool refused = metalloid_rms_norm(NULL, &x, NULL, -1, &x) == METALLOID_INVALID_ARGUMENT;
    *(bool *)seen = empty_at_first && refused && strncmp(metalloid_last_error(), "rms_norm: eps", 13) == 0;
    return NULL;
}

static void messages_belong_to_their_thread(void **state) {
    (void)state;
    expect_invalid(metalloid_set_num_threads(-7), "set_num_threads: threads ");
    pthread_t thread;
    bool right = false;
    assert_int_equal(pthread_create(&thread, NULL, fail_elsewhere, &right), 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_true(right);
    assert_memory_equal(metalloid_last_error(), "set_num_threads: ", 17);
}

static void success_keeps_the_last_message(void **state) {
    (void)state;
    expect_invalid(metalloid_set_num_threads(-7), "set_num_threads: threads ");
    expect_ok(metalloid_set_num_threads(0));
    assert_memory_equal(metalloid_last_error(), "set_num_threads: ", 17);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_first_message_of_a_thread_is_empty),
        cmocka_unit_test(contexts_refuse_bad_arguments),
        cmocka_unit_test(the_process_wide_count_is_set_and_reset),
        cmocka_unit_test(every_status_has_words),
        cmocka_unit_test(the_version_is_the_header_s),
        cmocka_unit_test(the_instruction_set_has_a_name),
        cmocka_unit_test(messages_belong_to_their_thread),
        cmocka_unit_test(success_keeps_the_last_message),
    };
    return cmocka_run_group_tests_name("context", tests, NULL, NULL);
}
