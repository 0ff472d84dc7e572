/* scaled_dot_product_attention. SPDX-License-Identifier: MIT */
#include "attention_cases.h"

typedef struct attention_tensors {
    tensor *q, *k, *v, *mask, *key_mask, *sinks, *out, *logsumexp;
    metalloid_attention_options options;
} attention_tensors;

static element_type promoted(element_type a, element_type b) { return a == b ? a : a == F64 || b == F64 ? F64 : F32; }

/* A floating dtype that promotes to `to`. */
static element_type random_narrower(element_type to) {
    element_type type;
    do {
        type = random_floating();
    } while (promoted(type, to) != to);
    return type;
}

/* {B, N, T, D}, at random over memory in which heads and time stand in the other order. */
static tensor *new_heads(element_type type, layout how, int64_t batch, int64_t heads, int64_t time, int64_t dim) {
    return new_normal(type, how, SHAPE(batch, heads, time, dim));
}

/* A mask of any kind and any shape that broadcasts, and its values over {B, N_q, T_q, T_kv}: 0 or -inf for bool. */
static tensor *random_mask(const attention_case *c, element_type promoted_type, const double **added) {
    const int64_t full[] = {c->batch, c->q_heads, c->q_len, c->kv_len};
    int rank = (int)random_int(0, 4);
    int64_t shape[4];
    for (int axis = 0; axis < rank; axis++) shape[axis] = one_in(3) ? 1 : full[4 - rank + axis];
    int kind = (int)random_int(0, 2);
    element_type type = kind == 0 ? BOOL : kind == 1 ? random_narrower(promoted_type) : random_integer();
    tensor *mask = new_tensor(type, INPUT, rank, shape);
    if (kind == 0) {
        int most = one_in(3) ? 1 : 3; /* a half or a quarter is hidden */
        for (int64_t i = 0; i < mask->elements; i++) set(mask, i, random_int(0, most) > 0);
    } else if (kind == 1) {
        for (int64_t i = 0; i < mask->elements; i++)
            set(mask, i, one_in(4) ? -INFINITY : one_in(8) ? -1e4 : random_normal());
    } else {
        fill_integers(mask, type >= U8 ? 0 : -3, 3);
    }
    double *all = new_doubles(full[0] * full[1] * full[2] * full[3]);
    for (int64_t i = 0; i < full[0] * full[1] * full[2] * full[3]; i++) {
        int64_t rest = i, index = 0, step = 1;
        for (int axis = 3; axis >= 0; axis--) {
            int64_t at = rest % full[axis], own = axis - (4 - rank);
            rest /= full[axis];
            if (own < 0) continue;
            if (shape[own] > 1) index += at * step;
            step *= shape[own];
        }
        all[i] = kind == 0 ? (get(mask, index) != 0 ? 0 : -INFINITY) : get(mask, index);
    }
    *added = all;
    return mask;
}

/* Keys that no query of the batch row and head sees get NaN or infinity in k and v. */
static void poison_hidden_keys(const attention_case *c, tensor *k, tensor *v) {
    int64_t group = c->q_heads / c->kv_heads;
    for (int64_t b = 0; b < c->batch; b++) {
        for (int64_t kv = 0; kv < c->kv_heads; kv++) {
            for (int64_t j = 0; j < c->kv_len; j++) {
                bool seen = false;
                for (int64_t h = kv * group; h < (kv + 1) * group && !seen; h++) {
                    for (int64_t i = 0; i < c->q_len && !seen; i++) seen = sees(c, b, h, i, j);
                }
                if (seen) continue;
                int64_t row = (b * c->kv_heads + kv) * c->kv_len + j;
                for (int64_t d = 0; d < c->head_dim; d++)
                    set(k, row * c->head_dim + d, one_in(2) ? (double)NAN : (double)INFINITY);
                for (int64_t d = 0; d < c->value_dim; d++)
                    set(v, row * c->value_dim + d, one_in(2) ? (double)NAN : -(double)INFINITY);
            }
        }
    }
}

