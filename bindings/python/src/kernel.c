/* metalloid_kernel as a Python type. SPDX-License-Identifier: MIT
 *
 * What takes a library's own words (dtypes, scalars, results) is Python, in metalloid/_kernel.py; here are the calls. */
#include "kernel.h"

#include "array.h"
#include "interrupt.h"
#include "kernel/kernel.h"
#include "operations.h"

enum { MOST_BUFFERS = 64, MOST_TEMPLATES = 64, MOST_SCALARS = 64 };

static const char op[] = "metal_kernel";

typedef struct kernel {
    PyObject_HEAD metalloid_kernel *kernel;
    PyObject *input_names, *output_names; /* tuples of strings */
} kernel;

static PyObject *raise_status(metalloid_status status) {
    PyObject *exception = status == METALLOID_OUT_OF_MEMORY      ? PyExc_MemoryError
                          : status == METALLOID_INVALID_ARGUMENT ? PyExc_ValueError
                                                                 : PyExc_RuntimeError;
    const char *message = metalloid_last_error(); /* a compiler's words among it, in any encoding */
    PyObject *text = PyUnicode_DecodeUTF8(message, (Py_ssize_t)strlen(message), "replace");
    if (text) PyErr_SetObject(exception, text);
    Py_XDECREF(text);
    return NULL;
}

/* ---- make ------------------------------------------------------------------------------------------------------------------ */

/* The strings of a tuple, which lives on. */
static bool read_names(PyObject *tuple, const char *names[MOST_BUFFERS], const char *what) {
    if (PyTuple_GET_SIZE(tuple) > MOST_BUFFERS) {
        PyErr_Format(PyExc_ValueError, "%s: %s must be at most %d", op, what, (int)MOST_BUFFERS);
        return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); i++) {
        Py_ssize_t length;
        names[i] = PyUnicode_AsUTF8AndSize(PyTuple_GET_ITEM(tuple, i), &length);
        if (!names[i]) return false;
        if ((size_t)length != strlen(names[i])) {
            PyErr_Format(PyExc_ValueError, "%s: %s[%zd] must not contain NUL", op, what, i);
            return false;
        }
    }
    return true;
}

static PyObject *kernel_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
    static char *keywords[] = {"name",
                               "input_names",
                               "output_names",
                               "source",
                               "header",
                               "ensure_row_contiguous",
                               "atomic_outputs",
                               "math_mode",
                               "fallback_compiler",
                               "debug",
                               "address_sanitizer",
                               "most_iterations",
                               "language",
                               "shared_memory",
                               NULL};
    metalloid_kernel_options options = METALLOID_KERNEL_OPTIONS_INIT;
    const char *name, *source;
    Py_ssize_t length; /* an image has NUL bytes */
    PyObject *inputs, *outputs;
    int contiguous = 1, atomic = 0, mode = 0, debug = 0, sanitizer = 0, language = METALLOID_KERNEL_METAL;
    long long iterations = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "sO!O!s#|sppizppLii", keywords, &name, &PyTuple_Type, &inputs,
                                     &PyTuple_Type, &outputs, &source, &length, &options.header, &contiguous, &atomic,
                                     &mode, &options.fallback_compiler, &debug, &sanitizer, &iterations, &language,
                                     &options.shared_memory))
        return NULL;
    const char *input_names[MOST_BUFFERS], *output_names[MOST_BUFFERS];
    if (!read_names(inputs, input_names, "input_names") || !read_names(outputs, output_names, "output_names"))
        return NULL;
    options.ensure_row_contiguous = contiguous;
    options.atomic_outputs = atomic;
    options.language = (metalloid_kernel_language)language;
    options.source_length = (size_t)length;
    options.math_mode = (metalloid_math_mode)mode;
    options.debug = debug;
    options.address_sanitizer = sanitizer;
    options.most_iterations = iterations;
    metalloid_kernel *created;
    metalloid_status status = metalloid_kernel_create(name, input_names, (int)PyTuple_GET_SIZE(inputs), output_names,
                                                      (int)PyTuple_GET_SIZE(outputs), source, &options, &created);
    if (status) return raise_status(status);
    kernel *made = (kernel *)type->tp_alloc(type, 0);
    if (!made) {
        metalloid_kernel_destroy(created);
        return NULL;
    }
    made->kernel = created;
    made->input_names = Py_NewRef(inputs);
    made->output_names = Py_NewRef(outputs);
    return (PyObject *)made;
}

