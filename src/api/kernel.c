/* Custom kernels. SPDX-License-Identifier: MIT */
#include "kernel/kernel.h"
#include "kernel/cuda_source.h"

#include "core/options.h"
#include "cpu/kernels.h"

#include <stdio.h>
#include <stdlib.h>

static const char op[] = "metal_kernel";

enum {
    MOST_THREADS = 1024, /* of a threadgroup */
    SMALL_ELEMENTS = 8,  /* an input with fewer is in Metal's constant address space */
    BUFFER_DTYPES = MTL_REAL | MTL_BOOLEAN | 1 << MTL_C64,
};

/* ---- names --------------------------------------------------------------------------------------------------------------- */

static bool is_word(const char *name) {
    if (!*name) return false;
    for (; *name; name++) {
        bool letter = (*name >= 'a' && *name <= 'z') || (*name >= 'A' && *name <= 'Z');
        if (!letter && *name != '_' && !(*name >= '0' && *name <= '9')) return false;
    }
    return true;
}

/* Words that C++ or Metal keep for themselves, and that a parameter cannot be called. */
static bool is_keyword(const char *name) {
    static const char *const words[] = {
        "alignas",      "alignof",
        "and",          "and_eq",
        "asm",          "atomic_cancel",
        "auto",         "bitand",
        "bitor",        "bool",
        "break",        "case",
        "catch",        "char",
        "char16_t",     "char32_t",
        "class",        "compl",
        "const",        "constant",
        "const_cast",   "constexpr",
        "continue",     "decltype",
        "default",      "delete",
        "device",       "do",
        "double",       "dynamic_cast",
        "else",         "enum",
        "explicit",     "export",
        "extern",       "false",
        "float",        "for",
        "fragment",     "friend",
        "goto",         "half",
        "if",           "inline",
        "int",          "kernel",
        "long",         "mutable",
        "namespace",    "new",
        "noexcept",     "not",
        "not_eq",       "nullptr",
        "operator",     "or",
        "or_eq",        "private",
        "protected",    "public",
        "register",     "reinterpret_cast",
        "return",       "short",
        "signed",       "sizeof",
        "static",       "static_assert",
        "static_cast",  "struct",
        "switch",       "template",
        "this",         "thread",
        "thread_local", "threadgroup",
        "throw",        "true",
        "try",          "typedef",
        "typeid",       "typename",
        "union",        "unsigned",
        "using",        "vertex",
        "virtual",      "void",
        "volatile",     "wchar_t",
        "while",        "xor",
        "xor_eq",
    };
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++) {
        if (strcmp(words[i], name) == 0) return true;
    }
    return false;
}

/* A kernel's own name stands behind custom_kernel_, and may begin with a digit. */
static metalloid_status check_name(const char *name, const char *what, bool digit_first) {
    MTL_REQUIRE(name, op, "%s must not be NULL", what);
    /* Not printed: it may be anything, of any length. */
    MTL_REQUIRE(is_word(name) && (digit_first || *name < '0' || *name > '9'), op,
                "%s must be an identifier: letters, digits and _%s", what, digit_first ? "" : ", no digit first");
    MTL_REQUIRE(strlen(name) <= MTL_LONGEST_NAME, op, "%s must have at most %d characters", what,
                (int)MTL_LONGEST_NAME);
    MTL_REQUIRE(strncmp(name, "__mtl", 5) != 0, op, "%s must not begin with __mtl", what);
    return METALLOID_OK;
}

static metalloid_status check_names(const char *const *names, int count, const char *what, bool metal) {
    char element[64];
    MTL_REQUIRE(count >= 0 && count <= MTL_MOST_BUFFERS, op, "%s must be 0 to %d, got %d", what, (int)MTL_MOST_BUFFERS,
                count);
    MTL_REQUIRE(names || count == 0, op, "%s must not be NULL", what);
    for (int i = 0; i < count; i++) {
        snprintf(element, sizeof element, "%s[%d]", what, i);
        MTL_TRY(check_name(names[i], element, false));
        MTL_REQUIRE(!is_keyword(names[i]), op, "%s must not be a word of the language, got %s", element, names[i]);
        MTL_REQUIRE(!metal || !mtl_is_attribute(names[i]), op, "%s must not be the name of a Metal attribute, got %s",
                    element, names[i]);
    }
    return METALLOID_OK;
}

