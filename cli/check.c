/* metalloid check: each optimized kernel against the plain C one, on this machine. SPDX-License-Identifier: MIT
 *
 * Every operation is called through the public interface on random input, in every dtype and in contiguous and strided layouts:
 * once by each instruction set of this machine, and once by the plain kernels in float64 on the same, already rounded values.
 * The difference must keep the accuracy that the documentation promises. */
#include "cli.h"
#include "core/context.h"
#include "core/tensor.h"
#include "cpu/kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MAX_TENSORS = 10, MAX_AXES = 4 };

/* ---- random numbers (xorshift64*, Vigna 2016) ------------------------------------------------------------------------ */

static uint64_t seed_state = 1;

static uint64_t random_bits(void) {
    seed_state ^= seed_state >> 12;
    seed_state ^= seed_state << 25;
    seed_state ^= seed_state >> 27;
    return seed_state * 0x2545f4914f6cdd1d;
}

static double random_uniform(void) { return (double)(random_bits() >> 11) * 0x1p-53; }
static double random_normal(void) {
    return sqrt(-2 * log(1 - random_uniform())) * cos(6.283185307179586 * random_uniform());
}
static int64_t random_between(int64_t least, int64_t most) {
    return least + (int64_t)(random_bits() % (uint64_t)(most - least + 1));
}

/* ---- cases ------------------------------------------------------------------------------------------------------------ */

/* What stands in a tensor, and how its error is measured if it is an output. */
typedef enum {
    VALUES,           /* normal, of the dtype under test */
    KEYS,             /* normal, of length near 1 along the last axis */
    DECAYS,           /* uniform in (0.8, 1), of the dtype under test */
    POSITIONS,        /* int32 */
    CLASSES,          /* int64 in [0, modulus) */
    FLAGS,            /* bool, one in eight false */
    OUTPUT,           /* of the dtype under test, error relative to the largest value of the row */
    OUTPUT_OF_TENSOR, /* the same, relative to the largest of the tensor, and of float32 (or float64) as gated_delta's state */
    LOSS,             /* float32 (or float64) output, relative to the row */
} content;

typedef struct {
    DLTensor dl;
    int64_t shape[MAX_AXES], strides[MAX_AXES];
    content content;
    int64_t modulus;
    size_t bytes;
} tensor;

typedef struct {
    tensor tensors[MAX_TENSORS];
    int count;
    bool contiguous, large;
    int64_t dims;
    double scale;
    metalloid_rope_options rope;
    metalloid_attention_options attention;
} test_case;

static DLTensor *at(test_case *c, int i) { return &c->tensors[i].dl; }

static void add(test_case *c, content kind, int64_t modulus, int rank, const int64_t *shape) {
    tensor *t = &c->tensors[c->count++];
    *t = (tensor){.content = kind, .modulus = modulus};
    memcpy(t->shape, shape, (size_t)rank * sizeof *shape);
    t->dl.ndim = rank;
}

#define ADD(c, content, modulus, ...) \
    add(c, content, modulus, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (const int64_t[]){__VA_ARGS__})

static void make_rms_norm(test_case *c) {
    int64_t rows = c->large ? 512 : random_between(1, 9), length = c->large ? 4096 : random_between(1, 700);
    ADD(c, VALUES, 0, rows, length);
    ADD(c, VALUES, 0, length);
    ADD(c, OUTPUT, 0, rows, length);
}
static metalloid_status call_rms_norm(metalloid_context *context, test_case *c) {
    return metalloid_rms_norm(context, at(c, 0), at(c, 1), 1e-5, at(c, 2));
}

static void make_layer_norm(test_case *c) {
    int64_t rows = c->large ? 512 : random_between(1, 9), length = c->large ? 4096 : random_between(2, 700);
    ADD(c, VALUES, 0, rows, length);
    ADD(c, VALUES, 0, length);
    ADD(c, VALUES, 0, length);
    ADD(c, OUTPUT, 0, rows, length);
}
static metalloid_status call_layer_norm(metalloid_context *context, test_case *c) {
    return metalloid_layer_norm(context, at(c, 0), at(c, 1), at(c, 2), 1e-5, at(c, 3));
}

