// The gated delta rule in chunks of 64 steps, on matrix units. SPDX-License-Identifier: MIT
//
//   (chunks: Yang et al. 2024, arXiv:2406.06484; with decay: arXiv:2412.06464)
//
// With S the state before the chunk, G_i = gamma_1 ... gamma_i and R_ij = gamma_(j+1) ... gamma_i the rule unrolls to
//
//   delta_i = beta_i (v_i - G_i S k_i - sum over j < i of R_ij (k_j.k_i) delta_j)
//   out_i   = G_i S q_i + sum over j <= i of R_ij (k_j.q_i) delta_j
//   S       = G_C S + sum over j of R_Cj delta_j k_j^T
//
// so that delta = M (v - G S k), M = (1 + beta R (k.k) below the diagonal)^-1 beta. What no state has a part in, M and
// N = R (k.q), is made for all chunks at once by gated_delta_prepare; gated_delta_chunks then goes through the chunks,
// a block to 32 rows of S, which it keeps in registers.
//
// Numerics: matrix units multiply bfloat16 and add float. A float counts as the sum of two bfloat16, which leaves a
// relative error of 2^-17, and the product of the two small parts is left out: the rule asks for 1e-4. bfloat16 q and k
// are exact as they are. R is formed by multiplication alone: a decay of 0 is nothing special. Where decays make the
// rule grow, where the inverse is large, and where anything is large or not finite, a chunk goes by steps, in float. A
// masked step is one of decay 1, beta 0 and zeros for k and v.
//
// Traffic: q, k, v and out once, and 32 KiB an item written and read. What a chunk needs comes by cp.async while the
// one before it is worked on.
#include "cuda/mma.cuh"

constexpr int STEPS = MTL_CUDA_CHUNK, SQUARE = STEPS * STEPS * 2; // bytes
constexpr float MOST = 0x1p40f, MOST_INVERSE = 16;

__device__ inline const char *place(const mtl_cuda_strided &operand, int64_t i, int64_t j, int64_t k) {
    return operand.data + i * operand.stride[0] + j * operand.stride[1] + k * operand.stride[2];
}

// What is rare stays out of line: the loop over chunks has to fit into the cache of instructions.
__device__ __noinline__ int64_t load_integer_of(const char *at, int dtype) { return load_integer(at, dtype); }
__device__ __noinline__ float load_float_of(const char *at, int dtype) { return load_float(at, dtype); }

__device__ inline bool is_live(const mtl_cuda_gated_delta_args &p, int64_t batch, int64_t time) {
    return time < p.time && (!p.mask.data || load_integer_of(place(p.mask, batch, time, 0), p.mask.dtype) != 0);
}

__device__ inline bool fits(float x, float most) { return fabsf(x) <= most; } // NaN does not

// Two floats, each as a sum of two bfloat16.
__device__ inline void split(float x, float y, unsigned &high, unsigned &low) {
    high = narrow_pair(x, y, __nv_bfloat16());
    low = narrow_pair(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xffff0000u), __nv_bfloat16());
}

__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply(c, a, b0, b1, __nv_bfloat16());
}

// Bytes of q or k of a chunk: with bfloat16 as they are, else their two parts.
template <typename T> constexpr bool EXACT = Element<T>::dtype == BF16;
template <typename T, int KEY_DIM> constexpr int KEYS_TILE = STEPS *KEY_DIM * 2;

// ---- what depends on no state

