/* From a kernel's body to a translation unit. SPDX-License-Identifier: MIT
 *
 * Metal's language is C++ but for a few things that no C++ compiler reads: address spaces, variables in threadgroup memory,
 * literals that are single or half precision, attributes on parameters. They are dealt with token by token, and every line
 * stays where it was, so that what the compiler says is about the user's own text. */
#include "kernel/source.h"
#include "kernel/msl.h"
#include "kernel/tokenizer.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- attributes ----------------------------------------------------------------------------------------------------- */

typedef struct attribute {
    const char *name;
    bool vector;   /* uint3, else uint */
    bool relative; /* depends on where the thread is in its threadgroup, or on the group */
    bool lane;     /* lanes of a simdgroup differ in it */
    const char *value;
} attribute;

/* Values in terms of the threadgroup `group` (position, extent), its dispatch, and the thread: x y z in the grid, lx ly lz in the
 * threadgroup, index in it. */
static const attribute attributes[] = {
    {"dispatch_quadgroups_per_threadgroup", false, false, false, "(__mtl_count(dispatch.threadgroup) + 3) / 4"},
    {"dispatch_simdgroups_per_threadgroup", false, false, false, "(__mtl_count(dispatch.threadgroup) + 31) / 32"},
    {"dispatch_threads_per_threadgroup", true, false, false, "__mtl_uint3(dispatch.threadgroup)"},
    {"grid_origin", true, false, false, "uint3(0, 0, 0)"},
    {"grid_size", true, false, false, "__mtl_uint3(dispatch.grid)"},
    {"quadgroup_index_in_threadgroup", false, true, true, "index / 4"},
    {"quadgroups_per_threadgroup", false, true, false, "(__mtl_count(group.extent) + 3) / 4"},
    {"simdgroup_index_in_threadgroup", false, true, false, "index / 32"},
    {"simdgroups_per_threadgroup", false, true, false, "(__mtl_count(group.extent) + 31) / 32"},
    {"thread_execution_width", false, false, false, "32"},
    {"thread_index_in_quadgroup", false, true, true, "index % 4"},
    {"thread_index_in_simdgroup", false, true, true, "index % 32"},
    {"thread_index_in_threadgroup", false, true, true, "index"},
    {"thread_position_in_grid", true, false, true, "uint3(x, y, z)"},
    {"thread_position_in_threadgroup", true, true, true, "uint3(lx, ly, lz)"},
    {"threadgroup_position_in_grid", true, true, false, "__mtl_uint3(group.position)"},
    {"threadgroups_per_grid", true, false, false, "__mtl_uint3(dispatch.threadgroups)"},
    {"threads_per_grid", true, false, false, "__mtl_uint3(dispatch.grid)"},
    {"threads_per_simdgroup", false, false, false, "32"},
    {"threads_per_threadgroup", true, true, false, "__mtl_uint3(group.extent)"},
};
enum { ATTRIBUTES = sizeof attributes / sizeof attributes[0] };

const char *mtl_metal_type(mtl_dtype dtype) {
    static const char *const name[MTL_DTYPES] = {"float",    "float16_t", "bfloat16_t", "double",     "bool",
                                                 "int8_t",   "int16_t",   "int32_t",    "int64_t",    "uint8_t",
                                                 "uint16_t", "uint32_t",  "uint64_t",   "complex64_t"};
    return name[dtype];
}

bool mtl_is_attribute(const char *name) {
    for (int i = 0; i < ATTRIBUTES; i++)
        if (strcmp(attributes[i].name, name) == 0) return true;
    return false;
}

/* ---- what the source mentions --------------------------------------------------------------------------------------- */

/* Names of Metal's in simd_ and quad_ begin with one of these; others are users' variables. */
bool mtl_is_exchange(const mtl_token *token) {
    static const char *const beginnings[] = {
        "all", "any",     "ballot", "active", "is_first", "is_helper", "broadcast", "shuffle", "rotate",
        "sum", "product", "min",    "max",    "and",      "or",        "xor",       "prefix",
    };
    static const char *const of_matrices[] = {"simdgroup_barrier", "simdgroup_load", "simdgroup_store",
                                              "simdgroup_multiply", "simdgroup_async"};
    if (token->kind != MTL_TOKEN_IDENTIFIER) return false;
    const char *text = token->text;
    size_t length = token->length;
    if (length > 5 && (memcmp(text, "simd_", 5) == 0 || memcmp(text, "quad_", 5) == 0)) {
        for (size_t i = 0; i < sizeof beginnings / sizeof beginnings[0]; i++) {
            size_t beginning = strlen(beginnings[i]);
            if (length - 5 >= beginning && memcmp(text + 5, beginnings[i], beginning) == 0) return true;
        }
    }
    for (size_t i = 0; i < sizeof of_matrices / sizeof of_matrices[0]; i++) {
        size_t beginning = strlen(of_matrices[i]);
        if (length >= beginning && memcmp(text, of_matrices[i], beginning) == 0) return true;
    }
    return false;
}

/* The threads of a kernel that has one of these need stacks of their own. */
static bool is_meeting_point(const mtl_token *token) {
    static const char *const others[] = {"threadgroup_barrier", "simdgroup_matrix", "make_filled_simdgroup_matrix"};
    if (mtl_is_exchange(token)) return true;
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        if (mtl_token_is(token, others[i])) return true;
    }
    return token->length > 10 && memcmp(token->text, "simdgroup_", 10) == 0 && token->text[token->length - 2] == 'x';
}

static bool begins_with(const mtl_token *token, const char *beginning) {
    size_t length = strlen(beginning);
    return token->length >= length && memcmp(token->text, beginning, length) == 0;
}

