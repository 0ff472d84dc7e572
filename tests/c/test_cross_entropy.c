/* cross_entropy. SPDX-License-Identifier: MIT */
#include "every_operation.h"

#include <math.h>

/* logsumexp(logits) - logits[target], in long double. */
static double reference(const double *logits, int64_t classes, int64_t target) {
    int64_t top = 0;
    for (int64_t i = 1; i < classes; i++) {
        if (logits[i] > logits[top]) top = i;
    }
    long double rest = 0; /* beside the largest term, which is 1 */
    for (int64_t i = 0; i < classes; i++) {
        if (i != top) rest += logits[i] == logits[top] ? 1 : expl((long double)logits[i] - logits[top]);
    }
    return (double)(((long double)logits[top] - logits[target]) + log1pl(rest));
}

static int64_t target_at(const tensor *targets, int64_t i) { return (int64_t)get(targets, i); }

static void matches_the_formula_on_random_calls(void **state) {
    (void)state;
    int count = scaled(2000);
    for (int i = 0; i < count; i++) {
        seed(8000000 + (uint64_t)i);
        describe("case %d", i);
        int64_t shape[MAX_RANK];
        int rank = (int)random_int(1, 4);
        random_shape(shape, rank, 6);
        int64_t classes = shape[rank - 1] = one_in(4) ? random_int(100, 2000) : random_int(1, 60);
        tensor *logits = new_tensor(random_floating(), INPUT, rank, shape);
        fill_normal(logits, one_in(3) ? 50 : 0, one_in(3) ? 15 : 2);
        tensor *targets = new_tensor(random_integer(), INPUT, rank - 1, shape);
        fill_integers(targets, 0, (classes < 128 ? classes : 128) - 1);
        tensor *loss = new_output(one_in(2) ? F32 : random_floating(), OUTPUT, rank - 1, shape);

        metalloid_cross_entropy_options options = METALLOID_CROSS_ENTROPY_OPTIONS_INIT;
        bool ignoring = one_in(3);
        if (ignoring) {
            bool negative = targets->type >= I8 && targets->type <= I64 && one_in(2);
            options.has_ignore_index = true;
            options.ignore_index = negative    ? -100
                                   : one_in(2) ? 127
                                               : random_int(0, 5); /* outside the classes, or one of them */
            for (int64_t row = 0; row < targets->elements; row++) {
                if (one_in(3)) set(targets, row, (double)options.ignore_index);
            }
        }
        double *x = values(logits), *y = new_doubles(loss->elements);
        for (int64_t row = 0; row < loss->elements; row++) {
            bool ignored = ignoring && target_at(targets, row) == options.ignore_index;
            y[row] = ignored ? 0 : reference(x + row * classes, classes, target_at(targets, row));
        }
        metalloid_context *context = random_context();
        snapshot();
        expect_ok(metalloid_cross_entropy(context, dl(logits), dl(targets), ignoring || one_in(2) ? &options : NULL,
                                          dl(loss)));
        expect_only_outputs_written();
        expect_close_by_row("loss", CROSS_ENTROPY, loss, y, rank > 1 ? shape[rank - 2] : 1);
        release_all();
    }
    report("random calls", count);
}

static void refuses_bad_arguments_and_writes_nothing(void **state) {
    (void)state;
    int refused = 0;
    for (int round = 0; round < scaled(4); round++) {
        seed((uint64_t)round);
        operation op = sample_cross_entropy(SMALL);
        refused += expect_bad_tensors_refused(&op);
        release_all();
    }
    seed(5);
    operation op = sample_cross_entropy(SMALL);
    tensor *targets = op.argument[1].tensor;
    static const double bad_targets[] = {-1, 7, 8, 1e9, -9e18};
    for (int i = 0; i < 5; i++) {
        for (int64_t row = 0; row < targets->elements; row++, refused++) {
            double before = get(targets, row);
            set(targets, row, bad_targets[i]);
            expect_refused(&op, "targets", "a target outside the classes");
            operation ignoring = op;
            ignoring.cross_entropy.has_ignore_index = true;
            ignoring.cross_entropy.ignore_index = -100;
            expect_refused(&ignoring, "targets", "a target that is not the one to ignore");
            set(targets, row, before);
        }
    }
    static const size_t sizes[] = {0, 1, 7, (size_t)1 << 40, SIZE_MAX};
    for (int i = 0; i < 5; i++, refused++) {
        operation bad = op;
        bad.cross_entropy.size = sizes[i];
        expect_refused(&bad, "options", "a bad size");
    }
    release_all();
    report("bad calls refused", refused);
}

