// Attention by mma.sync for head dimensions beyond 256: keys of up to 576, values of up to 512.
// SPDX-License-Identifier: MIT
//
//   (Dao 2023, arXiv:2307.08691; 576 and 512: DeepSeek-AI 2024, arXiv:2405.04434)
//
// One warp's registers cannot hold so long a row. Four warps share 16 TILES rows: each scores a quarter of a tile's
// keys and has a quarter of the values' columns. Between the two products the rows' maxima and the weights, rounded to
// the 16-bit type, pass through shared memory. Keys and values have one place each there: cp.async fills that of the
// values during the first product, that of the next keys during the second. The rest is as in attention.cu: scores and
// sums in float, heads of a key/value head together, keys split where rows are few, rows that come out NaN done again.
#include "cuda/attention.cuh"
#include "cuda/mma.cuh"

constexpr int KEY_DIM = 576, VALUE_DIM = 512, PARTS = 4;

template <typename T, int TILES, int GROUPS, int KEYS>
__device__ inline void attention_wide(const mtl_cuda_attention_args &p) {
    constexpr int THREADS = GROUPS * PARTS * WARP, ROWS = GROUPS * TILES * 16;
    constexpr int OWN_KEYS = KEYS / PARTS, OWN_COLUMNS = VALUE_DIM / PARTS, BLOCKS = OWN_KEYS / 8;
    extern __shared__ __align__(128) unsigned char shared[];
    unsigned q_tile = (unsigned)__cvta_generic_to_shared(shared), k_tile = q_tile + ROWS * KEY_DIM * 2;
    unsigned v_tile = k_tile + KEYS * KEY_DIM * 2, weights = v_tile + KEYS * VALUE_DIM * 2; // of 64 keys a row
    float(*of_part)[ROWS] = (float(*)[ROWS])(shared + (weights - q_tile) + ROWS * 128);
    int *wrong = (int *)of_part[PARTS]; // whether a row came out NaN

    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, part = warp % PARTS,
        group_row = warp / PARTS * TILES * 16;
    Turn turn = turn_of_block(p);
    int64_t kv_head, batch = divide(turn.head, p.kv_heads, kv_head);
    int rows = (int)(p.group * p.q_len), group = (int)p.group;
    int first_row = turn.block * ROWS;
    int last_row = min(first_row + ROWS, rows) - 1, first_query = first_row / group, last_query = last_row / group;

    const char *key_mask = key_mask_of(p, batch);
    KeyRange range = keys_of<KEYS>(p, key_mask, first_query, last_query);
    int64_t begin = range.begin, end = range.end;

    for (int at = threadIdx.x; at < ROWS * (KEY_DIM / 8); at += THREADS) {
        int row = at / (KEY_DIM / 8), chunk = at % (KEY_DIM / 8), of_list = first_row + row;
        bool there = of_list < rows && chunk * 8 < p.head_dim;
        const char *from = place(p.q, batch, kv_head * group + of_list % group, of_list / group) + chunk * 16;
        copy_async(chunk_at<KEY_DIM>(q_tile, row, chunk), there ? from : p.q.data, there);
    }
    const char *k = place(p.k, batch, kv_head, 0), *v = place(p.v, batch, kv_head, 0);
    int key_dim = (int)p.head_dim, value_dim = (int)p.value_dim, pairs = (key_dim + 31) / 32; // of 16 features
    auto fetch_keys = [&](int64_t first) {
        if (first < end)
            fetch_tile<KEY_DIM, KEYS, THREADS>(k_tile, k, p.k.stride[2], first, p.kv_len, key_dim, pairs * 32);
        copies_end();
    };
    auto fetch_values = [&](int64_t first) {
        if (first < end)
            fetch_tile<VALUE_DIM, KEYS, THREADS>(v_tile, v, p.v.stride[2], first, p.kv_len, value_dim, value_dim);
        copies_end();
    };
    fetch_keys(begin);
    if (threadIdx.x < ROWS) wrong[threadIdx.x] = 0;
    fetch_values(begin);
    copies_wait<1>();
    __syncthreads();

    // The lane's rows are those of lane / 4 and lane / 4 + 8 in each tile of its group.
    auto row_at = [&](int tile, int i) { return group_row + tile * 16 + lane / 4 + 8 * i; };
    float values[TILES][OWN_COLUMNS / 8][4] = {}, largest[TILES][2], sum[TILES][2] = {};
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) largest[tile][0] = largest[tile][1] = -INFINITY;
    bool plain = !p.mask.data && !key_mask && p.softcap == 0 && p.scale > 0;

    for (int64_t first = begin, next; first < end; first = next) {
        next = next_tile<KEYS>(p, key_mask, first + KEYS, end);

        float scores[TILES][BLOCKS][4] = {};
#pragma unroll 2
        for (int pair = 0; pair < pairs; pair++) {
            unsigned b[BLOCKS][4];
            if (BLOCKS == 1) {
                load_matrices(b[0], chunk_at<KEY_DIM>(k_tile, part * 8 + lane % 8, pair * 4 + lane / 8));
            } else {
#pragma unroll
                for (int half = 0; half < 2; half++) { // 16 keys by 16 features
                    unsigned of_half[4];
                    load_matrices(of_half, chunk_at<KEY_DIM>(k_tile, part * OWN_KEYS + lane % 8 + lane / 16 * 8,
                                                             pair * 4 + half * 2 + lane / 8 % 2));
#pragma unroll
                    for (int i = 0; i < 4; i++) b[i / 2][2 * half + i % 2] = of_half[i];
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    unsigned a[4];
                    load_matrices(a, chunk_at<KEY_DIM>(q_tile, group_row + tile * 16 + lane % 16,
                                                       pair * 4 + half * 2 + lane / 16));
#pragma unroll
                    for (int n = 0; n < BLOCKS; n++)
                        multiply(scores[tile][n], a, b[n][2 * half], b[n][2 * half + 1], T());
                }
            }
        }

        bool all_see_all = plain && first + KEYS <= end && first >= last_query + p.first_visible &&
                           first + KEYS - 1 <= first_query + p.last_visible;
        float scale = all_see_all ? p.scale : 1; // scores that everyone sees are scaled within the exponential
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (!all_see_all) {
                    int row = first_row + row_at(tile, i), query = row / group;
                    const char *mask = mask_of(p, batch, kv_head * group + row % group, query);
                    int64_t low = query + p.first_visible, high = query + p.last_visible;
                    high = row >= rows ? -1 : high < end ? high : end - 1;
#pragma unroll
                    for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
                        for (int e = 2 * i; e < 2 * i + 2; e++) {
                            int64_t key = first + part * OWN_KEYS + n * 8 + lane % 4 * 2 + e % 2;
                            float &score = scores[tile][n][e];
                            score = capped(p, score);
                            bool sees = key >= low && key <= high && passes_masks(p, score, key_mask, mask, key);
                            score = sees ? score : -INFINITY;
                        }
                    }
                }
                float top = -INFINITY;