/* half, float16_t, bfloat4, ... ; float3x3, matrix, transpose, ... */
static void find_types(mtl_mentions *mentions, const mtl_token *token) {
    static const char *const halves[] = {"half",    "bfloat", "packed_",   "float16",
                                         "unpack_", "HALF_",  "HUGE_VALH", "MAXHALF"};
    static const char *const matrices[] = {"matrix", "determinant", "transpose"};
    static const char *const simdgroup_matrices[] = {
        "simdgroup_matrix", "simdgroup_float8x8", "simdgroup_half8x8",     "simdgroup_bfloat8x8",    "simdgroup_load",
        "simdgroup_store",  "simdgroup_multiply", "make_filled_simdgroup", "make_diagonal_simdgroup"};
    for (size_t i = 0; i < sizeof halves / sizeof halves[0]; i++) mentions->halves |= begins_with(token, halves[i]);
    mentions->halves |= begins_with(token, "M_") && token->text[token->length - 1] == 'H';
    for (size_t i = 0; i < sizeof matrices / sizeof matrices[0]; i++)
        mentions->matrices |= mtl_token_is(token, matrices[i]);
    if (token->length > 3 && token->text[token->length - 2] == 'x') mentions->matrices = true;
    for (size_t i = 0; i < sizeof simdgroup_matrices / sizeof simdgroup_matrices[0]; i++)
        mentions->simdgroup_matrices |= begins_with(token, simdgroup_matrices[i]);
    int component[4];
    unsigned used;
    mentions->swizzles |= mtl_read_swizzle(token, component, &used) > 0;
    if (mtl_token_is(token, "thread_elements")) mentions->thread_elements = true;
    if (mtl_token_is(token, "make_uniform")) mentions->uniforms = true;
    static const char *const simd[] = {"vector_",   "matrix_",    "simd_float", "simd_half",
                                       "simd_char", "simd_uchar", "simd_short", "simd_ushort",
                                       "simd_int",  "simd_uint",  "simd_long",  "simd_ulong"};
    for (size_t i = 0; i < sizeof simd / sizeof simd[0]; i++) mentions->simd_types |= begins_with(token, simd[i]);
    mentions->simd_types |= mtl_token_is(token, "simd") && strncmp(token->text + token->length, "::", 2) == 0;
}

/* 1.0h, 1.0bf */
static bool is_16_bit_literal(const mtl_token *token) {
    if (token->kind != MTL_TOKEN_NUMBER || token->length < 2) return false;
    char last = token->text[token->length - 1], before = token->text[token->length - 2];
    return last == 'h' || last == 'H' || ((last == 'f' || last == 'F') && (before == 'b' || before == 'B'));
}

/* float4, ulong2, half4x4; 8 bytes a component or less than that. */
static bool is_vector(const mtl_token *token, bool *is_long) {
    static const char *const scalars[] = {"bool", "char",  "uchar",  "short", "ushort", "int",     "uint",
                                          "half", "float", "bfloat", "long",  "ulong",  "int64_t", "uint64_t"};
    static const char *const prefixes[] = {"simd_", "vector_", "matrix_"};
    mtl_token bare = *token;
    for (size_t i = 0; i < sizeof prefixes / sizeof prefixes[0]; i++) {
        if (!begins_with(token, prefixes[i])) continue;
        bare.text += strlen(prefixes[i]);
        bare.length -= strlen(prefixes[i]);
        token = &bare;
        break;
    }
    *is_long = begins_with(token, "long") || begins_with(token, "ulong") || mtl_token_is(token, "vec");
    if (mtl_token_is(token, "vec") || mtl_token_is(token, "matrix")) return true;
    for (size_t i = 0; i < sizeof scalars / sizeof scalars[0]; i++) {
        size_t length = strlen(scalars[i]);
        if (!begins_with(token, scalars[i]) || (token->length != length + 1 && token->length != length + 3)) continue;
        char width = token->text[length];
        if (width >= '2' && width <= '4' && (token->length == length + 1 || token->text[length + 1] == 'x'))
            return true;
    }
    return false;
}

/* The compiler of CUDA's has no such pragma, only an option for all of the unit. */
static bool forbids_contraction(const mtl_token *token) {
    static const char words[] = "contract(off)";
    for (size_t i = 0; token->kind == MTL_TOKEN_VERBATIM && i + sizeof words - 1 <= token->length; i++) {
        if (memcmp(token->text + i, words, sizeof words - 1) == 0) return true;
    }
    return false;
}

/* Vectors that a pointer, a reference or a struct may find in a buffer: whose names are no plain declaration's (float4 v) and no
 * constructor's (float4(x)). */
static void find_vectors(mtl_mentions *mentions, const mtl_tokens *tokens) {
    int all = 0, elsewhere = 0;
    bool structs = false, is_long;
    const mtl_token *before = NULL;
    for (size_t i = 0; i < tokens->count; i++) {
        const mtl_token *token = &tokens->token[i];
        if (token->kind == MTL_TOKEN_SPACE) continue;
        structs |= mtl_token_is(token, "struct") || mtl_token_is(token, "class") || mtl_token_is(token, "union");
        if (token->kind == MTL_TOKEN_IDENTIFIER && is_vector(token, &is_long)) {
            size_t next = i + 1;
            while (next < tokens->count && tokens->token[next].kind == MTL_TOKEN_SPACE) next++;
            const mtl_token *behind = next < tokens->count ? &tokens->token[next] : NULL;
            bool plain = behind && (behind->kind == MTL_TOKEN_IDENTIFIER || mtl_token_is(behind, "(")) &&
                         !(before && mtl_token_is(before, "typedef"));
            int bytes = is_long ? 32 : 16;
            if (bytes > all) all = bytes;
            if (!plain && bytes > elsewhere) elsewhere = bytes;
        }
        before = token;
    }
    int bytes = structs ? all : elsewhere;
    if (bytes > mentions->vector_bytes) mentions->vector_bytes = bytes;
}

/* Whether the token is `name` followed by `suffix`. */
static bool is_joined(const mtl_token *token, const char *name, const char *suffix) {
    size_t first = strlen(name), second = strlen(suffix);
    return token->length == first + second && memcmp(token->text, name, first) == 0 &&
           memcmp(token->text + first, suffix, second) == 0;
}

/* { .name =   or   , .name = */
static bool has_designators(const mtl_tokens *tokens) {
    const mtl_token *last[3] = {NULL, NULL, NULL};
    for (size_t i = 0; i < tokens->count; i++) {
        const mtl_token *token = &tokens->token[i];
        if (token->kind == MTL_TOKEN_SPACE) continue;
        if (last[0] && mtl_token_is(token, "=") && last[2]->kind == MTL_TOKEN_IDENTIFIER &&
            mtl_token_is(last[1], ".") && (mtl_token_is(last[0], "{") || mtl_token_is(last[0], ",")))
            return true;
        last[0] = last[1];
        last[1] = last[2];
        last[2] = token;
    }
    return false;
}

