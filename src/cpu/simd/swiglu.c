/* silu(gate) * up, silu(x) = x / (1 + exp(-x)). SPDX-License-Identifier: MIT
 *
 * With e = exp(x), silu(x) = x e / (1 + e): for large negative x, where e counts, it is small, and no digit is lost to 1. x is kept where e
 * neither overflows nor silu has anything left: above 64 the quotient is 1, below -110 e is 0, and 0 the result, -infinity's too. */
#include "cpu/simd/math.h"

/* Down to the smallest subnormal, which is where silu ends. */
#ifdef VEC_HAS_SCALE
#define exp_to_the_end vec_exp_of_softmax
#else
#define exp_to_the_end vec_exp
#endif

#ifdef MTL_IN_DOUBLE
#define LOWEST (-750.)
#else
#define LOWEST (-110.f)
#endif

INLINE vec activation(vec x, bool unused, bool narrow) {
    (void)unused;
    vec bounded = vec_max(vec_set(LOWEST), x), power = vec_min(vec_set(64), bounded);
    if (narrow) {
        vec e = vec_exp2_narrow(power * vec_set(LOG2_E));
        return bounded * (e * vec_reciprocal(vec_set(1) + e));
    }
    vec e = exp_to_the_end(power);
    return bounded * (e * vec_reciprocal(vec_set(1) + e));
}

#include "cpu/simd/gated.h"

void SIMD(swiglu)(const void *args, int64_t begin, int64_t end, void *scratch) {
    gated_items(args, begin, end, scratch, false);
}
