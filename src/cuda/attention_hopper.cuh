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
// The masks of a tile of scores come by the copy engine too, one warp asking for them, to a few places of their own. Of
// what key mask and boolean mask show two more warps make bits, ahead of the tiles; a tile of which nothing shows is not
// loaded. Additive masks are read like a matrix of the product's result and added in natural units, so that a row whose
// every key has finfo.min still has a mean.
//
// As in attention.cu a row that comes out NaN is done again by attention_row.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/wgmma.cuh"

constexpr float MOST = 4096; // sum of a lane's weights of a row and tile: float16 goes to 65504
constexpr int GROUP = 4 * WARP, GROUP_ROWS = 64, GROUPS = 2, ROWS = GROUPS * GROUP_ROWS, STAGES = 2, BIT_STAGES = 4;
constexpr int MASK_STAGES = 4;           // of a mask's tiles, at most
constexpr int MASK_WARP = 1, MAKERS = 2; // of the fetching group: who asks for them; the rest make bits

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

// What is known of a tile's bits: some key shows, some does not.
enum { SOME_SHOW = 1, SOME_HIDDEN = 2 };
// A row's bits lie in four words. Byte i of word j is of the lanes that have the scores 2i and 2i + 1 of every eight: its
// lower half of keys 16j on, two and two of eight, its upper half of keys 64 + 16j on.
struct MaskBits {
    uint4 rows[ROWS]; // all rows are alike, and the first stands for them, where there is no boolean mask
    int state[4];     // a maker's each
};

// A position among some stages, and how often it has come round.
struct Ring {
    int stage = 0, parity = 0;
    __device__ void advance(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// What one of the MAKERS warps does for a tile of an item's masks. A lane has 16 keys of every 64 of a row.
template <typename T, int KEYS> struct MaskMaker {
    static constexpr int HALVES = KEYS / 64, ROWS_AT_ONCE = WARP / 4;
    static constexpr unsigned ALL = HALVES == 2 ? 0xffffffffu : 0x0f0f0f0fu;
    const mtl_cuda_attention_args &p;
    const Item<KEYS> &item;
    int maker, lane, quarter, first_row;

    __device__ MaskMaker(const mtl_cuda_attention_args &p, const Item<KEYS> &item, int maker)
        : p(p), item(item), maker(maker), lane(threadIdx.x % WARP), quarter(lane % 4),
          first_row(maker * ROWS_AT_ONCE + lane / 4) {}

    // The bits of 16 keys that bits_of_bytes would make, of a bit each.
    __device__ static unsigned bits_of_keys(unsigned x) {
        auto spread = [](unsigned x) { return (x & 3) | (x & 0xc) << 6 | (x & 0x30) << 12 | (x & 0xc0) << 18; };
        return spread(x) | spread(x >> 8) << 2;
    }
    // Of the lane's keys, those there are and the key mask shows.
    __device__ unsigned visible_keys(int first) const {
        const char *key_mask = key_mask_of(p, item.batch);
        unsigned of_keys[KEYS / WARP], visible = 0;
#pragma unroll
        for (int i = 0; i < KEYS / WARP; i++) {
            int key = first + i * WARP + lane;
            bool sees = key < item.kv_len;
            if (sees && key_mask) sees = load_integer(key_mask + key * p.key_mask.stride[1], p.key_mask.dtype) != 0;
            of_keys[i] = __ballot_sync(ALL_LANES, sees);
        }
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            unsigned of_pair = quarter < 2 ? of_keys[2 * half] : of_keys[2 * half + 1];
            visible |= bits_of_keys(of_pair >> quarter % 2 * 16 & 0xffff) << 4 * half;
        }
        return visible;
    }
    // 16 of a boolean mask's values in memory, as far as there are any: by words, which end in no other page than they
    // begin.
    __device__ uint4 load_bytes(int row, int first) const {
        uint4 bytes = make_uint4(0, 0, 0, 0);
        int count = item.kv_len - first;
        if (item.first_query + row >= p.q_len || count <= 0) return bytes;
        const char *at = mask_of(p, item.batch, item.head, item.first_query + row) + first * p.mask.stride[3];
        unsigned *words = &bytes.x;
        if (p.mask.stride[3] != 1) {
#pragma unroll
            for (int i = 0; i < 16; i++) {
                if (i < count) words[i / 4] |= (unsigned)*(const uint8_t *)(at + i * p.mask.stride[3]) << i % 4 * 8;
            }
            return bytes;
        }
        int off = (int)((uintptr_t)at & 3), shift = off * 8;
        const unsigned *from = (const unsigned *)(at - off);
        unsigned low = from[0];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned high = 4 * (i + 1) < count + off && (i < 3 || off) ? from[i + 1] : 0;
            words[i] = __funnelshift_r(low, high, shift);
            low = high;
        }
        return bytes;
    }
    // `tile`: where the boolean mask's bytes lie, NULL where the copy engine cannot bring them.
    __device__ void make_bits(int first, bool by_rows, const unsigned char *tile, MaskBits &bits) const {
        unsigned visible = ALL;
        if (p.key_mask.data || (!tile && first + KEYS > item.kv_len)) visible = visible_keys(first);
        int state = 0;
#pragma unroll 2
        for (int row = first_row; row < ROWS; row += MAKERS * ROWS_AT_ONCE) {
            unsigned own = visible;
            if (by_rows) {
                unsigned shown = 0;
#pragma unroll
                for (int half = 0; half < HALVES; half++) {
                    int key = half * 64 + quarter * 16;
                    uint4 bytes = tile ? *(const uint4 *)(tile + row * KEYS + key) : load_bytes(row, first + key);
                    shown |= bits_of_bytes(bytes) << 4 * half;
                }
                own &= shown;
            }
            ((unsigned *)&bits.rows[row])[quarter] = own;
            state |= (own ? SOME_SHOW : 0) | (own != ALL ? SOME_HIDDEN : 0);
            if (!by_rows) break;
        }
        state = __reduce_or_sync(ALL_LANES, state);
        if (lane == 0) bits.state[maker] = state;
    }
    // An additive mask's tile, of any dtype and strides, as the copy engine would bring it.
    __device__ void convert(int first, unsigned char *tile) const {
        constexpr int AT_ONCE = 4;
        int left = min(item.kv_len - first, KEYS);
        for (int column = lane; column < KEYS; column += WARP) {
            const char *at = mask_of(p, item.batch, item.head, item.first_query) + (first + column) * p.mask.stride[3];
            for (int row = maker * AT_ONCE; row < ROWS; row += MAKERS * AT_ONCE) {
                T x[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    bool inside = column < left && item.first_query + row + i < p.q_len;
                    const char *from = at + (row + i) * p.mask.stride[2];
                    if (!inside) x[i] = T(0.0f);
                    else if (p.mask.dtype == Element<T>::dtype) x[i] = *(const T *)from;
                    else x[i] = T(load_float(from, p.mask.dtype));
                }
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++) {
                    int chunk = column % 64 / 8 ^ ((row + i) & 7);
                    *(T *)(tile + (column / 64 * ROWS + row + i) * 128 + chunk * 16 + column % 8 * 2) = x[i];
                }
            }
        }
    }
};

