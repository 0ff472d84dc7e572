/* The thread pool.
 *
 * Why a pool of our own: a library of small operations is called between other people's work, in their processes. It
 * must go on working in a forked child, leave the CPUs alone between calls (a spinning pool slows NumPy's BLAS several
 * times over) and be visible to ThreadSanitizer. Debian's pthreadpool fails all three, libgomp the last.
 *
 * Protocol: `pool.busy` gives the workers to one caller at a time; who finds it taken (another thread's job, or a part
 * that starts a job) runs its parts alone. The owner describes its job in `pool.job`, offers it to the workers it
 * wants, and claims parts from the job's counter like everyone else. One atomic a worker says who may do what:
 *
 *     IDLE    -> OFFERED   owner    a job is there; pool.job is published by this store
 *     OFFERED -> RUNNING   worker   the worker may read the job; the owner must wait for it
 *     OFFERED -> IDLE      owner    no part is left: an offer not yet taken is withdrawn, a sleepy worker delays nobody
 *     RUNNING -> IDLE      worker   done; the worker's results are published by this store
 *     IDLE    -> ASLEEP    worker   nothing came for SPIN_NS: only from here does an offer cost a wake-up
 *     RUNNING -> WATCHED   owner    likewise, the owner sleeps until the worker is done
 *
 * Sleeping is done on the worker's own condition variable, which never has more than one waiter. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "core/threads.h"

#include "core/environment.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    SPIN_NS = 40 * 1000,           /* a worker or a waiting caller spins this long before it sleeps */
    RETRY_NS = 1000 * 1000 * 1000, /* after a thread could not be created, none is tried for this long */
    MIN_STACK_BYTES = 1024 * 1024, /* kernels keep blocks on the stack; some C libraries give 128 KiB */
    CACHE_LINE = 64,
};

enum { STARTING = -1, MOVED = -2 }; /* instead of a worker's CPU */

enum state { NO_THREAD, IDLE, ASLEEP, OFFERED, RUNNING, WATCHED, QUIT };

struct job {
    mtl_job_fn fn;
    void *argument;
    unsigned parts;
    _Alignas(CACHE_LINE) atomic_uint next_part; /* unsigned: every thread adds one beyond the last part */
};

struct worker {
    _Alignas(CACHE_LINE) atomic_int state;
    int index;
    atomic_int cpu;        /* where it last looked for a job, STARTING, or MOVED since then */
    int kept_off;          /* the CPU that the thread's affinity mask lacks, or -1 */
    unsigned mask_version; /* of that mask */
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct worker *next;
};

#ifdef __linux__
typedef cpu_set_t cpu_mask[8]; /* 8192 CPUs, the most that Linux can be built for */
#endif

static struct {
    /* True from the start until fork handlers are in place, and after the library's end: then all jobs are serial. */
    atomic_bool busy;

    /* Below: the owner's alone. */
    struct job *job;
    int64_t retry_at;
    unsigned mask_version;
#ifdef __linux__
    cpu_mask mask; /* the last owner's */
    int cpus;      /* in it */
#endif

    /* Held while the list or its threads are made, and by fork(), whose child must find the list whole. */
    pthread_mutex_t growth;
    struct worker *workers;
} pool = {.busy = true, .growth = PTHREAD_MUTEX_INITIALIZER};

static atomic_int environment_threads = -1; /* -1: not yet read, 0: not set */

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline void spin_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); /* `yield` is a no-op on most cores */
#else
    sched_yield();
#endif
}

/* Waits for the state to leave `from`, for SPIN_NS at most; gives the last one seen. */
static int spin_while(atomic_int *state, int from) {
    int64_t end = 0;
    for (unsigned round = 1;; ++round) {
        int seen = atomic_load_explicit(state, memory_order_acquire);
        if (seen != from) {
            return seen;
        }
        spin_pause();
        if (round % 32 == 0) {
            sched_yield(); /* with more threads than CPUs, to whom we wait for */
            int64_t now = now_ns();
            if (end == 0) {
                end = now + SPIN_NS;
            } else if (now >= end) {
                return from;
            }
        }
    }
}

/* Sleeps while the state is `asleep`, unless it is no longer `from` to begin with; gives the last one seen. */
static int sleep_while(struct worker *worker, int from, int asleep) {
    int seen = from;
    pthread_mutex_lock(&worker->mutex);
    if (atomic_compare_exchange_strong(&worker->state, &seen, asleep)) {
        while ((seen = atomic_load(&worker->state)) == asleep) {
            pthread_cond_wait(&worker->changed, &worker->mutex);
        }
    }
    pthread_mutex_unlock(&worker->mutex);
    return seen;
}

/* Changes the state, and wakes the other side if it sleeps in `asleep`. */
static void set_state(struct worker *worker, int state, int asleep) {
    if (atomic_exchange(&worker->state, state) == asleep) {
        /* Once we had the mutex, the sleeper either waits or will see the new state. */
        pthread_mutex_lock(&worker->mutex);
        pthread_mutex_unlock(&worker->mutex);
        pthread_cond_signal(&worker->changed);
    }
}