template <typename T, int KEY_DIM>
__device__ inline void gated_delta_prepare(const mtl_cuda_gated_delta_chunks_args &args) {
    const mtl_cuda_gated_delta_args &p = args.delta;
    constexpr int THREADS = 4 * WARP, TILE = KEYS_TILE<T, KEY_DIM>, PARTS = EXACT<T> ? 1 : 2, CHUNKS = KEY_DIM / 8;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float gamma[STEPS], beta[STEPS];
    constexpr int PADDED = STEPS + 4, FLOATS = STEPS * PADDED * 4, AREA = PARTS * TILE > FLOATS ? PARTS * TILE : FLOATS;
    unsigned k_tile = (unsigned)__cvta_generic_to_shared(shared), q_tile = k_tile + AREA;
    int64_t chunk, head, item = blockIdx.x, batch = divide(divide(item, args.chunks, chunk), p.v_heads, head);
    int64_t group = p.v_heads / p.k_heads, k_head = head / group, first = chunk * STEPS;

    for (int i = threadIdx.x; i < STEPS * CHUNKS; i += THREADS) {
        int row = i / CHUNKS, column = i % CHUNKS;
        bool there = is_live(p, batch, first + row);
        const char *k = place(p.k, batch, first + row, k_head), *q = place(p.q, batch, first + row, k_head);
        unsigned to = chunk_at<KEY_DIM>(0, row, column);
        if constexpr (EXACT<T>) {
            copy_async(k_tile + to, there ? k + column * 16 : p.k.data, there);
            copy_async(q_tile + to, there ? q + column * 16 : p.q.data, there);
        } else {
            char *keep = args.keys + ((batch * p.k_heads + k_head) * args.chunks + chunk) * 4 * TILE +
                         (row * CHUNKS + column) * 16;
#pragma unroll
            for (int side = 0; side < 2; side++) {
                float x[8] = {};
                const char *from = (side ? q : k) + column * 8 * (int)sizeof(T);
                if (there) {
#pragma unroll
                    for (int j = 0; j < 8; j += LANES<T>) widen(x + j, *(const uint4 *)(from + j * sizeof(T)), T());
                }
                uint4 high, low;
                split(x[0], x[1], high.x, low.x), split(x[2], x[3], high.y, low.y);
                split(x[4], x[5], high.z, low.z), split(x[6], x[7], high.w, low.w);
                unsigned char *tile = shared + side * AREA;
                *(uint4 *)(tile + to) = high, *(uint4 *)(tile + TILE + to) = low;
                if (head % group == 0)
                    *(uint4 *)(keep + side * 2 * TILE) = high, *(uint4 *)(keep + (side * 2 + 1) * TILE) = low;
            }
        }
    }
    copies_end();
    if (threadIdx.x < STEPS) {
        bool live = is_live(p, batch, first + threadIdx.x);
        gamma[threadIdx.x] = live ? load_float_of(place(p.gamma, batch, first + threadIdx.x, head), p.gamma.dtype) : 1;
        beta[threadIdx.x] = live ? load_float_of(place(p.beta, batch, first + threadIdx.x, head), p.beta.dtype) : 0;
    }
    copies_wait<0>();
    __syncthreads();

    // k.k and q.k of 16 rows a warp, as far as the diagonal.
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float dots[2][STEPS / 8][4] = {};
#pragma unroll 2
    for (int step = 0; step < KEY_DIM / 16; step++) {
        unsigned a[2][PARTS][4];
        unsigned from = chunk_at<KEY_DIM>(0, warp * 16 + lane % 16, step * 2 + lane / 16);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            load_matrices(a[0][part], k_tile + part * TILE + from);
            load_matrices(a[1][part], q_tile + part * TILE + from);
        }
#pragma unroll
        for (int pair = 0; pair < STEPS / 16; pair++) {
            if (pair > warp) continue;
            unsigned b[PARTS][4];
            unsigned at = chunk_at<KEY_DIM>(k_tile, pair * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2);
#pragma unroll
            for (int part = 0; part < PARTS; part++) load_matrices(b[part], at + part * TILE);
#pragma unroll
            for (int side = 0; side < 2; side++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float(&c)[4] = dots[side][2 * pair + half];
                    multiply(c, a[side][0], b[0][2 * half], b[0][2 * half + 1]);
                    if constexpr (!EXACT<T>) {
                        multiply(c, a[side][0], b[1][2 * half], b[1][2 * half + 1]);
                        multiply(c, a[side][1], b[0][2 * half], b[0][2 * half + 1]);
                    }
                }
            }
        }
    }
    __syncthreads();
    float(*square)[PADDED] = (float(*)[PADDED])shared, (*with_q)[PADDED] = (float(*)[PADDED])(shared + AREA);
