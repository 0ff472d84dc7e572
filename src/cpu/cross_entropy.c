/* cross_entropy: an item is a row of logits. Of few rows it is a piece of one, so that a single row over a large vocabulary is shared out
 * too; the thread that does the last piece of a row puts them together, in their order: bits depend neither on threads nor on time.
 * SPDX-License-Identifier: MIT */
#include "cpu/kernels.h"

#include <stdatomic.h>

enum { FEW_ROWS = 16, PIECE = 16384 };

metalloid_status mtl_cpu_cross_entropy(const metalloid_context *context, const char *op, mtl_cross_entropy_args *args) {
    mtl_kernel kernel = mtl_cpu_kernels_for(context, args->in_double)->cross_entropy;
    int64_t rows = args->rows.count, pieces = rows < FEW_ROWS ? (args->classes + PIECE - 1) / PIECE : 1;
    if (rows == 0) return METALLOID_OK;
    args->cut.pieces = pieces;
    args->cut.length = pieces == 1 ? args->classes : PIECE;
    if (pieces == 1) return mtl_cpu_run(context, op, kernel, args, rows, args->classes * 4, 0);

    size_t bytes = (size_t)(rows * pieces) * sizeof *args->cut.done + (size_t)rows * sizeof *args->cut.left;
    args->cut.done = mtl_allocate(context, bytes);
    if (!args->cut.done) return mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: no %zu bytes of workspace", op, bytes);
    args->cut.left = (_Atomic int64_t *)(args->cut.done + rows * pieces);
    for (int64_t row = 0; row < rows; row++) atomic_init(&args->cut.left[row], pieces);
    metalloid_status status = mtl_cpu_run(context, op, kernel, args, rows * pieces, PIECE * 4, 0);
    mtl_release(context, args->cut.done);
    return status;
}
