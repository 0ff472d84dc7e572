/* The vector functions keep the error bounds that cpu/simd/math.h states; conversions are exact. SPDX-License-Identifier: MIT
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
            if (nonpositive && in[lane] < (real)EXP_LEAST_NORMAL && out[lane] == 0) continue; /* flushed, as it says */
            long double error = units(out[lane], wanted);
            if (nonpositive && fabs((double)in[lane]) <= 1000) error -= fabsl((long double)in[lane]) / 4;
            if (error > worst) worst = error, at = in[lane];
        }
    }
    printf("%s: %ld arguments, largest error %.3Lf units at %.9g\n", name, calls * LANES, worst, (double)at);
    assert_true(worst <= bound);
}

static vec call_exp(vec x) { return vec_exp(x); }
static vec call_exp_of_softmax(vec x) { return vec_exp_of_softmax(x); }
static vec call_tanh(vec x) { return vec_tanh(x); }
static vec call_erfc(vec x) { return vec_erfc_scaled(x); }
static long double exact_erfc(long double x) { return erfcl(x * 0.70710678118654752440084436210484904L); }

static void exp_keeps_its_bound(void **state) {
    (void)state;
    worst_is_below("exp", call_exp, expl, false, false, bound_exp);
}
static void exp_of_softmax_keeps_its_bound(void **state) {
    (void)state;
    worst_is_below("exp of softmax", call_exp_of_softmax, expl, false, true, 3);
}
static vec call_exp2_of_logits(vec x) { return vec_exp2_of_logits(x, false); }
static void exp2_of_logits_keeps_its_bound(void **state) {
    (void)state;
    worst_is_below("2^x of logits", call_exp2_of_logits, exp2l, false, true, sizeof(real) == 8 ? 2 : 3);
    const real far[] = {-(real)INFINITY, -(real)1e30, 121, 1000, (real)1e30, (real)INFINITY, (real)NAN};
    for (int i = 0; i < 7; i++) {
        real out[LANES];
        vec_store(out, vec_exp2_of_logits(vec_set(far[i]), false));
        for (int lane = 0; lane < LANES; lane++) {
            if (i < 2) assert_true(out[lane] == 0);
            else assert_true(i == 6 ? isnan(out[lane]) : out[lane] > (real)0x1p100);
        }
    }
}
#ifndef MTL_IN_DOUBLE
static vec call_exp2_narrow(vec x) { return vec_exp2_narrow(vec_min(vec_set(126), x)); }
static long double exact_exp2(long double x) { return exp2l(x > 126 ? 126 : x); }
static void exp2_of_16_bits_keeps_its_bound(void **state) {
    (void)state;
    worst_is_below("2^x of 16 bits", call_exp2_narrow, exact_exp2, false, false, 3e-6L * 0x1p24L);
}
static vec call_exp2_of_narrow_logits(vec x) { return vec_exp2_of_logits(x, true); }
static void exp2_of_narrow_logits_keeps_its_bound(void **state) {
    (void)state;
    worst_is_below("2^x of logits of 16 bits", call_exp2_of_narrow_logits, exp2l, false, true, 3e-6L * 0x1p24L);
}
#endif
static void tanh_keeps_its_bound(void **state) {
    (void)state;
    worst_is_below("tanh", call_tanh, tanhl, false, false, bound_tanh);
}
static void erfc_keeps_its_bound(void **state) {
    (void)state;
    worst_is_below("erfc(x / sqrt 2)", call_erfc, exact_erfc, true, false, bound_erfc);
}

static void largest_and_smallest_give_the_second_beside_nan(void **state) {
    (void)state;
    const real with[] = {1, 2, -(real)INFINITY, 0, NAN};
    for (int i = 0; i < 5; i++) {
        for (int j = 0; j < 5; j++) {
            real a = with[i], b = with[j], most[LANES], least[LANES];
            vec_store(most, vec_max(vec_set(a), vec_set(b)));
            vec_store(least, vec_min(vec_set(a), vec_set(b)));
            for (int lane = 0; lane < LANES; lane++) {
                assert_true(isnan(b) ? isnan(most[lane]) : most[lane] == (a > b ? a : b));
                assert_true(isnan(b) ? isnan(least[lane]) : least[lane] == (a < b ? a : b));
            }
        }
    }
}

#ifndef MTL_IN_DOUBLE
/* Bit for bit as mtl_store_float and mtl_load_float, but for the payload of a NaN, which stays a quiet one. */
static bool same_16_bits(mtl_dtype dtype, uint16_t a, uint16_t b) {
    uint16_t infinity = dtype == MTL_F16 ? 0x7c00 : 0x7f80, quiet = dtype == MTL_F16 ? 0x200 : 0x40;
    bool nan_a = (a & 0x7fff) > infinity, nan_b = (b & 0x7fff) > infinity;
    return nan_a || nan_b ? nan_a && nan_b && (a & b & quiet) : a == b;
}

