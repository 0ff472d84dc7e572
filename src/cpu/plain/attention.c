/* O = softmax(scale Q K^T + mask) V, with an online softmax. SPDX-License-Identifier: MIT
 *
 *   for each row (query of a head) and each key that it sees, in order:
 *       score = scale q.k; capped; biased by the mask
 *       largest' = max(largest, score); both sums are multiplied by exp(largest - largest')
 *       sum += exp(score - largest'); values += exp(score - largest') v
 *   out = values / sum                              (Milakov & Gimelshein 2018, arXiv:1805.02867)
 *
 * A block of keys and values is widened into scratch once for a block of rows. The row's state (cpu/attention.h) is in double, so that
 * rounding does not grow with the number of keys. A hidden key is left out of every sum, and so is one whose weight has underflowed to
 * 0 or whose score is -infinity: 0 times an infinite or NaN value would be NaN. */
#include "cpu/attention.h"
#include "cpu/plain/real.h"

/* ---- states ------------------------------------------------------------------------------------------------------- */

/* x exp(difference), where a factor of 0 drops what it multiplies, infinities too: such a key's weight has underflowed. */
static double rescale(double x, double factor) { return factor == 0 && !isnan(x) ? 0 : x * factor; }

/* The state's sums, in terms of a larger `largest`. */
static void raise_state(double *state, int64_t length, double largest) {
    if (!(largest > state[MTL_STATE_LARGEST])) return;
    double factor = exp(state[MTL_STATE_LARGEST] - largest);
    state[MTL_STATE_LARGEST] = largest;
    for (int64_t i = MTL_STATE_SUM; i < length; i++) state[i] = rescale(state[i], factor);
}

static void combine(double *state, double *other, int64_t length) {
    raise_state(state, length, other[MTL_STATE_LARGEST]);
    raise_state(other, length, state[MTL_STATE_LARGEST]);
    for (int64_t i = MTL_STATE_SUM; i < length; i++) state[i] += other[i];
}

/* Adds the sink to a row's state and writes its output and logsumexp. */
static void finish(const mtl_attention_args *args, int64_t batch, int64_t kv_head, int64_t row, double *state) {
    int64_t query = mtl_attention_query(args, row), head = mtl_attention_head(args, kv_head, row);
    if (args->sinks.data) {
        double sink = mtl_load_double(args->sinks.data + head * args->sinks.stride, args->sinks.dtype);
        raise_state(state, mtl_attention_state_length(args), sink);
        /* exp(infinity - infinity) is NaN, but next to an infinite sink every finite score has the weight 0. A sink of -infinity
         * is none. */
        if (sink != -INFINITY)
            state[MTL_STATE_SUM] += sink == INFINITY ? INFINITY : exp(sink - state[MTL_STATE_LARGEST]);
    }
    double largest = state[MTL_STATE_LARGEST], sum = state[MTL_STATE_SUM];
    bool nothing_seen = largest == -INFINITY && sum == 0;
    double inverse = nothing_seen ? 0 : 1 / sum;

    const mtl_attention_operand *out = &args->out;
    char *to = out->data + batch * out->stride[0] + head * out->stride[1] + query * out->stride[2];
    for (int64_t d = 0; d < args->value_dim; d++) {
        mtl_store_double(to + d * out->stride[3], out->dtype, state[MTL_STATE_VALUES + d] * inverse);
    }
    if (args->logsumexp.data) {
        const int64_t *stride = args->logsumexp.stride;
        mtl_store_double(args->logsumexp.data + batch * stride[0] + head * stride[1] + query * stride[2],
                         args->logsumexp.dtype, largest + log(sum));
    }
}

/* An item is a block of rows: the states of its key ranges, in order, become one. */
void REAL(mtl_plain_attention_merge)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_attention_args *args = arguments;
    int64_t length = mtl_attention_state_length(args);
    (void)scratch;
    for (int64_t row_block = begin; row_block < end; row_block++) {
        mtl_attention_item item = mtl_attention_item_at(args, row_block * args->cut.key_ranges);
        for (int64_t r = 0; r < item.rows; r++) {
            double *state = mtl_attention_states(args, row_block, 0) + r * length;
            for (int64_t range = 1; range < args->cut.key_ranges; range++) {
                combine(state, mtl_attention_states(args, row_block, range) + r * length, length);
            }
            finish(args, item.batch, item.kv_head, item.first_row + r, state);
        }
    }
}

/* ---- rows against keys -------------------------------------------------------------------------------------------- */

/* Features of operand[batch][head][time], widened. */
static void read_features(real *to, const mtl_attention_operand *operand, int64_t batch, int64_t head, int64_t time,
                          int64_t length) {
    const char *from =
        operand->data + batch * operand->stride[0] + head * operand->stride[1] + time * operand->stride[2];
    for (int64_t i = 0; i < length; i++) to[i] = real_load(from + i * operand->stride[3], operand->dtype);
}

