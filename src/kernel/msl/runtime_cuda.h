// What the generated kernels of a GPU are made of: the dispatch, and a thread's place in it.
#define __mtl_inline static __forceinline__

// As the library fills it (src/cuda/custom_kernel.c).
struct alignas(8) mtl_dispatch {
    unsigned grid[3], threadgroup[3], threadgroups[3];
    unsigned flags;
    unsigned prefetching; // threadgroups that call __mtl_prefetch
};
enum { mtl_flag_whole = 1, mtl_flag_linear = 2, mtl_flag_wide = 4 };

struct mtl_group {
    unsigned position[3], extent[3];
};

template <class T, class V> __mtl_inline void __mtl_assign(T &to, const V &value) { to = value; }
template <class T, class V, unsigned long N> __mtl_inline void __mtl_assign(T (&to)[N], const V (&value)[N]) {
    for (unsigned long i = 0; i < N; ++i) __mtl_assign(to[i], value[i]);
}
// The value that a variable in threadgroup memory begins with.
template <class T, class V> __mtl_inline void __mtl_initialize(T &variable, const V &value) {
    if (threadIdx.x + threadIdx.y + threadIdx.z == 0) __mtl_assign(variable, value);
    __syncthreads();
}

__mtl_inline unsigned __mtl_count(const unsigned (&extent)[3]) { return extent[0] * extent[1] * extent[2]; }

// A thread's place where the threadgroups are `threads` in a line, a power of two, and all of them whole.
template <unsigned threads>
__mtl_inline void __mtl_place_in_line(mtl_group &group, unsigned &index, unsigned (&local)[3]) {
    group.position[0] = blockIdx.x;
    group.position[1] = blockIdx.y;
    group.position[2] = blockIdx.z;
    group.extent[0] = threads;
    group.extent[1] = group.extent[2] = 1;
    index = local[0] = threadIdx.x & (threads - 1); // which the compiler then knows to be small
    local[1] = local[2] = 0;
}

// Brings into the L2 cache what a later threadgroup is going to read of an input, its slice, if threadgroups read theirs in
// turn. Where they do not, memory is read in vain, and nothing else happens. `first` is the address for the first
// threadgroup: a number, since the compiler keeps a pointer that it sees in assembly from what it may do with others. A
// slice has at most 128 bytes a thread.
template <unsigned threads> __mtl_inline void __mtl_prefetch(unsigned long first, unsigned group, unsigned slice) {
    unsigned offset = (threadIdx.x & (threads - 1)) * 128;
    asm volatile("{ .reg .pred reads; setp.lt.u32 reads, %1, %2; @reads prefetch.global.L2 [%0]; }"
                 : // no branch, before which ptxas would wait for the body's own loads
                 : "l"(first + (unsigned long)group * slice + offset), "r"(offset), "r"(slice));
}

// A thread's index in its threadgroup and its place there. A threadgroup at the grid's edge is smaller than the others, and its
// threads are numbered by its own extents; those of the block that are too many leave. Where a grid of blocks cannot have so many
// threadgroups along y or z, all are along x.
__mtl_inline bool __mtl_place(const mtl_dispatch &dispatch, mtl_group &group, unsigned &index, unsigned (&local)[3]) {
    group.position[0] = blockIdx.x;
    group.position[1] = blockIdx.y;
    group.position[2] = blockIdx.z;
    if (dispatch.flags & mtl_flag_linear) {
        unsigned rest = blockIdx.x / dispatch.threadgroups[0];
        group.position[0] = blockIdx.x % dispatch.threadgroups[0];
        group.position[1] = rest % dispatch.threadgroups[1];
        group.position[2] = rest / dispatch.threadgroups[1];
    }
    index = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    group.extent[0] = blockDim.x;
    group.extent[1] = blockDim.y;
    group.extent[2] = blockDim.z;
    local[0] = threadIdx.x;
    local[1] = threadIdx.y;
    local[2] = threadIdx.z;
    if (dispatch.flags & mtl_flag_whole) return true;
    for (int i = 0; i < 3; ++i) {
        unsigned left = dispatch.grid[i] - group.position[i] * dispatch.threadgroup[i];
        group.extent[i] = left < dispatch.threadgroup[i] ? left : dispatch.threadgroup[i];
    }
    if (index >= __mtl_count(group.extent)) return false;
    local[0] = index % group.extent[0];
    local[1] = index / group.extent[0] % group.extent[1];
    local[2] = index / group.extent[0] / group.extent[1];
    return true;
}