static void run(metalloid_context *context, attention_case *c, attention_tensors *t) {
    c->q = values(t->q);
    c->k = values(t->k);
    c->v = values(t->v);
    reference_attention(c);
    snapshot();
    expect_ok(metalloid_scaled_dot_product_attention(context, dl(t->q), dl(t->k), dl(t->v), c->scale, &t->options,
                                                     dl(t->out)));
    expect_only_outputs_written();
    bool in_double = t->q->type == F64 || t->k->type == F64 || t->v->type == F64 || t->out->type == F64;
    expect_close_with_slack("out", ATTENTION, t->out, c->out, c->v_size, c->value_dim, attention_slack(c, in_double));
    if (t->logsumexp) expect_close("logsumexp", ATTENTION, t->logsumexp, c->logsumexp, c->term_size, 1);
}

static void random_case(void) {
    attention_case c = {0};
    c.batch = random_int(1, 3);
    c.kv_heads = random_int(1, 3);
    c.q_heads = c.kv_heads * random_int(1, 3);
    c.q_len = one_in(4) ? 1 : random_attention_length(1, 40);
    c.kv_len = one_in(20) ? 0 : random_attention_length(1, 140);
    c.head_dim = random_head_dim();
    c.value_dim = one_in(2) ? c.head_dim : random_int(1, 70);
    c.scale = (one_in(5) ? random_uniform(-1.5, 1.5) : 1) / sqrt((double)c.head_dim);
    c.softcap = one_in(5) ? random_uniform(0.5, 30) : 0;
    c.causal = one_in(3);
    c.window = one_in(5) ? random_int(1, 50) : 0;
    c.causal_offset = one_in(3) ? random_int(-10, 150) : METALLOID_CAUSAL_OFFSET_DEFAULT;

    attention_tensors t = {.options = METALLOID_ATTENTION_OPTIONS_INIT};
    element_type q_type = random_floating(), k_type = one_in(2) ? q_type : random_floating(),
                 v_type = one_in(2) ? k_type : random_floating();
    element_type type = promoted(promoted(q_type, k_type), v_type);
    bool poison = one_in(3); /* writes to k and v key by key, which broadcast ones do not have */
    t.q = new_heads(q_type, INPUT, c.batch, c.q_heads, c.q_len, c.head_dim);
    t.k = new_heads(k_type, poison ? OUTPUT : INPUT, c.batch, c.kv_heads, c.kv_len, c.head_dim);
    t.v = new_heads(v_type, poison ? OUTPUT : INPUT, c.batch, c.kv_heads, c.kv_len, c.value_dim);
    if (one_in(2)) t.mask = random_mask(&c, type, &c.added);
    if (one_in(3)) {
        t.key_mask = new_tensor(one_in(2) ? BOOL : random_integer(), INPUT, SHAPE(c.batch, c.kv_len));
        fill_integers(t.key_mask, 0, one_in(2) ? 1 : 3);
        if (t.key_mask->type == BOOL) fill_integers(t.key_mask, 0, 1);
        c.key_mask = values(t.key_mask);
    }
    if (one_in(3)) {
        t.sinks = new_tensor(random_narrower(type), INPUT, SHAPE(c.q_heads));
        fill_normal(t.sinks, 0, 3);
        c.sinks = values(t.sinks);
    }
    if (poison) poison_hidden_keys(&c, t.k, t.v);
    t.out = new_output(one_in(2) ? type : random_floating(), OUTPUT, SHAPE(c.batch, c.q_heads, c.q_len, c.value_dim));
    element_type wide = type == F64 || t.out->type == F64 ? F64 : F32;
    if (one_in(2)) t.logsumexp = new_output(wide, OUTPUT, SHAPE(c.batch, c.q_heads, c.q_len));
    t.options.causal = c.causal;
    t.options.causal_offset = c.causal_offset;
    t.options.window = c.window;
    t.options.softcap = c.softcap;
    t.options.mask = dl(t.mask);
    t.options.key_mask = dl(t.key_mask);
    t.options.sinks = dl(t.sinks);
    t.options.logsumexp = dl(t.logsumexp);
    run(random_context(), &c, &t);
}

static void matches_the_formula_on_random_calls(void **state) {
    (void)state;
    int count = scaled(1000);
    for (int i = 0; i < count; i++) {
        seed(11000000 + (uint64_t)i);
        describe("case %d", i);
        random_case();
        release_all();
    }
    report("random calls", count);
}

