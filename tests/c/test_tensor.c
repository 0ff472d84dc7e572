/* Views, the exact overlap test and the merging of loops, against brute force on small random layouts.
 * SPDX-License-Identifier: MIT */
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/tensor.h"

static char memory[4096] __attribute__((aligned(64)));

/* A view of random shape and strides (any sign, also 0 and overlapping ones) around the middle of `memory`. */
typedef struct layout_case {
    DLTensor dl;
    int64_t shape[4], stride[4];
    int64_t size;
} layout_case;

static void random_layout(layout_case *c, int64_t most_stride, int64_t most_offset) {
    static const uint8_t bits[] = {8, 16, 32, 64};
    memset(c, 0, sizeof *c);
    c->size = 1 << random_int(0, 3);
    c->dl.dtype = (DLDataType){kDLInt, bits[c->size == 1 ? 0 : c->size == 2 ? 1 : c->size == 4 ? 2 : 3], 1};
    c->dl.device = (DLDevice){kDLCPU, 0};
    c->dl.ndim = (int)random_int(0, 4);
    for (int axis = 0; axis < c->dl.ndim; axis++) {
        c->shape[axis] = one_in(20) ? 0 : random_int(1, 4);
        c->stride[axis] = random_int(-most_stride, most_stride);
    }
    c->dl.shape = c->shape;
    c->dl.strides = c->stride;
    c->dl.data = memory + sizeof memory / 2 + random_int(0, most_offset / c->size) * c->size;
}

/* Visits each element's byte offset from `memory`. */
static int64_t next_element(const layout_case *c, int64_t number) {
    int64_t at = (char *)c->dl.data - memory;
    for (int axis = c->dl.ndim - 1; axis >= 0; axis--) {
        at += number % c->shape[axis] * c->stride[axis] * c->size;
        number /= c->shape[axis];
    }
    return at;
}

static int64_t elements_of(const layout_case *c) {
    int64_t count = 1;
    for (int axis = 0; axis < c->dl.ndim; axis++) count *= c->shape[axis];
    return count;
}

/* Adds one to each byte that an element covers; whether one was covered before. */
static bool cover(const layout_case *c, unsigned char *covered) {
    bool twice = false;
    int64_t count = elements_of(c);
    for (int64_t i = 0; i < count; i++) {
        int64_t at = next_element(c, i);
        for (int64_t byte = 0; byte < c->size; byte++) twice |= covered[at + byte]++ != 0;
    }
    return twice;
}

static void overlap_is_what_brute_force_says(void **state) {
    (void)state;
    seed(100);
    int count = scaled(60000), shared = 0, among_themselves = 0;
    for (int i = 0; i < count; i++) {
        layout_case a, b;
        int64_t most_stride = one_in(2) ? 4 : 20;
        random_layout(&a, most_stride, 64);
        random_layout(&b, most_stride, 64);
        mtl_view view_a, view_b;
        expect_ok(mtl_view_required(&view_a, &a.dl, "test", "a", MTL_INTEGER));
        expect_ok(mtl_view_required(&view_b, &b.dl, "test", "b", MTL_INTEGER));

        unsigned char covered[sizeof memory] = {0}, covered_by_b[sizeof memory] = {0};
        bool self = cover(&a, covered), both = false;
        cover(&b, covered_by_b);
        for (size_t byte = 0; byte < sizeof memory; byte++) both |= covered[byte] && covered_by_b[byte];
        if (mtl_overlaps_itself(&view_a) != self) fail_msg("layout %d: brute force says overlaps itself: %d", i, self);
        if (mtl_overlaps(&view_a, &view_b) != both) fail_msg("layouts %d: brute force says overlap: %d", i, both);
        assert_true(mtl_overlaps(&view_b, &view_a) == both);
        shared += both;
        among_themselves += self;
    }
    assert_true(count < 1000 ||
                (shared > count / 20 && shared < count && among_themselves > count / 20 && among_themselves < count));
    report("pairs of layouts", count);
    report("of them share a byte", shared);
    report("first ones overlap themselves", among_themselves);
}

