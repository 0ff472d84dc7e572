/* Settings of the environment that are not understood: one line on stderr, once a process. SPDX-License-Identifier: MIT */
#include "core/environment.h"
#include "core/threads.h"
#include "kernel/cache.h"
#include "support.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct setting {
    const char *name, *value;
    void (*read)(void);
    const char *says; /* behind "metalloid: <name>=<value> is ignored: "; NULL: nothing at all */
} setting;

static char directory[] = "/tmp/metalloid-environment-XXXXXX";

static void read_threads(void) { assert_true(mtl_default_threads() >= 1); }

static void read_isa(void) { assert_true(strlen(metalloid_cpu_isa()) > 0); }

static void store_an_entry(void) {
    mtl_digest key = {{0}};
    mtl_cache_store(&key, "bytes", 5);
}

static void store_in_a_directory(void) {
    setenv("METALLOID_CACHE", directory, 1);
    store_an_entry();
}

/* What a child says that reads the setting twice, and what its own children do. */
static const char *said_by_child(const setting *s) {
    static char said[4096];
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    fflush(NULL);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        close(ends[0]);
        close(ends[1]);
        setenv(s->name, s->value, 1);
        s->read();
        s->read();
        pid_t grandchild = fork();
        if (grandchild == 0) {
            s->read();
            _exit(0);
        }
        waitpid(grandchild, NULL, 0);
        _exit(0);
    }
    close(ends[1]);
    size_t length = 0;
    for (ssize_t count; (count = read(ends[0], said + length, sizeof said - 1 - length)) > 0;) length += (size_t)count;
    said[length] = '\0';
    close(ends[0]);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    return said;
}

static void what_is_not_understood_is_said_once(void **state) {
    (void)state;
    static const char integer[] = "it must be an integer from 1 to 1024; there is a thread for each CPU",
                      isa[] = "this processor has plain", place[] = "it must be the absolute path of a directory",
                      size[] = "it must be a number of MiB, 0 or more; 256 are kept instead";
    static const setting settings[] = {
        {"METALLOID_NUM_THREADS", "abc", read_threads, integer},
        {"METALLOID_NUM_THREADS", "-1", read_threads, integer},
        {"METALLOID_NUM_THREADS", "0", read_threads, integer},
        {"METALLOID_NUM_THREADS", "1025", read_threads, integer},
        {"METALLOID_NUM_THREADS", "99999999999999999999", read_threads, integer},
        {"METALLOID_NUM_THREADS", "2.5", read_threads, integer},
        {"METALLOID_NUM_THREADS", " ", read_threads, integer},
        {"METALLOID_NUM_THREADS", "2", read_threads, NULL},
        {"METALLOID_NUM_THREADS", "", read_threads, NULL},
        {"METALLOID_CPU_ISA", "sse9", read_isa, isa},
        {"METALLOID_CPU_ISA", "Plain", read_isa, isa},
        {"METALLOID_CPU_ISA", "plain", read_isa, NULL},
        {"METALLOID_CPU_ISA", "", read_isa, NULL},
        {"METALLOID_CACHE", "relative", store_an_entry, place},
        {"METALLOID_CACHE", "/proc/nothing", store_an_entry, place},
        {"METALLOID_CACHE", "/dev/null", store_an_entry, place},
        {"METALLOID_CACHE", directory, store_an_entry, NULL},
        {"METALLOID_CACHE_MIB", "1 GiB", store_in_a_directory, size},
        {"METALLOID_CACHE_MIB", "-1", store_in_a_directory, size},
        {"METALLOID_CACHE_MIB", "nan", store_in_a_directory, size},
        {"METALLOID_CACHE_MIB", " ", store_in_a_directory, size},
        {"METALLOID_CACHE_MIB", "0.5", store_in_a_directory, NULL},
        {"METALLOID_CACHE_MIB", "", store_in_a_directory, NULL},
    };
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        const setting *s = &settings[i];
        const char *said = said_by_child(s);
        if (!s->says) {
            assert_string_equal(said, "");
            continue;
        }
        char start[512];
        snprintf(start, sizeof start, "metalloid: %s=%s is ignored: %s", s->name, s->value, s->says);
        if (strncmp(said, start, strlen(start)) != 0) fail_msg("'%s' instead of '%s'", said, start);
        assert_ptr_equal(strchr(said, '\n'), said + strlen(said) - 1); /* one line */
    }
}

/* A value may be anything, of any length. */
static void a_value_is_shown_as_one_line(void **state) {
    (void)state;
    char value[100000];
    memset(value, 'x', sizeof value - 1);
    value[sizeof value - 1] = '\0';
    memcpy(value, "a\nb\033[2Jc\177%s%n", 13);
    setting s = {"METALLOID_NUM_THREADS", value, read_threads, NULL};
    const char *said = said_by_child(&s);
    assert_non_null(strstr(said, "METALLOID_NUM_THREADS=a?b?[2Jc?%s%n"));
    assert_non_null(strstr(said, "x is ignored: it must be an integer"));
    assert_ptr_equal(strchr(said, '\n'), said + strlen(said) - 1);
    assert_true(strlen(said) < 500);
}

static void *say(void *argument) {
    (void)argument;
    mtl_setting_ignored("METALLOID_OF_A_TEST", "x", "nothing is used instead");
    return NULL;
}

static void say_in_threads(void) {
    pthread_t threads[8];
    for (int i = 0; i < 8; i++) assert_int_equal(pthread_create(&threads[i], NULL, say, NULL), 0);
    for (int i = 0; i < 8; i++) pthread_join(threads[i], NULL);
}

static void threads_that_find_it_at_once_say_it_once(void **state) {
    (void)state;
    if (!CHILD_MAY_START_THREADS) skip();
    setting s = {"METALLOID_OF_A_TEST", "x", say_in_threads, NULL};
    assert_string_equal(said_by_child(&s), "metalloid: METALLOID_OF_A_TEST=x is ignored: nothing is used instead\n");
}

static void remove_directory(void) {
    char entry[sizeof directory + 80];
    snprintf(entry, sizeof entry, "%s/%064d.bin", directory, 0);
    unlink(entry);
    rmdir(directory);
}

int main(void) {
    /* Read in children alone: what a process has read, it keeps. */
    static const char *const names[] = {"METALLOID_NUM_THREADS", "METALLOID_CPU_ISA", "METALLOID_CACHE",
                                        "METALLOID_CACHE_MIB"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) unsetenv(names[i]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_not_understood_is_said_once),
        cmocka_unit_test(a_value_is_shown_as_one_line),
        cmocka_unit_test(threads_that_find_it_at_once_say_it_once),
    };
    if (!mkdtemp(directory)) return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    remove_directory();
    return failed;
}
