/* y = x / sqrt(mean(x^2) + eps) * weight, of x or of x + residual. SPDX-License-Identifier: MIT
 *
 * The row is read once, widened into scratch, and the sum of squares and the result are formed there. */
#include "cpu/plain/real.h"

void REAL(mtl_plain_rms_norm)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_norm_args *args = arguments;
    int64_t length = args->length;
    real *row = scratch;
    mtl_cursor at;
    mtl_cursor_seek(&at, &args->rows, begin);
    for (int64_t item = begin; item < end; item++, mtl_cursor_next(&at)) {
        read_row(row, args->x.data + at.offset[MTL_NORM_X], args->x, length);
        if (args->residual.data) {
            const char *residual = args->residual.data + at.offset[MTL_NORM_RESIDUAL];
            for (int64_t i = 0; i < length; i++)
                row[i] += real_load(residual + i * args->residual.stride, args->residual.dtype);
            write_row(args->sum.data + at.offset[MTL_NORM_SUM], args->sum, row, length);
        }
        double squares = 0;
        for (int64_t i = 0; i < length; i++) squares += (double)row[i] * (double)row[i];
        double inverse = 1 / sqrt(squares / (double)length + args->eps);
        for (int64_t i = 0; i < length; i++) {
            real weight =
                args->weight.data ? real_load(args->weight.data + i * args->weight.stride, args->weight.dtype) : 1;
            row[i] = (real)((double)row[i] * inverse) * weight;
        }
        write_row(args->out.data + at.offset[MTL_NORM_OUT], args->out, row, length);
    }
}
