// O = softmax(scale Q K^T + mask) V on Hopper's matrix units. SPDX-License-Identifier: MIT
//
//   (Dao et al. 2022, arXiv:2205.14135; Shah et al. 2024, arXiv:2407.08608)
//
// A block is three groups of four warps. The first one only fetches: one thread asks the copy engine for tiles of keys
// and values, two stages ahead. The other two have 64 rows of one head each. While the matrix units do the scores of
// the next tile and the weighted values of this one, a group's ordinary instructions do the softmax in between: of the
// two products in flight only the scores are waited for.
//
// As in attention.cu a row that comes out NaN is done again by attention_row.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/wgmma.cuh"

constexpr int GROUP = 4 * WARP, GROUPS = 2, GROUP_ROWS = 64, ROWS = GROUPS * GROUP_ROWS, STAGES = 2;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A row of a boolean mask over KEYS keys, as the lane needs it: bit 8 m + e of bits[c] is key 8 (4 m + c) + 2 (lane %
// 4) + e.
template <int KEYS> __device__ inline void mask_bits(unsigned (&bits)[4], const char *mask, int lane) {
    unsigned own = 0; // of chunks 4 m + lane % 4, a byte each
#pragma unroll
    for (int m = 0; m < KEYS / 32; m++) {
        uint2 keys = mask ? *(const uint2 *)(mask + (4 * m + lane % 4) * 8) : make_uint2(0, 0);
        unsigned low = __dp4a(__vsetgtu4(keys.x, 0), 0x08040201u, 0u),
                 high = __dp4a(__vsetgtu4(keys.y, 0), 0x80402010u, 0u);
        own |= (low | high) << 8 * m;
    }
#pragma unroll
    for (int c = 0; c < 4; c++) bits[c] = __shfl_sync(ALL_LANES, own, (lane & ~3) + c) >> lane % 4 * 2;
}

// A tile of 16-bit features lies as blocks of 64 features, each row of a block 128 bytes.
template <typename T, int KEY_DIM, int VALUE_DIM, int KEYS, bool MASKED>
__device__ inline void attention_groups(const mtl_cuda_attention_hopper_args &args) {
    const mtl_cuda_attention_args &p = args.attention;
    constexpr int ROW = 128; // bytes of a row of a block
    constexpr int K_BLOCKS = KEY_DIM / 64, V_BLOCKS = VALUE_DIM / 64;
    constexpr int K_TILE = K_BLOCKS * KEYS * ROW, V_TILE = V_BLOCKS * KEYS * ROW, Q_TILE = K_BLOCKS * ROWS * ROW;
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned q_tile = ((unsigned)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
    unsigned k_tiles = q_tile + Q_TILE, v_tiles = k_tiles + STAGES * K_TILE;
    __shared__ __align__(8) uint64_t barriers[1 + 4 * STAGES];
    unsigned q_full = (unsigned)__cvta_generic_to_shared(barriers);
    unsigned k_full = q_full + 8, k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES,
             v_empty = v_full + 8 * STAGES;

    int group = threadIdx.x / GROUP - 1; // -1 fetches
    int64_t head64, batch = divide(blockIdx.y, p.q_heads, head64);
    int head = (int)head64, kv_head = (int)(head / p.group);
    int first_query =
        (int)(gridDim.x - 1 - blockIdx.x) * ROWS; // under causal the last rows have most to do: they go first
    int last_query = (int)(first_query + ROWS < p.q_len ? first_query + ROWS : p.q_len) - 1;
    int64_t begin = first_query + p.first_visible, end = last_query + p.last_visible + 1;
    begin = begin < 0 ? 0 : begin / KEYS * KEYS, end = end > p.kv_len ? p.kv_len : end;
    int tiles = end > begin ? (int)((end - begin + KEYS - 1) / KEYS) : 0;

    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(k_full + 8 * i, 1), barrier_init(v_full + 8 * i, 1);
            barrier_init(k_empty + 8 * i, GROUPS * 4), barrier_init(v_empty + 8 * i, GROUPS * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (group < 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x != 0 || tiles == 0) return;
        barrier_expect(q_full, Q_TILE);
        for (int block = 0; block < K_BLOCKS; block++)
            copy_box(q_tile + block * ROWS * ROW, args.q_map, q_full, block * 64, first_query, head, (int)batch);
        for (int tile = 0; tile < tiles; tile++) {
            int stage = tile % STAGES, parity = tile / STAGES % 2 ^ 1, key = (int)begin + tile * KEYS;
            barrier_wait(k_empty + 8 * stage, parity);
            barrier_expect(k_full + 8 * stage, K_TILE);
            for (int block = 0; block < K_BLOCKS; block++)
                copy_box(k_tiles + stage * K_TILE + block * KEYS * ROW, args.k_map, k_full + 8 * stage, block * 64, key,
                         kv_head, (int)batch);
            barrier_wait(v_empty + 8 * stage, parity);
            barrier_expect(v_full + 8 * stage, V_TILE);
            for (int block = 0; block < V_BLOCKS; block++)
                copy_box(v_tiles + stage * V_TILE + block * KEYS * ROW, args.v_map, v_full + 8 * stage, block * 64, key,
                         kv_head, (int)batch);
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");

    // Values in parts of at most 128 columns, as wide as one product.
    constexpr int PART = VALUE_DIM < 128 ? VALUE_DIM : 128, PARTS = VALUE_DIM / PART;
    float scores[KEYS / 2], values[PARTS][PART / 2], largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, factor[2];
    unsigned weights[KEYS / 4];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
#pragma unroll
        for (int i = 0; i < PART / 2; i++) values[part][i] = 0;
    }
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
    int64_t query[2];
#pragma unroll
    for (int i = 0; i < 2; i++) query[i] = first_query + group * GROUP_ROWS + warp * 16 + lane / 4 + 8 * i;
    int64_t group_first = first_query + group * GROUP_ROWS, group_last = group_first + GROUP_ROWS - 1;
    // A boolean mask whose rows are aligned bytes is read eight keys at a time; other masks element by element.
    bool bits = MASKED && p.mask.data && p.mask.dtype == BOOL && p.mask.stride[3] == 1 &&
                (((uintptr_t)p.mask.data | p.mask.stride[0] | p.mask.stride[1] | p.mask.stride[2]) & 7) == 0;
    bool simple = !MASKED || ((!p.mask.data || bits) && !p.key_mask.data && p.softcap == 0 && p.scale > 0);
    bits = bits && simple;

    auto multiply_keys = [&](int tile) {
        int stage = tile % STAGES;
        barrier_wait(k_full + 8 * stage, tile / STAGES % 2);
        products_begin();
#pragma unroll
        for (int step = 0; step < KEY_DIM / 16; step++) {
            int block = step / 4, inside = step % 4 * 32;
            multiply_shared(scores, descriptor(q_tile + block * ROWS * ROW + group * GROUP_ROWS * ROW + inside, 16),
                            descriptor(k_tiles + stage * K_TILE + block * KEYS * ROW + inside, 16), step > 0, T());
        }
        products_end();
    };
    auto multiply_values = [&](int tile) {
        int stage = tile % STAGES;
        barrier_wait(v_full + 8 * stage, tile / STAGES % 2);
        products_begin();
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                unsigned at = v_tiles + stage * V_TILE + part * (PART / 64) * KEYS * ROW + step * 16 * ROW;
                multiply_registers(values[part], weights + 4 * step, descriptor(at, KEYS * ROW), 1, T());
            }
        }
        products_end();
    };
    auto softmax = [&](int tile) {
        int64_t first = begin + tile * KEYS;
        bool all_see_all = first + KEYS <= p.kv_len && first >= group_last + p.first_visible &&
                           first + KEYS - 1 <= group_first + p.last_visible;
        float scale =
            simple ? p.scale * LOG2_E : 1; // where nothing but visibility changes scores, within the exponential
        if (!all_see_all || !simple || bits) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // Of the tile's keys, those that causal and window show, as a lane's: less 2 (lane % 4).
                int64_t low = query[i] + p.first_visible - first, high = query[i] + p.last_visible - first;
                int from = low < 0      ? 0
                           : low > KEYS ? KEYS
                                        : (int)low,
                    to = high < 0      ? -1
                         : high > KEYS ? KEYS
                                       : (int)high;
                if (first + to >= p.kv_len) to = (int)(p.kv_len - first) - 1;
                if (query[i] >= p.q_len) to = -1;
                from -= lane % 4 * 2, to -= lane % 4 * 2;
                const char *mask = MASKED ? mask_of(p, batch, head, query[i]) : NULL;
                if (simple && (!bits || first + KEYS <= p.kv_len)) {
                    unsigned seen[4];
                    if (bits) mask_bits<KEYS>(seen, query[i] < p.q_len ? mask + first : NULL, lane);
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            bool sees = n * 8 + e >= from && n * 8 + e <= to;
                            if (bits) sees = sees && seen[n % 4] >> (n / 4 * 8 + e) & 1;
                            if (!sees) scores[4 * n + 2 * i + e] = -INFINITY;
                        }
                    }
                } else {
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            float &score = scores[4 * n + 2 * i + e];
                            float changed = capped(p, score);
                            bool sees =
                                n * 8 + e >= from && n * 8 + e <= to &&
                                passes_masks(p, changed, key_mask_of(p, batch), mask, first + n * 8 + lane % 4 * 2 + e);
                            if (simple) changed = score; // a boolean mask's last tile
                            else changed *= LOG2_E;
                            score = sees ? changed : -INFINITY;
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float now = -INFINITY;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
                now = larger(scores[4 * n + 2 * i], larger(scores[4 * n + 2 * i + 1], now));
            now = larger(__shfl_xor_sync(ALL_LANES, now, 1), now);
            now = larger(__shfl_xor_sync(ALL_LANES, now, 2), now);
            now = larger(now * scale, largest[i]);
            float base = now == -INFINITY ? 0 : now; // infinity - infinity would be NaN
            factor[i] = power_of_2(largest[i] - base);
            largest[i] = now;
            float of_tile = 0;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                scores[4 * n + 2 * i] = power_of_2(fmaf(scores[4 * n + 2 * i], scale, -base));
                scores[4 * n + 2 * i + 1] = power_of_2(fmaf(scores[4 * n + 2 * i + 1], scale, -base));
                of_tile += scores[4 * n + 2 * i] + scores[4 * n + 2 * i + 1];
            }
            sum[i] = sum[i] * factor[i] + of_tile;
        }
    };
    auto take_weights = [&]() {
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) weights[i] = narrow_pair(scores[2 * i], scores[2 * i + 1], T());
    };
    auto done = [&](unsigned barrier) {
        if (lane == 0) barrier_arrive(barrier);
    };
    auto settle_values = [&]() {
#pragma unroll
        for (int part = 0; part < PARTS; part++) settle(values[part]);
    };

    if (tiles > 0) {
        barrier_wait(q_full, 0);
        multiply_keys(0);
        products_wait<0>();
        settle(scores);
        done(k_empty);
        softmax(0);
        take_weights();
        for (int tile = 1; tile < tiles; tile++) {
            multiply_keys(tile);
            settle_values();
            multiply_values(tile - 1);
            products_wait<1>();
            settle(scores);
            done(k_empty + 8 * (tile % STAGES));
            softmax(tile);
            products_wait<0>();
            settle_values();
            done(v_empty + 8 * ((tile - 1) % STAGES));
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
#pragma unroll
                for (int i = 0; i < PART / 2; i++) values[part][i] *= factor[i / 2 % 2];
            }
            take_weights();
        }
        settle_values();
        multiply_values(tiles - 1);
        products_wait<0>();
        settle_values();
    }

    unsigned wrong = 0; // rows that came out NaN
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
        bool inside = query[i] < p.q_len;
        float top = largest[i] / LOG2_E, by = 1; // in base e
        if (p.sinks.data) {
            float sink = load_float(p.sinks.data + head * p.sinks.stride, p.sinks.dtype) * LOG2_E;
            float now = larger(sink, largest[i]);
            if (now != -INFINITY) {
                by = power_of_2(largest[i] - now);
                sum[i] = sink == INFINITY ? INFINITY : sum[i] * by + power_of_2(sink - now);
                top = now / LOG2_E;
            }
        }
        float inverse = sum[i] == 0 ? 0 : by / sum[i];
        bool nan = sum[i] != sum[i];
        char *out = (char *)place(p.out, batch, head, query[i]);
        bool pairs = p.out.dtype == Element<T>::dtype && p.out.stride[3] == 2 && ((uintptr_t)out & 3) == 0;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
