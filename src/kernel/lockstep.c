/* The body of a kernel whose threads meet, as loops over the lanes of a simdgroup. SPDX-License-Identifier: MIT
 *
 * Between two places at which lanes meet a body is a region: a loop over 32 lanes. What a lane declares outlives its
 * region in an array of 32. Statements around a meeting place become statements of the simdgroup, with a mask of the
 * lanes that are in them, as on a GPU; statements without one stay as they are, within a region:
 *
 *     float s = f(x);              each lane { s[lane] = f(x); ask[lane] = s[lane] * s[lane]; }
 *     s = simd_sum(s * s);         exchange(on)
 *     if (s > 1) t = simd_max(t);  each lane { s[lane] = asked[lane]; then |= (s[lane] > 1) << lane; } on &= then; ...
 *
 * What a declaration makes of a type is left to the compiler: a lambda that is never called contains it, and returns
 * what decltype says. Values that are the same for every lane (uint row = threadgroup_position_in_grid.x, never
 * assigned again) are declared once for all.
 *
 * This reads tokens, not C++: whatever it does not understand it refuses, and what it gets wrong in a type or a name
 * does not compile; threads then have a stack each (runtime_cpu.h). It has to be right where it compiles. The idea
 * is that of Karrenberg and Hack, Improving Performance of OpenCL on CPUs (2012), and of ISPC's masks. */
#include "kernel/translation.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_VARIABLES = 256, MOST_DECLARED = 16, MOST_LOOPS = 32, DEEPEST = 256, MOST_TEXT = 4 << 20 };

/* What every lane has one of: a variable of the body, or a parameter that it changes. `remade`: its declaration,
 * where every region can compute it anew; else lanes keep theirs in an array. */
typedef struct variable {
    const char *name;
    size_t length;
    mtl_word *word;       /* of its name; NULL: nothing in the text is called so */
    int hides, hidden_by; /* the ones before and behind it of that name, from 1 */
    int number, index;    /* index: among those that its statement declares */
    const char *remade;
} variable;

/* What differs from lane to lane in an expression that is never evaluated differently again: nothing, what follows
 * from a lane's number, or anything. */
typedef enum kind { UNIFORM, REMADE, KEPT } kind;

typedef struct call {
    size_t behind; /* where the text goes on; 0: none begins here */
    int number;
} call;

typedef struct lockstep {
    translation *t;
    const mtl_definition *definition;
    const mtl_mentions *mentions;
    mtl_text *out;
    mtl_text storage, region; /* of the region that is open: what stands before its loop, and in it */
    bool is_open, jumps;      /* jumps: to the end of the region, for a lane that leaves */
    int opened_at, label;     /* how many variables there were then */
    variable variables[MOST_VARIABLES];
    int variable_count;
    int loops[MOST_LOOPS], loop_count, if_depth;
    int number; /* the last one used in a name */
    call *calls;
    size_t *meetings; /* before each token */
    int depth;        /* of this file's functions that call each other */
    bool refused;
    bool moves, moved_by_lane; /* buffers that are moved are moved for all lanes at once; that was wrong */
    size_t pragma, pragma_end; /* before the next statement */
} lockstep;

static void refuse(lockstep *l) { l->refused = true; }

/* ---- what tokens say --------------------------------------------------------------------------------------------- */

/* Whether lanes meet in the call whose name is at `i`. */
static bool is_meeting(const translation *t, size_t i) {
    if (t->token[i].kind != MTL_TOKEN_IDENTIFIER) return false;
    if (!mtl_word_at(t, i)->exchanges && !mtl_is(t, i, "threadgroup_barrier")) return false;
    size_t open = mtl_after(t, i);
    return mtl_is(t, open, "(") || mtl_is(t, open, "<");
}

static bool any_meeting(const lockstep *l, size_t begin, size_t end) {
    return begin < end && l->meetings[end] > l->meetings[begin];
}

static const variable *find_variable(const lockstep *l, size_t i) {
    int top = mtl_is_identifier(l->t, i) ? mtl_word_at(l->t, i)->top : 0;
    return top ? &l->variables[top - 1] : NULL;
}

/* ---- writing ----------------------------------------------------------------------------------------------------- */

/* Tokens [begin, end), with the results of calls that were made before in their place. `renamed`: these get a
 * prefix, since the name itself will be that of the array's element. */
static void write(lockstep *l, mtl_text *out, size_t begin, size_t end, const variable *renamed, int renames) {
    const translation *t = l->t;
    for (size_t i = begin; i < end; i++) {
        const mtl_token *token = &t->token[i];
        if (l->calls[i].behind) {
            mtl_text_format(out, "__mtl_met_%d[__mtl_lane]", l->calls[i].number);
            i = l->calls[i].behind - 1;
            continue;
        }
        if (token->kind == MTL_TOKEN_SPACE) {
            mtl_text_add_string(out, memchr(token->text, '\n', token->length) ? "\n" : " ");
            continue;
        }
        size_t before = mtl_before(t, i);
        bool is_member = before != SIZE_MAX && (mtl_is(t, before, ".") || mtl_is(t, before, "->"));
        for (int r = 0; r < renames && token->kind == MTL_TOKEN_IDENTIFIER && !is_member; r++) {
            if (mtl_is_named(token, renamed[r].name, renamed[r].length)) mtl_text_add_string(out, "__mtl_new_");
        }
        mtl_write_token(out, token);
    }
}

static void open_region(lockstep *l) {
    if (l->is_open) return;
    l->is_open = true;
    l->jumps = false;
    l->opened_at = l->variable_count;
    l->label = ++l->number;
}

