/* What metalloid.jax and metalloid.mlx are made of: the operations by name. SPDX-License-Identifier: MIT */
#include "by_name.h"

#include "operations.h"
#include "xla.h"

#include <metalloid/metalloid.h>

/* ---- the checks of a call whose arrays are not there yet ---------------------------------------------------------------------- */

static const struct {
    const char *name;
    uint8_t code, bits;
} dtypes[] = {{"float32", kDLFloat, 32}, {"bfloat16", kDLBfloat, 16}, {"float16", kDLFloat, 16},
              {"float64", kDLFloat, 64}, {"int32", kDLInt, 32},       {"bool", METALLOID_DL_BOOL, 8},
              {"int64", kDLInt, 64},     {"int8", kDLInt, 8},         {"int16", kDLInt, 16},
              {"uint8", kDLUInt, 8},     {"uint16", kDLUInt, 16},     {"uint32", kDLUInt, 32},
              {"uint64", kDLUInt, 64}};

typedef struct described {
    mtl_operand operand;
    int64_t shape[MAX_RANK];
} described;

/* (shape, dtype's name) */
static bool describe(described *array, PyObject *description, const char *op, const char *name) {
    PyObject *shape;
    const char *dtype;
    if (!PyArg_ParseTuple(description, "O!s", &PyTuple_Type, &shape, &dtype)) return false;
    array->operand = (mtl_operand){.shape = array->shape, .rank = (int32_t)PyTuple_GET_SIZE(shape)};
    if (PyTuple_GET_SIZE(shape) > MAX_RANK) {
        PyErr_Format(PyExc_ValueError, "%s: %s must have rank 0 to %d, got %d", op, name, (int)MAX_RANK,
                     array->operand.rank);
        return false;
    }
    for (int axis = 0; axis < array->operand.rank; axis++) {
        array->shape[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, axis));
        if (array->shape[axis] == -1 && PyErr_Occurred()) return false;
    }
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++) {
        if (strcmp(dtypes[i].name, dtype) != 0) continue;
        array->operand.code = dtypes[i].code;
        array->operand.bits = dtypes[i].bits;
        return true;
    }
    PyErr_Format(PyExc_ValueError, "%s: %s has the dtype %s, which no operation takes", op, name, dtype);
    return false;
}

static PyObject *check_operation(PyObject *module, PyObject *args) {
    (void)module;
    const char *op;
    PyObject *inputs, *results, *reals, *integers;
    if (!PyArg_ParseTuple(args, "sO!O!O!O!", &op, &PyTuple_Type, &inputs, &PyTuple_Type, &results, &PyTuple_Type,
                          &reals, &PyTuple_Type, &integers))
        return NULL;
    int operation = mtl_operation_find(op);
    if (operation < 0) return PyErr_Format(PyExc_ValueError, "there is no operation %s", op);
    const mtl_operation_names *names = mtl_operation_names_of(operation);

    described arrays[MTL_MOST_INPUTS + MTL_MOST_OUTPUTS];
    mtl_operand operands[MTL_MOST_INPUTS + MTL_MOST_OUTPUTS];
    mtl_operands call = {.inputs = operands};
    int taken = 0;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(inputs) + PyTuple_GET_SIZE(results); i++) {
        bool is_input = i < PyTuple_GET_SIZE(inputs);
        PyObject *description =
            is_input ? PyTuple_GET_ITEM(inputs, i) : PyTuple_GET_ITEM(results, i - PyTuple_GET_SIZE(inputs));
        if (description == Py_None) continue;
        if (taken == MTL_MOST_INPUTS + MTL_MOST_OUTPUTS || (is_input && (i >= MTL_MOST_INPUTS || !names->inputs[i])))
            return PyErr_Format(PyExc_ValueError, "%s: too many arrays", op);
        if (!describe(&arrays[taken], description, op, is_input ? names->inputs[i] : "out")) return NULL;
        operands[taken] = arrays[taken].operand;
        operands[taken].data = (void *)((uintptr_t)(taken + 1) << 56); /* apart from each other, and never followed */
        taken++;
        if (is_input) {
            call.given |= 1u << i;
            call.input_count = taken;
        }
    }
    call.outputs = operands + call.input_count;
    call.output_count = taken - call.input_count;

    double real[MTL_MOST_REALS];
    int64_t integer[MTL_MOST_INTEGERS];
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(reals) && i < MTL_MOST_REALS; i++) {
        real[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(reals, i));
        if (real[i] == -1 && PyErr_Occurred()) return NULL;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(integers) && i < MTL_MOST_INTEGERS; i++) {
        integer[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(integers, i));
        if (integer[i] == -1 && PyErr_Occurred()) return NULL;
    }
    call.reals = real;
    call.integers = integer;
    if (mtl_operation_check(operation, &call) != METALLOID_OK)
        return PyErr_Format(PyExc_ValueError, "%s", metalloid_last_error());
    Py_RETURN_NONE;
}

