/* Metal source as tokens. SPDX-License-Identifier: MIT */
#ifndef METALLOID_KERNEL_TOKENIZER_H
#define METALLOID_KERNEL_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>

typedef enum mtl_token_kind {
    MTL_TOKEN_SPACE, /* blanks, newlines, comments, backslashes at a line's end */
    MTL_TOKEN_IDENTIFIER,
    MTL_TOKEN_NUMBER,
    MTL_TOKEN_QUOTED,      /* a string or character literal, raw strings too */
    MTL_TOKEN_PUNCTUATION, /* one character, but for :: and -> */
    MTL_TOKEN_INCLUDE,     /* what follows #include up to the end of the line */
    MTL_TOKEN_VERBATIM,    /* what follows #pragma, #error, #line and the like */
} mtl_token_kind;

/* Texts that follow each other, as a ring: the last of them knows the first. NULL: none. */
typedef struct mtl_piece {
    struct mtl_piece *next;
    const char *text;
} mtl_piece;

/* `text` points into the source. What takes its place, and stands before and behind it, is NULL where nothing does. */
typedef struct mtl_token {
    mtl_token_kind kind;
    size_t directive; /* 0: in none; else behind the number of its # */
    const char *text;
    size_t length;
    const char *replacement;
    mtl_piece *before, *behind; /* the last ones */
} mtl_token;

typedef struct mtl_tokens {
    mtl_token *token;
    size_t count;
} mtl_tokens;

/* Every byte of the source belongs to one token, whatever the source is: what ends too early ends there. False: no memory. */
bool mtl_tokenize(mtl_tokens *tokens, const char *source, size_t length);
void mtl_tokens_free(mtl_tokens *tokens);

bool mtl_token_is(const mtl_token *token, const char *text); /* an identifier or punctuation, spelled so */

#endif
