/* Workspaces: when the n-th allocation of a call fails, for n = 1, 2, ..., the call says so, writes nothing and gives everything back.
 * SPDX-License-Identifier: MIT */
#include "every_operation.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/context.h"
#include "cpu/kernels.h"

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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(failed_allocations_leave_everything_as_it_was),
        cmocka_unit_test(results_do_not_depend_on_what_the_workspace_held),
        cmocka_unit_test(attention_stores_no_scores),
    };
    return cmocka_run_group_tests_name("allocation", tests, NULL, NULL);
}
