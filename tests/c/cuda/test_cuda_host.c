/* The host code of the CUDA backend, where there is no GPU: every operation on tensors at made-up addresses, which it
 * must not touch, over a driver that launches nothing, refuses what drivers refuse, and fails at any of its calls.
 * SPDX-License-Identifier: MIT */
#include "libcuda.h"

#include "cuda/kernels.h"
#include "every_operation.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* ---- tensors ----------------------------------------------------------------------------------------------------- */

enum { LONGEST_RANK = 9, MOST_TENSORS = 12 };

/* A tensor in a place of its own, of 2 TiB, in the middle of it, as strides may be negative. */
typedef struct made_up {
    DLTensor dl;
    int64_t shape[LONGEST_RANK], stride[LONGEST_RANK];
} made_up;

/* What a case is made of. */
typedef struct call {
    operation op;
    int count, device;
    bool neat; /* rows side by side and aligned, which the fast kernels want */
    bool small;
    element_type dtype; /* of most tensors */
    made_up tensor[MOST_TENSORS];
    bool is_output[MOST_TENSORS];
} call;

/* The next axis's step; empty tensors may have extents that no memory stands behind. */
static int64_t step_over(int64_t step, int64_t extent) {
    int64_t product;
    bool overflow = __builtin_mul_overflow(step, extent ? extent : 1, &product);
    return overflow || product > (int64_t)1 << 50 ? (int64_t)1 << 50 : product;
}

static void place(made_up *t, int number, int device, element_type type, int rank, const int64_t *shape) {
    uintptr_t at = ((uintptr_t)number + 1) << 41 | (uintptr_t)1 << 40;
    memcpy(t->shape, shape, (size_t)rank * sizeof *shape);
    for (int64_t axis = rank - 1, step = 1; axis >= 0; step = step_over(step, t->shape[axis]), axis--)
        t->stride[axis] = step;
    t->dl = (DLTensor){.data = (void *)at,
                       .device = {kDLCUDA, device},
                       .ndim = rank,
                       .dtype = dtype_code(type),
                       .shape = t->shape,
                       .strides = t->stride};
}

static void exchange(int64_t *a, int64_t *b) {
    int64_t before = *a;
    *a = *b;
    *b = before;
}

/* Axes in any order in memory, with gaps; what is read may also be broadcast or backwards, and begin at any element. */
static void disturb(made_up *t, element_type type, bool written) {
    int order[LONGEST_RANK], rank = t->dl.ndim;
    for (int i = 0; i < rank; i++) order[i] = i;
    if (one_in(2)) {
        for (int i = rank - 1; i > 0; i--) {
            int other = (int)random_int(0, i), before = order[i];
            order[i] = order[other], order[other] = before;
        }
    }
    static const int64_t gaps[] = {0, 0, 1, 3, 8};
    int64_t step = one_in(4) ? 2 : 1;
    for (int i = rank - 1; i >= 0; i--) {
        t->stride[order[i]] = step;
        step = step_over(step, t->shape[order[i]] + gaps[random_int(0, 4)]);
    }
    for (int axis = 0; axis < rank && !written; axis++) {
        if (one_in(5)) t->stride[axis] = 0;
        if (one_in(8)) t->stride[axis] = -t->stride[axis];
    }
    t->dl.byte_offset = (uint64_t)(random_int(0, 3) * dtype_size(type));
}

static DLTensor *add(call *c, element_type type, bool written, int rank, const int64_t *shape) {
    made_up *t = &c->tensor[c->count];
    c->is_output[c->count] = written;
    place(t, c->count++, c->device, type, rank, shape);
    if (!c->neat && one_in(2)) disturb(t, type, written);
    return &t->dl;
}

static element_type floating(const call *c) {
    return c->neat || !one_in(4) ? c->dtype : (element_type)random_int(F32, BF16);
}
static element_type of_mask(void) { return one_in(2) ? BOOL : random_integer(); }

#define READ(...)          add(c, floating(c), false, SHAPE(__VA_ARGS__))
#define READ_OF(type, ...) add(c, type, false, SHAPE(__VA_ARGS__))
#define WRITTEN_TO(...)    add(c, floating(c), true, SHAPE(__VA_ARGS__))

/* Extents about the limits of grids, of blocks and of 32 bits; `room` is what is left to their product. */
static int64_t extent(const call *c, int64_t *room) {
    static const int64_t usual[] = {1,  1,   2,   3,   4,   5,   7,   8,    16,   17,   32,   33,    64,   65,
                                    96, 100, 128, 129, 256, 300, 512, 1000, 1024, 4096, 8192, 16384, 32768},
                         large[] = {
                             65535,          65536,     65537,         70000, 1 << 20, (1 << 24) + 1, (int64_t)1 << 30,
                             INT32_MAX - 1L, INT32_MAX, INT32_MAX + 1L};
    int64_t chosen = one_in(40)               ? 0
                     : !c->small && one_in(8) ? large[random_int(0, 9)]
                                              : usual[random_int(0, c->small ? 19 : 26)];
    if (chosen > *room) chosen = random_int(1, 3);
    *room /= chosen ? chosen : 1;
    return chosen;
}

static int64_t room_of(const call *c) { return c->small ? 1 << 20 : (int64_t)1 << (one_in(10) ? 34 : 32); }

/* ---- calls of every operation, by random ------------------------------------------------------------------------- */

static int random_shape_of(const call *c, int64_t shape[LONGEST_RANK], int least) {
    static const int ranks[] = {0, 1, 1, 2, 2, 2, 3, 3, 4, 9};
    int64_t room = room_of(c);
    int rank = ranks[random_int(0, 9)];
    if (rank < least) rank = least;
    shape[rank ? rank - 1 : 0] = extent(c, &room);
    for (int axis = 0; axis < rank - 1; axis++) shape[axis] = rank > 5 ? random_int(1, 3) : extent(c, &room);
    return rank;
}