bool mtl_find_mentions(mtl_mentions *mentions, const mtl_definition *definition) {
    *mentions = (mtl_mentions){0};
    mtl_tokens tokens;
    if (!mtl_tokenize(&tokens, definition->source, strlen(definition->source))) return false;
    for (size_t t = 0; t < tokens.count; t++) {
        const mtl_token *token = &tokens.token[t];
        mentions->no_contraction |= forbids_contraction(token);
        mentions->halves |= is_16_bit_literal(token);
        if (token->kind != MTL_TOKEN_IDENTIFIER) continue;
        for (int i = 0; i < ATTRIBUTES; i++) {
            if (mtl_token_is(token, attributes[i].name)) mentions->attributes |= 1u << i;
        }
        for (int i = 0; i < definition->input_count; i++) {
            const char *name = definition->input_names[i];
            if (is_joined(token, name, "_shape")) mentions->input[i] |= MTL_MENTIONS_SHAPE;
            if (is_joined(token, name, "_strides")) mentions->input[i] |= MTL_MENTIONS_STRIDES;
            if (is_joined(token, name, "_ndim")) mentions->input[i] |= MTL_MENTIONS_RANK;
        }
        if (mtl_token_is(token, "threadgroup")) mentions->relative = true;
        mentions->returns |= mtl_token_is(token, "return");
        if (is_meeting_point(token)) mentions->lanes_meet = true;
        find_types(mentions, token);
    }
    find_vectors(mentions, &tokens);
    mentions->designators |= has_designators(&tokens);
    mtl_tokens_free(&tokens);
    for (int i = 0; i < ATTRIBUTES; i++) {
        if (mentions->attributes >> i & 1 && attributes[i].relative) mentions->relative = true;
    }

    if (!mtl_tokenize(&tokens, definition->header, strlen(definition->header))) return false;
    for (size_t t = 0; t < tokens.count; t++) {
        mentions->no_contraction |= forbids_contraction(&tokens.token[t]);
        mentions->halves |= is_16_bit_literal(&tokens.token[t]);
        if (tokens.token[t].kind != MTL_TOKEN_IDENTIFIER) continue;
        mentions->returns |= tokens.token[t].directive && mtl_token_is(&tokens.token[t], "return");
        if (mtl_token_is(&tokens.token[t], "threadgroup")) mentions->relative = true; /* perhaps in a macro */
        if (is_meeting_point(&tokens.token[t])) mentions->lanes_meet = true;
        find_types(mentions, &tokens.token[t]);
    }
    find_vectors(mentions, &tokens);
    mentions->designators |= has_designators(&tokens);
    mtl_tokens_free(&tokens);
    return true;
}

/* ---- the source as Metal would get it --------------------------------------------------------------------------------- */

static void add_template_value(mtl_text *out, const mtl_template_value *value) {
    switch (value->kind) {
    case METALLOID_TEMPLATE_INT: mtl_text_format(out, "%lld", (long long)value->integer); break;
    case METALLOID_TEMPLATE_BOOL: mtl_text_add_string(out, value->integer ? "1" : "0"); break;
    case METALLOID_TEMPLATE_DTYPE: mtl_text_add_string(out, mtl_metal_type(value->dtype)); break;
    }
}

/* "<a, 3>" with separators of the caller's; nothing where there are none. */
static void add_template_values(mtl_text *out, const mtl_types *types, const char *open, const char *comma,
                                const char *close) {
    if (!types->template_count) return;
    mtl_text_add_string(out, open);
    for (int i = 0; i < types->template_count; i++) {
        if (i) mtl_text_add_string(out, comma);
        add_template_value(out, &types->template_values[i]);
    }
    mtl_text_add_string(out, close);
}

static void add_template_parameters(mtl_text *out, const mtl_types *types) {
    static const char *const kinds[] = {
        [METALLOID_TEMPLATE_INT] = "int", [METALLOID_TEMPLATE_BOOL] = "bool", [METALLOID_TEMPLATE_DTYPE] = "typename"};
    if (!types->template_count) return;
    mtl_text_add_string(out, "template <");
    for (int i = 0; i < types->template_count; i++) {
        const mtl_template_value *value = &types->template_values[i];
        mtl_text_format(out, "%s%s %s", i ? ", " : "", kinds[value->kind], value->name);
    }
    mtl_text_add_string(out, ">\n");
}

/* custom_kernel_<name>, with all that it is compiled for: one name, one source. */
static void add_kernel_name(mtl_text *out, const mtl_definition *definition, const mtl_types *types) {
    mtl_text_format(out, "custom_kernel_%s", definition->name);
    size_t from = out->length;
    add_template_values(out, types, "__", "_", "");
    for (size_t i = from; i < out->length; i++) { /* a negative number */
        if (out->data[i] == '-') out->data[i] = 'm';
    }
    for (int i = 0; i < definition->input_count; i++) {
        const mtl_buffer_type *input = &types->inputs[i];
        mtl_text_format(out, "_%s%s", mtl_metal_type(input->dtype),
                        input->is_scalar  ? "s"
                        : input->is_small ? "c"
                                          : "");
    }
    for (int i = 0; i < definition->output_count; i++) mtl_text_format(out, "_%s", mtl_metal_type(types->outputs[i]));
}

void mtl_metal_source(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                      const mtl_types *types) {
    mtl_text_add_string(out, definition->header);
    add_template_parameters(out, types);
    mtl_text_add_string(out, "[[kernel]] void ");
    add_kernel_name(out, definition, types);
    int buffer = 0;
    const char *separator = "(\n";
    for (int i = 0; i < definition->input_count; i++) {
        const mtl_buffer_type *input = &types->inputs[i];
        const char *name = definition->input_names[i];
        mtl_text_format(out, "%s  const %s %s%s %s [[buffer(%d)]]", separator, input->is_small ? "constant" : "device",
                        mtl_metal_type(input->dtype), input->is_scalar ? "&" : "*", name, buffer++);
        separator = ",\n";
        if (input->is_scalar) continue;
        if (mentions->input[i] & MTL_MENTIONS_SHAPE)
            mtl_text_format(out, ",\n  const constant int* %s_shape [[buffer(%d)]]", name, buffer++);
        if (mentions->input[i] & MTL_MENTIONS_STRIDES)
            mtl_text_format(out, ",\n  const constant int64_t* %s_strides [[buffer(%d)]]", name, buffer++);
        if (mentions->input[i] & MTL_MENTIONS_RANK)
            mtl_text_format(out, ",\n  const constant int& %s_ndim [[buffer(%d)]]", name, buffer++);
    }
    for (int i = 0; i < definition->output_count; i++) {
        const char *type = mtl_metal_type(types->outputs[i]);
        mtl_text_format(out,
                        definition->atomic_outputs ? "%s  device atomic<%s>* %s [[buffer(%d)]]"
                                                   : "%s  device %s* %s [[buffer(%d)]]",
                        separator, type, definition->output_names[i], buffer++);
        separator = ",\n";
    }
    for (int i = 0; i < ATTRIBUTES; i++) {
        if (!(mentions->attributes >> i & 1)) continue;
        const char *name = attributes[i].name;
        mtl_text_format(out, ",\n  %s %s [[%s]]", attributes[i].vector ? "uint3" : "uint", name, name);
    }
    mtl_text_format(out, ") {\n%s\n}\n", definition->source);
    if (!types->template_count) return;
    mtl_text_add_string(out, "\ntemplate [[host_name(\"");
    add_kernel_name(out, definition, types);
    mtl_text_add_string(out, "\")]] [[kernel]] decltype(");
    add_kernel_name(out, definition, types);
    add_template_values(out, types, "<", ", ", ">");
    mtl_text_add_string(out, ") ");
    add_kernel_name(out, definition, types);
    add_template_values(out, types, "<", ", ", ">");
    mtl_text_add_string(out, ";\n");
}

