/* Tokens on their way from Metal to C++. SPDX-License-Identifier: MIT */
#include "kernel/translation.h"

#include <stdlib.h>
#include <string.h>

static void *allocate(translation *t, size_t size) {
    block *kept = malloc(sizeof *kept + size);
    if (!kept) {
        t->failed = true;
        return NULL;
    }
    kept->next = t->scratch;
    t->scratch = kept;
    return kept + 1;
}

const char *mtl_keep(translation *t, const mtl_text *text) {
    char *kept = text->failed ? NULL : allocate(t, text->length + 1);
    t->failed |= text->failed;
    return kept ? memcpy(kept, mtl_text_string(text), text->length + 1) : "";
}

/* ---- words ---------------------------------------------------------------------------------------------------------------- */

/* Where the word is in the table, or would be. */
static unsigned *slot_of(const translation *t, const char *text, size_t length) {
    size_t hash = 14695981039346656037u & SIZE_MAX; /* FNV-1a */
    for (size_t i = 0; i < length; i++) hash = (hash ^ (unsigned char)text[i]) * (1099511628211u & SIZE_MAX);
    for (size_t at = (hash ^ hash >> 20) & (t->slots - 1);; at = (at + 1) & (t->slots - 1)) {
        const mtl_word *word = &t->word[t->table[at]];
        if (!t->table[at] || (word->length == length && memcmp(word->text, text, length) == 0)) return &t->table[at];
    }
}

mtl_word *mtl_find_word(const translation *t, const char *text, size_t length) {
    unsigned found = *slot_of(t, text, length);
    return found ? &t->word[found] : NULL;
}

mtl_word *mtl_word_at(const translation *t, size_t i) { return &t->word[t->link[i].word]; }

unsigned mtl_add_word(translation *t, const mtl_token *token) {
    unsigned *slot = slot_of(t, token->text, token->length);
    if (!*slot) {
        *slot = (unsigned)++t->words;
        bool exchanges = mtl_is_exchange(token);
        t->word[*slot] =
            (mtl_word){.text = token->text, .length = token->length, .exchanges = exchanges, .meets = exchanges};
    }
    return *slot;
}

/* Room for all, two address spaces among them. */
static bool find_words(translation *t) {
    size_t identifiers = 2;
    for (size_t i = 0; i < t->count; i++) identifiers += t->token[i].kind == MTL_TOKEN_IDENTIFIER;
    t->slots = 8;
    while (t->slots < 2 * identifiers) t->slots *= 2;
    t->word = calloc(identifiers + 1, sizeof *t->word);
    t->table = calloc(t->slots, sizeof *t->table);
    if (!t->word || !t->table || identifiers >= UINT32_MAX) return false;
    for (size_t i = 0; i < t->count; i++) {
        if (t->token[i].kind == MTL_TOKEN_IDENTIFIER) t->link[i].word = mtl_add_word(t, &t->token[i]);
    }
    return true;
}

/* Whether what the identifier at `i` names may be changed there. */
static bool is_changed_at(const translation *t, size_t i) {
    size_t before = mtl_before(t, i), behind = mtl_after(t, i);
    if (before != SIZE_MAX && (mtl_is(t, before, ".") || mtl_is(t, before, "->"))) return false;
    if (before != SIZE_MAX && before > 0) {
        if (mtl_is_pair(t, before - 1, "+", "+") || mtl_is_pair(t, before - 1, "-", "-")) return true;
        if (mtl_is(t, before, "&") && !mtl_is(t, before - 1, "&")) return true; /* a & b too, to be sure */
    }
    while (mtl_is(t, behind, ".")) behind = mtl_after(t, mtl_after(t, behind));
    return mtl_is_assignment(t, behind); /* not behind [ : what a pointer points to */
}

