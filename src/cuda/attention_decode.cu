// Attention of few queries on Hopper: one pass over the cache, spread over a cluster. SPDX-License-Identifier: MIT
//
//   (Dao et al. 2023, "Flash-Decoding"; the pieces' merge: Milakov & Gimelshein 2018, arXiv:1805.02867)
//
// All queries that share a key/value head, at most 16 rows, go together, so that the cache is read once. Its tiles are
// dealt round to the blocks of a cluster: hidden keys at either end cost all of them alike. In a block one thread asks
// the copy engine for tiles, several ahead; each of a team of four warps takes 16 keys of a tile and has its own maximum,
// sum and weighted values. Two teams take tiles by turns: one multiplies while the other waits. The parts are joined in
// the order of warps, then of blocks, which read each other's shared memory: the same call gives the same bits, nothing
// goes through global memory, and there is no second kernel. Where a head's cluster is too small a part of the GPU, it
// has several, and attention_merge joins those.
#include "cuda/attention.cuh"
#include "cuda/mma.cuh"
#include "cuda/wgmma.cuh"

constexpr int TEAM = 4; // warps
template <int TEAMS> constexpr int THREADS = (TEAMS * TEAM + 1) * WARP;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int ROWS = 16, KEYS = 16 * TEAM, MOST_TILES = 512, MOST_STAGES = 12;

// Of a block's joined rows, by row.
template <int VALUE_DIM> struct Joined { float values[ROWS][VALUE_DIM], largest[ROWS], sum[ROWS]; };

// What some keys give to an element of a row.
struct Part {
    float largest, sum, value;
};

// Of a cluster's blocks, in their order.
template <int BLOCKS> __device__ inline Part join(unsigned of_largest, unsigned of_sum, unsigned of_value) {
    Part parts[BLOCKS], whole = {-INFINITY, 0, 0};
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
        parts[i] = {load_from_block(of_largest, i), load_from_block(of_sum, i), load_from_block(of_value, i)};
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) whole.largest = larger(parts[i].largest, whole.largest);
    float base = whole.largest == -INFINITY ? 0 : whole.largest;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        float weight = exp_of_difference(parts[i].largest, base);
        whole.sum += weight * parts[i].sum;
        whole.value += weight * parts[i].value;
    }
    return whole;
}

// What a key mask of elements of type I shows of a block's tiles, a bit to a key. All loads of some tiles are on their way
// before the first is used.
template <typename I, typename FirstKey>
__device__ inline void find_live(uint2 *live, int tiles, const mtl_cuda_attention_args &p, const char *key_mask,
                                 FirstKey first_key) {
    constexpr int AT_ONCE = 4;
    int lane = threadIdx.x % WARP, step = blockDim.x / WARP;
    for (int tile = threadIdx.x / WARP; tile < tiles; tile += step * AT_ONCE) {
        I low[AT_ONCE] = {}, high[AT_ONCE] = {};
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            if (tile + i * step >= tiles) break;
            int64_t key = first_key(tile + i * step) + lane;
            if (key < p.kv_len) low[i] = *(const I *)(key_mask + key * p.key_mask.stride[1]);
            if (key + WARP < p.kv_len) high[i] = *(const I *)(key_mask + (key + WARP) * p.key_mask.stride[1]);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            uint2 bits = make_uint2(__ballot_sync(ALL_LANES, low[i] != 0), __ballot_sync(ALL_LANES, high[i] != 0));
            if (lane == 0 && tile + i * step < tiles) live[tile + i * step] = bits;
        }
    }
}

// What a mask has for the scores of a lane, as it lies in memory: asked for a tile ahead, made a number of when it counts.
template <typename T> struct LaneMask {
    unsigned raw[2][4];

    __device__ void load(const mtl_cuda_attention_args &p, const char *const (&rows)[2], int64_t first) {
        auto each = [&](auto of_element) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int64_t key = first + j / 2 * 8 + j % 2;
                    if (rows[i] && key < p.kv_len) raw[i][j] = of_element(rows[i] + key * p.mask.stride[3]);
                }
            }
        };
        if (p.mask.dtype == BOOL) each([](const char *at) { return *(const uint8_t *)at; });
        else if (p.mask.dtype == Element<T>::dtype) each([](const char *at) { return *(const uint16_t *)at; });
        else each([&](const char *at) { return __float_as_uint(load_float(at, p.mask.dtype)); });
    }
    __device__ void add_to(float (&scores)[2][4], const mtl_cuda_attention_args &p) const {
        auto each = [&](auto number) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float &score = scores[j / 2][2 * i + j % 2], bias = number(raw[i][j]);
                    score = bias == -INFINITY ? -INFINITY : score + bias;
                }
            }
        };
        if (p.mask.dtype == BOOL) each([](unsigned x) { return x ? 0 : -INFINITY; });
        else if (p.mask.dtype == Element<T>::dtype) each([](unsigned x) { return widen_pair(x, T()).x; });
        else each([](unsigned x) { return __uint_as_float(x); });
    }
};