/* Adds the mask to the score; false where the key is hidden. */
static bool sees(const mtl_attention_args *args, int64_t batch, int64_t head, int64_t query, int64_t key,
                 double *score) {
    if (key < query + args->first_visible || key > query + args->last_visible) return false;
    if (args->key_mask.data) {
        const char *at = args->key_mask.data + batch * args->key_mask.stride[0] + key * args->key_mask.stride[1];
        if (mtl_load_integer(at, args->key_mask.dtype) == 0) return false;
    }
    if (!args->mask.data) return true;
    const int64_t *stride = args->mask.stride;
    const char *at = args->mask.data + batch * stride[0] + head * stride[1] + query * stride[2] + key * stride[3];
    if (args->mask.dtype == MTL_BOOL) return mtl_load_integer(at, MTL_BOOL) != 0;
    double bias = mtl_load_double(at, args->mask.dtype);
    *score += bias;
    return bias != -INFINITY;
}

/* The state of a row for which mtl_attention_is_counting: `n` keys of one score. */
static void count_keys(const mtl_attention_args *args, const mtl_attention_item *item, int64_t row, double *state) {
    int64_t query = mtl_attention_query(args, row), head = mtl_attention_head(args, item->kv_head, row);
    int64_t low = query + args->first_visible, high = query + args->last_visible + 1;
    if (low < item->first_key) low = item->first_key;
    if (high > item->end_key) high = item->end_key;
    double score = 0;
    if (low >= high || !sees(args, item->batch, head, query, low, &score) || score == -INFINITY) return;
    state[MTL_STATE_LARGEST] = score;
    state[MTL_STATE_SUM] = (double)(high - low);
}

void REAL(mtl_plain_attention)(const void *arguments, int64_t begin, int64_t end, void *scratch) {
    const mtl_attention_args *args = arguments;
    int64_t head_dim = args->head_dim, value_dim = args->value_dim, state_length = mtl_attention_state_length(args);
    double *states = scratch;
    real *queries = (real *)(states + args->cut.rows * state_length);
    real *keys = queries + args->cut.rows * head_dim, *values = keys + MTL_ATTENTION_KEYS * head_dim;
    for (int64_t index = begin; index < end; index++) {
        mtl_attention_item item = mtl_attention_item_at(args, index);
        for (int64_t r = 0; r < item.rows; r++) {
            int64_t query = mtl_attention_query(args, item.first_row + r),
                    head = mtl_attention_head(args, item.kv_head, item.first_row + r);
            read_features(queries + r * head_dim, &args->q, item.batch, head, query, head_dim);
            for (int64_t i = 0; i < state_length; i++)
                states[r * state_length + i] = i == MTL_STATE_LARGEST ? -INFINITY : 0;
        }
        bool counting = mtl_attention_is_counting(args);
        for (int64_t r = 0; counting && r < item.rows; r++)
            count_keys(args, &item, item.first_row + r, states + r * state_length);
        for (int64_t first = item.first_key; !counting && first < item.end_key; first += MTL_ATTENTION_KEYS) {
            int64_t count = item.end_key - first < MTL_ATTENTION_KEYS ? item.end_key - first : MTL_ATTENTION_KEYS;
            for (int64_t key = 0; key < count; key++) {
                read_features(keys + key * head_dim, &args->k, item.batch, item.kv_head, first + key, head_dim);
                read_features(values + key * value_dim, &args->v, item.batch, item.kv_head, first + key, value_dim);
            }
            for (int64_t r = 0; r < item.rows; r++) {
                int64_t query = mtl_attention_query(args, item.first_row + r);
                int64_t head = mtl_attention_head(args, item.kv_head, item.first_row + r);
                double *state = states + r * state_length;
                for (int64_t key = 0; key < count; key++) {
                    double score = 0;
                    for (int64_t i = 0; i < head_dim; i++)
                        score += (double)queries[r * head_dim + i] * (double)keys[key * head_dim + i];
                    score *= args->scale;
                    if (args->softcap > 0) score = args->softcap * tanh(score / args->softcap);
                    if (!sees(args, item.batch, head, query, first + key, &score) || score == -INFINITY) continue;
                    raise_state(state, state_length, score);
                    double weight = exp(score - state[MTL_STATE_LARGEST]);
                    if (weight == 0) continue;
                    state[MTL_STATE_SUM] += weight;
                    for (int64_t i = 0; i < value_dim; i++)
                        state[MTL_STATE_VALUES + i] += weight * (double)values[key * value_dim + i];
                }
            }
        }
        for (int64_t r = 0; r < item.rows; r++) {
            double *state = states + r * state_length;
            if (item.states) memcpy(item.states + r * state_length, state, (size_t)state_length * sizeof *state);
            else finish(args, item.batch, item.kv_head, item.first_row + r, state);
        }
    }
}
