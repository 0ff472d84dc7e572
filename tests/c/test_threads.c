/* The thread pool: what it promises about parts, workers, forks, CPUs, signals and idle time. Parts never assert
 * (cmocka jumps out of the failing thread's stack); they count, and the test asserts on the counts. Counts that only
 * one thread may touch are plain, so that ThreadSanitizer checks the same promise. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "core/threads.h"

#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#ifdef __linux__
#include <dirent.h>
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif
#ifdef MTL_THREADS_MODULE
#include <dlfcn.h>
#endif

/* ThreadSanitizer would end a forked child that starts a thread, and adds a second to every exit. */
__attribute__((visibility("default"))) const char *__tsan_default_options(void);
const char *__tsan_default_options(void) { return "die_after_fork=0:atexit_sleep_ms=0"; }

enum { MOST_THREADS = 8, MOST_PARTS = 1000, PATIENCE_US = 5 * 1000 * 1000 /* then a test fails rather than hangs */ };

static int64_t clock_ns(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void sleep_us(long us) {
    nanosleep(&(struct timespec){.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000}, NULL);
}

static void work_us(int us) {
    for (int64_t end = clock_ns(CLOCK_MONOTONIC) + us * 1000; clock_ns(CLOCK_MONOTONIC) < end;) {}
}

/* ---- parts ---- */

struct counts {
    int runs[MOST_PARTS];
};

static void count_part(void *job, int part, int worker) {
    (void)worker;
    ++((struct counts *)job)->runs[part];
    if (part % 8 == 0) {
        work_us(2); /* so that others get their share, and jobs of several callers overlap */
    }
}

static bool runs_each_part_once(int threads, int parts) {
    struct counts counts = {{0}};
    mtl_parallel_run(threads, parts, count_part, &counts);
    for (int part = 0; part < MOST_PARTS; ++part) {
        if (counts.runs[part] != (part < parts)) {
            return false;
        }
    }
    return true;
}

static void every_part_runs_exactly_once(void **state) {
    (void)state;
    const int threads[] = {-1, 0, 1, 2, 3, MOST_THREADS};
    const int parts[] = {-1, 0, 1, 2, 3, 7, 64, MOST_PARTS};
    for (size_t t = 0; t < sizeof threads / sizeof *threads; ++t) {
        for (size_t p = 0; p < sizeof parts / sizeof *parts; ++p) {
            for (int repeat = 0; repeat < 50; ++repeat) {
                assert_true(runs_each_part_once(threads[t], parts[p]));
            }
        }
    }
}

/* A job whose parts wait for each other: it ends in time only if `parts` threads run it at the same moment. */
struct meeting {
    int parts;
    atomic_int arrived;
    atomic_int late;
};

static void meet(void *job, int part, int worker) {
    (void)part;
    (void)worker;
    struct meeting *meeting = job;
    int64_t end = clock_ns(CLOCK_MONOTONIC) + (int64_t)PATIENCE_US * 1000;
    atomic_fetch_add(&meeting->arrived, 1);
    while (atomic_load(&meeting->arrived) < meeting->parts) {
        if (clock_ns(CLOCK_MONOTONIC) > end) {
            atomic_fetch_add(&meeting->late, 1);
            return;
        }
        sched_yield();
    }
}

static bool threads_meet(int threads) {
    struct meeting meeting = {.parts = threads};
    mtl_parallel_run(threads, threads, meet, &meeting);
    return atomic_load(&meeting.late) == 0;
}

static void parts_run_at_the_same_time(void **state) {
    (void)state;
    for (int threads = 2; threads <= MOST_THREADS; ++threads) {
        assert_true(threads_meet(threads));
    }
}

/* Pauses around the time at which workers go to sleep, where an offer and a worker's last look cross. */
static void no_wake_up_is_lost(void **state) {
    (void)state;
    for (int i = 0; i < 1000; ++i) {
        assert_true(threads_meet(2));
        work_us(i % 100);
    }
}

/* ---- workers ---- */

struct workers {
    int threads;
    pthread_t caller;
    atomic_int inside[MOST_THREADS];
    int parts_of[MOST_THREADS];
    atomic_int errors;
};

static void use_worker_index(void *job, int part, int worker) {
    (void)part;
    struct workers *workers = job;
    if (worker < 0 || worker >= workers->threads) {
        atomic_fetch_add(&workers->errors, 1);
        return;
    }
    if (atomic_fetch_add(&workers->inside[worker], 1) != 0 ||
        (worker == 0) != (pthread_equal(pthread_self(), workers->caller) != 0)) {
        atomic_fetch_add(&workers->errors, 1);
    }
    ++workers->parts_of[worker];
    work_us(2);
    atomic_fetch_sub(&workers->inside[worker], 1);
}

/* The pool has threads for 8 by then: a job for fewer must leave the others alone. */
static void worker_index_is_unique_and_below_the_threads_asked_for(void **state) {
    (void)state;
    assert_true(threads_meet(MOST_THREADS));
    for (int i = 0; i < 200; ++i) {
        struct workers workers = {.threads = 1 + i % MOST_THREADS, .caller = pthread_self()};
        mtl_parallel_run(workers.threads, 40, use_worker_index, &workers);
        assert_int_equal(atomic_load(&workers.errors), 0);
        int parts = 0;
        for (int worker = 0; worker < MOST_THREADS; ++worker) {
            parts += workers.parts_of[worker];
        }
        assert_int_equal(parts, 40);
    }
}

struct straggler {
    struct meeting meeting;
    bool done;
    int64_t caller_cpu_ns; /* the caller's own CPU time when its part ended */
};

static void caller_is_done_first(void *job, int part, int worker) {
    struct straggler *straggler = job;
    meet(&straggler->meeting, part, worker);
    if (worker == 0) {
        straggler->caller_cpu_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    } else {
        sleep_us(100000);
        straggler->done = true;
    }
}

static void caller_sleeps_until_the_last_part_is_done(void **state) {
    (void)state;
    struct straggler straggler = {.meeting = {.parts = 2}};
    mtl_parallel_run(2, 2, caller_is_done_first, &straggler);
    assert_int_equal(atomic_load(&straggler.meeting.late), 0);
    assert_true(straggler.done);
    assert_true(clock_ns(CLOCK_THREAD_CPUTIME_ID) - straggler.caller_cpu_ns < 10000000);
}

static void idle_workers_use_no_cpu_time(void **state) {
    (void)state;
    assert_true(threads_meet(MOST_THREADS));
    sleep_us(2000); /* the workers' last spin */
    int64_t before = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    sleep_us(200000);
    assert_true(clock_ns(CLOCK_PROCESS_CPUTIME_ID) - before < 5000000);
}

/* ---- callers ---- */

static void call_in_part(void *job, int part, int worker) {
    (void)worker;
    if (!runs_each_part_once(2 + part % 3, 10 * part)) {
        atomic_fetch_add((atomic_int *)job, 1);
    }
}

static void nested_calls_run_every_part_and_return(void **state) {
    (void)state;
    atomic_int errors = 0;
    for (int i = 0; i < 100; ++i) {
        mtl_parallel_run(4, 16, call_in_part, &errors);
    }
    assert_int_equal(atomic_load(&errors), 0);
}

static void *call_often(void *errors) {
    for (int i = 0; i < 200; ++i) {
        if (!runs_each_part_once(1 + i % MOST_THREADS, i)) {
            atomic_fetch_add((atomic_int *)errors, 1);
        }
    }
    return NULL;
}

static void eight_threads_may_call_at_once(void **state) {
    (void)state;
    pthread_t threads[8];
    atomic_int errors = 0;
    for (int i = 0; i < 8; ++i) {
        assert_int_equal(pthread_create(&threads[i], NULL, call_often, &errors), 0);
    }
    for (int i = 0; i < 8; ++i) {
        pthread_join(threads[i], NULL);
    }
    assert_int_equal(atomic_load(&errors), 0);
    assert_true(threads_meet(4)); /* the pool is free again */
}

/* ---- forks ---- */

/* In a child: returns (with a line for the reader) instead of asserting. */
#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            dprintf(STDERR_FILENO, "%s:%d: child: %s\n", __FILE__, __LINE__, #condition); \
            return 1;                                                                     \
        }                                                                                 \
    } while (0)