static void make_add_rms_norm(test_case *c) {
    int64_t rows = c->large ? 512 : random_between(1, 9), length = c->large ? 4096 : random_between(1, 700);
    ADD(c, VALUES, 0, rows, length);
    ADD(c, VALUES, 0, rows, length);
    ADD(c, VALUES, 0, length);
    ADD(c, OUTPUT, 0, rows, length);
    ADD(c, OUTPUT, 0, rows, length);
}
static metalloid_status call_add_rms_norm(metalloid_context *context, test_case *c) {
    return metalloid_add_rms_norm(context, at(c, 0), at(c, 1), at(c, 2), 1e-5, at(c, 3), at(c, 4));
}

static void make_add_layer_norm(test_case *c) {
    int64_t rows = c->large ? 512 : random_between(1, 9), length = c->large ? 4096 : random_between(2, 700);
    ADD(c, VALUES, 0, rows, length);
    ADD(c, VALUES, 0, rows, length);
    ADD(c, VALUES, 0, length);
    ADD(c, VALUES, 0, length);
    ADD(c, OUTPUT, 0, rows, length);
    ADD(c, OUTPUT, 0, rows, length);
}
static metalloid_status call_add_layer_norm(metalloid_context *context, test_case *c) {
    return metalloid_add_layer_norm(context, at(c, 0), at(c, 1), at(c, 2), at(c, 3), 1e-5, at(c, 4), at(c, 5));
}

static void make_gated(test_case *c) {
    int64_t rows = c->large ? 512 : random_between(1, 9), length = c->large ? 4096 : random_between(1, 700);
    ADD(c, VALUES, 0, rows, length);
    ADD(c, VALUES, 0, rows, length);
    ADD(c, OUTPUT, 0, rows, length);
}
static metalloid_status call_swiglu(metalloid_context *context, test_case *c) {
    return metalloid_swiglu(context, at(c, 0), at(c, 1), at(c, 2));
}
static metalloid_status call_geglu_erf(metalloid_context *context, test_case *c) {
    return metalloid_geglu(context, at(c, 0), at(c, 1), METALLOID_GELU_ERF, at(c, 2));
}
static metalloid_status call_geglu_tanh(metalloid_context *context, test_case *c) {
    return metalloid_geglu(context, at(c, 0), at(c, 1), METALLOID_GELU_TANH, at(c, 2));
}

static void make_rope(test_case *c) {
    int64_t batch = c->large ? 1 : random_between(1, 3), heads = c->large ? 32 : random_between(1, 4);
    int64_t time = c->large ? 512 : random_between(1, 20), half = c->large ? 64 : random_between(1, 70);
    c->rope = (metalloid_rope_options)METALLOID_ROPE_OPTIONS_INIT;
    c->rope.traditional = random_bits() & 1;
    c->dims = 2 * half;
    ADD(c, VALUES, 0, batch, heads, time, 2 * half + (c->large ? 0 : random_between(0, 5)));
    ADD(c, POSITIONS, 1000000, batch, time);
    ADD(c, OUTPUT, 0, batch, heads, time, c->tensors[0].shape[3]);
}
static metalloid_status call_rope(metalloid_context *context, test_case *c) {
    c->rope.position_ids = at(c, 1);
    return metalloid_rope(context, at(c, 0), c->dims, &c->rope, at(c, 2));
}

static void make_qk_norm_rope(test_case *c) {
    int64_t batch = c->large ? 1 : random_between(1, 3), heads = c->large ? 32 : random_between(1, 4);
    int64_t time = c->large ? 512 : random_between(1, 20), half = c->large ? 64 : random_between(1, 70);
    c->rope = (metalloid_rope_options)METALLOID_ROPE_OPTIONS_INIT;
    c->rope.offset = random_between(0, 1000000);
    c->dims = 2 * half;
    ADD(c, VALUES, 0, batch, heads, time, 2 * half);
    ADD(c, VALUES, 0, batch, 2, time, 2 * half);
    ADD(c, VALUES, 0, 2 * half);
    ADD(c, VALUES, 0, 2 * half);
    ADD(c, OUTPUT, 0, batch, heads, time, 2 * half);
    ADD(c, OUTPUT, 0, batch, 2, time, 2 * half);
}
static metalloid_status call_qk_norm_rope(metalloid_context *context, test_case *c) {
    return metalloid_qk_norm_rope(context, at(c, 0), at(c, 1), at(c, 2), at(c, 3), 1e-6, c->dims, &c->rope, at(c, 4),
                                  at(c, 5));
}

