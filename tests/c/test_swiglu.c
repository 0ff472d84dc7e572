/* swiglu. SPDX-License-Identifier: MIT */
#include "gated_cases.h"

static double silu(double x) { return x == -(double)INFINITY ? -0.0 : (double)(x / (1 + expl(-(long double)x))); }

static void matches_the_formula_on_random_calls(void **state) {
    (void)state;
    random_gated_cases(sample_swiglu, silu, METALLOID_GELU_ERF, 5000000);
}

static void refuses_bad_arguments_and_writes_nothing(void **state) {
    (void)state;
    refuse_gated_arguments(sample_swiglu);
}

static void takes_empty_tensors_and_scalars(void **state) {
    (void)state;
    empty_and_scalar_gated(sample_swiglu, silu);
}

static void every_gate_of_16_bits_is_right(void **state) {
    (void)state;
    every_16_bit_gate(sample_swiglu, silu, METALLOID_GELU_ERF);
}

/* Large negative gates give 0, large positive ones themselves; -infinity has the limit 0. */
static void extreme_gates_give_their_limits(void **state) {
    (void)state;
    static const double gate[] = {1e4,       -1e4, 88.8, -88.8, -103.5, -104.5, INFINITY,
                                  -INFINITY, 0,    -0.0, 3e38,  -3e38,  NAN};
    extreme_gates(sample_swiglu, silu, METALLOID_GELU_ERF, gate, sizeof gate / sizeof *gate);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_the_formula_on_random_calls),
        cmocka_unit_test(refuses_bad_arguments_and_writes_nothing),
        cmocka_unit_test(takes_empty_tensors_and_scalars),
        cmocka_unit_test(every_gate_of_16_bits_is_right),
        cmocka_unit_test(extreme_gates_give_their_limits),
    };
    return cmocka_run_group_tests_name("swiglu", tests, NULL, NULL);
}
