/* gated_delta_update. SPDX-License-Identifier: MIT */
#include "every_operation.h"

#include <math.h>
#include <string.h>

typedef struct delta_case {
    int64_t batch, time, k_heads, v_heads, key_dim, value_dim;
    tensor *q, *k, *v, *gamma, *beta, *initial_state, *mask, *out, *state;
} delta_case;

/* A sum of products in twice double's precision (Ogita, Rump & Oishi 2005, doi:10.1137/030601818): `high` and what it has lost. Not
 * in long double, which Arm has in software alone. */
typedef struct {
    double high, low;
} exact_sum;

static void add_product(exact_sum *sum, double a, double b) {
    double product = a * b, rest = fma(a, b, -product);
    double next = sum->high + product, part = next - sum->high;
    sum->low += ((sum->high - (next - part)) + (product - part)) + rest;
    sum->high = next;
}

/* S <- S gamma_t;  S <- S + beta_t (v_t - S k_t) k_t^T;  out_t = S q_t, one step after the other. */
static void reference(const delta_case *c, double *out, double *final) {
    const double *q = values(c->q), *k = values(c->k), *v = values(c->v), *gamma = values(c->gamma),
                 *beta = values(c->beta);
    const double *mask = c->mask ? values(c->mask) : NULL,
                 *initial = c->initial_state ? values(c->initial_state) : NULL;
    int64_t size = c->value_dim * c->key_dim, group = c->k_heads ? c->v_heads / c->k_heads : 1;
    bool by_channel = c->gamma->rank == 4;
    for (int64_t b = 0; b < c->batch; b++) {
        for (int64_t h = 0; h < c->v_heads; h++) {
            double *s = final + (b * c->v_heads + h) * size;
            for (int64_t i = 0; i < size; i++) s[i] = initial ? initial[(b * c->v_heads + h) * size + i] : 0;
            for (int64_t t = 0; t < c->time; t++) {
                int64_t at = b * c->time + t, head = at * c->v_heads + h, k_head = at * c->k_heads + h / group;
                if (mask && mask[at] == 0) continue; /* out is 0 */
                for (int64_t row = 0; row < c->value_dim; row++) {
                    exact_sum dot = {0, 0}, result = {0, 0};
                    double *line = s + row * c->key_dim;
                    for (int64_t i = 0; i < c->key_dim; i++) {
                        line[i] *= gamma[by_channel ? head * c->key_dim + i : head];
                        add_product(&dot, line[i], k[k_head * c->key_dim + i]);
                    }
                    double change = beta[head] * ((v[head * c->value_dim + row] - dot.high) - dot.low);
                    for (int64_t i = 0; i < c->key_dim; i++) {
                        line[i] = fma(change, k[k_head * c->key_dim + i], line[i]);
                        add_product(&result, line[i], q[k_head * c->key_dim + i]);
                    }
                    out[head * c->value_dim + row] = result.high + result.low;
                }
            }
        }
    }
}

/* Keys of length about 1, as the models have them: else the rule does not contract. */
static void fill_like_a_model(delta_case *c) {
    fill_normal(c->k, 0, 1 / sqrt((double)(c->key_dim ? c->key_dim : 1)));
    fill_normal(c->q, 0, 1 / sqrt((double)(c->key_dim ? c->key_dim : 1)));
    fill_normal(c->v, 0, 1);
    fill_uniform(c->gamma, 0.6, 1);
    fill_uniform(c->beta, 0, 0.9);
    if (c->initial_state && !c->initial_state->output) fill_normal(c->initial_state, 0, 1);
}

static void run(metalloid_context *context, delta_case *c) {
    double *out = new_doubles(c->out->elements), *final = new_doubles(c->state->elements);
    reference(c, out, final);
    snapshot();
    expect_ok(metalloid_gated_delta_update(context, dl(c->q), dl(c->k), dl(c->v), dl(c->gamma), dl(c->beta),
                                           dl(c->initial_state), dl(c->mask), dl(c->out), dl(c->state)));
    expect_only_outputs_written();
    double out_size = largest(out, c->out->elements), state_size = largest(final, c->state->elements);
    if (c->out->elements) expect_close("out", GATED_DELTA, c->out, out, &out_size, c->out->elements);
    if (c->state->elements) expect_close("state", GATED_DELTA, c->state, final, &state_size, c->state->elements);
}

