/* Checked views of the caller's tensors, and loops over several of them. SPDX-License-Identifier: MIT */
#include "core/tensor.h"

#include <stdio.h>
#include <stdlib.h>

/* ---- one tensor --------------------------------------------------------------------------------------------------- */

bool mtl_dtype_from_dlpack(DLDataType type, mtl_dtype *dtype) {
    if (type.lanes != 1) return false;
    int log2_bytes = type.bits == 8 ? 0 : type.bits == 16 ? 1 : type.bits == 32 ? 2 : type.bits == 64 ? 3 : -1;
    if (log2_bytes < 0) return false;
    switch (type.code) {
    case kDLInt: *dtype = (mtl_dtype)(MTL_I8 + log2_bytes); return true;
    case kDLUInt: *dtype = (mtl_dtype)(MTL_U8 + log2_bytes); return true;
    case kDLFloat: *dtype = type.bits == 16 ? MTL_F16 : type.bits == 32 ? MTL_F32 : MTL_F64; return type.bits != 8;
    case kDLBfloat: *dtype = MTL_BF16; return type.bits == 16;
    case METALLOID_DL_BOOL: *dtype = MTL_BOOL; return type.bits == 8;
    case METALLOID_DL_COMPLEX: *dtype = MTL_C64; return type.bits == 64;
    default: return false;
    }
}

static const char *dtypes_in_words(unsigned dtypes) {
    switch (dtypes) {
    case MTL_FLOATING: return "float32, float16, bfloat16 or float64";
    case MTL_INTEGER: return "an integer of 8 to 64 bits";
    case MTL_INTEGER | MTL_BOOLEAN: return "bool or an integer of 8 to 64 bits";
    case MTL_REAL: return "floating or an integer of 8 to 64 bits";
    case MTL_REAL | MTL_BOOLEAN | 1 << MTL_C64: return "bool, floating, complex64 or an integer of 8 to 64 bits";
    case MTL_REAL | MTL_BOOLEAN: return "bool, floating or an integer of 8 to 64 bits";
    case 1 << MTL_F32 | 1 << MTL_F64: return "float32 or float64";
    case 1 << MTL_F32: return "float32";
    case 1 << MTL_F64: return "float64";
    case 1 << MTL_F16: return "float16";
    case 1 << MTL_BF16: return "bfloat16";
    default: return "another dtype";
    }
}

static metalloid_status refuse_dtype(DLDataType type, bool known, mtl_dtype dtype, const char *op, const char *name,
                                     unsigned dtypes) {
    if (known) {
        return mtl_fail(METALLOID_INVALID_ARGUMENT, "%s: %s must be %s, got %s", op, name, dtypes_in_words(dtypes),
                        mtl_dtype_name(dtype));
    }
    return mtl_fail(METALLOID_INVALID_ARGUMENT, "%s: %s must be %s, got DLPack type code %d of %d bits and %d lanes",
                    op, name, dtypes_in_words(dtypes), type.code, type.bits, type.lanes);
}

metalloid_status mtl_view_optional(mtl_view *view, const DLTensor *tensor, const char *op, const char *name,
                                   unsigned dtypes) {
    if (tensor) return mtl_view_required(view, tensor, op, name, dtypes);
    view->rank = -1;
    view->data = NULL;
    view->name = name;
    return METALLOID_OK;
}

/* In bytes; no address space is so large. The check for overlap adds and doubles a few of them, which then fits in int64_t. */
static const int64_t longest_reach = INT64_MAX / 16;

/* Where empty tensors lie, so that arithmetic on their pointers is always legal; it is never read or written. */
static char nowhere[8];

