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
// so that delta = M (v - G S k), M = (1 + L)^-1 beta, L = beta R (k.k) below the diagonal. What no state has a part in,
// M and N = R (k.q), is made for all chunks at once by gated_delta_prepare: the inverse in blocks of 16, those on the
// diagonal by substitution, the others by products. gated_delta_chunks then goes through the chunks, a block to 64 rows
// of S. Rows do not depend on each other, and a warp keeps 16 of them in registers over all chunks: sums of one product
// lie in the lanes as the next product wants its left operand, S k as S, delta as v - G S k. So no product's result
// goes through shared memory, which holds what the rows have in common, and warps wait for nothing but tiles. Four more
// warps fetch them, up to three chunks ahead, and take out away. On Hopper four warps multiply together (wgmma) and
// prepare the operands of one product while the matrix units are at the one before: v - G S k during S q, the parts of
// delta during M and the update, those of the next state during N delta.
//
// Numerics: matrix units multiply bfloat16 and add float. A float counts as the sum of two bfloat16, which leaves a
// relative error of 2^-17, and the product of the two small parts is left out: the rule asks for 1e-4. bfloat16 q and k
// are exact as they are. R is formed by multiplication alone: a decay of 0 is nothing special. Where decays make the
// rule grow, where L or the inverse is large, and where anything is large or not finite, a chunk goes by steps, in
// float. A masked step is one of decay 1, beta 0 and zeros for q, k and v.
//
// Traffic: q, k, v and out once, and 20 KiB an item written and read: M and N without what lies above the diagonal.
#include "cuda/mma.cuh"

constexpr int STEPS = MTL_CUDA_CHUNK, SQUARE = STEPS * STEPS * 2; // bytes: rows of 128, as the matrix units want them
constexpr int BLOCK = 16, BLOCKS = STEPS / BLOCK;
constexpr float MOST = 0x1p40f, MOST_INVERSE = 16;

__device__ inline const char *place(const mtl_cuda_strided &operand, int64_t i, int64_t j, int64_t k) {
    return operand.data + i * operand.stride[0] + j * operand.stride[1] + k * operand.stride[2];
}

__device__ inline bool fits(float x, float most) { return fabsf(x) <= most; } // NaN does not

// Two floats, each as a sum of two bfloat16.
__device__ inline void split(float x, float y, unsigned &high, unsigned &low) {
    high = narrow_pair(x, y, __nv_bfloat16());
    low = narrow_pair(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xffff0000u), __nv_bfloat16());
}

// The sums of 16 columns, two tiles of eight, as the left operand of 16 k.
__device__ inline void split_sums(const float *sums, unsigned (&high)[4], unsigned (&low)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) split(sums[2 * i], sums[2 * i + 1], high[i], low[i]);
}

__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    multiply(c, a, b0, b1, __nv_bfloat16());
}

// Whether q and k are bfloat16; else their tiles come twice, in two parts.
template <typename T> constexpr bool EXACT = Element<T>::dtype == BF16;
template <int KEY_DIM> constexpr int TILE = STEPS *KEY_DIM * 2; // of q or k of a chunk, bytes

// ---- what depends on no state

// Sums of a block of 16 x 16 to where the lane's belong in a square's two parts: whole sectors a row.
__device__ inline void store_block(char *own, const float (&sums)[8]) {
    int odd = threadIdx.x % 2;
    unsigned parts[2][4];
    split_sums(sums, parts[0], parts[1]);
#pragma unroll
    for (int part = 0; part < 2; part++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            unsigned left = parts[part][i], right = parts[part][2 + i];
            unsigned other = __shfl_xor_sync(ALL_LANES, odd ? left : right, 1);
            *(uint2 *)(own + part * SQUARE + i * 8 * STEPS * 2) =
                odd ? make_uint2(other, right) : make_uint2(left, other);
        }
    }
}

