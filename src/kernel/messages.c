/* What a compiler says of a kernel, in terms of the user's text. SPDX-License-Identifier: MIT
 *
 * Lines keep their numbers in the translation, but not their text: marks stand in them, and what C++ does not know is
 * left out. Where a message quotes such a line, the user's own takes its place. The column is that of the token that the
 * caret points to, if both lines have as many of it; else it is left out, since a wrong one is worse than none. */
#include "kernel/messages.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

typedef struct span {
    const char *text;
    size_t length;
} span;

static span line_at(const char *text) { return (span){text, strcspn(text, "\n")}; }

static const char *behind(span line) { return line.text + line.length + (line.text[line.length] == '\n'); }

static span trimmed(span line) {
    while (line.length && isspace((unsigned char)line.text[line.length - 1])) line.length--;
    while (line.length && isspace((unsigned char)*line.text)) line.text++, line.length--;
    return line;
}

static bool are_equal(span a, span b) { return a.length == b.length && memcmp(a.text, b.text, a.length) == 0; }

/* Line `number`, from 1, or one with a NULL. */
static span numbered_line(const char *text, unsigned long number) {
    while (number > 1 && *text) {
        text = behind(line_at(text));
        number--;
    }
    return *text && number ? line_at(text) : (span){NULL, 0};
}

/* ---- quoted lines ------------------------------------------------------------------------------------------------ */

typedef struct heading {
    const char *text;     /* of the file that it is about; NULL: another one */
    unsigned long number; /* of the line */
    size_t column, rest;  /* where ":column" begins and ends in it; as one where there is none */
} heading;

/* name:3:14: error: ... is clang's, name(3): error: ... NVRTC's. */
static bool read_heading(heading *h, const mtl_definition *definition, span line) {
    size_t name = 0;
    while (name < line.length && line.text[name] != ':' && line.text[name] != '(' && line.text[name] != ' ') name++;
    if (name == 0 || name + 1 >= line.length || !isdigit((unsigned char)line.text[name + 1])) return false;
    char *end;
    *h = (heading){.number = strtoul(line.text + name + 1, &end, 10)};
    h->column = h->rest = (size_t)(end - line.text);
    if (line.text[name] == ':' && *end == ':' && isdigit((unsigned char)end[1])) {
        strtoul(end + 1, &end, 10);
        h->rest = (size_t)(end - line.text);
    } else if (line.text[name] != '(' || *end != ')') {
        return false;
    }
    const span file = {line.text, name};
    if (are_equal(file, (span){"source", 6})) h->text = definition->source;
    else if (are_equal(file, (span){"header", 6})) h->text = definition->header;
    return true;
}

/* Blanks, ~ and a ^, behind the | of newer versions of clang. The place of the ^ is from the beginning. */
static bool is_caret(span line, size_t *at) {
    size_t i = 0;
    bool found = false;
    while (i < line.length && line.text[i] == ' ') i++;
    if (i < line.length && line.text[i] == '|') i++;
    for (; i < line.length; i++) {
        if (line.text[i] == '^' && !found) {
            *at = i;
            found = true;
        } else if (line.text[i] != ' ' && line.text[i] != '\t' && line.text[i] != '~' && line.text[i] != '^') {
            return false;
        }
    }
    return found;
}

static bool is_word(char c) { return isalnum((unsigned char)c) || c == '_'; }

/* Parts of words do not count. */
static bool is_there(span token, span line, size_t i) {
    size_t end = i + token.length;
    if (end > line.length || memcmp(line.text + i, token.text, token.length) != 0) return false;
    return !is_word(*token.text) ||
           !((i > 0 && is_word(line.text[i - 1])) || (end < line.length && is_word(line.text[end])));
}

/* How often `token` is in the line before `before`. */
static size_t count_of(span token, span line, size_t before) {
    size_t count = 0;
    for (size_t i = 0; i < before && i < line.length; i++) count += is_there(token, line, i);
    return count;
}

/* Where in `own` is what is at `at` in `quoted`, from 1; 0: nobody knows. */
static size_t place_in(span own, span quoted, size_t at) {
    for (size_t i = 0; i < quoted.length; i++) { /* clang's columns are not bytes then */
        if ((unsigned char)quoted.text[i] >= 0x80) return 0;
    }
    if (at == quoted.length) return own.length + 1;
    if (at > quoted.length) return 0;
    span token = {quoted.text + at, 1};
    if (is_word(*token.text)) {
        while (at + token.length < quoted.length && is_word(token.text[token.length])) token.length++;
    }
    size_t before = count_of(token, quoted, at);
    if (*token.text == ' ' || !is_there(token, quoted, at) ||
        count_of(token, quoted, quoted.length) != count_of(token, own, own.length))
        return 0;
    size_t place = 0;
    while (!is_there(token, own, place) || before-- > 0) place++;
    return place + 1;
}

