/* metalloid bench: the benchmark. SPDX-License-Identifier: MIT
 *
 * The benchmark is a Python program (bindings/python/metalloid/bench), because its peers are Python libraries; this command starts it.
 * The program in turn starts this command with --worker for what has to be measured in C: the machine's ceilings, the library's calls
 * and, for one row, a bare loop. A worker reads requests of one line from stdin and answers each with a line of JSON:
 *
 *   open OPERATION KEY=VALUE...   makes the tensors of a case (`copies` sets of them, used in turn, so that none is in the cache when
 *                                 it is needed again) and runs it once
 *   time CALLS                    {"seconds": the mean over so many calls}
 *   traffic CALLS read|STORES     {"seconds", "bytes"}: the open case's operands read, or copied to its results with such stores, since
 *                                 what memory allows depends on where tensors lie, by up to a quarter
 *   close                         frees the tensors
 *   info                          what ran
 *
 * With --kernels it measures custom kernels (bench_kernels.c) and needs no Python.
 */
#include "bare.h"
#include "ceilings.h"
#include "cli.h"
#include "core/context.h"
#include "core/dtype.h"
#include "core/threads.h"
#include "cpu/kernels.h"

#include <errno.h>
#include <metalloid/metalloid.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { MAX_TENSORS = 10, MAX_AXES = 4, MAX_WORDS = 24, PAGE = 4096, HUGE_PAGES_FROM = 4 << 20 };

/* ---- a case ------------------------------------------------------------------------------------------------------------ */

typedef enum { VALUES, KEYS, DECAYS, CLASSES, FLAGS, OUTPUT, OUTPUT_F32 } content;

typedef struct {
    DLTensor dl;
    int64_t shape[MAX_AXES];
    content content;
} tensor;

typedef struct {
    tensor tensors[MAX_TENSORS];
} tensor_set;

typedef struct {
    char *words[MAX_WORDS]; /* of the request: KEY=VALUE */
    int word_count;
    const struct operation *operation;
    mtl_dtype dtype;
    metalloid_context *context;
    tensor_set *sets;
    int64_t copies, next;
    int count; /* of tensors in a set */
    metalloid_rope_options rope;
    metalloid_attention_options attention;
    arithmetic_ceiling arithmetic;
    int64_t bytes; /* read or copied in a call */
    DLTensor *from, *to;
    store_kind stores;
    _Atomic uint64_t sink; /* of what ceilings compute, so that it is computed */
    const char *problem;   /* first one; NULL while all is well */
} bench_case;

static const char *text_parameter(const bench_case *c, const char *key, const char *otherwise) {
    size_t length = strlen(key);
    for (int i = 0; i < c->word_count; i++) {
        if (strncmp(c->words[i], key, length) == 0 && c->words[i][length] == '=') return c->words[i] + length + 1;
    }
    return otherwise;
}

static int64_t parameter(bench_case *c, const char *key, int64_t otherwise) {
    const char *text = text_parameter(c, key, NULL);
    if (!text) {
        if (otherwise < 0) c->problem = "a parameter of this operation is missing";
        return otherwise < 0 ? 1 : otherwise;
    }
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (errno || end == text || *end || value < 0 || value > INT64_C(1) << 40) {
        c->problem = "a parameter is not a number in 0..2^40";
        return 1;
    }
    return value;
}

static int64_t size_parameter(bench_case *c, const char *key) {
    int64_t value = parameter(c, key, -1);
    if (value < 1 || value > 1 << 24) c->problem = "a size is not in 1..2^24";
    return value;
}

static int64_t elements(const tensor *t) {
    int64_t product = 1;
    for (int i = 0; i < t->dl.ndim; i++) product *= t->shape[i];
    return product;
}

static int64_t size_in_bytes(const tensor *t) { return elements(t) * (t->dl.dtype.bits / 8); }