enum { SKIPPED = 77 };

/* GCC's ThreadSanitizer (12) ends a forked child that joins a thread, as the pool does at exit; Clang's does not. */
#ifdef __SANITIZE_THREAD__
enum { CHILD_MAY_JOIN = 0 };
#else
enum { CHILD_MAY_JOIN = 1 };
#endif

/* Ends a child that hangs; its status is then not 0. */
static int run_as_child(int (*body)(void), void (*leave)(int)) {
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        alarm(8);
        leave(body());
    }
    int status = -1;
    if (child < 0 || waitpid(child, &status, 0) != child) {
        return -1;
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static int use_pool(void) {
    CHECK(runs_each_part_once(4, 100));
    CHECK(threads_meet(3));
    return 0;
}

static int fork_and_use_pool(void) {
    CHECK(run_as_child(use_pool, _exit) == 0);
    CHECK(use_pool() == 0);
    CHECK(run_as_child(use_pool, _exit) == 0);
    return 0;
}

static void forked_child_and_its_children_have_working_pools(void **state) {
    (void)state;
    if (!CHILD_MAY_START_THREADS) {
        skip();
    }
    assert_true(threads_meet(4));
    assert_int_equal(run_as_child(fork_and_use_pool, _exit), 0);
    assert_true(threads_meet(4)); /* the parent keeps its own */
}

static int use_nothing(void) { return 0; }

static void forked_child_exits_with_and_without_threads_of_its_own(void **state) {
    (void)state;
    assert_true(threads_meet(4));
    assert_int_equal(run_as_child(use_nothing, exit), 0);
    if (CHILD_MAY_JOIN && CHILD_MAY_START_THREADS) {
        assert_int_equal(run_as_child(use_pool, exit), 0);
    }
}

static atomic_bool stop_calling;

static void work_in_part(void *job, int part, int worker) {
    (void)job;
    (void)worker;
    work_us(5 * part);
}

static void *call_until_told(void *argument) {
    for (int i = 0; !atomic_load(&stop_calling); ++i) {
        mtl_parallel_run(2 + i % 3, 6, work_in_part, argument);
    }
    return NULL;
}

static void fork_in_the_middle_of_other_threads_jobs_is_safe(void **state) {
    (void)state;
    if (!CHILD_MAY_START_THREADS) {
        skip();
    }
    pthread_t callers[2];
    atomic_store(&stop_calling, false);
    for (int i = 0; i < 2; ++i) {
        assert_int_equal(pthread_create(&callers[i], NULL, call_until_told, NULL), 0);
    }
    int failed = 0;
    for (int i = 0; i < 40; ++i) {
        failed += run_as_child(use_pool, _exit) != 0;
        work_us(i * 7 % 50);
    }
    atomic_store(&stop_calling, true);
    for (int i = 0; i < 2; ++i) {
        pthread_join(callers[i], NULL);
    }
    assert_int_equal(failed, 0);
    assert_true(threads_meet(2));
}

static void fork_in_part(void *job, int part, int worker) {
    (void)part;
    (void)worker;
    if (run_as_child(use_pool, _exit) != 0) {
        atomic_fetch_add((atomic_int *)job, 1);
    }
}

static void fork_inside_a_part_is_safe(void **state) {
    (void)state;
    if (!CHILD_MAY_START_THREADS) {
        skip();
    }
    atomic_int errors = 0;
    mtl_parallel_run(3, 6, fork_in_part, &errors);
    assert_int_equal(atomic_load(&errors), 0);
}

static int leave_threads_inside(void) {
    pthread_t caller;
    atomic_store(&stop_calling, false);
    for (int i = 0; i < 3; ++i) {
        CHECK(pthread_create(&caller, NULL, call_until_told, NULL) == 0);
        pthread_detach(caller);
    }
    sleep_us(1000);
    return 0;
}

static void exit_in_part(void *job, int part, int worker) {
    meet(job, part, worker);
    if (worker == 1) {
        exit(0);
    }
    sleep_us(50000);
}

static int exit_on_a_worker(void) {
    struct meeting meeting = {.parts = 2};
    mtl_parallel_run(2, 2, exit_in_part, &meeting);
    sleep_us(PATIENCE_US);
    return 1;
}

static void exit_while_threads_are_inside_ends_the_process(void **state) {
    (void)state;
    if (!CHILD_MAY_JOIN || !CHILD_MAY_START_THREADS) {
        skip();
    }
    for (int i = 0; i < 10; ++i) {
        assert_int_equal(run_as_child(leave_threads_inside, exit), 0);
    }
    assert_int_equal(run_as_child(exit_on_a_worker, exit), 0);
}

/* ---- the number of threads ---- */

static const char *environment_value;

static int default_is_the_environments(void) {
    setenv("METALLOID_NUM_THREADS", environment_value, 1);
    CHECK(mtl_default_threads() == atoi(environment_value));
    return 0;
}

static int bad_environment_counts_cpus(void) {
    setenv("METALLOID_NUM_THREADS", environment_value, 1);
    int threads = mtl_default_threads();
    unsetenv("METALLOID_NUM_THREADS");
#ifdef __linux__
    cpu_set_t mask;
    CHECK(sched_getaffinity(0, sizeof mask, &mask) == 0);
    CHECK(threads == CPU_COUNT(&mask));
#else
    CHECK(threads == sysconf(_SC_NPROCESSORS_ONLN));
#endif
    return 0;
}

/* Each value in a child: what its parent has read before must not matter there. */
static void default_threads_follow_the_environment_if_valid(void **state) {
    (void)state;
    const char *good[] = {"1", "3", "64", "1024"};
    const char *bad[] = {"", " ", "0", "-2", "1025", "99999999999999999999", "2x", "two", "1.5"};
    assert_true(mtl_default_threads() >= 1);
    for (size_t i = 0; i < sizeof good / sizeof *good; ++i) {
        environment_value = good[i];
        assert_int_equal(run_as_child(default_is_the_environments, _exit), 0);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i) {
        environment_value = bad[i];
        assert_int_equal(run_as_child(bad_environment_counts_cpus, _exit), 0);
    }
}

/* ---- signals ---- */

struct worker_traits {
    struct meeting meeting;
    atomic_int errors;
};

static void look_at_worker(void *job, int part, int worker) {
    struct worker_traits *traits = job;
    meet(&traits->meeting, part, worker);
    if (worker == 0) {
        return;
    }
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, NULL, &blocked);
    const int handled[] = {SIGINT, SIGTERM, SIGHUP, SIGALRM, SIGCHLD, SIGUSR1, SIGUSR2, SIGPIPE, SIGPROF, SIGQUIT};
    for (size_t i = 0; i < sizeof handled / sizeof *handled; ++i) {
        if (sigismember(&blocked, handled[i]) != 1) {
            atomic_fetch_add(&traits->errors, 1);
        }
    }
#ifdef __linux__
    char name[16] = "";
    pthread_attr_t attributes;
    size_t stack_bytes = 0;
    if (pthread_getname_np(pthread_self(), name, sizeof name) != 0 || strcmp(name, "metalloid") != 0) {
        atomic_fetch_add(&traits->errors, 1);
    }
    if (pthread_getattr_np(pthread_self(), &attributes) != 0 ||
        pthread_attr_getstacksize(&attributes, &stack_bytes) != 0 || stack_bytes < 1024 * 1024) {
        atomic_fetch_add(&traits->errors, 1);
    }
    pthread_attr_destroy(&attributes);
#endif
}

