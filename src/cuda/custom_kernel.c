/* Custom kernels on CUDA. SPDX-License-Identifier: MIT
 *
 * NVRTC makes machine code of the same unit that a C++ compiler gets on the CPU, with the other runtime part of the Metal header.
 * A threadgroup is a block, a simdgroup a warp. A launch has a parameter for each buffer and one struct for everything else, in
 * which shapes and strides travel too: nothing is copied to the device, and every launch can be captured. */
#include "core/dtype.h"
#include "cuda/driver.h"
#include "cuda/nvrtc.h"
#include "kernel/cache.h"
#include "kernel/cuda_source.h"
#include "kernel/kernel.h"
#include "kernel/messages.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

enum {
    MOST_OPTIONS = 16,
    MOST_BLOCKS_YZ = 65535, /* along y and z of a grid */
    MOST_THREADS_Z = 64,    /* of a block */
    BLOCKS_FOR_WIDTH = 8,   /* of a multiprocessor */
    COPY_AXES = 16,
    COPY_THREADS = 256,
};

static const char op[] = "metal_kernel";

/* ---- compiling ------------------------------------------------------------------------------------------------------------- */

static pthread_mutex_t building = PTHREAD_MUTEX_INITIALIZER;

static int options_of(metalloid_math_mode mode, bool metal, const mtl_mentions *mentions,
                      const char *options[MOST_OPTIONS]) {
    int count = 0;
    options[count++] = mentions->designators ? "-std=c++20" : "-std=c++17";
    options[count++] = "-default-device";
    options[count++] = "-w";
    if (metal && mode == METALLOID_MATH_FAST) options[count++] = "--use_fast_math";
    if (mentions->no_contraction) options[count++] = "--fmad=false";
    return count;
}

/* What was loaded, by what it was made of. It stays: a kernel that is made again, as by a function that makes one at
 * every call, gets the function that there is. All under `building`. */
typedef struct loaded {
    struct loaded *next;
    mtl_digest key;
    int device, shared_memory;
    CUfunction function;
    char symbol[];
} loaded;
static loaded *all_loaded;

static CUfunction find_loaded(const mtl_cuda_call *call, const mtl_digest *key, const char *symbol, int shared_memory) {
    for (loaded *at = all_loaded; at; at = at->next) {
        if (at->device == call->device->id && at->shared_memory == shared_memory && strcmp(at->symbol, symbol) == 0 &&
            memcmp(at->key.bytes, key->bytes, sizeof key->bytes) == 0)
            return at->function;
    }
    return NULL;
}

static metalloid_status load(const mtl_cuda_call *call, const mtl_digest *key, const void *image, const char *symbol,
                             int shared_memory, CUfunction *function) {
    size_t length = strlen(symbol) + 1;
    loaded *made = malloc(sizeof *made + length);
    if (!made) return mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: out of memory", op);
    metalloid_status status = mtl_cuda_load(call, image, symbol, shared_memory, function);
    if (status) {
        free(made);
        return status;
    }
    *made = (loaded){.next = all_loaded,
                     .key = *key,
                     .device = call->device->id,
                     .shared_memory = shared_memory,
                     .function = *function};
    memcpy(made->symbol, symbol, length);
    all_loaded = made;
    return METALLOID_OK;
}

static metalloid_status load_image(const mtl_cuda_call *call, const metalloid_kernel *kernel, CUfunction *function) {
    mtl_sha256 hash;
    mtl_sha256_begin(&hash);
    mtl_sha256_add(&hash, kernel->definition.source, kernel->image);
    mtl_digest key = mtl_sha256_end(&hash);
    pthread_mutex_lock(&building);
    metalloid_status status = METALLOID_OK;
    *function = find_loaded(call, &key, kernel->definition.name, kernel->shared_memory);
    if (!*function)
        status = load(call, &key, kernel->definition.source, kernel->definition.name, kernel->shared_memory, function);
    pthread_mutex_unlock(&building);
    return status;
}

