/* Metal source as C++, token by token. SPDX-License-Identifier: MIT */
#include "kernel/translation.h"

#include <stdlib.h>
#include <string.h>

static void translate_token(translation *t, size_t i);

/* Behind a list of template arguments that opens at `i` and is followed by what makes it one; `i` where it is a comparison. */
static size_t behind_arguments(const translation *t, size_t i) {
    static const char *const follow[] = {"(", "::", "{", NULL};
    size_t behind = mtl_behind_angle(t, i);
    return behind > i && mtl_is_one_of(t, behind, follow) ? behind : i;
}

/* The bracket that the token at `i` is directly in: '(', '[', '{', or NUL at the top. */
static char enclosing_bracket(const translation *t, size_t i) {
    size_t open = t->link[i].around;
    return open == MTL_NONE ? '\0' : t->token[open].text[0];
}

/* ---- literals --------------------------------------------------------------------------------------------------------------- */

/* The type that a literal's suffix names, and how long it is without: NULL for an integer, "" for the standard's own. */
static const char *literal_type(const mtl_token *token, size_t *length) {
    bool hexadecimal = token->length > 1 && token->text[0] == '0' && (token->text[1] == 'x' || token->text[1] == 'X');
    bool floating = memchr(token->text, '.', token->length) != NULL;
    const char *exponents = hexadecimal ? "pP" : "eE";
    for (size_t at = 0; at < token->length; at++) floating |= strchr(exponents, token->text[at]) != NULL;
    static const struct {
        const char *suffix, *type;
    } types[] = {{"bf", "::metal::bfloat"}, {"BF", "::metal::bfloat"}, {"h", "::metal::half"}, {"H", "::metal::half"}};
    *length = token->length;
    if (!floating) return NULL;
    for (size_t at = 0; at < sizeof types / sizeof *types; at++) {
        size_t suffix = strlen(types[at].suffix);
        if (*length <= suffix || memcmp(token->text + *length - suffix, types[at].suffix, suffix) != 0) continue;
        *length -= suffix;
        return types[at].type;
    }
    return "";
}

/* Metal has no double: 1.0 is a float. 1.0h and 1.0bf are made of floats: clang takes no suffix that is not a standard library's. */
static void translate_number(translation *t, size_t i) {
    mtl_token *token = &t->token[i];
    size_t length;
    const char *type = literal_type(token, &length);
    if (!type) return;
    char last = token->text[length - 1];
    bool is_digit = (last >= '0' && last <= '9') || last == '.';
    if (!is_digit && !*type) return;
    mtl_text text = {0};
    mtl_text_format(&text, *type ? "%s(%.*sf)" : "%s%.*sf", type, (int)length, token->text);
    token->replacement = mtl_keep(t, &text);
    mtl_text_free(&text);
}

/* ---- address spaces ----------------------------------------------------------------------------------------------------------- */

static const char *const plain_spaces[] = {"device", "thread", "ray_data", "object_data", "threadgroup_imageblock",
                                           NULL};

/* Whether a const stands in the same specifiers, before or behind: C++ takes it once. */
static bool is_const_already(const translation *t, size_t i) {
    static const char *const ends[] = {"(", ")", ",", ";", "{", "}", "=", "*", "&", "[", "]", NULL};
    for (size_t at = mtl_before(t, i); at != SIZE_MAX && !mtl_is_one_of(t, at, ends); at = mtl_before(t, at)) {
        if (mtl_is(t, at, "<")) break; /* the argument list that this is in */
        if (mtl_is(t, at, ">")) at = mtl_opening_angle(t, at);
        if (mtl_is(t, at, "const") || mtl_is(t, at, "constant")) return true;
    }
    for (size_t at = mtl_after(t, i); at < t->count && !mtl_is_one_of(t, at, ends); at = mtl_after(t, at)) {
        if (mtl_is(t, at, "<")) {
            size_t behind = mtl_behind_angle(t, at);
            if (behind == at) break;
            at = mtl_before(t, behind);
        } else if (mtl_is(t, at, ">")) {
            break;
        }
        if (mtl_is(t, at, "const")) return true;
    }
    return false;
}

/* A static member in constant memory is initialized in its class, of whatever type it is; a GPU's variable by a constant, which
 * another one is that is constexpr. */
static bool is_constant_expression(const translation *t, size_t i) {
    static const char *const specifiers[] = {"const", "inline", "static", NULL};
    static const char *const kinds[] = {"struct", "class", "union", "enum", NULL};
    bool found = t->options->target == MTL_TARGET_CUDA && t->region == MTL_REGION_HEADER &&
                 enclosing_bracket(t, i) != '(' && !mtl_is_one_of(t, mtl_after(t, i), kinds);
    for (size_t at = mtl_before(t, i); at != SIZE_MAX && mtl_is_one_of(t, at, specifiers); at = mtl_before(t, at))
        found |= mtl_is(t, at, "static");
    for (size_t at = mtl_after(t, i); at != SIZE_MAX && mtl_is_one_of(t, at, specifiers); at = mtl_after(t, at))
        found |= mtl_is(t, at, "static");
    if (!found) return false;
    for (size_t at = mtl_after(t, i); at < t->count && !mtl_is(t, at, "constant"); at = mtl_after(t, at)) {
        if (mtl_is(t, at, "=") || mtl_is(t, at, "{")) return true;
        if (mtl_is(t, at, ";") || mtl_is(t, at, "(") || mtl_is(t, at, "*") || mtl_is(t, at, "&")) return false;
    }
    return false;
}

static bool is_constexpr_already(const translation *t, size_t i) {
    static const char *const specifiers[] = {"const", "inline", "static", "constexpr", NULL};
    for (size_t at = mtl_before(t, i); at != SIZE_MAX && mtl_is_one_of(t, at, specifiers); at = mtl_before(t, at)) {
        if (mtl_is(t, at, "constexpr")) return true;
    }
    for (size_t at = mtl_after(t, i); mtl_is_one_of(t, at, specifiers); at = mtl_after(t, at)) {
        if (mtl_is(t, at, "constexpr")) return true;
    }
    return false;
}

static void translate_constant(translation *t, size_t i) {
    if (mtl_qualifies_constructor(t, i)) mtl_blank(t, i);
    else if (is_constant_expression(t, i) && !is_constexpr_already(t, i)) t->token[i].replacement = "constexpr";
    else t->token[i].replacement = is_const_already(t, i) ? "" : "const";
}

/* ---- variables in threadgroup memory ------------------------------------------------------------------------------------------- */