/* Interleaved columns of one matrix: their ranges overlap, their elements do not. */
static void interleaved_slices_of_a_large_matrix_do_not_overlap(void **state) {
    (void)state;
    static float matrix[64];
    int64_t shape[] = {1 << 20, 1000, 3}, stride[] = {1000 * 8, 8, 2};
    DLTensor dl_a = {
        .data = matrix, .device = {kDLCPU, 0}, .ndim = 3, .dtype = dtype_code(F32), .shape = shape, .strides = stride};
    DLTensor dl_b = dl_a;
    dl_b.data = matrix + 1;
    mtl_view a, b;
    expect_ok(mtl_view_required(&a, &dl_a, "test", "a", MTL_FLOATING));
    expect_ok(mtl_view_required(&b, &dl_b, "test", "b", MTL_FLOATING));
    assert_false(mtl_overlaps(&a, &b));
    assert_false(mtl_overlaps_itself(&a));
    dl_b.data = matrix + 4;
    expect_ok(mtl_view_required(&b, &dl_b, "test", "b", MTL_FLOATING));
    assert_true(mtl_overlaps(&a, &b));
}

static void views_have_byte_strides_and_the_range_they_touch(void **state) {
    (void)state;
    seed(101);
    int count = scaled(20000);
    for (int i = 0; i < count; i++) {
        layout_case c;
        random_layout(&c, 20, 64);
        int64_t back = random_int(0, 100);
        c.dl.data = (char *)c.dl.data - back;
        c.dl.byte_offset = (uint64_t)back;
        mtl_view view;
        expect_ok(mtl_view_required(&view, &c.dl, "test", "a", MTL_INTEGER));
        c.dl.data = (char *)c.dl.data + back;
        int64_t elements = elements_of(&c), low = INT64_MAX, high = INT64_MIN;
        assert_int_equal(view.elements, elements);
        assert_int_equal(view.rank, c.dl.ndim);
        for (int axis = 0; axis < view.rank; axis++) {
            assert_int_equal(view.shape[axis], c.shape[axis]);
            assert_int_equal(view.stride[axis], elements > 0 && c.shape[axis] > 1 ? c.stride[axis] * c.size : 0);
        }
        if (elements == 0) {
            assert_int_equal(view.low, 0);
            assert_int_equal(view.high, 0);
            continue;
        }
        assert_ptr_equal(view.data, c.dl.data);
        for (int64_t j = 0; j < elements; j++) {
            int64_t at = next_element(&c, j) - ((char *)c.dl.data - memory);
            low = at < low ? at : low;
            high = at + c.size > high ? at + c.size : high;
        }
        assert_int_equal(view.low, low);
        assert_int_equal(view.high, high);
    }
    report("views", count);
}

static void null_strides_are_row_major(void **state) {
    (void)state;
    int64_t shape[] = {4, 1, 3, 5};
    DLTensor dl = {.data = memory, .device = {kDLCPU, 0}, .ndim = 4, .dtype = dtype_code(F32), .shape = shape};
    mtl_view view;
    expect_ok(mtl_view_required(&view, &dl, "test", "a", MTL_FLOATING));
    assert_int_equal(view.stride[0], 60);
    assert_int_equal(view.stride[1], 0);
    assert_int_equal(view.stride[2], 20);
    assert_int_equal(view.stride[3], 4);
    assert_int_equal(view.low, 0);
    assert_int_equal(view.high, 240);
}

/* Strides of axes that are never stepped along do not matter, whatever they are. */
static void strides_of_single_extents_are_ignored(void **state) {
    (void)state;
    int64_t shape[] = {1, 3, 1}, stride[] = {INT64_MIN, 1, INT64_MAX};
    DLTensor dl = {
        .data = memory, .device = {kDLCPU, 0}, .ndim = 3, .dtype = dtype_code(F64), .shape = shape, .strides = stride};
    mtl_view view;
    expect_ok(mtl_view_required(&view, &dl, "test", "a", MTL_FLOATING));
    assert_int_equal(view.high, 24);
    assert_int_equal(view.stride[0], 0);
}

