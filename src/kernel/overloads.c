/* Overloads that differ in address spaces alone. SPDX-License-Identifier: MIT
 *
 * Metal tells a device T * from a threadgroup T *, so that its sources have one function for each; to C++ both are a T *, and the
 * second of them a redefinition. Where two declarations of one scope read the same but for address spaces and the names of
 * parameters, they mean the same, and the later one is left out: functions, members (X() thread, X() device), specializations of
 * class templates for pointers; members that do to a copy of theirs what the others do. Those that do something else stay, and the
 * compiler refuses them. */
#include "kernel/translation.h"

#include <stdlib.h>
#include <string.h>

enum { DEEPEST_SCOPE = 16, MOST_RENAMED = 32 };

typedef struct declaration {
    size_t begin, end;                 /* its tokens */
    size_t parameters, parameters_end; /* the first brackets that are no template's */
    size_t scope, branch;              /* branch: of the preprocessor's conditions */
    size_t hash, head_hash; /* the same for declarations that read the same; of what stands before the body */
    size_t next, next_head; /* of those in one slot, from 1 */
    bool has_spaces;        /* address spaces are in it */
} declaration;

typedef struct overloads {
    translation *t;
    declaration *declarations;
    size_t count, capacity;
    size_t *slot, *head_slot, slots; /* by hash; of a power of two */
    size_t *branch;                  /* of each token */
    size_t scopes, marks;
} overloads;

/* ---- reading a declaration without its address spaces ------------------------------------------------------------------ */

typedef struct reader {
    const translation *t;
    size_t at, end;
    bool was_const; /* constant is a const, and several are one */
} reader;

static bool is_space(const translation *t, size_t i) {
    static const char *const spaces[] = {"device", "thread", "threadgroup", NULL};
    return mtl_is_one_of(t, i, spaces) || (mtl_is(t, i, "constant") && mtl_qualifies_constructor(t, i));
}

static bool is_const(const translation *t, size_t i) {
    return mtl_is(t, i, "const") || (mtl_is(t, i, "constant") && !is_space(t, i));
}

/* The next token that counts; r->end behind the last. */
static size_t read(reader *r) {
    static const char *const inlines[] = {"inline", "METAL_FUNC", NULL}; /* which say the same */
    while (r->at < r->end) {
        size_t i = r->at++;
        if (r->t->token[i].kind == MTL_TOKEN_SPACE || is_space(r->t, i) || mtl_is_one_of(r->t, i, inlines)) continue;
        bool is_another = r->was_const && is_const(r->t, i);
        r->was_const = is_const(r->t, i);
        if (!is_another) return i;
    }
    return r->end;
}

static bool are_same(const translation *t, size_t a, size_t b) {
    const mtl_token *x = &t->token[a], *y = &t->token[b];
    if (is_const(t, a)) return is_const(t, b);
    return x->kind == y->kind && x->length == y->length && memcmp(x->text, y->text, x->length) == 0;
}

/* ---- names of parameters, which may differ ----------------------------------------------------------------------------- */

typedef struct renaming {
    size_t from[MOST_RENAMED], to[MOST_RENAMED];
    int count;
} renaming;

static bool is_parameter(const translation *t, const declaration *d, size_t i) {
    static const char *const behind[] = {",", ")", "[", "=", NULL};
    if (i <= d->parameters || i >= d->parameters_end || !mtl_is_one_of(t, mtl_after(t, i), behind)) return false;
    size_t before = mtl_before(t, i);
    return mtl_is_identifier(t, before) || mtl_is(t, before, "*") || mtl_is(t, before, "&") || mtl_is(t, before, ">");
}

/* Whether token `a` of declaration `x` is for `x` what `b` is for `y`. */
static bool correspond(const translation *t, renaming *names, const declaration *x, size_t a, const declaration *y,
                       size_t b) {
    if (!mtl_is_identifier(t, a) || !mtl_is_identifier(t, b)) return are_same(t, a, b);
    for (int i = 0; i < names->count; i++) {
        bool from = are_same(t, names->from[i], a), to = are_same(t, names->to[i], b);
        if (from || to) return from && to;
    }
    if (!is_parameter(t, x, a) || !is_parameter(t, y, b)) return are_same(t, a, b);
    if (names->count == MOST_RENAMED) return false;
    names->from[names->count] = a;
    names->to[names->count++] = b;
    return true;
}