/* ---- create and destroy ------------------------------------------------------------------------------------------------------ */

/* Takes the next string of the block that a kernel's strings are in. */
static const char *store_bytes(char **block, const char *bytes, size_t length) {
    char *stored = memcpy(*block, bytes, length);
    stored[length] = '\0';
    *block += length + 1;
    return stored;
}

static const char *store(char **block, const char *string) { return store_bytes(block, string, strlen(string)); }

static void free_kernel(metalloid_kernel *kernel) {
    for (mtl_variant *at = kernel->variants; at;) {
        mtl_variant *next = at->next;
        free(at);
        at = next;
    }
    free(kernel);
}

metalloid_status metalloid_kernel_create(const char *name, const char *const *input_names, int input_count,
                                         const char *const *output_names, int output_count, const char *source,
                                         const metalloid_kernel_options *options, metalloid_kernel **kernel) {
    static const metalloid_kernel_options defaults = METALLOID_KERNEL_OPTIONS_INIT;
    MTL_REQUIRE(kernel, op, "%s must not be NULL", "kernel");
    metalloid_kernel_options read;
    MTL_TRY(mtl_options_read(&read, &defaults, sizeof read, options, op));
    bool precompiled = read.language == METALLOID_KERNEL_PRECOMPILED, metal = read.language == METALLOID_KERNEL_METAL;
    if (precompiled) MTL_REQUIRE(name && *name, op, "%s must be the kernel's symbol in the image", "name");
    else MTL_TRY(check_name(name, "name", true));
    MTL_TRY(check_names(input_names, input_count, "input_names", metal));
    MTL_TRY(check_names(output_names, output_count, "output_names", metal));
    MTL_REQUIRE(output_count > 0, op, "%s must have at least one name", "output_names");
    for (int i = 0; i < input_count + output_count; i++) {
        const char *first = i < input_count ? input_names[i] : output_names[i - input_count];
        for (int j = 0; j < i; j++) {
            const char *second = j < input_count ? input_names[j] : output_names[j - input_count];
            MTL_REQUIRE(strcmp(first, second) != 0, op, "%s is the name of two parameters", first);
        }
    }
    MTL_REQUIRE(source, op, "%s must not be NULL", "source");
    MTL_REQUIRE(read.source_length <= PTRDIFF_MAX / 2, op, "options.source_length is too large: %zu",
                read.source_length);
    MTL_REQUIRE(read.language == METALLOID_KERNEL_METAL || read.language == METALLOID_KERNEL_CUDA || precompiled, op,
                "options.language is unknown: %d", (int)read.language);
    MTL_REQUIRE(read.shared_memory >= 0, op, "options.shared_memory must not be negative, got %d", read.shared_memory);
    MTL_REQUIRE((int)read.math_mode >= METALLOID_MATH_SAFE && (int)read.math_mode <= METALLOID_MATH_FAST, op,
                "options.math_mode is unknown: %d", (int)read.math_mode);
    MTL_REQUIRE(read.most_iterations >= 0, op, "options.most_iterations must not be negative, got %lld",
                (long long)read.most_iterations);

    /* The kernel, pointers to its names, and the strings, in one block. */
    const char *header = read.header ? read.header : "", *fallback = read.fallback_compiler;
    size_t size = sizeof(metalloid_kernel) + (size_t)(input_count + output_count) * sizeof(char *);
    size_t length = precompiled && read.source_length ? read.source_length : strlen(source);
    size += strlen(name) + length + strlen(header) + 3 + (fallback ? strlen(fallback) + 1 : 0);
    for (int i = 0; i < input_count; i++) size += strlen(input_names[i]) + 1;
    for (int i = 0; i < output_count; i++) size += strlen(output_names[i]) + 1;
    metalloid_kernel *created = malloc(size);
    if (!created) return mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: out of memory", op);
    const char **names = (const char **)(created + 1);
    char *block = (char *)(names + input_count + output_count);
    for (int i = 0; i < input_count; i++) names[i] = store(&block, input_names[i]);
    for (int i = 0; i < output_count; i++) names[input_count + i] = store(&block, output_names[i]);
    *created = (metalloid_kernel){
        .language = read.language,
        .shared_memory = read.shared_memory,
        .image = length,
        .definition = {.name = store(&block, name),
                       .input_count = input_count,
                       .output_count = output_count,
                       .input_names = names,
                       .output_names = names + input_count,
                       .source = store_bytes(&block, source, length),
                       .header = store(&block, header),
                       .atomic_outputs = mtl_option_flag(&read.atomic_outputs)},
        .math_mode = read.math_mode,
        .ensure_row_contiguous = mtl_option_flag(&read.ensure_row_contiguous),
        .debug = mtl_option_flag(&read.debug),
        .address_sanitizer = mtl_option_flag(&read.address_sanitizer),
        .most_iterations = read.most_iterations,
    };
    if (fallback) {
        created->fallback_compiler = block;
        store(&block, fallback);
    }
    if (!precompiled && !mtl_find_mentions(&created->mentions, &created->definition)) {
        free_kernel(created);
        return mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: out of memory", op);
    }
    *kernel = created;
    return METALLOID_OK;
}