metalloid_status mtl_view_required(mtl_view *view, const DLTensor *tensor, const char *op, const char *name,
                                   unsigned dtypes) {
    MTL_REQUIRE(tensor, op, "%s must not be NULL", name);
    view->name = name;
    view->rank = tensor->ndim;
    view->device = tensor->device;
    if (view->device.device_type == kDLCUDAHost || view->device.device_type == kDLCPU)
        view->device = (DLDevice){kDLCPU, 0};
    if (view->device.device_type == kDLCUDAManaged) view->device.device_type = kDLCUDA;

    mtl_dtype dtype = MTL_F32;
    bool known = mtl_dtype_from_dlpack(tensor->dtype, &dtype);
    if (!known || !(dtypes >> dtype & 1)) return refuse_dtype(tensor->dtype, known, dtype, op, name, dtypes);
    view->dtype = dtype;

    MTL_REQUIRE(tensor->ndim >= 0 && tensor->ndim <= MTL_MAX_RANK, op, "%s must have rank 0 to %d, got %d", name,
                (int)MTL_MAX_RANK, tensor->ndim);
    MTL_REQUIRE(tensor->shape || tensor->ndim == 0, op, "%s has rank %d but a NULL shape", name, tensor->ndim);

    int64_t size = mtl_dtype_size(dtype), elements = 1, low = 0, high = 0;
    bool overflow = false, empty = false;
    for (int axis = tensor->ndim - 1; axis >= 0; axis--) {
        int64_t extent = tensor->shape[axis], stride = 0, reach;
        MTL_REQUIRE(extent >= 0, op, "%s must not have a negative extent, got %lld at axis %d", name, (long long)extent,
                    axis);
        if (extent > 1 && !overflow) {
            overflow |= __builtin_mul_overflow(tensor->strides ? tensor->strides[axis] : elements, size, &stride);
            overflow |= __builtin_mul_overflow(stride, extent - 1, &reach);
            if (!overflow) overflow |= __builtin_add_overflow(reach < 0 ? low : high, reach, reach < 0 ? &low : &high);
        }
        empty |= extent == 0;
        overflow |= __builtin_mul_overflow(elements, extent ? extent : 1, &elements);
        view->shape[axis] = extent;
        view->stride[axis] = stride;
    }
    int64_t bytes;
    overflow |= __builtin_mul_overflow(elements, size, &bytes) || __builtin_add_overflow(high, size, &high);
    uintptr_t data = (uintptr_t)tensor->data, begin, end;
    overflow |= __builtin_add_overflow(data, (uintptr_t)tensor->byte_offset, &data);
    overflow |= (uint64_t)tensor->byte_offset > INT64_MAX;
    if (!empty && !overflow) {
        overflow |= __builtin_sub_overflow(data, (uintptr_t)0 - (uintptr_t)low, &begin) ||
                    __builtin_add_overflow(data, (uintptr_t)high, &end) || low < -longest_reach || high > longest_reach;
    }
    MTL_REQUIRE(!overflow, op, "%s is too large: its size in bytes overflows", name);
    view->elements = empty ? 0 : elements;
    view->low = empty ? 0 : low;
    view->high = empty ? 0 : high;
    if (empty) {
        for (int axis = 0; axis < view->rank; axis++) view->stride[axis] = 0;
        view->data = nowhere;
        return METALLOID_OK;
    }
    MTL_REQUIRE(tensor->data, op, "%s has elements but NULL data", name);
    MTL_REQUIRE(data % (uintptr_t)size == 0, op, "%s must be aligned to its element size of %d bytes", name, (int)size);
    view->data = (char *)data;
    return METALLOID_OK;
}

/* ---- shapes ------------------------------------------------------------------------------------------------------- */

static void print_shape(char *text, size_t size, int rank, const int64_t *shape) {
    size_t used = (size_t)snprintf(text, size, "{");
    for (int axis = 0; axis < rank && used < size; axis++) {
        const char *comma = axis ? ", " : "";
        used += (size_t)(shape[axis] < 0 ? snprintf(text + used, size - used, "%sany", comma)
                                         : snprintf(text + used, size - used, "%s%lld", comma, (long long)shape[axis]));
    }
    if (used < size) snprintf(text + used, size - used, "}");
}

metalloid_status mtl_check_shape(const mtl_view *view, const char *op, int rank, const int64_t *shape) {
    bool same = view->rank == rank;
    for (int axis = 0; same && axis < rank; axis++) same = shape[axis] < 0 || view->shape[axis] == shape[axis];
    if (same) return METALLOID_OK;
    char wanted[128], got[128];
    print_shape(wanted, sizeof wanted, rank, shape);
    print_shape(got, sizeof got, view->rank, view->shape);
    return mtl_fail(METALLOID_INVALID_ARGUMENT, "%s: %s must have shape %s, got %s", op, view->name, wanted, got);
}