static bool read_the_same(const translation *t, const declaration *x, const declaration *y) {
    reader a = {.t = t, .at = x->begin, .end = x->end}, b = {.t = t, .at = y->begin, .end = y->end};
    renaming names = {.count = 0};
    for (;;) {
        size_t i = read(&a), j = read(&b);
        if (i == a.end || j == b.end) return i == a.end && j == b.end;
        if (!correspond(t, &names, x, i, y, j)) return false;
    }
}

/* A declaration that is simply there twice is a mistake, and the compiler's to report. */
static bool are_one_text(const translation *t, const declaration *x, const declaration *y) {
    size_t a = x->begin, b = y->begin;
    while (a < x->end && b < y->end && are_same(t, a, b) && mtl_is(t, a, "const") == mtl_is(t, b, "const")) {
        a = mtl_after(t, a);
        b = mtl_after(t, b);
    }
    return a >= x->end && b >= y->end;
}

/* Numbers the branches of the preprocessor's conditions: of declarations in different ones only one may be there. */
static bool find_branches(overloads *o) {
    static const char *const opening[] = {"if", "ifdef", "ifndef", NULL};
    const translation *t = o->t;
    size_t *outer = malloc((t->count + 1) * sizeof *outer), depth = 0, now = 0, branches = 0;
    for (size_t i = 0; outer && i < t->count; i++) {
        o->branch[i] = now;
        if (!t->token[i].directive || !mtl_is(t, i, "#")) continue;
        size_t name = mtl_after(t, i);
        if (mtl_is_one_of(t, name, opening)) {
            outer[depth++] = now;
            now = ++branches;
        } else if (mtl_is(t, name, "else") || mtl_is(t, name, "elif")) {
            now = ++branches;
        } else if (mtl_is(t, name, "endif")) {
            now = depth > 0 ? outer[--depth] : ++branches;
        }
    }
    free(outer);
    return outer != NULL;
}

/* ---- scopes ---------------------------------------------------------------------------------------------------------------- */

/* Where the members of a class or namespace that is declared at `i` open, or t->count. */
static size_t members_of(const translation *t, size_t i) {
    static const char *const specifiers[] = {"typedef", "inline", "static", "const", "constant", "constexpr", NULL};
    static const char *const keys[] = {"struct", "class", "union", "namespace", NULL};
    static const char *const with_arguments[] = {"alignas", "__attribute__", NULL};
    if (mtl_is(t, i, "template") && mtl_is(t, mtl_after(t, i), "<")) i = mtl_behind_angle(t, mtl_after(t, i));
    while (mtl_is_one_of(t, i, specifiers)) i = mtl_after(t, i);
    if (!mtl_is_one_of(t, i, keys)) return t->count;
    for (i = mtl_after(t, i); i < t->count; i = mtl_after(t, i)) {
        while (mtl_is_one_of(t, i, with_arguments)) i = mtl_behind_bracket(t, mtl_after(t, i));
        if (mtl_is(t, i, "{")) return i;
        if (mtl_is(t, i, "(") || mtl_is(t, i, ";") || mtl_is(t, i, "=") || mtl_is(t, i, "}")) return t->count;
    }
    return t->count;
}

static bool is_initializer(const translation *t, size_t i) {
    int longest = 3; /* <<= */
    for (i = mtl_before(t, i); i != SIZE_MAX && t->token[i].kind == MTL_TOKEN_PUNCTUATION; i = mtl_before(t, i)) {
        static const char *const operators[] = {"=", "!", "<", ">", "+", "-", "*", "/", "%", "&", "|", "^", NULL};
        if (--longest < 0 || !mtl_is_one_of(t, i, operators)) return true;
    }
    return !mtl_is(t, i, "operator");
}