void metalloid_kernel_destroy(metalloid_kernel *kernel) {
    if (kernel) free_kernel(kernel);
}

/* ---- the arguments of a call ----------------------------------------------------------------------------------------------- */

/* Everything that the checks of one call fill, in one block. Few calls need more than what is on the stack. */
typedef struct checked {
    mtl_launch launch;
    DLDevice device;
    mtl_view *inputs, *outputs;
    mtl_buffer_type *input_types;
    mtl_dtype *output_types;
    mtl_template_value *templates;
    unsigned char *key;
    const int **shapes;
    const int64_t **strides;
    int *ranks;
    void *extents; /* all shapes and strides */
    void **copies; /* of inputs, or NULL */
    char *block;   /* all of it, or NULL */
} checked;

static bool is_row_contiguous(const mtl_view *view) {
    int64_t expected = mtl_dtype_size(view->dtype);
    if (view->elements == 0) return true;
    for (int axis = view->rank - 1; axis >= 0; axis--) {
        if (view->shape[axis] == 1) continue;
        if (view->stride[axis] != expected) return false;
        expected *= view->shape[axis];
    }
    return true;
}

static metalloid_status check_counts(const metalloid_kernel *kernel, const metalloid_kernel_call *call) {
    const mtl_definition *definition = &kernel->definition;
    MTL_REQUIRE(call->input_count == definition->input_count, op, "kernel %s has %d inputs, got %d", definition->name,
                definition->input_count, call->input_count);
    MTL_REQUIRE(call->output_count == definition->output_count, op, "kernel %s has %d outputs, got %d",
                definition->name, definition->output_count, call->output_count);
    MTL_REQUIRE(call->inputs || call->input_count == 0, op, "%s must not be NULL", "inputs");
    MTL_REQUIRE(call->outputs, op, "%s must not be NULL", "outputs");
    MTL_REQUIRE(call->template_count >= 0 && call->template_count <= MTL_MOST_TEMPLATES, op,
                "there may be 0 to %d template arguments, got %d", (int)MTL_MOST_TEMPLATES, call->template_count);
    MTL_REQUIRE(call->template_arguments || call->template_count == 0, op, "%s must not be NULL", "template_arguments");
    return METALLOID_OK;
}

static metalloid_status check_scalars(const metalloid_kernel *kernel, const metalloid_kernel_call *call) {
    if (kernel->language != METALLOID_KERNEL_PRECOMPILED) {
        MTL_REQUIRE(call->scalar_count == 0, op, "scalars are a precompiled kernel's, and kernel %s is none",
                    kernel->definition.name);
        return METALLOID_OK;
    }
    MTL_REQUIRE(call->template_count == 0, op, "kernel %s is compiled: it has no template arguments",
                kernel->definition.name);
    MTL_REQUIRE(call->scalar_count >= 0 && call->scalar_count <= MTL_MOST_SCALARS, op,
                "there may be 0 to %d scalars, got %lld", (int)MTL_MOST_SCALARS, (long long)call->scalar_count);
    MTL_REQUIRE(call->scalars || call->scalar_count == 0, op, "%s must not be NULL", "scalars");
    for (int64_t i = 0; i < call->scalar_count; i++) {
        int kind = (int)call->scalars[i].kind;
        MTL_REQUIRE(kind == METALLOID_SCALAR_INT || kind == METALLOID_SCALAR_FLOAT, op,
                    "scalar %lld is of unknown kind %d", (long long)i, kind);
    }
    return METALLOID_OK;
}