static void workers_block_signals_and_have_a_name_and_a_stack(void **state) {
    (void)state;
    struct worker_traits traits = {.meeting = {.parts = 4}};
    mtl_parallel_run(4, 4, look_at_worker, &traits);
    assert_int_equal(atomic_load(&traits.meeting.late), 0);
    assert_int_equal(atomic_load(&traits.errors), 0);
}

static atomic_int handled_elsewhere, handled_here;
static pthread_t main_thread;

static void on_signal(int signal) {
    (void)signal;
    atomic_fetch_add(pthread_equal(pthread_self(), main_thread) ? &handled_here : &handled_elsewhere, 1);
}

static void a_signal_waits_for_the_programs_own_thread(void **state) {
    (void)state;
    struct sigaction action = {.sa_handler = on_signal}, before;
    sigset_t user_signal, mask;
    main_thread = pthread_self();
    sigemptyset(&user_signal);
    sigaddset(&user_signal, SIGUSR1);
    assert_true(threads_meet(4));
    sigaction(SIGUSR1, &action, &before);
    pthread_sigmask(SIG_BLOCK, &user_signal, &mask);
    kill(getpid(), SIGUSR1);
    assert_true(threads_meet(4));
    assert_int_equal(atomic_load(&handled_here), 0);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    sleep_us(1000);
    sigaction(SIGUSR1, &before, NULL);
    assert_int_equal(atomic_load(&handled_elsewhere), 0);
    assert_int_equal(atomic_load(&handled_here), 1);
}