static void matches_the_recurrence_on_random_calls(void **state) {
    (void)state;
    int count = scaled(1500);
    for (int i = 0; i < count; i++) {
        seed(13000000 + (uint64_t)i);
        describe("case %d", i);
        delta_case c = {0};
        c.batch = random_int(1, 3);
        c.time = one_in(3) ? 1 : one_in(4) ? random_int(60, 140) : random_int(1, 36);
        c.k_heads = random_int(1, 2);
        c.v_heads = c.k_heads * random_int(1, 3);
        c.key_dim = one_in(4) ? 32 : random_int(1, 24);
        c.value_dim = one_in(4) ? 32 : one_in(6) ? random_int(25, 72) : random_int(1, 24);
        bool in_double = one_in(6);
#define RANDOM_TYPE() (in_double && one_in(2) ? F64 : random_float_below_64())
        c.q = new_tensor(RANDOM_TYPE(), INPUT, SHAPE(c.batch, c.time, c.k_heads, c.key_dim));
        c.k = new_tensor(RANDOM_TYPE(), INPUT, SHAPE(c.batch, c.time, c.k_heads, c.key_dim));
        c.v = new_tensor(RANDOM_TYPE(), INPUT, SHAPE(c.batch, c.time, c.v_heads, c.value_dim));
        bool by_channel = one_in(2);
        c.gamma = by_channel ? new_tensor(RANDOM_TYPE(), INPUT, SHAPE(c.batch, c.time, c.v_heads, c.key_dim))
                             : new_tensor(RANDOM_TYPE(), INPUT, SHAPE(c.batch, c.time, c.v_heads));
        c.beta = new_tensor(RANDOM_TYPE(), INPUT, SHAPE(c.batch, c.time, c.v_heads));
        element_type state_type = in_double ? F64 : F32;
        c.state = new_output(state_type, OUTPUT, SHAPE(c.batch, c.v_heads, c.value_dim, c.key_dim));
        if (one_in(2))
            c.initial_state = new_tensor(RANDOM_TYPE(), INPUT, SHAPE(c.batch, c.v_heads, c.value_dim, c.key_dim));
        fill_like_a_model(&c);
        if (one_in(4)) { /* in place */
            fill_normal(c.state, 0, 1);
            c.initial_state = c.state;
        }
        if (one_in(3)) {
            c.mask = new_tensor(one_in(2) ? BOOL : random_integer(), INPUT, SHAPE(c.batch, c.time));
            fill_integers(c.mask, 0, c.mask->type == BOOL || one_in(2) ? 1 : 3);
        }
        c.out = new_output(in_double ? random_floating() : random_float_below_64(), OUTPUT,
                           SHAPE(c.batch, c.time, c.v_heads, c.value_dim));
        run(random_context(), &c);
        release_all();
    }
    report("random calls", count);
}

static void a_thousand_steps_keep_the_accuracy(void **state) {
    (void)state;
    for (int by_channel = 0; by_channel < 2; by_channel++) {
        for (int type = F32; type <= F64; type++) {
            seed((uint64_t)type);
            element_type t = (element_type)type;
            delta_case c = {.batch = 1, .time = 1024, .k_heads = 1, .v_heads = 2, .key_dim = 32, .value_dim = 24};
            c.q = new_tensor(t, ROWS, SHAPE(1, 1024, 1, 32));
            c.k = new_tensor(t, ROWS, SHAPE(1, 1024, 1, 32));
            c.v = new_tensor(t, ROWS, SHAPE(1, 1024, 2, 24));
            c.gamma = by_channel ? new_tensor(t, ROWS, SHAPE(1, 1024, 2, 32)) : new_tensor(t, ROWS, SHAPE(1, 1024, 2));
            c.beta = new_tensor(t, ROWS, SHAPE(1, 1024, 2));
            c.out = new_output(t, ROWS, SHAPE(1, 1024, 2, 24));
            c.state = new_output(t == F64 ? F64 : F32, ROWS, SHAPE(1, 2, 24, 32));
            fill_like_a_model(&c);
            fill_uniform(c.gamma, 0.97, 1);
            describe("T = 1024 in %s", dtype_name(t));
            run(random_context(), &c);
            release_all();
        }
    }
}

