/* Swizzles that are read, as values. SPDX-License-Identifier: MIT
 *
 *     v.xyz   becomes   (msl_::valued(), v.xyz)
 *
 * A swizzle is a member of a class of its own, which stands for some components of a vector where it is assigned to. What is read has
 * to be a vector: auto, decltype and the deduction of template arguments ask for its type. The comma is a function for swizzles alone;
 * for a user's member of such a name it is the one that C++ has, which changes nothing. */
#include "kernel/translation.h"

#include <stdlib.h>

int mtl_read_swizzle(const mtl_token *token, int component[4], unsigned *used) {
    static const char *const letters[] = {"xyzw", "rgba"};
    if (token->kind != MTL_TOKEN_IDENTIFIER || token->length < 2 || token->length > 4) return 0;
    for (int set = 0; set < 2; set++) {
        size_t i = 0;
        *used = 0;
        for (; i < token->length; i++) {
            int at = 0;
            while (at < 4 && letters[set][at] != token->text[i]) at++;
            if (at == 4) break;
            component[i] = at;
            *used |= 1u << at;
        }
        if (i == token->length) return (int)token->length;
    }
    return 0;
}

/* What was found out about tokens that end, or follow, a part of a chain a.b[1].xy.c: where the chain begins and ends. */
#define UNKNOWN (SIZE_MAX - 1)
typedef struct chains {
    size_t *begin, *end;
} chains;

/* One step towards the beginning of the postfix expression that ends with the token at `*at`: a::b.c[1], f<2>(x), (p + 1),
 * T{1, 2}. True: the expression that ends at the new `*at` begins there too. Else `*at` is the beginning, or SIZE_MAX. */
static bool step_back(const translation *t, size_t *at) {
    static const char *const keywords[] = {"return", "else",   "case",  "do",     "if",       "while",
                                           "for",    "switch", "throw", "sizeof", "operator", NULL};
    size_t i = *at;
    *at = SIZE_MAX;
    if (mtl_is(t, i, "]")) { /* an element of what stands before */
        size_t open = mtl_opening_bracket(t, i);
        *at = open == SIZE_MAX ? open : mtl_before(t, open);
        return *at != SIZE_MAX;
    }
    if (mtl_is(t, i, ")") || mtl_is(t, i, "}")) { /* a call's arguments, or brackets alone */
        size_t open = mtl_opening_bracket(t, i), name = open == SIZE_MAX ? open : mtl_before(t, open);
        if (open == SIZE_MAX) return false;
        if (name != SIZE_MAX && mtl_is(t, name, ">")) {
            size_t angle = mtl_opening_angle(t, name);
            if (angle != SIZE_MAX) name = mtl_before(t, angle);
        }
        bool called = name != SIZE_MAX && mtl_is_identifier(t, name) && !mtl_is_one_of(t, name, keywords);
        if (!called) {
            if (mtl_is(t, i, ")")) *at = open;
            return false;
        }
        i = name;
    }
    if (!mtl_is_identifier(t, i) || mtl_is_one_of(t, i, keywords)) return false;
    size_t before = mtl_before(t, i);
    if (before != SIZE_MAX && mtl_is(t, before, "template")) before = mtl_before(t, before);
    if (before != SIZE_MAX && (mtl_is(t, before, ".") || mtl_is(t, before, "->"))) {
        *at = mtl_before(t, before);
        return *at != SIZE_MAX;
    }
    while (before != SIZE_MAX && mtl_is(t, before, "::")) {
        size_t scope = mtl_before(t, before);
        if (scope != SIZE_MAX && mtl_is(t, scope, ">")) {
            scope = mtl_opening_angle(t, scope);
            if (scope != SIZE_MAX) scope = mtl_before(t, scope);
        }
        if (scope == SIZE_MAX || !mtl_is_identifier(t, scope) || mtl_is_one_of(t, scope, keywords)) {
            *at = before;
            return false;
        }
        i = scope;
        before = mtl_before(t, i);
    }
    *at = i;
    return false;
}

/* One step over what follows a part of a chain; `*at` stays where the chain, or the directive, ends: at the ) of f(v.xy) too. */
static bool step_on(const translation *t, size_t *at) {
    size_t i = *at, next = i;
    if (mtl_is(t, i, ")")) {
        size_t open = mtl_opening_bracket(t, i), name = open == SIZE_MAX ? open : mtl_before(t, open);
        if (name == SIZE_MAX || !(mtl_is_identifier(t, name) || mtl_is(t, name, ">"))) next = mtl_after(t, i);
    } else if (mtl_is(t, i, "[")) next = mtl_behind_bracket(t, i);
    else if (mtl_is(t, i, ".") && mtl_is_identifier(t, mtl_after(t, i))) next = mtl_after(t, mtl_after(t, i));
    *at = next;
    return next != i && (!t->token[i].directive || mtl_are_one_directive(t, i, next));
}

/* Where steps from `i` on end. What is found is kept for all tokens on the way, so that none is stepped over twice. */
static size_t walk(const translation *t, size_t *found, bool (*step)(const translation *t, size_t *at), size_t i) {
    if (i == SIZE_MAX) return SIZE_MAX;
    size_t at = i;
    bool more = true;
    while (more && found[at] == UNKNOWN) more = step(t, &at);
    size_t end = more ? found[at] : at;
    for (more = true; more && found[i] == UNKNOWN;) {
        size_t known = i;
        more = step(t, &i);
        found[known] = end;
    }
    return end;
}

/* Whether a part of the swizzle is assigned to, or may be: a macro's text may end there. */
static bool is_changed(const translation *t, chains *found, size_t begin, size_t swizzle) {
    size_t behind = mtl_after(t, swizzle), before = mtl_before(t, begin);
    size_t directive = t->token[swizzle].directive;
    if (directive && !mtl_are_one_directive(t, swizzle, behind)) return true;
    behind = walk(t, found->end, step_on, behind);
    if (directive && !mtl_are_one_directive(t, swizzle, behind)) return true;
    if (mtl_is(t, behind, ")")) return false;
    if (mtl_is_assignment(t, behind)) return true;
    return before != SIZE_MAX && before > 0 &&
           (mtl_is_pair(t, before - 1, "+", "+") || mtl_is_pair(t, before - 1, "-", "-"));
}

static void translate_swizzles(translation *t, chains *found) {
    for (size_t i = 0; i < t->count && !t->failed; i++) {
        if (!mtl_is(t, i, ".") && !mtl_is(t, i, "->")) continue;
        size_t swizzle = mtl_after(t, i), behind = mtl_after(t, swizzle);
        int component[4];
        unsigned used;
        if (swizzle >= t->count || !mtl_read_swizzle(&t->token[swizzle], component, &used)) continue;
        if (mtl_is(t, behind, "(") || mtl_is_pair(t, behind, "#", "#")) continue;
        size_t begin = walk(t, found->begin, step_back, mtl_before(t, i));
        if (begin == SIZE_MAX || !mtl_are_one_directive(t, begin, i)) continue;
        if (is_changed(t, found, begin, swizzle)) continue;
        mtl_add_before(t, begin, "(::metal::msl_::valued(), ");
        mtl_add_behind(t, swizzle, ")");
    }
}

void mtl_translate_swizzles(translation *t) {
    chains found = {malloc((t->count + 1) * sizeof *found.begin), malloc((t->count + 1) * sizeof *found.end)};
    t->failed |= !found.begin || !found.end;
    for (size_t i = 0; i <= t->count && !t->failed; i++) found.begin[i] = found.end[i] = UNKNOWN;
    translate_swizzles(t, &found);
    free(found.begin);
    free(found.end);
}