/* Behind the type that follows `threadgroup` at `i`, where the declarators begin; t->count where no variable is declared: the
 * pointee of a pointer, a reference, an argument of a template. */
static size_t find_declarators(const translation *t, size_t i) {
    static const char *const ends[] = {"[", ";", ",", "=", "{", NULL};
    size_t name = t->count, words = 0;
    for (size_t at = mtl_after(t, i); mtl_are_one_directive(t, i, at);) {
        if (mtl_is(t, at, "__attribute__")) {
            at = mtl_behind_bracket(t, mtl_after(t, at));
        } else if (mtl_is(t, at, "decltype") || mtl_is(t, at, "alignas") || mtl_is(t, at, "typeof")) {
            words += !mtl_is(t, at, "alignas");
            at = mtl_after(t, at);
            if (mtl_is(t, at, "(")) at = mtl_behind_bracket(t, at);
            name = t->count;
        } else if (mtl_is(t, at, "threadgroup")) {
            return t->count; /* the specifiers of another */
        } else if (mtl_is_identifier(t, at)) {
            name = at;
            words++;
            at = mtl_after(t, at);
        } else if (mtl_is(t, at, "::")) {
            at = mtl_after(t, at);
            words--; /* a::b is one word */
        } else if (mtl_is(t, at, "<")) {
            size_t behind = mtl_behind_angle(t, at);
            if (behind == at) return t->count;
            at = behind;
            name = t->count;
        } else {
            return words >= 2 && name < t->count && mtl_is_one_of(t, at, ends) ? name : t->count;
        }
    }
    return t->count;
}

static void write_translated(translation *t, mtl_text *out, size_t i) {
    enum { DEEPEST = 16 }; /* lambdas in initializers of variables in lambdas: each is copied */
    if (t->depth++ < DEEPEST) translate_token(t, i);
    t->depth--;
    if (t->token[i].kind == MTL_TOKEN_SPACE) mtl_text_add_string(out, " ");
    else mtl_write_token(out, &t->token[i]);
}

/* Takes `= value` at `i`, if it is there, out of the text: `value`, a list of `type`. Behind it. */
static size_t take_initializer(translation *t, size_t i, const char *type, mtl_text *value) {
    if (!mtl_is(t, i, "=")) return i;
    size_t first = mtl_after(t, i), end = first;
    while (end < t->count && !mtl_is(t, end, ",") && !mtl_is(t, end, ";")) {
        bool opens = mtl_is(t, end, "(") || mtl_is(t, end, "{") || mtl_is(t, end, "[");
        size_t angle = mtl_is(t, end, "<") ? behind_arguments(t, end) : end;
        end = opens ? mtl_behind_bracket(t, end) : angle > end ? angle : mtl_after(t, end);
    }
    if (mtl_is(t, first, "{")) mtl_text_add_string(value, type);
    mtl_blank(t, i);
    for (size_t moved = first; moved < end; moved++) {
        write_translated(t, value, moved);
        if (t->token[moved].kind != MTL_TOKEN_SPACE) mtl_blank(t, moved);
        t->token[moved].before = t->token[moved].behind = NULL;
    }
    return end;
}

/* __shared__ T a = 1, b[2] = {};   without the initializers, which the threadgroup's first thread assigns behind. */
static void initialize_shared(translation *t, size_t name) {
    static const char *const ends[] = {";", ")", "]", "}", "threadgroup", NULL};
    mtl_text behind = {0};
    size_t at = name;
    while (at < t->count && !mtl_is_one_of(t, at, ends)) {
        if (!mtl_is(t, at, "=")) {
            bool opens = mtl_is(t, at, "(") || mtl_is(t, at, "{") || mtl_is(t, at, "[");
            if (mtl_is(t, at, ",")) name = mtl_after(t, at);
            at = opens ? mtl_behind_bracket(t, at) : mtl_after(t, at);
            continue;
        }
        mtl_text type = {0}, value = {0};
        const char *text = t->token[name].text;
        int length = (int)t->token[name].length;
        mtl_text_format(&type, "typename ::metal::remove_reference<decltype(%.*s)>::type", length, text);
        at = take_initializer(t, at, mtl_text_string(&type), &value);
        mtl_text_format(&behind, " __mtl_initialize(%.*s, %s);", length, text, mtl_text_string(&value));
        t->failed |= type.failed | value.failed;
        mtl_text_free(&type);
        mtl_text_free(&value);
    }
    t->failed |= behind.failed;
    if (mtl_is(t, at, ";") && behind.length) mtl_add_behind(t, at, mtl_keep(t, &behind));
    mtl_text_free(&behind);
}

/* threadgroup T a[4], b;   becomes   typedef T __mtl_a_0[4], __mtl_b_1; and references of these types to the group's storage. */
enum {
    HEADERS_VARIABLES = 64,
    MACROS_VARIABLES = 96
}; /* the numbers from which on they have theirs, of mtl_most_variables */

