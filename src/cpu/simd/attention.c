/* O = softmax(scale Q K^T + mask) V, a block of rows against a block of keys at a time. SPDX-License-Identifier: MIT
 *
 * Rows are the queries of all heads that share a key/value head (cpu/attention.h), so that a key is loaded once for them. Both products
 * run in one register-tiled micro-kernel, TILE_ROWS x 2 vectors of sums, that multiplies rows in scratch by a block whose rows are
 * vectors: V as it lies, K transposed when it is brought in. A handful of rows (decoding) does not pay for a transposed K: their scores
 * are dot products with K as it lies, and the cost is one read of the cache.
 *
 * Numerics: online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867), scores and sums in reals. A block's sums are formed by
 * themselves and then added to the rescaled ones, so that rounding grows with the number of blocks, not of keys. A hidden key's score
 * is -infinity, its weight exactly 0. Where 0 meets an infinite or NaN value the row comes out NaN, and the plain kernel, which
 * leaves hidden keys out one by one, does the item again: the common case pays one look at its result. */
#include "cpu/attention.h"
#include "cpu/simd/math.h"

enum {
    KEYS = MTL_ATTENTION_KEYS,
    ROWS = MTL_ATTENTION_ROWS,
    TILE_ROWS = 6,
    TILE = 2 * LANES, /* columns */
    FEW_ROWS = 8,
};

/* One item's working set; rows of `q` are head_padded long, of `sums` value_padded, of `scores` KEYS. */
typedef struct {
    const mtl_attention_args *args;
    mtl_attention_item item;
    int64_t head_padded, value_padded; /* to whole vectors and to whole tiles */
    real *q, *keys, *values, *scores, *sums;
    real largest[ROWS], sum[ROWS], factor[ROWS];
    bool one_by_one; /* leave weights of 0 out of the sums */
} block_state;

/* ---- products ----------------------------------------------------------------------------------------------------------- */

