/* Custom kernels on the CPU. SPDX-License-Identifier: MIT
 *
 * A kernel becomes a shared object whose one function runs a range of threadgroups. Threadgroups are independent of each other:
 * the range is cut into parts for the thread pool. What a threadgroup costs is not known beforehand, so the caller does the
 * first few by the clock, and asks for help where a wake-up of other threads is worth it. */
#include "core/environment.h"
#include "core/threads.h"
#include "kernel/cache.h"
#include "kernel/fiber.h"
#include "kernel/kernel.h"
#include "kernel/messages.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

enum {
    STACK_BITS = 13,          /* of a thread: 8 KiB, so that those of a threadgroup stay in the caches */
    LOCKSTEP_STACK_BITS = 17, /* of a simdgroup whose lanes are in lockstep, of which there are few */
    SANITIZER_STACK_BITS = 18,
    LARGEST_STACK_BITS = 20,
    FRAMES =
        5, /* this many of the largest size fit in a stack: a function, what it calls, an exchange, the library's own */
    ALONE_NS = 10 * 1000, /* the caller is on its own for so long */
    WORTH_NS = 15 * 1000, /* what is left has to take longer for others to be woken */
    PARTS_A_THREAD = 8,
};

static const char op[] = "metal_kernel";

/* ---- from a kernel to a function ------------------------------------------------------------------------------------------- */

/* Objects of this process by key: kernels that are made again find theirs. They stay until the process ends. */
typedef struct object {
    struct object *next;
    mtl_digest key;
    void *handle;
} object;

static struct {
    pthread_mutex_t mutex; /* held by who compiles */
    object *first;
} objects = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static void after_fork_in_child(void) { pthread_mutex_init(&objects.mutex, NULL); }

__attribute__((constructor)) static void prepare_fork(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }

/* What the compiler's -march=native looks at. */
static void add_processor(mtl_sha256 *hash) {
#if defined(__x86_64__)
    for (unsigned leaf = 0; leaf <= 0x80000001; leaf = leaf == 0x19 ? 0x80000001 : leaf + 1) {
        if (leaf == 2) leaf = 7; /* those between say how caches are shared, and on which CPU this runs */
        if (leaf > 7 && leaf < 0x14) leaf = 0x14;
        unsigned registers[4] = {0};
        if (!__get_cpuid_count(leaf, 0, &registers[0], &registers[1], &registers[2], &registers[3])) continue;
        if (leaf == 1) registers[1] = 0; /* the CPU's number */
        mtl_sha256_add(hash, registers, sizeof registers);
    }
#elif defined(__aarch64__) && defined(__linux__)
    unsigned long bits[] = {getauxval(AT_HWCAP), getauxval(AT_HWCAP2)};
    mtl_sha256_add(hash, bits, sizeof bits);
#else
    (void)hash;
#endif
}

static mtl_digest key_of(const mtl_compiler *compiler, const char *const *arguments, const mtl_text *unit) {
    mtl_sha256 hash;
    mtl_sha256_begin(&hash);
    const char *version = metalloid_version();
    mtl_sha256_add(&hash, version, strlen(version) + 1);
    mtl_sha256_add(&hash, compiler->identity.data, compiler->identity.length + 1);
    for (int i = 0; i < compiler->words; i++) mtl_sha256_add(&hash, compiler->word[i], strlen(compiler->word[i]) + 1);
    for (int i = 0; arguments[i]; i++) mtl_sha256_add(&hash, arguments[i], strlen(arguments[i]) + 1);
    add_processor(&hash);
    mtl_sha256_add(&hash, unit->data, unit->length);
    return mtl_sha256_end(&hash);
}