static void kernel_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    metalloid_kernel_destroy(((kernel *)self)->kernel);
    Py_XDECREF(((kernel *)self)->input_names);
    Py_XDECREF(((kernel *)self)->output_names);
    type->tp_free(self);
    Py_DECREF(type);
}

/* ---- a call ------------------------------------------------------------------------------------------------------------------ */

/* The arrays of one call, opened one after the other, and what metalloid_kernel_call points to. */
typedef struct opened {
    mtl_array *arrays;
    int count;
    const DLTensor *inputs[MOST_BUFFERS];
    DLTensor *outputs[MOST_BUFFERS];
    metalloid_template_argument templates[MOST_TEMPLATES];
    metalloid_kernel_scalar scalars[MOST_SCALARS];
    metalloid_context *context; /* with the stream of the first CUDA array; NULL on the CPU */
} opened;

static DLTensor *open_next(opened *o, module_state *state, PyObject *array, bool writable, const char *name) {
    mtl_array *next = &o->arrays[o->count++];
    if (!array_open(next, state, array, writable, op, name)) return NULL;
    if (array_on_cuda(next) && !o->context) {
        if (metalloid_context_create(&o->context) != METALLOID_OK) {
            PyErr_NoMemory();
            return NULL;
        }
        metalloid_context_set_stream(o->context, next->stream);
    }
    return &next->tensor;
}

static bool open_arrays(opened *o, kernel *self, module_state *state, PyObject *inputs, PyObject *outputs) {
    Py_ssize_t input_count = PyTuple_GET_SIZE(inputs), output_count = PyTuple_GET_SIZE(outputs);
    if (input_count != PyTuple_GET_SIZE(self->input_names) || output_count != PyTuple_GET_SIZE(self->output_names)) {
        PyErr_Format(PyExc_ValueError, "%s: the kernel has %zd inputs and %zd outputs, got %zd and %zd", op,
                     PyTuple_GET_SIZE(self->input_names), PyTuple_GET_SIZE(self->output_names), input_count,
                     output_count);
        return false;
    }
    o->arrays = PyMem_Malloc((size_t)(input_count + output_count) * sizeof *o->arrays);
    if (!o->arrays) {
        PyErr_NoMemory();
        return false;
    }
    for (Py_ssize_t i = 0; i < input_count; i++) {
        const char *name = PyUnicode_AsUTF8(PyTuple_GET_ITEM(self->input_names, i));
        o->inputs[i] = open_next(o, state, PyTuple_GET_ITEM(inputs, i), false, name);
        if (!o->inputs[i]) return false;
    }
    for (Py_ssize_t i = 0; i < output_count; i++) {
        const char *name = PyUnicode_AsUTF8(PyTuple_GET_ITEM(self->output_names, i));
        o->outputs[i] = open_next(o, state, PyTuple_GET_ITEM(outputs, i), true, name);
        if (!o->outputs[i]) return false;
    }
    return true;
}

static const struct {
    const char *name;
    DLDataType dtype;
} dtypes[] = {
    {"float32", {kDLFloat, 32, 1}},      {"float16", {kDLFloat, 16, 1}},
    {"bfloat16", {kDLBfloat, 16, 1}},    {"float64", {kDLFloat, 64, 1}},
    {"bool", {METALLOID_DL_BOOL, 8, 1}}, {"int8", {kDLInt, 8, 1}},
    {"int16", {kDLInt, 16, 1}},          {"int32", {kDLInt, 32, 1}},
    {"int64", {kDLInt, 64, 1}},          {"uint8", {kDLUInt, 8, 1}},
    {"uint16", {kDLUInt, 16, 1}},        {"uint32", {kDLUInt, 32, 1}},
    {"uint64", {kDLUInt, 64, 1}},        {"complex64", {METALLOID_DL_COMPLEX, 64, 1}},
};
enum { DTYPES = sizeof dtypes / sizeof dtypes[0] };

