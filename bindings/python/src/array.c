/* Python arrays as DLPack views. SPDX-License-Identifier: MIT
 *
 * Three ways lead from an object to its DLTensor, the fastest that it has is taken:
 * - a NumPy array is read through NumPy's C interface, which alone gives bfloat16 (of ml_dtypes), read-only arrays and no
 *   allocation;
 * - a type with DLPack's table of C functions (__dlpack_c_exchange_api__: PyTorch) fills a DLTensor without Python code;
 * - anything else with __dlpack__ hands over a capsule, versioned (DLPack 1.x) or not. */
#include "array.h"
#include "results.h"

#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#define NPY_TARGET_VERSION    NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>

/* ---- DLPack 1.x, which older headers lack --------------------------------------------------------------------------- */

typedef struct dlpack_version {
    uint32_t major, minor;
} dlpack_version;

typedef struct versioned_tensor {
    dlpack_version version;
    void *manager_ctx;
    void (*deleter)(struct versioned_tensor *self);
    uint64_t flags;
    DLTensor dl_tensor;
} versioned_tensor;

enum { FLAG_READ_ONLY = 1, FLAG_IS_COPIED = 2 };

typedef struct exchange_header {
    dlpack_version version;
    struct exchange_header *previous;
} exchange_header;

typedef struct exchange_api {
    exchange_header header;
    int (*allocate)(DLTensor *prototype, versioned_tensor **out, void *error_ctx,
                    void (*set_error)(void *error_ctx, const char *kind, const char *message));
    int (*managed_from_object)(void *object, versioned_tensor **out);
    int (*managed_to_object)(versioned_tensor *tensor, void **object);
    int (*tensor_from_object)(void *object, DLTensor *out);
    int (*current_work_stream)(DLDeviceType device_type, int32_t device_id, void **stream);
} exchange_api;

static const char versioned_name[] = "dltensor_versioned", used_versioned_name[] = "used_dltensor_versioned";
static const char unversioned_name[] = "dltensor", used_unversioned_name[] = "used_dltensor";

/* ---- errors ----------------------------------------------------------------------------------------------------------- */

static bool refuse_to_write(const char *op, const char *name) {
    PyErr_Format(PyExc_ValueError, "%s: %s is read-only", op, name);
    return false;
}

/* str(cause) on one line, without the backtrace that PyTorch's may end with; a new reference. */
static PyObject *in_one_line(PyObject *cause) {
    PyObject *text = PyObject_Str(cause);
    PyObject *parts = text ? PyObject_CallMethod(text, "partition", "s", "Exception raised from ") : NULL;
    PyObject *words = parts ? PyUnicode_Split(PyTuple_GET_ITEM(parts, 0), NULL, -1) : NULL;
    PyObject *space = words ? PyUnicode_FromString(" ") : NULL, *line = space ? PyUnicode_Join(space, words) : NULL;
    Py_XDECREF(space);
    Py_XDECREF(words);
    Py_XDECREF(parts);
    Py_XDECREF(text);
    if (line && PyUnicode_GET_LENGTH(line) > 0) return line;
    Py_XDECREF(line);
    PyErr_Clear(); /* of an exception that cannot be printed */
    return PyUnicode_FromString(Py_TYPE(cause)->tp_name);
}

/* Turns what the array's library raised into a ValueError that names the argument and keeps the other as its cause. */
static bool refuse_export(const char *op, const char *name) {
    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) return false;
    PyObject *type, *cause, *traceback;
    PyErr_Fetch(&type, &cause, &traceback);
    PyErr_NormalizeException(&type, &cause, &traceback);
    if (traceback) PyException_SetTraceback(cause, traceback);
    Py_DECREF(type);
    Py_XDECREF(traceback);

    PyObject *error, *line = in_one_line(cause);
    if (line) PyErr_Format(PyExc_ValueError, "%s: the memory of %s cannot be shared: %U", op, name, line);
    Py_XDECREF(line);
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    PyException_SetCause(error, cause); /* takes the reference */
    PyErr_Restore(type, error, traceback);
    return false;
}

/* A new reference in *value, or NULL where there is no such attribute; false on any other error. */
static bool optional_attribute(PyObject *object, PyObject *name, PyObject **value) {
    *value = PyObject_GetAttr(object, name);
    if (*value) return true;
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return false;
    PyErr_Clear();
    return true;
}

