/* XLA's C ABI for handlers, as far as they meet it. SPDX-License-Identifier: MIT
 *
 * Layouts and numbers are those of xla/ffi/api/c_api.h, version 0.3, under names of ours; tests/python/xla_abi.c compares them. */
#ifndef METALLOID_PYTHON_XLA_H
#define METALLOID_PYTHON_XLA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { XLA_MAJOR_VERSION = 0 };
enum { XLA_METADATA = 1 };                  /* types of extensions */
enum { XLA_BUFFER = 1 };                    /* types of arguments and results */
enum { XLA_ATTRIBUTE_SCALAR = 3 };          /* types of attributes */
enum { XLA_EXECUTE = 3 };                   /* stages */
enum { XLA_COMMAND_BUFFER_COMPATIBLE = 1 }; /* traits: can be captured in a CUDA graph */
enum { XLA_INVALID_ARGUMENT = 3, XLA_RESOURCE_EXHAUSTED = 8, XLA_UNIMPLEMENTED = 12, XLA_INTERNAL = 13 }; /* errors */

enum { /* dtypes */
       XLA_PRED = 1,
       XLA_S8 = 2,
       XLA_S16 = 3,
       XLA_S32 = 4,
       XLA_S64 = 5,
       XLA_U8 = 6,
       XLA_U16 = 7,
       XLA_U32 = 8,
       XLA_U64 = 9,
       XLA_F16 = 10,
       XLA_F32 = 11,
       XLA_F64 = 12,
       XLA_BF16 = 16,
};

typedef struct xla_error xla_error;
typedef struct xla_context xla_context; /* of one execution */

typedef struct xla_extension {
    size_t struct_size;
    int type;
    struct xla_extension *next;
} xla_extension;

typedef struct xla_version {
    size_t struct_size;
    xla_extension *extension_start;
    int major, minor;
} xla_version;

typedef struct xla_metadata {
    size_t struct_size;
    xla_version version;
    uint32_t traits;
} xla_metadata;

typedef struct xla_metadata_extension {
    xla_extension base;
    xla_metadata *metadata;
} xla_metadata_extension;

typedef struct xla_buffer {
    size_t struct_size;
    xla_extension *extension_start;
    int dtype;
    void *data;
    int64_t rank;
    int64_t *dims;
} xla_buffer;

typedef struct xla_byte_span {
    const char *data;
    size_t length;
} xla_byte_span;

typedef struct xla_scalar {
    int dtype;
    void *value;
} xla_scalar;

typedef struct xla_operands { /* arguments or results */
    size_t struct_size;
    xla_extension *extension_start;
    int64_t size;
    int *types;
    void **items;
} xla_operands;

typedef struct xla_attributes {
    size_t struct_size;
    xla_extension *extension_start;
    int64_t size;
    int *types;
    xla_byte_span **names;
    void **values;
} xla_attributes;

typedef struct xla_error_create_args {
    size_t struct_size;
    xla_extension *extension_start;
    const char *message;
    int code;
} xla_error_create_args;

typedef struct xla_stream_args {
    size_t struct_size;
    xla_extension *extension_start;
    xla_context *context;
    void *stream; /* out */
} xla_stream_args;

typedef struct xla_device_args {
    size_t struct_size;
    xla_extension *extension_start;
    xla_context *context;
    int32_t device_ordinal; /* out */
} xla_device_args;

typedef struct xla_api {
    size_t struct_size;
    xla_extension *extension_start;
    xla_version version;
    const void *internal_api;
    xla_error *(*error_create)(xla_error_create_args *args);
    void *skipped[3]; /* error_get_message, error_destroy, handler_register */
    xla_error *(*stream_get)(xla_stream_args *args);
    void *skipped_too[12];
    xla_error *(*device_ordinal_get)(xla_device_args *args);
} xla_api;

typedef struct xla_call_frame {
    size_t struct_size;
    xla_extension *extension_start;
    const xla_api *api;
    xla_context *context;
    int stage;
    xla_operands arguments, results;
    xla_attributes attributes;
} xla_call_frame;

typedef xla_error *xla_handler(const xla_call_frame *frame);

xla_handler *mtl_xla_handler(int operation, bool on_cuda);

#endif
