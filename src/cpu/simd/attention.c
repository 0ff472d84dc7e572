/* O = softmax(scale Q K^T + mask) V, a block of rows against a block of keys at a time. SPDX-License-Identifier: MIT
 *
 * Rows are the queries of all heads that share a key/value head (cpu/attention.h), so that a key is loaded once for
 * them. Both products run in one register-tiled micro-kernel (products.h), TILE_ROWS x 2 vectors of sums, that
 * multiplies rows in scratch by a panel: TILE columns of K transposed, or of V, one after the other, so that a panel
 * stays in the first-level cache whatever the strides of K and V. Causal and window give each TILE_ROWS rows a span of
 * a block's keys; nothing is computed outside it. A handful of rows (decoding) does not pay for panels: their scores
 * are dot products with K as it lies, V is added up as it lies, and the cost is one read of the cache.
 *
 * Where the processor multiplies pairs of bfloat16, bfloat16 tensors stay as they are: a row of Q and a transposed K
 * hold pairs of features, weights and V pairs of keys, and the same micro-kernel runs over half as many words.
 *
 * Numerics: online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867), scores and sums in reals. A block's sums
 * are formed by themselves and then added to the rescaled ones, so that rounding grows with the number of blocks,
 * not of keys. As pairs, weights are rounded to bfloat16 (FlashAttention does the same); their sum is not. A hidden
 * key's score is -infinity, its weight exactly 0. Where 0 meets an infinite or NaN value, or a product of pairs
 * overflows, a row comes out not finite, and the item is done again in reals, leaving hidden keys out one by one,
 * and if need be (sums beyond float32) by the plain kernel, in double: the common case pays one look at its result. */
#include "cpu/attention.h"
#include "cpu/simd/math.h"
#include "cpu/simd/products.h"

enum {
    KEYS = MTL_ATTENTION_KEYS,
    ROWS = MTL_ATTENTION_ROWS,
    KEYS_AT_ONCE = 4,                                      /* whose values are added up together */
    GRANULE = LANES > KEYS_AT_ONCE ? LANES : KEYS_AT_ONCE, /* spans end at multiples of it */
    BYTES_AHEAD =
        8 << 10, /* of K and V are asked for, each while it is read itself: then its next block has begun to come */
};

/* The keys of a block that some row of a tile sees by causal and window: from `begin` (whole tiles) to `end`,
 * `padded` to granules. */
typedef struct {
    int64_t begin, end, padded;
    bool whole; /* every row sees all of begin to padded, and there is no mask */
} key_span;

/* One item's working set, in reals or, where `paired`, words of two bfloat16. Rows of `q` are `words` long, of
 * `sums` value_padded, of `scores` KEYS; `packed` holds panels of TILE columns, first of keys with a row a word,
 * then of values with one a key or pair. */
typedef struct {
    const mtl_attention_args *args;
    mtl_attention_item item;
    bool few, paired, one_by_one; /* one_by_one: leave weights of 0 out of the sums */
    int64_t depth, words,
        value_padded; /* words of a head, the same to whole vectors, features of a value to whole tiles */
    real *q, *packed, *scores, *sums;
    real largest[ROWS], sum[ROWS], factor[ROWS];
    key_span spans[(ROWS + TILE_ROWS - 1) / TILE_ROWS];
} block_state;

/* ---- products ---------------------------------------------------------------------------------------------------- */

/* multiply_tile for one row of weights, where a weight (or factor) of 0 drops what it would multiply. */
static void multiply_visible(const real *weights, const real *b, int64_t b_stride, int64_t depth, real *c,
                             real factor) {
    vec sum[2] = {vec_zero(), vec_zero()};
    for (int64_t i = 0; i < depth; i++) {
        if (weights[i] == 0) continue;
        sum[0] = vec_fma(vec_set(weights[i]), vec_load(b + i * b_stride), sum[0]);
        sum[1] = vec_fma(vec_set(weights[i]), vec_load(b + i * b_stride + LANES), sum[1]);
    }
    for (int j = 0; j < 2; j++) {
        vec_store(c + j * LANES, factor == 0 ? sum[j] : vec_fma(vec_load(c + j * LANES), vec_set(factor), sum[j]));
    }
}

/* ---- products of few rows with K and V as they lie --------------------------------------------------------------- */

/* Keys are read one after the other, as the processor's own prefetchers like it. */

/* Keys or values of a block where they lie. */
typedef struct {
    const char *first;
    int64_t stride, count, ahead; /* in bytes, rows, bytes */
} rows_in_place;