/* The loop over lanes in which `text` is done: by those that are on, or, `whole`, by all 32. */
static void add_lanes(lockstep *l, const char *text, int variables, bool whole) {
    mtl_text_format(l->out, " for (unsigned __mtl_lane = 0; __mtl_lane < 32; __mtl_lane++) {%s ",
                    whole ? "" : " if (!(__mtl_on >> __mtl_lane & 1)) continue;");
    mtl_lane_attributes(l->out, l->mentions, "__mtl_here.first + __mtl_lane");
    for (int i = 0; i < variables; i++) {
        const variable *v = &l->variables[i];
        if (v->hidden_by && v->hidden_by <= variables) continue;
        if (v->remade) mtl_text_add_string(l->out, v->remade);
        else
            mtl_text_format(l->out, "auto &%.*s = __mtl_of_%d_%d[__mtl_lane]; ", (int)v->length, v->name, v->number,
                            v->index);
    }
    mtl_text_add_string(l->out, "{ ");
    mtl_text_add_string(l->out, text);
    mtl_text_add_string(l->out, " }");
    if (l->out->length > MOST_TEXT) refuse(l); /* a compiler would take minutes */
    if (l->jumps) mtl_text_format(l->out, " __mtl_next_%d:;", l->label);
    mtl_text_add_string(l->out, " }\n");
}

static void close_region(lockstep *l) {
    mtl_text_add_string(l->out, mtl_text_string(&l->storage));
    l->out->failed |= l->storage.failed | l->region.failed;
    if (l->region.length) add_lanes(l, mtl_text_string(&l->region), l->opened_at, false);
    mtl_text_free(&l->storage);
    mtl_text_free(&l->region);
    l->is_open = false;
}

static void add_variable(lockstep *l, variable v) {
    if (l->variable_count == MOST_VARIABLES) {
        refuse(l);
        return;
    }
    v.word = mtl_find_word(l->t, v.name, v.length);
    l->variables[l->variable_count++] = v;
    if (!v.word) return;
    variable *added = &l->variables[l->variable_count - 1];
    added->hides = v.word->top;
    if (added->hides) l->variables[added->hides - 1].hidden_by = l->variable_count;
    v.word->top = l->variable_count;
}

/* Those of a block that ends. */
static void remove_variables(lockstep *l, int count) {
    while (l->variable_count > count) {
        const variable *last = &l->variables[--l->variable_count];
        if (last->hides) l->variables[last->hides - 1].hidden_by = 0;
        if (last->word) last->word->top = last->hides;
    }
}

/* ---- exchanges --------------------------------------------------------------------------------------------------- */

/* Makes the exchanges in an expression, inner ones first; what is left of it belongs to the region that is open
 * then. */
static void meet(lockstep *l, size_t begin, size_t end) {
    translation *t = l->t;
    if (++l->depth > DEEPEST) refuse(l);
    bool conditional = false;
    for (size_t i = begin; i < end && !l->refused; i++) {
        if (t->token[i].directive) refuse(l);
        conditional |= mtl_is(t, i, "?") || mtl_is_pair(t, i, "&", "&") || mtl_is_pair(t, i, "|", "|");
        if (!is_meeting(t, i)) continue;
        size_t open = mtl_after(t, i), behind = mtl_behind_bracket(t, open), first = i;
        size_t before = mtl_before(t, i);
        if (before != SIZE_MAX && before >= begin && mtl_is(t, before, "::")) {
            first = mtl_before(t, before);
            if (first == SIZE_MAX || first < begin || !mtl_is(t, first, "metal")) refuse(l);
        } else if (before != SIZE_MAX && (mtl_is(t, before, ".") || mtl_is(t, before, "->"))) {
            refuse(l);
        }
        /* Part of the lanes might not evaluate it; barriers are no expressions. */
        if (conditional || !mtl_is(t, open, "(") || mtl_is(t, i, "threadgroup_barrier") ||
            mtl_is(t, i, "simdgroup_barrier"))
            refuse(l);
        if (l->refused) return;
        size_t close = mtl_before(t, behind);
        meet(l, open + 1, close);
        if (l->refused) return;
        open_region(l);
        int number = ++l->number;
        mtl_text request = {0};
        mtl_text_format(&request, "metal::meet::%.*s(", (int)t->token[i].length, t->token[i].text);
        write(l, &request, open + 1, close, NULL, 0);
        mtl_text_add_string(&request, ")");
        mtl_text_format(&l->storage, " __mtl_meeting<decltype(%s)> __mtl_met_%d;", mtl_text_string(&request), number);
        mtl_text_format(&l->region, " __mtl_met_%d.ask(__mtl_lane, %s);", number, mtl_text_string(&request));
        l->region.failed |= request.failed;
        mtl_text_free(&request);
        close_region(l);
        mtl_text_format(l->out, " __mtl_met_%d.exchange(__mtl_on); __mtl_turn(__mtl_group);", number);
        l->calls[first] = (call){close + 1, number};
        i = close;
    }
    l->depth--;
}

/* ---- declarations ------------------------------------------------------------------------------------------------ */

static bool is_specifier(const translation *t, size_t i) {
    static const char *const words[] = {"const",       "volatile", "static", "device", "constant", "thread",
                                        "threadgroup", "typename", "struct", "inline", NULL};
    return mtl_is_one_of(t, i, words);
}

static bool is_builtin_type(const translation *t, size_t i) {
    static const char *const words[] = {"bool", "char", "short", "int", "long", "unsigned", "signed", "float", NULL};
    return mtl_is_one_of(t, i, words);
}

/* The names that the statement [begin, end) declares, and where each one's declarator begins; 0: it is no
 * declaration. */