static void make_norm(call *c) {
    static const struct {
        const char *name;
        metalloid_status (*call)(const operation *);
        bool added, centred;
    } norms[] = {{"rms_norm", call_rms_norm, false, false},
                 {"layer_norm", call_layer_norm, false, true},
                 {"add_rms_norm", call_add_rms_norm, true, false},
                 {"add_layer_norm", call_add_layer_norm, true, true}};
    int which = (int)random_int(0, 3), given = 0;
    int64_t shape[LONGEST_RANK];
    int rank = random_shape_of(c, shape, 1);
    c->op = new_operation(norms[which].name, norms[which].call);
    DLTensor **to = c->op.given;
    to[given++] = add(c, floating(c), false, rank, shape);
    if (norms[which].added) to[given++] = add(c, floating(c), false, rank, shape);
    to[given++] = one_in(3) ? NULL : READ(shape[rank - 1]);
    if (norms[which].centred) to[given++] = one_in(3) ? NULL : READ(shape[rank - 1]);
    if (norms[which].added) to[given++] = add(c, floating(c), true, rank, shape);
    to[given] = add(c, floating(c), true, rank, shape);
}

static void make_gated(call *c) {
    int64_t shape[LONGEST_RANK];
    int rank = random_shape_of(c, shape, 0);
    c->op = one_in(2) ? new_operation("swiglu", call_swiglu) : new_operation("geglu", call_geglu);
    c->op.gelu = one_in(2) ? METALLOID_GELU_ERF : METALLOID_GELU_TANH;
    for (int i = 0; i < 3; i++) c->op.given[i] = add(c, floating(c), i == 2, rank, shape);
}

/* freqs, inv_freqs, offsets and position_ids from `first` on, and the rest of rope's options. */
static void add_rope_options(call *c, int first, int64_t batch, int64_t time, int64_t dims) {
    metalloid_rope_options *options = &c->op.rope;
    options->traditional = one_in(2);
    if (one_in(3)) {
        options->base = 0;
        c->op.given[first + (int)random_int(0, 1)] = READ_OF(one_in(3) ? random_integer() : F32, dims / 2);
    }
    switch (random_int(0, 3)) {
    case 0: c->op.given[first + 2] = READ_OF(random_integer(), batch); break;
    case 1: c->op.given[first + 3] = READ_OF(random_integer(), batch, time); break;
    case 2: options->offset = 100; break;
    default: break;
    }
}

static int64_t head_dimension(void) {
    static const int64_t dims[] = {2, 8, 64, 64, 80, 96, 128, 128, 192, 256, 512, 1024};
    return dims[random_int(0, 11)];
}

static void make_rope(call *c) {
    int64_t room = room_of(c), dim = head_dimension(), dims = one_in(3) ? dim / 2 / 2 * 2 : dim;
    if (dims == 0) dims = 2;
    bool second = one_in(2);
    int64_t b = extent(c, &room), t = extent(c, &room), h = extent(c, &room);
    c->op = new_operation("rope", call_rope);
    c->op.dims = dims;
    c->op.rope.time_axis = second ? METALLOID_TIME_AXIS_1 : METALLOID_TIME_SECOND_TO_LAST;
    int64_t shape[LONGEST_RANK] = {b, second ? t : h, second ? h : t, dim};
    int rank = 4;
    if (one_in(4)) { /* heads along several axes */
        rank = 9;
        shape[1] = t, shape[8] = dim;
        for (int axis = 2; axis < 8; axis++) shape[axis] = random_int(1, 2);
        if (!second) exchange(&shape[1], &shape[7]);
    }
    c->op.given[0] = add(c, floating(c), false, rank, shape);
    add_rope_options(c, 1, b, t, dims);
    bool in_place = one_in(4);
    c->is_output[0] = in_place;
    c->op.given[5] = in_place ? c->op.given[0] : add(c, floating(c), true, rank, shape);
}

static void make_qk_norm_rope(call *c) {
    int64_t room = room_of(c), dim = head_dimension();
    int64_t b = extent(c, &room), t = extent(c, &room), h = extent(c, &room), k = extent(c, &room);
    c->op = new_operation("qk_norm_rope", call_qk_norm_rope);
    c->op.dims = dim;
    bool second = one_in(2);
    c->op.rope.time_axis = second ? METALLOID_TIME_AXIS_1 : METALLOID_TIME_SECOND_TO_LAST;
    c->op.given[0] = READ(b, second ? t : h, second ? h : t, dim);
    c->op.given[1] = READ(b, second ? t : k, second ? k : t, dim);
    c->op.given[2] = one_in(3) ? NULL : READ(dim);
    c->op.given[3] = one_in(3) ? NULL : READ(dim);
    add_rope_options(c, 4, b, t, dim);
    c->op.given[8] = WRITTEN_TO(b, second ? t : h, second ? h : t, dim);
    c->op.given[9] = WRITTEN_TO(b, second ? t : k, second ? k : t, dim);
}

typedef struct heads {
    int64_t batch, kv, group, queries, keys, dim, value_dim;
} heads;