template <typename T, int KEY_DIM>
__device__ inline void gated_delta_prepare(const mtl_cuda_gated_delta_chunks_args &args) {
    const mtl_cuda_gated_delta_args &p = args.delta;
    constexpr int THREADS = 4 * WARP, PARTS = EXACT<T> ? 1 : 2, CHUNKS = KEY_DIM / 8, AREA = PARTS * TILE<KEY_DIM>;
    extern __shared__ __align__(1024) unsigned char shared[];
    // A warp has a block of the diagonal: R there; and L, column by column, which gives way to its inverse.
    constexpr int PADDED = BLOCK + 4, PITCH = 48; // numbers, bytes
    __shared__ float decay[BLOCKS][BLOCK][PADDED], gamma[STEPS], beta[STEPS];
    __shared__ unsigned live_bits[THREADS / WARP];
    unsigned char(*on_diagonal)[2 * BLOCK * PITCH] = (unsigned char(*)[2 * BLOCK * PITCH])(shared + 2 * SQUARE);
    unsigned k_tile = (unsigned)__cvta_generic_to_shared(shared), q_tile = k_tile + AREA;
    int64_t chunk, head, item = blockIdx.x, batch = divide(divide(item, args.chunks, chunk), p.v_heads, head);
    int64_t rest, group = divide(p.v_heads, p.k_heads, rest), k_head = divide(head, group, rest);
    int64_t first = chunk * STEPS, time = first + threadIdx.x;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

    uint64_t live = ~(uint64_t)0;
    if (p.mask.data || first + STEPS > p.time) {
        bool own = time < p.time && threadIdx.x < STEPS;
        if (own && p.mask.data) own = load_integer(place(p.mask, batch, time, 0), p.mask.dtype) != 0;
        unsigned bits = __ballot_sync(ALL_LANES, own);
        if (lane == 0) live_bits[warp] = bits;
        __syncthreads();
        live = (uint64_t)live_bits[1] << WARP | live_bits[0];
        if (threadIdx.x < 2) args.live[item * 2 + threadIdx.x] = live_bits[threadIdx.x];
    }
    float own_gamma = 1, own_beta = 0;
    if (threadIdx.x < STEPS && (live >> threadIdx.x & 1)) {
        own_gamma = load_float(place(p.gamma, batch, time, head), p.gamma.dtype);
        own_beta = load_float(place(p.beta, batch, time, head), p.beta.dtype);
    }
    constexpr int PASS = THREADS / CHUNKS; // rows at once
    int own_row = threadIdx.x / CHUNKS, column = threadIdx.x % CHUNKS;
    const char *k = place(p.k, batch, first + own_row, k_head) + column * 8 * (int)sizeof(T);
    const char *q = place(p.q, batch, first + own_row, k_head) + column * 8 * (int)sizeof(T);
    unsigned own_to = chunk_at<KEY_DIM>(0, own_row, column);
    [[maybe_unused]] char *keep =
        args.keys + ((batch * p.k_heads + k_head) * args.chunks + chunk) * 4 * TILE<KEY_DIM> + threadIdx.x * 16;
    if constexpr (EXACT<T>) {
#pragma unroll
        for (int pass = 0; pass < STEPS / PASS; pass++, k += PASS * p.k.stride[1], q += PASS * p.q.stride[1]) {
            bool there = live >> (own_row + pass * PASS) & 1;
            unsigned to = own_to + pass * PASS * KEY_DIM * 2;
            copy_async(k_tile + to, there ? k : p.k.data, there);
            copy_async(q_tile + to, there ? q : p.q.data, there);
        }
    } else {
        constexpr int AT_ONCE = 4, VECTORS = 8 / LANES<T>; // passes whose loads are on their way together
#pragma unroll
        for (int begin = 0; begin < STEPS / PASS; begin += AT_ONCE) {
            uint4 raw[AT_ONCE][2][VECTORS] = {};
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++, k += PASS * p.k.stride[1], q += PASS * p.q.stride[1]) {
                if (!(live >> (own_row + (begin + i) * PASS) & 1)) continue;
#pragma unroll
                for (int part = 0; part < VECTORS; part++)
                    raw[i][0][part] = *(const uint4 *)(k + part * 16),
                    raw[i][1][part] = *(const uint4 *)(q + part * 16);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
#pragma unroll
                for (int side = 0; side < 2; side++) {
                    float x[8];
#pragma unroll
                    for (int part = 0; part < VECTORS; part++) widen(x + part * LANES<T>, raw[i][side][part], T());
                    uint4 high, low;
                    split(x[0], x[1], high.x, low.x), split(x[2], x[3], high.y, low.y);
                    split(x[4], x[5], high.z, low.z), split(x[6], x[7], high.w, low.w);
                    unsigned char *to = shared + side * AREA + own_to + (begin + i) * PASS * KEY_DIM * 2;
                    *(uint4 *)to = high, *(uint4 *)(to + TILE<KEY_DIM>) = low;
                    if (rest == 0) { // the group's first head
                        char *at = keep + (begin + i) * THREADS * 16 + side * 2 * TILE<KEY_DIM>;
                        *(uint4 *)at = high, *(uint4 *)(at + TILE<KEY_DIM>) = low;
                    }
                }
            }
        }
    }
    copies_end();
    if (threadIdx.x < STEPS) gamma[threadIdx.x] = own_gamma, beta[threadIdx.x] = own_beta;
    int wrong = !fits(own_gamma, 1) || !fits(own_beta, MOST);
    __syncthreads();
    if (lane < BLOCK) { // a lane to a column of R
        float product = 1;
#pragma unroll
        for (int i = 0; i < BLOCK; i++) {
            product *= i > lane ? gamma[warp * BLOCK + i] : 1;
            decay[warp][i][lane] = i < lane ? 0 : product;
        }
    }
    copies_wait<0>();
    __syncthreads();
    // From a block's beginning to a step, from a step to its block's end, over a block.
    auto up_to = [&](int i) { return gamma[i / BLOCK * BLOCK] * decay[i / BLOCK][i % BLOCK][0]; };
    auto after = [&](int i) { return decay[i / BLOCK][BLOCK - 1][i % BLOCK]; };
    auto over_block = [&](int block) { return up_to(block * BLOCK + BLOCK - 1); };

    // k.k and q.k of 16 rows a warp, as far as the diagonal.
    float dots[2][BLOCKS][8] = {};
#pragma unroll 2
    for (int step = 0; step < KEY_DIM / 16; step++) {
        unsigned a[2][PARTS][4];
        unsigned from = chunk_at<KEY_DIM>(0, warp * 16 + lane % 16, step * 2 + lane / 16);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            load_matrices(a[0][part], k_tile + part * TILE<KEY_DIM> + from);
            load_matrices(a[1][part], q_tile + part * TILE<KEY_DIM> + from);
        }
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
            if (block > warp) continue;
            unsigned b[PARTS][4];
            unsigned at = chunk_at<KEY_DIM>(k_tile, block * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2);
#pragma unroll
            for (int part = 0; part < PARTS; part++) load_matrices(b[part], at + part * TILE<KEY_DIM>);
#pragma unroll
            for (int side = 0; side < 2; side++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float(&c)[4] = *(float(*)[4])(dots[side][block] + 4 * half);
                    multiply(c, a[side][0], b[0][2 * half], b[0][2 * half + 1]);
                    if constexpr (!EXACT<T>) {
                        multiply(c, a[side][0], b[1][2 * half], b[1][2 * half + 1]);
                        multiply(c, a[side][1], b[0][2 * half], b[0][2 * half + 1]);
                    }
                }
            }
        }
    }
    __syncthreads(); // L takes the place of the keys

    // The lane's four numbers side by side in the warp's rows of blocks, as store_block exchanges them.
    int i0 = lane / 4, pair = lane % 4 * 2, first_row = warp * BLOCK;
    char *own = args.matrices + item * 4 * SQUARE + ((first_row + i0) * STEPS + pair + lane % 2 * 6) * 2;
    float *column_of_l = (float *)on_diagonal[warp];
    float rise[2] = {up_to(first_row + i0), up_to(first_row + i0 + 8)};
    float step_size[2] = {beta[first_row + i0], beta[first_row + i0 + 8]}, between = 1, n[8];
    // The block on the diagonal
#pragma unroll
    for (int e = 0; e < 8; e++) {
        int i = i0 + e / 2 % 2 * 8, j = e / 4 * 8 + pair + e % 2;
        float l = 0;
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
            if (block == warp) l = dots[0][block][e], n[e] = dots[1][block][e];
        wrong |= i >= j && !(fits(l, MOST) && fits(n[e], MOST));
        n[e] = i >= j ? n[e] * decay[warp][i][j] : 0;
        l = i > j ? l * decay[warp][i][j] * step_size[e / 2 % 2] : 0;
        wrong |= !fits(l, MOST_INVERSE);
        column_of_l[j * PADDED + i] = l;
    }
    store_block(own + 2 * SQUARE + first_row * 2, n);
    // and those on its left; with k_i.k_i all k_i.k_j fit.