/* c[r][0..TILE) = sum over i of a[r][i] b[i][0..TILE), or, where `factor` is given, that added to factor[r] c[r]. */
INLINE void multiply_tile(int rows, const real *a, int64_t a_stride, const real *b, int64_t b_stride, int64_t depth,
                          real *c, int64_t c_stride, const real *factor) {
    vec sum[TILE_ROWS][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = vec_zero();
    for (int64_t i = 0; i < depth; i++) {
        vec b0 = vec_load(b + i * b_stride), b1 = vec_load(b + i * b_stride + LANES);
        for (int r = 0; r < rows; r++) {
            vec x = vec_set(a[r * a_stride + i]);
            sum[r][0] = vec_fma(x, b0, sum[r][0]);
            sum[r][1] = vec_fma(x, b1, sum[r][1]);
        }
    }
    for (int r = 0; r < rows; r++) {
        real *to = c + r * c_stride;
        if (factor) {
            sum[r][0] = vec_fma(vec_load(to), vec_set(factor[r]), sum[r][0]);
            sum[r][1] = vec_fma(vec_load(to + LANES), vec_set(factor[r]), sum[r][1]);
        }
        vec_store(to, sum[r][0]);
        vec_store(to + LANES, sum[r][1]);
    }
}

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

INLINE void multiply(int64_t rows, const real *a, int64_t a_stride, const real *b, int64_t b_stride, int64_t depth,
                     real *c, int64_t c_stride, int64_t columns, const real *factor) {
    for (int64_t column = 0; column < columns;
         column += TILE) { /* outermost: a tile's columns of b stay in the first-level cache */
        const real *b_tile = b + column;
        int64_t r = 0;
        for (; r + TILE_ROWS <= rows; r += TILE_ROWS) {
            multiply_tile(TILE_ROWS, a + r * a_stride, a_stride, b_tile, b_stride, depth, c + r * c_stride + column,
                          c_stride, factor ? factor + r : NULL);
        }
        const real *a_rest = a + r * a_stride, *factor_rest = factor ? factor + r : NULL;
        real *c_rest = c + r * c_stride + column;
        switch (rows - r) {
        case 5: multiply_tile(5, a_rest, a_stride, b_tile, b_stride, depth, c_rest, c_stride, factor_rest); break;
        case 4: multiply_tile(4, a_rest, a_stride, b_tile, b_stride, depth, c_rest, c_stride, factor_rest); break;
        case 3: multiply_tile(3, a_rest, a_stride, b_tile, b_stride, depth, c_rest, c_stride, factor_rest); break;
        case 2: multiply_tile(2, a_rest, a_stride, b_tile, b_stride, depth, c_rest, c_stride, factor_rest); break;
        case 1: multiply_tile(1, a_rest, a_stride, b_tile, b_stride, depth, c_rest, c_stride, factor_rest); break;
        default: break;
        }
    }
}

/* scores[r][key] = q[r] . k for `rows` rows and two keys, along D as it lies. */
INLINE void dot_keys(int rows, const real *q, int64_t q_stride, const char *k0, const char *k1, mtl_dtype dtype,
                     int64_t length, real *scores) {
    vec sum[4][2];
    int64_t size = mtl_dtype_size(dtype);
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = vec_zero();
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) {
        vec a = vec_load_as(k0 + i * size, dtype), b = vec_load_as(k1 + i * size, dtype);
        for (int r = 0; r < rows; r++) {
            vec x = vec_load(q + r * q_stride + i);
            sum[r][0] = vec_fma(x, a, sum[r][0]);
            sum[r][1] = vec_fma(x, b, sum[r][1]);
        }
    }
    if (i < length) {
        vec a = vec_load_part(k0 + i * size, dtype, length - i), b = vec_load_part(k1 + i * size, dtype, length - i);
        for (int r = 0; r < rows; r++) {
            vec x = vec_load(q + r * q_stride + i); /* padded with 0 */
            sum[r][0] = vec_fma(x, a, sum[r][0]);
            sum[r][1] = vec_fma(x, b, sum[r][1]);
        }
    }
    for (int r = 0; r < rows; r++) {
        scores[r * KEYS] = vec_sum(sum[r][0]);
        scores[r * KEYS + 1] = vec_sum(sum[r][1]);
    }
}

INLINE void dot_block_as(block_state *s, const char *keys, int64_t key_stride, mtl_dtype dtype, int64_t count) {
    int64_t length = s->args->head_dim;
    for (int64_t key = 0; key < count; key += 2) {
        const char *k0 = keys + key * key_stride, *k1 = key + 1 < count ? k0 + key_stride : k0;
        int64_t r = 0;
        for (; r + 4 <= s->item.rows; r += 4) {
            dot_keys(4, s->q + r * s->head_padded, s->head_padded, k0, k1, dtype, length, s->scores + r * KEYS + key);
        }
        for (; r < s->item.rows; r++) {
            dot_keys(1, s->q + r * s->head_padded, s->head_padded, k0, k1, dtype, length, s->scores + r * KEYS + key);
        }
    }
}

/* ---- bringing keys and values in ------------------------------------------------------------------------------------------ */

static void read_head(real *to, const char *from, const mtl_attention_operand *operand, int64_t length,
                      int64_t padded) {
    read_row(to, from, (mtl_row){NULL, operand->stride[3], operand->dtype}, length);
    for (int64_t i = length; i < padded; i++) to[i] = 0;
}

static const char *key_at(const block_state *s, const mtl_attention_operand *operand, int64_t key) {
    return operand->data + s->item.batch * operand->stride[0] + s->item.kv_head * operand->stride[1] +
           key * operand->stride[2];
}

