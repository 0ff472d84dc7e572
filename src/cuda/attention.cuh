// What the attention kernels share: who sees whom, a row done exactly, and the end of every row.
// SPDX-License-Identifier: MIT
#pragma once

#include "cuda/device.cuh"

__device__ inline const char *place(const mtl_cuda_strided &operand, int64_t i, int64_t j, int64_t k) {
    return operand.data + i * operand.stride[0] + j * operand.stride[1] + k * operand.stride[2];
}

__device__ inline float capped(const mtl_cuda_attention_args &p, float score) {
    score *= p.scale;
    return p.softcap > 0 ? p.softcap * tanhf(score / p.softcap) : score;
}

// To about 2^-22, which is enough for scores with a cap of up to 2^10.
__device__ inline float quick_tanh(float x) { return 1 - __fdividef(2, 1 + power_of_2(2 * LOG2_E * x)); }

// Whether the key is visible as far as key mask and mask say, and the score with the mask added.
__device__ inline bool passes_masks(const mtl_cuda_attention_args &p, float &score, const char *key_mask,
                                    const char *mask, int64_t key) {
    if (key_mask && load_integer(key_mask + key * p.key_mask.stride[1], p.key_mask.dtype) == 0) return false;
    if (!mask) return true;
    mask += key * p.mask.stride[3];
    if (p.mask.dtype == BOOL) return *(const uint8_t *)mask;
    float bias = load_float(mask, p.mask.dtype);
    score += bias;
    return bias != -INFINITY;
}

// Where a query's masks start; NULL where there are none.
__device__ inline const char *key_mask_of(const mtl_cuda_attention_args &p, int64_t batch) {
    return p.key_mask.data ? p.key_mask.data + batch * p.key_mask.stride[0] : NULL;
}
__device__ inline const char *mask_of(const mtl_cuda_attention_args &p, int64_t batch, int64_t head, int64_t query) {
    return p.mask.data ? place(p.mask, batch, head, query) : NULL;
}

// Which key/value head of all batches a block has, and which block of rows. Under causal the last rows have most to do:
// they go first, those of several heads together, so that no long block is left for the end, but of no more heads than
// the second-level cache has room for.
struct Turn {
    int head, block;
};

__device__ inline Turn turn_of_block(const mtl_cuda_attention_args &p) {
    int heads = (int)(p.batch * p.kv_heads), blocks = gridDim.x / heads, most = p.heads_a_turn;
    int first_head = blockIdx.x / (most * blocks) * most, at = blockIdx.x - first_head * blocks;
    int together = min(most, heads - first_head), before = at / together;
    return {first_head + at - before * together, blocks - 1 - before};
}

// The first tile of KEYS keys, from the one at `first` on, of which the key mask shows any. The block's threads call it
// together.
template <int KEYS>
__device__ inline int64_t next_tile(const mtl_cuda_attention_args &p, const char *key_mask, int64_t first,
                                    int64_t end) {
    if (!key_mask) return first;
    for (; first < end; first += KEYS) {
        bool seen = false;
        for (int64_t key = first + threadIdx.x; key < first + KEYS && key < end; key += blockDim.x)
            seen |= load_integer(key_mask + key * p.key_mask.stride[1], p.key_mask.dtype) != 0;
        if (__syncthreads_or(seen)) break;
    }
    return first;
}

// The keys that causal, window and the block's part of split keys leave to its queries, from a whole tile on, and from
// the first of which the key mask shows any.
struct KeyRange {
    int64_t begin, end;
};
template <int KEYS>
__device__ inline KeyRange keys_of(const mtl_cuda_attention_args &p, const char *key_mask, int64_t first_query,
                                   int64_t last_query) {
    int64_t begin = first_query + p.first_visible, end = last_query + p.last_visible + 1;
    begin = begin < 0 ? 0 : begin / KEYS * KEYS, end = end > p.kv_len ? p.kv_len : end;
    if (p.splits > 1) {
        int64_t from = blockIdx.z * p.split_keys, to = from + p.split_keys;
        begin = begin > from ? begin : from, end = end < to ? end : to;
    }
    return {next_tile<KEYS>(p, key_mask, begin, end), end};
}

__device__ inline float exp_of_difference(float x, float y) { return power_of_2((x - y) * LOG2_E); }

// What a row's weighted values are multiplied by in the end, and the logarithm of its weights' sum. `total` is that sum
// over exp(`largest`). The sink takes part, but not in one of several parts.
struct RowEnd {
    float factor, log_sum;
};

