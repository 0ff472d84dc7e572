// Matrix units, copies and barriers as every GPU from compute capability 8.0 on has them. SPDX-License-Identifier: MIT
#pragma once

#include "cuda/device.cuh"

__device__ inline void copy_async(unsigned to, const void *from, bool there) { // 16 bytes, or zeros
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void copy_async(unsigned to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void store_zeros(unsigned to) { // 16 bytes
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}
__device__ inline void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ inline void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Barriers in shared memory; how to wait for one differs.
__device__ inline void barrier_init(unsigned barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void load_matrices(unsigned (&m)[4], unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(at));
}
__device__ inline void load_transposed(unsigned (&m)[4], unsigned at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(at));
}

__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __nv_bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A tile of rows of DIM 16-bit features, its 16-byte chunks exchanged by row so that eight rows of a column lie in
// different banks.
template <int DIM> __device__ inline unsigned chunk_at(unsigned tile, int row, int chunk) {
    return tile + row * DIM * 2 + (((chunk & ~7) | ((chunk ^ row) & 7)) << 4);
}
// The same of chunk 2 `pair` + `odd`, which is 0 or 1, where `tile` is a multiple of 128: a warp's loads of all pairs
// differ by one exclusive or with a constant.
template <int DIM> __device__ inline unsigned chunk_of_pair(unsigned tile, int row, int odd, int pair) {
    unsigned first = tile + row * DIM * 2 + ((odd ^ (row & 7)) << 4);
    return (first ^ (pair * 2 & 7) << 4) + (pair * 2 & ~7) * 16;
}

// Such a tile, or one of rows PITCH apart whose chunks are not exchanged, from rows in memory: zeros beyond row `end`,
// and beyond `features` as far as `filled`, a multiple of 8.
template <int DIM, int ROWS, int THREADS, int PITCH = 0>
__device__ inline void fetch_tile(unsigned tile, const char *from, int64_t stride, int64_t first, int64_t end,
                                  int features, int filled) {
    constexpr int CHUNKS = DIM / 8, LANES_A_ROW = CHUNKS < WARP ? CHUNKS : WARP, STEP = THREADS / LANES_A_ROW;
    constexpr int APART = PITCH ? PITCH : DIM;
    int row = threadIdx.x / LANES_A_ROW, left = end - first < ROWS ? (int)(end - first) : ROWS;
    bool whole = left == ROWS && features >= filled; // the same for all: then nothing is asked for each copy
#pragma unroll
    for (int j = 0; j < (CHUNKS + LANES_A_ROW - 1) / LANES_A_ROW; j++) {
        int chunk = threadIdx.x % LANES_A_ROW + j * LANES_A_ROW;
        if (chunk * 8 >= filled) break;
        const char *at = from + (first + row) * stride + chunk * 16;
        unsigned to = PITCH ? tile + row * PITCH * 2 + chunk * 16 : chunk_at<DIM>(tile, row, chunk);
        auto to_row = [&](int i) { return (PITCH ? to : to ^ (i * STEP & 7) << 4) + i * STEP * APART * 2; };
        if (whole) {
#pragma unroll 8
            for (int i = 0; i < ROWS / STEP; i++, at += STEP * stride) copy_async(to_row(i), at);
        } else {
            int rows = chunk * 8 < features ? left - row : 0;
#pragma unroll 1
            for (int i = 0; i < ROWS / STEP; i++, at += STEP * stride) {
                if (i * STEP < rows) copy_async(to_row(i), at);
                else store_zeros(to_row(i));
            }
        }
    }
}
