/* The operations as handlers of XLA's foreign function interface, for jax.ffi. SPDX-License-Identifier: MIT
 *
 * A handler is called with a frame that describes its arguments, results and attributes; what it must look like is XLA's stable C
 * ABI (version 0.x; the header xla/ffi/api/c_api.h, that jaxlib installs). The parts that a handler meets are declared here in its
 * layout, so that the package is built without jaxlib, which is a hundred times its size; a test compares them with the header. */
#include "xla.h"

#include "operations.h"

#include <metalloid/metalloid.h>
#include <string.h>

static void *field(void *const *items, int64_t index) { return items[index]; }

/* ---- errors --------------------------------------------------------------------------------------------------------------- */

static xla_error *fail(const xla_call_frame *frame, int code, const char *message) {
    xla_error_create_args args = {.struct_size = sizeof args, .message = message, .code = code};
    return frame->api->error_create(&args);
}

static xla_error *fail_with(const xla_call_frame *frame, metalloid_status status) {
    if (status == METALLOID_OK) return NULL;
    int code = status == METALLOID_INVALID_ARGUMENT ? XLA_INVALID_ARGUMENT
               : status == METALLOID_OUT_OF_MEMORY  ? XLA_RESOURCE_EXHAUSTED
               : status == METALLOID_UNSUPPORTED    ? XLA_UNIMPLEMENTED
                                                    : XLA_INTERNAL;
    return fail(frame, code, metalloid_last_error());
}

/* ---- arguments ------------------------------------------------------------------------------------------------------------ */

/* False for a dtype that no operation takes. */
static bool operand_of(mtl_operand *operand, const xla_buffer *buffer) {
    static const struct {
        uint8_t code, bits;
    } dtypes[] = {[XLA_PRED] = {METALLOID_DL_BOOL, 8},
                  [XLA_S8] = {kDLInt, 8},
                  [XLA_S16] = {kDLInt, 16},
                  [XLA_S32] = {kDLInt, 32},
                  [XLA_S64] = {kDLInt, 64},
                  [XLA_U8] = {kDLUInt, 8},
                  [XLA_U16] = {kDLUInt, 16},
                  [XLA_U32] = {kDLUInt, 32},
                  [XLA_U64] = {kDLUInt, 64},
                  [XLA_F16] = {kDLFloat, 16},
                  [XLA_F32] = {kDLFloat, 32},
                  [XLA_F64] = {kDLFloat, 64},
                  [XLA_BF16] = {kDLBfloat, 16}};
    if (buffer->dtype < 0 || (size_t)buffer->dtype >= sizeof dtypes / sizeof dtypes[0]) return false;
    *operand = (mtl_operand){.data = buffer->data,
                             .shape = buffer->dims,
                             .rank = (int32_t)buffer->rank,
                             .code = dtypes[buffer->dtype].code,
                             .bits = dtypes[buffer->dtype].bits};
    return operand->bits != 0;
}

/* The value of a scalar attribute, or NULL. */
static const void *attribute(const xla_attributes *attributes, const char *name, int dtype) {
    size_t length = strlen(name);
    for (int64_t i = 0; i < attributes->size; i++) {
        const xla_byte_span *candidate = attributes->names[i];
        if (candidate->length != length || memcmp(candidate->data, name, length) != 0) continue;
        const xla_scalar *scalar = field(attributes->values, i);
        return attributes->types[i] == XLA_ATTRIBUTE_SCALAR && scalar->dtype == dtype ? scalar->value : NULL;
    }
    return NULL;
}

/* ---- a call --------------------------------------------------------------------------------------------------------------- */

static xla_error *describe_handler(const xla_call_frame *frame) {
    const xla_metadata_extension *extension = (const xla_metadata_extension *)frame->extension_start;
    /* A minor version of the ABI only adds fields behind those that are read here: this handler is of any. */
    extension->metadata->version.major = XLA_MAJOR_VERSION;
    extension->metadata->version.minor = frame->api->version.minor;
    extension->metadata->traits = XLA_COMMAND_BUFFER_COMPATIBLE;
    return NULL;
}