#pragma unroll
    for (int side = 0; side < 2; side++) {
#pragma unroll
        for (int n = 0; n < STEPS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float2 pair = make_float2(dots[side][n][2 * i], dots[side][n][2 * i + 1]);
                *(float2 *)&(side ? with_q : square)[warp * 16 + lane / 4 + 8 * i][n * 8 + lane % 4 * 2] = pair;
            }
        }
    }
    __syncthreads();

    // A thread to a column j of either: times R_ij, which goes down the column.
    int j = threadIdx.x % STEPS, wrong = !fits(gamma[j], 1) || !fits(beta[j], MOST);
    char *matrices = args.matrices + item * 4 * SQUARE;
    auto keep = [&](int which, int i, float x) {
        __nv_bfloat16 high = __float2bfloat16_rn(x);
        __nv_bfloat16 *to = (__nv_bfloat16 *)(matrices + which * 2 * SQUARE) + i * STEPS + j;
        to[0] = high, to[STEPS * STEPS] = __float2bfloat16_rn(x - __bfloat162float(high));
    };
    if (threadIdx.x < STEPS) {
        float decay = 1, *decays = args.decays + item * 2 * STEPS, from_beginning = 1;
        for (int i = 0; i < STEPS; i++) {
            if (i <= j) {
                from_beginning *= gamma[i];
                continue;
            }
            decay *= gamma[i];
            wrong |= !fits(square[i][j], MOST);
            square[i][j] *= beta[i] * decay;
        }
        decays[j] = from_beginning, decays[STEPS + j] = decay;
        asm volatile("bar.sync 1, 64;" ::: "memory");
        float x[STEPS]; // of the inverse
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            float sums[4] = {i == j ? 1.0f : 0, 0, 0, 0};
#pragma unroll
            for (int m = 0; m < i; m += 4) {
                float4 row = *(const float4 *)&square[i][m];
                sums[0] = fmaf(-row.x, x[m], sums[0]);
                if (m + 1 < i) sums[1] = fmaf(-row.y, x[m + 1], sums[1]);
                if (m + 2 < i) sums[2] = fmaf(-row.z, x[m + 2], sums[2]);
                if (m + 3 < i) sums[3] = fmaf(-row.w, x[m + 3], sums[3]);
            }
            x[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
            wrong |= !fits(x[i], MOST_INVERSE);
            keep(0, i, x[i] * beta[j]);
        }
    } else {
        float decay = 1;
        for (int i = 0; i < STEPS; i++) {
            float x = 0;
            if (i >= j) {
                if (i > j) decay *= gamma[i];
                wrong |= !fits(with_q[i][j], MOST);
                x = with_q[i][j] * decay;
            }
            keep(1, i, x);
        }
    }
    wrong = __syncthreads_or(wrong);
    if (threadIdx.x == 0) args.by_steps[item] = wrong;
}

// ---- chunk after chunk

constexpr int ROWS = 32, WARPS = 8, CHUNK_THREADS = WARPS * WARP, ROW_BYTES = 80; // of ROWS numbers: other banks each

// A tile of STEPS rows of ROWS bfloat16: 16 bytes of it.
__device__ inline unsigned narrow_at(unsigned tile, int row, int chunk) { return tile + row * ROW_BYTES + chunk * 16; }