/* The head dimensions that models use, among them 576/512 of DeepSeek's latent attention, for decoding and for a prompt. */
static void the_head_dimensions_of_models(void **state) {
    (void)state;
    static const int64_t dims[][2] = {{64, 64}, {80, 80}, {96, 96}, {128, 128}, {192, 128}, {256, 256}, {576, 512}};
    const int types = 3, all = 2 * types * (int)(sizeof dims / sizeof *dims);
    int cases = scaled(all) < all ? scaled(all) : all;
    for (int i = 0; i < cases; i++) {
        int number = i * 11 % all; /* a fraction of the cases takes from all dimensions and types */
        bool decode = number % 2;
        element_type type = (element_type)(number / 2 % types);
        const int64_t *dim = dims[number / 2 / types];
        seed((uint64_t)number);
        attention_case c = {.batch = 1,
                            .q_heads = 4,
                            .kv_heads = 2,
                            .q_len = decode ? 1 : 35,
                            .kv_len = 150,
                            .head_dim = dim[0],
                            .value_dim = dim[1],
                            .scale = 1 / sqrt((double)dim[0]),
                            .causal = true,
                            .causal_offset = METALLOID_CAUSAL_OFFSET_DEFAULT};
        attention_tensors t = {.options = METALLOID_ATTENTION_OPTIONS_INIT};
        t.options.causal = true;
        t.q = new_heads(type, CONTIGUOUS, 1, 4, c.q_len, c.head_dim);
        t.k = new_heads(type, CONTIGUOUS, 1, 2, c.kv_len, c.head_dim);
        t.v = new_heads(type, CONTIGUOUS, 1, 2, c.kv_len, c.value_dim);
        t.out = new_output(type, CONTIGUOUS, SHAPE(1, 4, c.q_len, c.value_dim));
        describe("D %lld, D_v %lld, T_q %lld, %s", (long long)c.head_dim, (long long)c.value_dim, (long long)c.q_len,
                 dtype_name(type));
        run(random_context(), &c, &t);
        release_all();
    }
    report("choices of dimensions, dtype and queries", cases);
}

/* Rows without a visible key: hidden by each of the forms. Zeros and -inf, or the sink; never NaN, even where k and v are. */
static void queries_that_see_no_key_give_zeros(void **state) {
    (void)state;
    for (int form = 0; form < 6; form++) {
        for (int type = F32; type <= F64; type++) {
            for (int with_sinks = 0; with_sinks < 2; with_sinks++) {
                seed((uint64_t)form);
                attention_tensors t = {.options = METALLOID_ATTENTION_OPTIONS_INIT};
                int64_t kv_len = form == 5 ? 0 : 37;
                t.q = new_heads((element_type)type, ROWS, 2, 4, 5, 8);
                t.k = new_heads((element_type)type, ROWS, 2, 2, kv_len, 8);
                t.v = new_heads((element_type)type, ROWS, 2, 2, kv_len, 6);
                fill(t.k, NAN);
                fill(t.v, NAN);
                t.out = new_output((element_type)type, ROWS, SHAPE(2, 4, 5, 6));
                t.logsumexp = new_output(type == F64 ? F64 : F32, ROWS, SHAPE(2, 4, 5));
                t.options.logsumexp = dl(t.logsumexp);
                t.sinks = with_sinks ? new_normal((element_type)type, ROWS, SHAPE(4)) : NULL;
                t.options.sinks = dl(t.sinks);
                if (form == 0) t.mask = new_tensor(BOOL, CONTIGUOUS, 0, NULL);
                if (form == 1) t.mask = new_tensor((element_type)type, CONTIGUOUS, SHAPE(1, 1));
                if (form == 2) t.key_mask = new_tensor(I64, CONTIGUOUS, SHAPE(2, 37));
                if (form == 3) t.options.causal = true, t.options.causal_offset = -100;
                if (form == 4) t.options.window = 3, t.options.causal_offset = 1000;
                if (t.mask) fill(t.mask, form == 0 ? 0 : -INFINITY);
                if (t.key_mask) fill(t.key_mask, 0);
                t.options.mask = dl(t.mask);
                t.options.key_mask = dl(t.key_mask);
                describe("form %d in %s", form, dtype_name((element_type)type));
                snapshot();
                expect_ok(metalloid_scaled_dot_product_attention(random_context(), dl(t.q), dl(t.k), dl(t.v), 1,
                                                                 &t.options, dl(t.out)));
                expect_only_outputs_written();
                for (int64_t i = 0; i < t.out->elements; i++) assert_true(get(t.out, i) == 0);
                for (int64_t i = 0; i < 40; i++) {
                    double expected = with_sinks ? get(t.sinks, i / 5 % 4) : -(double)INFINITY;
                    assert_true(fabs(get(t.logsumexp, i) - expected) <= 1e-6 * fabs(expected) ||
                                get(t.logsumexp, i) == expected);
                }
                release_all();
            }
        }
    }
}