static void declare_variables(translation *t, size_t keyword, size_t name) {
    mtl_text references = {0};
    const char *group = t->region == MTL_REGION_BODY ? "__mtl_group" : "__mtl_this_group()";
    t->token[keyword].replacement = "typedef";
    static const char *const no_typedef[] = {"static", "constexpr", "volatile", NULL};
    for (size_t at = mtl_before(t, keyword); at != SIZE_MAX && mtl_is_one_of(t, at, no_typedef); at = mtl_before(t, at))
        mtl_blank(t, at);
    size_t close = mtl_before(t, keyword);
    size_t open = close != SIZE_MAX && mtl_is(t, close, ")") ? mtl_opening_bracket(t, close) : SIZE_MAX;
    size_t word = open != SIZE_MAX ? mtl_before(t, open) : SIZE_MAX;
    if (word != SIZE_MAX && mtl_is(t, word, "alignas")) mtl_blank_range(t, word, keyword);
    for (size_t at = mtl_after(t, keyword); at < name; at = mtl_after(t, at)) {
        if (mtl_is(t, at, "alignas") || mtl_is(t, at, "__attribute__"))
            mtl_blank_range(t, at, mtl_behind_bracket(t, mtl_after(t, at)));
    }
    size_t at = name;
    while (at < t->count) {
        bool pointer = mtl_is(t, at, "*") || mtl_is(t, at, "&");
        while (mtl_is(t, at, "*") || mtl_is(t, at, "&") || mtl_is(t, at, "const")) at = mtl_after(t, at);
        if (!mtl_is_identifier(t, at)) break;
        mtl_token *declared = &t->token[at];
        mtl_text type = {0}, number = {0};
        if (t->token[keyword].directive) { /* a macro, whose parameter this may be, in use more than once */
            mtl_text_format(&type, "__mtl_##%.*s", (int)declared->length, declared->text);
            mtl_text_format(&number, "%d + __COUNTER__", (int)MACROS_VARIABLES);
        } else {
            mtl_text_format(&type, "__mtl_%.*s_%d", (int)declared->length, declared->text, t->variables);
            mtl_text_format(&number, "%d", t->variables++);
        }
        const char *type_name = mtl_keep(t, &type), *variable = mtl_keep(t, &number);
        mtl_text_free(&type);
        mtl_text_free(&number);
        declared->replacement = type_name;
        at = mtl_after(t, at);
        while (mtl_is(t, at, "[") || mtl_is(t, at, "__attribute__")) {
            bool attribute = !mtl_is(t, at, "[") || mtl_is(t, at + 1, "[");
            size_t behind = mtl_behind_bracket(t, mtl_is(t, at, "[") ? at : mtl_after(t, at));
            if (attribute) mtl_blank_range(t, at, behind);
            at = behind;
        }
        mtl_text initializer = {0};
        at = take_initializer(t, at, type_name, &initializer);
        const char *value = mtl_text_string(&initializer);
        if (pointer) { /* of the thread's own */
            mtl_text_format(&references, " %s %.*s%s%s;", type_name, (int)declared->length, declared->text,
                            *value ? " = " : "", value);
        } else {
            mtl_text_format(&references, " %s &%.*s = __mtl_variable<%s>(%s, %s%s%s);", type_name,
                            (int)declared->length, declared->text, type_name, group, variable, *value ? ", " : "",
                            value);
        }
        t->failed |= initializer.failed;
        mtl_text_free(&initializer);
        if (!mtl_is(t, at, ",")) break;
        at = mtl_after(t, at);
    }
    if (mtl_is(t, at, ";")) {
        mtl_add_behind(t, at, mtl_keep(t, &references));
    } else if (t->token[keyword].directive && references.length && !references.failed) { /* a macro that ends here */
        references.data[references.length - 1] = '\0';
        mtl_add_behind(t, mtl_before(t, at), ";");
        mtl_add_behind(t, mtl_before(t, at), mtl_keep(t, &references));
    }
    t->failed |= references.failed;
    mtl_text_free(&references);
}

static void translate_threadgroup(translation *t, size_t i) {
    char bracket = enclosing_bracket(t, i);
    size_t name = bracket == '(' || bracket == '[' ? t->count : find_declarators(t, i);
    if (name == t->count) mtl_blank(t, i);
    else if (t->options->target == MTL_TARGET_CUDA) t->token[i].replacement = "__shared__", initialize_shared(t, name);
    else declare_variables(t, i, name);
}

/* ---- attributes and directives ----------------------------------------------------------------------------------------------------- */

/* [[...]]: what C++ has an opinion about stays. A function constant is a value that its pipeline would give, and there is none. */
static void translate_attribute(translation *t, size_t i) {
    static const char *const standard[] = {"maybe_unused", "nodiscard", "fallthrough", "noreturn",
                                           "deprecated",   "likely",    "unlikely",    NULL};
    size_t first = mtl_after(t, i + 1), behind = mtl_behind_bracket(t, i);
    if (behind == t->count && !mtl_is(t, mtl_before(t, behind), "]")) return; /* text that no compiler gets to see */
    if (mtl_is_one_of(t, first, standard) || mtl_is(t, mtl_after(t, first), "::")) return;
    mtl_blank_range(t, i, behind);
    /* A parameter is there only if the constant says so. */
    if (mtl_is(t, first, "function_constant") && enclosing_bracket(t, i) != '(')
        mtl_add_before(t, i, "= ::metal::msl_::function_constant() ");
}

/* Metal's own headers are always there. */
static void translate_include(translation *t, size_t i) {
    const mtl_token *token = &t->token[i];
    size_t at = 0;
    while (at < token->length && (token->text[at] == ' ' || token->text[at] == '\t')) at++;
    static const char *const own[] = {"<metal", "<simd/"};
    for (size_t o = 0; o < sizeof own / sizeof own[0]; o++) {
        size_t length = strlen(own[o]);
        if (token->length - at < length || memcmp(token->text + at, own[o], length) != 0) continue;
        size_t name = mtl_before(t, i), hash = name == SIZE_MAX ? SIZE_MAX : mtl_before(t, name);
        mtl_blank(t, i);
        if (name != SIZE_MAX) mtl_blank(t, name);
        if (hash != SIZE_MAX) mtl_blank(t, hash);
        return;
    }
}

/* ::name is the user's own or Metal's, which stand in one namespace here. What stands right before :: is a scope. */
static void translate_global(translation *t, size_t i) {
    static const char *const no_scope[] = {"return", "else", "case", "do", "sizeof", "throw", NULL};
    bool after = i > 0 && t->token[i - 1].kind != MTL_TOKEN_SPACE;
    if (after && (mtl_is(t, i - 1, ">") || (mtl_is_identifier(t, i - 1) && !mtl_is_one_of(t, i - 1, no_scope)))) return;
    if (after && mtl_is(t, i - 1, ")")) { /* decltype(x)::type */
        size_t open = mtl_opening_bracket(t, i - 1), word = open == SIZE_MAX ? open : mtl_before(t, open);
        if (word != SIZE_MAX && mtl_is(t, word, "decltype")) return;
    }
    if (!mtl_is(t, mtl_after(t, i), "metal")) t->token[i].replacement = "::metal::";
}

/* namespace metal {   becomes   extern "C++" {   which leaves its declarations where all others are. */
static void translate_namespace(translation *t, size_t i) {
    size_t name = mtl_after(t, i), open = mtl_after(t, name);
    if (!mtl_is(t, name, "metal") || !mtl_is(t, open, "{") || enclosing_bracket(t, i) != '\0') return;
    t->token[i].replacement = "extern";
    t->token[name].replacement = "\"C++\"";
}

/* coherent device T *, coherent(system) device T *: every buffer is that. */
static void translate_coherent(translation *t, size_t i) {
    static const char *const following[] = {"device", "const", "volatile", NULL};
    static const char *const scopes[] = {"system", "device", "threadgroup", "simdgroup", NULL};
    size_t open = mtl_after(t, i), behind = open;
    if (mtl_is(t, open, "(") && mtl_is_one_of(t, mtl_after(t, open), scopes)) behind = mtl_behind_bracket(t, open);
    if (mtl_is_one_of(t, behind, following)) mtl_blank_range(t, i, behind);
}

