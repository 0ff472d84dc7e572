/* The operations by name. SPDX-License-Identifier: MIT */
#include "operations.h"

#include "core/tensor.h"

#include <metalloid/metalloid.h>
#include <stdio.h>
#include <string.h>

/* A call with its inputs in their places, absent ones NULL. */
typedef struct placed_call {
    const DLTensor *in[MTL_MOST_INPUTS];
    DLTensor *out[MTL_MOST_OUTPUTS];
    const double *reals;
    const int64_t *integers;
    metalloid_context *context;
    bool checks_only;
} placed_call;

/* ---- norms -------------------------------------------------------------------------------------------------------------- */

static metalloid_status rms_norm(const placed_call *call) {
    return metalloid_rms_norm(call->context, call->in[0], call->in[1], call->reals[0], call->out[0]);
}

static metalloid_status layer_norm(const placed_call *call) {
    return metalloid_layer_norm(call->context, call->in[0], call->in[1], call->in[2], call->reals[0], call->out[0]);
}

static metalloid_status add_rms_norm(const placed_call *call) {
    return metalloid_add_rms_norm(call->context, call->in[0], call->in[1], call->in[2], call->reals[0], call->out[0],
                                  call->out[1]);
}

static metalloid_status add_layer_norm(const placed_call *call) {
    return metalloid_add_layer_norm(call->context, call->in[0], call->in[1], call->in[2], call->in[3], call->reals[0],
                                    call->out[0], call->out[1]);
}

/* ---- rotary position embedding ------------------------------------------------------------------------------------------ */

#define ROPE_INPUTS   "offset", "freqs", "position_ids", "inv_freqs"
#define ROPE_INTEGERS "dims", "traditional", "offset", "time_axis"
#define ROPE_REALS    "base", "scale"

static metalloid_rope_options rope_options(const placed_call *call, int first) {
    metalloid_rope_options options = METALLOID_ROPE_OPTIONS_INIT;
    options.offsets = call->in[first];
    options.freqs = call->in[first + 1];
    options.position_ids = call->in[first + 2];
    options.inv_freqs = call->in[first + 3];
    options.base = call->reals[0];
    options.scale = call->reals[1];
    options.traditional = call->integers[1] != 0;
    options.offset = call->integers[2];
    options.time_axis = call->integers[3] == 1 ? METALLOID_TIME_AXIS_1 : METALLOID_TIME_SECOND_TO_LAST;
    return options;
}

static metalloid_status rope(const placed_call *call) {
    metalloid_rope_options options = rope_options(call, 1);
    return metalloid_rope(call->context, call->in[0], call->integers[0], &options, call->out[0]);
}

static metalloid_status qk_norm_rope(const placed_call *call) {
    metalloid_rope_options options = rope_options(call, 4);
    return metalloid_qk_norm_rope(call->context, call->in[0], call->in[1], call->in[2], call->in[3], call->reals[2],
                                  call->integers[0], &options, call->out[0], call->out[1]);
}

/* ---- gated activations ---------------------------------------------------------------------------------------------------- */

static metalloid_status swiglu(const placed_call *call) {
    return metalloid_swiglu(call->context, call->in[0], call->in[1], call->out[0]);
}

static metalloid_status geglu(const placed_call *call) {
    metalloid_gelu approximate = call->integers[0] ? METALLOID_GELU_TANH : METALLOID_GELU_ERF;
    return metalloid_geglu(call->context, call->in[0], call->in[1], approximate, call->out[0]);
}

/* ---- attention ------------------------------------------------------------------------------------------------------------ */

static metalloid_status scaled_dot_product_attention(const placed_call *call) {
    metalloid_attention_options options = METALLOID_ATTENTION_OPTIONS_INIT;
    options.mask = call->in[3];
    options.sinks = call->in[4];
    options.key_mask = call->in[5];
    options.softcap = call->reals[1];
    options.causal = call->integers[0] != 0;
    options.causal_offset = call->integers[1];
    options.window = call->integers[2];
    options.logsumexp = call->out[1];
    return metalloid_scaled_dot_product_attention(call->context, call->in[0], call->in[1], call->in[2], call->reals[0],
                                                  &options, call->out[0]);
}

