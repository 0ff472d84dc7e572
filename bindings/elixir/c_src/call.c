/* SPDX-License-Identifier: MIT */
#include "call.h"

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Memory comes from malloc and not from the VM's allocator, which ends the VM where there is none. */
struct memory {
    void *pointer;
};

static ErlNifResourceType *memory_type;

static void release_memory(ErlNifEnv *env, void *object) {
    (void)env;
    free(((struct memory *)object)->pointer);
}

bool call_load(ErlNifEnv *env, bool upgrade) {
    ErlNifResourceFlags flags = upgrade ? ERL_NIF_RT_TAKEOVER | ERL_NIF_RT_CREATE : ERL_NIF_RT_CREATE;
    memory_type = enif_open_resource_type(env, NULL, "metalloid_memory", release_memory, flags, NULL);
    return memory_type != NULL;
}

struct block {
    struct block *next;
    max_align_t memory[];
};

void call_begin(call *c, ErlNifEnv *env, const char *operation) {
    c->env = env;
    c->operation = operation;
    c->blocks = NULL;
    c->input_count = c->result_count = c->option_count = 0;
    c->failed = c->bad_argument = false;
}

static void fail(call *c, bool bad_argument, const char *format, va_list arguments) {
    if (c->failed) return;
    c->failed = true;
    c->bad_argument = bad_argument;
    int start = snprintf(c->message, sizeof c->message, "%s: ", c->operation);
    vsnprintf(c->message + start, sizeof c->message - (size_t)start, format, arguments);
}

void call_refuse(call *c, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fail(c, true, format, arguments);
    va_end(arguments);
}

__attribute__((format(printf, 2, 3))) static void out_of_memory(call *c, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fail(c, false, format, arguments);
    va_end(arguments);
}

void *call_allocate(call *c, size_t bytes, const char *what) {
    if (c->failed) return NULL;
    struct block *b = bytes < SIZE_MAX - sizeof *b ? malloc(sizeof *b + bytes) : NULL;
    if (!b) {
        out_of_memory(c, "there is no memory for %s", what);
        return NULL;
    }
    b->next = c->blocks;
    c->blocks = b;
    return b->memory;
}

static ERL_NIF_TERM text(ErlNifEnv *env, const char *of) {
    size_t length = strlen(of);
    ERL_NIF_TERM term;
    memcpy(enif_make_new_binary(env, length, &term), of, length);
    return term;
}

static ERL_NIF_TERM exception(ErlNifEnv *env, bool bad_argument, const char *message) {
    ERL_NIF_TERM keys[] = {enif_make_atom(env, "__struct__"), enif_make_atom(env, "__exception__"),
                           enif_make_atom(env, "message")};
    ERL_NIF_TERM values[] = {enif_make_atom(env, bad_argument ? "Elixir.ArgumentError" : "Elixir.RuntimeError"),
                             enif_make_atom(env, "true"), text(env, message)};
    ERL_NIF_TERM map;
    enif_make_map_from_arrays(env, keys, values, 3, &map);
    return enif_raise_exception(env, map);
}

static ERL_NIF_TERM term_of(call *c, result *r) {
    return enif_make_tuple3(c->env, r->type, r->shape,
                            enif_make_resource_binary(c->env, r->memory, r->memory->pointer, r->bytes));
}

ERL_NIF_TERM call_end_term(call *c, metalloid_status status, ERL_NIF_TERM term) {
    if (c->failed) {
        term = exception(c->env, c->bad_argument, c->message);
    } else if (status != METALLOID_OK) {
        term = exception(c->env, status == METALLOID_INVALID_ARGUMENT, metalloid_last_error());
    }
    for (int i = 0; i < c->result_count; i++) enif_release_resource(c->result[i]->memory);
    for (struct block *at = c->blocks, *next; at; at = next) {
        next = at->next;
        free(at);
    }
    return term;
}