/* ---- the translation unit ------------------------------------------------------------------------------------------------ */

/* A parameter of the body, and the place in mtl_dispatch.pointers that it comes from. `attribute`, where it is not NULL, gives its
 * value instead. */
typedef void (*parameter_fn)(mtl_text *out, const char *type, const char *name, int pointer, const attribute *value);

static void for_parameters(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                           const mtl_types *types, parameter_fn fn) {
    char type[64];
    int pointer = 0;
    for (int i = 0; i < definition->input_count; i++) {
        const mtl_buffer_type *input = &types->inputs[i];
        const char *name = definition->input_names[i];
        char joined[MTL_LONGEST_NAME + sizeof "_strides"];
        snprintf(type, sizeof type, "const %s %s", mtl_metal_type(input->dtype), input->is_scalar ? "&" : "*");
        fn(out, type, name, pointer, NULL);
        if (mentions->input[i] & MTL_MENTIONS_SHAPE) {
            snprintf(joined, sizeof joined, "%s_shape", name);
            fn(out, "const int *", joined, pointer + 1, NULL);
        }
        if (mentions->input[i] & MTL_MENTIONS_STRIDES) {
            snprintf(joined, sizeof joined, "%s_strides", name);
            fn(out, "const int64_t *", joined, pointer + 2, NULL);
        }
        if (mentions->input[i] & MTL_MENTIONS_RANK) {
            snprintf(joined, sizeof joined, "%s_ndim", name);
            fn(out, "const int &", joined, pointer + 3, NULL);
        }
        pointer += MTL_POINTERS_OF_INPUT;
    }
    for (int i = 0; i < definition->output_count; i++) {
        snprintf(type, sizeof type, definition->atomic_outputs ? "atomic<%s> *" : "%s *",
                 mtl_metal_type(types->outputs[i]));
        fn(out, type, definition->output_names[i], pointer++, NULL);
    }
    for (int i = 0; i < ATTRIBUTES; i++) {
        if (mentions->attributes >> i & 1)
            fn(out, attributes[i].vector ? "uint3 " : "uint ", attributes[i].name, -1, &attributes[i]);
    }
}

static void declare_parameter(mtl_text *out, const char *type, const char *name, int pointer, const attribute *value) {
    (void)pointer, (void)value;
    mtl_text_format(out, ", %s%s", type, name);
}

/* Buffers do not overlap where one of them is written, and nobody writes an input. */
static void declare_buffer(mtl_text *out, const char *type, const char *name, int pointer, const attribute *value) {
    if (!value) mtl_text_format(out, ", %s__restrict __mtl_%d", type, pointer);
    (void)name;
}

/* The same for a simdgroup; other simdgroups write outputs between its barriers. */
static void declare_shared_buffer(mtl_text *out, const char *type, const char *name, int pointer,
                                  const attribute *value) {
    if (strncmp(type, "const ", 6) == 0) declare_buffer(out, type, name, pointer, value);
    else if (!value) mtl_text_format(out, ", %s__mtl_%d", type, pointer);
}

static void pass_buffer(mtl_text *out, const char *type, const char *name, int pointer, const attribute *value) {
    (void)name;
    if (value) return;
    bool reference = type[strlen(type) - 1] == '&';
    mtl_text_format(out, ", %s(%.*s *)dispatch.pointers[%d]", reference ? "*" : "", (int)strlen(type) - 1, type,
                    pointer);
}

static void pass_in_loop(mtl_text *out, const char *type, const char *name, int pointer, const attribute *value) {
    (void)type, (void)name;
    if (value) mtl_text_format(out, ", %s", value->value);
    else mtl_text_format(out, ", __mtl_%d", pointer);
}

static void pass_in_thread(mtl_text *out, const char *type, const char *name, int pointer, const attribute *value) {
    if (value) mtl_text_format(out, ", %s", value->value);
    else pass_buffer(out, type, name, pointer, value);
}

static void add_call(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                     const mtl_types *types, parameter_fn pass) {
    mtl_text_format(out, "custom_kernel_%s", definition->name);
    add_template_values(out, types, "<", ", ", ">");
    mtl_text_add_string(out, "(group");
    for_parameters(out, definition, mentions, types, pass);
    mtl_text_add_string(out, ");\n");
}

/* Threads that never meet: a loop over the threads of a row, with no call left in it once the body is inlined. Where
 * nothing depends on the cut into threadgroups, the row goes through all of the caller's. It lies along x, or along
 * y in a grid that has one thread along x. */
static void add_loops(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                      const mtl_types *types) {
    char along = types->along_y ? 'y' : 'x', other = types->along_y ? 'x' : 'y';
    mtl_text_add_string(
        out, "static __attribute__((noinline)) void __mtl_row(mtl_group &group, unsigned begin, unsigned end, "
             "unsigned across, unsigned z, unsigned first, unsigned l_across, unsigned lz");
    for_parameters(out, definition, mentions, types, declare_buffer);
    mtl_text_format(
        out,
        ") {\n"
        "    const mtl_dispatch &dispatch = *group.dispatch;\n"
        "    unsigned before = (lz * group.extent[1] + l_across) * group.extent[0];\n"
        "    for (unsigned at = begin; at < end; at++) {\n"
        "        unsigned %c = at, %c = across, l%c = at - first, l%c = l_across, index = before + at - first;\n"
        "        (void)dispatch, (void)index;\n"
        "        ",
        along, other, along, other);
    add_call(out, definition, mentions, types, pass_in_loop);
    mtl_text_format(
        out,
        "    }\n"
        "}\n"
        "extern \"C\" __attribute__((visibility(\"default\"))) int mtl_kernel_run(mtl_group *worker, char *, "
        "unsigned long at, unsigned long end) {\n"
        "    enum { along = %d, other = 1 - along };\n"
        "    mtl_group &group = *worker;\n"
        "    const mtl_dispatch &dispatch = *group.dispatch;\n"
        "    while (at < end && !group.is_interrupted(&group)) {\n"
        "        unsigned long run = __mtl_place_group(group, at, end, %s);\n"
        "        unsigned first = group.position[along] * dispatch.threadgroup[along];\n"
        "        for (unsigned lz = 0; lz < group.extent[2]; lz++) {\n"
        "            for (unsigned l_across = 0; l_across < group.extent[other]; l_across++) {\n"
        "                unsigned across = group.position[other] * dispatch.threadgroup[other] + l_across;\n"
        "                unsigned z = group.position[2] * dispatch.threadgroup[2] + lz;\n"
        "                __mtl_row(group, first, first + group.extent[along], across, z, first, l_across, lz",
        types->along_y ? 1 : 0, mentions->relative ? "-1" : "along");
    for_parameters(out, definition, mentions, types, pass_buffer);
    mtl_text_add_string(out,
                        ");\n"
                        "            }\n"
                        "        }\n"
                        "        at += run;\n"
                        "    }\n"
                        "    return 1;\n"
                        "}\n"
                        "extern \"C\" __attribute__((visibility(\"default\"))) const int mtl_kernel_stack_bits = 0;\n");
}

