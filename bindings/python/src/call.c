/* One call of a function. SPDX-License-Identifier: MIT */
#include "call.h"

#include "route.h"

#include <stdarg.h>

const DLDataType dtype_float32 = {kDLFloat, 32, 1}, dtype_float64 = {kDLFloat, 64, 1};

/* ---- errors ------------------------------------------------------------------------------------------------------------- */

void call_fail(mtl_call *call, PyObject *exception, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    PyErr_FormatV(exception, format, arguments);
    va_end(arguments);
    call->failed = true;
}

/* ---- arguments ---------------------------------------------------------------------------------------------------------- */

static int parameters_of(const mtl_signature *signature) {
    int count = 0;
    while (signature->parameters[count]) count++;
    return count;
}

/* The place of a keyword; parameters are looked through from `from` on, since callers mostly keep to their order. */
static int find_parameter(const mtl_signature *signature, int count, PyObject *keyword, int from) {
    if (!PyUnicode_IS_COMPACT_ASCII(keyword)) return -1;
    const char *text = PyUnicode_DATA(keyword);
    for (int step = 0, at = from; step < count; step++, at = at + 1 < count ? at + 1 : 0) {
        if (strcmp(signature->parameters[at], text) == 0) return at;
    }
    return -1;
}

void call_begin(mtl_call *call, PyObject *module, const mtl_signature *signature, PyObject *const *arguments,
                Py_ssize_t given, PyObject *keywords) {
    int count = parameters_of(signature);
    call->state = PyModule_GetState(module);
    call->signature = signature;
    call->failed = false;
    call->arrays = call->results = 0;
    call->elements = 0;
    call->context = NULL;
    for (int i = 0; i < count; i++) call->given[i] = i < given ? arguments[i] : NULL;
    if (given > signature->positional) {
        call_fail(call, PyExc_TypeError, "%s() takes %d positional arguments but %zd were given", signature->name,
                  signature->positional, given);
        return;
    }

    Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    int at = (int)given - 1;
    for (Py_ssize_t i = 0; i < named; i++) {
        PyObject *keyword = PyTuple_GET_ITEM(keywords, i);
        at = find_parameter(signature, count, keyword, at + 1 < count ? at + 1 : 0);
        if (at < 0) {
            call_fail(call, PyExc_TypeError, "%s() got an unexpected keyword argument '%U'", signature->name, keyword);
            return;
        }
        if (call->given[at]) {
            call_fail(call, PyExc_TypeError, "%s() got multiple values for argument '%U'", signature->name, keyword);
            return;
        }
        call->given[at] = arguments[given + i];
    }
    for (int i = 0; i < signature->required; i++) {
        if (call->given[i]) continue;
        call_fail(call, PyExc_TypeError, "%s() missing required argument: '%s'", signature->name,
                  signature->parameters[i]);
        return;
    }
}

static DLTensor *take_array(mtl_call *call, PyObject *object, bool writable, const char *name) {
    if (call->failed) return NULL;
    if (writable) {
        PyObject *route = route_of(call->state, object);
        if (route != Py_None) {
            if (route) {
                call_fail(call, PyExc_ValueError, "%s: %s cannot be written to: arrays of type %.200s do not change",
                          call->signature->name, name, Py_TYPE(object)->tp_name);
            }
            call->failed = true;
            return NULL;
        }
    }
    mtl_array *taken = &call->array[call->arrays++];
    if (!array_open(taken, call->state, object, writable, call->signature->name, name)) {
        call->failed = true;
        return NULL;
    }
    if (array_on_cuda(taken) && !call->context) {
        if (metalloid_context_create(&call->context) != METALLOID_OK) {
            PyErr_NoMemory();
            call->failed = true;
            return NULL;
        }
        metalloid_context_set_stream(call->context, taken->stream);
    }
    int64_t elements = 1;
    for (int axis = 0; axis < taken->tensor.ndim; axis++) {
        if (__builtin_mul_overflow(elements, taken->shape[axis], &elements)) elements = INT64_MAX;
    }
    if (__builtin_add_overflow(call->elements, elements, &call->elements)) call->elements = INT64_MAX;
    return &taken->tensor;
}