/* A large finite number is no -inf: where every key has the same, it changes nothing. */
static void large_finite_masks_are_ordinary_numbers(void **state) {
    (void)state;
    static const double numbers[] = {-1e9, -3.4028234663852886e38};
    for (int i = 0; i < 2; i++) {
        for (int round = 0; round < 4; round++) {
            seed((uint64_t)round);
            attention_tensors t = {.options = METALLOID_ATTENTION_OPTIONS_INIT};
            t.q = new_heads(F32, ROWS, 1, 2, 3, 16);
            t.k = new_heads(F32, ROWS, 1, 2, 70, 16);
            t.v = new_heads(F32, ROWS, 1, 2, 70, 16);
            fill(t.q, 0); /* so that the mask's rounding has nothing to lose */
            t.out = new_output(F32, ROWS, SHAPE(1, 2, 3, 16));
            t.mask = new_tensor(F32, ROWS, SHAPE(3, 70));
            fill(t.mask, numbers[i]);
            t.options.mask = dl(t.mask);
            expect_ok(metalloid_scaled_dot_product_attention(random_context(), dl(t.q), dl(t.k), dl(t.v), 1, &t.options,
                                                             dl(t.out)));
            double *v = values(t.v), y[96], m[96];
            for (int64_t e = 0; e < 96; e++) {
                long double sum = 0;
                for (int64_t j = 0; j < 70; j++) sum += v[(e / 48 * 70 + j) * 16 + e % 16];
                y[e] = (double)(sum / 70);
                m[e] = largest(v, t.v->elements);
            }
            describe("mask %g", numbers[i]);
            expect_close("out", ATTENTION, t.out, y, m, 1);
            release_all();
        }
    }
}

static void no_features_mean_scores_of_zero(void **state) {
    (void)state;
    seed(1);
    attention_case c = {
        .batch = 2, .q_heads = 2, .kv_heads = 1, .q_len = 3, .kv_len = 20, .head_dim = 0, .value_dim = 4, .scale = 1};
    attention_tensors t = {.options = METALLOID_ATTENTION_OPTIONS_INIT};
    t.q = new_heads(F32, CONTIGUOUS, 2, 2, 3, 0);
    t.k = new_heads(F32, CONTIGUOUS, 2, 1, 20, 0);
    t.q->dl.data = t.k->dl.data = NULL;
    t.v = new_heads(F32, ROWS, 2, 1, 20, 4);
    t.out = new_output(F32, ROWS, SHAPE(2, 2, 3, 4));
    t.logsumexp = new_output(F32, ROWS, SHAPE(2, 2, 3));
    t.options.logsumexp = dl(t.logsumexp);
    describe("D = 0");
    run(NULL, &c, &t);
    release_all();
}

/* 2^60 keys without features: the answer is their number, and comes at once. */
static void keys_without_features_are_counted(void **state) {
    (void)state;
    int64_t q_shape[] = {1, 1, 2, 0}, kv_shape[] = {1, 1, (int64_t)1 << 60, 0}, sums_shape[] = {1, 1, 2};
    DLTensor q = {.device = {kDLCPU, 0}, .ndim = 4, .dtype = {kDLFloat, 32, 1}, .shape = q_shape}, kv = q, sums = q;
    float logsumexp[2];
    kv.shape = kv_shape;
    sums.ndim = 3;
    sums.shape = sums_shape;
    sums.data = logsumexp;
    for (int causal = 0; causal < 2; causal++) {
        metalloid_attention_options options = METALLOID_ATTENTION_OPTIONS_INIT;
        options.logsumexp = &sums;
        options.causal = causal;
        options.causal_offset = causal ? 1000 : METALLOID_CAUSAL_OFFSET_DEFAULT;
        expect_ok(metalloid_scaled_dot_product_attention(NULL, &q, &kv, &kv, 1, &options, &q));
        for (int query = 0; query < 2; query++) {
            double keys = causal ? 1001 + query : 0x1p60;
            assert_true(fabs((double)logsumexp[query] - log(keys)) < 1e-5 * log(keys));
        }
    }
}

