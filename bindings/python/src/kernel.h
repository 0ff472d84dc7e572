/* metalloid_kernel as a Python type. SPDX-License-Identifier: MIT */
#ifndef METALLOID_PYTHON_KERNEL_H
#define METALLOID_PYTHON_KERNEL_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

bool kernel_init(PyObject *module); /* adds the type */

#endif