bool mtl_index(translation *t) {
    size_t uses = 0, changes = 0;
    for (unsigned word = 0; word <= t->words; word++)
        t->word[word].uses = t->word[word].changes = t->word[word].mark = 0;
    for (size_t i = 0; i < t->count; i++) {
        if (!mtl_is_identifier(t, i)) continue;
        mtl_word *word = mtl_word_at(t, i);
        word->uses++;
        word->changes += is_changed_at(t, i);
        word->in_directive |= t->token[i].directive != 0;
        size_t open = mtl_after(t, i), define = mtl_before(t, i);
        word->is_macro |= open == i + 1 && mtl_is(t, open, "(") && t->token[i].directive && mtl_is(t, define, "define");
    }
    for (unsigned at = 0; at <= t->words; at++) {
        mtl_word *word = &t->word[at];
        word->first_use = uses, word->first_change = changes;
        uses += word->uses, changes += word->changes;
        word->uses = word->changes = 0;
    }
    free(t->use);
    free(t->change);
    t->use = malloc((uses + 1) * sizeof *t->use);
    t->change = malloc((changes + 1) * sizeof *t->change);
    if (!t->use || !t->change) return false;
    for (size_t i = 0; i < t->count; i++) {
        if (!mtl_is_identifier(t, i)) continue;
        mtl_word *word = mtl_word_at(t, i);
        t->use[word->first_use + word->uses++] = i;
        if (is_changed_at(t, i)) t->change[word->first_change + word->changes++] = i;
    }
    return true;
}

/* The first of place[first, last), which ascend, that is at or behind `i`; `last` where none is. */
static size_t search(const size_t *place, size_t first, size_t last, size_t i) {
    while (first < last) {
        size_t middle = first + (last - first) / 2;
        if (place[middle] < i) first = middle + 1;
        else last = middle;
    }
    return first;
}

size_t mtl_next_use(const translation *t, const mtl_word *word, size_t i) {
    return search(t->use, word->first_use, word->first_use + word->uses, i);
}

bool mtl_is_changed(const translation *t, size_t begin, size_t end, const char *name, size_t length) {
    const mtl_word *word = mtl_find_word(t, name, length);
    if (!word) return false;
    size_t last = word->first_change + word->changes, found = search(t->change, word->first_change, last, begin);
    return found < last && t->change[found] < end;
}

/* ---- links ---------------------------------------------------------------------------------------------------------------- */

void mtl_find_neighbours(translation *t) {
    size_t last = MTL_NONE;
    for (size_t i = 0; i <= t->count; i++) {
        t->link[i].before = last;
        if (i < t->count && t->token[i].kind != MTL_TOKEN_SPACE) last = i;
    }
    for (size_t i = t->count + 1, next = t->count; i-- > 0;) {
        t->link[i].after = next;
        if (i < t->count && t->token[i].kind != MTL_TOKEN_SPACE) next = i;
    }
}

/* Brackets nest, whatever their kinds. A < is closed in its brackets and its statement, or never. */
static void find_brackets(translation *t) {
    size_t open = MTL_NONE, angle = MTL_NONE;
    for (size_t i = 0; i < t->count; i++) {
        mtl_link *link = &t->link[i];
        link->match = MTL_NONE;
        link->around = open;
        link->angle = angle;
        if (t->token[i].kind != MTL_TOKEN_PUNCTUATION) continue;
        switch (t->token[i].text[0]) {
        case '{': link->angle = MTL_NONE; /* fall through */
        case '(':
        case '[':
            open = i;
            angle = MTL_NONE;
            break;
        case ')':
        case ']':
        case '}':
            angle = MTL_NONE;
            if (open == MTL_NONE) break;
            link->match = open;
            t->link[open].match = i;
            angle = t->link[open].angle;
            open = t->link[open].around;
            break;
        case '<': angle = i; break;
        case '>':
            if (angle == MTL_NONE) break;
            link->match = angle;
            t->link[angle].match = i;
            angle = t->link[angle].angle;
            break;
        case ';': angle = MTL_NONE; break;
        default: break;
        }
    }
}

/* From the last token to the first, so that what a statement ends with is known. `plain`: behind the next semicolon. */
static bool find_statements(translation *t) {
    size_t *plain = malloc((t->count + 1) * sizeof *plain);
    if (!plain) return false;
    plain[t->count] = t->link[t->count].statement = t->count;
    for (size_t i = t->count; i-- > 0;) {
        static const char *const with_condition[] = {"for", "while", "if", "switch", NULL};
        size_t after = mtl_after(t, i), *behind = &t->link[i].statement;
        bool opens = mtl_is(t, i, "(") || mtl_is(t, i, "[") || mtl_is(t, i, "{");
        plain[i] = mtl_is(t, i, ";") ? after : mtl_is(t, i, "}") ? i : plain[opens ? mtl_behind_bracket(t, i) : after];
        *behind = mtl_is(t, i, "{") ? mtl_behind_bracket(t, i) : plain[i];
        if (mtl_is(t, i, "do")) {
            *behind = t->link[after].statement;
            if (!mtl_is(t, *behind, "while")) continue;
            *behind = mtl_behind_bracket(t, mtl_after(t, *behind));
            if (mtl_is(t, *behind, ";")) *behind = mtl_after(t, *behind);
        } else if (mtl_is_one_of(t, i, with_condition)) {
            size_t open = mtl_is_identifier(t, after) ? mtl_after(t, after) : after; /* constexpr, or a macro for it */
            *behind = mtl_is(t, open, "(") ? t->link[mtl_behind_bracket(t, open)].statement : t->count;
            if (mtl_is(t, i, "if") && mtl_is(t, *behind, "else")) *behind = t->link[mtl_after(t, *behind)].statement;
        }
    }
    free(plain);
    return true;
}

