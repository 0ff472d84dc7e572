/* Results larger than the caches are written past them (mtl_cpu_streams): the same bits as where they are not. SPDX-License-Identifier: MIT
 *
 * A call is compared with calls on runs of its rows, each too small for that. */
#include "cpu/kernels.h"
#include "support.h"

#include <stdlib.h>

enum { ROWS_AT_ONCE = 64 };

typedef struct large_call {
    DLDataType type;
    int64_t rows, length;
    char *x, *y, *sum, *out, *weight; /* y: residual, or what is multiplied */
} large_call;

static int64_t row_bytes(const large_call *c) { return c->length * c->type.bits / 8; }

static DLTensor part(const large_call *c, char *data, int64_t first, int64_t *shape) {
    return (DLTensor){data + first * row_bytes(c), {kDLCPU, 0}, 2, c->type, shape, NULL, 0};
}

typedef metalloid_status operation_on_rows(DLTensor *x, DLTensor *y, DLTensor *weight, DLTensor *sum, DLTensor *out);

static metalloid_status rms_norm(DLTensor *x, DLTensor *y, DLTensor *weight, DLTensor *sum, DLTensor *out) {
    (void)y, (void)sum;
    return metalloid_rms_norm(NULL, x, weight, 1e-5, out);
}
static metalloid_status layer_norm(DLTensor *x, DLTensor *y, DLTensor *weight, DLTensor *sum, DLTensor *out) {
    (void)y, (void)sum;
    return metalloid_layer_norm(NULL, x, weight, weight, 1e-5, out);
}
static metalloid_status add_rms_norm(DLTensor *x, DLTensor *y, DLTensor *weight, DLTensor *sum, DLTensor *out) {
    return metalloid_add_rms_norm(NULL, x, y, weight, 1e-5, sum, out);
}
static metalloid_status swiglu(DLTensor *x, DLTensor *y, DLTensor *weight, DLTensor *sum, DLTensor *out) {
    (void)weight, (void)sum;
    return metalloid_swiglu(NULL, x, y, out);
}
static metalloid_status geglu(DLTensor *x, DLTensor *y, DLTensor *weight, DLTensor *sum, DLTensor *out) {
    (void)weight, (void)sum;
    return metalloid_geglu(NULL, x, y, METALLOID_GELU_TANH, out);
}
/* Rows are heads, all of one time step, so that a run of them is turned as it would be among the others. */
static metalloid_status turn(DLTensor *x, DLTensor *out, bool traditional) {
    int64_t shape[4] = {1, x->shape[0], 1, x->shape[1]};
    DLTensor heads = *x, turned = *out;
    heads.ndim = turned.ndim = 4;
    heads.shape = turned.shape = shape;
    metalloid_rope_options options = METALLOID_ROPE_OPTIONS_INIT;
    options.base = 10000;
    options.offset = 11;
    options.traditional = traditional;
    return metalloid_rope(NULL, &heads, shape[3] / 2 * 2, &options, &turned);
}
static metalloid_status rope(DLTensor *x, DLTensor *y, DLTensor *weight, DLTensor *sum, DLTensor *out) {
    (void)y, (void)weight, (void)sum;
    return turn(x, out, false);
}
static metalloid_status traditional_rope(DLTensor *x, DLTensor *y, DLTensor *weight, DLTensor *sum, DLTensor *out) {
    (void)y, (void)weight, (void)sum;
    return turn(x, out, true);
}

static void on_rows(const large_call *c, operation_on_rows *run, int64_t first, int64_t count) {
    int64_t shape[2] = {count, c->length};
    DLTensor x = part(c, c->x, first, shape), y = part(c, c->y, first, shape), sum = part(c, c->sum, first, shape),
             out = part(c, c->out, first, shape), weight = part(c, c->weight, 0, shape + 1);
    weight.ndim = 1;
    expect_ok(run(&x, &y, &weight, &sum, &out));
}