/* Few and many queries, keys, heads; head dimensions that each of the kernels has, and some that none has. */
static heads random_heads(const call *c) {
    static const int64_t pairs[][2] = {{64, 64},   {64, 64},   {80, 80},   {96, 96},  {128, 128}, {128, 128},
                                       {192, 128}, {256, 256}, {576, 512}, {72, 200}, {8, 256},   {512, 64},
                                       {300, 128}, {3, 5},     {1, 1},     {0, 16},   {64, 0},    {600, 64}};
    static const int64_t groups[] = {1, 1, 2, 4, 7, 8, 16, 128, 70000}, lengths[] = {1, 1, 1, 2, 4, 16, 33, 128, 4096};
    static const int64_t keys[] = {1, 2, 63, 64, 65, 1000, 1025, 8192, 40000, 131072, 400000, 1 << 20};
    const int64_t *pair = pairs[one_in(3) ? random_int(0, 7) : random_int(0, 17)];
    int64_t room = room_of(c);
    heads h = {.group = groups[random_int(0, c->small ? 6 : 8)], .dim = pair[0], .value_dim = pair[1]};
    h.queries = one_in(4) ? extent(c, &room) : lengths[random_int(0, 8)];
    h.keys = one_in(4) ? extent(c, &room) : keys[random_int(0, 11)];
    if (one_in(4)) h.queries = random_int(64, 320), h.keys = random_int(1, 1024), h.group = groups[random_int(0, 2)];
    room = room_of(c) / (h.group * (h.queries + 1));
    h.kv = one_in(2) ? random_int(1, 8) : extent(c, &room);
    h.batch = one_in(2) ? random_int(1, 8) : extent(c, &room);
    return h;
}

static void make_attention(call *c) {
    heads h = random_heads(c);
    int64_t q_heads = h.kv * h.group;
    c->op = new_operation("scaled_dot_product_attention", call_attention);
    DLTensor **to = c->op.given;
    to[0] = READ(h.batch, q_heads, h.queries, h.dim);
    to[1] = READ(h.batch, h.kv, h.keys, h.dim);
    to[2] = READ(h.batch, h.kv, h.keys, h.value_dim);
    bool plain = one_in(2); /* as most of a model's calls are */
    if (!plain && one_in(2)) {
        int64_t shape[] = {h.batch, q_heads, h.queries, h.keys};
        for (int axis = 0; axis < 4; axis++) shape[axis] = one_in(3) ? 1 : shape[axis];
        int rank = one_in(2) ? 4 : (int)random_int(0, 4);
        to[3] = add(c, one_in(2) ? BOOL : one_in(8) ? I32 : c->dtype, false, rank, shape + 4 - rank);
    }
    if (!plain && one_in(3)) to[4] = READ_OF(of_mask(), h.batch, h.keys);
    if (one_in(5)) to[5] = READ_OF(c->dtype, q_heads);
    if (one_in(3)) to[6] = add(c, F32, true, SHAPE(h.batch, q_heads, h.queries));
    to[7] = WRITTEN_TO(h.batch, q_heads, h.queries, h.value_dim);
    c->op.attention.causal = one_in(2);
    if (one_in(4)) c->op.attention.causal_offset = one_in(2) ? -1 : INT64_MAX;
    if (one_in(4)) c->op.attention.window = one_in(2) ? 1 : 1000;
    if (!plain && one_in(5)) c->op.attention.softcap = one_in(2) ? 30 : 1e30;
    if (!plain && one_in(8)) c->op.scale = -1;
}

static void make_kv_cache(call *c) {
    heads h = random_heads(c);
    c->op = new_operation("kv_cache_sdpa_update", call_kv_cache);
    if (h.queries > h.keys) h.queries = h.keys;
    c->op.offset = one_in(2) ? 0 : h.keys - h.queries;
    element_type key = c->neat ? c->dtype : floating(c), value = c->neat ? c->dtype : floating(c);
    DLTensor **to = c->op.given;
    to[0] = READ(h.batch, h.queries, h.kv * h.group, h.dim);
    to[1] = READ_OF(key, h.batch, h.queries, h.kv, h.dim);
    to[2] = READ_OF(value, h.batch, h.queries, h.kv, h.value_dim);
    to[3] = add(c, key, true, SHAPE(h.batch, h.keys, h.kv, h.dim));
    to[4] = add(c, value, true, SHAPE(h.batch, h.keys, h.kv, h.value_dim));
    to[5] = one_in(3) ? READ_OF(of_mask(), h.batch, h.keys) : NULL;
    to[6] = WRITTEN_TO(h.batch, h.kv * h.group, h.queries, h.value_dim);
}

static void make_cross_entropy(call *c) {
    int64_t shape[LONGEST_RANK];
    int rank = random_shape_of(c, shape, 1);
    c->op = new_operation("cross_entropy", call_cross_entropy);
    c->op.cross_entropy.has_ignore_index = one_in(2);
    c->op.given[0] = add(c, floating(c), false, rank, shape);
    c->op.given[1] = add(c, random_integer(), false, rank - 1, shape);
    c->op.given[2] = add(c, floating(c), true, rank - 1, shape);
}

static void make_gated_delta(call *c) {
    static const int64_t key_dims[] = {64, 64, 128, 128, 256, 96, 1, 0},
                         value_dims[] = {1, 64, 128, 128, 250, 65535, 70000, 1 << 21, 0}, groups[] = {1, 2, 4, 16};
    int64_t room = room_of(c), dim = key_dims[random_int(0, 7)], values = value_dims[random_int(0, c->small ? 4 : 8)];
    int64_t group = groups[random_int(0, 3)], t = one_in(3) ? 1 : extent(c, &room), b = extent(c, &room);
    room /= 16;
    int64_t k = extent(c, &room), h = k * group;
    c->op = new_operation("gated_delta_update", call_gated_delta);
    DLTensor **to = c->op.given;
    to[0] = READ(b, t, k, dim);
    to[1] = READ(b, t, k, dim);
    to[2] = READ(b, t, h, values);
    to[3] = one_in(3) ? READ_OF(F32, b, t, h, dim) : READ_OF(F32, b, t, h);
    to[4] = READ_OF(F32, b, t, h);
    to[5] = one_in(2) ? READ_OF(c->neat ? F32 : floating(c), b, h, values, dim) : NULL;
    to[6] = one_in(3) ? READ_OF(of_mask(), b, t) : NULL;
    to[7] = WRITTEN_TO(b, t, h, values);
    to[8] = add(c, F32, true, SHAPE(b, h, values, dim));
}

