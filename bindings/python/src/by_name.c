/* What metalloid.jax and metalloid.mlx are made of: the operations by name. SPDX-License-Identifier: MIT */
#include "by_name.h"

#include "operations.h"
#include "xla.h"

#include <metalloid/metalloid.h>

static bool read_numbers(PyObject *reals, PyObject *integers, double *real, int64_t *integer) {
    memset(real, 0, MTL_MOST_REALS * sizeof real[0]);
    memset(integer, 0, MTL_MOST_INTEGERS * sizeof integer[0]);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(reals) && i < MTL_MOST_REALS; i++) {
        real[i] = PyFloat_AsDouble(PyTuple_GET_ITEM(reals, i));
        if (real[i] == -1 && PyErr_Occurred()) return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(integers) && i < MTL_MOST_INTEGERS; i++) {
        integer[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(integers, i));
        if (integer[i] == -1 && PyErr_Occurred()) return false;
    }
    return true;
}

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
    if (!read_numbers(reals, integers, real, integer)) return NULL;
    call.reals = real;
    call.integers = integer;
    if (mtl_operation_check(operation, &call) != METALLOID_OK)
        return PyErr_Format(PyExc_ValueError, "%s", metalloid_last_error());
    Py_RETURN_NONE;
}

/* ---- a call with arrays of any library ------------------------------------------------------------------------------------------ */

static bool open_operand(mtl_array *opened, mtl_operand *operand, PyObject *module, PyObject *object, bool writable,
                         const char *op, const char *name) {
    if (!array_open(opened, PyModule_GetState(module), object, writable, op, name)) return false;
    if (opened->tensor.device.device_type != kDLCPU) {
        PyErr_Format(PyExc_ValueError, "%s: %s must be on the CPU", op, name);
        return false;
    }
    const DLTensor *tensor = &opened->tensor;
    *operand = (mtl_operand){.data = tensor->data ? (char *)tensor->data + tensor->byte_offset : NULL,
                             .shape = tensor->shape,
                             .strides = tensor->strides,
                             .rank = tensor->ndim,
                             .code = tensor->dtype.code,
                             .bits = tensor->dtype.bits};
    return true;
}

static PyObject *run_operation(PyObject *module, PyObject *args) {
    const char *op;
    unsigned given;
    PyObject *inputs, *results, *reals, *integers;
    if (!PyArg_ParseTuple(args, "sIO!O!O!O!", &op, &given, &PyTuple_Type, &inputs, &PyTuple_Type, &results,
                          &PyTuple_Type, &reals, &PyTuple_Type, &integers))
        return NULL;
    int operation = mtl_operation_find(op);
    if (operation < 0) return PyErr_Format(PyExc_ValueError, "there is no operation %s", op);
    Py_ssize_t input_count = PyTuple_GET_SIZE(inputs), count = input_count + PyTuple_GET_SIZE(results);
    if (input_count > MTL_MOST_INPUTS || PyTuple_GET_SIZE(results) > MTL_MOST_OUTPUTS)
        return PyErr_Format(PyExc_ValueError, "%s: too many arrays", op);
    double real[MTL_MOST_REALS];
    int64_t integer[MTL_MOST_INTEGERS];
    if (!read_numbers(reals, integers, real, integer)) return NULL;

    mtl_array opened[MTL_MOST_INPUTS + MTL_MOST_OUTPUTS];
    mtl_operand operands[MTL_MOST_INPUTS + MTL_MOST_OUTPUTS];
    Py_ssize_t taken = 0;
    bool ready = true;
    for (int place = 0; ready && taken < count; taken++, place++) {
        bool is_input = taken < input_count;
        while (is_input && place < MTL_MOST_INPUTS && !(given >> place & 1)) place++;
        const char *name =
            is_input && place < MTL_MOST_INPUTS ? mtl_operation_names_of(operation)->inputs[place] : "out";
        PyObject *object = is_input ? PyTuple_GET_ITEM(inputs, taken) : PyTuple_GET_ITEM(results, taken - input_count);
        ready = open_operand(&opened[taken], &operands[taken], module, object, !is_input, op, name ? name : "given");
    }
    metalloid_status status = METALLOID_OK;
    if (ready) {
        mtl_operands call = {.inputs = operands,
                             .outputs = operands + input_count,
                             .given = given,
                             .input_count = (int32_t)input_count,
                             .output_count = (int32_t)(count - input_count),
                             .reals = real,
                             .integers = integer};
        Py_BEGIN_ALLOW_THREADS;
        status = mtl_operation_run(operation, &call);
        Py_END_ALLOW_THREADS;
    }
    while (taken > 0) array_close(&opened[--taken]);
    if (!ready) return NULL;
    if (status == METALLOID_OK) Py_RETURN_NONE;
    PyObject *exception = status == METALLOID_OUT_OF_MEMORY      ? PyExc_MemoryError
                          : status == METALLOID_INVALID_ARGUMENT ? PyExc_ValueError
                                                                 : PyExc_RuntimeError;
    return PyErr_Format(exception, "%s", metalloid_last_error());
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
    {"run_operation", run_operation, METH_VARARGS,
     "run_operation($module, name, given, inputs, results, reals, integers, /)\n--\n\n"
     "Runs a call on arrays of any library on the CPU, of which the results are written; `given` has a bit for each "
     "place of\n"
     "an input that is there."},
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
