// O = softmax(scale Q K^T + mask) V on Hopper's matrix units. SPDX-License-Identifier: MIT
//
//   (Dao et al. 2022, arXiv:2205.14135; Shah et al. 2024, arXiv:2407.08608)
//
// A block has 64 rows of one head for each of its groups of four warps: two as a rule; one, and two such blocks on a
// multiprocessor, where items are few. One more group fetches: one thread takes items, dealt out or off a common
// counter as blocks get free, and asks the copy engine for their tiles of keys and values, some stages ahead, the next
// item's under the end of this one. While the matrix units do the scores of the next tile and the weighted values of
// this one, a group's ordinary instructions do the softmax in between: of the two products in flight only the scores
// are waited for.
//
// Numerics: a row's weights are relative to the maximum of its first tile, for as long as that leaves them small
// (MOST); only then is a new maximum looked for. A sum of them and a comparison find that out, with no maximum and no
// exchange between lanes in the usual tile. Weights round to the inputs' dtype, sums are float.
//
// The masks of a tile of scores come by the copy engine too, one warp asking for them, to a few places of their own.
// Of what key mask and boolean mask show two more warps make bits, ahead of the tiles; a tile of which nothing shows
// is not loaded. Additive masks are read like a matrix of the product's result and added in natural units, so that a
// row whose every key has finfo.min still has a mean.
//
// As in attention.cu a row that comes out NaN is done again by attention_row.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/wgmma.cuh"

constexpr float MOST = 4096; // sum of a lane's weights of a row and tile: float16 goes to 65504
constexpr int GROUP = 4 * WARP, GROUP_ROWS = 64, ITEM_STAGES = 4, BIT_STAGES = 4;
constexpr int MASK_STAGES = 4;           // of a mask's tiles, at most
constexpr int MASK_WARP = 1, MAKERS = 2; // of the fetching group: who asks for them; the rest make bits

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The queries of an item, as the fetching thread tells the others; first < 0: there are no more.
struct Queries {
    int first, head, batch;

    // Under causal the last rows have most to do: they go first, of all heads or of a head at a time.
    template <int ROWS> __device__ static Queries of_item(const mtl_cuda_attention_hopper_args &args, unsigned index) {
        const mtl_cuda_attention_args &p = args.attention;
        unsigned heads = (unsigned)p.q_heads, blocks = (unsigned)(p.q_len + ROWS - 1) / ROWS;
        unsigned inner = args.by_heads ? blocks : (unsigned)p.batch * heads, outer = index / inner, rest = index % inner;
        unsigned before = args.by_heads ? rest : outer, of_all = args.by_heads ? outer : rest;
        return {(int)(blocks - 1 - before) * ROWS, (int)(of_all % heads), (int)(of_all / heads)};
    }
};

// And the tiles of keys that causal and window leave them. Lengths are below 2^30 here, so that what is beyond it can
// be cut off, and int suffices.
template <int ROWS, int KEYS> struct Item {
    int batch, head, first_query, begin, tiles, first_visible, last_visible, kv_len;

    __device__ static int cut(int64_t x) { return (int)(x < -(1 << 30) ? -(1 << 30) : x > 1 << 30 ? 1 << 30 : x); }
    __device__ Item(const mtl_cuda_attention_args &p, Queries queries)
        : batch(queries.batch), head(queries.head), first_query(queries.first), first_visible(cut(p.first_visible)),
          last_visible(cut(p.last_visible)), kv_len((int)p.kv_len) {
        int last_query = min(first_query + ROWS, (int)p.q_len) - 1;
        int end = min(max(last_query + last_visible + 1, 0), kv_len);
        begin = max(first_query + first_visible, 0) / KEYS * KEYS;
        tiles = end > begin ? (end - begin + KEYS - 1) / KEYS : 0;
    }
};