/* More of attention, which has most kernels to choose from. */
static void (*const makers[])(call *) = {make_norm,      make_gated,         make_rope,        make_qk_norm_rope,
                                         make_attention, make_attention,     make_attention,   make_attention,
                                         make_kv_cache,  make_cross_entropy, make_gated_delta, make_attention};
enum { MAKERS = sizeof makers / sizeof *makers };

static void make(call *c, int maker, int device, bool small) {
    *c = (call){.device = device, .neat = one_in(2), .small = small, .dtype = (element_type)random_int(F32, BF16)};
    makers[maker](c);
}

/* ---- what has to hold after each call ---------------------------------------------------------------------------- */

static int a_stream; /* its address is one's handle */

static metalloid_context *context_of_stream(void) {
    metalloid_context *context;
    expect_ok(metalloid_context_create(&context));
    expect_ok(metalloid_context_set_stream(context, &a_stream));
    return context;
}

static char situation[128];

static void expect_nothing_left(void) {
    libcuda_left left = libcuda_left_behind();
    if (libcuda_complaint()[0]) fail_msg("%s: %s", situation, libcuda_complaint());
    if (left.memory || left.contexts || left.capture)
        fail_msg("%s: leaves %d blocks, %d contexts, capture mode %d", situation, left.memory, left.contexts,
                 left.capture);
}

static bool has_elements(const DLTensor *t) {
    bool has = true;
    for (int axis = 0; axis < t->ndim; axis++) has = has && t->shape[axis];
    return has;
}

/* Whether anything is to be written. */
static bool has_work(const call *c) {
    bool has = false;
    if (c->op.call == call_kv_cache) /* of the cache, what is new */
        return has_elements(c->op.given[1]) || has_elements(c->op.given[2]) || has_elements(c->op.given[6]);
    for (int i = 0; i < c->count; i++) has = has || (c->is_output[i] && has_elements(&c->tensor[i].dl));
    return has;
}

static metalloid_status run(const call *c) {
    libcuda_begin(c->op.context ? &a_stream : NULL);
    metalloid_status status = c->op.call(&c->op);
    expect_nothing_left();
    if (status == METALLOID_OK && has_work(c) && libcuda_launches() == 0)
        fail_msg("%s: nothing is launched", situation);
    return status;
}

static void set_situation(int number, const call *c) {
    bool there = c->device >= 0 && c->device < LIBCUDA_DEVICES;
    snprintf(situation, sizeof situation, "call %d, %s on %s", number, c->op.name,
             there ? libcuda_devices[c->device].name : "no device");
    describe("%s", situation);
}

static bool begins(const char *text, const char *with) { return strncmp(text, with, strlen(with)) == 0; }

/* The message of a call whose driver failed. */
static void expect_drivers_words(const char *op, metalloid_status status) {
    const char *message = metalloid_last_error(), *words = "the NVIDIA driver says: ";
    assert_true(begins(message, op) && begins(message + strlen(op), ": "));
    assert_null(strchr(message, '\n'));
    assert_non_null(strstr(message, words));
    assert_string_equal(strstr(message, words) + strlen(words),
                        status == METALLOID_OUT_OF_MEMORY ? "out of memory" : "unspecified launch failure");
}

/* ---- tests ------------------------------------------------------------------------------------------------------- */

/* A call of the smallest kind. */
static void make_simple(call *c, int device) {
    *c = (call){.device = device, .neat = true, .dtype = F32};
    c->op = new_operation("swiglu", call_swiglu);
    for (int i = 0; i < 3; i++) c->op.given[i] = add(c, F32, i == 2, SHAPE(4, 64));
}

/* In a child, as drivers and compilers are opened once: the status and the message of a call. */
static const char *in_child(metalloid_status (*make_call)(int), int argument) {
    static char message[1024];
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        libcuda_begin(NULL);
        metalloid_status status = make_call(argument);
        int length = snprintf(message, sizeof message, "%d %s", (int)status, status ? metalloid_last_error() : "");
        _exit(write(ends[1], message, (size_t)length) != length);
    }
    close(ends[1]);
    ssize_t count = read(ends[0], message, sizeof message - 1);
    close(ends[0]);
    message[count > 0 ? count : 0] = '\0';
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    return message;
}

static metalloid_status call_with_devices(int count) {
    call c;
    make_simple(&c, 0);
    libcuda_have_devices(count);
    return c.op.call(&c.op);
}

static metalloid_status call_with_failing_driver(int count) {
    libcuda_fail_each(true);
    return call_with_devices(count);
}

static void a_driver_that_does_not_open_says_why(void **state) {
    (void)state;
    assert_string_equal(in_child(call_with_devices, LIBCUDA_DEVICES), "0 ");
#define CLOSED "3 swiglu: the tensors are on a CUDA device, but the NVIDIA driver says: "
    assert_string_equal(in_child(call_with_failing_driver, 1), CLOSED "unspecified launch failure");
    assert_string_equal(in_child(call_with_devices, -1), CLOSED "no CUDA-capable device is detected");
    assert_string_equal(in_child(call_with_devices, 0), CLOSED "it has no device");
}