/* ---- from an object to its DLTensor ------------------------------------------------------------------------------------- */

static bool numpy_dtype(const PyArray_Descr *descr, DLDataType *dtype) {
    npy_intp size = PyDataType_ELSIZE(descr);
    DLDataTypeCode code;
    switch (descr->kind) {
    case 'f': code = kDLFloat; break;
    case 'i': code = kDLInt; break;
    case 'u': code = kDLUInt; break;
    case 'b': code = (DLDataTypeCode)METALLOID_DL_BOOL; break;
    case 'c': code = (DLDataTypeCode)METALLOID_DL_COMPLEX; break;
    case 'V': { /* where user-defined types stand */
        const char *name = descr->typeobj->tp_name, *dot = strrchr(name, '.');
        if (size != 2 || strcmp(dot ? dot + 1 : name, "bfloat16") != 0) return false;
        code = kDLBfloat;
        break;
    }
    default: return false;
    }
    if (size > 8) return false;
    *dtype = (DLDataType){(uint8_t)code, (uint8_t)(8 * size), 1};
    return true;
}

static bool open_numpy(mtl_array *opened, PyArrayObject *numpy, bool writable, const char *op, const char *name) {
    DLTensor *tensor = &opened->tensor;
    PyArray_Descr *descr = PyArray_DESCR(numpy);
    if (!numpy_dtype(descr, &tensor->dtype) || PyArray_ISBYTESWAPPED(numpy)) {
        PyErr_Format(PyExc_ValueError, "%s: %s has the dtype %S, which no operation takes", op, name, descr);
        return false;
    }
    if (writable && !PyArray_ISWRITEABLE(numpy)) return refuse_to_write(op, name);
    int size = tensor->dtype.bits / 8, shift = size == 1 ? 0 : size == 2 ? 1 : size == 4 ? 2 : 3;
    const npy_intp *shape = PyArray_DIMS(numpy), *strides = PyArray_STRIDES(numpy);
    tensor->data = PyArray_DATA(numpy);
    tensor->device = (DLDevice){kDLCPU, 0};
    tensor->ndim = PyArray_NDIM(numpy);
    tensor->byte_offset = 0;
    tensor->shape = opened->shape;
    tensor->strides = opened->strides;
    for (int axis = 0; axis < tensor->ndim; axis++) {
        if (strides[axis] & (size - 1) && shape[axis] > 1) {
            PyErr_Format(PyExc_ValueError,
                         "%s: axis %d of %s has a stride of %zd bytes, no multiple of the %d of an element", op, axis,
                         name, strides[axis], size);
            return false;
        }
        opened->shape[axis] = shape[axis];
        opened->strides[axis] = strides[axis] >> shift;
    }
    return true;
}

/* Copies the description, which in the object's own memory would be at the mercy of other threads. */
static bool take_tensor(mtl_array *opened, const DLTensor *tensor, const char *op, const char *name) {
    if (tensor->ndim < 0 || tensor->ndim > MAX_RANK) {
        PyErr_Format(PyExc_ValueError, "%s: %s must have rank 0 to %d, got %d", op, name, (int)MAX_RANK,
                     (int)tensor->ndim);
        return false;
    }
    opened->tensor = *tensor;
    if (tensor->ndim == 0) return true;
    if (!tensor->shape) {
        PyErr_Format(PyExc_ValueError, "%s: %s has rank %d but no shape", op, name, (int)tensor->ndim);
        return false;
    }
    memcpy(opened->shape, tensor->shape, (size_t)tensor->ndim * sizeof opened->shape[0]);
    opened->tensor.shape = opened->shape;
    for (int axis = 0; axis < tensor->ndim; axis++) { /* results are allocated before the operation looks at it */
        if (opened->shape[axis] >= 0) continue;
        PyErr_Format(PyExc_ValueError, "%s: %s must not have a negative extent, got %lld at axis %d", op, name,
                     (long long)opened->shape[axis], axis);
        return false;
    }
    if (tensor->strides) {
        memcpy(opened->strides, tensor->strides, (size_t)tensor->ndim * sizeof opened->strides[0]);
        opened->tensor.strides = opened->strides;
    }
    return true;
}