/* More rows than a block has, more keys, and queries whose tiles see spans of a block, a part of it, or nothing. */
static void blocks_of_every_kind(void **state) {
    (void)state;
    static const struct {
        int64_t q_heads, kv_heads, q_len, kv_len, window;
        bool causal;
    } calls[] = {{8, 1, 300, 300, 0, true},   {3, 1, 700, 700, 0, true},  {2, 2, 400, 650, 70, true},
                 {2, 1, 390, 390, 200, true}, {6, 2, 130, 129, 0, false}, {4, 1, 250, 1100, 0, true}};
    static const element_type types[] = {F32, F16, BF16, F64};
    for (int n = 0; n < scaled(24); n++) {
        int which = n * 7 % 24, i = which / 4, j = which % 4; /* fewer calls are of several kinds too */
        seed(12000000 + (uint64_t)which);
        attention_case c = {.batch = 1,
                            .q_heads = calls[i].q_heads,
                            .kv_heads = calls[i].kv_heads,
                            .q_len = calls[i].q_len,
                            .kv_len = calls[i].kv_len,
                            .head_dim = 34,
                            .value_dim = 33,
                            .scale = 1 / sqrt(34.),
                            .causal = calls[i].causal,
                            .window = calls[i].window,
                            .causal_offset = METALLOID_CAUSAL_OFFSET_DEFAULT};
        attention_tensors t = {.options = METALLOID_ATTENTION_OPTIONS_INIT};
        t.q = new_heads(types[j], INPUT, 1, c.q_heads, c.q_len, c.head_dim);
        t.k = new_heads(types[j], INPUT, 1, c.kv_heads, c.kv_len, c.head_dim);
        t.v = new_heads(types[j], INPUT, 1, c.kv_heads, c.kv_len, c.value_dim);
        t.out = new_output(types[j], OUTPUT, SHAPE(1, c.q_heads, c.q_len, c.value_dim));
        t.options.causal = c.causal;
        t.options.window = c.window;
        describe("call %d, type %d", i, j);
        run(random_context(), &c, &t);
        release_all();
    }
}

static void empty_outputs_are_nothing_to_do(void **state) {
    (void)state;
    for (int which = 1; which < 16; which++) {
        seed((uint64_t)which);
        int64_t batch = which & 1 ? 0 : 2, heads = which & 2 ? 0 : 2, q_len = which & 4 ? 0 : 3,
                value_dim = which & 8 ? 0 : 5;
        attention_tensors t = {.options = METALLOID_ATTENTION_OPTIONS_INIT};
        t.q = new_heads(F32, CONTIGUOUS, batch, heads, q_len, 4);
        t.k = new_heads(F32, CONTIGUOUS, batch, heads, 6, 4);
        t.v = new_heads(F32, CONTIGUOUS, batch, heads, 6, value_dim);
        t.out = new_output(F32, CONTIGUOUS, SHAPE(batch, heads, q_len, value_dim));
        t.out->dl.data = NULL;
        if (t.q->elements == 0) t.q->dl.data = NULL;
        if (t.v->elements == 0) t.v->dl.data = NULL;
        describe("empty: %d", which);
        snapshot();
        expect_ok(metalloid_scaled_dot_product_attention(NULL, dl(t.q), dl(t.k), dl(t.v), 1, NULL, dl(t.out)));
        expect_nothing_written();
        release_all();
    }
    /* No features in v, but a logsumexp to write. */
    seed(2);
    attention_case c = {
        .batch = 1, .q_heads = 1, .kv_heads = 1, .q_len = 3, .kv_len = 20, .head_dim = 4, .value_dim = 0, .scale = 1};
    attention_tensors t = {.options = METALLOID_ATTENTION_OPTIONS_INIT};
    t.q = new_heads(F32, CONTIGUOUS, 1, 1, 3, 4);
    t.k = new_heads(F32, CONTIGUOUS, 1, 1, 20, 4);
    t.v = new_heads(F32, CONTIGUOUS, 1, 1, 20, 0);
    t.out = new_output(F32, CONTIGUOUS, SHAPE(1, 1, 3, 0));
    t.logsumexp = new_output(F32, CONTIGUOUS, SHAPE(1, 1, 3));
    t.options.logsumexp = dl(t.logsumexp);
    describe("D_v = 0 with logsumexp");
    run(NULL, &c, &t);
    release_all();
}