/* keys[feature][key] from LANES keys of a contiguous dtype. */
INLINE void transpose_keys(real *to, const char *from, int64_t key_stride, mtl_dtype dtype, int64_t length) {
    int64_t size = mtl_dtype_size(dtype), i = 0;
    for (; i + LANES <= length; i += LANES) {
        vec square[LANES];
        for (int key = 0; key < LANES; key++) square[key] = vec_load_as(from + key * key_stride + i * size, dtype);
        vec_transpose(square);
        for (int j = 0; j < LANES; j++) vec_store(to + (i + j) * KEYS, square[j]);
    }
    for (; i < length; i++) {
        for (int key = 0; key < LANES; key++) to[i * KEYS + key] = real_load(from + key * key_stride + i * size, dtype);
    }
}

static void bring_keys(block_state *s, int64_t first, int64_t count) {
    const mtl_attention_operand *k = &s->args->k;
    int64_t length = s->args->head_dim, key = 0;
    if (k->stride[3] == mtl_dtype_size(k->dtype)) {
        for (; key + LANES <= count; key += LANES) {
            const char *from = key_at(s, k, first + key);
            if (k->dtype == REAL_DTYPE) transpose_keys(s->keys + key, from, k->stride[2], REAL_DTYPE, length);
#ifndef MTL_IN_DOUBLE
            else if (k->dtype == MTL_F16) transpose_keys(s->keys + key, from, k->stride[2], MTL_F16, length);
            else if (k->dtype == MTL_BF16) transpose_keys(s->keys + key, from, k->stride[2], MTL_BF16, length);
#endif
            else break;
        }
    }
    for (; key < count; key++) {
        const char *from = key_at(s, k, first + key);
        for (int64_t i = 0; i < length; i++) s->keys[i * KEYS + key] = real_load(from + i * k->stride[3], k->dtype);
    }
    for (int64_t i = 0; count < KEYS && i < length; i++) {
        for (key = count; key < KEYS; key++) s->keys[i * KEYS + key] = 0;
    }
}

/* V's rows where they lie if the micro-kernel can take them so, else widened into scratch. */
static const real *bring_values(block_state *s, int64_t first, int64_t count, int64_t *stride) {
    const mtl_attention_operand *v = &s->args->v;
    int64_t length = s->args->value_dim;
    bool as_it_lies = v->dtype == REAL_DTYPE && v->stride[3] == (int64_t)sizeof(real) && length == s->value_padded &&
                      v->stride[2] % (int64_t)sizeof(real) == 0 && s->item.rows > FEW_ROWS;
    if (as_it_lies) {
        *stride = v->stride[2] / (int64_t)sizeof(real);
        return (const real *)(const void *)key_at(s, v, first);
    }
    for (int64_t key = 0; key < count; key++) {
        read_head(s->values + key * s->value_padded, key_at(s, v, first + key), v, length, s->value_padded);
    }
    *stride = s->value_padded;
    return s->values;
}

/* ---- masks -------------------------------------------------------------------------------------------------------------- */

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

