/* How the threads of a threadgroup run on the CPU, one worker for all of them. SPDX-License-Identifier: MIT
 *
 * Every thread has a stack of its own and runs until it gets to a barrier or to an exchange between the lanes of its simdgroup;
 * there it switches to the next thread. The lane that comes last to an exchange does it for all who wait at the same one.
 * With part of the lanes elsewhere, those that are first in program order go on first, so that lanes meet again where a
 * GPU's would. The common case, all lanes at the same place, costs one switch a lane.
 *
 * The stacks of a worker lie behind each other in a region that is aligned to its size; behind the last one, in the middle of
 * the region, is its mtl_group. So a thread finds what it belongs to by its stack pointer alone: no thread-local storage, and
 * no load that the next switch would have to wait for. */
#define __mtl_inline        static inline __attribute__((always_inline))
#define __mtl_inline_member inline __attribute__((always_inline))

/* Read anew each time: kept, it would come back from the stack after a switch, which is what everything then waits for. */
__mtl_inline unsigned long __mtl_stack_pointer() {
    unsigned long pointer;
#if defined(__x86_64__)
    __asm__ volatile("movq %%rsp, %0" : "=r"(pointer));
#else
    __asm__ volatile("mov %0, sp" : "=r"(pointer));
#endif
    return pointer;
}

__mtl_inline mtl_group &__mtl_this_group() {
    const unsigned long stacks = (unsigned long)mtl_most_threads << MTL_STACK_BITS;
    return *(mtl_group *)((__mtl_stack_pointer() & ~(stacks - 1)) + stacks);
}

__mtl_inline unsigned __mtl_this_index() {
    return (unsigned)(__mtl_stack_pointer() >> MTL_STACK_BITS) & (mtl_most_threads - 1);
}

/* Stores the stack pointer in *from and goes on where `to` was stored. Every register that a call keeps is saved, by the
 * compiler where it is named as clobbered; the flags of floating point are nobody's to change. */
#if defined(__x86_64__)
#if defined(__AVX512F__)
#define __mtl_more_clobbers                                                                                       \
    , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", \
        "xmm28", "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7"
