/* rope. SPDX-License-Identifier: MIT */
#include "api/rope.h"
#include "api/backend.h"
#include "core/options.h"

metalloid_status mtl_rope_read_options(mtl_rope_args *args, mtl_rope_tensors *tensors,
                                       const metalloid_rope_options *given, int64_t dims, const char *op) {
    const metalloid_rope_options defaults = METALLOID_ROPE_OPTIONS_INIT;
    metalloid_rope_options options;
    MTL_TRY(mtl_options_read(&options, &defaults, sizeof options, given, op));

    MTL_REQUIRE(dims >= 2 && dims % 2 == 0, op, "dims must be even and 2 or more, got %lld", (long long)dims);
    MTL_REQUIRE(options.time_axis == METALLOID_TIME_SECOND_TO_LAST || options.time_axis == METALLOID_TIME_AXIS_1, op,
                "time_axis must be METALLOID_TIME_SECOND_TO_LAST or METALLOID_TIME_AXIS_1, got %d",
                (int)options.time_axis);
    MTL_REQUIRE(isfinite(options.scale), op, "scale must be finite, got %g", options.scale);

    int sources = (options.base != 0) + (options.freqs != NULL) + (options.inv_freqs != NULL);
    MTL_REQUIRE(sources == 1, op,
                "exactly one of base, freqs and inv_freqs must be given (base 0 stands for none), got %d", sources);
    MTL_REQUIRE(options.base == 0 || (isfinite(options.base) && options.base > 0), op,
                "base must be finite and positive, got %g", options.base);
    const char *name = options.freqs ? "freqs" : "inv_freqs";
    MTL_TRY(mtl_view_optional(&tensors->freqs, options.freqs ? options.freqs : options.inv_freqs, op, name, MTL_REAL));
    int64_t pairs = dims / 2;
    if (mtl_present(&tensors->freqs)) MTL_TRY(mtl_check_shape(&tensors->freqs, op, 1, &pairs));

    int positions = (options.offset != 0) + (options.offsets != NULL) + (options.position_ids != NULL);
    MTL_REQUIRE(positions <= 1, op, "only one of offset, offsets and position_ids may be given, got %d", positions);
    name = options.offsets ? "offsets" : "position_ids";
    MTL_TRY(mtl_view_optional(&tensors->positions, options.offsets ? options.offsets : options.position_ids, op, name,
                              MTL_INTEGER));

    tensors->time_axis = options.time_axis;
    args->angles = (mtl_rope_angles){.dims = dims,
                                     .traditional = mtl_option_flag(&options.traditional),
                                     .scale = options.scale,
                                     .base = options.base,
                                     .freqs = mtl_row_of(&tensors->freqs),
                                     .inverse = options.inv_freqs != NULL,
                                     .offset = options.offset};
    args->angles.positions.each_token = options.position_ids != NULL;
    return METALLOID_OK;
}

int mtl_rope_time_axis(const mtl_view *x, metalloid_time_axis time_axis) {
    return time_axis == METALLOID_TIME_AXIS_1 ? 1 : x->rank - 2;
}

/* Every position lies in int32's range: those of `steps` time steps from `position` on. */
static metalloid_status check_positions(int64_t position, int64_t steps, const char *name, const char *op) {
    bool inside = position >= INT32_MIN && position <= INT32_MAX && steps - 1 <= INT32_MAX - position;
    MTL_REQUIRE(inside || steps > 1, op, "%s must be positions within int32, got %lld", name, (long long)position);
    MTL_REQUIRE(inside, op, "%s must keep positions within int32, got %lld for %lld time steps", name,
                (long long)position, (long long)steps);
    return METALLOID_OK;
}