metalloid_status mtl_check_rank(const mtl_view *view, const char *op, int least, int most) {
    if (least == most) {
        MTL_REQUIRE(view->rank == least, op, "%s must have rank %d, got %d", view->name, least, view->rank);
    }
    MTL_REQUIRE(view->rank >= least, op, "%s must have rank %d or more, got %d", view->name, least, view->rank);
    MTL_REQUIRE(view->rank <= most, op, "%s must have rank %d at most, got %d", view->name, most, view->rank);
    return METALLOID_OK;
}

metalloid_status mtl_check_same_shape(const mtl_view *view, const mtl_view *other, const char *op) {
    return mtl_check_shape(view, op, other->rank, other->shape);
}

metalloid_status mtl_check_device(const mtl_view *const *views, int count, const char *op, DLDevice *device) {
    const mtl_view *first = views[0];
    for (int i = 1; i < count; i++) {
        if (!mtl_present(views[i])) continue;
        MTL_REQUIRE(views[i]->device.device_type == first->device.device_type &&
                        views[i]->device.device_id == first->device.device_id,
                    op, "%s must be on the device of %s (DLPack type %d, id %d), got type %d, id %d", views[i]->name,
                    first->name, (int)first->device.device_type, first->device.device_id,
                    (int)views[i]->device.device_type, views[i]->device.device_id);
    }
    *device = first->device;
    if (device->device_type == kDLCPU || (MTL_WITH_CUDA && device->device_type == kDLCUDA)) return METALLOID_OK;
    if ((int)device->device_type == MTL_NO_DEVICE) return METALLOID_OK;
    return mtl_fail(METALLOID_UNSUPPORTED,
                    "%s: %s is on a device of DLPack type %d, which no backend of this build serves", op, first->name,
                    (int)device->device_type);
}

metalloid_status mtl_check_eps(double eps, const char *op) {
    MTL_REQUIRE(isfinite(eps) && eps >= 0, op, "eps must be finite and not negative, got %g", eps);
    return METALLOID_OK;
}

bool mtl_any_double(const mtl_view *const *views, int count) {
    for (int i = 0; i < count; i++) {
        if (mtl_present(views[i]) && views[i]->dtype == MTL_F64) return true;
    }
    return false;
}

mtl_dtype mtl_promote(mtl_dtype a, mtl_dtype b) {
    if (a == b) return a;
    return a == MTL_F64 || b == MTL_F64 ? MTL_F64 : MTL_F32;
}

/* ---- overlap ------------------------------------------------------------------------------------------------------ */

/* Does sum(coefficient[i] * x[i]) = target have a solution with 0 <= x[i] <= bound[i]? Coefficients are positive and descending.
 * Largest first, the rest must be able to make up the difference, by range and by greatest common divisor: for the layouts of real
 * arrays one value or two survive at each level. `work` bounds the search; when it is used up the answer is yes. */
typedef struct {
    int terms;
    int64_t coefficient[2 * MTL_MAX_RANK + 2];
    int64_t bound[2 * MTL_MAX_RANK + 2];
    int64_t rest[2 * MTL_MAX_RANK + 3]; /* largest sum of terms i and after */
    int64_t gcd[2 * MTL_MAX_RANK + 3];  /* of the coefficients i and after */
    int64_t work;
} bounded_sum;

static void sum_add(bounded_sum *sum, int64_t coefficient, int64_t bound) {
    if (coefficient == 0 || bound == 0) return;
    int at = 0;
    while (at < sum->terms && sum->coefficient[at] > coefficient) at++;
    if (at < sum->terms &&
        sum->coefficient[at] == coefficient) { /* x1 + x2 takes every value up to both bounds together */
        sum->bound[at] += bound;
        return;
    }
    for (int i = sum->terms++; i > at; i--) {
        sum->coefficient[i] = sum->coefficient[i - 1];
        sum->bound[i] = sum->bound[i - 1];
    }
    sum->coefficient[at] = coefficient;
    sum->bound[at] = bound;
}

