/* add_layer_norm. SPDX-License-Identifier: MIT */
#include "norm_cases.h"

static void matches_the_formula_on_random_calls(void **state) {
    (void)state;
    random_norm_cases("add_layer_norm", true, true, 4000000);
}

static void refuses_bad_arguments_and_writes_nothing(void **state) {
    (void)state;
    refuse_norm_arguments(sample_add_layer_norm);
}

static void takes_empty_tensors_without_data(void **state) {
    (void)state;
    empty_norm_tensors(true, true);
}

/* The sum rounds to a row of equal bfloat16 values, whose norm would be 0. */
static void the_norm_is_taken_from_the_unrounded_sum(void **state) {
    (void)state;
    tensor *x = new_tensor(BF16, ROWS, SHAPE(2, 4)), *residual = new_tensor(BF16, ROWS, SHAPE(2, 4));
    tensor *sum = new_output(BF16, ROWS, SHAPE(2, 4)), *out = new_output(F32, ROWS, SHAPE(2, 4));
    double total[8], y[8], slack[8];
    fill(x, 1);
    for (int i = 0; i < 8; i++) {
        set(residual, i, i % 3 * 0x1p-10);
        total[i] = 1 + i % 3 * 0x1p-10;
    }
    expect_ok(metalloid_add_layer_norm(NULL, dl(x), dl(residual), NULL, NULL, 0, dl(sum), dl(out)));
    for (int i = 0; i < 8; i++) assert_true(get(sum, i) == 1);
    reference_norm(total, NULL, NULL, 0, true, 2, 4, 0, 0, y, slack);
    describe("bfloat16 sum");
    expect_close_by_row("out", LARGE_MEAN, out, y, 4);
    release_all();
}

static void the_variance_survives_a_large_mean(void **state) {
    (void)state;
    seed(11);
    tensor *x = new_tensor(F32, ROWS, SHAPE(5, 700)), *residual = new_normal(F32, ROWS, SHAPE(5, 700));
    tensor *sum = new_output(F32, ROWS, SHAPE(5, 700)), *out = new_output(F32, ROWS, SHAPE(5, 700));
    fill(x, 1e4);
    double *total = values(x), *other = values(residual), *y = new_doubles(3500), *slack = new_doubles(3500);
    for (int i = 0; i < 3500; i++) total[i] += other[i];
    reference_norm(total, NULL, NULL, 1e-5, true, 5, 700, 0, 0, y, slack);
    expect_ok(metalloid_add_layer_norm(NULL, dl(x), dl(residual), NULL, NULL, 1e-5, dl(sum), dl(out)));
    describe("a residual stream of mean 1e4");
    expect_close_by_row("out", LARGE_MEAN, out, y, 700);
    release_all();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_the_formula_on_random_calls),
        cmocka_unit_test(refuses_bad_arguments_and_writes_nothing),
        cmocka_unit_test(takes_empty_tensors_without_data),
        cmocka_unit_test(the_norm_is_taken_from_the_unrounded_sum),
        cmocka_unit_test(the_variance_survives_a_large_mean),
    };
    return cmocka_run_group_tests_name("add_layer_norm", tests, NULL, NULL);
}
