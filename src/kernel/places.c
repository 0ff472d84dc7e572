/* Marks where threads are in program order. SPDX-License-Identifier: MIT
 *
 * Lanes of a simdgroup that are at different places meet again when those that are behind have caught up; so a waiting lane
 * has to say where it is. Each call at which lanes meet gets a number, its place in the text, which the lane notes before;
 * each loop around one counts its iterations, and each function with one in it begins a level of its own:
 *     simd_sum(x)               (__mtl_at(level, number), simd_sum(x))
 *     for (...) statement       for (...) if (__mtl_loop(level, number)); else statement
 *     float f(...) { ... }      float f(...) { __mtl_frame __mtl_here; ... } */
#include "kernel/translation.h"

#include <stdlib.h>
#include <string.h>

static bool has_name(const mtl_names *names, const mtl_token *token) {
    for (size_t i = 0; i < names->count; i++) {
        if (names->name[i].length == token->length && memcmp(names->name[i].text, token->text, token->length) == 0)
            return true;
    }
    return false;
}

/* Whether the token is the name in a call at which lanes meet; `*open` is its parenthesis. */
static bool is_meeting(const translation *t, size_t i, size_t *open) {
    const mtl_token *token = &t->token[i];
    if (token->kind != MTL_TOKEN_IDENTIFIER) return false;
    if (!mtl_is_exchange(token) && !has_name(t->options->meeting, token)) return false;
    *open = mtl_after(t, i);
    if (mtl_is(t, *open, "<")) *open = mtl_behind_angle(t, *open);
    return mtl_is(t, *open, "(");
}

static bool is_macro_with_parameters(const translation *t, const mtl_token *name) {
    for (size_t i = 0; i < t->count; i++) {
        if (!t->token[i].in_directive || !mtl_is(t, i, "define")) continue;
        size_t defined = mtl_after(t, i);
        if (mtl_is(t, defined + 1, "(") && mtl_is_named(&t->token[defined], name->text, name->length)) return true;
    }
    return false;
}

bool mtl_is_statement_macro(const translation *t, size_t i) {
    static const char *const ends[] = {";", "{", "}", ")", "else", "do", NULL};
    static const char *const statements[] = {"if", "for", "while", "switch", "catch", NULL};
    size_t open = mtl_after(t, i), before = mtl_before(t, i);
    if (!mtl_is_identifier(t, i) || t->token[i].in_directive || mtl_is_one_of(t, i, statements)) return false;
    if (!mtl_is(t, open, "(") || !mtl_is(t, mtl_behind_bracket(t, open), "{")) return false;
    if (before != SIZE_MAX && !mtl_is_one_of(t, before, ends)) return false;
    /* A body has no functions in it, but a class in it may: a constructor. The header's macros stand elsewhere then. */
    return is_macro_with_parameters(t, &t->token[i]) || t->region == MTL_REGION_BODY;
}

bool mtl_is_body(const translation *t, size_t i, size_t *name) {
    static const char *const qualifiers[] = {"const",   "constant", "device",      "noexcept",
                                             "mutable", "thread",   "threadgroup", NULL};
    static const char *const statements[] = {"if", "constexpr", "for", "while", "switch", "catch", NULL};
    static const char *const of_type[] = {"::", "*", "&", ">", "<", ",", NULL};
    if (!mtl_is(t, i, "{")) return false;
    size_t at = mtl_before(t, i), close = at;
    while (close != SIZE_MAX && mtl_is_one_of(t, close, qualifiers)) close = mtl_before(t, close);
    if (close != SIZE_MAX && !mtl_is(t, close, ")")) { /* perhaps -> type */
        while (at != SIZE_MAX && (mtl_is_identifier(t, at) || mtl_is_one_of(t, at, of_type))) at = mtl_before(t, at);
        if (at == SIZE_MAX || !mtl_is(t, at, "->")) return false;
        close = mtl_before(t, at);
    }
    if (close == SIZE_MAX || !mtl_is(t, close, ")")) return false;
    size_t open = mtl_opening_bracket(t, close), before = open == SIZE_MAX ? SIZE_MAX : mtl_before(t, open);
    if (before == SIZE_MAX) return false;
    if (mtl_is(t, before, "]")) {
        size_t capture = mtl_opening_bracket(t, before),
               equals = capture == SIZE_MAX ? capture : mtl_before(t, capture);
        *name = equals != SIZE_MAX && mtl_is(t, equals, "=") ? mtl_before(t, equals) : SIZE_MAX;
        if (*name != SIZE_MAX && !mtl_is_identifier(t, *name)) *name = SIZE_MAX;
        return true;
    }
    *name = before;
    return mtl_is_identifier(t, before) && !mtl_is_one_of(t, before, statements) && !mtl_is_statement_macro(t, before);
}

