// O = softmax(scale Q K^T + mask) V on Hopper's matrix units. SPDX-License-Identifier: MIT
//
//   (Dao et al. 2022, arXiv:2205.14135; Shah et al. 2024, arXiv:2407.08608)
//
// A block has 64 rows of one head for each of its two groups of four warps. One more group fetches: one thread takes
// items of 128 rows off a common counter, as blocks get free, and asks the copy engine for their tiles of keys and
// values, some stages ahead, the next item's under the end of this one. While the matrix units do the scores of the next
// tile and the weighted values of this one, a group's ordinary instructions do the softmax in between: of the two
// products in flight only the scores are waited for.
//
// Numerics: a row's weights are relative to the maximum of its first tile, for as long as that leaves them small
// (MOST); only then is a new maximum looked for. A sum of them and a comparison find that out, with no maximum and no
// exchange between lanes in the usual tile. Weights round to the inputs' dtype, sums are float.
//
// What a key mask or a boolean mask shows is made into bits by the other three warps of the fetching group, ahead of
// the tiles; a tile of which nothing shows is not loaded. Additive masks are read while scores are multiplied.
//
// As in attention.cu a row that comes out NaN is done again by attention_row.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/wgmma.cuh"

constexpr float MOST = 4096; // sum of a lane's weights of a row and tile: float16 goes to 65504
constexpr int GROUP = 4 * WARP, GROUP_ROWS = 64, GROUPS = 2, ROWS = GROUPS * GROUP_ROWS, STAGES = 2, MASK_STAGES = 4,
              MASK_WARPS = 3;

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Some queries, and the tiles of keys that causal and window leave them. Lengths are below 2^30 here, so that what is
// beyond it can be cut off, and int suffices.
template <int KEYS> struct Item {
    int batch, head, first_query, begin, tiles, first_visible, last_visible, kv_len;

    __device__ static int cut(int64_t x) { return (int)(x < -(1 << 30) ? -(1 << 30) : x > 1 << 30 ? 1 << 30 : x); }
    __device__ Item(const mtl_cuda_attention_args &p, unsigned index)
        : first_visible(cut(p.first_visible)), last_visible(cut(p.last_visible)), kv_len((int)p.kv_len) {
        int q_len = (int)p.q_len;
        unsigned heads = (unsigned)p.q_heads, blocks = (unsigned)(q_len + ROWS - 1) / ROWS, of_all = index / blocks;
        batch = (int)(of_all / heads), head = (int)(of_all % heads);
        first_query = (int)(blocks - 1 - index % blocks) * ROWS; // under causal the last have most to do: they go first
        int last_query = min(first_query + ROWS, q_len) - 1, end = min(max(last_query + last_visible + 1, 0), kv_len);
        begin = max(first_query + first_visible, 0) / KEYS * KEYS;
        tiles = end > begin ? (end - begin + KEYS - 1) / KEYS : 0;
    }
};

// To about 2^-22, which is enough for what is added to scores.
__device__ inline float quick_tanh(float x) { return 1 - __fdividef(2, 1 + power_of_2(2 * LOG2_E * x)); }

__device__ inline float2 widen_pair(unsigned x, __half) { return __half22float2(*(const __half2 *)&x); }
__device__ inline float2 widen_pair(unsigned x, __nv_bfloat16) {
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}

// 16 bytes that are 0 or not: the bits of bytes 2i, 2i + 1, 2i + 8 and 2i + 9 in byte i's lower half.
__device__ inline unsigned bits_of_bytes(uint4 x) {
    if ((x.x | x.y | x.z | x.w) & 0xfefefefeu) // they are 0 or 1 as a rule
        x = make_uint4(__vsetgtu4(x.x, 0), __vsetgtu4(x.y, 0), __vsetgtu4(x.z, 0), __vsetgtu4(x.w, 0));
    unsigned low = x.x | x.z << 2, high = x.y | x.w << 2; // bytes of lanes 0 0 1 1, and of 2 2 3 3
    low |= low >> 7, high |= high >> 7;
    return __byte_perm(low, high, 0x6420) & 0x0f0f0f0fu;
}

// Beyond causal and window: nothing; keys hidden by a key mask or a boolean mask; and scores changed by an additive mask,
// a cap or a scale that is not positive.
enum Kind { PLAIN, HIDDEN, CHANGED };