static void make_attention(test_case *c) {
    int64_t batch = c->large ? 1 : random_between(1, 2), kv_heads = c->large ? 8 : random_between(1, 3);
    int64_t group = c->large ? 4 : random_between(1, 4);
    int64_t q_len = c->large ? 256 : random_between(1, 70), kv_len = c->large ? 512 : random_between(1, 300);
    int64_t head_dim = c->large ? 128 : random_between(1, 130), value_dim = c->large ? 128 : random_between(1, 130);
    c->scale = 1 / sqrt((double)head_dim);
    c->attention = (metalloid_attention_options)METALLOID_ATTENTION_OPTIONS_INIT;
    if (!c->large) {
        c->attention.causal = random_bits() & 1;
        c->attention.window = random_bits() & 1 ? random_between(1, kv_len) : 0;
        c->attention.softcap = random_bits() & 1 ? 20 : 0;
    }
    ADD(c, VALUES, 0, batch, kv_heads * group, q_len, head_dim);
    ADD(c, VALUES, 0, batch, kv_heads, kv_len, head_dim);
    ADD(c, VALUES, 0, batch, kv_heads, kv_len, value_dim);
    ADD(c, FLAGS, 0, q_len, kv_len);
    ADD(c, VALUES, 0, kv_heads * group);
    ADD(c, OUTPUT_OF_TENSOR, 0, batch, kv_heads * group, q_len, value_dim);
    ADD(c, LOSS, 0, batch, kv_heads * group, q_len);
    if (c->large) return;
    if (random_bits() & 1) c->attention.mask = at(c, 3);
    if (random_bits() & 1) c->attention.sinks = at(c, 4);
}
static metalloid_status call_attention(metalloid_context *context, test_case *c) {
    c->attention.mask = c->attention.mask ? at(c, 3) : NULL;
    c->attention.sinks = c->attention.sinks ? at(c, 4) : NULL;
    c->attention.logsumexp = at(c, 6);
    return metalloid_scaled_dot_product_attention(context, at(c, 0), at(c, 1), at(c, 2), c->scale, &c->attention,
                                                  at(c, 5));
}

static void make_cross_entropy(test_case *c) {
    int64_t rows = c->large ? 64 : random_between(1, 9), classes = c->large ? 32000 : random_between(1, 3000);
    ADD(c, VALUES, 0, rows, classes);
    ADD(c, CLASSES, classes, rows);
    ADD(c, LOSS, 0, rows);
}
static metalloid_status call_cross_entropy(metalloid_context *context, test_case *c) {
    return metalloid_cross_entropy(context, at(c, 0), at(c, 1), NULL, at(c, 2));
}

static void make_gated_delta(test_case *c) {
    int64_t batch = c->large ? 1 : random_between(1, 2), k_heads = c->large ? 8 : random_between(1, 2);
    int64_t v_heads = k_heads * random_between(1, 2), time = c->large ? 128 : random_between(1, 90);
    int64_t key_dim = c->large ? 128 : random_between(1, 80), value_dim = c->large ? 128 : random_between(1, 80);
    ADD(c, KEYS, 0, batch, time, k_heads, key_dim);
    ADD(c, KEYS, 0, batch, time, k_heads, key_dim);
    ADD(c, VALUES, 0, batch, time, v_heads, value_dim);
    ADD(c, DECAYS, 0, batch, time, v_heads);
    ADD(c, DECAYS, 0, batch, time, v_heads);
    ADD(c, VALUES, 0, batch, v_heads, value_dim, key_dim);
    ADD(c, FLAGS, 0, batch, time);
    ADD(c, OUTPUT_OF_TENSOR, 0, batch, time, v_heads, value_dim);
    ADD(c, LOSS, 0, batch, v_heads, value_dim, key_dim);
}
static metalloid_status call_gated_delta(metalloid_context *context, test_case *c) {
    return metalloid_gated_delta_update(context, at(c, 0), at(c, 1), at(c, 2), at(c, 3), at(c, 4), at(c, 5), at(c, 6),
                                        at(c, 7), at(c, 8));
}

