/* rope. SPDX-License-Identifier: MIT */
#include "rope_cases.h"

static void matches_the_rotation_on_random_calls(void **state) {
    (void)state;
    int count = scaled(2000);
    for (int i = 0; i < count; i++) {
        seed(9000000 + (uint64_t)i);
        describe("case %d", i);
        int rank = (int)random_int(3, 5);
        int64_t shape[MAX_RANK];
        random_shape(shape, rank, 5);
        int64_t head_dim = shape[rank - 1] = one_in(3) ? 64 : random_int(2, 70);
        bool axis_1 = one_in(2);
        int64_t times = shape[axis_1 ? 1 : rank - 2] = random_int(1, 12);
        static const int64_t reaches[] = {100, 5000, 1000000, INT32_MAX};
        rope_case c = random_rope_case(shape[0], times, head_dim, reaches[random_int(0, 3)]);
        c.options.time_axis = axis_1 ? METALLOID_TIME_AXIS_1 : METALLOID_TIME_SECOND_TO_LAST;
        tensor *x = new_normal(random_floating(), INPUT, rank, shape);
        tensor *out = writable(x) && one_in(4) ? x : new_tensor(random_floating(), OUTPUT, rank, shape);
        out->output = true;
        double *y = new_doubles(x->elements), *m = new_doubles(x->elements), *slack = new_doubles(x->elements);
        reference_rope(&c, values(x), shape, rank, y, m, slack);
        metalloid_context *context = random_context();
        snapshot();
        expect_ok(metalloid_rope(context, dl(x), c.dims, &c.options, dl(out)));
        expect_only_outputs_written();
        expect_close_with_slack("out", ROPE, out, y, m, 1, slack);
        release_all();
    }
    report("random calls", count);
}

static void null_options_are_the_defaults(void **state) {
    (void)state;
    seed(1);
    rope_case c = {.dims = 32, .options = METALLOID_ROPE_OPTIONS_INIT};
    tensor *x = new_normal(F32, ROWS, SHAPE(2, 3, 9, 40)), *out = new_output(F32, ROWS, SHAPE(2, 3, 9, 40));
    double *y = new_doubles(x->elements), *m = new_doubles(x->elements), *slack = new_doubles(x->elements);
    reference_rope(&c, values(x), x->shape, 4, y, m, slack);
    expect_ok(metalloid_rope(NULL, dl(x), 32, NULL, dl(out)));
    describe("no options");
    expect_close("out", ROPE, out, y, m, 1);
    release_all();
}

/* The contract's own numbers: position 1,000,000, bases 10,000 and 1,000,000, within 2e-6 of a float64 computation. */
static void the_angle_is_accurate_at_position_one_million(void **state) {
    (void)state;
    static const double bases[] = {10000, 1000000};
    for (int i = 0; i < 2; i++) {
        for (int traditional = 0; traditional < 2; traditional++) {
            rope_case c = {.dims = 128, .options = METALLOID_ROPE_OPTIONS_INIT};
            c.options.base = bases[i];
            c.options.offset = 1000000;
            c.options.traditional = traditional;
            seed((uint64_t)i);
            tensor *x = new_tensor(F32, ROWS, SHAPE(1, 2, 50, 128)), *out = new_output(F32, ROWS, SHAPE(1, 2, 50, 128));
            fill_uniform(x, -1, 1);
            double *y = new_doubles(x->elements), *m = new_doubles(x->elements), *slack = new_doubles(x->elements);
            reference_rope(&c, values(x), x->shape, 4, y, m, slack);
            expect_ok(metalloid_rope(random_context(), dl(x), 128, &c.options, dl(out)));
            describe("base %g", bases[i]);
            expect_close("out", ROPE, out, y, m, 1); /* no slack */
            release_all();
        }
    }
}

