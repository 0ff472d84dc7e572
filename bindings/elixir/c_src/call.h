/* What one call of a NIF holds: the tensors that its terms stand for, its results, and what went wrong.
 * SPDX-License-Identifier: MIT
 *
 * A tensor is the term {Type, Shape, Binary}: Nx's type ({:f, 32}, {:bf, 16}, {:s, 64}, ...), a tuple of extents, and
 * the elements in row-major order. Inputs are read where they lie; only a binary that is not aligned to its elements is
 * copied first. A result is a binary over memory that the library wrote, owned by a resource, so it is not copied
 * either.
 *
 * The first thing that goes wrong is kept, and what follows does nothing: a NIF reads its arguments one after the other
 * and asks `failed` once, before it calls the library. */
#ifndef METALLOID_ELIXIR_CALL_H
#define METALLOID_ELIXIR_CALL_H

#include <erl_nif.h>
#include <metalloid/metalloid.h>
#include <stdbool.h>

/* MAX_RANK and MAX_RESULTS (of a custom kernel) are the library's; OWN: as many as need no allocation. */
enum { OWN_INPUTS = 10, OWN_RESULTS = 3, MAX_RESULTS = 64, MAX_OPTIONS = 12, MAX_RANK = 64 };

typedef struct tensor {
    DLTensor dl;
    int64_t shape[MAX_RANK], strides[MAX_RANK];
} tensor;

typedef struct result {
    tensor tensor;
    ERL_NIF_TERM type, shape; /* as the caller will see them */
    struct memory *memory;
    size_t bytes;
} result;

typedef struct option {
    const char *name;
    ERL_NIF_TERM value; /* nil where it is not given */
} option;

typedef struct call {
    ErlNifEnv *env;
    const char *operation;
    int input_count, result_count, option_count;
    tensor input[OWN_INPUTS];
    result own_result[OWN_RESULTS], *result[MAX_RESULTS];
    struct block *blocks; /* what call_allocate gave */
    option option[MAX_OPTIONS];
    bool failed, bad_argument; /* bad_argument: ArgumentError, else RuntimeError */
    char message[512];
} call;

bool call_load(ErlNifEnv *env, bool upgrade);

void call_begin(call *c, ErlNifEnv *env, const char *operation);
/* The result, a tuple of the results where there are several, or the exception; frees what the call holds. */
ERL_NIF_TERM call_end(call *c, metalloid_status status);
/* The same, a tuple even of one result. */
ERL_NIF_TERM call_end_tuple(call *c, metalloid_status status);
/* The same with a term that needs nothing of what the call holds. */
ERL_NIF_TERM call_end_term(call *c, metalloid_status status, ERL_NIF_TERM term);

/* Memory until the end of the call, aligned for anything; NULL, and the call has failed, where there is none. */
void *call_allocate(call *c, size_t bytes, const char *what);

__attribute__((format(printf, 2, 3))) void call_refuse(call *c, const char *format, ...);

/* ---- arguments ------------------------------------------------------------------------------- */

/* NULL once the call has failed, and where an optional one is nil. */
DLTensor *input(call *c, const char *name, ERL_NIF_TERM term);
DLTensor *optional_input(call *c, const char *name, ERL_NIF_TERM term);
/* An integer tensor as one of bool: in Elixir an integer mask hides where it is 0. Copied where an element is wider
 * than a byte. */
DLTensor *optional_mask(call *c, const char *name, ERL_NIF_TERM term);

int64_t elements_of(const DLTensor *input);

double number(call *c, const char *name, ERL_NIF_TERM term); /* an integer or a float */
int64_t integer(call *c, const char *name, ERL_NIF_TERM term);
/* A binary without NUL, with a NUL behind it, until the end of the call; NULL once the call has failed. */
const char *string(call *c, const char *name, ERL_NIF_TERM term);
bool read_type(call *c, const char *name, ERL_NIF_TERM term, DLDataType *type);
/* The extents of a tuple; -1 once the call has failed, else the rank. */
int read_shape(call *c, const char *name, ERL_NIF_TERM term, int64_t shape[MAX_RANK]);
/* A tensor of rank 0 with the bytes of `value`. */
DLTensor *scalar_input(call *c, DLDataType type, const void *value);

/* Bytes of the tensors among these terms, from which follows whether a call is short. */
double bytes_of(ErlNifEnv *env, int argc, const ERL_NIF_TERM *argv);

/* ---- options: a keyword list; nil is as good as absent --------------------------------------- */

void read_options(call *c, ERL_NIF_TERM list, int count, const char *const *names);
bool option_given(const call *c, int which);
double option_number(call *c, int which, double otherwise);
int64_t option_integer(call *c, int which, int64_t otherwise);
bool option_boolean(call *c, int which);
/* The number of the option's atom among `words`, 0 where it is not given. */
int option_word(call *c, int which, int count, const char *const *words);
/* The option's type, or that of `first`. */
DLDataType option_type(call *c, int which, const DLTensor *first);
DLTensor *option_input(call *c, int which);
DLTensor *option_mask(call *c, int which);

/* ---- results --------------------------------------------------------------------------------- */

DLTensor *new_result(call *c, const char *name, DLDataType type, int rank, const int64_t *shape);
/* A result that begins as a copy of `source`. */
DLTensor *new_copy(call *c, const char *name, const DLTensor *source);
/* Exchanges two axes of a tensor of the call, for the library alone: Elixir sees the shape that it had. */
void exchange_axes(DLTensor *of, int a, int b);

#endif
