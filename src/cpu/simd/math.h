/* exp, tanh and erfc of vectors. SPDX-License-Identifier: MIT
 *
 * Coefficients: minimax fits (Remez exchange) over the reduced ranges, made for these functions; each comment gives the fit's
 * largest relative error. Largest error measured over a seventh of all float32 arguments, in units in the last place: exp 0.99,
 * tanh 1.29, erfc 5.4. tests/c/vector_math.c holds them to 1, 1.5 and 6, exp of softmax to 3 + |x| / 4, and double's to 2 (erfc: 4). */
#ifndef METALLOID_CPU_SIMD_MATH_H
#define METALLOID_CPU_SIMD_MATH_H

#include "cpu/simd/vec.h"

/* exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2; exp(r) = 1 + r + r^2 q(r). n comes from the low bits of x / ln 2 + 1.5 2^m,
 * whose unit in the last place is 1; r = x - n ln 2 with ln 2 in two parts, the first exact times n (Cody & Waite 1980). */
#ifdef MTL_IN_DOUBLE
#define EXP_MAGIC        0x1.8p52
#define EXP_BIAS         1023
#define EXP_SHIFT        52
#define EXP_LEAST        (-746.) /* below: 0 */
#define EXP_LEAST_NORMAL (-708.) /* below: subnormal */
#define EXP_MOST         710.    /* above: infinity */
INLINE vec exp_reduced(vec r) {  /* 6e-20 */
    vec q = vec_set(0x1.1e39664c128d6p-29);
    q = vec_fma(q, r, vec_set(0x1.af711e22fc514p-26));
    q = vec_fma(q, r, vec_set(0x1.27e5bbd87d069p-22));
    q = vec_fma(q, r, vec_set(0x1.71dded2ac5157p-19));
    q = vec_fma(q, r, vec_set(0x1.a01a013016068p-16));
    q = vec_fma(q, r, vec_set(0x1.a01a01b4aa113p-13));
    q = vec_fma(q, r, vec_set(0x1.6c16c16c3261dp-10));
    q = vec_fma(q, r, vec_set(0x1.111111110e962p-7));
    q = vec_fma(q, r, vec_set(0x1.55555555554fap-5));
    q = vec_fma(q, r, vec_set(0x1.555555555555cp-3));
    q = vec_fma(q, r, vec_set(0x1p-1));
    return vec_fma(r * r, q, r) + vec_set(1);
}
INLINE vec exp_remainder(vec x, vec n) {
    return vec_fma(n, vec_set(-0x1.abc9e3b39803fp-56), vec_fma(n, vec_set(-0x1.62e42fefa39efp-1), x));
}
#else
#define EXP_MAGIC        0x1.8p23f
#define EXP_BIAS         127
#define EXP_SHIFT        23
#define EXP_LEAST        (-104.f)
#define EXP_LEAST_NORMAL (-87.3f)
#define EXP_MOST         89.f
INLINE vec exp_reduced(vec r) { /* 3e-9 */
    vec q = vec_set(0x1.6a1a9cp-10f);
    q = vec_fma(q, r, vec_set(0x1.123fc6p-7f));
    q = vec_fma(q, r, vec_set(0x1.555916p-5f));
    q = vec_fma(q, r, vec_set(0x1.55548ap-3f));
    q = vec_fma(q, r, vec_set(0x1.fffffcp-2f));
    return vec_fma(r * r, q, r) + vec_set(1);
}
INLINE vec exp_remainder(vec x, vec n) {
    return vec_fma(n, vec_set(0x1.05c61p-29f), vec_fma(n, vec_set(-0x1.62e43p-1f), x));
}
#endif

#define LOG2_E ((real)0x1.71547652b82fep0)

INLINE vec exp_power(vec_bits n) { return (vec)((n + EXP_BIAS) << EXP_SHIFT); }

/* The whole range: subnormals below, infinity above, NaN for NaN. */
INLINE vec vec_exp(vec x) {
    x = vec_max(vec_set(EXP_LEAST), vec_min(vec_set(EXP_MOST), x));
    vec shifted = vec_fma(x, vec_set(LOG2_E), vec_set(EXP_MAGIC)), n = shifted - vec_set(EXP_MAGIC);
    vec y = exp_reduced(exp_remainder(x, n));
#ifdef VEC_HAS_SCALE
    return vec_scale(y, n);
#else
    vec_int power = (vec_int)shifted - (vec_int)vec_set(EXP_MAGIC), half = power >> 1;
    return y * exp_power((vec_bits)half) * exp_power((vec_bits)(power - half));
#endif
}

/* For softmax: x up to 87 (700), where sums need fewer digits than single values. What would be subnormal may be 0, and below EXP_LEAST is. NaN for
 * NaN. In float32 2^r of r = x / ln 2 - n, a polynomial (1.1e-7); the rounding of 1 / ln 2 makes the error grow with |x|. */
