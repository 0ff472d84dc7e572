/* Metal source as C++, token by token. SPDX-License-Identifier: MIT */
#include "kernel/source.h"
#include "kernel/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* `scratch` holds the replacements that are not constants, one block each, until the text is written. */
typedef struct block {
    struct block *next;
    char text[];
} block;

typedef struct translation {
    mtl_tokens tokens;
    mtl_token *token; /* of tokens */
    size_t count;
    mtl_region region;
    const mtl_unit_options *options;
    int variables; /* in threadgroup memory */
    block *scratch;
    bool failed;
} translation;

static const char *keep(translation *t, const mtl_text *text) {
    block *kept = text->failed ? NULL : malloc(sizeof *kept + text->length + 1);
    if (!kept) {
        t->failed = true;
        return "";
    }
    memcpy(kept->text, mtl_text_string(text), text->length + 1);
    kept->next = t->scratch;
    t->scratch = kept;
    return kept->text;
}

/* ---- walking over tokens ------------------------------------------------------------------------------------------------ */

/* The index of the next token that is no space; t->count at the end. */
static size_t after(const translation *t, size_t i) {
    do i++;
    while (i < t->count && t->token[i].kind == MTL_TOKEN_SPACE);
    return i;
}

/* Of the one before; SIZE_MAX at the beginning. */
static size_t before(const translation *t, size_t i) {
    while (i-- > 0) {
        if (t->token[i].kind != MTL_TOKEN_SPACE) return i;
    }
    return SIZE_MAX;
}

static bool is(const translation *t, size_t i, const char *text) {
    return i < t->count && mtl_token_is(&t->token[i], text);
}

static bool is_one_of(const translation *t, size_t i, const char *const *words) {
    for (; *words; words++) {
        if (is(t, i, *words)) return true;
    }
    return false;
}

static bool is_identifier(const translation *t, size_t i) {
    return i < t->count && t->token[i].kind == MTL_TOKEN_IDENTIFIER;
}

/* Behind the bracket that closes the one at `i`; t->count where none does. Brackets of the other kinds nest. */
static size_t behind_bracket(const translation *t, size_t i) {
    long depth = 0;
    for (; i < t->count; i = after(t, i)) {
        if (is(t, i, "(") || is(t, i, "[") || is(t, i, "{")) depth++;
        if ((is(t, i, ")") || is(t, i, "]") || is(t, i, "}")) && --depth == 0) return after(t, i);
    }
    return t->count;
}

/* Behind the > that closes the < at `i`, or `i` where it opens no list of template arguments. */
static size_t behind_angle(const translation *t, size_t i) {
    long depth = 0;
    for (size_t at = i; at < t->count;) {
        if (is(t, at, "<")) depth++;
        if (is(t, at, ">") && --depth == 0) return after(t, at);
        if (is(t, at, ";") || is(t, at, "{") || is(t, at, "}") || is(t, at, ")") || is(t, at, "]")) return i;
        at = is(t, at, "(") || is(t, at, "[") ? behind_bracket(t, at) : after(t, at);
    }
    return i;
}

static void blank(translation *t, size_t i) { t->token[i].replacement = ""; }

/* Everything in [begin, end), newlines excepted: those are in tokens of space. */
static void blank_range(translation *t, size_t begin, size_t end) {
    for (size_t i = begin; i < end && i < t->count; i++) {
        if (t->token[i].kind != MTL_TOKEN_SPACE) blank(t, i);
    }
}

/* ---- literals --------------------------------------------------------------------------------------------------------------- */

static bool ends_with(const mtl_token *token, const char *lower, const char *upper) {
    size_t length = strlen(lower);
    return token->length > length && (memcmp(token->text + token->length - length, lower, length) == 0 ||
                                      memcmp(token->text + token->length - length, upper, length) == 0);
}