/* Threads that meet: each has a stack. */
static void add_threads(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                        const mtl_types *types) {
    mtl_text_add_string(out, "static __attribute__((noinline)) void __mtl_thread() {\n"
                             "    mtl_group &group = __mtl_this_group();\n"
                             "    const mtl_dispatch &dispatch = *group.dispatch;\n"
                             "    unsigned index = __mtl_this_index();\n"
                             "    unsigned lx = group.position_of[index][0], ly = group.position_of[index][1];\n"
                             "    unsigned lz = group.position_of[index][2];\n"
                             "    unsigned x = group.position[0] * dispatch.threadgroup[0] + lx;\n"
                             "    unsigned y = group.position[1] * dispatch.threadgroup[1] + ly;\n"
                             "    unsigned z = group.position[2] * dispatch.threadgroup[2] + lz;\n"
                             "    (void)x, (void)y, (void)z;\n"
                             "    ");
    add_call(out, definition, mentions, types, pass_in_thread);
    mtl_text_add_string(
        out,
        "    __mtl_finish();\n"
        "}\n"
        "extern \"C\" __attribute__((visibility(\"default\"))) int mtl_kernel_run(mtl_group *worker, char *stacks, "
        "unsigned long at, unsigned long end) {\n"
        "    for (; at < end; at++) {\n"
        "        if (worker->is_interrupted(worker)) return 0;\n"
        "        __mtl_place_group(*worker, at, end, -1);\n"
        "        if (!__mtl_run_group(*worker, stacks, __mtl_thread)) return 0;\n"
        "    }\n"
        "    return 1;\n"
        "}\n"
        "extern \"C\" __attribute__((visibility(\"default\"))) const int mtl_kernel_stack_bits = MTL_STACK_BITS;\n");
}

/* ---- lanes in lockstep ---- */

bool mtl_is_lane_attribute(const mtl_token *token) {
    for (int i = 0; i < ATTRIBUTES; i++) {
        if (attributes[i].lane && mtl_token_is(token, attributes[i].name)) return true;
    }
    return false;
}

static void add_values(mtl_text *out, const mtl_mentions *mentions, const char *index, bool lane) {
    bool found = false;
    for (int i = 0; i < ATTRIBUTES; i++) {
        if (!(mentions->attributes >> i & 1) || (lane && !attributes[i].lane)) continue;
        if (!found) mtl_text_format(out, "const __mtl_values __mtl_own = __mtl_values_of(__mtl_here, %s); ", index);
        found = true;
        mtl_text_format(out, "const %s %s = __mtl_own.%s; ", attributes[i].vector ? "uint3" : "uint",
                        attributes[i].name, attributes[i].name);
    }
}

void mtl_lane_attributes(mtl_text *out, const mtl_mentions *mentions, const char *index) {
    add_values(out, mentions, index, true);
}

/* What the body of a simdgroup begins with. Attributes that lanes differ in have a lane's values in each region;
 * these here give their types. */
static void add_simdgroup_values(mtl_text *out, const mtl_mentions *mentions) {
    mtl_text_add_string(out, "const __mtl_place __mtl_here(__mtl_group); "
                             "unsigned __mtl_alive = __mtl_here.lanes, __mtl_on = __mtl_alive; "
                             "const unsigned __mtl_lane = 0; (void)__mtl_lane; ");
    add_values(out, mentions, "__mtl_here.first", false);
}

/* A simdgroup has a stack, and runs its lanes in lockstep. */
static void add_simdgroups(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                           const mtl_types *types) {
    mtl_text_add_string(out, "struct __mtl_values {\n");
    for (int i = 0; i < ATTRIBUTES; i++) {
        if (mentions->attributes >> i & 1)
            mtl_text_format(out, "    %s %s;\n", attributes[i].vector ? "uint3" : "uint", attributes[i].name);
    }
    mtl_text_add_string(out, "};\n"
                             "__mtl_inline __mtl_values __mtl_values_of(const __mtl_place &here, unsigned index) {\n"
                             "    const mtl_dispatch &dispatch = here.dispatch;\n"
                             "    const __mtl_place &group = here;\n"
                             "    unsigned lx = index, ly = 0, lz = 0;\n");
    if (!types->in_line) {
        mtl_text_add_string(out, "    if (!group.is_line) {\n"
                                 "        lx = index % group.extent[0], ly = index / group.extent[0];\n"
                                 "        lz = ly / group.extent[1], ly %= group.extent[1];\n"
                                 "    }\n");
    }
    mtl_text_add_string(out, "    unsigned x = group.position[0] * dispatch.threadgroup[0] + lx;\n"
                             "    unsigned y = group.position[1] * dispatch.threadgroup[1] + ly;\n"
                             "    unsigned z = group.position[2] * dispatch.threadgroup[2] + lz;\n"
                             "    (void)x, (void)y, (void)z;\n"
                             "    return {");
    for (int i = 0; i < ATTRIBUTES; i++) {
        if (mentions->attributes >> i & 1) mtl_text_format(out, "%s, ", attributes[i].value);
    }
    mtl_text_add_string(out, "};\n"
                             "}\n"
                             "static __attribute__((noinline)) void __mtl_simdgroup() {\n"
                             "    mtl_group &group = __mtl_this_group();\n"
                             "    const mtl_dispatch &dispatch = *group.dispatch;\n"
                             "    (void)dispatch;\n"
                             "    ");
    add_call(out, definition, mentions, types, pass_buffer);
    mtl_text_add_string(
        out,
        "    __mtl_end(group);\n"
        "}\n"
        "extern \"C\" __attribute__((visibility(\"default\"))) int mtl_kernel_run(mtl_group *worker, char *stacks, "
        "unsigned long at, unsigned long end) {\n"
        "    for (; at < end; at++) {\n"
        "        if (worker->is_interrupted(worker)) return 0;\n"
        "        __mtl_place_group(*worker, at, end, -1);\n"
        "        if (!__mtl_run_simdgroups(*worker, stacks, __mtl_simdgroup)) return 0;\n"
        "    }\n"
        "    return 1;\n"
        "}\n"
        "extern \"C\" __attribute__((visibility(\"default\"))) const int mtl_kernel_stack_bits = MTL_STACK_BITS;\n"
        "extern \"C\" __attribute__((visibility(\"default\"))) const int mtl_kernel_lockstep = 1;\n");
}