static void mask_row(const block_state *s, int64_t row, int64_t first, int64_t count, const real_int *key_visible) {
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
    char padded[KEYS] = {0};
    if (from && boolean && count < KEYS) from = memcpy(padded, from, (size_t)count);
    for (int64_t key = 0; key < KEYS; key += LANES) {
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

static void cap_scores(block_state *s) {
    real cap = (real)s->args->softcap;
    for (int64_t i = 0; i < s->item.rows * KEYS; i += LANES) {
        vec_store(s->scores + i, vec_set(cap) * vec_tanh(vec_load(s->scores + i) / vec_set(cap)));
    }
}

/* Whether every row sees every key of the block. */
static bool all_visible(const block_state *s, int64_t first, int64_t count) {
    const mtl_attention_args *args = s->args;
    int64_t first_query = mtl_attention_query(args, s->item.first_row);
    int64_t last_query = mtl_attention_query(args, s->item.first_row + s->item.rows - 1);
    return count == KEYS && !args->mask.data && !args->key_mask.data && first >= last_query + args->first_visible &&
           first + count - 1 <= first_query + args->last_visible;
}

/* ---- softmax -------------------------------------------------------------------------------------------------------------- */

/* Scores to weights exp(score - largest); factor is what the sums so far are to be multiplied by. */
static void weigh_row(block_state *s, int64_t row) {
    real *scores = s->scores + row * KEYS;
    vec most[2] = {vec_load(scores), vec_load(scores + LANES)};
    for (int i = 2; i < KEYS / LANES; i++) most[i & 1] = vec_max(vec_load(scores + i * LANES), most[i & 1]);
    /* A NaN in the first vectors may stand in `most`; it comes back as a NaN in the sum whatever is subtracted. */
    real here = vec_largest(vec_max(most[0], most[1])), largest = s->largest[row];
    s->factor[row] = 1;
    if (here > largest) {
        s->factor[row] = largest == -(real)INFINITY ? 0 : (real)exp((double)largest - (double)here);
        s->largest[row] = largest = here;
    }
    vec shift = vec_set(largest == -(real)INFINITY ? 0 : largest), sum[2] = {vec_zero(), vec_zero()};
    for (int i = 0; i < KEYS / LANES; i++) {
        vec weight = vec_exp_of_nonpositive(vec_load(scores + i * LANES) - shift);
        vec_store(scores + i * LANES, weight);
        sum[i & 1] += weight;
    }
    s->sum[row] = s->sum[row] * s->factor[row] + vec_sum(sum[0] + sum[1]);
}

/* ---- an item -------------------------------------------------------------------------------------------------------------- */

static void bring_queries(block_state *s) {
    const mtl_attention_args *args = s->args;
    for (int64_t r = 0; r < s->item.rows; r++) {
        int64_t query = mtl_attention_query(args, s->item.first_row + r);
        int64_t head = mtl_attention_head(args, s->item.kv_head, s->item.first_row + r);
        const char *from =
            args->q.data + s->item.batch * args->q.stride[0] + head * args->q.stride[1] + query * args->q.stride[2];
        real *q = s->q + r * s->head_padded;
        read_head(q, from, &args->q, args->head_dim, s->head_padded);
        for (int64_t i = 0; i < s->head_padded; i += LANES)
            vec_store(q + i, vec_load(q + i) * vec_set((real)args->scale));
        s->largest[r] = -(real)INFINITY;
        s->sum[r] = 0;
    }
    memset(s->sums, 0, (size_t)(s->item.rows * s->value_padded) * sizeof(real));
}

static void attend_block(block_state *s, int64_t first, int64_t count) {
    const mtl_attention_operand *k = &s->args->k;
    int64_t rows = s->item.rows;
    bool few = rows <= FEW_ROWS && k->stride[3] == mtl_dtype_size(k->dtype);
    const char *keys = key_at(s, k, first);
    if (few && k->dtype == REAL_DTYPE) {
        dot_block_as(s, keys, k->stride[2], REAL_DTYPE, count);
#ifndef MTL_IN_DOUBLE
    } else if (few && k->dtype == MTL_F16) {
        dot_block_as(s, keys, k->stride[2], MTL_F16, count);
    } else if (few && k->dtype == MTL_BF16) {
        dot_block_as(s, keys, k->stride[2], MTL_BF16, count);
#endif
    } else {
        bring_keys(s, first, count);
        multiply(rows, s->q, s->head_padded, s->keys, KEYS, s->args->head_dim, s->scores, KEYS, KEYS, NULL);
    }
    if (s->args->softcap > 0) cap_scores(s);
    if (!all_visible(s, first, count)) {
        real_int key_visible[KEYS];
        read_key_mask(s, first, count, key_visible);
        for (int64_t r = 0; r < rows; r++) mask_row(s, r, first, count, key_visible);
    }
    for (int64_t r = 0; r < rows; r++) weigh_row(s, r);
    int64_t value_stride;
    const real *values = bring_values(s, first, count, &value_stride);
    if (!s->one_by_one) {
        multiply(rows, s->scores, KEYS, values, value_stride, count, s->sums, s->value_padded, s->value_padded,
                 s->factor);
        return;
    }
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t column = 0; column < s->value_padded; column += TILE) {
            real *sums = s->sums + r * s->value_padded + column;
            multiply_visible(s->scores + r * KEYS, values + column, value_stride, count, sums, s->factor[r]);
        }
    }
}