// What is known of a stage of mask bits: some key shows, some does not.
enum { SOME_SHOW = 1, SOME_HIDDEN = 2 };
struct MaskStage {
    unsigned bits[ROWS][4]; // of a row's keys: of every eight, two to each of the four lanes that have the row's scores
    int state[4];           // a mask warp's each
};

// The part of an item's masks that one of the MASK_WARPS warps makes bits of: of some rows all keys of a tile.
template <int KEYS> struct MaskPart {
    static constexpr int LANES_OF_ROW = KEYS / 16, ROWS_AT_ONCE = WARP / LANES_OF_ROW; // a lane has 16 keys of a row
    static constexpr int STEP = MASK_WARPS * ROWS_AT_ONCE, PASSES = (ROWS + STEP - 1) / STEP;
    static constexpr unsigned ALL = 0x0f0f0f0fu;
    const mtl_cuda_attention_args &p;
    const Item<KEYS> &item;
    const char *key_mask, *mask; // mask: of the lane's first row and key 0
    int part, first_row;
    bool by_rows, vectors; // all rows are alike, and one stands for them, where there is no boolean mask

    __device__ MaskPart(const mtl_cuda_attention_args &p, const Item<KEYS> &item, int warp)
        : p(p), item(item), key_mask(key_mask_of(p, item.batch)), part(threadIdx.x % LANES_OF_ROW),
          first_row(warp * ROWS_AT_ONCE + threadIdx.x % WARP / LANES_OF_ROW),
          by_rows(p.mask.data && p.mask.dtype == BOOL) {
        mask = by_rows ? mask_of(p, item.batch, item.head, item.first_query + first_row) : NULL;
        vectors = by_rows && p.mask.stride[3] == 1 &&
                  (((uintptr_t)p.mask.data | p.mask.stride[0] | p.mask.stride[1] | p.mask.stride[2]) & 15) == 0;
    }
    __device__ int first_key(int tile) const { return item.begin + tile * KEYS + part * 16; }
    __device__ bool inside(int pass) const {
        int row = first_row + pass * STEP;
        return row < ROWS && item.first_query + row < p.q_len;
    }
    __device__ bool by_vectors(int tile) const {
        return vectors && tile < item.tiles && first_key(tile) + 16 <= item.kv_len;
    }

    // Asks for the bytes of a tile, where vectors serve.
    __device__ void load(uint4 (&bytes)[PASSES], int tile) const {
        const char *at = mask + first_key(tile);
        bool there = by_vectors(tile);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            bytes[pass] = make_uint4(0, 0, 0, 0);
            if (there && inside(pass)) bytes[pass] = *(const uint4 *)(at + (int64_t)pass * STEP * p.mask.stride[2]);
        }
    }
    __device__ void make_bits(const uint4 (&bytes)[PASSES], int tile, int warp, MaskStage &stage) const {
        int first = first_key(tile);
        unsigned visible = ALL;
        if (key_mask || first + 16 > item.kv_len) {
            visible = 0;
            for (int j = 0; j < 16; j++) {
                bool sees = first + j < item.kv_len;
                if (key_mask && sees)
                    sees = load_integer(key_mask + (first + j) * p.key_mask.stride[1], p.key_mask.dtype) != 0;
                visible |= (unsigned)sees << bit_of_key(j);
            }
        }
        bool there = by_vectors(tile);
        int state = 0;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            int row = first_row + pass * STEP;
            bool counts = by_rows ? inside(pass) : row == 0;
            unsigned own = counts ? visible : 0;
            if (there) {
                own &= bits_of_bytes(bytes[pass]);
            } else if (by_rows && counts) {
                const char *at = mask + (int64_t)pass * STEP * p.mask.stride[2] + first * p.mask.stride[3];
                for (int j = 0; j < 16; j++) {
                    unsigned bit = 1u << bit_of_key(j);
                    if (own & bit && *(const uint8_t *)(at + j * p.mask.stride[3]) == 0) own &= ~bit;
                }
            }
            if (counts) state |= (own ? SOME_SHOW : 0) | (own != ALL ? SOME_HIDDEN : 0);
            own |= __shfl_down_sync(ALL_LANES, own, 1) << 4;
            if (row < ROWS && part % 2 == 0) {
                unsigned char *to = (unsigned char *)stage.bits[row] + part / 2;
                to[0] = own, to[4] = own >> 8, to[8] = own >> 16, to[12] = own >> 24;
            }
            if (!by_rows) break;
        }
        state = __reduce_or_sync(ALL_LANES, state);
        if (threadIdx.x % WARP == 0) stage.state[warp] = state;
    }
    // Where a lane's key has its bit among what bits_of_bytes makes.
    __device__ static int bit_of_key(int j) { return j % 8 / 2 * 8 + j % 2 + j / 8 * 2; }
};