#pragma unroll
    for (int block = BLOCKS - 2; block >= 0; block--) {
        if (block >= warp) continue;
        float(&l)[8] = dots[0][block];
        float2 fall[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            fall[half] = *(const float2 *)&decay[block][BLOCK - 1][half * 8 + pair];
            fall[half].x *= between, fall[half].y *= between;
        }
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float by = rise[e / 2 % 2] * (e % 2 ? fall[e / 4].y : fall[e / 4].x);
            n[e] = dots[1][block][e] * by, l[e] *= by * step_size[e / 2 % 2];
            wrong |= !fits(n[e], MOST) || !fits(l[e], MOST_INVERSE);
        }
        between *= over_block(block);
        store_block(own + 2 * SQUARE + block * BLOCK * 2, n);
        unsigned high[4], low[4];
        split_sums(l, high, low);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned to = chunk_at<STEPS>(0, first_row + i0 + i % 2 * 8, block * 2 + i / 2) + pair * 2;
            *(unsigned *)(shared + to) = high[i], *(unsigned *)(shared + SQUARE + to) = low[i];
        }
    }
    __syncwarp();
    float x[BLOCK]; // a lane's column of the inverse of 1 + L
#pragma unroll
    for (int i = 0; i < BLOCK; i++) x[i] = i == lane % BLOCK;
#pragma unroll
    for (int j = 0; j < BLOCK - 1; j++) {
#pragma unroll
        for (int i = (j + 1) / 4 * 4; i < BLOCK; i += 4) {
            float4 l = *(const float4 *)&column_of_l[j * PADDED + i];
            if (i > j) x[i] = fmaf(-l.x, x[j], x[i]);
            if (i + 1 > j) x[i + 1] = fmaf(-l.y, x[j], x[i + 1]);
            if (i + 2 > j) x[i + 2] = fmaf(-l.z, x[j], x[i + 2]);
            x[i + 3] = fmaf(-l.w, x[j], x[i + 3]);
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < BLOCK; i++) {
        wrong |= !fits(x[i], MOST_INVERSE);
        __nv_bfloat16 high = __float2bfloat16_rn(x[i]);
        __nv_bfloat16 *to = (__nv_bfloat16 *)(on_diagonal[warp] + i * PITCH) + lane % BLOCK;
        if (lane < BLOCK) *to = high, to[BLOCK * PITCH / 2] = __float2bfloat16_rn(x[i] - __bfloat162float(high));
    }
    __syncthreads();

    // X (1 + L) = 1 by rows of blocks, from the diagonal leftwards: X_IJ = -(sum over K = J + 1 ... I of X_IK L_KJ)
    // X_JJ.
    unsigned inverse[BLOCKS][2][4]; // [I - J][part]
#pragma unroll
    for (int distance = 0; distance < BLOCKS; distance++) {
        int block = warp - distance;
        if (block < 0) continue;
        auto add_product = [](float(&sums)[8], const unsigned(&a)[2][4], const unsigned(&b)[2][4]) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float(&c)[4] = *(float(*)[4])(sums + 4 * half);
                multiply(c, a[0], b[0][2 * half], b[0][2 * half + 1]);
                multiply(c, a[1], b[0][2 * half], b[0][2 * half + 1]);
                multiply(c, a[0], b[1][2 * half], b[1][2 * half + 1]);
            }
        };
        unsigned diagonal = (unsigned)__cvta_generic_to_shared(on_diagonal[block]);
        unsigned at = diagonal + lane % 16 * PITCH + lane / 16 * 16;
        float sums[8] = {};
        if (distance == 0) {
            load_matrices(inverse[0][0], at), load_matrices(inverse[0][1], at + BLOCK * PITCH);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                unsigned high = inverse[0][0][i], low = inverse[0][1][i];
                sums[2 * i] = __uint_as_float(high << 16) + __uint_as_float(low << 16);
                sums[2 * i + 1] = __uint_as_float(high & 0xffff0000u) + __uint_as_float(low & 0xffff0000u);
            }
        } else {
            unsigned b[2][4], to_left[2][4];
            float with_l[8] = {};
#pragma unroll
            for (int nearer = 0; nearer < distance; nearer++) {
                unsigned from = chunk_at<STEPS>(k_tile, (warp - nearer) * BLOCK + lane % 16, block * 2 + lane / 16);
                load_transposed(b[0], from), load_transposed(b[1], from + SQUARE);
                add_product(with_l, inverse[nearer], b);
            }
#pragma unroll
            for (int e = 0; e < 8; e++) with_l[e] = -with_l[e];
            split_sums(with_l, to_left[0], to_left[1]);
            load_transposed(b[0], at), load_transposed(b[1], at + BLOCK * PITCH);
            add_product(sums, to_left, b);
            split_sums(sums, inverse[distance][0], inverse[distance][1]);
        }
#pragma unroll
        for (int e = 0; e < 8; e++) {
            wrong |= !fits(sums[e], MOST_INVERSE);
            sums[e] *= beta[block * BLOCK + e / 4 * 8 + pair + e % 2];
        }
        store_block(own + block * BLOCK * 2, sums);
    }
    wrong = __syncthreads_or(wrong);
    if (threadIdx.x < STEPS) {
        int i = threadIdx.x;
        float from_beginning = up_to(i), to_end = after(i);
        for (int block = 0; block < BLOCKS; block++) {
            if (block < i / BLOCK) from_beginning *= over_block(block);
            if (block > i / BLOCK) to_end *= over_block(block);
        }
        mtl_cuda_gated_delta_decays &decays = args.decays[item];
        decays.from_beginning[i] = wrong ? NAN : from_beginning; // with which v - G S k does not fit
        decays.to_end[i] = to_end, decays.gamma[i] = gamma[i], decays.beta[i] = beta[i];
    }
}

// ---- products of the warps that hold the state; a left operand in registers, the right one in a tile of 64 steps

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "cuda/wgmma.cuh"

