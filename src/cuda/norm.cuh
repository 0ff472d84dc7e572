// rms_norm, layer_norm, and the two after an addition: a row at a time. SPDX-License-Identifier: MIT
//
//   rms_norm:   y = x / sqrt(mean(x^2) + eps) * weight
//   layer_norm: y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias
//
// The fast kernel keeps a row in registers: one read and one write of each byte. A row belongs to a warp or to a block,
// so that its sums need few steps and many rows are in flight. layer_norm sums elements and their squares in one
// reduction. Where the mean found lies more than two deviations from 0, squares of elements cost digits: then the sums
// are taken again, of deviations from that mean.
//
// On an H200 what limits is no longer memory alone: a row's way from its reading to its writing, some 250 to 600
// instructions a warp, keeps the multiprocessor half busy, and a row that waits holds registers that the next one needs.
// So addresses are few, weights arrive before they are needed, and what is rare reads memory again.
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
    if (row >= p.rows.count) return; // never a part of a block that sums over it
    Offsets at = offsets_at(p.rows, row);
    wait_for_earlier();
    const char *x_row = p.x.data + at.of[X];
    char *out_row = p.out.data + at.of[OUT];
    unsigned vectors = (unsigned)p.length / N;
    auto inside = [&](int i) { return threadIdx.x + i * blockDim.x < vectors; };
    auto place = [&](auto *row, int i) { return row + (threadIdx.x + i * blockDim.x) * 16; };

    uint4 raw[VECTORS];
    // Weights and biases of x's dtype are on their way while the row is summed; of layer_norm's many vectors not all, whose
    // registers would leave too few rows on their way.
    constexpr int AHEAD = LAYER && VECTORS > 2 ? 2 : VECTORS;
    uint4 weights[VECTORS] = {}, biases[VECTORS] = {};
    bool usual = p.weight.data && p.weight.dtype == Element<T>::dtype;
    usual = usual && (!LAYER || (p.bias.data && p.bias.dtype == Element<T>::dtype));
    auto fetch = [&](int i) {
        if (!usual || !inside(i)) return;
        weights[i] = *(const uint4 *)place(p.weight.data, i);
        if (LAYER) biases[i] = *(const uint4 *)place(p.bias.data, i);
    };
    float sums[ADD ? VECTORS : 1][N], pivot = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; i++) raw[i] = inside(i) ? load_16_bytes(place(x_row, i)) : make_uint4(0, 0, 0, 0);
    if constexpr (ADD) {
        uint4 added[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
            added[i] = inside(i) ? load_16_bytes(place(p.residual.data + at.of[RESIDUAL], i)) : make_uint4(0, 0, 0, 0);
        let_next_start();
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            float y[N];
            widen(sums[i], raw[i], T());
            widen(y, added[i], T());
#pragma unroll
            for (int j = 0; j < N; j++) sums[i][j] += y[j];
            if (inside(i)) store_16_bytes(place(p.sum.data + at.of[SUM], i), narrow(sums[i], T()));
        }
    }
    if constexpr (!ADD) let_next_start();