#pragma unroll
                for (int n = 0; n < BLOCKS; n++)
                    top = larger(larger(scores[tile][n][2 * i], scores[tile][n][2 * i + 1]), top);
                top = larger(__shfl_xor_sync(ALL_LANES, top, 1), top);
                top = larger(__shfl_xor_sync(ALL_LANES, top, 2), top);
                if (lane % 4 == 0) of_part[part][row_at(tile, i)] = top * scale;
            }
        }
        copies_wait<0>(); // this tile's values are there
        __syncthreads();
        fetch_keys(next);

        bool grown = false;
        float factor[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int row = row_at(tile, i);
                float now = largest[tile][i];
#pragma unroll
                for (int other = 0; other < PARTS; other++) now = larger(of_part[other][row], now);
                float base = now == -INFINITY ? 0 : now; // infinity - infinity would be NaN
                factor[tile][i] = exp_of_difference(largest[tile][i], base);
                grown |= factor[tile][i] != 1;
                largest[tile][i] = now;
                sum[tile][i] *= factor[tile][i];
#pragma unroll
                for (int n = 0; n < BLOCKS; n++) {
                    float *pair = scores[tile][n] + 2 * i;
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        pair[e] = power_of_2(fmaf(pair[e], scale, -base) * LOG2_E);
                        sum[tile][i] += pair[e];
                    }
                    unsigned at = chunk_at<64>(weights, row, part * BLOCKS + n) + lane % 4 * 4;
                    *(unsigned *)(shared + (at - q_tile)) = narrow_pair(pair[0], pair[1], T());
                }
            }
        }
        __syncthreads();

        if (__any_sync(ALL_LANES, grown)) {
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
                for (int n = 0; n < OWN_COLUMNS / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) values[tile][n][e] *= factor[tile][e / 2];
                }
            }
        }
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
            unsigned a[TILES][4];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
                load_matrices(a[tile], chunk_at<64>(weights, group_row + tile * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
            for (int pair = 0; pair < OWN_COLUMNS / 16; pair++) {
                unsigned b[4];
                load_transposed(b, chunk_at<VALUE_DIM>(v_tile, step * 16 + lane % 16,
                                                       part * (OWN_COLUMNS / 8) + pair * 2 + lane / 16));
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    multiply(values[tile][2 * pair], a[tile], b[0], b[1], T());
                    multiply(values[tile][2 * pair + 1], a[tile], b[2], b[3], T());
                }
            }
        }
        copies_wait<0>(); // the next tile's keys are there
        __syncthreads();
        fetch_values(next);
    }
    copies_wait<0>();

