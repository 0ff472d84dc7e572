/* Running a kernel over its items on the thread pool. SPDX-License-Identifier: MIT */
#include "core/threads.h"
#include "cpu/kernels.h"

#include <stdio.h>

enum {
    PART_COST = 32 << 10,     /* below this a part is done before another thread has woken up */
    PARTS_A_THREAD = 4,       /* so that a thread that the machine takes away holds up little */
    STACK_SCRATCH = 32 << 10, /* small calls on one thread do without malloc */
    CACHE_LINE = 64,
    UNKNOWN_CACHE = 32 << 20, /* where the system does not say how large its last level is */
};

/* Of the last level that the first CPU has a share in. sysconf gives what all of a socket's have: on an EPYC a dozen times as much. */
static long last_level_size(void) {
    long size = 0;
    for (int index = 3; index >= 2 && size <= 0; index--) { /* 0 and 1 are the first level's two */
        char path[64], unit = 0;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
        FILE *file = fopen(path, "re");
        if (!file) continue;
        if (fscanf(file, "%ld%c", &size, &unit) == 2) size *= unit == 'K' ? 1 << 10 : unit == 'M' ? 1 << 20 : 1;
        fclose(file);
    }
    return size > 0 ? size : UNKNOWN_CACHE;
}

bool mtl_cpu_streams(double bytes) {
    static _Atomic long known;
    long size = known;
    if (!size) known = size = last_level_size();
    return bytes >=
           (double)size / 4; /* with the operands of most calls that is half of the cache or more, which others share */
}

typedef struct {
    mtl_kernel kernel;
    const void *args;
    int64_t items;
    int parts;
    char *scratch;
    size_t scratch_size;
} job;

static void run_part(void *argument, int part, int worker) {
    const job *j = argument;
    int64_t each = j->items / j->parts, more = j->items % j->parts; /* the first `more` parts have one item more */
    int64_t begin = each * part + (part < more ? part : more), end = begin + each + (part < more);
    j->kernel(j->args, begin, end, j->scratch ? j->scratch + (size_t)worker * j->scratch_size : NULL);
}

static metalloid_status run_alone(const metalloid_context *context, const char *op, mtl_kernel kernel, const void *args,
                                  int64_t items, size_t scratch) {
    if (scratch <= STACK_SCRATCH) {
        _Alignas(64) char on_stack[STACK_SCRATCH];
        kernel(args, 0, items, on_stack);
        return METALLOID_OK;
    }
    void *allocated = mtl_allocate(context, scratch);
    if (!allocated) return mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: no %zu bytes of workspace", op, scratch);
    kernel(args, 0, items, allocated);
    mtl_release(context, allocated);
    return METALLOID_OK;
}

metalloid_status mtl_cpu_run(const metalloid_context *context, const char *op, mtl_kernel kernel, const void *args,
                             int64_t items, int64_t item_cost, size_t scratch) {
    if (items == 0) return METALLOID_OK;
    double worth = (double)items * (double)item_cost / PART_COST;
    if (items == 1 || worth < 2) return run_alone(context, op, kernel, args, items, scratch);
    int threads = mtl_threads(context);
    if (threads == 1) return run_alone(context, op, kernel, args, items, scratch);

    int64_t parts = (int64_t)threads * PARTS_A_THREAD;
    if (parts > items) parts = items;
    if ((double)parts > worth) parts = (int64_t)worth;
    if (threads > parts) threads = (int)parts;
    job j = {kernel, args, items, (int)parts, NULL, (scratch + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE};
    if (scratch) {
        j.scratch = mtl_allocate(context, j.scratch_size * (size_t)threads);
        if (!j.scratch)
            return mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: no %zu bytes of workspace", op,
                            j.scratch_size * (size_t)threads);
    }
    mtl_parallel_run(threads, (int)parts, run_part, &j);
    mtl_release(context, j.scratch);
    return METALLOID_OK;
}