/* ---- what other libraries call ------------------------------------------------------------------------------------------------- */

static PyObject *xla_handlers(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    static const char *const platforms[] = {"cpu", "CUDA"};
    PyObject *list = PyList_New(0);
    for (int operation = 0; list && operation < MTL_OPERATION_COUNT; operation++) {
        for (int platform = 0; list && platform <= MTL_WITH_CUDA; platform++) {
            /* The name that jax.ffi asks for; a function pointer, which the capsule holds as one to an object. */
            void *handler;
            xla_handler *function = mtl_xla_handler(operation, platform != 0);
            memcpy(&handler, &function, sizeof handler);
            PyObject *capsule = PyCapsule_New(handler, "xla._CUSTOM_CALL_TARGET", NULL);
            PyObject *entry =
                capsule ? Py_BuildValue("(ssN)", mtl_operation_names_of(operation)->name, platforms[platform], capsule)
                        : NULL;
            if (!entry || PyList_Append(list, entry) < 0) Py_CLEAR(list);
            Py_XDECREF(entry);
        }
    }
    return list;
}

static PyObject *name_list(const char *const *names) {
    PyObject *list = PyList_New(0);
    for (; list && *names; names++) {
        PyObject *name = PyUnicode_FromString(*names);
        if (!name || PyList_Append(list, name) < 0) Py_CLEAR(list);
        Py_XDECREF(name);
    }
    PyObject *tuple = list ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(list);
    return tuple;
}

/* {operation: (names of inputs, of reals, of integers)} */
static PyObject *operation_names(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *all = PyDict_New();
    for (int operation = 0; all && operation < MTL_OPERATION_COUNT; operation++) {
        const mtl_operation_names *names = mtl_operation_names_of(operation);
        PyObject *entry =
            Py_BuildValue("(NNN)", name_list(names->inputs), name_list(names->reals), name_list(names->integers));
        if (!entry || PyDict_SetItemString(all, names->name, entry) < 0) Py_CLEAR(all);
        Py_XDECREF(entry);
    }
    return all;
}

PyMethodDef functions_by_name[] = {
    {"check_operation", check_operation, METH_VARARGS,
     "check_operation($module, name, inputs, results, reals, integers, /)\n--\n\n"
     "The checks of a call of which shapes and dtypes are known: ValueError, or nothing. An array is None or (shape, "
     "dtype's\nname); the others stand in the order of operation_names()."},
    {"operation_names", operation_names, METH_NOARGS,
     "operation_names($module, /)\n--\n\n"
     "{operation: (names of inputs, of real attributes, of integer ones)}, in the order in which calls by name have "
     "them."},
    {"xla_handlers", xla_handlers, METH_NOARGS,
     "xla_handlers($module, /)\n--\n\n[(operation, XLA's platform, capsule)] for jax.ffi.register_ffi_target."},
    {NULL, NULL, 0, NULL},
};

bool by_name_init(PyObject *module) {
    if (PyModule_AddFunctions(module, functions_by_name) < 0) return false;
    PyObject *capsule =
        PyCapsule_New((void *)(uintptr_t)&mtl_operations_table, MTL_OPERATIONS_CAPSULE, NULL); /* nobody writes to it */
    if (!capsule) return false;
    int added = PyModule_AddObjectRef(module, "operations", capsule);
    Py_DECREF(capsule);
    return added == 0;
}
