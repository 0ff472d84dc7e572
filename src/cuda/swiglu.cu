// silu(gate) * up, silu(x) = x / (1 + exp(-x)). SPDX-License-Identifier: MIT
//
// With e = exp(-|x|), which cannot overflow, silu(x) = x / (1 + e) for x >= 0 and x e / (1 + e) below. At -infinity the
// limit is 0.
#include "cuda/gated.cuh"

template <bool FAST> __device__ inline float silu(float x) {
    float magnitude = -fabsf(x), e = FAST ? __expf(magnitude) : expf(magnitude);
    float y = (x < 0 ? x * e : x) * (FAST ? __fdividef(1, 1 + e) : 1 / (1 + e));
    return x == -INFINITY ? -0.0f : y;
}

GATED_KERNELS(swiglu, silu<false>, silu<true>)