/* Metal has no double: 1.0 is a float, 1.0h a half, 1.0bf a bfloat. */
static void translate_number(translation *t, size_t i) {
    mtl_token *token = &t->token[i];
    bool hexadecimal = token->length > 1 && token->text[0] == '0' && (token->text[1] == 'x' || token->text[1] == 'X');
    bool floating = memchr(token->text, '.', token->length) != NULL;
    const char *exponents = hexadecimal ? "pP" : "eE";
    for (size_t at = 0; at < token->length; at++) floating |= strchr(exponents, token->text[at]) != NULL;
    if (!floating) return;
    bool has_p = memchr(token->text, 'p', token->length) || memchr(token->text, 'P', token->length);
    bool digits_only = hexadecimal && !has_p; /* the f of 0x1.f is a digit */
    const char *type = NULL;
    size_t suffix = 0;
    if (!digits_only && ends_with(token, "bf", "BF")) type = "bfloat", suffix = 2;
    else if (ends_with(token, "h", "H")) type = "half", suffix = 1;
    else if (!digits_only && ends_with(token, "f", "F")) return;
    mtl_text text = {0};
    int length = (int)(token->length - suffix);
    if (type) mtl_text_format(&text, "%s(%.*sf)", type, length, token->text);
    else mtl_text_format(&text, "%.*sf", length, token->text);
    token->replacement = keep(t, &text);
    mtl_text_free(&text);
}

/* ---- conditionals ------------------------------------------------------------------------------------------------------------ */

static void append(translation *t, const char **place, const char *more) {
    mtl_text text = {0};
    mtl_text_format(&text, "%s%s", *place ? *place : "", more);
    *place = keep(t, &text);
    mtl_text_free(&text);
}

/* The colon of the question mark at `i`, or t->count. */
static size_t colon_of(const translation *t, size_t i) {
    long open = 1;
    for (size_t at = after(t, i); at < t->count;) {
        if (is(t, at, "?")) open++;
        if (is(t, at, ":") && --open == 0) return at;
        if (is(t, at, ";") || is(t, at, ")") || is(t, at, "]") || is(t, at, "}")) break;
        at = is(t, at, "(") || is(t, at, "[") || is(t, at, "{") ? behind_bracket(t, at) : after(t, at);
    }
    return t->count;
}

/* The last token of the expression behind the colon at `i`. */
static size_t end_of_arm(const translation *t, size_t i) {
    static const char *const ends[] = {",", ";", ")", "]", "}", NULL};
    long open = 0;
    size_t last = i;
    for (size_t at = after(t, i); at < t->count && !is_one_of(t, at, ends);) {
        if (is(t, at, "?")) open++;
        if (is(t, at, ":") && open-- == 0) break; /* of a conditional around this one */
        if (t->token[i].in_directive && !t->token[at].in_directive) break;
        size_t next = after(t, at);
        if (is(t, at, "(") || is(t, at, "[") || is(t, at, "{")) next = behind_bracket(t, at);
        if (is(t, at, "<") && is_identifier(t, before(t, at))) { /* f<a, b>(x) is one operand, a < b another */
            size_t behind = behind_angle(t, at);
            if (behind != at && (is(t, behind, "(") || is(t, behind, "::") || is(t, behind, "{"))) next = behind;
        }
        last = before(t, next);
        at = next;
    }
    return last;
}

/* c ? x : y   becomes   c ? metal::arm(x) : metal::arm(y), where 16-bit types of ours may be among them: converting both ways,
 * they leave it open what the common type is. */
static void translate_conditional(translation *t, size_t i) {
    size_t colon = colon_of(t, i);
    if (colon == t->count) return;
    size_t last = end_of_arm(t, colon);
    if (last == colon || before(t, colon) == i) return;
    append(t, &t->token[i].behind, " ::metal::arm(");
    append(t, &t->token[colon].before, ")");
    append(t, &t->token[colon].behind, " ::metal::arm(");
    append(t, &t->token[last].behind, ")");
}

/* ---- address spaces ----------------------------------------------------------------------------------------------------------- */

static const char *const plain_spaces[] = {"device",      "thread",           "ray_data",
                                           "object_data", "threadgroup_imageblock", NULL};