/* Before any other test has loaded a kernel. */
static void *run_in_thread(void *argument) {
    call *c = argument;
    libcuda_begin(NULL);
    for (int i = 0; i < 20; i++) {
        if (c->op.call(&c->op) != METALLOID_OK) return "failed";
    }
    libcuda_left left = libcuda_left_behind();
    return libcuda_complaint()[0] || left.contexts || left.capture ? "left something" : NULL;
}

static void threads_load_kernels_at_once(void **state) {
    (void)state;
    enum { THREADS = 8 };
    static call calls[THREADS];
    pthread_t thread[THREADS];
    seed(11);
    for (int i = 0; i < THREADS; i++) {
        metalloid_status status = METALLOID_INVALID_ARGUMENT;
        for (int attempt = 0; attempt < 100 && status != METALLOID_OK; attempt++) {
            make(&calls[i], i % MAKERS, i % 2 ? LIBCUDA_H100 : LIBCUDA_A100, true);
            status = run(&calls[i]);
        }
        expect_ok(status);
        calls[i].device = i % 2 ? LIBCUDA_SLICE : LIBCUDA_ORIN; /* where nothing is loaded */
        for (int j = 0; j < calls[i].count; j++) calls[i].tensor[j].dl.device.device_id = calls[i].device;
    }
    for (int i = 0; i < THREADS; i++) assert_int_equal(pthread_create(&thread[i], NULL, run_in_thread, &calls[i]), 0);
    for (int i = 0; i < THREADS; i++) {
        void *wrong;
        pthread_join(thread[i], &wrong);
        if (wrong) fail_msg("%s: %s %s", calls[i].op.name, (char *)wrong, libcuda_complaint());
    }
    assert_int_equal(libcuda_left_behind().memory, 0);
}

static void devices_that_do_not_serve_are_refused(void **state) {
    (void)state;
    call c;
    make_simple(&c, LIBCUDA_T4);
    assert_int_equal(run(&c), METALLOID_UNSUPPORTED);
    assert_string_equal(metalloid_last_error(), "swiglu: CUDA kernels need compute capability 8.0, T4 has 7.5");
    const int none[] = {LIBCUDA_DEVICES, 1000, -1, INT32_MIN};
    for (int i = 0; i < 4; i++) {
        make_simple(&c, none[i]);
        assert_int_equal(run(&c), METALLOID_INVALID_ARGUMENT);
        assert_true(begins(metalloid_last_error(), "swiglu: the tensors are on CUDA device "));
    }
    make_simple(&c, LIBCUDA_A100);
    for (int i = 0; i < 3; i++) c.tensor[i].dl.dtype = dtype_code(F64);
    assert_int_equal(run(&c), METALLOID_INVALID_ARGUMENT);
    assert_true(begins(metalloid_last_error(), "swiglu: float64 is for tensors on the CPU"));
    make_simple(&c, LIBCUDA_A100);
    c.tensor[1].dl.device.device_id = LIBCUDA_H100;
    assert_int_equal(run(&c), METALLOID_INVALID_ARGUMENT);
    assert_true(begins(metalloid_last_error(), "swiglu: up must be on the device of gate"));
}

static void every_operation_suits_the_driver(void **state) {
    (void)state;
    enum { WHOLE = 800000 }; /* calls among which every kernel of the library is */
    int launching = 0, refused = 0, count = scaled(WHOLE);
    metalloid_context *context = context_of_stream();
    seed(12);
    for (int i = 0; i < count; i++) {
        call c;
        make(&c, i % MAKERS, (int)random_int(0, LIBCUDA_SERVED - 1), false);
        c.op.context = one_in(2) ? context : NULL;
        libcuda_make_current(one_in(2) ? -1 : (int)random_int(0, LIBCUDA_SERVED - 1));
        set_situation(i, &c);
        metalloid_status status = run(&c);
        if (status == METALLOID_INVALID_ARGUMENT || status == METALLOID_OUT_OF_MEMORY) { /* too large, or overlaps */
            assert_int_equal(libcuda_launches(), 0);
            refused++;
        } else {
            expect_ok(status);
            launching += libcuda_launches() > 0;
        }
    }
    libcuda_make_current(-1);
    metalloid_context_destroy(context);
    char idle[128] = "";
    int idle_kernels = libcuda_idle_kernels(idle, sizeof idle);
    report("calls that launch", launching);
    report("refused", refused);
    assert_true(launching > count / 2);
    if (count >= WHOLE && idle_kernels) fail_msg("%d kernels are never launched, such as %s", idle_kernels, idle);
}

static void every_driver_call_may_fail(void **state) {
    (void)state;
    int failures = 0, tolerated = 0, count = scaled(5000);
    metalloid_context *context = context_of_stream();
    seed(13);
    for (int i = 0; i < count; i++) {
        call c;
        make(&c, i % MAKERS, (int)random_int(0, LIBCUDA_SERVED - 1), true);
        c.op.context = one_in(2) ? context : NULL;
        set_situation(i, &c);
        libcuda_fail_each(true);
        for (;;) {
            metalloid_status status = run(&c);
            const char *failed = libcuda_failed();
            if (!failed) {
                assert_true(status == METALLOID_OK || status == METALLOID_INVALID_ARGUMENT);
                break;
            }
            failures++;
            /* What can do without: smaller clusters, kernels that need no description or copy of a mask. */
            bool allocation = strcmp(failed, "cuMemAllocAsync") == 0,
                 masked = c.op.call == call_attention && c.op.given[3];
            if (status == METALLOID_OK && (strcmp(failed, "cuTensorMapEncodeTiled") == 0 ||
                                           begins(failed, "cuOccupancy") || (allocation && masked))) {
                tolerated++;
                continue;
            }
            assert_int_equal(status, allocation ? METALLOID_OUT_OF_MEMORY : METALLOID_DEVICE_FAILURE);
            if (allocation && !masked) assert_int_equal(libcuda_launches(), 0); /* nothing is written */
            expect_drivers_words(c.op.name, status);
        }
        libcuda_fail_each(false);
    }
    metalloid_context_destroy(context);
    report("failures", failures);
    report("of them tolerated", tolerated);
    assert_true(failures > 2 * count && tolerated > 0);
}