static bool sum_search(bounded_sum *sum, int term, int64_t target) {
    if (target < 0 || target > sum->rest[term]) return false;
    if (target == 0) return true;
    if (target % sum->gcd[term] != 0) return false;
    int64_t coefficient = sum->coefficient[term], most = target / coefficient, least = 0;
    if (most > sum->bound[term]) most = sum->bound[term];
    if (target > sum->rest[term + 1]) least = (target - sum->rest[term + 1] + coefficient - 1) / coefficient;
    for (int64_t x = most; x >= least; x--) {
        if (sum->work-- <= 0) return true;
        if (sum_search(sum, term + 1, target - coefficient * x)) return true;
    }
    return false;
}

static bool sum_reaches(bounded_sum *sum, int64_t target) {
    sum->rest[sum->terms] = 0;
    sum->gcd[sum->terms] = 0;
    for (int i = sum->terms - 1; i >= 0; i--) {
        int64_t a = sum->coefficient[i], b = sum->gcd[i + 1];
        while (b) {
            int64_t r = a % b;
            a = b;
            b = r;
        }
        sum->gcd[i] = a;
        sum->rest[i] = sum->rest[i + 1] + sum->coefficient[i] * sum->bound[i];
    }
    return sum_search(sum, 0, target);
}

bool mtl_overlaps(const mtl_view *a, const mtl_view *b) {
    if (a->elements == 0 || b->elements == 0) return false;
    intptr_t a_data = (intptr_t)a->data, b_data = (intptr_t)b->data;
    if (a_data + a->high <= b_data + b->low || b_data + b->high <= a_data + a->low) return false;
    /* Bytes: a_low + sum(|stride| x) + i = b_low + sum(|stride| y) + j. Substituting bound - y for y makes every term positive. */
    bounded_sum sum = {.work = 20000};
    for (int axis = 0; axis < a->rank; axis++) sum_add(&sum, llabs(a->stride[axis]), a->shape[axis] - 1);
    for (int axis = 0; axis < b->rank; axis++) sum_add(&sum, llabs(b->stride[axis]), b->shape[axis] - 1);
    sum_add(&sum, 1, mtl_dtype_size(a->dtype) - 1 + mtl_dtype_size(b->dtype) - 1);
    return sum_reaches(&sum, (b_data + b->high - 1) - (a_data + a->low));
}

bool mtl_overlaps_itself(const mtl_view *view) {
    if (view->elements <= 1) return false;
    /* Two different places of one address: with axis `lead` the first where they differ, the earlier axes drop out. In elements. */
    int64_t size = mtl_dtype_size(view->dtype);
    int64_t reach =
        size; /* nested layouts, which nearly all are, need no search: each stride passes the extent of the smaller ones */
    bool nested = true;
    int64_t done = 0;
    for (int level = 0; level < view->rank && nested; level++) {
        int64_t smallest = INT64_MAX;
        int at = -1;
        for (int axis = 0; axis < view->rank; axis++) {
            if (view->shape[axis] > 1 && !(done >> axis & 1) && llabs(view->stride[axis]) < smallest) {
                smallest = llabs(view->stride[axis]);
                at = axis;
            }
        }
        if (at < 0) break;
        done |= (int64_t)((uint64_t)1 << at);
        nested = smallest >= reach;
        reach += smallest * (view->shape[at] - 1);
    }
    if (nested) return false;
    for (int lead = 0; lead < view->rank; lead++) {
        if (view->shape[lead] <= 1) continue;
        int64_t stride = llabs(view->stride[lead]), middle = 0;
        if (stride == 0) return true;
        bounded_sum sum = {.work = 20000};
        sum_add(&sum, stride, view->shape[lead] - 2); /* the difference along lead is 1 to extent - 1 */
        for (int axis = lead + 1; axis < view->rank; axis++) {
            int64_t other = llabs(view->stride[axis]), bound = view->shape[axis] - 1;
            if (bound <= 0) continue;
            sum_add(&sum, other, 2 * bound); /* differences -bound to bound, shifted by bound */
            middle += other * bound;
        }
        if (middle >= stride && sum_reaches(&sum, middle - stride)) return true;
    }
    return false;
}