/* Scores of `rows` rows. Past `count` the last key stands in for those that are not there; their scores are hidden. */
INLINE void score_rows(const block_state *s, bool paired, int rows, int64_t row, mtl_dtype dtype,
                       const rows_in_place *keys) {
    real scale = paired ? (real)s->args->scale : 1;
    int64_t size = mtl_dtype_size(dtype), depth = s->depth;
    for (int64_t first = 0; first < keys->count; first += LANES) {
        vec products[4][LANES];
        for (int64_t j = 0; j < LANES; j++) {
            int64_t key = first + j < keys->count ? first + j : keys->count - 1;
            const char *k = keys->first + key * keys->stride;
            vec sum[4];
            for (int r = 0; r < rows; r++) sum[r] = vec_zero();
            for (int64_t i = 0; i < depth; i += LANES) {
                prefetch_near(k + keys->ahead + i * size);
                vec x = vec_load_upto(k + i * size, dtype, depth - i);
                for (int r = 0; r < rows; r++) /* q is padded with 0 */
                    sum[r] = multiply_add(paired, vec_load(s->q + (row + r) * s->words + i), x, sum[r]);
            }
            for (int r = 0; r < rows; r++) products[r][j] = sum[r];
        }
        for (int r = 0; r < rows; r++) vec_store(s->scores + (row + r) * KEYS + first, vec_sums(products[r]) * scale);
    }
}