/* uint64 above int64's range must not wrap around to a class, or to the index to ignore. */
static void huge_unsigned_targets_do_not_wrap_around(void **state) {
    (void)state;
    operation op = sample_cross_entropy(SMALL);
    tensor *targets = new_tensor(U64, CONTIGUOUS, SHAPE(2, 3));
    fill(targets, 0);
    set(targets, 4, 0x1p63);
    op.given[1] = dl(targets);
    expect_refused(&op, "targets", "2^63");
    set(targets, 4, 18446744073709549568.0);
    op.cross_entropy.has_ignore_index = true;
    op.cross_entropy.ignore_index = -2048; /* what it would wrap around to */
    expect_refused(&op, "targets", "nearly 2^64");
    release_all();
}

static void empty_rows_are_nothing_to_do_but_no_classes_are_an_error(void **state) {
    (void)state;
    for (int which = 0; which < 4; which++) {
        int64_t shape[] = {which & 1 ? 0 : 2, which & 2 ? 0 : 3, 0};
        tensor *logits = new_tensor(F32, CONTIGUOUS, 3, shape), *targets = new_tensor(I32, CONTIGUOUS, 2, shape);
        tensor *loss = new_output(F32, CONTIGUOUS, 2, shape);
        logits->dl.data = NULL;
        if (which) targets->dl.data = loss->dl.data = NULL;
        if (!which) fill(targets, 0);
        describe("no classes, %lld x %lld rows", (long long)shape[0], (long long)shape[1]);
        snapshot();
        metalloid_status status = metalloid_cross_entropy(NULL, dl(logits), dl(targets), NULL, dl(loss));
        assert_int_equal(status, which ? METALLOID_OK : METALLOID_INVALID_ARGUMENT);
        expect_nothing_written();
        release_all();
    }
    tensor *logits = new_tensor(F32, CONTIGUOUS, SHAPE(0, 5)), *targets = new_tensor(I32, CONTIGUOUS, SHAPE(0));
    tensor *loss = new_output(F32, CONTIGUOUS, SHAPE(0));
    logits->dl.data = targets->dl.data = loss->dl.data = NULL;
    expect_ok(metalloid_cross_entropy(NULL, dl(logits), dl(targets), NULL, dl(loss)));
    release_all();
}

static void one_class_has_no_loss(void **state) {
    (void)state;
    tensor *logits = new_normal(F32, CONTIGUOUS, SHAPE(9, 1)), *targets = new_tensor(U8, CONTIGUOUS, SHAPE(9));
    tensor *loss = new_output(F32, CONTIGUOUS, SHAPE(9));
    fill(targets, 0);
    expect_ok(metalloid_cross_entropy(NULL, dl(logits), dl(targets), NULL, dl(loss)));
    for (int i = 0; i < 9; i++) assert_true(get(loss, i) == 0);
    release_all();
}