/* template <class T, uint N> void f(vec<T, N>): a width is found out from an argument if it has the type that it has in vec, which
 * Metal does not ask for. */
static void find_widths(translation *t, size_t i) {
    static const char *const integers[] = {"uint",     "unsigned", "ushort",  "short",  "size_t",    "uint32_t",
                                           "uint16_t", "uint8_t",  "uchar",   "char",   "long",      "ulong",
                                           "uint64_t", "int64_t",  "int16_t", "int8_t", "ptrdiff_t", NULL};
    size_t open = mtl_after(t, i), behind = mtl_is(t, open, "<") ? mtl_behind_angle(t, open) : open;
    if (behind == open) return;
    for (size_t at = mtl_after(t, open), inner; at<behind; at = inner> at ? inner : mtl_after(t, at)) {
        size_t name = mtl_after(t, at), next = mtl_after(t, name);
        inner = mtl_behind_angle(t, at);
        if (!mtl_is_one_of(t, at, integers) || !mtl_is_identifier(t, name)) continue;
        if (!mtl_is(t, mtl_before(t, at), "<") && !mtl_is(t, mtl_before(t, at), ",")) continue;
        if (!mtl_is(t, next, ",") && !mtl_is(t, next, ">") && !mtl_is(t, next, "=")) continue;
        mtl_word_at(t, name)->mark = at + 1;
    }
}

/* vec<T, N> in the declaration that such a list belongs to. */
static void translate_width(translation *t, size_t i) {
    size_t list = mtl_after(t, i);
    if (!mtl_is(t, list, "<")) return;
    size_t close = mtl_before(t, mtl_behind_angle(t, list));
    size_t width = close < t->count ? mtl_before(t, close) : t->count;
    if (width >= t->count || !mtl_is_identifier(t, width) || !mtl_is(t, mtl_before(t, width), ",")) return;
    size_t type = mtl_word_at(t, width)->mark;
    if (type > t->declaration) t->token[type - 1].replacement = "int";
}

/* T a[4] = {[0 ... 2] = x, [3] = y};   becomes   T a[4]; for (...) a[...] = x; ...   which clang alone reads as it is. */
static void translate_designators(translation *t, size_t i) {
    size_t equals = mtl_before(t, i), bracket = equals == SIZE_MAX ? equals : mtl_before(t, equals);
    if (bracket == SIZE_MAX || !mtl_is(t, equals, "=") || !mtl_is(t, bracket, "]")) return;
    size_t behind = mtl_behind_bracket(t, i), open = mtl_opening_bracket(t, bracket), name = mtl_before(t, open);
    size_t last = t->link[i].match; /* which need not be a } */
    if (!mtl_is(t, behind, ";") || name == SIZE_MAX || !mtl_is_identifier(t, name)) return;
    if (!mtl_is(t, mtl_behind_bracket(t, mtl_after(t, i)), "=")) return; /* a lambda */
    mtl_text loops = {0};
    for (size_t at = mtl_after(t, i); mtl_is(t, at, "[");) {
        size_t close = mtl_before(t, mtl_behind_bracket(t, at)), value = mtl_after(t, mtl_after(t, close)), dots = at;
        while (dots < close && !(mtl_is_pair(t, dots, ".", ".") && mtl_is(t, dots + 2, "."))) dots++;
        size_t end = value;
        while (end < last && !mtl_is(t, end, ",")) {
            bool opens = mtl_is(t, end, "(") || mtl_is(t, end, "{") || mtl_is(t, end, "[");
            size_t angle = mtl_is(t, end, "<") ? behind_arguments(t, end) : end;
            end = opens ? mtl_behind_bracket(t, end) : angle > end ? angle : mtl_after(t, end);
        }
        mtl_text_add_string(&loops, " for (int __mtl_at = ");
        for (size_t from = mtl_after(t, at); from < dots; from++) write_translated(t, &loops, from);
        mtl_text_add_string(&loops, "; __mtl_at <= ");
        for (size_t to = dots < close ? dots + 3 : mtl_after(t, at); to < close; to++) write_translated(t, &loops, to);
        mtl_text_format(&loops, "; ++__mtl_at) %.*s[__mtl_at] = ", (int)t->token[name].length, t->token[name].text);
        for (; value < end; value++) write_translated(t, &loops, value);
        mtl_text_add_string(&loops, ";");
        at = mtl_is(t, end, ",") ? mtl_after(t, end) : end;
    }
    for (size_t at = i; at < behind; at++) {
        if (t->token[at].kind != MTL_TOKEN_SPACE) mtl_blank(t, at);
        t->token[at].before = t->token[at].behind = NULL;
    }
    mtl_add_behind(t, i, "{}");
    mtl_add_behind(t, behind, mtl_keep(t, &loops));
    mtl_text_free(&loops);
}

/* ---- alignment ---------------------------------------------------------------------------------------------------------------------- */

/* Behind what gives a type an alignment at `i`: alignas(E), __attribute__((aligned(E))). `i` where nothing does; [*begin, *end): E. */
static size_t behind_alignment(const translation *t, size_t i, size_t *begin, size_t *end) {
    bool attribute = mtl_is(t, i, "__attribute__");
    if (!attribute && !mtl_is(t, i, "alignas")) return i;
    size_t open = mtl_after(t, i);
    if (!mtl_is(t, open, "(")) return i;
    size_t behind = mtl_behind_bracket(t, open);
    if (attribute) {
        size_t word = mtl_after(t, mtl_after(t, open));
        open = mtl_after(t, word);
        if ((!mtl_is(t, word, "aligned") && !mtl_is(t, word, "__aligned__")) || !mtl_is(t, open, "(")) return i;
    }
    *begin = mtl_after(t, open);
    *end = mtl_before(t, mtl_behind_bracket(t, open));
    return behind;
}

/* struct alignas(E) S {...}   becomes   struct S {... alignas(E) char _[0] = {};}
 *
 * The size and the layout are the same, but the compiler does not count on it behind a pointer: arrays begin anywhere. */
