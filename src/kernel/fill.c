/* Outputs that begin with a value. SPDX-License-Identifier: MIT */
#include "kernel/kernel.h"

/* The integer of `bits` bits that is nearest; NaN gives 0. */
static uint64_t nearest_integer(double value, int bits, bool is_signed) {
    double most = is_signed ? ldexp(1, bits - 1) : ldexp(1, bits), least = is_signed ? -most : 0;
    if (isnan(value)) return 0;
    if (value <= least) return is_signed ? (uint64_t)1 << (bits - 1) : 0;
    if (value >= most) return is_signed ? ((uint64_t)1 << (bits - 1)) - 1 : UINT64_MAX;
    return value < 0 ? (uint64_t)(int64_t)value : (uint64_t)value;
}

void mtl_kernel_fill(const mtl_view *output, double value) {
    size_t size = (size_t)mtl_dtype_size(output->dtype), bytes = size * (size_t)output->elements;
    char element[8] = {0};
    uint64_t integer = 0;
    float real = (float)value;
    switch (output->dtype) {
    case MTL_BOOL: element[0] = value != 0; break;
    case MTL_C64: memcpy(element, &real, sizeof real); break;
    case MTL_F32:
    case MTL_F16:
    case MTL_BF16:
    case MTL_F64: mtl_store_double(element, output->dtype, value); break;
    default:
        integer = nearest_integer(value, (int)(8 * size), output->dtype < MTL_U8);
        switch (size) {
        case 1: memcpy(element, &(uint8_t){(uint8_t)integer}, size); break;
        case 2: memcpy(element, &(uint16_t){(uint16_t)integer}, size); break;
        case 4: memcpy(element, &(uint32_t){(uint32_t)integer}, size); break;
        default: memcpy(element, &integer, size); break;
        }
    }
    if (bytes == 0) return;
    if (memcmp(element, (const char[8]){0}, size) == 0) {
        memset(output->data, 0, bytes);
        return;
    }
    memcpy(output->data, element, size);
    for (size_t done = size; done < bytes;) { /* doubling */
        size_t more = done < bytes - done ? done : bytes - done;
        memcpy(output->data + done, output->data, more);
        done += more;
    }
}