static ERL_NIF_TERM end_with_results(call *c, metalloid_status status, bool tuple_of_one) {
    ERL_NIF_TERM terms[MAX_RESULTS];
    if (c->failed || status != METALLOID_OK || c->result_count == 0) return call_end_term(c, status, 0);
    for (int i = 0; i < c->result_count; i++) terms[i] = term_of(c, c->result[i]);
    bool alone = c->result_count == 1 && !tuple_of_one;
    return call_end_term(c, status,
                         alone ? terms[0] : enif_make_tuple_from_array(c->env, terms, (unsigned)c->result_count));
}

ERL_NIF_TERM call_end(call *c, metalloid_status status) { return end_with_results(c, status, false); }

ERL_NIF_TERM call_end_tuple(call *c, metalloid_status status) { return end_with_results(c, status, true); }

/* ---- types and shapes ------------------------------------------------------------------------ */

/* Nx's name of a kind and DLPack's. */
static const struct {
    const char *name;
    uint8_t code;
    int bits[5];
} kinds[] = {
    {"f", kDLFloat, {16, 32, 64}},   {"bf", kDLBfloat, {16}},           {"s", kDLInt, {8, 16, 32, 64}},
    {"u", kDLUInt, {8, 16, 32, 64}}, {"c", METALLOID_DL_COMPLEX, {64}},
};
enum { KINDS = sizeof kinds / sizeof kinds[0] };

bool read_type(call *c, const char *name, ERL_NIF_TERM term, DLDataType *type) {
    const ERL_NIF_TERM *pair;
    int arity, bits;
    char kind[8];
    if (enif_get_tuple(c->env, term, &arity, &pair) && arity == 2 &&
        enif_get_atom(c->env, pair[0], kind, sizeof kind, ERL_NIF_LATIN1) && enif_get_int(c->env, pair[1], &bits)) {
        for (int i = 0; i < KINDS; i++) {
            if (strcmp(kind, kinds[i].name) != 0) continue;
            for (const int *known = kinds[i].bits; *known; known++) {
                if (bits != *known) continue;
                *type = (DLDataType){kinds[i].code, (uint8_t)bits, 1};
                return true;
            }
        }
    }
    char shown[64];
    enif_snprintf(shown, sizeof shown, "%T", term);
    call_refuse(c,
                "%s must have one of the types {:f, 16 | 32 | 64}, {:bf, 16}, {:s | :u, 8 | 16 | 32 | 64}, {:c, 64}, "
                "got %s",
                name, shown);
    return false;
}

/* Nx has no boolean type: what compares gives u8. */
static ERL_NIF_TERM type_term(ErlNifEnv *env, DLDataType type) {
    if (type.code == METALLOID_DL_BOOL) type.code = kDLUInt;
    int i = 0;
    while (kinds[i].code != type.code) i++;
    return enif_make_tuple2(env, enif_make_atom(env, kinds[i].name), enif_make_int(env, type.bits));
}

/* The number of bytes, -1 where it has no int64. */
static int64_t bytes_of_shape(int rank, const int64_t *shape, int64_t size) {
    int64_t bytes = size;
    for (int i = 0; i < rank; i++) {
        if (shape[i] == 0) return 0;
    }
    for (int i = 0; i < rank; i++) {
        if (__builtin_mul_overflow(bytes, shape[i], &bytes)) return -1;
    }
    return bytes;
}

int64_t elements_of(const DLTensor *t) { return bytes_of_shape(t->ndim, t->shape, 1); }

static DLTensor *set_tensor(tensor *t, void *data, DLDataType type, int rank, const int64_t *shape) {
    if (shape != t->shape) memcpy(t->shape, shape, (size_t)rank * sizeof *shape);
    t->dl = (DLTensor){.data = data, .device = {kDLCPU, 0}, .ndim = rank, .dtype = type, .shape = t->shape};
    return &t->dl;
}

/* ---- arguments ------------------------------------------------------------------------------- */