static void loops_visit_every_iteration_in_order(void **state) {
    (void)state;
    seed(102);
    int count = scaled(20000), merged = 0, axes = 0;
    for (int i = 0; i < count; i++) {
        int operands = (int)random_int(1, 3), rank = (int)random_int(0, 4);
        int64_t shape[4] = {0};
        mtl_view views[3];
        const mtl_view *pointers[3];
        for (int axis = 0; axis < rank; axis++) shape[axis] = one_in(15) ? 0 : random_int(1, 4);
        for (int o = 0; o < operands; o++) {
            memset(&views[o], 0, sizeof views[o]);
            views[o].rank = rank;
            bool contiguous = one_in(2);
            int64_t next = 4;
            for (int axis = rank - 1; axis >= 0; axis--) {
                views[o].shape[axis] = shape[axis];
                views[o].stride[axis] = shape[axis] <= 1 ? 0 : contiguous ? next : 4 * random_int(-9, 9);
                next *= shape[axis];
            }
            pointers[o] = &views[o];
        }
        mtl_loop loop;
        mtl_loop_init(&loop, rank, operands, pointers);
        int64_t iterations = 1;
        for (int axis = 0; axis < rank; axis++) iterations *= shape[axis];
        assert_int_equal(loop.count, iterations);
        assert_true(loop.rank <= rank);
        axes += rank;
        merged += rank - loop.rank;
        if (iterations == 0) continue;

        int64_t start = random_int(0, iterations - 1);
        mtl_cursor cursor, sought;
        mtl_cursor_seek(&cursor, &loop, start);
        for (int64_t at = start; at < iterations; at++, mtl_cursor_next(&cursor)) {
            mtl_cursor_seek(&sought, &loop, at);
            for (int o = 0; o < operands; o++) {
                int64_t offset = 0, rest = at;
                for (int axis = rank - 1; axis >= 0; axis--) {
                    offset += rest % shape[axis] * views[o].stride[axis];
                    rest /= shape[axis];
                }
                assert_int_equal(cursor.offset[o], offset);
                assert_int_equal(sought.offset[o], offset);
            }
        }

        /* Without its row, the loop and the row's strides still reach every element. */
        int64_t row_stride[3], length = mtl_loop_take_row(&loop, row_stride);
        assert_int_equal(loop.count * length, iterations);
        for (int64_t at = 0; at < iterations; at++) {
            mtl_cursor_seek(&sought, &loop, at / length);
            for (int o = 0; o < operands; o++) {
                int64_t offset = 0, rest = at;
                for (int axis = rank - 1; axis >= 0; axis--) {
                    offset += rest % shape[axis] * views[o].stride[axis];
                    rest /= shape[axis];
                }
                assert_int_equal(sought.offset[o] + at % length * row_stride[o], offset);
            }
        }
    }
    report("loops", count);
    report("of their axes were merged or dropped", merged);
    assert_true(count < 1000 || (merged > axes / 10 && merged < axes));
}

static void contiguous_loops_have_one_axis_at_most(void **state) {
    (void)state;
    int64_t shape[] = {2, 1, 3, 4};
    DLTensor dl = {.data = memory, .device = {kDLCPU, 0}, .ndim = 4, .dtype = dtype_code(F32), .shape = shape};
    mtl_view view;
    expect_ok(mtl_view_required(&view, &dl, "test", "a", MTL_FLOATING));
    const mtl_view *views[] = {&view, &view};
    mtl_loop loop;
    mtl_loop_init(&loop, 3, 2, views);
    assert_int_equal(loop.rank, 1);
    assert_int_equal(loop.shape[0], 6);
    assert_int_equal(loop.stride[0][0], 16);
    mtl_loop_init(&loop, 2, 2, views);
    assert_int_equal(loop.count, 2);
}