static void devices_have_words(void **state) {
    (void)state;
    char words[128];
    const char *why;
    assert_int_equal(mtl_cuda_device_count(&why), LIBCUDA_DEVICES);
    mtl_cuda_device_in_words(LIBCUDA_RTX_4090, words, sizeof words);
    assert_string_equal(words, "RTX 4090, compute capability 8.9");
    libcuda_fail_each(true);
    mtl_cuda_device_in_words(LIBCUDA_RTX_4090, words, sizeof words);
    libcuda_fail_each(false);
    assert_string_equal(words, "device 3, which does not answer");
}

/* ---- custom kernels ---------------------------------------------------------------------------------------------- */

static const char *const input_names[] = {"a", "b", "c"}, *const output_names[] = {"o", "p", "r"};

static metalloid_kernel *new_kernel(metalloid_kernel_language language, const char *name, const char *source,
                                    int inputs, int outputs, int shared_memory) {
    metalloid_kernel_options options = METALLOID_KERNEL_OPTIONS_INIT;
    metalloid_kernel *kernel;
    options.language = language;
    options.shared_memory = shared_memory;
    expect_ok(metalloid_kernel_create(name, input_names, inputs, output_names, outputs, source, &options, &kernel));
    return kernel;
}

static metalloid_kernel_call new_kernel_call(const DLTensor *const *inputs, int input_count, DLTensor *const *outputs,
                                             int output_count) {
    metalloid_kernel_call made = METALLOID_KERNEL_CALL_INIT;
    made.inputs = inputs, made.input_count = input_count;
    made.outputs = outputs, made.output_count = output_count;
    return made;
}

static metalloid_status launch(metalloid_kernel *kernel, const metalloid_kernel_call *made) {
    libcuda_begin(NULL);
    metalloid_status status = metalloid_kernel_launch(NULL, kernel, made);
    expect_nothing_left();
    return status;
}

/* Every call of the driver that the launch makes fails once. */
static void expect_failures(metalloid_kernel *kernel, const metalloid_kernel_call *made, int least) {
    int failures = 0;
    libcuda_fail_each(true);
    for (;; failures++) {
        metalloid_status status = launch(kernel, made);
        const char *failed = libcuda_failed();
        if (!failed) {
            expect_ok(status);
            break;
        }
        if (status == METALLOID_OK && begins(failed, "cuOccupancy")) continue; /* it does without */
        bool allocation = strcmp(failed, "cuMemAllocAsync") == 0;
        assert_int_equal(status, allocation ? METALLOID_OUT_OF_MEMORY : METALLOID_DEVICE_FAILURE);
        expect_drivers_words("metal_kernel", status);
    }
    libcuda_fail_each(false);
    assert_true(failures >= least);
}

static metalloid_status launch_one(int language) {
    call c = {.neat = true};
    DLTensor *output = add(&c, F32, true, SHAPE(64));
    metalloid_kernel_call made = new_kernel_call(NULL, 0, &output, 1);
    metalloid_kernel *kernel = new_kernel((metalloid_kernel_language)language, "one", "o[0] = 1;", 0, 1, 0);
    metalloid_status status = launch(kernel, &made);
    metalloid_kernel_destroy(kernel);
    return status;
}

static metalloid_status launch_without_compiler(int language) {
    setenv("METALLOID_NVRTC", "/nowhere/libnvrtc.so", 1);
    return launch_one(language);
}

static void kernels_without_a_compiler_say_so(void **state) {
    (void)state;
    snprintf(situation, sizeof situation, "a kernel");
    for (int language = METALLOID_KERNEL_METAL; language <= METALLOID_KERNEL_CUDA; language++) {
        assert_string_equal(in_child(launch_one, language), "0 ");
        assert_true(begins(in_child(launch_without_compiler, language),
                           "5 metal_kernel: kernel one has to be compiled, but METALLOID_NVRTC=/nowhere/libnvrtc.so "
                           "cannot be opened: "));
    }
    call c = {.neat = true};
    DLTensor *output = add(&c, F32, true, SHAPE(64));
    metalloid_kernel_call made = new_kernel_call(NULL, 0, &output, 1);
    metalloid_kernel *kernel = new_kernel(METALLOID_KERNEL_METAL, "wrong", "does_not_compile", 0, 1, 0);
    assert_int_equal(launch(kernel, &made), METALLOID_COMPILE_FAILED);
    assert_string_equal(metalloid_last_error(), "metal_kernel: kernel wrong does not compile\nunit.cu(1): error");
    metalloid_kernel_destroy(kernel);
}

