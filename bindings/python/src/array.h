/* Python arrays as DLPack views, without a copy, and memory for results. SPDX-License-Identifier: MIT */
#ifndef METALLOID_PYTHON_ARRAY_H
#define METALLOID_PYTHON_ARRAY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <metalloid/metalloid.h>

enum { MAX_RANK = 64 };

/* What the module keeps: names it looks up, made once. */
typedef struct module_state {
    PyObject *dlpack, *exchange_api, *requires_grad, *max_version_name, *max_version;
    PyObject *is_grad_enabled, *is_neg, *is_conj, *torch, *tensor, *numpy_ma, *masked_array, *cupy, *ndarray, *empty,
        *device, *float64, *float32, *float16, *bfloat16, *dtype_and_device;
    PyTypeObject *memory_type;
    PyObject *routes; /* {type: what route_of returns} */
} module_state;

/* One array of a call. `object` is borrowed: the caller of a function holds its arguments until the function returns, so that the
 * memory stays while the GIL is released. */
typedef struct mtl_array {
    DLTensor tensor; /* shape and strides point to those below, strides may be NULL */
    PyObject *object;
    void
        *stream; /* its library's current one on the tensor's CUDA device; NULL, the legacy default stream, elsewhere */
    PyObject *detached; /* a tensor made for this call, or NULL */
    void *managed;      /* a consumed DLPack capsule's, or NULL */
    bool versioned;     /* what `managed` is */
    int64_t shape[MAX_RANK], strides[MAX_RANK];
} mtl_array;

static inline bool array_on_cuda(const mtl_array *array) {
    return array->tensor.device.device_type == kDLCUDA || array->tensor.device.device_type == kDLCUDAManaged;
}

/* Once a module. */
bool arrays_init(PyObject *module, module_state *state);
void arrays_clear(module_state *state);

/* False with an exception set: TypeError for what is no array, ValueError for one that cannot be viewed, or not written to. After
 * either outcome array_close is due. */
bool array_open(mtl_array *opened, module_state *state, PyObject *object, bool writable, const char *op,
                const char *name);
void array_close(mtl_array *opened);

/* Row-contiguous memory, viewed by `opened`, in the library of `like`. Returns a new reference, which array_finish turns into the
 * array that the caller gets. */
PyObject *array_allocate(mtl_array *opened, module_state *state, const mtl_array *like, DLDataType dtype, int rank,
                         const int64_t *shape, const char *op);
PyObject *array_finish(PyObject *allocated, module_state *state);

#endif
