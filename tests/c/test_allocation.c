/* When the n-th allocation of a call fails, for n = 1, 2, ..., the call says so, writes nothing and gives everything back: those of
 * workspaces by the allocator of a context, those of a kernel's translation by the linker, which puts ours in malloc's place.
 * SPDX-License-Identifier: MIT */
#include "every_operation.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/context.h"
#include "cpu/kernels.h"
#include "kernel/source.h"

/* Counts, fails on demand, and checks that what comes back was given out. */
typedef struct meter {
    atomic_int allocated, released, wrong;
    int fail_at; /* the number of the allocation that fails; 0: none */
} meter;

enum { HEADER = 64 };

static void *metered_allocate(void *user, size_t bytes) {
    meter *m = user;
    int number = atomic_fetch_add(&m->allocated, 1) + 1;
    if (number == m->fail_at) {
        atomic_fetch_sub(&m->allocated, 1);
        m->fail_at = 0; /* only this one */
        return NULL;
    }
    char *block = aligned_alloc(64, (HEADER + bytes + 63) / 64 * 64);
    if (!block) return NULL;
    memcpy(block, &m, sizeof m);
    memset(block + HEADER, 0xff, bytes); /* NaN in every type: nothing may count on zeros */
    return block + HEADER;
}

static void metered_release(void *user, void *pointer) {
    meter *m = user, *from;
    memcpy(&from, (char *)pointer - HEADER, sizeof from);
    if (from != m) atomic_fetch_add(&m->wrong, 1);
    atomic_fetch_add(&m->released, 1);
    free((char *)pointer - HEADER);
}

static metalloid_context *metered_context(meter *m, int threads, const mtl_cpu_isa *isa) {
    metalloid_context *context;
    metalloid_allocator allocator = {metered_allocate, metered_release, m};
    expect_ok(metalloid_context_create(&context));
    expect_ok(metalloid_context_set_allocator(context, &allocator));
    expect_ok(metalloid_context_set_threads(context, threads));
    context->isa = isa;
    return context;
}

static void failed_allocations_leave_everything_as_it_was(void **state) {
    (void)state;
    const mtl_cpu_isa *const *isas;
    int isa_count = mtl_cpu_isas(&isas), failures = 0, allocating_calls = 0;
    for (int threads = 1; threads <= 3; threads += 2) {
        for (int isa = 0; isa < isa_count; isa++) {
            for (int size = SMALL; size <= LARGE; size++) {
                seed((uint64_t)(threads * 10 + isa));
                operation all[OPERATIONS];
                sample_every_operation(all, (sample_size)size);
                for (int i = 0; i < OPERATIONS; i++) {
                    meter m = {0};
                    operation *op = &all[i];
                    op->context = metered_context(&m, threads, isas[isa]);
                    describe("%s, %d threads, %s", op->name, threads, isas[isa]->name);
                    for (int fail_at = 1;; fail_at++) {
                        m.fail_at = fail_at;
                        snapshot();
                        metalloid_status status = op->call(op);
                        assert_int_equal(m.allocated, m.released);
                        assert_int_equal(m.wrong, 0);
                        if (m.fail_at != 0) { /* there were fewer allocations than that */
                            expect_ok(status);
                            allocating_calls += fail_at > 1;
                            break;
                        }
                        failures++;
                        expect_nothing_written();
                        assert_int_equal(status, METALLOID_OUT_OF_MEMORY);
                        size_t length = strlen(op->name);
                        assert_memory_equal(metalloid_last_error(), op->name, length);
                        assert_memory_equal(metalloid_last_error() + length, ": ", 2);
                        assert_null(strchr(metalloid_last_error(), '\n'));
                        m.allocated = m.released = 0;
                    }
                    metalloid_context_destroy(op->context);
                }
                release_all();
            }
        }
    }
    report("calls that need a workspace", allocating_calls);
    report("allocations failed", failures);
    assert_true(failures > 0); /* else this test tests nothing */
}

/* A workspace full of NaN gives the same bits as the default allocator's. */
static void results_do_not_depend_on_what_the_workspace_held(void **state) {
    (void)state;
    const mtl_cpu_isa *const *isas;
    int isa_count = mtl_cpu_isas(&isas);
    for (int isa = 0; isa < isa_count; isa++) {
        operation all[OPERATIONS];
        seed(77);
        sample_every_operation(all, LARGE);
        for (int i = 0; i < OPERATIONS; i++) {
            meter m = {0};
            operation *op = &all[i];
            if (strcmp(op->name, "kv_cache_sdpa_update") == 0)
                op->offset = 0; /* idempotent: writes the same keys again */
            op->context = metered_context(&m, 2, isas[isa]);
            describe("%s, %s", op->name, isas[isa]->name);
            expect_ok(op->call(op));
            expect_ok(metalloid_context_set_allocator(op->context, NULL));
            int allocated = m.allocated;
            snapshot();
            expect_ok(op->call(op));
            expect_nothing_written(); /* the same bits */
            assert_int_equal(m.allocated, allocated);
            metalloid_context_destroy(op->context);
        }
        release_all();
    }
}

