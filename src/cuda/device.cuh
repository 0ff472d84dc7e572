// What every kernel needs: dtypes, 16-byte vectors, loops over strided operands, sums over threads.
// SPDX-License-Identifier: MIT
#pragma once

#include "cuda/arguments.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// By value those of core/dtype.h.
enum Dtype { F32, F16, BF16, F64, BOOL, I8, I16, I32, I64, U8, U16, U32, U64 };

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// ---- launches that overlap: mtl_cuda_grid.overlaps

// What the stream had before is done, and its memory is seen.
__device__ inline void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next launch may take the places that this one leaves, once all blocks have come here or are done.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- elements of any dtype

__device__ inline float load_float(const char *at, int dtype) {
    switch (dtype) {
    case F32: return *(const float *)at;
    case F16: return __half2float(*(const __half *)at);
    case BF16: return __bfloat162float(*(const __nv_bfloat16 *)at);
    case F64: return (float)*(const double *)at;
    case I8: return *(const int8_t *)at;
    case I16: return *(const int16_t *)at;
    case I32: return (float)*(const int32_t *)at;
    case I64: return (float)*(const int64_t *)at;
    case U16: return *(const uint16_t *)at;
    case U32: return (float)*(const uint32_t *)at;
    case U64: return (float)*(const uint64_t *)at;
    case BOOL: return *(const uint8_t *)at != 0;
    default: return *(const uint8_t *)at;
    }
}

__device__ inline double load_double(const char *at, int dtype) {
    switch (dtype) {
    case F64: return *(const double *)at;
    case I32: return *(const int32_t *)at;
    case I64: return (double)*(const int64_t *)at;
    case U32: return *(const uint32_t *)at;
    case U64: return (double)*(const uint64_t *)at;
    default: return load_float(at, dtype);
    }
}

__device__ inline int64_t load_integer(const char *at, int dtype) {
    switch (dtype) {
    case I8: return *(const int8_t *)at;
    case I16: return *(const int16_t *)at;
    case I32: return *(const int32_t *)at;
    case I64: return *(const int64_t *)at;
    case U16: return *(const uint16_t *)at;
    case U32: return *(const uint32_t *)at;
    case U64: return *(const uint64_t *)at > INT64_MAX ? INT64_MAX : (int64_t) * (const uint64_t *)at;
    case BOOL: return *(const uint8_t *)at != 0;
    default: return *(const uint8_t *)at;
    }
}

__device__ inline void store_float(char *at, int dtype, float x) {
    if (dtype == F32) *(float *)at = x;
    else if (dtype == F16) *(__half *)at = __float2half_rn(x);
    else *(__nv_bfloat16 *)at = __float2bfloat16_rn(x);
}

// ---- sixteen bytes at once

template <typename T> struct Element;
template <> struct Element<float> { static constexpr int dtype = F32; };
template <> struct Element<__half> { static constexpr int dtype = F16; };
template <> struct Element<__nv_bfloat16> { static constexpr int dtype = BF16; };

template <typename T> constexpr int LANES = 16 / sizeof(T);

// As assembly so that loads stay together, before the first use of any. Without a hint: not to allocate in the
// first-level cache made streams on Hopper slower, by 1 to 3 %.
__device__ inline uint4 load_16_bytes(const void *at) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}
__device__ inline void store_16_bytes(void *at, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ inline void widen(float *to, uint4 v, float) {
    to[0] = __uint_as_float(v.x), to[1] = __uint_as_float(v.y), to[2] = __uint_as_float(v.z),
    to[3] = __uint_as_float(v.w);
}
__device__ inline void widen(float *to, uint4 v, __nv_bfloat16) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
__device__ inline void widen(float *to, uint4 v, __half) {
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = __half22float2(*(const __half2 *)&words[i]);
        to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
    }
}

__device__ inline uint4 narrow(const float *from, float) {
    return make_uint4(__float_as_uint(from[0]), __float_as_uint(from[1]), __float_as_uint(from[2]),
                      __float_as_uint(from[3]));
}
__device__ inline float2 widen_pair(unsigned pair, __half) { return __half22float2(*(const __half2 *)&pair); }
__device__ inline float2 widen_pair(unsigned pair, __nv_bfloat16) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
__device__ inline unsigned narrow_pair(float low, float high, __nv_bfloat16) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *(unsigned *)&pair;
}
__device__ inline unsigned narrow_pair(float low, float high, __half) {
    __half2 pair = __floats2half2_rn(low, high);
    return *(unsigned *)&pair;
}
template <typename T> __device__ inline uint4 narrow(const float *from, T t) {
    return make_uint4(narrow_pair(from[0], from[1], t), narrow_pair(from[2], from[3], t),
                      narrow_pair(from[4], from[5], t), narrow_pair(from[6], from[7], t));
}