static void run_parts(struct job *job, int worker) {
    unsigned part;
    while ((part = atomic_fetch_add_explicit(&job->next_part, 1, memory_order_relaxed)) < job->parts) {
        job->fn(job->argument, (int)part, worker);
    }
}

static void *worker_main(void *argument) {
    struct worker *worker = argument;
#ifdef __linux__
    pthread_setname_np(pthread_self(), "metalloid");
#endif
    for (;;) {
        int state = spin_while(&worker->state, IDLE);
        if (state == IDLE) {
            state = sleep_while(worker, IDLE, ASLEEP);
        }
        if (state == QUIT) {
            return NULL;
        }
#ifdef __linux__
        atomic_store_explicit(&worker->cpu, sched_getcpu(), memory_order_relaxed);
#endif
        if (state == OFFERED && atomic_compare_exchange_strong(&worker->state, &state, RUNNING)) {
            run_parts(pool.job, worker->index);
            set_state(worker, IDLE, WATCHED);
        }
    }
}

static bool start_thread(struct worker *worker) {
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes) != 0) {
        return false;
    }
    size_t stack_bytes = 0;
    if (pthread_attr_getstacksize(&attributes, &stack_bytes) != 0 || stack_bytes < MIN_STACK_BYTES) {
        pthread_attr_setstacksize(&attributes, MIN_STACK_BYTES);
    }
    /* The program's signal handlers run on the program's threads; a fault is still reported from where it happens. */
    sigset_t blocked, before;
    sigfillset(&blocked);
    const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; ++i) {
        sigdelset(&blocked, faults[i]);
    }
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    atomic_store_explicit(&worker->cpu, STARTING, memory_order_relaxed);
    atomic_store(&worker->state, IDLE);
    bool started = pthread_create(&worker->thread, &attributes, worker_main, worker) == 0;
    if (!started) {
        atomic_store(&worker->state, NO_THREAD);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    worker->mask_version = pool.mask_version; /* a new thread has its creator's mask */
    worker->kept_off = -1;
    return started;
}

/* Makes the next worker of the list, or a thread for one that has none (the first use after a fork). */
static bool grow(struct worker **link, int index) {
    if (pool.retry_at != 0 && now_ns() < pool.retry_at) {
        return false;
    }
    pthread_mutex_lock(&pool.growth);
    struct worker *worker = *link;
    void *memory;
    if (worker == NULL && posix_memalign(&memory, CACHE_LINE, sizeof *worker) == 0) {
        worker = memory;
        *worker = (struct worker){.state = NO_THREAD, .index = index};
        pthread_mutex_init(&worker->mutex, NULL);
        pthread_cond_init(&worker->changed, NULL);
        *link = worker;
    }
    bool started = worker != NULL && start_thread(worker);
    pthread_mutex_unlock(&pool.growth);
    pool.retry_at = started ? 0 : now_ns() + RETRY_NS;
    return started;
}

static void read_mask(void) {
#ifdef __linux__
    cpu_mask mask;
    if (sched_getaffinity(0, sizeof mask, mask) == 0 && memcmp(mask, pool.mask, sizeof mask) != 0) {
        memcpy(pool.mask, mask, sizeof mask);
        pool.cpus = CPU_COUNT_S(sizeof mask, mask);
        ++pool.mask_version;
    }
#endif
}

#ifdef __linux__
/* The owner's mask, without the CPU `off` unless that is -1. */
static bool set_mask(struct worker *worker, int off) {
    cpu_mask mask;
    memcpy(mask, pool.mask, sizeof mask);
    if (off >= 0) {
        CPU_CLR_S((size_t)off, sizeof mask, mask);
    }
    if (pthread_setaffinity_np(worker->thread, sizeof mask, mask) != 0) {
        return false;
    }
    atomic_store_explicit(&worker->cpu, MOVED, memory_order_relaxed);
    worker->kept_off = off;
    worker->mask_version = pool.mask_version;
    return true;
}
#endif

/* Keeps the worker on the CPUs that the owner may use, but off the owner's own once the two have met there. A scheduler
 * that wakes them on one CPU (as a new thread, or after other programs ran) may leave them so for tens of milliseconds: the
 * owner finds no part left for the worker whenever it comes to run, and the worker is too little load to be moved. */
static bool place(struct worker *worker) {
#ifdef __linux__
    int own = sched_getcpu(), its = atomic_load_explicit(&worker->cpu, memory_order_relaxed), off = worker->kept_off;
    bool meets = its == own || its == STARTING || (off >= 0 && off != own);
    meets = meets && own >= 0 && worker->index < pool.cpus;
    if (worker->mask_version != pool.mask_version || meets) {
        return set_mask(worker, meets ? own : -1);
    }
#else
    (void)worker;
#endif
    return true;
}

/* The owner goes to sleep: a worker that other programs keep from its CPU may have the owner's. */
static void let_go(struct worker *worker) {
#ifdef __linux__
    if (worker->kept_off >= 0) {
        set_mask(worker, -1);
    }
#else
    (void)worker;
#endif
}

