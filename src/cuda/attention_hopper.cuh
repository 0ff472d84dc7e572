// O = softmax(scale Q K^T + mask) V on Hopper's matrix units. SPDX-License-Identifier: MIT
//
//   (Dao et al. 2022, arXiv:2205.14135; Shah et al. 2024, arXiv:2407.08608)
//
// A block has 64 rows of one head for each of its GROUPS groups of four warps. One more group fetches: one thread asks
// the copy engine for tiles of keys and values, two stages ahead. While the matrix units do the scores of the next tile
// and the weighted values of this one, a group's ordinary instructions do the softmax in between: of the two products
// in flight only the scores are waited for. (Blocks that stay, with items dealt out beforehand, were slower: under
// causal items differ, and the hardware deals them out as blocks get free.)
//
// What a key mask or a boolean mask shows is made into bits by the other three warps of the fetching group, ahead of
// the tiles; a tile of which nothing shows is not loaded. Additive masks are read where the scores are.
//
// As in attention.cu a row that comes out NaN is done again by attention_row.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/wgmma.cuh"

constexpr int GROUP = 4 * WARP, GROUP_ROWS = 64, STAGES = 2, MASK_STAGES = 4, MASK_WARPS = 3;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A block's queries, and the tiles of keys that causal and window leave them.
template <int ROWS, int KEYS> struct Item {
    int batch, head, first_query, tiles;
    int64_t begin;

    __device__ Item(const mtl_cuda_attention_args &p) {
        int64_t h;
        batch = (int)divide(blockIdx.y, p.q_heads, h);
        head = (int)h;
        first_query = (int)(gridDim.x - 1 - blockIdx.x) * ROWS; // under causal the last have most to do: they go first
        int64_t last_query = (first_query + ROWS < p.q_len ? first_query + ROWS : p.q_len) - 1;
        int64_t end = last_query + p.last_visible + 1;
        begin = first_query + p.first_visible;
        begin = begin < 0 ? 0 : begin / KEYS * KEYS, end = end > p.kv_len ? p.kv_len : end;
        tiles = end > begin ? (int)((end - begin + KEYS - 1) / KEYS) : 0;
    }
};

// Of 16 bytes, a bit each: whether it is not 0. They are 0 or 1 as a rule, and then a bit costs a multiplication.
__device__ inline unsigned bits_of_bytes(uint4 x) {
    if ((x.x | x.y | x.z | x.w) & 0xfefefefeu)
        x = make_uint4(__vsetgtu4(x.x, 0), __vsetgtu4(x.y, 0), __vsetgtu4(x.z, 0), __vsetgtu4(x.w, 0));
    unsigned low = __dp4a(x.y, 0x80402010u, __dp4a(x.x, 0x08040201u, 0u));
    unsigned high = __dp4a(x.w, 0x80402010u, __dp4a(x.z, 0x08040201u, 0u));
    return low | high << 8;
}

// What is known of a stage of mask bits: some key shows, some does not.
enum { SOME_SHOW = 1, SOME_HIDDEN = 2 };
template <int ROWS, int KEYS> struct MaskStage {
    uint4 bits[ROWS]; // of a row's keys
    int state[4];     // a mask warp's each
};