/* inv_freq 1 has no rounding of its own, so that the ordinary bound holds up to both ends of int32. */
static void positions_reach_both_ends_of_int32(void **state) {
    (void)state;
    static const int64_t positions[] = {INT32_MAX, INT32_MAX - 1, INT32_MIN, INT32_MIN + 1, 0, -1, 1};
    for (int type = F32; type <= F64; type++) {
        for (int kind = 0; kind < 3; kind++) {
            seed((uint64_t)kind);
            int64_t pairs = 20, count = sizeof positions / sizeof *positions;
            rope_case c = {.dims = 2 * pairs, .options = METALLOID_ROPE_OPTIONS_INIT};
            c.options.base = 0;
            c.inv_freqs = new_tensor(F32, CONTIGUOUS, 1, &pairs);
            fill(c.inv_freqs, 1);
            c.options.inv_freqs = dl(c.inv_freqs);
            for (int64_t i = 0; i < count; i++) {
                c.options.offset = 0;
                if (kind == 0) {
                    c.options.offset = positions[i];
                } else if (kind == 1) {
                    c.offsets = new_tensor(I32, CONTIGUOUS, 0, NULL);
                    set(c.offsets, 0, (double)positions[i]);
                    c.options.offsets = dl(c.offsets);
                } else {
                    c.position_ids = new_tensor(I64, CONTIGUOUS, SHAPE(1, 1));
                    set(c.position_ids, 0, (double)positions[i]);
                    c.options.position_ids = dl(c.position_ids);
                }
                tensor *x = new_normal((element_type)type, ROWS, SHAPE(1, 3, 1, 40));
                tensor *out = new_output((element_type)type, ROWS, SHAPE(1, 3, 1, 40));
                double y[120], m[120], slack[120];
                reference_rope(&c, values(x), x->shape, 4, y, m, slack);
                expect_ok(metalloid_rope(random_context(), dl(x), c.dims, &c.options, dl(out)));
                describe("position %lld in %s", (long long)positions[i], dtype_name((element_type)type));
                expect_close("out", ROPE, out, y, m, 1);
            }
            release_all();
        }
    }
}

static void infinite_freqs_leave_their_pair_unrotated(void **state) {
    (void)state;
    seed(3);
    int64_t pairs = 16;
    rope_case c = {.dims = 32, .options = METALLOID_ROPE_OPTIONS_INIT};
    c.options.base = 0;
    c.options.offset = 12345;
    c.freqs = new_tensor(F16, CONTIGUOUS, 1, &pairs);
    fill(c.freqs, 3);
    set(c.freqs, 5, INFINITY);
    c.options.freqs = dl(c.freqs);
    tensor *x = new_normal(F32, ROWS, SHAPE(2, 4, 32)), *out = new_output(F32, ROWS, SHAPE(2, 4, 32));
    expect_ok(metalloid_rope(NULL, dl(x), 32, &c.options, dl(out)));
    for (int64_t i = 0; i < x->elements; i++) {
        bool unrotated = i % 32 == 5 || i % 32 == 5 + 16;
        assert_true((get(out, i) == get(x, i)) == unrotated);
    }
    release_all();
}

/* Features beyond dims pass through unchanged, bit for bit, NaN and infinities included. */
static void features_beyond_dims_pass_through(void **state) {
    (void)state;
    for (int type = F32; type <= F64; type++) {
        seed(4);
        tensor *x = new_normal((element_type)type, ROWS, SHAPE(2, 7, 21)),
               *out = new_output((element_type)type, ROWS, SHAPE(2, 7, 21));
        set(x, 20, INFINITY);
        set(x, 19, 1e-42);
        expect_ok(metalloid_rope(random_context(), dl(x), 10, NULL, dl(out)));
        for (int64_t i = 0; i < x->elements; i++) {
            if (i % 21 >= 10)
                assert_memory_equal(element(x, i), element(out, i), (size_t)dtype_size((element_type)type));
        }
        release_all();
    }
}

