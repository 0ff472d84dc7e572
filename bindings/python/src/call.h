/* One call of a function: its arguments, its arrays, its results. SPDX-License-Identifier: MIT
 *
 * The first argument that is refused makes the call fail: an exception is set, and every later step does nothing, so that a
 * function reads its arguments one after the other and asks once. */
#ifndef METALLOID_PYTHON_CALL_H
#define METALLOID_PYTHON_CALL_H

#include "array.h"

enum {
    MAX_PARAMETERS = 16,
    MAX_ARRAYS = 10,
    /* A call of fewer elements takes a few microseconds and keeps the GIL: letting it go and asking for it costs up to one. */
    ELEMENTS_WORTH_RELEASING_THE_GIL = 1 << 14,
};

typedef struct mtl_signature {
    const char *name;
    int positional; /* the first so many may be given by position, the others are keyword-only */
    int required;   /* the first so many have no default */
    const char *parameters[MAX_PARAMETERS + 1];
} mtl_signature;

typedef struct mtl_call {
    module_state *state;
    const mtl_signature *signature;
    PyObject *given[MAX_PARAMETERS]; /* borrowed; NULL where not given */
    bool failed;
    int arrays, results;
    int64_t elements;           /* of all arrays */
    metalloid_context *context; /* with the stream of the first CUDA array; NULL on the CPU */
    PyObject *result[2];
    bool allocated[2]; /* or given by the caller */
    mtl_array array[MAX_ARRAYS];
} mtl_call;

void call_begin(mtl_call *call, PyObject *module, const mtl_signature *signature, PyObject *const *arguments,
                Py_ssize_t count, PyObject *keywords);

/* None counts as not given. */
static inline bool call_has(const mtl_call *call, int parameter) {
    return call->given[parameter] && call->given[parameter] != Py_None;
}

/* NULL where the call failed. */
DLTensor *call_array(mtl_call *call, int parameter);
DLTensor *call_optional_array(mtl_call *call, int parameter); /* NULL also where not given */
DLTensor *call_writable_array(mtl_call *call, int parameter);

/* A Python or NumPy number; `fallback` where not given, or None for a parameter that has a default. */
double call_real(mtl_call *call, int parameter, double fallback);
int64_t call_integer(mtl_call *call, int parameter, int64_t fallback);
bool call_bool(mtl_call *call, int parameter);

/* An argument that may be a number as well as an array. */
bool call_is_integer(const mtl_call *call, int parameter);
bool call_is_array(const mtl_call *call, int parameter);

void call_refuse_type(mtl_call *call, int parameter,
                      const char *wanted); /* TypeError: "op: name must be `wanted`, got int" */
void call_fail(mtl_call *call, PyObject *exception, const char *format, ...);

/* The parameter out: one array, or a tuple of two. Where it is not given the result is allocated, in the library of `like`, an array
 * of this call. */
DLTensor *call_result(mtl_call *call, int parameter, const DLTensor *like, DLDataType dtype, int rank,
                      const int64_t *shape);
DLTensor *call_result_of_two(mtl_call *call, int parameter, int index, const DLTensor *like, DLDataType dtype, int rank,
                             const int64_t *shape);

bool call_releases_gil(const mtl_call *call);
void call_settle(mtl_call *call, metalloid_status status);

/* Runs `expression`, a function of metalloid.h, without the GIL where that is worth it. */
#define CALL_RUN(call, expression)                                                    \
    do {                                                                              \
        if ((call)->failed) break;                                                    \
        PyThreadState *thread = call_releases_gil(call) ? PyEval_SaveThread() : NULL; \
        metalloid_status status = (expression);                                       \
        if (thread) PyEval_RestoreThread(thread);                                     \
        call_settle(call, status);                                                    \
    } while (0)

/* Lets go of the arrays and returns the result, or the two as a tuple; NULL where the call failed. */
PyObject *call_end(mtl_call *call);

/* The dtype that arithmetic on both gives: float16 with bfloat16 gives float32. Refused dtypes give something, and are refused by
 * the operation. */
DLDataType dtype_promote(DLDataType a, DLDataType b);
bool dtype_is_double(const DLTensor *tensor); /* NULL is not */

extern const DLDataType dtype_float32, dtype_float64;

#endif
