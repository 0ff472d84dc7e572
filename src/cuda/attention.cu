// O = softmax(scale Q K^T + mask) V by mma.sync, blocked, with an online softmax. SPDX-License-Identifier: MIT
//
//   (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691)
//
// A warp has 16 rows, so that a row's maximum and sum never leave four lanes. Keys and values pass through shared
// memory in two stages, one being filled by cp.async while the other is used. Scores, softmax and sums are float;
// weights are rounded to the 16-bit type for the second product. All heads of a key/value head share a block's keys: a
// decode step reads the cache once. Where rows are few, keys are split over blocks, and attention_merge joins the parts
// in their order, so that the same call gives the same bits.
//
// A weight of 0 does not keep a NaN or infinity of V out of a matrix product: a row that comes out NaN is done again by
// attention_row, which leaves hidden keys out. Not where its weights' sum is NaN: then a visible score is.
#include "cuda/attention.cuh"
#include "cuda/mma.cuh"

template <typename T, int DIM, int WARPS, int KEYS>
__device__ inline void attention_tiles(const mtl_cuda_attention_args &p) {
    constexpr int THREADS = WARPS * WARP, ROWS = WARPS * 16, CHUNKS = DIM / 8;
    extern __shared__ __align__(128) unsigned char shared[];
    unsigned q_tile = (unsigned)__cvta_generic_to_shared(shared), stages = q_tile + ROWS * DIM * 2;
    constexpr unsigned TILE = KEYS * DIM * 2, STAGE = 2 * TILE; // keys, then values

    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Turn turn = turn_of_block(p);
    int64_t kv_head, batch = divide(turn.head, p.kv_heads, kv_head), rows = p.group * p.q_len;
    int64_t first_row = (int64_t)turn.block * ROWS;
    int64_t last_row = first_row + ROWS < rows ? first_row + ROWS - 1 : rows - 1;
    int64_t ignored, first_query = divide(first_row, p.group, ignored), last_query = divide(last_row, p.group, ignored);

    const char *key_mask = key_mask_of(p, batch);
    KeyRange range = keys_of<KEYS>(p, key_mask, first_query, last_query);
    int64_t begin = range.begin, end = range.end;

    for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        int at = i * THREADS + threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
        int64_t in_group, query = divide(first_row + row, p.group, in_group);
        bool there = first_row + row < rows && chunk * 8 < p.head_dim;
        const char *from = there ? place(p.q, batch, kv_head * p.group + in_group, query) + chunk * 16 : p.q.data;
        copy_async(chunk_at<DIM>(q_tile, row, chunk), from, there);
    }
    const char *k = place(p.k, batch, kv_head, 0), *v = place(p.v, batch, kv_head, 0);
    auto fetch = [&](int64_t first, unsigned stage) {
        fetch_tile<DIM, KEYS, THREADS>(stage, k, p.k.stride[2], first, p.kv_len, (int)p.head_dim, DIM);
        fetch_tile<DIM, KEYS, THREADS>(stage + TILE, v, p.v.stride[2], first, p.kv_len, (int)p.value_dim, DIM);
        copies_end();
    };
    if (begin < end) fetch(begin, stages);
    else copies_end();

    // The lane's two rows.
    int64_t row[2], query[2], head[2];
    float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        row[i] = first_row + warp * 16 + lane / 4 + 8 * i;
        int64_t in_group;
        query[i] = divide(row[i], p.group, in_group);
        head[i] = kv_head * p.group + in_group;
    }
    float values[DIM / 8][4] = {};
    bool plain = !p.mask.data && !key_mask && p.softcap == 0 && p.scale > 0;

    int64_t stage_at = 0;
    for (int64_t first = begin, next; first < end; first = next, stage_at ^= 1) {
        unsigned stage = stages + (unsigned)stage_at * STAGE;
        next = next_tile<KEYS>(p, key_mask, first + KEYS, end);
        if (next < end) {
            fetch(next, stages + (unsigned)(stage_at ^ 1) * STAGE);
            copies_wait<1>();
        } else {
            copies_wait<0>();
        }
        if (WARPS > 1) __syncthreads();
        else __syncwarp();

        float scores[KEYS / 8][4] = {};
#pragma unroll
        for (int step = 0; step < DIM / 16; step++) {
            unsigned a[4];
            load_matrices(a, chunk_at<DIM>(q_tile, warp * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
            for (int pair = 0; pair < KEYS / 16; pair++) {
                unsigned b[4];
                load_matrices(b, chunk_at<DIM>(stage, pair * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
                multiply(scores[2 * pair], a, b[0], b[1], T());
                multiply(scores[2 * pair + 1], a, b[2], b[3], T());
            }
        }

        // Scores that everyone sees are scaled within the exponential.
        bool all_see_all = plain && first + KEYS <= end && first >= last_query + p.first_visible &&
                           first + KEYS - 1 <= first_query + p.last_visible;
        float scale = all_see_all ? p.scale : 1;
        if (!all_see_all) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // Of the tile's keys, those that causal and window show.
                int64_t low = query[i] + p.first_visible - first, high = query[i] + p.last_visible - first;
                int from = low < 0      ? 0
                           : low > KEYS ? KEYS
                                        : (int)low,
                    to = high < 0      ? -1
                         : high > KEYS ? KEYS
                                       : (int)high;
                if (first + to >= end) to = (int)(end - first) - 1;
                if (row[i] >= rows) to = -1;
                const char *mask = mask_of(p, batch, head[i], query[i]);
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        int key = n * 8 + lane % 4 * 2 + e;
                        float &score = scores[n][2 * i + e];
                        score = capped(p, score);
                        bool sees = key >= from && key <= to && passes_masks(p, score, key_mask, mask, first + key);
                        score = sees ? score : -INFINITY;
                    }
                }
            }
        }

#pragma unroll
        for (int i = 0; i < 2; i++) {
            float now = -INFINITY;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) now = larger(scores[n][2 * i], larger(scores[n][2 * i + 1], now));
            now = larger(__shfl_xor_sync(ALL_LANES, now, 1), now);
            now = larger(__shfl_xor_sync(ALL_LANES, now, 2), now);
            now = larger(now * scale, largest[i]);
            float base = now == -INFINITY ? 0 : now; // infinity - infinity would be NaN
            float factor = exp_of_difference(largest[i], base);
            largest[i] = now;
            sum[i] *= factor;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                scores[n][2 * i] = power_of_2(fmaf(scores[n][2 * i], scale, -base) * LOG2_E);
                scores[n][2 * i + 1] = power_of_2(fmaf(scores[n][2 * i + 1], scale, -base) * LOG2_E);
                sum[i] += scores[n][2 * i] + scores[n][2 * i + 1];
            }
