/* What the library and the kernels that it compiles for the CPU agree on. SPDX-License-Identifier: MIT
 *
 * Read by both compilers: the C of the library includes it, kernels have it as their first lines. Built-in types alone. */
#ifndef MTL_KERNEL_ABI_CPU_H
#define MTL_KERNEL_ABI_CPU_H

enum {
    mtl_most_threads = 1024, /* of a threadgroup */
    mtl_simd_lanes = 32,
    mtl_most_simdgroups = mtl_most_threads / mtl_simd_lanes,
    mtl_most_variables = 128, /* in threadgroup memory */
    mtl_near_levels = 3,
    mtl_most_levels = 14, /* of loops and calls around a place of exchange */
    mtl_most_joined =
        1 << 16,            /* threads in a line of whole threadgroups that are one loop: what cannot be interrupted */
    mtl_uninterrupted = 64, /* iterations of a loop that are counted */
};

/* One dispatch, the same for all of its threadgroups. */
typedef struct mtl_dispatch {
    void *const *pointers; /* the kernel's buffers: data, shape, strides and rank of each input, then each output */
    unsigned grid[3], threadgroup[3], threadgroups[3];
    unsigned long most_iterations;   /* of all loops of one thread; 0: as many as it likes */
    const volatile int *interrupted; /* or NULL; no longer 0: everything has to end */
} mtl_dispatch;

/* One thread of a threadgroup whose threads have stacks of their own: a cache line. */
typedef struct mtl_thread {
    void *stack;          /* where it stands while another one runs */
    const void *argument; /* what it brings to an exchange, and where its result goes */
    void *result;
    const void *exchange; /* which one it waits for */

    /* Where it is in program order: of each loop and call around it the place in the text (upper half) and the iteration (lower
     * half), `level` of them, and how many exchanges came since the last was noted. The first few marks stand here. */
    unsigned sequence;
    unsigned short level, frame;
    unsigned long mark[mtl_near_levels];
} mtl_thread;

/* Bit i is lane i. A lane that is alive is ready (or running), waits for an exchange, or stands at a barrier. */
typedef struct mtl_simdgroup {
    unsigned alive, ready, waiting, barrier;
    unsigned active; /* the lanes of the exchange that `leader` does next */
    int leader;      /* -1: none */
    unsigned long
        shared[8]; /* the result of an exchange that has one for all; every lane has read it before the next is done */
} mtl_simdgroup;

/* What one worker needs to run threadgroups, one after the other. */
typedef struct mtl_group {
    const mtl_dispatch *dispatch;
    void *home;  /* stack of the worker's own thread while threads of the group run */
    int failure; /* mtl_failure_* */
    unsigned threads, simdgroups, finished;
    unsigned position[3], extent[3]; /* of the threadgroup in the grid of threadgroups; its threads along each axis */

    /* Threadgroup memory: variables come into being when the first thread gets to them. */
    char *memory;
    unsigned long memory_used, memory_size;
    void *variable[mtl_most_variables];

    /* The thread that has to run next, when nobody in the simdgroup of thread `index` is ready: its index, or -1 for home. */
    int (*next)(struct mtl_group *group, unsigned index);

    /* The same for lanes in lockstep, where a simdgroup has one stack, that of the thread of its number. */
    int (*next_simdgroup)(struct mtl_group *group, unsigned simdgroup);

    /* Whether the launch has been interrupted, which is a failure then; `asked` counts how often. */
    int (*is_interrupted)(struct mtl_group *group);
    unsigned asked;
    void *(*declare)(struct mtl_group *group, unsigned variable, unsigned long bytes, unsigned long alignment);

    mtl_simdgroup simdgroup[mtl_most_simdgroups];
    mtl_thread thread[mtl_most_threads];
    unsigned long far_mark[mtl_most_threads][mtl_most_levels - mtl_near_levels]; /* of levels beyond mtl_thread.mark */
    unsigned position_of[mtl_most_threads][3];                                   /* of each thread in the threadgroup */
    unsigned long iterations[mtl_most_threads];
} mtl_group;

enum { mtl_failure_none, mtl_failure_barrier, mtl_failure_iterations, mtl_failure_memory, mtl_failure_interrupted };

#endif