static bool take_versioned(mtl_array *opened, versioned_tensor *managed, bool writable, const char *op,
                           const char *name) {
    opened->managed = managed;
    opened->versioned = true;
    if (managed->version.major != 1) {
        PyErr_Format(PyExc_ValueError, "%s: %s comes by DLPack %u, only 1 is known", op, name,
                     (unsigned)managed->version.major);
        return false;
    }
    if (writable && managed->flags & FLAG_READ_ONLY) return refuse_to_write(op, name);
    if (writable && managed->flags & FLAG_IS_COPIED) {
        PyErr_Format(PyExc_ValueError, "%s: %s was exported as a copy, which nobody would see written", op, name);
        return false;
    }
    return take_tensor(opened, &managed->dl_tensor, op, name);
}

static bool open_exchange(mtl_array *opened, PyObject *capsule, PyObject *object, bool writable, const char *op,
                          const char *name) {
    const exchange_api *api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (!api) return refuse_export(op, name);
    bool taken;
    if (!writable && api->tensor_from_object) {
        DLTensor tensor;
        if (api->tensor_from_object(object, &tensor) != 0) return refuse_export(op, name);
        taken = take_tensor(opened, &tensor, op, name);
    } else {
        versioned_tensor *managed; /* says whether it may be written */
        if (api->managed_from_object(object, &managed) != 0) return refuse_export(op, name);
        taken = take_versioned(opened, managed, writable, op, name);
    }
    if (!taken || !array_on_cuda(opened)) return taken;
    return api->current_work_stream(kDLCUDA, opened->tensor.device.device_id, &opened->stream) == 0 ||
           refuse_export(op, name);
}

/* Whether the table is one of DLPack 1.x; NULL for none. */
static bool usable_exchange(PyObject *capsule) {
    const exchange_header *header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (!header) PyErr_Clear();
    return header && header->version.major == 1;
}

/* 1: an array of the class `type` of `library`, whose module goes to *module (borrowed); 0: not; -1: error. */
static int is_of(PyObject *object, PyObject *library, PyObject *type, PyObject **module) {
    *module = PyDict_GetItemWithError(PyImport_GetModuleDict(), library);
    if (!*module) return PyErr_Occurred() ? -1 : 0;
    PyObject *class = PyObject_GetAttr(*module, type);
    if (!class) {
        PyErr_Clear(); /* another module of that name */
        return 0;
    }
    int is = PyObject_IsInstance(object, class);
    Py_DECREF(class);
    return is;
}

/* Of NumPy's subclasses a masked array is not what its memory says. */
static bool check_unmasked(module_state *state, PyObject *object, const char *op, const char *name) {
    if (PyArray_CheckExact(object)) return true;
    PyObject *module;
    int is = is_of(object, state->numpy_ma, state->masked_array, &module);
    if (is > 0) {
        PyErr_Format(PyExc_TypeError,
                     "%s: %s is a masked array, whose mask would be lost: pass %s.filled(value) or %s.data", op, name,
                     name, name);
    }
    return is == 0;
}

/* CuPy tells its current stream by Python alone. */
static bool find_stream(mtl_array *opened, module_state *state) {
    PyObject *cupy;
    int is = is_of(opened->object, state->cupy, state->ndarray, &cupy);
    if (is <= 0) return is == 0;
    PyObject *cuda = PyObject_GetAttrString(cupy, "cuda");
    PyObject *stream = cuda ? PyObject_CallMethod(cuda, "get_current_stream", NULL) : NULL;
    PyObject *address = stream ? PyObject_GetAttrString(stream, "ptr") : NULL;
    if (address) opened->stream = PyLong_AsVoidPtr(address);
    Py_XDECREF(address);
    Py_XDECREF(stream);
    Py_XDECREF(cuda);
    return !PyErr_Occurred();
}

