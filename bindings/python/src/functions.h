/* The operations as Python functions. SPDX-License-Identifier: MIT */
#ifndef METALLOID_PYTHON_FUNCTIONS_H
#define METALLOID_PYTHON_FUNCTIONS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

extern PyMethodDef functions[]; /* ends with an empty entry */

#endif
