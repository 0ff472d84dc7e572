/* SPDX-License-Identifier: MIT
 *
 * A kernel is a resource: the VM frees it after the last reference, and a call that runs holds one. */
#include "kernel.h"

#include "call.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MAX_BUFFERS = 64, MAX_TEMPLATES = 64 }; /* the library's */

static const char operation[] = "metal_kernel";

struct kernel {
    metalloid_kernel *made;
};

static ErlNifResourceType *kernel_type;

static void release_kernel(ErlNifEnv *env, void *object) {
    (void)env;
    metalloid_kernel_destroy(((struct kernel *)object)->made);
}

bool kernel_load(ErlNifEnv *env, bool upgrade) {
    ErlNifResourceFlags flags = upgrade ? ERL_NIF_RT_TAKEOVER | ERL_NIF_RT_CREATE : ERL_NIF_RT_CREATE;
    kernel_type = enif_open_resource_type(env, NULL, "metalloid_kernel", release_kernel, flags, NULL);
    return kernel_type != NULL;
}

/* The length of a list of at most `most`; -1 once the call has failed. */
static int list_length(call *c, const char *name, ERL_NIF_TERM list, int most) {
    unsigned length;
    if (c->failed) return -1;
    if (!enif_get_list_length(c->env, list, &length)) {
        call_refuse(c, "%s must be a list", name);
        return -1;
    }
    if (length > (unsigned)most) {
        call_refuse(c, "%s must have at most %d entries, got %u", name, most, length);
        return -1;
    }
    return (int)length;
}

/* ---- create ---------------------------------------------------------------------------------- */

static int read_names(call *c, const char *name, ERL_NIF_TERM list, const char *names[MAX_BUFFERS]) {
    char element[32];
    ERL_NIF_TERM head;
    int count = list_length(c, name, list, MAX_BUFFERS);
    for (int i = 0; i < count; i++) {
        enif_get_list_cell(c->env, list, &head, &list);
        snprintf(element, sizeof element, "%s[%d]", name, i);
        names[i] = string(c, element, head);
    }
    return count;
}

ERL_NIF_TERM kernel_create(ErlNifEnv *env, int argc, const ERL_NIF_TERM *argv) {
    (void)argc;
    enum { HEADER, CONTIGUOUS, ATOMIC, MATH_MODE, DEBUG, SANITIZER, ITERATIONS, OPTIONS };
    static const char *const keys[OPTIONS] = {
        "header", "ensure_row_contiguous", "atomic_outputs", "math_mode",
        "debug",  "address_sanitizer",     "max_iterations",
    };
    static const char *const math_modes[] = {"safe", "relaxed", "fast"}; /* in the order of metalloid_math_mode */
    call c;
    call_begin(&c, env, operation);
    const char *input_names[MAX_BUFFERS], *output_names[MAX_BUFFERS];
    const char *name = string(&c, "name", argv[0]);
    int inputs = read_names(&c, "input_names", argv[1], input_names);
    int outputs = read_names(&c, "output_names", argv[2], output_names);
    const char *source = string(&c, "source", argv[3]);
    read_options(&c, argv[4], OPTIONS, keys);
    metalloid_kernel_options options = METALLOID_KERNEL_OPTIONS_INIT;
    if (option_given(&c, HEADER)) options.header = string(&c, keys[HEADER], c.option[HEADER].value);
    if (option_given(&c, CONTIGUOUS)) options.ensure_row_contiguous = option_boolean(&c, CONTIGUOUS);
    options.atomic_outputs = option_boolean(&c, ATOMIC);
    options.math_mode = (metalloid_math_mode)option_word(&c, MATH_MODE, 3, math_modes);
    options.debug = option_boolean(&c, DEBUG);
    options.address_sanitizer = option_boolean(&c, SANITIZER);
    options.most_iterations = option_integer(&c, ITERATIONS, 0);

    metalloid_kernel *made = NULL;
    metalloid_status status = METALLOID_OK;
    if (!c.failed)
        status = metalloid_kernel_create(name, input_names, inputs, output_names, outputs, source, &options, &made);
    ERL_NIF_TERM term = 0;
    if (made) {
        struct kernel *k = enif_alloc_resource(kernel_type, sizeof *k);
        k->made = made;
        term = enif_make_resource(env, k);
        enif_release_resource(k);
    }
    return call_end_term(&c, status, term);
}

/* ---- a call ---------------------------------------------------------------------------------- */