static void translate_alignment(translation *t, size_t i) {
    size_t before = mtl_before(t, i);
    if (before != SIZE_MAX && mtl_is(t, before, "enum")) return;
    static const char *const classes[] = {"struct", "class", "union", NULL};
    bool is_union = mtl_is(t, i, "union");
    size_t at = mtl_after(t, i), begin = 0, end = 0, behind = behind_alignment(t, at, &begin, &end);
    size_t open = behind;
    while (open < t->count && (mtl_is_identifier(t, open) || mtl_is(t, open, "<") || mtl_is(t, open, ":"))) {
        if (mtl_is_one_of(t, open, classes)) return;
        size_t next = mtl_is(t, open, "<") ? mtl_behind_angle(t, open) : mtl_after(t, open);
        if (next == open) return;
        open = next;
    }
    if (!mtl_is(t, open, "{")) return;
    size_t after = mtl_behind_bracket(t, open), close = mtl_before(t, after);
    if (behind == at) { /* struct S {...} __attribute__((aligned(E))); */
        at = after, behind = behind_alignment(t, at, &begin, &end);
        if (behind == at) return;
    }
    if (end >= t->count || close >= t->count || !mtl_is(t, close, "}")) return;
    mtl_text member = {0};
    mtl_text_add_string(&member, "alignas(");
    for (size_t of = begin; of < end; of++) {
        if (t->token[of].kind == MTL_TOKEN_SPACE) mtl_text_add_string(&member, " "); /* lines stay where they are */
        else mtl_write_token(&member, &t->token[of]);
    }
    mtl_text_add_string(&member, is_union ? ") char __mtl_aligned[0]; " : ") char __mtl_aligned[0] = {}; ");
    mtl_add_before(t, close, mtl_keep(t, &member));
    mtl_text_free(&member);
    mtl_blank_range(t, at, behind);
}

/* ---- unions ------------------------------------------------------------------------------------------------------------------------- */

/* Whether an anonymous union is among the members between the brackets. */
static bool has_anonymous_union(const translation *t, size_t open, size_t close) {
    for (size_t at = mtl_after(t, open); at < close;) {
        size_t brace = mtl_after(t, at);
        if (mtl_is(t, at, "union") && mtl_is(t, brace, "{") && mtl_is(t, mtl_behind_bracket(t, brace), ";"))
            return true;
        at = mtl_is(t, at, "(") || mtl_is(t, at, "{") ? mtl_behind_bracket(t, at) : brace;
    }
    return false;
}

/* union U {...}   becomes   union U {... U &operator=(const U &from) {...}}
 *
 * which C++ does not make for a union with vectors, since their assignment is their own; nor for a class with such a union among its
 * members. */
static void translate_union(translation *t, size_t i) {
    static const char *const ends[] = {"{", ";", "struct", "class", "union", NULL};
    size_t before = mtl_before(t, i), name = mtl_after(t, i), begin = 0, end = 0;
    if (before != SIZE_MAX && (mtl_is(t, before, "enum") || mtl_is(t, before, "<") || mtl_is(t, before, ","))) return;
    name = behind_alignment(t, name, &begin, &end);
    size_t open = mtl_is_identifier(t, name) ? mtl_after(t, name) : name;
    if (mtl_is(t, open, ":")) { /* a base */
        while (open < t->count && !mtl_is_one_of(t, open, ends)) open = mtl_after(t, open);
    }
    if (!mtl_is(t, open, "{")) return;
    size_t behind = mtl_behind_bracket(t, open), close = mtl_before(t, behind);
    if (close >= t->count || !mtl_is(t, close, "}")) return;
    bool is_member = name == open && !mtl_is_identifier(t, behind) && !mtl_is(t, behind, "*"); /* of what is around */
    if (is_member || (!mtl_is(t, i, "union") && !has_anonymous_union(t, open, close))) return;
    for (size_t at = mtl_after(t, open); at < close;) { /* its own, not those of classes in it */
        if (mtl_is(t, at, "operator") && mtl_is_pair(t, mtl_after(t, at), "=", "(")) return;
        at = mtl_is(t, at, "{") ? mtl_behind_bracket(t, at) : mtl_after(t, at);
    }
    mtl_text own = {0}, assignment = {0};
    if (name == open) {
        mtl_text_format(&own, "__mtl_union_%d ", t->unions++);
        mtl_add_before(t, open, mtl_keep(t, &own));
    } else {
        mtl_text_add(&own, t->token[name].text, t->token[name].length);
    }
    const char *type = mtl_text_string(&own);
    mtl_text_format(&assignment,
                    "%s &operator=(const %s &__mtl_from) "
                    "{ ::metal::msl_::copy(this, &__mtl_from, sizeof *this); return *this; } ",
                    type, type);
    mtl_add_before(t, close, mtl_keep(t, &assignment));
    t->failed |= own.failed;
    mtl_text_free(&own);
    mtl_text_free(&assignment);
}

/* ---- loops ------------------------------------------------------------------------------------------------------------------------- */

/* for (...) statement   becomes   for (...) if (__mtl_iterate()); else statement */
static void count_iterations(translation *t, size_t i) {
    static const char count[] = " if (__mtl_iterate()); else ";
    if (mtl_is(t, i, "do")) {
        mtl_add_behind(t, i, count);
        return;
    }
    size_t open = mtl_after(t, i);
    if (!mtl_is(t, open, "(")) return;
    size_t behind = mtl_behind_bracket(t, open), close = mtl_before(t, behind);
    if (behind >= t->count) return;
    if (mtl_is(t, i, "while") && mtl_is(t, behind, ";")) { /* the end of do, or a loop of nothing */
        mtl_add_behind(t, open, "!__mtl_iterate() && (");
        mtl_add_before(t, close, ")");
        return;
    }
    mtl_add_behind(t, close, count);
}

/* ---- arms of ?: ----------------------------------------------------------------------------------------------------------------------- */

/* Whether the token at `i` may be in a list of template arguments: a < before it that nothing closes. */
static bool in_angles(const translation *t, size_t i) { return t->link[i].angle != MTL_NONE; }

/* The end of the arm that begins at `i`: its colon (`middle`), or what follows the whole expression; t->count at the end of the text.
 * The arms of a ?: in it are known. */
static size_t arm_end(const translation *t, size_t i, bool middle, bool angles) {
    static const char *const ends[] = {",", ";", ")", "]", "}", NULL};
    size_t at = i;
    while (at < t->count && mtl_are_one_directive(t, i, at)) {
        if (mtl_is_one_of(t, at, ends) && !(middle && mtl_is(t, at, ","))) break;
        if (mtl_is(t, at, ":")) break;
        if (!middle && angles && mtl_is(t, at, ">")) break;
        size_t behind = mtl_is(t, at, "<") ? behind_arguments(t, at) : at;
        bool opens = mtl_is(t, at, "(") || mtl_is(t, at, "[") || mtl_is(t, at, "{");
        if (mtl_is(t, at, "?")) at = t->arms[at].end;
        else if (behind > at) at = behind;
        else at = opens ? mtl_behind_bracket(t, at) : mtl_after(t, at);
    }
    return at;
}