static metalloid_status check_templates(const mtl_definition *definition, const metalloid_kernel_call *call,
                                        mtl_template_value *values) {
    for (int i = 0; i < call->template_count; i++) {
        const metalloid_template_argument *argument = &call->template_arguments[i];
        char element[64];
        snprintf(element, sizeof element, "the name of template argument %d", i);
        MTL_TRY(check_name(argument->name, element, false));
        MTL_REQUIRE(!is_keyword(argument->name), op, "%s must not be a word of the language, got %s", element,
                    argument->name);
        for (int j = 0; j < definition->input_count + definition->output_count; j++) {
            bool is_input = j < definition->input_count;
            const char *parameter =
                is_input ? definition->input_names[j] : definition->output_names[j - definition->input_count];
            MTL_REQUIRE(strcmp(argument->name, parameter) != 0, op, "template argument %s has the name of an %s",
                        argument->name, is_input ? "input" : "output");
        }
        for (int j = 0; j < i; j++) {
            MTL_REQUIRE(strcmp(argument->name, call->template_arguments[j].name) != 0, op,
                        "two template arguments are called %s", argument->name);
        }
        values[i] = (mtl_template_value){.name = argument->name, .kind = argument->kind};
        switch ((int)argument->kind) {
        case METALLOID_TEMPLATE_INT:
            MTL_REQUIRE(argument->value >= INT32_MIN && argument->value <= INT32_MAX, op,
                        "template argument %s must fit in 32 bits, got %lld", argument->name,
                        (long long)argument->value);
            values[i].integer = argument->value;
            break;
        case METALLOID_TEMPLATE_BOOL: values[i].integer = argument->value != 0; break;
        case METALLOID_TEMPLATE_DTYPE:
            MTL_REQUIRE(mtl_dtype_from_dlpack(argument->dtype, &values[i].dtype), op,
                        "template argument %s is a dtype that kernels do not have: DLPack type code %d of %d bits",
                        argument->name, argument->dtype.code, argument->dtype.bits);
            break;
        default:
            return mtl_fail(METALLOID_INVALID_ARGUMENT, "%s: template argument %s is of unknown kind %d", op,
                            argument->name, (int)argument->kind);
        }
    }
    return METALLOID_OK;
}

static metalloid_status check_grid(const metalloid_kernel_call *call, mtl_launch *launch) {
    int64_t threads = 1;
    for (int axis = 0; axis < 3; axis++) {
        int64_t grid = call->grid[axis], group = call->threadgroup[axis];
        MTL_REQUIRE(grid >= 1 && grid <= INT32_MAX, op, "grid must be 1 to %d along each axis, got %lld along %c",
                    INT32_MAX, (long long)grid, "xyz"[axis]);
        MTL_REQUIRE(group >= 1, op, "threadgroup must be at least 1 along each axis, got %lld along %c",
                    (long long)group, "xyz"[axis]);
        if (group > grid) group = grid;
        if (__builtin_mul_overflow(threads, group, &threads)) threads = INT64_MAX;
        launch->grid[axis] = (uint32_t)grid;
        launch->threadgroup[axis] = (uint32_t)group;
    }
    MTL_REQUIRE(threads <= MOST_THREADS, op, "threadgroup must have at most %d threads, got %lld", (int)MOST_THREADS,
                (long long)threads);
    return METALLOID_OK;
}