/* sums[r] = factor[r] sums[r] + sum over the keys of weights[r][key] v[key]; those of the block are added up first. */
INLINE void add_values(const block_state *s, bool paired, int rows, int64_t row, mtl_dtype dtype,
                       const rows_in_place *values) {
    int64_t size = mtl_dtype_size(dtype), length = s->args->value_dim;
    const real *weights = s->scores + row * KEYS;
    real *part = s->packed + row * s->value_padded;
    const int step = paired ? 2 : 1;
    for (int64_t key = 0; key < values->count; key += KEYS_AT_ONCE) {
        const char *v[KEYS_AT_ONCE];
        for (int j = 0; j < KEYS_AT_ONCE; j++)
            v[j] = values->first + (key + j < values->count ? key + j : values->count - 1) * values->stride;
        vec weight[4][KEYS_AT_ONCE];
        for (int r = 0; r < rows; r++) {
            const real *from = weights + r * KEYS + (paired ? key / 2 : key);
            for (int j = 0; j < KEYS_AT_ONCE; j += step) weight[r][j] = broadcast(paired, from + j / step);
        }
        for (int64_t i = 0; i < length; i += LANES) {
            vec x[KEYS_AT_ONCE];
            for (int j = 0; j < KEYS_AT_ONCE; j++) prefetch_near(v[j] + values->ahead + i * size);
            for (int j = 0; j < KEYS_AT_ONCE; j += step)
                x[j] =
                    paired ? vec_zip_pairs(v[j] + i * size, v[j + 1] + i * size) : vec_load_as(v[j] + i * size, dtype);
            for (int r = 0; r < rows; r++) {
                vec sum = key ? vec_load(part + r * s->value_padded + i) : vec_zero();
                for (int j = 0; j < KEYS_AT_ONCE; j += step) sum = multiply_add(paired, weight[r][j], x[j], sum);
                vec_store(part + r * s->value_padded + i, sum);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        real *sums = s->sums + (row + r) * s->value_padded, *more = part + r * s->value_padded;
        vec factor = vec_set(s->factor[row + r]);
        for (int64_t i = 0; i < length; i += LANES)
            vec_store(sums + i, vec_fma(vec_load(sums + i), factor, vec_load(more + i)));
    }
}

INLINE void take_rows(const block_state *s, bool values, bool paired, int rows, int64_t row, mtl_dtype dtype,
                      const rows_in_place *in_place) {
    if (values) add_values(s, paired, rows, row, dtype, in_place);
    else score_rows(s, paired, rows, row, dtype, in_place);
}

INLINE void take_as(const block_state *s, bool values, bool paired, mtl_dtype dtype, const rows_in_place *in_place) {
    for (int64_t row = 0; row < s->item.rows; row += 4) {
        switch (s->item.rows - row) {
        case 1: take_rows(s, values, paired, 1, row, dtype, in_place); break;
        case 2: take_rows(s, values, paired, 2, row, dtype, in_place); break;
        case 3: take_rows(s, values, paired, 3, row, dtype, in_place); break;
        default: take_rows(s, values, paired, 4, row, dtype, in_place); break;
        }
    }
}

static const char *head_at(const mtl_attention_operand *operand, int64_t batch, int64_t head, int64_t time) {
    return operand->data + batch * operand->stride[0] + head * operand->stride[1] + time * operand->stride[2];
}

static const char *key_at(const block_state *s, const mtl_attention_operand *operand, int64_t key) {
    return head_at(operand, s->item.batch, s->item.kv_head, key);
}

static bool contiguous(const mtl_attention_operand *operand) {
    return operand->stride[3] == mtl_dtype_size(operand->dtype);
}

/* One of the two products for few rows. False where K, or V, cannot be taken as it lies. */
INLINE bool take_few(const block_state *s, bool values, int64_t first, int64_t count) {
    const mtl_attention_operand *x = values ? &s->args->v : &s->args->k;
    int64_t row_bytes = (values ? s->args->value_dim : s->args->head_dim) * mtl_dtype_size(x->dtype);
    if (!s->few || !contiguous(x) || (values && s->args->value_dim % LANES)) return false;
    int64_t rows_ahead = row_bytes > 0 && row_bytes < BYTES_AHEAD ? BYTES_AHEAD / row_bytes : 1;
    rows_in_place in_place = {key_at(s, x, first), x->stride[2], count, rows_ahead * x->stride[2]};
    /* A pair of features of K is a word; of V, keys are paired. */
    if (HAS_PAIRS && s->paired) take_as(s, values, true, values ? MTL_BF16 : REAL_DTYPE, &in_place);
    else if (x->dtype == REAL_DTYPE) take_as(s, values, false, REAL_DTYPE, &in_place);
#ifndef MTL_IN_DOUBLE
    else if (x->dtype == MTL_F16) take_as(s, values, false, MTL_F16, &in_place);
    else if (x->dtype == MTL_BF16) take_as(s, values, false, MTL_BF16, &in_place);
#endif
    else return false;
    return true;
}

/* ---- bringing queries, keys and values in ------------------------------------------------------------------------ */

/* Whether pairs do: an even number of features, none of the three to be gathered, and a result that is as coarse. */
static bool can_be_paired(const mtl_attention_args *args) {
    return HAS_PAIRS && args->out.dtype == MTL_BF16 && args->q.dtype == MTL_BF16 && args->k.dtype == MTL_BF16 &&
           args->v.dtype == MTL_BF16 && args->head_dim % 2 == 0 && contiguous(&args->q) && contiguous(&args->k) &&
           contiguous(&args->v);
}

static void bring_queries(block_state *s) {
    const mtl_attention_args *args = s->args;
    for (int64_t r = 0; r < s->item.rows; r++) {
        int64_t query = mtl_attention_query(args, s->item.first_row + r);
        const char *from =
            head_at(&args->q, s->item.batch, mtl_attention_head(args, s->item.kv_head, s->item.first_row + r), query);
        real *q = s->q + r * s->words;
        memset(q + s->depth, 0, (size_t)(s->words - s->depth) * sizeof(real));
        if (s->paired) {
            memcpy(q, from, (size_t)s->depth * sizeof(real)); /* the products are scaled instead */
        } else {
            read_row(q, from, (mtl_row){NULL, args->q.stride[3], args->q.dtype}, s->depth);
            for (int64_t i = 0; i < s->words; i += LANES)
                vec_store(q + i, vec_load(q + i) * vec_set((real)args->scale));
        }
    }
    for (int64_t r = 0; r < ROWS; r++) {
        s->largest[r] = -(real)INFINITY;
        s->sum[r] = 0;
    }
    memset(s->sums, 0, (size_t)(s->item.rows * s->value_padded) * sizeof(real));
}

/* A panel's half, to[word][key], from LANES keys whose words are `size` bytes apart. */
INLINE void transpose_keys(real *to, const char *from, int64_t key_stride, mtl_dtype dtype, int64_t size,
                           int64_t words) {
    for (int64_t i = 0; i < words; i += LANES) {
        vec square[LANES];
        for (int key = 0; key < LANES; key++)
            square[key] = vec_load_upto(from + key * key_stride + i * size, dtype, words - i);
        vec_transpose(square);
        if (words - i >= LANES) {
            for (int j = 0; j < LANES; j++) vec_store(to + (i + j) * TILE, square[j]);
        } else {
            for (int j = 0; j < words - i; j++) vec_store(to + (i + j) * TILE, square[j]);
        }
    }
}

/* Keys `begin` to `end` of a block; in the last panel those that are not there are 0. */
static void bring_keys(block_state *s, int64_t first, int64_t begin, int64_t end) {
    const mtl_attention_operand *k = &s->args->k;
    int64_t key = begin, stride = k->stride[2];
    for (; contiguous(k) && key + LANES <= end; key += LANES) {
        const char *from = key_at(s, k, first + key);
        real *to = s->packed + key / TILE * TILE * s->depth + key % TILE;
        if (s->paired || k->dtype == REAL_DTYPE) transpose_keys(to, from, stride, REAL_DTYPE, sizeof(real), s->depth);
#ifndef MTL_IN_DOUBLE
        else if (k->dtype == MTL_F16) transpose_keys(to, from, stride, MTL_F16, 2, s->depth);
        else if (k->dtype == MTL_BF16) transpose_keys(to, from, stride, MTL_BF16, 2, s->depth);
#endif
        else break;
    }
    for (; key % TILE || key < end; key++) {
        real *to = s->packed + key / TILE * TILE * s->depth + key % TILE;
        const char *from = key < end ? key_at(s, k, first + key) : NULL;
        for (int64_t i = 0; i < s->depth; i++) {
            if (!from) to[i * TILE] = 0;
            else if (s->paired) memcpy(to + i * TILE, from + i * (int64_t)sizeof(real), sizeof(real));
            else to[i * TILE] = real_load(from + i * k->stride[3], k->dtype);
        }
    }
}

/* Where row `row` (a key, or a pair of keys) of the values' panel of feature `feature` stands. */
INLINE real *value_at(const block_state *s, int64_t row, int64_t feature) {
    return s->packed + feature / TILE * TILE * KEYS + row * TILE + feature % TILE;
}

INLINE void pack_values(const block_state *s, mtl_dtype dtype, const char *from, int64_t stride, int64_t begin,
                        int64_t end) {
    int64_t length = s->args->value_dim, size = mtl_dtype_size(dtype);
    for (int64_t key = begin; key < end; key++) {
        const char *v = from + key * stride;
        for (int64_t i = 0; i + TILE <= length; i += TILE) {
            vec_store(value_at(s, key, i), vec_load_as(v + i * size, dtype));
            vec_store(value_at(s, key, i) + LANES, vec_load_as(v + (i + LANES) * size, dtype));
        }
        for (int64_t i = length / TILE * TILE; i < s->value_padded; i += LANES) {
            int64_t left = length - i;
            vec_store(value_at(s, key, i), left > 0 ? vec_load_upto(v + i * size, dtype, left) : vec_zero());
        }
    }
}

/* Pairs of keys of one feature; where there is no second key it counts as 0. */
static void pack_value_pairs(const block_state *s, const char *from, int64_t stride, int64_t begin, int64_t end) {
    int64_t length = s->args->value_dim, size = 2;
    for (int64_t key = begin; key < end; key += 2) {
        const char *one = from + key * stride, *other = key + 1 < end ? one + stride : NULL;
        for (int64_t i = 0; i < s->value_padded; i += LANES) {
            if (other && i + LANES <= length) {
                vec_store(value_at(s, key / 2, i), vec_zip_pairs(one + i * size, other + i * size));
                continue;
            }
            int64_t left = length - i < 0 ? 0 : length - i < LANES ? length - i : LANES;
            char rest[2][LANES * 2] = {{0}, {0}};
            memcpy(rest[0], one + i * size, (size_t)(left * size)); // NOLINT: values are somewhere
            if (other) memcpy(rest[1], other + i * size, (size_t)(left * size));
            vec_store(value_at(s, key / 2, i), vec_zip_pairs(rest[0], rest[1]));
        }
    }
}

/* Values of keys `begin` (even) to `end` of a block. */
static void bring_values(const block_state *s, int64_t first, int64_t begin, int64_t end) {
    const mtl_attention_operand *v = &s->args->v;
    int64_t stride = v->stride[2];
    const char *from = key_at(s, v, first);
    if (HAS_PAIRS && s->paired) pack_value_pairs(s, from, stride, begin, end);
    else if (contiguous(v) && v->dtype == REAL_DTYPE) pack_values(s, REAL_DTYPE, from, stride, begin, end);
#ifndef MTL_IN_DOUBLE
    else if (contiguous(v) && v->dtype == MTL_F16) pack_values(s, MTL_F16, from, stride, begin, end);
    else if (contiguous(v) && v->dtype == MTL_BF16) pack_values(s, MTL_BF16, from, stride, begin, end);
#endif
    else {
        for (int64_t key = begin; key < end; key++) {
            for (int64_t i = 0; i < s->value_padded; i++) {
                bool there = i < s->args->value_dim;
                *value_at(s, key, i) = there ? real_load(from + key * stride + i * v->stride[3], v->dtype) : 0;
            }
        }
    }
}

/* ---- masks ------------------------------------------------------------------------------------------------------- */

/* 0 or -1 a key: key_mask, the same for all rows. */
static void read_key_mask(const block_state *s, int64_t first, int64_t count, real_int *visible) {
    const mtl_attention_args *args = s->args;
    for (int64_t key = 0; key < KEYS; key++) visible[key] = -1;
    if (!args->key_mask.data) return;
    const char *from =
        args->key_mask.data + s->item.batch * args->key_mask.stride[0] + first * args->key_mask.stride[1];
    for (int64_t key = 0; key < count; key++) {
        visible[key] = mtl_load_integer(from + key * args->key_mask.stride[1], args->key_mask.dtype) ? -1 : 0;
    }
}

static void mask_row(const block_state *s, int64_t row, int64_t first, int64_t count, const key_span *span,
                     const real_int *key_visible) {
    const mtl_attention_args *args = s->args;
    int64_t query = mtl_attention_query(args, s->item.first_row + row);
    int64_t head = mtl_attention_head(args, s->item.kv_head, s->item.first_row + row);
    /* Keys `low` to `high` of the block by causal and window. */
    int64_t low = query + args->first_visible - first, high = query + args->last_visible + 1 - first;
    if (high > count) high = count;
    real *scores = s->scores + row * KEYS;
    const mtl_attention_operand *mask = &args->mask;
    const char *from = mask->data ? mask->data + s->item.batch * mask->stride[0] + head * mask->stride[1] +
                                        query * mask->stride[2] + first * mask->stride[3]
                                  : NULL;
    real bias[KEYS];
    bool boolean = mask->dtype == MTL_BOOL;
    if (from && !boolean) read_row(bias, from, (mtl_row){NULL, mask->stride[3], mask->dtype}, count);
    if (from && boolean && mask->stride[3] != 1) {
        for (int64_t key = 0; key < count; key++) bias[key] = from[key * mask->stride[3]] ? 0 : -(real)INFINITY;
        boolean = false;
    }
    char padded[KEYS];
    if (from && boolean && count < KEYS) {
        memset(padded, 0, sizeof padded);
        from = memcpy(padded, from, (size_t)count);
    }
    for (int64_t key = span->begin; key < span->padded; key += LANES) {
        vec score = vec_load(scores + key);
        vec_int visible;
        memcpy(&visible, key_visible + key, sizeof visible);
        visible &= vec_first(high - key) & ~vec_first(low - key);
        if (from && boolean) {
            visible &= vec_nonzero_bytes(from + key);
        } else if (from) {
            vec b = vec_load(bias + key); /* past `count` whatever it is, those are hidden by `high` */
            visible &= b != vec_set(-(real)INFINITY);
            score += b;
        }
        vec_store(scores + key, vec_select(visible, score, vec_set(-(real)INFINITY)));
    }
}

static const key_span *span_of(const block_state *s, int64_t row) { return &s->spans[row / TILE_ROWS]; }

/* The spans of a block's tiles, and in `all` what they cover together. */
static void find_spans(block_state *s, int64_t first, int64_t count, key_span *all) {
    const mtl_attention_args *args = s->args;
    bool masked = args->mask.data || args->key_mask.data;
    *all = (key_span){.begin = count};
    for (int64_t row = 0; row < s->item.rows; row += TILE_ROWS) {
        int64_t last = row + TILE_ROWS < s->item.rows ? row + TILE_ROWS - 1 : s->item.rows - 1;
        int64_t from = mtl_attention_query(args, s->item.first_row + row) - first;
        int64_t to = mtl_attention_query(args, s->item.first_row + last) - first;
        int64_t begin = from + args->first_visible, end = to + args->last_visible + 1;
        if (begin < 0 || s->few) begin = 0;
        if (end > count || s->few) end = count;
        begin -= begin % TILE;
        if (end <= begin) begin = end = 0;
        int64_t padded = (end + GRANULE - 1) / GRANULE * GRANULE;
        bool whole = !masked && to + args->first_visible <= begin && from + args->last_visible + 1 >= padded;
        s->spans[row / TILE_ROWS] = (key_span){begin, end, padded, whole && padded <= count};
        if (begin == end) continue;
        if (begin < all->begin) all->begin = begin;
        if (end > all->end) all->end = end;
    }
}

static void cap_scores(block_state *s) {
    real cap = (real)s->args->softcap;
    for (int64_t r = 0; r < s->item.rows; r++) {
        real *scores = s->scores + r * KEYS;
        for (int64_t i = span_of(s, r)->begin; i < span_of(s, r)->padded; i += LANES)
            vec_store(scores + i, vec_set(cap) * vec_tanh(vec_load(scores + i) / vec_set(cap)));
    }
}

/* ---- softmax ----------------------------------------------------------------------------------------------------- */

/* The weights exp(score - shift) of a row, in pairs or not, in place of its scores; lane by lane their sum. */
INLINE vec weigh(real *scores, const key_span *span, vec shift, bool paired) {
    vec sum[2] = {vec_zero(), vec_zero()};
    for (int64_t i = span->begin; i < span->padded; i += 2 * LANES) {
        vec weight[2] = {vec_exp_of_softmax(vec_load(scores + i) - shift), vec_zero()};
        bool second = i + LANES < span->padded;
        if (second) weight[1] = vec_exp_of_softmax(vec_load(scores + i + LANES) - shift);
        sum[0] += weight[0];
        sum[1] += weight[1];
        if (paired) {
            vec_store(scores + i / 2, vec_pack_pairs(weight[0], weight[1]));
            continue;
        }
        vec_store(scores + i, weight[0]);
        if (second) vec_store(scores + i + LANES, weight[1]);
    }
    return sum[0] + sum[1];
}

/* Scores to weights, LANES rows at a time, so that what is done once a row is done in vectors; factor is what the
 * sums so far are to be multiplied by. */
static void weigh_rows(block_state *s) {
    for (int64_t row = 0; row < s->item.rows; row += LANES) {
        int count = s->item.rows - row < LANES ? (int)(s->item.rows - row) : LANES;
        vec each[LANES];
        for (int r = 0; r < LANES; r++) {
            each[r] = vec_set(-(real)INFINITY);
            if (r >= count) continue;
            const real *scores = s->scores + (row + r) * KEYS;
            const key_span *span = span_of(s, row + r);
            /* A NaN may be passed over; it comes back as a NaN in the sum whatever is subtracted. */
            for (int64_t i = span->begin; i < span->padded; i += LANES)
                each[r] = vec_max(vec_load(scores + i), each[r]);
        }
        vec before = vec_load(s->largest + row), largest = vec_max(vec_largests(each), before);
        vec_int seen = largest != vec_set(-(real)INFINITY);
        vec factor = vec_select(seen, vec_exp_of_softmax(before - largest), vec_set(1));
        real shift[LANES];
        vec_store(shift, vec_select(seen, largest, vec_zero()));
        vec_store(s->largest + row, largest);
        vec_store(s->factor + row, factor);
        for (int r = 0; r < LANES; r++) {
            each[r] = vec_zero();
            if (r >= count) continue;
            real *scores = s->scores + (row + r) * KEYS;
            if (HAS_PAIRS && s->paired) each[r] = weigh(scores, span_of(s, row + r), vec_set(shift[r]), true);
            else each[r] = weigh(scores, span_of(s, row + r), vec_set(shift[r]), false);
        }
        vec_store(s->sum + row, vec_fma(vec_load(s->sum + row), factor, vec_sums(each)));
    }
}

/* ---- an item ----------------------------------------------------------------------------------------------------- */

/* Scores of all tiles of rows with the keys of a panel, and then another: a panel stays in the first-level cache. */
INLINE void score_tiles(const block_state *s, bool paired, int64_t begin, int64_t end) {
    real scale = paired ? (real)s->args->scale : 1;
    for (int64_t key = begin; key < end; key += TILE) {
        for (int64_t row = 0; row < s->item.rows; row += TILE_ROWS) {
            const key_span *span = span_of(s, row);
            if (key < span->begin || key >= span->padded) continue;
            const real *q = s->q + row * s->words, *keys = s->packed + key * s->depth;
            real *scores = s->scores + row * KEYS + key;
            int64_t rows = s->item.rows - row;
            if (span->padded - key > LANES)
                multiply_rows(paired, rows, 2, q, s->words, keys, TILE, s->depth, scores, KEYS, NULL, scale);
            else multiply_rows(paired, rows, 1, q, s->words, keys, TILE, s->depth, scores, KEYS, NULL, scale);
        }
    }
}

INLINE void add_tiles(const block_state *s, bool paired) {
    int64_t keys = paired ? 2 : 1; /* of a row of V */
    for (int64_t feature = 0; feature < s->value_padded; feature += TILE) {
        for (int64_t row = 0; row < s->item.rows; row += TILE_ROWS) {
            const key_span *span = span_of(s, row);
            if (span->begin == span->end) continue;
            int64_t begin = span->begin / keys, depth = (span->end + keys - 1) / keys - begin;
            const real *weights = s->scores + row * KEYS + begin, *values = value_at(s, begin, feature);
            real *sums = s->sums + row * s->value_padded + feature;
            multiply_rows(paired, s->item.rows - row, 2, weights, KEYS, values, TILE, depth, sums, s->value_padded,
                          s->factor + row, 1);
        }
    }
}

static void add_one_by_one(const block_state *s) {
    for (int64_t r = 0; r < s->item.rows; r++) {
        const key_span *span = span_of(s, r);
        for (int64_t feature = 0; feature < s->value_padded; feature += TILE) {
            real *sums = s->sums + r * s->value_padded + feature;
            const real *weights = s->scores + r * KEYS + span->begin, *values = value_at(s, span->begin, feature);
            multiply_visible(weights, values, TILE, span->end - span->begin, sums, s->factor[r]);
        }
    }
}

static void attend_block(block_state *s, int64_t first, int64_t count) {
    int64_t rows = s->item.rows;
    key_span all;
    find_spans(s, first, count, &all);
    if (!take_few(s, false, first, count)) {
        bring_keys(s, first, all.begin, all.end);
        if (HAS_PAIRS && s->paired) score_tiles(s, true, all.begin, all.end);
        else score_tiles(s, false, all.begin, all.end);
    }
    if (s->args->softcap > 0) cap_scores(s);
    real_int key_visible[KEYS];
    bool read = false;
    for (int64_t r = 0; r < rows; r++) {
        if (span_of(s, r)->whole) continue;
        if (!read) read_key_mask(s, first, count, key_visible);
        read = true;
        mask_row(s, r, first, count, span_of(s, r), key_visible);
    }
    weigh_rows(s);
    if (!s->one_by_one && take_few(s, true, first, count)) return;
    bring_values(s, first, all.begin, all.end);
    if (s->one_by_one) add_one_by_one(s);
    else if (HAS_PAIRS && s->paired) add_tiles(s, true);
    else add_tiles(s, false);
}

static bool all_finite(const real *row, int64_t length) {
    vec_int found = {0};
    for (int64_t i = 0; i < length; i += LANES) { /* of whole vectors */
        vec v = vec_load(row + i);
        found |= v - v != vec_zero();
    }
    bool any = false;
    for (int lane = 0; lane < LANES; lane++) any |= found[lane] != 0;
    return !any;
}

/* The sink joins a row's sum; gives what the row's values are to be multiplied by to become its output. */
static double normalizer(const mtl_attention_args *args, int64_t head, double *largest, double *sum) {
    double factor = 1;
    if (args->sinks.data) {
        double sink = mtl_load_double(args->sinks.data + head * args->sinks.stride, args->sinks.dtype);
        if (sink > *largest) {
            factor = exp(*largest - sink);
            *sum = factor == 0 && !isnan(*sum) ? 0 : *sum * factor;
            *largest = sink;
        }
        /* exp(infinity - infinity) is NaN, but next to an infinite sink every finite score has the weight 0. */
        if (sink != -INFINITY) *sum += sink == INFINITY ? INFINITY : exp(sink - *largest);
    }
    return *largest == -INFINITY && *sum == 0 ? 0 : factor / *sum;
}

static void write_out(const mtl_attention_args *args, const mtl_attention_item *item, int64_t r, const real *values,
                      double logsumexp) {
    int64_t row = item->first_row + r, query = mtl_attention_query(args, row);
    int64_t head = mtl_attention_head(args, item->kv_head, row);
    const mtl_attention_operand *out = &args->out;
    write_row(out->data + item->batch * out->stride[0] + head * out->stride[1] + query * out->stride[2],
              (mtl_row){NULL, out->stride[3], out->dtype}, values, args->value_dim);
    if (!args->logsumexp.data) return;
    const int64_t *stride = args->logsumexp.stride;
    mtl_store_double(args->logsumexp.data + item->batch * stride[0] + head * stride[1] + query * stride[2],
                     args->logsumexp.dtype, logsumexp);
}

static void finish_row(block_state *s, int64_t r) {
    int64_t head = mtl_attention_head(s->args, s->item.kv_head, s->item.first_row + r);
    double largest = (double)s->largest[r], sum = (double)s->sum[r];
    vec inverse = vec_set((real)normalizer(s->args, head, &largest, &sum));
    real *sums = s->sums + r * s->value_padded;
    for (int64_t i = 0; i < s->value_padded; i += LANES) vec_store(sums + i, vec_load(sums + i) * inverse);
    write_out(s->args, &s->item, r, sums, largest + log(sum));
}

static void hand_over_row(block_state *s, int64_t r) {
    double *state = s->item.states + r * mtl_attention_state_length(s->args);
    state[MTL_STATE_LARGEST] = (double)s->largest[r];
    state[MTL_STATE_SUM] = (double)s->sum[r];
    for (int64_t i = 0; i < s->args->value_dim; i++)
        state[MTL_STATE_VALUES + i] = (double)s->sums[r * s->value_padded + i];
}

static void attend(block_state *s, bool paired, bool one_by_one) {
    s->few = mtl_attention_is_few(s->args);
    s->paired = paired;
    s->one_by_one = one_by_one;
    s->depth = paired ? s->args->head_dim / 2 : s->args->head_dim;
    s->words = (s->depth + LANES - 1) / LANES * LANES;
    bring_queries(s);
    for (int64_t first = s->item.first_key; first < s->item.end_key; first += KEYS) {
        attend_block(s, first, s->item.end_key - first < KEYS ? s->item.end_key - first : KEYS);
    }
}

void PLAIN(attention)(const void *, int64_t, int64_t, void *);

void SIMD(attention)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    block_state state = {.args = arguments}, *s = &state;
    int64_t head_padded = (s->args->head_dim + LANES - 1) / LANES * LANES;
    bool paired = can_be_paired(s->args);
    s->value_padded = (s->args->value_dim + TILE - 1) / TILE * TILE;
    s->q = scratch;
    s->packed = s->q + s->args->cut.rows * head_padded;
    s->scores = s->packed + KEYS * (head_padded > s->value_padded ? head_padded : s->value_padded);
    s->sums = s->scores + s->args->cut.rows * KEYS;
    for (int64_t index = begin; index < end; index++) {
        s->item = mtl_attention_item_at(s->args, index);
        attend(s, paired, false);
        if (!all_finite(s->sums, s->item.rows * s->value_padded)) {
            attend(s, false, true);
            if (!all_finite(s->sums, s->item.rows * s->value_padded)) {
                PLAIN(attention)(arguments, index, index + 1, scratch);
                continue;
            }
        }
        for (int64_t r = 0; r < s->item.rows; r++) {
            if (s->item.states) hand_over_row(s, r);
            else finish_row(s, r);
        }
    }
}

/* ---- merging ranges of keys -------------------------------------------------------------------------------------- */

enum { MERGED_AT_ONCE = 64 };

/* An item is a block of rows. A factor of 0 drops infinities: the weights that made them have underflowed. */
void SIMD(attention_merge)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_attention_args *args = arguments;
    int64_t length = mtl_attention_state_length(args), ranges = args->cut.key_ranges, apart = args->cut.rows * length;
    (void)scratch;
    for (int64_t row_block = begin; row_block < end; row_block++) {
        mtl_attention_item item = mtl_attention_item_at(args, row_block * ranges);
        for (int64_t r = 0; r < item.rows; r++) {
            double *state = mtl_attention_states(args, row_block, 0) + r * length;
            double largest = -INFINITY, sum = 0, factor[MTL_ATTENTION_RANGES];
            for (int64_t i = 0; i < ranges; i++) {
                double here = state[i * apart + MTL_STATE_LARGEST];
                if (here > largest) largest = here;
            }
            for (int64_t i = 0; i < ranges; i++) {
                double here = state[i * apart + MTL_STATE_LARGEST], part = state[i * apart + MTL_STATE_SUM];
                factor[i] = here == largest ? 1 : exp(here - largest);
                sum += factor[i] == 0 && part == part ? 0 : part * factor[i];
            }
            int64_t head = mtl_attention_head(args, item.kv_head, item.first_row + r);
            double inverse = normalizer(args, head, &largest, &sum);
            real *out = (real *)(void *)(state + MTL_STATE_VALUES); /* over what has been read, and no further */
            for (int64_t d = 0; d < args->value_dim; d += MERGED_AT_ONCE) {
                int64_t count = args->value_dim - d < MERGED_AT_ONCE ? args->value_dim - d : MERGED_AT_ONCE;
                double total[MERGED_AT_ONCE] = {0};
                for (int64_t i = 0; i < ranges; i++) {
                    const double *values = state + i * apart + MTL_STATE_VALUES + d;
                    if (factor[i] == 0) {
                        for (int64_t j = 0; j < count; j++) total[j] += values[j] == values[j] ? 0 : values[j];
                    } else {
                        for (int64_t j = 0; j < count; j++) total[j] += values[j] * factor[i];
                    }
                }
                for (int64_t j = 0; j < count; j++) out[d + j] = (real)(total[j] * inverse);
            }
            write_out(args, &item, r, out, largest + log(sum));
        }
    }
}