// A tile of 16-bit features lies as blocks of 64 features, each row of a block 128 bytes.
template <typename T, int KEY_DIM, int VALUE_DIM, int KEYS, Kind KIND>
__device__ inline void attention_groups(const mtl_cuda_attention_hopper_args &args) {
    constexpr bool MASKED = KIND != PLAIN;
    // Registers of a fetching thread; three groups have 504 a thread of each together.
    constexpr int FETCHING = MASKED ? 104 : 40, BLOCK_REGISTERS = 504;
    const mtl_cuda_attention_args &p = args.attention;
    // Groups take turns where the softmax takes as long as the products; elsewhere they find their places themselves.
    constexpr bool TURNS = KEY_DIM <= 64;
    constexpr int ROW = 128; // bytes of a row of a block
    constexpr int K_BLOCKS = (KEY_DIM + 63) / 64, V_BLOCKS = (VALUE_DIM + 63) / 64;
    constexpr int K_TILE = K_BLOCKS * KEYS * ROW, V_TILE = V_BLOCKS * KEYS * ROW, Q_TILE = K_BLOCKS * ROWS * ROW;
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned q_tile = ((unsigned)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
    unsigned k_tiles = q_tile + Q_TILE, v_tiles = k_tiles + STAGES * K_TILE, masks_at = v_tiles + STAGES * V_TILE;
    MaskStage *masks = (MaskStage *)(shared + (masks_at - (unsigned)__cvta_generic_to_shared(shared)));
    __shared__ unsigned item_taken[STAGES];
    __shared__ __align__(8) uint64_t barriers[2 + 6 * STAGES + 2 * MASK_STAGES];
    unsigned q_full = (unsigned)__cvta_generic_to_shared(barriers), q_empty = q_full + 8;
    unsigned item_full = q_empty + 8, item_empty = item_full + 8 * STAGES;
    unsigned k_full = item_empty + 8 * STAGES, k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES,
             v_empty = v_full + 8 * STAGES, mask_full = v_empty + 8 * STAGES, mask_empty = mask_full + 8 * MASK_STAGES;

    int group = __shfl_sync(ALL_LANES, threadIdx.x / GROUP, 0) - 1; // -1 fetches
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
    const unsigned items = args.items;
    bool bits = MASKED && (p.key_mask.data || (p.mask.data && p.mask.dtype == BOOL));

    if (threadIdx.x == 0) {
        barrier_init(q_full, 1), barrier_init(q_empty, GROUPS * 4);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(item_full + 8 * i, 1), barrier_init(item_empty + 8 * i, GROUPS * 4 + (bits ? MASK_WARPS : 0));
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

    // What the fetching thread took: the same items for all roles, and at last one that is not there.
    unsigned taken = 0;
    auto next_item = [&]() {
        int stage = taken % STAGES;
        barrier_wait(item_full + 8 * stage, taken++ / STAGES % 2);
        unsigned index = item_taken[stage];
        __syncwarp();
        if (lane == 0) barrier_arrive(item_empty + 8 * stage);
        return index;
    };

    if (group < 0) {
        // Of the registers that the block starts with, 168 a thread: what is asked for beyond them never comes.
        give_registers<FETCHING>();
        if (MASKED && warp > 0) {
            if (!bits) return;
            for (unsigned index; (index = next_item()) < items;) {
                const Item<KEYS> item(p, index);
                const MaskPart<KEYS> part(p, item, warp - 1);
                uint4 bytes[part.PASSES], next[part.PASSES];
                part.load(bytes, 0);
                for (int tile = 0; tile < item.tiles; tile++, masks_seen++) {
                    int stage = masks_seen % MASK_STAGES;
                    part.load(next, tile + 1);
                    barrier_wait(mask_empty + 8 * stage, masks_seen / MASK_STAGES % 2 ^ 1);
                    part.make_bits(bytes, tile, warp - 1, masks[stage]);
                    __syncwarp();
                    if (lane == 0) barrier_arrive(mask_full + 8 * stage);
#pragma unroll
                    for (int i = 0; i < part.PASSES; i++) bytes[i] = next[i];
                }
            }
            return;
        }
        if (threadIdx.x != 0) return;
        unsigned fetched = 0, worked = 0;
        for (;; taken++) {
            unsigned index = taken == 0 ? blockIdx.x : args.next ? gridDim.x + atomicAdd(args.next, 1u) : items;
            barrier_wait(item_empty + 8 * (taken % STAGES), taken / STAGES % 2 ^ 1);
            item_taken[taken % STAGES] = index;
            barrier_arrive(item_full + 8 * (taken % STAGES));
            if (index >= items) return;
            const Item<KEYS> item(p, index);
            int kv_head = item.head / (int)p.group;
            bool queries = false; // are on their way
            for (int tile = 0; tile < item.tiles; tile++) {
                if (bits) {
                    int state = mask_state();
                    mask_done(true);
                    if (!shows(state)) continue;
                }
                int stage = fetched % STAGES, parity = fetched / STAGES % 2 ^ 1, key = item.begin + tile * KEYS;
                fetched++;
                barrier_wait(k_empty + 8 * stage, parity);
                barrier_expect(k_full + 8 * stage, K_TILE);
                for (int block = 0; block < K_BLOCKS; block++)
                    copy_box(k_tiles + stage * K_TILE + block * KEYS * ROW, args.k_map, k_full + 8 * stage, block * 64,
                             key, kv_head, item.batch);
                if (!queries) {
                    queries = true;
                    barrier_wait(q_empty, worked++ % 2 ^ 1);
                    barrier_expect(q_full, Q_TILE);
                    for (int block = 0; block < K_BLOCKS; block++)
                        copy_box(q_tile + block * ROWS * ROW, args.q_map, q_full, block * 64, item.first_query,
                                 item.head, item.batch);
                }
                barrier_wait(v_empty + 8 * stage, parity);
                barrier_expect(v_full + 8 * stage, V_TILE);
                for (int block = 0; block < V_BLOCKS; block++)
                    copy_box(v_tiles + stage * V_TILE + block * KEYS * ROW, args.v_map, v_full + 8 * stage, block * 64,
                             key, kv_head, item.batch);
            }
        }
    }
    take_registers<(BLOCK_REGISTERS - FETCHING) / GROUPS>();

    // Values in parts of at most 128 columns, as wide as one product.
    constexpr int PART = VALUE_DIM < 128 ? VALUE_DIM : 128, PARTS = VALUE_DIM / PART;
    float scores[KEYS / 2], values[PARTS][PART / 2], largest[2], sum[2], factor[2];
    unsigned weights[2][KEYS / 4] = {};                   // of a tile that is being multiplied, and of the next
    float scale = KIND == CHANGED ? 1 : p.scale * LOG2_E; // within the exponential
    unsigned multiplied = 0, weighted = 0;                // tiles of keys, of values

    uint64_t queries = descriptor(q_tile + group * GROUP_ROWS * ROW, 16);
    auto multiply_keys = [&]() {
        int stage = multiplied % STAGES;
        barrier_wait(k_full + 8 * stage, multiplied / STAGES % 2);
        uint64_t keys = descriptor(k_tiles + stage * K_TILE, 16);
        products_begin();
#pragma unroll
        for (int step = 0; step < KEY_DIM / 16; step++) {
            int block = step / 4, inside = step % 4 * 32;
            multiply_shared(scores, queries + ((block * ROWS * ROW + inside) >> 4),
                            keys + ((block * KEYS * ROW + inside) >> 4), step > 0, T());
        }
        products_end();
    };
    auto multiply_values = [&](const unsigned(&weights)[KEYS / 4]) {
        int stage = weighted % STAGES;
        barrier_wait(v_full + 8 * stage, weighted / STAGES % 2);
        uint64_t tile_of_values = descriptor(v_tiles + stage * V_TILE, KEYS * ROW);
        products_begin();
#pragma unroll
        for (int step = 0; step < KEYS / 16; step++) {
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
                multiply_registers(values[part], weights + 4 * step,
                                   tile_of_values + ((part * (PART / 64) * KEYS * ROW + step * 16 * ROW) >> 4), 1, T());
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
    auto settle_values = [&]() {
#pragma unroll
        for (int part = 0; part < PARTS; part++) settle(values[part]);
    };

    // Turns at the matrix units.
    auto await_turn = [&]() {
        if (TURNS) asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
    };
    auto end_turn = [&]() {
        if (TURNS) asm volatile("bar.arrive %0, 256;" ::"r"(1 + (group + 1) % GROUPS) : "memory");
    };
    if (group == GROUPS - 1) end_turn();
    unsigned worked = 0; // items
    unsigned added_pairs[2][KEYS / 8];
    bool added = KIND == CHANGED && p.mask.data && p.mask.dtype != BOOL, pairs = false;
    for (unsigned index; (index = next_item()) < items;) {
        const Item<KEYS> item(p, index);
        int query[2], group_first = item.first_query + group * GROUP_ROWS, state = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            query[i] = group_first + warp * 16 + lane / 4 + 8 * i;
            largest[i] = query[i] < p.q_len ? -INFINITY : 0, sum[i] = 0;
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
        // An additive mask's values for a tile, asked for while its scores are being multiplied, where pairs serve.
        auto load_added = [&](int tile) {
            if (KIND != CHANGED || !added) return;
            int first = item.begin + tile * KEYS;
            pairs = p.mask.dtype == Element<T>::dtype && p.mask.stride[3] == (int)sizeof(T) &&
                    first + KEYS <= item.kv_len &&
                    (((uintptr_t)p.mask.data | p.mask.stride[0] | p.mask.stride[1] | p.mask.stride[2]) & 3) == 0;
            if (!pairs) return;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int row = query[i] < p.q_len ? query[i] : 0;
                const char *at = mask_of(p, item.batch, item.head, row) + (first + lane % 4 * 2) * (int)sizeof(T);
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) added_pairs[i][n] = *(const unsigned *)(at + n * 8 * sizeof(T));
            }
        };
        // Scores as the softmax takes them, by base 2: scaled, capped, with the mask added.
        auto change = [&](int first) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const char *mask =
                    added && !pairs && query[i] < p.q_len ? mask_of(p, item.batch, item.head, query[i]) : NULL;
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) {
                    float2 bias = pairs ? widen_pair(added_pairs[i][n], T()) : make_float2(0, 0);
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float &score = scores[4 * n + 2 * i + e], of_key = e ? bias.y : bias.x;
                        int key = first + n * 8 + lane % 4 * 2 + e;
                        if (mask && key < item.kv_len) of_key = load_float(mask + key * p.mask.stride[3], p.mask.dtype);
                        float changed = score * p.scale;
                        if (p.softcap > 0) changed = p.softcap * quick_tanh(changed / p.softcap);
                        score = of_key == -INFINITY ? -INFINITY : (changed + of_key) * LOG2_E;
                    }
                }
            }
        };
        auto hide = [&](int tile) {
            int first = item.begin + tile * KEYS;
            if constexpr (KIND == CHANGED) change(first);
            bool all_see_all = first + KEYS <= item.kv_len &&
                               first >= group_first + GROUP_ROWS - 1 + item.first_visible &&
                               first + KEYS - 1 <= group_first + item.last_visible;
            if (!all_see_all) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    // Of the tile's keys, those that causal and window show, as a lane's: less 2 (lane % 4).
                    int from = query[i] + item.first_visible - first;
                    int to = min(query[i] + item.last_visible, item.kv_len - 1) - first;
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
                        unsigned seen = masks[masks_seen % MASK_STAGES].bits[row][lane % 4];
#pragma unroll
                        for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                            for (int e = 0; e < 2; e++) {
                                if (!(seen & 1u << (2 * n + e))) scores[4 * n + 2 * i + e] = -INFINITY;
                            }
                        }
                    }
                }
                __syncwarp();
                mask_done(lane == 0);
            }
        };
        // The weights of row i of the tile relative to `largest`; their sum.
        auto weigh = [&](int i, unsigned(&weights)[KEYS / 4]) {
            float base = largest[i] == -INFINITY ? 0 : largest[i], of_tile = 0; // infinity - infinity would be NaN
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                float x = power_of_2(fmaf(scores[4 * n + 2 * i], scale, -base));
                float y = power_of_2(fmaf(scores[4 * n + 2 * i + 1], scale, -base));
                of_tile += x;
                of_tile += y;
                weights[2 * n + i] = narrow_pair(x, y, T());
            }
            return of_tile;
        };
        // Of a row's first tile `largest` is its maximum. It stays as long as weights relative to it are not too large,
        // and there is no maximum to look for. Whether it changed, and with it, by `factor`, what the values count.
        auto softmax = [&](unsigned(&weights)[KEYS / 4], bool first) {
            float of_tile[2];
            bool outgrown = first;
            if (!first) {
#pragma unroll
                for (int i = 0; i < 2; i++) of_tile[i] = weigh(i, weights);
                bool fits =
                    of_tile[0] <= MOST && of_tile[1] <= MOST && largest[0] != -INFINITY && largest[1] != -INFINITY;
                outgrown = __any_sync(ALL_LANES, !fits);
            }
            if (outgrown) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float now = -INFINITY;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
                        now = larger(scores[4 * n + 2 * i], larger(scores[4 * n + 2 * i + 1], now));
                    now = larger(__shfl_xor_sync(ALL_LANES, now, 1), now);
                    now = larger(__shfl_xor_sync(ALL_LANES, now, 2), now);
                    now = larger(now * scale, largest[i]);
                    factor[i] = now == -INFINITY ? 1 : power_of_2(largest[i] - now);
                    largest[i] = now;
                    of_tile[i] = weigh(i, weights);
                    sum[i] *= factor[i];
                }
            }
            sum[0] += of_tile[0], sum[1] += of_tile[1];
            return outgrown;
        };

        int tile = next_tile(0);
        if (tile < item.tiles) {
            barrier_wait(q_full, worked % 2);
            worked++;
            await_turn();
            multiply_keys();
            end_turn();
            load_added(tile);
            products_wait<0>();
            settle(scores);
            keys_done();
            // The tile's weights, and on to the next tile if there is one: while they are multiplied, its weights are
            // made in other registers.
            auto work = [&](unsigned(&weights)[KEYS / 4], bool first) {
                hide(tile);
                bool changed = softmax(weights, first);
                products_wait<0>();
                settle_values();
                if (!first) values_done();
                if (changed) {
#pragma unroll
                    for (int part = 0; part < PARTS; part++) {
#pragma unroll
                        for (int i = 0; i < PART / 2; i++) values[part][i] *= factor[i / 2 % 2];
                    }
                }
                tile = next_tile(tile + 1);
                if (tile >= item.tiles) {
                    if (lane == 0) barrier_arrive(q_empty);
                    await_turn();
                    multiply_values(weights);
                    end_turn();
                    return false;
                }
                await_turn();
                multiply_keys();
                multiply_values(weights);
                end_turn();
                load_added(tile);
                products_wait<1>();
                settle(scores);
                keys_done();
                return true;
            };
            for (bool first = true; work(weights[0], first) && work(weights[1], false);) first = false;
            products_wait<0>();
            settle_values();
            values_done();
            if (items == 0) keep(weights[0]), keep(weights[1]);
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
    if (group == 0) await_turn();
}
#define BODY(type, key_dim, value_dim, keys, kind) attention_groups<type, key_dim, value_dim, keys, kind>(args)
#else
#define BODY(type, key_dim, value_dim, keys, kind) // the host takes attention.cu's kernels
#endif

#define ATTENTION_KERNEL(name, type, key_dim, value_dim, keys, kind)        \
    extern "C" __global__ void __launch_bounds__((GROUPS + 1) * GROUP, 1)   \
        name(const __grid_constant__ mtl_cuda_attention_hopper_args args) { \
        BODY(type, key_dim, value_dim, keys, kind);                         \
    }
// The bits of masks, and what is added, take registers: fewer keys at once leave them.
#define ATTENTION_KERNELS(name, type, kind)                                            \
    ATTENTION_KERNEL(name##_64_64, type, 64, 64, (kind == PLAIN ? 128 : 64), kind)     \
    ATTENTION_KERNEL(name##_96_96, type, 96, 96, (kind == PLAIN ? 128 : 64), kind)     \
    ATTENTION_KERNEL(name##_128_128, type, 128, 128, (kind == PLAIN ? 128 : 64), kind) \
    ATTENTION_KERNEL(name##_192_128, type, 192, 128, (kind == PLAIN ? 128 : 64), kind) \
    ATTENTION_KERNEL(name##_256_256, type, 256, 256, (kind == PLAIN ? 64 : 32), kind)
