/* qk_norm_rope. SPDX-License-Identifier: MIT */
#include "rope_cases.h"

/* rms_norm of each head, unrounded, then rope; m is the largest normalized value of the row. */
static void reference_side(const rope_case *c, const tensor *x, const tensor *weight, double eps, double *y, double *m,
                           double *slack) {
    int64_t head_dim = x->shape[3], rows = x->elements / head_dim;
    double *normed = values(x), *pair_m = new_doubles(x->elements);
    for (int64_t row = 0; row < rows; row++) {
        double *at = normed + row * head_dim;
        long double square = 0;
        for (int64_t i = 0; i < head_dim; i++) square += (long double)at[i] * at[i];
        long double scale = 1 / sqrtl(square / head_dim + eps);
        for (int64_t i = 0; i < head_dim; i++) at[i] = (double)(at[i] * scale * (weight ? get(weight, i) : 1));
        m[row] = largest(at, head_dim);
    }
    reference_rope(c, normed, x->shape, 4, y, pair_m, slack);
}

static void matches_norm_then_rotation_on_random_calls(void **state) {
    (void)state;
    int count = scaled(2000);
    for (int i = 0; i < count; i++) {
        seed(10000000 + (uint64_t)i);
        describe("case %d", i);
        bool axis_1 = one_in(2);
        int64_t batch = random_int(1, 3), times = random_int(1, 9), q_heads = random_int(1, 4),
                kv_heads = random_int(1, 3);
        int64_t head_dim = one_in(3) ? 64 : random_int(2, 50);
        int64_t q_shape[] = {batch, axis_1 ? times : q_heads, axis_1 ? q_heads : times, head_dim};
        int64_t k_shape[] = {batch, axis_1 ? times : kv_heads, axis_1 ? kv_heads : times, head_dim};
        rope_case c = random_rope_case(batch, times, head_dim, one_in(3) ? INT32_MAX : 4000);
        c.options.time_axis = axis_1 ? METALLOID_TIME_AXIS_1 : METALLOID_TIME_SECOND_TO_LAST;
        tensor *q = new_normal(random_floating(), INPUT, 4, q_shape),
               *k = new_normal(random_floating(), INPUT, 4, k_shape);
        tensor *q_weight = one_in(3) ? NULL : new_normal(random_floating(), INPUT, 1, &head_dim);
        tensor *k_weight = one_in(3) ? NULL : new_normal(random_floating(), INPUT, 1, &head_dim);
        tensor *q_out = writable(q) && one_in(3) ? q : new_tensor(random_floating(), OUTPUT, 4, q_shape);
        tensor *k_out = writable(k) && one_in(3) ? k : new_tensor(random_floating(), OUTPUT, 4, k_shape);
        q_out->output = k_out->output = true;
        double eps = one_in(2) ? 1e-6 : 1e-2;

        double *q_y = new_doubles(q->elements), *q_m = new_doubles(q->elements), *q_slack = new_doubles(q->elements);
        double *k_y = new_doubles(k->elements), *k_m = new_doubles(k->elements), *k_slack = new_doubles(k->elements);
        reference_side(&c, q, q_weight, eps, q_y, q_m, q_slack);
        reference_side(&c, k, k_weight, eps, k_y, k_m, k_slack);
        metalloid_context *context = random_context();
        snapshot();
        expect_ok(metalloid_qk_norm_rope(context, dl(q), dl(k), dl(q_weight), dl(k_weight), eps, c.dims, &c.options,
                                         dl(q_out), dl(k_out)));
        expect_only_outputs_written();
        expect_close_with_slack("q_out", ROPE, q_out, q_y, q_m, head_dim, q_slack);
        expect_close_with_slack("k_out", ROPE, k_out, k_y, k_m, head_dim, k_slack);
        release_all();
    }
    report("random calls", count);
}

static void refuses_bad_arguments_and_writes_nothing(void **state) {
    (void)state;
    int refused = refuse_rope_options(sample_qk_norm_rope_with, 4);
    for (int round = 0; round < scaled(4); round++) {
        seed((uint64_t)round);
        operation op = sample_qk_norm_rope_with(SMALL, round & 1, round & 2);
        refused += expect_bad_tensors_refused(&op);
        static const double bad_eps[] = {-1e-6, -INFINITY, INFINITY, NAN};
        for (int i = 0; i < 4; i++, refused++) {
            operation bad = op;
            bad.eps = bad_eps[i];
            expect_refused(&bad, "eps", "a bad eps");
        }
        release_all();
    }
    report("bad calls refused", refused);
}

/* No heads in k is no reason to leave q alone. */
static void takes_empty_tensors_without_data(void **state) {
    (void)state;
    for (int which = 1; which < 16; which++) {
        seed((uint64_t)which);
        int64_t batch = which & 1 ? 0 : 2, times = which & 2 ? 0 : 3;
        tensor *q = new_normal(F32, CONTIGUOUS, SHAPE(batch, which & 4 ? 0 : 2, times, 8));
        tensor *k = new_normal(F32, CONTIGUOUS, SHAPE(batch, which & 8 ? 0 : 1, times, 8));
        tensor *q_out = new_output(F32, CONTIGUOUS, 4, q->shape), *k_out = new_output(F32, CONTIGUOUS, 4, k->shape);
        if (q->elements == 0) q->dl.data = q_out->dl.data = NULL;
        if (k->elements == 0) k->dl.data = k_out->dl.data = NULL;
        rope_case c = {.dims = 8, .options = METALLOID_ROPE_OPTIONS_INIT};
        double *q_y = new_doubles(q->elements), *q_m = new_doubles(q->elements), *q_slack = new_doubles(q->elements);
        double *k_y = new_doubles(k->elements), *k_m = new_doubles(k->elements), *k_slack = new_doubles(k->elements);
        if (q->elements) reference_side(&c, q, NULL, 1e-5, q_y, q_m, q_slack);
        if (k->elements) reference_side(&c, k, NULL, 1e-5, k_y, k_m, k_slack);
        describe("empty: %d", which);
        snapshot();
        expect_ok(metalloid_qk_norm_rope(NULL, dl(q), dl(k), NULL, NULL, 1e-5, 8, NULL, dl(q_out), dl(k_out)));
        expect_only_outputs_written();
        if (q->elements) expect_close("q_out", ROPE, q_out, q_y, q_m, 8);
        if (k->elements) expect_close("k_out", ROPE, k_out, k_y, k_m, 8);
        release_all();
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_norm_then_rotation_on_random_calls),
        cmocka_unit_test(refuses_bad_arguments_and_writes_nothing),
        cmocka_unit_test(takes_empty_tensors_without_data),
    };
    return cmocka_run_group_tests_name("qk_norm_rope", tests, NULL, NULL);
}