static bool any_meeting(const translation *t, size_t begin, size_t end) {
    size_t open;
    for (size_t i = begin; i < end; i++) {
        if (is_meeting(t, i, &open)) return true;
    }
    return false;
}

bool mtl_find_meeting(const translation *t, mtl_names *names, bool *found) {
    *found = false;
    for (size_t i = 0; i < t->count; i++) {
        size_t name;
        if (!mtl_is_body(t, i, &name) || name == SIZE_MAX) continue;
        const mtl_token *token = &t->token[name];
        if (mtl_is_exchange(token) || has_name(names, token) || !any_meeting(t, i, mtl_behind_bracket(t, i))) continue;
        mtl_name *grown = realloc(names->name, (names->count + 1) * sizeof *grown);
        if (!grown) return false;
        names->name = grown;
        names->name[names->count++] = (mtl_name){token->text, token->length};
        *found = true;
    }
    return true;
}

size_t mtl_behind_statement(const translation *t, size_t i) {
    static const char *const with_condition[] = {"for", "while", "if", "switch", NULL};
    int nested = 0, ifs = 0; /* do, each with a while to come; if, each with an else, perhaps */
    for (;;) {
        if (i >= t->count) return t->count;
        if (mtl_is(t, i, "do")) {
            nested++;
            i = mtl_after(t, i);
            continue;
        }
        if (mtl_is_one_of(t, i, with_condition)) {
            size_t open = mtl_after(t, i);
            if (mtl_is(t, i, "if")) ifs++;
            if (mtl_is_identifier(t, open)) open = mtl_after(t, open); /* constexpr, or a macro for it */
            if (!mtl_is(t, open, "(")) return t->count;
            i = mtl_behind_bracket(t, open);
            continue;
        }
        if (mtl_is(t, i, "{")) {
            i = mtl_behind_bracket(t, i);
        } else {
            while (i < t->count && !mtl_is(t, i, ";") && !mtl_is(t, i, "}"))
                i = mtl_is(t, i, "(") || mtl_is(t, i, "[") || mtl_is(t, i, "{") ? mtl_behind_bracket(t, i)
                                                                                : mtl_after(t, i);
            if (mtl_is(t, i, ";")) i = mtl_after(t, i);
        }
        if (ifs > 0 && mtl_is(t, i, "else")) {
            ifs--;
            i = mtl_after(t, i);
        } else if (nested > 0 && mtl_is(t, i, "while")) {
            nested--;
            i = mtl_behind_bracket(t, mtl_after(t, i));
            if (mtl_is(t, i, ";")) i = mtl_after(t, i);
            if (nested == 0) return i;
        } else {
            return i;
        }
    }
}

/* What every token is in: how many marked loops, and whether it is code. */
typedef struct surroundings {
    unsigned short *loops;
    bool *code;
} surroundings;

static void mark_loop(translation *t, size_t i, const surroundings *around) {
    size_t body;
    mtl_text mark = {0};
    if (mtl_is(t, i, "do")) {
        body = mtl_after(t, i);
    } else {
        size_t open = mtl_after(t, i);
        if (!mtl_is(t, open, "(")) return;
        body = mtl_behind_bracket(t, open);
        if (mtl_is(t, i, "while") && mtl_is(t, body, ";")) return; /* of do, or of nothing */
    }
    size_t end = mtl_behind_statement(t, body);
    if (body >= t->count || !any_meeting(t, body, end)) return;
    mtl_text_format(&mark, " if (__mtl_loop(%d, %zu)); else ", around->loops[i], t->first_place + i);
    mtl_add_behind(t, mtl_before(t, body), mtl_keep(t, &mark));
    mtl_text_free(&mark);
    for (size_t at = body; at < end; at++) around->loops[at]++;
}