/* The user's line, and below it the caret. */
static void add_quote(mtl_text *out, span prefix, span own, size_t column) {
    mtl_text_add(out, prefix.text, prefix.length);
    mtl_text_add(out, own.text, own.length);
    mtl_text_add_string(out, "\n");
    if (!column) return;
    for (size_t i = 0; i < prefix.length; i++) mtl_text_add(out, prefix.text[i] == '|' ? "|" : " ", 1);
    for (size_t i = 0; i + 1 < column; i++) mtl_text_add(out, own.text[i] == '\t' ? "\t" : " ", 1);
    mtl_text_add_string(out, "^\n");
}

/* A message, up to `end`, where the next one begins. */
static void add_message(mtl_text *out, const heading *h, span first, const char *end) {
    span code = first, prefix = {"", 0};
    size_t at = 0;
    const char *from = behind(first), *rest = from;
    bool found = false;
    while (rest < end && !found) { /* what stands above the caret is quoted */
        span line = line_at(rest);
        found = rest != from && is_caret(line, &at);
        if (!found) code = line;
        rest = behind(line);
    }
    span quoted = code;
    unsigned long number = h->number;
    size_t gutter = found ? strspn(code.text, " 0123456789") : 0; /* " 12 | " */
    bool is_clang = h->column != h->rest;
    if (gutter && gutter + 1 < code.length && code.text[gutter] == '|') {
        number = strtoul(code.text, NULL, 10);
        prefix = (span){code.text, gutter + 2};
        quoted = (span){code.text + prefix.length, code.length - prefix.length};
    } else if (!is_clang) {
        prefix = (span){"  ", 2};
    }
    span own = found ? numbered_line(h->text, number) : (span){NULL, 0};
    while (own.length && isspace((unsigned char)own.text[own.length - 1])) own.length--;
    size_t begin = (size_t)(quoted.text - code.text);
    if (!own.text || are_equal(trimmed(quoted), trimmed(own)) || at < begin) {
        mtl_text_add(out, first.text, (size_t)(end - first.text));
        return;
    }
    size_t column = place_in(own, quoted, at - begin);
    mtl_text_add(out, first.text, h->column);
    if (column && is_clang) mtl_text_format(out, ":%zu", column);
    const char *words = first.text + h->rest;
    mtl_text_add(out, words, (size_t)((is_clang ? from : code.text) - words)); /* NVRTC breaks long ones into lines */
    add_quote(out, prefix, own, column);
    while (is_clang && rest < end && *rest == ' ') rest = behind(line_at(rest)); /* how clang would mend it */
    mtl_text_add(out, rest, (size_t)(end - rest));
}

/* ---- what a compiler does not know ------------------------------------------------------------------------------- */

static unsigned long line_of(const char *text, const char *at) {
    unsigned long line = 1;
    for (; text < at; text++) line += *text == '\n';
    return line;
}

/* Of the tokens that count, those from `i` on: the index of number `n`, from 0. */
static size_t after(const mtl_tokens *tokens, size_t i, int n) {
    while (i < tokens->count && (tokens->token[i].kind == MTL_TOKEN_SPACE || n-- > 0)) i++;
    return i;
}

static bool is_at(const mtl_tokens *tokens, size_t i, int n, const char *text) {
    size_t at = after(tokens, i, n);
    return at < tokens->count && mtl_token_is(&tokens->token[at], text);
}