/* Decays from none at all to a clean slate: products over many steps underflow, and must not turn into NaN. */
static void extreme_decays_stay_finite(void **state) {
    (void)state;
    static const double decays[] = {0, 1e-30, 1e-3, 1};
    for (int i = 0; i < 4; i++) {
        for (int by_channel = 0; by_channel < 2; by_channel++) {
            seed((uint64_t)i);
            delta_case c = {.batch = 1, .time = 130, .k_heads = 1, .v_heads = 1, .key_dim = 16, .value_dim = 16};
            c.q = new_tensor(F32, ROWS, SHAPE(1, 130, 1, 16));
            c.k = new_tensor(F32, ROWS, SHAPE(1, 130, 1, 16));
            c.v = new_tensor(F32, ROWS, SHAPE(1, 130, 1, 16));
            c.gamma =
                by_channel ? new_tensor(F32, ROWS, SHAPE(1, 130, 1, 16)) : new_tensor(F32, ROWS, SHAPE(1, 130, 1));
            c.beta = new_tensor(F32, ROWS, SHAPE(1, 130, 1));
            c.initial_state = new_tensor(F32, ROWS, SHAPE(1, 1, 16, 16));
            c.out = new_output(F32, ROWS, SHAPE(1, 130, 1, 16));
            c.state = new_output(F32, ROWS, SHAPE(1, 1, 16, 16));
            fill_like_a_model(&c);
            for (int64_t e = 0; e < c.gamma->elements; e++) {
                if (!one_in(3)) set(c.gamma, e, decays[i]);
            }
            describe("decay %g", decays[i]);
            run(random_context(), &c);
            release_all();
        }
    }
}

/* Chunks that are full, one short or one over, or that masks leave a step of; whole and part blocks of rows, whole and
 * part vectors. */
static void chunks_of_any_length_match_the_recurrence(void **state) {
    (void)state;
    static const int64_t times[] = {5, 6, 7, 8, 9, 31, 32, 33, 40, 63, 64, 65, 97};
    static const int64_t dims[][2] = {{16, 32}, {33, 65}, {128, 31}, {40, 128}, {1, 1}};
    int count = 0;
    for (int i = 0; i < 13; i++) {
        for (int d = 0; d < 5; d++) {
            seed((uint64_t)(i * 5 + d));
            int64_t time = times[i], key_dim = dims[d][0], value_dim = dims[d][1], group = random_int(1, 3);
            element_type t = one_in(4) ? F64 : F32;
            delta_case c = {.batch = 2, .time = time, .k_heads = 2, .v_heads = 2 * group, .key_dim = key_dim};
            c.value_dim = value_dim;
            c.q = new_tensor(t, ROWS, SHAPE(2, time, 2, key_dim));
            c.k = new_tensor(t, ROWS, SHAPE(2, time, 2, key_dim));
            c.v = new_tensor(t, ROWS, SHAPE(2, time, 2 * group, value_dim));
            c.gamma = one_in(2) ? new_tensor(t, ROWS, SHAPE(2, time, 2 * group, key_dim))
                                : new_tensor(t, ROWS, SHAPE(2, time, 2 * group));
            c.beta = new_tensor(t, ROWS, SHAPE(2, time, 2 * group));
            c.out = new_output(t, ROWS, SHAPE(2, time, 2 * group, value_dim));
            c.state = new_output(t, one_in(2) ? CONTIGUOUS : STRIDED, SHAPE(2, 2 * group, value_dim, key_dim));
            fill_normal(c.state, 0, 1);
            c.initial_state = c.state; /* in place */
            fill_like_a_model(&c);
            if (one_in(2)) {
                c.mask = new_tensor(BOOL, ROWS, SHAPE(2, time));
                int live = (int)random_int(1, 8);
                for (int64_t step = 0; step < 2 * time; step++) set(c.mask, step, !one_in(live));
            }
            describe("T %d, D_k %d, D_v %d, group %d", (int)time, (int)key_dim, (int)value_dim, (int)group);
            run(random_context(), &c);
            release_all();
            count++;
        }
    }
    report("lengths and dimensions", count);
}