static int compiler_arguments(const metalloid_kernel *kernel, int stack_bits, char frame_limit[64],
                              const char *arguments[48]) {
    static const char *const always[] = {
        "-x",
        "c++",
        "-std=c++17",
        "-nostdinc",
        "-nostdinc++",
        "-nostdlib",
        "-shared",
        "-fPIC",
        "-fno-exceptions",
        "-fno-rtti",
        "-fvisibility=hidden",
        "-fsigned-char",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fno-stack-protector",
        "-fno-asynchronous-unwind-tables",
        "-march=native",
        "-Wno-everything",
        "-fno-color-diagnostics",
        "-fno-sanitize=undefined", /* which zig has on without optimization */
        "-ferror-limit=20",
        "-fmax-type-align=8", /* of what pointers point to: vectors in any array (msl/vectors.h) */
        "-Werror=frame-larger-than",
        "-Werror=vla", /* which Metal has not, and no limit of frames sees */
#if defined(__x86_64__)
        "-mno-red-zone",
        "-mprefer-vector-width=512",
#endif
    };
    static const char *const safe[] = {"-Xclang", "-ffp-contract=fast-honor-pragmas", NULL};
    static const char *const relaxed[] = {"-fassociative-math",
                                          "-freciprocal-math",
                                          "-fno-signed-zeros",
                                          "-Xclang",
                                          "-ffp-contract=fast-honor-pragmas",
                                          NULL};
    /* Infinity and NaN count all the same: masks are made of them. clang then leaves out the macro, which Metal has. */
    static const char *const fast[] = {"-ffast-math", "-fno-finite-math-only", "-D__FAST_MATH__=1", NULL};
    int count = 0;
    for (size_t i = 0; i < sizeof always / sizeof always[0]; i++) arguments[count++] = always[i];
    const char *const *mode = kernel->math_mode == METALLOID_MATH_SAFE      ? safe
                              : kernel->math_mode == METALLOID_MATH_RELAXED ? relaxed
                                                                            : fast;
    while (*mode) arguments[count++] = *mode++;
    /* A frame that its stack could not hold is an error of the compiler's, not of the process. */
    snprintf(frame_limit, 64, "-Wframe-larger-than=%lu", (1ul << stack_bits) / FRAMES);
    arguments[count++] = frame_limit;
    if (kernel->debug || kernel->address_sanitizer) {
        arguments[count++] = "-g";
        arguments[count++] = "-fno-omit-frame-pointer";
        arguments[count++] = kernel->address_sanitizer ? "-O1" : "-O0"; /* -Og leaves out variables */
    } else {
        arguments[count++] = "-O3";
    }
    if (kernel->address_sanitizer) {
        arguments[count++] = "-fsanitize=address";
        arguments[count++] = "-fsanitize-address-use-after-return=never"; /* it would follow one stack a thread */
    }
    arguments[count] = NULL;
    return count;
}

static void *find_object(const mtl_digest *key) {
    for (const object *at = objects.first; at; at = at->next) {
        if (memcmp(&at->key, key, sizeof *key) == 0) return at->handle;
    }
    return NULL;
}

/* Compiles, or finds it compiled; the mutex is held. NULL: `log` has why, or `*lockstep`, lanes in lockstep, is what
 * the source does not allow. */
static void *build_object(const metalloid_kernel *kernel, const mtl_types *types, int stack_bits, bool *lockstep,
                          const mtl_compiler *compiler, mtl_text *log) {
    const char *arguments[48];
    char frame_limit[64];
    compiler_arguments(kernel, stack_bits, frame_limit, arguments);
    const mtl_unit_options options = {.target = MTL_TARGET_CPU,
                                      .math_mode = kernel->math_mode,
                                      .stack_bits = stack_bits,
                                      .count_iterations = kernel->most_iterations > 0,
                                      .lockstep = *lockstep};
    mtl_text unit = {0};
    void *handle = NULL;
    bool wanted = *lockstep;
    *lockstep = mtl_translation_unit(&unit, &kernel->definition, &kernel->mentions, types, &options);
    if (unit.failed) {
        log->failed = true;
    } else if (*lockstep == wanted) {
        mtl_build build = {.compiler = compiler,
                           .arguments = arguments,
                           .unit = unit.data,
                           .unit_length = unit.length,
                           .key = key_of(compiler, arguments, &unit)};
        if (kernel->debug) {
            build.source = kernel->definition.source;
            build.header = kernel->definition.header;
        }
        handle = find_object(&build.key);
        if (!handle) {
            handle = mtl_cache_get(&build, log);
            object *kept = handle ? malloc(sizeof *kept) : NULL;
            if (kept) {
                *kept = (object){objects.first, build.key, handle};
                objects.first = kept;
            }
        }
    }
    mtl_text_free(&unit);
    return handle;
}

/* Where the compiler says that a frame is too large: log2 of a stack that holds it; 0 where none does, or it says
 * something else. */
static int larger_stack(const mtl_text *log, int bits) {
    static const char words[] = "stack frame size (";
    if (!log->data || !strstr(log->data, "frame-larger-than")) return 0;
    unsigned long largest = 0;
    for (const char *at = log->data; (at = strstr(at, words)); at += sizeof words - 1) {
        unsigned long size = strtoul(at + sizeof words - 1, NULL, 10);
        if (size > largest) largest = size;
    }
    if (!largest) return LARGEST_STACK_BITS; /* another version's words */
    while (bits < LARGEST_STACK_BITS && (1ul << bits) / FRAMES < largest) bits++;
    return (1ul << bits) / FRAMES < largest ? 0 : bits;
}

