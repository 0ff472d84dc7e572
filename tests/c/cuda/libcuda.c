/* A stand-in for libcuda.so.1: see libcuda.h. The limits are those of the CUDA C++ Programming Guide's table of
 * technical specifications and of the driver API's reference. SPDX-License-Identifier: MIT */
#include "libcuda.h"

#include <cuda.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

EXPORT const libcuda_device libcuda_devices[LIBCUDA_DEVICES] = {
    [LIBCUDA_H100] = {"H100", 9, 0, 132, 227 << 10, 16},
    [LIBCUDA_SLICE] = {"slice of an H100", 9, 0, 16, 227 << 10, 8},
    [LIBCUDA_A100] = {"A100", 8, 0, 108, 163 << 10, 0},
    [LIBCUDA_RTX_4090] = {"RTX 4090", 8, 9, 128, 99 << 10, 0},
    [LIBCUDA_ORIN] = {"Orin", 8, 7, 8, 163 << 10, 0},
    [LIBCUDA_B200] = {"B200", 10, 0, 148, 227 << 10, 16},
    [LIBCUDA_RTX_5090] = {"RTX 5090", 12, 0, 170, 99 << 10, 8},
    [LIBCUDA_T4] = {"T4", 7, 5, 40, 64 << 10, 0},
};

enum {
    ALWAYS_THERE = 48 << 10, /* of dynamic and static shared memory together */
    LONGEST_NAME = 96,
    MOST_PARAMETERS = 16,
    MOST_BLOCKS = 256, /* of memory at a time */
    MOST_CONTEXTS = 8,
    MOST_KEYS = 1 << 16,
    MOST_KERNELS = 1024,
    MOST_IMAGES = 64,
};

struct CUctx_st {
    int device;
};
struct CUmod_st {
    int device;
    const char *image;
    CUfunction functions;
};
struct CUfunc_st {
    CUmodule module;
    CUfunction next; /* of its module */
    char name[LONGEST_NAME];
    int device, architecture, most_threads;
    int own_memory; /* shared, in bytes */
    atomic_int dynamic_memory;
    atomic_bool large_clusters, launched;
    int parameters, parameter[MOST_PARAMETERS]; /* in bytes; parameters -1: not known */
};

static struct CUctx_st primary[LIBCUDA_DEVICES];
static atomic_int device_count = LIBCUDA_DEVICES, modules;

static _Thread_local struct {
    char complaint[512];
    CUstream stream;
    int launches, contexts, depth_at_first;
    CUcontext context[MOST_CONTEXTS];
    CUstreamCaptureMode mode; /* global at first */
} thread;

static CUresult refuse(CUresult result, const char *format, ...) __attribute__((format(printf, 2, 3)));
static CUresult refuse(CUresult result, const char *format, ...) {
    if (thread.complaint[0]) return result;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(thread.complaint, sizeof thread.complaint, format, arguments);
    va_end(arguments);
    return result;
}

#define REQUIRE(condition, ...)                                                 \
    do {                                                                        \
        if (!(condition)) return refuse(CUDA_ERROR_INVALID_VALUE, __VA_ARGS__); \
    } while (0)

/* ---- failures ---------------------------------------------------------------------------------------------------- */

/* A call is known by its function, what it is about, and how many such were made since libcuda_begin. */
static struct {
    bool on;
    const char *failed;
    int count, made;
    char *key[MOST_KEYS];  /* of those that have failed */
    char *call[MOST_KEYS]; /* of those made since libcuda_begin */
} failures;

static void forget(char **strings, int *count) {
    for (int i = 0; i < *count; i++) free(strings[i]);
    *count = 0;
}