DLTensor *call_array(mtl_call *call, int parameter) {
    return take_array(call, call->given[parameter], false, call->signature->parameters[parameter]);
}

DLTensor *call_optional_array(mtl_call *call, int parameter) {
    return call_has(call, parameter) ? call_array(call, parameter) : NULL;
}

DLTensor *call_writable_array(mtl_call *call, int parameter) {
    return take_array(call, call->given[parameter], true, call->signature->parameters[parameter]);
}

void call_refuse_type(mtl_call *call, int parameter, const char *wanted) {
    call_fail(call, PyExc_TypeError, "%s: %s must be %s, got %.200s", call->signature->name,
              call->signature->parameters[parameter], wanted, Py_TYPE(call->given[parameter])->tp_name);
}

/* None stands for the default, where there is one. */
static bool takes_default(const mtl_call *call, int parameter) {
    return !call->given[parameter] || (call->given[parameter] == Py_None && parameter >= call->signature->required);
}

double call_real(mtl_call *call, int parameter, double fallback) {
    if (call->failed || takes_default(call, parameter)) return fallback;
    PyObject *given = call->given[parameter];
    if (PyFloat_CheckExact(given)) return PyFloat_AS_DOUBLE(given);
    double value = PyFloat_AsDouble(given);
    if (value == -1 && PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            call_refuse_type(call, parameter, "a real number");
        } else if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Clear();
            call_fail(call, PyExc_ValueError, "%s: %s must fit in a float", call->signature->name,
                      call->signature->parameters[parameter]);
        }
        call->failed = true;
    }
    return value;
}

bool call_is_integer(const mtl_call *call, int parameter) {
    PyObject *given = call->given[parameter];
    if (call->failed || PyLong_CheckExact(given)) return true;
    /* Arrays of one element are integers to Python too. */
    return PyIndex_Check(given) && !PyObject_HasAttr(given, call->state->dlpack);
}

bool call_is_array(const mtl_call *call, int parameter) {
    return !call->failed && PyObject_HasAttr(call->given[parameter], call->state->dlpack);
}

int64_t call_integer(mtl_call *call, int parameter, int64_t fallback) {
    if (call->failed || takes_default(call, parameter)) return fallback;
    PyObject *given = call->given[parameter];
    if (PyBool_Check(given) || !call_is_integer(call, parameter)) {
        call_refuse_type(call, parameter, "an integer");
        return fallback;
    }
    PyObject *number = PyNumber_Index(given);
    if (!number) {
        call->failed = true;
        return fallback;
    }
    int overflow;
    long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
    if (overflow) {
        call_fail(call, PyExc_ValueError, "%s: %s must fit in 64 bits, got %S", call->signature->name,
                  call->signature->parameters[parameter], number);
    }
    Py_DECREF(number);
    return value;
}

bool call_bool(mtl_call *call, int parameter) {
    PyObject *given = call->given[parameter];
    if (call->failed || !given || given == Py_False) return false;
    if (given == Py_True) return true;
    const char *type = Py_TYPE(given)->tp_name;
    if (strcmp(type, "numpy.bool") == 0 || strcmp(type, "numpy.bool_") == 0) return PyObject_IsTrue(given) == 1;
    call_refuse_type(call, parameter, "True or False");
    return false;
}

/* ---- results ------------------------------------------------------------------------------------------------------------ */

