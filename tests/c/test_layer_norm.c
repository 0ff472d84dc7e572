/* layer_norm. SPDX-License-Identifier: MIT */
#include "norm_cases.h"

static void matches_the_formula_on_random_calls(void **state) {
    (void)state;
    random_norm_cases("layer_norm", false, true, 2000000);
}

static void refuses_bad_arguments_and_writes_nothing(void **state) {
    (void)state;
    refuse_norm_arguments(sample_layer_norm);
}

static void takes_empty_tensors_without_data(void **state) {
    (void)state;
    empty_norm_tensors(false, true);
}

/* Rows of mean 1e4 and deviation 1 in float32 come out with relative error below 1e-3. */
static void the_variance_survives_a_large_mean(void **state) {
    (void)state;
    static const int64_t lengths[] = {3, 64, 768, 5000};
    for (int i = 0; i < 4; i++) {
        for (int sign = -1; sign <= 1; sign += 2) {
            seed((uint64_t)i);
            int64_t length = lengths[i];
            tensor *x = new_tensor(F32, ROWS, SHAPE(6, length)), *out = new_output(F32, ROWS, SHAPE(6, length));
            fill_normal(x, sign * 1e4, 1);
            double *y = new_doubles(x->elements), *slack = new_doubles(x->elements);
            reference_norm(values(x), NULL, NULL, 1e-5, true, 6, length, 0, 0, y, slack);
            expect_ok(metalloid_layer_norm(random_context(), dl(x), NULL, NULL, 1e-5, dl(out)));
            describe("rows of %lld, mean %g", (long long)length, sign * 1e4);
            expect_close_by_row("out", LARGE_MEAN, out, y, length);
            release_all();
        }
    }
}

/* Up to 100 deviations the ordinary bound holds. */
static void a_mean_of_90_deviations_keeps_the_ordinary_accuracy(void **state) {
    (void)state;
    for (int i = 0; i < scaled(50); i++) {
        seed((uint64_t)i);
        int64_t length = random_int(100, 3000);
        tensor *x = new_tensor(F32, ROWS, SHAPE(2, length)), *out = new_output(F32, ROWS, SHAPE(2, length));
        fill_normal(x, 90, 1);
        double *y = new_doubles(x->elements), *slack = new_doubles(x->elements);
        reference_norm(values(x), NULL, NULL, 1e-5, true, 2, length, 0, 0, y, slack);
        expect_ok(metalloid_layer_norm(random_context(), dl(x), NULL, NULL, 1e-5, dl(out)));
        describe("rows of %lld, mean 90", (long long)length);
        expect_close_by_row("out", NORM, out, y, length);
        release_all();
    }
}

static void constant_rows_give_the_bias(void **state) {
    (void)state;
    for (int type = F32; type <= F64; type++) {
        seed((uint64_t)type);
        tensor *x = new_tensor((element_type)type, INPUT, SHAPE(3, 64)),
               *bias = new_normal((element_type)type, INPUT, SHAPE(64));
        tensor *weight = new_normal((element_type)type, INPUT, SHAPE(64)),
               *out = new_output((element_type)type, OUTPUT, SHAPE(3, 64));
        fill(x, 0.75);
        expect_ok(metalloid_layer_norm(NULL, dl(x), dl(weight), dl(bias), 1e-5, dl(out)));
        for (int64_t i = 0; i < out->elements; i++) assert_true(get(out, i) == get(bias, i % 64));
        release_all();
    }
}

static void a_nan_or_infinity_stays_in_its_row(void **state) {
    (void)state;
    for (int type = F32; type <= F64; type++) {
        seed(7);
        tensor *x = new_normal((element_type)type, ROWS, SHAPE(3, 40)),
               *out = new_output((element_type)type, ROWS, SHAPE(3, 40));
        double y[120], slack[120];
        reference_norm(values(x), NULL, NULL, 1e-5, true, 3, 40, 0, 0, y, slack);
        set(x, 40 + 17, NAN);
        set(x, 80 + 5, INFINITY); /* infinity - infinity */
        expect_ok(metalloid_layer_norm(NULL, dl(x), NULL, NULL, 1e-5, dl(out)));
        for (int i = 40; i < 120; i++) y[i] = NAN;
        describe("rows with NaN and infinity, %s", dtype_name((element_type)type));
        expect_close_by_row("out", NORM, out, y, 40);
        release_all();
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_the_formula_on_random_calls),
        cmocka_unit_test(refuses_bad_arguments_and_writes_nothing),
        cmocka_unit_test(takes_empty_tensors_without_data),
        cmocka_unit_test(the_variance_survives_a_large_mean),
        cmocka_unit_test(a_mean_of_90_deviations_keeps_the_ordinary_accuracy),
        cmocka_unit_test(constant_rows_give_the_bias),
        cmocka_unit_test(a_nan_or_infinity_stays_in_its_row),
    };
    return cmocka_run_group_tests_name("layer_norm", tests, NULL, NULL);
}
