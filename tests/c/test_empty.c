/* Empty tensors may have extents that no memory stands behind: calls on them do nothing, at once and without overflow, and write what
 * is not empty. SPDX-License-Identifier: MIT */
#include "support.h"

#include <math.h>
#include <string.h>

#define POWER(n) ((int64_t)1 << (n))

static float memory[64] __attribute__((aligned(64)));

typedef struct huge {
    DLTensor dl;
    int64_t shape[4];
} huge;

/* Lives as long as the block it is made in. */
static DLTensor *make(huge *h, int rank, const int64_t *shape) {
    memcpy(h->shape, shape, (size_t)rank * sizeof *shape);
    h->dl =
        (DLTensor){.data = memory, .device = {kDLCPU, 0}, .ndim = rank, .dtype = dtype_code(F32), .shape = h->shape};
    return &h->dl;
}

#define HUGE_TENSOR(...) make(&(huge){.shape = {0}}, SHAPE(__VA_ARGS__))

static void norms(void **state) {
    (void)state;
    const int64_t shapes[][2] = {{0, POWER(60)}, {POWER(60), 0}};
    for (int i = 0; i < 2; i++) {
        int64_t rows = shapes[i][0], length = shapes[i][1];
        DLTensor *x = HUGE_TENSOR(rows, length), *sum = HUGE_TENSOR(rows, length), *out = HUGE_TENSOR(rows, length);
        expect_ok(metalloid_rms_norm(NULL, x, NULL, 0, out));
        expect_ok(metalloid_layer_norm(NULL, x, NULL, NULL, 0, out));
        expect_ok(metalloid_add_rms_norm(NULL, x, x, NULL, 0, sum, out));
        expect_ok(metalloid_add_layer_norm(NULL, x, x, NULL, NULL, 0, sum, out));
        expect_ok(metalloid_swiglu(NULL, x, x, out));
        expect_ok(metalloid_geglu(NULL, x, x, METALLOID_GELU_ERF, out));
    }
}

static void rope(void **state) {
    (void)state;
    const int64_t shapes[][4] = {
        {0, 1, 1, POWER(60)}, {1, POWER(30), 0, POWER(30)}, {1, 0, POWER(30), POWER(30)}, {POWER(30), 1, 0, POWER(30)}};
    for (int i = 0; i < 4; i++) {
        const int64_t *s = shapes[i];
        DLTensor *x = HUGE_TENSOR(s[0], s[1], s[2], s[3]), *k = HUGE_TENSOR(s[0], s[1], s[2], s[3]);
        expect_ok(metalloid_rope(NULL, x, s[3], NULL, x));
        expect_ok(metalloid_qk_norm_rope(NULL, x, k, NULL, NULL, 0, s[3], NULL, x, k));
    }
}

static void kv_cache_sdpa_update(void **state) {
    (void)state;
    const int64_t batch = POWER(40);
    expect_ok(metalloid_kv_cache_sdpa_update(NULL, HUGE_TENSOR(batch, 1, 1, 0), HUGE_TENSOR(batch, 1, 1, 0),
                                             HUGE_TENSOR(batch, 1, 1, 0), HUGE_TENSOR(batch, 2, 1, 0),
                                             HUGE_TENSOR(batch, 2, 1, 0), 1, NULL, 1, HUGE_TENSOR(batch, 1, 1, 0)));
}

static void gated_delta_update(void **state) {
    (void)state;
    /* batch, time, key dim, value dim */
    const int64_t cases[][4] = {{POWER(40), 0, 0, 1},
                                {0, POWER(30), POWER(30), 64},
                                {0, 1, POWER(59), 2},
                                {POWER(20), POWER(20), POWER(20), 0}};
    for (int i = 0; i < 4; i++) {
        const int64_t *c = cases[i];
        /* With no values, q, k, gamma and beta still have elements: one, broadcast. */
        int64_t broadcast[4] = {0};
        DLTensor *q = HUGE_TENSOR(c[0], c[1], 1, c[2]), *gates = HUGE_TENSOR(c[0], c[1], 1);
        q->strides = gates->strides = broadcast;
        expect_ok(metalloid_gated_delta_update(NULL, q, q, HUGE_TENSOR(c[0], c[1], 1, c[3]), gates, gates, NULL, NULL,
                                               HUGE_TENSOR(c[0], c[1], 1, c[3]), HUGE_TENSOR(c[0], 1, c[3], c[2])));
    }
}

/* T = 0 copies the state, D_k = 0 leaves zeros in out: one of the two is empty, the other is not. */
static void gated_delta_update_writes_what_is_not_empty(void **state) {
    (void)state;
    tensor *initial = new_normal(F32, CONTIGUOUS, SHAPE(1, 1, 2, 3)),
           *final = new_output(F32, OUTPUT, SHAPE(1, 1, 2, 3));
    expect_ok(metalloid_gated_delta_update(NULL, HUGE_TENSOR(1, 0, 1, 3), HUGE_TENSOR(1, 0, 1, 3),
                                           HUGE_TENSOR(1, 0, 1, 2), HUGE_TENSOR(1, 0, 1), HUGE_TENSOR(1, 0, 1),
                                           dl(initial), NULL, HUGE_TENSOR(1, 0, 1, 2), dl(final)));
    for (int64_t i = 0; i < 6; i++) assert_true(get(final, i) == get(initial, i));

    tensor *out = new_output(F32, OUTPUT, SHAPE(1, 4, 1, 2));
    fill(out, 7);
    expect_ok(metalloid_gated_delta_update(NULL, HUGE_TENSOR(1, 4, 1, 0), HUGE_TENSOR(1, 4, 1, 0),
                                           HUGE_TENSOR(1, 4, 1, 2), HUGE_TENSOR(1, 4, 1), HUGE_TENSOR(1, 4, 1), NULL,
                                           NULL, dl(out), HUGE_TENSOR(1, 1, 2, 0)));
    for (int64_t i = 0; i < 8; i++) assert_true(get(out, i) == 0);
    release_all();
}

static void attention(void **state) {
    (void)state;
    const int64_t heads = POWER(30);
    expect_ok(metalloid_scaled_dot_product_attention(NULL, HUGE_TENSOR(0, heads, 1, heads),
                                                     HUGE_TENSOR(0, heads, 0, heads), HUGE_TENSOR(0, heads, 0, heads),
                                                     1, NULL, HUGE_TENSOR(0, heads, 1, heads)));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(norms),
        cmocka_unit_test(rope),
        cmocka_unit_test(kv_cache_sdpa_update),
        cmocka_unit_test(gated_delta_update),
        cmocka_unit_test(gated_delta_update_writes_what_is_not_empty),
        cmocka_unit_test(attention),
    };
    return cmocka_run_group_tests_name("empty", tests, NULL, NULL);
}