#pragma unroll
            for (int n = 0; n < DIM / 8; n++) values[n][2 * i] *= factor, values[n][2 * i + 1] *= factor;
        }

#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            unsigned a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *c = scores[2 * step + i / 2];
                a[i] = narrow_pair(c[i % 2 * 2], c[i % 2 * 2 + 1], T());
            }
#pragma unroll
            for (int pair = 0; pair < DIM / 16; pair++) {
                unsigned b[4];
                load_transposed(b, chunk_at<DIM>(stage + TILE, step * 16 + lane % 16, pair * 2 + lane / 16));
                multiply(values[2 * pair], a, b[0], b[1], T());
                multiply(values[2 * pair + 1], a, b[2], b[3], T());
            }
        }
        if (WARPS > 1) __syncthreads();
        else __syncwarp();
    }
    copies_wait<0>();

    unsigned wrong = 0; // rows that came out NaN
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
        bool split = p.splits > 1;
        RowEnd end_of_row = {};
        if (row[i] < rows) end_of_row = end_row(p, head[i], largest[i], sum[i], split);
        bool nan = false;
        int64_t part = ((int64_t)blockIdx.z * (p.batch * p.kv_heads) + turn.head) * rows + row[i];
        char *out = (char *)place(p.out, batch, head[i], query[i]);
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int column = n * 8 + lane % 4 * 2 + e;
                float x = values[n][2 * i + e] * end_of_row.factor;
                nan |= x != x && column < p.value_dim;
                if (row[i] >= rows || column >= p.value_dim) continue;
                if (split) p.parts[part * p.value_dim + column] = x;
                else store_float(out + column * p.out.stride[3], p.out.dtype, x);
            }
        }
        if (row[i] < rows && lane % 4 == 0) {
            if (split) p.part_logs[part] = largest[i], p.part_sums[part] = sum[i];
            else if (p.logsumexp.data) *(float *)place(p.logsumexp, batch, head[i], query[i]) = end_of_row.log_sum;
        }
        nan = nan && end_of_row.factor == end_of_row.factor;
        unsigned of_lanes = __ballot_sync(ALL_LANES, nan && row[i] < rows && !split);
        for (int r = 0; r < 8; r++) wrong |= (of_lanes >> 4 * r & 15 ? 1u : 0u) << (r + 8 * i);
    }
    __syncwarp();
    for (; wrong; wrong &= wrong - 1) {
        int64_t in_group, at = divide(first_row + warp * 16 + __ffs(wrong) - 1, p.group, in_group);
        attention_row(p, batch, kv_head * p.group + in_group, at);
    }
}

// Joins the ranges of split keys: a block to a row, a thread to a column and, of so many groups, to its share of the ranges.
constexpr int MERGE_COLUMNS = 64, MERGE_GROUPS = 8; // at most

