/* The CUDA backend's way to the driver. SPDX-License-Identifier: MIT */
#include "cuda/driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

/* ---- the driver -------------------------------------------------------------------------------------------------- */

#define DRIVER_FUNCTIONS(X)                        \
    X(cuInit)                                      \
    X(cuDeviceGetCount)                            \
    X(cuDeviceGet)                                 \
    X(cuDeviceGetName)                             \
    X(cuDeviceGetAttribute)                        \
    X(cuDevicePrimaryCtxRetain)                    \
    X(cuCtxGetCurrent)                             \
    X(cuCtxPushCurrent)                            \
    X(cuCtxPopCurrent)                             \
    X(cuModuleLoadData)                            \
    X(cuModuleUnload)                              \
    X(cuModuleGetFunction)                         \
    X(cuFuncGetAttribute)                          \
    X(cuFuncSetAttribute)                          \
    X(cuLaunchKernel)                              \
    X(cuLaunchKernelEx)                            \
    X(cuOccupancyMaxActiveClusters)                \
    X(cuOccupancyMaxActiveBlocksPerMultiprocessor) \
    X(cuMemAllocAsync)                             \
    X(cuMemFreeAsync)                              \
    X(cuMemcpyDtoDAsync)                           \
    X(cuMemsetD8Async)                             \
    X(cuMemsetD16Async)                            \
    X(cuMemsetD32Async)                            \
    X(cuMemsetD2D32Async)                          \
    X(cuThreadExchangeStreamCaptureMode)           \
    X(cuTensorMapEncodeTiled)                      \
    X(cuGetErrorString)

#define STRING_(x)             #x
#define STRING(x)              STRING_(x) /* cuda.h renames functions to their current versions: the name after that */

#define DRIVER_FIELD(function) __typeof__(&(function)) function; // NOLINT: a declaration
static struct { DRIVER_FUNCTIONS(DRIVER_FIELD) } driver;
static CUresult (*parameter_info)(CUfunction, size_t, size_t *, size_t *); /* cuFuncGetParamInfo, or NULL */

static pthread_once_t opened = PTHREAD_ONCE_INIT;
static char why_closed[256]; /* "" once the driver is open */
static int device_count;

static void open_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        snprintf(why_closed, sizeof why_closed, "there is no NVIDIA driver (%s)", dlerror());
        return;
    }
#define DRIVER_FIND(function)                                                                                    \
    *(void **)(void *)&driver.function = dlsym(library, STRING(function));                                       \
    if (!driver.function) {                                                                                      \
        snprintf(why_closed, sizeof why_closed, "the NVIDIA driver is too old: it has no %s", STRING(function)); \
        return;                                                                                                  \
    }
    DRIVER_FUNCTIONS(DRIVER_FIND)
    *(void **)(void *)&parameter_info = dlsym(library, "cuFuncGetParamInfo");
    const char *words = "it has no device";
    CUresult result = driver.cuInit(0);
    if (result == CUDA_SUCCESS) result = driver.cuDeviceGetCount(&device_count);
    if (result != CUDA_SUCCESS) {
        device_count = 0;
        driver.cuGetErrorString(result, &words);
    }
    if (device_count == 0) snprintf(why_closed, sizeof why_closed, "the NVIDIA driver says: %s", words);
    if (device_count > MTL_CUDA_DEVICES) device_count = MTL_CUDA_DEVICES;
}

int mtl_cuda_device_count(const char **why) {
    pthread_once(&opened, open_driver);
    *why = why_closed;
    return device_count;
}

static metalloid_status driver_failed(const char *op, const char *doing, CUresult result) {
    const char *words = NULL;
    driver.cuGetErrorString(result, &words);
    return mtl_fail(result == CUDA_ERROR_OUT_OF_MEMORY ? METALLOID_OUT_OF_MEMORY : METALLOID_DEVICE_FAILURE,
                    "%s: %s: the NVIDIA driver says: %s", op, doing, words ? words : "unknown error");
}

#define DRIVER_TRY(op, doing, call)                                            \
    do {                                                                       \
        CUresult result_ = (call);                                             \
        if (result_ != CUDA_SUCCESS) return driver_failed(op, doing, result_); \
    } while (0)

/* ---- devices ----------------------------------------------------------------------------------------------------- */

