/* The declarations of bindings/python/src/xla.h against those of the header that jaxlib installs: compiled, never run. */
#include <assert.h>
#include <xla/ffi/api/c_api.h>

#include "xla.h"

#define SAME(ours, our_field, theirs, their_field)                                                       \
    static_assert(offsetof(ours, our_field) == offsetof(theirs, their_field), #theirs "." #their_field); \
    static_assert(sizeof(((ours *)0)->our_field) == sizeof(((theirs *)0)->their_field), #theirs "." #their_field)

#define EQUAL(ours, theirs) static_assert((int)(ours) == (int)(theirs), #theirs)

EQUAL(XLA_MAJOR_VERSION, XLA_FFI_API_MAJOR);
EQUAL(XLA_METADATA, XLA_FFI_Extension_Metadata);
EQUAL(XLA_BUFFER, XLA_FFI_ArgType_BUFFER);
EQUAL(XLA_BUFFER, XLA_FFI_RetType_BUFFER);
EQUAL(XLA_ATTRIBUTE_SCALAR, XLA_FFI_AttrType_SCALAR);
EQUAL(XLA_EXECUTE, XLA_FFI_ExecutionStage_EXECUTE);
EQUAL(XLA_COMMAND_BUFFER_COMPATIBLE, XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE);
EQUAL(XLA_INVALID_ARGUMENT, XLA_FFI_Error_Code_INVALID_ARGUMENT);
EQUAL(XLA_RESOURCE_EXHAUSTED, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
EQUAL(XLA_UNIMPLEMENTED, XLA_FFI_Error_Code_UNIMPLEMENTED);
EQUAL(XLA_INTERNAL, XLA_FFI_Error_Code_INTERNAL);
EQUAL(XLA_PRED, XLA_FFI_DataType_PRED);
EQUAL(XLA_S8, XLA_FFI_DataType_S8);
EQUAL(XLA_S16, XLA_FFI_DataType_S16);
EQUAL(XLA_S32, XLA_FFI_DataType_S32);
EQUAL(XLA_S64, XLA_FFI_DataType_S64);
EQUAL(XLA_U8, XLA_FFI_DataType_U8);
EQUAL(XLA_U16, XLA_FFI_DataType_U16);
EQUAL(XLA_U32, XLA_FFI_DataType_U32);
EQUAL(XLA_U64, XLA_FFI_DataType_U64);
EQUAL(XLA_F16, XLA_FFI_DataType_F16);
EQUAL(XLA_F32, XLA_FFI_DataType_F32);
EQUAL(XLA_F64, XLA_FFI_DataType_F64);
EQUAL(XLA_BF16, XLA_FFI_DataType_BF16);

SAME(xla_extension, type, XLA_FFI_Extension_Base, type);
SAME(xla_version, major, XLA_FFI_Api_Version, major_version);
SAME(xla_version, minor, XLA_FFI_Api_Version, minor_version);
SAME(xla_metadata, version, XLA_FFI_Metadata, api_version);
SAME(xla_metadata, traits, XLA_FFI_Metadata, traits);
SAME(xla_metadata_extension, metadata, XLA_FFI_Metadata_Extension, metadata);
SAME(xla_buffer, dtype, XLA_FFI_Buffer, dtype);
SAME(xla_buffer, data, XLA_FFI_Buffer, data);
SAME(xla_buffer, rank, XLA_FFI_Buffer, rank);
SAME(xla_buffer, dims, XLA_FFI_Buffer, dims);
SAME(xla_byte_span, data, XLA_FFI_ByteSpan, ptr);
SAME(xla_byte_span, length, XLA_FFI_ByteSpan, len);
SAME(xla_scalar, dtype, XLA_FFI_Scalar, dtype);
SAME(xla_scalar, value, XLA_FFI_Scalar, value);
SAME(xla_operands, size, XLA_FFI_Args, size);
SAME(xla_operands, types, XLA_FFI_Args, types);
SAME(xla_operands, items, XLA_FFI_Args, args);
SAME(xla_operands, size, XLA_FFI_Rets, size);
SAME(xla_operands, types, XLA_FFI_Rets, types);
SAME(xla_operands, items, XLA_FFI_Rets, rets);
SAME(xla_attributes, size, XLA_FFI_Attrs, size);
SAME(xla_attributes, types, XLA_FFI_Attrs, types);
SAME(xla_attributes, names, XLA_FFI_Attrs, names);
SAME(xla_attributes, values, XLA_FFI_Attrs, attrs);
SAME(xla_error_create_args, message, XLA_FFI_Error_Create_Args, message);
SAME(xla_error_create_args, code, XLA_FFI_Error_Create_Args, errc);
SAME(xla_stream_args, context, XLA_FFI_Stream_Get_Args, ctx);
SAME(xla_stream_args, stream, XLA_FFI_Stream_Get_Args, stream);
SAME(xla_device_args, context, XLA_FFI_DeviceOrdinal_Get_Args, ctx);
SAME(xla_device_args, device_ordinal, XLA_FFI_DeviceOrdinal_Get_Args, device_ordinal);
SAME(xla_api, version, XLA_FFI_Api, api_version);
SAME(xla_api, error_create, XLA_FFI_Api, XLA_FFI_Error_Create);
SAME(xla_api, stream_get, XLA_FFI_Api, XLA_FFI_Stream_Get);
SAME(xla_api, device_ordinal_get, XLA_FFI_Api, XLA_FFI_DeviceOrdinal_Get);
SAME(xla_call_frame, api, XLA_FFI_CallFrame, api);
SAME(xla_call_frame, context, XLA_FFI_CallFrame, ctx);
SAME(xla_call_frame, stage, XLA_FFI_CallFrame, stage);
SAME(xla_call_frame, arguments, XLA_FFI_CallFrame, args);
SAME(xla_call_frame, results, XLA_FFI_CallFrame, rets);
SAME(xla_call_frame, attributes, XLA_FFI_CallFrame, attrs);
