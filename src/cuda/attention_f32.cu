// O = softmax(scale Q K^T + mask) V in float32 arithmetic, for operands of any dtype. SPDX-License-Identifier: MIT
//
//   (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691)
//
// Both products are multiply-adds of tiles in registers: a thread has 8 rows by KEYS / COLUMN_LANES keys of scores, and
// the same 8 rows by DIM / COLUMN_LANES columns of values. A warp owns 8 ROW_LANES rows, so that weights pass from the
// first product to the second through memory that no other warp sees. Keys and values have one place each in shared
// memory: cp.async fills that of the values during the first product, that of the next keys during the second. Operands
// that are not float32 in 16-byte pieces are widened on their way there instead. All heads of a key/value head share a
// block's keys; where rows are few, keys are split over blocks, and attention_merge joins the parts in their order.
//
// A tile's weighted values are summed on their own before they join the row's, so that a long row loses little more
// than a short one, and where some key of a tile is hidden and a NaN comes out, the tile is summed again without the
// keys whose weight is 0: what a hidden key holds changes no bit. A row that is NaN at the end is done again by
// attention_row.
#include "cuda/attention.cuh"
#include "cuda/mma.cuh"

// Whether rows can be copied 16 bytes at a time.
__device__ inline bool in_vectors(const mtl_cuda_strided &operand, int64_t features) {
    int64_t odd = (int64_t)operand.data | operand.stride[0] | operand.stride[1] | operand.stride[2];
    return operand.dtype == F32 && operand.stride[3] == 4 && odd % 16 == 0 && features % 4 == 0;
}

// A tile of rows of DIM floats, zeros where there are none. Its 16-byte chunks are exchanged by the row's last bits, of
// which MASK says how many, so that the lanes that read a column at once find it in different banks. from(row): where
// that row is, or NULL.
template <int DIM, int ROWS, int THREADS, int PITCH, int MASK, typename From>
__device__ inline void widen_rows(float *tile, const mtl_cuda_strided &operand, int features, From from) {
#pragma unroll 1
    for (int at = threadIdx.x; at < ROWS * DIM; at += THREADS) {
        int row = at / DIM, feature = at % DIM;
        const char *start = feature < features ? from(row) : NULL;
        tile[row * PITCH + (feature ^ (row & MASK) * 4)] =
            start ? load_float(start + feature * operand.stride[3], operand.dtype) : 0;
    }
}

__device__ inline float4 load_shared(unsigned at) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(at));
    return x;
}
// By an addition, in a register: a compiler would rather form each address anew, in the units that multiply.
__device__ inline unsigned advanced(unsigned at, unsigned by) {
    at += by;
    asm volatile("" : "+r"(at));
    return at;
}

__device__ inline void add_product(float4 &sum, float weight, float4 x) {
    sum.x = fmaf(weight, x.x, sum.x), sum.y = fmaf(weight, x.y, sum.y);
    sum.z = fmaf(weight, x.z, sum.z), sum.w = fmaf(weight, x.w, sum.w);
}

// Four features of a query by those of several keys.
template <int N> __device__ inline void add_products(float (&sums)[N], float4 a, const float4 (&b)[N]) {
#pragma unroll
    for (int n = 0; n < N; n++) sums[n] = fmaf(a.x, b[n].x, sums[n]);
#pragma unroll
    for (int n = 0; n < N; n++) sums[n] = fmaf(a.y, b[n].y, sums[n]);
#pragma unroll
    for (int n = 0; n < N; n++) sums[n] = fmaf(a.z, b[n].z, sums[n]);
#pragma unroll
    for (int n = 0; n < N; n++) sums[n] = fmaf(a.w, b[n].w, sums[n]);
}

// What a mask adds to the scores of N keys, `step` apart from `at` on, of which bits of `wanted` say which count;
// -infinity where it hides. All loads are on their way before the first is used.
template <int N>
__device__ inline void load_masks(float (&added)[N], const mtl_cuda_attention_args &p, const char *at, int step,
                                  unsigned wanted) {
    int64_t stride = step * p.mask.stride[3];
    auto load = [&](auto of_element) {
#pragma unroll
        for (int j = 0; j < N; j++)
            if (wanted >> j & 1) added[j] = of_element(at + j * stride);
    };
    switch (p.mask.dtype) {
    case BOOL: load([](const char *x) { return *(const uint8_t *)x ? 0 : -INFINITY; }); break;
    case F32: load([](const char *x) { return *(const float *)x; }); break;
    case F16: load([](const char *x) { return __half2float(*(const __half *)x); }); break;
    case BF16: load([](const char *x) { return __bfloat162float(*(const __nv_bfloat16 *)x); }); break;
    default: load([&](const char *x) { return load_float(x, p.mask.dtype); });
    }
}