/* With stacks of that size, or of a larger one where they have to be. */
static void *build_with_stacks(const metalloid_kernel *kernel, const mtl_types *types, int bits, bool lockstep,
                               const mtl_compiler *compiler, mtl_text *log) {
    void *handle = build_object(kernel, types, bits, &lockstep, compiler, log);
    int larger = handle ? 0 : larger_stack(log, bits);
    if (!larger) return handle;
    mtl_text_free(log);
    return build_object(kernel, types, larger, &lockstep, compiler, log);
}

/* Whether the compiler says of itself that it is not clang. */
static bool is_other_compiler(const mtl_compiler *compiler) {
    static const char *const arguments[] = {"-dM", "-E", "-x",
                                            "c++", "-",  NULL}; /* the macros that it has from the start */
    mtl_text macros = {0};
    bool other = mtl_compiler_run(compiler, arguments, "/", &macros) && macros.data &&
                 strstr(macros.data, "#define __cplusplus") && !strstr(macros.data, "#define __clang__");
    mtl_text_free(&macros);
    return other;
}

static metalloid_status refuse(const metalloid_kernel *kernel, const mtl_compiler *compiler, const mtl_text *log) {
    const char *wanted = mtl_setting("METALLOID_CXX");
    mtl_text hint = {0};
    if (wanted && is_other_compiler(compiler))
        mtl_text_format(&hint, "METALLOID_CXX=%s is not clang, which kernels are compiled with\n", wanted);
    metalloid_status status = mtl_does_not_compile(op, &kernel->definition, &hint, log);
    mtl_text_free(&hint);
    return status;
}

static metalloid_status build(const metalloid_kernel *kernel, const mtl_types *types, mtl_variant *variant) {
    if (kernel->address_sanitizer && !dlsym(RTLD_DEFAULT, "__asan_init")) {
        return mtl_fail(METALLOID_COMPILE_FAILED,
                        "%s: kernel %s asks for AddressSanitizer, whose run-time is not in this process: start it with "
                        "LD_PRELOAD=$(clang -print-file-name=libclang_rt.asan-x86_64.so)",
                        op, kernel->definition.name);
    }
    mtl_compiler compiler;
    if (!mtl_compiler_find(&compiler, kernel->fallback_compiler)) {
        const char *wanted = mtl_setting("METALLOID_CXX");
        if (wanted) {
            return mtl_fail(METALLOID_COMPILE_FAILED,
                            "%s: METALLOID_CXX=%.200s is no program that can be run, and kernel %s has to be compiled",
                            op, wanted, kernel->definition.name);
        }
        return mtl_fail(METALLOID_COMPILE_FAILED,
                        "%s: no C++ compiler for kernel %s: install clang (Debian: apt install clang), or the PyPI "
                        "package ziglang, or name one in METALLOID_CXX",
                        op, kernel->definition.name);
    }
    mtl_text log = {0};
    pthread_mutex_lock(&objects.mutex);
    bool to_debug = kernel->address_sanitizer || kernel->debug;
    void *handle = NULL;
    /* In lockstep where the source allows it; what does not compile so is built, and complained about, as written. */
    if (!to_debug) handle = build_with_stacks(kernel, types, LOCKSTEP_STACK_BITS, true, &compiler, &log);
    if (!handle) {
        mtl_text_free(&log);
        int bits = to_debug ? SANITIZER_STACK_BITS : STACK_BITS;
        handle = build_with_stacks(kernel, types, bits, false, &compiler, &log);
    }
    pthread_mutex_unlock(&objects.mutex);
    metalloid_status status = handle ? METALLOID_OK : refuse(kernel, &compiler, &log);
    mtl_compiler_free(&compiler);
    mtl_text_free(&log);
    if (status) return status;
    void *run = dlsym(handle, "mtl_kernel_run");
    const int *stack = dlsym(handle, "mtl_kernel_stack_bits");
    if (!run || !stack)
        return mtl_fail(METALLOID_COMPILE_FAILED, "%s: the object of kernel %s is none of ours", op,
                        kernel->definition.name);
    memcpy(&variant->run, &run, sizeof run); /* C has no cast between these two */
    variant->stack_bits = *stack;
    return METALLOID_OK;
}

/* FNV-1a */
static uint64_t hash_of(const unsigned char *bytes, size_t count) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < count; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

