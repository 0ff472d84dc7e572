/* gelu(gate) * up. SPDX-License-Identifier: MIT
 *
 *   erf:  gelu(x) = x/2 (1 + erf(x / sqrt 2)), as x/2 erfc(-x / sqrt 2): the sum would cancel for a negative x
 *   tanh: gelu(x) = x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), as x / (1 + exp(-2u)), for the same reason */
#include "cpu/plain/real.h"

static real gelu_erf(real x) {
    return x == -(real)INFINITY ? -(real)0 : (real)((double)x / 2 * erfc(-(double)x * 0x1.6a09e667f3bcdp-1));
}

static real gelu_tanh(real x) {
    double u = 0x1.9884533d43651p-1 * ((double)x + 0.044715 * (double)x * (double)x * (double)x);
    return x == -(real)INFINITY ? -(real)0 : (real)((double)x / (1 + exp(-2 * u)));
}

void REAL(mtl_plain_geglu)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_gated_args *args = arguments;
    (void)scratch;
    mtl_cursor at;
    for (int64_t item = begin; item < end; item++) {
        mtl_cursor_seek(&at, &args->rows, item / args->runs);
        int64_t first = item % args->runs * args->run;
        int64_t last = first + args->run < args->length ? first + args->run : args->length;
        const char *gate = args->gate.data + at.offset[MTL_GATED_GATE], *up = args->up.data + at.offset[MTL_GATED_UP];
        char *out = args->out.data + at.offset[MTL_GATED_OUT];
        for (int64_t i = first; i < last; i++) {
            real g = real_load(gate + i * args->gate.stride, args->gate.dtype);
            real u = real_load(up + i * args->up.stride, args->up.dtype);
            real_store(out + i * args->out.stride, args->out.dtype, (args->tanh ? gelu_tanh(g) : gelu_erf(g)) * u);
        }
    }
}