static int find_declared(const lockstep *l, size_t begin, size_t end, size_t names[MOST_DECLARED]) {
    static const char *const no_types[] = {"return", "goto",     "delete", "throw",  "case", "default",
                                           "break",  "continue", "else",   "if",     "for",  "while",
                                           "do",     "switch",   "new",    "sizeof", NULL};
    static const char *const ends[] = {"=", ";", ",", "[", "(", "{", NULL};
    static const char *const arguments_end[] = {"(", "::", "{", NULL};
    const translation *t = l->t;
    bool type = false;
    size_t at = begin;
    while (at < end) {
        if (is_specifier(t, at)) {
            at = mtl_after(t, at);
        } else if (mtl_is(t, at, "alignas")) {
            at = mtl_behind_bracket(t, mtl_after(t, at));
        } else if (is_builtin_type(t, at)) {
            type = true;
            at = mtl_after(t, at);
        } else if (!type && mtl_is(t, at, "decltype")) {
            type = true;
            at = mtl_behind_bracket(t, mtl_after(t, at));
        } else if (!type && mtl_is_identifier(t, at) && !mtl_is_one_of(t, at, no_types)) {
            type = true;
            at = mtl_after(t, at);
            for (;;) {
                size_t behind = mtl_is(t, at, "<") ? mtl_behind_angle(t, at) : at;
                if (behind > at) at = behind;
                else if (mtl_is(t, at, "::")) at = mtl_after(t, mtl_after(t, at));
                else break;
            }
        } else {
            break;
        }
    }
    int count = 0;
    while (type && at < end) {
        while (mtl_is(t, at, "*") || mtl_is(t, at, "&") || is_specifier(t, at)) at = mtl_after(t, at);
        if (!mtl_is_identifier(t, at) || !mtl_is_one_of(t, mtl_after(t, at), ends)) return 0;
        if (count == MOST_DECLARED) return 0;
        names[count++] = at;
        while (at < end && !mtl_is(t, at, ",") && !mtl_is(t, at, ";")) {
            size_t behind = mtl_is(t, at, "<") ? mtl_behind_angle(t, at) : at;
            if (behind > at && mtl_is_one_of(t, behind, arguments_end)) at = behind;
            else
                at = mtl_is(t, at, "(") || mtl_is(t, at, "[") || mtl_is(t, at, "{") ? mtl_behind_bracket(t, at)
                                                                                    : mtl_after(t, at);
        }
        if (!mtl_is(t, at, ",")) break;
        at = mtl_after(t, at);
    }
    return count;
}

/* Marks what names a variable in threadgroup memory: its declaration has become a type. */
static void find_shared(const translation *t) {
    static const char type[] = "__mtl_";
    for (size_t i = 0; i < t->count; i++) {
        const char *replacement = t->token[i].replacement;
        if (mtl_is_identifier(t, i) && replacement && strncmp(replacement, type, sizeof type - 1) == 0)
            mtl_word_at(t, i)->is_shared = true;
    }
}

/* Whether it names a buffer that the body changes by statements x += ...; outside of all brackets alone. */
static bool find_moved(const lockstep *l, const mtl_word *name) {
    const translation *t = l->t;
    bool found = false;
    for (size_t use = name->first_use; use < name->first_use + name->uses; use++) {
        size_t i = t->use[use], before = mtl_before(t, i), plus = mtl_after(t, i);
        if (t->link[i].around == MTL_NONE && mtl_is_pair(t, plus, "+", "=") &&
            (before == SIZE_MAX || mtl_is(t, before, ";") || mtl_is(t, before, "}")))
            found = true;
        else if (mtl_is_changed(t, i, i + 1, name->text, name->length)) return false;
    }
    return found;
}

static bool is_moved(const lockstep *l, size_t i) {
    return l->moves && mtl_is_identifier(l->t, i) && mtl_word_at(l->t, i)->is_moved;
}

/* What the tokens [begin, end) of an initializer say: no memory is read that could change, nothing is called that
 * could do anything. `own`: a name that does not count. */
static kind kind_of(const lockstep *l, size_t begin, size_t end, const mtl_token *own) {
    static const char *const pure[] = {"sizeof", "uint", "size_t", "min", "max", "ceildiv", NULL};
    static const char *const comparisons[] = {"=", "<", ">", "!", NULL};
    const translation *t = l->t;
    kind found = UNIFORM;
    bool moves = false, divides = false;
    for (size_t at = begin; at < end; at++) {
        const mtl_token *token = &t->token[at];
        size_t before = mtl_before(t, at), behind = mtl_after(t, at);
        if (l->calls[at].behind || token->directive) return KEPT;
        bool compares = mtl_is(t, at, "=") && at > begin && mtl_is_one_of(t, at - 1, comparisons);
        if (mtl_is(t, at, "[") || mtl_is(t, at, "->") || mtl_is(t, at, "&") || (!compares && mtl_is_assignment(t, at)))
            return KEPT;
        /* What a pointer points to, unless it is a product. */
        if (mtl_is(t, at, "*") && (at == begin || !(mtl_is_identifier(t, before) || mtl_is(t, before, ")") ||
                                                    t->token[before].kind == MTL_TOKEN_NUMBER)))
            return KEPT;
        /* Not worth to be done anew. */
        divides |=
            (mtl_is(t, at, "/") || mtl_is(t, at, "%")) && (behind >= end || t->token[behind].kind != MTL_TOKEN_NUMBER);
        if (token->kind != MTL_TOKEN_IDENTIFIER || (before != SIZE_MAX && mtl_is(t, before, "."))) continue;
        if (mtl_is(t, behind, "(") && !is_builtin_type(t, at) && !mtl_is_one_of(t, at, pure)) return KEPT;
        if (own && mtl_is_named(token, own->text, own->length)) continue;
        const variable *v = find_variable(l, at);
        if (mtl_word_at(t, at)->is_shared || (v && !v->remade)) return KEPT;
        if (v || mtl_is_lane_attribute(token)) found = REMADE;
        moves |= is_moved(l, at);
    }
    return found == REMADE && (moves || divides) ? KEPT : found; /* moves: the buffer may move on */
}