/* Behind the declaration, or the statement, that begins at d->begin. */
static size_t behind_declaration(const translation *t, declaration *d, size_t end, bool is_class) {
    bool initialized = false;
    for (size_t at = d->begin; at < end;) {
        if (t->token[at].directive) {
            at = mtl_after(t, at);
        } else if (mtl_is(t, at, "template") && mtl_is(t, mtl_after(t, at), "<")) {
            size_t open = mtl_after(t, at), behind = mtl_behind_angle(t, open);
            at = behind > open ? behind : mtl_after(t, open);
        } else if (mtl_is(t, at, ";") || mtl_is(t, at, "}")) {
            return mtl_after(t, at);
        } else if (mtl_is(t, at, "(") || mtl_is(t, at, "[")) {
            size_t behind = mtl_behind_bracket(t, at);
            if (d->parameters_end == 0 && mtl_is(t, at, "(")) {
                d->parameters = at;
                d->parameters_end = behind;
            }
            at = behind;
        } else if (mtl_is(t, at, "{")) {
            size_t behind = mtl_behind_bracket(t, at);
            /* Behind a constructor's a{1} there is another, or the body. */
            if (!is_class && !initialized && !mtl_is(t, behind, ",") && !mtl_is(t, behind, "{")) return behind;
            at = behind;
        } else {
            initialized |= mtl_is(t, at, "=") && is_initializer(t, at);
            at = mtl_after(t, at);
        }
    }
    return end;
}

/* What the token at `i` adds to a hash. Names that may be those of parameters, which may differ, are all alike: in the brackets of
 * the parameters, before `next`, the next token that is read, and from then on. */
static size_t hash_of(overloads *o, const declaration *d, size_t i, size_t next) {
    static const char *const behind[] = {",", ")", "[", "=", NULL};
    const translation *t = o->t;
    if (is_const(t, i)) return 1;
    if (mtl_is_identifier(t, i)) {
        mtl_word *word = mtl_word_at(t, i);
        if (i > d->parameters && i < d->parameters_end && mtl_is_one_of(t, next, behind)) word->mark = o->marks;
        return word->mark == o->marks ? 2 : 3 + t->link[i].word;
    }
    size_t hash = 0;
    for (size_t at = 0; at < t->token[i].length; at++) hash = hash * 257 + (unsigned char)t->token[i].text[at];
    return hash;
}

static void measure(overloads *o, declaration *d) {
    const translation *t = o->t;
    reader r = {.t = t, .at = d->begin, .end = d->end};
    size_t body = d->parameters_end ? d->parameters_end : d->end;
    while (body < d->end && !mtl_is(t, body, "{")) body = mtl_after(t, body);
    for (size_t i = d->begin; i < d->end; i++) d->has_spaces |= is_space(t, i) || mtl_is(t, i, "constant");
    o->marks++;
    d->hash = (d->scope * (1099511628211u & SIZE_MAX)) ^ d->branch; /* only those of one place are compared */
    size_t i = read(&r);
    while (i < r.end) {
        size_t next = read(&r);
        d->hash = (d->hash ^ hash_of(o, d, i, next)) * (1099511628211u & SIZE_MAX);
        if (i < body) d->head_hash = d->hash;
        i = next;
    }
}

/* T f(U x) device const { return X(*this).f(x); }   where the brace is, or d->end: what is done to a copy in thread memory is what
 * the member without an address space does. */
static size_t body_on_a_copy(const translation *t, const declaration *d) {
    size_t body = d->parameters_end;
    if (!d->has_spaces || !d->parameters_end) return d->end;
    while (body < d->end && !mtl_is(t, body, "{") && !mtl_is(t, body, ":")) body = mtl_after(t, body);
    if (!mtl_is(t, body, "{")) return d->end;
    for (size_t i = body; i < d->end; i = mtl_after(t, i)) {
        size_t copied = mtl_after(t, mtl_after(t, i));
        if ((mtl_is(t, i, "(") || mtl_is(t, i, "{")) && mtl_is(t, mtl_after(t, i), "*") && mtl_is(t, copied, "this") &&
            mtl_is_identifier(t, mtl_before(t, i)))
            return body;
    }
    return d->end;
}

static bool is_done_already(const overloads *o, const declaration *d) {
    const translation *t = o->t;
    declaration head = *d;
    head.end = body_on_a_copy(t, d);
    if (head.end == d->end) return false;
    for (size_t at = o->head_slot[d->head_hash & (o->slots - 1)]; at; at = o->declarations[at - 1].next_head) {
        declaration other = o->declarations[at - 1];
        if (other.head_hash != d->head_hash || other.scope != d->scope || other.branch != d->branch ||
            !other.parameters_end)
            continue;
        size_t body = other.parameters_end;
        while (body < other.end && !mtl_is(t, body, "{")) body = mtl_after(t, body);
        other.end = body;
        if (read_the_same(t, &other, &head) && !are_one_text(t, &other, &head)) return true;
    }
    return false;
}