static DLTensor *take_result(mtl_call *call, PyObject *out, const char *name, const DLTensor *like, DLDataType dtype,
                             int rank, const int64_t *shape) {
    if (call->failed) return NULL;
    if (out && out != Py_None) {
        DLTensor *tensor = take_array(call, out, true, name);
        if (!tensor) return NULL;
        call->allocated[call->results] = false;
        call->result[call->results++] = Py_NewRef(out);
        return tensor;
    }
    mtl_array *allocated = &call->array[call->arrays];
    const mtl_array *model = (const mtl_array *)like; /* its first member */
    PyObject *result = array_allocate(allocated, call->state, model, dtype, rank, shape, call->signature->name);
    if (!result) {
        call->failed = true;
        return NULL;
    }
    call->arrays++;
    call->allocated[call->results] = true;
    call->result[call->results++] = result;
    return &allocated->tensor;
}

DLTensor *call_result(mtl_call *call, int parameter, const DLTensor *like, DLDataType dtype, int rank,
                      const int64_t *shape) {
    return take_result(call, call->given[parameter], "out", like, dtype, rank, shape);
}

DLTensor *call_result_of_two(mtl_call *call, int parameter, int index, const DLTensor *like, DLDataType dtype, int rank,
                             const int64_t *shape) {
    PyObject *out = call->given[parameter];
    if (call->failed || !call_has(call, parameter)) return take_result(call, NULL, "out", like, dtype, rank, shape);
    if (!PyTuple_Check(out) || PyTuple_GET_SIZE(out) != 2) {
        call_fail(call, PyExc_TypeError, "%s: out must be a tuple of two arrays, got %.200s%s", call->signature->name,
                  Py_TYPE(out)->tp_name, PyTuple_Check(out) ? " of another length" : "");
        return NULL;
    }
    if (PyTuple_GET_ITEM(out, 0) == PyTuple_GET_ITEM(out, 1) && PyTuple_GET_ITEM(out, 0) != Py_None) {
        call_fail(call, PyExc_ValueError, "%s: out must be two arrays, got the same one twice", call->signature->name);
        return NULL;
    }
    out = PyTuple_GET_ITEM(out, index);
    if (out == Py_None) {
        call_fail(call, PyExc_TypeError, "%s: out must be a tuple of two arrays, got None in it",
                  call->signature->name);
        return NULL;
    }
    return take_result(call, out, index ? "out[1]" : "out[0]", like, dtype, rank, shape);
}

/* ---- run and end -------------------------------------------------------------------------------------------------------- */

bool call_releases_gil(const mtl_call *call) { return call->elements >= ELEMENTS_WORTH_RELEASING_THE_GIL; }

void call_settle(mtl_call *call, metalloid_status status) {
    if (status == METALLOID_OK) return;
    PyObject *exception = status == METALLOID_OUT_OF_MEMORY      ? PyExc_MemoryError
                          : status == METALLOID_INVALID_ARGUMENT ? PyExc_ValueError
                                                                 : PyExc_RuntimeError;
    PyErr_SetString(exception, metalloid_last_error());
    call->failed = true;
}

PyObject *call_end(mtl_call *call) {
    for (int i = 0; i < call->arrays; i++) array_close(&call->array[i]);
    metalloid_context_destroy(call->context);
    for (int i = 0; i < call->results && !call->failed; i++) {
        if (!call->allocated[i]) continue;
        call->result[i] = array_finish(call->result[i], call->state);
        call->failed = !call->result[i];
    }
    if (!call->failed && call->results == 1) return call->result[0];
    PyObject *pair = call->failed ? NULL : PyTuple_Pack(2, call->result[0], call->result[1]);
    for (int i = 0; i < call->results; i++) Py_XDECREF(call->result[i]);
    return pair;
}

/* ---- dtypes ------------------------------------------------------------------------------------------------------------- */

DLDataType dtype_promote(DLDataType a, DLDataType b) {
    bool floating = a.code == kDLFloat || a.code == kDLBfloat;
    if (floating && a.code == b.code && a.bits == b.bits) return a;
    return a.bits == 64 || b.bits == 64 ? dtype_float64 : dtype_float32;
}

bool dtype_is_double(const DLTensor *tensor) {
    return tensor && tensor->dtype.code == kDLFloat && tensor->dtype.bits == 64;
}