static const struct operation {
    const char *name;
    void (*make)(test_case *c);
    metalloid_status (*call)(metalloid_context *context, test_case *c);
    double tolerance_float; /* relative, where arithmetic is float32 (operations.md, "Accuracy") */
    double tolerance_double;
} operations[] = {
    {"rms_norm", make_rms_norm, call_rms_norm, 2e-6, 1e-13},
    {"layer_norm", make_layer_norm, call_layer_norm, 2e-6, 1e-13},
    {"add_rms_norm", make_add_rms_norm, call_add_rms_norm, 2e-6, 1e-13},
    {"add_layer_norm", make_add_layer_norm, call_add_layer_norm, 2e-6, 1e-13},
    {"swiglu", make_gated, call_swiglu, 2e-6, 1e-13},
    {"geglu (erf)", make_gated, call_geglu_erf, 2e-6, 1e-13},
    {"geglu (tanh)", make_gated, call_geglu_tanh, 2e-6, 1e-13},
    {"rope", make_rope, call_rope, 2e-6, 1e-13},
    {"qk_norm_rope", make_qk_norm_rope, call_qk_norm_rope, 2e-6, 1e-13},
    {"attention", make_attention, call_attention, 1e-5, 1e-12},
    {"cross_entropy", make_cross_entropy, call_cross_entropy, 1e-5, 1e-13},
    {"gated_delta", make_gated_delta, call_gated_delta, 1e-4, 1e-12},
};

enum { OPERATIONS = sizeof operations / sizeof *operations };

/* ---- tensors ---------------------------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    mtl_dtype dtype;
    DLDataType dlpack;
    double unit; /* of the last place, relative: 0 where the tolerance of the arithmetic decides */
} dtypes[] = {
    {"float32", MTL_F32, {kDLFloat, 32, 1}, 0},
    {"float16", MTL_F16, {kDLFloat, 16, 1}, 0x1p-10},
    {"bfloat16", MTL_BF16, {kDLBfloat, 16, 1}, 0x1p-7},
    {"float64", MTL_F64, {kDLFloat, 64, 1}, 0},
};

enum { DTYPES = sizeof dtypes / sizeof *dtypes };

static mtl_dtype dtype_of(const tensor *t) {
    if (t->dl.dtype.code == kDLBfloat) return MTL_BF16;
    return t->dl.dtype.bits == 16 ? MTL_F16 : t->dl.dtype.bits == 32 ? MTL_F32 : MTL_F64;
}

/* Row-major, or with the axes in a random order and gaps between elements. */
static bool allocate(tensor *t, bool contiguous) {
    int order[MAX_AXES];
    for (int i = 0; i < t->dl.ndim; i++) {
        int j = contiguous ? 0 : (int)random_between(0, i); /* 0 puts the last axis first: the fastest one */
        memmove(order + j + 1, order + j, (size_t)(i - j) * sizeof *order);
        order[j] = i;
    }
    int64_t elements = contiguous ? 1 : random_between(1, 2);
    for (int i = 0; i < t->dl.ndim; i++) {
        t->strides[order[i]] = elements;
        elements *= t->shape[order[i]];
    }
    t->bytes = (size_t)elements * (size_t)(t->dl.dtype.bits / 8);
    t->dl.shape = t->shape;
    t->dl.strides = t->strides;
    t->dl.device = (DLDevice){kDLCPU, 0};
    t->dl.data = calloc(t->bytes ? t->bytes : 1, 1);
    return t->dl.data != NULL;
}