/* A layout made to keep an exact search busy: the answer may be "shares", but it must come at once. */
static void hostile_layouts_are_decided_quickly(void **state) {
    (void)state;
    int64_t shape[20], stride[20];
    for (int axis = 0; axis < 20; axis++) {
        shape[axis] = 3;
        stride[axis] = 1000003 + 2 * (axis * axis + 7 * axis);
    }
    DLTensor dl_a = {.data = (void *)(uintptr_t)(1 << 30),
                     .device = {kDLCPU, 0},
                     .ndim = 20,
                     .dtype = dtype_code(I8),
                     .shape = shape,
                     .strides = stride};
    DLTensor dl_b = dl_a;
    dl_b.data = (char *)dl_b.data + 999983;
    mtl_view a, b;
    expect_ok(mtl_view_required(&a, &dl_a, "test", "a", MTL_INTEGER));
    expect_ok(mtl_view_required(&b, &dl_b, "test", "b", MTL_INTEGER));
    mtl_overlaps(&a, &b);
    assert_true(mtl_overlaps_itself(&a)); /* pigeonhole: 3^20 elements, far fewer bytes */
}

/* No memory lies under such strides, but the checks must come to their answer without overflow. */
static void strides_beyond_any_address_space_are_refused(void **state) {
    (void)state;
    static const struct {
        element_type type;
        int64_t shape[3], stride[3];
    } far[] = {
        {F64, {2, 3, 1}, {(int64_t)1 << 58, (int64_t)1 << 58, 1}},
        {F32, {4, 4, 4}, {-4, (int64_t)1 << 58, (int64_t)1 << 58}},
        {F32, {2, 1, 1}, {-((int64_t)1 << 60), 1, 1}},
        {F16, {2, 2, 2}, {1, 2, (int64_t)1 << 61}},
    };
    for (size_t i = 0; i < sizeof far / sizeof *far; i++) {
        DLTensor dl = {.data = memory + 64,
                       .device = {kDLCPU, 0},
                       .ndim = 3,
                       .dtype = dtype_code(far[i].type),
                       .shape = (int64_t *)(uintptr_t)far[i].shape,
                       .strides = (int64_t *)(uintptr_t)far[i].stride};
        DLTensor x = dl;
        x.strides = NULL;
        x.data = memory + 1024;
        assert_int_equal(metalloid_rms_norm(NULL, &x, NULL, 0, &dl), METALLOID_INVALID_ARGUMENT);
        assert_string_equal(metalloid_last_error(), "rms_norm: out is too large: its size in bytes overflows");
    }
}

static void messages_show_long_shapes_cut(void **state) {
    (void)state;
    int64_t shape[64];
    for (int axis = 0; axis < 64; axis++) shape[axis] = 1;
    DLTensor dl = {.data = memory, .device = {kDLCPU, 0}, .ndim = 64, .dtype = dtype_code(F32), .shape = shape};
    mtl_view view;
    expect_ok(mtl_view_required(&view, &dl, "test", "a", MTL_FLOATING));
    int64_t wanted[] = {2, 3};
    assert_int_equal(mtl_check_shape(&view, "test", 2, wanted), METALLOID_INVALID_ARGUMENT);
    assert_memory_equal(metalloid_last_error(), "test: a must have shape {2, 3}, got {1, 1, ", 41);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(overlap_is_what_brute_force_says),
        cmocka_unit_test(interleaved_slices_of_a_large_matrix_do_not_overlap),
        cmocka_unit_test(views_have_byte_strides_and_the_range_they_touch),
        cmocka_unit_test(null_strides_are_row_major),
        cmocka_unit_test(strides_of_single_extents_are_ignored),
        cmocka_unit_test(loops_visit_every_iteration_in_order),
        cmocka_unit_test(contiguous_loops_have_one_axis_at_most),
        cmocka_unit_test(hostile_layouts_are_decided_quickly),
        cmocka_unit_test(strides_beyond_any_address_space_are_refused),
        cmocka_unit_test(messages_show_long_shapes_cut),
    };
    return cmocka_run_group_tests_name("tensor", tests, NULL, NULL);
}
