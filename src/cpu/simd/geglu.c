/* gelu(gate) * up. SPDX-License-Identifier: MIT
 *
 *   erf:  gelu(x) = x/2 erfc(-x / sqrt 2); for x > 0 as x - x/2 erfc(x / sqrt 2), so that erfc never comes near 2
 *   tanh: gelu(x) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3), as x / (1 + exp(x (C1 + C3 x^2)))
 *
 * In the tail the exponent is large, and exp makes its rounding error a relative one of the result: the roundings of x^2, of the sum, of
 * the product and of the two constants are put back in to first order. */
#include "cpu/simd/math.h"

#ifdef MTL_IN_DOUBLE
#define C1     (-0x1.9884533d43651p+0)
#define C1_LOW 0x1.cbc0d30ebfd15p-54
#define C3     (-0x1.2444f2a4d8b4bp-4)
#define C3_LOW 0x1.6c843a29d1c70p-61
#else
#define C1     (-0x1.988454p+0f)
#define C1_LOW 0x1.857936p-25f
#define C3     (-0x1.2444f2p-4f)
#define C3_LOW (-0x1.49b16ap-29f)
#endif

INLINE vec gelu_tanh(vec x) {
    vec v = vec_max(vec_set(-32), vec_min(vec_set(32), x)); /* beyond, exp is 0 or infinity */
    vec square = v * v, square_lost = vec_fma(v, v, -square);
    vec slope = vec_fma(square, vec_set(C3), vec_set(C1));
    vec lost = vec_fma(square_lost, vec_set(C3), vec_fma(square, vec_set(C3_LOW), vec_set(C1_LOW)));
    lost = lost + vec_fma(square, vec_set(C3), vec_set(C1) - slope);
    vec exponent = v * slope, power = vec_exp(exponent);
    lost = vec_fma(v, lost, vec_fma(v, slope, -exponent));
    power = vec_select(power < vec_set((real)INFINITY), vec_fma(power, lost, power), power);
    return x / (vec_set(1) + power);
}

/* For results of 16 bits, whose tail ends before those roundings count: x e / (1 + e), e = 2^(x (K1 + K3 x^2)), as swiglu. */
INLINE vec gelu_tanh_narrow(vec x) {
    vec bounded = vec_max(vec_set(-11), x), v = vec_min(vec_set(8), bounded);
    vec slope = vec_fma(v * v, vec_set((real)0.10294323974), vec_set((real)2.30220819814));
    vec e = vec_exp2_narrow(v * slope);
    return bounded * (e * vec_reciprocal(vec_set(1) + e));
}

INLINE vec activation(vec x, bool tanh, bool narrow) {
    if (tanh && narrow) return gelu_tanh_narrow(x);
    x = vec_max(vec_set((real)-1e18), x); /* -infinity would meet 0 */
    if (tanh) return gelu_tanh(x);
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