/* ---- the kernel of a GPU ---- */

static void add_cuda_call(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                          const mtl_types *types) {
    mtl_text_format(out, "custom_kernel_%s", definition->name);
    add_template_values(out, types, "<", ", ", ">");
    mtl_text_add_string(out, "(group");
    for (int i = 0; i < definition->input_count; i++) {
        const char *type = mtl_metal_type(types->inputs[i].dtype);
        /* A scalar of the host's comes with the launch. */
        if (types->inputs[i].is_scalar)
            mtl_text_format(out, ", *(__mtl_in_%d ? __mtl_in_%d : (const %s *)&launch.scalar[%d])", i, i, type, i);
        else mtl_text_format(out, ", __mtl_in_%d", i);
        unsigned char mentioned = mentions->input[i];
        if (mentioned & MTL_MENTIONS_SHAPE) mtl_text_format(out, ", launch.shapes + launch.shape_at[%d]", i);
        if (mentioned & MTL_MENTIONS_STRIDES) mtl_text_format(out, ", launch.strides + launch.strides_at[%d]", i);
        if (mentioned & MTL_MENTIONS_RANK) mtl_text_format(out, ", launch.rank[%d]", i);
    }
    for (int i = 0; i < definition->output_count; i++) mtl_text_format(out, ", __mtl_out_%d", i);
    for (int i = 0; i < ATTRIBUTES; i++) {
        if (mentions->attributes >> i & 1) mtl_text_format(out, ", %s", attributes[i].value);
    }
    mtl_text_add_string(out, ");\n");
}

static int prefetched_of(const mtl_definition *definition) {
    return definition->input_count < MTL_CUDA_PREFETCHED ? definition->input_count : MTL_CUDA_PREFETCHED;
}

/* Data is a parameter for each buffer, which alone the compiler believes to overlap no other; the rest is one struct, laid out as
 * mtl_cuda_layout says. */
static void add_cuda_kernel(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                            const mtl_types *types, const mtl_unit_options *options) {
    mtl_cuda_layout layout = mtl_cuda_layout_of(definition, mentions);
    int inputs = definition->input_count;
    mtl_text_add_string(out, "struct mtl_launch {\n    mtl_dispatch dispatch;\n");
    if (inputs) {
        mtl_text_format(out,
                        "    unsigned long scalar[%d], prefetched[%d];\n    int rank[%d], shape_at[%d], "
                        "strides_at[%d];\n    unsigned slice[%d];\n",
                        inputs, prefetched_of(definition), inputs, inputs, inputs, prefetched_of(definition));
    }
    if (layout.strides_at) mtl_text_format(out, "    long strides[%d];\n", (int)MTL_CUDA_EXTENTS);
    /* Both begin at a multiple of 8, as in mtl_cuda_layout_of. */
    if (layout.shapes_at) mtl_text_format(out, "    alignas(8) int shapes[%d];\n", (int)MTL_CUDA_EXTENTS);
    mtl_text_format(out, "};\nstatic_assert(sizeof(mtl_launch) == %d, \"\");\n", layout.size);
    mtl_text_format(out, "extern \"C\" __global__ void __launch_bounds__(%d", options->most_threads);
    /* Products of matrices want registers more than threads: left alone, the compiler saves registers by loading tiles late. 512
     * threads of 128 registers each fill a multiprocessor. */
    if (mentions->simdgroup_matrices) mtl_text_format(out, ", %d", options->most_threads < 512 ? 2 : 1);
    mtl_text_add_string(out, ") mtl_kernel(");
    for (int i = 0; i < inputs; i++) {
        mtl_text_format(out, "const %s *__restrict__ __mtl_in_%d, ", mtl_metal_type(types->inputs[i].dtype), i);
    }
    for (int i = 0; i < definition->output_count; i++) {
        mtl_text_format(out,
                        definition->atomic_outputs ? "atomic<%s> *__restrict__ __mtl_out_%d, "
                                                   : "%s *__restrict__ __mtl_out_%d, ",
                        mtl_metal_type(types->outputs[i]), i);
    }
    mtl_text_add_string(out, "const __grid_constant__ mtl_launch launch) {\n"
                             "    const mtl_dispatch &dispatch = launch.dispatch;\n"
                             "    mtl_group group;\n"
                             "    unsigned index, local[3];\n");
    int width = mtl_cuda_width(definition, mentions, types);
    bool repeats = mtl_cuda_repeats(definition, mentions, options->line);
    if (width) {
        /* The first position is below 2^31, as the launch sees to: the others' offsets are then constants in addresses. */
        mtl_text_format(out,
                        "    if (dispatch.flags & mtl_flag_wide) {\n"
                        "        unsigned first = (blockIdx.x * %du + threadIdx.x) & 0x7fffffffu;\n"
                        "        unsigned y = blockIdx.y, z = blockIdx.z;\n"
                        "        (void)y, (void)z;\n"
                        "        if ((blockIdx.x + 1) * %du <= dispatch.grid[0]) {\n"
                        "#pragma unroll\n"
                        "            for (unsigned step = 0; step < %d; ++step) {\n"
                        "                unsigned x = first + step * %d;\n"
                        "                ",
                        width * MTL_CUDA_WIDE_THREADS, width * MTL_CUDA_WIDE_THREADS, width, MTL_CUDA_WIDE_THREADS);
        add_cuda_call(out, definition, mentions, types);
        mtl_text_format(out,
                        "            }\n"
                        "        } else {\n"
                        "            for (unsigned x = first; x < dispatch.grid[0]; x += %d) {\n"
                        "                ",
                        MTL_CUDA_WIDE_THREADS);
        add_cuda_call(out, definition, mentions, types);
        mtl_text_add_string(out, "            }\n        }\n        return;\n    }\n");
    }
    if (options->line) {
        mtl_text_format(out, "    __mtl_place_in_line<%d>(group, index, local);\n", options->line);
        if (repeats) mtl_text_add_string(out, "#pragma unroll 1\n    for (;;) {\n");
        mtl_text_add_string(out,
                            "    unsigned at = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + group.position[0];\n"
                            "    (void)at;\n");
        for (int i = 0; i < prefetched_of(definition); i++) {
            if (types->inputs[i].is_small) continue;
            mtl_text_format(out,
                            "    __mtl_prefetch<%d>(launch.prefetched[%d], at, at < dispatch.prefetching ? "
                            "launch.slice[%d] : 0);\n",
                            options->line, i, i);
        }
    } else mtl_text_add_string(out, "    if (!__mtl_place(dispatch, group, index, local)) return;\n");
    mtl_text_add_string(out, "    unsigned lx = local[0], ly = local[1], lz = local[2];\n"
                             "    unsigned x = group.position[0] * dispatch.threadgroup[0] + lx;\n"
                             "    unsigned y = group.position[1] * dispatch.threadgroup[1] + ly;\n"
                             "    unsigned z = group.position[2] * dispatch.threadgroup[2] + lz;\n"
                             "    (void)x, (void)y, (void)z;\n    ");
    add_cuda_call(out, definition, mentions, types);
    if (repeats) {
        mtl_text_add_string(out, "    group.position[0] += gridDim.x;\n"
                                 "    if (group.position[0] >= dispatch.threadgroups[0]) break;\n"
                                 "    __syncthreads();\n"
                                 "    }\n");
    }
    mtl_text_add_string(out, "}\n");
}