/* Offsets and windows at the ends of int64 do what a large one does. */
static void extreme_offsets_and_windows_do_not_overflow(void **state) {
    (void)state;
    static const int64_t offsets[] = {INT64_MAX, INT64_MAX - 1, INT64_MIN + 1, INT64_MIN + 2, 0, 5, -1};
    static const int64_t windows[] = {0, 1, 4, INT64_MAX, INT64_MAX - 1};
    for (size_t i = 0; i < sizeof offsets / sizeof *offsets; i++) {
        for (size_t j = 0; j < sizeof windows / sizeof *windows; j++) {
            for (int causal = 0; causal < 2; causal++) {
                seed(i);
                attention_case c = {.batch = 1,
                                    .q_heads = 2,
                                    .kv_heads = 2,
                                    .q_len = 4,
                                    .kv_len = 9,
                                    .head_dim = 8,
                                    .value_dim = 8,
                                    .scale = 0.3,
                                    .causal = causal,
                                    .causal_offset = offsets[i],
                                    .window = windows[j]};
                attention_tensors t = {.options = METALLOID_ATTENTION_OPTIONS_INIT};
                t.options.causal = causal;
                t.options.causal_offset = offsets[i];
                t.options.window = windows[j];
                t.q = new_heads(F32, ROWS, 1, 2, 4, 8);
                t.k = new_heads(F32, ROWS, 1, 2, 9, 8);
                t.v = new_heads(F32, ROWS, 1, 2, 9, 8);
                t.out = new_output(F32, ROWS, SHAPE(1, 2, 4, 8));
                describe("causal_offset %lld, window %lld", (long long)offsets[i], (long long)windows[j]);
                run(random_context(), &c, &t);
                release_all();
            }
        }
    }
}

/* With logsumexp, two halves of the keys give what all keys give (the sinks go to one part). */
static void partial_results_merge_by_their_logsumexp(void **state) {
    (void)state;
    seed(3);
    attention_tensors t = {.options = METALLOID_ATTENTION_OPTIONS_INIT};
    t.q = new_heads(F32, CONTIGUOUS, 1, 4, 7, 32);
    t.k = new_heads(F32, CONTIGUOUS, 1, 2, 100, 32);
    t.v = new_heads(F32, CONTIGUOUS, 1, 2, 100, 16);
    t.sinks = new_normal(F32, CONTIGUOUS, SHAPE(4));
    tensor *out[3], *lse[3];
    for (int part = 0; part < 3; part++) { /* all, the first 30 keys, the other 70 */
        out[part] = new_output(F32, CONTIGUOUS, SHAPE(1, 4, 7, 16));
        lse[part] = new_output(F32, CONTIGUOUS, SHAPE(1, 4, 7));
        int64_t first = part == 2 ? 30 : 0, count = part == 0 ? 100 : part == 1 ? 30 : 70;
        int64_t k_shape[] = {1, 2, count, 32}, v_shape[] = {1, 2, count, 16};
        DLTensor k = t.k->dl, v = t.v->dl;
        k.data = t.k->first + first * t.k->stride[2] * 4;
        v.data = t.v->first + first * t.v->stride[2] * 4;
        k.byte_offset = v.byte_offset = 0;
        k.shape = k_shape;
        v.shape = v_shape;
        k.strides = t.k->stride;
        v.strides = t.v->stride;
        t.options.sinks = part == 2 ? NULL : dl(t.sinks);
        t.options.logsumexp = dl(lse[part]);
        expect_ok(metalloid_scaled_dot_product_attention(NULL, dl(t.q), &k, &v, 0.2, &t.options, dl(out[part])));
    }
    for (int64_t i = 0; i < out[0]->elements; i++) {
        double a = get(lse[1], i / 16), b = get(lse[2], i / 16), most = fmax(a, b),
               both = most + log(exp(a - most) + exp(b - most));
        assert_true(fabs(both - get(lse[0], i / 16)) < 1e-5);
        assert_true(fabs(get(out[1], i) * exp(a - both) + get(out[2], i) * exp(b - both) - get(out[0], i)) < 1e-5);
    }
    release_all();
}