template <int DIM, int ROW_LANES, int WARPS, int KEYS>
__device__ inline void attention_f32(const mtl_cuda_attention_args &p) {
    constexpr int THREADS = WARPS * WARP, COLUMN_LANES = WARP / ROW_LANES, OWN = 8, ROWS = WARPS * OWN * ROW_LANES;
    constexpr int OWN_KEYS = KEYS / COLUMN_LANES, OWN_COLUMNS = DIM / COLUMN_LANES / 4; // columns in fours
    constexpr bool COMPENSATED = WARPS == 1 && DIM <= 128; // where there are registers for it
    // Keys lie a chunk further apart than they are long, or have their chunks exchanged where that memory is missed.
    constexpr bool PADDED = WARPS > 1;
    constexpr int K_PITCH = PADDED ? DIM + 4 : DIM, Q_MASK = ROW_LANES > 1;
    constexpr int STEPS = 2; // of four features, that the first product is unrolled by
    extern __shared__ __align__(128) float shared[];
    float *v_tile = shared, *q_tile = v_tile + KEYS * DIM, *k_tile = q_tile + ROWS * DIM;
    float *weights = k_tile + KEYS * K_PITCH;

    // Neighbours at a distance of 1 share a row, at a distance of 2 a column: a load of 16 bytes a lane then takes two
    // passes over the banks and not four.
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int row_lane = ROW_LANES == 1 ? 0 : ROW_LANES == 2 ? lane / 2 % 2 : lane / 2 % 2 + lane / 16 * 2;
    int column_lane = ROW_LANES == 1 ? lane : ROW_LANES == 2 ? lane % 2 + lane / 4 * 2 : lane % 2 + lane / 4 % 4 * 2;
    constexpr int OF_ROW = ROW_LANES == 1 ? 31 : ROW_LANES == 2 ? 29 : 13; // the lane's bits that tell columns apart

    Turn turn = turn_of_block(p);
    int64_t kv_head, batch = divide(turn.head, p.kv_heads, kv_head);
    int rows = (int)(p.group * p.q_len), group = (int)p.group;
    int first_row = turn.block * ROWS;
    int last_row = min(first_row + ROWS, rows) - 1, first_query = first_row / group, last_query = last_row / group;

    const char *key_mask = key_mask_of(p, batch);
    KeyRange range = keys_of<KEYS>(p, key_mask, first_query, last_query);
    int64_t begin = range.begin, end = range.end;

    auto meet = [] {
        if (WARPS > 1) __syncthreads();
        else __syncwarp();
    };
    const char *k = place(p.k, batch, kv_head, 0), *v = place(p.v, batch, kv_head, 0);
    bool k_vectors = in_vectors(p.k, p.head_dim), v_vectors = in_vectors(p.v, p.value_dim);
    int key_dim = (int)p.head_dim, value_dim = (int)p.value_dim, laps = (key_dim - 1) / (STEPS * 4) + 1;
    auto fetch_keys = [&](int64_t first) {
        if (first >= end) return;
        if (k_vectors) {
            unsigned tile = (unsigned)__cvta_generic_to_shared(k_tile);
            fetch_tile<2 * DIM, KEYS, THREADS, PADDED ? 2 * K_PITCH : 0>(tile, k, p.k.stride[2], first, p.kv_len,
                                                                         2 * key_dim, 8 * STEPS * laps);
        } else {
            widen_rows<DIM, KEYS, THREADS, K_PITCH, PADDED ? 0 : 7>(k_tile, p.k, (int)p.head_dim, [&](int row) {
                return first + row < p.kv_len ? k + (first + row) * p.k.stride[2] : NULL;
            });
        }
        copies_end();
    };
    auto fetch_values = [&](int64_t first) {
        if (first >= end) return;
        if (v_vectors) {
            unsigned tile = (unsigned)__cvta_generic_to_shared(v_tile);
            fetch_tile<2 * DIM, KEYS, THREADS, 2 * DIM>(tile, v, p.v.stride[2], first, p.kv_len, 2 * value_dim,
                                                        2 * value_dim);
        } else {
            widen_rows<DIM, KEYS, THREADS, DIM, 0>(v_tile, p.v, (int)p.value_dim, [&](int row) {
                return first + row < p.kv_len ? v + (first + row) * p.v.stride[2] : NULL;
            });
        }
        copies_end();
    };
    auto q_row = [&](int row) {
        row += first_row;
        return row < rows ? place(p.q, batch, kv_head * group + row % group, row / group) : NULL;
    };
    if (in_vectors(p.q, p.head_dim)) {
        constexpr int CHUNKS = DIM / 4;
#pragma unroll 4
        for (int i = 0; i < ROWS * CHUNKS / THREADS; i++) {
            int at = i * THREADS + threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
            const char *start = chunk * 4 < p.head_dim ? q_row(row) : NULL;
            float *to = q_tile + row * DIM + (chunk ^ (row & Q_MASK)) * 4;
            copy_async((unsigned)__cvta_generic_to_shared(to), start ? start + chunk * 16 : p.q.data, start);
        }
    } else {
        widen_rows<DIM, ROWS, THREADS, DIM, Q_MASK>(q_tile, p.q, (int)p.head_dim, q_row);
    }
    fetch_keys(begin);
    fetch_values(begin);
    if (begin < end) copies_wait<1>();
    meet();

    // The thread's rows are i ROW_LANES + row_lane of its warp's.
    int warp_row = warp * OWN * ROW_LANES + row_lane;
    unsigned q_rows = (unsigned)__cvta_generic_to_shared(q_tile + warp_row * DIM);
    unsigned k_rows = (unsigned)__cvta_generic_to_shared(k_tile + column_lane * K_PITCH);
    int exchanged = row_lane & Q_MASK; // whether chunks 2 n and 2 n + 1 of the thread's queries are
    float *weight_rows = weights + warp_row * KEYS;
    auto weight_at = [&](int i, int key) {
        return weight_rows + i * ROW_LANES * KEYS + (key ^ row_lane * COLUMN_LANES);
    };
    auto each_score = [&](auto f) {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
#pragma unroll
            for (int j = 0; j < OWN_KEYS; j++) f(i, j, weight_at(i, column_lane + j * COLUMN_LANES));
        }
    };
    bool plain = !p.mask.data && !key_mask && p.softcap == 0 && p.scale > 0;
    float largest[OWN];
    LongSum sum[OWN] = {};
    float4 values[OWN][OWN_COLUMNS] = {}, lost[OWN][OWN_COLUMNS] = {};