/* Whether a const stands in the same specifiers, before or behind: C++ takes it once. */
static bool is_const_already(const translation *t, size_t i) {
    static const char *const ends[] = {"(", ")", ",", ";", "{", "}", "=", "*", "&", "[", "]", NULL};
    long angles = 0;
    for (size_t at = before(t, i); at != SIZE_MAX && !is_one_of(t, at, ends); at = before(t, at)) {
        if (is(t, at, ">")) angles++;
        if (is(t, at, "<") && --angles < 0) break; /* the argument list that this is in */
        if (angles == 0 && (is(t, at, "const") || is(t, at, "constant"))) return true;
    }
    for (size_t at = after(t, i); at < t->count && !is_one_of(t, at, ends); at = after(t, at)) {
        if (is(t, at, "<")) {
            size_t behind = behind_angle(t, at);
            if (behind == at) break;
            at = before(t, behind);
        } else if (is(t, at, ">")) {
            break;
        }
        if (is(t, at, "const")) return true;
    }
    return false;
}

/* A static member in constant memory is initialized in its class, of whatever type it is. */
static bool is_static_member(const translation *t, size_t i) {
    static const char *const specifiers[] = {"const", "inline", "static", NULL};
    bool found = false;
    for (size_t at = before(t, i); at != SIZE_MAX && is_one_of(t, at, specifiers); at = before(t, at))
        found |= is(t, at, "static");
    for (size_t at = after(t, i); at != SIZE_MAX && is_one_of(t, at, specifiers); at = after(t, at))
        found |= is(t, at, "static");
    if (!found) return false;
    for (size_t at = i; at < t->count; at = after(t, at)) {
        if (is(t, at, "=") || is(t, at, "{")) return true;
        if (is(t, at, ";") || is(t, at, "(") || is(t, at, "*") || is(t, at, "&")) return false;
    }
    return false;
}

static bool is_constexpr_already(const translation *t, size_t i) {
    static const char *const specifiers[] = {"const", "inline", "static", "constexpr", NULL};
    for (size_t at = before(t, i); at != SIZE_MAX && is_one_of(t, at, specifiers); at = before(t, at)) {
        if (is(t, at, "constexpr")) return true;
    }
    for (size_t at = after(t, i); is_one_of(t, at, specifiers); at = after(t, at)) {
        if (is(t, at, "constexpr")) return true;
    }
    return false;
}

static void translate_constant(translation *t, size_t i) {
    if (is_static_member(t, i) && !is_constexpr_already(t, i)) t->token[i].replacement = "constexpr";
    else t->token[i].replacement = is_const_already(t, i) ? "" : "const";
}

/* ---- variables in threadgroup memory ------------------------------------------------------------------------------------------- */

/* The bracket that the token at `i` is directly in: '(', '[', '{', or NUL at the top. */
static char enclosing_bracket(const translation *t, size_t i) {
    long depth = 0;
    for (size_t at = before(t, i); at != SIZE_MAX; at = before(t, at)) {
        if (is(t, at, ")") || is(t, at, "]") || is(t, at, "}")) depth++;
        if ((is(t, at, "(") || is(t, at, "[") || is(t, at, "{")) && depth-- == 0) return t->token[at].text[0];
    }
    return '\0';
}

/* Behind the type that follows `threadgroup` at `i`, where the declarators begin; t->count where no variable is declared: the
 * pointee of a pointer, a reference, an argument of a template. */
static size_t find_declarators(const translation *t, size_t i) {
    static const char *const ends[] = {"[", ";", ",", "=", "{", NULL};
    size_t name = t->count, words = 0;
    for (size_t at = after(t, i); at < t->count;) {
        if (is(t, at, "decltype") || is(t, at, "alignas") || is(t, at, "typeof")) {
            words += !is(t, at, "alignas");
            at = after(t, at);
            if (is(t, at, "(")) at = behind_bracket(t, at);
            name = t->count;
        } else if (is_identifier(t, at)) {
            name = at;
            words++;
            at = after(t, at);
        } else if (is(t, at, "::")) {
            at = after(t, at);
            words--; /* a::b is one word */
        } else if (is(t, at, "<")) {
            size_t behind = behind_angle(t, at);
            if (behind == at) return t->count;
            at = behind;
            name = t->count;
        } else {
            return words >= 2 && name < t->count && is_one_of(t, at, ends) ? name : t->count;
        }
    }
    return t->count;
}