__device__ inline RowEnd end_row(const mtl_cuda_attention_args &p, int64_t head, float largest, float total,
                                 bool split) {
    float factor = 1;
    if (p.sinks.data && !split) {
        float sink = load_float(p.sinks.data + head * p.sinks.stride, p.sinks.dtype), top = larger(sink, largest);
        factor = largest == -INFINITY ? 0 : exp_of_difference(largest, top);
        float weight = sink == -INFINITY ? 0 : exp_of_difference(sink, top);
        total = sink == INFINITY ? INFINITY : total == 0 ? weight : total * factor + weight;
        largest = top;
    }
    return {total == 0 ? 0 : factor / total, total == 0 ? -INFINITY : largest + logf(total)};
}

// A sum of many terms, with what rounding has taken from it (Kahan 1965).
struct LongSum {
    float value, lost;

    __device__ void add(float x) {
        float y = x - lost, total = value + y, taken = (total - value) - y;
        lost = taken == taken ? taken : 0; // infinities have none
        value = total;
    }
    __device__ void scale(
        float factor) { // a factor of 0 drops infinities too: the weight of such a key has underflowed
        value = factor == 0 ? 0 : value * factor;
        lost = factor == 0 ? 0 : lost * factor;
    }
};

// One query by one warp, in float: keys that are hidden, or whose weight is 0, are left out and not only weighted by 0,
// so that nothing they hold can show. Any dtypes and strides.
__device__ inline void attention_row(const mtl_cuda_attention_args &p, int64_t batch, int64_t head, int64_t query) {
    constexpr int COLUMNS = 8; // of values, a lane, in one pass over the keys
    int lane = threadIdx.x % WARP;
    int64_t kv_head = head / p.group, first = query + p.first_visible, end = query + p.last_visible + 1;
    first = first < 0 ? 0 : first, end = end > p.kv_len ? p.kv_len : end;
    const char *q = place(p.q, batch, head, query);
    const char *key_mask = key_mask_of(p, batch), *mask = mask_of(p, batch, head, query);
    int64_t column = 0;
    do {
        float largest = -INFINITY;
        LongSum sum = {}, values[COLUMNS] = {};
        for (int64_t from = first; from < end; from += WARP) {
            int64_t key = from + lane;
            float score = 0;
            if (key < end) {
                const char *k = place(p.k, batch, kv_head, key);
                for (int64_t i = 0; i < p.head_dim; i++)
                    score = fmaf(load_float(q + i * p.q.stride[3], p.q.dtype),
                                 load_float(k + i * p.k.stride[3], p.k.dtype), score);
            }
            score = capped(p, score);
            if (key >= end || !passes_masks(p, score, key_mask, mask, key)) score = -INFINITY;
            float now = larger(over_warp<float, larger>(score), largest);
            if (now == -INFINITY) continue;
            float factor = largest == -INFINITY ? 0 : exp_of_difference(largest, now);
            float weight = score == -INFINITY ? 0 : exp_of_difference(score, now);
            sum.scale(factor);
            sum.add(over_warp<float, add<float>>(weight));
            largest = now;
            float of_keys[COLUMNS] = {};
            for (int other = 0; other < WARP; other++) {
                float w = __shfl_sync(ALL_LANES, weight, other);
                if (w == 0) continue;
                const char *v = place(p.v, batch, kv_head, from + other);
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) {
                    int64_t at = column + i * WARP + lane;
                    if (at < p.value_dim)
                        of_keys[i] = fmaf(w, load_float(v + at * p.v.stride[3], p.v.dtype), of_keys[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
                values[i].scale(factor);
                values[i].add(of_keys[i]);
            }
        }
        if (p.sinks.data) {
            float sink = load_float(p.sinks.data + head * p.sinks.stride, p.sinks.dtype);
            float now = larger(sink, largest), factor = largest == -INFINITY ? 0 : exp_of_difference(largest, now);
            if (now != -INFINITY) {
                sum.value = sink == INFINITY
                                ? INFINITY // beside it every finite score has the weight 0
                                : sum.value * factor + (sink == -INFINITY ? 0 : exp_of_difference(sink, now));
#pragma unroll
                for (int i = 0; i < COLUMNS; i++) values[i].scale(factor);
                largest = now;
            }
        }
        float inverse = largest == -INFINITY && sum.value == 0 ? 0 : 1 / sum.value;
        char *out = (char *)place(p.out, batch, head, query);
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            int64_t at = column + i * WARP + lane;
            if (at < p.value_dim) store_float(out + at * p.out.stride[3], p.out.dtype, values[i].value * inverse);
        }
        if (p.logsumexp.data && column == 0 && lane == 0)
            *(float *)place(p.logsumexp, batch, head, query) = largest + logf(sum.value);
        column += COLUMNS * WARP;
    } while (column < p.value_dim);
}