/* A float of the VM is finite; the rest are Nx's atoms. */
static bool read_real(call *c, ERL_NIF_TERM term, double *value) {
    static const struct {
        const char *name;
        double value;
    } atoms[] = {{"infinity", INFINITY}, {"neg_infinity", -INFINITY}, {"nan", NAN}};
    char name[16];
    if (enif_get_double(c->env, term, value)) return true;
    if (!enif_get_atom(c->env, term, name, sizeof name, ERL_NIF_LATIN1)) return false;
    for (int i = 0; i < 3; i++) {
        if (strcmp(atoms[i].name, name) != 0) continue;
        *value = atoms[i].value;
        return true;
    }
    return false;
}

static bool read_boolean(call *c, ERL_NIF_TERM term, bool *value) {
    *value = enif_is_identical(term, enif_make_atom(c->env, "true"));
    return *value || enif_is_identical(term, enif_make_atom(c->env, "false"));
}

/* Also :bool, which is no type of Nx. */
static bool read_kernel_type(call *c, const char *name, ERL_NIF_TERM term, DLDataType *type) {
    *type = (DLDataType){METALLOID_DL_BOOL, 8, 1};
    return enif_is_identical(term, enif_make_atom(c->env, "bool")) || read_type(c, name, term, type);
}

/* A tensor, or a number with the type that MLX gives it. */
static DLTensor *read_input(call *c, const char *name, ERL_NIF_TERM term) {
    ErlNifSInt64 whole;
    double real;
    bool flag;
    if (c->failed) return NULL;
    if (enif_get_int64(c->env, term, &whole)) {
        int32_t narrow = (int32_t)whole;
        if (narrow == whole) return scalar_input(c, (DLDataType){kDLInt, 32, 1}, &narrow);
        return scalar_input(c, (DLDataType){kDLInt, 64, 1}, &whole);
    }
    if (read_real(c, term, &real)) return scalar_input(c, (DLDataType){kDLFloat, 32, 1}, &(float){(float)real});
    if (read_boolean(c, term, &flag)) return scalar_input(c, (DLDataType){METALLOID_DL_BOOL, 8, 1}, &flag);
    if (!enif_is_tuple(c->env, term)) {
        char shown[64];
        enif_snprintf(shown, sizeof shown, "%T", term);
        call_refuse(c, "%s must be a {type, shape, binary} tuple, a number of 64 bits or a boolean, got %s", name,
                    shown);
        return NULL;
    }
    return input(c, name, term);
}

static void read_three(call *c, const char *name, ERL_NIF_TERM term, int64_t three[3]) {
    const ERL_NIF_TERM *parts;
    int arity;
    if (c->failed) return;
    if (!enif_get_tuple(c->env, term, &arity, &parts) || arity != 3) {
        call_refuse(c, "%s must be a tuple of three integers", name);
        return;
    }
    for (int i = 0; i < 3; i++) three[i] = integer(c, name, parts[i]);
    for (int i = 0; i < 3; i++) {
        if (three[i] < 1) call_refuse(c, "%s must be at least 1 on each axis, got %lld", name, (long long)three[i]);
    }
}

static int read_templates(call *c, ERL_NIF_TERM list, metalloid_template_argument templates[MAX_TEMPLATES]) {
    char element[32];
    ERL_NIF_TERM head;
    int count = list_length(c, "template", list, MAX_TEMPLATES);
    for (int i = 0; i < count && !c->failed; i++) {
        metalloid_template_argument *argument = &templates[i];
        const ERL_NIF_TERM *pair;
        int arity;
        bool flag;
        ErlNifSInt64 whole;
        enif_get_list_cell(c->env, list, &head, &list);
        snprintf(element, sizeof element, "template[%d]", i);
        *argument = (metalloid_template_argument){0};
        if (!enif_get_tuple(c->env, head, &arity, &pair) || arity != 2) {
            call_refuse(c, "%s must be {name, value}", element);
            return -1;
        }
        argument->name = string(c, element, pair[0]);
        if (read_boolean(c, pair[1], &flag)) {
            argument->kind = METALLOID_TEMPLATE_BOOL;
            argument->value = flag;
        } else if (enif_get_int64(c->env, pair[1], &whole)) {
            argument->value = whole;
        } else if (enif_is_number(c->env, pair[1])) {
            call_refuse(c, "%s must be an integer of 32 bits, a boolean or a type", element);
        } else {
            argument->kind = METALLOID_TEMPLATE_DTYPE;
            read_kernel_type(c, element, pair[1], &argument->dtype);
        }
    }
    return count;
}