static char *element(const tensor *t, const int64_t *index) {
    int64_t offset = 0;
    for (int axis = 0; axis < t->dl.ndim; axis++) offset += index[axis] * t->strides[axis];
    return (char *)t->dl.data + offset * (t->dl.dtype.bits / 8);
}

static bool next_index(const tensor *t, int64_t *index) {
    for (int axis = t->dl.ndim - 1; axis >= 0; axis--) {
        if (++index[axis] < t->shape[axis]) return true;
        index[axis] = 0;
    }
    return false;
}

static bool is_output(content kind) { return kind >= OUTPUT; }

static void set_dtype(tensor *t, int dtype) {
    bool in_double = dtypes[dtype].dtype == MTL_F64;
    t->dl.dtype = dtypes[dtype].dlpack;
    if (t->content == LOSS) t->dl.dtype = (DLDataType){kDLFloat, in_double ? 64 : 32, 1};
    if (t->content == POSITIONS) t->dl.dtype = (DLDataType){kDLInt, 32, 1};
    if (t->content == CLASSES) t->dl.dtype = (DLDataType){kDLInt, 64, 1};
    if (t->content == FLAGS) t->dl.dtype = (DLDataType){METALLOID_DL_BOOL, 8, 1};
}

static void fill(tensor *t) {
    int64_t index[MAX_AXES] = {0};
    double length = t->dl.ndim ? (double)t->shape[t->dl.ndim - 1] : 1;
    do {
        char *to = element(t, index);
        int32_t position;
        int64_t class;
        switch (t->content) {
        case VALUES: mtl_store_double(to, dtype_of(t), random_normal()); break;
        case KEYS: mtl_store_double(to, dtype_of(t), random_normal() / sqrt(length)); break;
        case DECAYS: mtl_store_double(to, dtype_of(t), 0.8 + 0.2 * random_uniform()); break;
        case POSITIONS:
            position = (int32_t)random_between(0, t->modulus);
            memcpy(to, &position, sizeof position);
            break;
        case CLASSES:
            class = random_between(0, t->modulus - 1);
            memcpy(to, &class, sizeof class);
            break;
        case FLAGS: *to = random_bits() % 8 != 0; break;
        default: break;
        }
    } while (next_index(t, index));
}

/* The same values in float64 (integers and flags as they are), for the reference. */
static bool widen(const tensor *from, tensor *to) {
    *to = *from;
    set_dtype(to, DTYPES - 1);
    if (!allocate(to, true)) return false;
    int64_t index[MAX_AXES] = {0};
    if (is_output(from->content)) return true;
    do {
        if (from->dl.dtype.code == to->dl.dtype.code && from->dl.dtype.bits == to->dl.dtype.bits) {
            memcpy(element(to, index), element(from, index), from->dl.dtype.bits / 8);
        } else {
            double value = mtl_load_double(element(from, index), dtype_of(from));
            memcpy(element(to, index), &value, sizeof value);
        }
    } while (next_index(to, index));
    return true;
}

static void release(test_case *c) {
    for (int i = 0; i < c->count; i++) free(c->tensors[i].dl.data);
    c->count = 0;
}

/* ---- comparison ------------------------------------------------------------------------------------------------------- */

static double unit_at(double magnitude, double unit) { /* one unit in the last place at that magnitude */
    int exponent;
    frexp(magnitude, &exponent);
    return magnitude > 0 ? ldexp(unit, exponent - 1) : 0;
}