INLINE void stores_round_as_the_scalar_ones(mtl_dtype dtype) {
    /* Every upper half, with lower halves that are ties of float16 (0x1000, 0x3000) or bfloat16 (0x8000), next to ties, exact. */
    static const uint16_t lower[] = {0, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff};
    for (size_t i = 0; i < sizeof lower / sizeof *lower * 0x10000; i += LANES) {
        float in[LANES];
        uint16_t out[LANES], wanted;
        for (size_t lane = 0; lane < LANES; lane++)
            in[lane] = mtl_bits_float((uint32_t)((i + lane) % 0x10000 << 16 | lower[i / 0x10000]));
        vec_store_as(out, dtype, vec_load(in));
        uint16_t two[2 * LANES];
        vec_put_two(false, two, dtype, (vec_two){vec_load(in), vec_set(-in[0])});
        for (int lane = 0; lane < LANES; lane++) {
            uint16_t second;
            mtl_store_float(&second, dtype, -in[0]);
            if (!same_16_bits(dtype, two[lane], out[lane]) || !same_16_bits(dtype, two[LANES + lane], second))
                fail_msg("%s of %a differs where two vectors are stored", mtl_dtype_name(dtype), (double)in[lane]);
            mtl_store_float(&wanted, dtype, in[lane]);
            if (!same_16_bits(dtype, out[lane], wanted))
                fail_msg("%s of %a is 0x%04x instead of 0x%04x", mtl_dtype_name(dtype), (double)in[lane], out[lane],
                         wanted);
        }
    }
}

INLINE void loads_are_exact(mtl_dtype dtype) {
    for (uint32_t bits = 0; bits < 0x10000; bits += LANES) {
        uint16_t in[LANES];
        float out[LANES];
        for (uint32_t lane = 0; lane < LANES; lane++) in[lane] = (uint16_t)(bits + lane);
        vec_store(out, vec_load_as(in, dtype));
        uint16_t twice[2 * LANES];
        memcpy(twice, in, sizeof in);
        memcpy(twice + LANES, in, sizeof in);
        vec_two both = vec_load_two(twice, dtype);
        assert_memory_equal(&both.low, out, sizeof out);
        assert_memory_equal(&both.high, out, sizeof out);
        for (int lane = 0; lane < LANES; lane++) {
            float wanted = mtl_load_float(&in[lane], dtype);
            if (isnan(wanted) ? !isnan(out[lane]) : mtl_float_bits(out[lane]) != mtl_float_bits(wanted))
                fail_msg("%s 0x%04x is %a instead of %a", mtl_dtype_name(dtype), in[lane], (double)out[lane],
                         (double)wanted);
        }
    }
}

static void stores_of_16_bits_round_as_the_scalar_ones(void **state) {
    (void)state;
    stores_round_as_the_scalar_ones(MTL_F16);
    stores_round_as_the_scalar_ones(MTL_BF16);
}

static void loads_of_16_bits_are_exact(void **state) {
    (void)state;
    loads_are_exact(MTL_F16);
    loads_are_exact(MTL_BF16);
}
#endif

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exp_keeps_its_bound),
        cmocka_unit_test(exp_of_softmax_keeps_its_bound),
        cmocka_unit_test(exp2_of_logits_keeps_its_bound),
#ifndef MTL_IN_DOUBLE
        cmocka_unit_test(exp2_of_16_bits_keeps_its_bound),
        cmocka_unit_test(exp2_of_narrow_logits_keeps_its_bound),
#endif
        cmocka_unit_test(tanh_keeps_its_bound),
        cmocka_unit_test(erfc_keeps_its_bound),
        cmocka_unit_test(largest_and_smallest_give_the_second_beside_nan),
#ifndef MTL_IN_DOUBLE
        cmocka_unit_test(stores_of_16_bits_round_as_the_scalar_ones),
        cmocka_unit_test(loads_of_16_bits_are_exact),
#endif
    };
#if defined(MTL_ISA_AVX512_BF16)
    unsigned needed = MTL_AVX512_BF16;
#elif defined(MTL_ISA_AVX512)
    unsigned needed = MTL_AVX512;
#elif defined(MTL_ISA_AVX2)
    unsigned needed = MTL_AVX2;
#elif defined(MTL_ISA_NEON_BF16)
    unsigned needed = MTL_NEON_BF16;
#elif defined(MTL_ISA_NEON)
    unsigned needed = MTL_NEON;
#endif
    if (!(mtl_cpu_features() & needed)) {
        printf("left out: this processor has not these instructions\n");
        return 0;
    }
    return cmocka_run_group_tests(tests, NULL, NULL);
}