/* ---- what only Linux lets us see ---- */

#ifdef __linux__
struct placement {
    struct meeting meeting;
    cpu_set_t allowed;
    atomic_int errors;
};

static void look_at_placement(void *job, int part, int worker) {
    struct placement *placement = job;
    meet(&placement->meeting, part, worker);
    cpu_set_t mask, both;
    int cpu = sched_getcpu(), lacks = CPU_COUNT(&placement->allowed);
    bool known = sched_getaffinity(0, sizeof mask, &mask) == 0;
    CPU_AND(&both, &mask, &placement->allowed);
    lacks -= CPU_COUNT(&mask);
    /* A worker is kept off the caller's CPU, no further. */
    if (!known || !CPU_EQUAL(&mask, &both) || lacks < 0 || lacks > (worker > 0) || cpu < 0 ||
        !CPU_ISSET((size_t)cpu, &placement->allowed)) {
        atomic_fetch_add(&placement->errors, 1);
    }
}

static int placement_errors(const cpu_set_t *allowed) {
    struct placement placement = {.meeting = {.parts = 3}, .allowed = *allowed};
    if (sched_setaffinity(0, sizeof *allowed, allowed) != 0) {
        return -1;
    }
    mtl_parallel_run(3, 3, look_at_placement, &placement);
    return atomic_load(&placement.errors) + atomic_load(&placement.meeting.late);
}