int read_shape(call *c, const char *name, ERL_NIF_TERM term, int64_t shape[MAX_RANK]) {
    const ERL_NIF_TERM *extents;
    int rank;
    if (c->failed) return -1;
    if (!enif_get_tuple(c->env, term, &rank, &extents) || rank > MAX_RANK) {
        call_refuse(c, "%s must have as its shape a tuple of at most %d extents", name, MAX_RANK);
        return -1;
    }
    for (int i = 0; i < rank; i++) {
        ErlNifSInt64 extent;
        if (!enif_get_int64(c->env, extents[i], &extent) || extent < 0) {
            char shown[64];
            enif_snprintf(shown, sizeof shown, "%T", extents[i]);
            call_refuse(c, "%s must have extents that are integers from 0 to 2^63 - 1, got %s for axis %d", name, shown,
                        i);
            return -1;
        }
        shape[i] = extent;
    }
    return rank;
}

static tensor *next_input(call *c) {
    tensor *next =
        c->input_count < OWN_INPUTS ? &c->input[c->input_count] : call_allocate(c, sizeof *next, "the arguments");
    c->input_count++;
    return next;
}

DLTensor *input(call *c, const char *name, ERL_NIF_TERM term) {
    if (c->failed) return NULL;
    const ERL_NIF_TERM *parts;
    int arity;
    ErlNifBinary binary;
    DLDataType type;
    if (!enif_get_tuple(c->env, term, &arity, &parts) || arity != 3 ||
        !enif_inspect_binary(c->env, parts[2], &binary)) {
        call_refuse(c, "%s must be a {type, shape, binary} tuple", name);
        return NULL;
    }
    if (!read_type(c, name, parts[0], &type)) return NULL;
    tensor *t = next_input(c);
    int rank = t ? read_shape(c, name, parts[1], t->shape) : -1;
    if (rank < 0) return NULL;
    int64_t size = type.bits / 8, bytes = bytes_of_shape(rank, t->shape, size);
    if (bytes < 0 || (uint64_t)bytes != binary.size) {
        char shape[128], expected[32] = "more than 2^63";
        enif_snprintf(shape, sizeof shape, "%T", parts[1]);
        if (bytes >= 0) snprintf(expected, sizeof expected, "%lld", (long long)bytes);
        call_refuse(c, "%s of shape %s must have a binary of %s bytes, got %zu", name, shape, expected, binary.size);
        return NULL;
    }
    void *data = binary.data;
    if ((uintptr_t)data % (uintptr_t)size != 0) { /* a part of another binary */
        data = call_allocate(c, binary.size, name);
        if (!data) return NULL;
        if (binary.size) memcpy(data, binary.data, binary.size);
    }
    return set_tensor(t, data, type, rank, t->shape);
}

DLTensor *scalar_input(call *c, DLDataType type, const void *value) {
    size_t bytes = type.bits / 8;
    tensor *t = next_input(c);
    void *data = t ? call_allocate(c, bytes, "a number") : NULL;
    return data ? set_tensor(t, memcpy(data, value, bytes), type, 0, t->shape) : NULL;
}

DLTensor *optional_input(call *c, const char *name, ERL_NIF_TERM term) {
    return enif_is_identical(term, enif_make_atom(c->env, "nil")) ? NULL : input(c, name, term);
}

#define NONZERO(type) \
    for (int64_t i = 0; i < elements; i++) flags[i] = ((const type *)t->data)[i] != 0

DLTensor *optional_mask(call *c, const char *name, ERL_NIF_TERM term) {
    DLTensor *t = optional_input(c, name, term);
    if (!t || (t->dtype.code != kDLInt && t->dtype.code != kDLUInt)) return t;
    if (t->dtype.bits > 8) { /* any byte but 0 is true */
        int64_t elements = elements_of(t);
        uint8_t *flags = call_allocate(c, (size_t)elements, name);
        if (!flags) return NULL;
        if (t->dtype.bits == 16) NONZERO(uint16_t);
        if (t->dtype.bits == 32) NONZERO(uint32_t);
        if (t->dtype.bits == 64) NONZERO(uint64_t);
        t->data = flags;
    }
    t->dtype = (DLDataType){METALLOID_DL_BOOL, 8, 1};
    return t;
}

