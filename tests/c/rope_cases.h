/* What the tests of rope and qk_norm_rope share: the rotation in long double, and random options. SPDX-License-Identifier: MIT */
#ifndef METALLOID_TESTS_ROPE_CASES_H
#define METALLOID_TESTS_ROPE_CASES_H

#include "every_operation.h"

#include <math.h>
#include <string.h>

/* Everything about a call but x. */
typedef struct rope_case {
    int64_t dims;
    metalloid_rope_options options;
    tensor *freqs, *inv_freqs, *offsets, *position_ids;
} rope_case;

static inline int64_t rope_position(const rope_case *c, int64_t batch, int64_t time, int64_t times) {
    if (c->position_ids) return (int64_t)get(c->position_ids, batch * times + time);
    if (c->offsets) return (int64_t)get(c->offsets, c->offsets->elements == 1 ? 0 : batch) + time;
    return c->options.offset + time;
}

/* x of any rank >= 3, row-major. slack: float64, in which the contract has the angle computed, knows an angle to 2^-53 of itself in each
 * of its few operations. */
static inline void reference_rope(const rope_case *c, const double *x, const int64_t *shape, int rank, double *y,
                                  double *m, double *slack) {
    int time_axis = c->options.time_axis == METALLOID_TIME_AXIS_1 ? 1 : rank - 2;
    int64_t head_dim = shape[rank - 1], rows = 1, after_time = 1, pairs = c->dims / 2;
    for (int axis = 0; axis < rank - 1; axis++) rows *= shape[axis];
    for (int axis = time_axis + 1; axis < rank - 1; axis++) after_time *= shape[axis];
    for (int64_t row = 0; row < rows; row++, x += head_dim, y += head_dim, m += head_dim, slack += head_dim) {
        int64_t batch = row / (rows / shape[0]), time = row / after_time % shape[time_axis];
        long double position = (long double)rope_position(c, batch, time, shape[time_axis]);
        for (int64_t i = 0; i < head_dim; i++) y[i] = x[i], m[i] = fabs(x[i]), slack[i] = 0;
        for (int64_t i = 0; i < pairs; i++) {
            long double inv_freq = c->freqs       ? 1 / (long double)get(c->freqs, i)
                                   : c->inv_freqs ? (long double)get(c->inv_freqs, i)
                                                  : powl(c->options.base, -(long double)(2 * i) / c->dims);
            long double angle = position * c->options.scale * inv_freq, cosine = cosl(angle), sine = sinl(angle);
            int64_t first = c->options.traditional ? 2 * i : i, second = c->options.traditional ? 2 * i + 1 : i + pairs;
            y[first] = (double)(x[first] * cosine - x[second] * sine);
            y[second] = (double)(x[first] * sine + x[second] * cosine);
            m[first] = m[second] = fmax(fabs(x[first]), fabs(x[second]));
            slack[first] = slack[second] = 8 * 0x1p-53 * (double)fabsl(angle) * 2 * m[first];
        }
    }
}

/* Any of the frequency and position forms. Positions stay below `most` in magnitude. */
static inline rope_case random_rope_case(int64_t batch, int64_t times, int64_t head_dim, int64_t most) {
    rope_case c = {.dims = 2 * random_int(1, head_dim / 2), .options = METALLOID_ROPE_OPTIONS_INIT};
    c.options.traditional = one_in(2);
    c.options.scale = one_in(2) ? 1 : random_uniform(-2, 2);
    int64_t pairs = c.dims / 2;
    switch (random_int(0, 2)) {
    case 0: c.options.base = one_in(2) ? 10000 : random_uniform(2, 1e6); break;
    case 1:
        c.freqs = new_tensor(one_in(3) ? random_integer() : random_floating(), INPUT, 1, &pairs);
        if (c.freqs->type <= F64) {
            fill_uniform(c.freqs, 0.3, 100);
            if (one_in(3)) set(c.freqs, random_int(0, pairs - 1), INFINITY);
        } else {
            fill_integers(c.freqs, 1, 100);
        }
        break;
    default:
        c.inv_freqs = new_tensor(one_in(3) ? random_integer() : random_floating(), INPUT, 1, &pairs);
        if (c.inv_freqs->type <= F64) {
            fill_uniform(c.inv_freqs, 0, 2);
        } else {
            fill_integers(c.inv_freqs, 0, 2);
        }
    }
    if (c.freqs || c.inv_freqs) c.options.base = 0;

    int kind = (int)random_int(0, 2);
    if (kind == 0) {
        c.options.offset = random_int(-most, most - times);
    } else {
        element_type type = random_integer();
        int bits = 8 * (int)dtype_size(type);
        int64_t highest = type >= U8 ? (bits == 64 ? INT64_MAX : ((int64_t)1 << bits) - 1) : INT64_MAX >> (64 - bits);
        int64_t lowest = type >= U8 ? 0 : -highest - 1;
        if (highest > most) highest = most;
        if (lowest < -most) lowest = -most;
        if (kind == 1) {
            c.offsets = one_in(3)   ? new_tensor(type, INPUT, 0, NULL)
                        : one_in(2) ? new_tensor(type, INPUT, SHAPE(1))
                                    : new_tensor(type, INPUT, 1, &batch);
            fill_integers(c.offsets, lowest, highest - times);
        } else {
            c.position_ids = new_tensor(type, INPUT, SHAPE(batch, times));
            fill_integers(c.position_ids, lowest, highest);
        }
    }
    c.options.freqs = dl(c.freqs);
    c.options.inv_freqs = dl(c.inv_freqs);
    c.options.offsets = dl(c.offsets);
    c.options.position_ids = dl(c.position_ids);
    return c;
}