#else
#define __mtl_more_clobbers
#endif
__mtl_inline void __mtl_switch(void **from, void *to) {
    __asm__ volatile("pushq %%rbp\n\t"
                     "pushq %%rbx\n\t"
                     "leaq 1f(%%rip), %%rax\n\t"
                     "pushq %%rax\n\t"
                     "movq %%rsp, (%0)\n\t"
                     "movq %1, %%rsp\n\t"
                     "popq %%rax\n\t"
                     "jmpq *%%rax\n"
                     "1:\n\t"
                     "popq %%rbx\n\t"
                     "popq %%rbp\n\t"
                     : "+D"(from), "+S"(to)
                     :
                     : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "cc", "memory",
                       "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                       "xmm12", "xmm13", "xmm14", "xmm15" __mtl_more_clobbers);
}
/* A stack on which the switch will call `entry`: its pointer is as a call would leave it. */
__mtl_inline void *__mtl_fresh_stack(char *top, void (*entry)()) {
    void **stack = (void **)top - 2;
    stack[1] = 0;
    stack[0] = (void *)entry;
    return stack;
}
#elif defined(__aarch64__)
__mtl_inline void __mtl_switch(void **from, void *to) {
    register void **first __asm__("x0") = from;
    register void *second __asm__("x1") = to;
    __asm__ volatile("stp x29, x30, [sp, #-32]!\n\t"
                     "adr x9, 1f\n\t"
                     "stp x19, x9, [sp, #16]\n\t"
                     "mov x10, sp\n\t"
                     "str x10, [%0]\n\t"
                     "mov sp, %1\n\t"
                     "ldr x9, [sp, #24]\n\t"
                     "br x9\n"
                     "1:\n\t"
                     "ldr x19, [sp, #16]\n\t"
                     "ldp x29, x30, [sp], #32\n\t"
                     : "+r"(first), "+r"(second)
                     :
                     : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16",
                       "x17", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "cc", "memory", "v0", "v1",
                       "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16",
                       "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30",
                       "v31");
}
__mtl_inline void *__mtl_fresh_stack(char *top, void (*entry)()) {
    void **stack = (void **)top - 4;
    stack[3] = (void *)entry;
    return stack;
}
#else
#error "Metal kernels run on x86-64 and aarch64"
#endif

__mtl_inline unsigned __mtl_lane() { return __mtl_this_index() % mtl_simd_lanes; }

/* The calling thread has left its simdgroup's ready lanes: runs others, and returns when its turn comes again. Mostly it is
 * the next lane's turn: a branch, which is predicted, so that its stack need not be waited for. */
__mtl_inline void __mtl_yield(mtl_group &group, unsigned index, const mtl_simdgroup &simd) {
    unsigned ready = simd.ready;
    mtl_thread *self = &group.thread[index];
    if (__builtin_expect((ready & (2u << index % mtl_simd_lanes)) != 0, 1)) {
        __mtl_switch(&self->stack, self[1].stack);
        return;
    }
    int next = ready ? (int)(index / mtl_simd_lanes * mtl_simd_lanes + (unsigned)__builtin_ctz(ready))
                     : group.next(&group, index);
    if (next == (int)index) return;
    __mtl_switch(&self->stack, next < 0 ? group.home : group.thread[next].stack);
}

/* One lane does the exchange for all that wait at it. */
template <typename Result, typename Argument, typename Combine>
static __attribute__((noinline)) void __mtl_lead(mtl_simdgroup &simd, const mtl_thread *threads, Combine combine) {
    unsigned active = simd.active;
    Argument values[mtl_simd_lanes];
    Result results[mtl_simd_lanes];
    if (active == ~0u) {
        for (unsigned i = 0; i < mtl_simd_lanes; i++) values[i] = *(const Argument *)threads[i].argument;
        combine(values, results, ~0u);
        for (unsigned i = 0; i < mtl_simd_lanes; i++) *(Result *)threads[i].result = results[i];
    } else {
        for (unsigned left = active; left; left &= left - 1) {
            unsigned i = (unsigned)__builtin_ctz(left);
            values[i] = *(const Argument *)threads[i].argument;
        }
        combine(values, results, active);
        for (unsigned left = active; left; left &= left - 1) {
            unsigned i = (unsigned)__builtin_ctz(left);
            *(Result *)threads[i].result = results[i];
        }
    }
    simd.leader = -1;
    simd.waiting &= ~active;
    simd.ready |= active;
}

#if MTL_LOCKSTEP

/* Lanes in lockstep meet by lockstep_cpu.h. A call of these comes out of what its translation does not see, a macro
 * say: it must not compile. */
#define __mtl_not_in_lockstep __attribute__((error("lanes meet where they are not in lockstep")))
template <typename Result, typename Argument, typename Combine>
__mtl_not_in_lockstep Result __mtl_collective(const Argument &mine, Combine combine);
template <typename Result, typename Argument, typename Combine>
__mtl_not_in_lockstep Result __mtl_collective_uniform(const Argument &mine, Combine combine);
__mtl_not_in_lockstep void __mtl_simdgroup_barrier();
__mtl_not_in_lockstep void __mtl_threadgroup_barrier();

#else

/* Runs once when every active lane of this simdgroup stands at this call:
 *     combine(const Argument (&values)[32], Result (&results)[32], unsigned active)
 * where values[i] is there for the bits i of `active`, and results[i] has to be set. Both are trivially copyable. One lane runs
 * combine for all of them: what depends on the lane stands in Argument. All of it but combine is inlined, so that a switch
 * comes back by a jump, which is predicted, and saves what is live, no more. */
template <typename Result, typename Argument, typename Combine>
__mtl_inline Result __mtl_collective(const Argument &mine, Combine combine) {
    mtl_group &group = __mtl_this_group();
    unsigned index = __mtl_this_index(), lane = index % mtl_simd_lanes;
    mtl_thread &self = group.thread[index];
    mtl_simdgroup &simd = group.simdgroup[index / mtl_simd_lanes];
    Argument argument = mine;
    Result result;
    self.argument = &argument;
    self.result = &result;
    self.exchange = (const void *)&__mtl_lead<Result, Argument, Combine>;
    self.sequence++;
    simd.ready &= ~(1u << lane);
    simd.waiting |= 1u << lane;
    __mtl_yield(group, index, simd);
    mtl_simdgroup &again = __mtl_this_group().simdgroup[__mtl_this_index() / mtl_simd_lanes];
    if (__builtin_expect(again.leader == (int)(__mtl_this_index() % mtl_simd_lanes), 0))
        __mtl_lead<Result, Argument, Combine>(again, &self - lane, combine);
    return result;
}

/* The same with one result, of at most 64 bytes, for all lanes: combine(values, active) returns it. */
template <typename Result, typename Argument, typename Combine>
static __attribute__((noinline)) void __mtl_lead_uniform(mtl_simdgroup &simd, const mtl_thread *threads,
                                                         Combine combine) {
    unsigned active = simd.active;
    Argument values[mtl_simd_lanes];
    if (active == ~0u) {
        for (unsigned i = 0; i < mtl_simd_lanes; i++) values[i] = *(const Argument *)threads[i].argument;
        *(Result *)simd.shared = combine(values, ~0u);
    } else {
        for (unsigned left = active; left; left &= left - 1) {
            unsigned i = (unsigned)__builtin_ctz(left);
            values[i] = *(const Argument *)threads[i].argument;
        }
        *(Result *)simd.shared = combine(values, active);
    }
    simd.leader = -1;
    simd.waiting &= ~active;
    simd.ready |= active;
}

template <typename Result, typename Argument, typename Combine>
__mtl_inline Result __mtl_collective_uniform(const Argument &mine, Combine combine) {
    static_assert(sizeof(Result) <= sizeof(mtl_simdgroup::shared), "a result for all lanes is small");
    mtl_group &group = __mtl_this_group();
    unsigned index = __mtl_this_index(), lane = index % mtl_simd_lanes;
    mtl_thread &self = group.thread[index];
    mtl_simdgroup &simd = group.simdgroup[index / mtl_simd_lanes];
    Argument argument = mine;
    self.argument = &argument;
    self.exchange = (const void *)&__mtl_lead_uniform<Result, Argument, Combine>;
    self.sequence++;
    simd.ready &= ~(1u << lane);
    simd.waiting |= 1u << lane;
    __mtl_yield(group, index, simd);
    mtl_simdgroup &again = __mtl_this_group().simdgroup[__mtl_this_index() / mtl_simd_lanes];
    if (__builtin_expect(again.leader == (int)(__mtl_this_index() % mtl_simd_lanes), 0))
        __mtl_lead_uniform<Result, Argument, Combine>(again, &self - lane, combine);
    return *(const Result *)again.shared;
}

__mtl_inline void __mtl_simdgroup_barrier() {
    __mtl_collective_uniform<char>((char)0, [](const char(&)[mtl_simd_lanes], unsigned) { return (char)0; });
}

__mtl_inline void __mtl_threadgroup_barrier() {
    mtl_group &group = __mtl_this_group();
    unsigned index = __mtl_this_index(), bit = 1u << index % mtl_simd_lanes;
    mtl_simdgroup &simd = group.simdgroup[index / mtl_simd_lanes];
    group.thread[index].sequence++;
    simd.ready &= ~bit;
    simd.barrier |= bit;
    __mtl_yield(group, index, simd);
}

#endif

/* The calling thread is done with the kernel's body. */
__mtl_inline void __mtl_finish() {
    mtl_group &group = __mtl_this_group();
    unsigned index = __mtl_this_index(), bit = 1u << index % mtl_simd_lanes;
    mtl_simdgroup &simd = group.simdgroup[index / mtl_simd_lanes];
    simd.ready &= ~bit;
    simd.alive &= ~bit;
    group.finished++;
    __mtl_yield(group, index, simd);
    __builtin_trap(); /* nobody switches back to it */
}

/* Loops of a kernel that counts them come by here. */
static __attribute__((noinline)) bool __mtl_iterate() {
    mtl_group &group = __mtl_this_group();
    unsigned index = __mtl_this_index();
    unsigned long count = ++group.iterations[index];
    if (__builtin_expect(count > group.dispatch->most_iterations, 0)) group.failure = mtl_failure_iterations;
    else if (__builtin_expect(count % mtl_uninterrupted != 0 || !group.is_interrupted(&group), 1)) return false;
    __mtl_switch(&group.thread[index].stack, group.home);
    return true;
}

/* The marks of src/kernel/places.c. */
__mtl_inline unsigned long &__mtl_mark(mtl_group &group, unsigned index, unsigned level) {
    return __builtin_expect(level < mtl_near_levels, 1) ? group.thread[index].mark[level]
                                                        : group.far_mark[index][level - mtl_near_levels];
}

__mtl_inline unsigned __mtl_level(const mtl_thread &self, unsigned loops) {
    unsigned level = self.frame + loops;
    return __builtin_expect(level < mtl_most_levels - 1, 1) ? level : mtl_most_levels - 2;
}

/* The thread is at the place `number`, within so many loops of its function. */
__mtl_inline void __mtl_at(unsigned loops, unsigned long number) {
    mtl_group &group = __mtl_this_group();
    unsigned index = __mtl_this_index();
    mtl_thread &self = group.thread[index];
    unsigned level = __mtl_level(self, loops);
    __mtl_mark(group, index, level) = number << 32;
    self.level = (unsigned short)(level + 1);
    self.sequence = 0;
}

/* It begins an iteration of the loop `number`: the first one, where it comes from another place. */
__mtl_inline bool __mtl_loop(unsigned loops, unsigned long number) {
    mtl_group &group = __mtl_this_group();
    unsigned index = __mtl_this_index();
    mtl_thread &self = group.thread[index];
    unsigned level = __mtl_level(self, loops);
    unsigned long &mark = __mtl_mark(group, index, level);
    mark = mark >> 32 == number ? mark + 1 : number << 32;
    __mtl_mark(group, index, level + 1) = 0;
    self.level = (unsigned short)(level + 1);
    self.sequence = 0;
    return false;
}

/* It is in a function; what is in there comes below the place of the call. */
struct __mtl_frame {
    unsigned before;
    __mtl_inline_member __mtl_frame() {
        mtl_group &group = __mtl_this_group();
        unsigned index = __mtl_this_index();
        mtl_thread &self = group.thread[index];
        before = self.frame;
        self.frame = self.level < mtl_most_levels - 1 ? self.level : (unsigned short)(mtl_most_levels - 2);
        __mtl_mark(group, index, self.frame) = 0;
    }
    __mtl_inline_member ~__mtl_frame() { __mtl_this_group().thread[__mtl_this_index()].frame = (unsigned short)before; }
};

/* A variable in threadgroup memory. */
template <typename Type> __mtl_inline Type &__mtl_variable(mtl_group &group, unsigned variable) {
    void *memory = group.variable[variable];
    if (!memory) memory = group.declare(&group, variable, sizeof(Type), alignof(Type));
    return *(Type *)memory;
}

template <typename Type, typename Value> __mtl_inline void __mtl_assign(Type &to, const Value &value) { to = value; }
template <typename Type, typename Value, unsigned long N>
__mtl_inline void __mtl_assign(Type (&to)[N], const Value (&value)[N]) {
    for (unsigned long i = 0; i < N; i++) __mtl_assign(to[i], value[i]);
}
/* With a value, which it has when a threadgroup's first thread gets there. */
template <typename Type> struct __mtl_initialized {
    Type value;
    unsigned position[3]; /* of the threadgroup whose value it is */
};
template <typename Type, typename Value>
__mtl_inline Type &__mtl_variable(mtl_group &group, unsigned variable, const Value &value) {
    bool first = !group.variable[variable];
    __mtl_initialized<Type> &place = __mtl_variable<__mtl_initialized<Type>>(group, variable);
    for (int axis = 0; axis < 3; axis++) first |= place.position[axis] != group.position[axis];
    if (first) {
        for (int axis = 0; axis < 3; axis++) place.position[axis] = group.position[axis];
        __mtl_assign(place.value, value);
    }
    return place.value;
}

__mtl_inline unsigned __mtl_count(const unsigned *extent) { return extent[0] * extent[1] * extent[2]; }

/* Sets place and extents of threadgroup `at` of the dispatch. `joined`, an axis (y where there is one along x): of
 * as many threadgroups as lie behind each other along it before `end`, taken as one; -1: of one. Returns how many. */
static unsigned long __mtl_place_group(mtl_group &group, unsigned long at, unsigned long end, int joined) {
    const mtl_dispatch &dispatch = *group.dispatch;
    unsigned long rows = at / dispatch.threadgroups[0], run = 1;
    group.position[0] = (unsigned)(at % dispatch.threadgroups[0]);
    group.position[1] = (unsigned)(rows % dispatch.threadgroups[1]);
    group.position[2] = (unsigned)(rows / dispatch.threadgroups[1]);
    if (joined >= 0) {
        unsigned long left = dispatch.threadgroups[joined] - group.position[joined];
        unsigned long most = mtl_most_joined / dispatch.threadgroup[joined];
        run = end - at < left ? end - at : left;
        if (run > most) run = most;
    }
    for (int axis = 0; axis < 3; axis++) {
        unsigned long size = axis == joined ? run * dispatch.threadgroup[axis] : dispatch.threadgroup[axis];
        unsigned long left = dispatch.grid[axis] - (unsigned long)group.position[axis] * dispatch.threadgroup[axis];
        group.extent[axis] = (unsigned)(size < left ? size : left);
    }
    return run;
}

/* Runs one threadgroup whose place and extents are set; `entry` is the life of a thread. False where it failed. */
static bool __mtl_run_group(mtl_group &group, char *stacks, void (*entry)()) {
    group.threads = group.extent[0] * group.extent[1] * group.extent[2];
    group.simdgroups = (group.threads + mtl_simd_lanes - 1) / mtl_simd_lanes;
    group.finished = 0;
    unsigned x = 0, y = 0, z = 0;
    for (unsigned i = 0; i < group.threads; i++) {
        mtl_thread &thread = group.thread[i];
        /* Stacks begin at different places of their pages: at equal ones they would all fall into the same few cache sets. */
        unsigned long top = ((unsigned long)(i + 1) << MTL_STACK_BITS) - (i + i / 16) % 32 * 64;
        thread.stack = __mtl_fresh_stack(stacks + top, entry);
        thread.level = thread.frame = 0;
        thread.sequence = 0;
        thread.mark[0] = 0;
        if (group.dispatch->most_iterations) group.iterations[i] = 0;
        group.position_of[i][0] = x;
        group.position_of[i][1] = y;
        group.position_of[i][2] = z;
        if (++x == group.extent[0]) {
            x = 0;
            if (++y == group.extent[1]) y = 0, z++;
        }
    }
    for (unsigned s = 0; s < group.simdgroups; s++) {
        unsigned lanes = group.threads - s * mtl_simd_lanes;
        unsigned all = lanes >= mtl_simd_lanes ? ~0u : (1u << lanes) - 1;
        mtl_simdgroup &simd = group.simdgroup[s];
        simd.alive = simd.ready = all;
        simd.waiting = simd.barrier = simd.active = 0;
        simd.leader = -1;
    }
    __mtl_switch(&group.home, group.thread[0].stack);
    return group.failure == mtl_failure_none;
}