/* The types that the generated source depends on, and the key of the compiled kernel. */
static void settle_types(const metalloid_kernel *kernel, checked *c) {
    const mtl_definition *definition = &kernel->definition;
    unsigned char *key = c->key;
    for (int i = 0; i < definition->input_count; i++) {
        const mtl_view *view = &c->inputs[i];
        c->input_types[i] = (mtl_buffer_type){view->dtype, view->rank == 0, view->elements < SMALL_ELEMENTS};
        *key++ = (unsigned char)view->dtype;
        *key++ = (unsigned char)(c->input_types[i].is_scalar); /* small or not is one to a C++ compiler */
    }
    for (int i = 0; i < definition->output_count; i++) {
        c->output_types[i] = c->outputs[i].dtype;
        *key++ = (unsigned char)c->outputs[i].dtype;
    }
    for (int i = 0; i < c->launch.types.template_count; i++) {
        const mtl_template_value *value = &c->templates[i];
        size_t length = strlen(value->name) + 1;
        *key++ = (unsigned char)value->kind;
        int32_t number = value->kind == METALLOID_TEMPLATE_DTYPE ? (int32_t)value->dtype : (int32_t)value->integer;
        memcpy(key, &number, sizeof number);
        key += sizeof number;
        memcpy(key, value->name, length);
        key += length;
    }
    *key++ = (unsigned char)(c->launch.types.along_y | c->launch.types.in_line << 1);
    /* What comes compiled is the same for all types. */
    c->launch.key_length = kernel->language == METALLOID_KERNEL_PRECOMPILED ? 0 : (size_t)(key - c->key);
}

static void *carve(char **at, size_t bytes) {
    void *carved = *at;
    *at += (bytes + 15) / 16 * 16;
    return carved;
}

static metalloid_status allocate(checked *c, const metalloid_kernel_call *call) {
    size_t inputs = (size_t)call->input_count, outputs = (size_t)call->output_count;
    size_t templates = (size_t)call->template_count;
    size_t key = 2 * inputs + outputs + templates * (5 + MTL_LONGEST_NAME + 1) + 1;
    size_t sizes[] = {inputs * sizeof(mtl_view),
                      outputs * sizeof(mtl_view),
                      inputs * sizeof(mtl_buffer_type),
                      outputs * sizeof(mtl_dtype),
                      templates * sizeof(mtl_template_value),
                      key,
                      inputs * sizeof(int *),
                      inputs * sizeof(int64_t *),
                      inputs * sizeof(int),
                      inputs * sizeof(void *)};
    size_t all = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) all += (sizes[i] + 15) / 16 * 16;
    char *at = c->block = malloc(all + 16);
    if (!at) return mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: out of memory", op);
    c->inputs = carve(&at, sizes[0]);
    c->outputs = carve(&at, sizes[1]);
    c->input_types = carve(&at, sizes[2]);
    c->output_types = carve(&at, sizes[3]);
    c->templates = carve(&at, sizes[4]);
    c->key = carve(&at, sizes[5]);
    c->shapes = carve(&at, sizes[6]);
    c->strides = carve(&at, sizes[7]);
    c->ranks = carve(&at, sizes[8]);
    c->copies = carve(&at, sizes[9]);
    for (size_t i = 0; i < inputs; i++) {
        c->copies[i] = NULL;
        c->shapes[i] = NULL;
        c->strides[i] = NULL;
    }
    return METALLOID_OK;
}

static metalloid_status check_tensors(const metalloid_kernel *kernel, const metalloid_kernel_call *call, checked *c) {
    const mtl_definition *definition = &kernel->definition;
    const mtl_view *outputs[MTL_MOST_BUFFERS], *inputs[MTL_MOST_BUFFERS], *all[2 * MTL_MOST_BUFFERS];
    int count = 0;
    for (int i = 0; i < call->output_count; i++) {
        const char *name = definition->output_names[i];
        MTL_TRY(mtl_view_required(&c->outputs[i], call->outputs[i], op, name, BUFFER_DTYPES));
        MTL_REQUIRE(is_row_contiguous(&c->outputs[i]), op, "output %s must be row-contiguous", name);
        all[count++] = outputs[i] = &c->outputs[i];
    }
    for (int i = 0; i < call->input_count; i++) {
        MTL_TRY(mtl_view_required(&c->inputs[i], call->inputs[i], op, definition->input_names[i], BUFFER_DTYPES));
        inputs[i] = &c->inputs[i];
        /* A scalar of the host's goes to a device with the launch. */
        bool is_host_scalar = inputs[i]->rank == 0 && inputs[i]->device.device_type == kDLCPU &&
                              c->outputs[0].device.device_type != kDLCPU;
        if (!is_host_scalar) all[count++] = inputs[i];
    }
    MTL_TRY(mtl_check_device(all, count, op, &c->device));
    return mtl_check_overlap(outputs, call->output_count, inputs, call->input_count, NULL, op);
}