/* Declares the names with the type [type, type_end) and the declarators [begin, end). */
static void declare(lockstep *l, size_t type, size_t type_end, size_t begin, size_t end, const size_t *names,
                    int count) {
    static const char *const spaces[] = {"device", "constant", "threadgroup", "thread", NULL};
    translation *t = l->t;
    variable declared[MOST_DECLARED];
    int number = ++l->number;
    bool has_space = false, is_reference = false;
    if (count < 1) return;
    for (size_t i = type; i < end; i++) {
        if (t->token[i].directive) refuse(l);
        has_space |= mtl_is_one_of(t, i, spaces);
    }
    for (int i = 0; i < count; i++) {
        declared[i] = (variable){
            .name = t->token[names[i]].text, .length = t->token[names[i]].length, .number = number, .index = i};
        is_reference |= mtl_is(t, mtl_before(t, names[i]), "&");
    }
    if (is_reference && !has_space) refuse(l); /* it may be to a value that ends with its region */
    mtl_text text = {0};
    write(l, &text, type, type_end, NULL, 0);
    mtl_text_add_string(&text, " ");
    write(l, &text, begin, end, declared, count);
    mtl_text_add_string(&text, ";");
    open_region(l);

    const variable *first = &declared[0];
    size_t equals = mtl_after(t, names[0]);
    kind found = count > 1 || is_reference || !mtl_is(t, equals, "=") || find_variable(l, names[0]) ||
                         mtl_is(t, type, "static") || mtl_is_changed(t, equals, t->count, first->name, first->length)
                     ? KEPT
                     : kind_of(l, equals + 1, end, NULL);
    if (found != KEPT) {
        mtl_text_format(&text, " const auto &%.*s = __mtl_new_%.*s; ", (int)first->length, first->name,
                        (int)first->length, first->name);
        mtl_text_format(&l->storage, " %s", mtl_text_string(&text));
        declared[0].remade = mtl_keep(t, &text);
        if (found == REMADE) {
            mtl_text_format(&l->region, " %s", mtl_text_string(&text));
            add_variable(l, declared[0]);
        }
        mtl_text_free(&text);
        return;
    }
    const char *written = mtl_text_string(&text);
    mtl_text_format(&l->storage, " auto __mtl_types_%d = [&] { %s return __mtl_types<", number, written);
    for (int i = 0; i < count; i++)
        mtl_text_format(&l->storage, "%sdecltype(__mtl_new_%.*s)", i ? ", " : "", (int)declared[i].length,
                        declared[i].name);
    mtl_text_add_string(&l->storage, ">(); };");
    mtl_text_format(&l->region, " %s", written);
    for (int i = 0; i < count; i++) {
        const variable *v = &declared[i];
        mtl_text_format(&l->storage,
                        " __mtl_lanes<__mtl_type_at<%d, decltype(__mtl_types_%d())>> __mtl_of_%d_%d;"
                        " auto &%.*s = __mtl_of_%d_%d[0];",
                        i, number, number, i, (int)v->length, v->name, number, i);
        mtl_text_format(&l->region, " auto &%.*s = __mtl_of_%d_%d.keep(__mtl_lane, __mtl_new_%.*s);", (int)v->length,
                        v->name, number, i, (int)v->length, v->name);
        add_variable(l, *v);
    }
    l->region.failed |= text.failed;
    mtl_text_free(&text);
}

/* T a = 1, b = a + c; as T a = 1; T b = a + c; which are told apart then. */
static void declare_all(lockstep *l, size_t begin, size_t behind, const size_t *names, int count) {
    const translation *t = l->t;
    size_t end = mtl_before(t, behind), before = mtl_before(t, names[0]);
    bool plain = !mtl_is(t, before, "*") && !mtl_is(t, before, "&");
    for (int i = 1; i < count; i++) plain &= mtl_is(t, mtl_before(t, names[i]), ",");
    if (!plain) {
        declare(l, begin, names[0], names[0], end, names, count);
        return;
    }
    for (int i = 0; i < count; i++)
        declare(l, begin, names[0], names[i], i + 1 < count ? mtl_before(t, names[i + 1]) : end, &names[i], 1);
}

/* ---- statements -------------------------------------------------------------------------------------------------- */

/* Where the lambdas, loops and switches that were seen in a statement end: the last of each kind. */
typedef struct inner_ends {
    size_t lambda, loop, choice;
} inner_ends;

static void look_into(const translation *t, size_t i, inner_ends *ends) {
    size_t name, behind = mtl_behind_statement(t, i);
    bool is_loop = mtl_is(t, i, "for") || mtl_is(t, i, "while") || mtl_is(t, i, "do");
    if (mtl_is_body(t, i, &name) && mtl_behind_bracket(t, i) > ends->lambda) ends->lambda = mtl_behind_bracket(t, i);
    if (is_loop && behind > ends->loop) ends->loop = behind;
    if (mtl_is(t, i, "switch") && behind > ends->choice) ends->choice = behind;
}

/* x += row * N; which moves a buffer for every lane alike. */
static bool add_move(lockstep *l, size_t begin, size_t end) {
    const translation *t = l->t;
    size_t plus = mtl_after(t, begin), semicolon = mtl_before(t, end);
    if (!is_moved(l, begin) || !mtl_is_pair(t, plus, "+", "=")) return false;
    if (kind_of(l, plus + 2, semicolon, NULL) != UNIFORM) {
        l->moved_by_lane = true;
        refuse(l);
        return true;
    }
    close_region(l);
    mtl_text_format(l->out, " __mtl_moved_%.*s ", (int)t->token[begin].length, t->token[begin].text);
    write(l, l->out, plus, end, NULL, 0);
    return true;
}

/* for (T i = a; i < b; i += c) statement   with the same b and c for all lanes, and a that follows from a lane's
 * number: all lanes do an iteration, then the next one, so that neighbours read and write neighbouring elements, in
 * vectors. */