/* The caches are results whose memory the caller has made those of the inputs. */
static metalloid_status kv_cache_sdpa_update(const placed_call *call) {
    static const char op[] = "kv_cache_sdpa_update";
    const DLTensor *offset = call->in[5];
    MTL_REQUIRE(offset && offset->ndim == 0 && offset->dtype.code == kDLInt && offset->dtype.bits == 32 &&
                    offset->device.device_type != kDLCUDA,
                op, "%s must be an int32 on the CPU", "offset");
    for (int cache = 0; cache < 2 && !call->checks_only; cache++) {
        MTL_REQUIRE(call->in[3 + cache] && call->out[1 + cache] &&
                        call->in[3 + cache]->data == call->out[1 + cache]->data,
                    op, "%s must be updated in place", cache ? "v_cache" : "k_cache");
    }
    int32_t at = 0;
    if (!call->checks_only) memcpy(&at, offset->data, sizeof at);
    return metalloid_kv_cache_sdpa_update(call->context, call->in[0], call->in[1], call->in[2], call->out[1],
                                          call->out[2], at, call->in[6], call->reals[0], call->out[0]);
}

/* ---- loss, gated delta rule ------------------------------------------------------------------------------------------------- */

static metalloid_status cross_entropy(const placed_call *call) {
    metalloid_cross_entropy_options options = METALLOID_CROSS_ENTROPY_OPTIONS_INIT;
    options.has_ignore_index = call->integers[0] != 0;
    options.ignore_index = call->integers[1];
    return metalloid_cross_entropy(call->context, call->in[0], call->in[1], &options, call->out[0]);
}

static metalloid_status gated_delta_update(const placed_call *call) {
    return metalloid_gated_delta_update(call->context, call->in[0], call->in[1], call->in[2], call->in[3], call->in[4],
                                        call->in[5], call->in[6], call->out[0], call->out[1]);
}

/* ---- the list --------------------------------------------------------------------------------------------------------------- */

typedef struct operation {
    mtl_operation_names names;
    metalloid_status (*run)(const placed_call *call);
} operation;

static const operation operations[] = {
    [MTL_RMS_NORM] = {{"rms_norm", {"x", "weight"}, {"eps"}, {NULL}}, rms_norm},
    [MTL_LAYER_NORM] = {{"layer_norm", {"x", "weight", "bias"}, {"eps"}, {NULL}}, layer_norm},
    [MTL_ADD_RMS_NORM] = {{"add_rms_norm", {"x", "residual", "weight"}, {"eps"}, {NULL}}, add_rms_norm},
    [MTL_ADD_LAYER_NORM] = {{"add_layer_norm", {"x", "residual", "weight", "bias"}, {"eps"}, {NULL}}, add_layer_norm},
    [MTL_ROPE] = {{"rope", {"a", ROPE_INPUTS}, {ROPE_REALS}, {ROPE_INTEGERS}}, rope},
    [MTL_QK_NORM_ROPE] =
        {{"qk_norm_rope", {"q", "k", "q_weight", "k_weight", ROPE_INPUTS}, {ROPE_REALS, "eps"}, {ROPE_INTEGERS}},
         qk_norm_rope},
    [MTL_SWIGLU] = {{"swiglu", {"gate", "up"}, {NULL}, {NULL}}, swiglu},
    [MTL_GEGLU] = {{"geglu", {"gate", "up"}, {NULL}, {"approximate"}}, geglu},
    [MTL_SCALED_DOT_PRODUCT_ATTENTION] = {{"scaled_dot_product_attention",
                                           {"q", "k", "v", "mask", "sinks", "key_mask"},
                                           {"scale", "softcap"},
                                           {"causal", "causal_offset", "window"}},
                                          scaled_dot_product_attention},
    [MTL_KV_CACHE_SDPA_UPDATE] = {{"kv_cache_sdpa_update",
                                   {"q", "new_k", "new_v", "k_cache", "v_cache", "offset", "key_mask"},
                                   {"scale"},
                                   {NULL}},
                                  kv_cache_sdpa_update},
    [MTL_CROSS_ENTROPY] = {{"cross_entropy", {"logits", "targets"}, {NULL}, {"has_ignore_index", "ignore_index"}},
                           cross_entropy},
    [MTL_GATED_DELTA_UPDATE] =
        {{"gated_delta_update", {"q", "k", "v", "gamma", "beta", "initial_state", "mask"}, {NULL}, {NULL}},
         gated_delta_update},
};