bool mtl_begin(translation *t, const char *source) {
    if (!mtl_tokenize(&t->tokens, source, strlen(source))) return false;
    t->token = t->tokens.token;
    t->count = t->tokens.count;
    t->link = calloc(t->count + 1, sizeof *t->link);
    if (!t->link || !find_words(t)) return false;
    mtl_find_neighbours(t);
    find_brackets(t);
    return find_statements(t);
}

void mtl_end(translation *t) {
    mtl_tokens_free(&t->tokens);
    free(t->link);
    free(t->word);
    free(t->table);
    free(t->use);
    free(t->change);
    free(t->arms);
    while (t->scratch) {
        block *next = t->scratch->next;
        free(t->scratch);
        t->scratch = next;
    }
}

size_t *mtl_count(const translation *t, bool (*is)(const translation *t, size_t i)) {
    size_t *count = malloc((t->count + 1) * sizeof *count);
    if (!count) return NULL;
    count[0] = 0;
    for (size_t i = 0; i < t->count; i++) count[i + 1] = count[i] + is(t, i);
    return count;
}

/* ---- walking over tokens ------------------------------------------------------------------------------------------------ */

size_t mtl_after(const translation *t, size_t i) {
    if (i == SIZE_MAX) return t->count && t->token[0].kind == MTL_TOKEN_SPACE ? t->link[0].after : 0;
    return i < t->count ? t->link[i].after : t->count;
}

size_t mtl_before(const translation *t, size_t i) {
    if (i == SIZE_MAX) return SIZE_MAX;
    return t->link[i < t->count ? i : t->count].before;
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
    return b < t->count && t->token[a].directive == t->token[b].directive;
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

size_t mtl_behind_bracket(const translation *t, size_t i) {
    bool opens = mtl_is(t, i, "(") || mtl_is(t, i, "[") || mtl_is(t, i, "{");
    return opens && t->link[i].match != MTL_NONE ? mtl_after(t, t->link[i].match) : t->count;
}

size_t mtl_opening_bracket(const translation *t, size_t i) {
    return mtl_is(t, i, ")") || mtl_is(t, i, "]") || mtl_is(t, i, "}") ? t->link[i].match : MTL_NONE;
}

size_t mtl_behind_angle(const translation *t, size_t i) {
    return mtl_is(t, i, "<") && t->link[i].match != MTL_NONE ? mtl_after(t, t->link[i].match) : i;
}

size_t mtl_opening_angle(const translation *t, size_t i) { return mtl_is(t, i, ">") ? t->link[i].match : MTL_NONE; }

size_t mtl_behind_statement(const translation *t, size_t i) { return t->link[i < t->count ? i : t->count].statement; }

/* The class whose members the token at `i` is among, by name; SIZE_MAX where there is none. */
static size_t class_around(const translation *t, size_t i) {
    static const char *const ends[] = {";", "}", "{", NULL};
    size_t open = t->link[i].around;
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

static void add_piece(translation *t, mtl_piece **last, const char *text, bool first) {
    mtl_piece *piece = allocate(t, sizeof *piece);
    if (!piece) return;
    *piece = (mtl_piece){*last ? (*last)->next : piece, text};
    if (*last) (*last)->next = piece;
    if (!*last || !first) *last = piece;
}

void mtl_add_before(translation *t, size_t i, const char *text) { add_piece(t, &t->token[i].before, text, true); }

void mtl_add_behind(translation *t, size_t i, const char *text) { add_piece(t, &t->token[i].behind, text, false); }