/* The largest error of the output in tolerances: 1 is the most that is right. */
static double worst_error(const tensor *out, const tensor *reference, double tolerance, double unit) {
    double worst = 0, tensor_scale = 0;
    int64_t index[MAX_AXES] = {0}, length = out->dl.ndim ? out->shape[out->dl.ndim - 1] : 1;
    do {
        double value = mtl_load_double(element(reference, index), MTL_F64);
        if (isfinite(value) && fabs(value) > tensor_scale) tensor_scale = fabs(value);
    } while (next_index(reference, index));
    bool more = true;
    while (more) {
        double row_scale = 0;
        int64_t start[MAX_AXES];
        memcpy(start, index, sizeof start);
        for (int64_t i = 0; i < length; i++) {
            if (out->dl.ndim) index[out->dl.ndim - 1] = i;
            double value = mtl_load_double(element(reference, index), MTL_F64);
            if (isfinite(value) && fabs(value) > row_scale) row_scale = fabs(value);
        }
        memcpy(index, start, sizeof start);
        for (int64_t i = 0; i < length && more; i++) {
            double wanted = mtl_load_double(element(reference, index), MTL_F64);
            double got = mtl_load_double(element(out, index), dtype_of(out));
            double scale = out->content == OUTPUT ? row_scale : tensor_scale;
            double allowed = tolerance * (fabs(wanted) + scale) +
                             unit_at(fabs(wanted) > scale ? fabs(wanted) : scale, unit) + 1e-300;
            double error = fabs(got - wanted) / allowed;
            if (isinf(wanted) ? got != wanted : !(error <= 1e30)) error = 1e30; /* NaN too: the reference has none */
            if (error > worst) worst = error;
            more = next_index(out, index);
        }
    }
    return worst;
}

/* One random case by `isa`: its error in tolerances, or -1 where the call or an allocation failed. */
static double run_case(const struct operation *operation, int dtype, metalloid_context *context,
                       metalloid_context *reference) {
    test_case c = {.contiguous = random_bits() & 1}, wide;
    operation->make(&c);
    bool ready = true;
    for (int i = 0; i < c.count; i++) {
        set_dtype(&c.tensors[i], dtype);
        ready = allocate(&c.tensors[i], c.contiguous) && ready;
    }
    for (int i = 0; ready && i < c.count; i++) fill(&c.tensors[i]);
    wide = c;
    for (int i = 0; i < c.count; i++) ready = widen(&c.tensors[i], &wide.tensors[i]) && ready;
    double worst = -1;
    if (ready && operation->call(context, &c) == METALLOID_OK && operation->call(reference, &wide) == METALLOID_OK) {
        worst = 0;
        bool in_double = dtypes[dtype].dtype == MTL_F64;
        for (int i = 0; i < c.count; i++) {
            if (!is_output(c.tensors[i].content)) continue;
            double unit = c.tensors[i].content == LOSS ? 0 : dtypes[dtype].unit;
            double error = worst_error(&c.tensors[i], &wide.tensors[i],
                                       in_double ? operation->tolerance_double : operation->tolerance_float, unit);
            if (error > worst) worst = error;
        }
    }
    release(&c);
    release(&wide);
    return worst;
}

/* ---- timing ----------------------------------------------------------------------------------------------------------- */

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Seconds of the fastest of some calls at a model's size; -1 where a call failed. */
static double time_case(const struct operation *operation, int dtype, metalloid_context *context) {
    test_case c = {.contiguous = true, .large = true};
    seed_state = 1;
    operation->make(&c);
    double best = 1e30, start = now();
    bool ready = true;
    for (int i = 0; i < c.count; i++) {
        set_dtype(&c.tensors[i], dtype);
        ready = allocate(&c.tensors[i], true) && ready;
    }
    for (int i = 0; ready && i < c.count; i++) fill(&c.tensors[i]);
    for (int i = 0; ready && (i < 3 || now() - start < 0.2) && i < 1000; i++) {
        double begin = now();
        ready = operation->call(context, &c) == METALLOID_OK;
        double seconds = now() - begin;
        if (seconds < best) best = seconds;
    }
    release(&c);
    return ready ? best : -1;
}

/* ---- the command ------------------------------------------------------------------------------------------------------ */

static int usage(FILE *to) {
    fprintf(to, "usage: metalloid check [--trials N] [--seed N] [--bench]\n\n"
                "Compares the kernels of every instruction set of this machine with the plain C ones in float64, on "
                "random input.\n\n"
                "  --trials N  random cases an operation and dtype (default 50)\n"
                "  --seed N    start of the random numbers (default 1)\n"
                "  --bench     also time one large call by every instruction set\n");
    return to == stdout ? EXIT_OK : EXIT_USAGE;
}

