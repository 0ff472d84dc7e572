// gelu(gate) * up. SPDX-License-Identifier: MIT
//
//   erf:  gelu(x) = x/2 (1 + erf(x / sqrt 2)). With t = exp(-x^2/2) erfcx(|x| / sqrt 2) / 2, the share of the tail
//         beyond |x|, it is x t below 0 and x (1 - t) above: nothing cancels.
//   tanh: gelu(x) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3), by e = exp(-2|u|) as silu is by exp(-|x|).
//
// An exponential turns the absolute error of its argument into its relative one. For float the arguments, up to 88, are
// therefore formed in more than float: x^2/2 as a float and the rest that fma leaves, 2|u| in double.
#include "cuda/gated.cuh"

template <bool FAST> __device__ inline float gelu_erf(float x) {
    float magnitude = fabsf(x), t;
    if (FAST) {
        // erfc with a relative error below 1.2e-7 (Press et al., Numerical Recipes, 6.2).
        const float c[] = {0.17087277f,  -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                           -0.18628806f, 0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
        float part = __fdividef(1, fmaf(0.35355339f, magnitude, 1)), power = c[0];
#pragma unroll
        for (int i = 1; i < 10; i++) power = fmaf(power, part, c[i]);
        t = 0.5f * part * __expf(fmaf(-0.5f * x, x, power));
    } else {
        float half = 0.5f * x, square = half * x, rest = fmaf(half, x, -square);
        t = 0.5f * expf(-square) * (1 - rest) * erfcxf(magnitude * 0.70710678f);
    }
    if (magnitude > 15) t = 0; // below float's range, where x^2 may pass it
    return x == -INFINITY ? -0.0f : x < 0 ? x * t : x * (1 - t);
}

template <bool FAST> __device__ inline float gelu_tanh(float x) {
    float e;
    if (FAST) {
        e = __expf(-1.5957691216f * fabsf(x) * fmaf(0.044715f * x, x, 1));
    } else {
        // In base 2: whole powers of two are exact, and what is left is small.
        double power = -2.302208198144325 * fabs((double)x) * fma(0.044715 * (double)x, (double)x, 1.0);
        double whole = rint(fmax(power, -200.0));
        e = scalbnf(exp2f((float)(fmax(power, -200.0) - whole)), (int)whole);
    }
    float y = (x < 0 ? x * e : x) * (FAST ? __fdividef(1, 1 + e) : 1 / (1 + e));
    return x == -INFINITY ? -0.0f : y;
}

GATED_KERNELS(geglu_erf, gelu_erf<false>, gelu_erf<true>)
GATED_KERNELS(geglu_tanh, gelu_tanh<false>, gelu_tanh<true>)
