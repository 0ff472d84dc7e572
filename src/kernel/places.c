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

/* Whether the token is the name in a call at which lanes meet; `*open` is its parenthesis. */
static bool is_meeting(const translation *t, size_t i, size_t *open) {
    const mtl_token *token = &t->token[i];
    if (token->kind != MTL_TOKEN_IDENTIFIER || !mtl_word_at(t, i)->meets) return false;
    *open = mtl_after(t, i);
    if (mtl_is(t, *open, "<")) *open = mtl_behind_angle(t, *open);
    return mtl_is(t, *open, "(");
}

bool mtl_is_statement_macro(const translation *t, size_t i) {
    static const char *const ends[] = {";", "{", "}", ")", "else", "do", NULL};
    static const char *const statements[] = {"if", "for", "while", "switch", "catch", NULL};
    size_t open = mtl_after(t, i), before = mtl_before(t, i);
    if (!mtl_is_identifier(t, i) || t->token[i].directive || mtl_is_one_of(t, i, statements)) return false;
    if (!mtl_is(t, open, "(") || !mtl_is(t, mtl_behind_bracket(t, open), "{")) return false;
    if (before != SIZE_MAX && !mtl_is_one_of(t, before, ends)) return false;
    /* A body has no functions in it, but a class in it may: a constructor. The header's macros stand elsewhere then. */
    return mtl_word_at(t, i)->is_macro || t->region == MTL_REGION_BODY;
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

/* Adds the functions of `t` that have the call at `i` in their bodies. `seen`: brackets that were looked at. */
static bool add_callers(translation *t, size_t i, bool *seen, translation *const both[2], mtl_names *names) {
    for (size_t at = t->link[i].around, name; at != MTL_NONE && !seen[at]; at = t->link[at].around) {
        seen[at] = true;
        if (!mtl_is_body(t, at, &name) || name == SIZE_MAX || mtl_word_at(t, name)->meets) continue;
        const mtl_token *token = &t->token[name];
        mtl_name *grown = realloc(names->name, (names->count + 1) * sizeof *grown);
        if (!grown) return false;
        names->name = grown;
        names->name[names->count++] = (mtl_name){token->text, token->length};
        for (int of = 0; of < 2; of++) {
            mtl_word *word = mtl_find_word(both[of], token->text, token->length);
            if (word) word->meets = true;
        }
    }
    return true;
}

static bool add_callers_of(translation *t, const mtl_word *word, bool *seen, translation *const both[2],
                           mtl_names *names) {
    size_t open;
    for (size_t at = word->first_use; at < word->first_use + word->uses; at++) {
        if (is_meeting(t, t->use[at], &open) && !add_callers(t, t->use[at], seen, both, names)) return false;
    }
    return true;
}

/* From exchanges to the functions that make them, to those that call these, and so on: every call is looked at once. */
bool mtl_find_meeting(translation *header, translation *body, mtl_names *names) {
    translation *const both[2] = {header, body};
    bool *seen[2] = {calloc(header->count + 1, sizeof(bool)), calloc(body->count + 1, sizeof(bool))};
    bool done = seen[0] && seen[1];
    for (int of = 0; of < 2; of++) {
        for (size_t word = 1; done && word <= both[of]->words; word++) {
            if (both[of]->word[word].exchanges)
                done = add_callers_of(both[of], &both[of]->word[word], seen[of], both, names);
        }
    }
    for (size_t name = 0; done && name < names->count; name++) {
        for (int of = 0; of < 2 && done; of++) {
            const mtl_word *word = mtl_find_word(both[of], names->name[name].text, names->name[name].length);
            done = !word || add_callers_of(both[of], word, seen[of], both, names);
        }
    }
    free(seen[0]);
    free(seen[1]);
    return done;
}

static bool is_meeting_call(const translation *t, size_t i) {
    size_t open;
    return is_meeting(t, i, &open);
}

/* What tokens are in: how many marked loops, those of the function alone; and which function, as its bracket. `meetings`: how many
 * calls at which lanes meet stand before each token. */
#define UNKNOWN (SIZE_MAX - 1)
typedef struct surroundings {
    long *loops;
    size_t *body, *meetings, *begin; /* begin: of the expression that ends with the name of a call */
} surroundings;

static bool any_meeting(const surroundings *around, size_t begin, size_t end) {
    return begin < end && around->meetings[end] > around->meetings[begin];
}

static void mark_loop(translation *t, size_t i, long loops, const surroundings *around) {
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
    if (body >= t->count || !any_meeting(around, body, end)) return;
    mtl_text_format(&mark, " if (__mtl_loop(%ld, %zu)); else ", loops, t->first_place + i);
    mtl_add_behind(t, mtl_before(t, body), mtl_keep(t, &mark));
    mtl_text_free(&mark);
    around->loops[body]++;
    around->loops[end]--;
}

/* The beginning of the expression that ends with the name at `i`: a::b.c[1].name */
static size_t postfix_begin(const translation *t, size_t i, const surroundings *around) {
    for (;;) {
        if (around->begin[i] != UNKNOWN) return around->begin[i];
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

static void mark_call(translation *t, size_t i, size_t open, long loops, const surroundings *around) {
    static const char *const before_expressions[] = {"return", "else", "case", "do", NULL};
    size_t begin = postfix_begin(t, i, around), behind = mtl_behind_bracket(t, open);
    around->begin[i] = begin;
    if (begin == SIZE_MAX || (behind >= t->count && !mtl_is(t, mtl_before(t, behind), ")"))) return;
    size_t before = mtl_before(t, begin);
    if (before != SIZE_MAX && !mtl_is_one_of(t, before, before_expressions) &&
        (mtl_is_identifier(t, before) || mtl_is(t, before, ">") || mtl_is(t, before, "*") || mtl_is(t, before, "&"))) {
        /* A declaration, or an operator: a > f(x) is as good with its mark left out as T f(x) is wrong with one. */
        if (mtl_is_identifier(t, before) || mtl_is(t, before, ">")) return;
    }
    mtl_text mark = {0};
    mtl_text_format(&mark, "(__mtl_at(%ld, %zu), ", loops, t->first_place + i);
    mtl_add_before(t, begin, mtl_keep(t, &mark));
    mtl_text_free(&mark);
    mtl_add_behind(t, mtl_before(t, behind), ")");
}

static void mark_body(translation *t, size_t i, size_t name, const surroundings *around) {
    if (!any_meeting(around, i, mtl_behind_bracket(t, i))) return;
    mtl_add_behind(t, i, " __mtl_frame __mtl_here; ");
    if (name == SIZE_MAX) return;
    /* Which no constexpr function can have. */
    for (size_t at = mtl_before(t, name);
         at != SIZE_MAX && !mtl_is(t, at, ";") && !mtl_is(t, at, "}") && !mtl_is(t, at, "{") && !mtl_is(t, at, "=");
         at = mtl_before(t, at)) {
        if (mtl_is(t, at, "constexpr")) mtl_blank(t, at);
    }
}

static void mark_places(translation *t, const surroundings *around) {
    size_t name, open, body = MTL_NONE;
    long loops = 0;
    for (size_t i = 0; i < t->count; i++) { /* a change of the number, made behind its head, becomes the number */
        loops += around->loops[i];
        around->loops[i] = loops;
        if (t->token[i].directive) continue;
        if (mtl_is(t, i, "for") || mtl_is(t, i, "while") || mtl_is(t, i, "do") || mtl_is_statement_macro(t, i))
            mark_loop(t, i, loops, around);
    }
    for (size_t i = 0; i < t->count; i++) {
        while (body != MTL_NONE && mtl_behind_bracket(t, body) <= i)
            body = around->body[body]; /* to the one around it */
        around->body[i] = body;
        if (t->token[i].directive || !mtl_is_body(t, i, &name)) continue;
        mark_body(t, i, name, around);
        body = i;
    }
    for (size_t i = 0; i < t->count; i++) {
        bool code = t->region == MTL_REGION_BODY || around->body[i] != MTL_NONE || t->token[i].directive;
        /* A function's own levels begin with it. */
        long outside = around->body[i] == MTL_NONE ? 0 : around->loops[around->body[i]];
        if (code && is_meeting(t, i, &open)) mark_call(t, i, open, around->loops[i] - outside, around);
    }
}

void mtl_mark_places(translation *t) {
    const mtl_names *meeting = t->options->meeting;
    for (size_t i = 0; i < meeting->count; i++) {
        mtl_word *word = mtl_find_word(t, meeting->name[i].text, meeting->name[i].length);
        if (word) word->meets = true;
    }
    surroundings around = {calloc(t->count + 1, sizeof *around.loops), calloc(t->count + 1, sizeof *around.body),
                           mtl_count(t, is_meeting_call), malloc((t->count + 1) * sizeof *around.begin)};
    t->failed |= !around.loops || !around.body || !around.meetings || !around.begin;
    for (size_t i = 0; i <= t->count && !t->failed; i++) around.begin[i] = UNKNOWN;
    if (!t->failed) mark_places(t, &around);
    free(around.loops);
    free(around.body);
    free(around.meetings);
    free(around.begin);
}