// Bytes that are not 0 as 1, which they are as a rule.
template <int N> __device__ inline void as_zeros_and_ones(uint4 (&x)[N]) {
    unsigned any = 0;
#pragma unroll
    for (int i = 0; i < N; i++) any |= x[i].x | x[i].y | x[i].z | x[i].w;
    if ((any & 0xfefefefeu) == 0) return;
#pragma unroll
    for (int i = 0; i < N; i++)
        x[i] = make_uint4(__vsetgtu4(x[i].x, 0), __vsetgtu4(x[i].y, 0), __vsetgtu4(x[i].z, 0), __vsetgtu4(x[i].w, 0));
}
// A bit to each of 16 such bytes, above those that there are.
__device__ inline unsigned bits_of_bytes(uint4 x, unsigned bits) {
    bits = __dp4a(x.z, 0x08040201u, __dp4a(x.w, 0x80402010u, bits << 8));
    return __dp4a(x.x, 0x08040201u, __dp4a(x.y, 0x80402010u, bits << 8));
}

// Beyond causal and window: nothing; keys hidden by a key mask or a boolean mask; and scores changed by an additive
// mask, a cap or a scale that is not positive.
enum Kind { PLAIN, HIDDEN, CHANGED };

// What is known of a tile's bits: some key shows, some does not.
enum { SOME_SHOW = 1, SOME_HIDDEN = 2 };
template <int ROWS> struct MaskBits {
    __align__(16) unsigned rows[ROWS][4]; // the first stands for all where there is no boolean mask of different rows
    int state[4];                         // a maker's each
};

// Of a tile's keys, those that two rows of scores see, as a lane has them: bit 8 (n % 4) + 2 (n / 4) + e is of the n-th
// eight's e-th.
struct Seen {
    unsigned rows[2];
    template <int KEYS> __device__ void load(int i, const unsigned (&row)[4]) {
        const uint4 bits = *(const uint4 *)row;
        const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
        rows[i] = 0;
#pragma unroll
        for (int j = 0; j < KEYS / 32; j++)
            rows[i] |= __funnelshift_r(words[j], words[j], threadIdx.x % 4 * 2 - 2 * j) & 0x03030303u << 2 * j;
    }
    __device__ bool operator()(int i, int n, int e) const { return rows[i] & 1u << (n % 4 * 8 + n / 4 * 2 + e); }
};
struct SeenAll {
    __device__ bool operator()(int, int, int) const { return true; }
};

// Of a pair of columns of each of four eights, the eight of the lane's own number, from four lanes.
__device__ inline void transpose_pairs(unsigned (&pairs)[4]) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
        bool odd = threadIdx.x & bit;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & bit) continue;
            unsigned other = __shfl_xor_sync(ALL_LANES, odd ? pairs[i] : pairs[i + bit], bit);
            if (odd) pairs[i] = other;
            else pairs[i + bit] = other;
        }
    }
}