static bool add_strided_loop(lockstep *l, size_t begin, size_t behind) {
    static const char *const others[] = {"for",    "while",    "do",   "switch", "break",
                                         "return", "continue", "goto", "asm",    NULL};
    static const char *const integers[] = {"int",    "uint",    "unsigned", "long",      "ulong",
                                           "size_t", "int32_t", "uint32_t", "ptrdiff_t", NULL};
    translation *t = l->t;
    size_t open = mtl_after(t, begin), body = mtl_behind_bracket(t, open), close = mtl_before(t, body);
    size_t names[MOST_DECLARED] = {0}, ends[2] = {0}, found = 0;
    if (!mtl_is(t, begin, "for")) return false;
    for (size_t at = open; at < close; at++) {
        if (mtl_is(t, at, ";") && found++ < 2) ends[found - 1] = at;
    }
    if (found != 2 || find_declared(l, mtl_after(t, open), ends[0] + 1, names) != 1) return false;
    const mtl_token *name = &t->token[names[0]];
    size_t equals = mtl_after(t, names[0]), step = mtl_after(t, ends[1]);
    /* Floats would be rounded otherwise. */
    if (!mtl_is(t, equals, "=") || mtl_after(t, mtl_after(t, open)) != names[0] ||
        !mtl_is_one_of(t, mtl_after(t, open), integers))
        return false;
    if (kind_of(l, equals + 1, ends[0], NULL) != REMADE || kind_of(l, ends[0] + 1, ends[1], name) != UNIFORM)
        return false;
    if (!mtl_is_named(&t->token[step], name->text, name->length) || !mtl_is_pair(t, mtl_after(t, step), "+", "=") ||
        kind_of(l, mtl_after(t, step) + 2, close, NULL) != UNIFORM)
        return false;
    if (mtl_is_changed(t, body, behind, name->text, name->length)) return false;
    size_t nothing;
    for (size_t at = body; at < behind; at++) {
        if (mtl_is_one_of(t, at, others) || t->token[at].directive || mtl_is_body(t, at, &nothing)) return false;
    }
    close_region(l);
    l->jumps = false;
    mtl_text begun = {0}, condition = {0}, inner = {0}, text = {0};
    write(l, &begun, open + 1, ends[0], NULL, 0);
    mtl_text_format(&begun, "; %.*s += __mtl_k * (", (int)name->length, name->text);
    write(l, &begun, mtl_after(t, step) + 2, close, NULL, 0);
    mtl_text_add_string(&begun, ");");
    write(l, &condition, ends[0] + 1, ends[1], NULL, 0);
    write(l, &inner, body, behind, NULL, 0);
    const char *start = mtl_text_string(&begun), *stay = mtl_text_string(&condition), *work = mtl_text_string(&inner);
    int variables = l->variable_count;
    /* As long as all lanes are there no store is masked: what a masked one wrote is slow to come back. */
    mtl_text_add_string(l->out, " { unsigned char __mtl_live[32]; for (auto &__mtl_one : __mtl_live) __mtl_one = 1;"
                                " bool __mtl_whole = __mtl_on == ~0u; for (unsigned __mtl_k = 0;; __mtl_k++) {"
                                " if (__mtl_whole) { unsigned __mtl_all = 1, __mtl_any = 0;");
    mtl_text_format(&text, "%s unsigned __mtl_in = bool(%s); __mtl_all &= __mtl_in; __mtl_any |= __mtl_in;", start,
                    stay);
    add_lanes(l, mtl_text_string(&text), variables, true);
    mtl_text_add_string(l->out, " if (!__mtl_any) break; __mtl_whole = __mtl_all; } if (__mtl_whole) {");
    text.length = 0;
    mtl_text_format(&text, "%s %s", start, work);
    add_lanes(l, mtl_text_string(&text), variables, true);
    mtl_text_add_string(l->out, " continue; } unsigned __mtl_more = 0;");
    text.length = 0;
    mtl_text_format(&text,
                    "%s const unsigned char __mtl_in = __mtl_live[__mtl_lane] & (unsigned char)bool(%s);"
                    " __mtl_live[__mtl_lane] = __mtl_in; __mtl_more |= __mtl_in; if (__mtl_in) %s",
                    start, stay, work);
    add_lanes(l, mtl_text_string(&text), variables, false);
    mtl_text_add_string(l->out, " if (!__mtl_more) break; } }");
    l->out->failed |= begun.failed | condition.failed | inner.failed | text.failed;
    mtl_text_free(&begun);
    mtl_text_free(&condition);
    mtl_text_free(&inner);
    mtl_text_free(&text);
    return true;
}

/* A statement of single lanes, at which none meet. Where it leaves what stands around it, the lane's bits say so. */
static void add_leaf(lockstep *l, size_t begin, size_t end) {
    static const char leave[] = "__mtl_on &= ~(1u << __mtl_lane);";
    translation *t = l->t;
    if (add_move(l, begin, end) || add_strided_loop(l, begin, end)) return;
    open_region(l);
    if (l->pragma_end == begin) {
        mtl_text_add_string(&l->region, "\n");
        write(l, &l->region, l->pragma, begin, NULL, 0);
        mtl_text_add_string(&l->region, "\n");
    }
    inner_ends ends = {0};
    for (size_t i = begin; i < end; i++) {
        bool is_return = mtl_is(t, i, "return"), is_break = mtl_is(t, i, "break"), is_next = mtl_is(t, i, "continue");
        bool in_lambda = ends.lambda > i, in_loop = in_lambda || ends.loop > i, in_switch = in_loop || ends.choice > i;
        look_into(t, i, &ends);
        if (mtl_is(t, i, "goto") || ((mtl_is(t, i, "case") || mtl_is(t, i, "default")) && !in_switch)) refuse(l);
        if ((!is_return || in_lambda) && (!is_break || in_switch) && (!is_next || in_loop)) continue;
        mtl_text text = {0};
        if (is_return) {
            if (!mtl_is(t, mtl_after(t, i), ";")) refuse(l);
            mtl_text_format(&text, "do { __mtl_alive &= ~(1u << __mtl_lane); %s goto __mtl_next_%d; } while (0)", leave,
                            l->label);
        } else {
            int loop = l->loop_count ? l->loops[l->loop_count - 1] : 0;
            if (!loop) refuse(l);
            mtl_text_add_string(&text, "do { ");
            if (is_next) mtl_text_format(&text, "__mtl_again_%d |= 1u << __mtl_lane; ", loop);
            mtl_text_format(&text, "%s goto __mtl_next_%d; } while (0)", leave, l->label);
        }
        t->token[i].replacement = mtl_keep(t, &text);
        mtl_text_free(&text);
        l->jumps = true;
    }
    mtl_text_add_string(&l->region, " ");
    write(l, &l->region, begin, end, NULL, 0);
}