metalloid_status mtl_rope_check_extents(mtl_rope_args *args, const mtl_rope_tensors *tensors, const mtl_view *x,
                                        const char *op) {
    mtl_rope_angles *angles = &args->angles;
    args->batch = x->shape[0];
    args->time = x->shape[mtl_rope_time_axis(x, tensors->time_axis)];
    args->head_dim = x->shape[x->rank - 1];
    MTL_REQUIRE(angles->dims <= args->head_dim, op, "dims must be at most the last extent of %s, %lld, got %lld",
                x->name, (long long)args->head_dim, (long long)angles->dims);

    const mtl_view *positions = &tensors->positions;
    if (!mtl_present(positions)) {
        return args->batch && args->time ? check_positions(angles->offset, args->time, "offset", op) : METALLOID_OK;
    }
    if (angles->positions.each_token) {
        MTL_TRY(mtl_check_shape(positions, op, 2, (int64_t[]){args->batch, args->time}));
        angles->positions.time_stride = positions->stride[1];
    } else {
        bool one_for_all = positions->rank == 0 || (positions->rank == 1 && positions->shape[0] == 1);
        if (!one_for_all) MTL_TRY(mtl_check_shape(positions, op, 1, &args->batch));
    }
    angles->positions.data = positions->data;
    angles->positions.dtype = positions->dtype;
    angles->positions.batch_stride = positions->rank ? positions->stride[0] : 0;
    if (args->batch == 0 || args->time == 0) return METALLOID_OK;
    if (positions->device.device_type != kDLCPU) return METALLOID_OK; /* the kernel looks at them and gives NaN */

    /* A broadcast axis, which may be of any length, is looked at once. */
    int64_t rows = angles->positions.batch_stride ? args->batch : 1,
            starts = angles->positions.time_stride ? args->time : 1;
    int64_t steps = angles->positions.each_token ? 1 : args->time;
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t start = 0; start < starts; start++) {
            const char *at =
                positions->data + row * angles->positions.batch_stride + start * angles->positions.time_stride;
            MTL_TRY(check_positions(mtl_load_integer(at, positions->dtype), steps, positions->name, op));
        }
    }
    return METALLOID_OK;
}

void mtl_rope_fill_side(mtl_rope_side *side, const mtl_view *x, const mtl_view *out, int time_axis) {
    side->x = mtl_row_of(x);
    side->out = mtl_row_of(out);
    side->x_batch_stride = x->stride[0];
    side->out_batch_stride = out->stride[0];
    side->x_time_stride = x->stride[time_axis];
    side->out_time_stride = out->stride[time_axis];
    mtl_view x_heads, out_heads; /* the axes that are neither batch, time nor feature */
    int rank = 0;
    for (int axis = 1; axis < x->rank - 1; axis++) {
        if (axis == time_axis) continue;
        x_heads.shape[rank] = x->shape[axis];
        x_heads.stride[rank] = x->stride[axis];
        out_heads.stride[rank] = out->stride[axis];
        rank++;
    }
    const mtl_view *heads[] = {[MTL_ROPE_X] = &x_heads, [MTL_ROPE_OUT] = &out_heads};
    mtl_loop_init(&side->heads, rank, 2, heads);
}

metalloid_status metalloid_rope(metalloid_context *context, const DLTensor *x_tensor, int64_t dims,
                                const metalloid_rope_options *options, DLTensor *out_tensor) {
    static const char op[] = "rope";
    mtl_rope_args args = {.sides = 1};
    mtl_rope_tensors tensors;
    mtl_view x, out;
    MTL_TRY(mtl_view_required(&x, x_tensor, op, "x", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&out, out_tensor, op, "out", MTL_FLOATING));
    MTL_TRY(mtl_rope_read_options(&args, &tensors, options, dims, op));
    MTL_TRY(mtl_check_rank(&x, op, 3, MTL_MAX_RANK));
    MTL_TRY(mtl_check_same_shape(&out, &x, op));

    DLDevice device;
    const mtl_view *all[] = {&x, &out, &tensors.freqs, &tensors.positions};
    MTL_TRY(mtl_check_device(all, 4, op, &device));
    MTL_TRY(mtl_rope_check_extents(&args, &tensors, &x, op));
    const mtl_view *outputs[] = {&out}, *inputs[] = {&x, &tensors.freqs, &tensors.positions};
    const unsigned aliases[] = {1}; /* x */
    MTL_TRY(mtl_check_overlap(outputs, 1, inputs, 3, aliases, op));

    mtl_rope_fill_side(&args.side[0], &x, &out, mtl_rope_time_axis(&x, tensors.time_axis));
    args.device = device;
    args.in_double = mtl_any_double(all, 2);
    return MTL_RUN(rope, context, op, &args);
}
