/* What the tests of the four norms share: the formula in long double, and random calls against it. SPDX-License-Identifier: MIT */
#ifndef METALLOID_TESTS_NORM_CASES_H
#define METALLOID_TESTS_NORM_CASES_H

#include "every_operation.h"

#include <math.h>
#include <string.h>

/* y = (x - mean) / sqrt(var + eps) * weight + bias where `centred`, else x / sqrt(mean(x^2) + eps) * weight.
 *
 * slack[i] is what the condition of the row may cost beside the ordinary bound. A row with |mean| > 100 deviations has section 3's
 * bound, and the roundings of its mean's sum, which is all there is to see in a constant row. `sum_rounding`, 0 where x is an input, is that of
 * x = x + residual in the arithmetic of the call, which the subtraction of the mean magnifies. */
static inline void reference_norm(const double *x, const double *weight, const double *bias, double eps, bool centred,
                                  int64_t rows, int64_t length, double mean_rounding, double sum_rounding, double *y,
                                  double *slack) {
    for (int64_t row = 0; row < rows; row++, x += length, y += length, slack += length) {
        long double mean = 0, square = 0;
        for (int64_t i = 0; i < length; i++) mean += x[i];
        mean = centred ? mean / length : 0;
        for (int64_t i = 0; i < length; i++) square += (x[i] - mean) * (x[i] - mean);
        long double variance = square / length, scale = 1 / sqrtl(variance + eps);
        bool large_mean = centred && fabsl(mean) > 100 * sqrtl(variance);
        for (int64_t i = 0; i < length; i++) {
            long double value = (x[i] - mean) * scale;
            if (weight) value *= weight[i];
            if (bias) value += bias[i];
            y[i] = (double)value;
            double steepness = (double)scale * (weight ? fabs(weight[i]) : 1), mean_size = (double)fabsl(mean);
            slack[i] = centred ? sum_rounding * (fabs(x[i]) + mean_size) * steepness : 0;
            if (large_mean) slack[i] += 1e-3 * fabs(y[i]) + mean_rounding * mean_size * steepness;
        }
    }
}

static inline int64_t random_length(void) {
    switch (random_int(0, 3)) {
    case 0: return random_int(1, 9);
    case 1: return 64 * random_int(1, 5);
    default: return random_int(1, 150);
    }
}

/* One call with random shapes, dtypes, layouts, optional tensors and aliases. */
static inline void random_norm_case(const char *name, bool added, bool centred) {
    int rank = (int)random_int(1, 4);
    int64_t shape[MAX_RANK];
    random_shape(shape, rank, 4);
    int64_t length = shape[rank - 1] = random_length();
    double mean = centred && one_in(3) ? random_uniform(-50, 50) : 0;
    static const double some_eps[] = {1e-6, 1e-5, 1e-3, 1};
    double eps = some_eps[random_int(0, 3)];

    tensor *x = new_tensor(random_floating(), INPUT, rank, shape);
    fill_normal(x, mean, one_in(4) ? 30 : 1);
    tensor *residual = added ? new_normal(random_floating(), INPUT, rank, shape) : NULL;
    tensor *weight = one_in(3) ? NULL : new_normal(random_floating(), INPUT, 1, &length);
    tensor *bias = !centred || one_in(3) ? NULL : new_normal(random_floating(), INPUT, 1, &length);

    tensor *out = NULL, *sum = NULL;
    if (writable(x) && one_in(4)) out = x;
    if (added && !out && writable(residual) && one_in(4)) out = residual;
    if (added && out != x && writable(x) && one_in(4)) sum = x;
    if (added && !sum && out != residual && writable(residual) && one_in(4)) sum = residual;
    if (!out) out = new_tensor(random_floating(), OUTPUT, rank, shape);
    if (added && !sum) sum = new_tensor(random_floating(), OUTPUT, rank, shape);
    out->output = true;
    if (sum) sum->output = true;

    double *total = values(x);
    if (added) {
        double *other = values(residual);
        for (int64_t i = 0; i < x->elements; i++) total[i] = (double)((long double)total[i] + other[i]);
    }
    double *y = new_doubles(x->elements), *slack = new_doubles(x->elements), *m = new_doubles(x->elements / length);
    const tensor *operands[] = {x, residual, weight, bias, sum, out};
    double rounding = 0x1p-24;
    for (int i = 0; i < 6; i++) {
        if (operands[i] && operands[i]->type == F64) rounding = 0x1p-53;
    }
    reference_norm(total, weight ? values(weight) : NULL, bias ? values(bias) : NULL, eps, centred,
                   x->elements / length, length, (double)(length + 4) * rounding, added ? rounding : 0, y, slack);
    for (int64_t row = 0; row < x->elements / length; row++) m[row] = largest(y + row * length, length);

    metalloid_context *context = random_context();
    snapshot();
    metalloid_status status;
    if (added && centred) {
        status = metalloid_add_layer_norm(context, dl(x), dl(residual), dl(weight), dl(bias), eps, dl(sum), dl(out));
    } else if (added) {
        status = metalloid_add_rms_norm(context, dl(x), dl(residual), dl(weight), eps, dl(sum), dl(out));
    } else if (centred) {
        status = metalloid_layer_norm(context, dl(x), dl(weight), dl(bias), eps, dl(out));
    } else {
        status = metalloid_rms_norm(context, dl(x), dl(weight), eps, dl(out));
    }
    expect_ok(status);
    expect_only_outputs_written();
    expect_close_with_slack(name, NORM, out, y, m, length, slack);
    if (added) expect_close_by_row("sum", NORM, sum, total, length);
}