/* Of every ?: in the text, from the last to the first: one ends where the next one in its second arm does. */
static void find_arms(translation *t) {
    t->arms = malloc((t->count + 1) * sizeof *t->arms);
    t->failed |= !t->arms;
    for (size_t i = t->count; i-- > 0 && !t->failed;) {
        mtl_arms *arms = &t->arms[i];
        if (!mtl_is(t, i, "?")) continue;
        arms->colon = MTL_NONE;
        arms->end = arm_end(t, mtl_after(t, i), true, false);
        if (!mtl_is(t, arms->end, ":") || !mtl_are_one_directive(t, i, arms->end)) continue;
        arms->colon = arms->end;
        arms->end = arm_end(t, mtl_after(t, arms->colon), false, in_angles(t, i));
    }
}

/* [begin, end) as (msl_::armed(), (...)), which gives both arms a type that C++ finds in common: half is a class. A literal has
 * one. */
static void wrap_arm(translation *t, size_t begin, size_t end) {
    size_t last = mtl_before(t, end);
    if (begin >= end || last == SIZE_MAX || last < begin) return;
    if (begin == last && t->token[begin].kind == MTL_TOKEN_NUMBER) {
        size_t length;
        const char *type = literal_type(&t->token[begin], &length);
        if (!type || !*type) return;
    }
    mtl_add_before(t, begin, "(::metal::msl_::armed(), (");
    mtl_add_behind(t, last, "))");
}

static void translate_condition(translation *t, size_t i) {
    const mtl_arms *arms = &t->arms[i];
    if (arms->colon == MTL_NONE || mtl_after(t, arms->colon) >= t->count) return;
    wrap_arm(t, mtl_after(t, i), arms->colon);
    wrap_arm(t, mtl_after(t, arms->colon), arms->end);
}

/* Behind the name and the parameters of the macro whose text the token at `i` is in. */
static size_t macro_begin(const translation *t, size_t i) {
    size_t name = mtl_after(t, mtl_after(t, t->token[i].directive - 1));
    return mtl_is(t, name + 1, "(") ? mtl_behind_bracket(t, name + 1) : mtl_after(t, name);
}

/* Not a condition of the preprocessor's. */
static bool is_macro_text(const translation *t, size_t i) {
    return mtl_is(t, mtl_after(t, t->token[i].directive - 1), "define");
}

/* The < of a list of template arguments that the > at `i` closes; SIZE_MAX where it is a comparison: a < b && c > d. `others`: how
 * many tokens before each one are in no such list. */
static size_t arguments_begin(const translation *t, size_t i, const size_t *others) {
    size_t open = mtl_opening_angle(t, i), behind = mtl_after(t, i);
    if (open == SIZE_MAX || !mtl_is_identifier(t, mtl_before(t, open))) return SIZE_MAX;
    if (mtl_is_identifier(t, behind) || (behind < t->count && t->token[behind].kind == MTL_TOKEN_NUMBER))
        return SIZE_MAX;
    return others[i] > others[open] ? SIZE_MAX : open;
}

static bool is_no_argument(const translation *t, size_t i) {
    static const char *const parts[] = {",", "::", "<", ">", "*", "(", ")", NULL};
    return t->token[i].kind == MTL_TOKEN_PUNCTUATION && !mtl_is_one_of(t, i, parts);
}

/* Where the condition before the ? at `i` begins. */
static size_t condition_begin(const translation *t, size_t i, const size_t *others) {
    static const char *const stops[] = {"(", "[", "{", ",", ";", "?", ":", "return", "else", "case", "do", NULL};
    static const char *const statements[] = {"if", "for", "while", "switch", "constexpr", NULL};
    size_t directive = t->token[i].directive, begin = i, least = directive ? macro_begin(t, i) : 0;
    for (size_t at = mtl_before(t, i); at != SIZE_MAX && at >= least && t->token[at].directive == directive;) {
        if (mtl_is_one_of(t, at, stops)) break;
        if (mtl_is(t, at, "=")) {
            bool compares = at > 0 && (mtl_is(t, at - 1, "=") || mtl_is(t, at - 1, "!") || mtl_is(t, at - 1, "<") ||
                                       mtl_is(t, at - 1, ">"));
            bool shifts = compares && at > 1 && !mtl_is(t, at - 1, "=") && !mtl_is(t, at - 1, "!") &&
                          mtl_is(t, at - 2, t->token[at - 1].text[0] == '<' ? "<" : ">");
            if (!compares || shifts) break;
            at--;
        } else if (mtl_is(t, at, ">") && arguments_begin(t, at, others) != SIZE_MAX) {
            at = arguments_begin(t, at, others);
        } else if (mtl_is(t, at, ")") || mtl_is(t, at, "]") || mtl_is(t, at, "}")) {
            size_t open = mtl_opening_bracket(t, at), before = open == SIZE_MAX ? open : mtl_before(t, open);
            if (open == SIZE_MAX) return i;
            if (mtl_is(t, at, ")") && before != SIZE_MAX && mtl_is_one_of(t, before, statements)) break;
            bool is_list = before != SIZE_MAX && (mtl_is_identifier(t, before) || mtl_is(t, before, ">"));
            if (mtl_is(t, at, "}") && (!is_list || mtl_is_one_of(t, before, stops))) break;
            at = open;
        }
        begin = at;
        at = mtl_before(t, at);
    }
    return begin;
}

/* c ? a : b   becomes   (msl_::unarmed(), (c ? a : b)), which takes from the value what its arms have been given. */
static void translate_conditions(translation *t) {
    size_t *others = mtl_count(t, is_no_argument);
    t->failed |= !others;
    for (size_t i = 0; i < t->count && !t->failed; i++) {
        if (!mtl_is(t, i, "?") || t->arms[i].colon == MTL_NONE) continue;
        size_t second = mtl_after(t, t->arms[i].colon), end = t->arms[i].end;
        if (second >= t->count) continue;
        if (mtl_is(t, end, ">") && in_angles(t, i)) continue; /* f<c ? 1 : 2>, or perhaps a < b ? c : d > e */
        if (t->token[i].directive && !is_macro_text(t, i)) continue;
        size_t begin = condition_begin(t, i, others), last = mtl_before(t, end);
        if (begin >= i || last == SIZE_MAX || last < second) continue;
        mtl_add_before(t, begin, "(::metal::msl_::unarmed(), (");
        mtl_add_behind(t, last, "))");
    }
    free(others);
}