/* A NaN that a query sees makes its row NaN, and no other. */
static void a_visible_nan_stays_in_its_rows(void **state) {
    (void)state;
    for (int type = F32; type <= F64; type++) {
        seed(4);
        attention_case c = {.batch = 1,
                            .q_heads = 2,
                            .kv_heads = 2,
                            .q_len = 40,
                            .kv_len = 40,
                            .head_dim = 16,
                            .value_dim = 16,
                            .scale = 0.25,
                            .causal = true,
                            .causal_offset = 0};
        attention_tensors t = {.options = METALLOID_ATTENTION_OPTIONS_INIT};
        t.options.causal = true;
        t.options.causal_offset = 0;
        t.q = new_heads((element_type)type, ROWS, 1, 2, 40, 16);
        t.k = new_heads((element_type)type, ROWS, 1, 2, 40, 16);
        t.v = new_heads((element_type)type, ROWS, 1, 2, 40, 16);
        set(t.k, 25 * 16 + 3, NAN);        /* head 0: rows from 25 on see it */
        set(t.v, (40 + 30) * 16 + 7, NAN); /* head 1: feature 7 of rows from 30 on */
        t.out = new_output((element_type)type, ROWS, SHAPE(1, 2, 40, 16));
        describe("visible NaN in %s", dtype_name((element_type)type));
        run(random_context(), &c, &t);
        for (int64_t i = 0; i < 40; i++) {
            assert_true(isnan(get(t.out, i * 16)) == (i >= 25));
            assert_true(isnan(get(t.out, (40 + i) * 16 + 7)) == (i >= 30));
        }
        release_all();
    }
}

/* Scores far apart, and far beyond the range of exp. */
static void large_scores_do_not_overflow(void **state) {
    (void)state;
    for (int round = 0; round < 6; round++) {
        seed((uint64_t)round);
        attention_case c = {.batch = 1,
                            .q_heads = 1,
                            .kv_heads = 1,
                            .q_len = 9,
                            .kv_len = 80,
                            .head_dim = 4,
                            .value_dim = 8,
                            .scale = 1};
        attention_tensors t = {.options = METALLOID_ATTENTION_OPTIONS_INIT};
        t.q = new_heads(F32, ROWS, 1, 1, 9, 4);
        t.k = new_heads(F32, ROWS, 1, 1, 80, 4);
        t.v = new_heads(F32, ROWS, 1, 1, 80, 8);
        fill_integers(t.q, -64, 64); /* integers, so that scores of thousands are exact */
        fill_integers(t.k, -64, 64);
        t.out = new_output(F32, ROWS, SHAPE(1, 1, 9, 8));
        t.logsumexp = new_output(F32, ROWS, SHAPE(1, 1, 9));
        t.options.logsumexp = dl(t.logsumexp);
        describe("scores of thousands");
        run(random_context(), &c, &t);
        release_all();
    }
}

