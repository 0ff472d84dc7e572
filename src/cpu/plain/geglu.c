/* gelu(gate) * up. SPDX-License-Identifier: MIT
 *
 *   erf:  gelu(x) = x/2 (1 + erf(x / sqrt 2)), as x/2 erfc(-x / sqrt 2): the sum would cancel for a negative x
 *   tanh: gelu(x) = x/2 (1 + tanh(u)), u = sqrt(2/pi) (x + 0.044715 x^3), as x / (1 + exp(-2u)), for the same reason */
#include "cpu/plain/real.h"

/* Both exponentials multiply the rounding of their argument, so each is taken in the next wider arithmetic. */
#ifdef MTL_IN_DOUBLE
typedef long double wide;
#define wide_exp  expl
#define wide_erfc erfcl
#else
typedef double wide;
#define wide_exp  exp
#define wide_erfc erfc
#endif

static real gelu_erf(real x) {
    if (x == -(real)INFINITY) return -(real)0;
    return (real)((wide)x / 2 * wide_erfc(-(wide)x * (wide)0.707106781186547524400844362104849039L));
}

static real gelu_tanh(real x) {
    if (x == -(real)INFINITY) return -(real)0;
    wide u = (wide)0.797884560802865355879892119868763737L * (x + (wide)0.044715L * x * x * x);
    return (real)(x / (1 + wide_exp(-2 * u)));
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