/* ---- division ------------------------------------------------------------------------------------------------------------------------ */

/* Whether it has   template <class U> S operator/(S a, U b)   or the like, which would take __mtl_trap for a divisor. */
static bool has_generic_division(const translation *t) {
    size_t template = MTL_NONE; /* of this declaration, so far */
    for (size_t i = 0; i < t->count; i++) {
        if (mtl_is(t, i, ";") || mtl_is(t, i, "{") || mtl_is(t, i, "}")) template = MTL_NONE;
        if (mtl_is(t, i, "template")) template = i;
        size_t next = mtl_after(t, i), open = mtl_after(t, next);
        if (template == MTL_NONE) continue;
        if ((mtl_is(t, i, "typename") || mtl_is(t, i, "class")) && mtl_is_identifier(t, next))
            mtl_word_at(t, next)->mark = template + 1;
        if (!mtl_is(t, i, "operator") || !(mtl_is(t, next, "/") || mtl_is(t, next, "%")) || !mtl_is(t, open, "("))
            continue;
        size_t at = t->link[open].match, type = open; /* that of the last parameter */
        for (at = mtl_before(t, at); at != MTL_NONE && at > open && !mtl_is(t, at, ","); at = mtl_before(t, type)) {
            type = at;
            if (mtl_is(t, at, ">") && mtl_opening_angle(t, at) != MTL_NONE) type = mtl_opening_angle(t, at);
            if (mtl_opening_bracket(t, at) != MTL_NONE) type = mtl_opening_bracket(t, at);
        }
        while (mtl_is(t, type, "const") || mtl_is(t, type, "thread")) type = mtl_after(t, type);
        if (type <= open || mtl_is(t, mtl_after(t, type), "<")) continue;
        if (mtl_is_identifier(t, type) && mtl_word_at(t, type)->mark == template + 1) return true;
    }
    return false;
}

/* a / b   becomes   a / !__mtl_trap / b,   which has a value for every b (msl/types.h). */
static void translate_division(translation *t, size_t i) {
    size_t before = mtl_before(t, i), operand = mtl_is(t, i + 1, "=") ? mtl_after(t, i + 1) : mtl_after(t, i);
    if (before == SIZE_MAX || mtl_is(t, before, "operator") || !mtl_are_one_directive(t, before, operand)) return;
    if (mtl_is(t, operand, ")") || mtl_is(t, operand, ",")) return; /* a macro's argument */
    const mtl_token *divisor = &t->token[operand];
    for (size_t at = 0; divisor->kind == MTL_TOKEN_NUMBER && at < divisor->length; at++) {
        if (divisor->text[at] >= '1' && divisor->text[at] <= '9') return;
    }
    bool quotient = mtl_is(t, i, "/");
    if (!mtl_is(t, i + 1, "=")) t->token[i].replacement = quotient ? "/ !__mtl_trap /" : "% !__mtl_trap %";
    else mtl_add_behind(t, i + 1, quotient ? " !__mtl_trap /=" : " !__mtl_trap %=");
}

/* ---- all of it ------------------------------------------------------------------------------------------------------------------------ */

static void translate_token(translation *t, size_t i) {
    const mtl_token *token = &t->token[i];
    if (token->replacement) return; /* dealt with on the way to an earlier one */
    if (token->directive && mtl_is(t, i, "#")) {
        size_t name = mtl_after(t, i);
        t->in_condition = mtl_is(t, name, "if") || mtl_is(t, name, "elif");
    } else if (!token->directive) {
        t->in_condition = false;
    }
    if (t->in_condition) return; /* the preprocessor's own arithmetic */
    switch (token->kind) {
    case MTL_TOKEN_NUMBER: translate_number(t, i); break;
    case MTL_TOKEN_INCLUDE: translate_include(t, i); break;
    case MTL_TOKEN_PUNCTUATION:
        if (mtl_is(t, i, ";") || mtl_is(t, i, "{")) t->declaration = i + 1;
        if (mtl_is(t, i, "[") && mtl_is(t, i + 1, "[")) translate_attribute(t, i);
        else if (mtl_is(t, i, "?") && t->options->arms) translate_condition(t, i);
        else if (mtl_is(t, i, "::")) translate_global(t, i);
        else if ((mtl_is(t, i, "/") || mtl_is(t, i, "%")) && t->options->target == MTL_TARGET_CPU && !t->divides)
            translate_division(t, i);
        else if (mtl_is(t, i, "{") && mtl_is(t, mtl_after(t, i), "[") && t->options->target == MTL_TARGET_CUDA)
            translate_designators(t, i);
        break;
    case MTL_TOKEN_IDENTIFIER:
        if (mtl_is_one_of(t, i, plain_spaces)) mtl_blank(t, i);
        else if (mtl_is(t, i, "constant")) translate_constant(t, i);
        else if (mtl_is(t, i, "threadgroup")) translate_threadgroup(t, i);
        else if (mtl_is(t, i, "struct") || mtl_is(t, i, "class") || mtl_is(t, i, "union")) {
            if (t->options->target == MTL_TARGET_CPU) translate_alignment(t, i);
            translate_union(t, i);
        } else if (mtl_is(t, i, "namespace")) translate_namespace(t, i);
        else if (mtl_is(t, i, "template")) find_widths(t, i);
        else if (mtl_is(t, i, "vec")) translate_width(t, i);
        else if (mtl_is(t, i, "coherent")) translate_coherent(t, i);
        else if (mtl_is(t, i, "__extension__")) mtl_blank(t, i); /* which NVRTC does not know */
        else if (mtl_is(t, i, "kernel") && mtl_is_identifier(t, mtl_after(t, i))) mtl_blank(t, i);
        else if (t->options->count_iterations && (mtl_is(t, i, "for") || mtl_is(t, i, "while") || mtl_is(t, i, "do")))
            count_iterations(t, i);
        else if (t->options->line && mtl_is(t, i, "for")) mtl_unroll(t, i);
        break;
    default: break;
    }
}

static void add_pieces(mtl_text *out, const mtl_piece *last) {
    if (!last) return;
    const mtl_piece *piece = last;
    do {
        piece = piece->next;
        mtl_text_add_string(out, piece->text);
    } while (piece != last);
}

void mtl_write_token(mtl_text *out, const mtl_token *token) {
    add_pieces(out, token->before);
    if (!token->replacement) {
        mtl_text_add(out, token->text, token->length);
    } else if (token->replacement[0]) {
        mtl_text_add_string(out, token->replacement);
    } else { /* blanks, so that what follows stays in its column */
        for (size_t i = 0; i < token->length; i++) mtl_text_add(out, token->text[i] == '\n' ? "\n" : " ", 1);
    }
    add_pieces(out, token->behind);
}