/* One step of a chunk holds what no model gives: growth, a change of sign, keys far from unit length, NaN. It must show
 * where the recurrence has it show, and nowhere else. */
static void a_hostile_step_in_a_chunk_acts_as_in_the_recurrence(void **state) {
    (void)state;
    static const double strange[] = {0, -0.5, 1.5, -3, 1e6, 1e-38, NAN};
    enum { HEADS = 2, KEY_DIM = 20, VALUE_DIM = 37, TIME = 70 };
    int count = 0;
    for (int which = 0; which < 6; which++) {
        for (int i = 0; i < 7; i++) {
            for (int by_channel = 0; by_channel < 2; by_channel++) {
                seed((uint64_t)(which * 7 + i));
                delta_case c = {.batch = 1, .time = TIME, .k_heads = 1, .v_heads = HEADS, .key_dim = KEY_DIM};
                c.value_dim = VALUE_DIM;
                c.q = new_tensor(F32, ROWS, SHAPE(1, TIME, 1, KEY_DIM));
                c.k = new_tensor(F32, ROWS, SHAPE(1, TIME, 1, KEY_DIM));
                c.v = new_tensor(F32, ROWS, SHAPE(1, TIME, HEADS, VALUE_DIM));
                c.gamma = by_channel ? new_tensor(F32, ROWS, SHAPE(1, TIME, HEADS, KEY_DIM))
                                     : new_tensor(F32, ROWS, SHAPE(1, TIME, HEADS));
                c.beta = new_tensor(F32, ROWS, SHAPE(1, TIME, HEADS));
                c.initial_state = one_in(2) ? new_tensor(F32, ROWS, SHAPE(1, HEADS, VALUE_DIM, KEY_DIM)) : NULL;
                c.out = new_output(F32, ROWS, SHAPE(1, TIME, HEADS, VALUE_DIM));
                c.state = new_output(F32, ROWS, SHAPE(1, HEADS, VALUE_DIM, KEY_DIM));
                fill_like_a_model(&c);
                tensor *hit[] = {c.q, c.k, c.v, c.gamma, c.beta, c.initial_state};
                if (!hit[which]) hit[which] = c.v;
                set(hit[which], random_int(0, hit[which]->elements - 1), strange[i]);
                describe("%g in argument %d", strange[i], which);
                run(random_context(), &c);
                release_all();
                count++;
            }
        }
    }
    report("hostile steps", count);
}

/* A state of zeros takes any decay; infinite ones make NaN of it as 0 times infinity does. */
static void growth_of_an_empty_state_is_nothing(void **state) {
    (void)state;
    for (int by_channel = 0; by_channel < 2; by_channel++) {
        seed((uint64_t)by_channel);
        delta_case c = {.batch = 1, .time = 40, .k_heads = 1, .v_heads = 1, .key_dim = 16, .value_dim = 16};
        c.q = new_tensor(F32, ROWS, SHAPE(1, 40, 1, 16));
        c.k = new_tensor(F32, ROWS, SHAPE(1, 40, 1, 16));
        c.v = new_tensor(F32, ROWS, SHAPE(1, 40, 1, 16));
        c.gamma = by_channel ? new_tensor(F32, ROWS, SHAPE(1, 40, 1, 16)) : new_tensor(F32, ROWS, SHAPE(1, 40, 1));
        c.beta = new_tensor(F32, ROWS, SHAPE(1, 40, 1));
        c.out = new_output(F32, ROWS, SHAPE(1, 40, 1, 16));
        c.state = new_output(F32, ROWS, SHAPE(1, 1, 16, 16));
        fill_like_a_model(&c);
        fill(c.gamma, 1e30);
        fill(c.v, 0);
        describe("decay 1e30 of nothing");
        run(random_context(), &c);
        release_all();
    }
}