static void grids_of_kernels_suit_the_driver(void **state) {
    (void)state;
    static const struct {
        int64_t grid[3], threadgroup[3];
        metalloid_status metal, cuda; /* CUDA C++ has the device's own limits */
    } cases[] = {
        {{1, 1, 1}, {1024, 1, 1}, METALLOID_OK, METALLOID_OK},
        {{2000000, 1, 1}, {256, 1, 1}, METALLOID_OK, METALLOID_OK},
        {{INT32_MAX, 1, 1}, {1, 1, 1}, METALLOID_OK, METALLOID_OK},
        {{INT32_MAX, 1, 1}, {1024, 1, 1}, METALLOID_OK, METALLOID_OK},
        {{1, 1, 256}, {1, 1, 64}, METALLOID_OK, METALLOID_OK},
        {{1, 1, 256}, {1, 1, 65}, METALLOID_OK, METALLOID_INVALID_ARGUMENT},
        {{2, 70, 90}, {1, 2, 65}, METALLOID_OK, METALLOID_INVALID_ARGUMENT},
        {{1, 1, 5000}, {1, 1, 1024}, METALLOID_OK, METALLOID_INVALID_ARGUMENT},
        {{1, 65535, 1}, {1, 1, 1}, METALLOID_OK, METALLOID_OK},
        {{3, 65536, 1}, {1, 1, 1}, METALLOID_OK, METALLOID_INVALID_ARGUMENT},
        {{2, 2, 70000}, {2, 2, 1}, METALLOID_OK, METALLOID_INVALID_ARGUMENT},
        {{1000000, 1, 65}, {1, 1, 65}, METALLOID_OK, METALLOID_INVALID_ARGUMENT},
        {{INT32_MAX, 70000, 1}, {1024, 1, 1}, METALLOID_INVALID_ARGUMENT, METALLOID_INVALID_ARGUMENT},
        {{INT32_MAX, INT32_MAX, INT32_MAX}, {1, 1, 1}, METALLOID_INVALID_ARGUMENT, METALLOID_INVALID_ARGUMENT}};
    static const char *const sources[] = {"o[thread_position_in_grid.x] = 1;",
                                          "uint3 p = thread_position_in_grid; o[p.z] = thread_index_in_threadgroup;"};
    for (int device = 0; device < LIBCUDA_SERVED; device++) {
        call c = {.device = device, .neat = true};
        DLTensor *output = add(&c, F32, true, SHAPE(64));
        metalloid_kernel *metal[2], *cuda = new_kernel(METALLOID_KERNEL_CUDA, "k", "o[threadIdx.z] = 1;", 0, 1, 0);
        for (int i = 0; i < 2; i++) metal[i] = new_kernel(METALLOID_KERNEL_METAL, "k", sources[i], 0, 1, 0);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            metalloid_kernel_call made = new_kernel_call(NULL, 0, &output, 1);
            memcpy(made.grid, cases[i].grid, sizeof made.grid);
            memcpy(made.threadgroup, cases[i].threadgroup, sizeof made.threadgroup);
            snprintf(situation, sizeof situation, "grid %d on %s", (int)i, libcuda_devices[device].name);
            for (int j = 0; j < 2; j++) assert_int_equal(launch(metal[j], &made), cases[i].metal);
            assert_int_equal(launch(cuda, &made), cases[i].cuda);
        }
        for (int i = 0; i < 2; i++) metalloid_kernel_destroy(metal[i]);
        metalloid_kernel_destroy(cuda);
    }
}

/* Copies of what is strided or not aligned, scalars of the host, first values: what a launch allocates and fills. */
static void every_driver_call_of_a_kernel_may_fail(void **state) {
    (void)state;
    static const element_type types[] = {U8, F16, F32, F64, F64};
    for (int i = 0; i < 5; i++) {
        call c = {.device = i % 2 ? LIBCUDA_A100 : LIBCUDA_RTX_5090, .neat = true};
        element_type type = types[i];
        double host = 3;
        DLTensor *vectors = add(&c, F32, false, SHAPE(16)), *strided = add(&c, type, false, SHAPE(3, 4)),
                 *output = add(&c, F32, true, SHAPE(16)), *other = add(&c, type, true, SHAPE(5)),
                 *empty = add(&c, F32, true, SHAPE(0));
        DLTensor scalar = {.data = &host, .device = {kDLCPU, 0}, .dtype = dtype_code(F64)};
        vectors->byte_offset = 4, output->byte_offset = 8;
        strided->strides[0] = 1, strided->strides[1] = 3;
        const DLTensor *inputs[] = {vectors, strided, &scalar};
        DLTensor *outputs[] = {output, other, empty};
        metalloid_kernel_call made = new_kernel_call(inputs, 3, outputs, 3);
        made.has_init_value = true;
        made.init_value = i == 3 ? 0.1 : 0; /* in float64 words that differ, or do not */
        snprintf(situation, sizeof situation, "a kernel with %s", dtype_name(type));
        char source[256];
        snprintf(source, sizeof source,
                 "((device float4 *)o)[0] = ((device const float4 *)a)[0]; p[0] = b[0]; if (c > %d) r[0] = 0;", i);
        metalloid_kernel *metal = new_kernel(METALLOID_KERNEL_METAL, "k", source, 3, 3, 0),
                         *cuda = new_kernel(METALLOID_KERNEL_CUDA, "k", source, 3, 3, 40 << 10);
        expect_failures(metal, &made, 10);
        expect_failures(cuda, &made, 8);
        int modules = libcuda_modules();
        for (int again = 0; again < 3; again++) { /* of the same source: what is loaded serves */
            metalloid_kernel_destroy(metal);
            metal = new_kernel(METALLOID_KERNEL_METAL, "k", source, 3, 3, 0);
            expect_ok(launch(metal, &made));
        }
        assert_int_equal(libcuda_modules(), modules);
        metalloid_kernel_destroy(metal);
        metalloid_kernel_destroy(cuda);
    }
}