using Tile = uint64_t; // where it is, as the matrix units are told
__device__ inline Tile tile_at(unsigned at) { return descriptor(at, SQUARE); }
__device__ inline Tile within(Tile tile, int bytes) { return tile + (bytes >> 4); }

// C += A B, where row i of the tile is column i of B, as many as C has columns; k from 16 `step` on.
template <int SUMS>
__device__ inline void multiply_rows(float (&c)[SUMS], const unsigned (&a)[4], Tile tile, int step, bool add) {
    Tile b = within(tile, step / 4 * SQUARE + step % 4 * 32);
    multiply_registers_by_rows(c, a, b, add, __nv_bfloat16());
}
// C += A B, where row k of the tile is row k of B.
__device__ inline void multiply_steps(float (&c)[32], const unsigned (&a)[4], Tile tile, int step) {
    multiply_registers(c, a, within(tile, step * 16 * 128), 1, __nv_bfloat16());
}
// What ordinary instructions wrote to shared memory, for the matrix units.
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What load_transposed reads.
__device__ inline void store_transposed(const unsigned (&m)[4], unsigned at) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(m[0]),
                 "r"(m[1]), "r"(m[2]), "r"(m[3])
                 : "memory");
}
#else
using Tile = unsigned;
__device__ inline Tile tile_at(unsigned at) { return at; }
__device__ inline Tile within(Tile tile, int bytes) { return tile + bytes; }

template <int SUMS>
__device__ inline void multiply_rows(float (&c)[SUMS], const unsigned (&a)[4], Tile tile, int step, bool add) {
    int lane = threadIdx.x % WARP, row = lane % 8 + lane / 16 * 8;
#pragma unroll
    for (int pair = 0; pair < SUMS / 8; pair++) {
        unsigned b[4];
        load_matrices(b, chunk_at<STEPS>(tile + step / 4 * SQUARE, row + pair * 16, step % 4 * 2 + lane / 8 % 2));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float(&sums)[4] = *(float(*)[4])(c + 8 * pair + 4 * half);
            if (!add) sums[0] = sums[1] = sums[2] = sums[3] = 0;
            multiply(sums, a, b[2 * half], b[2 * half + 1]);
        }
    }
}
__device__ inline void multiply_steps(float (&c)[32], const unsigned (&a)[4], Tile tile, int step) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
        unsigned b[4];
        load_transposed(b, chunk_at<STEPS>(tile, step * 16 + lane % 16, pair * 2 + lane / 16));
        multiply(*(float(*)[4])(c + 8 * pair), a, b[0], b[1]);
        multiply(*(float(*)[4])(c + 8 * pair + 4), a, b[2], b[3]);
    }
}
__device__ inline void publish() {}
__device__ inline void products_begin() {}
__device__ inline void products_end() {}
template <int PENDING> __device__ inline void products_wait() {}
template <int N> __device__ inline void settle(float (&)[N]) {}

__device__ inline void barrier_wait(unsigned barrier, int parity) {
    asm volatile("{\n.reg .pred done;\n"
                 "WAIT:\n"
                 "mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra WAIT;\n}\n" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

__device__ inline void store_transposed(const unsigned (&m)[4], unsigned at) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned turned, to = __shfl_sync(ALL_LANES, at, i * 8 + lane / 4) + lane % 4 * 4;
        asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(m[i]));
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(turned) : "memory");
    }
}
#endif

// ---- chunk after chunk

constexpr int GROUP = 4 * WARP, ROWS = 64; // threads that hold the state, and as many that fetch; rows of a block
enum Barrier { VOTE = 1, FETCHERS };

// What stands behind the stages: for each, whether it is full, whether it is empty, whether its chunk went by steps.
struct Signals {
    uint64_t full[MTL_CUDA_STAGES], empty[MTL_CUDA_STAGES];
    int by_steps[MTL_CUDA_STAGES];
};
static_assert(sizeof(Signals) <= MTL_CUDA_SIGNALS);

// Of each thread that holds the state, or that fetches: what it did is done.
__device__ inline void arrive(uint64_t &barrier) { barrier_arrive((unsigned)__cvta_generic_to_shared(&barrier)); }
__device__ inline void wait_for(uint64_t &barrier, int parity) {
    barrier_wait((unsigned)__cvta_generic_to_shared(&barrier), parity);
}
__device__ inline bool any_of_group(bool x) {
    int any;
    asm volatile("{\n.reg .pred p, q;\nsetp.ne.b32 p, %1, 0;\nbar.red.or.pred q, %2, 128, p;\nselp.b32 %0, 1, 0, q;\n}"
                 : "=r"(any)
                 : "r"((int)x), "n"((int)VOTE)
                 : "memory");
    return any;
}

__device__ inline float2 load_pair(const char *at, float) { return *(const float2 *)at; }
template <typename T> __device__ inline float2 load_pair(const char *at, T t) {
    return widen_pair(*(const unsigned *)at, t);
}

// A stage: k, q (both parts each), M, N (both parts), decays, v: of type T where it is fit for copies, else both parts.
// What v's place gets back is out, of type T, for those who fetch to write where it is fit for 16 bytes at once.
template <typename T, int KEY_DIM> struct Stage {
    static constexpr int PARTS = EXACT<T> ? 1 : 2, Q = PARTS * TILE<KEY_DIM>, M = 2 * Q, N = M + 2 * SQUARE;
    static constexpr int DECAYS = N + 2 * SQUARE, V = DECAYS + (int)sizeof(mtl_cuda_gated_delta_decays);
    static constexpr int VALUES = 16 / (int)sizeof(T), V_CHUNKS = ROWS / VALUES; // of 16 bytes, of a step

    __device__ static unsigned v_at(int step, int chunk) { return chunk_at<V_CHUNKS * 8>(V, step, chunk); }
    __device__ static unsigned value_at(int step, int row) {
        return v_at(step, row / VALUES) + row % VALUES * (int)sizeof(T);
    }
};

// Of a chunk, a bit to a step.
__device__ inline uint64_t live_steps(const mtl_cuda_gated_delta_chunks_args &args, int64_t first_item, int64_t chunk) {
    bool all = !args.delta.mask.data && (chunk + 1) * STEPS <= args.delta.time;
    return all ? ~(uint64_t)0 : *(const uint64_t *)(args.live + (first_item + chunk) * 2);
}