#pragma unroll
    for (int i = 0; i < AHEAD; i++) fetch(i);
    auto read = [&](float *x, int i, bool far) { // less the pivot where the mean is far from 0
        if constexpr (!ADD) widen(x, raw[i], T());
#pragma unroll
        for (int j = 0; j < N; j++) {
            if constexpr (ADD) x[j] = sums[i][j];
            if (LAYER && far) x[j] -= pivot;
        }
    };

    // What is rare takes every element of the thread less the pivot: again from memory where that has it, so that it
    // costs the usual way neither registers nor instructions.
    auto each = [&](auto &&one) {
        if constexpr (ADD) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                if (!inside(i)) continue;
#pragma unroll
                for (int j = 0; j < N; j++) one(0, sums[i][j] - pivot);
            }
        } else {
#pragma unroll 1
            for (int64_t i = threadIdx.x * N; i < p.length; i += blockDim.x * N) {
#pragma unroll 1
                for (int64_t j = i; j < i + N; j++)
                    one(j, load_float(x_row + j * sizeof(T), Element<T>::dtype) - pivot);
            }
        }
    };
    float per_length = p.per_length, eps = p.eps_in_float, mean = 0, variance;
    if constexpr (LAYER) {
        auto sum = [&](bool far) { // of deviations from the pivot, and of their squares
            float2 total = {};
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
                if (!inside(i)) continue;
                float x[N];
                read(x, i, far);
#pragma unroll
                for (int j = 0; j < N; j++) total.x += x[j], total.y += x[j] * x[j];
            }
            return total;
        };
        auto set = [&](float2 total) {
            mean = total.x * per_length;
            variance = larger(total.y * per_length - mean * mean, 0);
        };
        set(over_row<float2, add<float2>, 0>(sum(false)));
        if (mean != 0 && mean * mean >= 4 * variance) { // the same for the whole row
            float x[N]; // a row of equal elements shall lose nothing to the rounding of its mean
            read(x, 0, false);
            float first = over_row<float, add<float>, 5>(threadIdx.x == 0 ? x[0] : 0);
            pivot = fabsf(first - mean) <= 1e-5f * fabsf(mean) ? first : mean;
            set(over_row<float2, add<float2>, 3>(sum(true)));
        }
    } else {
        float total = 0;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            float x[N];
            read(x, i, false);
#pragma unroll
            for (int j = 0; j < N; j++) total += x[j] * x[j];
        }
        variance = over_row<float, add<float>, 0>(total) * per_length;
    }

    if (!(variance + eps > 1e-25f && variance + eps < 1e30f)) { // the same for the whole row
        float largest = 0, squares = 0;
        each([&](int64_t, float x) { largest = larger(fabsf(x), largest); });
        float scale = comfortable_scale(over_row<float, larger, 1>(largest), p.eps);
        if constexpr (LAYER) {
            mean = 0;
            each([&](int64_t, float x) { mean += x * scale; });
            mean = over_row<float, add<float>, 4>(mean) * per_length;
        }
        each([&](int64_t, float x) {
            float deviation = x * scale - mean;
            squares += deviation * deviation;
        });
        variance = over_row<float, add<float>, 2>(squares) * per_length;
        eps = (float)(p.eps * scale * scale);
        if constexpr (ADD) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) {
#pragma unroll
                for (int j = 0; j < N; j++) sums[i][j] = (sums[i][j] - pivot) * scale;
            }
            pivot = 0;
        } else {
            float inverse = rsqrtf(variance + eps);
            each([&](int64_t i, float x) {
                float y = (x * scale - mean) * inverse;
                if (p.weight.data) y *= load_float(p.weight.data + i * p.weight.stride, p.weight.dtype);
                if (LAYER && p.bias.data) y += load_float(p.bias.data + i * p.bias.stride, p.bias.dtype);
                store_float(out_row + i * sizeof(T), Element<T>::dtype, y);
            });
            return;
        }
    }
    float inverse = rsqrtf(variance + eps), shift = -mean * inverse;
    auto finish = [&](bool usual, bool far) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            if (inside(i)) {
                float x[N], weight[N], bias[N];
                if (usual) {
                    widen(weight, weights[i], T());
                    if (LAYER) widen(bias, biases[i], T());
                } else {
                    int64_t first = (int64_t)(i * blockDim.x + threadIdx.x) * N;
                    load_vector<T>(weight, p.weight, first, 1);
                    load_vector<T>(bias, p.bias, first, 0);
                }
                read(x, i, far);
#pragma unroll
                for (int j = 0; j < N; j++) {
                    x[j] = LAYER ? fmaf(x[j], inverse, shift) : x[j] * inverse;
                    x[j] = LAYER ? fmaf(x[j], weight[j], bias[j]) : x[j] * weight[j];
                }
                store_16_bytes(place(out_row, i), narrow(x, T()));
            }
            if (usual && i + AHEAD < VECTORS) fetch(i + AHEAD);
        }
    };
    bool far = LAYER && pivot != 0;
    if (usual && !far) finish(true, false);
    else if (usual) finish(true, true);
    else finish(false, true);
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
// threads; six times 256 of two vectors with 40 registers, or eight times 128 of four with 64, keep an H200's memory busy.
#define NORM_BLOCKS(layer, added, vectors) ((added) || (vectors) > 4 ? 1 : (layer) || (vectors) > 2 ? 2 : 3)
#define NORM_KERNEL(name, layer, added, type, vectors)                                    \
    extern "C" __global__ void __launch_bounds__(512, NORM_BLOCKS(layer, added, vectors)) \
        name(const __grid_constant__ mtl_cuda_norm_args p) {                              \
        norm_row<type, vectors, layer, added>(p);                                         \
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
