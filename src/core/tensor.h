/* Checked views of the caller's tensors, and loops over several of them. SPDX-License-Identifier: MIT */
#ifndef METALLOID_CORE_TENSOR_H
#define METALLOID_CORE_TENSOR_H

#include "core/dtype.h"
#include "core/status.h"

enum {
    MTL_MAX_RANK = 64,    /* NumPy's limit */
    MTL_MAX_OPERANDS = 4, /* of one loop */
    /* A device type of which a call is checked and nothing done, for callers that know shapes and dtypes alone (a graph being traced).
     * Data pointers are then told apart, never followed. */
    MTL_NO_DEVICE = 0x4d544c,
};

/* A DLTensor after its checks: byte_offset applied, strides always there and in bytes (0 along axes of extent 1 or 0, so that
 * equal layouts have equal strides). */
typedef struct mtl_view {
    char *data; /* NULL data and rank -1: an optional tensor that is not there */
    mtl_dtype dtype;
    int rank;
    int64_t elements;
    DLDevice device;
    const char *name;
    int64_t low, high; /* bytes that the view touches, relative to data: [low, high) */
    int64_t shape[MTL_MAX_RANK];
    int64_t stride[MTL_MAX_RANK];
} mtl_view;

static inline bool mtl_present(const mtl_view *view) { return view->rank >= 0; }
static inline mtl_view mtl_absent(void) { return (mtl_view){.rank = -1}; }

bool mtl_dtype_from_dlpack(DLDataType type, mtl_dtype *dtype); /* false: none of ours */

/* Checks one tensor by itself: pointers, dtype in `dtypes`, extents, strides, alignment, sizes that fit. Device types that alias
 * CPU memory become kDLCPU, managed CUDA memory becomes kDLCUDA. */
metalloid_status mtl_view_required(mtl_view *view, const DLTensor *tensor, const char *op, const char *name,
                                   unsigned dtypes);
metalloid_status mtl_view_optional(mtl_view *view, const DLTensor *tensor, const char *op, const char *name,
                                   unsigned dtypes);

/* One axis, as "x must have shape {2, 3}"; an extent of -1 in `shape` matches any. */
metalloid_status mtl_check_shape(const mtl_view *view, const char *op, int rank, const int64_t *shape);
metalloid_status mtl_check_rank(const mtl_view *view, const char *op, int least, int most);
metalloid_status mtl_check_same_shape(const mtl_view *view, const mtl_view *other, const char *op);

/* All present views, of which the first is one, on one device; the device goes to `device`. */
metalloid_status mtl_check_device(const mtl_view *const *views, int count, const char *op, DLDevice *device);

/* Outputs do not overlap themselves, each other, or an input, but where `aliases` allows an output to be exactly an input (same
 * pointer, dtype, shape and strides): bit i of aliases[o] allows output o to be inputs[i]. Absent views are skipped. */
metalloid_status mtl_check_overlap(const mtl_view *const *outputs, int output_count, const mtl_view *const *inputs,
                                   int input_count, const unsigned *aliases, const char *op);

/* Whether the two views share a byte: exact, but for hostile layouts that would take long to decide, which count as sharing. */
bool mtl_overlaps(const mtl_view *a, const mtl_view *b);
bool mtl_overlaps_itself(const mtl_view *view);

metalloid_status mtl_check_eps(double eps, const char *op);

/* Whether the call computes in float64: one of its floating operands is float64. */
bool mtl_any_double(const mtl_view *const *views, int count);

/* The dtype that arithmetic on both gives: float16 with bfloat16 gives float32. */
mtl_dtype mtl_promote(mtl_dtype a, mtl_dtype b);

/* A loop over the leading `rank` axes of up to MTL_MAX_OPERANDS views of equal extents there. Axes of extent 1 go, and axes that
 * every operand steps through evenly merge, so that a contiguous loop has rank <= 1. */
typedef struct mtl_loop {
    int rank, operands;
    int64_t count; /* iterations */
    int64_t shape[MTL_MAX_RANK];
    int64_t stride[MTL_MAX_RANK][MTL_MAX_OPERANDS];
} mtl_loop;

void mtl_loop_init(mtl_loop *loop, int rank, int operands, const mtl_view *const *views);

/* Takes the last axis out of the loop and returns its extent, with the operands' strides along it: the row of an elementwise
 * operation, as long as the operands' layouts allow. */
int64_t mtl_loop_take_row(mtl_loop *loop, int64_t *stride);

/* The place of one iteration: byte offsets of the operands. */
typedef struct mtl_cursor {
    const mtl_loop *loop;
    int64_t offset[MTL_MAX_OPERANDS];
    int64_t index[MTL_MAX_RANK];
} mtl_cursor;

void mtl_cursor_seek(mtl_cursor *cursor, const mtl_loop *loop, int64_t iteration);
void mtl_cursor_carry(mtl_cursor *cursor);

static inline void mtl_cursor_next(mtl_cursor *cursor) {
    const mtl_loop *loop = cursor->loop;
    int last = loop->rank - 1;
    if (last < 0) return;
    for (int i = 0; i < loop->operands; i++) cursor->offset[i] += loop->stride[last][i];
    if (++cursor->index[last] == loop->shape[last]) mtl_cursor_carry(cursor);
}

#endif