/* Filled once and never changed again: readers look at `ready`, and take the lock only where it is not set. */
static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
static struct {
    atomic_bool ready;
    mtl_cuda_device device;
    CUmodule image[MTL_CUDA_IMAGE_COUNT];
    atomic_bool waits[MTL_CUDA_IMAGE_COUNT]; /* compiled for an architecture that has wait_for_earlier */
    _Atomic(CUfunction) kernel[MTL_CUDA_IMAGE_COUNT][MTL_CUDA_KERNELS];
    atomic_int shared_memory[MTL_CUDA_IMAGE_COUNT][MTL_CUDA_KERNELS]; /* that was asked for, in bytes */
    atomic_int cluster[MTL_CUDA_IMAGE_COUNT][MTL_CUDA_KERNELS];       /* the largest that has a place */
} devices[MTL_CUDA_DEVICES];

static metalloid_status fill_device(mtl_cuda_device *device, const char *op, int id) {
    CUdevice handle;
    DRIVER_TRY(op, "opening the device", driver.cuDeviceGet(&handle, id));
    DRIVER_TRY(op, "opening the device", driver.cuDeviceGetName(device->name, sizeof device->name, handle));
    const struct {
        int *to;
        CUdevice_attribute attribute;
    } wanted[] = {{&device->multiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT},
                  {&device->major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR},
                  {&device->minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR},
                  {&device->memory_clock, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE},
                  {&device->shared_memory, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN}};
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        DRIVER_TRY(op, "opening the device", driver.cuDeviceGetAttribute(wanted[i].to, wanted[i].attribute, handle));
    DRIVER_TRY(op, "opening the device", driver.cuDevicePrimaryCtxRetain(&device->context, handle));
    device->id = id;
    return METALLOID_OK;
}

void mtl_cuda_device_in_words(int device, char *words, size_t size) {
    CUdevice handle;
    char name[128];
    int major = 0, minor = 0;
    if (driver.cuDeviceGet(&handle, device) != CUDA_SUCCESS ||
        driver.cuDeviceGetName(name, sizeof name, handle) != CUDA_SUCCESS) {
        snprintf(words, size, "device %d, which does not answer", device);
        return;
    }
    driver.cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle);
    driver.cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle);
    snprintf(words, size, "%s, compute capability %d.%d", name, major, minor);
}

static metalloid_status find_device(const mtl_cuda_device **device, const char *op, int id) {
    if (atomic_load_explicit(&devices[id].ready, memory_order_acquire)) {
        *device = &devices[id].device;
        return METALLOID_OK;
    }
    pthread_mutex_lock(&loading);
    metalloid_status status = METALLOID_OK;
    if (!atomic_load_explicit(&devices[id].ready, memory_order_relaxed)) {
        status = fill_device(&devices[id].device, op, id);
        if (status == METALLOID_OK) atomic_store_explicit(&devices[id].ready, true, memory_order_release);
    }
    pthread_mutex_unlock(&loading);
    *device = &devices[id].device;
    return status;
}

/* ---- calls ------------------------------------------------------------------------------------------------------- */

metalloid_status mtl_cuda_begin(mtl_cuda_call *call, const metalloid_context *context, const char *op, DLDevice place,
                                bool in_double) {
    MTL_REQUIRE(!in_double, op, "float64 is for tensors on the CPU, these are on CUDA device %d", place.device_id);
    int device = place.device_id;
    const char *why;
    int count = mtl_cuda_device_count(&why);
    if (count == 0) return mtl_fail(METALLOID_UNSUPPORTED, "%s: the tensors are on a CUDA device, but %s", op, why);
    MTL_REQUIRE(device >= 0 && device < count, op, "the tensors are on CUDA device %d, but there are %d", device,
                count);
    *call = (mtl_cuda_call){.op = op, .stream = context ? (CUstream)context->stream : NULL};
    MTL_TRY(find_device(&call->device, op, device));
    if (call->device->major < 8) {
        return mtl_fail(METALLOID_UNSUPPORTED, "%s: CUDA kernels need compute capability 8.0, %s has %d.%d", op,
                        call->device->name, call->device->major, call->device->minor);
    }
    CUcontext current = NULL;
    DRIVER_TRY(op, "making the device current", driver.cuCtxGetCurrent(&current));
    if (current != call->device->context) {
        DRIVER_TRY(op, "making the device current", driver.cuCtxPushCurrent(call->device->context));
        call->pushed = true;
    }
    return METALLOID_OK;
}

metalloid_status mtl_cuda_end(mtl_cuda_call *call, metalloid_status status) {
    CUcontext ours;
    if (call->pushed) driver.cuCtxPopCurrent(&ours);
    return status;
}

/* ---- kernels ----------------------------------------------------------------------------------------------------- */

