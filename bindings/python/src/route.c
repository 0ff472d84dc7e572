/* Calls for libraries that have functions of their own here. SPDX-License-Identifier: MIT */
#include "route.h"

#include <string.h>

/* By the package that a type comes from and the class that its arrays, traced ones too, are of. */
static const struct {
    const char *package, *module, *array, *route;
} libraries[] = {{"jax.", "jax", "Array", "metalloid.jax"},
                 {"jaxlib.", "jax", "Array", "metalloid.jax"},
                 {"mlx.", "mlx.core", "array", "metalloid.mlx"}};

static bool is_of(PyObject *object, const char *module_name, const char *class_name) {
    PyObject *module = PyDict_GetItemString(PyImport_GetModuleDict(), module_name); /* borrowed */
    PyObject *class = module ? PyObject_GetAttrString(module, class_name) : NULL;
    int is = class ? PyObject_IsInstance(object, class) : 0;
    Py_XDECREF(class);
    PyErr_Clear(); /* another module of that name */
    return is == 1;
}

/* A new reference. */
static PyObject *find_route(PyObject *object) {
    PyObject *package = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__module__");
    const char *name = package && PyUnicode_Check(package) ? PyUnicode_AsUTF8(package) : NULL;
    PyErr_Clear();
    const char *route = NULL;
    for (size_t i = 0; name && !route && i < sizeof libraries / sizeof libraries[0]; i++) {
        if (strncmp(name, libraries[i].package, strlen(libraries[i].package)) != 0) continue;
        if (is_of(object, libraries[i].module, libraries[i].array)) route = libraries[i].route;
    }
    Py_XDECREF(package);
    return route ? PyUnicode_FromString(route) : Py_NewRef(Py_None);
}

PyObject *route_of(module_state *state, PyObject *array) {
    PyObject *type = (PyObject *)Py_TYPE(array);
    PyObject *route = PyDict_GetItemWithError(state->routes, type);
    if (route || PyErr_Occurred()) return route;
    route = find_route(array);
    if (route && PyDict_SetItem(state->routes, type, route) < 0) Py_CLEAR(route);
    Py_XDECREF(route); /* the dictionary has it */
    return route;
}

/* Arrays that do not change take no out=; where it is None it is left out. */
static PyObject *call_elsewhere(PyObject *function, const char *name, PyObject *const *arguments, Py_ssize_t given,
                                PyObject *keywords) {
    Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    for (Py_ssize_t i = 0; i < named; i++) {
        if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(keywords, i), "out") != 0) continue;
        if (arguments[given + i] != Py_None) {
            return PyErr_Format(PyExc_ValueError, "%s: out cannot be given where arrays do not change, as those of %s",
                                name, Py_TYPE(arguments[0])->tp_name);
        }
        PyObject *others = PyDict_New(), *positional = PyTuple_New(given), *result = NULL;
        bool ready = others && positional;
        for (Py_ssize_t j = 0; ready && j < given; j++) PyTuple_SET_ITEM(positional, j, Py_NewRef(arguments[j]));
        for (Py_ssize_t j = 0; ready && j < named; j++) {
            if (j != i) ready = PyDict_SetItem(others, PyTuple_GET_ITEM(keywords, j), arguments[given + j]) == 0;
        }
        if (ready) result = PyObject_Call(function, positional, others);
        Py_XDECREF(others);
        Py_XDECREF(positional);
        return result;
    }
    return PyObject_Vectorcall(function, arguments, (size_t)given, keywords);
}

bool route_call(PyObject *module, const char *name, PyObject *const *arguments, Py_ssize_t given, PyObject *keywords,
                PyObject **result) {
    if (given + (keywords ? PyTuple_GET_SIZE(keywords) : 0) == 0) return false;
    PyObject *route = route_of(PyModule_GetState(module), arguments[0]);
    if (route == Py_None) return false;
    PyObject *elsewhere = route ? PyImport_Import(route) : NULL;
    PyObject *function = elsewhere ? PyObject_GetAttrString(elsewhere, name) : NULL;
    *result = function ? call_elsewhere(function, name, arguments, given, keywords) : NULL;
    Py_XDECREF(function);
    Py_XDECREF(elsewhere);
    return true;
}
