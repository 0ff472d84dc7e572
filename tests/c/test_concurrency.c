/* Calls from many threads at once, in a forked child, and again: always the same bits. SPDX-License-Identifier: MIT */
#include "every_operation.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

/* ThreadSanitizer would end a forked child that starts a thread. */
__attribute__((visibility("default"))) const char *__tsan_default_options(void);
const char *__tsan_default_options(void) { return "die_after_fork=0:atexit_sleep_ms=0"; }

enum { CALLERS = 8, MOST_OUTPUTS = 3 };

/* A sample call whose outputs' bytes are kept to compare with. */
typedef struct prepared {
    operation op;
    tensor *output[MOST_OUTPUTS];
    char *expected[MOST_OUTPUTS];
    int outputs;
} prepared;

static void prepare(prepared *p, operation op) {
    memset(p, 0, sizeof *p);
    p->op = op;
    for (int i = 0; i < op.count; i++) {
        if (op.argument[i].flags & WRITTEN) p->output[p->outputs++] = op.argument[i].tensor;
    }
    expect_ok(op.call(&op));
    for (int i = 0; i < p->outputs; i++) {
        size_t bytes = (size_t)(p->output[i]->elements * dtype_size(p->output[i]->type));
        p->expected[i] = malloc(bytes);
        assert_non_null(p->expected[i]);
        for (int64_t e = 0; e < p->output[i]->elements; e++) {
            size_t size = (size_t)dtype_size(p->output[i]->type);
            memcpy(p->expected[i] + (size_t)e * size, element(p->output[i], e), size);
        }
    }
}

/* Spoils the outputs, calls, and compares. Asserts nothing: it also runs on threads that are not cmocka's. */
static bool repeats(const prepared *p) {
    for (int i = 0; i < p->outputs; i++) {
        size_t size = (size_t)dtype_size(p->output[i]->type);
        bool in_and_out =
            strstr(p->op.name, "kv_cache") && i < 2; /* the caches are inputs too; the call writes them again */
        for (int64_t e = 0; e < p->output[i]->elements && !in_and_out; e++)
            memset(element(p->output[i], e), 0x3c, size);
    }
    if (p->op.call(&p->op) != METALLOID_OK) return false;
    for (int i = 0; i < p->outputs; i++) {
        size_t size = (size_t)dtype_size(p->output[i]->type);
        for (int64_t e = 0; e < p->output[i]->elements; e++) {
            if (memcmp(p->expected[i] + (size_t)e * size, element(p->output[i], e), size) != 0) return false;
        }
    }
    return true;
}

static void discard(prepared *p) {
    for (int i = 0; i < p->outputs; i++) free(p->expected[i]);
}

static void repeated_calls_give_the_same_bits_whatever_runs_them(void **state) {
    (void)state;
    seed(1);
    operation all[OPERATIONS];
    sample_every_operation(all, LARGE);
    for (int i = 0; i < OPERATIONS; i++) {
        for (int threads = 1; threads <= 4; threads++) {
            metalloid_context *context;
            expect_ok(metalloid_context_create(&context));
            expect_ok(metalloid_context_set_threads(context, threads));
            all[i].context = context;
            prepared p;
            prepare(&p, all[i]);
            for (int round = 0; round < scaled(5); round++) {
                if (!repeats(&p)) fail_msg("%s with %d threads gave other bits the next time", all[i].name, threads);
            }
            discard(&p);
            metalloid_context_destroy(context);
        }
    }
    release_all();
}

static void bits_do_not_depend_on_the_thread_count(void **state) {
    (void)state;
    seed(2);
    operation all[OPERATIONS];
    sample_every_operation(all, LARGE);
    metalloid_context *context;
    expect_ok(metalloid_context_create(&context));
    for (int i = 0; i < OPERATIONS; i++) {
        all[i].context = context;
        expect_ok(metalloid_context_set_threads(context, 1));
        prepared p;
        prepare(&p, all[i]);
        for (int threads = 2; threads <= 5; threads++) {
            expect_ok(metalloid_context_set_threads(context, threads));
            if (!repeats(&p)) fail_msg("%s gave other bits with %d threads than with one", all[i].name, threads);
        }
        discard(&p);
    }
    metalloid_context_destroy(context);
    release_all();
}

typedef struct caller {
    prepared calls[OPERATIONS];
    metalloid_context *context; /* NULL: the default one */
    pthread_barrier_t *start;
    int first, rounds, wrong, done;
} caller;

static void *call_everything(void *argument) {
    caller *c = argument;
    pthread_barrier_wait(c->start);
    for (int round = 0; round < c->rounds; round++) {
        for (int i = 0; i < OPERATIONS; i++) { /* each caller begins with another operation */
            c->wrong += !repeats(&c->calls[(c->first + i) % OPERATIONS]);
            c->done++;
            DLTensor *x = c->calls[0].op.given[0];
            c->wrong += metalloid_rms_norm(c->context, x, NULL, -1, x) != METALLOID_INVALID_ARGUMENT;
            c->wrong += strncmp(metalloid_last_error(), "rms_norm: eps", 13) != 0;
        }
    }
    return NULL;
}