static bool read_dtype(const char *name, DLDataType *dtype) {
    for (int i = 0; i < DTYPES; i++) {
        if (strcmp(dtypes[i].name, name) != 0) continue;
        *dtype = dtypes[i].dtype;
        return true;
    }
    PyErr_Format(PyExc_ValueError, "%s: kernels have no dtype %s", op, name);
    return false;
}

/* (name, value) pairs; a dtype is given by its name. */
static bool read_templates(metalloid_template_argument *arguments, PyObject *templates, int *count) {
    Py_ssize_t given = PyTuple_GET_SIZE(templates);
    if (given > MOST_TEMPLATES) {
        PyErr_Format(PyExc_ValueError, "%s: there may be %d template arguments, got %zd", op, (int)MOST_TEMPLATES,
                     given);
        return false;
    }
    for (Py_ssize_t i = 0; i < given; i++) {
        metalloid_template_argument *argument = &arguments[i];
        PyObject *pair = PyTuple_GET_ITEM(templates, i), *value;
        *argument = (metalloid_template_argument){0};
        if (!PyTuple_Check(pair) || !PyArg_ParseTuple(pair, "sO", &argument->name, &value)) return false;
        if (PyBool_Check(value)) {
            argument->kind = METALLOID_TEMPLATE_BOOL;
            argument->value = value == Py_True;
        } else if (PyUnicode_Check(value)) {
            argument->kind = METALLOID_TEMPLATE_DTYPE;
            const char *name = PyUnicode_AsUTF8(value);
            if (!name || !read_dtype(name, &argument->dtype)) return false;
        } else {
            int overflow;
            argument->kind = METALLOID_TEMPLATE_INT;
            argument->value = PyLong_AsLongLongAndOverflow(value, &overflow);
            if (argument->value == -1 && PyErr_Occurred()) return false;
            if (overflow) argument->value = overflow < 0 ? INT64_MIN : INT64_MAX; /* refused in the library's words */
        }
    }
    *count = (int)given;
    return true;
}

/* Numbers; NULL for none. */
static bool read_scalars(opened *o, PyObject *scalars, int64_t *count) {
    Py_ssize_t given = scalars ? PyTuple_GET_SIZE(scalars) : 0;
    if (given > MOST_SCALARS) {
        PyErr_Format(PyExc_ValueError, "%s: there may be %d scalars, got %zd", op, (int)MOST_SCALARS, given);
        return false;
    }
    for (Py_ssize_t i = 0; i < given; i++) {
        PyObject *value = PyTuple_GET_ITEM(scalars, i);
        o->scalars[i] = (metalloid_kernel_scalar){0};
        if (PyFloat_Check(value)) {
            o->scalars[i].kind = METALLOID_SCALAR_FLOAT;
            o->scalars[i].real = PyFloat_AS_DOUBLE(value);
        } else {
            o->scalars[i].integer = PyLong_AsLongLong(value);
            if (o->scalars[i].integer == -1 && PyErr_Occurred()) return false;
        }
    }
    *count = given;
    return true;
}

static void close_call(opened *o) {
    for (int i = 0; i < o->count; i++) array_close(&o->arrays[i]);
    PyMem_Free(o->arrays);
    metalloid_context_destroy(o->context);
}

/* The text of a call, in memory of PyMem_Malloc's. */
static PyObject *source_of(metalloid_kernel *made, const metalloid_kernel_call *call, bool translated) {
    PyObject *string = NULL;
    for (size_t size = 1 << 16, length = 0; !string && !PyErr_Occurred(); size = length + 1) {
        char *text = PyMem_Malloc(size);
        if (!text) return PyErr_NoMemory();
        metalloid_status status;
        /* To translate a long source takes a while. */
        Py_BEGIN_ALLOW_THREADS;
        status = metalloid_kernel_source(made, call, translated, text, size, &length);
        Py_END_ALLOW_THREADS;
        if (status) raise_status(status);
        else if (length < size) string = PyUnicode_DecodeUTF8(text, (Py_ssize_t)length, "replace");
        PyMem_Free(text);
    }
    return string;
}