#pragma unroll
    for (int i = 0; i < OWN; i++) largest[i] = -INFINITY;

    for (int64_t first = begin, next; first < end; first = next) {
        next = next_tile<KEYS>(p, key_mask, first + KEYS, end);

        float scores[OWN][OWN_KEYS] = {};
        unsigned k_at = k_rows, q_at[2] = {q_rows + exchanged * 16, q_rows + (exchanged ^ 1) * 16};
#pragma unroll 1
        for (int lap = 0; lap < laps; lap++) {
#pragma unroll
            for (int step = 0; step < STEPS; step++) {
                float4 b[OWN_KEYS];
                unsigned keys = PADDED ? k_at + step * 16 : k_rows + ((lap * STEPS + step) ^ (column_lane & 7)) * 16;
#pragma unroll
                for (int j = 0; j < OWN_KEYS; j++) b[j] = load_shared(keys + j * COLUMN_LANES * K_PITCH * 4);
#pragma unroll
                for (int i = 0; i < OWN; i++)
                    add_products(scores[i], load_shared(q_at[step % 2] + step / 2 * 32 + i * ROW_LANES * DIM * 4), b);
            }
            k_at = advanced(k_at, STEPS * 16);
            q_at[0] = advanced(q_at[0], STEPS * 16), q_at[1] = advanced(q_at[1], STEPS * 16);
        }
        copies_wait<0>(); // this tile's values are there
        meet();
        fetch_keys(next);

        bool all_see_all = plain && first + KEYS <= end && first >= last_query + p.first_visible &&
                           first + KEYS - 1 <= first_query + p.last_visible;
        float scale = all_see_all ? p.scale : 1, factor[OWN];
        // Of the tile's keys, those from low to high are shown to a row by causal and window.
        auto shown = [&](int i, int &low, int &high) {
            int row = first_row + warp_row + i * ROW_LANES, query = row / group;
            int64_t from = query + p.first_visible - first, to = query + p.last_visible - first, last = end - 1 - first;
            low = from > 0 ? from < KEYS ? (int)from : KEYS : 0;
            high = row >= rows || to < 0 ? -1 : (int)(to < last ? to : last < KEYS ? last : KEYS);
        };
        if (!all_see_all && plain) {
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                int low, high;
                shown(i, low, high);
#pragma unroll
                for (int j = 0; j < OWN_KEYS; j++) {
                    int key = column_lane + j * COLUMN_LANES;
                    scores[i][j] = key >= low && key <= high ? scores[i][j] * p.scale : -INFINITY;
                }
            }
        } else if (!all_see_all) { // by way of memory: in a loop that is not unrolled
            each_score([&](int i, int j, float *at) { *at = scores[i][j]; });
            unsigned seen = 0; // of the thread's keys, those that the key mask shows
#pragma unroll
            for (int j = 0; j < OWN_KEYS; j++) {
                int64_t key = first + column_lane + j * COLUMN_LANES;
                bool shows = key < end;
                if (shows && key_mask)
                    shows = load_integer(key_mask + key * p.key_mask.stride[1], p.key_mask.dtype) != 0;
                seen |= (unsigned)shows << j;
            }
#pragma unroll 2
            for (int i = 0; i < OWN; i++) {
                int row = first_row + warp_row + i * ROW_LANES, low, high;
                shown(i, low, high);
                float added[OWN_KEYS] = {};
                const char *mask = mask_of(p, batch, kv_head * group + row % group, row / group);
                if (mask && row < rows)
                    load_masks(added, p, mask + (first + column_lane) * p.mask.stride[3], COLUMN_LANES, seen);
#pragma unroll
                for (int j = 0; j < OWN_KEYS; j++) {
                    int key = column_lane + j * COLUMN_LANES;
                    float *at = weight_at(i, key);
                    bool sees = key >= low && key <= high && (seen >> j & 1) && added[j] != -INFINITY;
                    *at = sees ? capped(p, *at) + added[j] : -INFINITY;
                }
            }
            each_score([&](int i, int j, float *at) { scores[i][j] = *at; });
        }
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            float now = scores[i][0];
#pragma unroll
            for (int j = 1; j < OWN_KEYS; j++) now = larger(scores[i][j], now);
