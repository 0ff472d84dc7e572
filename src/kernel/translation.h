/* Tokens on their way from Metal to C++. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_TRANSLATION_H
#define METALLOID_KERNEL_TRANSLATION_H

#include "kernel/source.h"
#include "kernel/tokenizer.h"

#include <stdint.h>

#define MTL_NONE SIZE_MAX

/* What stands around a token. It is found once, in one pass over the text, so that no question about a token looks through
 * the text again: a source of any length is translated in time that grows as its length does. */
typedef struct mtl_link {
    size_t after, before; /* the next tokens that are no space; the count, and MTL_NONE, where there is none */
    size_t match;         /* of a bracket, of < and >: the other one, or MTL_NONE */
    size_t around;        /* the bracket that it is directly in, or MTL_NONE; of one that closes, the one that opens */
    size_t angle;     /* the < before it, in the same brackets and statement, that no > has closed yet, or MTL_NONE */
    size_t statement; /* behind the statement that begins with it */
    unsigned word;
} mtl_link;

/* Identifiers that are spelled alike. Their places, and those at which they may be changed (mtl_is_changed), are ranges of
 * translation.use and translation.change. */
typedef struct mtl_word {
    const char *text;
    size_t length;
    size_t first_use, uses, first_change, changes;
    const char *space;     /* the address space that the source defines it as */
    bool is_type_of_space; /* it is defined as a type in threadgroup memory */
    bool is_macro;         /* with parameters */
    bool exchanges;        /* a function of Metal's, among lanes */
    bool meets;            /* a function at which lanes meet, these too */
    bool is_shared;        /* lockstep.c: a variable in threadgroup memory */
    bool is_moved;         /* lockstep.c: a buffer that all lanes move */
    int top;               /* lockstep.c: the latest variable of that name, from 1 */
    size_t mark;           /* overloads.c, translate.c: where it was seen last */
    bool in_directive;
    bool is_sought, is_evaluated, is_known; /* unroll.c: its only value, at value_at */
    size_t value_at;
    int64_t value;
} mtl_word;

/* The parts of c ? a : b, by the token ?. */
typedef struct mtl_arms {
    size_t colon; /* MTL_NONE: there is none */
    size_t end;   /* what follows it all; without a colon, where the search for it ended */
} mtl_arms;

/* What is kept until the text is written; the memory follows. */
typedef struct block {
    struct block *next;
} block;

typedef struct translation {
    mtl_tokens tokens;
    mtl_token *token; /* of tokens */
    size_t count;
    mtl_link *link;  /* one for each token, and one behind the last */
    mtl_word *word;  /* from 1 */
    unsigned *table; /* words by hash; of a power of two */
    size_t words, slots;
    size_t *use, *change;
    mtl_arms *arms;
    mtl_region region;
    const mtl_unit_options *options;
    int variables;      /* in threadgroup memory */
    int unions;         /* without a name of their own */
    bool divides;       /* the user has an operator / or % for anything */
    size_t declaration; /* begins here, behind the last ; or { */
    size_t first_place; /* the number of the first token, among those of header and body */
    block *scratch;
    bool in_condition; /* of #if */
    bool failed;
    int depth; /* of translations of a part in another place */
} translation;

/* ---- the tokens of a source, and what stands around each ---- */

bool mtl_begin(translation *t, const char *source); /* false: no memory */
void mtl_end(translation *t);

/* What is before and after each token; again where some have become spaces. */
void mtl_find_neighbours(translation *t);

/* Where each word is, once the tokens are what they stay. False: no memory. */
bool mtl_index(translation *t);

/* The word that is spelled so, or NULL. */
mtl_word *mtl_find_word(const translation *t, const char *text, size_t length);
mtl_word *mtl_word_at(const translation *t, size_t i); /* of the identifier at `i` */

unsigned mtl_add_word(translation *t, const mtl_token *token); /* with room for two that the source has not */

/* The first of the word's places at or behind `i`, as an index into t->use. */
size_t mtl_next_use(const translation *t, const mtl_word *word, size_t i);