static mtl_digest key_of(const mtl_text *unit, int arch, const char *const *options, int count) {
    mtl_sha256 hash;
    mtl_sha256_begin(&hash);
    const char *version = metalloid_version(), *compiler = mtl_nvrtc_identity();
    mtl_sha256_add(&hash, version, strlen(version) + 1);
    mtl_sha256_add(&hash, compiler, strlen(compiler) + 1);
    mtl_sha256_add(&hash, &arch, sizeof arch);
    for (int i = 0; i < count; i++) mtl_sha256_add(&hash, options[i], strlen(options[i]) + 1);
    mtl_sha256_add(&hash, unit->data, unit->length);
    return mtl_sha256_end(&hash);
}

/* The unit's kernel `symbol`, from the cache or compiled. */
static metalloid_status build(const mtl_cuda_call *call, const mtl_definition *definition, const mtl_text *unit,
                              metalloid_math_mode mode, bool metal, const mtl_mentions *mentions, bool include,
                              const char *symbol, int shared_memory, CUfunction *function) {
    const char *why, *options[MOST_OPTIONS];
    if (unit->failed) return mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: out of memory", op);
    if (!mtl_nvrtc_available(&why))
        return mtl_fail(METALLOID_COMPILE_FAILED, "%s: kernel %s has to be compiled, but %s", op, definition->name,
                        why);
    int arch = call->device->major * 10 + call->device->minor;
    int count = options_of(mode, metal, mentions, options);
    mtl_digest key = key_of(unit, arch, options, count);
    size_t length;
    char *code = NULL;
    mtl_text log = {0};
    metalloid_status status = METALLOID_OK;
    pthread_mutex_lock(&building);
    *function = find_loaded(call, &key, symbol, shared_memory);
    if (!*function && !mtl_cache_load(&key, &code, &length)) {
        code = mtl_nvrtc_compile(mtl_text_string((mtl_text *)(uintptr_t)unit), arch, options, count, include, &length,
                                 &log);
        if (code) mtl_cache_store(&key, code, length);
    }
    if (code) {
        status = load(call, &key, code, symbol, shared_memory, function);
    } else if (!*function) {
        status = mtl_does_not_compile(op, definition, &(mtl_text){0}, &log);
    }
    pthread_mutex_unlock(&building);
    free(code);
    mtl_text_free(&log);
    return status;
}

/* ---- from a kernel to a function -------------------------------------------------------------------------------------------- */

