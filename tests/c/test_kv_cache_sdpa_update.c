/* kv_cache_sdpa_update. SPDX-License-Identifier: MIT */
#include "attention_cases.h"

/* {B, T, N, D} to {B, N, T, D}. */
static double *heads_first(const double *x, int64_t batch, int64_t time, int64_t heads, int64_t dim) {
    double *turned = new_doubles(batch * time * heads * dim);
    for (int64_t i = 0; i < batch * time * heads * dim; i++) {
        int64_t d = i % dim, h = i / dim % heads, t = i / dim / heads % time, b = i / dim / heads / time;
        turned[((b * heads + h) * time + t) * dim + d] = x[i];
    }
    return turned;
}

/* Puts `fresh` {B, T_q, N, D} at `offset` of `cache` {B, T_max, N, D}. */
static void put(double *cache, const tensor *fresh, int64_t longest, int64_t offset) {
    int64_t row = fresh->shape[2] * fresh->shape[3];
    for (int64_t i = 0; i < fresh->elements; i++) {
        int64_t b = i / row / fresh->shape[1], t = i / row % fresh->shape[1];
        cache[(b * longest + offset + t) * row + i % row] = get(fresh, i);
    }
}

static void expect_exactly(const char *what, const tensor *cache, const double *expected) {
    for (int64_t i = 0; i < cache->elements; i++) {
        double got = get(cache, i);
        if (got == expected[i] || (isnan(got) && isnan(expected[i]))) continue;
        fail_msg("%s: element %lld is %g instead of %g", what, (long long)i, got, expected[i]);
    }
}

static void random_case(void) {
    attention_case c = {0};
    c.batch = random_int(1, 3);
    c.kv_heads = random_int(1, 3);
    c.q_heads = c.kv_heads * random_int(1, 3);
    c.q_len = one_in(2) ? 1 : random_int(1, 20);
    c.kv_len = c.q_len + random_int(0, 90);
    c.head_dim = random_head_dim();
    c.value_dim = one_in(2) ? c.head_dim : random_int(1, 50);
    c.scale = 1 / sqrt((double)c.head_dim);
    int64_t offset = random_int(0, c.kv_len - c.q_len);
    c.causal = c.q_len > 1;
    c.causal_offset = offset;
    element_type k_type = random_floating(), v_type = one_in(2) ? k_type : random_floating();
    tensor *q = new_normal(random_floating(), INPUT, SHAPE(c.batch, c.q_len, c.q_heads, c.head_dim));
    tensor *new_k = new_normal(k_type, INPUT, SHAPE(c.batch, c.q_len, c.kv_heads, c.head_dim));
    tensor *new_v = new_normal(v_type, INPUT, SHAPE(c.batch, c.q_len, c.kv_heads, c.value_dim));
    tensor *k_cache = new_normal(k_type, OUTPUT, SHAPE(c.batch, c.kv_len, c.kv_heads, c.head_dim));
    tensor *v_cache = new_normal(v_type, OUTPUT, SHAPE(c.batch, c.kv_len, c.kv_heads, c.value_dim));
    tensor *key_mask =
        one_in(3) ? NULL : new_tensor(one_in(2) ? BOOL : random_integer(), INPUT, SHAPE(c.batch, c.kv_len));
    tensor *out = new_output(random_floating(), OUTPUT, SHAPE(c.batch, c.q_heads, c.q_len, c.value_dim));
    if (key_mask) {
        fill_integers(key_mask, 0, 1);
        c.key_mask = values(key_mask);
    }
    /* What a model leaves in a cache beyond the last position must not matter where it is hidden. */
    for (int64_t t = 0; t < c.kv_len && key_mask; t++) {
        for (int64_t b = 0; b < c.batch; b++) {
            if (c.key_mask[b * c.kv_len + t] != 0 || (t >= offset && t < offset + c.q_len)) continue;
            int64_t row = b * c.kv_len + t;
            for (int64_t i = 0; i < c.kv_heads * c.head_dim; i++) set(k_cache, row * c.kv_heads * c.head_dim + i, NAN);
            for (int64_t i = 0; i < c.kv_heads * c.value_dim; i++)
                set(v_cache, row * c.kv_heads * c.value_dim + i, INFINITY);
        }
    }
    double *k_after = values(k_cache), *v_after = values(v_cache);
    put(k_after, new_k, c.kv_len, offset);
    put(v_after, new_v, c.kv_len, offset);
    c.q = heads_first(values(q), c.batch, c.q_len, c.q_heads, c.head_dim);
    c.k = heads_first(k_after, c.batch, c.kv_len, c.kv_heads, c.head_dim);
    c.v = heads_first(v_after, c.batch, c.kv_len, c.kv_heads, c.value_dim);
    reference_attention(&c);

    k_cache->output = v_cache->output = true;
    metalloid_context *context = random_context();
    snapshot();
    expect_ok(metalloid_kv_cache_sdpa_update(context, dl(q), dl(new_k), dl(new_v), dl(k_cache), dl(v_cache), offset,
                                             dl(key_mask), c.scale, dl(out)));
    expect_only_outputs_written();
    expect_exactly("k_cache", k_cache, k_after);
    expect_exactly("v_cache", v_cache, v_after);
    expect_close("out", ATTENTION, out, c.out, c.v_size, c.value_dim);
}