// 16 bytes of a tile of blocks of 64 features, as the copy engine swizzles it.
__device__ inline unsigned swizzled(unsigned tile, int row, int chunk) {
    return tile + chunk / 8 * KEYS * 128 + row * 128 + (((chunk ^ row) & 7) << 4);
}

// MASKED: by key mask, mask, softcap or a scale that is not positive; else by causal and window alone.
template <typename T, int KEY_DIM, int VALUE_DIM, int TEAMS, bool MASKED>
__device__ inline void attention_decode(const mtl_cuda_attention_hopper_args &args) {
    const mtl_cuda_attention_args &p = args.attention;
    constexpr int WARPS = TEAMS * TEAM, K_TILE = KEYS * KEY_DIM * 2, V_TILE = KEYS * VALUE_DIM * 2,
                  STAGE = K_TILE + V_TILE;
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned stages = ((unsigned)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
    unsigned char *own = shared + (stages - (unsigned)__cvta_generic_to_shared(shared));
    __shared__ __align__(8) uint64_t barriers[2 * MOST_STAGES];
    __shared__ unsigned wrong;                      // rows that came out NaN
    __shared__ uint2 live[MASKED ? MOST_TILES : 1]; // what the key mask shows of a tile of this block
    unsigned full = (unsigned)__cvta_generic_to_shared(barriers), empty = full + 8 * MOST_STAGES;
    int count = args.stages;

    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, rank = blockIdx.x, ranks = gridDim.x;
    int64_t kv_head, batch = divide(blockIdx.y, p.kv_heads, kv_head);
    int rows = (int)(p.group * p.q_len), first_row = blockIdx.z * ROWS, kept = min(rows - first_row, ROWS);
    int group = (int)p.group, first_query = first_row / group, last_query = (first_row + kept - 1) / group;
    // Lengths are below 2^31 - 128 here, so that what is beyond can be cut off, and int suffices.
    auto cut = [](int64_t x) {
        return (int)(x < -INT32_MAX + 64 ? -INT32_MAX + 64 : x > INT32_MAX - 64 ? INT32_MAX - 64 : x);
    };
    int kv_len = (int)p.kv_len, first_visible = cut(p.first_visible), last_visible = cut(p.last_visible);
    int begin = max(first_query + first_visible, 0) / KEYS, end = min(last_query + last_visible + 1, kv_len);
    int all = end > begin * KEYS ? (end + KEYS - 1) / KEYS - begin : 0;
    int tiles = all > rank ? (all - rank + ranks - 1) / ranks : 0; // begin + rank + i ranks
    const char *key_mask = key_mask_of(p, batch);
    // Heads begin at different tiles: at a power of two apart, all would ask the same memory at once.
    int start = tiles ? (int)(blockIdx.y * 5 % tiles) : 0;
    auto first_key = [&](int i) {
        i += start;
        return (begin + rank + (i < tiles ? i : i - tiles) * ranks) * KEYS;
    };

    // The copying warp makes the barriers and asks for tiles before the others have come that far.
    if (threadIdx.x == WARPS * WARP) {
        prefetch_map(args.k_map), prefetch_map(args.v_map);
        for (int i = 0; i < count; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, TEAM);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    wait_for_earlier();
    if (!MASKED) let_next_start(); // else at the end: blocks that wait beside slow those of masked calls
    if (MASKED && key_mask) {
        switch (p.key_mask.dtype) {
        case I16:
        case U16: find_live<uint16_t>(live, tiles, p, key_mask, first_key); break;
        case I32:
        case U32: find_live<uint32_t>(live, tiles, p, key_mask, first_key); break;
        case I64:
        case U64: find_live<uint64_t>(live, tiles, p, key_mask, first_key); break;
        default: find_live<uint8_t>(live, tiles, p, key_mask, first_key);
        }
    }
    __syncthreads();

    auto shows = [&](int tile) { return !MASKED || !key_mask || (live[tile].x | live[tile].y); };

    float values[VALUE_DIM / 8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    if (warp == WARPS) {
        if (lane == 0) {
            int turn = 0, parity = 1;
            for (int i = 0; i < tiles; i++) {
                if (!shows(i)) continue;
                unsigned k_tile = stages + turn * STAGE, v_tile = k_tile + K_TILE;
                barrier_wait(empty + 8 * turn, parity);
                barrier_expect(full + 8 * turn, STAGE);
                for (int block = 0; block < KEY_DIM / 64; block++)
                    copy_box(k_tile + block * KEYS * 128, args.k_map, full + 8 * turn, block * 64, first_key(i),
                             (int)kv_head, (int)batch);
                for (int block = 0; block < VALUE_DIM / 64; block++)
                    copy_box(v_tile + block * KEYS * 128, args.v_map, full + 8 * turn, block * 64, first_key(i),
                             (int)kv_head, (int)batch);
                if (++turn == count) turn = 0, parity ^= 1;
            }
        }
        __syncwarp();
    } else {
        // The lane's two rows, and its part of their queries.
        int query[2];
        const char *mask_rows[2];
        unsigned q[KEY_DIM / 16][4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = first_row + lane / 4 + 8 * i;
            query[i] = row / group;
            const char *from = place(p.q, batch, kv_head * group + row % group, query[i]);
            mask_rows[i] = row < rows ? mask_of(p, batch, kv_head * group + row % group, query[i]) : NULL;
#pragma unroll
            for (int step = 0; step < KEY_DIM / 16; step++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    int feature = step * 16 + half * 8 + lane % 4 * 2;
                    q[step][i + 2 * half] =
                        row < rows && feature < p.head_dim ? *(const unsigned *)(from + feature * 2) : 0;
                }
            }
        }
        // Teams take tiles by turns.
        int turn = TEAMS > 1 ? warp / TEAM : 0, parity = 0, part = TEAMS > 1 ? warp % TEAM : warp;
        auto next_tile = [&](int tile, int steps) { // of those that show something
            for (;; tile++) {
                while (tile < tiles && !shows(tile)) tile++;
                if (tile >= tiles || steps-- == 0) return tile;
            }
        };
        LaneMask<T> mask = {};
        auto load_mask = [&](int tile) {
            if (MASKED && p.mask.data && tile < tiles)
                mask.load(p, mask_rows, first_key(tile) + part * 16 + lane % 4 * 2);
        };
        bool both = kept > 8; // of the lane's rows are there
        int tile = next_tile(0, turn);
        load_mask(tile);
        for (int next; tile < tiles; tile = next) {
            next = next_tile(tile + 1, TEAMS - 1);
            unsigned k_tile = stages + turn * STAGE, v_tile = k_tile + K_TILE;
            int first = first_key(tile) + part * 16;
            barrier_wait(full + 8 * turn, parity);

            float scores[2][4] = {}, odd[2][4] = {}; // in two chains, for the wait between products
#pragma unroll
            for (int step = 0; step < KEY_DIM / 16; step++) {
                unsigned b[4];
                load_matrices(b, swizzled(k_tile, part * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
                multiply(step % 2 ? odd[0] : scores[0], q[step], b[0], b[1], T());
                multiply(step % 2 ? odd[1] : scores[1], q[step], b[2], b[3], T());
            }
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) scores[n][e] += odd[n][e];
            }

            bool inside =
                first + 16 <= end && first >= last_query + first_visible && first + 15 <= first_query + last_visible;
            float scale = !MASKED && inside ? p.scale : 1;
            if (MASKED || !inside) {
#pragma unroll
                for (int n = 0; n < 2; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) scores[n][e] *= p.scale;
                }
                if (MASKED && p.softcap > 0) {
                    float inverse = 1 / p.softcap;
#pragma unroll
                    for (int n = 0; n < 2; n++) {
#pragma unroll
                        for (int e = 0; e < 4; e++) scores[n][e] = p.softcap * quick_tanh(scores[n][e] * inverse);
                    }
                }
                if (MASKED && p.mask.data) {
                    mask.add_to(scores, p);
                    load_mask(next);
                }
                unsigned seen = ~0u; // of the warp's keys
                if (MASKED && key_mask) seen = (part < 2 ? live[tile].x : live[tile].y) >> part % 2 * 16;
#pragma unroll
                for (int n = 0; n < 2; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int at = n * 8 + lane % 4 * 2 + e % 2, row_query = query[e / 2];
                        bool in_range = inside || (first + at < kv_len && first + at >= row_query + first_visible &&
                                                   first + at <= row_query + last_visible);
                        if (!in_range || !(seen >> at & 1)) scores[n][e] = -INFINITY;
                    }
                }
            }

            bool grown = false;
            float factor[2] = {1, 1};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (MASKED && i == 1 && !both) continue; // nothing
                float now = larger(larger(scores[0][2 * i], scores[0][2 * i + 1]),
                                   larger(scores[1][2 * i], scores[1][2 * i + 1]));
                now = larger(__shfl_xor_sync(ALL_LANES, now, 1), now);
                now = larger(__shfl_xor_sync(ALL_LANES, now, 2), now);
                now = larger(now * scale, largest[i]);
                float base = now == -INFINITY ? 0 : now; // infinity - infinity would be NaN
                factor[i] = exp_of_difference(largest[i], base);
                grown |= factor[i] != 1;
                largest[i] = now;
                sum[i] *= factor[i];
#pragma unroll
                for (int n = 0; n < 2; n++) {
#pragma unroll
                    for (int e = 2 * i; e < 2 * i + 2; e++) {
                        scores[n][e] = power_of_2(fmaf(scores[n][e], scale, -base) * LOG2_E);
                        sum[i] += scores[n][e];
                    }
                }
            }
            if (__any_sync(ALL_LANES, grown)) {
#pragma unroll
                for (int n = 0; n < VALUE_DIM / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) values[n][e] *= factor[e / 2];
                }
            }
            unsigned weights[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                weights[i] = narrow_pair(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1], T());
#pragma unroll
            for (int pair = 0; pair < VALUE_DIM / 16; pair++) {
                unsigned b[4];
                load_transposed(b, swizzled(v_tile, part * 16 + lane % 16, pair * 2 + lane / 16));
                multiply(values[2 * pair], weights, b[0], b[1], T());
                multiply(values[2 * pair + 1], weights, b[2], b[3], T());
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + 8 * turn);
            turn += TEAMS;
            if (turn >= count) turn -= count, parity ^= 1;
        }
    }

    // The warps' parts, where the tiles were.
    __syncthreads();
    Joined<VALUE_DIM> *parts = (Joined<VALUE_DIM> *)own, *joined = parts + WARPS;
    if (warp < WARPS) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = lane / 4 + 8 * i;
            sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
            sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
            if (row >= kept) continue;
            if (lane % 4 == 0) parts[warp].largest[row] = largest[i], parts[warp].sum[row] = sum[i];