// The bits of a tile of masks, by one of the MASK_WARPS warps.
template <int ROWS, int KEYS>
__device__ inline void make_bits(const mtl_cuda_attention_args &p, const Item<ROWS, KEYS> &item, int tile, int warp,
                                 MaskStage<ROWS, KEYS> &stage) {
    constexpr int LANES_OF_ROW = KEYS / 16, ROWS_AT_ONCE = WARP / LANES_OF_ROW; // a lane has 16 keys of a row
    int lane = threadIdx.x % WARP, part = lane % LANES_OF_ROW;
    int64_t first = item.begin + (int64_t)tile * KEYS + part * 16;
    const char *key_mask = key_mask_of(p, item.batch);
    bool whole = first - part * 16 + KEYS <= p.kv_len;
    unsigned visible = whole && !key_mask ? 0xffff : 0;
    for (int j = whole && !key_mask ? 16 : 0; j < 16; j++) {
        bool sees = first + j < p.kv_len;
        if (key_mask && sees) sees = load_integer(key_mask + (first + j) * p.key_mask.stride[1], p.key_mask.dtype) != 0;
        visible |= (unsigned)sees << j;
    }
    bool by_rows = p.mask.data && p.mask.dtype == BOOL; // else all rows are alike, and one stands for them
    bool vectors = by_rows && whole && p.mask.stride[3] == 1 &&
                   (((uintptr_t)p.mask.data | p.mask.stride[0] | p.mask.stride[1] | p.mask.stride[2]) & 15) == 0;
    const char *mask = by_rows ? mask_of(p, item.batch, item.head, item.first_query) + first * p.mask.stride[3] : NULL;
    constexpr int BATCH = 6; // rows whose masks are on their way together
    int state = 0;
    for (int from = warp * ROWS_AT_ONCE; from < (by_rows ? ROWS : 1); from += BATCH * MASK_WARPS * ROWS_AT_ONCE) {
        uint4 keys[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int row = from + i * MASK_WARPS * ROWS_AT_ONCE + lane / LANES_OF_ROW;
            bool inside = row < ROWS && item.first_query + row < p.q_len;
            if (vectors) keys[i] = *(const uint4 *)(mask + (inside ? row : 0) * p.mask.stride[2]);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int row = from + i * MASK_WARPS * ROWS_AT_ONCE + lane / LANES_OF_ROW;
            bool inside = row < ROWS && item.first_query + row < p.q_len;
            unsigned own = inside || !by_rows ? visible : 0;
            if (vectors) {
                own &= bits_of_bytes(keys[i]);
            } else if (by_rows && inside) {
                const char *at = mask + (int64_t)row * p.mask.stride[2];
                for (int j = 0; j < 16; j++) {
                    if (own >> j & 1 && *(const uint8_t *)(at + j * p.mask.stride[3]) == 0) own &= ~(1u << j);
                }
            }
            if (inside || !by_rows) state |= (own ? SOME_SHOW : 0) | (own != 0xffff ? SOME_HIDDEN : 0);
            unsigned word = own << part % 2 * 16;
            word |= __shfl_xor_sync(ALL_LANES, word, 1);
            if (row < (by_rows ? ROWS : 1) && part % 2 == 0) ((unsigned *)&stage.bits[row])[part / 2] = word;
        }
    }
    state = __reduce_or_sync(ALL_LANES, state);
    if (lane == 0) stage.state[warp] = state;
}