static void explain_braces(mtl_text *out, const char *name, const char *text, const mtl_tokens *tokens) {
    enum { DEEPEST = 256 };
    const char *open[DEEPEST], *closing = NULL;
    long depth = 0, skipped = 0; /* skipped: in what #else begins, whose braces are those of #if once more */
    for (size_t i = 0; i < tokens->count; i++) {
        const mtl_token *token = &tokens->token[i];
        if (token->directive && mtl_token_is(token, "#")) {
            bool opens = is_at(tokens, i, 1, "if") || is_at(tokens, i, 1, "ifdef") || is_at(tokens, i, 1, "ifndef");
            bool turns = is_at(tokens, i, 1, "else") || is_at(tokens, i, 1, "elif");
            if (skipped) skipped += opens - is_at(tokens, i, 1, "endif");
            else if (turns) skipped = 1;
        }
        if (token->directive || skipped) continue;
        if (mtl_token_is(token, "{")) {
            if (depth >= 0 && depth < DEEPEST) open[depth] = token->text;
            depth++;
        } else if (mtl_token_is(token, "}")) {
            if (--depth < 0 && !closing) closing = token->text;
        }
    }
    if (depth > 0 && depth <= DEEPEST && !closing)
        mtl_text_format(out, "%s:%lu: the braces do not balance: no } closes the { of this line\n", name,
                        line_of(text, open[depth - 1]));
    if (depth < 0)
        mtl_text_format(out, "%s:%lu: the braces do not balance: } closes none\n", name, line_of(text, closing));
}

/* kernel void f(...) { ... } */
static void explain_kernel(mtl_text *out, const char *source, const mtl_tokens *tokens) {
    for (size_t i = 0; i < tokens->count; i++) {
        size_t at = i;
        if (mtl_token_is(&tokens->token[i], "[") && is_at(tokens, i, 1, "[") && is_at(tokens, i, 2, "kernel"))
            at = after(tokens, i, 4);
        else if (!mtl_token_is(&tokens->token[i], "kernel")) continue;
        if (!is_at(tokens, at, 1, "void")) continue;
        mtl_text_format(
            out,
            "source:%lu: source is a kernel's body alone, what stands in the braces of kernel void f(...) {}; "
            "its buffers are input_names and output_names, and functions go into header\n",
            line_of(source, tokens->token[i].text));
        return;
    }
}

/* atomic_fetch_add_explicit(&y[i], ...   with an output y of plain elements */
static void explain_atomics(mtl_text *out, const mtl_definition *definition, const mtl_tokens *tokens) {
    for (size_t i = 0; i < tokens->count && !definition->atomic_outputs; i++) {
        const mtl_token *token = &tokens->token[i];
        if (token->kind != MTL_TOKEN_IDENTIFIER || token->length < 7 || memcmp(token->text, "atomic_", 7) != 0)
            continue;
        if (!is_at(tokens, i, 1, "(")) continue;
        size_t name = after(tokens, i, is_at(tokens, i, 2, "&") ? 3 : 2);
        for (int n = 0; n < definition->output_count && name < tokens->count; n++) {
            if (!mtl_token_is(&tokens->token[name], definition->output_names[n])) continue;
            mtl_text_format(out,
                            "source:%lu: %.*s needs an atomic, and %s is none: outputs are device atomic<T> * with "
                            "atomic_outputs=True alone\n",
                            line_of(definition->source, token->text), (int)token->length, token->text,
                            definition->output_names[n]);
            return;
        }
    }
}

void mtl_explain(mtl_text *out, const mtl_definition *definition, const char *log) {
    mtl_tokens source, header;
    if (!mtl_tokenize(&source, definition->source, strlen(definition->source))) {
        out->failed = true;
        return;
    }
    if (!mtl_tokenize(&header, definition->header, strlen(definition->header))) {
        mtl_tokens_free(&source);
        out->failed = true;
        return;
    }
    explain_kernel(out, definition->source, &source);
    explain_atomics(out, definition, &source);
    explain_braces(out, "header", definition->header, &header);
    explain_braces(out, "source", definition->source, &source);
    mtl_tokens_free(&source);
    mtl_tokens_free(&header);

    while (*log) {
        heading h, next;
        span first = line_at(log);
        const char *end = behind(first);
        bool found = read_heading(&h, definition, first);
        while (found && *end && !read_heading(&next, definition, line_at(end))) end = behind(line_at(end));
        if (found && h.text) add_message(out, &h, first, end);
        else mtl_text_add(out, log, (size_t)(end - log));
        log = end;
    }
}

metalloid_status mtl_does_not_compile(const char *op, const mtl_definition *definition, const mtl_text *hint,
                                      const mtl_text *log) {
    mtl_text text = {.failed = hint->failed || log->failed};
    mtl_text_add_string(&text, mtl_text_string(hint));
    mtl_explain(&text, definition, mtl_text_string(log));
    metalloid_status status = text.failed ? mtl_fail(METALLOID_OUT_OF_MEMORY, "%s: out of memory", op)
                                          : mtl_fail(METALLOID_COMPILE_FAILED, "%s: kernel %s does not compile\n%s", op,
                                                     definition->name, mtl_text_string(&text));
    mtl_text_free(&text);
    return status;
}