/* However a call is cut, its bits are the same: rows of a state have nothing to do with each other. */
static void bits_do_not_depend_on_the_threads(void **state) {
    (void)state;
    for (int by_channel = 0; by_channel < 2; by_channel++) {
        double *first = NULL, *first_state = NULL;
        for (int threads = 1; threads <= 64; threads *= 4) {
            seed((uint64_t)by_channel);
            delta_case c = {.batch = 1, .time = 70, .k_heads = 2, .v_heads = 4, .key_dim = 64, .value_dim = 100};
            c.q = new_tensor(F32, CONTIGUOUS, SHAPE(1, 70, 2, 64));
            c.k = new_tensor(F32, CONTIGUOUS, SHAPE(1, 70, 2, 64));
            c.v = new_tensor(F32, CONTIGUOUS, SHAPE(1, 70, 4, 100));
            c.gamma = by_channel ? new_tensor(F32, CONTIGUOUS, SHAPE(1, 70, 4, 64))
                                 : new_tensor(F32, CONTIGUOUS, SHAPE(1, 70, 4));
            c.beta = new_tensor(F32, CONTIGUOUS, SHAPE(1, 70, 4));
            c.out = new_output(F32, CONTIGUOUS, SHAPE(1, 70, 4, 100));
            c.state = new_output(F32, CONTIGUOUS, SHAPE(1, 4, 100, 64));
            fill_like_a_model(&c);
            metalloid_context *context = NULL;
            expect_ok(metalloid_context_create(&context));
            expect_ok(metalloid_context_set_threads(context, threads));
            describe("%d threads", threads);
            run(context, &c);
            metalloid_context_destroy(context);
            double *out = values(c.out), *final = values(c.state);
            if (!first) first = out, first_state = final;
            assert_memory_equal(out, first, (size_t)c.out->elements * sizeof *out);
            assert_memory_equal(final, first_state, (size_t)c.state->elements * sizeof *final);
        }
        release_all();
    }
}

/* What a masked step holds, even NaN, leaves no trace. */
static void masked_steps_do_not_touch_the_state(void **state) {
    (void)state;
    for (int round = 0; round < 20; round++) {
        seed((uint64_t)round);
        int64_t time = random_int(1, 90);
        delta_case c = {.batch = 2, .time = time, .k_heads = 1, .v_heads = 2, .key_dim = 8, .value_dim = 5};
        c.q = new_tensor(F32, STRIDED, SHAPE(2, time, 1, 8));
        c.k = new_tensor(F32, ROWS, SHAPE(2, time, 1, 8));
        c.v = new_tensor(F32, ROWS, SHAPE(2, time, 2, 5));
        c.gamma = one_in(2) ? new_tensor(F32, ROWS, SHAPE(2, time, 2)) : new_tensor(F32, ROWS, SHAPE(2, time, 2, 8));
        c.beta = new_tensor(F32, ROWS, SHAPE(2, time, 2));
        c.initial_state = new_tensor(F32, ROWS, SHAPE(2, 2, 5, 8));
        c.mask = new_tensor(BOOL, ROWS, SHAPE(2, time));
        c.out = new_output(F32, ROWS, SHAPE(2, time, 2, 5));
        c.state = new_output(F32, ROWS, SHAPE(2, 2, 5, 8));
        fill_like_a_model(&c);
        bool nothing = one_in(4);
        for (int64_t step = 0; step < 2 * time; step++) {
            bool live = !nothing && one_in(2);
            set(c.mask, step, live);
            if (live) continue;
            for (int64_t i = 0; i < 8; i++) set(c.q, step * 8 + i, NAN), set(c.k, step * 8 + i, NAN);
            for (int64_t i = 0; i < 10; i++) set(c.v, step * 10 + i, NAN);
            for (int64_t i = 0; i < 2; i++) set(c.beta, step * 2 + i, NAN);
            for (int64_t i = 0; i < c.gamma->elements / (2 * time); i++)
                set(c.gamma, step * (c.gamma->elements / (2 * time)) + i, NAN);
        }
        describe("masked steps, round %d", round);
        run(random_context(), &c);
        if (nothing) {
            for (int64_t i = 0; i < c.state->elements; i++) assert_true(get(c.state, i) == get(c.initial_state, i));
        }
        release_all();
    }
}

