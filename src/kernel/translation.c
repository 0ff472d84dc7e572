/* Tokens on their way from Metal to C++. SPDX-License-Identifier: MIT */
#include "kernel/translation.h"

#include <stdlib.h>
#include <string.h>

const char *mtl_keep(translation *t, const mtl_text *text) {
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
size_t mtl_after(const translation *t, size_t i) {
    do i++;
    while (i < t->count && t->token[i].kind == MTL_TOKEN_SPACE);
    return i;
}

/* Of the one before; SIZE_MAX at the beginning. */
size_t mtl_before(const translation *t, size_t i) {
    if (i == SIZE_MAX) return SIZE_MAX;
    while (i-- > 0) {
        if (t->token[i].kind != MTL_TOKEN_SPACE) return i;
    }
    return SIZE_MAX;
}

bool mtl_is(const translation *t, size_t i, const char *text) {
    return i < t->count && mtl_token_is(&t->token[i], text);
}

bool mtl_is_one_of(const translation *t, size_t i, const char *const *words) {
    for (; *words; words++) {
        if (mtl_is(t, i, *words)) return true;
    }
    return false;
}

bool mtl_is_identifier(const translation *t, size_t i) {
    return i < t->count && t->token[i].kind == MTL_TOKEN_IDENTIFIER;
}

bool mtl_is_named(const mtl_token *token, const char *name, size_t length) {
    return token->length == length && memcmp(token->text, name, length) == 0;
}

bool mtl_are_one_directive(const translation *t, size_t a, size_t b) {
    if (b >= t->count || t->token[a].in_directive != t->token[b].in_directive) return false;
    while (t->token[a].in_directive && a < b) a++;
    return a == b || !t->token[b].in_directive;
}

bool mtl_is_pair(const translation *t, size_t i, const char *first, const char *second) {
    return mtl_is(t, i, first) && mtl_is(t, i + 1, second);
}

bool mtl_is_assignment(const translation *t, size_t i) {
    static const char *const operators[] = {"+", "-", "*", "/", "%", "&", "|", "^", NULL};
    if (mtl_is(t, i, "=")) return !mtl_is(t, i + 1, "=");
    if (mtl_is_one_of(t, i, operators) && mtl_is(t, i + 1, "=")) return true;
    if (mtl_is_pair(t, i, "<", "<") || mtl_is_pair(t, i, ">", ">")) return mtl_is(t, i + 2, "=");
    return mtl_is_pair(t, i, "+", "+") || mtl_is_pair(t, i, "-", "-");
}

bool mtl_is_changed(const translation *t, size_t begin, size_t end, const char *name, size_t length) {
    for (size_t i = begin; i < end; i++) {
        if (t->token[i].kind != MTL_TOKEN_IDENTIFIER || !mtl_is_named(&t->token[i], name, length)) continue;
        size_t before = mtl_before(t, i), behind = mtl_after(t, i);
        if (before != SIZE_MAX && (mtl_is(t, before, ".") || mtl_is(t, before, "->"))) continue;
        if (before != SIZE_MAX && before > 0) {
            if (mtl_is_pair(t, before - 1, "+", "+") || mtl_is_pair(t, before - 1, "-", "-")) return true;
            if (mtl_is(t, before, "&") && !mtl_is(t, before - 1, "&")) return true; /* a & b too, to be sure */
        }
        while (mtl_is(t, behind, ".") || mtl_is(t, behind, "[")) {
            if (mtl_is(t, behind, "[")) break; /* what a pointer points to */
            behind = mtl_after(t, mtl_after(t, behind));
        }
        if (mtl_is_assignment(t, behind)) return true;
    }
    return false;
}

/* Behind the bracket that closes the one at `i`; t->count where none does. Brackets of the other kinds nest. */
size_t mtl_behind_bracket(const translation *t, size_t i) {
    long depth = 0;
    for (; i < t->count; i = mtl_after(t, i)) {
        if (mtl_is(t, i, "(") || mtl_is(t, i, "[") || mtl_is(t, i, "{")) depth++;
        if ((mtl_is(t, i, ")") || mtl_is(t, i, "]") || mtl_is(t, i, "}")) && --depth == 0) return mtl_after(t, i);
    }
    return t->count;
}

size_t mtl_opening_bracket(const translation *t, size_t i) {
    long depth = 0;
    for (; i != SIZE_MAX; i = mtl_before(t, i)) {
        if (mtl_is(t, i, ")") || mtl_is(t, i, "]") || mtl_is(t, i, "}")) depth++;
        if ((mtl_is(t, i, "(") || mtl_is(t, i, "[") || mtl_is(t, i, "{")) && --depth == 0) return i;
    }
    return SIZE_MAX;
}

/* Behind the > that closes the < at `i`, or `i` where it opens no list of template arguments. */
size_t mtl_behind_angle(const translation *t, size_t i) {
    long depth = 0;
    for (size_t at = i; at < t->count;) {
        if (mtl_is(t, at, "<")) depth++;
        if (mtl_is(t, at, ">") && --depth == 0) return mtl_after(t, at);
        if (mtl_is(t, at, ";") || mtl_is(t, at, "{") || mtl_is(t, at, "}") || mtl_is(t, at, ")") || mtl_is(t, at, "]"))
            return i;
        at = mtl_is(t, at, "(") || mtl_is(t, at, "[") ? mtl_behind_bracket(t, at) : mtl_after(t, at);
    }
    return i;
}

size_t mtl_opening_angle(const translation *t, size_t i) {
    static const char *const ends[] = {";", "{", "}", NULL};
    long depth = 0;
    for (; i != SIZE_MAX && !mtl_is_one_of(t, i, ends); i = mtl_before(t, i)) {
        if (mtl_is(t, i, ")") || mtl_is(t, i, "]")) i = mtl_opening_bracket(t, i);
        if (mtl_is(t, i, ">")) depth++;
        if (mtl_is(t, i, "<") && --depth == 0) return i;
    }
    return SIZE_MAX;
}

/* The class whose members the token at `i` is among, by name; SIZE_MAX where there is none. */
static size_t class_around(const translation *t, size_t i) {
    static const char *const ends[] = {";", "}", "{", NULL};
    size_t open = i;
    long depth = 0;
    for (open = mtl_before(t, open); open != SIZE_MAX; open = mtl_before(t, open)) {
        if (mtl_is(t, open, ")") || mtl_is(t, open, "]") || mtl_is(t, open, "}")) depth++;
        if ((mtl_is(t, open, "(") || mtl_is(t, open, "[") || mtl_is(t, open, "{")) && depth-- == 0) break;
    }
    if (open == SIZE_MAX || !mtl_is(t, open, "{")) return SIZE_MAX;
    for (size_t at = mtl_before(t, open); at != SIZE_MAX && !mtl_is_one_of(t, at, ends); at = mtl_before(t, at)) {
        if (mtl_is(t, at, "struct") || mtl_is(t, at, "class") || mtl_is(t, at, "union")) return mtl_after(t, at);
    }
    return SIZE_MAX;
}

bool mtl_qualifies_constructor(const translation *t, size_t i) {
    size_t before = mtl_before(t, i), behind = mtl_after(t, i);
    if (before == SIZE_MAX || !mtl_is(t, before, ")")) return false;
    if (mtl_is(t, behind, ":") || mtl_is(t, behind, "=")) return true;
    if (!mtl_is(t, behind, "{") && !mtl_is(t, behind, ";")) return false;
    size_t open = mtl_opening_bracket(t, before), name = open == SIZE_MAX ? open : mtl_before(t, open);
    size_t around = name == SIZE_MAX ? name : class_around(t, name);
    return around != SIZE_MAX && around < name && mtl_is_identifier(t, name) && mtl_is_identifier(t, around) &&
           mtl_is_named(&t->token[name], t->token[around].text, t->token[around].length);
}

void mtl_blank(translation *t, size_t i) { t->token[i].replacement = ""; }

/* Everything in [begin, end), newlines excepted: those are in tokens of space. */
void mtl_blank_range(translation *t, size_t begin, size_t end) {
    for (size_t i = begin; i < end && i < t->count; i++) {
        if (t->token[i].kind != MTL_TOKEN_SPACE) mtl_blank(t, i);
    }
}

void mtl_add_before(translation *t, size_t i, const char *text) {
    mtl_text joined = {0};
    mtl_text_format(&joined, "%s%s", text, t->token[i].before ? t->token[i].before : "");
    t->token[i].before = mtl_keep(t, &joined);
    mtl_text_free(&joined);
}

void mtl_add_behind(translation *t, size_t i, const char *text) {
    mtl_text joined = {0};
    mtl_text_format(&joined, "%s%s", t->token[i].behind ? t->token[i].behind : "", text);
    t->token[i].behind = mtl_keep(t, &joined);
    mtl_text_free(&joined);
}