/* threadgroup T a[4], b;   becomes   typedef T __mtl_a_0[4], __mtl_b_1; and references of these types to the group's storage. */
static void declare_variables(translation *t, size_t keyword, size_t name) {
    mtl_text references = {0};
    const char *group = t->region == MTL_REGION_BODY ? "__mtl_group" : "__mtl_this_group()";
    t->token[keyword].replacement = "typedef";
    static const char *const no_typedef[] = {"static", "constexpr", "volatile", NULL};
    for (size_t at = before(t, keyword); at != SIZE_MAX && is_one_of(t, at, no_typedef); at = before(t, at))
        blank(t, at);
    for (size_t at = after(t, keyword); at < name; at = after(t, at)) {
        if (is(t, at, "alignas")) blank_range(t, at, behind_bracket(t, after(t, at)));
    }
    size_t at = name;
    while (at < t->count) {
        bool pointer = is(t, at, "*") || is(t, at, "&");
        while (is(t, at, "*") || is(t, at, "&") || is(t, at, "const")) at = after(t, at);
        if (!is_identifier(t, at)) break;
        mtl_token *declared = &t->token[at];
        mtl_text type = {0};
        mtl_text_format(&type, "__mtl_%.*s_%d", (int)declared->length, declared->text, t->variables);
        const char *type_name = keep(t, &type);
        mtl_text_free(&type);
        if (pointer) { /* of the thread's own */
            mtl_text_format(&references, " %s %.*s;", type_name, (int)declared->length, declared->text);
        } else {
            mtl_text_format(&references, " %s &%.*s = __mtl_variable<%s>(%s, %d);", type_name, (int)declared->length,
                            declared->text, type_name, group, t->variables);
        }
        t->variables++;
        declared->replacement = type_name;
        size_t name_at = at;
        at = after(t, at);
        while (is(t, at, "[")) {
            size_t behind = behind_bracket(t, at);
            if (is(t, at + 1, "[")) blank_range(t, at, behind); /* an attribute */
            at = behind;
        }
        if (is(t, at, "=")) { /* Metal has no initializers here; an assignment is what they would mean */
            size_t end = after(t, at);
            for (long depth = 0; end < t->count && !(depth == 0 && (is(t, end, ",") || is(t, end, ";")));
                 end = after(t, end)) {
                depth += is(t, end, "(") || is(t, end, "{") || is(t, end, "[");
                depth -= is(t, end, ")") || is(t, end, "}") || is(t, end, "]");
            }
            mtl_text_format(&references, " %.*s ", (int)t->token[name_at].length, t->token[name_at].text);
            for (size_t moved = at; moved < end; moved++) {
                if (t->token[moved].kind == MTL_TOKEN_SPACE) {
                    mtl_text_add_string(&references, " ");
                    continue;
                }
                if (t->token[moved].kind == MTL_TOKEN_NUMBER) translate_number(t, moved);
                const char *text = t->token[moved].replacement;
                if (text) mtl_text_add_string(&references, text);
                else mtl_text_add(&references, t->token[moved].text, t->token[moved].length);
                blank(t, moved);
            }
            mtl_text_add_string(&references, ";");
            at = end;
        }
        if (!is(t, at, ",")) break;
        at = after(t, at);
    }
    if (is(t, at, ";")) t->token[at].behind = keep(t, &references);
    mtl_text_free(&references);
}

static void translate_threadgroup(translation *t, size_t i) {
    char bracket = enclosing_bracket(t, i);
    size_t name = bracket == '(' || bracket == '[' ? t->count : find_declarators(t, i);
    if (name == t->count) blank(t, i);
    else if (t->options->target == MTL_TARGET_CUDA) t->token[i].replacement = "__shared__";
    else declare_variables(t, i, name);
}

/* ---- attributes and directives ----------------------------------------------------------------------------------------------------- */

