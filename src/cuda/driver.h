/* The CUDA backend's way to the driver: opened at run time, kernels loaded at their first use. SPDX-License-Identifier:
 * MIT
 *
 * Nothing of CUDA is linked. The images that nvcc made are part of the library; a device gets an image when it first
 * runs one of its kernels, in its primary context, the one that every framework on the CUDA runtime uses. */
#ifndef METALLOID_CUDA_DRIVER_H
#define METALLOID_CUDA_DRIVER_H

#include "core/context.h"
#include "core/operations.h"
#include "cuda/arguments.h"
#include "cuda/kernels.h"

#include <cuda.h>

enum {
    MTL_CUDA_DEVICES = 64,
    MTL_CUDA_KERNELS = 64, /* of an image */
};

/* One image a .cu file. */
#define MTL_CUDA_IMAGES(X)     \
    X(rms_norm)                \
    X(layer_norm)              \
    X(rope)                    \
    X(swiglu)                  \
    X(geglu)                   \
    X(cross_entropy)           \
    X(gated_delta)             \
    X(gated_delta_chunks)      \
    X(attention)               \
    X(attention_f32)           \
    X(attention_wide)          \
    X(attention_decode)        \
    X(attention_hopper)        \
    X(attention_hopper_masked) \
    X(attention_hopper_changed)

#define MTL_CUDA_IMAGE_ID(name) MTL_CUDA_IMAGE_##name,
typedef enum mtl_cuda_image { MTL_CUDA_IMAGES(MTL_CUDA_IMAGE_ID) MTL_CUDA_IMAGE_COUNT } mtl_cuda_image;

/* What a device is, as far as launches depend on it. */
typedef struct mtl_cuda_device {
    int id, multiprocessors, major, minor;
    int shared_memory; /* that a block can have, in bytes */
    int memory_clock;  /* kHz */
    char name[128];
    CUcontext context;
} mtl_cuda_device;

/* One call on one device, between mtl_cuda_begin and mtl_cuda_end. */
typedef struct mtl_cuda_call {
    const char *op;
    const mtl_cuda_device *device;
    CUstream stream;
    bool pushed;
} mtl_cuda_call;

metalloid_status mtl_cuda_begin(mtl_cuda_call *call, const metalloid_context *context, const char *op, DLDevice place,
                                bool in_double);
metalloid_status mtl_cuda_end(mtl_cuda_call *call, metalloid_status status);

/* A kernel is one of an image's: `name` is its symbol, `index` its place in the image's table of loaded kernels. */
typedef struct mtl_cuda_kernel {
    mtl_cuda_image image;
    int index;
    const char *name;
} mtl_cuda_kernel;

typedef struct mtl_cuda_grid {
    int64_t blocks;
    int y, z;          /* of the grid; 0 counts as 1 */
    int threads, rows; /* a block is {threads, rows}; rows 0 counts as 1 */
    int shared_memory; /* dynamic, in bytes */
    int cluster;       /* blocks along x that form one; 0 counts as 1 */
    bool overlaps;     /* the kernel waits by itself for what the stream had before, see device.cuh */
} mtl_cuda_grid;

/* Queues the kernel on the call's stream; its one parameter is the struct at `arguments`. */
metalloid_status mtl_cuda_launch(const mtl_cuda_call *call, mtl_cuda_kernel kernel, mtl_cuda_grid grid,
                                 const void *arguments);

/* The largest cluster of this kernel, a power of two up to grid.cluster, for which the device has a place: what the
 * kernel's first call finds holds for all. */
metalloid_status mtl_cuda_fit_cluster(const mtl_cuda_call *call, mtl_cuda_kernel kernel, mtl_cuda_grid *grid);

/* How the copy engine of Hopper finds boxes of some columns and time steps in {batch, head, time, column}: of float16 and
 * bfloat16, a row of a box being 128 bytes, whose vectors it exchanges, or of bool. A stride may be 0. False where the
 * layout or the driver does not allow it. */
typedef struct mtl_cuda_box {
    int columns, rows;
} mtl_cuda_box;
bool mtl_cuda_describe(const mtl_cuda_call *call, void *map, const mtl_attention_operand *operand, int64_t columns,
                       int64_t time, int64_t heads, int64_t batch, mtl_cuda_box box);

/* Memory in the order of the stream: it belongs to the calls queued between the two. */
metalloid_status mtl_cuda_allocate(const mtl_cuda_call *call, size_t bytes, CUdeviceptr *memory);
void mtl_cuda_release(const mtl_cuda_call *call, CUdeviceptr memory);

/* A kernel of an image that comes at run time, machine code or PTX; the module stays until the process ends. */
metalloid_status mtl_cuda_load(const mtl_cuda_call *call, const void *image, const char *name, int shared_memory,
                               CUfunction *function);
metalloid_status mtl_cuda_launch_function(const mtl_cuda_call *call, CUfunction function, const uint32_t blocks[3],
                                          const uint32_t threads[3], int shared_memory, void **parameters);

/* How many blocks of so many threads a multiprocessor has at a time; 0 where the driver does not tell. */
int mtl_cuda_running(CUfunction function, int threads);

/* Bytes of a kernel's parameter; 0 beyond the last one, -1 where the driver does not tell (before CUDA 12.4). */
int mtl_cuda_parameter_size(CUfunction function, int index);

/* Elements of 1, 2, 4 or 8 bytes. */
metalloid_status mtl_cuda_fill(const mtl_cuda_call *call, CUdeviceptr memory, int64_t elements, int size,
                               uint64_t bits);

metalloid_status mtl_cuda_copy(const mtl_cuda_call *call, CUdeviceptr to, CUdeviceptr from, size_t bytes);

/* ---- arguments for kernels --------------------------------------------------------------------------------------- */

static inline mtl_cuda_row mtl_cuda_row_of(mtl_row row) { return (mtl_cuda_row){row.data, row.stride, (int)row.dtype}; }

/* Kernels loop over at most MTL_CUDA_AXES axes. A loop of more, which layouts that no axis merges in give, is cut:
 * `inner` is what a launch does, once for each iteration of `outer`, whose offsets the launch adds to its operands. */
void mtl_cuda_cut_loop(const mtl_loop *loop, mtl_loop *outer, mtl_cuda_loop *inner);

/* Whether rows of this operand can be read 16 bytes at a time, in every iteration of the loop. */
bool mtl_cuda_vectors(mtl_row row, const mtl_loop *loop, int operand);

/* Whether load_vector of device.cuh takes a row of weights or biases. */
bool mtl_cuda_weights(mtl_row row);

#endif