double number(call *c, const char *name, ERL_NIF_TERM term) {
    double value = 0;
    ErlNifSInt64 whole;
    if (c->failed || enif_get_double(c->env, term, &value)) return value;
    if (enif_get_int64(c->env, term, &whole)) return (double)whole;
    /* Nx has atoms for what a float of the VM cannot be. */
    char shown[64];
    enif_snprintf(shown, sizeof shown, "%T", term);
    call_refuse(c, "%s must be a number, got %s", name, shown);
    return 0;
}

int64_t integer(call *c, const char *name, ERL_NIF_TERM term) {
    ErlNifSInt64 value = 0;
    if (c->failed || enif_get_int64(c->env, term, &value)) return value;
    char shown[64];
    enif_snprintf(shown, sizeof shown, "%T", term);
    call_refuse(c, "%s must be an integer of 64 bits, got %s", name, shown);
    return 0;
}

const char *string(call *c, const char *name, ERL_NIF_TERM term) {
    ErlNifBinary binary;
    if (c->failed) return NULL;
    if (!enif_inspect_binary(c->env, term, &binary) || (binary.size && memchr(binary.data, 0, binary.size))) {
        call_refuse(c, "%s must be a string without NUL", name);
        return NULL;
    }
    char *copy = call_allocate(c, binary.size + 1, name);
    if (!copy) return NULL;
    if (binary.size) memcpy(copy, binary.data, binary.size);
    copy[binary.size] = 0;
    return copy;
}

double bytes_of(ErlNifEnv *env, int argc, const ERL_NIF_TERM *argv) {
    double bytes = 0;
    for (int i = 0; i < argc; i++) {
        const ERL_NIF_TERM *parts;
        int arity;
        ErlNifBinary binary;
        if (enif_get_tuple(env, argv[i], &arity, &parts) && arity == 3 && enif_is_binary(env, parts[2]) &&
            enif_inspect_binary(env, parts[2], &binary))
            bytes += (double)binary.size;
    }
    return bytes;
}

/* ---- options --------------------------------------------------------------------------------- */

void read_options(call *c, ERL_NIF_TERM list, int count, const char *const *names) {
    ERL_NIF_TERM nil = enif_make_atom(c->env, "nil"), head;
    c->option_count = count;
    for (int i = 0; i < count; i++) c->option[i] = (option){names[i], nil};
    if (c->failed) return;
    while (enif_get_list_cell(c->env, list, &head, &list)) {
        const ERL_NIF_TERM *pair;
        int arity, found = -1;
        char key[32] = "";
        if (!enif_get_tuple(c->env, head, &arity, &pair) || arity != 2) {
            call_refuse(c, "the options must be a keyword list");
            return;
        }
        enif_get_atom(c->env, pair[0], key, sizeof key, ERL_NIF_LATIN1);
        for (int i = 0; i < count; i++) {
            if (strcmp(key, names[i]) == 0) found = i;
        }
        if (found < 0) {
            char shown[64];
            enif_snprintf(shown, sizeof shown, "%T", pair[0]);
            call_refuse(c, "there is no option %s", shown);
            return;
        }
        c->option[found].value = pair[1];
    }
    if (!enif_is_empty_list(c->env, list)) call_refuse(c, "the options must be a keyword list");
}

bool option_given(const call *c, int which) {
    return !enif_is_identical(c->option[which].value, enif_make_atom(c->env, "nil"));
}

double option_number(call *c, int which, double otherwise) {
    return option_given(c, which) ? number(c, c->option[which].name, c->option[which].value) : otherwise;
}

int64_t option_integer(call *c, int which, int64_t otherwise) {
    return option_given(c, which) ? integer(c, c->option[which].name, c->option[which].value) : otherwise;
}