static PyObject *run_call(PyObject *self, PyObject *args, bool run) {
    kernel *made = (kernel *)self;
    metalloid_kernel_call call = METALLOID_KERNEL_CALL_INIT;
    PyObject *inputs, *outputs, *templates, *init_value, *scalars = NULL;
    long long grid[3], threadgroup[3];
    int translated = 0;
    if (!PyArg_ParseTuple(args, run ? "O!O!(LLL)(LLL)O!O|O!" : "O!O!(LLL)(LLL)O!O|p", &PyTuple_Type, &inputs,
                          &PyTuple_Type, &outputs, &grid[0], &grid[1], &grid[2], &threadgroup[0], &threadgroup[1],
                          &threadgroup[2], &PyTuple_Type, &templates, &init_value,
                          run ? (void *)&PyTuple_Type : (void *)&translated, &scalars))
        return NULL;
    if (init_value != Py_None) {
        call.has_init_value = true;
        call.init_value = PyFloat_AsDouble(init_value);
        if (call.init_value == -1 && PyErr_Occurred()) return NULL;
    }
    module_state *state = PyType_GetModuleState(Py_TYPE(self));
    opened o;
    o.arrays = NULL;
    o.count = 0;
    o.context = NULL;
    PyObject *result = NULL;
    if (open_arrays(&o, made, state, inputs, outputs) && read_templates(o.templates, templates, &call.template_count) &&
        read_scalars(&o, scalars, &call.scalar_count)) {
        call.input_count = (int)PyTuple_GET_SIZE(inputs);
        call.output_count = (int)PyTuple_GET_SIZE(outputs);
        call.inputs = o.inputs;
        call.outputs = o.outputs;
        call.template_arguments = o.templates;
        call.scalars = o.scalars;
        for (int axis = 0; axis < 3; axis++) {
            call.grid[axis] = grid[axis];
            call.threadgroup[axis] = threadgroup[axis];
        }
        if (run) {
            interrupt pressed;
            if (interrupt_begin(&pressed)) {
                metalloid_status status;
                call.interrupted = interrupt_flag(&pressed);
                Py_BEGIN_ALLOW_THREADS;
                status = metalloid_kernel_launch(o.context, made->kernel, &call);
                Py_END_ALLOW_THREADS;
                interrupt_end(&pressed);
                if (!status) result = Py_NewRef(Py_None);
                else if (PyErr_CheckSignals() == 0) raise_status(status);
            }
        } else {
            result = source_of(made->kernel, &call, translated);
        }
    }
    close_call(&o);
    return result;
}

static PyObject *kernel_launch(PyObject *self, PyObject *args) { return run_call(self, args, true); }
static PyObject *kernel_source(PyObject *self, PyObject *args) { return run_call(self, args, false); }

/* ---- a call without its arrays, for MLX's primitive ------------------------------------------------------------------------------ */

typedef struct prepared {
    metalloid_kernel *kernel;
    metalloid_kernel_call call;
    metalloid_template_argument templates[MOST_TEMPLATES];
    PyObject *owner, *names; /* of the kernel, and of the template arguments' names */
} prepared;

static void free_prepared(PyObject *capsule) {
    prepared *p = PyCapsule_GetPointer(capsule, MTL_KERNEL_CALL_CAPSULE);
    Py_XDECREF(p->owner);
    Py_XDECREF(p->names);
    PyMem_Free(p);
}