static int refuse_options(void) {
    int refused = 0;
#define REFUSE_OPTION(name, what, ...)    \
    do {                                  \
        operation bad = op;               \
        __VA_ARGS__;                      \
        expect_refused(&bad, name, what); \
        refused++;                        \
    } while (0)
    seed(1);
    operation op = sample_attention(SMALL);
    const double bad_scale[] = {INFINITY, -INFINITY, NAN}, bad_softcap[] = {-1, -1e-9, INFINITY, -INFINITY, NAN};
    for (int i = 0; i < 3; i++) REFUSE_OPTION("scale", "a bad scale", bad.scale = bad_scale[i]);
    for (int i = 0; i < 5; i++) REFUSE_OPTION("softcap", "a bad softcap", bad.attention.softcap = bad_softcap[i]);
    REFUSE_OPTION("window", "a negative window", bad.attention.window = -1);
    REFUSE_OPTION("window", "the most negative window", bad.attention.window = INT64_MIN);
    const size_t bad_size[] = {0, 4, 7, 12, 44, (size_t)1 << 40, SIZE_MAX};
    for (int i = 0; i < 7; i++) REFUSE_OPTION("options", "a bad size", bad.attention.size = bad_size[i]);

    /* q, k, v promote to float32 here. */
    REFUSE_OPTION("mask", "a float64 mask", bad.given[3] = dl(new_normal(F64, ROWS, SHAPE(2, 4, 3, 5))));
    REFUSE_OPTION("sinks", "float64 sinks", bad.given[5] = dl(new_normal(F64, ROWS, SHAPE(4))));
    REFUSE_OPTION("logsumexp", "a float16 logsumexp", bad.given[6] = dl(new_output(F16, ROWS, SHAPE(2, 4, 3))));
    REFUSE_OPTION("logsumexp", "a float64 logsumexp", bad.given[6] = dl(new_output(F64, ROWS, SHAPE(2, 4, 3))));
    REFUSE_OPTION("mask", "a mask of rank 5", bad.given[3] = dl(new_normal(F32, ROWS, SHAPE(1, 2, 4, 3, 5))));
    REFUSE_OPTION("mask", "a mask that does not broadcast", bad.given[3] = dl(new_normal(F32, ROWS, SHAPE(2, 5))));
    REFUSE_OPTION("mask", "a mask for key heads", bad.given[3] = dl(new_normal(F32, ROWS, SHAPE(2, 2, 3, 5))));
    REFUSE_OPTION("q", "3 heads of q over 2", {
        bad.given[0] = dl(new_normal(F32, ROWS, SHAPE(2, 3, 3, 6)));
        bad.given[3] = bad.given[4] = bad.given[5] = bad.given[6] = NULL;
        bad.given[7] = dl(new_output(F32, ROWS, SHAPE(2, 3, 3, 7)));
    });

    /* All of q, k, v float16: a bfloat16 mask would promote to float32. */
    for (int argument = 0; argument < 3; argument++) {
        op.given[argument] = dl(new_normal(F16, ROWS, 4, op.argument[argument].tensor->shape));
    }
    REFUSE_OPTION("mask", "a bfloat16 mask over float16", bad.given[3] = dl(new_normal(BF16, ROWS, SHAPE(3, 5))));
    REFUSE_OPTION("mask", "a float32 mask over float16", bad.given[3] = dl(new_normal(F32, ROWS, SHAPE(3, 5))));
    REFUSE_OPTION("sinks", "bfloat16 sinks over float16", bad.given[5] = dl(new_normal(BF16, ROWS, SHAPE(4))));
#undef REFUSE_OPTION
    release_all();
    return refused;
}

static void refuses_bad_arguments_and_writes_nothing(void **state) {
    (void)state;
    static const element_type masks[] = {F16, BOOL, I32, F32};
    int refused = refuse_options();
    for (int round = 0; round < scaled(4); round++) {
        seed((uint64_t)round);
        operation op = sample_attention_with(SMALL, masks[round % 4]);
        refused += expect_bad_tensors_refused(&op);
        release_all();
    }
    report("bad calls refused", refused);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_the_formula_on_random_calls),
        cmocka_unit_test(the_head_dimensions_of_models),
        cmocka_unit_test(queries_that_see_no_key_give_zeros),
        cmocka_unit_test(large_finite_masks_are_ordinary_numbers),
        cmocka_unit_test(no_features_mean_scores_of_zero),
        cmocka_unit_test(keys_without_features_are_counted),
        cmocka_unit_test(blocks_of_every_kind),
        cmocka_unit_test(empty_outputs_are_nothing_to_do),
        cmocka_unit_test(extreme_offsets_and_windows_do_not_overflow),
        cmocka_unit_test(partial_results_merge_by_their_logsumexp),
        cmocka_unit_test(a_visible_nan_stays_in_its_rows),
        cmocka_unit_test(large_scores_do_not_overflow),
        cmocka_unit_test(refuses_bad_arguments_and_writes_nothing),
    };
    return cmocka_run_group_tests_name("scaled_dot_product_attention", tests, NULL, NULL);
}
