/* Memory for the results of calls without `out`. SPDX-License-Identifier: MIT */
#ifndef METALLOID_PYTHON_RESULTS_H
#define METALLOID_PYTHON_RESULTS_H

#include <stddef.h>

enum { RESULTS_KEPT_FROM = 256 << 10 }; /* bytes; below, malloc keeps what is freed */

/* The four functions of NumPy's allocators (NEP 49). They are called with the GIL held. */
void *results_malloc(void *unused, size_t size);
void *results_calloc(void *unused, size_t count, size_t size);
void *results_realloc(void *unused, void *memory, size_t size);
void results_free(void *unused, void *memory, size_t size);

#endif
