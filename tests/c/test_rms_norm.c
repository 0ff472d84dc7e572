/* rms_norm. SPDX-License-Identifier: MIT */
#include "norm_cases.h"

static void matches_the_formula_on_random_calls(void **state) {
    (void)state;
    random_norm_cases("rms_norm", false, false, 1000000);
}

static void refuses_bad_arguments_and_writes_nothing(void **state) {
    (void)state;
    refuse_norm_arguments(sample_rms_norm);
}

static void takes_empty_tensors_without_data(void **state) {
    (void)state;
    empty_norm_tensors(false, false);
}

/* 64 axes is NumPy's limit and the library's. */
static void takes_rank_64(void **state) {
    (void)state;
    seed(1);
    int64_t shape[64], length = 5;
    for (int axis = 0; axis < 64; axis++) shape[axis] = axis == 10 ? 3 : axis == 63 ? length : 1;
    tensor *x = new_normal(F32, CONTIGUOUS, SHAPE(3, 5)), *out = new_output(F32, CONTIGUOUS, SHAPE(3, 5));
    DLTensor deep_x = x->dl, deep_out = out->dl;
    deep_x.ndim = deep_out.ndim = 64;
    deep_x.shape = deep_out.shape = shape;
    deep_x.strides = deep_out.strides = NULL;
    double y[15], slack[15];
    reference_norm(values(x), NULL, NULL, 1e-5, false, 3, length, 0, 0, y, slack);
    snapshot();
    expect_ok(metalloid_rms_norm(NULL, &deep_x, NULL, 1e-5, &deep_out));
    expect_only_outputs_written();
    expect_close_by_row("rank 64", NORM, out, y, length);
    release_all();
}

static void zero_rows_give_zeros_where_eps_is_positive(void **state) {
    (void)state;
    for (int type = F32; type <= F64; type++) {
        tensor *x = new_tensor((element_type)type, STRIDED, SHAPE(2, 33)),
               *out = new_output((element_type)type, STRIDED, SHAPE(2, 33));
        fill(x, 0);
        expect_ok(metalloid_rms_norm(NULL, dl(x), NULL, 1e-6, dl(out)));
        for (int64_t i = 0; i < out->elements; i++) assert_true(get(out, i) == 0);
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
        reference_norm(values(x), NULL, NULL, 1e-5, false, 3, 40, 0, 0, y, slack);
        set(x, 40 + 17, NAN);
        set(x, 80 + 5, INFINITY);
        expect_ok(metalloid_rms_norm(NULL, dl(x), NULL, 1e-5, dl(out)));
        for (int i = 40; i < 80; i++) y[i] = NAN;
        for (int i = 80; i < 120; i++)
            y[i] = i == 85 ? (double)NAN : 0; /* infinity / infinity, and a number / infinity */
        describe("rows with NaN and infinity, %s", dtype_name((element_type)type));
        expect_close_by_row("out", NORM, out, y, 40);
        release_all();
    }
}

/* The squares of float16's and bfloat16's extremes, and of float32's around 1e18, are within float32's range. */
static void extreme_magnitudes_keep_their_accuracy(void **state) {
    (void)state;
    static const struct {
        element_type type;
        double magnitude;
    } extremes[] = {{F16, 60000}, {F16, 1e-7},   {BF16, 1e18}, {F32, 1e18},
                    {F32, 1e-18}, {BF16, 1e-18}, {F64, 1e150}, {F64, 1e-150}};
    for (size_t i = 0; i < sizeof extremes / sizeof *extremes; i++) {
        seed(i);
        tensor *x = new_tensor(extremes[i].type, ROWS, SHAPE(4, 100)),
               *out = new_output(extremes[i].type, ROWS, SHAPE(4, 100));
        fill_uniform(x, -extremes[i].magnitude, extremes[i].magnitude);
        double y[400], slack[400];
        reference_norm(values(x), NULL, NULL, 0, false, 4, 100, 0, 0, y, slack);
        expect_ok(metalloid_rms_norm(NULL, dl(x), NULL, 0, dl(out)));
        describe("rows of magnitude %g in %s", extremes[i].magnitude, dtype_name(extremes[i].type));
        expect_close_by_row("out", NORM, out, y, 100);
        release_all();
    }
}

static void long_rows_keep_their_accuracy(void **state) {
    (void)state;
    seed(3);
    tensor *x = new_normal(F32, ROWS, SHAPE(2, 300001)), *out = new_output(F32, ROWS, SHAPE(2, 300001));
    double *y = new_doubles(x->elements), *slack = new_doubles(x->elements);
    reference_norm(values(x), NULL, NULL, 1e-5, false, 2, 300001, 0, 0, y, slack);
    expect_ok(metalloid_rms_norm(NULL, dl(x), NULL, 1e-5, dl(out)));
    describe("rows of 300001");
    expect_close_by_row("out", NORM, out, y, 300001);
    release_all();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_the_formula_on_random_calls),
        cmocka_unit_test(refuses_bad_arguments_and_writes_nothing),
        cmocka_unit_test(takes_empty_tensors_without_data),
        cmocka_unit_test(takes_rank_64),
        cmocka_unit_test(zero_rows_give_zeros_where_eps_is_positive),
        cmocka_unit_test(a_nan_or_infinity_stays_in_its_row),
        cmocka_unit_test(extreme_magnitudes_keep_their_accuracy),
        cmocka_unit_test(long_rows_keep_their_accuracy),
    };
    return cmocka_run_group_tests_name("rms_norm", tests, NULL, NULL);
}