static void matches_put_then_attention_on_random_calls(void **state) {
    (void)state;
    int count = scaled(1000);
    for (int i = 0; i < count; i++) {
        seed(12000000 + (uint64_t)i);
        describe("case %d", i);
        random_case();
        release_all();
    }
    report("random calls", count);
}

/* Bits, not values: NaN payloads and signed zeros go into the cache as they are. */
static void the_caches_get_the_bits_of_the_new_keys_and_values(void **state) {
    (void)state;
    for (int type = F32; type <= F64; type++) {
        seed((uint64_t)type);
        element_type t = (element_type)type;
        tensor *q = new_normal(t, ROWS, SHAPE(1, 2, 2, 4)), *out = new_output(t, ROWS, SHAPE(1, 2, 2, 4));
        tensor *new_k = new_tensor(t, STRIDED, SHAPE(1, 2, 2, 4)), *new_v = new_tensor(t, ROWS, SHAPE(1, 2, 2, 4));
        tensor *k_cache = new_normal(t, ROWS, SHAPE(1, 6, 2, 4)), *v_cache = new_normal(t, STRIDED, SHAPE(1, 6, 2, 4));
        size_t size = (size_t)dtype_size(t);
        for (int64_t i = 0; i < 16; i++) {
            uint64_t bits = random_bits();
            memcpy(element(new_k, i), &bits, size);
            bits = i % 2 ? UINT64_MAX >> 1 : (uint64_t)1 << (8 * size - 1); /* a NaN with every payload bit, -0 */
            memcpy(element(new_v, i), &bits, size);
        }
        expect_ok(metalloid_kv_cache_sdpa_update(NULL, dl(q), dl(new_k), dl(new_v), dl(k_cache), dl(v_cache), 3, NULL,
                                                 1, dl(out)));
        for (int64_t i = 0; i < 16; i++) {
            assert_memory_equal(element(k_cache, 3 * 8 + i), element(new_k, i), size);
            assert_memory_equal(element(v_cache, 3 * 8 + i), element(new_v, i), size);
        }
        release_all();
    }
}