// A position among some stages, and how often it has come round.
struct Ring {
    int stage = 0, parity = 0;
    __device__ void advance(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// What one of the MAKERS warps makes of a tile of an item's masks, 32 keys of a row a lane. `tile`: where the boolean
// mask's bytes lie; NULL: there is none.
template <int ROWS, int KEYS>
__device__ inline void make_bits(const mtl_cuda_attention_args &p, const Item<ROWS, KEYS> &item, int first, int maker,
                                 const unsigned char *tile, bool rows_differ, MaskBits<ROWS> &bits) {
    constexpr int LANES = KEYS / 32, ROWS_AT_ONCE = WARP / LANES;
    int lane = threadIdx.x % WARP, word = lane % LANES, state = 0;
    const char *key_mask = key_mask_of(p, item.batch);
    unsigned visible = ~0u; // the copy engine fills with zeros what is beyond the last key
    if (key_mask || !tile) {
#pragma unroll
        for (int i = 0; i < LANES; i++) {
            int key = first + i * 32 + lane;
            bool sees = key < item.kv_len;
            if (sees && key_mask) sees = load_integer(key_mask + key * p.key_mask.stride[1], p.key_mask.dtype) != 0;
            unsigned of_word = __ballot_sync(ALL_LANES, sees);
            if (word == i) visible = of_word;
        }
    }
    auto set = [&](int row, unsigned seen) {
        bits.rows[row][word] = seen;
        state |= (seen ? SOME_SHOW : 0) | (~seen ? SOME_HIDDEN : 0);
    };
    if (tile && rows_differ) {
        constexpr int STEP = MAKERS * ROWS_AT_ONCE;
        int row = maker * ROWS_AT_ONCE + lane / LANES;
        const uint4 *at = (const uint4 *)(tile + row * KEYS + word * 32), *next = at + STEP * KEYS / 16;
#pragma unroll
        for (int i = 0; i < ROWS; i += 2 * STEP) {
            uint4 bytes[4] = {at[i * KEYS / 16], at[i * KEYS / 16 + 1], next[i * KEYS / 16], next[i * KEYS / 16 + 1]};
            as_zeros_and_ones(bytes);
            set(row + i, visible & bits_of_bytes(bytes[0], bits_of_bytes(bytes[1], 0)));
            set(row + i + STEP, visible & bits_of_bytes(bytes[2], bits_of_bytes(bytes[3], 0)));
        }
    } else if (maker == 0) {
        unsigned seen = visible;
        if (tile) {
            const uint4 *at = (const uint4 *)tile + word * 2;
            uint4 bytes[2] = {at[0], at[1]};
            as_zeros_and_ones(bytes);
            seen &= bits_of_bytes(bytes[0], bits_of_bytes(bytes[1], 0));
        }
        set(0, seen);
    }
    state = __reduce_or_sync(ALL_LANES, state);
    if (lane == 0) bits.state[maker] = state;
}

// A tile of 16-bit features lies as blocks of 64 features, each row of a block 128 bytes.
template <typename T, int KEY_DIM, int VALUE_DIM, int GROUPS, int BLOCKS, int KEYS, Kind KIND>
__device__ inline void attention_groups(const mtl_cuda_attention_hopper_args &args) {
    constexpr bool MASKED = KIND != PLAIN;
    constexpr int ROWS = GROUPS * GROUP_ROWS;
    // Where there is room short items' keys are on their way together.
    constexpr int STAGES = GROUPS > 1 && KEY_DIM <= 64 ? 4 : 2, QUERY_STAGES = STAGES / 2;
    // Registers of a thread: as the block starts, of those that fetch, of the others.
    constexpr int AT_START = (1 << 16) / (BLOCKS * (GROUPS + 1) * GROUP) / 8 * 8, FETCHING = 40;
    constexpr int WORKING = ((GROUPS + 1) * AT_START - FETCHING) / GROUPS / 8 * 8;
    const mtl_cuda_attention_args &p = args.attention;
    // Groups take turns where the softmax takes as long as the products; elsewhere they find their places themselves.
    constexpr bool TURNS = GROUPS > 1 && KEY_DIM <= 64;
    constexpr int ROW = 128; // bytes of a row of a block
    constexpr int K_BLOCKS = (KEY_DIM + 63) / 64, V_BLOCKS = (VALUE_DIM + 63) / 64;
    constexpr int K_TILE = K_BLOCKS * KEYS * ROW, V_TILE = V_BLOCKS * KEYS * ROW, Q_TILE = K_BLOCKS * ROWS * ROW;
    extern __shared__ __align__(1024) unsigned char shared[];
    unsigned q_tile = ((unsigned)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
    unsigned k_tiles = q_tile + QUERY_STAGES * Q_TILE, v_tiles = k_tiles + STAGES * K_TILE,
             masks_at = v_tiles + STAGES * V_TILE;
    const bool boolean = MASKED && p.mask.data && p.mask.dtype == BOOL, bits = MASKED && (boolean || p.key_mask.data);
    const bool added = KIND == CHANGED && p.mask.data && !boolean, rows_differ = p.mask.stride[2] != 0;
    const int mask_tile = ROWS * KEYS * (added ? 2 : 1), mask_stages = args.mask_stages;
    unsigned char *mask_tiles = shared + (masks_at - (unsigned)__cvta_generic_to_shared(shared));
    MaskBits<ROWS> *mask_bits = (MaskBits<ROWS> *)(mask_tiles + mask_stages * mask_tile);
    __shared__ Queries queries_of_item[ITEM_STAGES];
    __shared__ __align__(8)
        uint64_t barriers[2 * QUERY_STAGES + 2 * ITEM_STAGES + 4 * STAGES + 2 * BIT_STAGES + 2 * MASK_STAGES];
    unsigned q_full = (unsigned)__cvta_generic_to_shared(barriers), q_empty = q_full + 8 * QUERY_STAGES;
    unsigned item_full = q_empty + 8 * QUERY_STAGES, item_empty = item_full + 8 * ITEM_STAGES;
    unsigned k_full = item_empty + 8 * ITEM_STAGES, k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES,
             v_empty = v_full + 8 * STAGES, bits_full = v_empty + 8 * STAGES, bits_empty = bits_full + 8 * BIT_STAGES,
             mask_full = bits_empty + 8 * BIT_STAGES, mask_empty = mask_full + 8 * MASK_STAGES;

    int group = __shfl_sync(ALL_LANES, threadIdx.x / GROUP, 0) - 1; // -1 fetches
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
    const unsigned items = args.items;

    // While one thread finds the first item another makes the barriers.
    unsigned index =
        blockIdx.y % 2 ? (blockIdx.y + 1) * gridDim.x - 1 - blockIdx.x : blockIdx.y * gridDim.x + blockIdx.x;
    Queries first_item = {-1, 0, 0};
    if (threadIdx.x == 0) {
        prefetch_map(args.k_map), prefetch_map(args.q_map), prefetch_map(args.v_map);
        if (index < items) first_item = Queries::of_item<ROWS>(args, index);
    }
    if (threadIdx.x == GROUP) {
        for (int i = 0; i < QUERY_STAGES; i++)
            barrier_init(q_full + 8 * i, 1), barrier_init(q_empty + 8 * i, GROUPS * 4);
        for (int i = 0; i < ITEM_STAGES; i++) {
            barrier_init(item_full + 8 * i, 1);
            barrier_init(item_empty + 8 * i, (GROUPS * 4 + (MASKED ? 1 + MAKERS : 0)) * WARP);
        }
        for (int i = 0; i < STAGES; i++) {
            barrier_init(k_full + 8 * i, 1), barrier_init(v_full + 8 * i, 1);
            barrier_init(k_empty + 8 * i, GROUPS * 4), barrier_init(v_empty + 8 * i, GROUPS * 4);
        }
        for (int i = 0; MASKED && i < BIT_STAGES; i++)
            barrier_init(bits_full + 8 * i, MAKERS * WARP), barrier_init(bits_empty + 8 * i, GROUPS * GROUP + 1);
        for (int i = 0; MASKED && i < mask_stages; i++)
            barrier_init(mask_full + 8 * i, 1),
                barrier_init(mask_empty + 8 * i, added ? GROUPS * GROUP : MAKERS * WARP);
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
    auto bits_done = [&]() {
        barrier_arrive(bits_empty + 8 * bits_at.stage);
        bits_at.advance(BIT_STAGES);
    };
    auto mask_done = [&]() {
        barrier_arrive(mask_empty + 8 * mask_at.stage);
        mask_at.advance(mask_stages);
    };

    // What the fetching thread took: the same items for all roles, and at last one that is not there.
    unsigned taken = 0;
    auto next_item = [&]() {
        int stage = taken % ITEM_STAGES;
        barrier_wait(item_full + 8 * stage, taken++ / ITEM_STAGES % 2);
        const Queries &there = queries_of_item[stage];
        Queries queries = {__shfl_sync(ALL_LANES, there.first, 0), __shfl_sync(ALL_LANES, there.head, 0),
                           __shfl_sync(ALL_LANES, there.batch, 0)}; // and so they have arrived
        barrier_arrive(item_empty + 8 * stage);
        return queries;
    };

    if (group < 0) {
        // Of the registers that the block starts with: what is asked for beyond them never comes.
        give_registers<FETCHING>();
        if (MASKED && warp > 0) {
            for (Queries queries; (queries = next_item()).first >= 0;) {
                const Item<ROWS, KEYS> item(p, queries);
                for (int tile = 0; tile < item.tiles; tile++) {
                    int first = item.begin + tile * KEYS;
                    if (warp == MASK_WARP) {
                        if (mask_stages == 0 || lane != 0) break;
                        unsigned full = mask_full + 8 * mask_at.stage, to = masks_at + mask_at.stage * mask_tile;
                        barrier_wait(mask_empty + 8 * mask_at.stage, mask_at.parity ^ 1);
                        barrier_expect(full, rows_differ ? mask_tile : mask_tile / ROWS);
                        for (int at = 0; at < KEYS; at += added ? 64 : KEYS)
                            copy_box(to + at * ROWS * 2, args.mask_map, full, first + at, item.first_query, item.head,
                                     item.batch);
                        mask_at.advance(mask_stages);
                    } else if (bits) {
                        const unsigned char *mask = boolean ? mask_tiles + mask_at.stage * mask_tile : NULL;
                        if (mask) barrier_wait(mask_full + 8 * mask_at.stage, mask_at.parity);
                        barrier_wait(bits_empty + 8 * bits_at.stage, bits_at.parity ^ 1);
                        make_bits(p, item, first, warp - MASK_WARP - 1, mask, rows_differ, mask_bits[bits_at.stage]);
                        barrier_arrive(bits_full + 8 * bits_at.stage);
                        bits_at.advance(BIT_STAGES);
                        if (mask) after_reads(), mask_done();
                    }
                }
            }
            return;
        }
        if (threadIdx.x != 0) return;
        unsigned fetched = 0, worked = 0;
        for (;; taken++) {
            Queries queries = first_item;
            if (taken > 0) {
                // Dealt out there and back: who has most to do in one round has least in the next.
                unsigned turn = taken * gridDim.y + blockIdx.y;
                index = turn * gridDim.x + (turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
                if (args.next) index = gridDim.x * gridDim.y + atomicAdd(args.next, 1u);
                queries = index < items ? Queries::of_item<ROWS>(args, index) : Queries{-1, 0, 0};
            } else {
                wait_for_earlier(); // and with it all that waits for an item
            }
            barrier_wait(item_empty + 8 * (taken % ITEM_STAGES), taken / ITEM_STAGES % 2 ^ 1);
            queries_of_item[taken % ITEM_STAGES] = queries;
            barrier_arrive(item_full + 8 * (taken % ITEM_STAGES));
            if (index >= items) return;
            const Item<ROWS, KEYS> item(p, queries);
            int kv_head = item.head / (int)p.group;
            bool fetches_queries = true;
            for (int tile = 0; tile < item.tiles; tile++) {
                if (bits) {
                    bool shown = shows(bits_state());
                    if (!shown) { // two arrivals, so that both stand behind what was read
                        bits_done();
                        continue;
                    }
                    bits_done();
                }
                int stage = fetched % STAGES, parity = fetched / STAGES % 2 ^ 1, key = item.begin + tile * KEYS;
                fetched++;
                barrier_wait(k_empty + 8 * stage, parity);
                barrier_expect(k_full + 8 * stage, K_TILE);
                for (int block = 0; block < K_BLOCKS; block++)
                    copy_box(k_tiles + stage * K_TILE + block * KEYS * ROW, args.k_map, k_full + 8 * stage, block * 64,
                             key, kv_head, item.batch);
                if (fetches_queries) {
                    fetches_queries = false;
                    int q_stage = worked % QUERY_STAGES, full = q_full + 8 * q_stage;
                    barrier_wait(q_empty + 8 * q_stage, worked++ / QUERY_STAGES % 2 ^ 1);
                    barrier_expect(full, Q_TILE);
                    for (int block = 0; block < K_BLOCKS; block++)
                        copy_box(q_tile + q_stage * Q_TILE + block * ROWS * ROW, args.q_map, full, block * 64,
                                 item.first_query, item.head, item.batch);
                }
                barrier_wait(v_empty + 8 * stage, parity);
                barrier_expect(v_full + 8 * stage, V_TILE);
                for (int block = 0; block < V_BLOCKS; block++)
                    copy_box(v_tiles + stage * V_TILE + block * KEYS * ROW, args.v_map, v_full + 8 * stage, block * 64,
                             key, kv_head, item.batch);
                if (fetched == 1) let_next_start(); // its loads come after these
            }
        }
    }
    take_registers<WORKING>();

    // Values in parts of at most 128 columns, as wide as one product.
    constexpr int PART = VALUE_DIM < 128 ? VALUE_DIM : 128, PARTS = VALUE_DIM / PART;
    float scores[KEYS / 2], values[PARTS][PART / 2], largest[2], sum[2], factor[2];
    unsigned weights[2][KEYS / 4] = {}; // of a tile that is being multiplied, and of the next
    // Scores are multiplied by the scale, and by LOG2_E for powers of 2, within the exponential, as a rule; changed
    // ones are in natural units. largest is in `UNIT`s of them.
    constexpr float UNIT = KIND == CHANGED ? 1 : LOG2_E;
    auto power = [](float x) { return power_of_2(KIND == CHANGED ? x * LOG2_E : x); };
    float scale = KIND == CHANGED ? 1 : p.scale * LOG2_E;
    unsigned multiplied = 0, weighted = 0; // tiles of keys, of values

    unsigned worked = 0;          // items
    uint64_t tile_of_queries = 0; // of an item
    auto multiply_keys = [&]() {
        int stage = multiplied % STAGES;
        barrier_wait(k_full + 8 * stage, multiplied / STAGES % 2);
        uint64_t keys = descriptor(k_tiles + stage * K_TILE, 16);
        products_begin();
#pragma unroll
        for (int step = 0; step < KEY_DIM / 16; step++) {
            int block = step / 4, inside = step % 4 * 32;
            multiply_shared(scores, tile_of_queries + ((block * ROWS * ROW + inside) >> 4),
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
    const bool vectors = p.out.dtype == Element<T>::dtype && p.out.stride[3] == 2 &&
                         (((uintptr_t)p.out.data | p.out.stride[0] | p.out.stride[1] | p.out.stride[2]) & 15) == 0;
    if (group == GROUPS - 1) end_turn();
    for (Queries queries; (queries = next_item()).first >= 0;) {
        const Item<ROWS, KEYS> item(p, queries);
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
            if constexpr (MASKED) {
                if (!bits) return tile;
                for (; tile < item.tiles; tile++) {
                    state = bits_state();
                    if (shows(state)) break;
                    bits_done();
                    if (!added) continue;
                    barrier_wait(mask_full + 8 * mask_at.stage, mask_at.parity);
                    mask_done();
                }
            }
            return tile;
        };
        // Scores in natural units: scaled, capped, with the mask added. What causal, window and bits hide is hidden in
        // between, so that -infinity stays what it is, and the last step mixes with the weights'.
        const bool early = p.softcap > 0 || !(p.scale > 0);
        auto cap = [&]() {
            if (p.softcap > 0) {
                float inverse = p.scale / p.softcap;
#pragma unroll
                for (int i = 0; i < KEYS / 2; i++) scores[i] = p.softcap * quick_tanh(scores[i] * inverse);
            } else {
#pragma unroll
                for (int i = 0; i < KEYS / 2; i++) scores[i] *= p.scale;
            }
        };
        auto add_mask = [&]() {
            const float factor = early ? 1 : p.scale;
            barrier_wait(mask_full + 8 * mask_at.stage, mask_at.parity);
            unsigned row = rows_differ ? group * GROUP_ROWS + warp * 16 + lane % 16 : 0;
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
        };
        auto hide = [&](int tile) {
            int first = item.begin + tile * KEYS;
            if (KIND == CHANGED && early) cap();
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
        };
        auto hide_unseen = [&](const Seen &seen) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; i++) {
                if (!seen(i / 2 % 2, i / 4, i % 2)) scores[i] = -INFINITY;
            }
        };
        // The weights of row i of the tile relative to `largest`; their sum.
        auto weigh = [&](int i, unsigned(&weights)[KEYS / 4], const auto &seen) {
            float base = largest[i] == -INFINITY ? 0 : largest[i], of_tile = 0; // infinity - infinity would be NaN
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                float x = seen(i, n, 0) ? fmaf(scores[4 * n + 2 * i], scale, -base) : -INFINITY;
                float y = seen(i, n, 1) ? fmaf(scores[4 * n + 2 * i + 1], scale, -base) : -INFINITY;
                x = power(x), y = power(y);
                of_tile += x;
                of_tile += y;
                weights[2 * n + i] = narrow_pair(x, y, T());
            }
            return of_tile;
        };
        // Of a row's first tile `largest` is its maximum. It stays as long as weights relative to it are not too large,
        // and there is no maximum to look for. Whether it changed, and with it, by `factor`, what the values count.
        auto softmax = [&](unsigned(&weights)[KEYS / 4], bool first) {
            Seen seen;
            bool partly = false; // seen
            if (bits) {
                if (state & SOME_HIDDEN) {
                    partly = true;
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        int row = boolean && rows_differ ? group * GROUP_ROWS + warp * 16 + lane / 4 + 8 * i : 0;
                        seen.load<KEYS>(i, mask_bits[bits_at.stage].rows[row]);
                    }
                    if (KIND == CHANGED) hide_unseen(seen);
                }
            }
            if (KIND == CHANGED && added) add_mask();
            float of_tile[2];
            bool outgrown = first;
            // With masks the first tile's are made in vain: without a branch they mix with what comes before.
            if (MASKED || !first) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (KIND == HIDDEN && partly) of_tile[i] = weigh(i, weights, seen);
                    else of_tile[i] = weigh(i, weights, SeenAll());
                }
                bool fits =
                    of_tile[0] <= MOST && of_tile[1] <= MOST && largest[0] != -INFINITY && largest[1] != -INFINITY;
                outgrown = __any_sync(ALL_LANES, !fits);
            }
            // Only now is what was read known to have arrived in registers: loads wait for the matrix units, arrivals
            // at barriers do not, and who writes there next is quick.
            if (bits) bits_done();
            if (KIND == CHANGED && added) after_reads(), mask_done();
            if (outgrown) {
                if (KIND == HIDDEN && partly) hide_unseen(seen);
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
                    of_tile[i] = weigh(i, weights, SeenAll());
                    sum[i] *= factor[i];
                }
            }
            sum[0] += of_tile[0], sum[1] += of_tile[1];
            return outgrown;
        };

        int tile = next_tile(0);
        if (tile < item.tiles) {
            // The same for all lanes, as the assembler sees now: what the products' operands depend on.
            int q_stage = QUERY_STAGES > 1 ? __shfl_sync(ALL_LANES, worked % QUERY_STAGES, 0) : 0;
            tile_of_queries = descriptor(q_tile + q_stage * Q_TILE + group * GROUP_ROWS * ROW, 16);
            barrier_wait(q_full + 8 * q_stage, worked++ / QUERY_STAGES % 2);
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
                    if (lane == 0) barrier_arrive(q_empty + 8 * q_stage);
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
            bool inside = query[i] < p.q_len, nan = false;
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
            char *out = (char *)place(p.out, item.batch, item.head, query[i]);
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
#pragma unroll
                for (int j = 0; j < PART / 2; j += 4) {
                    float *two = &values[part][j + 2 * i];
                    two[0] *= inverse, two[1] *= inverse;
                    nan |= two[0] != two[0] || two[1] != two[1];
                }
            }
            // Of four lanes that have pairs of a row each has 8 columns then. One branch for all columns: what is not
            // run must not stand between instructions that are.
            if (vectors) {
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
#pragma unroll
                    for (int n = 0; n < PART / 8; n += 4) {
                        unsigned pairs[4];
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            const float *two = &values[part][4 * (n + j) + 2 * i];
                            pairs[j] = narrow_pair(two[0], two[1], T());
                        }
                        transpose_pairs(pairs);
                        int column = part * PART + (n + lane % 4) * 8;
                        if (inside && column < p.value_dim)
                            store_16_bytes(out + column * 2, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
                    }
                }
            } else if (inside) {
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
#pragma unroll
                    for (int j = 0; j < PART / 4; j++) {
                        int column = part * PART + j / 2 * 8 + lane % 4 * 2 + j % 2;
                        if (column < p.value_dim)
                            store_float(out + column * p.out.stride[3], p.out.dtype,
                                        values[part][j / 2 * 4 + 2 * i + j % 2]);
                    }
                }
            }
            if (inside && lane % 4 == 0 && p.logsumexp.data)
                *(float *)place(p.logsumexp, item.batch, item.head, query[i]) =
                    sum[i] == 0 ? -INFINITY : top + logf(sum[i]);
            nan = nan && (added || sum[i] == sum[i]); // a NaN beside an additive mask's -infinity is hidden
            unsigned of_lanes = __ballot_sync(ALL_LANES, nan && inside);
            for (int row = 8 * i; of_lanes; row++, of_lanes >>= 4) wrong |= (of_lanes & 15 ? 1u : 0u) << row;
        }
        __syncwarp();
        for (; wrong; wrong &= wrong - 1)
            attention_row(p, item.batch, item.head, group_first + warp * 16 + __ffs(wrong) - 1);
    }
    if (group == 0) await_turn();
}
#define BODY(...) attention_groups<__VA_ARGS__>(args)
#else
#define BODY(...) // the host takes attention.cu's kernels
#endif

