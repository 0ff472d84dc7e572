/* Memory and schedule of threadgroups on the CPU; src/kernel/msl/runtime_cpu.h is the other half. SPDX-License-Identifier: MIT */
#include "kernel/fiber.h"

#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    GROUP_MEMORY = 8 << 20, /* of threadgroup variables; Metal has 32 KiB */
    SMALL_STACK_BITS = 14,
    MOST_KEPT_STACK_BITS = 17, /* larger ones are given back to the system */
};

/* ---- interruption ---------------------------------------------------------------------------------------------------------- */

/* Where every thread of the process has SIGINT blocked, as those that run kernels do, it waits and no handler tells. */
static int is_interrupted(mtl_group *group) {
    enum { ASK_THE_SYSTEM = 4096 };
    const volatile int *interrupted = group->dispatch->interrupted;
    if (!interrupted) return 0;
    sigset_t pending;
    bool found = *interrupted != 0;
    if (!found && ++group->asked % ASK_THE_SYSTEM == 0 && sigpending(&pending) == 0)
        found = sigismember(&pending, SIGINT) == 1;
    if (found) group->failure = mtl_failure_interrupted;
    return found;
}

/* ---- which thread runs next ------------------------------------------------------------------------------------------------ */

static unsigned long mark_of(const mtl_group *group, unsigned index, unsigned level) {
    return level < mtl_near_levels ? group->thread[index].mark[level] : group->far_mark[index][level - mtl_near_levels];
}

/* Below 0: a comes first in program order; 0: the same place of it. */
static int compare(const mtl_group *group, unsigned a, unsigned b) {
    const mtl_thread *first = &group->thread[a], *second = &group->thread[b];
    unsigned levels = first->level < second->level ? first->level : second->level;
    for (unsigned i = 0; i < levels; i++) {
        unsigned long left = mark_of(group, a, i), right = mark_of(group, b, i);
        if (left != right) return left < right ? -1 : 1;
    }
    if (first->level != second->level) return first->level < second->level ? -1 : 1;
    if (first->sequence != second->sequence) return first->sequence < second->sequence ? -1 : 1;
    if (first->exchange != second->exchange) return (uintptr_t)first->exchange < (uintptr_t)second->exchange ? -1 : 1;
    return 0;
}

/* All lanes of the simdgroup that can run wait: those who come first in program order exchange. One of them goes on, `index` where it
 * is among them. */
static unsigned choose(mtl_group *group, unsigned simdgroup, unsigned index) {
    mtl_simdgroup *simd = &group->simdgroup[simdgroup];
    unsigned base = simdgroup * mtl_simd_lanes, lane = (unsigned)__builtin_ctz(simd->waiting);
    unsigned first = base + lane;
    simd->active = 0;
    for (unsigned left = simd->waiting; left; left &= left - 1) {
        lane = (unsigned)__builtin_ctz(left);
        int order = base + lane == first ? 0 : compare(group, base + lane, first);
        if (order > 0) continue;
        if (order < 0) {
            first = base + lane;
            simd->active = 0;
        }
        simd->active |= 1u << lane;
    }
    unsigned leader = index / mtl_simd_lanes == simdgroup && simd->active >> index % mtl_simd_lanes & 1 ? index : first;
    simd->leader = (int)(leader % mtl_simd_lanes);
    return leader;
}

/* Simdgroups take turns at every exchange: none gets far ahead of the others between two barriers, as on a GPU. Kernels rely on it
 * that read threadgroup memory, reduce what they read and write there again with no barrier in between. */
static int next_thread(mtl_group *group, unsigned index) {
    if (is_interrupted(group)) return -1;
    unsigned simdgroup = index / mtl_simd_lanes;
    for (unsigned looked = 0; looked < group->simdgroups; looked++) {
        if (++simdgroup >= group->simdgroups) simdgroup = 0;
        const mtl_simdgroup *simd = &group->simdgroup[simdgroup];
        if (simd->ready) return (int)(simdgroup * mtl_simd_lanes + (unsigned)__builtin_ctz(simd->ready));
        if (simd->waiting) return (int)choose(group, simdgroup, index);
    }
    /* Whoever is left stands at a barrier. */
    if (group->finished == group->threads) return -1;
    if (group->finished > 0) {
        group->failure = mtl_failure_barrier;
        return -1;
    }
    for (unsigned i = 0; i < group->simdgroups; i++) {
        group->simdgroup[i].ready = group->simdgroup[i].barrier;
        group->simdgroup[i].barrier = 0;
    }
    return 0;
}

/* With lanes in lockstep a simdgroup is at one place: ready (as long as it is not at a barrier), or at one with some
 * lanes. */
static int next_simdgroup(mtl_group *group, unsigned simdgroup) {
    if (is_interrupted(group)) return -1;
    for (unsigned looked = 0; looked < group->simdgroups; looked++) {
        if (++simdgroup >= group->simdgroups) simdgroup = 0;
        if (group->simdgroup[simdgroup].ready) return (int)simdgroup;
    }
    unsigned at_barrier = 0;
    for (unsigned i = 0; i < group->simdgroups; i++)
        at_barrier += (unsigned)__builtin_popcount(group->simdgroup[i].barrier);
    group->finished = group->threads - at_barrier;
    if (group->finished > 0) {
        if (at_barrier > 0) group->failure = mtl_failure_barrier;
        return -1;
    }
    for (unsigned i = 0; i < group->simdgroups; i++) {
        group->simdgroup[i].ready = group->simdgroup[i].barrier;
        group->simdgroup[i].barrier = 0;
    }
    return 0;
}