static int first_and_last_cpu(const cpu_set_t *mask, cpu_set_t *first, cpu_set_t *last) {
    CPU_ZERO(first);
    for (size_t cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, mask)) {
            if (CPU_COUNT(first) == 0) {
                CPU_SET(cpu, first);
            }
            CPU_ZERO(last);
            CPU_SET(cpu, last);
        }
    }
    return CPU_COUNT(mask);
}

static void workers_follow_each_callers_affinity_mask(void **state) {
    (void)state;
    cpu_set_t all, first, last;
    assert_int_equal(sched_getaffinity(0, sizeof all, &all), 0);
    if (first_and_last_cpu(&all, &first, &last) < 2) {
        skip();
    }
    int errors = 0;
    for (int i = 0; i < 10; ++i) {
        errors += placement_errors(&first) + placement_errors(&last) + placement_errors(&all);
    }
    sched_setaffinity(0, sizeof all, &all);
    assert_int_equal(errors, 0);
}

struct encounter {
    struct meeting meeting;
    atomic_int callers_cpu, workers_cpu;
};

static void go_to_the_callers_cpu(void *job, int part, int worker) {
    struct encounter *encounter = job;
    cpu_set_t one;
    if (worker == 0) {
        atomic_store(&encounter->callers_cpu, sched_getcpu());
    }
    meet(&encounter->meeting, part, worker);
    if (worker == 1) {
        CPU_ZERO(&one);
        CPU_SET((size_t)atomic_load(&encounter->callers_cpu), &one);
        sched_setaffinity(0, sizeof one, &one);
    }
}

static void look_where_the_threads_are(void *job, int part, int worker) {
    struct encounter *encounter = job;
    atomic_store(worker == 0 ? &encounter->callers_cpu : &encounter->workers_cpu, sched_getcpu());
    meet(&encounter->meeting, part, worker);
}