/* (shape, dtype's name) as a tensor that is not there. */
static bool describe(DLTensor *tensor, int64_t shape[MAX_RANK], PyObject *description, int place) {
    PyObject *extents;
    const char *dtype;
    if (!PyArg_ParseTuple(description, "O!s", &PyTuple_Type, &extents, &dtype)) return false;
    if (PyTuple_GET_SIZE(extents) > MAX_RANK) {
        PyErr_Format(PyExc_ValueError, "%s: an array must have rank 0 to %d, got %zd", op, (int)MAX_RANK,
                     PyTuple_GET_SIZE(extents));
        return false;
    }
    *tensor = (DLTensor){.data = (void *)((uintptr_t)(place + 1) << 56), /* apart from each other, and never followed */
                         .device = {kDLCPU, 0},
                         .ndim = (int32_t)PyTuple_GET_SIZE(extents),
                         .shape = shape};
    for (int axis = 0; axis < tensor->ndim; axis++) {
        shape[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(extents, axis));
        if (shape[axis] == -1 && PyErr_Occurred()) return false;
    }
    return read_dtype(dtype, &tensor->dtype);
}

/* The checks of a call; what it generates, which is compiled if that is wanted. */
static PyObject *check_prepared(prepared *p, PyObject *inputs, PyObject *outputs, bool compile) {
    typedef struct described {
        DLTensor tensor;
        int64_t shape[MAX_RANK];
    } described;
    const DLTensor *input_tensors[MOST_BUFFERS];
    DLTensor *output_tensors[MOST_BUFFERS];
    int input_count = (int)PyTuple_GET_SIZE(inputs), count = input_count + (int)PyTuple_GET_SIZE(outputs);
    described *arrays = PyMem_Malloc((size_t)(count + 1) * sizeof *arrays);
    if (!arrays) return PyErr_NoMemory();
    bool ready = true;
    for (int i = 0; i < count && ready; i++) {
        bool is_input = i < input_count;
        PyObject *description = is_input ? PyTuple_GET_ITEM(inputs, i) : PyTuple_GET_ITEM(outputs, i - input_count);
        ready = describe(&arrays[i].tensor, arrays[i].shape, description, i);
        if (is_input) input_tensors[i] = &arrays[i].tensor;
        else output_tensors[i - input_count] = &arrays[i].tensor;
    }
    p->call.inputs = input_tensors;
    p->call.outputs = output_tensors;
    PyObject *text = ready ? source_of(p->kernel, &p->call, false) : NULL;
    if (text && compile) {
        metalloid_status status;
        Py_BEGIN_ALLOW_THREADS;
        status = mtl_kernel_compile(p->kernel, &p->call);
        Py_END_ALLOW_THREADS;
        if (status) {
            Py_CLEAR(text);
            raise_status(status);
        }
    }
    p->call.inputs = NULL;
    p->call.outputs = NULL;
    PyMem_Free(arrays);
    return text;
}

static PyObject *kernel_prepare(PyObject *self, PyObject *args) {
    kernel *made = (kernel *)self;
    PyObject *inputs, *outputs, *templates, *init_value;
    long long grid[3], threadgroup[3];
    int compile = 1;
    if (!PyArg_ParseTuple(args, "O!O!(LLL)(LLL)O!O|p", &PyTuple_Type, &inputs, &PyTuple_Type, &outputs, &grid[0],
                          &grid[1], &grid[2], &threadgroup[0], &threadgroup[1], &threadgroup[2], &PyTuple_Type,
                          &templates, &init_value, &compile))
        return NULL;
    if (PyTuple_GET_SIZE(inputs) != PyTuple_GET_SIZE(made->input_names) ||
        PyTuple_GET_SIZE(outputs) != PyTuple_GET_SIZE(made->output_names))
        return PyErr_Format(PyExc_ValueError, "%s: the kernel has other inputs and outputs", op);
    prepared *p = PyMem_Calloc(1, sizeof *p);
    if (!p) return PyErr_NoMemory();
    PyObject *capsule = PyCapsule_New(p, MTL_KERNEL_CALL_CAPSULE, free_prepared);
    if (!capsule) {
        PyMem_Free(p);
        return NULL;
    }
    p->kernel = made->kernel;
    p->owner = Py_NewRef(self);
    p->names = Py_NewRef(templates);
    p->call = (metalloid_kernel_call)METALLOID_KERNEL_CALL_INIT;
    PyObject *text = NULL;
    if (init_value != Py_None) {
        p->call.has_init_value = true;
        p->call.init_value = PyFloat_AsDouble(init_value);
    }
    if (!PyErr_Occurred() && read_templates(p->templates, templates, &p->call.template_count)) {
        p->call.input_count = (int)PyTuple_GET_SIZE(inputs);
        p->call.output_count = (int)PyTuple_GET_SIZE(outputs);
        p->call.template_arguments = p->templates;
        for (int axis = 0; axis < 3; axis++) {
            p->call.grid[axis] = grid[axis];
            p->call.threadgroup[axis] = threadgroup[axis];
        }
        text = check_prepared(p, inputs, outputs, compile);
    }
    PyObject *result = text ? PyTuple_Pack(2, capsule, text) : NULL;
    Py_DECREF(capsule);
    Py_XDECREF(text);
    return result;
}