#define IMAGE_DECLARATION(name) extern const unsigned char mtl_cuda_image_##name[];
#define IMAGE_ENTRY(name)       mtl_cuda_image_##name,
MTL_CUDA_IMAGES(IMAGE_DECLARATION)
static const unsigned char *const images[] = {MTL_CUDA_IMAGES(IMAGE_ENTRY)};

static metalloid_status load_kernel(const mtl_cuda_call *call, mtl_cuda_kernel kernel) {
    int id = call->device->id;
    CUmodule *image = &devices[id].image[kernel.image];
    CUfunction function;
    int architecture = 0;
    if (!*image) DRIVER_TRY(call->op, "loading kernels", driver.cuModuleLoadData(image, images[kernel.image]));
    DRIVER_TRY(call->op, kernel.name, driver.cuModuleGetFunction(&function, *image, kernel.name));
    DRIVER_TRY(call->op, kernel.name,
               driver.cuFuncGetAttribute(&architecture, CU_FUNC_ATTRIBUTE_PTX_VERSION, function));
    atomic_store_explicit(&devices[id].waits[kernel.image], architecture >= 90, memory_order_relaxed);
    if (call->device->major >= 9)
        DRIVER_TRY(call->op, kernel.name,
                   driver.cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1));
    atomic_store_explicit(&devices[id].kernel[kernel.image][kernel.index], function, memory_order_release);
    return METALLOID_OK;
}

static metalloid_status find_kernel(const mtl_cuda_call *call, mtl_cuda_kernel kernel, CUfunction *function) {
    _Atomic(CUfunction) *place = &devices[call->device->id].kernel[kernel.image][kernel.index];
    *function = atomic_load_explicit(place, memory_order_acquire);
    if (*function) return METALLOID_OK;
    /* Loading allocates, which a stream capture of this thread would refuse; it is no part of what is captured. */
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    pthread_mutex_lock(&loading);
    driver.cuThreadExchangeStreamCaptureMode(&mode);
    metalloid_status status = load_kernel(call, kernel);
    driver.cuThreadExchangeStreamCaptureMode(&mode);
    pthread_mutex_unlock(&loading);
    *function = atomic_load_explicit(place, memory_order_relaxed);
    return status;
}

/* Much dynamic shared memory has to be asked for: the device's limit less what the kernel has of its own. Not by
 * kernels that have none: what they were given would come off the first-level cache, where loads on their way have
 * their place. */
static metalloid_status allow_shared_memory(const mtl_cuda_call *call, mtl_cuda_kernel kernel, CUfunction function,
                                            int bytes) {
    atomic_int *allowed = &devices[call->device->id].shared_memory[kernel.image][kernel.index];
    if (bytes <= atomic_load_explicit(allowed, memory_order_relaxed)) return METALLOID_OK;
    int own = 0;
    DRIVER_TRY(call->op, kernel.name, driver.cuFuncGetAttribute(&own, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function));
    int most = call->device->shared_memory - own;
    DRIVER_TRY(call->op, kernel.name,
               driver.cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most));
    atomic_store_explicit(allowed, most, memory_order_relaxed);
    return METALLOID_OK;
}

enum { ATTRIBUTES = 2 };

static CUlaunchConfig configuration(const mtl_cuda_call *call, const mtl_cuda_grid *grid,
                                    CUlaunchAttribute attributes[ATTRIBUTES]) {
    unsigned count = 0;
    if (grid->cluster > 1) {
        attributes[count++] = (CUlaunchAttribute){.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                                                  .value.clusterDim = {(unsigned)grid->cluster, 1, 1}};
    }
    if (grid->overlaps) {
        attributes[count++] = (CUlaunchAttribute){.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                                                  .value.programmaticStreamSerializationAllowed = 1};
    }
    return (CUlaunchConfig){.gridDimX = (unsigned)grid->blocks,
                            .gridDimY = grid->y ? (unsigned)grid->y : 1,
                            .gridDimZ = grid->z ? (unsigned)grid->z : 1,
                            .blockDimX = (unsigned)grid->threads,
                            .blockDimY = grid->rows ? (unsigned)grid->rows : 1,
                            .blockDimZ = 1,
                            .sharedMemBytes = (unsigned)grid->shared_memory,
                            .hStream = call->stream,
                            .attrs = attributes,
                            .numAttrs = count};
}