static bool has_nan(const real *row, int64_t length) {
    vec_int found = {0};
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES) {
        vec v = vec_load(row + i);
        found |= v != v;
    }
    bool any = false;
    for (; i < length; i++) any |= isnan(row[i]);
    for (int lane = 0; lane < LANES; lane++) any |= found[lane] != 0;
    return any;
}

/* The sink joins the sum; the row is normalized and written. */
static void finish_row(block_state *s, int64_t r) {
    const mtl_attention_args *args = s->args;
    int64_t query = mtl_attention_query(args, s->item.first_row + r);
    int64_t head = mtl_attention_head(args, s->item.kv_head, s->item.first_row + r);
    double largest = (double)s->largest[r], sum = (double)s->sum[r], factor = 1;
    if (args->sinks.data) {
        double sink = mtl_load_double(args->sinks.data + head * args->sinks.stride, args->sinks.dtype);
        if (sink > largest) {
            factor = exp(largest - sink);
            sum *= factor;
            largest = sink;
        }
        /* exp(infinity - infinity) is NaN, but next to an infinite sink every finite score has the weight 0. */
        if (sink != -INFINITY) sum += sink == INFINITY ? INFINITY : exp(sink - largest);
    }
    bool nothing_seen = largest == -INFINITY && sum == 0;
    vec inverse = vec_set((real)(nothing_seen ? 0 : factor / sum));
    real *sums = s->sums + r * s->value_padded;
    for (int64_t i = 0; i < s->value_padded; i += LANES) vec_store(sums + i, vec_load(sums + i) * inverse);
    const mtl_attention_operand *out = &args->out;
    write_row(out->data + s->item.batch * out->stride[0] + head * out->stride[1] + query * out->stride[2],
              (mtl_row){NULL, out->stride[3], out->dtype}, sums, args->value_dim);
    if (args->logsumexp.data) {
        const int64_t *stride = args->logsumexp.stride;
        mtl_store_double(args->logsumexp.data + s->item.batch * stride[0] + head * stride[1] + query * stride[2],
                         args->logsumexp.dtype, largest + log(sum));
    }
}

static void hand_over_row(block_state *s, int64_t r) {
    double *state = s->item.states + r * mtl_attention_state_length(s->args);
    state[MTL_STATE_LARGEST] = (double)s->largest[r];
    state[MTL_STATE_SUM] = (double)s->sum[r];
    for (int64_t i = 0; i < s->args->value_dim; i++)
        state[MTL_STATE_VALUES + i] = (double)s->sums[r * s->value_padded + i];
}

static void attend(block_state *s) {
    bring_queries(s);
    for (int64_t first = s->item.first_key; first < s->item.end_key; first += KEYS) {
        attend_block(s, first, s->item.end_key - first < KEYS ? s->item.end_key - first : KEYS);
    }
}

void SIMD(attention)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    block_state state = {.args = arguments}, *s = &state;
    s->head_padded = (s->args->head_dim + LANES - 1) / LANES * LANES;
    s->value_padded = (s->args->value_dim + TILE - 1) / TILE * TILE;
    s->q = scratch;
    s->keys = s->q + s->args->cut.rows * s->head_padded;
    s->values = s->keys + KEYS * s->head_padded;
    s->scores = s->values + KEYS * s->value_padded;
    s->sums = s->scores + s->args->cut.rows * KEYS;
    for (int64_t index = begin; index < end; index++) {
        s->item = mtl_attention_item_at(s->args, index);
        s->one_by_one = false;
        attend(s);
        if (has_nan(s->sums, s->item.rows * s->value_padded)) {
            s->one_by_one = true;
            attend(s);
        }
        for (int64_t r = 0; r < s->item.rows; r++) {
            if (s->item.states) hand_over_row(s, r);
            else finish_row(s, r);
        }
    }
}