#pragma unroll
            for (int bit = 1; bit < WARP; bit *= 2)
                if (OF_ROW & bit) now = larger(__shfl_xor_sync(ALL_LANES, now, bit), now);
            now = larger(now * scale, largest[i]);
            float base = now == -INFINITY ? 0 : now, of_tile = 0; // infinity - infinity would be NaN
            factor[i] = exp_of_difference(largest[i], base);
            largest[i] = now;
#pragma unroll
            for (int j = 0; j < OWN_KEYS; j++) {
                float weight = power_of_2(fmaf(scores[i][j], scale, -base) * LOG2_E);
                of_tile += weight;
                *weight_at(i, column_lane + j * COLUMN_LANES) = weight;
            }
            sum[i].scale(factor[i]);
            sum[i].add(of_tile);
        }
        __syncwarp();

        float4 of_tile[OWN][OWN_COLUMNS] = {};
        float4 of_rows[OWN], b[OWN_COLUMNS];
        const float *v_at = v_tile + column_lane * 4;
#pragma unroll
        for (int i = 0; i < OWN; i++) of_rows[i] = *(const float4 *)weight_at(i, 0);
#pragma unroll
        for (int n = 0; n < OWN_COLUMNS; n++) b[n] = *(const float4 *)(v_at + n * COLUMN_LANES * 4);
#pragma unroll 2
        for (int step = 0; step < KEYS / 4; step++) {
            int next_step = (step + 1) % (KEYS / 4);
#pragma unroll
            for (int key = 0; key < 4; key++) {
                float4 ahead[OWN_COLUMNS];
                v_at += DIM; // in the end a row of queries, which is not used
#pragma unroll
                for (int n = 0; n < OWN_COLUMNS; n++) ahead[n] = *(const float4 *)(v_at + n * COLUMN_LANES * 4);
#pragma unroll
                for (int i = 0; i < OWN; i++) {
#pragma unroll
                    for (int n = 0; n < OWN_COLUMNS; n++)
                        add_product(of_tile[i][n], ((const float *)&of_rows[i])[key], b[n]);
                    if (key == 3) of_rows[i] = *(const float4 *)weight_at(i, next_step * 4);
                }
#pragma unroll
                for (int n = 0; n < OWN_COLUMNS; n++) b[n] = ahead[n];
            }
        }
        bool nan = false;
        if (!all_see_all) {
#pragma unroll
            for (int i = 0; i < OWN; i++) {
#pragma unroll
                for (int n = 0; n < OWN_COLUMNS; n++) {
                    float4 x = of_tile[i][n];
                    bool wrong = x.x != x.x || x.y != x.y || x.z != x.z || x.w != x.w;
                    nan |= wrong && (column_lane + n * COLUMN_LANES) * 4 < value_dim;
                }
            }
        }
        if (__any_sync(ALL_LANES, nan)) { // the same sums in the same order, without the keys of weight 0
#pragma unroll
            for (int i = 0; i < OWN; i++) {
#pragma unroll
                for (int n = 0; n < OWN_COLUMNS; n++) of_tile[i][n] = make_float4(0, 0, 0, 0);
            }
#pragma unroll 1
            for (int key = 0; key < KEYS; key++) {
#pragma unroll
                for (int i = 0; i < OWN; i++) {
                    float weight = *weight_at(i, key);
#pragma unroll
                    for (int n = 0; n < OWN_COLUMNS; n++)
                        if (weight != 0)
                            add_product(of_tile[i][n], weight,
                                        *(const float4 *)(v_tile + key * DIM + (column_lane + n * COLUMN_LANES) * 4));
                }
            }
        }