INLINE vec vec_exp_of_softmax(vec x) {
#ifdef VEC_HAS_SCALE
    x = vec_max(vec_set(EXP_LEAST), x);
#endif
    vec shifted = vec_fma(x, vec_set(LOG2_E), vec_set(EXP_MAGIC)), n = shifted - vec_set(EXP_MAGIC);
#ifdef MTL_IN_DOUBLE
    vec y = exp_reduced(exp_remainder(x, n));
#else
    vec r = vec_fma(x, vec_set(LOG2_E), -n), y = vec_set(0x1.5bb9fcp-10f);
    y = vec_fma(y, r, vec_set(0x1.3cea9ep-7f));
    y = vec_fma(y, r, vec_set(0x1.c6b754p-5f));
    y = vec_fma(y, r, vec_set(0x1.ebf9bcp-3f));
    y = vec_fma(y, r, vec_set(0x1.62e42ap-1f));
    y = vec_fma(y, r, vec_set(1));
#endif
#ifdef VEC_HAS_SCALE
    return vec_scale(y, n);
#else
    vec_bits power = (vec_bits)shifted - (vec_bits)vec_set(EXP_MAGIC); /* far below it wraps, and y is dropped */
    y *= exp_power(power);
    return (vec)((vec_int)y & ~(vec_int)(x < vec_set(EXP_LEAST_NORMAL)));
#endif
}

/* 2^x for x up to 126, for results of 16 bits: relative error 3e-6 (2^-18.4). 0 below the range, NaN for NaN. */
INLINE vec vec_exp2_narrow(vec x) {
#ifndef VEC_HAS_SCALE
    x = vec_max(vec_set(-200), x);
#endif
    vec n = (x + vec_set(EXP_MAGIC)) - vec_set(EXP_MAGIC), r = x - n, y = vec_set((real)0x1.3997d6p-7);
    y = vec_fma(y, r, vec_set((real)0x1.ca1442p-5));
    y = vec_fma(y, r, vec_set((real)0x1.ec06dap-3));
    y = vec_fma(y, r, vec_set((real)0x1.62e0dcp-1));
    y = vec_fma(y, r, vec_set((real)0x1.ffffe8p-1));
#ifdef VEC_HAS_SCALE
    return vec_scale(y, n);
#else
    vec_int power = (vec_int)(n + vec_set(EXP_MAGIC)) - (vec_int)vec_set(EXP_MAGIC), half = power >> 1;
    return y * exp_power((vec_bits)half) * exp_power((vec_bits)(power - half));
#endif
}

/* 2^x for sums over logits: any x, NaN for NaN. Relative error 2e-7, and 3e-6 where `narrow`, for logits of 16 bits;
 * what would be below 2^-126 may be 0. Above 2^120 any number above 2^100, or infinity. */
INLINE vec vec_exp2_of_logits(vec x, bool narrow) {
#ifdef MTL_IN_DOUBLE
    (void)narrow;
    vec at = vec_max(vec_set(-1000), vec_min(vec_set(1000), x));
    vec n = (at + vec_set(EXP_MAGIC)) - vec_set(EXP_MAGIC), y = exp_reduced((at - n) * vec_set(0x1.62e42fefa39efp-1));
    y *= exp_power((vec_bits)(at + vec_set(EXP_MAGIC)) - (vec_bits)vec_set(EXP_MAGIC));
    return (vec)((vec_int)y & ~(vec_int)(x < vec_set(-1000)));
#else
#ifdef VEC_HAS_SCALE /* by the power of floor(x), which makes 0 <= r < 1; of infinity it is 0 */
    vec r = vec_above_floor(x);
#else
    vec at = vec_max(vec_set(-126), vec_min(vec_set(126), x)), floor = (at - vec_set(0.5f)) + vec_set(EXP_MAGIC);
    vec r = at - (floor - vec_set(EXP_MAGIC));
#endif
    vec y;
    if (narrow) {
        y = vec_fma(vec_set(0x1.bb7cd4p-7f), r, vec_set(0x1.aa13fp-5f));
        y = vec_fma(y, r, vec_set(0x1.ee798ap-3f));
        y = vec_fma(y, r, vec_set(0x1.62d166p-1f));
        y = vec_fma(y, r, vec_set(0x1.00002cp+0f));
    } else {
        y = vec_fma(vec_set(0x1.ec320ap-10f), r, vec_set(0x1.26900cp-7f));
        y = vec_fma(y, r, vec_set(0x1.c95446p-5f));
        y = vec_fma(y, r, vec_set(0x1.ebd5a8p-3f));
        y = vec_fma(y, r, vec_set(0x1.62e4f6p-1f));
        y = vec_fma(y, r, vec_set(0x1.fffffep-1f));
    }
#ifdef VEC_HAS_SCALE
    return vec_scale(y, x);
#else
    y *= exp_power((vec_bits)floor - (vec_bits)vec_set(EXP_MAGIC));
    return (vec)((vec_int)y & ~(vec_int)(x < vec_set(-126)));
#endif
#endif
}

