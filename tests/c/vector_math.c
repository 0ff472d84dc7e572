/* The vector functions keep the error bounds that cpu/simd/math.h states. SPDX-License-Identifier: MIT
 *
 * Built once for each instruction set and arithmetic, with the set's own flags. */
#include "cpu/features.h"
#include "cpu/simd/math.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#ifdef MTL_IN_DOUBLE
#define LEAST_NORMAL 0x1p-1022L
enum { DIGITS = 52 };
static const long double bound_exp = 2, bound_tanh = 2, bound_erfc = 4;
#else
#define LEAST_NORMAL 0x1p-126L
enum { DIGITS = 23 };
static const long double bound_exp = 1, bound_tanh = 1.5, bound_erfc = 6;
#endif

static uint64_t bits_state = 0x9e3779b97f4a7c15;

/* Any bit pattern, or, every other time, a number that no function sends to its limit. */
static real argument(void) {
    bits_state ^= bits_state << 13;
    bits_state ^= bits_state >> 7;
    bits_state ^= bits_state << 17;
    if (bits_state & 1) return (real)((double)(int64_t)bits_state * 0x1p-63 * (bits_state & 2 ? 100 : 1));
    real x;
    memcpy(&x, &bits_state, sizeof x);
    return x;
}

/* Units in the last place; results below the normal range count in the units of its end. */
static long double units(real got, long double wanted) {
    if (isnan(wanted)) return isnan(got) ? 0 : INFINITY;
    if ((real)wanted == got) return 0;
    if (!isfinite(got)) return INFINITY;
    long double magnitude = fabsl(wanted) < LEAST_NORMAL ? LEAST_NORMAL : fabsl(wanted);
    return fabsl((long double)got - wanted) / ldexpl(1, ilogbl(magnitude) - DIGITS);
}

static void worst_is_below(const char *name, vec (*function)(vec), long double (*exact)(long double), bool nonnegative,
                           bool nonpositive, long double bound) {
    const char *scale = getenv("METALLOID_TEST_SCALE");
    long calls = (long)(2e6 * (scale ? atof(scale) : 1)) / LANES;
    long double worst = 0;
    real at = 0;
    for (long i = 0; i < calls; i++) {
        real in[LANES], out[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            in[lane] = argument();
            if (nonnegative) in[lane] = (real)fabs((double)in[lane]);
            if (nonpositive) in[lane] = -(real)fabs((double)in[lane]);
        }
        vec_store(out, function(vec_load(in)));
        for (int lane = 0; lane < LANES; lane++) {
            long double wanted = exact((long double)in[lane]);
            if (nonpositive && in[lane] < (real)EXP_LEAST_NORMAL) wanted = 0; /* flushed, as it says */
            long double error = units(out[lane], wanted);
            if (error > worst) worst = error, at = in[lane];
        }
    }
    printf("%s: %ld arguments, largest error %.3Lf units at %.9g\n", name, calls * LANES, worst, (double)at);
    assert_true(worst <= bound);
}

static vec call_exp(vec x) { return vec_exp(x); }
static vec call_exp_of_nonpositive(vec x) { return vec_exp_of_nonpositive(x); }
static vec call_tanh(vec x) { return vec_tanh(x); }
static vec call_erfc(vec x) { return vec_erfc_scaled(x); }
static long double exact_erfc(long double x) { return erfcl(x * 0.70710678118654752440084436210484904L); }

static void exp_keeps_its_bound(void **state) {
    (void)state;
    worst_is_below("exp", call_exp, expl, false, false, bound_exp);
}
static void exp_of_nonpositive_keeps_its_bound(void **state) {
    (void)state;
    worst_is_below("exp of nonpositive", call_exp_of_nonpositive, expl, false, true, bound_exp);
}
static void tanh_keeps_its_bound(void **state) {
    (void)state;
    worst_is_below("tanh", call_tanh, tanhl, false, false, bound_tanh);
}
static void erfc_keeps_its_bound(void **state) {
    (void)state;
    worst_is_below("erfc(x / sqrt 2)", call_erfc, exact_erfc, true, false, bound_erfc);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exp_keeps_its_bound),
        cmocka_unit_test(exp_of_nonpositive_keeps_its_bound),
        cmocka_unit_test(tanh_keeps_its_bound),
        cmocka_unit_test(erfc_keeps_its_bound),
    };
#if defined(MTL_ISA_AVX512)
    unsigned needed = MTL_AVX512;
#elif defined(MTL_ISA_AVX2)
    unsigned needed = MTL_AVX2;
#endif
    if (!(mtl_cpu_features() & needed)) {
        printf("left out: this processor has not these instructions\n");
        return 0;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
