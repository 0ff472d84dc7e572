/* Calls for libraries that have functions of their own here: metalloid.jax, metalloid.mlx. SPDX-License-Identifier: MIT
 *
 * Their arrays are values: traced, differentiated, and never written to. A call whose first argument is one of them goes to the
 * function of the same name in that module. */
#ifndef METALLOID_PYTHON_ROUTE_H
#define METALLOID_PYTHON_ROUTE_H

#include "array.h"

/* The name of the module for arrays like this one, borrowed; None where they are served here; NULL with an exception. */
PyObject *route_of(module_state *state, PyObject *array);

/* Whether the call went elsewhere, its result or NULL in *result. */
bool route_call(PyObject *module, const char *name, PyObject *const *arguments, Py_ssize_t given, PyObject *keywords,
                PyObject **result);

#endif