int mtl_cuda_line(const mtl_mentions *mentions, const uint32_t grid[3], const uint32_t threadgroup[3]) {
    enum { MOST_BLOCKS_YZ = 65535 };
    uint32_t threads = threadgroup[0];
    bool in_line = threadgroup[1] == 1 && threadgroup[2] == 1 && threads >= 32 && (threads & (threads - 1)) == 0;
    bool whole = grid[0] % threads == 0 && grid[1] <= MOST_BLOCKS_YZ && grid[2] <= MOST_BLOCKS_YZ;
    return in_line && whole && (mentions->lanes_meet || mentions->relative) ? (int)threads : 0;
}

bool mtl_cuda_repeats(const mtl_definition *definition, const mtl_mentions *mentions, int line) {
    return (line == 32 || line == 64 || line == 1024) && !mentions->returns && !definition->atomic_outputs;
}

/* One element a thread is too few bytes under way for a GPU's memory: 16 bytes of each input are enough. */
int mtl_cuda_width(const mtl_definition *definition, const mtl_mentions *mentions, const mtl_types *types) {
    enum { SHORT = 600, BYTES = 16, LEAST = 4, MOST = 8 };
    if (mentions->lanes_meet || mentions->relative || definition->atomic_outputs || strlen(definition->source) >= SHORT)
        return 0;
    int size = 1;
    for (int i = 0; i < definition->input_count; i++) {
        int own = types->inputs[i].is_scalar ? 1 : (int)mtl_dtype_size(types->inputs[i].dtype);
        size = own > size ? own : size;
    }
    return BYTES / size < LEAST ? LEAST : BYTES / size > MOST ? MOST : BYTES / size;
}

mtl_cuda_layout mtl_cuda_layout_of(const mtl_definition *definition, const mtl_mentions *mentions) {
    mtl_cuda_layout layout = {.scalars_at = 48}; /* behind mtl_dispatch */
    unsigned char mentioned = 0;
    for (int i = 0; i < definition->input_count; i++) mentioned |= mentions->input[i];
    layout.prefetched_at = layout.scalars_at + 8 * definition->input_count;
    layout.ints_at = layout.prefetched_at + 8 * prefetched_of(definition);
    layout.slices_at = layout.ints_at + 12 * definition->input_count;
    layout.size = (layout.slices_at + 4 * prefetched_of(definition) + 7) / 8 * 8;
    if (mentioned & MTL_MENTIONS_STRIDES) {
        layout.strides_at = layout.size;
        layout.size += 8 * MTL_CUDA_EXTENTS;
    }
    if (mentioned & MTL_MENTIONS_SHAPE) {
        layout.shapes_at = layout.size;
        layout.size += 4 * MTL_CUDA_EXTENTS;
    }
    return layout;
}

/* ---- the header of Metal's types and functions ---- */

/* What a call's types and the source make of the header: parts that nothing mentions cost time to compile. */
static bool is_part_of(const char *name, const mtl_mentions *mentions, const mtl_unit_options *options) {
    const char *suffix = options->target == MTL_TARGET_CPU ? "_cuda.h" : "_cpu.h"; /* the other's */
    size_t length = strlen(name), end = strlen(suffix);
    if (length > end && strcmp(name + length - end, suffix) == 0) return false;
    if (strcmp(name, "lockstep_cpu.h") == 0) return options->lockstep;
    if (strcmp(name, "matrix.h") == 0) return mentions->matrices || mentions->simd_types;
    if (strcmp(name, "simd_types.h") == 0) return mentions->simd_types;
    if (strcmp(name, "simdgroup_matrix.h") == 0) return mentions->simdgroup_matrices;
    return true;
}

/* `seen`: by the letters of the set, how many, and which. */
static void add_swizzle(mtl_text lists[3], bool seen[2][5][256], const mtl_token *token) {
    int component[4];
    unsigned used;
    int count = mtl_read_swizzle(token, component, &used), which = 0;
    if (!count) return;
    for (int i = 0; i < count; i++) which = which * 4 + component[i];
    bool *is_there = &seen[strchr("rgba", token->text[0]) != NULL][count][which];
    for (int width = 2; width <= 4 && !*is_there; width++) {
        mtl_text *list = &lists[width - 2];
        if (used >> width) continue;
        mtl_text_format(list, " S%d(%.*s", count, (int)token->length, token->text);
        for (int i = 0; i < count; i++) mtl_text_format(list, ", %d", component[i]);
        mtl_text_add_string(list, ")");
    }
    *is_there = true;
}

/* A vector has the swizzles that the source mentions: all of them would be 680 members. */
static void add_swizzles(mtl_text *out, const mtl_definition *definition) {
    mtl_text lists[3] = {{0}, {0}, {0}};
    bool seen[2][5][256] = {0};
    const char *const sources[] = {definition->header, definition->source};
    for (int s = 0; s < 2; s++) {
        mtl_tokens tokens;
        if (!mtl_tokenize(&tokens, sources[s], strlen(sources[s]))) {
            out->failed = true;
            break;
        }
        bool member = false;
        for (size_t i = 0; i < tokens.count; i++) {
            const mtl_token *token = &tokens.token[i];
            if (token->kind == MTL_TOKEN_SPACE) continue;
            /* ## may put one together from letters, or come behind the point */
            if (member || mtl_token_is(token, "xy") || mtl_token_is(token, "zw") || mtl_token_is(token, "xyz"))
                add_swizzle(lists, seen, token);
            member = mtl_token_is(token, ".") || mtl_token_is(token, "->");
        }
        mtl_tokens_free(&tokens);
    }
    for (int width = 2; width <= 4; width++) {
        mtl_text *list = &lists[width - 2];
        mtl_text_format(out, "#define MSL_SWIZZLES_%d(S2, S3, S4)%s\n", width, mtl_text_string(list));
        out->failed |= list->failed;
        mtl_text_free(list);
    }
}

/* Class templates of Metal's that users have their own of: ours then get another name, as functions give way by themselves
 * (MSL_REST). Those in a namespace or class of the user's hide ours. */
