/* Metal source as tokens. SPDX-License-Identifier: MIT
 *
 * The lexical grammar of C++17 ([lex] of its standard): preprocessing numbers, raw strings, lines continued by a backslash,
 * directives. Nothing is interpreted here. */
#include "kernel/tokenizer.h"

#include <stdlib.h>
#include <string.h>

typedef struct scanner {
    const char *at, *end;
    bool line_start;
    mtl_tokens *tokens;
    size_t capacity, directive; /* as in mtl_token */
    bool failed;
} scanner;

static bool is_digit(char c) { return c >= '0' && c <= '9'; }
/* Bytes of UTF-8 beyond ASCII count as letters. */
static bool is_letter(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c == '$' || (unsigned char)c >= 0x80;
}
static bool is_word(char c) { return is_letter(c) || is_digit(c); }

static char peek(const scanner *s, size_t ahead) { return (size_t)(s->end - s->at) > ahead ? s->at[ahead] : '\0'; }

/* The length of a backslash and the line's end that it hides, or 0. */
static size_t splice(const scanner *s, const char *at) {
    if (at >= s->end || *at != '\\') return 0;
    size_t left = (size_t)(s->end - at);
    if (left > 1 && at[1] == '\n') return 2;
    return left > 2 && at[1] == '\r' && at[2] == '\n' ? 3 : 0;
}

static void emit(scanner *s, mtl_token_kind kind, const char *begin) {
    if (s->at == begin) return;
    mtl_tokens *tokens = s->tokens;
    if (tokens->count == s->capacity) {
        size_t capacity = s->capacity ? 2 * s->capacity : 256;
        mtl_token *token = realloc(tokens->token, capacity * sizeof *token);
        if (!token) {
            s->failed = true;
            return;
        }
        tokens->token = token;
        s->capacity = capacity;
    }
    tokens->token[tokens->count++] =
        (mtl_token){.kind = kind, .directive = s->directive, .text = begin, .length = (size_t)(s->at - begin)};
}

/* Up to the end of the line, which is left, over continued lines. */
static void skip_line(scanner *s) {
    while (s->at < s->end && *s->at != '\n') {
        size_t spliced = splice(s, s->at);
        s->at += spliced ? spliced : 1;
    }
}

static void skip_block_comment(scanner *s) {
    s->at += 2;
    while (s->at < s->end && !(*s->at == '*' && peek(s, 1) == '/')) s->at++;
    s->at = s->end - s->at >= 2 ? s->at + 2 : s->end;
}

static void space(scanner *s) {
    const char *begin = s->at;
    while (s->at < s->end && !s->failed) {
        size_t spliced = splice(s, s->at);
        if (spliced) {
            s->at += spliced;
        } else if (*s->at == '\n') {
            if (s->directive) { /* the line's end is the first that is not part of it */
                emit(s, MTL_TOKEN_SPACE, begin);
                begin = s->at;
                s->directive = 0;
            }
            s->at++;
            s->line_start = true;
        } else if (*s->at == ' ' || *s->at == '\t' || *s->at == '\r' || *s->at == '\v' || *s->at == '\f') {
            s->at++;
        } else if (*s->at == '/' && peek(s, 1) == '/') {
            skip_line(s);
        } else if (*s->at == '/' && peek(s, 1) == '*') {
            skip_block_comment(s);
        } else {
            break;
        }
    }
    emit(s, MTL_TOKEN_SPACE, begin);
}

/* Between quotes of one kind, on one line. */
static void quoted(scanner *s, const char *begin) {
    char quote = *s->at++;
    while (s->at < s->end && *s->at != quote && *s->at != '\n') {
        size_t spliced = splice(s, s->at);
        s->at += spliced ? spliced : *s->at == '\\' && s->end - s->at > 1 && s->at[1] != '\n' ? 2 : 1;
    }
    if (s->at < s->end && *s->at == quote) s->at++;
    emit(s, MTL_TOKEN_QUOTED, begin);
}

/* R"delimiter( ... )delimiter": the scanner is at the quote. */
static void raw_string(scanner *s, const char *begin) {
    enum { LONGEST_DELIMITER = 16 };
    const char *delimiter = ++s->at;
    while (s->at < s->end && *s->at != '(' && *s->at != '"' && *s->at != '\n' && s->at - delimiter <= LONGEST_DELIMITER)
        s->at++;
    size_t length = (size_t)(s->at - delimiter);
    for (; s->at < s->end; s->at++) {
        size_t left = (size_t)(s->end - s->at);
        if (*s->at == ')' && left >= length + 2 && memcmp(s->at + 1, delimiter, length) == 0 &&
            s->at[length + 1] == '"') {
            s->at += length + 2;
            break;
        }
    }
    emit(s, MTL_TOKEN_QUOTED, begin);
}