static void release(const metalloid_context *context, checked *c, int inputs) {
    for (int i = 0; c->block && i < inputs; i++) mtl_release(context, c->copies[i]);
    free(c->extents);
    free(c->block);
}

static metalloid_status check(const metalloid_kernel *kernel, const metalloid_kernel_call *given, checked *c,
                              metalloid_kernel_call *call) {
    static const metalloid_kernel_call defaults = METALLOID_KERNEL_CALL_INIT;
    *c = (checked){0};
    MTL_REQUIRE(kernel, op, "%s must not be NULL", "kernel");
    MTL_REQUIRE(given, op, "%s must not be NULL", "call");
    MTL_TRY(mtl_options_read(call, &defaults, sizeof *call, given, op));
    MTL_TRY(check_counts(kernel, call));
    MTL_TRY(check_scalars(kernel, call));
    MTL_TRY(check_grid(call, &c->launch));
    MTL_TRY(allocate(c, call));
    MTL_TRY(check_templates(&kernel->definition, call, c->templates));
    MTL_TRY(check_tensors(kernel, call, c));
    bool on_cpu = c->device.device_type == kDLCPU, meet = kernel->mentions.lanes_meet;
    c->launch.types = (mtl_types){
        .inputs = c->input_types,
        .outputs = c->output_types,
        .template_count = call->template_count,
        .template_values = c->templates,
        .along_y = on_cpu && !meet && c->launch.grid[0] == 1 && c->launch.grid[1] > 1,
        .in_line = on_cpu && meet && c->launch.threadgroup[1] == 1 && c->launch.threadgroup[2] == 1,
    };
    c->launch.inputs = c->inputs;
    c->launch.outputs = c->outputs;
    c->launch.interrupted = call->interrupted;
    c->launch.has_init_value = mtl_option_flag(&call->has_init_value);
    c->launch.init_value = call->init_value;
    c->launch.scalars = call->scalars;
    c->launch.scalar_count = (int)call->scalar_count;
    c->launch.shapes = c->shapes;
    c->launch.strides = c->strides;
    c->launch.ranks = c->ranks;
    c->launch.key = c->key;
    settle_types(kernel, c);
    return METALLOID_OK;
}

/* ---- what the kernel sees of its inputs -------------------------------------------------------------------------------------- */

typedef struct row_copy {
    mtl_loop rows;
    const char *from;
    char *to;
    int64_t length, stride, size;
} row_copy;

static void copy_rows(const void *args, int64_t begin, int64_t end, void *scratch) {
    const row_copy *copy = args;
    (void)scratch;
    mtl_cursor cursor;
    mtl_cursor_seek(&cursor, &copy->rows, begin);
    char *to = copy->to + begin * copy->length * copy->size;
    for (int64_t row = begin; row < end; row++, mtl_cursor_next(&cursor)) {
        const char *from = copy->from + cursor.offset[0];
        switch (copy->size) {
        case 1:
            for (int64_t i = 0; i < copy->length; i++) to[i] = from[i * copy->stride];
            break;
        case 2:
            for (int64_t i = 0; i < copy->length; i++) memcpy(to + 2 * i, from + i * copy->stride, 2);
            break;
        case 4:
            for (int64_t i = 0; i < copy->length; i++) memcpy(to + 4 * i, from + i * copy->stride, 4);
            break;
        default:
            for (int64_t i = 0; i < copy->length; i++) memcpy(to + 8 * i, from + i * copy->stride, 8);
            break;
        }
        to += copy->length * copy->size;
    }
}