/* Adds the tensor to the first set, of which the others are copies. */
static void add(bench_case *c, content kind, int rank, const int64_t *shape) {
    static const DLDataType floating[] = {[MTL_F32] = {kDLFloat, 32, 1},
                                          [MTL_F16] = {kDLFloat, 16, 1},
                                          [MTL_BF16] = {kDLBfloat, 16, 1},
                                          [MTL_F64] = {kDLFloat, 64, 1}};
    tensor *t = &c->sets[0].tensors[c->count++];
    *t = (tensor){.content = kind};
    memcpy(t->shape, shape, (size_t)rank * sizeof *shape);
    t->dl.ndim = rank;
    t->dl.device = (DLDevice){kDLCPU, 0};
    t->dl.dtype = floating[c->dtype];
    if (kind == OUTPUT_F32) t->dl.dtype = floating[c->dtype == MTL_F64 ? MTL_F64 : MTL_F32];
    if (kind == CLASSES) t->dl.dtype = (DLDataType){kDLInt, 64, 1};
    if (kind == FLAGS) t->dl.dtype = (DLDataType){METALLOID_DL_BOOL, 8, 1};
}

#define ADD(c, kind, ...) \
    add(c, kind, (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (const int64_t[]){__VA_ARGS__})

static DLTensor *at(bench_case *c, int i) { return &c->sets[c->next].tensors[i].dl; }
static float *floats(bench_case *c, int i) { return at(c, i)->data; }

/* ---- operations --------------------------------------------------------------------------------------------------------- */

static void make_norm(bench_case *c) { /* x, weight, bias, out */
    int64_t rows = size_parameter(c, "rows"), length = size_parameter(c, "length");
    ADD(c, VALUES, rows, length);
    ADD(c, VALUES, length);
    ADD(c, VALUES, length);
    ADD(c, OUTPUT, rows, length);
}
static metalloid_status call_rms_norm(bench_case *c) {
    return metalloid_rms_norm(c->context, at(c, 0), at(c, 1), 1e-5, at(c, 3));
}
static void bare_call_rms_norm(bench_case *c) {
    bare_rms_norm((size_t)at(c, 0)->shape[1], floats(c, 0), floats(c, 1), 1e-5f, floats(c, 3));
}
static metalloid_status call_layer_norm(bench_case *c) {
    return metalloid_layer_norm(c->context, at(c, 0), at(c, 1), at(c, 2), 1e-5, at(c, 3));
}
static void bare_call_layer_norm(bench_case *c) {
    bare_layer_norm((size_t)at(c, 0)->shape[1], floats(c, 0), floats(c, 1), floats(c, 2), 1e-5f, floats(c, 3));
}

static void make_add_norm(bench_case *c) { /* x, residual, weight, bias, sum, out */
    int64_t rows = size_parameter(c, "rows"), length = size_parameter(c, "length");
    ADD(c, VALUES, rows, length);
    ADD(c, VALUES, rows, length);
    ADD(c, VALUES, length);
    ADD(c, VALUES, length);
    ADD(c, OUTPUT, rows, length);
    ADD(c, OUTPUT, rows, length);
}
static metalloid_status call_add_rms_norm(bench_case *c) {
    return metalloid_add_rms_norm(c->context, at(c, 0), at(c, 1), at(c, 2), 1e-5, at(c, 4), at(c, 5));
}
static void bare_call_add_rms_norm(bench_case *c) {
    bare_add_rms_norm((size_t)at(c, 0)->shape[1], floats(c, 0), floats(c, 1), floats(c, 2), 1e-5f, floats(c, 4),
                      floats(c, 5));
}
static metalloid_status call_add_layer_norm(bench_case *c) {
    return metalloid_add_layer_norm(c->context, at(c, 0), at(c, 1), at(c, 2), at(c, 3), 1e-5, at(c, 4), at(c, 5));
}

static void make_gated(bench_case *c) { /* gate, up, out */
    int64_t rows = size_parameter(c, "rows"), length = size_parameter(c, "length");
    ADD(c, VALUES, rows, length);
    ADD(c, VALUES, rows, length);
    ADD(c, OUTPUT, rows, length);
}
static metalloid_status call_swiglu(bench_case *c) {
    return metalloid_swiglu(c->context, at(c, 0), at(c, 1), at(c, 2));
}
static void bare_call_swiglu(bench_case *c) {
    bare_swiglu((size_t)at(c, 0)->shape[1], floats(c, 0), floats(c, 1), floats(c, 2));
}
static metalloid_status call_geglu(bench_case *c) {
    return metalloid_geglu(c->context, at(c, 0), at(c, 1), METALLOID_GELU_TANH, at(c, 2));
}

static void make_rope(bench_case *c) { /* x, out */
    int64_t heads = size_parameter(c, "heads"), time = size_parameter(c, "time"), dim = size_parameter(c, "dim");
    c->rope.offset = parameter(c, "offset", 0);
    ADD(c, VALUES, 1, heads, time, dim);
    ADD(c, OUTPUT, 1, heads, time, dim);
}
static metalloid_status call_rope(bench_case *c) {
    return metalloid_rope(c->context, at(c, 0), at(c, 0)->shape[3], &c->rope, at(c, 1));
}

static void make_qk_norm_rope(bench_case *c) { /* q, k, their weights, their outputs */
    int64_t heads = size_parameter(c, "heads"), kv_heads = size_parameter(c, "kv_heads");
    int64_t time = size_parameter(c, "time"), dim = size_parameter(c, "dim");
    c->rope.offset = parameter(c, "offset", 0);
    ADD(c, VALUES, 1, heads, time, dim);
    ADD(c, VALUES, 1, kv_heads, time, dim);
    ADD(c, VALUES, dim);
    ADD(c, VALUES, dim);
    ADD(c, OUTPUT, 1, heads, time, dim);
    ADD(c, OUTPUT, 1, kv_heads, time, dim);
}
static metalloid_status call_qk_norm_rope(bench_case *c) {
    return metalloid_qk_norm_rope(c->context, at(c, 0), at(c, 1), at(c, 2), at(c, 3), 1e-6, at(c, 0)->shape[3],
                                  &c->rope, at(c, 4), at(c, 5));
}

static void make_attention(bench_case *c) { /* q, k, v, out, mask */
    int64_t heads = size_parameter(c, "heads"), kv_heads = size_parameter(c, "kv_heads");
    int64_t q_len = size_parameter(c, "q_len"), kv_len = size_parameter(c, "kv_len"), dim = size_parameter(c, "dim");
    c->attention.causal = parameter(c, "causal", 0) != 0;
    c->attention.window = parameter(c, "window", 0);
    ADD(c, VALUES, 1, heads, q_len, dim);
    ADD(c, VALUES, 1, kv_heads, kv_len, dim);
    ADD(c, VALUES, 1, kv_heads, kv_len, dim);
    ADD(c, OUTPUT, 1, heads, q_len, dim);
    if (parameter(c, "mask", 0)) ADD(c, FLAGS, q_len, kv_len);
}
static metalloid_status call_attention(bench_case *c) {
    if (c->count > 4) c->attention.mask = at(c, 4);
    return metalloid_scaled_dot_product_attention(c->context, at(c, 0), at(c, 1), at(c, 2),
                                                  1 / sqrt((double)at(c, 0)->shape[3]), &c->attention, at(c, 3));
}

static void make_cross_entropy(bench_case *c) { /* logits, targets, loss */
    int64_t rows = size_parameter(c, "rows"), classes = size_parameter(c, "classes");
    ADD(c, VALUES, rows, classes);
    ADD(c, CLASSES, rows);
    ADD(c, OUTPUT_F32, rows);
}
static metalloid_status call_cross_entropy(bench_case *c) {
    return metalloid_cross_entropy(c->context, at(c, 0), at(c, 1), NULL, at(c, 2));
}

static void make_gated_delta_update(bench_case *c) { /* q, k, v, gamma, beta, out, state, which is updated in place */
    int64_t batch = size_parameter(c, "batch"), time = size_parameter(c, "time"), dim = size_parameter(c, "dim");
    int64_t k_heads = size_parameter(c, "k_heads"), v_heads = size_parameter(c, "v_heads");
    ADD(c, KEYS, batch, time, k_heads, dim);
    ADD(c, KEYS, batch, time, k_heads, dim);
    ADD(c, VALUES, batch, time, v_heads, dim);
    ADD(c, DECAYS, batch, time, v_heads);
    ADD(c, DECAYS, batch, time, v_heads);
    ADD(c, OUTPUT, batch, time, v_heads, dim);
    ADD(c, OUTPUT_F32, batch, v_heads, dim, dim);
}
static metalloid_status call_gated_delta_update(bench_case *c) {
    return metalloid_gated_delta_update(c->context, at(c, 0), at(c, 1), at(c, 2), at(c, 3), at(c, 4), at(c, 6), NULL,
                                        at(c, 5), at(c, 6));
}

/* Ceilings: as many threads as a call of the library may use, one part for each. */

/* Asked once: in a part it would be a worker that asks, which is kept off the caller's CPU. */
static int thread_count(void) {
    static int count;
    if (count == 0) count = metalloid_get_num_threads();
    return count;
}

static char *part_of(const bench_case *c, const DLTensor *t, int part, size_t *bytes) {
    int64_t each = c->bytes / thread_count() / 256 * 256, begin = each * part;
    *bytes = (size_t)(part == thread_count() - 1 ? c->bytes - begin : each);
    return (char *)t->data + begin;
}

static void make_buffers(bench_case *c) {
    c->bytes = parameter(c, "bytes", -1) / 256 * 256;
    if (c->bytes < 256 * thread_count()) c->problem = "bytes must be 256 a thread at least";
    c->stores = (store_kind)parameter(c, "stores", STORES_CACHED);
    if (c->stores >= STORE_KINDS) c->problem = "stores must be 0, 1 or 2";
    c->dtype = MTL_F32;
    ADD(c, VALUES, c->bytes / 4);
}
static void read_part(void *argument, int part, int worker) {
    bench_case *c = argument;
    size_t bytes;
    const char *from = part_of(c, c->from, part, &bytes);
    c->sink += stream_read(from, bytes);
    (void)worker;
}
static metalloid_status call_read(bench_case *c) {
    c->from = at(c, 0);
    mtl_parallel_run(thread_count(), thread_count(), read_part, c);
    return METALLOID_OK;
}
static void copy_part(void *argument, int part, int worker) {
    bench_case *c = argument;
    size_t bytes;
    const char *from = part_of(c, c->from, part, &bytes);
    stream_copy(part_of(c, c->to, part, &bytes), from, bytes, c->stores);
    (void)worker;
}
static metalloid_status call_copy(bench_case *c) {
    c->from = at(c, 0);
    c->to = at(c, 1);
    mtl_parallel_run(thread_count(), thread_count(), copy_part, c);
    return METALLOID_OK;
}
static void make_copy(bench_case *c) {
    make_buffers(c);
    if (!c->problem) ADD(c, OUTPUT, c->bytes / 4);
}

/* One call's traffic without its arithmetic: the bytes moved. */
static int64_t read_operands(bench_case *c) {
    int64_t moved = 0;
    for (int i = 0; i < c->count; i++) {
        const tensor *t = &c->sets[c->next].tensors[i];
        if (t->content != VALUES) continue;
        c->bytes = size_in_bytes(t) / 256 * 256;
        c->from = at(c, i);
        mtl_parallel_run(thread_count(), thread_count(), read_part, c);
        moved += c->bytes;
    }
    return moved;
}

/* Each result takes a copy of an operand of its size, the first of the first and so on. */
static int64_t copy_to_results(bench_case *c) {
    tensor *set = c->sets[c->next].tensors;
    int64_t moved = 0;
    for (int result = 0, operand = 0; result < c->count; result++) {
        if (set[result].content != OUTPUT) continue;
        while (operand < result &&
               (set[operand].content != VALUES || size_in_bytes(&set[operand]) != size_in_bytes(&set[result])))
            operand++;
        if (operand == result) break;
        c->bytes = size_in_bytes(&set[result]) / 256 * 256;
        c->from = at(c, operand++);
        c->to = at(c, result);
        mtl_parallel_run(thread_count(), thread_count(), copy_part, c);
        moved += 2 * c->bytes;
    }
    return moved;
}

static int64_t move_tensors(bench_case *c, bool read) {
    int64_t moved = read ? read_operands(c) : copy_to_results(c);
    if (++c->next == c->copies) c->next = 0;
    return moved;
}

enum { ARITHMETIC_STEPS = 1 << 18 };

static void make_arithmetic(bench_case *c) {
    c->arithmetic = find_arithmetic_ceiling(text_parameter(c, "dtype", "float32"));
    if (!c->arithmetic.run) c->problem = "no such instruction on this processor";
}
static void arithmetic_part(void *argument, int part, int worker) {
    bench_case *c = argument;
    c->sink += c->arithmetic.run(ARITHMETIC_STEPS, 0.5 + part * 0x1p-10) > 0;
    (void)worker;
}
static metalloid_status call_arithmetic(bench_case *c) {
    mtl_parallel_run(thread_count(), thread_count(), arithmetic_part, c);
    return METALLOID_OK;
}

static const struct operation {
    const char *name;
    void (*make)(bench_case *c);
    metalloid_status (*call)(bench_case *c);
    void (*bare)(bench_case *c); /* NULL: there is none */
} operations[] = {
    {"rms_norm", make_norm, call_rms_norm, bare_call_rms_norm},
    {"layer_norm", make_norm, call_layer_norm, bare_call_layer_norm},
    {"add_rms_norm", make_add_norm, call_add_rms_norm, bare_call_add_rms_norm},
    {"add_layer_norm", make_add_norm, call_add_layer_norm, NULL},
    {"swiglu", make_gated, call_swiglu, bare_call_swiglu},
    {"geglu", make_gated, call_geglu, NULL},
    {"rope", make_rope, call_rope, NULL},
    {"qk_norm_rope", make_qk_norm_rope, call_qk_norm_rope, NULL},
    {"attention", make_attention, call_attention, NULL},
    {"cross_entropy", make_cross_entropy, call_cross_entropy, NULL},
    {"gated_delta_update", make_gated_delta_update, call_gated_delta_update, NULL},
    {"read", make_buffers, call_read, NULL},
    {"copy", make_copy, call_copy, NULL},
    {"arithmetic", make_arithmetic, call_arithmetic, NULL},
};

enum { OPERATIONS = sizeof operations / sizeof *operations };

/* ---- tensors ------------------------------------------------------------------------------------------------------------ */

static uint64_t random_bits(void) { /* xorshift64* (Vigna 2016) */
    static uint64_t state = 1;
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return state * 0x2545f4914f6cdd1d;
}
static double random_uniform(void) { return (double)(random_bits() >> 11) * 0x1p-53; }

/* Random elements to begin with, then copies of them: gigabytes are filled at the speed of memory. */
static void fill(bench_case *c, tensor *t) {
    int64_t count = elements(t), size = t->dl.dtype.bits / 8, distinct = count < 65521 ? count : 65521;
    int64_t classes = t->content == CLASSES ? c->sets[0].tensors[0].shape[1] : 1;
    double key_scale = 1 / sqrt((double)t->shape[t->dl.ndim - 1]);
    char *data = t->dl.data;
    for (int64_t i = 0; i < distinct; i++) {
        double normal = sqrt(-2 * log(1 - random_uniform())) * cos(6.283185307179586 * random_uniform());
        int64_t class = (int64_t)(random_uniform() * (double)classes);
        switch (t->content) {
        case VALUES: mtl_store_double(data + i * size, c->dtype, normal); break;
        case KEYS: mtl_store_double(data + i * size, c->dtype, normal * key_scale); break;
        case DECAYS: mtl_store_double(data + i * size, c->dtype, 0.8 + 0.2 * random_uniform()); break;
        case CLASSES: memcpy(data + i * size, &class, sizeof class); break;
        case FLAGS: data[i] = random_bits() % 8 != 0; break;
        default: break;
        }
    }
    if (t->content >= OUTPUT) {
        memset(data, 0, (size_t)(count * size)); /* so that its pages are there */
        return;
    }
    for (int64_t done = distinct; done < count; done += distinct) {
        memcpy(data + done * size, data, (size_t)((count - done < distinct ? count - done : distinct) * size));
    }
}

static bool allocate(bench_case *c, tensor *t) {
    size_t bytes = ((size_t)size_in_bytes(t) + PAGE - 1) / PAGE * PAGE;
    t->dl.shape = t->shape;
    t->dl.data = aligned_alloc(PAGE, bytes);
    if (!t->dl.data) return false;
#if defined(MADV_HUGEPAGE)
    if (bytes >= HUGE_PAGES_FROM) madvise(t->dl.data, bytes, MADV_HUGEPAGE); /* as NumPy does; a refusal does no harm */
#endif
    fill(c, t);
    return true;
}

static void close_case(bench_case *c) {
    for (int64_t set = 0; c->sets && set < c->copies; set++) {
        for (int i = 0; i < c->count; i++) free(c->sets[set].tensors[i].dl.data);
    }
    free(c->sets);
    metalloid_context_destroy(c->context);
    *c = (bench_case){0};
}

/* ---- requests ----------------------------------------------------------------------------------------------------------- */

static void answer(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
}

static void call_once(bench_case *c, bool bare) {
    if (bare) c->operation->bare(c);
    else if (c->operation->call(c) != METALLOID_OK) c->problem = metalloid_last_error();
    if (++c->next == c->copies) c->next = 0;
}

static bool is_bare(const bench_case *c) { return strcmp(text_parameter(c, "by", "metalloid"), "bare") == 0; }

static void open_case(bench_case *c) {
    static const struct {
        const char *name;
        mtl_dtype dtype;
    } dtypes[] = {{"float32", MTL_F32}, {"float16", MTL_F16}, {"bfloat16", MTL_BF16}, {"float64", MTL_F64}};
    const char *dtype = text_parameter(c, "dtype", "float32");
    bool known = false;
    for (int i = 0; i < 4; i++) {
        if (strcmp(dtypes[i].name, dtype) == 0) {
            c->dtype = dtypes[i].dtype;
            known = true;
        }
    }
    if (!known) c->problem = "dtype must be float32, float16, bfloat16 or float64";
    for (int i = 0; i < OPERATIONS && c->word_count > 1; i++) {
        if (strcmp(operations[i].name, c->words[1]) == 0) c->operation = &operations[i];
    }
    if (!c->operation) {
        c->problem = "no such operation";
        return;
    }
    c->copies = parameter(c, "copies", 1);
    if (c->copies < 1 || c->copies > 1 << 20) {
        c->problem = "copies must be in 1..2^20";
        c->copies = 1;
    }
    const char *by = text_parameter(c, "by", "metalloid");
    if (strcmp(by, "metalloid") != 0 && strcmp(by, "plain") != 0 && !(is_bare(c) && c->operation->bare))
        c->problem = "by must be metalloid, plain or, for some operations, bare";
    c->rope = (metalloid_rope_options)METALLOID_ROPE_OPTIONS_INIT;
    c->attention = (metalloid_attention_options)METALLOID_ATTENTION_OPTIONS_INIT;
    c->sets = calloc((size_t)c->copies, sizeof *c->sets);
    if (!c->sets || metalloid_context_create(&c->context) != METALLOID_OK) c->problem = "out of memory";
    if (c->problem) return;
    if (strcmp(by, "plain") == 0) {
        const mtl_cpu_isa *const *isas;
        mtl_cpu_isas(&isas);
        c->context->isa = isas[0];
    }
    c->operation->make(c);
    if (is_bare(c) && (c->dtype != MTL_F32 || c->sets[0].tensors[0].shape[0] != 1))
        c->problem = "bare loops do one float32 row";
    for (int64_t set = 1; !c->problem && set < c->copies; set++) c->sets[set] = c->sets[0];
    for (int64_t set = 0; !c->problem && set < c->copies; set++) {
        for (int i = 0; i < c->count; i++) {
            if (!allocate(c, &c->sets[set].tensors[i])) c->problem = "out of memory";
        }
    }
    if (!c->problem) call_once(c, is_bare(c));
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void time_case(bench_case *c, const char *calls_in_words) {
    long long calls = calls_in_words ? strtoll(calls_in_words, NULL, 10) : 0;
    if (!c->operation || calls < 1 || calls > 1 << 30) {
        answer("{\"error\": \"time: an open case and a number of calls are needed\"}");
        return;
    }
    bool bare = is_bare(c);
    if (calls > 1) call_once(c, bare); /* wakes the threads and the core's clock */
    double begin = now();
    for (long long i = 0; i < calls; i++) call_once(c, bare);
    double seconds = (now() - begin) / (double)calls;
    if (c->problem) answer("{\"error\": \"%s\"}", c->problem);
    else answer("{\"seconds\": %.9g}", seconds);
}

static void time_traffic(bench_case *c, const char *calls_in_words, const char *how) {
    long long calls = calls_in_words ? strtoll(calls_in_words, NULL, 10) : 0;
    bool read = how && strcmp(how, "read") == 0;
    long long stores = !how ? -1 : read ? 0 : strtoll(how, NULL, 10);
    if (!c->operation || calls < 1 || calls > 1 << 30 || stores < 0 || stores >= STORE_KINDS) {
        answer("{\"error\": \"traffic: an open case, a number of calls and how are needed\"}");
        return;
    }
    c->stores = (store_kind)stores;
    if (calls > 1) move_tensors(c, read);
    int64_t moved = 0;
    double begin = now();
    for (long long i = 0; i < calls; i++) moved += move_tensors(c, read);
    double seconds = (now() - begin) / (double)calls;
    if (moved == 0) answer("{\"error\": \"traffic: no tensor to move\"}");
    else answer("{\"seconds\": %.9g, \"bytes\": %.17g}", seconds, (double)moved / (double)calls);
}

static int serve(void) {
    bench_case c = {0};
    char *line = NULL, *request = NULL; /* `request` holds the words of the open case */
    size_t size = 0;
    while (getline(&line, &size, stdin) > 0) {
        char *words[MAX_WORDS], *rest = line;
        int count = 0;
        for (char *word; count < MAX_WORDS && (word = strtok_r(rest, " \n", &rest));) words[count++] = word;
        if (count == 0) continue;
        if (strcmp(words[0], "info") == 0) {
            answer("{\"version\": \"%s\", \"isa\": \"%s\", \"threads\": %d, \"fma\": \"%s\", \"dot_bf16\": \"%s\"}",
                   metalloid_version(), metalloid_cpu_isa(), thread_count(),
                   find_arithmetic_ceiling("float32").instructions, find_arithmetic_ceiling("bfloat16").instructions);
        } else if (strcmp(words[0], "open") == 0) {
            close_case(&c);
            free(request);
            request = line;
            line = NULL;
            size = 0;
            memcpy(c.words, words, sizeof *words * (size_t)count);
            c.word_count = count;
            open_case(&c);
            if (c.problem) answer("{\"error\": \"%s\"}", c.problem);
            else answer("{\"flops\": %.17g}", c.arithmetic.flops_a_step * ARITHMETIC_STEPS * thread_count());
            if (c.problem) close_case(&c);
        } else if (strcmp(words[0], "time") == 0) {
            time_case(&c, count > 1 ? words[1] : NULL);
        } else if (strcmp(words[0], "traffic") == 0) {
            time_traffic(&c, count > 1 ? words[1] : NULL, count > 2 ? words[2] : NULL);
        } else if (strcmp(words[0], "close") == 0) {
            close_case(&c);
            answer("{}");
        } else {
            answer("{\"error\": \"no such request\"}");
        }
    }
    close_case(&c);
    free(request);
    free(line);
    return EXIT_OK;
}

/* ---- the command -------------------------------------------------------------------------------------------------------- */

int metalloid_cli_bench(int count, char **arguments) {
    if (count == 1 && strcmp(arguments[0], "--worker") == 0) return serve();
    if (count == 1 && strcmp(arguments[0], "--kernels") == 0) return metalloid_cli_bench_kernels();
    if (count == 1 && strcmp(arguments[0], "--kernels-cached") == 0) return metalloid_cli_bench_kernels_cached();

    const char *named = getenv("METALLOID_PYTHON"), *python = named && *named ? named : "python3";
    char self[PAGE];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length > 0) {
        self[length] = '\0';
        setenv("METALLOID_COMMAND", self, 1);
    }
    char **all = calloc((size_t)count + 4, sizeof *all);
    if (!all) return EXIT_FAILED;
    /* A package without the benchmark, or none at all, gets a line of advice instead of Python's traceback. */
    static const char start[] = "import importlib.util as i, sys\n"
                                "try: found = i.find_spec('metalloid.bench')\n"
                                "except Exception: found = None\n"
                                "if not found: sys.exit(print('metalloid bench: the Python package is missing; pip "
                                "install \".[bench]\" in a checkout, or name '\n"
                                "    'the interpreter that has it in METALLOID_PYTHON', file=sys.stderr) or 1)\n"
                                "from metalloid.bench.__main__ import main\n"
                                "sys.exit(main())";
    all[0] = (char *)python;
    all[1] = "-c";
    all[2] = (char *)start;
    memcpy(all + 3, arguments, (size_t)count * sizeof *all);
    execvp(python, all);
    fprintf(stderr,
            "metalloid bench: cannot run %s: %s; METALLOID_PYTHON names the interpreter that has the package "
            "metalloid (pip install '.[bench]' in a checkout)\n",
            python, strerror(errno));
    free(all);
    return EXIT_FAILED;
}