static const mtl_variant *find_variant(const metalloid_kernel *kernel, uint64_t hash, const mtl_launch *launch) {
    for (const mtl_variant *at = atomic_load_explicit(&kernel->variants, memory_order_acquire); at; at = at->next) {
        if (at->hash == hash && at->key_length == launch->key_length &&
            memcmp(at->key, launch->key, launch->key_length) == 0)
            return at;
    }
    return NULL;
}

/* NULL: `status` says what failed. */
static const mtl_variant *get_variant(metalloid_kernel *kernel, const mtl_launch *launch, metalloid_status *status) {
    uint64_t hash = hash_of(launch->key, launch->key_length);
    const mtl_variant *found = find_variant(kernel, hash, launch);
    if (found) return found;
    mtl_variant *variant = malloc(sizeof *variant + launch->key_length);
    if (!variant) {
        *status = mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: out of memory", op);
        return NULL;
    }
    *variant = (mtl_variant){.hash = hash, .key_length = launch->key_length, .key = (unsigned char *)(variant + 1)};
    memcpy(variant + 1, launch->key, launch->key_length);
    *status = build(kernel, &launch->types, variant);
    if (*status) {
        free(variant);
        return NULL;
    }
    variant->next = atomic_load(&kernel->variants);
    while (!atomic_compare_exchange_weak(&kernel->variants, &variant->next, variant)) continue;
    return variant;
}

/* ---- run ---------------------------------------------------------------------------------------------------------------------- */

typedef struct job {
    const mtl_variant *variant;
    const mtl_dispatch *dispatch;
    unsigned long begin, end;
    int parts;
    mtl_workspace **workspaces; /* of each worker */
    atomic_int failed;          /* the failure of one; the others need not go on */
    mtl_workspace *_Atomic failed_in;
} job;

static void run_range(job *j, mtl_workspace *workspace, unsigned long begin, unsigned long end) {
    if (begin == end || atomic_load_explicit(&j->failed, memory_order_relaxed)) return;
    mtl_group *group = workspace->group;
    group->dispatch = j->dispatch;
    j->variant->run(group, workspace->stacks, begin, end);
    int none = 0;
    if (group->failure && atomic_compare_exchange_strong(&j->failed, &none, group->failure)) j->failed_in = workspace;
}

static void run_part(void *argument, int part, int worker) {
    job *j = argument;
    unsigned long each = (j->end - j->begin) / (unsigned long)j->parts;
    unsigned long more = (j->end - j->begin) % (unsigned long)j->parts, at = (unsigned long)part;
    unsigned long begin = j->begin + each * at + (at < more ? at : more);
    run_range(j, j->workspaces[worker], begin, begin + each + (at < more));
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static metalloid_status report(const metalloid_kernel *kernel, const job *j) {
    const mtl_group *group = j->failed_in->group;
    const char *name = kernel->definition.name;
    const unsigned *at = group->position;
    switch (atomic_load(&j->failed)) {
    case mtl_failure_barrier:
        return mtl_fail(
            METALLOID_KERNEL_FAILED,
            "%s: kernel %s: %u of the %u threads of threadgroup (%u, %u, %u) ended without the barrier that "
            "the others wait at",
            op, name, group->finished, group->threads, at[0], at[1], at[2]);
    case mtl_failure_iterations:
        return mtl_fail(METALLOID_KERNEL_FAILED,
                        "%s: kernel %s: a thread of threadgroup (%u, %u, %u) went through more than %lld iterations",
                        op, name, at[0], at[1], at[2], (long long)kernel->most_iterations);
    case mtl_failure_interrupted:
        return mtl_fail(METALLOID_KERNEL_FAILED, "%s: kernel %s was interrupted in threadgroup (%u, %u, %u)", op, name,
                        at[0], at[1], at[2]);
    default:
        return mtl_fail(METALLOID_KERNEL_FAILED, "%s: kernel %s: its threadgroup variables need more than %lu bytes",
                        op, name, group->memory_size);
    }
}

/* A signal's frame would not fit on the stack of a kernel's thread; those of faults have to. What ends the process, a user's way
 * out of a kernel that never does, has none. */
static void block_signals(sigset_t *before) {
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT};
    static const int ends[] = {SIGINT, SIGTERM, SIGQUIT};
    sigset_t blocked;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++) sigdelset(&blocked, faults[i]);
    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
        struct sigaction action;
        if (sigaction(ends[i], NULL, &action) == 0 && !(action.sa_flags & SA_SIGINFO) && action.sa_handler == SIG_DFL)
            sigdelset(&blocked, ends[i]);
    }
    pthread_sigmask(SIG_SETMASK, &blocked, before);
}