template <typename T, int KEY_DIM>
__device__ inline void gated_delta_chunks(const mtl_cuda_gated_delta_chunks_args &args) {
    const mtl_cuda_gated_delta_args &p = args.delta;
    constexpr int PARTS = EXACT<T> ? 1 : 2, TILE = KEYS_TILE<T, KEY_DIM>, CHUNKS = KEY_DIM / 8;
    constexpr int STAGE = 2 * PARTS * TILE + 4 * SQUARE, NARROW = STEPS * ROW_BYTES, STATE = ROWS * KEY_DIM * 2;
    constexpr int COLUMNS = KEY_DIM / 4; // of the state, a warp of the first four
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ float v_tile[STEPS][ROWS + 1], decays[2][2 * STEPS];
    unsigned base = (unsigned)__cvta_generic_to_shared(shared);
    unsigned state_tile = base, rest_tile = state_tile + 2 * STATE, delta_tile = rest_tile + 2 * NARROW;
    unsigned ended_tile = delta_tile + 2 * NARROW, stages = ended_tile + 2 * NARROW;
    float(*steps_state)[KEY_DIM] =
        (float(*)[KEY_DIM])shared; // by steps, over state_tile and, for its size, what follows

    int64_t head, batch = divide(blockIdx.x, p.v_heads, head), k_head = head / (p.v_heads / p.k_heads);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first_row = blockIdx.y * ROWS;
    int64_t first_item = (batch * p.v_heads + head) * args.chunks;
    auto row_there = [&](int row) { return first_row + row < p.value_dim; };

    // A thread has the same 16 bytes of every PASS rows, and a value of every WARPS steps.
    constexpr int PASS = CHUNK_THREADS / CHUNKS, PASS_OF_SQUARE = CHUNK_THREADS / 8;
    int key_row = threadIdx.x / CHUNKS, key_column = threadIdx.x % CHUNKS;
    const char *k_from = place(p.k, batch, key_row, k_head) + key_column * 16;
    const char *q_from = place(p.q, batch, key_row, k_head) + key_column * 16;
    const char *v_from = place(p.v, batch, warp, head) + (first_row + lane) * p.v.stride[3];
    const char *keys_from = args.keys + (batch * p.k_heads + k_head) * args.chunks * 4 * TILE + threadIdx.x * 16;
    const char *matrices_from = args.matrices + first_item * 4 * SQUARE + threadIdx.x * 16;
    unsigned key_to = chunk_at<KEY_DIM>(0, key_row, key_column);
    unsigned matrix_to = chunk_at<STEPS>(2 * PARTS * TILE, threadIdx.x / 8, threadIdx.x % 8);
    auto is_whole = [&](int64_t chunk) { return !p.mask.data && (chunk + 1) * STEPS <= p.time; };
    auto fetch = [&](int64_t chunk, unsigned stage) {
        if constexpr (EXACT<T>) {
            const char *k = k_from + chunk * STEPS * p.k.stride[1], *q = q_from + chunk * STEPS * p.q.stride[1];
            bool whole = is_whole(chunk);
#pragma unroll
            for (int pass = 0; pass < STEPS / PASS; pass++) {
                bool there = whole || is_live(p, batch, chunk * STEPS + key_row + pass * PASS);
                unsigned to = stage + key_to + pass * PASS * KEY_DIM * 2;
                copy_async(to, there ? k : p.k.data, there);
                copy_async(to + TILE, there ? q : p.q.data, there);
                k += PASS * p.k.stride[1], q += PASS * p.q.stride[1];
            }
        } else {
            const char *from = keys_from + chunk * 4 * TILE;
#pragma unroll
            for (int pass = 0; pass < 4 * STEPS / PASS; pass++)
                copy_async(stage + key_to + pass * PASS * KEY_DIM * 2, from + pass * CHUNK_THREADS * 16, true);
        }
        const char *from = matrices_from + chunk * 4 * SQUARE;
#pragma unroll
        for (int pass = 0; pass < 4 * STEPS / PASS_OF_SQUARE; pass++)
            copy_async(stage + matrix_to + pass * PASS_OF_SQUARE * STEPS * 2, from + pass * CHUNK_THREADS * 16, true);
        copies_end();
    };
    bool typed_v = p.v.dtype == Element<T>::dtype;
    unsigned staged_v[STEPS * ROWS / CHUNK_THREADS]; // as they came: to widen one would wait for it
    float staged_decay;
    auto read_v = [&](int64_t chunk) {
        staged_decay = threadIdx.x < 2 * STEPS ? args.decays[(first_item + chunk) * 2 * STEPS + threadIdx.x] : 0;
        const char *from = v_from + chunk * STEPS * p.v.stride[1];
        bool whole = is_whole(chunk);
#pragma unroll
        for (int i = 0; i < STEPS * ROWS / CHUNK_THREADS; i++) {
            staged_v[i] = 0;
            if (row_there(lane) && (whole || is_live(p, batch, chunk * STEPS + i * WARPS + warp))) {
                if (!typed_v) staged_v[i] = __float_as_uint(load_float_of(from, p.v.dtype));
                else if constexpr (sizeof(T) == 4) staged_v[i] = *(const unsigned *)from;
                else staged_v[i] = *(const unsigned short *)from;
            }
            from += WARPS * p.v.stride[1];
        }
    };
    auto keep_v = [&](int64_t chunk) {
        if (threadIdx.x < 2 * STEPS) decays[chunk % 2][threadIdx.x] = staged_decay;
#pragma unroll
        for (int i = 0; i < STEPS * ROWS / CHUNK_THREADS; i++) {
            float v = __uint_as_float(staged_v[i]);
            if (typed_v && EXACT<T>) v = __uint_as_float(staged_v[i] << 16);
            else if (typed_v && sizeof(T) == 2) v = __half2float(__ushort_as_half((unsigned short)staged_v[i]));
            v_tile[i * WARPS + warp][lane] = v;
        }
    };

    // The state: of the first four warps' lanes, COLUMNS columns a warp.
    float state[2][COLUMNS / 8][4] = {};
    auto each_of_state = [&](auto visit) { // (row, column, number)
        if (warp >= 4) return;
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++)
                    visit(m * 16 + lane / 4 + e / 2 * 8, warp * COLUMNS + n * 8 + lane % 4 * 2 + e % 2, state[m][n][e]);
            }
        }
    };
    auto share_state = [&]() {
        if (warp >= 4) return;
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    unsigned high, low;
                    split(state[m][n][2 * i], state[m][n][2 * i + 1], high, low);
                    unsigned to =
                        chunk_at<KEY_DIM>(0, m * 16 + lane / 4 + 8 * i, warp * COLUMNS / 8 + n) + lane % 4 * 4;
                    *(unsigned *)(shared + to) = high, *(unsigned *)(shared + STATE + to) = low;
                }
            }
        }
    };
    if (p.initial_state.data)
        each_of_state([&](int row, int column, float &x) {
            if (row_there(row))
                x = load_float_of(place(p.initial_state, batch, head, first_row + row) +
                                      column * p.initial_state.stride[3],
                                  p.initial_state.dtype);
        });
    share_state();
    fetch(0, stages);
    read_v(0);
    keep_v(0);
    copies_wait<0>();
    __syncthreads();

    constexpr int SIZE = sizeof(T);
    bool paired = p.out.dtype == Element<T>::dtype && p.out.stride[3] == SIZE && row_there(ROWS - 1) &&
                  (((int64_t)p.out.data | p.out.stride[0] | p.out.stride[1] | p.out.stride[2]) & (2 * SIZE - 1)) == 0;
    int m_tile = warp % 4, first_step = m_tile * 16 + lane / 4; // the warp's steps, and the lane's: and the one 8 on
    for (int64_t chunk = 0; chunk < args.chunks; chunk++) {
        unsigned stage = stages + (args.stages > 1 ? (unsigned)(chunk % 2) * STAGE : 0);
        unsigned q_tile = stage + PARTS * TILE, inverse = stage + 2 * PARTS * TILE, with_q = inverse + 2 * SQUARE;
        const float *from_beginning = decays[chunk % 2], *to_end = from_beginning + STEPS;
        bool more = chunk + 1 < args.chunks;
        if (more) {
            read_v(chunk + 1);
            if (args.stages > 1) fetch(chunk + 1, stages + (unsigned)((chunk + 1) % 2) * STAGE);
        }
        int wrong = args.by_steps[first_item + chunk];

        // S k by four warps, S q by the others.
        float with_state[ROWS / 8][4] = {};
        struct Operands { // of a product's step; loaded while the step before is multiplied
            unsigned a[PARTS][4], high[ROWS / 16][4], low[ROWS / 16][4];
        } operands[2];
        auto load_step = [&](Operands &to, int step) {
#pragma unroll
            for (int part = 0; part < PARTS; part++)
                load_matrices(to.a[part], chunk_of_pair<KEY_DIM>((warp < 4 ? stage : q_tile) + part * TILE,
                                                                 m_tile * 16 + lane % 16, lane / 16, step));
#pragma unroll
            for (int pair = 0; pair < ROWS / 16; pair++) {
                unsigned at =
                    chunk_of_pair<KEY_DIM>(state_tile, pair * 16 + lane % 8 + lane / 16 * 8, lane / 8 % 2, step);
                load_matrices(to.high[pair], at);
                load_matrices(to.low[pair], at + STATE);
            }
        };
        load_step(operands[0], 0);
#pragma unroll
        for (int step = 0; step < KEY_DIM / 16; step++) {
            const Operands &now = operands[step % 2];
            if (step + 1 < KEY_DIM / 16) load_step(operands[(step + 1) % 2], step + 1);
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++)
                multiply(with_state[n], now.a[0], now.high[n / 2][n % 2 * 2], now.high[n / 2][n % 2 * 2 + 1]);
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++)
                multiply(with_state[n], now.a[0], now.low[n / 2][n % 2 * 2], now.low[n / 2][n % 2 * 2 + 1]);
            if constexpr (!EXACT<T>) {
#pragma unroll
                for (int n = 0; n < ROWS / 8; n++)
                    multiply(with_state[n], now.a[1], now.high[n / 2][n % 2 * 2], now.high[n / 2][n % 2 * 2 + 1]);
            }
        }
        // Of 16-bit pairs at [step][row], both parts.
        auto put = [&](unsigned tile, int step, int row, float x, float y) {
            unsigned high, low, to = narrow_at(tile - base, step, 0) + row * 2;
            split(x, y, high, low);
            *(unsigned *)(shared + to) = high, *(unsigned *)(shared + NARROW + to) = low;
        };
        if (warp < 4) {
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int step = first_step + 8 * i, row = n * 8 + lane % 4 * 2;
                    float decay = from_beginning[step], x = v_tile[step][row] - decay * with_state[n][2 * i],
                          y = v_tile[step][row + 1] - decay * with_state[n][2 * i + 1];
                    wrong |= !fits(x, MOST) || !fits(y, MOST);
                    put(rest_tile, step, row, x, y);
                }
            }
        }
        __syncthreads();

        // delta = M (v - G S k): 16 steps and 16 rows a warp.
        float parts[3][2][4] = {}; // in three chains, for the wait between products