static void eight_threads_call_different_operations_at_once(void **state) {
    (void)state;
    static caller callers[CALLERS];
    pthread_barrier_t start;
    assert_int_equal(pthread_barrier_init(&start, NULL, CALLERS), 0);
    expect_ok(metalloid_set_num_threads(3));
    for (int i = 0; i < CALLERS; i++) {
        seed((uint64_t)i);
        callers[i] = (caller){.start = &start, .first = i, .rounds = scaled(6)};
        if (i % 2) {
            expect_ok(metalloid_context_create(&callers[i].context));
            expect_ok(metalloid_context_set_threads(callers[i].context, 1 + i % 4));
        }
        operation all[OPERATIONS];
        sample_every_operation(all, LARGE);
        for (int j = 0; j < OPERATIONS; j++) {
            all[j].context = callers[i].context;
            prepare(&callers[i].calls[j], all[j]);
        }
    }
    pthread_t threads[CALLERS];
    for (int i = 0; i < CALLERS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, call_everything, &callers[i]), 0);
    int wrong = 0, done = 0;
    for (int i = 0; i < CALLERS; i++) {
        assert_int_equal(pthread_join(threads[i], NULL), 0);
        wrong += callers[i].wrong;
        done += callers[i].done;
        for (int j = 0; j < OPERATIONS; j++) discard(&callers[i].calls[j]);
        metalloid_context_destroy(callers[i].context);
    }
    pthread_barrier_destroy(&start);
    expect_ok(metalloid_set_num_threads(0));
    release_all();
    assert_int_equal(wrong, 0);
    report("calls from 8 threads at once", done);
}

/* fork() copies the caller's thread alone: the pool of the parent is gone in the child, which must not wait for it. */
static void a_forked_child_calls_every_operation(void **state) {
    (void)state;
    if (!CHILD_MAY_START_THREADS) skip();
    seed(3);
    metalloid_context *context;
    expect_ok(metalloid_context_create(&context));
    expect_ok(metalloid_context_set_threads(context, 4));
    operation all[OPERATIONS];
    sample_every_operation(all, LARGE);
    prepared calls[OPERATIONS];
    for (int i = 0; i < OPERATIONS; i++) {
        all[i].context = context;
        prepare(&calls[i], all[i]); /* starts the pool in the parent */
    }
    for (int round = 0; round < 3; round++) {
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            alarm(60); /* rather than hang */
            int wrong = 0;
            for (int i = 0; i < OPERATIONS; i++) wrong += !repeats(&calls[i]);
            _exit(wrong);
        }
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFEXITED(status));
        assert_int_equal(WEXITSTATUS(status), 0);
        for (int i = 0; i < OPERATIONS; i++) assert_true(repeats(&calls[i])); /* and the parent goes on */
    }
    for (int i = 0; i < OPERATIONS; i++) discard(&calls[i]);
    metalloid_context_destroy(context);
    release_all();
}

typedef struct forking {
    prepared *calls;
    int stop, wrong;
} forking;

static void *call_until_stopped(void *argument) {
    forking *f = argument;
    for (int i = 0; !__atomic_load_n(&f->stop, __ATOMIC_ACQUIRE); i++) f->wrong += !repeats(&f->calls[i % OPERATIONS]);
    return NULL;
}

#ifdef __SANITIZE_ADDRESS__
#define ALLOCATOR_SURVIVES_FORK \
    0 /* with gcc 12's AddressSanitizer, a lock of malloc that another thread held stays so */
#else
#define ALLOCATOR_SURVIVES_FORK 1
#endif

/* The pool is busy with another thread's call at the moment of the fork. */
static void a_child_forked_in_the_middle_of_a_call_works_too(void **state) {
    (void)state;
    if (!CHILD_MAY_START_THREADS || !ALLOCATOR_SURVIVES_FORK) skip();
    static prepared busy[OPERATIONS], calls[OPERATIONS];
    operation all[OPERATIONS];
    expect_ok(metalloid_set_num_threads(3));
    seed(4);
    sample_every_operation(all, LARGE);
    for (int i = 0; i < OPERATIONS; i++) prepare(&busy[i], all[i]);
    sample_every_operation(all, LARGE);
    for (int i = 0; i < OPERATIONS; i++) prepare(&calls[i], all[i]);
    forking f = {.calls = busy};
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, call_until_stopped, &f), 0);
    int failed = 0, forks = scaled(10);
    for (int round = 0; round < forks; round++) {
        pid_t child = fork();
        if (child == 0) {
            alarm(60);
            int wrong = 0;
            for (int i = 0; i < OPERATIONS; i++) wrong += !repeats(&calls[(round + i) % OPERATIONS]);
            _exit(wrong);
        }
        int status = 1;
        failed += child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status) || WEXITSTATUS(status) != 0;
    }
    __atomic_store_n(&f.stop, 1, __ATOMIC_RELEASE);
    assert_int_equal(pthread_join(thread, NULL), 0);
    for (int i = 0; i < OPERATIONS; i++) {
        discard(&busy[i]);
        discard(&calls[i]);
    }
    release_all();
    expect_ok(metalloid_set_num_threads(0));
    assert_int_equal(failed, 0);
    assert_int_equal(f.wrong, 0);
    report("forks while another thread calls", forks);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(repeated_calls_give_the_same_bits_whatever_runs_them),
        cmocka_unit_test(bits_do_not_depend_on_the_thread_count),
        cmocka_unit_test(eight_threads_call_different_operations_at_once),
        cmocka_unit_test(a_forked_child_calls_every_operation),
        cmocka_unit_test(a_child_forked_in_the_middle_of_a_call_works_too),
    };
    return cmocka_run_group_tests_name("concurrency", tests, NULL, NULL);
}