int mtl_kernel_call_launch(const void *prepared_call, const mtl_operands *operands) {
    const prepared *p = prepared_call;
    metalloid_kernel_call call = p->call;
    DLTensor tensors[2 * MOST_BUFFERS];
    const DLTensor *inputs[MOST_BUFFERS];
    DLTensor *outputs[MOST_BUFFERS];
    for (int i = 0; i < call.input_count + call.output_count; i++) {
        bool is_input = i < call.input_count;
        const mtl_operand *operand = is_input ? &operands->inputs[i] : &operands->outputs[i - call.input_count];
        tensors[i] = (DLTensor){.data = operand->data,
                                .device = {kDLCPU, 0},
                                .ndim = operand->rank,
                                .dtype = {operand->code, operand->bits, 1},
                                .shape = (int64_t *)(uintptr_t)operand->shape,
                                .strides = (int64_t *)(uintptr_t)operand->strides};
        if (is_input) inputs[i] = &tensors[i];
        else outputs[i - call.input_count] = &tensors[i];
    }
    call.inputs = inputs;
    call.outputs = outputs;
    return (int)metalloid_kernel_launch(NULL, p->kernel, &call);
}

static PyMethodDef methods[] = {
    {"launch", kernel_launch, METH_VARARGS,
     "launch($self, inputs, outputs, grid, threadgroup, template, init_value, scalars=(), /)\n--\n\n"
     "Runs the kernel: tuples of arrays, of three integers, of (name, value) pairs with dtypes by their names, of a "
     "precompiled kernel's numbers."},
    {"source", kernel_source, METH_VARARGS,
     "source($self, inputs, outputs, grid, threadgroup, template, init_value, translated=False, /)\n--\n\n"
     "The generated source of such a call."},
    {"prepare", kernel_prepare, METH_VARARGS,
     "prepare($self, inputs, outputs, grid, threadgroup, template, init_value, compile=True, /)\n--\n\n"
     "Checks a call whose arrays are described by (shape, dtype's name), and compiles its kernel: a capsule for MLX's "
     "primitive, and the generated source."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, (void *)kernel_new},
    {Py_tp_dealloc, (void *)kernel_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_doc, "A custom kernel; metalloid.fast.metal_kernel makes it."},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "metalloid._native.Kernel",
    .basicsize = sizeof(kernel),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = slots,
};

bool kernel_init(PyObject *module) {
    PyObject *type = PyType_FromModuleAndSpec(module, &spec, NULL);
    if (!type) return false;
    bool added = PyModule_AddType(module, (PyTypeObject *)type) == 0;
    Py_DECREF(type);
    PyObject *names = added ? PyTuple_New(DTYPES) : NULL;
    for (int i = 0; names && i < DTYPES; i++) {
        PyObject *name = PyUnicode_FromString(dtypes[i].name);
        if (!name) Py_CLEAR(names);
        else PyTuple_SET_ITEM(names, i, name);
    }
    added = names && PyModule_AddObjectRef(module, "KERNEL_DTYPES", names) == 0;
    Py_XDECREF(names);
    return added;
}