// A tile of 16-bit features lies as blocks of 64 features, each row of a block 128 bytes.
template <typename T, int KEY_DIM, int VALUE_DIM, int KEYS, Kind KIND>
__device__ inline void attention_groups(const mtl_cuda_attention_hopper_args &args) {
    constexpr bool MASKED = KIND != PLAIN;
    // Registers of a fetching thread; three groups have 504 a thread of each together.
    constexpr int FETCHING = 40, BLOCK_REGISTERS = 504;
    const mtl_cuda_attention_args &p = args.attention;
    // Groups take turns where the softmax takes as long as the products; elsewhere they find their places themselves.
    constexpr bool TURNS = KEY_DIM <= 64;
    constexpr int ROW = 128; // bytes of a row of a block
    constexpr int K_BLOCKS = (KEY_DIM + 63) / 64, V_BLOCKS = (VALUE_DIM + 63) / 64;
    constexpr int K_TILE = K_BLOCKS * KEYS * ROW, V_TILE = V_BLOCKS * KEYS * ROW, Q_TILE = K_BLOCKS * ROWS * ROW;
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned q_tile = ((unsigned)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
    unsigned k_tiles = q_tile + Q_TILE, v_tiles = k_tiles + STAGES * K_TILE, masks_at = v_tiles + STAGES * V_TILE;
    const bool by_rows = MASKED && p.mask.data && p.mask.dtype == BOOL, bits = MASKED && (by_rows || p.key_mask.data);
    const bool added = KIND == CHANGED && p.mask.data && !by_rows;
    const int mask_tile = ROWS * KEYS * (added ? 2 : 1), mask_stages = args.mask_stages;
    unsigned char *mask_tiles = shared + (masks_at - (unsigned)__cvta_generic_to_shared(shared));
    MaskBits *mask_bits = (MaskBits *)(mask_tiles + mask_stages * mask_tile);
    __shared__ unsigned item_taken[STAGES];
    __shared__ __align__(8) uint64_t barriers[2 + 6 * STAGES + 2 * BIT_STAGES + 2 * MASK_STAGES];
    unsigned q_full = (unsigned)__cvta_generic_to_shared(barriers), q_empty = q_full + 8;
    unsigned item_full = q_empty + 8, item_empty = item_full + 8 * STAGES;
    unsigned k_full = item_empty + 8 * STAGES, k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES,
             v_empty = v_full + 8 * STAGES, bits_full = v_empty + 8 * STAGES, bits_empty = bits_full + 8 * BIT_STAGES,
             mask_full = bits_empty + 8 * BIT_STAGES, mask_empty = mask_full + 8 * MASK_STAGES;

    int group = __shfl_sync(ALL_LANES, threadIdx.x / GROUP, 0) - 1; // -1 fetches
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
    const unsigned items = args.items;

    if (threadIdx.x == 0) {
        barrier_init(q_full, 1), barrier_init(q_empty, GROUPS * 4);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(item_full + 8 * i, 1), barrier_init(item_empty + 8 * i, GROUPS * 4 + (MASKED ? 3 : 0));
            barrier_init(k_full + 8 * i, 1), barrier_init(v_full + 8 * i, 1);
            barrier_init(k_empty + 8 * i, GROUPS * 4), barrier_init(v_empty + 8 * i, GROUPS * 4);
        }
        for (int i = 0; MASKED && i < BIT_STAGES; i++)
            barrier_init(bits_full + 8 * i, MAKERS), barrier_init(bits_empty + 8 * i, GROUPS * 4 + 1);
        for (int i = 0; MASKED && i < mask_stages; i++) {
            barrier_init(mask_full + 8 * i, args.mask_copied ? 1 : MAKERS);
            barrier_init(mask_empty + 8 * i, added ? GROUPS * 4 : MAKERS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    // Every role goes through the same tiles.
    Ring bits_at, mask_at;
    auto shows = [&](int state) { return (state & SOME_SHOW) != 0; };
    auto bits_state = [&]() { // of the next tile, once its bits are there
        barrier_wait(bits_full + 8 * bits_at.stage, bits_at.parity);
        return mask_bits[bits_at.stage].state[0] | mask_bits[bits_at.stage].state[1];
    };
    auto bits_done = [&](bool arrives) {
        if (arrives) barrier_arrive(bits_empty + 8 * bits_at.stage);
        bits_at.advance(BIT_STAGES);
    };
    auto mask_done = [&](bool arrives) {
        if (arrives) barrier_arrive(mask_empty + 8 * mask_at.stage);
        mask_at.advance(mask_stages);
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
            for (unsigned index; (index = next_item()) < items;) {
                const Item<KEYS> item(p, index);
                const MaskMaker<T, KEYS> maker(p, item, warp - MASK_WARP - 1);
                for (int tile = 0; tile < item.tiles; tile++) {
                    int first = item.begin + tile * KEYS;
                    unsigned char *mask = mask_tiles + mask_at.stage * mask_tile;
                    if (warp == MASK_WARP) {
                        if (!args.mask_copied || lane != 0) continue;
                        barrier_wait(mask_empty + 8 * mask_at.stage, mask_at.parity ^ 1);
                        unsigned full = mask_full + 8 * mask_at.stage;
                        barrier_expect(full, mask_tile);
                        for (int at = 0; at < KEYS; at += added ? 64 : KEYS)
                            copy_box(masks_at + mask_at.stage * mask_tile + at * ROWS * 2, args.mask_map, full,
                                     first + at, item.first_query, item.head, item.batch);
                        mask_at.advance(mask_stages);
                        continue;
                    }
                    if (bits) {
                        bool copied = by_rows && args.mask_copied;
                        if (copied) barrier_wait(mask_full + 8 * mask_at.stage, mask_at.parity);
                        barrier_wait(bits_empty + 8 * bits_at.stage, bits_at.parity ^ 1);
                        maker.make_bits(first, by_rows, copied ? mask : NULL, mask_bits[bits_at.stage]);
                        __syncwarp();
                        if (lane == 0) barrier_arrive(bits_full + 8 * bits_at.stage);
                        bits_at.advance(BIT_STAGES);
                        if (copied) mask_done(lane == 0);
                    }
                    if (added && !args.mask_copied) {
                        barrier_wait(mask_empty + 8 * mask_at.stage, mask_at.parity ^ 1);
                        maker.convert(first, mask);
                        __syncwarp();
                        if (lane == 0) barrier_arrive(mask_full + 8 * mask_at.stage);
                        mask_at.advance(mask_stages);
                    }
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
                    int state = bits_state();
                    bits_done(true);
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
    unsigned weights[2][KEYS / 4] = {}; // of a tile that is being multiplied, and of the next
    // Scores are multiplied by the scale, and by LOG2_E for powers of 2, within the exponential, as a rule; changed ones
    // are in natural units. largest is in `UNIT`s of them.
    constexpr float UNIT = KIND == CHANGED ? 1 : LOG2_E;
    auto power = [](float x) { return power_of_2(KIND == CHANGED ? x * LOG2_E : x); };
    float scale = KIND == CHANGED ? 1 : p.scale * LOG2_E;
    unsigned multiplied = 0, weighted = 0; // tiles of keys, of values

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

        // The next tile of which something shows, from `tile` on; its bits stay where they are until bits_done.
        auto next_tile = [&](int tile) {
            if (!bits) return tile;
            for (; tile < item.tiles; tile++) {
                state = bits_state();
                if (shows(state)) break;
                bits_done(lane == 0);
                if (!added) continue;
                barrier_wait(mask_full + 8 * mask_at.stage, mask_at.parity);
                mask_done(lane == 0);
            }
            return tile;
        };
        // Scores in natural units: scaled, capped, with the mask added.
        auto change = [&]() {
            float factor = p.scale;
            if (p.softcap > 0) {
                float inverse = p.scale / p.softcap;
#pragma unroll
                for (int i = 0; i < KEYS / 2; i++) scores[i] = p.softcap * quick_tanh(scores[i] * inverse);
                factor = 1;
            }
            if (!added) {
#pragma unroll
                for (int i = 0; i < KEYS / 2; i++) scores[i] *= factor;
                return;
            }
            barrier_wait(mask_full + 8 * mask_at.stage, mask_at.parity);
            unsigned row = group * GROUP_ROWS + warp * 16 + lane % 16;
            unsigned at = masks_at + mask_at.stage * mask_tile + row * ROW + ((lane / 16 ^ (row & 7)) << 4);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                unsigned pairs[4];
                load_matrices(pairs, (at ^ n % 8 << 4) + n / 8 * ROWS * ROW);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float2 bias = widen_pair(pairs[j], T());
                    float *two = &scores[4 * (n + j / 2) + 2 * (j % 2)];
                    two[0] = fmaf(two[0], factor, bias.x), two[1] = fmaf(two[1], factor, bias.y);
                }
            }
            __syncwarp();
            mask_done(lane == 0);
        };
        auto hide = [&](int tile) {
            int first = item.begin + tile * KEYS;
            if constexpr (KIND == CHANGED) change();
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
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        int row = by_rows ? group * GROUP_ROWS + warp * 16 + lane / 4 + 8 * i : 0;
                        uint4 of_row = mask_bits[bits_at.stage].rows[row];
                        const unsigned words[4] = {of_row.x, of_row.y, of_row.z, of_row.w};
#pragma unroll
                        for (int quarter = 0; quarter < 4; quarter++) {
                            unsigned seen = words[quarter] >> lane % 4 * 8;
#pragma unroll
                            for (int j = 0; j < KEYS / 16; j++) {
                                int n = j / 4 * 8 + quarter * 2 + j % 4 / 2;
                                if (!(seen & 1u << j)) scores[4 * n + 2 * i + j % 2] = -INFINITY;
                            }
                        }
                    }
                }
                __syncwarp();
                bits_done(lane == 0);
            }
        };
        // The weights of row i of the tile relative to `largest`; their sum.
        auto weigh = [&](int i, unsigned(&weights)[KEYS / 4]) {
            float base = largest[i] == -INFINITY ? 0 : largest[i], of_tile = 0; // infinity - infinity would be NaN
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                float x = power(fmaf(scores[4 * n + 2 * i], scale, -base));
                float y = power(fmaf(scores[4 * n + 2 * i + 1], scale, -base));
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
                    factor[i] = now == -INFINITY ? 1 : power(largest[i] - now);
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
            float top = largest[i] / UNIT, by = 1; // in natural units
            if (p.sinks.data) {
                float sink = load_float(p.sinks.data + item.head * p.sinks.stride, p.sinks.dtype) * UNIT;
                float now = larger(sink, largest[i]);
                if (now != -INFINITY) {
                    by = power(largest[i] - now);
                    sum[i] = sink == INFINITY ? INFINITY : sum[i] * by + power(sink - now);
                    top = now / UNIT;
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
// 192 features and the tiles of an additive mask leave room for 64 keys.
#define ATTENTION_KERNELS(name, type, kind)                                            \
    ATTENTION_KERNEL(name##_64_64, type, 64, 64, 128, kind)                            \
    ATTENTION_KERNEL(name##_96_96, type, 96, 96, 128, kind)                            \
    ATTENTION_KERNEL(name##_128_128, type, 128, 128, 128, kind)                        \
    ATTENTION_KERNEL(name##_192_128, type, 192, 128, (kind == PLAIN ? 128 : 64), kind) \
    ATTENTION_KERNEL(name##_256_256, type, 256, 256, 64, kind)