static void refuses_bad_arguments_and_writes_nothing(void **state) {
    (void)state;
    int refused = 0;
    for (int round = 0; round < scaled(4); round++) {
        seed((uint64_t)round);
        operation op = sample_kv_cache(SMALL);
        refused += expect_bad_tensors_refused(&op);
        release_all();
    }
    seed(7);
    operation op = sample_kv_cache(SMALL);
    static const int64_t bad_offsets[] = {-1, 5, 7, INT64_MIN, INT64_MAX}; /* T_max 7, T_q 3 */
    static const double bad_scales[] = {INFINITY, -INFINITY, NAN};
    for (int i = 0; i < 5; i++, refused++) {
        operation bad = op;
        bad.offset = bad_offsets[i];
        expect_refused(&bad, "offset", "an offset out of range");
    }
    for (int i = 0; i < 3; i++, refused++) {
        operation bad = op;
        bad.scale = bad_scales[i];
        expect_refused(&bad, "scale", "a bad scale");
    }
    operation bad = op;
    bad.given[1] = dl(new_normal(F32, ROWS, SHAPE(2, 3, 2, 6)));
    expect_refused(&bad, "new_k", "another dtype than k_cache");
    bad = op;
    bad.given[2] = dl(new_normal(F16, ROWS, SHAPE(2, 3, 2, 5)));
    expect_refused(&bad, "new_v", "another dtype than v_cache");
    bad = op;
    bad.given[0] = dl(new_normal(F32, ROWS, SHAPE(2, 3, 3, 6)));
    bad.given[6] = dl(new_output(F32, ROWS, SHAPE(2, 3, 3, 5)));
    expect_refused(&bad, "q", "3 heads of q over 2");
    bad = op; /* more new keys than the cache holds */
    bad.offset = 0;
    bad.given[0] = dl(new_normal(F32, ROWS, SHAPE(2, 8, 4, 6)));
    bad.given[1] = dl(new_normal(F16, ROWS, SHAPE(2, 8, 2, 6)));
    bad.given[2] = dl(new_normal(BF16, ROWS, SHAPE(2, 8, 2, 5)));
    bad.given[6] = dl(new_output(F32, ROWS, SHAPE(2, 4, 8, 5)));
    expect_refused(&bad, "new_k", "more new keys than the cache holds");
    release_all();
    report("bad calls refused", refused + 4);
}

static void empty_calls_write_no_more_than_they_must(void **state) {
    (void)state;
    /* T_q = 0: nothing new, nothing out. */
    seed(8);
    tensor *q = new_normal(F32, CONTIGUOUS, SHAPE(2, 0, 4, 6)), *new_k = new_normal(F32, CONTIGUOUS, SHAPE(2, 0, 2, 6));
    tensor *new_v = new_normal(F32, CONTIGUOUS, SHAPE(2, 0, 2, 6)),
           *out = new_output(F32, CONTIGUOUS, SHAPE(2, 4, 0, 6));
    tensor *k_cache = new_normal(F32, CONTIGUOUS, SHAPE(2, 5, 2, 6)),
           *v_cache = new_normal(F32, CONTIGUOUS, SHAPE(2, 5, 2, 6));
    q->dl.data = new_k->dl.data = new_v->dl.data = out->dl.data = NULL;
    describe("T_q = 0");
    snapshot();
    expect_ok(metalloid_kv_cache_sdpa_update(NULL, dl(q), dl(new_k), dl(new_v), dl(k_cache), dl(v_cache), 5, NULL, 1,
                                             dl(out)));
    expect_nothing_written();
    release_all();

    /* No query heads: the caches are still written. */
    q = new_normal(F32, CONTIGUOUS, SHAPE(1, 2, 0, 6));
    new_k = new_normal(F32, CONTIGUOUS, SHAPE(1, 2, 2, 6));
    new_v = new_normal(F32, CONTIGUOUS, SHAPE(1, 2, 2, 6));
    out = new_output(F32, CONTIGUOUS, SHAPE(1, 0, 2, 6));
    k_cache = new_output(F32, CONTIGUOUS, SHAPE(1, 5, 2, 6));
    v_cache = new_output(F32, CONTIGUOUS, SHAPE(1, 5, 2, 6));
    fill(k_cache, 1);
    fill(v_cache, 1);
    q->dl.data = out->dl.data = NULL;
    double *k_after = values(k_cache), *v_after = values(v_cache);
    put(k_after, new_k, 5, 1);
    put(v_after, new_v, 5, 1);
    describe("no query heads");
    expect_ok(metalloid_kv_cache_sdpa_update(NULL, dl(q), dl(new_k), dl(new_v), dl(k_cache), dl(v_cache), 1, NULL, 1,
                                             dl(out)));
    expect_exactly("k_cache", k_cache, k_after);
    expect_exactly("v_cache", v_cache, v_after);
    release_all();
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matches_put_then_attention_on_random_calls),
        cmocka_unit_test(the_caches_get_the_bits_of_the_new_keys_and_values),
        cmocka_unit_test(refuses_bad_arguments_and_writes_nothing),
        cmocka_unit_test(empty_calls_write_no_more_than_they_must),
    };
    return cmocka_run_group_tests_name("kv_cache_sdpa_update", tests, NULL, NULL);
}
