/* geglu. SPDX-License-Identifier: MIT */
#include "gated_cases.h"

/* x/2 (1 + erf(x / sqrt 2)), whose tail needs erfc. */
static double gelu_erf(double x) {
    return x == -(double)INFINITY ? -0.0 : (double)(x / 2 * erfcl(-(long double)x / sqrtl(2)));
}

/* x/2 (1 + tanh(z)) = x / (1 + exp(-2z)), which loses nothing where tanh comes close to -1. */
static double gelu_tanh(double x) {
    long double z = sqrtl(2 / acosl(-1)) * (x + 0.044715L * x * x * x);
    return x == -(double)INFINITY ? -0.0 : (double)(x / (1 + expl(-2 * z)));
}

static void erf_matches_the_formula_on_random_calls(void **state) {
    (void)state;
    random_gated_cases(sample_geglu, gelu_erf, METALLOID_GELU_ERF, 6000000);
}

static void tanh_matches_the_formula_on_random_calls(void **state) {
    (void)state;
    random_gated_cases(sample_geglu, gelu_tanh, METALLOID_GELU_TANH, 7000000);
}

static void refuses_bad_arguments_and_writes_nothing(void **state) {
    (void)state;
    refuse_gated_arguments(sample_geglu);
    static const int bad[] = {-1, 2, 77, INT32_MAX};
    seed(1);
    operation op = sample_geglu(SMALL);
    for (int i = 0; i < 4; i++) {
        memcpy(&op.gelu, &bad[i], sizeof bad[i]); /* an int that is none of the enumeration */
        expect_refused(&op, "approximate", "an approximation that does not exist");
    }
    release_all();
}

static void takes_empty_tensors_and_scalars(void **state) {
    (void)state;
    empty_and_scalar_gated(sample_geglu, gelu_erf);
}

static void every_gate_of_16_bits_is_right(void **state) {
    (void)state;
    every_16_bit_gate(sample_geglu, gelu_erf, METALLOID_GELU_ERF);
    every_16_bit_gate(sample_geglu, gelu_tanh, METALLOID_GELU_TANH);
}

static void extreme_gates_give_their_limits(void **state) {
    (void)state;
    static const double gate[] = {1e4, -1e4, 5, -5, 9.3, -9.3, -13, 13, INFINITY, -INFINITY, 0, -0.0, 3e38, -3e38, NAN};
    extreme_gates(sample_geglu, gelu_erf, METALLOID_GELU_ERF, gate, sizeof gate / sizeof *gate);
    extreme_gates(sample_geglu, gelu_tanh, METALLOID_GELU_TANH, gate, sizeof gate / sizeof *gate);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(erf_matches_the_formula_on_random_calls),
        cmocka_unit_test(tanh_matches_the_formula_on_random_calls),
        cmocka_unit_test(refuses_bad_arguments_and_writes_nothing),
        cmocka_unit_test(takes_empty_tensors_and_scalars),
        cmocka_unit_test(every_gate_of_16_bits_is_right),
        cmocka_unit_test(extreme_gates_give_their_limits),
    };
    return cmocka_run_group_tests_name("geglu", tests, NULL, NULL);
}