static inline void random_norm_cases(const char *name, bool added, bool centred, uint64_t first_seed) {
    int count = scaled(3000);
    for (int i = 0; i < count; i++) {
        seed(first_seed + (uint64_t)i);
        describe("%s case %d", name, i);
        random_norm_case(name, added, centred);
        release_all();
    }
    report("random calls", count);
}

/* eps, and every way in which a tensor can be wrong, for several choices of dtypes and layouts. */
static inline void refuse_norm_arguments(operation (*sample)(sample_size)) {
    static const double bad_eps[] = {-1e-6, -INFINITY, INFINITY, NAN};
    int refused = 0;
    for (int round = 0; round < scaled(4); round++) {
        seed((uint64_t)round);
        operation op = sample(SMALL);
        refused += expect_bad_tensors_refused(&op);
        for (int i = 0; i < 4; i++, refused++) {
            operation bad = op;
            bad.eps = bad_eps[i];
            expect_refused(&bad, "eps", "a bad eps");
        }
        release_all();
    }
    report("bad calls refused", refused);
}

/* Every combination of zero and other extents, with NULL data where the tensor is empty, must succeed and write nothing. */
static inline void empty_norm_tensors(bool added, bool centred) {
    int count = 0;
    for (int which = 1; which < 8; which++, count++) {
        int64_t shape[] = {which & 1 ? 0 : 2, which & 2 ? 0 : 3, which & 4 ? 0 : 5};
        tensor *x = new_tensor(F32, CONTIGUOUS, 3, shape), *weight = new_normal(F16, CONTIGUOUS, 1, &shape[2]);
        tensor *out = new_output(F16, CONTIGUOUS, 3, shape);
        x->dl.data = out->dl.data = NULL;
        x->dl.byte_offset = out->dl.byte_offset = 0;
        describe("empty x {%lld, %lld, %lld}", (long long)shape[0], (long long)shape[1], (long long)shape[2]);
        snapshot();
        if (added) {
            tensor *sum = new_output(F32, CONTIGUOUS, 3, shape), *residual = new_tensor(F32, CONTIGUOUS, 3, shape);
            snapshot();
            expect_ok(centred ? metalloid_add_layer_norm(NULL, dl(x), dl(residual), dl(weight), dl(weight), 1e-5,
                                                         dl(sum), dl(out))
                              : metalloid_add_rms_norm(NULL, dl(x), dl(residual), dl(weight), 1e-5, dl(sum), dl(out)));
        } else {
            expect_ok(centred ? metalloid_layer_norm(NULL, dl(x), dl(weight), dl(weight), 1e-5, dl(out))
                              : metalloid_rms_norm(NULL, dl(x), dl(weight), 1e-5, dl(out)));
        }
        expect_nothing_written();
        release_all();
    }
    report("empty calls", count);
}

#endif
