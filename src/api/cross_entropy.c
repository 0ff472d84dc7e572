/* cross_entropy. SPDX-License-Identifier: MIT */
#include "api/backend.h"
#include "core/options.h"

static const char op[] = "cross_entropy";

/* Every target is looked at before anything is written: they are small beside the logits. */
static metalloid_status check_targets(const mtl_cross_entropy_args *args) {
    mtl_cursor at;
    mtl_cursor_seek(&at, &args->rows, 0);
    for (int64_t row = 0; row < args->rows.count; row++, mtl_cursor_next(&at)) {
        int64_t target =
            mtl_load_integer(args->targets.data + at.offset[MTL_CROSS_ENTROPY_TARGETS], args->targets.dtype);
        if (args->has_ignore_index && target == args->ignore_index) continue;
        MTL_REQUIRE(target >= 0 && target < args->classes, op, "targets must lie in [0, %lld), got %lld",
                    (long long)args->classes, (long long)target);
    }
    return METALLOID_OK;
}

metalloid_status metalloid_cross_entropy(metalloid_context *context, const DLTensor *logits, const DLTensor *targets,
                                         const metalloid_cross_entropy_options *given, DLTensor *loss) {
    const metalloid_cross_entropy_options defaults = METALLOID_CROSS_ENTROPY_OPTIONS_INIT;
    metalloid_cross_entropy_options options;
    MTL_TRY(mtl_options_read(&options, &defaults, sizeof options, given, op));

    mtl_view logits_view, targets_view, loss_view;
    MTL_TRY(mtl_view_required(&logits_view, logits, op, "logits", MTL_FLOATING));
    MTL_TRY(mtl_view_required(&targets_view, targets, op, "targets", MTL_INTEGER));
    MTL_TRY(mtl_view_required(&loss_view, loss, op, "loss", MTL_FLOATING));
    MTL_TRY(mtl_check_rank(&logits_view, op, 1, MTL_MAX_RANK));
    MTL_TRY(mtl_check_shape(&targets_view, op, logits_view.rank - 1, logits_view.shape));
    MTL_TRY(mtl_check_same_shape(&loss_view, &targets_view, op));

    DLDevice device;
    const mtl_view *all[] = {&logits_view, &targets_view, &loss_view};
    MTL_TRY(mtl_check_device(all, 3, op, &device));
    const mtl_view *outputs[] = {&loss_view};
    MTL_TRY(mtl_check_overlap(outputs, 1, all, 2, NULL, op));

    mtl_cross_entropy_args args = {.classes = logits_view.shape[logits_view.rank - 1],
                                   .logits = mtl_row_of(&logits_view),
                                   .targets = {targets_view.data, 0, targets_view.dtype},
                                   .loss = {loss_view.data, 0, loss_view.dtype},
                                   .has_ignore_index = mtl_option_flag(&options.has_ignore_index),
                                   .ignore_index = options.ignore_index,
                                   .device = device,
                                   .in_double = mtl_any_double(all, 3)};
    const mtl_view *in_rows[] = {[MTL_CROSS_ENTROPY_LOGITS] = &logits_view,
                                 [MTL_CROSS_ENTROPY_TARGETS] = &targets_view,
                                 [MTL_CROSS_ENTROPY_LOSS] = &loss_view};
    mtl_loop_init(&args.rows, targets_view.rank, 3, in_rows);
    if (args.rows.count == 0) return METALLOID_OK;
    MTL_REQUIRE(args.classes > 0, op, "logits must have at least one class, got %d for %lld rows", 0,
                (long long)args.rows.count);
    /* On a GPU the kernel looks at them and gives NaN: reading them here would wait for it. */
    if (device.device_type == kDLCPU) MTL_TRY(check_targets(&args));
    return MTL_RUN(cross_entropy, context, op, &args);
}
