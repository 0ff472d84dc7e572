/* What the tests of swiglu and geglu share: out = f(gate) * up, with f in wide arithmetic. SPDX-License-Identifier: MIT */
#ifndef METALLOID_TESTS_GATED_CASES_H
#define METALLOID_TESTS_GATED_CASES_H

#include "every_operation.h"

#include <math.h>
#include <string.h>

typedef double (*activation)(double);

/* Runs the operation on these tensors and compares, with one row `span` elements long. Large negative gates may give 0 as soon as
 * an exponential of theirs passes the range of the arithmetic. */
static inline void run_gated(operation (*sample)(sample_size), activation f, metalloid_gelu gelu, tensor *gate,
                             tensor *up, tensor *out, int64_t span) {
    double *g = values(gate), *u = values(up), *y = new_doubles(gate->elements);
    double *slack = new_doubles(gate->elements), *m = new_doubles(gate->elements);
    bool in_double = gate->type == F64 || up->type == F64 || out->type == F64;
    for (int64_t i = 0; i < gate->elements; i++) {
        double activated = f(g[i]), vanishing = in_double ? 1e-300 : 1e-36;
        y[i] = (double)((long double)activated * u[i]);
        slack[i] = g[i] < 0 && fabs(activated) < vanishing ? fabs(u[i]) * vanishing : 0;
    }
    for (int64_t i = 0; i < gate->elements; i += span) m[i / span] = largest(y + i, span);
    operation op = sample(SMALL); /* its own tensors must stay untouched, too */
    op.gelu = gelu;
    op.context = random_context();
    op.given[0] = dl(gate);
    op.given[1] = dl(up);
    op.given[2] = dl(out);
    for (int i = 0; i < op.count; i++) op.argument[i].tensor->output = false;
    out->output = true;
    snapshot();
    expect_ok(op.call(&op));
    expect_only_outputs_written();
    expect_close_with_slack("out", GATED, out, y, m, span, slack);
}

static inline void random_gated_cases(operation (*sample)(sample_size), activation f, metalloid_gelu gelu,
                                      uint64_t first_seed) {
    int count = scaled(2000);
    for (int i = 0; i < count; i++) {
        seed(first_seed + (uint64_t)i);
        describe("case %d", i);
        int64_t shape[MAX_RANK];
        int rank = (int)random_int(0, 4);
        random_shape(shape, rank, one_in(3) ? 12 : 5);
        if (rank > 0 && one_in(3)) shape[rank - 1] = random_int(1, 300);
        tensor *gate = new_tensor(random_floating(), INPUT, rank, shape),
               *up = new_normal(random_floating(), INPUT, rank, shape);
        fill_normal(gate, 0, one_in(3) ? 20 : 2);
        tensor *out = NULL;
        if (writable(gate) && one_in(5)) out = gate;
        if (!out && writable(up) && one_in(5)) out = up;
        if (!out) out = new_tensor(random_floating(), OUTPUT, rank, shape);
        run_gated(sample, f, gelu, gate, up, out, rank ? shape[rank - 1] : 1);
        release_all();
    }
    report("random calls", count);
}

static inline void refuse_gated_arguments(operation (*sample)(sample_size)) {
    int refused = 0;
    for (int round = 0; round < scaled(4); round++) {
        seed((uint64_t)round);
        operation op = sample(SMALL);
        refused += expect_bad_tensors_refused(&op);
        release_all();
    }
    report("bad calls refused", refused);
}

static inline void empty_and_scalar_gated(operation (*sample)(sample_size), activation f) {
    for (int which = 1; which < 8; which++) {
        int64_t shape[] = {which & 1 ? 0 : 2, which & 2 ? 0 : 3, which & 4 ? 0 : 5};
        tensor *gate = new_tensor(F32, CONTIGUOUS, 3, shape), *up = new_tensor(F16, CONTIGUOUS, 3, shape);
        tensor *out = new_tensor(F32, CONTIGUOUS, 3, shape);
        gate->dl.data = up->dl.data = out->dl.data = NULL;
        describe("empty {%lld, %lld, %lld}", (long long)shape[0], (long long)shape[1], (long long)shape[2]);
        run_gated(sample, f, METALLOID_GELU_ERF, gate, up, out, 1);
        release_all();
    }
    describe("rank 0");
    run_gated(sample, f, METALLOID_GELU_ERF, new_normal(F32, CONTIGUOUS, 0, NULL), new_normal(F16, CONTIGUOUS, 0, NULL),
              new_tensor(F32, CONTIGUOUS, 0, NULL), 1);
    release_all();
}

/* All 65536 gates, one at a time in the bound (each its own row), for a float32 and a 16-bit output. */
static inline void every_16_bit_gate(operation (*sample)(sample_size), activation f, metalloid_gelu gelu) {
    static const element_type types[] = {F16, BF16};
    for (int i = 0; i < 2; i++) {
        tensor *gate = new_tensor(types[i], CONTIGUOUS, SHAPE(65536)),
               *up = new_tensor(types[i], CONTIGUOUS, SHAPE(65536));
        for (int bits = 0; bits < 65536; bits++) memcpy(element(gate, bits), &(uint16_t){(uint16_t)bits}, 2);
        fill(up, 1);
        describe("all gates of %s", dtype_name(types[i]));
        run_gated(sample, f, gelu, gate, up, new_tensor(F32, CONTIGUOUS, SHAPE(65536)), 1);
        run_gated(sample, f, gelu, gate, up, new_tensor(types[i], CONTIGUOUS, SHAPE(65536)), 1);
        release_all();
    }
}

/* Each gate many times over, so that the vectors and the tails of every kernel see it, with factors 1 and 1/4. */
static inline void extreme_gates(operation (*sample)(sample_size), activation f, metalloid_gelu gelu,
                                 const double *gate, size_t count) {
    for (int type = F32; type <= F64; type++) {
        for (size_t i = 0; i < count; i++) {
            seed(i);
            tensor *gates = new_tensor((element_type)type, INPUT, SHAPE(3, 37)),
                   *up = new_tensor(F32, INPUT, SHAPE(3, 37));
            fill(gates, gate[i]);
            fill(up, one_in(2) ? 1 : 0.25);
            describe("gate %g in %s", gate[i], dtype_name((element_type)type));
            run_gated(sample, f, gelu, gates, up, new_tensor((element_type)type, OUTPUT, SHAPE(3, 37)), 37);
            release_all();
        }
    }
}

#endif
