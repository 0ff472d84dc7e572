/* Element types: names and the slow conversions. SPDX-License-Identifier: MIT */
#include "core/dtype.h"

const char *mtl_dtype_name(mtl_dtype dtype) {
    static const char *const name[MTL_DTYPES] = {"float32", "float16", "bfloat16", "float64",  "bool",
                                                 "int8",    "int16",   "int32",    "int64",    "uint8",
                                                 "uint16",  "uint32",  "uint64",   "complex64"};
    return name[dtype];
}

#define MTL_READ(type)                           \
    do {                                         \
        type value_;                             \
        memcpy(&value_, element, sizeof value_); \
        return MTL_CAST(value_);                 \
    } while (0)

double mtl_load_double(const void *element, mtl_dtype dtype) {
#define MTL_CAST(value) (double)(value)
    switch (dtype) {
    case MTL_F64: MTL_READ(double);
    case MTL_I8: MTL_READ(int8_t);
    case MTL_I16: MTL_READ(int16_t);
    case MTL_I32: MTL_READ(int32_t);
    case MTL_I64: MTL_READ(int64_t);
    case MTL_U8: MTL_READ(uint8_t);
    case MTL_U16: MTL_READ(uint16_t);
    case MTL_U32: MTL_READ(uint32_t);
    case MTL_U64: MTL_READ(uint64_t);
    case MTL_BOOL: return *(const uint8_t *)element != 0;
    default: return (double)mtl_load_float(element, dtype);
    }
#undef MTL_CAST
}

int64_t mtl_load_integer(const void *element, mtl_dtype dtype) {
#define MTL_CAST(value) (int64_t)(value)
    switch (dtype) {
    case MTL_I8: MTL_READ(int8_t);
    case MTL_I16: MTL_READ(int16_t);
    case MTL_I32: MTL_READ(int32_t);
    case MTL_I64: MTL_READ(int64_t);
    case MTL_U8: MTL_READ(uint8_t);
    case MTL_U16: MTL_READ(uint16_t);
    case MTL_U32: MTL_READ(uint32_t);
    case MTL_U64: {
        uint64_t value;
        memcpy(&value, element, sizeof value);
        return value > INT64_MAX ? INT64_MAX : (int64_t)value;
    }
    default: return *(const uint8_t *)element != 0;
    }
#undef MTL_CAST
}
