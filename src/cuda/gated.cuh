// act(gate) * up, element by element: two reads and a write, nothing else. SPDX-License-Identifier: MIT
//
// A block does VECTORS * blockDim vectors of one row in a go, all its loads before the first use. `act` is accurate for
// float and may use the special function unit for 16-bit types, whose rounding covers it.
#pragma once

#include "cuda/device.cuh"

enum { GATE, UP, OUT }; // operands of the loop

constexpr int GATED_VECTORS = 1; // of a thread, as in gated.c

// The product, or for an infinite `up` infinity: an act(gate) below float's range is then no 0, which would give NaN.
__device__ inline float beside_infinity(float product, float gate, float up) {
    bool infinite = (isinf(up) & (gate != 0)) & (fabsf(gate) < INFINITY);
    return infinite ? __uint_as_float(__float_as_uint(up) ^ (__float_as_uint(gate) & 0x80000000u)) : product;
}

template <typename T, float (*act)(float)> __device__ inline void gated_rows(const mtl_cuda_gated_args &p) {
    constexpr int N = LANES<T>;
    Offsets at = offsets_at(p.rows, p.first_row + blockIdx.y);
    int64_t first = (int64_t)blockIdx.x * GATED_VECTORS * blockDim.x + threadIdx.x, vectors = p.length / N;
    wait_for_earlier();
    let_next_start();
    uint4 gate[GATED_VECTORS], up[GATED_VECTORS];
#pragma unroll
    for (int i = 0; i < GATED_VECTORS; i++) {
        int64_t vector = first + i * blockDim.x;
        if (vector >= vectors) continue;
        gate[i] = load_16_bytes(p.gate.data + at.of[GATE] + vector * 16);
        up[i] = load_16_bytes(p.up.data + at.of[UP] + vector * 16);
    }
#pragma unroll
    for (int i = 0; i < GATED_VECTORS; i++) {
        int64_t vector = first + i * blockDim.x;
        if (vector >= vectors) continue;
        float g[N], u[N], largest = 0;
        widen(g, gate[i], T());
        widen(u, up[i], T());
#pragma unroll
        for (int j = 0; j < N; j++) largest = fmaxf(largest, fabsf(u[j]));
        if (largest < INFINITY) {
#pragma unroll
            for (int j = 0; j < N; j++) g[j] = act(g[j]) * u[j];
        } else {
#pragma unroll
            for (int j = 0; j < N; j++) g[j] = beside_infinity(act(g[j]) * u[j], g[j], u[j]);
        }
        store_16_bytes(p.out.data + at.of[OUT] + vector * 16, narrow(g, T()));
    }
}

// Any strides, dtypes and lengths.
template <float (*act)(float)> __device__ inline void gated_any(const mtl_cuda_gated_args &p) {
    Offsets at = offsets_at(p.rows, p.first_row + blockIdx.y);
    int64_t stride = (int64_t)gridDim.x * blockDim.x;
    wait_for_earlier();
    let_next_start();
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.length; i += stride) {
        float gate = load_float(p.gate.data + at.of[GATE] + i * p.gate.stride, p.gate.dtype);
        float up = load_float(p.up.data + at.of[UP] + i * p.up.stride, p.up.dtype);
        store_float(p.out.data + at.of[OUT] + i * p.out.stride, p.out.dtype, beside_infinity(act(gate) * up, gate, up));
    }
}

#define GATED_KERNEL(name, type, act)                                                                       \
    extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ mtl_cuda_gated_args p) { \
        gated_rows<type, act>(p);                                                                           \
    }
#define GATED_KERNELS(op, accurate, fast)                                                                       \
    GATED_KERNEL(op##_f32, float, accurate)                                                                     \
    GATED_KERNEL(op##_f16, __half, fast)                                                                        \
    GATED_KERNEL(op##_bf16, __nv_bfloat16, fast)                                                                \
    extern "C" __global__ void __launch_bounds__(256) op##_any(const __grid_constant__ mtl_cuda_gated_args p) { \
        gated_any<accurate>(p);                                                                                 \
    }
