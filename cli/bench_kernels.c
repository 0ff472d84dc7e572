/* metalloid bench --kernels: what custom kernels cost on the CPU, as ratios inside one run. SPDX-License-Identifier:
 * MIT
 *
 *     an elementwise body beside the same loop in C, one thread each, in the cache and out of it
 *     rms_norm in the Metal Shading Language beside the library's, all threads, for threadgroups of several sizes
 *     a launch, a first call, a first call whose kernel is in the cache on disk (in a process of its own)
 *
 * The cache is a directory of this run's. Bounds are those that the library sets itself. */
#include "bare.h"
#include "cli.h"

#include <dirent.h>
#include <fcntl.h>
#include <math.h>
#include <metalloid/metalloid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 15, ROWS = 4096, LENGTH = 4096, MOST_PATH = 4096 };

static const char soft_sign[] = "uint i = thread_position_in_grid.x; float v = x[i]; out[i] = v / (1.0f + abs(v));";

static const char rms_norm_by_elements[] =
    "threadgroup float shared[32];\n"
    "uint row = threadgroup_position_in_grid.x, lid = thread_position_in_threadgroup.x;\n"
    "uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;\n"
    "uint groups = simdgroups_per_threadgroup, threads = threads_per_threadgroup.x;\n"
    "x += row * N; out += row * N;\n"
    "float sum = 0;\n"
    "for (uint i = lid; i < N; i += threads) { float v = x[i]; sum += v * v; }\n"
    "sum = simd_sum(sum);\n"
    "if (lane == 0) shared[group] = sum;\n"
    "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    "float total = simd_sum(lane < groups ? shared[lane] : 0.0f);\n"
    "float scale = metal::precise::rsqrt(total / N + 1e-5f);\n"
    "for (uint i = lid; i < N; i += threads) out[i] = x[i] * scale * w[i];\n";