/* tanh(y) = y + y^3 P(y^2) for |y| <= 0.65, else 1 - 2 / (exp(2|y|) + 1) with the sign of y. */
INLINE vec vec_tanh(vec y) {
    vec magnitude = vec_abs(y), u = y * y;
#ifdef MTL_IN_DOUBLE /* 1e-18 */
    vec p = vec_set(0x1.78621e8b7da91p-18);
    p = vec_fma(p, u, vec_set(-0x1.e980979bf0109p-16));
    p = vec_fma(p, u, vec_set(0x1.7bb6b6e4373f6p-14));
    p = vec_fma(p, u, vec_set(-0x1.efcb434c0bbe8p-13));
    p = vec_fma(p, u, vec_set(0x1.34ed47e635b06p-11));
    p = vec_fma(p, u, vec_set(-0x1.7d98872a5d28dp-10));
    p = vec_fma(p, u, vec_set(0x1.d6d30e77f1131p-9));
    p = vec_fma(p, u, vec_set(-0x1.226e30d06fe8fp-7));
    p = vec_fma(p, u, vec_set(0x1.664f485fd76ddp-6));
    p = vec_fma(p, u, vec_set(-0x1.ba1ba1b97e598p-5));
    p = vec_fma(p, u, vec_set(0x1.11111111105efp-3));
    p = vec_fma(p, u, vec_set(-0x1.555555555554dp-2));
#else /* 3e-10 */
    vec p = vec_set(0x1.0df432p-9f);
    p = vec_fma(p, u, vec_set(-0x1.08f33p-7f));
    p = vec_fma(p, u, vec_set(0x1.62eee8p-6f));
    p = vec_fma(p, u, vec_set(-0x1.b9e042p-5f));
    p = vec_fma(p, u, vec_set(0x1.11101ep-3f));
    p = vec_fma(p, u, vec_set(-0x1.555552p-2f));
#endif
    vec small = vec_fma(y * u, p, y);
    vec large = vec_set(1) - vec_set(2) / (vec_exp(magnitude + magnitude) + vec_set(1));
    vec_int sign = (vec_int)vec_set(-(real)0);
    large = (vec)((vec_int)large | ((vec_int)y & sign));
    return vec_select(magnitude <= vec_set((real)0.65), small, large);
}

/* erfc(x / sqrt 2) for x >= 0, which is what gelu needs: exp(-x^2/2) times the scaled complementary error function of z = x / sqrt 2, a
 * polynomial in t = (z - 3)/(z + 3) (1.5e-9). The rounding error of x^2 is put back in. */
INLINE vec vec_erfc_scaled(vec x) {
#ifdef MTL_IN_DOUBLE
    for (int i = 0; i < LANES; i++) { /* erfc'(z) = -2 / sqrt(pi) exp(-z^2) makes up for the rounding of z */
        double z = x[i] * 0x1.6a09e667f3bcdp-1,
               lost = fma(x[i], 0x1.6a09e667f3bcdp-1, -z) + x[i] * -0x1.bdd3413b26456p-55;
        double correction = 0x1.20dd750429b6dp0 * exp(-z * z) * lost;
        x[i] = erfc(z) - (correction == correction ? correction : 0);
    }
    return x;
#else
    vec z = vec_min(vec_set(20), x * vec_set(0x1.6a09e6p-1f)), t = (z - vec_set(3)) / (z + vec_set(3));
    vec p = vec_set(0x1.d78feap-15f);
    p = vec_fma(p, t, vec_set(0x1.f01212p-16f));
    p = vec_fma(p, t, vec_set(-0x1.3792fp-11f));
    p = vec_fma(p, t, vec_set(0x1.77124p-11f));
    p = vec_fma(p, t, vec_set(0x1.17bfd6p-8f));
    p = vec_fma(p, t, vec_set(-0x1.8faca0p-6f));
    p = vec_fma(p, t, vec_set(0x1.258b28p-4f));
    p = vec_fma(p, t, vec_set(-0x1.336fe8p-3f));
    p = vec_fma(p, t, vec_set(0x1.f6ff2p-3f));
    p = vec_fma(p, t, vec_set(-0x1.4e102cp-2f));
    p = vec_fma(p, t, vec_set(0x1.6e9828p-3f));
    vec square = x * x, lost = vec_fma(x, x, -square);
    vec e = vec_exp(square * vec_set(-0.5f));
    return vec_select(square < vec_set(300), vec_fma(e * p, lost * vec_set(-0.5f), e * p),
                      vec_select(x != x, x, vec_zero()));
#endif
}

#endif