int option_word(call *c, int which, int count, const char *const *words) {
    if (!option_given(c, which)) return 0;
    char word[32];
    if (enif_get_atom(c->env, c->option[which].value, word, sizeof word, ERL_NIF_LATIN1)) {
        for (int i = 0; i < count; i++) {
            if (strcmp(word, words[i]) == 0) return i;
        }
    }
    char shown[64], expected[128] = "";
    size_t length = 0;
    for (int i = 0; i < count; i++)
        length += (size_t)snprintf(expected + length, sizeof expected - length, i ? " or %s" : "%s", words[i]);
    enif_snprintf(shown, sizeof shown, "%T", c->option[which].value);
    call_refuse(c, "%s must be %s, got %s", c->option[which].name, expected, shown);
    return 0;
}

bool option_boolean(call *c, int which) {
    static const char *const words[] = {"false", "true"};
    return option_word(c, which, 2, words) == 1;
}

DLDataType option_type(call *c, int which, const DLTensor *first) {
    DLDataType type = first ? first->dtype : (DLDataType){kDLFloat, 32, 1};
    if (option_given(c, which)) read_type(c, c->option[which].name, c->option[which].value, &type);
    return type;
}

DLTensor *option_input(call *c, int which) { return optional_input(c, c->option[which].name, c->option[which].value); }

DLTensor *option_mask(call *c, int which) { return optional_mask(c, c->option[which].name, c->option[which].value); }

/* ---- results --------------------------------------------------------------------------------- */

DLTensor *new_result(call *c, const char *name, DLDataType type, int rank, const int64_t *shape) {
    if (c->failed) return NULL;
    if (c->result_count == MAX_RESULTS) {
        call_refuse(c, "there may be %d results", MAX_RESULTS);
        return NULL;
    }
    result *r =
        c->result_count < OWN_RESULTS ? &c->own_result[c->result_count] : call_allocate(c, sizeof *r, "the results");
    if (!r) return NULL;
    int64_t bytes = bytes_of_shape(rank, shape, type.bits / 8);
    void *pointer = NULL;
    if (bytes < 0 || posix_memalign(&pointer, 64, bytes ? (size_t)bytes : 1) != 0) {
        out_of_memory(c, "there is no memory for %s", name);
        return NULL;
    }
    r->memory = enif_alloc_resource(memory_type, sizeof *r->memory);
    r->memory->pointer = pointer;
    r->bytes = (size_t)bytes;
    r->type = type_term(c->env, type);
    ERL_NIF_TERM extents[MAX_RANK];
    for (int i = 0; i < rank; i++) extents[i] = enif_make_int64(c->env, shape[i]);
    r->shape = enif_make_tuple_from_array(c->env, extents, (unsigned)rank);
    c->result[c->result_count++] = r;
    return set_tensor(&r->tensor, pointer, type, rank, shape);
}

DLTensor *new_copy(call *c, const char *name, const DLTensor *source) {
    if (c->failed) return NULL;
    DLTensor *copy = new_result(c, name, source->dtype, source->ndim, source->shape);
    size_t bytes = copy ? c->result[c->result_count - 1]->bytes : 0;
    if (bytes) memcpy(copy->data, source->data, bytes);
    return copy;
}

void exchange_axes(DLTensor *of, int a, int b) {
    tensor *t = (tensor *)of; /* dl is its first member */
    if (!of->strides) {
        uint64_t stride = 1; /* of a tensor without elements it may wrap around, and is not used */
        for (int i = of->ndim - 1; i >= 0; i--) {
            t->strides[i] = (int64_t)stride;
            stride *= (uint64_t)t->shape[i];
        }
        of->strides = t->strides;
    }
    int64_t extent = t->shape[a], stride = t->strides[a];
    t->shape[a] = t->shape[b];
    t->strides[a] = t->strides[b];
    t->shape[b] = extent;
    t->strides[b] = stride;
}