// v that is not fit for copies, value by value.
template <typename V>
__device__ inline void split_values(const mtl_cuda_strided &v, const char *from, unsigned char *tile, int rows,
                                    uint64_t live, int thread) {
    constexpr int AT_ONCE = 8, PASS = GROUP / (ROWS / 2); // a thread to two rows
    int row = thread % (ROWS / 2) * 2;
    from += row * v.stride[3] + thread / (ROWS / 2) * v.stride[1];
#pragma unroll 1
    for (int first = thread / (ROWS / 2); first < STEPS; first += AT_ONCE * PASS) {
        V raw[AT_ONCE][2]; // of somewhere else where nothing is: without branches all loads are on their way together
        float x[AT_ONCE][2];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++, from += PASS * v.stride[1]) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                bool there = row + e < rows && (live >> (first + i * PASS) & 1);
                raw[i][e] = *(const V *)(there ? from + e * v.stride[3] : v.data);
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
#pragma unroll
            for (int e = 0; e < 2; e++)
                x[i][e] = row + e < rows && (live >> (first + i * PASS) & 1) ? (float)raw[i][e] : 0;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            // The first part is cut off, not rounded, so that it stays finite.
            unsigned bits[2] = {__float_as_uint(x[i][0]), __float_as_uint(x[i][1])};
            float rest[2];
#pragma unroll
            for (int e = 0; e < 2; e++) rest[e] = isinf(x[i][e]) ? 0 : x[i][e] - __uint_as_float(bits[e] & 0xffff0000u);
            unsigned char *to = tile + chunk_at<ROWS>(0, first + i * PASS, row / 8) + row % 8 * 2;
            *(unsigned *)to = __byte_perm(bits[0], bits[1], 0x7632);
            *(unsigned *)(to + SQUARE) = narrow_pair(rest[0], rest[1], __nv_bfloat16());
        }
    }
}

template <typename T, int KEY_DIM>
__device__ inline void fetch_chunks(const mtl_cuda_gated_delta_chunks_args &args, unsigned char *shared, int64_t batch,
                                    int64_t head, int first_row, int thread) {
    using S = Stage<T, KEY_DIM>;
    const mtl_cuda_gated_delta_args &p = args.delta;
    constexpr int CHUNKS = KEY_DIM / 8, PASS = GROUP / CHUNKS; // rows at once
    int64_t k_head = head / (p.v_heads / p.k_heads), first_item = (batch * p.v_heads + head) * args.chunks;
    int row = thread / CHUNKS, column = thread % CHUNKS, rows = (int)min(p.value_dim - first_row, (int64_t)ROWS);
    unsigned base = (unsigned)__cvta_generic_to_shared(shared);
    unsigned key_to = column / 8 * SQUARE + chunk_at<STEPS>(0, row, column % 8);
    const char *k_from = place(p.k, batch, row, k_head) + column * 16;
    const char *q_from = place(p.q, batch, row, k_head) + column * 16;
    const char *keys_from = args.keys + (batch * p.k_heads + k_head) * args.chunks * 4 * TILE<KEY_DIM> + thread * 16;
    const char *v_from = place(p.v, batch, 0, head) + first_row * p.v.stride[3];
    // Of a square's rows of blocks the last and, together, the first and the third are one copy a thread; of two
    // squares' second ones it is one.
    int second = thread % 64, third = thread - 32;
    int square_row[3] = {48 + thread / 8, thread < 32 ? thread / 2 : 32 + third / 6, 16 + second / 4};
    int square_column[3] = {thread % 8, thread < 32 ? thread % 2 : third % 6, second % 4};
    constexpr int V_PASS = GROUP / S::V_CHUNKS; // steps at once
    int v_step = thread / S::V_CHUNKS, v_column = thread % S::V_CHUNKS;
    bool v_there = v_column * S::VALUES < rows;
    Signals &signals = *(Signals *)(shared + args.stages * args.stage_bytes);
    auto write_out = [&](int64_t chunk, int slot) {
        const unsigned char *stage = shared + slot * args.stage_bytes;
        if (!args.out_copies || signals.by_steps[slot] || !v_there) return;
        char *to =
            (char *)place(p.out, batch, chunk * STEPS + v_step, head) + first_row * (int)sizeof(T) + v_column * 16;
#pragma unroll
        for (int pass = 0; pass < STEPS / V_PASS; pass++, to += V_PASS * p.out.stride[1]) {
            int step = v_step + pass * V_PASS;
            if (chunk * STEPS + step < p.time) *(uint4 *)to = *(const uint4 *)(stage + S::v_at(step, v_column));
        }
    };

    bool ahead = args.stages > 2; // a chunk still on its way when the next one is asked for
    auto arrived = [&](int slot) {
        publish();
        arrive(signals.full[slot]);
    };
    int slot = 0, last = 0, parity = 1;
    for (int64_t chunk = 0; chunk < args.chunks; chunk++) {
        if (chunk >= args.stages) {
            wait_for(signals.empty[slot], parity);
            write_out(chunk - args.stages, slot);
            // A copy of v goes where the same thread has just read; other values do not.
            if (!args.v_copies) asm volatile("bar.sync %0, %1;" ::"n"((int)FETCHERS), "n"(GROUP) : "memory");
        }
        unsigned stage = base + slot * args.stage_bytes;
        uint64_t live = live_steps(args, first_item, chunk);
        if constexpr (EXACT<T>) {
            const char *k = k_from + chunk * STEPS * p.k.stride[1], *q = q_from + chunk * STEPS * p.q.stride[1];
#pragma unroll
            for (int pass = 0; pass < STEPS / PASS; pass++) {
                bool there = live >> (row + pass * PASS) & 1;
                unsigned to = stage + key_to + pass * PASS * 128;
                copy_async(to, there ? k : p.k.data, there);
                copy_async(to + S::Q, there ? q : p.q.data, there);
                k += PASS * p.k.stride[1], q += PASS * p.q.stride[1];
            }
        } else {
            const char *from = keys_from + chunk * 4 * TILE<KEY_DIM>;
#pragma unroll
            for (int tile = 0; tile < 4; tile++) {
#pragma unroll
                for (int pass = 0; pass < STEPS / PASS; pass++, from += GROUP * 16)
                    copy_async(stage + tile * TILE<KEY_DIM> + key_to + pass * PASS * 128, from, true);
            }
        }
        const char *from = args.matrices + (first_item + chunk) * 4 * SQUARE;
#pragma unroll
        for (int i = 0; i < 10; i++) {
            int which = i < 8 ? i % 2 : 2, square = i < 8 ? i / 2 : (i - 8) * 2 + thread / 64;
            copy_async(chunk_at<STEPS>(stage + S::M + square * SQUARE, square_row[which], square_column[which]),
                       from + square * SQUARE + square_row[which] * 128 + square_column[which] * 16, true);
        }
        if (thread < (int)sizeof(mtl_cuda_gated_delta_decays) / 16)
            copy_async(stage + S::DECAYS + thread * 16, (const char *)&args.decays[first_item + chunk] + thread * 16,
                       true);
        const char *v = v_from + chunk * STEPS * p.v.stride[1];
        if (args.v_copies) {
            v += v_step * p.v.stride[1] + v_column * 16;
#pragma unroll
            for (int pass = 0; pass < STEPS / V_PASS; pass++, v += V_PASS * p.v.stride[1]) {
                int step = v_step + pass * V_PASS;
                bool there = v_there && (live >> step & 1);
                copy_async(stage + S::v_at(step, v_column), there ? v : p.v.data, there);
            }
        } else {
            unsigned char *to = shared + slot * args.stage_bytes + S::V;
            if (p.v.dtype == F32) split_values<float>(p.v, v, to, rows, live, thread);
            else if (p.v.dtype == F16) split_values<__half>(p.v, v, to, rows, live, thread);
            else split_values<__nv_bfloat16>(p.v, v, to, rows, live, thread);
        }
        copies_end();
        if (!ahead) {
            copies_wait<0>();
            arrived(slot);
        } else if (chunk > 0) {
            copies_wait<1>();
            arrived(last);
        }
        last = slot;
        if (++slot == args.stages) slot = 0, parity ^= 1;
    }
    if (ahead) {
        copies_wait<0>();
        arrived(last);
    }
    for (int64_t chunk = max(args.chunks - args.stages, (int64_t)0); chunk < args.chunks; chunk++) {
        slot = (int)(chunk % args.stages);
        wait_for(signals.empty[slot], (int)(chunk / args.stages % 2));
        write_out(chunk, slot);
    }
}