/* Adds up the bytes asked for. */
static void *sized_allocate(void *user, size_t bytes) {
    *(size_t *)user += bytes;
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static void sized_release(void *user, void *pointer) {
    (void)user;
    free(pointer);
}

/* Extra memory of attention is O(T_q): however many keys there are beyond what is cut into ranges, it needs no more. */
static void attention_stores_no_scores(void **state) {
    (void)state;
    size_t bytes[2] = {0, 0};
    for (int round = 0; round < 2; round++) {
        seed(78);
        metalloid_context *context;
        expect_ok(metalloid_context_create(&context));
        expect_ok(metalloid_context_set_threads(context, 1));
        int64_t kv_len = round ? 80000 : 20000;
        tensor *q = new_normal(F32, CONTIGUOUS, SHAPE(1, 1, 70, 8)),
               *k = new_normal(F32, CONTIGUOUS, SHAPE(1, 1, kv_len, 8));
        tensor *out = new_output(F32, CONTIGUOUS, SHAPE(1, 1, 70, 8));
        metalloid_allocator allocator = {sized_allocate, sized_release, &bytes[round]};
        expect_ok(metalloid_context_set_allocator(context, &allocator));
        expect_ok(metalloid_scaled_dot_product_attention(context, dl(q), dl(k), dl(k), 1, NULL, dl(out)));
        metalloid_context_destroy(context);
        release_all();
    }
    assert_int_equal(bytes[0], bytes[1]);
    assert_true(bytes[1] < 70 * 20000 * sizeof(float));
}

/* ---- malloc, in the library and here ------------------------------------------------------------------------------------- */

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *block, size_t bytes);
void __real_free(void *block);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *block, size_t bytes);
void __wrap_free(void *block);

/* Of this thread, while a test meters it. */
static _Thread_local struct {
    bool on;
    int live, until_failure; /* until_failure: 0 where it has been */
} heap;

static bool fails(void) { return heap.on && heap.until_failure > 0 && --heap.until_failure == 0; }

static void *counted(void *block) {
    heap.live += heap.on && block;
    return block;
}

void *__wrap_malloc(size_t bytes) { return fails() ? NULL : counted(__real_malloc(bytes)); }
void *__wrap_calloc(size_t count, size_t bytes) { return fails() ? NULL : counted(__real_calloc(count, bytes)); }
void *__wrap_realloc(void *block, size_t bytes) {
    if (fails()) return NULL;
    return block ? __real_realloc(block, bytes) : counted(__real_malloc(bytes));
}
void __wrap_free(void *block) {
    heap.live -= heap.on && block;
    __real_free(block);
}

enum { MOST_SOURCE = 1 << 20 };

/* The CUDA source of a kernel in `text`. */
static metalloid_status translate_for_a_gpu(const char *header, const char *body, char *text) {
    const char *const names[] = {"x"}, *const results[] = {"y"};
    const mtl_buffer_type input = {.dtype = MTL_F32};
    const mtl_dtype output = MTL_F32;
    const mtl_template_value value = {.name = "N", .kind = METALLOID_TEMPLATE_INT, .integer = 64};
    const mtl_types types = {&input, &output, 1, &value, false, false};
    const mtl_definition definition = {"k", 1, 1, names, results, body, header, false};
    const mtl_unit_options options = {.target = MTL_TARGET_CUDA, .most_threads = 1024, .line = 32};
    mtl_mentions mentions;
    if (!mtl_find_mentions(&mentions, &definition)) return METALLOID_OUT_OF_MEMORY;
    mtl_text out = {0};
    mtl_translation_unit(&out, &definition, &mentions, &types, &options);
    metalloid_status status = out.failed ? METALLOID_OUT_OF_MEMORY : METALLOID_OK;
    assert_true(out.length < MOST_SOURCE);
    if (!status) memcpy(text, mtl_text_string(&out), out.length + 1);
    mtl_text_free(&out);
    return status;
}