/* How many of the tokens before each one `is` says yes of; to be freed. NULL: no memory. */
size_t *mtl_count(const translation *t, bool (*is)(const translation *t, size_t i));

/* ---- walking over tokens: indices, of those that are no space ---- */

size_t mtl_after(const translation *t, size_t i);  /* t->count at the end */
size_t mtl_before(const translation *t, size_t i); /* SIZE_MAX at the beginning */
bool mtl_is(const translation *t, size_t i, const char *text);
bool mtl_is_one_of(const translation *t, size_t i, const char *const *words); /* ends with a NULL */
bool mtl_is_identifier(const translation *t, size_t i);
bool mtl_is_named(const mtl_token *token, const char *name, size_t length);

/* Whether both tokens, b behind a, are code, or of one directive. */
bool mtl_are_one_directive(const translation *t, size_t a, size_t b);

/* Operators come as single characters: whether there are these two, or one that assigns, ++ and -- among them. */
bool mtl_is_pair(const translation *t, size_t i, const char *first, const char *second);
bool mtl_is_assignment(const translation *t, size_t i);

/* Whether tokens [begin, end) may change what has this name: assign to it or a part of it, or take its address. */
bool mtl_is_changed(const translation *t, size_t begin, size_t end, const char *name, size_t length);

/* Behind the bracket that closes the one at `i`; t->count where none does, or none opens there. Kinds of brackets are not told apart. */
size_t mtl_behind_bracket(const translation *t, size_t i);

/* The one that the bracket at `i` closes; SIZE_MAX where none does. */
size_t mtl_opening_bracket(const translation *t, size_t i);

/* Behind the > that closes the < at `i`, or `i` where it opens no list of template arguments. */
size_t mtl_behind_angle(const translation *t, size_t i);

/* The < that the > at `i` closes, if they are brackets; SIZE_MAX where there is none. */
size_t mtl_opening_angle(const translation *t, size_t i);

/* Whether the address space at `i` is that of a constructor: X() constant : x(1) {}. No const can stand there. */
bool mtl_qualifies_constructor(const translation *t, size_t i);

/* ---- changing them ---- */

const char *mtl_keep(translation *t, const mtl_text *text); /* until the translation is written */
void mtl_blank(translation *t, size_t i);
void mtl_blank_range(translation *t, size_t begin, size_t end); /* all but spaces, in which newlines are */
void mtl_add_before(translation *t, size_t i, const char *text);
void mtl_add_behind(translation *t, size_t i, const char *text);

/* ---- translate.c ---- */

void mtl_write_token(mtl_text *out, const mtl_token *token);

/* ---- places.c ---- */

/* Whether `name (...) {` at `i` is a macro that stands for the head of a statement: FOR_UNROLL (int i = 0; i < 4; ++i) {...} */
bool mtl_is_statement_macro(const translation *t, size_t i);

/* Whether the body of a function or a lambda opens at `i`, with its name, or SIZE_MAX for a lambda without one. */
bool mtl_is_body(const translation *t, size_t i, size_t *name);

size_t mtl_behind_statement(const translation *t, size_t i);

/* Finds the functions of a header and a body at which lanes meet. False: no memory. */
bool mtl_find_meeting(translation *header, translation *body, mtl_names *names);
void mtl_mark_places(translation *t);

/* ---- lockstep.c ---- */

/* The translated tokens of a body as statements of a simdgroup. False: it has to be run thread by thread. */
bool mtl_write_lockstep(translation *t, mtl_text *out, const mtl_definition *definition, const mtl_mentions *mentions);

/* ---- unroll.c ---- */

/* Asks for the loop at `i` (for) to be unrolled if it goes over a threadgroup's share of few elements. */
void mtl_unroll(translation *t, size_t i);

/* ---- swizzles.c ---- */

/* Those that are read become values. */
void mtl_translate_swizzles(translation *t);

/* ---- overloads.c ---- */

void mtl_leave_out_overloads(translation *t);

#endif