/* As in many published kernels: the first simdgroup sums for all, each thread has neighbouring elements. */
static const char rms_norm_by_blocks[] =
    "constexpr int READS = 4;\n"
    "threadgroup float shared[32];\n"
    "threadgroup float inverse[1];\n"
    "uint row = threadgroup_position_in_grid.x, lid = thread_position_in_threadgroup.x;\n"
    "uint step = threads_per_threadgroup.x * READS;\n"
    "const device float *from = x + row * N;\n"
    "device float *to = out + row * N;\n"
    "float sum = 0;\n"
    "for (uint r = lid * READS; r < N; r += step)\n"
    "    for (int i = 0; i < READS; i++) { float v = from[r + i]; sum += v * v; }\n"
    "sum = simd_sum(sum);\n"
    "if (simdgroup_index_in_threadgroup == 0) shared[thread_index_in_simdgroup] = 0;\n"
    "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    "if (thread_index_in_simdgroup == 0) shared[simdgroup_index_in_threadgroup] = sum;\n"
    "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    "if (simdgroup_index_in_threadgroup == 0) {\n"
    "    sum = simd_sum(shared[thread_index_in_simdgroup]);\n"
    "    if (thread_index_in_simdgroup == 0) inverse[0] = metal::precise::rsqrt(sum / N + 1e-5f);\n"
    "}\n"
    "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    "for (uint r = lid * READS; r < N; r += step)\n"
    "    for (int i = 0; i < READS; i++) to[r + i] = from[r + i] * inverse[0] * w[r + i];\n";

/* ---- tensors, calls ---------------------------------------------------------------------------------------------- */

typedef struct {
    DLTensor dl;
    int64_t shape[2];
} tensor;

static void *checked(void *memory) {
    if (memory) return memory;
    fprintf(stderr, "metalloid bench: out of memory\n");
    exit(EXIT_FAILED);
}

static void check(metalloid_status status) {
    if (!status) return;
    fprintf(stderr, "metalloid bench: %s\n", metalloid_last_error());
    exit(EXIT_FAILED);
}

/* Float32, with small values that differ. */
static tensor *new_tensor(int64_t rows, int64_t length) {
    tensor *t = checked(calloc(1, sizeof *t));
    float *values = checked(aligned_alloc(64, (size_t)(rows * length) * sizeof *values));
    for (int64_t i = 0; i < rows * length; i++) values[i] = (float)(i * 7919 % 1009) / 504.5f - 1;
    t->shape[0] = rows;
    t->shape[1] = length;
    t->dl = (DLTensor){.data = values,
                       .device = {kDLCPU, 0},
                       .ndim = rows == 1 ? 1 : 2,
                       .dtype = {kDLFloat, 32, 1},
                       .shape = rows == 1 ? &t->shape[1] : t->shape};
    return t;
}

static void free_tensor(tensor *t) {
    free(t->dl.data);
    free(t);
}

static const float *values_of(const tensor *t) { return t->dl.data; }

typedef struct {
    metalloid_context *context;
    metalloid_kernel *kernel;
    const tensor *x, *weight;
    tensor *out;
    int64_t grid, threadgroup, length; /* length: the template argument N; 0: none */
} kernel_call;

static void launch(kernel_call *c) {
    const DLTensor *const inputs[] = {&c->x->dl, c->weight ? &c->weight->dl : NULL};
    DLTensor *const outputs[] = {&c->out->dl};
    const metalloid_template_argument length = {"N", METALLOID_TEMPLATE_INT, c->length, {0}};
    metalloid_kernel_call call = METALLOID_KERNEL_CALL_INIT;
    call.input_count = c->weight ? 2 : 1;
    call.output_count = 1;
    call.inputs = inputs;
    call.outputs = outputs;
    call.grid[0] = c->grid;
    call.threadgroup[0] = c->threadgroup;
    call.template_count = c->length ? 1 : 0;
    call.template_arguments = &length;
    check(metalloid_kernel_launch(c->context, c->kernel, &call));
}

static void call_bare(kernel_call *c) { bare_soft_sign((size_t)c->grid, values_of(c->x), c->out->dl.data); }

static void call_library(kernel_call *c) {
    check(metalloid_rms_norm(c->context, &c->x->dl, &c->weight->dl, 1e-5, &c->out->dl));
}

static metalloid_kernel *new_kernel(const char *name, const char *source, int inputs) {
    static const char *const input_names[] = {"x", "w"}, *const output_names[] = {"out"};
    metalloid_kernel *kernel = NULL;
    check(metalloid_kernel_create(name, input_names, inputs, output_names, 1, source, NULL, &kernel));
    return kernel;
}

static metalloid_context *new_context(int threads) {
    metalloid_context *context = NULL;
    check(metalloid_context_create(&context));
    if (threads) check(metalloid_context_set_threads(context, threads));
    return context;
}

/* ---- time --------------------------------------------------------------------------------------------------------
 * ----------- */

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static double seconds(void (*fn)(kernel_call *), kernel_call *c, int calls) {
    double begin = now();
    for (int i = 0; i < calls; i++) fn(c);
    return (now() - begin) / calls;
}

static int compare(const void *a, const void *b) {
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

/* The fastest of rounds in which the two take turns: what else the machine does only adds. */
static void time_both(void (*first)(kernel_call *), kernel_call *a, void (*second)(kernel_call *), kernel_call *b,
                      int calls, double took[2]) {
    double times[2][ROUNDS];
    first(a);
    second(b);
    for (int i = 0; i < ROUNDS; i++) {
        times[0][i] = seconds(first, a, calls);
        times[1][i] = seconds(second, b, calls);
    }
    for (int side = 0; side < 2; side++) {
        qsort(times[side], ROUNDS, sizeof *times[side], compare);
        took[side] = times[side][0];
    }
}

static bool report(const char *what, double value, const char *unit, double bound) {
    printf("%-52s %8.2f%s (bound %g%s)%s\n", what, value, unit, bound, unit, value <= bound ? "" : "  ABOVE IT");
    fflush(stdout);
    return value <= bound;
}

static void compare_results(const char *what, const tensor *a, const tensor *b, int64_t count, float tolerance) {
    for (int64_t i = 0; i < count; i++) {
        float difference = fabsf(values_of(a)[i] - values_of(b)[i]);
        if (difference <= tolerance * (1 + fabsf(values_of(b)[i]))) continue;
        fprintf(stderr, "metalloid bench: %s: element %lld is %g instead of %g\n", what, (long long)i,
                (double)values_of(a)[i], (double)values_of(b)[i]);
        exit(EXIT_FAILED);
    }
}

/* ---- what is measured -------------------------------------------------------------------------------------------- */

static bool time_elementwise(void) {
    static const struct {
        int64_t size;
        int calls;
        const char *where;
    } cases[] = {{1 << 16, 500, "in the cache"}, {1 << 24, 1, "out of it"}};
    bool good = true;
    metalloid_context *one_thread = new_context(1);
    metalloid_kernel *kernel = new_kernel("soft_sign", soft_sign, 1);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        tensor *x = new_tensor(1, cases[i].size), *out = new_tensor(1, cases[i].size),
               *own = new_tensor(1, cases[i].size);
        kernel_call ours = {one_thread, kernel, x, NULL, out, cases[i].size, 256, 0}, theirs = ours;
        theirs.out = own;
        double took[2];
        char what[80];
        time_both(launch, &ours, call_bare, &theirs, cases[i].calls, took);
        compare_results("elementwise", out, own, cases[i].size, 1e-6f);
        snprintf(what, sizeof what, "elementwise, %s: kernel / loop in C", cases[i].where);
        good &= report(what, took[0] / took[1], "x", 1.25);
        free_tensor(x);
        free_tensor(out);
        free_tensor(own);
    }
    metalloid_kernel_destroy(kernel);
    metalloid_context_destroy(one_thread);
    return good;
}

static bool time_norms(void) {
    static const struct {
        const char *name, *source;
    } kinds[] = {{"by_elements", rms_norm_by_elements}, {"by_blocks", rms_norm_by_blocks}};
    static const int threads[] = {128, 256, 512, 1024};
    bool good = true;
    metalloid_context *context = new_context(0);
    tensor *x = new_tensor(ROWS, LENGTH), *weight = new_tensor(1, LENGTH);
    tensor *out = new_tensor(ROWS, LENGTH), *own = new_tensor(ROWS, LENGTH);
    for (size_t k = 0; k < sizeof kinds / sizeof kinds[0]; k++) {
        metalloid_kernel *kernel = new_kernel(kinds[k].name, kinds[k].source, 2);
        for (size_t i = 0; i < sizeof threads / sizeof threads[0]; i++) {
            kernel_call ours = {context, kernel, x, weight, out, (int64_t)ROWS * threads[i], threads[i], LENGTH};
            kernel_call theirs = ours;
            theirs.out = own;
            double took[2];
            char what[80];
            time_both(launch, &ours, call_library, &theirs, 1, took);
            compare_results("rms_norm", out, own, (int64_t)ROWS * LENGTH, 1e-5f);
            snprintf(what, sizeof what, "rms_norm %s, %d threads: kernel / library", kinds[k].name, threads[i]);
            good &= report(what, took[0] / took[1], "x", 8);
        }
        metalloid_kernel_destroy(kernel);
    }
    free_tensor(x);
    free_tensor(weight);
    free_tensor(out);
    free_tensor(own);
    metalloid_context_destroy(context);
    return good;
}

/* The first call of rms_norm, on a single row. */
static double first_call(const char *source) {
    metalloid_context *context = new_context(0);
    tensor *x = new_tensor(1, LENGTH), *weight = new_tensor(1, LENGTH), *out = new_tensor(1, LENGTH);
    metalloid_kernel *kernel = new_kernel("first", source, 2);
    kernel_call c = {context, kernel, x, weight, out, 256, 256, LENGTH};
    double took = seconds(launch, &c, 1);
    metalloid_kernel_destroy(kernel);
    free_tensor(x);
    free_tensor(weight);
    free_tensor(out);
    metalloid_context_destroy(context);
    return took;
}

int metalloid_cli_bench_kernels_cached(void) {
    printf("%.9g\n", first_call(rms_norm_by_elements));
    return EXIT_OK;
}

static bool time_calls(void) {
    bool good = report("first call", first_call(rms_norm_by_elements) * 1e3, " ms", 1000);
    char self[MOST_PATH] = "", command[MOST_PATH + 64], *end = NULL;
    double cached = 0;
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length > 0 && !strchr(self, '\'')) {
        double times[ROUNDS];
        for (int i = 0; i < ROUNDS; i++) {
            snprintf(command, sizeof command, "'%s' bench --kernels-cached", self);
            FILE *other = popen(command, "r"); // NOLINT: the command is this program
            char line[64] = "";
            if (!other || !fgets(line, sizeof line, other)) line[0] = '\0';
            if (other) pclose(other);
            times[i] = strtod(line, &end);
        }
        qsort(times, ROUNDS, sizeof *times, compare);
        cached = times[ROUNDS / 2];
    }
    if (cached > 0) good &= report("first call of a process, from the cache", cached * 1e3, " ms", 5);

    metalloid_context *context = new_context(0);
    tensor *x = new_tensor(1, 32), *out = new_tensor(1, 32);
    metalloid_kernel *kernel = new_kernel("soft_sign", soft_sign, 1);
    kernel_call c = {context, kernel, x, NULL, out, 32, 32, 0};
    launch(&c);
    double times[ROUNDS];
    for (int i = 0; i < ROUNDS; i++) times[i] = seconds(launch, &c, 10000);
    qsort(times, ROUNDS, sizeof *times, compare);
    good &= report("launch of 32 threads", times[ROUNDS / 2] * 1e6, " us", 3);
    metalloid_kernel_destroy(kernel);
    free_tensor(x);
    free_tensor(out);
    metalloid_context_destroy(context);
    return good;
}

static void remove_files(const char *path) {
    DIR *directory = opendir(path);
    if (directory) {
        for (struct dirent *entry; (entry = readdir(directory));) unlinkat(dirfd(directory), entry->d_name, 0);
        closedir(directory);
    }
    rmdir(path);
}

int metalloid_cli_bench_kernels(void) {
    char cache[] = "/tmp/metalloid-bench-XXXXXX";
    if (!mkdtemp(cache)) {
        perror("metalloid bench: /tmp");
        return EXIT_FAILED;
    }
    setenv("METALLOID_CACHE", cache, 1);
    bool good = time_calls();
    good &= time_elementwise();
    good &= time_norms();
    remove_files(cache);
    return good ? EXIT_OK : EXIT_FAILED;
}