/* The input becomes a row-contiguous copy of itself. */
static metalloid_status make_contiguous(const metalloid_context *context, mtl_view *view, void **copy) {
    int64_t size = mtl_dtype_size(view->dtype);
    *copy = mtl_allocate(context, (size_t)(view->elements * size));
    if (!*copy) return mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: no memory for a copy of %s", op, view->name);
    row_copy rows = {.from = view->data, .to = *copy, .size = size};
    const mtl_view *views[] = {view};
    mtl_loop_init(&rows.rows, view->rank, 1, views);
    rows.length = mtl_loop_take_row(&rows.rows, &rows.stride);
    MTL_TRY(mtl_cpu_run(context, op, copy_rows, &rows, rows.rows.count, 2 * rows.length * size, 0));
    view->data = *copy;
    for (int axis = view->rank - 1; axis >= 0; axis--) {
        view->stride[axis] = size;
        size *= view->shape[axis];
    }
    return METALLOID_OK;
}

/* Shapes and strides in elements, as the kernel reads them. An axis of extent 1 keeps the stride that its array gave it. */
static metalloid_status lay_out_extents(const metalloid_kernel *kernel, const metalloid_kernel_call *call, checked *c) {
    size_t strides = 0, shapes = 0;
    for (int i = 0; i < call->input_count; i++) {
        unsigned char mentioned = kernel->mentions.input[i];
        c->ranks[i] = c->inputs[i].rank;
        if (mentioned & MTL_MENTIONS_STRIDES) strides += (size_t)c->inputs[i].rank + 1;
        if (mentioned & MTL_MENTIONS_SHAPE) shapes += (size_t)c->inputs[i].rank + 1;
    }
    if (strides + shapes == 0) return METALLOID_OK;
    c->extents = malloc(strides * sizeof(int64_t) + shapes * sizeof(int));
    if (!c->extents) return mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: out of memory", op);
    int64_t *stride = c->extents;
    int *shape = (int *)(stride + strides);
    for (int i = 0; i < call->input_count; i++) {
        const mtl_view *view = &c->inputs[i];
        unsigned char mentioned = kernel->mentions.input[i];
        if (mentioned & MTL_MENTIONS_SHAPE) {
            c->shapes[i] = shape;
            for (int axis = 0; axis < view->rank; axis++) {
                MTL_REQUIRE(view->shape[axis] <= INT32_MAX, op,
                            "%s has an extent beyond 32 bits, and kernel %s reads it", view->name,
                            kernel->definition.name);
                *shape++ = (int)view->shape[axis];
            }
            *shape++ = 0;
        }
        if (mentioned & MTL_MENTIONS_STRIDES) {
            c->strides[i] = stride;
            const int64_t *given = c->copies[i] ? NULL : call->inputs[i]->strides;
            int64_t contiguous = 1;
            for (int axis = view->rank - 1; axis >= 0; axis--) {
                stride[axis] = given ? given[axis] : contiguous;
                contiguous *= view->shape[axis];
            }
            stride += view->rank;
            *stride++ = 0;
        }
    }
    return METALLOID_OK;
}

static metalloid_status launch_cuda(metalloid_context *context, metalloid_kernel *kernel,
                                    const metalloid_kernel_call *call, checked *c) {
#if MTL_WITH_CUDA
    bool strided[MTL_MOST_BUFFERS] = {false};
    for (int i = 0; i < call->input_count; i++) {
        strided[i] = kernel->ensure_row_contiguous && !is_row_contiguous(&c->inputs[i]);
        if (strided[i]) c->copies[i] = c->inputs[i].data; /* for lay_out_extents: it will be a copy */
    }
    metalloid_status status = lay_out_extents(kernel, call, c);
    for (int i = 0; i < call->input_count; i++) c->copies[i] = NULL;
    return status ? status : mtl_kernel_launch_cuda(context, kernel, &c->launch, strided, c->inputs, c->outputs);
#else
    (void)context, (void)kernel, (void)call, (void)c;
    return mtl_fail(METALLOID_UNSUPPORTED, "%s: the tensors are on a CUDA device, and this build has no CUDA backend",
                    op);
#endif
}