#pragma unroll
        for (int step = 0; step < STEPS / 16; step++) {
            if (step > m_tile) continue;
            unsigned a[2][4], b[2][4];
#pragma unroll
            for (int part = 0; part < 2; part++) {
                load_matrices(a[part],
                              chunk_of_pair<STEPS>(inverse + part * SQUARE, m_tile * 16 + lane % 16, lane / 16, step));
                load_transposed(b[part],
                                narrow_at(rest_tile + part * NARROW, step * 16 + lane % 16, warp / 4 * 2 + lane / 16));
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                multiply(parts[0][half], a[0], b[0][2 * half], b[0][2 * half + 1]);
                multiply(parts[1][half], a[0], b[1][2 * half], b[1][2 * half + 1]);
                multiply(parts[2][half], a[1], b[0][2 * half], b[0][2 * half + 1]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int step = first_step + 8 * i, row = warp / 4 * 16 + half * 8 + lane % 4 * 2;
                float x = parts[0][half][2 * i] + (parts[1][half][2 * i] + parts[2][half][2 * i]);
                float y = parts[0][half][2 * i + 1] + (parts[1][half][2 * i + 1] + parts[2][half][2 * i + 1]);
                wrong |= !fits(x, MOST) || !fits(y, MOST);
                put(delta_tile, step, row, x, y);
                put(ended_tile, step, row, x * to_end[step], y * to_end[step]);
            }
        }
        if (more) keep_v(chunk + 1);
        wrong = __syncthreads_or(wrong);

        if (wrong) {
            each_of_state([&](int row, int column, float &x) { steps_state[row][column] = x; });
            __syncthreads();
            constexpr int LANES_OF_ROW = CHUNK_THREADS / ROWS;
            int row = threadIdx.x / LANES_OF_ROW, part = threadIdx.x % LANES_OF_ROW;
            int64_t end = min((chunk + 1) * STEPS, p.time);
            for (int64_t time = chunk * STEPS; time < end; time++) {
                float out = 0;
                if (is_live(p, batch, time)) {
                    const char *q = place(p.q, batch, time, k_head), *k = place(p.k, batch, time, k_head);
                    float decay = load_float_of(place(p.gamma, batch, time, head), p.gamma.dtype), with_k = 0;
                    float beta = load_float_of(place(p.beta, batch, time, head), p.beta.dtype);
                    float v = row_there(row)
                                  ? load_float_of(place(p.v, batch, time, head) + (first_row + row) * p.v.stride[3],
                                                  p.v.dtype)
                                  : 0;
                    for (int i = part; i < KEY_DIM; i += LANES_OF_ROW) {
                        float s = steps_state[row][i] * decay;
                        steps_state[row][i] = s;
                        with_k = fmaf(s, load_float_of(k + i * p.k.stride[3], p.k.dtype), with_k);
                    }
                    float delta = beta * (v - over_warp<float, add<float>>(with_k, LANES_OF_ROW));
                    for (int i = part; i < KEY_DIM; i += LANES_OF_ROW) {
                        float s = fmaf(delta, load_float_of(k + i * p.k.stride[3], p.k.dtype), steps_state[row][i]);
                        steps_state[row][i] = s;
                        out = fmaf(s, load_float_of(q + i * p.q.stride[3], p.q.dtype), out);
                    }
                    out = over_warp<float, add<float>>(out, LANES_OF_ROW);
                }
                if (part == 0 && row_there(row))
                    store_float((char *)place(p.out, batch, time, head) + (first_row + row) * p.out.stride[3],
                                p.out.dtype, out);
            }
            __syncthreads();
            each_of_state([&](int row, int column, float &x) { x = steps_state[row][column]; });
            __syncthreads();
        } else if (warp >= 4) {
            // out = G S q + N delta
#pragma unroll
            for (int n = 0; n < ROWS / 8; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) with_state[n][e] *= from_beginning[first_step + e / 2 * 8];
            }
#pragma unroll
            for (int step = 0; step < STEPS / 16; step++) {
                if (step > m_tile) continue;
                unsigned a[2][4];
#pragma unroll
                for (int part = 0; part < 2; part++)
                    load_matrices(a[part], chunk_of_pair<STEPS>(with_q + part * SQUARE, m_tile * 16 + lane % 16,
                                                                lane / 16, step));
#pragma unroll
                for (int pair = 0; pair < ROWS / 16; pair++) {
                    unsigned high[4], low[4];
                    unsigned at = narrow_at(delta_tile, step * 16 + lane % 16, pair * 2 + lane / 16);
                    load_transposed(high, at);
                    load_transposed(low, at + NARROW);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float(&c)[4] = with_state[2 * pair + half];
                        multiply(c, a[0], high[2 * half], high[2 * half + 1]);
                        multiply(c, a[0], low[2 * half], low[2 * half + 1]);
                        multiply(c, a[1], high[2 * half], high[2 * half + 1]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int64_t time = chunk * STEPS + first_step + 8 * i;
                if (time >= p.time) continue;
                bool live = !p.mask.data || is_live(p, batch, time);
                char *out = (char *)place(p.out, batch, time, head) + first_row * p.out.stride[3];
#pragma unroll
                for (int n = 0; n < ROWS / 8; n++) {
                    int row = n * 8 + lane % 4 * 2;
                    float x = live ? with_state[n][2 * i] : 0, y = live ? with_state[n][2 * i + 1] : 0;
                    if (paired) {
                        if constexpr (sizeof(T) == 4) *(float2 *)(out + row * 4) = make_float2(x, y);
                        else *(unsigned *)(out + row * 2) = narrow_pair(x, y, T());
                        continue;
                    }
                    if (row_there(row)) store_float(out + row * p.out.stride[3], p.out.dtype, x);
                    if (row_there(row + 1)) store_float(out + (row + 1) * p.out.stride[3], p.out.dtype, y);
                }
            }
        } else {
            // S = G_C S + delta k
            float decay = from_beginning[STEPS - 1];
            each_of_state([&](int, int, float &x) { x *= decay; });
#pragma unroll
            for (int step = 0; step < STEPS / 16; step++) {
                unsigned a[2][2][4];
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    unsigned at = narrow_at(ended_tile, step * 16 + lane / 16 * 8 + lane % 8, m * 2 + lane / 8 % 2);
                    load_transposed(a[m][0], at);
                    load_transposed(a[m][1], at + NARROW);
                }
#pragma unroll
                for (int pair = 0; pair < COLUMNS / 16; pair++) {
                    unsigned b[PARTS][4];
#pragma unroll
                    for (int part = 0; part < PARTS; part++)
                        load_transposed(b[part], chunk_at<KEY_DIM>(stage + part * TILE, step * 16 + lane % 16,
                                                                   warp * COLUMNS / 8 + pair * 2 + lane / 16));
#pragma unroll
                    for (int m = 0; m < 2; m++) {
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            float(&c)[4] = state[m][2 * pair + half];
                            multiply(c, a[m][0], b[0][2 * half], b[0][2 * half + 1]);
                            multiply(c, a[m][1], b[0][2 * half], b[0][2 * half + 1]);
                            if constexpr (!EXACT<T>) multiply(c, a[m][0], b[1][2 * half], b[1][2 * half + 1]);
                        }
                    }
                }
            }
        }
        share_state();
        if (more && args.stages == 1) {
            __syncthreads();
            fetch(chunk + 1, stages);
        }
        copies_wait<0>();
        __syncthreads();
    }
    each_of_state([&](int row, int column, float &x) {
        if (row_there(row))
            *(float *)((char *)place(p.state, batch, head, first_row + row) + column * p.state.stride[3]) = x;
    });
}

#define GATED_DELTA_KERNELS(dtype, type, dim)                                                                \
    extern "C" __global__ void __launch_bounds__(128)                                                        \
        gated_delta_prepare_##dtype##_##dim(const __grid_constant__ mtl_cuda_gated_delta_chunks_args args) { \
        gated_delta_prepare<type, dim>(args);                                                                \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(CHUNK_THREADS, 1)                                           \
        gated_delta_chunks_##dtype##_##dim(const __grid_constant__ mtl_cuda_gated_delta_chunks_args args) {  \
        gated_delta_chunks<type, dim>(args);                                                                 \
    }
#define GATED_DELTA_DTYPE(dtype, type)   \
    GATED_DELTA_KERNELS(dtype, type, 64) \
    GATED_DELTA_KERNELS(dtype, type, 128)
GATED_DELTA_DTYPE(f32, float)
GATED_DELTA_DTYPE(f16, __half)
GATED_DELTA_DTYPE(bf16, __nv_bfloat16)