/* ---- threadgroup memory -------------------------------------------------------------------------------------------------------- */

static void *declare(mtl_group *group, unsigned variable, unsigned long bytes, unsigned long alignment) {
    unsigned long at = (group->memory_used + 63) / 64 * 64;
    if (alignment > 64) at = (at + alignment - 1) / alignment * alignment;
    if (variable >= mtl_most_variables || bytes > group->memory_size || at > group->memory_size - bytes) {
        group->failure = mtl_failure_memory; /* runs on in memory that is there, to be refused at the end */
        return group->memory;
    }
    group->memory_used = at + bytes;
    return group->variable[variable] = group->memory + at;
}

static void *declare_separately(mtl_group *group, unsigned variable, unsigned long bytes, unsigned long alignment) {
    void *memory = NULL;
    if (variable >= mtl_most_variables || bytes > group->memory_size ||
        posix_memalign(&memory, alignment < 16 ? 16 : alignment, bytes) != 0) {
        group->failure = mtl_failure_memory;
        return group->memory;
    }
    return group->variable[variable] = memory;
}

/* ---- workspaces ------------------------------------------------------------------------------------------------------------------- */

static struct {
    pthread_mutex_t mutex;
    mtl_workspace *first;
} idle = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static void after_fork_in_child(void) { pthread_mutex_init(&idle.mutex, NULL); }

__attribute__((constructor)) static void prepare_fork(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }

static size_t all_stacks(int stack_bits) { return (size_t)mtl_most_threads << stack_bits; }

/* From the first stack to the end of the group. */
static size_t mapped_bytes(int stack_bits) { return all_stacks(stack_bits) + sizeof(mtl_group); }

/* The region that threads compute from their stack pointers: stacks, and then the group. */
static bool map_stacks(mtl_workspace *workspace, int stack_bits) {
    size_t size = all_stacks(stack_bits), region = 2 * size;
    char *all = mmap(NULL, 2 * region, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) return false;
    char *aligned = all + (region - (uintptr_t)all % region) % region;
    if (aligned > all) munmap(all, (size_t)(aligned - all));
    munmap(aligned + region, (size_t)(all + region - aligned));
    if (mprotect(aligned, mapped_bytes(stack_bits), PROT_READ | PROT_WRITE) != 0) {
        munmap(aligned, region);
        return false;
    }
    /* Small stacks are used all, and a few large pages hold them; of large ones a small page is. */
    madvise(aligned, size, stack_bits <= SMALL_STACK_BITS ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    workspace->stacks = aligned;
    workspace->stack_bits = stack_bits;
    workspace->group = (mtl_group *)(void *)(aligned + size);
    return true;
}

static void free_workspace(mtl_workspace *workspace) {
    if (workspace->group && workspace->group->memory) munmap(workspace->group->memory, GROUP_MEMORY);
    if (workspace->stacks) munmap(workspace->stacks, 2 * all_stacks(workspace->stack_bits));
    else free(workspace->group);
    free(workspace);
}

static mtl_workspace *new_workspace(int stack_bits) {
    mtl_workspace *workspace = calloc(1, sizeof *workspace);
    if (!workspace) return NULL;
    bool mapped = stack_bits ? map_stacks(workspace, stack_bits)
                             : (workspace->group = calloc(1, sizeof *workspace->group)) != NULL;
    void *memory =
        mapped ? mmap(NULL, GROUP_MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
               : MAP_FAILED;
    if (memory == MAP_FAILED) {
        free_workspace(workspace);
        return NULL;
    }
    workspace->group->memory = memory;
    workspace->group->memory_size = GROUP_MEMORY;
    workspace->group->is_interrupted = is_interrupted;
    workspace->group->next = next_thread;
    workspace->group->next_simdgroup = next_simdgroup;
    return workspace;
}

mtl_workspace *mtl_workspace_take(int stack_bits, bool separate) {
    pthread_mutex_lock(&idle.mutex);
    mtl_workspace **link = &idle.first;
    while (*link && (*link)->stack_bits != stack_bits) link = &(*link)->next;
    mtl_workspace *workspace = *link;
    if (workspace) *link = workspace->next;
    pthread_mutex_unlock(&idle.mutex);
    if (!workspace) workspace = new_workspace(stack_bits);
    if (!workspace) return NULL;
    mtl_group *group = workspace->group;
    memset(group->variable, 0, sizeof group->variable);
    group->memory_used = 0;
    group->failure = mtl_failure_none;
    group->declare = separate ? declare_separately : declare;
    return workspace;
}

void mtl_workspace_give(mtl_workspace *workspace, bool reusable) {
    mtl_group *group = workspace->group;
    if (group->declare == declare_separately) {
        for (int i = 0; i < mtl_most_variables; i++) free(group->variable[i]);
    }
    if (!reusable || workspace->stack_bits > MOST_KEPT_STACK_BITS) {
        free_workspace(workspace);
        return;
    }
    pthread_mutex_lock(&idle.mutex);
    workspace->next = idle.first;
    idle.first = workspace;
    pthread_mutex_unlock(&idle.mutex);
}

__attribute__((destructor)) static void free_idle(void) {
    while (idle.first) {
        mtl_workspace *next = idle.first->next;
        free_workspace(idle.first);
        idle.first = next;
    }
}
