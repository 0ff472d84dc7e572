/* float16 and bfloat16 storage, against rounding by exact scaling (support.c), which shares nothing with the library's bit tricks.
 * SPDX-License-Identifier: MIT */
#include "support.h"

#include <math.h>
#include <string.h>

#include "core/dtype.h"

static double widened(element_type type, uint16_t bits) {
    return (double)(type == F16 ? mtl_f16_to_float(bits) : mtl_bf16_to_float(bits));
}

static uint16_t narrowed(element_type type, float x) {
    return type == F16 ? mtl_float_to_f16(x) : mtl_float_to_bf16(x);
}

static uint16_t narrowed_double(element_type type, double x) {
    uint16_t bits;
    mtl_store_double(&bits, type == F16 ? MTL_F16 : MTL_BF16, x);
    return bits;
}

static bool is_nan_16(element_type type, uint16_t bits) { return (bits & 0x7fff) > (type == F16 ? 0x7c00 : 0x7f80); }

static void expect_bits(element_type type, double x, uint16_t got) {
    uint16_t wanted = encode_16(type, x);
    if (got != wanted) fail_msg("%a to %s: 0x%04x instead of 0x%04x", x, dtype_name(type), got, wanted);
}

static void every_16_bit_number_widens_to_its_value_and_comes_back(void **state) {
    (void)state;
    for (int type = F16; type <= BF16; type++) {
        for (int i = 0; i < 65536; i++) {
            uint16_t bits = (uint16_t)i;
            double value = widened((element_type)type, bits);
            if (is_nan_16((element_type)type, bits)) {
                assert_true(isnan(value));
                uint16_t back = narrowed((element_type)type, (float)value);
                assert_true(is_nan_16((element_type)type, back) && (back & (type == F16 ? 0x200 : 0x40))); /* quiet */
                assert_int_equal(back >> 15, bits >> 15);
                continue;
            }
            double expected = decode_16((element_type)type, bits);
            assert_true(value == expected && signbit(value) == signbit(expected));
            assert_int_equal(narrowed((element_type)type, (float)value), bits);
            assert_int_equal(narrowed_double((element_type)type, value), bits);
            assert_int_equal(encode_16((element_type)type, value), bits); /* the reference itself */
        }
    }
    report("numbers there and back", 2 * 65536);
}

/* Between each two neighbours: the middle, which is a tie, and the closest floats and doubles on either side of it. */
static void ties_go_to_even_and_their_neighbours_do_not(void **state) {
    (void)state;
    int count = 0;
    for (int type = F16; type <= BF16; type++) {
        int infinity = type == F16 ? 0x7c00 : 0x7f80;
        for (int i = 0; i < infinity; i++) {
            /* Past the largest number the middle is towards the power of two that infinity stands for. */
            double low = decode_16((element_type)type, (uint16_t)i);
            double high =
                i + 1 == infinity ? ldexp(1, type == F16 ? 16 : 128) : decode_16((element_type)type, (uint16_t)(i + 1));
            double middle = low + (high - low) / 2;
            assert_true((double)(float)middle == middle);
            for (int sign = -1; sign <= 1; sign += 2, count++) {
                float tie = (float)(sign * middle);
                const float floats[] = {tie, nextafterf(tie, 0), nextafterf(tie, (float)sign * INFINITY)};
                const double doubles[] = {sign * middle, nextafter(sign * middle, 0),
                                          nextafter(sign * middle, sign * INFINITY)};
                for (int j = 0; j < 3; j++) {
                    expect_bits((element_type)type, (double)floats[j], narrowed((element_type)type, floats[j]));
                    expect_bits((element_type)type, doubles[j], narrowed_double((element_type)type, doubles[j]));
                }
            }
        }
    }
    report("ties and their neighbours", count);
}

static void random_floats_round_once(void **state) {
    (void)state;
    seed(42);
    int count = scaled(2000000);
    for (int i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)random_bits();
        if (one_in(2)) bits = (bits & 0x807fffff) | (uint32_t)random_int(100, 146) << 23; /* the range of float16 */
        float x;
        memcpy(&x, &bits, sizeof x);
        if (isnan(x)) continue;
        for (int type = F16; type <= BF16; type++)
            expect_bits((element_type)type, (double)x, narrowed((element_type)type, x));
    }
    report("random floats", count);
}