#pragma unroll
        for (int i = 0; i < OWN; i++) {
#pragma unroll
            for (int n = 0; n < OWN_COLUMNS; n++) {
                float *of_row = (float *)&values[i][n], *rest = (float *)&lost[i][n], *x = (float *)&of_tile[i][n];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    if (COMPENSATED) {
                        LongSum total = {of_row[e], rest[e]};
                        total.scale(factor[i]);
                        total.add(x[e]);
                        of_row[e] = total.value, rest[e] = total.lost;
                    } else {
                        of_row[e] = fmaf(of_row[e], factor[i], x[e]);
                    }
                }
            }
        }
        copies_wait<0>(); // the next tile's keys are there
        meet();
        fetch_values(next);
    }
    copies_wait<0>();

    unsigned wrong = 0; // of the thread's rows, those that came out NaN
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        int row = first_row + warp_row + i * ROW_LANES, query = row / group;
        int64_t head = kv_head * group + row % group;
        float total = sum[i].value;
#pragma unroll
        for (int bit = 1; bit < WARP; bit *= 2)
            if (OF_ROW & bit) total += __shfl_xor_sync(ALL_LANES, total, bit);
        if (row >= rows) continue;
        bool split = p.splits > 1;
        RowEnd end_of_row = end_row(p, head, largest[i], total, split);
        bool nan = false;
        int64_t part = ((int64_t)blockIdx.z * (p.batch * p.kv_heads) + turn.head) * rows + row;
        char *out = (char *)place(p.out, batch, head, query);
#pragma unroll
        for (int n = 0; n < OWN_COLUMNS; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int column = (column_lane + n * COLUMN_LANES) * 4 + e;
                if (column >= p.value_dim) continue;
                float x = ((const float *)&values[i][n])[e] * end_of_row.factor;
                nan |= x != x;
                if (split) p.parts[part * p.value_dim + column] = x;
                else store_float(out + column * p.out.stride[3], p.out.dtype, x);
            }
        }
        if (column_lane == 0) {
            if (split) p.part_logs[part] = largest[i], p.part_sums[part] = total;
            else if (p.logsumexp.data) *(float *)place(p.logsumexp, batch, head, query) = end_of_row.log_sum;
        }
        nan = nan && end_of_row.factor == end_of_row.factor;
        wrong |= (unsigned)(nan && !split) << i;
    }
    for (int of_lane = 0; of_lane < ROW_LANES; of_lane++) {
        unsigned rest = __reduce_or_sync(ALL_LANES, row_lane == of_lane ? wrong : 0);
        for (; rest; rest &= rest - 1) {
            int row = first_row + warp * OWN * ROW_LANES + (__ffs(rest) - 1) * ROW_LANES + of_lane;
            attention_row(p, batch, kv_head * group + row % group, row / group);
        }
    }
}

// For many rows, and for few: decoding, and devices with little shared memory.
#define ATTENTION_KERNEL(name, dim, row_lanes, warps, keys, blocks)  \
    extern "C" __global__ void __launch_bounds__(warps * 32, blocks) \
        name(const __grid_constant__ mtl_cuda_attention_args p) {    \
        attention_f32<dim, row_lanes, warps, keys>(p);               \
    }
ATTENTION_KERNEL(attention_f32_64, 64, 4, 4, 64, 2)
ATTENTION_KERNEL(attention_f32_64_few, 64, 2, 1, 32, 8)
ATTENTION_KERNEL(attention_f32_128, 128, 2, 4, 64, 2)
ATTENTION_KERNEL(attention_f32_128_few, 128, 1, 1, 32, 6)
ATTENTION_KERNEL(attention_f32_256, 256, 1, 8, 64, 1)
ATTENTION_KERNEL(attention_f32_256_few, 256, 1, 1, 32, 3)