/* Its C++, as of a call of a simdgroup. */
static metalloid_status translate(const char *header, const char *body, int most_iterations, char *text) {
    int64_t shape[] = {64};
    float memory[2][64] = {0};
    DLTensor x = {memory[0], {kDLCPU, 0}, 1, {kDLFloat, 32, 1}, shape, NULL, 0}, y = x;
    y.data = memory[1];
    const DLTensor *inputs[] = {&x};
    DLTensor *outputs[] = {&y};
    const char *const names[] = {"x"}, *const results[] = {"y"};
    metalloid_kernel_options options = METALLOID_KERNEL_OPTIONS_INIT;
    options.header = header;
    options.most_iterations = most_iterations;
    metalloid_template_argument argument = {"N", METALLOID_TEMPLATE_INT, 64, {0}};
    metalloid_kernel_call given = METALLOID_KERNEL_CALL_INIT;
    given.inputs = inputs, given.input_count = 1;
    given.outputs = outputs, given.output_count = 1;
    given.template_arguments = &argument, given.template_count = 1;
    for (int axis = 0; axis < 3; axis++) given.grid[axis] = given.threadgroup[axis] = axis ? 1 : 32;
    metalloid_kernel *kernel = NULL;
    metalloid_status status = metalloid_kernel_create("k", names, 1, results, 1, body, &options, &kernel);
    assert_int_equal(status == METALLOID_OK, kernel != NULL);
    size_t length;
    if (!status) status = metalloid_kernel_source(kernel, &given, true, text, MOST_SOURCE, &length);
    if (!status) assert_true(length < MOST_SOURCE);
    metalloid_kernel_destroy(kernel);
    return status;
}

/* What is translated all the same is translated in full. */
static void failed_allocations_leave_no_half_translation(void **state) {
    (void)state;
    static const char header[] =
        "#define SHARED threadgroup\n"
        "constant float c[2] = {1.0, 2.0h}; union U { float4 v; float f[4]; }; struct { union { int a; float b; }; } "
        "s;\n"
        "struct alignas(16) S { S() thread {} S() device {} float f(float a) const { return a; } };\n"
        "float f(device float *p) { return p[0] / 2; } float f(SHARED float *q) { return q[0] / 2; }\n"
        "float h(float a) { return a; } template <class T, uint M> T g(vec<T, M> v) { return v.xy.x; }\n";
    static const char meeting_header[] = "float h(float a) { for (;;) return simd_sum(a); }\n";
    static const struct {
        const char *header, *body;
        int most_iterations;
    } kernels[] = {
        {header, "uint i = thread_position_in_grid.x; float4 v = c[0]; y[i] = i < 3 ? 1.0h : (v.xy).x / x[i];", 0},
        {header,
         "threadgroup float a[N], *b = a, d = 1; uint i = thread_index_in_threadgroup, j = i; x += 1; if (i) { y += 2; "
         "}"
         "for (uint k = i; k < N; k += 32) { a[k] = x[k]; if (k > 2) continue; } a[i] = simd_sum(a[i]);"
         "if (i > 3) { y[i] = simd_max(x[i]); return; } else while (simd_any(j > 2)) j--; y[i] = a[i];",
         0},
        {meeting_header, "y[thread_position_in_grid.x] = h(x[0]) + simd_sum(x[1]);", 0},
        {"",
         "float t[4] = {[0] = 1.0h, [1] = 2}; threadgroup float s = 1; for (uint i = 0; i < N; i++) y[i] = t[0] + s;",
         9},
    };
    static char expected[MOST_SOURCE], text[MOST_SOURCE];
    int failures = 0;
    for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++) {
        const char *head = kernels[i].header, *body = kernels[i].body;
        for (int gpu = 0; gpu < 2; gpu++) {
            describe("kernel %zu%s", i, gpu ? ", on a GPU" : "");
            for (int fail_at = 0; fail_at == 0 || heap.until_failure == 0; fail_at++) { /* 0: none */
                heap.on = fail_at > 0, heap.live = 0, heap.until_failure = fail_at;
                char *to = fail_at ? text : expected;
                metalloid_status status =
                    gpu ? translate_for_a_gpu(head, body, to) : translate(head, body, kernels[i].most_iterations, to);
                heap.on = false;
                assert_int_equal(heap.live, 0);
                if (fail_at == 0) expect_ok(status);
                else if (status) assert_int_equal(status, METALLOID_OUT_OF_MEMORY);
                else assert_string_equal(text, expected);
                failures += status != METALLOID_OK;
            }
        }
    }
    report("allocations of translations failed", failures);
    assert_true(failures > 0);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(failed_allocations_leave_everything_as_it_was),
        cmocka_unit_test(results_do_not_depend_on_what_the_workspace_held),
        cmocka_unit_test(attention_stores_no_scores),
        cmocka_unit_test(failed_allocations_leave_no_half_translation),
    };
    return cmocka_run_group_tests_name("allocation", tests, NULL, NULL);
}