/* As a scheduler may do to them; one that is tied to the caller's CPU would not leave it by itself. */
static void a_worker_on_the_callers_cpu_leaves_it(void **state) {
    (void)state;
    cpu_set_t all, first, last;
    assert_int_equal(sched_getaffinity(0, sizeof all, &all), 0);
    if (first_and_last_cpu(&all, &first, &last) < 2) {
        skip();
    }
    int apart = 0;
    for (int i = 0; i < 20; ++i) {
        struct encounter tied = {.meeting = {.parts = 2}};
        mtl_parallel_run(2, 2, go_to_the_callers_cpu, &tied);
        for (int job = 0; job < 3; ++job) { /* the first finds out where the worker is, the others may see it gone */
            struct encounter after = {.meeting = {.parts = 2}};
            mtl_parallel_run(2, 2, look_where_the_threads_are, &after);
            apart += job > 0 && atomic_load(&after.callers_cpu) != atomic_load(&after.workers_cpu);
        }
    }
    assert_true(apart >= 30); /* of 40: the caller may be moved now and then */
}

static int one_cpu_gives_one_thread(void) {
    cpu_set_t all, first, last;
    unsetenv("METALLOID_NUM_THREADS");
    CHECK(sched_getaffinity(0, sizeof all, &all) == 0);
    CHECK(mtl_default_threads() == first_and_last_cpu(&all, &first, &last));
    CHECK(sched_setaffinity(0, sizeof first, &first) == 0);
    CHECK(mtl_default_threads() == 1);
    return 0;
}

static void default_threads_are_the_cpus_of_the_mask(void **state) {
    (void)state;
    assert_int_equal(run_as_child(one_cpu_gives_one_thread, _exit), 0);
}

/* Fills in how often each of the pool's threads has gone to sleep, and whether all sleep now; gives their number. */
static int count_sleeps(long sleeps[64], bool *all_asleep) {
    int threads = 0;
    *all_asleep = true;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *task; tasks != NULL && (task = readdir(tasks)) != NULL && threads < 64;) {
        char path[300], line[200];
        bool ours = false;
        snprintf(path, sizeof path, "/proc/self/task/%s/status", task->d_name);
        FILE *file = task->d_name[0] != '.' ? fopen(path, "r") : NULL;
        while (file != NULL && fgets(line, sizeof line, file) != NULL) {
            ours |= strcmp(line, "Name:\tmetalloid\n") == 0;
            *all_asleep &= !(ours && strncmp(line, "State:", 6) == 0 && strncmp(line, "State:\tS", 8) != 0);
            if (ours && sscanf(line, "voluntary_ctxt_switches: %ld", &sleeps[threads]) == 1) {
                ++threads;
            }
        }
        if (file != NULL) {
            fclose(file);
        }
    }
    if (tasks != NULL) {
        closedir(tasks);
    }
    return threads;
}

static int pool_threads(void) {
    long sleeps[64];
    bool all_asleep;
    return count_sleeps(sleeps, &all_asleep);
}

/* On a busy machine a worker may be long in getting the time for its last spin. */
static int count_sleeps_when_parked(long sleeps[64]) {
    bool all_asleep = false;
    int threads = 0;
    for (int i = 0; i < PATIENCE_US / 1000 && !all_asleep; ++i) {
        sleep_us(1000);
        threads = count_sleeps(sleeps, &all_asleep);
    }
    assert_true(all_asleep);
    return threads;
}

static void a_small_job_wakes_only_the_workers_it_asks_for(void **state) {
    (void)state;
    long before[64], after[64];
    assert_true(threads_meet(MOST_THREADS));
    int threads = count_sleeps_when_parked(before);
    assert_int_equal(threads, MOST_THREADS - 1);
    for (int i = 0; i < 20; ++i) {
        assert_true(threads_meet(2));
        sleep_us(1000);
    }
    assert_int_equal(count_sleeps_when_parked(after), threads);
    int woken = 0;
    for (int i = 0; i < threads; ++i) {
        woken += after[i] != before[i];
    }
    assert_int_equal(woken, 1);
}

