// loss = logsumexp(logits) - logits[target], a row to a block. SPDX-License-Identifier: MIT
//
// One read: every thread carries its largest logit m and rest = sum of exp(x - m) over its other logits, and a larger m
// rescales the rest (Milakov & Gimelshein 2018, arXiv:1805.02867). The loss is (m - logits[target]) + log1p(rest): the
// term of m itself is 1 and stays out of the sum, as a confident row's loss is what lies beside that 1. To keep it out
// without a search, the logits of a batch pass m one after the other: the larger of the two stays as m, the smaller
// goes on. A thread's next vectors are on their way while it takes these.
#include "cuda/device.cuh"

enum { LOGITS, TARGETS, LOSS }; // operands of the loop

// The largest of some logits, and the sum of exp(x - largest) over the others. Before the first logit: {-infinity, 0}.
struct Partial {
    float largest, rest;

    __device__ static float exp_of(float x, float largest) { return power_of_2((x - largest) * LOG2_E); }

    template <int N> __device__ void take(float *x) {
        float before = largest, sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) {
            float passed = x[i];
            x[i] = smaller(passed, largest);
            largest = larger(passed, largest);
        }
        if (largest == -INFINITY) return; // infinity - infinity would be NaN
#pragma unroll
        for (int i = 0; i < N; i++) sum += exp_of(x[i], largest);
        // x holds `before` too where it was passed by; otherwise the one that is not in x is `largest` itself.
        rest = rest * exp_of(before, largest) + sum;
    }

    __device__ void take(Partial other) {
        float low = smaller(largest, other.largest), high = larger(largest, other.largest);
        if (high == -INFINITY) return;
        float factor = exp_of(low, high);
        rest = largest >= other.largest ? rest + (1 + other.rest) * factor : other.rest + (1 + rest) * factor;
        largest = high;
    }
};

template <typename T> __device__ inline void take_vectors(Partial &partial, const char *row, int vectors) {
    constexpr int N = LANES<T>, VECTORS = 4; // on their way while as many are taken
    constexpr unsigned none = sizeof(T) == 4             ? 0xff800000
                              : Element<T>::dtype == F16 ? 0xfc00fc00
                                                         : 0xff80ff80; // -infinity
    auto fetch = [&](uint4(&raw)[VECTORS], int first) {
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
            int vector = first + i * blockDim.x;
            raw[i] = vector < vectors ? load_16_bytes(row + (int64_t)vector * 16) : make_uint4(none, none, none, none);
        }
    };
    uint4 raw[VECTORS], next[VECTORS];
    fetch(raw, threadIdx.x);
    for (int first = threadIdx.x; first < vectors;) {
        first += VECTORS * blockDim.x;
        fetch(next, first);
#pragma unroll
        for (int i = 0; i < VECTORS; i += 2) {
            float x[2 * N];
            widen(x, raw[i], T());
            widen(x + N, raw[i + 1], T());
            partial.take<2 * N>(x);
        }
#pragma unroll
        for (int i = 0; i < VECTORS; i++) raw[i] = next[i];
    }
}

// T: the logits' dtype, their elements side by side; void: any dtype and stride.
template <typename T> __device__ inline void cross_entropy_row(const mtl_cuda_cross_entropy_args &p) {
    Offsets at = offsets_at(p.rows, blockIdx.x);
    wait_for_earlier();
    let_next_start();
    const char *logits = p.logits.data + at.of[LOGITS];
    int64_t target = load_integer(p.targets.data + at.of[TARGETS], p.targets.dtype);
    char *loss = p.loss.data + at.of[LOSS];
    bool ignored = p.has_ignore_index && target == p.ignore_index, refused = target < 0 || target >= p.classes;
    if (ignored || refused) {
        if (threadIdx.x == 0) store_float(loss, p.loss.dtype, ignored ? 0 : NAN);
        return;
    }
    float chosen = threadIdx.x == 0 ? load_float(logits + target * p.logits.stride, p.logits.dtype) : 0;

    Partial partial = {-INFINITY, 0};
    auto take_single = [&](int64_t i) {
        float x[1] = {load_float(logits + i * p.logits.stride, p.logits.dtype)};
        partial.take<1>(x);
    };
    if constexpr (sizeof(T) == 1) {
        for (int64_t i = threadIdx.x; i < p.classes; i += blockDim.x) take_single(i);
    } else {
        // A row may start anywhere: singly up to the first 16-byte boundary and after the last.
        int64_t before = (16 - (int64_t)((uintptr_t)logits & 15)) % 16 / (int64_t)sizeof(T);
        if (before > p.classes) before = p.classes;
        int64_t vectors = (p.classes - before) / LANES<T>;
        take_vectors<T>(partial, logits + before * sizeof(T), (int)vectors);
        int64_t after = before + vectors * LANES<T>, singles = before + p.classes - after;
        if (threadIdx.x < singles) take_single(threadIdx.x < before ? threadIdx.x : after + (threadIdx.x - before));
    }

#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) {
        Partial other = {__shfl_xor_sync(ALL_LANES, partial.largest, lane),
                         __shfl_xor_sync(ALL_LANES, partial.rest, lane)};
        partial.take(other);
    }
    __shared__ Partial of_warp[WARP];
    int warps = blockDim.x / WARP;
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = partial;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < warps; warp++) partial.take(of_warp[warp]);
    // Beside an infinite logit every other has the weight 0.
    float rest = partial.largest == INFINITY ? 0 : partial.rest;
    store_float(loss, p.loss.dtype, (partial.largest - chosen) + log1pf(rest));
}

#define CROSS_ENTROPY_KERNEL(name, type)                                                                               \
    extern "C" __global__ void __launch_bounds__(256, 4) name(const __grid_constant__ mtl_cuda_cross_entropy_args p) { \
        cross_entropy_row<type>(p);                                                                                    \
    }
CROSS_ENTROPY_KERNEL(cross_entropy_f32, float)
CROSS_ENTROPY_KERNEL(cross_entropy_f16, __half)
CROSS_ENTROPY_KERNEL(cross_entropy_bf16, __nv_bfloat16)
CROSS_ENTROPY_KERNEL(cross_entropy_any, char)