/* A hash of what was written (FNV-1a, eight bytes at a time). */
static uint64_t hash(const char *bytes, int64_t count) {
    uint64_t h = 14695981039346656037u, word;
    for (int64_t i = 0; i + 8 <= count; i += 8) {
        memcpy(&word, bytes + i, sizeof word);
        h = (h ^ word) * 1099511628211u;
    }
    return h;
}

static void fill_pattern(const large_call *c, char *to, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        uint16_t half =
            (uint16_t)(random_bits() & 0x807f); /* bfloat16 of magnitude 1 to 2, and the upper half of such a float32 */
        half |= c->type.code == kDLBfloat || c->type.bits == 32 ? 0x3f80 : 0x3c00;
        if (c->type.bits == 32) {
            uint32_t word = (uint32_t)half << 16 | (random_bits() & 0xffff);
            memcpy(to + i * 4, &word, sizeof word);
        } else {
            memcpy(to + i * 2, &half, sizeof half);
        }
    }
}

static void same_bits_past_the_caches(void **state) {
    (void)state;
#ifndef __x86_64__
    print_message("left out: no such stores for this processor\n");
    skip();
#endif
    int64_t bytes = 12 << 20;
    while (!mtl_cpu_streams((double)bytes) && bytes < (int64_t)256 << 20) bytes += bytes / 4;
    if (!mtl_cpu_streams((double)bytes)) {
        print_message("left out: the caches of this machine are too large\n");
        skip();
    }
    static const DLDataType types[] = {{kDLFloat, 32, 1}, {kDLFloat, 16, 1}, {kDLBfloat, 16, 1}};
    static operation_on_rows *const operations[] = {rms_norm, layer_norm, add_rms_norm,    swiglu,
                                                    geglu,    rope,       traditional_rope};
    static const int64_t lengths[] = {1024, 1042,
                                      1024}; /* rows that begin on a vector's boundary, and rows that do not */
    for (int t = 0; t < 3; t++) {
        large_call c = {.type = types[t], .length = lengths[t]};
        c.rows = bytes / row_bytes(&c) + 1;
        char **buffers[] = {&c.x, &c.y, &c.sum, &c.out, &c.weight};
        for (int i = 0; i < 5; i++) {
            *buffers[i] = aligned_alloc(64, (size_t)(c.rows * row_bytes(&c) + 63) / 64 * 64);
            assert_non_null(*buffers[i]);
            fill_pattern(&c, *buffers[i], i < 2 ? c.rows * c.length : c.length);
        }
        for (size_t i = 0; i < sizeof operations / sizeof *operations; i++) {
            describe("%s, length %lld, operation %zu",
                     t == 0   ? "float32"
                     : t == 1 ? "float16"
                              : "bfloat16",
                     (long long)c.length, i);
            on_rows(&c, operations[i], 0, c.rows);
            uint64_t whole[2] = {hash(c.out, c.rows * row_bytes(&c)), hash(c.sum, c.rows * row_bytes(&c))};
            memset(c.out, 0xff, (size_t)(c.rows * row_bytes(&c)));
            memset(c.sum, 0xff, operations[i] == add_rms_norm ? (size_t)(c.rows * row_bytes(&c)) : 0);
            for (int64_t first = 0; first < c.rows; first += ROWS_AT_ONCE)
                on_rows(&c, operations[i], first, c.rows - first < ROWS_AT_ONCE ? c.rows - first : ROWS_AT_ONCE);
            assert_true(hash(c.out, c.rows * row_bytes(&c)) == whole[0]);
            if (operations[i] == add_rms_norm) assert_true(hash(c.sum, c.rows * row_bytes(&c)) == whole[1]);
        }
        for (int i = 0; i < 5; i++) free(*buffers[i]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(same_bits_past_the_caches)};
    return cmocka_run_group_tests_name("large results", tests, NULL, NULL);
}