// A tile of 16-bit features lies as blocks of 64 features, each row of a block 128 bytes.
template <typename T, int KEY_DIM, int VALUE_DIM, int KEYS, int GROUPS, bool MASKED>
__device__ inline void attention_groups(const mtl_cuda_attention_hopper_args &args) {
    const mtl_cuda_attention_args &p = args.attention;
    constexpr int ROWS = GROUPS * GROUP_ROWS, ROW = 128; // bytes of a row of a block
    constexpr int K_BLOCKS = (KEY_DIM + 63) / 64, V_BLOCKS = (VALUE_DIM + 63) / 64;
    constexpr int K_TILE = K_BLOCKS * KEYS * ROW, V_TILE = V_BLOCKS * KEYS * ROW, Q_TILE = K_BLOCKS * ROWS * ROW;
    using Masks = MaskStage<ROWS, KEYS>;
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned q_tile = ((unsigned)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
    unsigned k_tiles = q_tile + Q_TILE, v_tiles = k_tiles + STAGES * K_TILE, masks_at = v_tiles + STAGES * V_TILE;
    Masks *masks = (Masks *)(shared + (masks_at - (unsigned)__cvta_generic_to_shared(shared)));
    __shared__ __align__(8) uint64_t barriers[1 + 4 * STAGES + 2 * MASK_STAGES];
    unsigned q_full = (unsigned)__cvta_generic_to_shared(barriers);
    unsigned k_full = q_full + 8, k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES,
             v_empty = v_full + 8 * STAGES, mask_full = v_empty + 8 * STAGES, mask_empty = mask_full + 8 * MASK_STAGES;

    int group = threadIdx.x / GROUP - 1; // -1 fetches
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
    const Item<ROWS, KEYS> item(p);
    bool bits = MASKED && (p.key_mask.data || (p.mask.data && p.mask.dtype == BOOL));

    if (threadIdx.x == 0) {
        barrier_init(q_full, 1);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(k_full + 8 * i, 1), barrier_init(v_full + 8 * i, 1);
            barrier_init(k_empty + 8 * i, GROUPS * 4), barrier_init(v_empty + 8 * i, GROUPS * 4);
        }
        for (int i = 0; i < MASK_STAGES; i++)
            barrier_init(mask_full + 8 * i, MASK_WARPS), barrier_init(mask_empty + 8 * i, GROUPS * 4 + 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    // Every role goes through the same tiles; `masks_seen` counts them where they have bits.
    unsigned masks_seen = 0;
    auto shows = [&](int state) { return (state & SOME_SHOW) != 0; };
    auto mask_state = [&]() { // of the next tile, once its bits are there
        int stage = masks_seen % MASK_STAGES;
        barrier_wait(mask_full + 8 * stage, masks_seen / MASK_STAGES % 2);
        int state = 0;
#pragma unroll
        for (int i = 0; i < MASK_WARPS; i++) state |= masks[stage].state[i];
        return state;
    };
    auto mask_done = [&](bool arrives) {
        if (arrives) barrier_arrive(mask_empty + 8 * (masks_seen % MASK_STAGES));
        masks_seen++;
    };

    if (group < 0) {
        // Of the registers that the block starts with, 168 or 128 a thread: what is asked for beyond them never comes.
        if constexpr (GROUPS == 3) asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        else if constexpr (MASKED) asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
        else asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (MASKED && warp > 0) {
            if (!bits) return;
            for (int tile = 0; tile < item.tiles; tile++, masks_seen++) {
                int stage = masks_seen % MASK_STAGES;
                barrier_wait(mask_empty + 8 * stage, masks_seen / MASK_STAGES % 2 ^ 1);
                make_bits<ROWS, KEYS>(p, item, tile, warp - 1, masks[stage]);
                __syncwarp();
                if (lane == 0) barrier_arrive(mask_full + 8 * stage);
            }
            return;
        }
        if (threadIdx.x != 0 || item.tiles == 0) return;
        unsigned fetched = 0;
        int kv_head = item.head / (int)p.group;
        barrier_expect(q_full, Q_TILE);
        for (int block = 0; block < K_BLOCKS; block++)
            copy_box(q_tile + block * ROWS * ROW, args.q_map, q_full, block * 64, item.first_query, item.head,
                     item.batch);
        for (int tile = 0; tile < item.tiles; tile++) {
            if (bits) {
                int state = mask_state();
                mask_done(true);
                if (!shows(state)) continue;
            }
            int stage = fetched % STAGES, parity = fetched / STAGES % 2 ^ 1, key = (int)item.begin + tile * KEYS;
            fetched++;
            barrier_wait(k_empty + 8 * stage, parity);
            barrier_expect(k_full + 8 * stage, K_TILE);
            for (int block = 0; block < K_BLOCKS; block++)
                copy_box(k_tiles + stage * K_TILE + block * KEYS * ROW, args.k_map, k_full + 8 * stage, block * 64, key,
                         kv_head, item.batch);
            barrier_wait(v_empty + 8 * stage, parity);
            barrier_expect(v_full + 8 * stage, V_TILE);
            for (int block = 0; block < V_BLOCKS; block++)
                copy_box(v_tiles + stage * V_TILE + block * KEYS * ROW, args.v_map, v_full + 8 * stage, block * 64, key,
                         kv_head, item.batch);
        }
        return;
    }
    if constexpr (GROUPS == 3) asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    else if constexpr (MASKED) asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    else asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");

    // Values in parts of at most 128 columns, as wide as one product.
    constexpr int PART = VALUE_DIM < 128 ? VALUE_DIM : 128, PARTS = VALUE_DIM / PART;
    float scores[KEYS / 2], values[PARTS][PART / 2], largest[2], sum[2], factor[2];
    unsigned weights[KEYS / 4];
    // Where nothing but visibility changes scores they are scaled within the exponential.
    bool biased = MASKED && p.mask.data && p.mask.dtype != BOOL;
    bool simple = !MASKED || (!biased && p.softcap == 0 && p.scale > 0);
    float scale = simple ? p.scale * LOG2_E : 1;
    unsigned multiplied = 0, weighted = 0; // tiles of keys, of values

    auto multiply_keys = [&]() {
        int stage = multiplied % STAGES;
        barrier_wait(k_full + 8 * stage, multiplied / STAGES % 2);
        products_begin();
#pragma unroll
        for (int step = 0; step < KEY_DIM / 16; step++) {
            int block = step / 4, inside = step % 4 * 32;
            multiply_shared(scores, descriptor(q_tile + block * ROWS * ROW + group * GROUP_ROWS * ROW + inside, 16),
                            descriptor(k_tiles + stage * K_TILE + block * KEYS * ROW + inside, 16), step > 0, T());
        }
        products_end();
    };
    auto multiply_values = [&]() {
        int stage = weighted % STAGES;
        barrier_wait(v_full + 8 * stage, weighted / STAGES % 2);
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
    auto keys_done = [&]() {
        if (lane == 0) barrier_arrive(k_empty + 8 * (multiplied % STAGES));
        multiplied++;
    };
    auto values_done = [&]() {
        if (lane == 0) barrier_arrive(v_empty + 8 * (weighted % STAGES));
        weighted++;
    };
    auto take_weights = [&]() {
#pragma unroll
        for (int i = 0; i < KEYS / 4; i++) weights[i] = narrow_pair(scores[2 * i], scores[2 * i + 1], T());
    };
    auto settle_values = [&]() {
#pragma unroll
        for (int part = 0; part < PARTS; part++) settle(values[part]);
    };

    int query[2], group_first = item.first_query + group * GROUP_ROWS, state = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        query[i] = group_first + warp * 16 + lane / 4 + 8 * i;
        largest[i] = -INFINITY, sum[i] = 0;
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
#pragma unroll
        for (int i = 0; i < PART / 2; i++) values[part][i] = 0;
    }

    // The next tile of which something shows, from `tile` on; its bits stay where they are until mask_done.
    auto next_tile = [&](int tile) {
        if (!bits) return tile;
        for (; tile < item.tiles; tile++) {
            state = mask_state();
            if (shows(state)) break;
            mask_done(lane == 0);
        }
        return tile;
    };
    auto softmax = [&](int tile) {
        int64_t first = item.begin + (int64_t)tile * KEYS;
        if (!simple) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const char *mask = biased ? mask_of(p, item.batch, item.head, query[i]) : NULL;
                bool inside = query[i] < p.q_len;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &score = scores[4 * n + 2 * i + e];
                        int64_t key = first + n * 8 + lane % 4 * 2 + e;
                        float changed = capped(p, score);
                        bool sees = inside && key < p.kv_len && passes_masks(p, changed, NULL, mask, key);
                        score = sees ? changed * LOG2_E : -INFINITY;
                    }
                }
            }
        }
        bool all_see_all = first + KEYS <= p.kv_len && first >= group_first + GROUP_ROWS - 1 + p.first_visible &&
                           first + KEYS - 1 <= group_first + p.last_visible;
        if (!all_see_all) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // Of the tile's keys, those that causal and window show, as a lane's: less 2 (lane % 4).
                int64_t low = query[i] + p.first_visible - first, high = query[i] + p.last_visible - first;
                if (first + high >= p.kv_len) high = p.kv_len - first - 1;
                int from = low < 0 ? 0 : low > KEYS ? KEYS : (int)low;
                int to = high < 0 ? -1 : high > KEYS ? KEYS : (int)high;
                if (query[i] >= p.q_len) to = -1;
                from -= lane % 4 * 2, to -= lane % 4 * 2;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        if (n * 8 + e < from || n * 8 + e > to) scores[4 * n + 2 * i + e] = -INFINITY;
                    }
                }
            }
        }
        if (bits) {
            if (state & SOME_HIDDEN) {
                bool by_rows = p.mask.data && p.mask.dtype == BOOL;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int row = by_rows ? group * GROUP_ROWS + warp * 16 + lane / 4 + 8 * i : 0;
                    uint4 of_row = masks[masks_seen % MASK_STAGES].bits[row];
                    unsigned seen[4] = {of_row.x, of_row.y, of_row.z, of_row.w};
#pragma unroll
                    for (int word = 0; word < KEYS / 32; word++) {
                        seen[word] >>= lane % 4 * 2;
#pragma unroll
                        for (int n = 0; n < 4; n++) {
#pragma unroll
                            for (int e = 0; e < 2; e++) {
                                if (!(seen[word] & 1u << (n * 8 + e)))
                                    scores[4 * (word * 4 + n) + 2 * i + e] = -INFINITY;
                            }
                        }
                    }
                }
            }
            __syncwarp();
            mask_done(lane == 0);
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

    if (item.tiles > 0) barrier_wait(q_full, 0);
    int tile = next_tile(0);
    if (tile < item.tiles) {
        multiply_keys();
        products_wait<0>();
        settle(scores);
        keys_done();
        softmax(tile);
        take_weights();
        for (tile = next_tile(tile + 1); tile < item.tiles; tile = next_tile(tile + 1)) {
            multiply_keys();
            settle_values();
            multiply_values();
            products_wait<1>();
            settle(scores);
            keys_done();
            softmax(tile);
            products_wait<0>();
            settle_values();
            values_done();
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
#pragma unroll
                for (int i = 0; i < PART / 2; i++) values[part][i] *= factor[i / 2 % 2];
            }
            take_weights();
        }
        settle_values();
        multiply_values();
        products_wait<0>();
        settle_values();
        values_done();
    }

    unsigned wrong = 0; // rows that came out NaN
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
        bool inside = query[i] < p.q_len;
        float top = largest[i] / LOG2_E, by = 1; // in base e
        if (p.sinks.data) {
            float sink = load_float(p.sinks.data + item.head * p.sinks.stride, p.sinks.dtype) * LOG2_E;
            float now = larger(sink, largest[i]);
            if (now != -INFINITY) {
                by = power_of_2(largest[i] - now);
                sum[i] = sink == INFINITY ? INFINITY : sum[i] * by + power_of_2(sink - now);
                top = now / LOG2_E;
            }
        }
        float inverse = sum[i] == 0 ? 0 : by / sum[i];
        bool nan = sum[i] != sum[i];
        char *out = (char *)place(p.out, item.batch, item.head, query[i]);
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
            *(float *)place(p.logsumexp, item.batch, item.head, query[i]) =
                sum[i] == 0 ? -INFINITY : top + logf(sum[i]);
        unsigned of_lanes = __ballot_sync(ALL_LANES, nan && inside);
        for (int r = 0; r < 8; r++) wrong |= (of_lanes >> 4 * r & 15 ? 1u : 0u) << (r + 8 * i);
    }
    __syncwarp();
    for (; wrong; wrong &= wrong - 1)
        attention_row(p, item.batch, item.head, group_first + warp * 16 + __ffs(wrong) - 1);
}
#define BODY(type, key_dim, value_dim, keys, groups, masked) \
    attention_groups<type, key_dim, value_dim, keys, groups, masked>(args)
#else
#define BODY(type, key_dim, value_dim, keys, groups, masked) // the host takes attention.cu's kernels
#endif

#define ATTENTION_KERNEL(name, type, key_dim, value_dim, keys, groups, masked) \
    extern "C" __global__ void __launch_bounds__((groups + 1) * GROUP, 1)      \
        name(const __grid_constant__ mtl_cuda_attention_hopper_args args) {    \
        BODY(type, key_dim, value_dim, keys, groups, masked);                  \
    }
// Masks take registers, of which three groups of 64 rows leave none.
#define ATTENTION_KERNELS(name, type, masked)                                   \
    ATTENTION_KERNEL(name##_64_64, type, 64, 64, 128, (masked ? 2 : 3), masked) \
    ATTENTION_KERNEL(name##_96_96, type, 96, 96, 128, 2, masked)                \
    ATTENTION_KERNEL(name##_128_128, type, 128, 128, 128, 2, masked)            \
    ATTENTION_KERNEL(name##_192_128, type, 192, 128, 128, 2, masked)            \
    ATTENTION_KERNEL(name##_256_256, type, 256, 256, 64, 2, masked)