static bool open_capsule(mtl_array *opened, module_state *state, PyObject *method, bool writable, const char *op,
                         const char *name) {
    PyObject *capsule = PyObject_Vectorcall(method, &state->max_version, 0, state->max_version_name);
    if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) { /* an exporter older than DLPack 1.0 */
        PyErr_Clear();
        capsule = PyObject_CallNoArgs(method);
    }
    if (!capsule) return refuse_export(op, name);

    bool done = false;
    if (PyCapsule_IsValid(capsule, versioned_name)) {
        versioned_tensor *managed = PyCapsule_GetPointer(capsule, versioned_name);
        PyCapsule_SetName(capsule, used_versioned_name);
        done = take_versioned(opened, managed, writable, op, name);
    } else if (PyCapsule_IsValid(capsule, unversioned_name)) {
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, unversioned_name);
        PyCapsule_SetName(capsule, used_unversioned_name);
        opened->managed = managed;
        opened->versioned = false;
        done = take_tensor(opened, &managed->dl_tensor, op, name);
    } else {
        PyErr_Format(PyExc_ValueError, "%s: __dlpack__ of %s returned no DLPack capsule", op, name);
    }
    Py_DECREF(capsule);
    return done && (!array_on_cuda(opened) || find_stream(opened, state) || refuse_export(op, name));
}

/* That a PyTorch tensor is no view of memory that holds its values otherwise, as `method` would say. */
static bool check_view(PyObject *object, PyObject *method, const char *stored, const char *resolve, const char *op,
                       const char *name) {
    PyObject *is_view = PyObject_CallMethodNoArgs(object, method);
    if (!is_view && !PyErr_ExceptionMatches(PyExc_AttributeError)) return false;
    if (!is_view) PyErr_Clear();
    Py_XDECREF(is_view);
    if (is_view != Py_True) return true;
    PyErr_Format(PyExc_ValueError, "%s: %s is a view of %s memory: pass %s.%s()", op, name, stored, name, resolve);
    return false;
}

/* What a PyTorch tensor says beside its memory: false for one that records gradients, where they would get lost, and for one whose
 * memory holds its negated values. */
static bool check_tensor(module_state *state, PyObject *object, PyObject *requires_grad, const char *op,
                         const char *name) {
    if (requires_grad == Py_True) {
        PyObject *torch = PyDict_GetItemWithError(PyImport_GetModuleDict(), state->torch);
        PyObject *enabled = torch ? PyObject_CallMethodNoArgs(torch, state->is_grad_enabled) : NULL;
        if (!enabled && PyErr_Occurred()) return false;
        Py_XDECREF(enabled);
        if (enabled == Py_True) {
            bool kernel = strstr(op, "kernel") != NULL; /* of the user's, whose gradient nobody knows */
            PyErr_Format(
                PyExc_ValueError,
                "%s: %s requires gradients, which this function does not record: %s%s%spass %s.detach(), or call it "
                "under torch.no_grad()",
                op, name, kernel ? "" : "call metalloid.torch.", kernel ? "" : op, kernel ? "" : ", ", name);
            return false;
        }
    }
    return check_view(object, state->is_neg, "negated", "resolve_neg", op, name);
}

bool array_open(mtl_array *opened, module_state *state, PyObject *object, bool writable, const char *op,
                const char *name) {
    opened->object = object;
    opened->stream = NULL;
    opened->detached = NULL;
    opened->managed = NULL;
    if (PyArray_Check(object))
        return check_unmasked(state, object, op, name) &&
               open_numpy(opened, (PyArrayObject *)object, writable, op, name);

    PyObject *attribute = NULL, *requires_grad;
    if (PyType_Check(object)) goto no_array; /* a class has its arrays' attributes */
    if (!optional_attribute(object, state->requires_grad, &requires_grad)) return refuse_export(op, name);
    Py_XDECREF(requires_grad);
    if (requires_grad && !check_tensor(state, object, requires_grad, op, name)) return false;

    if (!optional_attribute((PyObject *)Py_TYPE(object), state->exchange_api, &attribute))
        return refuse_export(op, name);
    if (attribute && usable_exchange(attribute)) {
        bool done = open_exchange(opened, attribute, object, writable, op, name);
        Py_DECREF(attribute);
        if (done && requires_grad && opened->tensor.dtype.code == kDLComplex)
            done = check_view(object, state->is_conj, "conjugated", "resolve_conj", op, name);
        return done;
    }
    Py_XDECREF(attribute);

    if (requires_grad == Py_True) { /* whose __dlpack__ refuses */
        object = opened->detached = PyObject_CallMethod(object, "detach", NULL);
        if (!object) return refuse_export(op, name);
    }
    if (!optional_attribute(object, state->dlpack, &attribute)) return refuse_export(op, name);
    if (attribute) {
        bool done = open_capsule(opened, state, attribute, writable, op, name);
        Py_DECREF(attribute);
        return done;
    }
no_array:
    PyErr_Format(PyExc_TypeError, "%s: %s must be an array of NumPy or another library with __dlpack__, got %.200s", op,
                 name, Py_TYPE(object)->tp_name);
    return false;
}