metalloid_status mtl_cuda_launch(const mtl_cuda_call *call, mtl_cuda_kernel kernel, mtl_cuda_grid grid,
                                 const void *arguments) {
    CUfunction function;
    MTL_TRY(find_kernel(call, kernel, &function));
    if (grid.blocks == 0) return METALLOID_OK;
    MTL_TRY(allow_shared_memory(call, kernel, function, grid.shared_memory));
    if (!atomic_load_explicit(&devices[call->device->id].waits[kernel.image], memory_order_relaxed))
        grid.overlaps = false;
    MTL_REQUIRE(grid.blocks <= INT32_MAX, call->op, "the tensors are too large for one launch (%lld blocks)",
                (long long)grid.blocks);
    void *parameters[] = {(void *)(uintptr_t)arguments};
    CUlaunchAttribute attributes[ATTRIBUTES];
    CUlaunchConfig config = configuration(call, &grid, attributes);
    DRIVER_TRY(call->op, kernel.name, driver.cuLaunchKernelEx(&config, function, parameters, NULL));
    return METALLOID_OK;
}

metalloid_status mtl_cuda_fit_cluster(const mtl_cuda_call *call, mtl_cuda_kernel kernel, mtl_cuda_grid *grid) {
    enum { PORTABLE = 8 }; /* what every device with clusters has */
    atomic_int *most = &devices[call->device->id].cluster[kernel.image][kernel.index];
    if (grid->cluster <= PORTABLE) return METALLOID_OK;
    int found = atomic_load_explicit(most, memory_order_relaxed);
    if (found == 0) {
        CUfunction function;
        MTL_TRY(find_kernel(call, kernel, &function));
        MTL_TRY(allow_shared_memory(call, kernel, function, grid->shared_memory));
        found = grid->cluster;
        for (mtl_cuda_grid tried = *grid; found > PORTABLE; found /= 2) {
            CUlaunchAttribute attributes[ATTRIBUTES];
            int places = 0;
            tried.cluster = found, tried.blocks = found;
            CUlaunchConfig config = configuration(call, &tried, attributes);
            if (driver.cuOccupancyMaxActiveClusters(&places, function, &config) == CUDA_SUCCESS && places > 0) break;
        }
        atomic_store_explicit(most, found, memory_order_relaxed);
    }
    if (grid->cluster > found) grid->cluster = found;
    return METALLOID_OK;
}