static bool same_place(const mtl_view *a, const mtl_view *b) {
    bool same = a->data == b->data && a->dtype == b->dtype && a->rank == b->rank;
    for (int axis = 0; same && axis < a->rank; axis++)
        same = a->shape[axis] == b->shape[axis] && a->stride[axis] == b->stride[axis];
    return same;
}

metalloid_status mtl_check_overlap(const mtl_view *const *outputs, int output_count, const mtl_view *const *inputs,
                                   int input_count, const unsigned *aliases, const char *op) {
    for (int o = 0; o < output_count; o++) {
        const mtl_view *out = outputs[o];
        if (!mtl_present(out)) continue;
        MTL_REQUIRE(!mtl_overlaps_itself(out), op, "%s must not overlap itself", out->name);
        for (int i = 0; i < input_count; i++) {
            if (!mtl_present(inputs[i]) || !mtl_overlaps(out, inputs[i])) continue;
            bool may_alias = aliases && aliases[o] >> i & 1;
            if (may_alias && same_place(out, inputs[i])) continue;
            return mtl_fail(METALLOID_INVALID_ARGUMENT,
                            may_alias ? "%s: %s must be %s itself or not overlap it" : "%s: %s must not overlap %s", op,
                            out->name, inputs[i]->name);
        }
        for (int other = 0; other < o; other++) {
            if (!mtl_present(outputs[other])) continue;
            MTL_REQUIRE(!mtl_overlaps(out, outputs[other]), op, "%s must not overlap %s", out->name,
                        outputs[other]->name);
        }
    }
    return METALLOID_OK;
}

/* ---- loops -------------------------------------------------------------------------------------------------------- */

void mtl_loop_init(mtl_loop *loop, int rank, int operands, const mtl_view *const *views) {
    loop->rank = 0;
    loop->operands = operands;
    loop->count = 1;
    for (int axis = 0; axis < rank; axis++) {
        int64_t extent = views[0]->shape[axis];
        loop->count *= extent;
        if (extent == 1) continue;
        int last = loop->rank - 1;
        bool merges = last >= 0;
        for (int i = 0; i < operands && merges; i++) merges = loop->stride[last][i] == views[i]->stride[axis] * extent;
        if (!merges) {
            last = loop->rank++;
            loop->shape[last] = 1;
        }
        loop->shape[last] *= extent;
        for (int i = 0; i < operands; i++) loop->stride[last][i] = views[i]->stride[axis];
    }
}

int64_t mtl_loop_take_row(mtl_loop *loop, int64_t *stride) {
    for (int i = 0; i < loop->operands; i++) stride[i] = 0;
    if (loop->rank == 0) return loop->count;
    int last = --loop->rank;
    for (int i = 0; i < loop->operands; i++) stride[i] = loop->stride[last][i];
    loop->count = 1;
    for (int axis = 0; axis < last; axis++) loop->count *= loop->shape[axis];
    return loop->shape[last];
}

void mtl_cursor_seek(mtl_cursor *cursor, const mtl_loop *loop, int64_t iteration) {
    cursor->loop = loop;
    for (int i = 0; i < loop->operands; i++) cursor->offset[i] = 0;
    if (loop->count == 0) return; /* an extent of 0 is no divisor */
    for (int axis = loop->rank - 1; axis >= 0; axis--) {
        cursor->index[axis] = iteration % loop->shape[axis];
        iteration /= loop->shape[axis];
        for (int i = 0; i < loop->operands; i++) cursor->offset[i] += cursor->index[axis] * loop->stride[axis][i];
    }
}

void mtl_cursor_carry(mtl_cursor *cursor) {
    const mtl_loop *loop = cursor->loop;
    for (int axis = loop->rank - 1; axis > 0 && cursor->index[axis] == loop->shape[axis]; axis--) {
        cursor->index[axis] = 0;
        cursor->index[axis - 1]++;
        for (int i = 0; i < loop->operands; i++) {
            cursor->offset[i] += loop->stride[axis - 1][i] - loop->shape[axis] * loop->stride[axis][i];
        }
    }
}