static bool must_fail(const char *function, const char *about, int number) {
    if (!failures.on || failures.failed || failures.made == MOST_KEYS || failures.count == MOST_KEYS) return false;
    char key[256];
    int length = snprintf(key, sizeof key, "%s %s %d", function, about, number), before = 0;
    for (int i = 0; i < failures.made; i++) before += strcmp(failures.call[i], key) == 0;
    failures.call[failures.made++] = strdup(key);
    snprintf(key + length, sizeof key - (size_t)length, " %d", before);
    for (int i = 0; i < failures.count; i++) {
        if (strcmp(failures.key[i], key) == 0) return false;
    }
    failures.key[failures.count++] = strdup(key);
    failures.failed = function;
    return true;
}

#define MAY_FAIL(about, number)                                                         \
    do {                                                                                \
        if (must_fail(__func__, about, (int)(number))) return CUDA_ERROR_LAUNCH_FAILED; \
    } while (0)

/* ---- memory ------------------------------------------------------------------------------------------------------ */

static const CUdeviceptr first_block = (CUdeviceptr)1 << 46; /* above what the test makes up */
static const size_t most_memory = (size_t)1 << 44;
static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    int count;
    CUdeviceptr next;
    struct block {
        CUdeviceptr at;
        size_t bytes;
    } block[MOST_BLOCKS];
} memory;

static int blocks_of_memory(void) {
    pthread_mutex_lock(&memory_lock);
    int count = memory.count;
    pthread_mutex_unlock(&memory_lock);
    return count;
}

/* Whether that is memory of a block, or of what was not allocated here. */
static bool is_memory(CUdeviceptr at, size_t bytes) {
    if (at < first_block) return at && at + bytes <= first_block;
    bool found = false;
    pthread_mutex_lock(&memory_lock);
    for (int i = 0; i < memory.count && !found; i++) {
        const struct block *b = &memory.block[i];
        found = at >= b->at && bytes <= b->bytes && at - b->at <= b->bytes - bytes;
    }
    pthread_mutex_unlock(&memory_lock);
    return found;
}

/* ---- for the test ------------------------------------------------------------------------------------------------ */

EXPORT void libcuda_begin(void *stream) {
    thread.complaint[0] = '\0';
    thread.stream = stream;
    thread.launches = 0;
    thread.depth_at_first = thread.contexts;
    if (!failures.on) return;
    failures.failed = NULL;
    forget(failures.call, &failures.made);
}

EXPORT const char *libcuda_complaint(void) { return thread.complaint; }
EXPORT int libcuda_launches(void) { return thread.launches; }

EXPORT libcuda_left libcuda_left_behind(void) {
    return (libcuda_left){.memory = blocks_of_memory(),
                          .contexts = thread.contexts - thread.depth_at_first,
                          .capture = thread.mode != CU_STREAM_CAPTURE_MODE_GLOBAL};
}

EXPORT void libcuda_make_current(int device) {
    thread.contexts = device < 0 ? 0 : 1;
    if (device >= 0) {
        primary[device].device = device;
        thread.context[0] = &primary[device];
    }
}

EXPORT void libcuda_fail_each(bool on) {
    failures.on = on;
    failures.failed = NULL;
    forget(failures.key, &failures.count);
    forget(failures.call, &failures.made);
}

EXPORT const char *libcuda_failed(void) { return failures.failed; }
EXPORT void libcuda_have_devices(int count) { device_count = count; }
EXPORT int libcuda_modules(void) { return modules; }

/* ---- devices and contexts ---------------------------------------------------------------------------------------- */

static atomic_bool initialized;

#define REQUIRE_DEVICE(device) \
    REQUIRE(initialized && (device) >= 0 && (device) < LIBCUDA_DEVICES, "%s of no device: %d", __func__, (int)(device))