template <typename T, int KEY_DIM>
__device__ inline void gated_delta_chunks(const mtl_cuda_gated_delta_chunks_args &args) {
    using S = Stage<T, KEY_DIM>;
    const mtl_cuda_gated_delta_args &p = args.delta;
    constexpr int PARTS = S::PARTS, TILES = KEY_DIM / 8, HALVES = KEY_DIM / 64;
    extern __shared__ __align__(1024) unsigned char shared[];
    int64_t head, batch = divide(blockIdx.x, p.v_heads, head);
    int first_row = blockIdx.y * ROWS, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // What lies above the diagonals is never written again.
    for (int i = threadIdx.x; i < args.stages * 4 * SQUARE / 16; i += 2 * GROUP) {
        unsigned char *squares = shared + i / (4 * SQUARE / 16) * args.stage_bytes + S::M;
        ((uint4 *)squares)[i % (4 * SQUARE / 16)] = make_uint4(0, 0, 0, 0);
    }
    publish();
    Signals &signals = *(Signals *)(shared + args.stages * args.stage_bytes);
    if (threadIdx.x < args.stages) {
        barrier_init((unsigned)__cvta_generic_to_shared(&signals.full[threadIdx.x]), GROUP);
        barrier_init((unsigned)__cvta_generic_to_shared(&signals.empty[threadIdx.x]), GROUP);
    }
    __syncthreads();
    if (__shfl_sync(ALL_LANES, warp, 0) >= 4) { // the same of all lanes, as far as the compiler can see
        fetch_chunks<T, KEY_DIM>(args, shared, batch, head, first_row, threadIdx.x - GROUP);
        return;
    }
    unsigned base = (unsigned)__cvta_generic_to_shared(shared);
    // Of a product's sums [4 n + 2 i + e] is the one of row[i] and column 8 n + pair + e.
    int row[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8}, pair = lane % 4 * 2;
    auto row_there = [&](int r) { return first_row + r < p.value_dim; };
    auto out_at = [&](int64_t time, int r) {
        return (char *)place(p.out, batch, time, head) + (first_row + r) * p.out.stride[3];
    };

    float state[HALVES][32] = {}; // of 64 columns each: one is split while the other one is still multiplied
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!p.initial_state.data || !row_there(row[i])) continue;
        const char *from = place(p.initial_state, batch, head, first_row + row[i]) + pair * 4;
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            float2 x = *(const float2 *)(from + n * 32);
            state[n / 8][n % 8 * 4 + 2 * i] = x.x, state[n / 8][n % 8 * 4 + 2 * i + 1] = x.y;
        }
    }

    float out[STEPS / 2];
    auto write_out = [&](int chunk) {
#pragma unroll
        for (int n = 0; n < STEPS / 8; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                int64_t time = (int64_t)chunk * STEPS + n * 8 + pair + e;
                if (time >= p.time) continue;
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (row_there(row[i])) store_float(out_at(time, row[i]), p.out.dtype, out[4 * n + 2 * i + e]);
            }
        }
    };
    auto stage_out = [&](unsigned char *stage) {
        if constexpr (sizeof(T) == 2) {
            unsigned at =
                (unsigned)__cvta_generic_to_shared(stage) + S::v_at(lane % 8 + lane / 16 * 8, warp * 2 + lane / 8 % 2);
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                unsigned pairs[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    pairs[i] = narrow_pair(out[8 * block + 2 * i], out[8 * block + 2 * i + 1], T());
                store_transposed(pairs, at + block * 16 * ROWS * 2);
            }
        } else {
#pragma unroll
            for (int n = 0; n < STEPS / 8; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    *(float *)(stage + S::value_at(n * 8 + pair + e % 2, row[e / 2])) = out[4 * n + e];
                }
            }
        }
    };

    // The step as it stands. Four lanes have two rows of the state, as it was before the chunk: where k and q were, for
    // nothing that is still multiplied with them will count.
    auto keep_state = [&](unsigned char *stage) {
#pragma unroll
        for (int i = 0; i < KEY_DIM / 2; i++) ((float *)stage)[i * GROUP + threadIdx.x] = state[i / 32][i % 32];
    };
    auto by_steps = [&](int chunk, unsigned char *stage) {
        const mtl_cuda_gated_delta_decays &decays = *(const mtl_cuda_gated_delta_decays *)(stage + S::DECAYS);
        float *own = (float *)stage + threadIdx.x;
        // Worked out here again: what would be kept for this rare path takes registers from the products.
        unsigned block = blockIdx.x;
        asm volatile("" : "+r"(block));
        int64_t head, batch = divide(block, p.v_heads, head), k_head = head / (p.v_heads / p.k_heads);
        uint64_t live = live_steps(args, (batch * p.v_heads + head) * args.chunks, chunk);
        int most = (int)min(p.time - (int64_t)chunk * STEPS, (int64_t)STEPS);
        auto over_lanes = [](float x) { return over_warp<float, add<float>>(x, 4); };
        for (int step = 0; step < most; step++) {
            int64_t time = (int64_t)chunk * STEPS + step;
            float sum[2] = {};
            if (live >> step & 1) {
                float gamma = decays.gamma[step], beta = decays.beta[step], delta[2];
                const char *k = place(p.k, batch, time, k_head) + pair * (int)sizeof(T);
                const char *q = place(p.q, batch, time, k_head) + pair * (int)sizeof(T);
#pragma unroll 4
                for (int n = 0; n < TILES; n++) {
                    float2 x = load_pair(k + n * 8 * (int)sizeof(T), T());
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float *s = own + (4 * n + 2 * i) * GROUP;
                        s[0] *= gamma, s[GROUP] *= gamma;
                        sum[i] = fmaf(s[0], x.x, fmaf(s[GROUP], x.y, sum[i]));
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float value;
                    if (args.v_copies) {
                        value = (float)*(const T *)(stage + S::value_at(step, row[i]));
                    } else {
                        const unsigned char *v = stage + chunk_at<ROWS>(S::V, step, row[i] / 8) + row[i] % 8 * 2;
                        value = __bfloat162float(*(const __nv_bfloat16 *)v) +
                                __bfloat162float(*(const __nv_bfloat16 *)(v + SQUARE));
                    }
                    delta[i] = beta * (value - over_lanes(sum[i]));
                    sum[i] = 0;
                }
#pragma unroll 4
                for (int n = 0; n < TILES; n++) {
                    float2 x = load_pair(k + n * 8 * (int)sizeof(T), T());
                    float2 y = load_pair(q + n * 8 * (int)sizeof(T), T());
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float *s = own + (4 * n + 2 * i) * GROUP;
                        s[0] = fmaf(delta[i], x.x, s[0]), s[GROUP] = fmaf(delta[i], x.y, s[GROUP]);
                        sum[i] = fmaf(s[0], y.x, fmaf(s[GROUP], y.y, sum[i]));
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float x = over_lanes(sum[i]);
                char *to = (char *)place(p.out, batch, time, head) + (first_row + row[i]) * p.out.stride[3];
                if (lane % 4 == 0 && row_there(row[i])) store_float(to, p.out.dtype, x);
            }
        }
#pragma unroll
        for (int i = 0; i < KEY_DIM / 2; i++) state[i / 32][i % 32] = own[i * GROUP];
    };

    unsigned high[KEY_DIM / 16][4], low[KEY_DIM / 16][4];
    auto split_state = [&]() {
#pragma unroll
        for (int step = 0; step < KEY_DIM / 16; step++)
            split_sums(state[step / 4] + step % 4 * 8, high[step], low[step]);
    };
    split_state();
    int slot = 0, parity = 0;
    for (int chunk = 0; chunk < args.chunks; chunk++) {
        unsigned stage = base + slot * args.stage_bytes;
        Tile k_tile = tile_at(stage), m_tile = within(k_tile, S::M), n_tile = within(k_tile, S::N);
        unsigned char *here = shared + slot * args.stage_bytes;
        const mtl_cuda_gated_delta_decays &decays = *(const mtl_cuda_gated_delta_decays *)(here + S::DECAYS);
        wait_for(signals.full[slot], parity);

        // S k, S q
        float with_k[STEPS / 2];
        auto multiply_state = [&](float(&sums)[STEPS / 2], Tile tile, int step) {
            multiply_rows(sums, high[step], tile, step, step > 0);
            multiply_rows(sums, low[step], tile, step, true);
            if constexpr (PARTS == 2) multiply_rows(sums, high[step], within(tile, TILE<KEY_DIM>), step, true);
        };
        products_begin();
#pragma unroll
        for (int step = 0; step < KEY_DIM / 16; step++) multiply_state(with_k, k_tile, step);
        products_end();
        products_begin();
#pragma unroll
        for (int step = 0; step < KEY_DIM / 16; step++) {
            multiply_state(out, within(k_tile, S::Q), step);
            if (step == KEY_DIM / 32 - 1) products_end();
        }
        products_end();

        // v - G S k, as the left operand of M
        unsigned rest_high[BLOCKS][4], rest_low[BLOCKS][4];
        bool wrong = false;
        struct Rest { // what a block's need; read while the block before is worked on
            unsigned v[8];
            float2 decay[2];
        } next[2];
        auto read_rest = [&](int block) {
            Rest &to = next[block % 2];
            unsigned at = chunk_at<ROWS>(stage + S::V, block * 16 + lane % 8 + lane / 16 * 8, warp * 2 + lane / 8 % 2);
            if (sizeof(T) == 4 && args.v_copies) {
#pragma unroll
                for (int e = 0; e < 8; e++)
                    to.v[e] =
                        *(const unsigned *)(here + S::value_at(block * 16 + e / 4 * 8 + pair + e % 2, row[e / 2 % 2]));
            } else {
                load_transposed(*(unsigned(*)[4])to.v, at);
                if (!args.v_copies) load_transposed(*(unsigned(*)[4])(to.v + 4), at + SQUARE);
            }
#pragma unroll
            for (int half = 0; half < 2; half++)
                to.decay[half] = *(const float2 *)&decays.from_beginning[block * 16 + half * 8 + pair];
        };
        auto take_rest = [&](int block) {
            if (block + 1 < BLOCKS) read_rest(block + 1);
            const Rest &now = next[block % 2];
            float v[8];
            if (sizeof(T) == 4 && args.v_copies) {
#pragma unroll
                for (int e = 0; e < 8; e++) v[e] = __uint_as_float(now.v[e]);
            } else {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float2 x = widen_pair(now.v[i], __nv_bfloat16()), y = {};
                    if (!args.v_copies) y = widen_pair(now.v[4 + i], __nv_bfloat16());
                    else if (!EXACT<T>) x = widen_pair(now.v[i], __half());
                    v[2 * i] = x.x + y.x, v[2 * i + 1] = x.y + y.y;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float &x = v[4 * half + e];
                    x -= (e % 2 ? now.decay[half].y : now.decay[half].x) * with_k[8 * block + 4 * half + e];
                    wrong |= !fits(x, MOST);
                }
            }
            split_sums(v, rest_high[block], rest_low[block]);
        };
        // delta = M (v - G S k): the first 32 steps need but half of it.
        float delta[2][STEPS / 4];
        auto take_delta = [&](int half, int block) {
            Tile tile = within(m_tile, half * 32 * 128);
            multiply_rows(delta[half], rest_high[block], tile, block, block > 0);
            multiply_rows(delta[half], rest_low[block], tile, block, true);
            multiply_rows(delta[half], rest_high[block], within(tile, SQUARE), block, true);
        };
        read_rest(0);
        products_wait<2>();
        settle(with_k);
        take_rest(0);
        products_wait<1>(); // and half the state's parts make room
        take_rest(1), take_rest(2), take_rest(3);
        wrong = __any_sync(ALL_LANES, any_of_group(wrong)); // to the compiler, too, the same of all lanes
        if (__builtin_expect(wrong, 0)) keep_state(here);   // and by_steps does it all again
        products_wait<0>();
        settle(out);
        products_begin();
        take_delta(0, 0), take_delta(0, 1);
        products_end();
        take_delta(1, 0), take_delta(1, 1), take_delta(1, 2), take_delta(1, 3);
        products_end();
        float over_chunk = decays.from_beginning[STEPS - 1];
#pragma unroll
        for (int i = 0; i < KEY_DIM / 2; i++) state[i / 32][i % 32] *= over_chunk;
        float2 to_end[STEPS / 8];
#pragma unroll
        for (int n = 0; n < STEPS / 8; n++) to_end[n] = *(const float2 *)&decays.to_end[n * 8 + pair];
        products_wait<1>();
        settle(delta[0]);

        // S = G_C S + delta k, out = G S q + N delta
        unsigned ended_high[BLOCKS][4], ended_low[BLOCKS][4], delta_high[BLOCKS][4], delta_low[BLOCKS][4];
        auto take_ended = [&](int block) {
            float ended[8];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float2 decay = to_end[2 * block + half];
#pragma unroll
                for (int e = 0; e < 4; e++)
                    ended[4 * half + e] = delta[block / 2][block % 2 * 8 + 4 * half + e] * (e % 2 ? decay.y : decay.x);
            }
            split_sums(ended, ended_high[block], ended_low[block]);
        };
        auto update = [&](int block) {
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                Tile tile = within(k_tile, half * SQUARE);
                multiply_steps(state[half], ended_high[block], tile, block);
                multiply_steps(state[half], ended_low[block], tile, block);
                if constexpr (PARTS == 2)
                    multiply_steps(state[half], ended_high[block], within(tile, TILE<KEY_DIM>), block);
            }
        };
        take_ended(0), take_ended(1);
        products_begin();
        update(0), update(1);
        products_end();
        products_wait<1>();
        settle(delta[1]);
        take_ended(2), take_ended(3);
        products_begin();
        update(2), update(3);
        products_end();
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float2 decay = *(const float2 *)&decays.from_beginning[block * 16 + half * 8 + pair];
#pragma unroll
                for (int e = 0; e < 4; e++) out[8 * block + 4 * half + e] *= e % 2 ? decay.y : decay.x;
            }
            split_sums(delta[block / 2] + block % 2 * 8, delta_high[block], delta_low[block]);
        }
        products_begin();
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
            multiply_rows(out, delta_high[block], n_tile, block, true);
            multiply_rows(out, delta_low[block], n_tile, block, true);
            multiply_rows(out, delta_high[block], within(n_tile, SQUARE), block, true);
        }
        products_end();
        products_wait<1>();