const mtl_operation_names *mtl_operation_names_of(int number) { return &operations[number].names; }

int mtl_operation_find(const char *name) {
    for (int i = 0; i < MTL_OPERATION_COUNT; i++) {
        if (strcmp(operations[i].names.name, name) == 0) return i;
    }
    return -1;
}

/* ---- a call ----------------------------------------------------------------------------------------------------------------- */

static DLTensor tensor_of(const mtl_operand *operand, DLDevice device) {
    return (DLTensor){.data = operand->data,
                      .device = device,
                      .ndim = operand->rank,
                      .dtype = {operand->code, operand->bits, 1},
                      .shape = (int64_t *)(uintptr_t)operand->shape, /* DLPack knows no const */
                      .strides = (int64_t *)(uintptr_t)operand->strides};
}

static metalloid_status run(const operation *op, const mtl_operands *operands, placed_call *call, DLDevice device) {
    DLTensor tensors[MTL_MOST_INPUTS + MTL_MOST_OUTPUTS];
    int taken = 0;
    for (int place = 0; place < MTL_MOST_INPUTS; place++) {
        call->in[place] = NULL;
        if (!(operands->given >> place & 1)) continue;
        MTL_REQUIRE(taken < operands->input_count && op->names.inputs[place], op->names.name,
                    "%s says more inputs than there are", "given");
        tensors[taken] = tensor_of(&operands->inputs[taken], device);
        call->in[place] = &tensors[taken++];
    }
    MTL_REQUIRE(taken == operands->input_count && operands->output_count <= MTL_MOST_OUTPUTS, op->names.name,
                "%s says fewer inputs than there are, or there are too many outputs", "given");
    for (int i = 0; i < MTL_MOST_OUTPUTS; i++) {
        call->out[i] = NULL;
        if (i >= operands->output_count) continue;
        tensors[taken] = tensor_of(&operands->outputs[i], device);
        call->out[i] = &tensors[taken++];
    }
    call->reals = operands->reals;
    call->integers = operands->integers;
    return op->run(call);
}

int mtl_operation_run(int number, const mtl_operands *operands) {
    placed_call call = {.context = NULL};
    if (operands->on_cuda) {
        metalloid_status status = metalloid_context_create(&call.context);
        if (status != METALLOID_OK) return status;
        metalloid_context_set_stream(call.context, operands->stream);
    }
    DLDevice device = operands->on_cuda ? (DLDevice){kDLCUDA, operands->device_id} : (DLDevice){kDLCPU, 0};
    metalloid_status status = run(&operations[number], operands, &call, device);
    metalloid_context_destroy(call.context);
    return status;
}

int mtl_operation_check(int number, const mtl_operands *operands) {
    placed_call call = {.checks_only = true};
    return run(&operations[number], operands, &call, (DLDevice){MTL_NO_DEVICE, 0});
}

const mtl_operations mtl_operations_table = {sizeof(mtl_operations), mtl_operation_find, mtl_operation_run,
                                             metalloid_last_error, mtl_kernel_call_launch};