EXPORT CUresult CUDAAPI cuInit(unsigned flags) {
    MAY_FAIL("", 0);
    REQUIRE(flags == 0, "cuInit with flags %u", flags);
    initialized = true;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuDeviceGetCount(int *count) {
    MAY_FAIL("", 0);
    REQUIRE(initialized, "cuDeviceGetCount before cuInit");
    if (device_count < 0) return CUDA_ERROR_NO_DEVICE;
    *count = device_count;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal) {
    MAY_FAIL("", ordinal);
    REQUIRE_DEVICE(ordinal);
    *device = ordinal;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuDeviceGetName(char *name, int size, CUdevice device) {
    MAY_FAIL("", device);
    REQUIRE_DEVICE(device);
    snprintf(name, (size_t)size, "%s", libcuda_devices[device].name);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    MAY_FAIL("", attribute);
    REQUIRE_DEVICE(device);
    const libcuda_device *d = &libcuda_devices[device];
    switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = d->multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = d->major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = d->minor; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = d->shared_memory; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 2619000; break;
    default: return refuse(CUDA_ERROR_INVALID_VALUE, "device attribute %d is unknown here", (int)attribute);
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    MAY_FAIL("", device);
    REQUIRE_DEVICE(device);
    primary[device].device = device;
    *context = &primary[device];
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuCtxGetCurrent(CUcontext *context) {
    MAY_FAIL("", 0);
    *context = thread.contexts ? thread.context[thread.contexts - 1] : NULL;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuCtxPushCurrent(CUcontext context) {
    MAY_FAIL("", 0);
    REQUIRE(context && thread.contexts < MOST_CONTEXTS, "%d contexts are pushed", thread.contexts);
    thread.context[thread.contexts++] = context;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuCtxPopCurrent(CUcontext *context) {
    REQUIRE(thread.contexts > 0, "there is no context to pop");
    *context = thread.context[--thread.contexts];
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
    CUstreamCaptureMode before = thread.mode;
    thread.mode = *mode;
    *mode = before;
    return CUDA_SUCCESS;
}

/* Of the context that is current; -1: none is. */
static int current_device(void) { return thread.contexts ? thread.context[thread.contexts - 1]->device : -1; }

#define REQUIRE_CONTEXT() REQUIRE(current_device() >= 0, "%s without a context", __func__)

/* ---- kernels ----------------------------------------------------------------------------------------------------- */

/* Images are text: a kernel is there when its name is, before a parenthesis. In those that the test makes the bytes of
 * its parameters follow; the library's are their source after the preprocessor, which has the bounds of launches. */
static const char *find_in_image(const char *image, const char *name) {
    size_t length = strlen(name);
    for (const char *at = strstr(image, name); at; at = strstr(at + 1, name)) {
        bool begins = at == image || !strchr("abcdefghijklmnopqrstuvwxyz0123456789_", at[-1]);
        if (begins && at[length] == '(') return at;
    }
    return NULL;
}

/* The library's images, and the kernels that were launched. */
static pthread_mutex_t use_lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    int images, kernels;
    const char *image[MOST_IMAGES];
    char kernel[MOST_KERNELS][LONGEST_NAME];
} used;

static void remember_image(const char *image) {
    pthread_mutex_lock(&use_lock);
    bool known = !strstr(image, "__global__") || used.images == MOST_IMAGES;
    for (int i = 0; i < used.images && !known; i++) known = used.image[i] == image;
    if (!known) used.image[used.images++] = image;
    pthread_mutex_unlock(&use_lock);
}

static void remember_kernel(CUfunction function) {
    if (atomic_exchange(&function->launched, true)) return;
    pthread_mutex_lock(&use_lock);
    if (used.kernels < MOST_KERNELS) memcpy(used.kernel[used.kernels++], function->name, LONGEST_NAME);
    pthread_mutex_unlock(&use_lock);
}

static bool is_used(const char *name, size_t length) {
    bool found = false;
    for (int i = 0; i < used.kernels && !found; i++)
        found = strncmp(used.kernel[i], name, length) == 0 && !used.kernel[i][length];
    return found;
}

/* Past "void", bounds in parentheses and blanks to the name. */
static const char *name_of_kernel(const char *at) {
    at += strspn(at, " \n");
    if (strncmp(at, "void", 4) == 0) return name_of_kernel(at + 4);
    if (strncmp(at, "__launch_bounds__", 17) != 0) return at;
    int depth = 0;
    do {
        depth += (*at == '(') - (*at == ')');
        at++;
    } while (depth > 0 || at[-1] != ')');
    return name_of_kernel(at);
}

EXPORT int libcuda_idle_kernels(char *name, size_t size) {
    static const char word[] = "__global__";
    int idle = 0;
    for (int i = 0; i < used.images; i++) {
        for (const char *at = strstr(used.image[i], word); at; at = strstr(at, word)) {
            at = name_of_kernel(at + sizeof word - 1);
            size_t length = strcspn(at, "(");
            if (is_used(at, length)) continue;
            snprintf(name, size, "%.*s", (int)length, at);
            idle++;
        }
    }
    return idle;
}

/* What of shared memory the library's kernels declare for themselves, at most. */
static int own_memory_of(const char *name) {
    static const struct {
        const char *prefix;
        int bytes;
    } of[] = {{"attention_decode", 5 << 10},
              {"attention_masked", 1 << 10},
              {"attention_changed", 1 << 10},
              {"gated_delta_prepare", 5 << 10},
              {"rope", 8 << 10},
              {"norm_rope", 8 << 10},
              {LIBCUDA_OWN_MEMORY, LIBCUDA_OWN_BYTES}};
    for (size_t i = 0; i < sizeof of / sizeof *of; i++) {
        if (strncmp(name, of[i].prefix, strlen(of[i].prefix)) == 0) return of[i].bytes;
    }
    return 0;
}

/* "__launch_bounds__(8 * 32, 2) name(", where no name is part of the bound. */
static int launch_bound_of(const char *image, const char *at) {
    static const char words[] = "__launch_bounds__(";
    const char *bounds = NULL, *next = image;
    int threads, warps;
    char end[2];
    while ((next = strstr(next, words)) && next < at) bounds = next += sizeof words - 1;
    if (bounds && sscanf(bounds, "%d%1[,)]", &threads, end) == 2) return threads;
    if (bounds && sscanf(bounds, "%d * %d%1[,)]", &warps, &threads, end) == 3) return warps * threads;
    return 1024;
}

EXPORT CUresult CUDAAPI cuModuleLoadData(CUmodule *module, const void *image) {
    MAY_FAIL("", 0);
    REQUIRE_CONTEXT();
    REQUIRE(image, "an image of NULL");
    REQUIRE(thread.mode == CU_STREAM_CAPTURE_MODE_RELAXED, "to load a module would end the capture of a stream");
    if (!*(const char *)image) return CUDA_ERROR_INVALID_IMAGE;
    remember_image(image);
    atomic_fetch_add(&modules, 1);
    *module = malloc(sizeof **module);
    **module = (struct CUmod_st){.device = current_device(), .image = image};
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuModuleUnload(CUmodule module) {
    REQUIRE(module, "a module of NULL");
    atomic_fetch_sub(&modules, 1);
    for (CUfunction next, at = module->functions; at; at = next) {
        next = at->next;
        free(at);
    }
    free(module);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    MAY_FAIL(name, 0);
    REQUIRE(module && module->device == current_device(), "%s of another context's module", name);
    const char *at = find_in_image(module->image, name);
    if (!at) return CUDA_ERROR_NOT_FOUND;
    CUfunction f = calloc(1, sizeof *f);
    f->module = module;
    f->next = module->functions;
    module->functions = f;
    snprintf(f->name, sizeof f->name, "%s", name);
    f->device = module->device;
    f->architecture = libcuda_devices[f->device].major == 9 ? 90 : 80; /* for newer ones there is PTX for 80 */
    f->most_threads = launch_bound_of(module->image, at);
    f->own_memory = own_memory_of(name);
    f->dynamic_memory = ALWAYS_THERE - f->own_memory;
    f->parameters = -1;
    at += strlen(name) + 1;
    if (!strchr("0123456789)", *at)) {
        *function = f;
        return CUDA_SUCCESS;
    }
    f->parameters = 0;
    for (char *end; *at != ')'; at = end) f->parameter[f->parameters++] = (int)strtol(at, &end, 10);
    *function = f;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    MAY_FAIL(function->name, attribute);
    switch ((int)attribute) {
    case CU_FUNC_ATTRIBUTE_PTX_VERSION: *value = function->architecture; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = function->own_memory; break;
    default: return refuse(CUDA_ERROR_INVALID_VALUE, "function attribute %d is unknown here", (int)attribute);
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    MAY_FAIL(function->name, attribute);
    const libcuda_device *device = &libcuda_devices[function->device];
    switch ((int)attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
        REQUIRE(value >= 0 && value <= device->shared_memory - function->own_memory, "%s with %d bytes of memory",
                function->name, value);
        function->dynamic_memory = value;
        break;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
        REQUIRE(device->major >= 9, "%s has no clusters", device->name);
        function->large_clusters = value;
        break;
    default: return refuse(CUDA_ERROR_INVALID_VALUE, "function attribute %d is unknown here", (int)attribute);
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuFuncGetParamInfo(CUfunction function, size_t index, size_t *offset, size_t *size);
EXPORT CUresult CUDAAPI cuFuncGetParamInfo(CUfunction function, size_t index, size_t *offset, size_t *size) {
    if (function->parameters < 0 || index >= (size_t)function->parameters) return CUDA_ERROR_INVALID_VALUE;
    *offset = 0;
    *size = (size_t)function->parameter[index];
    return CUDA_SUCCESS;
}

static CUresult check_configuration(const CUlaunchConfig *c, CUfunction f, int *cluster) {
    const libcuda_device *device = &libcuda_devices[f->device];
    const char *name = f->name;
    REQUIRE(f->device == current_device(), "%s where another context is current", name);
    REQUIRE(c->hStream == thread.stream, "%s on another stream", name);
    REQUIRE(c->gridDimX >= 1 && c->gridDimX <= INT32_MAX && c->gridDimY >= 1 && c->gridDimY <= 65535 &&
                c->gridDimZ >= 1 && c->gridDimZ <= 65535,
            "%s in a grid of %u x %u x %u", name, c->gridDimX, c->gridDimY, c->gridDimZ);
    REQUIRE(
        c->blockDimX >= 1 && c->blockDimX <= 1024 && c->blockDimY >= 1 && c->blockDimY <= 1024 && c->blockDimZ >= 1 &&
            c->blockDimZ <= 64 && (uint64_t)c->blockDimX * c->blockDimY * c->blockDimZ <= (uint64_t)f->most_threads,
        "%s in blocks of %u x %u x %u, of %d at most", name, c->blockDimX, c->blockDimY, c->blockDimZ, f->most_threads);
    REQUIRE(c->sharedMemBytes <= (unsigned)f->dynamic_memory, "%s with %u bytes of memory, of %d", name,
            c->sharedMemBytes, f->dynamic_memory);
    for (unsigned i = 0; i < c->numAttrs; i++) {
        const CUlaunchAttribute *attribute = &c->attrs[i];
        if (attribute->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
            unsigned x = attribute->value.clusterDim.x, y = attribute->value.clusterDim.y;
            REQUIRE(x >= 1 && x <= (f->large_clusters ? 16 : 8) && y == 1 && attribute->value.clusterDim.z == 1,
                    "%s in clusters of %u x %u x %u", name, x, y, attribute->value.clusterDim.z);
            REQUIRE(device->major >= 9, "%s has no clusters", device->name);
            REQUIRE(c->gridDimX % x == 0, "%s: %u blocks in clusters of %u", name, c->gridDimX, x);
            *cluster = (int)x;
        } else if (attribute->id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
            REQUIRE(f->architecture >= 90, "%s, compiled for %d, does not wait", name, f->architecture);
        } else {
            REQUIRE(false, "launch attribute %d is unknown here", (int)attribute->id);
        }
    }
    return CUDA_SUCCESS;
}

static CUresult check_launch(const CUlaunchConfig *c, CUfunction f, void *const *parameters) {
    int cluster = 1, given = f->parameters < 0 ? 1 : f->parameters;
    CUresult result = check_configuration(c, f, &cluster);
    if (result != CUDA_SUCCESS) return result;
    REQUIRE(cluster == 1 || cluster <= libcuda_devices[f->device].cluster, "%s has no place for clusters of %d",
            f->name, cluster);
    for (int i = 0; i < given; i++) REQUIRE(parameters && parameters[i], "%s without parameter %d", f->name, i);
    remember_kernel(f);
    thread.launches++;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                                         void **extra) {
    MAY_FAIL(function->name, 0);
    REQUIRE(!extra, "%s with extra parameters", function->name);
    return check_launch(config, function, parameters);
}

EXPORT CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                       unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_memory,
                                       CUstream stream, void **parameters, void **extra) {
    MAY_FAIL(function->name, 0);
    REQUIRE(!extra, "%s with extra parameters", function->name);
    CUlaunchConfig config = {.gridDimX = grid_x,
                             .gridDimY = grid_y,
                             .gridDimZ = grid_z,
                             .blockDimX = block_x,
                             .blockDimY = block_y,
                             .blockDimZ = block_z,
                             .sharedMemBytes = shared_memory,
                             .hStream = stream};
    return check_launch(&config, function, parameters);
}

EXPORT CUresult CUDAAPI cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int threads,
                                                                    size_t shared_memory) {
    MAY_FAIL(function->name, threads);
    REQUIRE(function->device == current_device(), "%s where another context is current", function->name);
    REQUIRE(threads >= 1 && threads <= 1024 && shared_memory <= (size_t)function->dynamic_memory,
            "%s in blocks of %d with %zu bytes of memory", function->name, threads, shared_memory);
    *count = threads <= function->most_threads ? (threads > 512 ? 1 : 1024 / threads < 16 ? 1024 / threads : 16) : 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
    int cluster = 1;
    MAY_FAIL(function->name, config->gridDimX);
    CUresult result = check_configuration(config, function, &cluster);
    const libcuda_device *device = &libcuda_devices[function->device];
    *count = result == CUDA_SUCCESS && cluster <= device->cluster ? device->multiprocessors / cluster : 0;
    return result;
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

#define REQUIRE_STREAM(stream)                                              \
    do {                                                                    \
        REQUIRE_CONTEXT();                                                  \
        REQUIRE(stream == thread.stream, "%s on another stream", __func__); \
    } while (0)

EXPORT CUresult CUDAAPI cuMemAllocAsync(CUdeviceptr *at, size_t bytes, CUstream stream) {
    if (must_fail(__func__, "", 0)) return CUDA_ERROR_OUT_OF_MEMORY;
    REQUIRE_STREAM(stream);
    REQUIRE(bytes, "an allocation of 0 bytes");
    if (bytes > most_memory) return CUDA_ERROR_OUT_OF_MEMORY;
    pthread_mutex_lock(&memory_lock);
    bool fits = memory.count < MOST_BLOCKS;
    if (fits) {
        if (!memory.next) memory.next = first_block;
        memory.block[memory.count++] = (struct block){memory.next, bytes};
        *at = memory.next;
        memory.next += (bytes + 1023) / 512 * 512; /* with a gap */
    }
    pthread_mutex_unlock(&memory_lock);
    REQUIRE(fits, "%d blocks of memory", (int)MOST_BLOCKS);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemFreeAsync(CUdeviceptr at, CUstream stream) {
    REQUIRE_STREAM(stream);
    pthread_mutex_lock(&memory_lock);
    int i = 0;
    while (i < memory.count && memory.block[i].at != at) i++;
    bool found = i < memory.count;
    if (found) memory.block[i] = memory.block[--memory.count];
    pthread_mutex_unlock(&memory_lock);
    REQUIRE(found, "what is released was not allocated");
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    MAY_FAIL("", 0);
    REQUIRE_STREAM(stream);
    REQUIRE(bytes && is_memory(to, bytes) && is_memory(from, bytes), "a copy of %zu bytes", bytes);
    return CUDA_SUCCESS;
}

static CUresult check_fill(CUdeviceptr at, size_t pitch, size_t size, size_t count, CUstream stream) {
    REQUIRE_STREAM(stream);
    REQUIRE(count && at % size == 0 && pitch % size == 0 && is_memory(at, (count - 1) * pitch + size),
            "a fill of %zu elements of %zu bytes", count, size);
    return CUDA_SUCCESS;
}

EXPORT CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr at, unsigned char value, size_t count, CUstream stream) {
    MAY_FAIL("", 0);
    (void)value;
    return check_fill(at, 1, 1, count, stream);
}

EXPORT CUresult CUDAAPI cuMemsetD16Async(CUdeviceptr at, unsigned short value, size_t count, CUstream stream) {
    MAY_FAIL("", 0);
    (void)value;
    return check_fill(at, 2, 2, count, stream);
}

EXPORT CUresult CUDAAPI cuMemsetD32Async(CUdeviceptr at, unsigned value, size_t count, CUstream stream) {
    MAY_FAIL("", 0);
    (void)value;
    return check_fill(at, 4, 4, count, stream);
}

EXPORT CUresult CUDAAPI cuMemsetD2D32Async(CUdeviceptr at, size_t pitch, unsigned value, size_t width, size_t height,
                                           CUstream stream) {
    MAY_FAIL("", 0);
    (void)value;
    REQUIRE(width == 1, "rows of %zu", width);
    return check_fill(at, pitch, 4, height, stream);
}

/* ---- tensor maps ------------------------------------------------------------------------------------------------- */

EXPORT CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *at,
                                               const cuuint64_t *extent, const cuuint64_t *stride,
                                               const cuuint32_t *box, const cuuint32_t *step,
                                               CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                               CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    MAY_FAIL("", box[1]);
    (void)promotion, (void)fill;
    unsigned size = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
    REQUIRE((uintptr_t)map % 64 == 0, "a tensor map at %p", (void *)map);
    REQUIRE(at && (uintptr_t)at % 16 == 0, "a tensor map of %p", at);
    REQUIRE(rank >= 3 && rank <= 5 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE, "a tensor map of rank %u", rank);
    for (unsigned i = 0; i < rank; i++) {
        REQUIRE(extent[i] >= 1 && extent[i] <= (cuuint64_t)1 << 32, "a tensor map of extent %llu",
                (unsigned long long)extent[i]);
        REQUIRE(box[i] >= 1 && box[i] <= 256 && step[i] >= 1 && step[i] <= 8, "a tensor map with boxes of %u", box[i]);
        if (i + 1 == rank) break;
        REQUIRE(stride[i] % 16 == 0 && stride[i] < (cuuint64_t)1 << 40, "a tensor map of stride %llu",
                (unsigned long long)stride[i]);
    }
    REQUIRE(box[0] * size % 16 == 0 && (swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * size <= 128),
            "a tensor map with rows of %u bytes", box[0] * size);
    memset(map, 1, sizeof *map);
    return CUDA_SUCCESS;
}

/* ---- words ------------------------------------------------------------------------------------------------------- */

EXPORT CUresult CUDAAPI cuGetErrorString(CUresult result, const char **words) {
    switch ((int)result) {
    case CUDA_ERROR_INVALID_VALUE: *words = "invalid argument"; return CUDA_SUCCESS;
    case CUDA_ERROR_NO_DEVICE: *words = "no CUDA-capable device is detected"; return CUDA_SUCCESS;
    case CUDA_ERROR_OUT_OF_MEMORY: *words = "out of memory"; return CUDA_SUCCESS;
    case CUDA_ERROR_INVALID_IMAGE: *words = "device kernel image is invalid"; return CUDA_SUCCESS;
    case CUDA_ERROR_NOT_FOUND: *words = "named symbol not found"; return CUDA_SUCCESS;
    case CUDA_ERROR_LAUNCH_FAILED: *words = "unspecified launch failure"; return CUDA_SUCCESS;
    default: *words = NULL; return CUDA_ERROR_INVALID_VALUE;
    }
}