static uint64_t hash_of(const unsigned char *bytes, size_t count) { /* FNV-1a */
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < count; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

/* Registers are shared among a block's threads: how many there can be is part of what is compiled. */
static int most_threads_of(const uint32_t threads[3]) {
    uint32_t count = threads[0] * threads[1] * threads[2];
    return count <= 256 ? 256 : count <= 512 ? 512 : 1024;
}

static metalloid_status make_function(const mtl_cuda_call *call, const metalloid_kernel *kernel,
                                      const mtl_launch *launch, int most_threads, int line, CUfunction *function) {
    const mtl_definition *definition = &kernel->definition;
    if (kernel->language == METALLOID_KERNEL_PRECOMPILED) return load_image(call, kernel, function);
    bool metal = kernel->language == METALLOID_KERNEL_METAL, include = false;
    mtl_text unit = {0};
    const mtl_unit_options options = {
        .target = MTL_TARGET_CUDA, .math_mode = kernel->math_mode, .most_threads = most_threads, .line = line};
    if (metal) mtl_translation_unit(&unit, definition, &kernel->mentions, &launch->types, &options);
    else mtl_cuda_unit(&unit, definition, &kernel->mentions, &launch->types, &include);
    metalloid_status status = build(call, definition, &unit, kernel->math_mode, metal, &kernel->mentions, include,
                                    "mtl_kernel", kernel->shared_memory, function);
    mtl_text_free(&unit);
    return status;
}

static metalloid_status get_function(const mtl_cuda_call *call, metalloid_kernel *kernel, const mtl_launch *launch,
                                     const mtl_variant **variant) {
    bool metal = kernel->language == METALLOID_KERNEL_METAL;
    int most_threads = metal ? most_threads_of(launch->threadgroup) : 0;
    int line = metal ? mtl_cuda_line(&kernel->mentions, launch->grid, launch->threadgroup) : 0;
    size_t length = launch->key_length + 4;
    unsigned char local[512], *key = length <= sizeof local ? local : malloc(length);
    if (!key) return mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: out of memory", op);
    memcpy(key, launch->key, launch->key_length);
    key[launch->key_length] = (unsigned char)call->device->id;
    key[launch->key_length + 1] = (unsigned char)(most_threads / 256);
    key[launch->key_length + 2] = (unsigned char)(line / 32);
    key[launch->key_length + 3] = 0xff; /* no key of the CPU ends so */
    uint64_t hash = hash_of(key, length);
    metalloid_status status = METALLOID_OK;
    for (mtl_variant *at = atomic_load_explicit(&kernel->variants, memory_order_acquire); at; at = at->next) {
        if (at->hash != hash || at->key_length != length || memcmp(at->key, key, length) != 0) continue;
        *variant = at;
        goto done;
    }
    CUfunction function = NULL;
    status = make_function(call, kernel, launch, most_threads, line, &function);
    if (status) goto done;
    mtl_variant *made = malloc(sizeof *made + length);
    if (!made) {
        status = mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: out of memory", op);
        goto done;
    }
    *made = (mtl_variant){.hash = hash,
                          .key_length = length,
                          .key = (unsigned char *)(made + 1),
                          .function = function,
                          .running = line ? mtl_cuda_running(function, line) : 0};
    memcpy(made + 1, key, length);
    made->next = atomic_load(&kernel->variants);
    while (!atomic_compare_exchange_weak(&kernel->variants, &made->next, made)) continue;
    *variant = made;
done:
    if (key != local) free(key);
    return status;
}

/* ---- inputs that are not row-contiguous ---------------------------------------------------------------------------------------- */

typedef struct copy_arguments {
    long count;
    int rank, unused;
    long shape[COPY_AXES], stride[COPY_AXES]; /* strides in bytes */
} copy_arguments;

static const char copy_source[] =
    "struct copy_arguments { long count; int rank, unused; long shape[16], stride[16]; };\n"
    "template <class T> __device__ void copy(const char *from, T *to, const copy_arguments &a) {\n"
    "    for (long i = blockIdx.x * 256l + threadIdx.x; i < a.count; i += gridDim.x * 256l) {\n"
    "        long rest = i, at = 0;\n"
    "        for (int axis = a.rank - 1; axis >= 0; --axis) {\n"
    "            at += rest % a.shape[axis] * a.stride[axis];\n"
    "            rest /= a.shape[axis];\n"
    "        }\n"
    "        to[i] = *(const T *)(from + at);\n"
    "    }\n"
    "}\n"
    "#define COPY(size, T) extern \"C\" __global__ void copy_##size(const char *from, T *to, \\\n"
    "    const __grid_constant__ copy_arguments a) { copy(from, to, a); }\n"
    "COPY(1, unsigned char)\nCOPY(2, unsigned short)\nCOPY(4, unsigned)\nCOPY(8, unsigned long)\n";

static _Atomic(CUfunction) copy_functions[MTL_CUDA_DEVICES][4];

static metalloid_status copy_to_rows(const mtl_cuda_call *call, mtl_view *view, CUdeviceptr *memory) {
    int64_t size = mtl_dtype_size(view->dtype);
    MTL_TRY(mtl_cuda_allocate(call, (size_t)(view->elements * size), memory));
    static const char *const names[] = {"copy_1", "copy_2", "copy_4", "copy_8"};
    int which = size == 1 ? 0 : size == 2 ? 1 : size == 4 ? 2 : 3;
    _Atomic(CUfunction) *place = &copy_functions[call->device->id][which];
    CUfunction function = atomic_load_explicit(place, memory_order_acquire);
    if (!function) {
        mtl_text unit = {0};
        mtl_text_add_string(&unit, copy_source);
        const mtl_definition definition = {.name = "copy", .source = "", .header = ""};
        metalloid_status status = build(call, &definition, &unit, METALLOID_MATH_SAFE, false, &(mtl_mentions){0}, false,
                                        names[which], 0, &function);
        mtl_text_free(&unit);
        if (status) return status;
        atomic_store_explicit(place, function, memory_order_release);
    }
    const mtl_view *views[] = {view};
    mtl_loop loop;
    mtl_loop_init(&loop, view->rank, 1, views);
    MTL_REQUIRE(loop.rank <= COPY_AXES, op, "%s has more than %d axes that do not merge", view->name, (int)COPY_AXES);
    copy_arguments arguments = {.count = view->elements, .rank = loop.rank};
    for (int axis = 0; axis < loop.rank; axis++) {
        arguments.shape[axis] = loop.shape[axis];
        arguments.stride[axis] = loop.stride[axis][0];
    }
    int64_t blocks = (view->elements + COPY_THREADS - 1) / COPY_THREADS;
    const uint32_t grid[] = {(uint32_t)(blocks < 65536 ? blocks : 65536), 1, 1}, threads[] = {COPY_THREADS, 1, 1};
    void *from = view->data, *parameters[] = {&from, memory, &arguments};
    MTL_TRY(mtl_cuda_launch_function(call, function, grid, threads, 0, parameters));
    view->data = (char *)*memory;
    for (int axis = view->rank - 1; axis >= 0; axis--) {
        view->stride[axis] = size;
        size *= view->shape[axis];
    }
    return METALLOID_OK;
}

/* ---- buffers that are not aligned --------------------------------------------------------------------------------------------- */

/* A float4 is loaded and stored whole, at a multiple of its size, and a slice begins anywhere: where a kernel may have vectors in it, the
 * view moves to a copy. */
static metalloid_status align(const mtl_cuda_call *call, mtl_view *view, int alignment, CUdeviceptr *memory) {
    size_t unit = alignment ? (size_t)alignment : 1;
    if ((uintptr_t)view->data % unit == 0 || view->high == view->low || view->device.device_type == kDLCPU)
        return METALLOID_OK;
    size_t lead = ((size_t)-view->low + unit - 1) / unit * unit, length = (size_t)(view->high - view->low);
    MTL_TRY(mtl_cuda_allocate(call, lead + (size_t)view->high, memory));
    char *from = view->data + view->low;
    view->data = (char *)*memory + lead;
    return mtl_cuda_copy(call, (CUdeviceptr)(view->data + view->low), (CUdeviceptr)from, length);
}

/* ---- launches ------------------------------------------------------------------------------------------------------------------ */

static metalloid_status fill(const mtl_cuda_call *call, const mtl_view *output, double value) {
    char element[16] __attribute__((aligned(16))) = {0};
    mtl_view one = {.data = element, .dtype = output->dtype, .rank = 0, .elements = 1};
    mtl_kernel_fill(&one, value);
    uint64_t bits;
    memcpy(&bits, element, sizeof bits);
    return mtl_cuda_fill(call, (CUdeviceptr)output->data, output->elements, (int)mtl_dtype_size(output->dtype), bits);
}

/* What threadgroups prefetch for later ones: of each input so many bytes each, from this address on. It is believed that
 * threadgroups go in turn over inputs that are as large as an output. 16 bytes a thread or less are too few under way for
 * a GPU's memory, and there cannot be more threads: those that run ask for what the next as many will read. Rows of 4096
 * by fours, 1024 threads, on an H200: in bfloat16 91 us for 113, in float 132 for 156; with more bytes a thread, or further
 * ahead, it costs time. */
typedef struct prefetch {
    uint32_t threadgroups;  /* that prefetch for another */
    int64_t running, bytes; /* threadgroups that the device has at a time, and what each reads */
    uint32_t slice[MTL_CUDA_PREFETCHED];
    uint64_t address[MTL_CUDA_PREFETCHED];
} prefetch;

static prefetch plan_prefetch(const mtl_cuda_call *call, const metalloid_kernel *kernel, const mtl_launch *launch,
                              const uint32_t groups[3], int running) {
    enum { BYTES = 16 };
    prefetch plan = {.running = (int64_t)running * call->device->multiprocessors};
    int64_t most = BYTES * (int64_t)launch->threadgroup[0];
    if (running == 0 || (int64_t)groups[0] * groups[1] > INT32_MAX) return plan;
    int64_t count = (int64_t)groups[0] * groups[1] * groups[2];
    if (count <= plan.running || count > INT32_MAX) return plan;
    for (int i = 0; i < kernel->definition.input_count && i < MTL_CUDA_PREFETCHED; i++) {
        const mtl_view *input = &launch->inputs[i];
        int64_t bytes = input->elements * mtl_dtype_size(input->dtype);
        bool in_turn = false;
        for (int o = 0; o < kernel->definition.output_count; o++)
            in_turn |= launch->outputs[o].elements == input->elements;
        in_turn &= input->low == 0 && input->high == bytes && bytes % count == 0;
        int64_t slice = in_turn ? bytes / count : 0;
        plan.bytes += slice;
        if (plan.bytes > most) return plan;
        plan.slice[i] = (uint32_t)slice;
        plan.address[i] = (uint64_t)(uintptr_t)input->data + (uint64_t)(plan.running * slice);
    }
    if (plan.bytes > 0) plan.threadgroups = (uint32_t)(count - plan.running);
    return plan;
}

/* Whether the blocks that the device has at a time go on to the other threadgroups, where each reads little: on an H200,
 * rows of 4096 by 1024 threads in bfloat16 79 us for 91, rows of 256 by 32 threads 72 us for 161; in float, which is twice
 * the bytes, 1024 threads have no gain. */
static bool repeats(const metalloid_kernel *kernel, const mtl_launch *launch, const uint32_t groups[3],
                    const prefetch *plan) {
    enum { MOST_BYTES = 8 }; /* of one of 1024 threads */
    uint32_t line = launch->threadgroup[0];
    return plan->threadgroups && mtl_cuda_repeats(&kernel->definition, &kernel->mentions, (int)line) &&
           groups[1] == 1 && groups[2] == 1 && (line < 1024 || plan->bytes <= MOST_BYTES * (int64_t)line);
}

/* What the launch takes from the host: everything but the buffers. */
static metalloid_status lay_out(const metalloid_kernel *kernel, const mtl_launch *launch, const mtl_cuda_layout *layout,
                                const uint32_t groups[3], uint32_t flags, const prefetch *plan, char *bytes) {
    int inputs = kernel->definition.input_count, shapes = 0, strides = 0;
    uint32_t head[11] = {0};
    memcpy(head, launch->grid, 12);
    memcpy(head + 3, launch->threadgroup, 12);
    memcpy(head + 6, groups, 12);
    head[9] = flags;
    head[10] = plan->threadgroups;
    memcpy(bytes, head, sizeof head);
    for (int i = 0; i < inputs; i++) {
        const mtl_view *view = &launch->inputs[i];
        if (view->rank == 0 && view->device.device_type == kDLCPU)
            memcpy(bytes + layout->scalars_at + 8 * i, view->data, (size_t)mtl_dtype_size(view->dtype));
        if (i < MTL_CUDA_PREFETCHED) {
            memcpy(bytes + layout->prefetched_at + 8 * i, &plan->address[i], 8);
            memcpy(bytes + layout->slices_at + 4 * i, &plan->slice[i], 4);
        }
        const int ints[] = {launch->ranks[i], shapes, strides};
        for (int k = 0; k < 3; k++) memcpy(bytes + layout->ints_at + 4 * (inputs * k + i), &ints[k], 4);
        size_t rank = (size_t)launch->ranks[i];
        MTL_REQUIRE(shapes + (int)rank <= MTL_CUDA_EXTENTS && strides + (int)rank <= MTL_CUDA_EXTENTS, op,
                    "kernel %s reads shapes of more than %d axes in all", kernel->definition.name,
                    (int)MTL_CUDA_EXTENTS);
        if (launch->shapes[i]) {
            memcpy(bytes + layout->shapes_at + 4 * shapes, launch->shapes[i], 4 * rank);
            shapes += (int)rank;
        }
        if (launch->strides[i]) {
            memcpy(bytes + layout->strides_at + 8 * strides, launch->strides[i], 8 * rank);
            strides += (int)rank;
        }
    }
    return METALLOID_OK;
}

static metalloid_status launch_metal(const mtl_cuda_call *call, const metalloid_kernel *kernel,
                                     const mtl_launch *launch, const mtl_variant *variant) {
    enum { MOST_BYTES = 4096 };
    mtl_cuda_layout layout = mtl_cuda_layout_of(&kernel->definition, &kernel->mentions);
    char bytes[MOST_BYTES] __attribute__((aligned(16)));
    memset(bytes, 0, (size_t)layout.size);
    uint32_t groups[3], flags = MTL_CUDA_WHOLE;
    for (int axis = 0; axis < 3; axis++) {
        groups[axis] = (launch->grid[axis] - 1) / launch->threadgroup[axis] + 1;
        if (launch->grid[axis] % launch->threadgroup[axis]) flags &= ~(uint32_t)MTL_CUDA_WHOLE;
    }
    uint32_t blocks[3] = {groups[0], groups[1], groups[2]};
    if (groups[1] > MOST_BLOCKS_YZ || groups[2] > MOST_BLOCKS_YZ) {
        uint64_t all = (uint64_t)groups[0] * groups[1];
        MTL_REQUIRE(all <= INT32_MAX && all * groups[2] <= INT32_MAX, op, "%s has too many threadgroups", "grid");
        blocks[0] = (uint32_t)(all * groups[2]);
        blocks[1] = blocks[2] = 1;
        flags |= MTL_CUDA_LINEAR;
    }
    /* A block cannot have so many threads along z: they come in a line, as those of a group at the grid's edge do. */
    uint32_t threads[3];
    memcpy(threads, launch->threadgroup, sizeof threads);
    if (threads[2] > MOST_THREADS_Z) {
        threads[0] *= threads[1] * threads[2];
        threads[1] = threads[2] = 1;
        flags &= ~(uint32_t)MTL_CUDA_WHOLE;
    }
    /* With the blocks for it, a thread does several positions. */
    int width = mtl_cuda_width(&kernel->definition, &kernel->mentions, &launch->types);
    int64_t positions = (int64_t)width * MTL_CUDA_WIDE_THREADS;
    if (width && launch->grid[0] >= call->device->multiprocessors * BLOCKS_FOR_WIDTH * positions &&
        launch->grid[0] <= INT32_MAX && launch->grid[1] <= MOST_BLOCKS_YZ && launch->grid[2] <= MOST_BLOCKS_YZ) {
        const uint32_t wide[3] = {(uint32_t)((launch->grid[0] - 1) / positions + 1), launch->grid[1], launch->grid[2]};
        memcpy(blocks, wide, sizeof blocks);
        memcpy(threads, (uint32_t[3]){MTL_CUDA_WIDE_THREADS, 1, 1}, sizeof threads);
        flags = MTL_CUDA_WIDE;
    }
    const prefetch plan = plan_prefetch(call, kernel, launch, groups, variant->running);
    if (repeats(kernel, launch, groups, &plan)) blocks[0] = (uint32_t)plan.running;
    MTL_TRY(lay_out(kernel, launch, &layout, groups, flags, &plan, bytes));
    void *pointers[2 * MTL_MOST_BUFFERS], *parameters[2 * MTL_MOST_BUFFERS + 1];
    int count = 0;
    for (int i = 0; i < kernel->definition.input_count; i++) {
        const mtl_view *view = &launch->inputs[i];
        pointers[count++] = view->rank == 0 && view->device.device_type == kDLCPU ? NULL : view->data;
    }
    for (int i = 0; i < kernel->definition.output_count; i++) pointers[count++] = launch->outputs[i].data;
    for (int i = 0; i < count; i++) parameters[i] = &pointers[i];
    parameters[count] = bytes;
    return mtl_cuda_launch_function(call, variant->function, blocks, threads, 0, parameters);
}

/* The scalars of a precompiled kernel, each as wide as the parameter that it is for; `parameters` are all of the call. Too few of them
 * would be read beyond their end. */
static metalloid_status place_scalars(const metalloid_kernel *kernel, const mtl_launch *launch, CUfunction function,
                                      uint64_t *values, void **parameters, int count) {
    int first = count - launch->scalar_count;
    for (int i = 0; i < count; i++) {
        int size = mtl_cuda_parameter_size(function, i);
        MTL_REQUIRE(size != 0, op, "kernel %s has %d parameters, and the call gives it %d: inputs, outputs, scalars",
                    kernel->definition.name, i, count);
        if (i < first) {
            MTL_REQUIRE(size == -1 || size == (int)sizeof(void *), op,
                        "parameter %d of kernel %s has %d bytes, and an array's pointer has %d", i,
                        kernel->definition.name, size, (int)sizeof(void *));
            continue;
        }
        const metalloid_kernel_scalar *scalar = &launch->scalars[i - first];
        uint64_t *value = &values[i - first];
        bool real = scalar->kind == METALLOID_SCALAR_FLOAT;
        if (size == -1) size = 4;
        MTL_REQUIRE(size == 8 || size == 4 || (!real && size < 4), op,
                    "parameter %d of kernel %s has %d bytes, and scalar %d is %s", i, kernel->definition.name, size,
                    i - first, real ? "a float" : "an integer");
        if (real) {
            float narrow = (float)scalar->real;
            *value = 0;
            memcpy(value, size == 8 ? (const void *)&scalar->real : (const void *)&narrow, (size_t)size);
        } else {
            int64_t beyond = size == 8 ? 0 : scalar->integer >> (8 * size - 1); /* -1, 0 or, without a sign, 1 */
            MTL_REQUIRE(beyond >= -1 && beyond <= 1, op,
                        "scalar %d is %lld, and parameter %d of kernel %s has %d bytes", i - first,
                        (long long)scalar->integer, i, kernel->definition.name, size);
            *value = (uint64_t)scalar->integer;
        }
        parameters[i] = value;
    }
    MTL_REQUIRE(mtl_cuda_parameter_size(function, count) <= 0, op,
                "kernel %s has more parameters than the %d that the call gives it: inputs, outputs, scalars",
                kernel->definition.name, count);
    return METALLOID_OK;
}

/* MLX's conventions: whole blocks, and of each input its pointer, then what of shape, strides and rank the source mentions. A
 * precompiled kernel gets pointers and scalars. */
static metalloid_status launch_whole_blocks(const mtl_cuda_call *call, const metalloid_kernel *kernel,
                                            const mtl_launch *launch, CUfunction function) {
    enum { MOST_PARAMETERS = (MTL_POINTERS_OF_INPUT + 1) * MTL_MOST_BUFFERS + MTL_MOST_SCALARS };
    struct {
        int32_t shape[MTL_CUDA_NDIM];
        int64_t strides[MTL_CUDA_NDIM];
        int32_t rank;
    } extents[MTL_MOST_BUFFERS];
    void *pointers[2 * MTL_MOST_BUFFERS], *parameters[MOST_PARAMETERS];
    CUdeviceptr scalars[MTL_MOST_BUFFERS] = {0};
    int count = 0, buffers = 0;
    uint32_t blocks[3];
    for (int axis = 0; axis < 3; axis++) blocks[axis] = (launch->grid[axis] - 1) / launch->threadgroup[axis] + 1;
    for (int axis = 1; axis < 3; axis++) {
        MTL_REQUIRE(blocks[axis] <= MOST_BLOCKS_YZ, op, "grid must have at most %d threadgroups along %c, got %u",
                    (int)MOST_BLOCKS_YZ, "xyz"[axis], blocks[axis]);
    }
    MTL_REQUIRE(launch->threadgroup[2] <= MOST_THREADS_Z, op,
                "threadgroup must have at most %d threads along z, got %u", (int)MOST_THREADS_Z,
                launch->threadgroup[2]);
    metalloid_status status = METALLOID_OK;
    for (int i = 0; i < kernel->definition.input_count && !status; i++) {
        const mtl_view *view = &launch->inputs[i];
        pointers[buffers] = view->data;
        if (view->rank == 0 &&
            view->device.device_type == kDLCPU) { /* such a kernel reads a scalar through a pointer */
            uint64_t bits = 0;
            size_t size = (size_t)mtl_dtype_size(view->dtype);
            memcpy(&bits, view->data, size);
            status = mtl_cuda_allocate(call, 8, &scalars[i]);
            if (!status) status = mtl_cuda_fill(call, scalars[i], 1, (int)size, bits);
            pointers[buffers] = (void *)scalars[i];
        }
        parameters[count++] = &pointers[buffers++];
        if (view->rank == 0) continue;
        unsigned char mentioned = kernel->mentions.input[i];
        if (mentioned && view->rank > MTL_CUDA_NDIM) {
            status = mtl_fail(METALLOID_INVALID_ARGUMENT, "%s: %s has %d axes, and kernel %s reads at most %d", op,
                              view->name, view->rank, kernel->definition.name, (int)MTL_CUDA_NDIM);
            break;
        }
        memset(&extents[i], 0, sizeof extents[i]);
        if (mentioned & MTL_MENTIONS_SHAPE) {
            memcpy(extents[i].shape, launch->shapes[i], 4 * (size_t)view->rank);
            parameters[count++] = extents[i].shape;
        }
        if (mentioned & MTL_MENTIONS_STRIDES) {
            memcpy(extents[i].strides, launch->strides[i], 8 * (size_t)view->rank);
            parameters[count++] = extents[i].strides;
        }
        extents[i].rank = view->rank;
        if (mentioned & MTL_MENTIONS_RANK) parameters[count++] = &extents[i].rank;
    }
    for (int i = 0; i < kernel->definition.output_count; i++) {
        pointers[buffers] = launch->outputs[i].data;
        parameters[count++] = &pointers[buffers++];
    }
    uint64_t values[MTL_MOST_SCALARS];
    if (!status && kernel->language == METALLOID_KERNEL_PRECOMPILED)
        status = place_scalars(kernel, launch, function, values, parameters, count + launch->scalar_count);
    if (!status) {
        status =
            mtl_cuda_launch_function(call, function, blocks, launch->threadgroup, kernel->shared_memory, parameters);
    }
    for (int i = 0; i < kernel->definition.input_count; i++) {
        if (scalars[i]) mtl_cuda_release(call, scalars[i]);
    }
    return status;
}

static metalloid_status run(const mtl_cuda_call *call, metalloid_kernel *kernel, const mtl_launch *launch,
                            const bool *strided, mtl_view *inputs, mtl_view *outputs) {
    const mtl_variant *variant = NULL;
    CUdeviceptr copies[2 * MTL_MOST_BUFFERS] = {0}; /* of inputs, then of outputs */
    char *own[MTL_MOST_BUFFERS];
    int input_count = kernel->definition.input_count, output_count = kernel->definition.output_count;
    int alignment = kernel->language == METALLOID_KERNEL_METAL ? kernel->mentions.vector_bytes : 0;
    MTL_REQUIRE(kernel->shared_memory <= call->device->shared_memory, op,
                "options.shared_memory must be at most %d on %s, got %d", call->device->shared_memory,
                call->device->name, kernel->shared_memory);
    metalloid_status status = get_function(call, kernel, launch, &variant);
    for (int i = 0; i < input_count && !status; i++) {
        status =
            strided[i] ? copy_to_rows(call, &inputs[i], &copies[i]) : align(call, &inputs[i], alignment, &copies[i]);
    }
    for (int i = 0; i < output_count; i++) own[i] = outputs[i].data;
    for (int i = 0; i < output_count && !status; i++) {
        if (launch->has_init_value) status = fill(call, &outputs[i], launch->init_value);
        if (!status) status = align(call, &outputs[i], alignment, &copies[input_count + i]);
    }
    if (!status) {
        status =
            kernel->language == METALLOID_KERNEL_METAL
                ? launch_metal(call, kernel, launch, variant)
                : launch_whole_blocks(call, kernel, launch, variant->function); // NOLINT: status says that it is set
    }
    for (int i = 0; i < output_count && !status; i++) {
        const mtl_view *view = &outputs[i];
        if (view->data != own[i])
            status = mtl_cuda_copy(call, (CUdeviceptr)(own[i] + view->low), (CUdeviceptr)(view->data + view->low),
                                   (size_t)(view->high - view->low));
    }
    for (int i = 0; i < input_count + output_count; i++) {
        if (copies[i]) mtl_cuda_release(call, copies[i]);
    }
    return status;
}

metalloid_status mtl_kernel_launch_cuda(const metalloid_context *context, metalloid_kernel *kernel,
                                        const mtl_launch *launch, const bool *strided, mtl_view *inputs,
                                        mtl_view *outputs) {
    mtl_cuda_call call;
    MTL_TRY(mtl_cuda_begin(&call, context, op, launch->outputs[0].device, false));
    return mtl_cuda_end(&call, run(&call, kernel, launch, strided, inputs, outputs));
}
