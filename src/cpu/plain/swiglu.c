/* silu(gate) * up, silu(x) = x / (1 + exp(-x)). SPDX-License-Identifier: MIT
 *
 * exp(-x) overflows to infinity for a large negative x, and x / infinity is the right 0; -infinity / infinity would be NaN where
 * the limit is 0, so that case is named. */
#include "cpu/plain/real.h"

static real silu(real x) { return x == -(real)INFINITY ? -(real)0 : x / (1 + real_exp(-x)); }

void REAL(mtl_plain_swiglu)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
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
            real_store(out + i * args->out.stride, args->out.dtype, silu(g) * u);
        }
    }
}