static size_t add_statement(lockstep *l, size_t i);

/* A statement of the simdgroup in braces. */
static size_t add_block(lockstep *l, size_t i) {
    int variables = l->variable_count;
    l->depth++;
    mtl_text_add_string(l->out, " {");
    size_t behind;
    if (mtl_is(l->t, i, "{")) {
        behind = mtl_behind_bracket(l->t, i);
        size_t close = mtl_before(l->t, behind);
        for (size_t at = mtl_after(l->t, i); at < close && !l->refused;) at = add_statement(l, at);
    } else {
        behind = add_statement(l, i);
    }
    close_region(l);
    mtl_text_add_string(l->out, " }");
    remove_variables(l, variables);
    l->depth--;
    return behind;
}

/* The lanes for which the expression holds, as the bits of `name`. */
static void add_condition(lockstep *l, size_t begin, size_t end, const char *name, int number) {
    meet(l, begin, end);
    open_region(l);
    mtl_text_format(&l->storage, " unsigned __mtl_%s_%d = 0;", name, number);
    mtl_text_add_string(&l->region, " if (");
    write(l, &l->region, begin, end, NULL, 0);
    mtl_text_format(&l->region, ") __mtl_%s_%d |= 1u << __mtl_lane;", name, number);
    close_region(l);
}

static size_t add_if(lockstep *l, size_t i) {
    translation *t = l->t;
    size_t open = mtl_after(t, i);
    bool is_constant = mtl_is(t, open, "constexpr");
    if (is_constant) open = mtl_after(t, open);
    size_t body = mtl_behind_bracket(t, open), close = mtl_before(t, body);
    for (size_t at = open; at < close; at++) {
        if (mtl_is(t, at, ";")) refuse(l);
    }
    if (is_constant) {
        close_region(l);
        mtl_text_add_string(l->out, " if constexpr (");
        write(l, l->out, open + 1, close, NULL, 0);
        mtl_text_add_string(l->out, ")");
        size_t behind = add_block(l, body);
        if (!mtl_is(t, behind, "else")) return behind;
        mtl_text_add_string(l->out, " else");
        return add_block(l, mtl_after(t, behind));
    }
    int number = ++l->number;
    add_condition(l, open + 1, close, "then", number);
    mtl_text_format(l->out,
                    " const unsigned __mtl_else_%d = __mtl_on & ~__mtl_then_%d; __mtl_on &= __mtl_then_%d;"
                    " if (__mtl_on)",
                    number, number, number);
    l->if_depth++;
    size_t behind = add_block(l, body);
    if (mtl_is(t, behind, "else")) {
        mtl_text_format(l->out, " __mtl_then_%d = __mtl_on; __mtl_on = __mtl_else_%d; if (__mtl_on)", number, number);
        behind = add_block(l, mtl_after(t, behind));
        mtl_text_format(l->out, " __mtl_on |= __mtl_then_%d;", number);
    } else {
        mtl_text_format(l->out, " __mtl_on |= __mtl_else_%d;", number);
    }
    l->if_depth--;
    return behind;
}

static size_t add_loop(lockstep *l, size_t i) {
    translation *t = l->t;
    int number = ++l->number, variables = l->variable_count;
    bool is_do = mtl_is(t, i, "do"), is_for = mtl_is(t, i, "for");
    size_t open = is_do ? SIZE_MAX : mtl_after(t, i);
    size_t body = is_do ? mtl_after(t, i) : mtl_behind_bracket(t, open);
    size_t close = is_do ? 0 : mtl_before(t, body), begin = open + 1, end = close, step = close;
    if (l->loop_count == MOST_LOOPS) refuse(l);
    if (l->refused) return t->count;
    close_region(l);
    mtl_text_add_string(l->out, " {");
    if (is_for) { /* its parts */
        size_t ends[2], found = 0;
        for (size_t at = mtl_after(t, open); at < close;) {
            if (mtl_is(t, at, ";")) {
                if (found < 2) ends[found] = at;
                found++;
            }
            at = mtl_is(t, at, "(") || mtl_is(t, at, "[") || mtl_is(t, at, "{") ? mtl_behind_bracket(t, at)
                                                                                : mtl_after(t, at);
        }
        if (found != 2 || any_meeting(l, open, ends[0]) || any_meeting(l, ends[1], close)) {
            refuse(l);
            return t->count;
        }
        if (mtl_after(t, open) < ends[0]) add_statement(l, mtl_after(t, open));
        begin = ends[0] + 1;
        end = ends[1];
        step = ends[1] + 1;
        close_region(l);
    }
    mtl_text_format(l->out, " const unsigned __mtl_all_%d = __mtl_on; unsigned __mtl_again_%d = 0; for (;;) {", number,
                    number);
    bool endless = is_for && mtl_after(t, begin - 1) >= end;
    if (!is_do && !endless) {
        add_condition(l, begin, end, "stay", number);
        mtl_text_format(l->out, " __mtl_on &= __mtl_stay_%d;", number);
    }
    mtl_text_add_string(l->out, " if (!__mtl_on) break;");
    l->loops[l->loop_count++] = number;
    size_t behind = add_block(l, body);
    l->loop_count--;
    mtl_text_format(l->out, " __mtl_on |= __mtl_again_%d; __mtl_again_%d = 0;", number, number);
    if (is_for && mtl_after(t, step - 1) < close) {
        open_region(l);
        mtl_text_add_string(&l->region, " ");
        write(l, &l->region, step, close, NULL, 0);
        mtl_text_add_string(&l->region, ";");
        close_region(l);
    }
    if (is_do) {
        size_t condition = mtl_is(t, behind, "while") ? mtl_after(t, behind) : t->count;
        if (!mtl_is(t, condition, "(")) {
            refuse(l);
            return t->count;
        }
        behind = mtl_behind_bracket(t, condition);
        add_condition(l, condition + 1, mtl_before(t, behind), "stay", number);
        mtl_text_format(l->out, " __mtl_on &= __mtl_stay_%d;", number);
        behind = mtl_after(t, behind); /* ; */
    }
    mtl_text_format(l->out, " } __mtl_on = __mtl_all_%d & __mtl_alive; }", number);
    remove_variables(l, variables);
    return behind;
}