/* [[...]]: what C++ has an opinion about stays. */
static void translate_attribute(translation *t, size_t i) {
    static const char *const standard[] = {"maybe_unused", "nodiscard", "fallthrough", "noreturn",
                                           "deprecated",   "likely",    "unlikely",    NULL};
    size_t first = after(t, i + 1);
    if (is_one_of(t, first, standard) || is(t, after(t, first), "::")) return;
    blank_range(t, i, behind_bracket(t, i));
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
        size_t name = before(t, i), hash = name == SIZE_MAX ? SIZE_MAX : before(t, name);
        blank(t, i);
        if (name != SIZE_MAX) blank(t, name);
        if (hash != SIZE_MAX) blank(t, hash);
        return;
    }
}

/* ---- loops ------------------------------------------------------------------------------------------------------------------------- */

/* for (...) statement   becomes   for (...) if (__mtl_iterate()); else statement */
static void count_iterations(translation *t, size_t i) {
    static const char count[] = " if (__mtl_iterate()); else ";
    if (is(t, i, "do")) {
        t->token[i].behind = count;
        return;
    }
    size_t open = after(t, i);
    if (!is(t, open, "(")) return;
    size_t behind = behind_bracket(t, open), close = before(t, behind);
    if (behind >= t->count) return;
    if (is(t, i, "while") && is(t, behind, ";")) { /* the end of do, or a loop of nothing */
        t->token[open].behind = "!__mtl_iterate() && (";
        t->token[close].before = ")";
        return;
    }
    t->token[close].behind = count;
}

/* ---- all of it ------------------------------------------------------------------------------------------------------------------------ */

static void translate_token(translation *t, size_t i) {
    const mtl_token *token = &t->token[i];
    if (token->replacement) return; /* dealt with on the way to an earlier one */
    switch (token->kind) {
    case MTL_TOKEN_NUMBER: translate_number(t, i); break;
    case MTL_TOKEN_INCLUDE: translate_include(t, i); break;
    case MTL_TOKEN_PUNCTUATION:
        if (is(t, i, "[") && is(t, i + 1, "[")) translate_attribute(t, i);
        else if (t->options->has_16_bit_types && is(t, i, "?")) translate_conditional(t, i);
        break;
    case MTL_TOKEN_IDENTIFIER:
        if (is_one_of(t, i, plain_spaces)) blank(t, i);
        else if (is(t, i, "constant")) translate_constant(t, i);
        else if (is(t, i, "threadgroup")) translate_threadgroup(t, i);
        else if (is(t, i, "kernel") && is(t, after(t, i), "void")) blank(t, i);
        else if (t->options->count_iterations && (is(t, i, "for") || is(t, i, "while") || is(t, i, "do")))
            count_iterations(t, i);
        break;
    default: break;
    }
}

static void write_token(mtl_text *out, const mtl_token *token) {
    if (token->before) mtl_text_add_string(out, token->before);
    if (!token->replacement) {
        mtl_text_add(out, token->text, token->length);
    } else if (token->replacement[0]) {
        mtl_text_add_string(out, token->replacement);
    } else { /* blanks, so that what follows stays in its column */
        for (size_t i = 0; i < token->length; i++) mtl_text_add(out, token->text[i] == '\n' ? "\n" : " ", 1);
    }
    if (token->behind) mtl_text_add_string(out, token->behind);
}

void mtl_translate(mtl_text *out, const char *source, mtl_region region, const mtl_unit_options *options) {
    translation t = {.region = region, .options = options};
    if (!mtl_tokenize(&t.tokens, source, strlen(source))) {
        out->failed = true;
        return;
    }
    t.token = t.tokens.token;
    t.count = t.tokens.count;
    for (size_t i = 0; i < t.count && !t.failed; i++) translate_token(&t, i);
    for (size_t i = 0; i < t.count && !t.failed; i++) write_token(out, &t.token[i]);
    out->failed |= t.failed;
    mtl_tokens_free(&t.tokens);
    while (t.scratch) {
        block *next = t.scratch->next;
        free(t.scratch);
        t.scratch = next;
    }
}