void array_close(mtl_array *opened) {
    if (!opened->managed && !opened->detached) return;
    PyObject *type, *value, *traceback; /* a deleter may run Python code */
    PyErr_Fetch(&type, &value, &traceback);
    if (opened->managed && opened->versioned) {
        versioned_tensor *managed = opened->managed;
        if (managed->deleter) managed->deleter(managed);
    } else if (opened->managed) {
        DLManagedTensor *managed = opened->managed;
        if (managed->deleter) managed->deleter(managed);
    }
    Py_XDECREF(opened->detached);
    PyErr_Restore(type, value, traceback);
}

/* ---- results for a library known by its protocols alone ------------------------------------------------------------------ */

/* Memory that another library takes over by its from_dlpack: an array of NumPy's with the dtype that its bits stand for. */
typedef struct memory {
    PyObject_VAR_HEAD PyArrayObject *bits;
    PyObject *from_dlpack; /* of that library */
    DLDataType dtype;
    int64_t shape[1]; /* ob_size of them */
} memory;

static void memory_dealloc(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(((memory *)self)->bits);
    Py_XDECREF(((memory *)self)->from_dlpack);
    type->tp_free(self);
    Py_DECREF(type);
}

/* What a capsule owns: both forms of DLPack in one block, the shape behind. */
typedef struct exported {
    union {
        DLManagedTensor unversioned;
        versioned_tensor versioned;
    } managed;
    PyArrayObject *bits;
    int64_t shape[];
} exported;

static void exported_delete(exported *block) {
    PyGILState_STATE gil = PyGILState_Ensure(); /* consumers may call from any thread */
    Py_DECREF(block->bits);
    PyMem_Free(block);
    PyGILState_Release(gil);
}

static void versioned_delete(versioned_tensor *self) { exported_delete(self->manager_ctx); }
static void unversioned_delete(DLManagedTensor *self) { exported_delete(self->manager_ctx); }

static void capsule_delete(PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, versioned_name) || PyCapsule_IsValid(capsule, unversioned_name)) {
        exported_delete(PyCapsule_GetContext(capsule));
    }
}

static PyObject *memory_dlpack(PyObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = NULL, *max_version = NULL, *device = NULL, *copy = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO", names, &stream, &max_version, &device, &copy)) return NULL;
    if (copy == Py_True) {
        PyErr_SetString(PyExc_BufferError, "the memory of a result is not copied");
        return NULL;
    }
    unsigned major = 0, minor = 0;
    if (max_version && max_version != Py_None && !PyArg_ParseTuple(max_version, "II", &major, &minor)) return NULL;

    memory *source = (memory *)self;
    size_t rank = (size_t)Py_SIZE(self);
    exported *block = PyMem_Malloc(sizeof *block + rank * sizeof block->shape[0]);
    if (!block) return PyErr_NoMemory();
    memcpy(block->shape, source->shape, rank * sizeof block->shape[0]);
    DLTensor tensor = {.data = PyArray_DATA(source->bits),
                       .device = {kDLCPU, 0},
                       .ndim = (int)rank,
                       .dtype = source->dtype,
                       .shape = block->shape};
    const char *name = unversioned_name;
    if (major >= 1) {
        block->managed.versioned = (versioned_tensor){
            .version = {1, 0}, .manager_ctx = block, .deleter = versioned_delete, .dl_tensor = tensor};
        name = versioned_name;
    } else {
        block->managed.unversioned =
            (DLManagedTensor){.dl_tensor = tensor, .manager_ctx = block, .deleter = unversioned_delete};
    }
    block->bits = source->bits;
    PyObject *capsule = PyCapsule_New(&block->managed, name, NULL);
    if (!capsule) {
        PyMem_Free(block);
        return NULL;
    }
    Py_INCREF(block->bits);
    PyCapsule_SetContext(capsule, block);
    PyCapsule_SetDestructor(capsule, capsule_delete);
    return capsule;
}