/* `*known`: a declaration that reads the same stands for it from now on. */
static bool is_there_already(const overloads *o, const declaration *d, bool *known) {
    for (size_t at = o->slot[d->hash & (o->slots - 1)]; at; at = o->declarations[at - 1].next) {
        const declaration *other = &o->declarations[at - 1];
        if (other->hash != d->hash || other->scope != d->scope || other->branch != d->branch) continue;
        if (!read_the_same(o->t, other, d)) continue;
        *known = true;
        return (other->has_spaces || d->has_spaces) && !are_one_text(o->t, other, d);
    }
    return false;
}

static void remember(overloads *o, declaration *d) {
    if (o->count == o->capacity) {
        size_t capacity = o->capacity ? 2 * o->capacity : 32;
        declaration *grown = realloc(o->declarations, capacity * sizeof *grown);
        if (!grown) {
            o->t->failed = true;
            return;
        }
        o->declarations = grown;
        o->capacity = capacity;
    }
    size_t *slot = &o->slot[d->hash & (o->slots - 1)], *head_slot = &o->head_slot[d->head_hash & (o->slots - 1)];
    d->next = *slot;
    d->next_head = *head_slot;
    o->declarations[o->count++] = *d;
    *slot = *head_slot = o->count;
}

/* As if it were blanks; its lines stay. */
static void leave_out(translation *t, const declaration *d) {
    size_t before = mtl_before(t, d->begin);
    for (size_t i = d->begin; i < d->end; i++) {
        t->token[i].kind = MTL_TOKEN_SPACE;
        mtl_blank(t, i);
        t->link[i].after = d->end;
    }
    for (size_t i = d->begin; i <= d->end; i++) t->link[i].before = before;
    if (before != MTL_NONE) t->link[before].after = d->end; /* the spaces between them wait for the end */
}

/* Statements are not declarations: only the classes among them are looked into. */
static void go_through(overloads *o, size_t at, size_t end, bool statements, int depth) {
    static const char *const labels[] = {"public", "private", "protected", NULL};
    translation *t = o->t;
    size_t scope = o->scopes++;
    while (at < end && !t->failed) {
        if (t->token[at].directive || (mtl_is_one_of(t, at, labels) && mtl_is(t, mtl_after(t, at), ":"))) {
            at = mtl_after(t, at);
            if (mtl_is(t, at, ":")) at = mtl_after(t, at);
            continue;
        }
        declaration d = {.begin = at, .scope = scope, .branch = o->branch[at]};
        size_t members = members_of(t, at);
        bool is_namespace = members < end && mtl_is(t, at, "namespace"), known = false;
        d.end = behind_declaration(t, &d, end, members < end && !is_namespace);
        if (members < d.end && depth < DEEPEST_SCOPE) {
            size_t close = mtl_before(t, mtl_behind_bracket(t, members));
            if (close > members) go_through(o, mtl_after(t, members), close, false, depth + 1);
        }
        if (!statements && !is_namespace) {
            measure(o, &d);
            if (is_there_already(o, &d, &known) || is_done_already(o, &d)) leave_out(t, &d);
            else if (!known) remember(o, &d);
        }
        at = d.end;
    }
}

void mtl_leave_out_overloads(translation *t) {
    overloads o = {.t = t, .slots = 8, .scopes = 1, .marks = t->count}; /* others' marks are numbers of tokens */
    while (o.slots < t->count / 8) o.slots *= 2;
    o.slot = calloc(o.slots, sizeof *o.slot);
    o.head_slot = calloc(o.slots, sizeof *o.head_slot);
    o.branch = malloc((t->count + 1) * sizeof *o.branch);
    if (!o.slot || !o.head_slot || !o.branch || !find_branches(&o)) t->failed = true;
    else go_through(&o, mtl_after(t, SIZE_MAX), t->count, t->region == MTL_REGION_BODY, 0);
    mtl_find_neighbours(t);
    free(o.declarations);
    free(o.slot);
    free(o.head_slot);
    free(o.branch);
}
