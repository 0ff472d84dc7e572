/* Swizzles that are read, as values. SPDX-License-Identifier: MIT
 *
 *     v.xyz   becomes   (msl_::valued(), v.xyz)
 *
 * A swizzle is a member of a class of its own, which stands for some components of a vector where it is assigned to. What is read has
 * to be a vector: auto, decltype and the deduction of template arguments ask for its type. The comma is a function for swizzles alone;
 * for a user's member of such a name it is the one that C++ has, which changes nothing. */
#include "kernel/translation.h"

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

/* Where the postfix expression that ends with the token at `i` begins, or SIZE_MAX: a::b.c[1], f<2>(x), (p + 1), T{1, 2}. */
static size_t expression_begin(const translation *t, size_t i) {
    static const char *const keywords[] = {"return", "else",   "case",  "do",     "if",       "while",
                                           "for",    "switch", "throw", "sizeof", "operator", NULL};
    for (;;) {
        if (i == SIZE_MAX) return SIZE_MAX;
        if (mtl_is(t, i, "]")) { /* an element of what stands before */
            size_t open = mtl_opening_bracket(t, i);
            i = open == SIZE_MAX ? open : mtl_before(t, open);
            continue;
        }
        if (mtl_is(t, i, ")") || mtl_is(t, i, "}")) { /* a call's arguments, or brackets alone */
            size_t open = mtl_opening_bracket(t, i), name = open == SIZE_MAX ? open : mtl_before(t, open);
            if (open == SIZE_MAX) return SIZE_MAX;
            if (name != SIZE_MAX && mtl_is(t, name, ">")) {
                size_t angle = mtl_opening_angle(t, name);
                if (angle != SIZE_MAX) name = mtl_before(t, angle);
            }
            bool called = name != SIZE_MAX && mtl_is_identifier(t, name) && !mtl_is_one_of(t, name, keywords);
            if (!called) return mtl_is(t, i, ")") ? open : SIZE_MAX;
            i = name;
        }
        if (!mtl_is_identifier(t, i) || mtl_is_one_of(t, i, keywords)) return SIZE_MAX;
        size_t before = mtl_before(t, i);
        if (before != SIZE_MAX && mtl_is(t, before, "template")) before = mtl_before(t, before);
        if (before != SIZE_MAX && (mtl_is(t, before, ".") || mtl_is(t, before, "->"))) {
            i = mtl_before(t, before);
            continue;
        }
        while (before != SIZE_MAX && mtl_is(t, before, "::")) {
            size_t scope = mtl_before(t, before);
            if (scope != SIZE_MAX && mtl_is(t, scope, ">")) {
                scope = mtl_opening_angle(t, scope);
                if (scope != SIZE_MAX) scope = mtl_before(t, scope);
            }
            if (scope == SIZE_MAX || !mtl_is_identifier(t, scope) || mtl_is_one_of(t, scope, keywords)) return before;
            i = scope;
            before = mtl_before(t, i);
        }
        return i;
    }
}

/* Whether a part of the swizzle is assigned to, or may be: a macro's text may end there. */
static bool is_changed(const translation *t, size_t begin, size_t swizzle) {
    size_t behind = mtl_after(t, swizzle), before = mtl_before(t, begin);
    bool directive = t->token[swizzle].in_directive;
    for (;;) {
        if (directive && !mtl_are_one_directive(t, swizzle, behind)) return true;
        if (mtl_is(t, behind, ")")) {
            size_t open = mtl_opening_bracket(t, behind), name = open == SIZE_MAX ? open : mtl_before(t, open);
            if (name != SIZE_MAX && (mtl_is_identifier(t, name) || mtl_is(t, name, ">"))) return false; /* f(v.xy) */
            behind = mtl_after(t, behind);
        } else if (mtl_is(t, behind, "[")) behind = mtl_behind_bracket(t, behind);
        else if (mtl_is(t, behind, ".") && mtl_is_identifier(t, mtl_after(t, behind)))
            behind = mtl_after(t, mtl_after(t, behind));
        else break;
    }
    if (mtl_is_assignment(t, behind)) return true;
    return before != SIZE_MAX && before > 0 &&
           (mtl_is_pair(t, before - 1, "+", "+") || mtl_is_pair(t, before - 1, "-", "-"));
}

void mtl_translate_swizzles(translation *t) {
    for (size_t i = 0; i < t->count && !t->failed; i++) {
        if (!mtl_is(t, i, ".") && !mtl_is(t, i, "->")) continue;
        size_t swizzle = mtl_after(t, i), behind = mtl_after(t, swizzle);
        int component[4];
        unsigned used;
        if (swizzle >= t->count || !mtl_read_swizzle(&t->token[swizzle], component, &used)) continue;
        if (mtl_is(t, behind, "(") || mtl_is_pair(t, behind, "#", "#")) continue;
        size_t begin = expression_begin(t, mtl_before(t, i));
        if (begin == SIZE_MAX || !mtl_are_one_directive(t, begin, i)) continue;
        if (is_changed(t, begin, swizzle)) continue;
        mtl_add_before(t, begin, "(::metal::msl_::valued(), ");
        mtl_add_behind(t, swizzle, ")");
    }
}