static int run_without_new_threads(void) {
    struct sock_filter refuse_clone[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EAGAIN),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {.len = sizeof refuse_clone / sizeof *refuse_clone, .filter = refuse_clone};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0) {
        return SKIPPED;
    }
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, call_until_told, NULL) == EAGAIN);
    for (int i = 0; i < 100; ++i) {
        CHECK(runs_each_part_once(MOST_THREADS, i));
    }
    CHECK(pool_threads() == 0);
    return 0;
}

static void a_call_succeeds_when_no_thread_can_be_created(void **state) {
    (void)state;
    int status = run_as_child(run_without_new_threads, _exit);
    if (status == SKIPPED) {
        skip();
    }
    assert_int_equal(status, 0);
}
#endif

#ifdef MTL_THREADS_MODULE
/* MTL_THREADS_MODULE: path of a loadable module of threads.c alone, its symbols visible. */
static void unloading_the_library_ends_its_threads(void **state) {
    (void)state;
    int threads = pool_threads();
    for (int i = 0; i < 20; ++i) {
        void *module = dlopen(MTL_THREADS_MODULE, RTLD_NOW | RTLD_LOCAL);
        assert_non_null(module);
        void (*run)(int, int, mtl_job_fn, void *);
        *(void **)&run = dlsym(module, "mtl_parallel_run");
        assert_non_null(run);
        assert_true(run != mtl_parallel_run);
        struct meeting meeting = {.parts = 4};
        run(4, 4, meet, &meeting);
        assert_int_equal(atomic_load(&meeting.late), 0);
        assert_int_equal(pool_threads(), threads + 3);
        sleep_us(i % 2 * 500); /* parked or spinning */
        assert_int_equal(dlclose(module), 0);
        assert_null(dlopen(MTL_THREADS_MODULE, RTLD_NOW | RTLD_NOLOAD));
        assert_int_equal(run_as_child(CHILD_MAY_START_THREADS ? use_pool : use_nothing, _exit),
                         0); /* its fork handlers are gone too */
        for (int ms = 0; ms < PATIENCE_US / 1000 && pool_threads() > threads; ++ms) {
            sleep_us(1000); /* /proc may show a thread a moment longer than pthread_join waits for it */
        }
        assert_int_equal(pool_threads(), threads);
    }
}
#endif

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_part_runs_exactly_once),
        cmocka_unit_test(parts_run_at_the_same_time),
        cmocka_unit_test(no_wake_up_is_lost),
        cmocka_unit_test(worker_index_is_unique_and_below_the_threads_asked_for),
        cmocka_unit_test(caller_sleeps_until_the_last_part_is_done),
        cmocka_unit_test(idle_workers_use_no_cpu_time),
        cmocka_unit_test(nested_calls_run_every_part_and_return),
        cmocka_unit_test(eight_threads_may_call_at_once),
        cmocka_unit_test(forked_child_and_its_children_have_working_pools),
        cmocka_unit_test(forked_child_exits_with_and_without_threads_of_its_own),
        cmocka_unit_test(fork_in_the_middle_of_other_threads_jobs_is_safe),
        cmocka_unit_test(fork_inside_a_part_is_safe),
        cmocka_unit_test(exit_while_threads_are_inside_ends_the_process),
        cmocka_unit_test(default_threads_follow_the_environment_if_valid),
        cmocka_unit_test(workers_block_signals_and_have_a_name_and_a_stack),
        cmocka_unit_test(a_signal_waits_for_the_programs_own_thread),
#ifdef __linux__
        cmocka_unit_test(workers_follow_each_callers_affinity_mask),
        cmocka_unit_test(a_worker_on_the_callers_cpu_leaves_it),
        cmocka_unit_test(default_threads_are_the_cpus_of_the_mask),
        cmocka_unit_test(a_small_job_wakes_only_the_workers_it_asks_for),
        cmocka_unit_test(a_call_succeeds_when_no_thread_can_be_created),
#endif
#ifdef MTL_THREADS_MODULE
        cmocka_unit_test(unloading_the_library_ends_its_threads),
#endif
    };
    return cmocka_run_group_tests_name("threads", tests, NULL, NULL);
}
