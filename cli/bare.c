/* Loops over one float32 row, as one would write them by hand for one shape. SPDX-License-Identifier: MIT
 *
 * The compiler vectorizes them for the processor's best instruction set (-O3 -fopenmp-simd); the sums may be reassociated, as `omp simd
 * reduction` says. They are yardsticks of time: the library does not use them. */
#include "bare.h"
#include "cpu/features.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#define BODY static inline __attribute__((always_inline)) void

BODY rms_norm(size_t length, const float *restrict x, const float *restrict weight, float eps, float *restrict out) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (size_t i = 0; i < length; i++) squares += x[i] * x[i];
    float scale = 1 / sqrtf(squares / (float)length + eps);
#pragma omp simd
    for (size_t i = 0; i < length; i++) out[i] = x[i] * scale * weight[i];
}

BODY add_rms_norm(size_t length, const float *restrict x, const float *restrict residual, const float *restrict weight,
                  float eps, float *restrict sum, float *restrict out) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (size_t i = 0; i < length; i++) {
        sum[i] = x[i] + residual[i];
        squares += sum[i] * sum[i];
    }
    float scale = 1 / sqrtf(squares / (float)length + eps);
#pragma omp simd
    for (size_t i = 0; i < length; i++) out[i] = sum[i] * scale * weight[i];
}

/* Two passes, since E[x^2] - E[x]^2 loses the variance of a row with a large mean. */
BODY layer_norm(size_t length, const float *restrict x, const float *restrict weight, const float *restrict bias,
                float eps, float *restrict out) {
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < length; i++) sum += x[i];
    float mean = sum / (float)length;
#pragma omp simd reduction(+ : squares)
    for (size_t i = 0; i < length; i++) squares += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf(squares / (float)length + eps);
#pragma omp simd
    for (size_t i = 0; i < length; i++) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

BODY soft_sign(size_t length, const float *restrict x, float *restrict out) {
#pragma omp simd
    for (size_t i = 0; i < length; i++) out[i] = x[i] / (1 + fabsf(x[i]));
}

/* exp(-g) = 2^n 2^f, |f| <= 1/2: the Taylor polynomial of 2^f to the fifth power, relative error 3e-6. */
BODY swiglu(size_t length, const float *restrict gate, const float *restrict up, float *restrict out) {
#pragma omp simd
    for (size_t i = 0; i < length; i++) {
        float power = gate[i] * -1.44269504f;
        power = power < -126 ? -126 : power > 126 ? 126 : power;
        float whole = (power + 0x1.8p23f) - 0x1.8p23f, f = power - whole;
        float two_to_f = 1 + f * (0.693147181f +
                                  f * (0.240226507f + f * (0.0555041087f + f * (0.00961812911f + f * 0.00133335581f))));
        int32_t bits = ((int32_t)whole + 127) * (1 << 23);
        float two_to_n;
        memcpy(&two_to_n, &bits, sizeof bits);
        out[i] = gate[i] / (1 + two_to_n * two_to_f) * up[i];
    }
}

#if defined(__x86_64__)
#define FOR_EACH_ISA(name, parameters, ...)                                                                  \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))) static void name##_avx512 parameters {     \
        name(__VA_ARGS__);                                                                                   \
    }                                                                                                        \
    __attribute__((target("avx2,fma"))) static void name##_avx2 parameters { name(__VA_ARGS__); }            \
    static void name##_any parameters { name(__VA_ARGS__); }                                                 \
    void bare_##name parameters {                                                                            \
        static void(*chosen) parameters;                                                                     \
        if (!chosen) {                                                                                       \
            unsigned features = mtl_cpu_features();                                                          \
            chosen = features & MTL_AVX512 ? name##_avx512 : features & MTL_AVX2 ? name##_avx2 : name##_any; \
        }                                                                                                    \
        chosen(__VA_ARGS__);                                                                                 \
    }
#else
#define FOR_EACH_ISA(name, parameters, ...) \
    void bare_##name parameters { name(__VA_ARGS__); }
#endif

FOR_EACH_ISA(rms_norm, (size_t length, const float *x, const float *weight, float eps, float *out), length, x, weight,
             eps, out)
FOR_EACH_ISA(add_rms_norm,
             (size_t length, const float *x, const float *residual, const float *weight, float eps, float *sum,
              float *out),
             length, x, residual, weight, eps, sum, out)
FOR_EACH_ISA(layer_norm, (size_t length, const float *x, const float *weight, const float *bias, float eps, float *out),
             length, x, weight, bias, eps, out)
FOR_EACH_ISA(soft_sign, (size_t length, const float *x, float *out), length, x, out)
FOR_EACH_ISA(swiglu, (size_t length, const float *gate, const float *up, float *out), length, gate, up, out)
