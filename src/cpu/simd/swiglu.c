/* silu(gate) * up, silu(x) = x / (1 + exp(-x)). SPDX-License-Identifier: MIT
 *
 * With t = exp(-|x|), silu(x) = x / (1 + t) for x >= 0 and x t / (1 + t) below: nothing overflows, and the divisor is in [1, 2].
 * -infinity, which would meet t = 0, is moved to a number that gives the right 0 too. */
#include "cpu/simd/math.h"

/* Down to the smallest subnormal, which is where silu ends. */
#ifdef VEC_HAS_SCALE
#define exp_to_the_end vec_exp_of_softmax
#else
#define exp_to_the_end vec_exp
#endif

INLINE vec activation(vec x, bool unused) {
    (void)unused;
    vec t = exp_to_the_end(-vec_abs(x));
    vec y = vec_max(vec_set((real)-1e30), x) * vec_reciprocal(vec_set(1) + t);
    return vec_select(x < vec_zero(), y * t, y);
}

#include "cpu/simd/gated.h"

void SIMD(swiglu)(const void *args, int64_t begin, int64_t end, void *scratch) {
    gated_items(args, begin, end, scratch, false);
}
