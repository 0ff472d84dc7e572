// rms_norm, layer_norm, and the two after an addition: a row at a time. SPDX-License-Identifier: MIT
//
//   rms_norm:   y = x / sqrt(mean(x^2) + eps) * weight
//   layer_norm: y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias
//
// The fast kernel keeps a row in registers: one read and one write of each byte. A row belongs to a warp or to a block,
// so that its sums need few steps and many rows are in flight. layer_norm takes deviations from a pivot, the row's
// first element, so that a large mean is gone before it can cost digits, and sums them and their squares in one
// reduction. Where that element lies more than two deviations from the mean, taking it away costs digits in its turn:
// then the mean found becomes the pivot, and the sums are taken again.
//
// Where squares would leave float32's range, the row is first multiplied by a power of two, which is exact and cancels.
//
// The general kernel takes any strides, lengths and dtypes, reads a row again for each sum, and adds in double.
#pragma once

#include "cuda/device.cuh"

enum { X, OUT, RESIDUAL, SUM }; // operands of the loop

// A thread has VECTORS vectors of a row: as they came, which takes half the registers, or as sums with a residual,
// unrounded.
template <typename T, int VECTORS, bool LAYER, bool ADD> __device__ inline void norm_row(const mtl_cuda_norm_args &p) {
    constexpr int N = LANES<T>;
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= p.rows.count) return; // only where a row is a warp
    Offsets at = offsets_at(p.rows, row);
    wait_for_earlier();
    int vectors = (int)(p.length / N);
    auto inside = [&](int i) { return (int)(i * blockDim.x + threadIdx.x) < vectors; };
    auto place = [&](int i) { return (int)(i * blockDim.x + threadIdx.x) * 16; };

    uint4 raw[VECTORS];
    // Weights and biases are on their way while the row is summed; those of layer_norm's many vectors, whose registers
    // would leave too few rows on their way, while the vector before is finished.
    constexpr bool EARLY = !LAYER || VECTORS < 4;
    uint4 weights[VECTORS], biases[VECTORS];
    bool typed = p.weight.data && p.weight.dtype == Element<T>::dtype;
    bool typed_bias = LAYER && p.bias.data && p.bias.dtype == Element<T>::dtype;
    auto fetch = [&](int i) {
        weights[i] = typed && inside(i) ? *(const uint4 *)(p.weight.data + place(i)) : make_uint4(0, 0, 0, 0);
        biases[i] = typed_bias && inside(i) ? *(const uint4 *)(p.bias.data + place(i)) : make_uint4(0, 0, 0, 0);
    };
    float sums[ADD ? VECTORS : 1][N], pivot = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
        raw[i] = inside(i) ? load_16_bytes(p.x.data + at.of[X] + place(i)) : make_uint4(0, 0, 0, 0);
    if constexpr (ADD) {
        uint4 added[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            added[i] = inside(i) ? load_16_bytes(p.residual.data + at.of[RESIDUAL] + place(i)) : make_uint4(0, 0, 0, 0);
        let_next_start();
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            float y[N];
            widen(sums[i], raw[i], T());
            widen(y, added[i], T());
#pragma unroll
            for (int j = 0; j < N; j++) sums[i][j] += y[j];
            if (inside(i)) store_16_bytes(p.sum.data + at.of[SUM] + place(i), narrow(sums[i], T()));
        }
    }
    if constexpr (!ADD) let_next_start();
    if constexpr (EARLY) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) fetch(i);
    }
    auto read = [&](float *x, int i) { // less the pivot
        if constexpr (!ADD) widen(x, raw[i], T());
#pragma unroll
        for (int j = 0; j < N; j++) {
            if constexpr (ADD) x[j] = sums[i][j];
            if constexpr (LAYER) x[j] -= pivot;
        }
    };

    float per_length = 1 / (float)p.length, eps = (float)p.eps, mean = 0, variance, scale = 1;
    if constexpr (LAYER) {
        // The sum may lie where an input was: what is read there is read once.
        if constexpr (ADD) pivot = of_first_thread(sums[0][0]);
        else pivot = load_float(p.x.data + at.of[X], Element<T>::dtype);
#pragma unroll 1
        for (bool again = false;; again = true) {
            float2 total = {}; // of deviations from the pivot, and of their squares
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                if (!inside(i)) continue;
                float x[N];
                read(x, i);
#pragma unroll
                for (int j = 0; j < N; j++) total.x += x[j], total.y += x[j] * x[j];
            }
            total = over_row<float2, add<float2>, 0>(total);
            mean = total.x * per_length;
            variance = fmaxf(total.y * per_length - mean * mean, 0);
            bool far = mean != 0 && mean * mean >= 4 * variance; // the same for the whole row
            if (again || !far) break;
            pivot += mean;
            if (blockDim.x > WARP) __syncthreads(); // before what over_row shares is written again
            if constexpr (!ADD) { // or the compiler widens before the loop, for which registers are too few
#pragma unroll
                for (int i = 0; i < VECTORS; i++)
                    asm volatile("" : "+r"(raw[i].x), "+r"(raw[i].y), "+r"(raw[i].z), "+r"(raw[i].w));
            }
        }
    } else {
        float total = 0;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            float x[N];
            read(x, i);
#pragma unroll
            for (int j = 0; j < N; j++) total += x[j] * x[j];
        }
        variance = over_row<float, add<float>, 0>(total) * per_length;
    }

    if (!(variance + eps > 1e-25f && variance + eps < 1e30f)) { // the same for the whole row
        float largest = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            float x[N];
            read(x, i);
#pragma unroll
            for (int j = 0; j < N; j++) largest = larger(inside(i) ? fabsf(x[j]) : 0, largest);
        }
        scale = comfortable_scale(over_row<float, larger, 1>(largest), p.eps);
        eps = (float)(p.eps * scale * scale);
        mean *= scale;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            float x[N];
            read(x, i);