static void make_results(call *c, ERL_NIF_TERM types, ERL_NIF_TERM shapes, metalloid_kernel_call *launch,
                         DLTensor *outputs[MAX_BUFFERS]) {
    char element[32];
    ERL_NIF_TERM type_term, shape_term;
    int64_t shape[MAX_RANK];
    int count = list_length(c, "output_dtypes", types, MAX_BUFFERS);
    int shape_count = list_length(c, "output_shapes", shapes, MAX_BUFFERS);
    if (!c->failed && count != shape_count)
        call_refuse(c, "output_shapes must have as many entries as output_dtypes, %d, got %d", count, shape_count);
    for (int i = 0; i < count && !c->failed; i++) {
        DLDataType type;
        enif_get_list_cell(c->env, types, &type_term, &types);
        enif_get_list_cell(c->env, shapes, &shape_term, &shapes);
        snprintf(element, sizeof element, "output_dtypes[%d]", i);
        if (!read_kernel_type(c, element, type_term, &type)) return;
        snprintf(element, sizeof element, "output_shapes[%d]", i);
        int rank = read_shape(c, element, shape_term, shape);
        if (rank < 0) return;
        snprintf(element, sizeof element, "outputs[%d]", i);
        outputs[i] = new_result(c, element, type, rank, shape);
    }
    launch->output_count = count;
    launch->outputs = outputs;
}

static ERL_NIF_TERM run_call(ErlNifEnv *env, const ERL_NIF_TERM *argv, bool run) {
    enum { TEMPLATE, INIT_VALUE, TRANSLATED, OPTIONS };
    static const char *const keys[OPTIONS] = {"template", "init_value", "translated"};
    call c;
    call_begin(&c, env, operation);
    metalloid_kernel_call launch = METALLOID_KERNEL_CALL_INIT;
    const DLTensor *inputs[MAX_BUFFERS];
    DLTensor *outputs[MAX_BUFFERS];
    metalloid_template_argument templates[MAX_TEMPLATES];
    void *kernel = NULL;
    if (!enif_get_resource(env, argv[0], kernel_type, &kernel))
        call_refuse(&c, "the kernel must be a reference that kernel_create gave");

    char element[32];
    ERL_NIF_TERM list = argv[1], head;
    launch.inputs = inputs;
    launch.input_count = list_length(&c, "inputs", list, MAX_BUFFERS);
    for (int i = 0; i < launch.input_count; i++) {
        enif_get_list_cell(env, list, &head, &list);
        snprintf(element, sizeof element, "inputs[%d]", i);
        inputs[i] = read_input(&c, element, head);
    }
    read_three(&c, "grid", argv[4], launch.grid);
    read_three(&c, "threadgroup", argv[5], launch.threadgroup);
    read_options(&c, argv[6], OPTIONS, keys);
    if (option_given(&c, TEMPLATE)) {
        launch.template_count = read_templates(&c, c.option[TEMPLATE].value, templates);
        launch.template_arguments = templates;
    }
    launch.has_init_value = option_given(&c, INIT_VALUE);
    if (launch.has_init_value && !read_real(&c, c.option[INIT_VALUE].value, &launch.init_value))
        launch.init_value = number(&c, keys[INIT_VALUE], c.option[INIT_VALUE].value);
    bool translated = option_boolean(&c, TRANSLATED);
    make_results(&c, argv[2], argv[3], &launch, outputs);

    metalloid_kernel *made = c.failed ? NULL : ((struct kernel *)kernel)->made;
    if (run) return call_end_tuple(&c, made ? metalloid_kernel_launch(NULL, made, &launch) : METALLOID_OK);

    ERL_NIF_TERM term = 0;
    size_t length = 0;
    metalloid_status status =
        made ? metalloid_kernel_source(made, &launch, translated, NULL, 0, &length) : METALLOID_OK;
    char *text = made && status == METALLOID_OK ? call_allocate(&c, length + 1, "the source") : NULL;
    if (text) {
        status = metalloid_kernel_source(made, &launch, translated, text, length + 1, &length);
        memcpy(enif_make_new_binary(env, length, &term), text, length);
    }
    return call_end_term(&c, status, term);
}

ERL_NIF_TERM kernel_launch(ErlNifEnv *env, int argc, const ERL_NIF_TERM *argv) {
    (void)argc;
    return run_call(env, argv, true);
}

ERL_NIF_TERM kernel_source(ErlNifEnv *env, int argc, const ERL_NIF_TERM *argv) {
    (void)argc;
    return run_call(env, argv, false);
}