/* A barrier as a statement of its own. Lanes of a simdgroup that come to different ones need a stack each. */
static bool add_barrier(lockstep *l, size_t i, size_t behind) {
    const translation *t = l->t;
    if (mtl_is(t, i, "metal") && mtl_is(t, mtl_after(t, i), "::")) i = mtl_after(t, mtl_after(t, i));
    bool of_group = mtl_is(t, i, "threadgroup_barrier");
    size_t open = mtl_after(t, i);
    if ((!of_group && !mtl_is(t, i, "simdgroup_barrier")) || !mtl_is(t, open, "(")) return false;
    size_t end = mtl_behind_bracket(t, open);
    if (!mtl_is(t, end, ";") || mtl_after(t, end) != behind) return false;
    if (of_group && l->if_depth > 0) refuse(l);
    close_region(l);
    mtl_text_add_string(l->out, " (void)sizeof((");
    write(l, l->out, i, end, NULL, 0); /* what does not compile as it is written does not so either */
    mtl_text_add_string(l->out,
                        of_group ? ", 0)); __mtl_wait(__mtl_group, __mtl_on);" : ", 0)); __mtl_turn(__mtl_group);");
    return true;
}

/* What all lanes have in common: types, constants, variables in threadgroup memory. */
static bool is_common(lockstep *l, size_t i, size_t behind) {
    static const char *const words[] = {"using", "typedef", "constexpr", "static_assert", NULL};
    static const char *const kinds[] = {"struct", "class", "union", "enum", NULL};
    const translation *t = l->t;
    if (mtl_is(t, i, "if")) return false; /* constexpr or not */
    if (mtl_is_one_of(t, i, kinds)) {
        size_t at = mtl_after(t, i);
        while (mtl_is_identifier(t, at)) at = mtl_after(t, at);
        if (mtl_is(t, at, "{") || mtl_is(t, at, ":")) {
            size_t last = mtl_before(t, mtl_before(t, behind));
            if (!mtl_is(t, last, "}")) refuse(l);
            return true;
        }
    }
    bool found = false, is_constant = false, hides = false;
    for (size_t at = i; at < behind; at++) {
        is_constant |= mtl_is_one_of(t, at, words);
        const char *replacement = t->token[at].replacement;
        found |= mtl_is(t, at, "threadgroup") && replacement && strcmp(replacement, "typedef") == 0;
        if (mtl_is(t, at, "=") || mtl_is(t, at, "(") || mtl_is(t, at, "{")) break;
        hides |= mtl_is_identifier(t, at) && find_variable(l, at);
    }
    if (hides && (found || is_constant))
        refuse(l); /* what lanes have of that name would come back in the next region */
    for (size_t at = i; found && at < behind;
         at++) { /* a pointer beside an array is each lane's; so is what is assigned */
        if (mtl_is(t, at, "*") || mtl_is(t, at, "&") || mtl_is(t, at, "=")) refuse(l);
    }
    return found || is_constant;
}

/* Whether exchanges may be done before the rest of the statement: none needs what it declares, or what stands before
 * a comma. */
static bool is_unordered(const translation *t, size_t begin, size_t end, const size_t *names, int count) {
    for (size_t at = begin; at < end;) {
        if (count == 0 && mtl_is(t, at, ",")) return false;
        at = mtl_is(t, at, "(") || mtl_is(t, at, "[") || mtl_is(t, at, "{") ? mtl_behind_bracket(t, at)
                                                                            : mtl_after(t, at);
    }
    for (int i = 0; i < count; i++) {
        const mtl_token *name = &t->token[names[i]];
        for (size_t at = names[i] + 1; at < end; at++) {
            if (t->token[at].kind == MTL_TOKEN_IDENTIFIER && mtl_is_named(&t->token[at], name->text, name->length))
                return false;
        }
    }
    return true;
}

