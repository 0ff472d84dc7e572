/* gelu(gate) * up. SPDX-License-Identifier: MIT
 *
 *   erf:  gelu(x) = x/2 erfc(-x / sqrt 2); for x > 0 as x - x/2 erfc(x / sqrt 2), so that erfc never comes near 2
 *   tanh: gelu(x) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3) */
#include "cpu/simd/math.h"

INLINE vec activation(vec x, bool tanh) {
    x = vec_max(vec_set((real)-1e18), x); /* -infinity would meet 0 */
    if (tanh) {
        vec cubed = vec_fma(x * x, x * vec_set((real)0.044715), x);
        return x / (vec_set(1) + vec_exp(cubed * vec_set((real)-0x1.9884533d43651p0)));
    }
    vec bounded = vec_min(vec_set((real)1e18), x); /* so would infinity */
    vec tail = bounded * vec_set((real)0.5) * vec_erfc_scaled(vec_abs(bounded));
    return vec_select(x > vec_zero(), x - tail, tail);
}

#include "cpu/simd/gated.h"

void SIMD(geglu)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_gated_args *args = arguments;
    if (args->tanh) gated_items(args, begin, end, scratch, true);
    else gated_items(args, begin, end, scratch, false);
}