static xla_error *handle(const xla_call_frame *frame, int operation, bool on_cuda) {
    if (frame->extension_start && frame->extension_start->type == XLA_METADATA) return describe_handler(frame);
    if (frame->stage != XLA_EXECUTE) return NULL;

    const mtl_operation_names *names = mtl_operation_names_of(operation);
    if (frame->arguments.size > MTL_MOST_INPUTS || frame->results.size > MTL_MOST_OUTPUTS)
        return fail(frame, XLA_INVALID_ARGUMENT, "too many arguments or results");
    mtl_operand inputs[MTL_MOST_INPUTS], outputs[MTL_MOST_OUTPUTS];
    for (int64_t i = 0; i < frame->arguments.size; i++) {
        if (frame->arguments.types[i] != XLA_BUFFER || !operand_of(&inputs[i], field(frame->arguments.items, i)))
            return fail(frame, XLA_INVALID_ARGUMENT, "an argument has a dtype that no operation takes");
    }
    for (int64_t i = 0; i < frame->results.size; i++) {
        if (frame->results.types[i] != XLA_BUFFER || !operand_of(&outputs[i], field(frame->results.items, i)))
            return fail(frame, XLA_INVALID_ARGUMENT, "a result has a dtype that no operation gives");
    }

    double reals[MTL_MOST_REALS];
    int64_t integers[MTL_MOST_INTEGERS];
    for (int i = 0; names->reals[i]; i++) {
        const void *value = attribute(&frame->attributes, names->reals[i], XLA_F64);
        if (!value) return fail(frame, XLA_INVALID_ARGUMENT, "an attribute that must be float64 is not there");
        memcpy(&reals[i], value, sizeof reals[i]);
    }
    for (int i = 0; names->integers[i]; i++) {
        const void *value = attribute(&frame->attributes, names->integers[i], XLA_S64);
        if (!value) return fail(frame, XLA_INVALID_ARGUMENT, "an attribute that must be int64 is not there");
        memcpy(&integers[i], value, sizeof integers[i]);
    }
    int64_t given;
    const void *value = attribute(&frame->attributes, "given", XLA_S64);
    if (!value) return fail(frame, XLA_INVALID_ARGUMENT, "the attribute given, int64, is not there");
    memcpy(&given, value, sizeof given);

    mtl_operands operands = {.inputs = inputs,
                             .outputs = outputs,
                             .given = (uint32_t)given,
                             .input_count = (int32_t)frame->arguments.size,
                             .output_count = (int32_t)frame->results.size,
                             .reals = reals,
                             .integers = integers,
                             .on_cuda = on_cuda};
    if (on_cuda) {
        xla_stream_args stream = {.struct_size = sizeof stream, .context = frame->context};
        xla_device_args device = {.struct_size = sizeof device, .context = frame->context};
        xla_error *error = frame->api->stream_get(&stream);
        if (!error) error = frame->api->device_ordinal_get(&device);
        if (error) return error;
        operands.stream = stream.stream;
        operands.device_id = device.device_ordinal;
    }
    return fail_with(frame, mtl_operation_run(operation, &operands));
}

/* ---- the handlers, two of each operation ------------------------------------------------------------------------------------ */

#define HANDLERS(name, operation)                                                                            \
    static xla_error *name##_on_cpu(const xla_call_frame *frame) { return handle(frame, operation, false); } \
    static xla_error *name##_on_cuda(const xla_call_frame *frame) { return handle(frame, operation, true); }

HANDLERS(rms_norm, MTL_RMS_NORM)
HANDLERS(layer_norm, MTL_LAYER_NORM)
HANDLERS(add_rms_norm, MTL_ADD_RMS_NORM)
HANDLERS(add_layer_norm, MTL_ADD_LAYER_NORM)
HANDLERS(rope, MTL_ROPE)
HANDLERS(qk_norm_rope, MTL_QK_NORM_ROPE)
HANDLERS(swiglu, MTL_SWIGLU)
HANDLERS(geglu, MTL_GEGLU)
HANDLERS(scaled_dot_product_attention, MTL_SCALED_DOT_PRODUCT_ATTENTION)
HANDLERS(kv_cache_sdpa_update, MTL_KV_CACHE_SDPA_UPDATE)
HANDLERS(cross_entropy, MTL_CROSS_ENTROPY)
HANDLERS(gated_delta_update, MTL_GATED_DELTA_UPDATE)

#define PAIR(name) \
    { name##_on_cpu, name##_on_cuda }

static xla_handler *const handlers[MTL_OPERATION_COUNT][2] = {
    [MTL_RMS_NORM] = PAIR(rms_norm),
    [MTL_LAYER_NORM] = PAIR(layer_norm),
    [MTL_ADD_RMS_NORM] = PAIR(add_rms_norm),
    [MTL_ADD_LAYER_NORM] = PAIR(add_layer_norm),
    [MTL_ROPE] = PAIR(rope),
    [MTL_QK_NORM_ROPE] = PAIR(qk_norm_rope),
    [MTL_SWIGLU] = PAIR(swiglu),
    [MTL_GEGLU] = PAIR(geglu),
    [MTL_SCALED_DOT_PRODUCT_ATTENTION] = PAIR(scaled_dot_product_attention),
    [MTL_KV_CACHE_SDPA_UPDATE] = PAIR(kv_cache_sdpa_update),
    [MTL_CROSS_ENTROPY] = PAIR(cross_entropy),
    [MTL_GATED_DELTA_UPDATE] = PAIR(gated_delta_update),
};

xla_handler *mtl_xla_handler(int operation, bool on_cuda) { return handlers[operation][on_cuda]; }