#pragma unroll
            for (int n = 0; n < VALUE_DIM / 8; n++)
                *(float2 *)&parts[warp].values[row][n * 8 + lane % 4 * 2] =
                    make_float2(values[n][2 * i], values[n][2 * i + 1]);
        }
    }
    if (threadIdx.x == 0) wrong = 0;
    __syncthreads();
    for (int at = threadIdx.x; at < kept * VALUE_DIM; at += THREADS<TEAMS>) {
        int row = at / VALUE_DIM, column = at % VALUE_DIM;
        float top = -INFINITY, x = 0, total = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) top = larger(parts[i].largest[row], top);
        float base = top == -INFINITY ? 0 : top;
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            float weight = exp_of_difference(parts[i].largest[row], base);
            total += weight * parts[i].sum[row];
            x += weight * parts[i].values[row][column];
        }
        joined->values[row][column] = x;
        if (column == 0) joined->largest[row] = top, joined->sum[row] = total;
    }
    if (MASKED) let_next_start();
    int place_in_cluster = (int)cluster_rank(), blocks = (int)cluster_size();
    cluster_sync();

    // The blocks' parts: each block finishes its share of the rows.
    unsigned here = (unsigned)__cvta_generic_to_shared(joined);
    for (int at = threadIdx.x; at < (kept - place_in_cluster + blocks - 1) / blocks * VALUE_DIM; at += THREADS<TEAMS>) {
        int row = place_in_cluster + at / VALUE_DIM * blocks, column = at % VALUE_DIM;
        if (column >= p.value_dim) continue;
        unsigned of_value = here + (unsigned)((char *)&joined->values[row][column] - (char *)joined);
        unsigned of_largest = here + (unsigned)((char *)&joined->largest[row] - (char *)joined);
        unsigned of_sum = of_largest + sizeof joined->largest;
        int64_t head = kv_head * group + (first_row + row) % group, query = (first_row + row) / group;
        bool parted = p.splits > 1;
        float sink =
            !parted && p.sinks.data ? load_float(p.sinks.data + head * p.sinks.stride, p.sinks.dtype) : -INFINITY;
        Part whole = blocks == 1   ? Part{joined->largest[row], joined->sum[row], joined->values[row][column]}
                     : blocks == 2 ? join<2>(of_largest, of_sum, of_value)
                     : blocks == 4 ? join<4>(of_largest, of_sum, of_value)
                     : blocks == 8 ? join<8>(of_largest, of_sum, of_value)
                                   : join<16>(of_largest, of_sum, of_value);
        float top = larger(sink, whole.largest), base = top == -INFINITY ? 0 : top;
        float weight = exp_of_difference(whole.largest, base), total = weight * whole.sum, x = weight * whole.value;
        total = sink == INFINITY ? INFINITY : sink == -INFINITY ? total : total + exp_of_difference(sink, base);
        x *= total == 0 ? 0 : 1 / total;
        float log_sum = total == 0 ? -INFINITY : top + logf(total);
        int64_t split = rank / blocks, part = (split * gridDim.y + blockIdx.y) * rows + first_row + row;
        if (parted) {
            p.parts[part * p.value_dim + column] = x;
            if (column == 0) p.part_logs[part] = top, p.part_sums[part] = total;
            continue;
        }
        store_float((char *)place(p.out, batch, head, query) + column * p.out.stride[3], p.out.dtype, x);
        if (column == 0 && p.logsumexp.data) *(float *)place(p.logsumexp, batch, head, query) = log_sum;
        if (x != x && total == total) atomicOr(&wrong, 1u << row);
    }
    __syncthreads();
    cluster_arrive();
    if (wrong && warp == 0) {
        for (unsigned left = wrong; left; left &= left - 1) {
            int row = first_row + __ffs(left) - 1;
            attention_row(p, batch, kv_head * group + row % group, row / group);
        }
    }
    cluster_wait(); // nobody goes while another reads its memory
}
#define BODY(type, key_dim, value_dim, teams, masked) attention_decode<type, key_dim, value_dim, teams, masked>(args)
#else
#define BODY(type, key_dim, value_dim, teams, masked) // the host takes attention.cu's kernels
#endif