extern "C" __global__ void __launch_bounds__(MERGE_COLUMNS *MERGE_GROUPS)
    attention_merge(const __grid_constant__ mtl_cuda_attention_args p) {
    __shared__ float joined[MERGE_GROUPS][MERGE_COLUMNS], of_group[MERGE_GROUPS];
    int64_t rows = p.group * p.q_len, all = p.batch * p.kv_heads * rows, at = blockIdx.x, row, in_group, kv_head;
    int64_t batch = divide(divide(at, rows, row), p.kv_heads, kv_head), query = divide(row, p.group, in_group);
    int64_t head = kv_head * p.group + in_group;
    int thread = threadIdx.y * blockDim.x + threadIdx.x;
    wait_for_earlier();
    let_next_start();
    float sink = p.sinks.data ? load_float(p.sinks.data + head * p.sinks.stride, p.sinks.dtype) : -INFINITY;

    float largest = -INFINITY; // every warp finds the same
    for (int split = thread % WARP; split < p.splits; split += WARP)
        largest = larger(p.part_logs[split * all + at], largest);
    largest = larger(over_warp<float, larger>(largest), sink);
    float base = largest == -INFINITY ? 0 : largest;
    bool nan = false;
    for (int64_t column = threadIdx.x; column < (p.value_dim + MERGE_COLUMNS - 1) / MERGE_COLUMNS * MERGE_COLUMNS;
         column += MERGE_COLUMNS) {
        float x = 0, sum = 0;
        int64_t from = column < p.value_dim ? column : 0;
#pragma unroll 8 // so that the loads of several ranges are in flight
        for (int split = threadIdx.y; split < p.splits; split += blockDim.y) {
            float weight = exp_of_difference(p.part_logs[split * all + at], base) * p.part_sums[split * all + at];
            float part = p.parts[(split * all + at) * p.value_dim + from];
            sum += weight;
            x += weight == 0 ? 0 : weight * part;
        }
        __syncthreads();
        joined[threadIdx.y][threadIdx.x] = x;
        if (threadIdx.x == 0) of_group[threadIdx.y] = sum;
        __syncthreads();
        x = 0, sum = sink == INFINITY ? INFINITY : sink == -INFINITY ? 0 : exp_of_difference(sink, base);
        for (int group = 0; group < blockDim.y; group++) x += joined[group][threadIdx.x], sum += of_group[group];
        x = sum == 0 ? 0 : x / sum;
        if (column < p.value_dim) {
            nan |= x != x && sum == sum;
            if (threadIdx.y == 0)
                store_float((char *)place(p.out, batch, head, query) + column * p.out.stride[3], p.out.dtype, x);
        }
        if (thread == 0 && column == 0 && p.logsumexp.data)
            *(float *)place(p.logsumexp, batch, head, query) = sum == 0 ? -INFINITY : largest + logf(sum);
    }
    if (__syncthreads_or(nan) && thread < WARP) attention_row(p, batch, head, query);
}

// A warp to a query: any dtypes, strides and dimensions.
extern "C" __global__ void __launch_bounds__(128) attention_any(const __grid_constant__ mtl_cuda_attention_args p) {
    int64_t rows = p.batch * p.q_heads * p.q_len, warp = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    for (int64_t item = warp; item < rows; item += (int64_t)gridDim.x * blockDim.y) {
        int64_t query, head, batch = divide(divide(item, p.q_len, query), p.q_heads, head);
        attention_row(p, batch, head, query);
    }
}

// A warp copies a row of features.
template <typename T> __device__ inline void append_rows(const mtl_cuda_append_args &p) {
    int64_t warps = (int64_t)gridDim.x * (blockDim.x / WARP);
    for (int64_t row = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) / WARP; row < p.rows; row += warps) {
        int64_t head, time, batch = divide(divide(row, p.heads, head), p.time, time);
        const char *from = place(p.from, batch, head, time);
        char *to = (char *)place(p.to, batch, head, time);
#pragma unroll 4
        for (int64_t i = threadIdx.x % WARP; i < p.features; i += WARP)
            *(T *)(to + i * p.to.stride[3]) = *(const T *)(from + i * p.from.stride[3]);
    }
}
extern "C" __global__ void __launch_bounds__(256) attention_append(const __grid_constant__ mtl_cuda_append_args p) {
    if (p.size == 1) append_rows<uint8_t>(p);
    else if (p.size == 2) append_rows<uint16_t>(p);
    else append_rows<uint32_t>(p);
}

#define ATTENTION_KERNEL(name, type, dim, warps, keys, blocks)       \
    extern "C" __global__ void __launch_bounds__(warps * 32, blocks) \
        name(const __grid_constant__ mtl_cuda_attention_args p) {    \
        attention_tiles<type, dim, warps, keys>(p);                  \
    }
#define ATTENTION_KERNELS(dtype, type)                                 \
    ATTENTION_KERNEL(attention_##dtype##_64, type, 64, 8, 64, 2)       \
    ATTENTION_KERNEL(attention_##dtype##_64_few, type, 64, 1, 64, 8)   \
    ATTENTION_KERNEL(attention_##dtype##_128, type, 128, 8, 64, 1)     \
    ATTENTION_KERNEL(attention_##dtype##_128_few, type, 128, 1, 32, 6) \
    ATTENTION_KERNEL(attention_##dtype##_256, type, 256, 8, 32, 1)     \
    ATTENTION_KERNEL(attention_##dtype##_256_few, type, 256, 1, 32, 3)
ATTENTION_KERNELS(f16, __half)
ATTENTION_KERNELS(bf16, __nv_bfloat16)