#pragma unroll
            for (int n = 0; n < PART / 8; n++) {
                int column = part * PART + n * 8 + lane % 4 * 2;
                float x = values[part][4 * n + 2 * i] * inverse, y = values[part][4 * n + 2 * i + 1] * inverse;
                if (!inside || column >= p.value_dim) continue;
                nan |= x != x || y != y;
                if (pairs) {
                    *(unsigned *)(out + column * 2) = narrow_pair(x, y, T());
                } else {
                    store_float(out + column * p.out.stride[3], p.out.dtype, x);
                    store_float(out + (column + 1) * p.out.stride[3], p.out.dtype, y);
                }
            }
        }
        if (inside && lane % 4 == 0 && p.logsumexp.data)
            *(float *)place(p.logsumexp, batch, head, query[i]) = sum[i] == 0 ? -INFINITY : top + logf(sum[i]);
        unsigned of_lanes = __ballot_sync(ALL_LANES, nan && inside);
        for (int r = 0; r < 8; r++) wrong |= (of_lanes >> 4 * r & 15 ? 1u : 0u) << (r + 8 * i);
    }
    __syncwarp();
    for (; wrong; wrong &= wrong - 1) attention_row(p, batch, head, group_first + warp * 16 + __ffs(wrong) - 1);
}
#define BODY(type, key_dim, value_dim, keys, masked) attention_groups<type, key_dim, value_dim, keys, masked>(args)
#else
#define BODY(type, key_dim, value_dim, keys, masked) // the host takes attention.cu's kernels
#endif

#define ATTENTION_KERNEL(name, type, key_dim, value_dim, keys, masked)      \
    extern "C" __global__ void __launch_bounds__((GROUPS + 1) * GROUP, 1)   \
        name(const __grid_constant__ mtl_cuda_attention_hopper_args args) { \
        BODY(type, key_dim, value_dim, keys, masked);                       \
    }
#define ATTENTION_KERNELS(name, type, masked)                     \
    ATTENTION_KERNEL(name##_64_64, type, 64, 64, 128, masked)     \
    ATTENTION_KERNEL(name##_128_128, type, 128, 128, 128, masked) \
    ATTENTION_KERNEL(name##_192_128, type, 192, 128, 128, masked) \
    ATTENTION_KERNEL(name##_256_256, type, 256, 256, 64, masked)