static size_t add_statement(lockstep *l, size_t i) {
    translation *t = l->t;
    size_t names[MOST_DECLARED] = {0};
    if (i >= t->count || l->depth > DEEPEST) refuse(l); /* the text ends in the middle of something */
    if (l->refused) return t->count;
    if (t->token[i].directive) { /* a pragma stays before a loop of single lanes */
        if (!mtl_is(t, mtl_after(t, i), "pragma")) refuse(l);
        size_t next = i;
        while (next < t->count && t->token[next].directive) next++;
        if (next < t->count && t->token[next].kind == MTL_TOKEN_SPACE) next = mtl_after(t, next);
        if (next >= t->count || t->token[next].directive) refuse(l);
        l->pragma = i;
        l->pragma_end = next;
        return next;
    }
    if (mtl_is(t, i, ";")) return mtl_after(t, i);
    size_t behind = mtl_behind_statement(t, i);
    if (behind <= i || mtl_is(t, i, "else") || mtl_is(t, i, "}")) {
        refuse(l);
        return t->count;
    }
    bool meets = any_meeting(l, i, behind);
    if (is_common(l, i, behind)) {
        if (meets) refuse(l);
        write(l, &l->storage, i, behind, NULL, 0);
        mtl_text_add_string(&l->storage, " ");
        return behind;
    }
    if (meets) {
        if (mtl_is(t, i, "{")) {
            close_region(l);
            return add_block(l, i);
        }
        if (mtl_is(t, i, "if")) return add_if(l, i);
        if (mtl_is(t, i, "for") || mtl_is(t, i, "while") || mtl_is(t, i, "do")) return add_loop(l, i);
        if (mtl_is(t, i, "switch") || mtl_is(t, i, "return")) refuse(l);
        if (add_barrier(l, i, behind)) return behind;
    }
    int declared = find_declared(l, i, behind, names);
    if (meets) {
        if (!is_unordered(t, i, behind, names, declared)) refuse(l);
        meet(l, i, behind);
    }
    if (l->refused) return t->count;
    if (declared) {
        declare_all(l, i, behind, names, declared);
    } else {
        if (mtl_is(t, i, "auto") || is_specifier(t, i) || is_builtin_type(t, i)) refuse(l); /* declares something odd */
        add_leaf(l, i, behind);
    }
    return behind;
}

/* ---- all of it --------------------------------------------------------------------------------------------------- */

/* A buffer as the body names it: each lane's own where the body moves it. */
static void add_buffer(lockstep *l, int pointer, const char *name, const char *suffix) {
    mtl_text joined = {0};
    mtl_text_format(&joined, "%s%s", name, suffix);
    if (joined.failed) {
        l->out->failed = true;
        return;
    }
    const char *kept = mtl_keep(l->t, &joined);
    size_t length = joined.length;
    mtl_text_free(&joined);
    if (!mtl_is_changed(l->t, 0, l->t->count, kept, length)) {
        mtl_text_format(l->out, " const auto &%s = __mtl_%d;", kept, pointer);
    } else if (l->moves && mtl_find_word(l->t, kept, length)->is_moved) {
        mtl_text_format(l->out, " auto __mtl_moved_%s = __mtl_%d; const auto &%s = __mtl_moved_%s;", kept, pointer,
                        kept, kept);
    } else {
        variable v = {.name = kept, .length = length, .number = ++l->number};
        open_region(l);
        mtl_text_format(&l->storage, " __mtl_lanes<decltype(__mtl_%d)> __mtl_of_%d_0; auto &%s = __mtl_of_%d_0[0];",
                        pointer, v.number, kept, v.number);
        mtl_text_format(&l->region, " auto &%s = __mtl_of_%d_0.keep(__mtl_lane, __mtl_%d);", kept, v.number, pointer);
        add_variable(l, v);
    }
}

static void find_moved_buffers(const lockstep *l) {
    const mtl_definition *definition = l->definition;
    for (int i = 0; i < definition->input_count + definition->output_count; i++) {
        int output = i - definition->input_count;
        const char *name = output < 0 ? definition->input_names[i] : definition->output_names[output];
        mtl_word *word = mtl_find_word(l->t, name, strlen(name));
        if (word) word->is_moved = find_moved(l, word);
    }
}

static void add_buffers(lockstep *l) {
    const mtl_definition *definition = l->definition;
    int pointer = 0;
    for (int i = 0; i < definition->input_count; i++, pointer += MTL_POINTERS_OF_INPUT) {
        const char *name = definition->input_names[i];
        add_buffer(l, pointer, name, "");
        if (l->mentions->input[i] & MTL_MENTIONS_SHAPE) add_buffer(l, pointer + 1, name, "_shape");
        if (l->mentions->input[i] & MTL_MENTIONS_STRIDES) add_buffer(l, pointer + 2, name, "_strides");
        if (l->mentions->input[i] & MTL_MENTIONS_RANK) add_buffer(l, pointer + 3, name, "_ndim");
    }
    for (int i = 0; i < definition->output_count; i++) add_buffer(l, pointer++, definition->output_names[i], "");
}

static bool write_body(lockstep *l) {
    translation *t = l->t;
    size_t name, i = mtl_after(t, SIZE_MAX);
    for (size_t at = 0; at < t->count; at++) { /* in a lambda, a macro */
        if (mtl_is_body(t, at, &name) && any_meeting(l, at, mtl_behind_bracket(t, at))) refuse(l);
        if (t->token[at].directive && is_meeting(t, at)) refuse(l);
    }
    add_buffers(l);
    while (i < t->count && !l->refused) i = add_statement(l, i);
    close_region(l);
    return !l->refused && !t->failed;
}

bool mtl_write_lockstep(translation *t, mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions) {
    bool done = false, again = false;
    lockstep *l = malloc(sizeof *l);
    call *calls = malloc((t->count + 1) * sizeof *calls);
    size_t *meetings = mtl_count(t, is_meeting);
    find_shared(t);
    for (int moves = 1; moves >= 0 && (moves || again) && l && calls && meetings; moves--) {
        memset(calls, 0, (t->count + 1) * sizeof *calls);
        *l = (lockstep){
            .t = t, .out = out, .definition = definition, .mentions = mentions, .calls = calls, .moves = moves};
        l->meetings = meetings;
        for (size_t word = 0; word <= t->words; word++) t->word[word].top = 0;
        find_moved_buffers(l);
        mtl_text_free(out);
        done = write_body(l);
        again = l->moved_by_lane;
        mtl_text_free(&l->storage);
        mtl_text_free(&l->region);
    }
    out->failed |= !l || !calls || !meetings;
    free(meetings);
    free(calls);
    free(l);
    return done;
}
