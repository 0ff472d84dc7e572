/* Ctrl-C while a kernel runs. SPDX-License-Identifier: MIT */
#ifndef METALLOID_PYTHON_INTERRUPT_H
#define METALLOID_PYTHON_INTERRUPT_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <signal.h>
#include <stdbool.h>

/* The interpreter's own handler takes a note, to which nobody comes before the launch is over. In the main thread one of ours takes its
 * place meanwhile, which tells the launch first, and then calls it. */
typedef struct interrupt {
    bool is_set;
    struct sigaction before;
} interrupt;

/* With the GIL; false: a KeyboardInterrupt, or what else a handler of the program's raised, is on its way. */
bool interrupt_begin(interrupt *i);

/* What the launch is given; NULL where it cannot be interrupted. */
const volatile int *interrupt_flag(const interrupt *i);

void interrupt_end(interrupt *i);

#endif