/* A detour over the nearest float would round these twice. */
static void random_doubles_round_once(void **state) {
    (void)state;
    seed(43);
    int count = scaled(2000000), twice = 0;
    for (int i = 0; i < count; i++) {
        double x;
        if (one_in(2)) { /* close to a tie of one of the types */
            element_type type = one_in(2) ? F16 : BF16;
            double low = decode_16(type, (uint16_t)(random_bits() & 0xffff));
            if (!isfinite(low)) continue;
            x = low + copysign(half_ulp(type, low), low);
            x += copysign(ldexp(fabs(x), -(int)random_int(24, 52)), one_in(2) ? 1 : -1);
        } else {
            uint64_t bits = (random_bits() & 0x800fffffffffffff) | (uint64_t)random_int(1023 - 160, 1023 + 140) << 52;
            memcpy(&x, &bits, sizeof x);
        }
        for (int type = F16; type <= BF16; type++) {
            uint16_t got = narrowed_double((element_type)type, x);
            expect_bits((element_type)type, x, got);
            twice += got != narrowed((element_type)type, (float)x);
        }
    }
    assert_true(count < 1000 || twice > 0); /* else the numbers do not tell the two apart */
    report("random doubles", count);
    report("of them on which two roundings would have gone wrong", twice);
}

static void infinities_and_zeros_keep_their_sign(void **state) {
    (void)state;
    for (int type = F16; type <= BF16; type++) {
        const double special[] = {0, -0.0, INFINITY, -INFINITY, 1e300, -1e300, 1e-300, -1e-300, 5e-324, -5e-324};
        for (size_t i = 0; i < sizeof special / sizeof *special; i++) {
            expect_bits((element_type)type, special[i], narrowed_double((element_type)type, special[i]));
            expect_bits((element_type)type, special[i], narrowed((element_type)type, (float)special[i]));
        }
        assert_true(is_nan_16((element_type)type, narrowed_double((element_type)type, NAN)));
    }
}

static void integers_are_read_by_value(void **state) {
    (void)state;
    static const mtl_dtype type[] = {MTL_I8, MTL_I16, MTL_I32, MTL_I64, MTL_U8, MTL_U16, MTL_U32, MTL_U64};
    seed(44);
    for (int i = 0; i < scaled(10000); i++) {
        for (int j = 0; j < 8; j++) {
            int bits = 8 * (int)mtl_dtype_size(type[j]);
            uint64_t raw = random_bits() >> (one_in(3) ? random_int(0, 63) : 0);
            unsigned char bytes[8];
            for (int byte = 0; byte < bits / 8; byte++) bytes[byte] = (unsigned char)(raw >> 8 * byte);
            uint64_t low = bits == 64 ? raw : raw & (((uint64_t)1 << bits) - 1);
            bool negative = j < 4 && low >> (bits - 1) & 1;
            int64_t value =
                negative ? (int64_t)(low | ~(bits == 64 ? UINT64_MAX : ((uint64_t)1 << bits) - 1)) : (int64_t)low;
            if (j == 7 && low > INT64_MAX) { /* has no int64_t: saturates, and is never taken for a negative number */
                assert_true(mtl_load_integer(bytes, type[j]) == INT64_MAX);
                assert_true(mtl_load_double(bytes, type[j]) == (double)low);
                continue;
            }
            assert_true(mtl_load_integer(bytes, type[j]) == value);
            assert_true(mtl_load_double(bytes, type[j]) == (double)value);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_16_bit_number_widens_to_its_value_and_comes_back),
        cmocka_unit_test(ties_go_to_even_and_their_neighbours_do_not),
        cmocka_unit_test(random_floats_round_once),
        cmocka_unit_test(random_doubles_round_once),
        cmocka_unit_test(infinities_and_zeros_keep_their_sign),
        cmocka_unit_test(integers_are_read_by_value),
    };
    return cmocka_run_group_tests_name("dtype", tests, NULL, NULL);
}