static void refuses_bad_arguments_and_writes_nothing(void **state) {
    (void)state;
    int refused = 0;
    for (int round = 0; round < scaled(4); round++) {
        seed((uint64_t)round);
        operation op = sample_gated_delta(SMALL);
        refused += expect_bad_tensors_refused(&op);
        release_all();
    }
    seed(5);
    operation op = sample_gated_delta(SMALL), bad = op;
    bad.given[8] = dl(new_output(F16, ROWS, SHAPE(2, 4, 6, 5)));
    expect_refused(&bad, "state", "a float16 state");
    bad = op;
    bad.given[8] = dl(new_output(BF16, ROWS, SHAPE(2, 4, 6, 5)));
    expect_refused(&bad, "state", "a bfloat16 state");
    bad = op; /* 3 value heads over 2 key heads */
    bad.given[2] = dl(new_normal(F32, ROWS, SHAPE(2, 3, 3, 6)));
    bad.given[3] = dl(new_normal(F32, ROWS, SHAPE(2, 3, 3)));
    bad.given[4] = dl(new_normal(F32, ROWS, SHAPE(2, 3, 3)));
    bad.given[5] = NULL;
    bad.given[7] = dl(new_output(F32, ROWS, SHAPE(2, 3, 3, 6)));
    bad.given[8] = dl(new_output(F32, ROWS, SHAPE(2, 3, 6, 5)));
    expect_refused(&bad, "v", "3 value heads over 2");
    release_all();
    report("bad calls refused", refused + 3);
}

/* T = 0 gives the initial state or zeros, no key features give zeros; what is empty itself is left alone. */
static void zero_extents_give_the_initial_state(void **state) {
    (void)state;
    for (int which = 1; which < 32; which++) {
        for (int with_state = 0; with_state < 2; with_state++) {
            seed((uint64_t)which);
            int64_t b = which & 1 ? 0 : 2, t = which & 2 ? 0 : 3, h = which & 4 ? 0 : 2, dk = which & 8 ? 0 : 4,
                    dv = which & 16 ? 0 : 5;
            delta_case c = {.batch = b, .time = t, .k_heads = h, .v_heads = h, .key_dim = dk, .value_dim = dv};
            c.q = new_tensor(F32, CONTIGUOUS, SHAPE(b, t, h, dk));
            c.k = new_tensor(F32, CONTIGUOUS, SHAPE(b, t, h, dk));
            c.v = new_tensor(F32, CONTIGUOUS, SHAPE(b, t, h, dv));
            c.gamma = which % 3 ? new_tensor(F32, CONTIGUOUS, SHAPE(b, t, h))
                                : new_tensor(F32, CONTIGUOUS, SHAPE(b, t, h, dk));
            c.beta = new_tensor(F32, CONTIGUOUS, SHAPE(b, t, h));
            c.initial_state = with_state ? new_tensor(F16, CONTIGUOUS, SHAPE(b, h, dv, dk)) : NULL;
            c.out = new_output(F32, CONTIGUOUS, SHAPE(b, t, h, dv));
            c.state = new_output(F32, CONTIGUOUS, SHAPE(b, h, dv, dk));
            tensor *all[] = {c.q, c.k, c.v, c.gamma, c.beta, c.initial_state, c.out, c.state};
            for (int i = 0; i < 8; i++) {
                if (all[i] && all[i]->elements == 0) all[i]->dl.data = NULL;
            }
            fill_like_a_model(&c);
            describe("B %d T %d H %d D_k %d D_v %d", (int)b, (int)t, (int)h, (int)dk, (int)dv);
            run(NULL, &c);
            release_all();
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_the_recurrence_on_random_calls),
        cmocka_unit_test(a_thousand_steps_keep_the_accuracy),
        cmocka_unit_test(extreme_decays_stay_finite),
        cmocka_unit_test(chunks_of_any_length_match_the_recurrence),
        cmocka_unit_test(a_hostile_step_in_a_chunk_acts_as_in_the_recurrence),
        cmocka_unit_test(growth_of_an_empty_state_is_nothing),
        cmocka_unit_test(bits_do_not_depend_on_the_threads),
        cmocka_unit_test(masked_steps_do_not_touch_the_state),
        cmocka_unit_test(refuses_bad_arguments_and_writes_nothing),
        cmocka_unit_test(zero_extents_give_the_initial_state),
    };
    return cmocka_run_group_tests_name("gated_delta_update", tests, NULL, NULL);
}