static PyObject *memory_dlpack_device(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return Py_BuildValue("ii", (int)kDLCPU, 0);
}

static PyMethodDef memory_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))memory_dlpack, METH_VARARGS | METH_KEYWORDS, NULL},
    {"__dlpack_device__", memory_dlpack_device, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot memory_slots[] = {
    {Py_tp_dealloc, (void *)memory_dealloc},
    {Py_tp_methods, memory_methods},
    {Py_tp_doc, "Memory of a result, on its way into the caller's array library."},
    {0, NULL},
};

static PyType_Spec memory_spec = {
    .name = "metalloid._native.Memory",
    .basicsize = offsetof(memory, shape),
    .itemsize = sizeof(int64_t),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = memory_slots,
};

/* Asked for before the call writes anything: a library without it is an error. */
static PyObject *from_dlpack_of(PyObject *array, const char *op) {
    PyObject *namespace = PyObject_CallMethod(array, "__array_namespace__", NULL);
    PyObject *function = namespace ? PyObject_GetAttrString(namespace, "from_dlpack") : NULL;
    Py_XDECREF(namespace);
    if (!function && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Format(PyExc_ValueError,
                     "%s: results cannot be allocated as %.200s, which has no __array_namespace__: pass out=", op,
                     Py_TYPE(array)->tp_name);
    }
    return function;
}

/* ---- memory for results --------------------------------------------------------------------------------------------------- */

static PyDataMem_Handler results_handler = {
    "metalloid_results", 1, {NULL, results_malloc, results_calloc, results_realloc, results_free}};

/* An array of NumPy's, not initialized. */
static PyObject *new_array(int rank, const int64_t *shape, int type, int64_t item_size) {
    npy_intp extents[MAX_RANK];
    int64_t bytes = item_size;
    for (int axis = 0; axis < rank; axis++) bytes *= extents[axis] = (npy_intp)shape[axis];
    if (bytes < RESULTS_KEPT_FROM) return PyArray_SimpleNew(rank, extents, type);
    PyObject *ours = PyCapsule_New(&results_handler, "mem_handler", NULL);
    PyObject *before = ours ? PyDataMem_SetHandler(ours) : NULL;
    Py_XDECREF(ours);
    if (!before) return NULL;
    PyObject *array = PyArray_SimpleNew(rank, extents, type), *type_raised, *value, *traceback;
    PyErr_Fetch(&type_raised, &value, &traceback);
    Py_XDECREF(PyDataMem_SetHandler(before));
    Py_DECREF(before);
    PyErr_Restore(type_raised, value, traceback);
    return array;
}

static PyObject *allocate_memory(mtl_array *opened, module_state *state, const mtl_array *like, DLDataType dtype,
                                 int rank, const int64_t *shape, const char *op) {
    PyObject *from_dlpack = from_dlpack_of(like->object, op);
    if (!from_dlpack) return NULL;
    int type = dtype.bits == 16 ? NPY_UINT16 : dtype.bits == 32 ? NPY_UINT32 : NPY_UINT64;
    PyObject *bits = new_array(rank, shape, type, dtype.bits / 8);
    memory *result = bits ? (memory *)state->memory_type->tp_alloc(state->memory_type, rank) : NULL;
    if (!result) {
        Py_XDECREF(bits);
        Py_DECREF(from_dlpack);
        return NULL;
    }
    result->bits = (PyArrayObject *)bits;
    result->from_dlpack = from_dlpack;
    result->dtype = dtype;
    memcpy(result->shape, shape, (size_t)rank * sizeof shape[0]);
    opened->tensor = (DLTensor){.data = PyArray_DATA(result->bits),
                                .device = {kDLCPU, 0},
                                .ndim = rank,
                                .dtype = dtype,
                                .shape = opened->shape};
    memcpy(opened->shape, shape, (size_t)rank * sizeof shape[0]);
    opened->object = (PyObject *)result;
    opened->stream = NULL;
    opened->detached = opened->managed = NULL;
    return (PyObject *)result;
}

static PyObject *allocate_numpy(const mtl_array *like, DLDataType dtype, int rank, const int64_t *shape) {
    int type;
    if (dtype.code == kDLBfloat) type = PyArray_TYPE((PyArrayObject *)like->object); /* only bfloat16 gives bfloat16 */
    else type = dtype.bits == 16 ? NPY_HALF : dtype.bits == 32 ? NPY_FLOAT : NPY_DOUBLE;
    return new_array(rank, shape, type, dtype.bits / 8);
}

static PyObject *allocate_torch(module_state *state, PyObject *torch, PyObject *like, DLDataType dtype, int rank,
                                const int64_t *shape) {
    PyObject *result = NULL, *empty = NULL, *type = NULL, *device = NULL, *extents = PyTuple_New(rank);
    if (!extents) return NULL;
    for (int axis = 0; axis < rank; axis++) {
        PyObject *extent = PyLong_FromLongLong(shape[axis]);
        if (!extent) goto done;
        PyTuple_SET_ITEM(extents, axis, extent);
    }
    type = PyObject_GetAttr(torch, dtype.code == kDLBfloat ? state->bfloat16
                                   : dtype.bits == 16      ? state->float16
                                   : dtype.bits == 32      ? state->float32
                                                           : state->float64);
    empty = PyObject_GetAttr(torch, state->empty);
    device = PyObject_GetAttr(like, state->device);
    if (type && empty && device)
        result = PyObject_Vectorcall(empty, (PyObject *[]){extents, type, device}, 1, state->dtype_and_device);
done:
    Py_XDECREF(device);
    Py_XDECREF(empty);
    Py_XDECREF(type);
    Py_DECREF(extents);
    return result;
}

/* On the device and in the order of the stream that `like` is used on: that of CuPy's allocator. */
static PyObject *allocate_cupy(PyObject *cupy, PyObject *like, DLDataType dtype, int rank, const int64_t *shape) {
    PyObject *result = NULL, *extents = PyTuple_New(rank), *type = NULL, *device = NULL, *entered = NULL;
    for (int axis = 0; extents && axis < rank; axis++)
        PyTuple_SET_ITEM(extents, axis, PyLong_FromLongLong(shape[axis])); /* NULL of a failure is an error below */
    if (!extents || PyErr_Occurred()) goto done;
    if (dtype.code == kDLBfloat) type = PyObject_GetAttrString(like, "dtype"); /* only bfloat16 gives bfloat16 */
    else type = PyUnicode_FromString(dtype.bits == 16 ? "float16" : dtype.bits == 32 ? "float32" : "float64");
    device = type ? PyObject_GetAttrString(like, "device") : NULL;
    entered = device ? PyObject_CallMethod(device, "__enter__", NULL) : NULL;
    if (!entered) goto done;
    result = PyObject_CallMethod(cupy, "empty", "OO", extents, type);
    PyObject *kind, *value, *traceback;
    PyErr_Fetch(&kind, &value, &traceback);
    PyObject *left = PyObject_CallMethod(device, "__exit__", "OOO", Py_None, Py_None, Py_None);
    if (!left) Py_CLEAR(result);
    Py_XDECREF(left);
    if (kind) PyErr_Restore(kind, value, traceback);
done:
    Py_XDECREF(entered);
    Py_XDECREF(device);
    Py_XDECREF(type);
    Py_XDECREF(extents);
    return result;
}

PyObject *array_allocate(mtl_array *opened, module_state *state, const mtl_array *like, DLDataType dtype, int rank,
                         const int64_t *shape, const char *op) {
    PyObject *result, *torch, *cupy = NULL;
    npy_intp bytes = dtype.bits / 8;
    for (int axis = 0; axis < rank; axis++) {
        if (shape[axis] && __builtin_mul_overflow(bytes, shape[axis], &bytes)) {
            PyErr_Format(PyExc_ValueError, "%s: out would be too large: its size in bytes overflows", op);
            return NULL;
        }
    }
    if (PyArray_Check(like->object)) {
        result = allocate_numpy(like, dtype, rank, shape);
    } else {
        int is = is_of(like->object, state->torch, state->tensor, &torch);
        int of_cupy = is == 0 ? is_of(like->object, state->cupy, state->ndarray, &cupy) : 0;
        if (is < 0 || of_cupy < 0) return NULL;
        DLDeviceType device = like->tensor.device.device_type;
        if (device != kDLCPU && device != kDLCUDAHost && !(MTL_WITH_CUDA && array_on_cuda(like))) {
            PyErr_Format(PyExc_RuntimeError,
                         "%s: the arrays are on a device of DLPack type %d, which no backend of this build serves", op,
                         (int)device);
            return NULL;
        }
        if (!is && !of_cupy && array_on_cuda(like)) {
            PyErr_Format(
                PyExc_RuntimeError,
                "%s: results on a CUDA device are allocated as PyTorch's and CuPy's arrays alone: pass out=", op);
            return NULL;
        }
        if (is) result = allocate_torch(state, torch, like->object, dtype, rank, shape);
        else if (of_cupy) result = allocate_cupy(cupy, like->object, dtype, rank, shape);
        else return allocate_memory(opened, state, like, dtype, rank, shape, op);
    }
    if (result && !array_open(opened, state, result, false, op, "out")) {
        array_close(opened);
        Py_CLEAR(result);
    }
    return result;
}

PyObject *array_finish(PyObject *allocated, module_state *state) {
    if (Py_TYPE(allocated) != state->memory_type) return allocated;
    PyObject *result = PyObject_CallOneArg(((memory *)allocated)->from_dlpack, allocated);
    Py_DECREF(allocated);
    return result;
}

/* ---- set-up --------------------------------------------------------------------------------------------------------------- */

bool arrays_init(PyObject *module, module_state *state) {
    if (PyArray_ImportNumPyAPI() < 0) return false;
    const struct {
        PyObject **name;
        const char *text;
    } names[] = {{&state->dlpack, "__dlpack__"},
                 {&state->exchange_api, "__dlpack_c_exchange_api__"},
                 {&state->requires_grad, "requires_grad"},
                 {&state->is_grad_enabled, "is_grad_enabled"},
                 {&state->is_neg, "is_neg"},
                 {&state->is_conj, "is_conj"},
                 {&state->torch, "torch"},
                 {&state->tensor, "Tensor"},
                 {&state->numpy_ma, "numpy.ma"},
                 {&state->masked_array, "MaskedArray"},
                 {&state->cupy, "cupy"},
                 {&state->ndarray, "ndarray"},
                 {&state->empty, "empty"},
                 {&state->device, "device"},
                 {&state->float64, "float64"},
                 {&state->float32, "float32"},
                 {&state->float16, "float16"},
                 {&state->bfloat16, "bfloat16"}};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        *names[i].name = PyUnicode_InternFromString(names[i].text);
        if (!*names[i].name) return false;
    }
    state->max_version_name = Py_BuildValue("(s)", "max_version");
    state->max_version = Py_BuildValue("(ii)", 1, 3);
    state->dtype_and_device = Py_BuildValue("(ss)", "dtype", "device");
    state->memory_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &memory_spec, NULL);
    state->routes = PyDict_New();
    return state->max_version_name && state->max_version && state->dtype_and_device && state->memory_type &&
           state->routes;
}

void arrays_clear(module_state *state) {
    Py_CLEAR(state->dlpack);
    Py_CLEAR(state->exchange_api);
    Py_CLEAR(state->requires_grad);
    Py_CLEAR(state->is_grad_enabled);
    Py_CLEAR(state->is_neg);
    Py_CLEAR(state->is_conj);
    Py_CLEAR(state->torch);
    Py_CLEAR(state->tensor);
    Py_CLEAR(state->numpy_ma);
    Py_CLEAR(state->masked_array);
    Py_CLEAR(state->cupy);
    Py_CLEAR(state->ndarray);
    Py_CLEAR(state->empty);
    Py_CLEAR(state->device);
    Py_CLEAR(state->float64);
    Py_CLEAR(state->float32);
    Py_CLEAR(state->float16);
    Py_CLEAR(state->bfloat16);
    Py_CLEAR(state->max_version_name);
    Py_CLEAR(state->max_version);
    Py_CLEAR(state->dtype_and_device);
    Py_CLEAR(state->memory_type);
    Py_CLEAR(state->routes);
}