static void one_position_for_the_batch_or_one_a_row(void **state) {
    (void)state;
    seed(5);
    tensor *x = new_normal(F32, ROWS, SHAPE(3, 2, 4, 16));
    tensor *by_scalar = new_output(F32, ROWS, SHAPE(3, 2, 4, 16)), *by_row = new_output(F32, ROWS, SHAPE(3, 2, 4, 16));
    tensor *scalar = new_tensor(I16, CONTIGUOUS, 0, NULL), *rows = new_tensor(U32, CONTIGUOUS, SHAPE(3));
    fill(scalar, 77);
    fill(rows, 77);
    metalloid_rope_options options = METALLOID_ROPE_OPTIONS_INIT;
    options.offsets = dl(scalar);
    expect_ok(metalloid_rope(NULL, dl(x), 16, &options, dl(by_scalar)));
    options.offsets = dl(rows);
    expect_ok(metalloid_rope(NULL, dl(x), 16, &options, dl(by_row)));
    for (int64_t i = 0; i < x->elements; i++) assert_true(get(by_scalar, i) == get(by_row, i));
    release_all();
}

static metalloid_status call_rope_of_rank_3(const operation *op) {
    return metalloid_rope(NULL, op->given[0], op->dims, NULL, op->given[1]);
}

static void refuses_bad_arguments_and_writes_nothing(void **state) {
    (void)state;
    int refused = refuse_rope_options(sample_rope_with, 1);
    for (int round = 0; round < scaled(4); round++) {
        seed((uint64_t)round);
        operation op = sample_rope_with(SMALL, round & 1, round & 2);
        refused += expect_bad_tensors_refused(&op);
        release_all();
    }
    seed(9);
    operation op = new_operation("rope", call_rope_of_rank_3);
    op.dims = 2;
    takes(&op, "x", new_normal(F32, CONTIGUOUS, SHAPE(3, 4)), REQUIRED | TAKES_FLOATING);
    takes(&op, "out", new_tensor(F32, CONTIGUOUS, SHAPE(3, 4)), REQUIRED | WRITTEN | TAKES_FLOATING);
    expect_refused(&op, "x", "rank 2");
    release_all();
    report("bad calls refused", refused + 1);
}

static void takes_empty_tensors_without_data(void **state) {
    (void)state;
    for (int which = 1; which < 8; which++) {
        for (int axis_1 = 0; axis_1 < 2; axis_1++) {
            int64_t shape[] = {which & 1 ? 0 : 2, which & 2 ? 0 : 3, which & 4 ? 0 : 5, 8};
            tensor *x = new_tensor(F32, CONTIGUOUS, 4, shape), *out = new_output(F16, CONTIGUOUS, 4, shape);
            tensor *ids = new_tensor(I32, CONTIGUOUS, SHAPE(shape[0], axis_1 ? shape[1] : shape[2]));
            fill(ids, 3);
            x->dl.data = out->dl.data = NULL;
            if (ids->elements == 0) ids->dl.data = NULL;
            metalloid_rope_options options = METALLOID_ROPE_OPTIONS_INIT;
            options.time_axis = axis_1 ? METALLOID_TIME_AXIS_1 : METALLOID_TIME_SECOND_TO_LAST;
            options.position_ids = dl(ids);
            describe("empty x {%lld, %lld, %lld, 8}", (long long)shape[0], (long long)shape[1], (long long)shape[2]);
            snapshot();
            expect_ok(metalloid_rope(NULL, dl(x), 8, &options, dl(out)));
            expect_nothing_written();
            release_all();
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_the_rotation_on_random_calls),
        cmocka_unit_test(null_options_are_the_defaults),
        cmocka_unit_test(the_angle_is_accurate_at_position_one_million),
        cmocka_unit_test(positions_reach_both_ends_of_int32),
        cmocka_unit_test(infinite_freqs_leave_their_pair_unrotated),
        cmocka_unit_test(features_beyond_dims_pass_through),
        cmocka_unit_test(one_position_for_the_batch_or_one_a_row),
        cmocka_unit_test(refuses_bad_arguments_and_writes_nothing),
        cmocka_unit_test(takes_empty_tensors_without_data),
    };
    return cmocka_run_group_tests_name("rope", tests, NULL, NULL);
}