static metalloid_status run(const metalloid_context *context, const metalloid_kernel *kernel, const mtl_launch *launch,
                            job *j) {
    enum { MOST_WORKERS = 256 };
    mtl_workspace *workspaces[MOST_WORKERS];
    int bits = j->variant->stack_bits, workers = 1;
    unsigned long total = j->end;
    workspaces[0] = mtl_workspace_take(bits, kernel->address_sanitizer);
    if (!workspaces[0]) return mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: no memory for the threads of a threadgroup", op);

    for (int i = 0; i < kernel->definition.output_count && launch->has_init_value; i++)
        mtl_kernel_fill(&launch->outputs[i], launch->init_value);

    sigset_t signals;
    if (bits) block_signals(&signals);
    int threads = mtl_threads(context);
    unsigned long done = 0;
    if (threads == 1 || total == 1) {
        run_range(j, workspaces[0], 0, total);
        done = total;
    }
    int64_t begun = done < total ? now_ns() : 0, elapsed = 0;
    for (unsigned long step = 1; done < total && elapsed < ALONE_NS; step *= 2) {
        unsigned long end = total - done < step ? total : done + step;
        run_range(j, workspaces[0], done, end);
        done = end;
        elapsed = now_ns() - begun;
    }
    double left = done ? (double)elapsed / (double)done * (double)(total - done) : 0;
    if (done < total && left < WORTH_NS) {
        run_range(j, workspaces[0], done, total);
    } else if (done < total) {
        if (threads > MOST_WORKERS) threads = MOST_WORKERS;
        if ((unsigned long)threads > total - done) threads = (int)(total - done);
        while (workers < threads) {
            workspaces[workers] = mtl_workspace_take(bits, kernel->address_sanitizer);
            if (!workspaces[workers]) break;
            workers++;
        }
        j->begin = done;
        unsigned long parts = (unsigned long)workers * PARTS_A_THREAD;
        j->parts = (int)(parts < total - done ? parts : total - done);
        j->workspaces = workspaces;
        mtl_parallel_run(workers, j->parts, run_part, j);
    }
    if (bits) pthread_sigmask(SIG_SETMASK, &signals, NULL);
    metalloid_status status = j->failed ? report(kernel, j) : METALLOID_OK;
    for (int i = 0; i < workers; i++) mtl_workspace_give(workspaces[i], !workspaces[i]->group->failure);
    return status;
}

metalloid_status mtl_kernel_compile_cpu(metalloid_kernel *kernel, const mtl_launch *launch) {
    metalloid_status status = METALLOID_OK;
    get_variant(kernel, launch, &status);
    return status;
}

metalloid_status mtl_kernel_launch_cpu(const metalloid_context *context, metalloid_kernel *kernel,
                                       const mtl_launch *launch) {
    metalloid_status status = METALLOID_OK;
    const mtl_variant *variant = get_variant(kernel, launch, &status);
    if (!variant) return status;
    int inputs = kernel->definition.input_count, outputs = kernel->definition.output_count;
    mtl_dispatch dispatch = {.most_iterations = (unsigned long)kernel->most_iterations,
                             .interrupted = launch->interrupted};
    unsigned long total = 1;
    for (int axis = 0; axis < 3; axis++) {
        dispatch.grid[axis] = launch->grid[axis];
        dispatch.threadgroup[axis] = launch->threadgroup[axis];
        dispatch.threadgroups[axis] =
            (uint32_t)(((uint64_t)launch->grid[axis] + launch->threadgroup[axis] - 1) / launch->threadgroup[axis]);
        if (__builtin_mul_overflow(total, dispatch.threadgroups[axis], &total))
            return mtl_fail(METALLOID_INVALID_ARGUMENT, "%s: grid has too many threadgroups", op);
    }

    void *pointers[(MTL_POINTERS_OF_INPUT + 1) * MTL_MOST_BUFFERS];
    int count = 0;
    for (int i = 0; i < inputs; i++) {
        pointers[count++] = launch->inputs[i].data;
        pointers[count++] = (void *)(uintptr_t)launch->shapes[i];
        pointers[count++] = (void *)(uintptr_t)launch->strides[i];
        pointers[count++] = (void *)(uintptr_t)&launch->ranks[i];
    }
    for (int i = 0; i < outputs; i++) pointers[count++] = launch->outputs[i].data;
    dispatch.pointers = pointers;
    job j = {.variant = variant, .dispatch = &dispatch, .end = total};
    return run(context, kernel, launch, &j);
}
