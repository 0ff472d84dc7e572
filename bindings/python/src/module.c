/* The extension module metalloid._native. SPDX-License-Identifier: MIT */
#include "array.h"
#include "by_name.h"
#include "functions.h"
#include "kernel.h"

static int module_exec(PyObject *module) {
    if (!arrays_init(module, PyModule_GetState(module))) return -1;
    if (PyModule_AddFunctions(module, functions) < 0 || !by_name_init(module) || !kernel_init(module)) return -1;
    return PyModule_AddStringConstant(module, "__version__", metalloid_version());
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    module_state *state = PyModule_GetState(module);
    if (state) {
        Py_VISIT(state->memory_type);
        Py_VISIT(state->routes);
    }
    return 0;
}

static int module_clear(PyObject *module) {
    module_state *state = PyModule_GetState(module);
    if (state) arrays_clear(state);
    return 0;
}

static void module_free(void *module) { module_clear(module); }

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)module_exec},
#if PY_VERSION_HEX >= 0x030D0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED}, /* the state is written once, when the module is made */
#endif
    {0, NULL},
};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "metalloid._native",
    .m_doc = "The operations of Metalloid, compiled. Import them from metalloid or metalloid.fast.",
    .m_size = sizeof(module_state),
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