/* The beginning of the expression that ends with the name at `i`: a::b.c[1].name */
static size_t postfix_begin(const translation *t, size_t i) {
    for (;;) {
        size_t before = mtl_before(t, i);
        if (before == SIZE_MAX || !(mtl_is(t, before, "::") || mtl_is(t, before, ".") || mtl_is(t, before, "->")))
            return i;
        if (mtl_is(t, before, "::") && before > 0 && t->token[before - 1].kind == MTL_TOKEN_SPACE) return before;
        size_t left = mtl_before(t, before);
        while (left != SIZE_MAX && (mtl_is(t, left, ")") || mtl_is(t, left, "]"))) {
            i = mtl_opening_bracket(t, left);
            if (i == SIZE_MAX) return SIZE_MAX;
            left = mtl_before(t, i);
        }
        if (left == SIZE_MAX || !mtl_is_identifier(t, left)) return mtl_is(t, before, "::") ? before : SIZE_MAX;
        i = left;
    }
}

static void mark_call(translation *t, size_t i, size_t open, const surroundings *around) {
    static const char *const before_expressions[] = {"return", "else", "case", "do", NULL};
    size_t begin = postfix_begin(t, i), behind = mtl_behind_bracket(t, open);
    if (begin == SIZE_MAX || (behind >= t->count && !mtl_is(t, mtl_before(t, behind), ")"))) return;
    size_t before = mtl_before(t, begin);
    if (before != SIZE_MAX && !mtl_is_one_of(t, before, before_expressions) &&
        (mtl_is_identifier(t, before) || mtl_is(t, before, ">") || mtl_is(t, before, "*") || mtl_is(t, before, "&"))) {
        /* A declaration, or an operator: a > f(x) is as good with its mark left out as T f(x) is wrong with one. */
        if (mtl_is_identifier(t, before) || mtl_is(t, before, ">")) return;
    }
    mtl_text mark = {0};
    mtl_text_format(&mark, "(__mtl_at(%d, %zu), ", around->loops[i], t->first_place + i);
    mtl_add_before(t, begin, mtl_keep(t, &mark));
    mtl_text_free(&mark);
    mtl_add_behind(t, mtl_before(t, behind), ")");
}

/* A function's own levels begin with it. */
static void mark_body(translation *t, size_t i, size_t name, const surroundings *around) {
    size_t end = mtl_behind_bracket(t, i);
    unsigned short outside = around->loops[i];
    for (size_t at = i; at < end; at++) {
        around->loops[at] = (unsigned short)(around->loops[at] - outside);
        around->code[at] = true;
    }
    if (!any_meeting(t, i, end)) return;
    mtl_add_behind(t, i, " __mtl_frame __mtl_here; ");
    if (name == SIZE_MAX) return;
    /* Which no constexpr function can have. */
    for (size_t at = mtl_before(t, name);
         at != SIZE_MAX && !mtl_is(t, at, ";") && !mtl_is(t, at, "}") && !mtl_is(t, at, "{") && !mtl_is(t, at, "=");
         at = mtl_before(t, at)) {
        if (mtl_is(t, at, "constexpr")) mtl_blank(t, at);
    }
}

void mtl_mark_places(translation *t) {
    surroundings around = {calloc(t->count + 1, sizeof *around.loops), calloc(t->count + 1, sizeof *around.code)};
    if (!around.loops || !around.code) {
        t->failed = true;
    } else {
        size_t name, open;
        for (size_t i = 0; i < t->count; i++) {
            if (t->token[i].in_directive) continue;
            if (mtl_is(t, i, "for") || mtl_is(t, i, "while") || mtl_is(t, i, "do") || mtl_is_statement_macro(t, i))
                mark_loop(t, i, &around);
        }
        for (size_t i = 0; i < t->count; i++) {
            if (!t->token[i].in_directive && mtl_is_body(t, i, &name)) mark_body(t, i, name, &around);
        }
        for (size_t i = 0; i < t->count; i++) {
            bool code = t->region == MTL_REGION_BODY || around.code[i] || t->token[i].in_directive;
            if (code && is_meeting(t, i, &open)) mark_call(t, i, open, &around);
        }
    }
    free(around.loops);
    free(around.code);
}