/* Shapes and strides travel with the launch, in places of which there are so many. */
static void kernels_read_shapes_of_some_axes(void **state) {
    (void)state;
    static const int64_t ones[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    snprintf(situation, sizeof situation, "a kernel that reads shapes");
    for (int rank = 1; rank <= 16; rank++) {
        int64_t shape[3][16], stride[3][16];
        DLTensor input[3], *output;
        const DLTensor *inputs[3];
        call c = {.device = LIBCUDA_H100, .neat = true};
        output = add(&c, F32, true, SHAPE(16));
        for (int i = 0; i < 3; i++) {
            memcpy(shape[i], ones, sizeof ones);
            memcpy(stride[i], ones, sizeof ones);
            input[i] = *output;
            input[i].data = (char *)output->data + 4096 * (i + 1);
            input[i].ndim = rank, input[i].shape = shape[i], input[i].strides = stride[i];
            inputs[i] = &input[i];
        }
        metalloid_kernel_call made = new_kernel_call(inputs, 3, &output, 1);
        const char *source = "o[0] = a_shape[0] + a_strides[0] + a_ndim + b_shape[0] + b_strides[0] + c_shape[0];";
        for (int language = METALLOID_KERNEL_METAL; language <= METALLOID_KERNEL_CUDA; language++) {
            metalloid_kernel *kernel = new_kernel((metalloid_kernel_language)language, "k", source, 3, 1, 0);
            metalloid_status status = launch(kernel, &made);
            if (status == METALLOID_INVALID_ARGUMENT) {
                assert_true(rank > 8);
                assert_non_null(strstr(metalloid_last_error(), " axes"));
            } else {
                expect_ok(status);
            }
            metalloid_kernel_destroy(kernel);
        }
    }
}

static void expect_kernel(const char *name, const char *image, int shared_memory, int scalars, metalloid_status status,
                          const char *words) {
    static const metalloid_kernel_scalar values[] = {{METALLOID_SCALAR_INT, -1, 0}, {METALLOID_SCALAR_FLOAT, 0, 0.1}};
    call c = {.device = LIBCUDA_A100, .neat = true};
    const DLTensor *input = add(&c, F32, false, SHAPE(16));
    DLTensor *output = add(&c, F32, true, SHAPE(16));
    metalloid_kernel_call made = new_kernel_call(&input, 1, &output, 1);
    made.scalars = values, made.scalar_count = scalars;
    metalloid_kernel *kernel = new_kernel(METALLOID_KERNEL_PRECOMPILED, name, image, 1, 1, shared_memory);
    int modules = libcuda_modules();
    snprintf(situation, sizeof situation, "kernel %s of %s", name, image);
    if (status == METALLOID_OK) {
        expect_failures(kernel, &made, 4);
    } else {
        assert_int_equal(launch(kernel, &made), status);
        if (!strstr(metalloid_last_error(), words)) fail_msg("%s: %s", situation, metalloid_last_error());
        assert_int_equal(libcuda_launches(), 0);
        if (status == METALLOID_DEVICE_FAILURE) assert_int_equal(libcuda_modules(), modules);
    }
    metalloid_kernel_destroy(kernel);
}

static void precompiled_kernels(void **state) {
    (void)state;
    const metalloid_status bad = METALLOID_INVALID_ARGUMENT, failure = METALLOID_DEVICE_FAILURE;
    expect_kernel("k", "k(8 8)", 0, 0, METALLOID_OK, NULL);
    expect_kernel("k", "k(8 8 1 4)", 0, 2, METALLOID_OK, NULL);
    expect_kernel("k", "k(8 8 8 8)", 100 << 10, 2, METALLOID_OK, NULL);
    expect_kernel("unknown", "unknown(*)", 0, 0, bad, "kernel unknown has 0 parameters");
    expect_kernel("k", "k(8 8 4)", 0, 0, bad, "kernel k has more parameters than the 2");
    expect_kernel("k", "k(8 8 4)", 0, 2, bad, "kernel k has 3 parameters");
    expect_kernel("k", "k(8 4)", 0, 0, bad, "parameter 1 of kernel k has 4 bytes");
    expect_kernel("k", "k(8 8 4 2)", 0, 2, bad, "parameter 3 of kernel k has 2 bytes");
    expect_kernel("k", "k(8 8 16)", 0, 1, bad, "parameter 2 of kernel k has 16 bytes");
    expect_kernel("k", "k(8 8) ", 200 << 10, 0, bad, "options.shared_memory must be at most 166912 on A100");
    expect_kernel("k", "", 0, 0, failure, "k: the NVIDIA driver says: device kernel image is invalid");
    expect_kernel("other", "k(8 8)", 0, 0, failure, "other: the NVIDIA driver says: named symbol not found");
    /* Together more than every kernel has, each less. */
    expect_kernel(LIBCUDA_OWN_MEMORY, LIBCUDA_OWN_MEMORY "(8 8)", 40 << 10, 0, METALLOID_OK, NULL);
}

static int reset(void **state) {
    (void)state;
    libcuda_fail_each(false);
    libcuda_make_current(-1);
    return 0;
}

int main(void) {
    setenv("METALLOID_NVRTC", MTL_NVRTC, 1);
    setenv("METALLOID_CACHE", "none", 1); /* what this compiler makes must serve nobody else */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(a_driver_that_does_not_open_says_why, reset),
        cmocka_unit_test_teardown(threads_load_kernels_at_once, reset),
        cmocka_unit_test_teardown(devices_that_do_not_serve_are_refused, reset),
        cmocka_unit_test_teardown(every_operation_suits_the_driver, reset),
        cmocka_unit_test_teardown(every_driver_call_may_fail, reset),
        cmocka_unit_test_teardown(devices_have_words, reset),
        cmocka_unit_test_teardown(kernels_without_a_compiler_say_so, reset),
        cmocka_unit_test_teardown(grids_of_kernels_suit_the_driver, reset),
        cmocka_unit_test_teardown(every_driver_call_of_a_kernel_may_fail, reset),
        cmocka_unit_test_teardown(kernels_read_shapes_of_some_axes, reset),
        cmocka_unit_test_teardown(precompiled_kernels, reset),
    };
    return cmocka_run_group_tests_name("cuda_host", tests, NULL, NULL);
}
