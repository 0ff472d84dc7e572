/* silu(gate) * up, silu(x) = x / (1 + exp(-x)). SPDX-License-Identifier: MIT
 *
 * exp(-x) is infinity for x below -89, and x / infinity the right 0; -infinity is moved to where that holds for it too. */
#include "cpu/simd/math.h"

INLINE vec activation(vec x, bool unused) {
    (void)unused;
    return vec_max(vec_set((real)-1e30), x) / (vec_set(1) + vec_exp(-x));
}

#include "cpu/simd/gated.h"

void SIMD(swiglu)(const void *args, int64_t begin, int64_t end, void *scratch) {
    gated_items(args, begin, end, scratch, false);
}