static void word(scanner *s) {
    const char *begin = s->at;
    while (s->at < s->end && is_word(*s->at)) s->at++;
    size_t length = (size_t)(s->at - begin);
    if (s->at < s->end && (*s->at == '"' || *s->at == '\'') && length <= 3) { /* prefixes: L u U u8, R with any */
        static const char *const prefixes[] = {"L", "u", "U", "u8", "R", "LR", "uR", "UR", "u8R"};
        for (size_t i = 0; i < sizeof prefixes / sizeof prefixes[0]; i++) {
            if (strlen(prefixes[i]) != length || memcmp(prefixes[i], begin, length) != 0) continue;
            if (begin[length - 1] == 'R' && *s->at == '"') raw_string(s, begin);
            else quoted(s, begin);
            return;
        }
    }
    emit(s, MTL_TOKEN_IDENTIFIER, begin);
}

static void number(scanner *s) {
    const char *begin = s->at;
    while (s->at < s->end) {
        char c = *s->at, last = s->at > begin ? s->at[-1] : '\0';
        bool sign = (c == '+' || c == '-') && (last == 'e' || last == 'E' || last == 'p' || last == 'P');
        /* The e of a hexadecimal number is a digit, and a sign behind it an operator. */
        if (sign && (last == 'e' || last == 'E') && s->at - begin > 2 && begin[0] == '0' &&
            (begin[1] == 'x' || begin[1] == 'X'))
            sign = false;
        if (!is_word(c) && c != '.' && !sign && !(c == '\'' && is_word(peek(s, 1)))) break;
        s->at++;
    }
    emit(s, MTL_TOKEN_NUMBER, begin);
}

/* The scanner is behind the # that begins a line. */
static void directive(scanner *s) {
    space(s);
    const char *begin = s->at;
    while (s->at < s->end && is_word(*s->at)) s->at++;
    size_t length = (size_t)(s->at - begin);
    emit(s, MTL_TOKEN_IDENTIFIER, begin);
    static const char *const with_tokens[] = {"define", "undef", "if", "ifdef", "ifndef", "elif", "else", "endif"};
    for (size_t i = 0; i < sizeof with_tokens / sizeof with_tokens[0]; i++) {
        if (strlen(with_tokens[i]) == length && memcmp(with_tokens[i], begin, length) == 0) return;
    }
    if (!s->directive) return; /* the line is over */
    bool include =
        (length == 7 && memcmp(begin, "include", 7) == 0) || (length == 6 && memcmp(begin, "import", 6) == 0);
    begin = s->at;
    skip_line(s);
    emit(s, include ? MTL_TOKEN_INCLUDE : MTL_TOKEN_VERBATIM, begin);
}

bool mtl_tokenize(mtl_tokens *tokens, const char *source, size_t length) {
    *tokens = (mtl_tokens){0};
    scanner s = {.at = source, .end = source + length, .line_start = true, .tokens = tokens};
    while (s.at < s.end && !s.failed) {
        space(&s);
        if (s.at == s.end || s.failed) break;
        const char *begin = s.at;
        bool starts_line = s.line_start;
        s.line_start = false;
        char c = *s.at;
        if (c == '#' && starts_line) {
            s.at++;
            s.directive = tokens->count + 1;
            emit(&s, MTL_TOKEN_PUNCTUATION, begin);
            directive(&s);
        } else if (is_letter(c)) {
            word(&s);
        } else if (is_digit(c) || (c == '.' && is_digit(peek(&s, 1)))) {
            number(&s);
        } else if (c == '"' || c == '\'') {
            quoted(&s, s.at);
        } else {
            s.at += (c == ':' && peek(&s, 1) == ':') || (c == '-' && peek(&s, 1) == '>') ? 2 : 1;
            emit(&s, MTL_TOKEN_PUNCTUATION, begin);
        }
    }
    if (s.failed) mtl_tokens_free(tokens);
    return !s.failed;
}

void mtl_tokens_free(mtl_tokens *tokens) {
    free(tokens->token);
    *tokens = (mtl_tokens){0};
}

bool mtl_token_is(const mtl_token *token, const char *text) {
    return (token->kind == MTL_TOKEN_IDENTIFIER || token->kind == MTL_TOKEN_PUNCTUATION) &&
           strlen(text) == token->length && memcmp(token->text, text, token->length) == 0;
}