/* exp(x) of these logits overflows, or is 0 for all of them, unless the largest is taken out first. */
static void large_logits_neither_overflow_nor_vanish(void **state) {
    (void)state;
    static const double offsets[] = {1e4, -1e4, 6e4, -6e4};
    for (int type = F32; type <= F64; type++) {
        for (int i = 0; i < 4; i++) {
            tensor *logits = new_tensor((element_type)type, ROWS, SHAPE(5, 77)),
                   *targets = new_tensor(I64, ROWS, SHAPE(5));
            tensor *loss = new_output(F32, ROWS, SHAPE(5));
            fill_normal(logits, offsets[i], 1);
            fill_integers(targets, 0, 76);
            double *x = values(logits), y[5];
            for (int row = 0; row < 5; row++) y[row] = reference(x + 77 * row, 77, target_at(targets, row));
            describe("logits around %g in %s", offsets[i], dtype_name((element_type)type));
            expect_ok(metalloid_cross_entropy(random_context(), dl(logits), dl(targets), NULL, dl(loss)));
            expect_close_by_row("loss", CROSS_ENTROPY, loss, y, 5);
            release_all();
        }
    }
}

/* -inf is a class that cannot be; NaN and +inf spoil their own row alone, and an ignored row not at all. */
static void infinities_and_nan_stay_in_their_row(void **state) {
    (void)state;
    for (int type = F32; type <= F64; type++) {
        for (int round = 0; round < 8; round++) {
            seed((uint64_t)round);
            tensor *logits = new_normal((element_type)type, OUTPUT, SHAPE(6, 33)),
                   *targets = new_tensor(I64, ROWS, SHAPE(6));
            tensor *loss = new_output(F32, ROWS, SHAPE(6));
            fill_integers(targets, 0, 9);
            set(targets, 5, -100);
            set(logits, 33 + 20, -INFINITY);
            set(logits, 66 + target_at(targets, 2), -INFINITY);
            set(logits, 99 + 20, INFINITY);
            set(logits, 132 + 20, NAN);
            set(logits, 165 + 20, NAN);
            double *x = values(logits), y[6];
            for (int row = 0; row < 2; row++) y[row] = reference(x + 33 * row, 33, target_at(targets, row));
            y[2] = y[3] = INFINITY;
            y[4] = NAN;
            y[5] = 0;
            metalloid_cross_entropy_options options = METALLOID_CROSS_ENTROPY_OPTIONS_INIT;
            options.has_ignore_index = true;
            options.ignore_index = -100;
            describe("special logits in %s", dtype_name((element_type)type));
            expect_ok(metalloid_cross_entropy(random_context(), dl(logits), dl(targets), &options, dl(loss)));
            expect_close_by_row("loss", CROSS_ENTROPY, loss, y, 6);
            release_all();
        }
    }
}

/* A struct of a later version is fine as long as the fields unknown here are zero. */
static void longer_option_structs_are_taken_when_their_new_fields_are_zero(void **state) {
    (void)state;
    struct {
        metalloid_cross_entropy_options known;
        int64_t later[2];
    } options = {METALLOID_CROSS_ENTROPY_OPTIONS_INIT, {0, 0}};
    options.known.size = sizeof options;
    operation op = sample_cross_entropy(SMALL);
    expect_ok(metalloid_cross_entropy(NULL, op.given[0], op.given[1], &options.known, op.given[2]));
    options.later[1] = 1;
    assert_int_equal(metalloid_cross_entropy(NULL, op.given[0], op.given[1], &options.known, op.given[2]),
                     METALLOID_INVALID_ARGUMENT);
    release_all();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_the_formula_on_random_calls),
        cmocka_unit_test(refuses_bad_arguments_and_writes_nothing),
        cmocka_unit_test(huge_unsigned_targets_do_not_wrap_around),
        cmocka_unit_test(empty_rows_are_nothing_to_do_but_no_classes_are_an_error),
        cmocka_unit_test(one_class_has_no_loss),
        cmocka_unit_test(large_logits_neither_overflow_nor_vanish),
        cmocka_unit_test(infinities_and_nan_stay_in_their_row),
        cmocka_unit_test(longer_option_structs_are_taken_when_their_new_fields_are_zero),
    };
    return cmocka_run_group_tests_name("cross_entropy", tests, NULL, NULL);
}
