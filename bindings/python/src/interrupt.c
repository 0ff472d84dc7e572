/* Ctrl-C while a kernel runs. SPDX-License-Identifier: MIT */
#include "interrupt.h"

#include <sys/syscall.h>
#include <unistd.h>

static PyOS_sighandler_t interpreters; /* handler, which ours calls; after the launch too if somebody put ours back */
static volatile sig_atomic_t came;

static void on_signal(int signal) {
    came = 1;
    interpreters(signal);
}

/* Whether the signal is to become a KeyboardInterrupt: a handler of the program's may want the kernel to end as always. */
static bool is_default(void) {
    static PyObject *getsignal, *handler, *number; /* for good */
    if (!number) {
        PyObject *module = PyImport_ImportModule("_signal");
        if (module) {
            getsignal = PyObject_GetAttrString(module, "getsignal");
            handler = PyObject_GetAttrString(module, "default_int_handler");
            number = getsignal && handler ? PyLong_FromLong(SIGINT) : NULL;
            Py_DECREF(module);
        }
        PyErr_Clear();
        if (!number) return false;
    }
    PyObject *found = PyObject_CallFunctionObjArgs(getsignal, number, NULL);
    PyErr_Clear();
    Py_XDECREF(found);
    return found == handler;
}

bool interrupt_begin(interrupt *i) {
    static _Thread_local char is_main; /* 0: not asked yet */
    if (!is_main) is_main = syscall(SYS_gettid) == getpid() ? 1 : -1;
    i->is_set = false;
    if (is_main < 0 || !is_default()) return true;
    if (!interpreters) { /* which it has for all signals */
        PyOS_sighandler_t handler = PyOS_getsig(SIGINT);
        if (handler == SIG_DFL || handler == SIG_IGN || handler == SIG_ERR) return true;
        interpreters = handler;
    }
    came = 0;
    struct sigaction own = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    i->is_set = sigaction(SIGINT, &own, &i->before) == 0;
    if (i->is_set && ((i->before.sa_flags & SA_SIGINFO) || i->before.sa_handler != interpreters)) {
        interrupt_end(i); /* set behind the interpreter's back */
        return true;
    }
    if (PyErr_CheckSignals() == 0) return true; /* none had come before */
    interrupt_end(i);
    return false;
}

const volatile int *interrupt_flag(const interrupt *i) { return i->is_set ? &came : NULL; }

void interrupt_end(interrupt *i) {
    struct sigaction now;
    if (i->is_set && sigaction(SIGINT, &i->before, &now) == 0 && now.sa_handler != on_signal)
        sigaction(SIGINT, &now, NULL); /* somebody's who came meanwhile */
    i->is_set = false;
}
