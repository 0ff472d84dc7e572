/* add_rms_norm. SPDX-License-Identifier: MIT */
#include "norm_cases.h"

static void matches_the_formula_on_random_calls(void **state) {
    (void)state;
    random_norm_cases("add_rms_norm", true, false, 3000000);
}

static void refuses_bad_arguments_and_writes_nothing(void **state) {
    (void)state;
    refuse_norm_arguments(sample_add_rms_norm);
}

static void takes_empty_tensors_without_data(void **state) {
    (void)state;
    empty_norm_tensors(true, false);
}

/* 1 + 2^-9 is no bfloat16: its norm with a partner of 1 tells the unrounded sum from the rounded one. */
static void the_norm_is_taken_from_the_unrounded_sum(void **state) {
    (void)state;
    tensor *x = new_tensor(BF16, ROWS, SHAPE(1, 2)), *residual = new_tensor(BF16, ROWS, SHAPE(1, 2));
    tensor *sum = new_output(BF16, ROWS, SHAPE(1, 2)), *out = new_output(F32, ROWS, SHAPE(1, 2));
    fill(x, 1);
    fill(residual, 0);
    set(residual, 0, 0x1p-9);
    expect_ok(metalloid_add_rms_norm(NULL, dl(x), dl(residual), NULL, 0, dl(sum), dl(out)));
    assert_true(get(sum, 0) == 1 && get(sum, 1) == 1);
    double total[] = {1 + 0x1p-9, 1}, y[2], slack[2];
    reference_norm(total, NULL, NULL, 0, false, 1, 2, 0, 0, y, slack);
    describe("bfloat16 sum");
    expect_close_by_row("out", NORM, out, y, 2);
    release_all();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_the_formula_on_random_calls),
        cmocka_unit_test(refuses_bad_arguments_and_writes_nothing),
        cmocka_unit_test(takes_empty_tensors_without_data),
        cmocka_unit_test(the_norm_is_taken_from_the_unrounded_sum),
    };
    return cmocka_run_group_tests_name("add_rms_norm", tests, NULL, NULL);
}