/* What both operations must refuse beside bad tensors. Returns how many calls were refused. */
static inline int refuse_rope_options(operation (*sample)(sample_size, bool inverse, bool each_token), int first) {
    int refused = 0;
#define REFUSE_OPTION(name, what, ...)    \
    do {                                  \
        operation bad = op;               \
        __VA_ARGS__;                      \
        expect_refused(&bad, name, what); \
        refused++;                        \
    } while (0)

    for (int form = 0; form < 4; form++) {
        seed((uint64_t)form);
        operation op = sample(SMALL, form & 1, form & 2);
        int64_t head_dim = op.argument[0].tensor->shape[3];
        static const int64_t bad_dims[] = {0, 1, 3, 7, -2, -4, INT64_MIN, INT64_MAX};
        for (size_t i = 0; i < sizeof bad_dims / sizeof *bad_dims; i++)
            REFUSE_OPTION("dims", "bad dims", bad.dims = bad_dims[i]);
        operation by_base = op;
        by_base.given[first] = by_base.given[first + 1] = NULL;
        by_base.rope.base = 10000;
        {
            operation bad = by_base;
            bad.dims = head_dim + 2;
            expect_refused(&bad, "dims", "more dims than features");
            bad.dims = INT64_MAX - 1;
            expect_refused(&bad, "dims", "far more dims than features");
            bad = by_base;
            const double bad_base[] = {-1, -10000, INFINITY, -INFINITY, NAN};
            for (int i = 0; i < 5; i++, refused++) {
                bad.rope.base = bad_base[i];
                expect_refused(&bad, "base", "a bad base");
            }
        }
        REFUSE_OPTION(form & 1 ? "inv_freqs" : "freqs", "base and a table", bad.rope.base = 10000);
        REFUSE_OPTION("freqs", "both tables",
                      bad.given[first] = bad.given[first + 1] =
                          op.given[first] ? op.given[first] : op.given[first + 1]);
        REFUSE_OPTION("freqs", "no frequencies", bad.given[first] = bad.given[first + 1] = NULL);
        REFUSE_OPTION("offset", "an offset and a tensor of positions", bad.rope.offset = 1);
        REFUSE_OPTION("position_ids", "both tensors of positions", {
            DLTensor *either = op.given[first + 2] ? op.given[first + 2] : op.given[first + 3];
            bad.given[first + 2] = bad.given[first + 3] = either;
        });
        const double bad_scale[] = {INFINITY, -INFINITY, NAN};
        for (int i = 0; i < 3; i++) REFUSE_OPTION("scale", "a bad scale", bad.rope.scale = bad_scale[i]);
        const int bad_axis[] = {-1, 2, 1000};
        for (int i = 0; i < 3; i++)
            REFUSE_OPTION("time_axis", "a bad time axis", memcpy(&bad.rope.time_axis, &bad_axis[i], sizeof(int)));
        const size_t bad_size[] = {0, 4, 7, 12, 44, (size_t)1 << 40, SIZE_MAX};
        for (int i = 0; i < 7; i++) REFUSE_OPTION("options", "a bad size", bad.rope.size = bad_size[i]);

        /* Positions outside of int32. */
        operation by_offset = op;
        by_offset.given[first + 2] = by_offset.given[first + 3] = NULL;
        const int64_t bad_offset[] = {(int64_t)INT32_MAX - 3, (int64_t)INT32_MAX + 1, (int64_t)INT32_MIN - 1, INT64_MAX,
                                      INT64_MIN};
        for (int i = 0; i < 5; i++, refused++) { /* 5 time steps */
            operation bad = by_offset;
            bad.rope.offset = bad_offset[i];
            expect_refused(&bad, "offset", "an offset out of range");
        }
        bool each_token = form & 2;
        int64_t batch = op.argument[0].tensor->shape[0], times = op.argument[0].tensor->shape[2];
        tensor *wide =
            each_token ? new_tensor(I64, STRIDED, SHAPE(batch, times)) : new_tensor(I64, STRIDED, SHAPE(batch));
        tensor *huge =
            each_token ? new_tensor(U64, STRIDED, SHAPE(batch, times)) : new_tensor(U64, STRIDED, SHAPE(batch));
        const double bad_position[] = {0x1p31, -0x1p31 - 1, 0x1p62, -0x1p63, 0x1p32};
        for (int i = 0; i < 5; i++, refused++) {
            fill(wide, 0);
            set(wide, wide->elements - 1, bad_position[i]);
            operation bad = op;
            bad.given[first + (each_token ? 3 : 2)] = dl(wide);
            expect_refused(&bad, each_token ? "position_ids" : "offsets", "a position out of range");
        }
        fill(huge, 0);
        set(huge, 1, 18446744073709549568.0); /* wraps around to -2048 */
        operation bad = op;
        bad.given[first + (each_token ? 3 : 2)] = dl(huge);
        expect_refused(&bad, each_token ? "position_ids" : "offsets", "a position of nearly 2^64");
        if (!each_token) {
            fill(wide, 0);
            set(wide, 1, 0x1p31 - 1 - 3); /* the last of 5 steps is outside */
            bad.given[first + 2] = dl(wide);
            expect_refused(&bad, "offsets", "an offset too close to the end");
        }
        release_all();
    }
#undef REFUSE_OPTION
    return refused;
}

#endif
