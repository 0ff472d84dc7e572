/* Tokens on their way from Metal to C++. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_TRANSLATION_H
#define METALLOID_KERNEL_TRANSLATION_H

#include "kernel/source.h"
#include "kernel/tokenizer.h"

#include <stdint.h>

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
    int variables;      /* in threadgroup memory */
    int unions;         /* without a name of their own */
    bool divides;       /* the user has an operator / or % for anything */
    size_t first_place; /* the number of the first token, among those of header and body */
    block *scratch;
    bool in_condition; /* of #if */
    bool failed;
} translation;

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

/* Behind the bracket that closes the one at `i`; t->count where none does. Brackets of the other kinds nest. */
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

/* Adds the functions defined here at which lanes meet, as far as `names` says which others do; whether there were any. False: no
 * memory. */
bool mtl_find_meeting(const translation *t, mtl_names *names, bool *found);
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