// LANES<T> elements of a contiguous row of W, aligned to 16 bytes, from element `first` on.
template <typename T, typename W> __device__ inline void load_lanes(float *to, const char *row, int64_t first) {
    const char *at = row + first * (int64_t)sizeof(W);
    if constexpr (sizeof(W) < sizeof(T)) {
        uint2 v = *(const uint2 *)at;
        float2 low = widen_pair(v.x, W()), high = widen_pair(v.y, W());
        to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
    } else {
#pragma unroll
        for (int i = 0; i < LANES<T> / LANES<W>; i++) widen(to + i * LANES<W>, ((const uint4 *)at)[i], W());
    }
}
// Of any floating dtype but float64, or `absent` ones.
template <typename T>
__device__ inline void load_vector(float *to, const mtl_cuda_row &row, int64_t first, float absent) {
    if (row.data && row.dtype == F32) return load_lanes<T, float>(to, row.data, first);
    if (row.data && row.dtype == F16) return load_lanes<T, __half>(to, row.data, first);
    if (row.data) return load_lanes<T, __nv_bfloat16>(to, row.data, first);
#pragma unroll
    for (int i = 0; i < LANES<T>; i++) to[i] = absent;
}

// ---- loops

// Quotient and remainder, by 32 bits where they do: a division of 64 bits takes as long as a read from memory.
__device__ inline int64_t divide(int64_t a, int64_t b, int64_t &remainder) {
    if ((a | b) >> 32 == 0) {
        unsigned quotient = (unsigned)a / (unsigned)b;
        remainder = (unsigned)a - quotient * (unsigned)b;
        return quotient;
    }
    int64_t quotient = a / b;
    remainder = a - quotient * b;
    return quotient;
}

struct Offsets {
    int64_t of[MTL_CUDA_OPERANDS];
};

__device__ inline Offsets offsets_at(const mtl_cuda_loop &loop, int64_t iteration) {
    Offsets offsets = {};
#pragma unroll 1
    for (int axis = loop.rank - 1; axis > 0; axis--) {
        int64_t index;
        iteration = divide(iteration, loop.shape[axis], index);
#pragma unroll
        for (int i = 0; i < MTL_CUDA_OPERANDS; i++) offsets.of[i] += index * loop.stride[axis][i];
    }
    // Most loops have this axis alone: without a loop it costs few instructions, which blocks of one row feel.
#pragma unroll
    for (int i = 0; i < MTL_CUDA_OPERANDS; i++) offsets.of[i] += iteration * loop.stride[0][i];
    return offsets;
}

// ---- over threads: every thread gets the result, and the order of additions is fixed

template <typename T> __device__ inline T add(T a, T b) { return a + b; }
template <> __device__ inline float2 add(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
// NaN wins, so that it reaches the result.
__device__ inline float larger(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
__device__ inline float smaller(float a, float b) {
    float c;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

constexpr float LOG2_E = 1.44269504f;

// 2^x by the special function unit; what is below float's normal range counts as 0.
__device__ inline float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float2 __shfl_xor_sync(unsigned lanes, float2 x, int lane) {
    return make_float2(__shfl_xor_sync(lanes, x.x, lane), __shfl_xor_sync(lanes, x.y, lane));
}

template <typename T, T (*combine)(T, T)> __device__ inline T over_warp(T x, int width = WARP) {
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) {
        if (lane < width) x = combine(x, __shfl_xor_sync(ALL_LANES, x, lane));
    }
    return x;
}

// Over the threads of a row: the block, of whole warps, or where it is {threads, rows} with a power of two of at most a
// warp's threads, those. To combine anything with T() changes nothing. Each of a kernel's sums has a SLOT of its own and is
// formed once, or with a barrier between.
template <typename T, T (*combine)(T, T), int SLOT> __device__ inline T over_row(T x) {
    if (blockDim.x < WARP) {
        unsigned first = (threadIdx.y * blockDim.x + threadIdx.x) % WARP - threadIdx.x; // lane of the row
        unsigned lanes = ((1u << blockDim.x) - 1) << first; // other rows of the warp may go another way
#pragma unroll 1
        for (int step = blockDim.x / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(lanes, x, step));
        return x;
    }
    x = over_warp<T, combine>(x);
    if (blockDim.x == WARP) return x;
    __shared__ T of_warp[WARP];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    unsigned width = 2u << (31 - __clz(warps - 1)); // of lanes that join them: a power of two
    x = (lane & (width - 1)) < warps ? of_warp[lane & (width - 1)] : T();
#pragma unroll 1
    for (int step = width / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// ---- norms

// The power of two that brings the larger of `largest` and sqrt(eps) near 1.
__device__ inline float comfortable_scale(float largest, double eps) {
    float size = fmaxf(largest, (float)sqrt(eps));
    if (!(size > 0) || isinf(size)) return 1;
    int exponent = ilogbf(size);
    return exponent < -126 ? 0x1p126f : exponent > 126 ? 0x1p-126f : exp2f((float)-exponent);
}