#pragma unroll
            for (int j = 0; j < N; j++) {
                float deviation = x[j] * scale - mean;
                squares += inside(i) ? deviation * deviation : 0;
            }
        }
        variance = over_row<float, add<float>, 2>(squares) * per_length;
    }
    float inverse = rsqrtf(variance + eps);
    float weight[N], bias[N];
    auto finish = [&](int i, bool weighted, bool biased) {
        float x[N];
        read(x, i);
#pragma unroll
        for (int j = 0; j < N; j++) {
            x[j] = (x[j] * scale - mean) * inverse;
            if (weighted) x[j] *= weight[j];
            if (biased) x[j] += bias[j];
        }
        store_16_bytes(p.out.data + at.of[OUT] + place(i), narrow(x, T()));
    };
    if (!EARLY && typed && typed_bias) {
        fetch(0);
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (i + 1 < VECTORS) fetch(i + 1);
            if (!inside(i)) continue;
            widen(weight, weights[i], T());
            widen(bias, biases[i], T());
            finish(i, true, true);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
        if (!inside(i)) continue;
        int64_t first = (int64_t)(i * blockDim.x + threadIdx.x) * N;
        if (EARLY && typed) widen(weight, weights[i], T());
        else if (p.weight.data) load_vector<T>(weight, p.weight, first);
        if (EARLY && typed_bias) widen(bias, biases[i], T());
        else if (LAYER && p.bias.data) load_vector<T>(bias, p.bias, first);
        finish(i, p.weight.data, LAYER && p.bias.data);
    }
}

template <bool LAYER> __device__ inline void norm_any(const mtl_cuda_norm_args &p) {
    wait_for_earlier();
    let_next_start();
    for (int64_t row = blockIdx.x; row < p.rows.count; row += gridDim.x) {
        Offsets at = offsets_at(p.rows, row);
        auto element = [&](int64_t i) {
            float x = load_float(p.x.data + at.of[X] + i * p.x.stride, p.x.dtype);
            if (p.residual.data)
                x += load_float(p.residual.data + at.of[RESIDUAL] + i * p.residual.stride, p.residual.dtype);
            return x;
        };
        double mean = 0, squares = 0;
        if (LAYER) {
            for (int64_t i = threadIdx.x; i < p.length; i += blockDim.x) mean += element(i);
            mean = over_row<double, add<double>, 0>(mean) / (double)p.length;
        }
        for (int64_t i = threadIdx.x; i < p.length; i += blockDim.x) {
            double deviation = element(i) - mean;
            squares += deviation * deviation;
        }
        squares = over_row<double, add<double>, 1>(squares);
        double inverse = 1 / sqrt(squares / (double)p.length + p.eps);
        for (int64_t i = threadIdx.x; i < p.length; i += blockDim.x) {
            float x = element(i), y = (float)((x - mean) * inverse);
            if (p.weight.data) y *= load_float(p.weight.data + i * p.weight.stride, p.weight.dtype);
            if (LAYER && p.bias.data) y += load_float(p.bias.data + i * p.bias.stride, p.bias.dtype);
            if (p.residual.data) store_float(p.sum.data + at.of[SUM] + i * p.sum.stride, p.sum.dtype, x);
            store_float(p.out.data + at.of[OUT] + i * p.out.stride, p.out.dtype, y);
        }
        __syncthreads();
    }
}

// Symbols: <op>_<dtype>_<vectors>, add_<op>_..., and <op>_any; norm.c names them in this order. Blocks have at most 512
// threads, and with four vectors a thread 64 registers: eight times 128 threads keep an H200's memory busy.
#define NORM_KERNEL(name, layer, added, type, vectors)                                \
    extern "C" __global__ void __launch_bounds__(512, !added && vectors <= 4 ? 2 : 1) \
        name(const __grid_constant__ mtl_cuda_norm_args p) {                          \
        norm_row<type, vectors, layer, added>(p);                                     \
    }
#define NORM_KERNELS(op, layer, dtype, type)                  \
    NORM_KERNEL(op##_##dtype##_1, layer, false, type, 1)      \
    NORM_KERNEL(op##_##dtype##_2, layer, false, type, 2)      \
    NORM_KERNEL(op##_##dtype##_4, layer, false, type, 4)      \
    NORM_KERNEL(op##_##dtype##_8, layer, false, type, 8)      \
    NORM_KERNEL(add_##op##_##dtype##_1, layer, true, type, 1) \
    NORM_KERNEL(add_##op##_##dtype##_2, layer, true, type, 2) \
    NORM_KERNEL(add_##op##_##dtype##_4, layer, true, type, 4) \
    NORM_KERNEL(add_##op##_##dtype##_8, layer, true, type, 8)
#define NORM_IMAGE(op, layer)                                                                                  \
    NORM_KERNELS(op, layer, f32, float)                                                                        \
    NORM_KERNELS(op, layer, f16, __half)                                                                       \
    NORM_KERNELS(op, layer, bf16, __nv_bfloat16)                                                               \
    extern "C" __global__ void __launch_bounds__(256) op##_any(const __grid_constant__ mtl_cuda_norm_args p) { \
        norm_any<layer>(p);                                                                                    \
    }