#define ATTENTION_KERNEL(name, type, key_dim, value_dim, groups, blocks, keys, kind) \
    extern "C" __global__ void __launch_bounds__((groups + 1) * GROUP, blocks)       \
        name(const __grid_constant__ mtl_cuda_attention_hopper_args args) {          \
        BODY(type, key_dim, value_dim, groups, blocks, keys, kind);                  \
    }
// 192 features and the tiles of an additive mask leave room for 64 keys. Where rows are few, a block has one group, and
// a multiprocessor several blocks.
#define ATTENTION_KERNELS(name, type, kind)                                                  \
    ATTENTION_KERNEL(name##_64_64, type, 64, 64, 2, 1, 128, kind)                            \
    ATTENTION_KERNEL(name##_96_96, type, 96, 96, 2, 1, 128, kind)                            \
    ATTENTION_KERNEL(name##_128_128, type, 128, 128, 2, 1, 128, kind)                        \
    ATTENTION_KERNEL(name##_192_128, type, 192, 128, 2, 1, (kind == PLAIN ? 128 : 64), kind) \
    ATTENTION_KERNEL(name##_256_256, type, 256, 256, 2, 1, 64, kind)                         \
    ATTENTION_KERNEL(name##_64_64_short, type, 64, 64, 1, 2, 128, kind)                      \
    ATTENTION_KERNEL(name##_96_96_short, type, 96, 96, 1, 2, 64, kind)                       \
    ATTENTION_KERNEL(name##_128_128_short, type, 128, 128, 1, 2, 64, kind)