bool mtl_cuda_describe(const mtl_cuda_call *call, void *map, const mtl_attention_operand *operand, int64_t columns,
                       int64_t time, int64_t heads, int64_t batch, mtl_cuda_box box) {
    enum { VECTOR = 16, FAST_MEMORY = 3000000 /* kHz */ };
#ifdef MTL_CUDA_WITHOUT_HOPPER
    return false; /* its kernels are empty in what was built */
#endif
    if (call->device->major != 9) return false;
    const int64_t extent[] = {columns, time, heads, batch},
                  stride[] = {operand->stride[2], operand->stride[1], operand->stride[0]};
    cuuint64_t extents[4], strides[3];
    for (int i = 0; i < 4; i++) extents[i] = (cuuint64_t)extent[i];
    for (int i = 0; i < 3; i++) {
        if (extent[i + 1] > 1 && (stride[i] < 0 || stride[i] >= (int64_t)1 << 40)) return false;
        strides[i] = extent[i + 1] > 1 ? (cuuint64_t)stride[i] : VECTOR; /* an axis of one step has none */
    }
    const cuuint32_t lengths[] = {(cuuint32_t)box.columns, (cuuint32_t)box.rows, 1, 1}, steps[] = {1, 1, 1, 1};
    CUtensorMapDataType dtype = operand->dtype == MTL_F16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                : operand->dtype == MTL_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_UINT8;
    CUtensorMapSwizzle swizzle = operand->dtype == MTL_BOOL ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B;
    /* To fetch 256 bytes where 128 are asked for gives a stream from an H100's memory 2 % and costs it 8 % on an H200,
     * whose memory has the higher clock: 2619 and 3201 MHz. */
    CUtensorMapL2promotion fetched = call->device->memory_clock < FAST_MEMORY ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B
                                                                              : CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
    return driver.cuTensorMapEncodeTiled(map, dtype, 4, operand->data, extents, strides, lengths, steps,
                                         CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, fetched,
                                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

metalloid_status mtl_cuda_allocate(const mtl_cuda_call *call, size_t bytes, CUdeviceptr *memory) {
    DRIVER_TRY(call->op, "workspace", driver.cuMemAllocAsync(memory, bytes, call->stream));
    return METALLOID_OK;
}

void mtl_cuda_release(const mtl_cuda_call *call, CUdeviceptr memory) { driver.cuMemFreeAsync(memory, call->stream); }

/* ---- kernels that come at run time ------------------------------------------------------------------------------- */

metalloid_status mtl_cuda_load(const mtl_cuda_call *call, const void *image, const char *name, int shared_memory,
                               CUfunction *function) {
    CUmodule module = NULL;
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED; /* as in find_kernel */
    driver.cuThreadExchangeStreamCaptureMode(&mode);
    CUresult result = driver.cuModuleLoadData(&module, image);
    if (result == CUDA_SUCCESS) result = driver.cuModuleGetFunction(function, module, name);
    /* 48 KiB are there unasked, but the kernel's own arrays count too. */
    if (result == CUDA_SUCCESS && shared_memory > 0)
        result = driver.cuFuncSetAttribute(*function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_memory);
    if (result != CUDA_SUCCESS && module) driver.cuModuleUnload(module);
    driver.cuThreadExchangeStreamCaptureMode(&mode);
    DRIVER_TRY(call->op, name, result);
    return METALLOID_OK;
}

int mtl_cuda_running(CUfunction function, int threads) {
    int blocks = 0;
    return driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads, 0) == CUDA_SUCCESS ? blocks
                                                                                                             : 0;
}

metalloid_status mtl_cuda_launch_function(const mtl_cuda_call *call, CUfunction function, const uint32_t blocks[3],
                                          const uint32_t threads[3], int shared_memory, void **parameters) {
    DRIVER_TRY(call->op, "launch",
               driver.cuLaunchKernel(function, blocks[0], blocks[1], blocks[2], threads[0], threads[1], threads[2],
                                     (unsigned)shared_memory, call->stream, parameters, NULL));
    return METALLOID_OK;
}

int mtl_cuda_parameter_size(CUfunction function, int index) {
    size_t offset, size;
    if (!parameter_info) return -1;
    return parameter_info(function, (size_t)index, &offset, &size) == CUDA_SUCCESS ? (int)size : 0;
}

metalloid_status mtl_cuda_fill(const mtl_cuda_call *call, CUdeviceptr memory, int64_t elements, int size,
                               uint64_t bits) {
    size_t count = (size_t)elements;
    CUresult result = CUDA_SUCCESS;
    uint32_t low = (uint32_t)bits, high = (uint32_t)(bits >> 32);
    if (count == 0) return METALLOID_OK;
    switch (size) {
    case 1: result = driver.cuMemsetD8Async(memory, (unsigned char)bits, count, call->stream); break;
    case 2: result = driver.cuMemsetD16Async(memory, (unsigned short)bits, count, call->stream); break;
    case 4: result = driver.cuMemsetD32Async(memory, low, count, call->stream); break;
    default:
        if (low == high) {
            result = driver.cuMemsetD32Async(memory, low, 2 * count, call->stream);
            break;
        }
        result = driver.cuMemsetD2D32Async(memory, 8, low, 1, count, call->stream);
        if (result == CUDA_SUCCESS) result = driver.cuMemsetD2D32Async(memory + 4, 8, high, 1, count, call->stream);
    }
    DRIVER_TRY(call->op, "fill", result);
    return METALLOID_OK;
}

metalloid_status mtl_cuda_copy(const mtl_cuda_call *call, CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    DRIVER_TRY(call->op, "copy", driver.cuMemcpyDtoDAsync(to, from, bytes, call->stream));
    return METALLOID_OK;
}

/* ---- arguments --------------------------------------------------------------------------------------------------- */

void mtl_cuda_cut_loop(const mtl_loop *loop, mtl_loop *outer, mtl_cuda_loop *inner) {
    int cut = loop->rank > MTL_CUDA_AXES ? loop->rank - MTL_CUDA_AXES : 0;
    *outer = *loop;
    outer->rank = cut;
    outer->count = loop->count ? 1 : 0;
    for (int axis = 0; axis < cut; axis++) outer->count *= loop->shape[axis];
    inner->rank = loop->rank - cut;
    inner->count = 1;
    for (int axis = 0; axis < inner->rank; axis++) {
        inner->shape[axis] = loop->shape[cut + axis];
        inner->count *= inner->shape[axis];
        for (int i = 0; i < loop->operands; i++) inner->stride[axis][i] = loop->stride[cut + axis][i];
    }
}

bool mtl_cuda_vectors(mtl_row row, const mtl_loop *loop, int operand) {
    enum { VECTOR = 16 };
    if (!row.data) return true;
    bool aligned = row.stride == mtl_dtype_size(row.dtype) && (uintptr_t)row.data % VECTOR == 0;
    for (int axis = 0; axis < loop->rank && aligned; axis++) aligned = loop->stride[axis][operand] % VECTOR == 0;
    return aligned;
}

bool mtl_cuda_weights(mtl_row row) {
    return !row.data || (row.dtype != MTL_F64 && mtl_cuda_vectors(row, &(mtl_loop){0}, 0));
}