static metalloid_status launch_checked(metalloid_context *context, metalloid_kernel *kernel,
                                       const metalloid_kernel_call *call, checked *c) {
    if (c->device.device_type != kDLCPU) return launch_cuda(context, kernel, call, c);
    if (kernel->language != METALLOID_KERNEL_METAL) {
        return mtl_fail(
            METALLOID_UNSUPPORTED, "cuda_kernel: kernel %s is %s, for NVIDIA GPUs, and its tensors are in CPU memory",
            kernel->definition.name, kernel->language == METALLOID_KERNEL_CUDA ? "in CUDA C++" : "a precompiled one");
    }
    for (int i = 0; i < call->input_count; i++) {
        if (kernel->ensure_row_contiguous && !is_row_contiguous(&c->inputs[i]))
            MTL_TRY(make_contiguous(context, &c->inputs[i], &c->copies[i]));
    }
    MTL_TRY(lay_out_extents(kernel, call, c));
    return mtl_kernel_launch_cpu(context, kernel, &c->launch);
}

metalloid_status metalloid_kernel_launch(metalloid_context *context, metalloid_kernel *kernel,
                                         const metalloid_kernel_call *given) {
    checked c;
    metalloid_kernel_call call = METALLOID_KERNEL_CALL_INIT;
    metalloid_status status = check(kernel, given, &c, &call);
    if (!status) status = launch_checked(context, kernel, &call, &c);
    release(context, &c, call.input_count);
    return status;
}

metalloid_status mtl_kernel_compile(metalloid_kernel *kernel, const metalloid_kernel_call *given) {
    checked c;
    metalloid_kernel_call call = METALLOID_KERNEL_CALL_INIT;
    metalloid_status status = check(kernel, given, &c, &call);
    if (!status && kernel->language == METALLOID_KERNEL_METAL) status = mtl_kernel_compile_cpu(kernel, &c.launch);
    release(NULL, &c, 0);
    return status;
}

metalloid_status metalloid_kernel_source(metalloid_kernel *kernel, const metalloid_kernel_call *given, bool translated,
                                         char *text, size_t capacity, size_t *length) {
    checked c;
    metalloid_kernel_call call = METALLOID_KERNEL_CALL_INIT;
    mtl_text source = {0};
    metalloid_status status = check(kernel, given, &c, &call);
    if (!status && !(text || capacity == 0))
        status = mtl_fail(METALLOID_INVALID_ARGUMENT, "%s: text must not be NULL where capacity is %zu", op, capacity);
    if (!status && kernel->language == METALLOID_KERNEL_PRECOMPILED) {
        status = mtl_fail(METALLOID_INVALID_ARGUMENT, "%s: kernel %s came compiled: it has no source", op,
                          kernel->definition.name);
    } else if (!status && kernel->language == METALLOID_KERNEL_CUDA) {
        bool include;
        mtl_cuda_unit(&source, &kernel->definition, &kernel->mentions, &c.launch.types, &include);
    } else if (!status && translated) {
        const mtl_unit_options options = {.target = c.device.device_type == kDLCPU ? MTL_TARGET_CPU : MTL_TARGET_CUDA,
                                          .math_mode = kernel->math_mode,
                                          .stack_bits = 16,
                                          .most_threads = 1024,
                                          .line = mtl_cuda_line(&kernel->mentions, c.launch.grid, c.launch.threadgroup),
                                          .count_iterations = kernel->most_iterations > 0,
                                          .lockstep = !kernel->debug && !kernel->address_sanitizer};
        mtl_translation_unit(&source, &kernel->definition, &kernel->mentions, &c.launch.types, &options);
    } else if (!status) {
        mtl_metal_source(&source, &kernel->definition, &kernel->mentions, &c.launch.types);
    }
    if (source.failed) status = mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: out of memory", op);
    if (!status) {
        if (length) *length = source.length;
        size_t written = source.length < capacity ? source.length : capacity ? capacity - 1 : 0;
        if (text && capacity) {
            memcpy(text, mtl_text_string(&source), written);
            text[written] = '\0';
        }
    }
    mtl_text_free(&source);
    release(NULL, &c, 0);
    return status;
}
