/* What metalloid.jax and metalloid.mlx are made of: the operations by name. SPDX-License-Identifier: MIT */
#ifndef METALLOID_PYTHON_BY_NAME_H
#define METALLOID_PYTHON_BY_NAME_H

#include "array.h"

bool by_name_init(PyObject *module);

#endif