static void rename_classes(mtl_text *begin, mtl_text *end, const char *header) {
    static const char *const names[] = {"array",  "conditional", "enable_if", "integer_sequence", "integral_constant",
                                        "is_same"};
    mtl_tokens tokens;
    if (!mtl_tokenize(&tokens, header, strlen(header))) {
        begin->failed = true;
        return;
    }
    const mtl_token *last[2] = {NULL, NULL};
    long depth = 0;
    for (size_t i = 0; i < tokens.count; i++) {
        const mtl_token *token = &tokens.token[i];
        if (token->kind == MTL_TOKEN_SPACE || token->directive) continue;
        bool defines = depth == 0 && last[0] && (mtl_token_is(token, "{") || mtl_token_is(token, ":")) &&
                       (mtl_token_is(last[0], "struct") || mtl_token_is(last[0], "class"));
        for (size_t n = 0; defines && n < sizeof names / sizeof names[0]; n++) {
            if (!mtl_token_is(last[1], names[n])) continue;
            mtl_text_format(begin, "#define %s __mtl_metals_%s\n", names[n], names[n]);
            mtl_text_format(end, "#undef %s\n", names[n]);
        }
        depth += mtl_token_is(token, "{") - mtl_token_is(token, "}");
        last[0] = last[1];
        last[1] = token;
    }
    mtl_tokens_free(&tokens);
}

static void add_prelude(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                        const mtl_unit_options *options) {
    if (options->math_mode == METALLOID_MATH_FAST) mtl_text_add_string(out, "#define MSL_MATH_FAST 1\n");
    if (options->target == MTL_TARGET_CUDA) mtl_text_add_string(out, "#define MTL_TARGET_CUDA 1\n");
    if (options->target == MTL_TARGET_CPU) mtl_text_format(out, "#define MTL_STACK_BITS %d\n", options->stack_bits);
    if (options->lockstep) mtl_text_add_string(out, "#define MTL_LOCKSTEP 1\n");
    if (mentions->uniforms) mtl_text_add_string(out, "#define MSL_UNIFORM 1\n");
    if (mentions->thread_elements) mtl_text_add_string(out, "#define MSL_THREAD_ELEMENTS 1\n");
    add_swizzles(out, definition);
    mtl_text renamed = {0};
    rename_classes(out, &renamed, definition->header);
    for (int i = 0; i < mtl_msl_part_count; i++) {
        const mtl_msl_part *part = &mtl_msl_parts[i];
        if (!is_part_of(part->name, mentions, options)) continue;
        mtl_text_format(out, "#line 1 \"metalloid/%s\"\n", part->name);
        mtl_text_add(out, part->text, part->length);
        mtl_text_add_string(out, "\n");
    }
    mtl_text_add_string(out, mtl_text_string(&renamed));
    out->failed |= renamed.failed;
    mtl_text_free(&renamed);
}

static bool has_arms(const mtl_definition *definition, const mtl_mentions *mentions, const mtl_types *types) {
    bool found = mentions->halves || mentions->swizzles;
    for (int i = 0; i < definition->input_count; i++) {
        mtl_dtype dtype = types->inputs[i].dtype;
        found |= dtype == MTL_F16 || dtype == MTL_BF16;
    }
    for (int i = 0; i < definition->output_count; i++)
        found |= types->outputs[i] == MTL_F16 || types->outputs[i] == MTL_BF16;
    for (int i = 0; i < types->template_count; i++) {
        const mtl_template_value *value = &types->template_values[i];
        found |= value->kind == METALLOID_TEMPLATE_DTYPE && (value->dtype == MTL_F16 || value->dtype == MTL_BF16);
    }
    return found;
}

/* The body as a function, up to its opening brace or semicolon. */
static void add_signature(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                          const mtl_types *types, parameter_fn declare) {
    add_template_parameters(out, types);
    mtl_text_format(out, "__mtl_inline void custom_kernel_%s(mtl_group &__mtl_group", definition->name);
    for_parameters(out, definition, mentions, types, declare);
    mtl_text_add_string(out, ")");
}

/* What calls the body comes before it: macros of the user's header are then none of its business. All of it is in Metal's namespace,
 * which stands between the user's names and those that a compiler has built in. */
bool mtl_translation_unit(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                          const mtl_types *types, const mtl_unit_options *given) {
    mtl_unit_options options = *given;
    options.types = types;
    options.header = definition->header;
    options.arms = has_arms(definition, mentions, types);
    bool threads = mentions->lanes_meet || options.count_iterations;
    mtl_names meeting = {0};
    if (threads && options.target == MTL_TARGET_CPU) {
        if (!mtl_find_meeting_functions(&meeting, definition)) out->failed = true;
        options.meeting = &meeting;
    }
    mtl_text body = {0};
    options.lockstep = given->lockstep && options.target == MTL_TARGET_CPU && mentions->lanes_meet &&
                       !options.count_iterations && !mentions->simdgroup_matrices && !mentions->no_contraction &&
                       !meeting.count;
    if (options.lockstep) {
        options.meeting = NULL;
        options.lockstep = mtl_translate_in_lockstep(&body, definition, mentions, &options);
        if (!options.lockstep) options.meeting = &meeting;
    }
    parameter_fn declare = options.lockstep ? declare_shared_buffer : declare_parameter;
    add_prelude(out, definition, mentions, &options);
    mtl_text_add_string(out, "#line 1 \"generated\"\nnamespace metal {\n"
                             "__mtl_inline uint3 __mtl_uint3(const unsigned *from) { return uint3(from[0], from[1], "
                             "from[2]); }\n");
    add_signature(out, definition, mentions, types, declare);
    mtl_text_add_string(out, ";\n");
    if (options.target == MTL_TARGET_CUDA) add_cuda_kernel(out, definition, mentions, types, &options);
    else if (options.lockstep) add_simdgroups(out, definition, mentions, types);
    else if (threads) add_threads(out, definition, mentions, types);
    else add_loops(out, definition, mentions, types);
    mtl_text_add_string(out, "#line 1 \"header\"\n");
    mtl_translate(out, definition->header, MTL_REGION_HEADER, &options);
    mtl_text_add_string(out, "\n#line 1 \"generated\"\n");
    add_signature(out, definition, mentions, types, declare);
    mtl_text_add_string(out, " {\n#line 1 \"source\"\n");
    if (options.lockstep) {
        add_simdgroup_values(out, mentions);
        mtl_text_add_string(out, mtl_text_string(&body));
    } else {
        mtl_translate(out, definition->source, MTL_REGION_BODY, &options);
    }
    mtl_text_add_string(out, "\n}\n}\n");
    out->failed |= body.failed;
    mtl_text_free(&body);
    free(meeting.name);
    return options.lockstep;
}