#pragma unroll
        for (int half = 0; half < HALVES; half++) settle(state[half]);
        split_state();
        products_wait<0>();
        settle(out);
        if (__builtin_expect(wrong, 0)) {
            by_steps(chunk, here);
            split_state();
        } else if (args.out_copies) {
            stage_out(here);
        } else {
            write_out(chunk);
        }
        if (threadIdx.x == 0) signals.by_steps[slot] = wrong;
        arrive(signals.empty[slot]);
        if (++slot == args.stages) slot = 0, parity ^= 1;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (!row_there(row[i])) continue;
        char *to = (char *)place(p.state, batch, head, first_row + row[i]) + pair * 4;
#pragma unroll
        for (int n = 0; n < TILES; n++)
            *(float2 *)(to + n * 32) =
                make_float2(state[n / 8][n % 8 * 4 + 2 * i], state[n / 8][n % 8 * 4 + 2 * i + 1]);
    }
}

#define GATED_DELTA_KERNELS(dtype, type, dim)                                                                \
    extern "C" __global__ void __launch_bounds__(128)                                                        \
        gated_delta_prepare_##dtype##_##dim(const __grid_constant__ mtl_cuda_gated_delta_chunks_args args) { \
        gated_delta_prepare<type, dim>(args);                                                                \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(2 * GROUP, 1)                                               \
        gated_delta_chunks_##dtype##_##dim(const __grid_constant__ mtl_cuda_gated_delta_chunks_args args) {  \
        gated_delta_chunks<type, dim>(args);                                                                 \
    }
#define GATED_DELTA_DTYPE(dtype, type)   \
    GATED_DELTA_KERNELS(dtype, type, 64) \
    GATED_DELTA_KERNELS(dtype, type, 128)
GATED_DELTA_DTYPE(f32, float)
GATED_DELTA_DTYPE(f16, __half)
GATED_DELTA_DTYPE(bf16, __nv_bfloat16)