static bool parse_count(const char *text, uint64_t *value) {
    char *end;
    *value = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && *end == '\0' && *value >= 1 && *value <= 1000000;
}

int metalloid_cli_check(int count, char **arguments) {
    uint64_t trials = 50, seed = 1;
    bool bench = false;
    for (int i = 0; i < count; i++) {
        const char *word = arguments[i];
        uint64_t *number = strcmp(word, "--trials") == 0 ? &trials : strcmp(word, "--seed") == 0 ? &seed : NULL;
        if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) return usage(stdout);
        if (strcmp(word, "--bench") == 0) {
            bench = true;
        } else if (!number) {
            fprintf(stderr, "metalloid check: no option '%s'\n\n", word);
            return usage(stderr);
        } else if (++i == count || !parse_count(arguments[i], number)) {
            fprintf(stderr, "metalloid check: %s must be a number from 1 to 1000000, got '%s'\n\n", word,
                    i < count ? arguments[i] : "");
            return usage(stderr);
        }
    }

    const mtl_cpu_isa *const *isas;
    int isa_count = mtl_cpu_isas(&isas), failures = 0;
    metalloid_context *context, *reference;
    if (metalloid_context_create(&context) != METALLOID_OK || metalloid_context_create(&reference) != METALLOID_OK) {
        fprintf(stderr, "metalloid check: %s\n", metalloid_last_error());
        return EXIT_FAILED;
    }
    reference->isa = isas[0];
    bool terminal = isatty(STDERR_FILENO);
    printf(
        "Every operation on %llu random inputs of each dtype, by each instruction set of this machine, against plain C "
        "in "
        "float64.\n\n"
        "tolerance: the error that the operation may have, relative to the result and to the largest of its row (for\n"
        "attention and gated_delta, of the tensor); float16 and bfloat16 may be off by one unit in the last place "
        "more.\n"
        "Below an instruction set: the largest error found, in tolerances. More than 1 is wrong, and marked !.\n%s\n",
        (unsigned long long)trials, bench ? "Below its name on the right: microseconds of a large call.\n" : "");
    printf("%-14s %-9s %9s", "operation", "dtype", "tolerance");
    for (int i = 0; i < isa_count; i++) printf(" %12s ", isas[i]->name);
    for (int i = 0; bench && i < isa_count; i++) printf(" %12s", isas[i]->name);
    printf("\n");
    fflush(stdout);
    for (int o = 0; o < OPERATIONS; o++) {
        for (int dtype = 0; dtype < DTYPES; dtype++) {
            bool in_double = dtypes[dtype].dtype == MTL_F64;
            printf("%-14s %-9s %9.0e", operations[o].name, dtypes[dtype].name,
                   in_double ? operations[o].tolerance_double : operations[o].tolerance_float);
            for (int i = 0; i < isa_count; i++) {
                context->isa = isas[i];
                seed_state = seed * 0x9e3779b97f4a7c15 + 1;
                double worst = 0;
                for (uint64_t trial = 0; trial < trials && worst >= 0; trial++) {
                    if (terminal && trial % 10 == 0)
                        fprintf(stderr, "\r%s %s %s %llu\033[K\r", operations[o].name, dtypes[dtype].name,
                                isas[i]->name, (unsigned long long)trial);
                    double error = run_case(&operations[o], dtype, context, reference);
                    worst = error < 0 || error > worst ? error : worst;
                }
                if (worst < 0) printf(" %12s!", "call failed");
                else printf(" %12.3g%c", worst, worst <= 1 ? ' ' : '!');
                failures += worst < 0 || worst > 1;
            }
            for (int i = 0; bench && i < isa_count; i++) {
                context->isa = isas[i];
                double seconds = time_case(&operations[o], dtype, context);
                printf(" %12.1f", seconds * 1e6);
                failures += seconds < 0;
            }
            printf("\n");
            fflush(stdout);
        }
    }
    metalloid_context_destroy(context);
    metalloid_context_destroy(reference);
    if (failures) printf("\n%d of the above are wrong (marked !).\n", failures);
    else printf("\nAll kernels agree.\n");
    return failures ? EXIT_FAILED : EXIT_OK;
}