/* Offers the job to the first `wanted` workers; gives how many got the offer. */
static int offer(struct job *job, int wanted) {
    struct worker **link = &pool.workers;
    int offered = 0;
    pool.job = job;
    read_mask();
    /* The first workers may be through with all parts before the last are asked. */
    while (offered < wanted && atomic_load_explicit(&job->next_part, memory_order_relaxed) < job->parts) {
        if ((*link == NULL || atomic_load(&(*link)->state) == NO_THREAD) && !grow(link, offered + 1)) {
            break;
        }
        struct worker *worker = *link;
        if (!place(worker)) {
            break;
        }
        set_state(worker, OFFERED, ASLEEP);
        link = &worker->next;
        ++offered;
    }
    return offered;
}

/* Takes back the offers that were not taken up, and waits for the workers that took theirs. */
static void withdraw(int offered) {
    for (struct worker *worker = pool.workers; offered > 0; worker = worker->next, --offered) {
        int seen = OFFERED;
        if (!atomic_compare_exchange_strong(&worker->state, &seen, IDLE) && seen == RUNNING &&
            spin_while(&worker->state, RUNNING) == RUNNING) {
            let_go(worker);
            sleep_while(worker, RUNNING, WATCHED);
        }
    }
    pool.job = NULL;
}

void mtl_parallel_run(int threads, int parts, mtl_job_fn fn, void *argument) {
    if (threads > parts) {
        threads = parts;
    }
    if (threads <= 1 || atomic_load_explicit(&pool.busy, memory_order_relaxed) || atomic_exchange(&pool.busy, true)) {
        for (int part = 0; part < parts; ++part) {
            fn(argument, part, 0);
        }
        return;
    }
    struct job job = {.fn = fn, .argument = argument, .parts = (unsigned)parts};
    int offered = offer(&job, threads - 1);
    run_parts(&job, 0);
    withdraw(offered);
    atomic_store(&pool.busy, false);
}

int mtl_environment_threads(void) {
    static const char name[] = "METALLOID_NUM_THREADS";
    const char *text = mtl_setting(name);
    if (text == NULL) {
        return 0;
    }
    char *end = NULL;
    long threads = strtol(text, &end, 10);
    if (end != text && *end == '\0' && threads >= 1 && threads <= MTL_MOST_THREADS) {
        return (int)threads;
    }
    mtl_setting_ignored(name, text,
                        "it must be an integer from 1 to %d; there is a thread for each CPU of the process instead",
                        (int)MTL_MOST_THREADS);
    return 0;
}

int mtl_default_threads(void) {
    int threads = atomic_load_explicit(&environment_threads, memory_order_relaxed);
    if (threads < 0) {
        threads = mtl_environment_threads();
        atomic_store_explicit(&environment_threads, threads, memory_order_relaxed);
    }
    if (threads > 0) {
        return threads;
    }
#ifdef __linux__
    cpu_mask mask;
    if (sched_getaffinity(0, sizeof mask, mask) == 0) {
        return CPU_COUNT_S(sizeof mask, mask);
    }
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}

static void before_fork(void) { pthread_mutex_lock(&pool.growth); }

static void after_fork_in_parent(void) { pthread_mutex_unlock(&pool.growth); }

/* The child has none of the threads, and their locks may be held by nobody: every worker starts anew. If the forking
 * thread was itself inside a part, that job's other parts are lost to the child, which must not return from it. */
static void after_fork_in_child(void) {
    for (struct worker *worker = pool.workers; worker != NULL; worker = worker->next) {
        atomic_store(&worker->state, NO_THREAD);
        pthread_mutex_init(&worker->mutex, NULL);
        pthread_cond_init(&worker->changed, NULL);
    }
    pool.retry_at = 0;
    atomic_store(&environment_threads, -1);
    atomic_store(&pool.busy, false);
    pthread_mutex_init(&pool.growth, NULL);
}

__attribute__((constructor)) static void open_pool(void) {
    if (pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) == 0) {
        atomic_store(&pool.busy, false);
    }
}

/* Runs at exit and when the library is unloaded: no worker may be left in code that goes away. If some thread is inside
 * a job this is exit(), or exit() in a part: waiting could last for ever, and the code stays until the process ends. */
__attribute__((destructor)) static void close_pool(void) {
    if (atomic_exchange(&pool.busy, true)) {
        return;
    }
    pthread_mutex_lock(&pool.growth);
    struct worker *worker = pool.workers;
    pool.workers = NULL;
    pthread_mutex_unlock(&pool.growth);
    while (worker != NULL) {
        struct worker *next = worker->next;
        if (atomic_load(&worker->state) != NO_THREAD) {
            set_state(worker, QUIT, ASLEEP);
            pthread_join(worker->thread, NULL);
        }
        pthread_mutex_destroy(&worker->mutex);
        pthread_cond_destroy(&worker->changed);
        free(worker);
        worker = next;
    }
}