#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            sum[tile][i] += __shfl_xor_sync(ALL_LANES, sum[tile][i], 1);
            sum[tile][i] += __shfl_xor_sync(ALL_LANES, sum[tile][i], 2);
            if (lane % 4 == 0) of_part[part][row_at(tile, i)] = sum[tile][i];
        }
    }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int in_block = row_at(tile, i), row = first_row + in_block, query = row / group;
            int64_t head = kv_head * group + row % group;
            float total = 0;
#pragma unroll
            for (int other = 0; other < PARTS; other++) total += of_part[other][in_block];
            if (row >= rows) continue;
            bool split = p.splits > 1;
            RowEnd end_of_row = end_row(p, head, largest[tile][i], total, split);
            bool nan = false;
            int64_t at = ((int64_t)blockIdx.z * (p.batch * p.kv_heads) + turn.head) * rows + row;
            char *out = (char *)place(p.out, batch, head, query);
#pragma unroll
            for (int n = 0; n < OWN_COLUMNS / 8; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int column = part * OWN_COLUMNS + n * 8 + lane % 4 * 2 + e;
                    if (column >= p.value_dim) continue;
                    float x = values[tile][n][2 * i + e] * end_of_row.factor;
                    nan |= x != x;
                    if (split) p.parts[at * p.value_dim + column] = x;
                    else store_float(out + column * p.out.stride[3], p.out.dtype, x);
                }
            }
            if (part == 0 && lane % 4 == 0) {
                if (split) p.part_logs[at] = largest[tile][i], p.part_sums[at] = total;
                else if (p.logsumexp.data) *(float *)place(p.logsumexp, batch, head, query) = end_of_row.log_sum;
            }
            nan = nan && end_of_row.factor == end_of_row.factor;
            if (nan && !split) wrong[in_block] = 1;
        }
    }
    __syncthreads();
    for (int in_block = warp; in_block < ROWS; in_block += THREADS / WARP) {
        int row = first_row + in_block;
        if (wrong[in_block]) attention_row(p, batch, kv_head * group + row % group, row / group);
    }
}

// For many rows; for many where a block has less shared memory, as on compute capability 8.0; for few, and where it has
// least.
#define ATTENTION_KERNEL(name, type, tiles, groups, keys, blocks)            \
    extern "C" __global__ void __launch_bounds__(groups *PARTS * 32, blocks) \
        name(const __grid_constant__ mtl_cuda_attention_args p) {            \
        attention_wide<type, tiles, groups, keys>(p);                        \
    }
#define ATTENTION_KERNELS(dtype, type)                                  \
    ATTENTION_KERNEL(attention_wide_##dtype, type, 2, 2, 64, 1)         \
    ATTENTION_KERNEL(attention_wide_##dtype##_short, type, 2, 2, 32, 1) \
    ATTENTION_KERNEL(attention_wide_##dtype##_few, type, 1, 1, 32, 2)
ATTENTION_KERNELS(f16, __half)
ATTENTION_KERNELS(bf16, __nv_bfloat16)
