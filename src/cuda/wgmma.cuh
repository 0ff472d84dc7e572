// Hopper's matrix units and bulk copies, as the attention kernel uses them. SPDX-License-Identifier: MIT
#pragma once

#include "cuda/mma.cuh"

// ---- products of a group of four warps: D (64 rows, float, in registers) += A B

#define TYPE   __half
#define SUFFIX "f16"
#include "cuda/wgmma.inc"
#undef TYPE
#undef SUFFIX
#define TYPE   __nv_bfloat16
#define SUFFIX "bf16"
#include "cuda/wgmma.inc"
#undef TYPE
#undef SUFFIX

__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ inline void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Registers of each thread of the group.
template <int COUNT> __device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
// Keeps the compiler from moving work on registers across a wait for the products that write them.
template <int N> __device__ inline void settle(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Products read registers until they are waited for, of which the assembler knows nothing: it takes them for free once
// the product is issued. Where a kernel could come to this after a loop (and never does), it has them in use throughout (tools/check_products).
template <int N> __device__ inline void keep(const unsigned (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("st.shared.u32 [%0], %1;" ::"r"(4 * i), "r"(x[i]) : "memory");
}

// Of a tile of rows of 64 16-bit elements under the 128-byte swizzle; `blocks` is the distance of two such tiles in
// bytes, which counts where rows run along n.
__device__ inline uint64_t descriptor(unsigned at, unsigned blocks) {
    return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)(blocks >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
}

// ---- barriers in shared memory

__device__ inline void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void barrier_wait(unsigned barrier, int parity) {
    asm volatile("{\n.reg .pred done;\n"
                 "WAIT:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra WAIT;\n}\n" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}

// Between a thread's own reads of shared memory and its leave for the copy engine to write there.
__device__ inline void after_reads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- a box of a tensor {feature, time, head, batch}, by the copy engine

__device__ inline void copy_box(unsigned to, const void *map, unsigned barrier, int feature, int time, int head,
                                int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(to),
        "l"(map), "r"(barrier), "r"(feature), "r"(time), "r"(head), "r"(batch)
        : "memory");
}

__device__ inline void prefetch_map(const void *map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// ---- a cluster of blocks, which read each other's shared memory

constexpr int MOST_BLOCKS = 16;

__device__ inline unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ inline unsigned cluster_size() {
    unsigned size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same in two halves, of which the first promises nothing but that its block has read what it uses.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// What block `block` of the cluster has at the place where this one has `at`.
__device__ inline float load_from_block(unsigned at, int block) {
    float x;
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
                 : "=f"(x)
                 : "r"(at), "r"(block)
                 : "memory");
    return x;
}
