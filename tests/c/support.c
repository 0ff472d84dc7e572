/* What the C tests share. SPDX-License-Identifier: MIT */
#include "support.h"

#include <ctype.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/context.h"
#include "cpu/kernels.h"

#if defined(__SANITIZE_ADDRESS__)
#define WITH_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define WITH_ASAN 1
#endif
#endif
#ifdef WITH_ASAN
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)   ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

enum { GUARD = 256, GUARD_BYTE = 0xA5 };

/* ---- random numbers and the amount of work -------------------------------------------------------------------------- */

static uint64_t random_state;

void seed(uint64_t value) { random_state = value; }

uint64_t random_bits(void) { /* splitmix64 */
    uint64_t z = random_state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

int64_t random_int(int64_t low, int64_t high) {
    uint64_t choices = (uint64_t)high - (uint64_t)low + 1;
    return (int64_t)((uint64_t)low + (choices ? random_bits() % choices : random_bits()));
}

bool one_in(int n) { return random_int(1, n) == 1; }

double random_uniform(double low, double high) { return low + (high - low) * (double)(random_bits() >> 11) * 0x1p-53; }

double random_normal(void) {
    double radius = sqrt(-2 * log(1 - random_uniform(0, 1)));
    return radius * cos(6.283185307179586 * random_uniform(0, 1));
}

int scaled(int count) {
    const char *text = getenv("METALLOID_TEST_SCALE");
    double scale = text ? strtod(text, NULL) : 1;
    int result = (int)(count * (scale > 0 ? scale : 1));
    return result > 1 ? result : 1;
}

void report(const char *what, int count) { print_message("             %d %s\n", count, what); }

static char situation[512] = "";

void describe(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(situation, sizeof situation, format, arguments);
    va_end(arguments);
}

/* ---- element types -------------------------------------------------------------------------------------------------- */

/* Significant bits, smallest and largest exponent of a normal number. */
static const struct {
    int precision, least, most;
} format_of[] = {[F32] = {24, -126, 127}, [F16] = {11, -14, 15}, [BF16] = {8, -126, 127}, [F64] = {53, -1022, 1023}};

int64_t dtype_size(element_type type) {
    static const int64_t size[DTYPES] = {4, 2, 2, 8, 1, 1, 2, 4, 8, 1, 2, 4, 8};
    return size[type];
}

const char *dtype_name(element_type type) {
    static const char *const name[DTYPES] = {"float32", "float16", "bfloat16", "float64", "bool",   "int8",  "int16",
                                             "int32",   "int64",   "uint8",    "uint16",  "uint32", "uint64"};
    return name[type];
}

DLDataType dtype_code(element_type type) {
    static const uint8_t code[DTYPES] = {kDLFloat, kDLFloat, kDLBfloat, kDLFloat, METALLOID_DL_BOOL, kDLInt, kDLInt,
                                         kDLInt,   kDLInt,   kDLUInt,   kDLUInt,  kDLUInt,           kDLUInt};
    return (DLDataType){code[type], (uint8_t)(8 * dtype_size(type)), 1};
}

element_type random_floating(void) {
    static const element_type choice[] = {F32, F32, F16, BF16, F64};
    return choice[random_int(0, 4)];
}

element_type random_float_below_64(void) {
    static const element_type choice[] = {F32, F16, BF16};
    return choice[random_int(0, 2)];
}

element_type random_integer(void) { return (element_type)random_int(I8, U64); }

static int exponent_of(element_type type, double value) {
    int exponent = value == 0 ? format_of[type].least : ilogb(value);
    return exponent > format_of[type].least ? exponent : format_of[type].least;
}

double nearest(element_type type, double value) {
    if (type == F64 || isnan(value) || isinf(value) || value == 0) return value;
    int last_place = exponent_of(type, value) - (format_of[type].precision - 1);
    double rounded = ldexp(nearbyint(ldexp(value, -last_place)), last_place);
    return fabs(rounded) >= ldexp(1, format_of[type].most + 1) ? copysign(INFINITY, value) : rounded;
}

double half_ulp(element_type type, double value) {
    if (isnan(value) || isinf(value)) return 0;
    return ldexp(0.5, exponent_of(type, value) - (format_of[type].precision - 1));
}

uint16_t encode_16(element_type type, double value) {
    int fraction_bits = format_of[type].precision - 1;
    uint32_t sign = signbit(value) ? 0x8000 : 0, infinity = (uint32_t)((1 << (15 - fraction_bits)) - 1)
                                                            << fraction_bits;
    double rounded = fabs(nearest(type, value));
    if (isnan(value)) return (uint16_t)(sign | infinity | 1u << (fraction_bits - 1));
    if (isinf(rounded)) return (uint16_t)(sign | infinity);
    int exponent = exponent_of(type, rounded);
    uint32_t significand = (uint32_t)ldexp(rounded, fraction_bits - exponent);
    /* A subnormal's exponent field is 0, as its significand lacks the leading bit that the addition would carry into it. */
    return (uint16_t)(sign | (((uint32_t)(exponent - format_of[type].least) << fraction_bits) + significand));
}

double decode_16(element_type type, uint16_t bits) {
    int fraction_bits = format_of[type].precision - 1;
    int fraction = bits & ((1 << fraction_bits) - 1), field = (bits & 0x7fff) >> fraction_bits;
    double magnitude;
    if (field == (1 << (15 - fraction_bits)) - 1) {
        magnitude = fraction ? (double)NAN : (double)INFINITY;
    } else if (field == 0) {
        magnitude = ldexp(fraction, format_of[type].least - fraction_bits);
    } else {
        magnitude = ldexp(fraction + (1 << fraction_bits), format_of[type].least - fraction_bits + field - 1);
    }
    return bits & 0x8000 ? -magnitude : magnitude;
}

static double load(const char *from, element_type type) {
    union {
        float f32;
        double f64;
        uint16_t u16;
        int8_t i8;
        int16_t i16;
        int32_t i32;
        int64_t i64;
        uint8_t u8;
        uint32_t u32;
        uint64_t u64;
    } u;
    memcpy(&u, from, (size_t)dtype_size(type));
    switch (type) {
    case F32: return (double)u.f32;
    case F64: return u.f64;
    case F16:
    case BF16: return decode_16(type, u.u16);
    case I8: return u.i8;
    case I16: return u.i16;
    case I32: return u.i32;
    case I64: return (double)u.i64;
    case U16: return u.u16;
    case U32: return u.u32;
    case U64: return (double)u.u64;
    default: return u.u8;
    }
}

static void store(char *to, element_type type, double value) {
    float f32 = 0;
    uint16_t u16 = 0;
    int64_t integer = 0;
    uint64_t u64 = 0;
    const void *from = &integer; /* the low bytes of a little-endian integer are the narrower integer */
    switch (type) {
    case F32:
        f32 = (float)value;
        from = &f32;
        break;
    case F64: from = &value; break;
    case F16:
    case BF16:
        u16 = encode_16(type, value);
        from = &u16;
        break;
    case U64:
        u64 = (uint64_t)value;
        from = &u64;
        break;
    default: integer = (int64_t)value; break;
    }
    memcpy(to, from, (size_t)dtype_size(type));
}

/* ---- tensors -------------------------------------------------------------------------------------------------------- */

static tensor *tensors;

typedef struct chunk {
    struct chunk *next;
    double values[];
} chunk;

static chunk *chunks;

enum { MOST_CONTEXTS = 64 };
static metalloid_context *contexts[MOST_CONTEXTS];
static int context_count;

static void *need(void *memory) {
    if (!memory) fail_msg("the test itself is out of memory");
    return memory;
}

double *new_doubles(int64_t count) {
    chunk *made = need(calloc(1, sizeof *made + (size_t)(count > 0 ? count : 1) * sizeof(double)));
    made->next = chunks;
    chunks = made;
    return made->values;
}

static void poison_guards(tensor *t, bool on) {
    size_t inside = (size_t)(t->bytes - 2 * GUARD);
    if (on) {
        ASAN_POISON_MEMORY_REGION(t->block, GUARD);
        ASAN_POISON_MEMORY_REGION(t->block + GUARD + inside, GUARD);
    } else {
        ASAN_UNPOISON_MEMORY_REGION(t->block, t->bytes);
    }
}

void release_all(void) {
    while (tensors) {
        tensor *t = tensors;
        tensors = t->next;
        poison_guards(t, false);
        free(t->block);
        free(t->before);
        free(t);
    }
    while (chunks) {
        chunk *c = chunks;
        chunks = c->next;
        free(c);
    }
    while (context_count) metalloid_context_destroy(contexts[--context_count]);
}

static void lay_out(tensor *t, layout how) {
    int order[MAX_RANK]; /* axes from the innermost in memory */
    for (int i = 0; i < t->rank; i++) order[i] = t->rank - 1 - i;
    if (how != CONTIGUOUS) {
        int first = how == ROWS ? 1 : 0;
        for (int i = t->rank - 1; i > first; i--) {
            int j = (int)random_int(first, i), swapped = order[i];
            order[i] = order[j];
            order[j] = swapped;
        }
    }
    int64_t reach = 1;
    for (int i = 0; i < t->rank; i++) {
        int axis = order[i];
        bool plain = how == CONTIGUOUS || (how == ROWS && i == 0);
        if (!plain && one_in(2)) reach += random_int(0, 5);
        t->stride[axis] = reach;
        reach *= t->shape[axis] > 0 ? t->shape[axis] : 1;
        if (!plain && one_in(3)) t->stride[axis] = -t->stride[axis];
    }
}

const tensor *tensor_of(const DLTensor *given) {
    const tensor *t = tensors;
    while (t && &t->dl != given) t = t->next;
    return t;
}

tensor *new_tensor(element_type type, layout how, int rank, const int64_t *shape) {
    tensor *t = need(calloc(1, sizeof *t));
    t->type = type;
    t->rank = rank;
    t->elements = 1;
    for (int axis = 0; axis < rank; axis++) {
        t->shape[axis] = shape[axis];
        t->elements *= shape[axis];
    }
    bool broadcast = how == INPUT && one_in(4);
    if (how == INPUT || how == OUTPUT) how = (layout)random_int(CONTIGUOUS, ROWS);
    lay_out(t, how);
    for (int axis = 0; axis < rank && broadcast; axis++) {
        if (one_in(2)) t->stride[axis] = 0;
    }

    int64_t low = 0, high = 0, size = dtype_size(type);
    for (int axis = 0; axis < rank; axis++) {
        int64_t reach = t->stride[axis] * (t->shape[axis] > 0 ? t->shape[axis] - 1 : 0);
        *(reach < 0 ? &low : &high) += reach;
    }
    /* Aligned to no more than the element, at random. */
    int64_t shift = one_in(2) ? size * random_int(0, 7) : 0;
    t->bytes = (size_t)(2 * GUARD + shift + (t->elements ? (high - low + 1) * size : 0));
    t->block = need(aligned_alloc(64, (t->bytes + 63) / 64 * 64));
    t->before = need(malloc(t->bytes));
    memset(t->block, GUARD_BYTE, t->bytes);
    t->first = t->block + GUARD + shift - low * size;

    t->dl.device = (DLDevice){one_in(4) ? kDLCUDAHost : kDLCPU, 0};
    t->dl.dtype = dtype_code(type);
    t->dl.ndim = rank;
    t->dl.shape = rank > 0 || one_in(2) ? t->shape : NULL;
    t->dl.strides = how == CONTIGUOUS && !broadcast && one_in(2) ? NULL : t->stride;
    if (t->elements == 0 && one_in(2)) {
        t->dl.data = NULL;
    } else if (one_in(2)) {
        t->dl.data = t->block;
        t->dl.byte_offset = (uint64_t)(t->first - t->block);
    } else {
        t->dl.data = t->first;
    }
    t->next = tensors;
    tensors = t;
    return t;
}

tensor *new_output(element_type type, layout how, int rank, const int64_t *shape) {
    tensor *t = new_tensor(type, how, rank, shape);
    t->output = true;
    return t;
}

tensor *new_normal(element_type type, layout how, int rank, const int64_t *shape) {
    tensor *t = new_tensor(type, how, rank, shape);
    fill_normal(t, 0, 1);
    return t;
}

void random_shape(int64_t *shape, int rank, int64_t most) {
    for (int axis = 0; axis < rank; axis++) shape[axis] = random_int(1, most);
}

bool writable(const tensor *t) {
    for (int axis = 0; axis < t->rank; axis++) {
        if (t->stride[axis] == 0 && t->shape[axis] > 1) return false;
    }
    return true;
}

char *element(const tensor *t, int64_t index) {
    int64_t offset = 0;
    for (int axis = t->rank - 1; axis >= 0; axis--) {
        offset += index % t->shape[axis] * t->stride[axis];
        index /= t->shape[axis];
    }
    return t->first + offset * dtype_size(t->type);
}

double get(const tensor *t, int64_t index) { return load(element(t, index), t->type); }

void set(tensor *t, int64_t index, double value) { store(element(t, index), t->type, value); }

double *values(const tensor *t) {
    double *all = new_doubles(t->elements);
    for (int64_t i = 0; i < t->elements; i++) all[i] = get(t, i);
    return all;
}

void fill(tensor *t, double value) {
    for (int64_t i = 0; i < t->elements; i++) set(t, i, value);
}

void fill_normal(tensor *t, double mean, double deviation) {
    for (int64_t i = 0; i < t->elements; i++) set(t, i, mean + deviation * random_normal());
}

void fill_uniform(tensor *t, double low, double high) {
    for (int64_t i = 0; i < t->elements; i++) set(t, i, random_uniform(low, high));
}

void fill_integers(tensor *t, int64_t low, int64_t high) {
    for (int64_t i = 0; i < t->elements; i++) set(t, i, (double)random_int(low, high));
}

metalloid_context *random_context(void) {
    if (one_in(3) || context_count == MOST_CONTEXTS) return NULL;
    metalloid_context *context;
    expect_ok(metalloid_context_create(&context));
    contexts[context_count++] = context;
    expect_ok(metalloid_context_set_threads(context, (int)random_int(1, 4)));
    const mtl_cpu_isa *const *isas;
    int count = mtl_cpu_isas(&isas);
    context->isa = isas[random_int(0, count - 1)];
    return context;
}

/* ---- what a call may and must do ------------------------------------------------------------------------------------- */

void snapshot(void) {
    for (tensor *t = tensors; t; t = t->next) {
        poison_guards(t, false);
        memcpy(t->before, t->block, t->bytes);
        t->has_before = true;
        poison_guards(t, true);
    }
}

static void expect_unchanged(const tensor *t, const char *before) {
    for (size_t i = 0; i < t->bytes; i++) {
        if (t->block[i] == before[i]) continue;
        fail_msg("%s: byte %lld of an %s of %lld elements of %s was written", situation,
                 (long long)(t->block + i - t->first), t->output ? "output (outside its elements)" : "input",
                 (long long)t->elements, dtype_name(t->type));
    }
}

void expect_nothing_written(void) {
    for (tensor *t = tensors; t; t = t->next) {
        poison_guards(t, false);
        expect_unchanged(t, t->before);
    }
}

void expect_only_outputs_written(void) {
    for (tensor *t = tensors; t; t = t->next) {
        poison_guards(t, false);
        if (!t->output) {
            expect_unchanged(t, t->before);
            continue;
        }
        char *expected = need(malloc(t->bytes));
        memcpy(expected, t->before, t->bytes);
        size_t size = (size_t)dtype_size(t->type);
        for (int64_t i = 0; i < t->elements; i++) {
            char *at = element(t, i);
            memcpy(expected + (at - t->block), at, size);
        }
        bool same = memcmp(expected, t->block, t->bytes) == 0;
        if (!same) expect_unchanged(t, expected);
        free(expected);
    }
}

/* Whether one of the instruction sets that random contexts take multiplies pairs of bfloat16. */
static bool multiplies_pairs(void) {
    const mtl_cpu_isa *const *isas;
    int count = mtl_cpu_isas(&isas);
    return strstr(isas[count - 1]->name, "_bf16") != NULL;
}

/* operations.md, section 4. 16-bit results are float32 results rounded once: half a unit in the last place beside float32's bound, which
 * is within the unit that norms, rope and the gated activations may lose and within twice the rounding that attention may. A row with
 * |mean| > 100 deviations has section 3's bound. */
double tolerance(accuracy of, element_type type, double reference, double m) {
    static const struct {
        double in_float, in_double;
    } relative[ACCURACIES] = {
        [NORM] = {2e-6, 1e-13},      [ROPE] = {2e-6, 1e-13},          [GATED] = {2e-6, 1e-13},
        [ATTENTION] = {1e-5, 1e-12}, [CROSS_ENTROPY] = {1e-5, 1e-13}, [GATED_DELTA] = {1e-4, 1e-13},
        [LARGE_MEAN] = {1e-3, 1e-10}};
    double allowed = (type == F64 ? relative[of].in_double : relative[of].in_float) * (fabs(reference) + m);
    /* Weights rounded to bfloat16 are off by 2^-9; the contract would allow 2e-2. */
    if (of == ATTENTION && type == BF16 && multiplies_pairs()) allowed = 0x1p-8 * (fabs(reference) + m);
    if (type == F16 || type == BF16) allowed += half_ulp(type, fabs(reference) + allowed);
    return allowed + (type == F64 ? DBL_MIN : (double)FLT_MIN); /* smaller results may be flushed to zero */
}

static bool acceptable(accuracy of, element_type type, double out, double reference, double m, double slack) {
    if (isnan(reference)) return isnan(out);
    double rounded = nearest(type, reference);
    if (out == rounded) return true;
    if (isnan(out) || isinf(reference)) return false;
    double allowed = tolerance(of, type, reference, m) + slack;
    if (isinf(rounded) || isinf(out)) { /* at the edge of the range either side of it will do */
        double edge = ldexp(1, format_of[type].most + 1);
        return fabs(reference) + allowed >= edge * (1 - ldexp(1, -format_of[type].precision)) &&
               signbit(out) == signbit(reference) &&
               fabs(out) + allowed >= edge * (1 - ldexp(1, 1 - format_of[type].precision));
    }
    return fabs(out - reference) <= allowed;
}

void expect_close_with_slack(const char *what, accuracy of, const tensor *out, const double *reference, const double *m,
                             int64_t span, const double *slack) {
    double *bound = new_doubles(out->elements);
    for (int64_t i = 0; i < out->elements; i++)
        bound[i] = tolerance(of, out->type, reference[i], m[i / span]) + (slack ? slack[i] : 0);
    record_output(out, reference, bound);
    for (int64_t i = 0; i < out->elements; i++) {
        double got = get(out, i), extra = slack ? slack[i] : 0;
        if (acceptable(of, out->type, got, reference[i], m[i / span], extra)) continue;
        fail_msg("%s: %s (%s): element %lld is %.17g instead of %.17g, off by %.3g, allowed %.3g", situation, what,
                 dtype_name(out->type), (long long)i, got, reference[i], fabs(got - reference[i]),
                 tolerance(of, out->type, reference[i], m[i / span]) + extra);
    }
}

void expect_close(const char *what, accuracy of, const tensor *out, const double *reference, const double *m,
                  int64_t span) {
    expect_close_with_slack(what, of, out, reference, m, span, NULL);
}

double largest(const double *value, int64_t count) {
    double most = 0;
    for (int64_t i = 0; i < count; i++) {
        if (isfinite(value[i]) && fabs(value[i]) > most) most = fabs(value[i]);
    }
    return most;
}

void expect_close_by_row(const char *what, accuracy of, const tensor *out, const double *reference, int64_t span) {
    if (out->elements == 0) return;
    int64_t rows = out->elements / span;
    double *m = new_doubles(rows);
    for (int64_t row = 0; row < rows; row++) m[row] = largest(reference + row * span, span);
    expect_close(what, of, out, reference, m, span);
}

void expect_ok_at(metalloid_status status, const char *file, int line) {
    if (status == METALLOID_OK) return;
    print_error("%s:%d: %s: %s (%s)\n", file, line, situation, metalloid_status_string(status), metalloid_last_error());
    fail();
}

/* ---- bad arguments --------------------------------------------------------------------------------------------------- */

int takes(operation *op, const char *name, tensor *t, unsigned flags) {
    int i = op->count++;
    assert_true(i < MAX_ARGUMENTS);
    op->argument[i].name = name;
    op->argument[i].tensor = t;
    op->argument[i].flags = flags;
    op->argument[i].free_axes = 0;
    op->argument[i].may_be_input = 0;
    op->given[i] = dl(t);
    if (t && flags & WRITTEN) t->output = true;
    return i;
}

static bool is_word(char c) { return isalnum((unsigned char)c) || c == '_'; }

/* As a whole word behind the operation's name. */
static bool names(const char *message, const char *word) {
    size_t length = strlen(word);
    for (const char *at = strchr(message, ':'); at && (at = strstr(at, word)); at++) {
        if (!is_word(at[-1]) && !is_word(at[length])) return true;
    }
    return false;
}

void expect_status(const operation *op, metalloid_status status, const char *argument, const char *what) {
    describe("%s with %s (%s)", op->name, what, argument ? argument : "any argument");
    snapshot();
    metalloid_status got = op->call(op);
    expect_nothing_written();
    const char *message = metalloid_last_error();
    if (got != status) {
        fail_msg("%s: %s instead of %s; last message: %s", situation, metalloid_status_string(got),
                 metalloid_status_string(status), message);
    }
    size_t length = strlen(op->name);
    if (strncmp(message, op->name, length) != 0 || strncmp(message + length, ": ", 2) != 0 ||
        strpbrk(message, "\r\n")) {
        fail_msg("%s: the message is not one line that starts with the operation: %s", situation, message);
    }
    bool named = argument && names(message, argument);
    for (int i = 0; i < op->count && !argument && !named; i++) named = names(message, op->argument[i].name);
    if (!named) fail_msg("%s: the message does not name the argument: %s", situation, message);
}

/* A tensor argument that can be spoilt: a copy whose shape and strides are its own. */
typedef struct spoilt {
    operation op;
    DLTensor dl;
    int64_t shape[80], stride[80];
} spoilt;

static void spoil(spoilt *s, const operation *op, int i) {
    const tensor *t = op->argument[i].tensor;
    s->op = *op;
    s->dl = t->dl;
    for (int axis = 0; axis < 80; axis++) {
        s->shape[axis] = axis < t->rank ? t->shape[axis] : 1;
        s->stride[axis] = axis < t->rank ? t->stride[axis] : 0;
    }
    s->dl.shape = s->shape;
    s->dl.strides = s->stride;
    s->op.given[i] = &s->dl;
}

#define REFUSED_WITH(status, op, i, name, what, ...) \
    do {                                             \
        spoilt s;                                    \
        spoil(&s, op, i);                            \
        __VA_ARGS__;                                 \
        expect_status(&s.op, status, name, what);    \
        refused++;                                   \
    } while (0)
#define REFUSED(name, what, ...) REFUSED_WITH(METALLOID_INVALID_ARGUMENT, op, i, name, what, __VA_ARGS__)

static int refuse_dtypes(const operation *op, int i) {
    int refused = 0;
    const char *name = op->argument[i].name;
    unsigned flags = op->argument[i].flags;
    REFUSED(name, "two lanes", s.dl.dtype.lanes = 2);
    REFUSED(name, "no lanes", s.dl.dtype.lanes = 0);
    REFUSED(name, "4-bit integers", s.dl.dtype = ((DLDataType){kDLInt, 4, 1}));
    REFUSED(name, "128-bit integers", s.dl.dtype = ((DLDataType){kDLUInt, 128, 1}));
    REFUSED(name, "float8", s.dl.dtype = ((DLDataType){kDLFloat, 8, 1}));
    REFUSED(name, "bfloat of 32 bits", s.dl.dtype = ((DLDataType){kDLBfloat, 32, 1}));
    REFUSED(name, "complex numbers", s.dl.dtype = ((DLDataType){kDLComplex, 64, 1}));
    REFUSED(name, "opaque handles", s.dl.dtype = ((DLDataType){kDLOpaqueHandle, 64, 1}));
    REFUSED(name, "an unknown type code", s.dl.dtype = ((DLDataType){200, 32, 1}));
    for (int type = 0; type < DTYPES; type++) {
        unsigned kind = type <= F64 ? TAKES_FLOATING : type == BOOL ? TAKES_BOOL : TAKES_INTEGER;
        if (flags & kind) continue;
        REFUSED(name, dtype_name((element_type)type), s.dl.dtype = dtype_code((element_type)type));
    }
    return refused;
}

static int refuse_shapes(const operation *op, int i) {
    int refused = 0;
    const tensor *t = op->argument[i].tensor;
    const char *name = op->argument[i].name;
    const int64_t huge = (int64_t)1 << 62;
    REFUSED(name, "rank -1", s.dl.ndim = -1);
    REFUSED(name, "rank 65", s.dl.ndim = 65);
    REFUSED(name, "the largest rank", s.dl.ndim = INT32_MAX);
    if (t->rank == 0) return refused;
    REFUSED(name, "a NULL shape", s.dl.shape = NULL);
    for (int axis = 0; axis < t->rank; axis++) {
        REFUSED(name, "a negative extent", s.shape[axis] = -1);
        REFUSED(name, "the most negative extent", s.shape[axis] = INT64_MIN);
        REFUSED(NULL, "an extent of 2^62", s.shape[axis] = huge; s.stride[axis] = 1);
        if (!(op->argument[i].free_axes >> axis & 1)) {
            REFUSED(NULL, "an extent one too large", s.shape[axis]++;
                    s.stride[axis] = op->argument[i].flags & WRITTEN ? s.stride[axis] : 0);
        }
        if (t->shape[axis] > 1) {
            if (dtype_size(t->type) > 1) REFUSED(name, "a stride of 2^62", s.stride[axis] = huge);
            REFUSED(name, "the most negative stride", s.stride[axis] = INT64_MIN);
        }
    }
    if (dtype_size(t->type) > 1 || t->rank > 1) {
        REFUSED(name, "every extent 2^62", s.dl.strides = NULL;
                for (int axis = 0; axis < t->rank; axis++) s.shape[axis] = huge);
    }
    REFUSED(NULL, "a rank more", s.dl.ndim++);
    if (!(op->argument[i].flags & RANK_MAY_DROP)) REFUSED(NULL, "a rank less", s.dl.ndim--);
    return refused;
}

static int refuse_places(const operation *op, int i) {
    int refused = 0;
    const tensor *t = op->argument[i].tensor;
    const char *name = op->argument[i].name;
    REFUSED(name, "NULL data", s.dl.data = NULL; s.dl.byte_offset = 0);
    REFUSED(name, "a byte_offset of 2^63", s.dl.byte_offset = (uint64_t)1 << 63);
    REFUSED(name, "a byte_offset of nearly 2^64", s.dl.byte_offset = UINT64_MAX & ~(uint64_t)7);
    if (dtype_size(t->type) > 1) {
        REFUSED(name, "misaligned data", s.dl.data = (char *)s.dl.data + 1);
        REFUSED(name, "a misaligned byte_offset", s.dl.byte_offset++);
    }
    int others = 0;
    for (int other = 0; other < op->count; other++) others += op->given[other] != NULL;
    if (others > 1) REFUSED(name, "another device", s.dl.device = ((DLDevice){kDLCUDA, 0}));
    return refused;
}

static int refuse_overlaps(const operation *op, int i) {
    int refused = 0;
    const tensor *t = op->argument[i].tensor;
    const char *name = op->argument[i].name;
    for (int axis = 0; axis < t->rank; axis++) {
        if (t->shape[axis] > 1) REFUSED(name, "elements that share a place", s.stride[axis] = 0);
    }
    for (int other = 0; other < op->count; other++) {
        const tensor *u = op->argument[other].tensor;
        if (other == i || !u) continue;
        REFUSED(name, "a last element on another argument's first", {
            s.dl.data = u->first - (element(t, t->elements - 1) - t->first);
            uintptr_t odd = (uintptr_t)s.dl.data % (uintptr_t)dtype_size(t->type);
            s.dl.data = (char *)s.dl.data - odd;
            s.dl.byte_offset = 0;
        });
        if (t->elements > 1 && u->elements > 1) {
            REFUSED(name, "a first element on another argument's last", {
                s.dl.data = element(u, u->elements - 1);
                uintptr_t odd = (uintptr_t)s.dl.data % (uintptr_t)dtype_size(t->type);
                s.dl.data = (char *)s.dl.data - odd;
                s.dl.byte_offset = 0;
            });
        }
        bool alike = u->type == t->type && u->rank == t->rank && memcmp(u->shape, t->shape, sizeof u->shape) == 0;
        if (alike && !(op->argument[i].may_be_input >> other & 1)) {
            REFUSED(name, "another argument's place", s.dl.data = u->first; s.dl.byte_offset = 0;
                    memcpy(s.stride, u->stride, sizeof u->stride));
        }
    }
    return refused;
}

int expect_bad_tensors_refused(const operation *op) {
    int refused = 0;
    describe("%s as it should be", op->name);
    expect_ok(op->call(op));
    for (int i = 0; i < op->count; i++) {
        if (!op->given[i]) continue;
        if (op->argument[i].flags & REQUIRED) {
            operation without = *op;
            without.given[i] = NULL;
            expect_refused(&without, op->argument[i].name, "NULL");
            refused++;
        }
        refused += refuse_dtypes(op, i);
        refused += refuse_shapes(op, i);
        refused += refuse_places(op, i);
        if (op->argument[i].flags & WRITTEN) refused += refuse_overlaps(op, i);
    }
    operation elsewhere = *op;
    DLTensor on_cuda[MAX_ARGUMENTS];
    for (int i = 0; i < op->count; i++) {
        if (!op->given[i]) continue;
        on_cuda[i] = *op->given[i];
        on_cuda[i].device = (DLDevice){one_in(2) ? kDLCUDA : kDLCUDAManaged, 0};
        elsewhere.given[i] = &on_cuda[i];
    }
    expect_status(&elsewhere, METALLOID_UNSUPPORTED, NULL, "all tensors on a GPU");
    return refused + 1;
}