#define ATTENTION_KERNEL(name, type, key_dim, value_dim, teams, blocks, masked) \
    extern "C" __global__ void __launch_bounds__(THREADS<teams>, blocks)        \
        name(const __grid_constant__ mtl_cuda_attention_hopper_args args) {     \
        BODY(type, key_dim, value_dim, teams, masked);                          \
    }
// A multiprocessor has one block, of two teams where registers suffice; or two small ones, of one team each.
#define ATTENTION_KERNELS(name, form, type, masked)                          \
    ATTENTION_KERNEL(name##form##_64_64, type, 64, 64, 2, 1, masked)         \
    ATTENTION_KERNEL(name##form##_128_128, type, 128, 128, 2, 1, masked)     \
    ATTENTION_KERNEL(name##form##_192_128, type, 192, 128, 1, 1, masked)     \
    ATTENTION_KERNEL(name##form##_256_256, type, 256, 256, 1, 1, masked)     \
    ATTENTION_KERNEL(name##_small##form##_64_64, type, 64, 64, 1, 2, masked) \
    ATTENTION_KERNEL(name##_small##form##_128_128, type, 128, 128, 1, 2, masked)
ATTENTION_KERNELS(attention_decode, _f16, __half, false)
ATTENTION_KERNELS(attention_decode, _bf16, __nv_bfloat16, false)
ATTENTION_KERNELS(attention_decode, _masked_f16, __half, true)
ATTENTION_KERNELS(attention_decode, _masked_bf16, __nv_bfloat16, true)