/* Whether an address space and a type are all that a macro stands for, its space being at `i`. */
static bool is_type_of_space(const translation *t, size_t i) {
    static const char *const no_type[] = {"*", "&", "(", "[", "{", "=", ";", "#", NULL};
    size_t at = mtl_after(t, i);
    while (mtl_are_one_directive(t, i, at) && !mtl_is_one_of(t, at, no_type)) at = mtl_after(t, at);
    return at > mtl_after(t, i) && !mtl_are_one_directive(t, i, at);
}

/* SHARED_FLOAT a;   becomes   threadgroup SHARED_FLOAT a;   in the places of the name and of the blanks behind it. */
static void put_space_before(translation *t, size_t i) {
    mtl_token *name = &t->token[i], *blanks = &t->token[i + 1];
    mtl_text kept = {0};
    mtl_text_add(&kept, blanks->text, blanks->length);
    mtl_add_before(t, i + 1, " ");
    mtl_add_behind(t, i + 1, mtl_keep(t, &kept));
    mtl_text_free(&kept);
    blanks->kind = MTL_TOKEN_IDENTIFIER;
    blanks->text = name->text;
    blanks->length = name->length;
    t->link[i + 1].word = t->link[i].word;
    name->text = "threadgroup";
    name->length = strlen(name->text);
    t->link[i].word = mtl_add_word(t, name);
}

/* #define SHARED threadgroup: what is named so is that. #define SHARED_FLOAT threadgroup float: what is declared so is there. The
 * preprocessor comes too late for both. */
static void name_spaces(translation *t, translation *defining) {
    static const char *const spaces[] = {"threadgroup", "constant"};
    for (size_t i = 0; i < defining->count; i++) {
        size_t name = mtl_after(defining, i), space = mtl_after(defining, name);
        if (!defining->token[i].directive || !mtl_is(defining, i, "define") || !mtl_is_identifier(defining, space))
            continue;
        if (!mtl_are_one_directive(defining, i, space) || !mtl_is_identifier(defining, name)) continue;
        mtl_word *word = mtl_word_at(defining, name), *of = mtl_word_at(defining, space);
        const char *meant = of->space;
        for (int s = 0; s < 2; s++) {
            if (mtl_is(defining, space, spaces[s])) meant = spaces[s];
        }
        bool alone = !mtl_are_one_directive(defining, space, mtl_after(defining, space));
        bool of_type = alone ? of->is_type_of_space
                             : meant && strcmp(meant, "threadgroup") == 0 && is_type_of_space(defining, space);
        if (word->space || (!of_type && !(alone && meant))) continue;
        word->is_type_of_space |= of_type;
        if (!of_type) word->space = meant;
        mtl_word *own = mtl_find_word(t, word->text, word->length);
        if (own) own->is_type_of_space = word->is_type_of_space, own->space = word->space;
    }
}

static void use_spaces(translation *t) {
    bool changed = false;
    for (size_t i = 0; i < t->count; i++) {
        if (!mtl_is_identifier(t, i) || (t->token[i].directive && mtl_is(t, mtl_before(t, i), "define"))) continue;
        const mtl_word *word = mtl_word_at(t, i);
        if (word->space) {
            t->token[i].text = word->space;
            t->token[i].length = strlen(word->space);
            t->link[i].word = mtl_add_word(t, &t->token[i]);
        } else if (word->is_type_of_space && mtl_is_identifier(t, mtl_after(t, i)) &&
                   mtl_are_one_directive(t, i, mtl_after(t, i))) {
            put_space_before(t, i++);
            changed = true;
        }
    }
    if (changed) mtl_find_neighbours(t);
}

static bool begin(translation *t, const char *source) {
    const char *header = t->options->header;
    if (!mtl_begin(t, source)) return false;
    if (t->region == MTL_REGION_BODY && header &&
        (strstr(header, "threadgroup") || strstr(header, "constant") || strstr(header, "operator"))) {
        translation before = {.region = MTL_REGION_HEADER, .options = t->options};
        bool done = mtl_begin(&before, header);
        if (done) name_spaces(t, &before);
        t->divides = done && has_generic_division(&before);
        mtl_end(&before);
        if (!done) return false;
    }
    name_spaces(t, t);
    use_spaces(t);
    t->divides |= has_generic_division(t);
    return true;
}

/* Up to what is written. */
static bool translate(translation *t, const char *source) {
    if (!begin(t, source)) return false;
    mtl_leave_out_overloads(t);
    if (t->failed || !mtl_index(t)) return false;
    if (t->options->meeting) mtl_mark_places(t);
    mtl_translate_swizzles(t);
    if (t->options->arms) find_arms(t);
    if (t->options->arms && !t->failed) translate_conditions(t);
    for (size_t i = 0; i < t->count && !t->failed; i++) translate_token(t, i);
    return !t->failed;
}

bool mtl_find_meeting_functions(mtl_names *names, const mtl_definition *definition) {
    const mtl_unit_options options = {.meeting = names};
    translation header = {.region = MTL_REGION_HEADER, .options = &options};
    translation body = {.region = MTL_REGION_BODY, .options = &options};
    bool done = begin(&header, definition->header) && begin(&body, definition->source) && mtl_index(&header) &&
                mtl_index(&body) && mtl_find_meeting(&header, &body, names);
    mtl_end(&header);
    mtl_end(&body);
    return done;
}

void mtl_translate(mtl_text *out, const char *source, mtl_region region, const mtl_unit_options *options) {
    enum { PLACES_OF_HEADER = 1 << 24 }; /* the body's come behind */
    translation t = {.region = region,
                     .options = options,
                     .variables = region == MTL_REGION_HEADER ? HEADERS_VARIABLES : 0,
                     .first_place = region == MTL_REGION_HEADER ? 0 : PLACES_OF_HEADER};
    bool done = translate(&t, source);
    for (size_t i = 0; i < t.count && done; i++) mtl_write_token(out, &t.token[i]);
    out->failed |= !done;
    mtl_end(&t);
}

bool mtl_translate_in_lockstep(mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions,
                               const mtl_unit_options *options) {
    translation t = {.region = MTL_REGION_BODY, .options = options};
    bool translated = translate(&t, definition->source);
    bool done = translated && mtl_write_lockstep(&t, out, definition, mentions);
    out->failed |= !translated || t.failed;
    mtl_end(&t);
    return done && !out->failed;
}
